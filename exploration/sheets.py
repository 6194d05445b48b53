"""Sheets: pictures in rows and columns with captions, and maps drawn over an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

CAPTION = 14  # pixels of height for a line of the default font
MIN_TILE = 96


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (..., C) of 1, 3 or 4 channels -> (..., 3); transparency shows white."""
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Repeat the pixels of (H, W, ...) until the longer side has at least MIN_TILE."""
    factor = -(-MIN_TILE // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Draw weights (h, w) over an image (H, W, 3): 0 and less dark, the largest white, through red and yellow."""
    H, W, _ = image.shape
    rows, columns = np.arange(H) * weights.shape[0] // H, np.arange(W) * weights.shape[1] // W
    heat = np.clip(weights / max(weights.max(), 1e-12), 0, 1)[rows][:, columns]
    colors = np.clip(3 * heat[:, :, None] - [0, 1, 2], 0, 1)
    return (0.35 * image + 0.65 * 255 * colors).astype(np.uint8)


def marked(image: np.ndarray, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    """Frame the pixel (x, y) of what was an image of `size` (height, width) before it was enlarged, in cyan."""
    factor = image.shape[0] // size[0]
    picture = Image.fromarray(image)
    corners = [x * factor - 2, y * factor - 2, (x + 1) * factor + 1, (y + 1) * factor + 1]
    ImageDraw.Draw(picture).rectangle(corners, outline=(0, 255, 255), width=2)
    return np.array(picture)


def sheet(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str] = ()) -> np.ndarray:
    """Put tiles (H, W, 3) of one size into rows, with 2 pixels between them and a caption above each column."""
    H, W, _ = rows[0][0].shape
    top = CAPTION if captions else 0
    width, height = len(rows[0]) * (W + 2) - 2, top + len(rows) * (H + 2) - 2
    canvas = Image.new("RGB", (width, height), "white")
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (c * (W + 2), top + r * (H + 2)))
    for c, caption in enumerate(captions):
        ImageDraw.Draw(canvas).text((c * (W + 2) + 2, 1), caption, fill="black")
    return np.array(canvas)
