"""Contact sheets of images with captions, and heat maps drawn over an image."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_TILE = 96
MAX_ENLARGED = 1024  # images in a grid; a larger grid would take gigabytes
GAP = 2  # pixels between tiles
FRAME_GAP = 10  # pixels between the header row and column of a sheet and the rest
MARGIN = 16  # pixels around the parts of `arranged`
TEXT_SIZE = 13
TITLE_SIZE = 16
INK = (32, 32, 32)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 (..., C) with 1, 3 or 4 channels to RGB (..., 3); alpha is blended onto white."""
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def upscale_factor(size: Sequence[int], min_side: int) -> int:
    """Return the integer factor that brings the longer side of (height, width) to at least `min_side` pixels."""
    return -(-min_side // max(size))


def enlarged(pixels: np.ndarray, min_side: int = MIN_TILE) -> np.ndarray:
    """Upscale (H, W, ...) by an integer factor, until the longer side is at least `min_side` pixels."""
    factor = upscale_factor(pixels.shape[:2], min_side)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def tiles_of(images: Tensor, min_side: int = MIN_TILE) -> list[np.ndarray]:
    """Convert uint8 images (n, C, h, w) to RGB tiles (H, W, 3), enlarged to `min_side`."""
    return [enlarged(to_rgb(pixels), min_side) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]


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


def caption_of(name: str) -> str:
    """Return the caption of an image by its file name: "seed0004" and "4" become "seed 4", others are kept."""
    match = re.fullmatch(r"(?:seed)?(\d+)", name)
    return f"seed {int(match[1])}" if match else name


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str] = (),
    row_captions: Sequence[str] = (),
    *,
    has_frame: bool = False,
) -> np.ndarray:
    """Arrange tiles (H, W, 3) of equal size in rows on white; the last row may be shorter.

    A caption is centred above each column, a row caption left of each row. With `has_frame`, a wider gap separates the
    first row and the first column from the rest.
    """
    H, W, _ = rows[0][0].shape
    if any(len(row) > len(rows[0]) for row in rows):
        raise ValueError("a row has more tiles than the first")
    size = _text_size(captions, (H, W), W)
    top = math.ceil(1.4 * size) if captions else 0
    side_size = _text_size(row_captions, (H, W), 4 * W)
    left = math.ceil(max((_width(caption, side_size) + side_size for caption in row_captions), default=0))
    apart = FRAME_GAP - GAP if has_frame else 0
    xs = [left + c * (W + GAP) + apart * (c > 0) for c in range(len(rows[0]))]
    ys = [top + r * (H + GAP) + apart * (r > 0) for r in range(len(rows))]
    canvas = Image.new("RGB", (xs[-1] + W, ys[-1] + H), "white")
    draw = ImageDraw.Draw(canvas)
    for y, row in zip(ys, rows, strict=True):
        for x, tile in zip(xs, row, strict=False):
            canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
    for x, caption in zip(xs, captions, strict=True) if captions else ():
        anchor = (x + W / 2, top - 0.35 * size)  # centre of the baseline
        draw.text(anchor, caption, fill=INK, font_size=size, anchor="ms")
    for y, caption in zip(ys, row_captions, strict=True) if row_captions else ():
        draw.text((left - side_size / 2, y + H / 2), caption, fill=INK, font_size=side_size, anchor="rm")
    return np.array(canvas)


def captioned(tile: np.ndarray, caption: str, size: float) -> np.ndarray:
    """Return a tile (H, W, 3) above a centred caption of a font size."""
    H, W, _ = tile.shape
    canvas = Image.new("RGB", (W, H + math.ceil(1.5 * size)), "white")
    canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (0, 0))
    ImageDraw.Draw(canvas).text((W / 2, H + size), caption, fill=INK, font_size=size, anchor="ms")
    return np.array(canvas)


def labelled_grid(images: Tensor, captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """Draw uint8 images (n, C, h, w) in rows, each above its caption; up to MAX_ENLARGED images are enlarged."""
    tiles = tiles_of(images, MIN_TILE if len(images) <= MAX_ENLARGED else 1)
    size = _text_size(captions, tiles[0].shape[:2], tiles[0].shape[1])
    named = [captioned(tile, caption, size) for tile, caption in zip(tiles, captions, strict=True)]
    return sheet(in_rows(named, columns))


def in_rows(tiles: Sequence[np.ndarray], columns: int | None = None) -> list[list[np.ndarray]]:
    """Split tiles into rows, by default of ceil(sqrt(n)) tiles."""
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    return [list(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]


def titled(pixels: np.ndarray, title: str) -> np.ndarray:
    """Return an image (H, W, 3) below a title."""
    H, W, _ = pixels.shape
    size = min(TITLE_SIZE, W / max(_width(title, 1), 1e-6))
    canvas = Image.new("RGB", (W, H + 2 * TITLE_SIZE), "white")
    canvas.paste(Image.fromarray(pixels), (0, 2 * TITLE_SIZE))
    ImageDraw.Draw(canvas).text((0, 1.4 * TITLE_SIZE), title, fill=INK, font_size=size, anchor="ls")
    return np.array(canvas)


def arranged(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Arrange images (H, W, 3) of any size in rows on white, with a margin around each."""
    heights = [max(len(image) for image in row) + MARGIN for row in rows]
    width = max(sum(image.shape[1] + MARGIN for image in row) for row in rows)
    canvas = np.full((MARGIN + sum(heights), MARGIN + width, 3), 255, np.uint8)
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        x = MARGIN
        for image in row:
            H, W, _ = image.shape
            canvas[y : y + H, x : x + W] = image
            x += W + MARGIN
        y += height
    return canvas


def _text_size(captions: Sequence[str], tile: tuple[int, int], width: int) -> float:
    """Return the font size of captions for a tile size: TEXT_SIZE or larger, unless a caption would exceed `width`."""
    widest = max((_width(caption, 1) for caption in captions), default=0)
    return min(max(TEXT_SIZE, max(tile) / 12), 0.92 * width / max(widest, 1e-6))


def _width(text: str, size: float) -> float:
    return _font().getlength(text) / 100 * size


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(100)
