"""Contact sheet of a dataset: evenly spaced images with class, name and size, and statistics of the dataset."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dnnlib.image_files import BrokenImageError
from dnnlib.screen import printable
from dnnlib.util import counted
from training.data_sources.checking import Findings, short_sides
from training.data_sources.codec import decode_image, to_pillow
from training.data_sources.dataset_json import MAX_CLASS, DatasetJson
from training.data_sources.files import FileStore
from training.data_sources.sizes import CHANNEL_NAMES, describe_sizes

MAX_TILES = 64
COLUMNS = 8

_SIDE = 128  # side of the image of a tile, in pixels
_GAP = 20
_MARGIN = 40
_HEADER = 92
_MIN_COLUMNS = 5  # required by the header
_LINE_HEIGHT = 18  # text below images
_CHECKER = 8  # side of the squares of the checkerboard
_BAR_WIDTH, _BAR_HEIGHT = 34, 44

_PAPER, _INK, _FAINT, _LINE, _ACCENT = "#ffffff", "#1c1e21", "#6b7078", "#d9dce0", "#4c78a8"
_LIGHT, _DARK = 255, 224  # gray levels of the checkerboard

# Fallback system fonts for characters that Pillow's built-in font lacks.
_OTHER_FONTS = (
    *("NotoSans-Regular.ttf", "DejaVuSans.ttf", "arial.ttf", "Arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf"),
)
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


class Tile(NamedTuple):
    """Image of the sheet, uint8 [H, W, C], and the text below it."""

    pixels: np.ndarray
    name: str
    class_name: str | None = None
    class_number: int | None = None


def spread(count: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced integers from range(count)."""
    chosen = min(count, limit)
    return [k * count // chosen for k in range(chosen)]


def choose_tiles(positions: Sequence[int], classes: Mapping[int, int]) -> list[int]:
    """Choose up to MAX_TILES evenly spaced image positions, grouped by class and balanced over the classes.

    `classes` maps positions to class numbers; positions without a class come last.
    """
    members: dict[int, list[int]] = {}
    for position in positions:
        members.setdefault(classes.get(position, MAX_CLASS + 1), []).append(position)
    numbers = sorted(members)
    numbers = [numbers[k] for k in spread(len(numbers), MAX_TILES)]
    shares = dict.fromkeys(numbers, 0)
    remaining = min(MAX_TILES, sum(len(members[number]) for number in numbers))
    while remaining:
        for number in numbers:
            if remaining and shares[number] < len(members[number]):
                shares[number] += 1
                remaining -= 1
    return [members[number][k] for number in numbers for k in spread(len(members[number]), shares[number])]


def make_sheet(store: FileStore, content: DatasetJson, findings: Findings) -> Image.Image:
    """Draw the contact sheet of a dataset with up to MAX_TILES readable images."""
    labels = content.labels or {}
    found = {position: labels.get(findings.names[position]) for position in findings.readable.tolist()}
    classes = {position: label for position, label in found.items() if isinstance(label, int)}
    names = dict(enumerate(content.class_names or ()))
    tiles = []
    for position in tqdm(choose_tiles(list(found), classes), "Sheet", unit="images", disable=None, leave=False):
        name, number = findings.names[position], classes.get(position)
        class_name = "no label" if classes else None
        if number is not None:
            class_name = names.get(number) or f"class {number}"
        with suppress(BrokenImageError):  # changed since the inspection
            tiles.append(Tile(decode_image(store.read(position)), name, class_name, number))
    bars, is_original = short_sides(findings, content)
    subject = "originals" if is_original else "images"
    return draw_sheet(store.path.resolve().name, _facts(findings, content, classes), tiles, bars, subject)


def _facts(findings: Findings, content: DatasetJson, classes: Mapping[int, int]) -> list[str]:
    """Return the lines of the header."""
    channels = " and ".join(CHANNEL_NAMES[kind] for kind, _ in findings.channels.most_common())
    sizes = f"{describe_sizes(findings.sizes)}, {channels}" if findings.sizes else "no readable images"
    if classes:
        labels = f"{max(max(classes.values()) + 1, len(content.class_names or ())):,} classes"
    else:
        labels = "without labels" if content.labels is None else "labels are vectors"
    count = len(findings.readable)
    part = f"; {MAX_TILES} shown, evenly spread" if count > MAX_TILES else ""
    return [f"{counted(len(findings.names), 'image')}, {labels}{part}", sizes]


def draw_sheet(
    title: str, facts: Sequence[str], tiles: Sequence[Tile], bars: Mapping[int, int], subject: str
) -> Image.Image:
    """Draw tiles in rows of COLUMNS below a header with title, facts and a histogram.

    `bars` has the number of images by shorter side; `subject` is "images" or "originals".
    """
    columns = max(min(len(tiles), COLUMNS), _MIN_COLUMNS)
    with_size = len({tile.pixels.shape[:2] for tile in tiles}) > 1
    drawn = [(_fitted(tile.pixels), _caption(tile, with_size=with_size)) for tile in tiles]
    rows = [drawn[k : k + columns] for k in range(0, len(drawn), columns)]
    heights = [max(image.height for image, _ in row) for row in rows]  # without captions
    caption = 8 + _LINE_HEIGHT * max((len(lines) for _, lines in drawn), default=0)
    width = 2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP
    height = 2 * _MARGIN + _HEADER + sum(heights) + len(rows) * (caption + _GAP) - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    max_width = width - 2 * _MARGIN
    if len(bars) > 1:
        max_width -= _draw_bars(draw, width - _MARGIN, bars, f"Shorter side of the {subject}, px") + _GAP
    _write(draw, (_MARGIN, _MARGIN - 6), title, 26, _INK, max_width, "dataset")
    for line, fact in enumerate(facts):
        _write(draw, (_MARGIN, _MARGIN + 30 + 20 * line), fact, 14, _FAINT, max_width, "")
    base = _MARGIN + _HEADER
    for row, row_height in zip(rows, heights, strict=True):
        base += row_height
        for column, (image, lines) in enumerate(row):
            x, y = _MARGIN + column * (_SIDE + _GAP), base - image.height
            sheet.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + image.width, base), outline=_LINE)
            for line, (text, fallback) in enumerate(lines):
                size, color = (12, _FAINT) if line else (14, _INK)
                _write(draw, (x, base + 7 + _LINE_HEIGHT * line), text, size, color, _SIDE, fallback)
        base += caption + _GAP
    return sheet


def _caption(tile: Tile, *, with_size: bool) -> list[tuple[str, str]]:
    """Return the lines below an image, each with a fallback text for characters that no font has."""
    height, width = tile.pixels.shape[:2]
    name = (PurePosixPath(tile.name).stem, "image")
    lines = [name] if tile.class_name is None else [(tile.class_name, f"class {tile.class_number}"), name]
    return [lines[0], (f"{width}x{height}", "")] if with_size else lines


def _fitted(pixels: np.ndarray) -> Image.Image:
    """Fit an image into a tile: enlarge small images by an integer factor, and show transparency on a checkerboard."""
    image = to_pillow(pixels)
    longer = max(image.size)
    if longer > _SIDE:
        size = (max(round(image.width * _SIDE / longer), 1), max(round(image.height * _SIDE / longer), 1))
        image = image.resize(size, Image.Resampling.LANCZOS)
    else:
        factor = _SIDE // longer
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.mode != "RGBA":
        return image.convert("RGB")
    rows, columns = (np.arange(side) // _CHECKER for side in (image.height, image.width))
    squares = np.where((rows[:, None] + columns) % 2, _DARK, _LIGHT).astype(np.uint8)
    board = Image.fromarray(squares).convert("RGBA")
    return Image.alpha_composite(board, image).convert("RGB")


def _draw_bars(draw: ImageDraw.ImageDraw, right: int, bars: Mapping[int, int], title: str) -> int:
    """Draw a histogram with the right edge at `right`, and return the width of the histogram."""
    width = max(len(bars) * _BAR_WIDTH, round(draw.textlength(title, _font(12))))
    left, base = right - width, _MARGIN + 14 + _BAR_HEIGHT
    _write(draw, (left, _MARGIN - 6), title, 12, _FAINT, width, "")
    maximum = max(bars.values())
    for k, (side, count) in enumerate(bars.items()):
        x = left + k * _BAR_WIDTH
        bar_height = max(round(_BAR_HEIGHT * count / maximum), 1)
        draw.rectangle((x, base - bar_height, x + _BAR_WIDTH - 6, base - 1), fill=_ACCENT)
        draw.text((x + _BAR_WIDTH // 2 - 3, base + 4), str(side), _FAINT, _font(11), anchor="ma")
    draw.line((left, base, left + len(bars) * _BAR_WIDTH - 6, base), fill=_LINE)
    return width


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, color: str, max_width: int, fallback: str
) -> None:
    """Write a line at its upper left corner, shortened to `max_width` pixels.

    If no font has all characters of `text`, accents are removed; if this is not sufficient, `fallback` is written.
    """
    text = printable(text)
    font = _font_for(text, size)
    if font is None:
        text = unicodedata.normalize("NFKD", text)
        text = "".join(letter for letter in text if not unicodedata.combining(letter))
        font = _font(size)
        text = text if _has_glyphs(font, text) else fallback
    if draw.textlength(text, font) > max_width:
        text = _shortened(draw, text, font, max_width)
    draw.text(corner, text, color, font)


def _shortened(draw: ImageDraw.ImageDraw, text: str, font: _Font, max_width: int) -> str:
    """Shorten a text to `max_width` pixels by replacing the middle with an ellipsis."""
    for kept in range(len(text) - 1, 0, -1):
        shorter = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if draw.textlength(shorter, font) <= max_width:
            return shorter
    return "…"


@cache
def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


@cache
def _other_fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for name in _OTHER_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return fonts


def _font_for(text: str, size: int) -> _Font | None:
    """Return a font that has all characters of a text, or None."""
    return next((font for font in (_font(size), *_other_fonts(size)) if _has_glyphs(font, text)), None)


def _has_glyphs(font: _Font, text: str) -> bool:
    missing = bytes(font.getmask("\uffff"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in {*text})
