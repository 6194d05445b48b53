"""Contact sheets of images with captions, and heat maps drawn over an image."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_TILE, MAX_TILE = 96, 256  # longer side of a tile in pixels: smaller images are enlarged, larger ones reduced
MAX_WIDTH = 3072  # pixels of the tiles in a row; with more tiles than this allows, they become smaller
LEAST_TILE = 32  # longer side in pixels to which tiles are reduced to keep MAX_WIDTH
GAP = 2  # pixels between tiles
FRAME_GAP = 10  # pixels between the header row and column of a sheet and the rest
MARGIN = 16  # pixels around the parts of `arranged`
TEXT_SIZE, TITLE_SIZE = 13, 16  # font sizes in pixels; text grows with the tiles, but is never smaller
INK = (32, 32, 32)


class Text(NamedTuple):
    """A line of text at a point (x, y); Pillow's `anchor` says which point, e.g. "ms" the middle of the baseline."""

    text: str
    point: tuple[float, float]
    size: int
    anchor: str


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 (..., C) with 1, 3 or 4 channels to RGB (..., 3); alpha is blended onto white."""
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def upscale_factor(size: Sequence[int], min_side: int) -> int:
    """Return the integer factor that brings the longer side of (height, width) to at least `min_side` pixels."""
    return -(-min_side // max(size))


def tile_of(pixels: np.ndarray, min_side: int = MIN_TILE, max_side: int = MAX_TILE) -> np.ndarray:
    """Resize uint8 (H, W, 3) by an integer factor: up until the longer side is at least `min_side` pixels, or down.

    The longer side is at most `max_side`. Reduction averages pixels.
    """
    longer = max(pixels.shape[:2])
    factor = min(upscale_factor(pixels.shape[:2], min_side), max_side // longer)
    if factor:
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).reduce(-(-longer // max_side)))


def largest_side(columns: int) -> int:
    """Return the longer side in pixels at which tiles of a sheet of this many columns keep MAX_WIDTH."""
    return min(max(MAX_WIDTH // columns, LEAST_TILE), MAX_TILE)


def tiles_of(images: Tensor, columns: int) -> list[np.ndarray]:
    """Convert uint8 images (n, C, h, w) to RGB tiles (H, W, 3) for a sheet of this many columns."""
    largest = largest_side(columns)
    return [tile_of(to_rgb(pixels), max_side=largest) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]


def overlay(image: np.ndarray, weights: np.ndarray, peak: float | None = None) -> np.ndarray:
    """Draw a heat map of weights (h, w) over an image (H, W, 3): dark for 0 and below, then red, yellow, white.

    White is `peak`, by default the largest weight. A pixel that covers several weights shows the largest. The image
    is gray, so that its colours are not mistaken for weights.
    """
    H, W, _ = image.shape
    h, w = weights.shape
    weights = np.maximum.reduceat(weights, np.arange(H) * h // H, axis=0)
    weights = np.maximum.reduceat(weights, np.arange(W) * w // W, axis=1)  # (H, W)
    heat = np.clip(weights / max(weights.max() if peak is None else peak, 1e-12), 0, 1)
    colors = np.clip(3 * heat[:, :, None] - [0, 1, 2], 0, 1)
    return (0.35 * image.mean(axis=2, keepdims=True) + 0.65 * 255 * colors).astype(np.uint8)


def marked(image: np.ndarray, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    """Draw a cyan frame with a black edge around pixel (x, y) of an image whose (height, width) was `size`."""
    H, W, _ = image.shape
    left, top = x * W // size[1], y * H // size[0]
    right, bottom = max((x + 1) * W // size[1], left + 3), max((y + 1) * H // size[0], top + 3)
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle([left - 3, top - 3, right + 2, bottom + 2], outline=(0, 0, 0))
    draw.rectangle([left - 2, top - 2, right + 1, bottom + 1], outline=(0, 255, 255), width=2)
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
    title: str = "",
    peaks: Sequence[float | None] = (),
    has_frame: bool = False,
) -> np.ndarray:
    """Arrange tiles (H, W, 3) of equal size in rows on white; the last row may be shorter.

    A caption is centred above each column, which is widened to its text, a row caption is left of each row, and the
    title is above all. The colour scale of `overlay` is right of each row whose peak is not None. With `has_frame`, a
    wider gap separates the first row and the first column from the rest.
    """
    H, W, _ = rows[0][0].shape
    if any(len(row) > len(rows[0]) for row in rows):
        raise ValueError("a row has more tiles than the first")
    size, apart = text_size(H, W), FRAME_GAP - GAP if has_frame else 0
    cell, line = column_width(W, captions, size), max(H, 3 * size) if peaks else H  # a scale needs three lines of text
    top = math.ceil(1.4 * size) if captions else 0
    left = math.ceil(widest(row_captions, size) + size) if row_captions else 0
    xs = [left + c * (cell + GAP) + apart * (c > 0) for c in range(len(rows[0]))]
    ys = [top + r * (line + GAP) + apart * (r > 0) for r in range(len(rows))]
    tiles = [
        (tile, (x + (cell - W) // 2, y))
        for y, row in zip(ys, rows, strict=True)
        for x, tile in zip(xs, row, strict=False)
    ]
    texts = []
    if captions:
        texts += [Text(c, (x + cell / 2, top - 0.35 * size), size, "ms") for x, c in zip(xs, captions, strict=True)]
    if row_captions:
        texts += [Text(c, (left - size / 2, y + H / 2), size, "rm") for y, c in zip(ys, row_captions, strict=True)]
    drawn = drawing((xs[-1] + cell, ys[-1] + line), tiles, texts)
    if peaks:
        scales = {y: peak for y, peak in zip(ys, peaks, strict=True) if peak is not None}
        drawn = np.concatenate([drawn, color_scales(scales, len(drawn), line, size)], axis=1)
    return titled(drawn, title, size + TITLE_SIZE - TEXT_SIZE, size / 2 if row_captions else 0) if title else drawn


def color_scales(peaks: Mapping[int, float], height: int, H: int, size: int) -> np.ndarray:
    """Draw colour scales of H pixels at heights y -> peak of the scale, with the numbers 0 and peak: (height, W, 3)."""
    numbers = {y: f"{peak:.2g}" for y, peak in peaks.items()}
    inset = round(0.6 * size)  # keeps the numbers of neighbouring rows apart
    length = H - 2 * inset
    bar = overlay(np.full((length, size, 3), 128, np.uint8), np.linspace(1, 0, length)[:, None])
    x = 2.25 * size  # of the numbers; the bar begins at 0.75 size
    tiles = [(bar, (round(0.75 * size), y + inset)) for y in numbers]
    texts = [Text(number, (x, y + inset), size, "lm") for y, number in numbers.items()]
    texts += [Text("0", (x, y + H - inset), size, "lm") for y in numbers]
    return drawing((math.ceil(x + widest(numbers.values(), size) + size / 2), height), tiles, texts)


def captioned(tile: np.ndarray, caption: str, size: int, width: int = 0) -> np.ndarray:
    """Return a tile (H, W, 3) above a caption of a font size, both centred on white of at least `width` pixels."""
    H, W, _ = tile.shape
    width = max(column_width(W, [caption], size), width)
    text = Text(caption, (width / 2, H + size), size, "ms")
    return drawing((width, H + math.ceil(1.5 * size)), [(tile, ((width - W) // 2, 0))], [text])


def captioned_rows(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
    """Return tiles (H, W, 3) above their captions, all of the width of the widest caption."""
    H, W, _ = rows[0][0].shape
    size = text_size(H, W)
    width = column_width(W, [text for row in captions for text in row], size)
    return [
        [captioned(tile, text, size, width) for tile, text in zip(*row, strict=True)]
        for row in zip(rows, captions, strict=True)
    ]


def titled(pixels: np.ndarray, title: str, size: int = TITLE_SIZE, indent: float = 0) -> np.ndarray:
    """Return an image (H, W, 3) below a title of a font size, which begins `indent` pixels from the left edge."""
    H, W, _ = pixels.shape
    top = 2 * size
    width = max(W, math.ceil(indent + text_width(title, size) + size / 2))
    return drawing((width, top + H), [(pixels, (0, top))], [Text(title, (indent, 1.4 * size), size, "ls")])


def labelled_grid(images: Tensor, captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """Draw uint8 images (n, C, h, w) in rows, each above its caption."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    (named,) = captioned_rows([tiles_of(images, columns)], [captions])
    return sheet(in_rows(named, columns))


def in_rows(tiles: Sequence[np.ndarray], columns: int | None = None) -> list[list[np.ndarray]]:
    """Split tiles into rows, by default of ceil(sqrt(n)) tiles."""
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    return [list(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]


def arranged(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Arrange images (H, W, 3) of any size in rows on white, with a margin around each."""
    tiles, y = [], MARGIN
    for row in rows:
        x = MARGIN
        for image in row:
            tiles.append((image, (x, y)))
            x += image.shape[1] + MARGIN
        y += max(map(len, row)) + MARGIN
    return drawing((max(x + image.shape[1] for image, (x, _) in tiles) + MARGIN, y), tiles)


def drawing(
    size: tuple[int, int], tiles: Iterable[tuple[np.ndarray, tuple[int, int]]], texts: Iterable[Text] = ()
) -> np.ndarray:
    """Draw tiles (H, W, 3) with their upper left corners (x, y), and texts, on white of a (width, height): RGB."""
    canvas = Image.new("RGB", size, "white")
    for tile, corner in tiles:
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), corner)
    draw = ImageDraw.Draw(canvas)
    for text, point, font_size, anchor in texts:
        draw.text(point, text, fill=INK, font=_font(font_size), anchor=anchor)
    return np.array(canvas)


def text_size(H: int, W: int) -> int:
    """Return the font size of the captions of H x W tiles."""
    return max(TEXT_SIZE, max(H, W) // 16)


def column_width(W: int, captions: Sequence[str], size: int) -> int:
    """Return the width of a column of W pixels wide tiles in which its captions of a font size fit."""
    return max(W, math.ceil(widest(captions, size) + size / 2)) if captions else W


def widest(texts: Iterable[str], size: int) -> float:
    """Return the width of the widest text in pixels, or 0 without texts."""
    return max((text_width(text, size) for text in texts), default=0)


def text_width(text: str, size: int) -> float:
    """Return the width of a line of text in pixels."""
    return _font(size).getlength(text)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
