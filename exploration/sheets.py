"""Contact sheets of images with captions, and heat maps drawn over an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_TILE = 96
GAP = 2  # pixels between tiles
FRAME_GAP = 10  # pixels between the header row and column of a sheet and the rest


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 (..., C) with 1, 3 or 4 channels to RGB (..., 3); alpha is blended onto white."""
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def upscale_factor(size: Sequence[int], min_side: int) -> int:
    """Return the integer factor that brings the longer side of (height, width) to at least `min_side` pixels."""
    return -(-min_side // max(size))


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Upscale (H, W, ...) by an integer factor, until the longer side is at least MIN_TILE."""
    factor = upscale_factor(pixels.shape[:2], MIN_TILE)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def tiles_of(images: Tensor) -> list[np.ndarray]:
    """Convert uint8 images (n, C, h, w) to RGB tiles (H, W, 3)."""
    return [enlarged(to_rgb(pixels)) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Draw a heat map of weights (h, w) over an image (H, W, 3): dark for 0 and below, then red, yellow, white."""
    H, W, _ = image.shape
    rows, columns = np.arange(H) * weights.shape[0] // H, np.arange(W) * weights.shape[1] // W
    heat = np.clip(weights / max(weights.max(), 1e-12), 0, 1)[rows][:, columns]
    colors = np.clip(3 * heat[:, :, None] - [0, 1, 2], 0, 1)
    return (0.35 * image + 0.65 * 255 * colors).astype(np.uint8)


def marked(image: np.ndarray, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    """Draw a cyan frame around pixel (x, y) of an upscaled image; `size` is its original (height, width)."""
    factor = image.shape[0] // size[0]
    canvas = Image.fromarray(image)
    corners = [x * factor - 2, y * factor - 2, (x + 1) * factor + 1, (y + 1) * factor + 1]
    ImageDraw.Draw(canvas).rectangle(corners, outline=(0, 255, 255), width=2)
    return np.array(canvas)


def sheet(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str] = (), *, has_frame: bool = False) -> np.ndarray:
    """Arrange tiles (H, W, 3) of equal size in rows on white, with a centred caption above each column.

    With `has_frame`, a wider gap separates the first row and the first column from the rest.
    """
    H, W, _ = rows[0][0].shape
    size = _text_size(captions, H, W) if captions else 0
    top = math.ceil(1.4 * size)
    apart = FRAME_GAP - GAP if has_frame else 0
    xs = [c * (W + GAP) + apart * (c > 0) for c in range(len(rows[0]))]
    ys = [top + r * (H + GAP) + apart * (r > 0) for r in range(len(rows))]
    canvas = Image.new("RGB", (xs[-1] + W, ys[-1] + H), "white")
    for y, row in zip(ys, rows, strict=True):
        for x, tile in zip(xs, row, strict=True):
            canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
    for x, caption in zip(xs, captions, strict=False):
        anchor = (x + W / 2, top - 0.35 * size)  # centre of the baseline
        ImageDraw.Draw(canvas).text(anchor, caption, fill="black", font_size=size, anchor="ms")
    return np.array(canvas)


def _text_size(captions: Sequence[str], height: int, width: int) -> float:
    """Return the font size: an eighth of the longer side, or smaller if a caption would exceed the width."""
    measure = ImageFont.load_default(100)
    widest = max(measure.getlength(caption) / 100 for caption in captions)  # at size 1
    return min(max(height, width) / 8, width / widest)
