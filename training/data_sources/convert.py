"""Conversion of an item of a source to the PNG of a dataset: channels, padding, crop, resize, encoding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dnnlib.config import UserError
from dnnlib.image_files import BrokenImageError
from training.data_sources.codec import decode_image, encode_png, is_gray, to_pillow
from training.data_sources.files import read_image_file
from training.data_sources.items import Item

TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-letterbox")
LETTERBOXED = ("center-crop-wide", "center-crop-letterbox")
MAX_SIDE = 8000  # maximum --width and --height; the uncompressed RGBA PNG is within the limits of the reader
RESIZE_FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class TooSmallError(Exception):
    """Image smaller than the target of center-crop-wide, which drops such images."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Pixel operations, in order: padding by `pad` zero pixels on each side, transform, resize.

    `width` and `height` are both given or both None. The transforms:

    None                    the whole image, resized to width x height regardless of its aspect ratio
    center-crop             the largest centred rectangle with the aspect ratio width:height, resized
    center-crop-wide        round(width * H / W) centred rows of a W x H image, at full width, resized, letterboxed
                            (StyleGAN2-ADA's geometry for LSUN Car)
    center-crop-letterbox   center-crop, letterboxed

    Letterboxed images are centred in a width x width square of zeros (black, or transparent in RGBA).
    """

    width: int | None = None
    height: int | None = None
    transform: str | None = None
    resize_filter: str = "lanczos"
    channels: int = 3
    pad: int = 0

    def __post_init__(self) -> None:
        if (self.width is None) != (self.height is None):
            raise UserError("--width and --height must be used together: give both or neither")
        if self.width is None and self.transform:
            raise UserError(f"--transform={self.transform} needs an output size: give --width and --height")
        if self.width and self.height and max(self.width, self.height) > MAX_SIDE:
            raise UserError(
                f"--width={self.width} --height={self.height}: images of a dataset have at most {MAX_SIDE} pixels per "
                "side: choose a smaller size"
            )
        if self.width and self.height and self.transform in LETTERBOXED and self.height > self.width:
            raise UserError(
                f"--height={self.height} exceeds --width={self.width}: --transform={self.transform} places wide images "
                "in a square of side --width"
            )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Map uint8 [H, W, C] to [height, width, channels]. Raises TooSmallError for an image to drop."""
        pixels = force_channels(pixels, self.channels)
        if self.pad:
            pixels = np.pad(pixels, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        if self.width is None or self.height is None:
            return pixels
        if self.transform == "center-crop-wide":
            pixels = center_rows(pixels, self.width, self.height)
        elif self.transform:
            pixels = center_crop(pixels, self.width, self.height)
        pixels = resize(pixels, self.width, self.height, self.resize_filter)
        return letterbox(pixels) if self.transform in LETTERBOXED else pixels


def center_rows(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the central round(width * H / W) rows of an image [H, W, C], as StyleGAN2-ADA does.

    The aspect ratio of the result is not width:height unless W = width. Raises TooSmallError if W < width or the result
    has fewer than `height` rows.
    """
    H, W, _ = pixels.shape
    rows = round(width * H / W)
    if width > W or height > rows:
        raise TooSmallError(f"{W}x{H} pixels")
    top = (H - rows) // 2
    return pixels[top : top + rows]


def letterbox(pixels: np.ndarray) -> np.ndarray:
    """Pad [H, W, C] to [W, W, C] with rows of zeros above and below, one more below if W - H is odd."""
    H, W, _ = pixels.shape
    top = (W - H) // 2
    return np.pad(pixels, ((top, W - H - top), (0, 0), (0, 0)))


def center_crop(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Crop the largest centred rectangle with the aspect ratio width:height, rounded to whole pixels."""
    H, W, _ = pixels.shape
    if W * height > H * width:
        crop_w, crop_h = max(round(H * width / height), 1), H
    else:
        crop_w, crop_h = W, max(round(W * height / width), 1)
    top, left = (H - crop_h) // 2, (W - crop_w) // 2
    return pixels[top : top + crop_h, left : left + crop_w]


def resize(pixels: np.ndarray, width: int, height: int, resize_filter: str) -> np.ndarray:
    """Resize with antialiasing, in RGBA with premultiplied alpha so that invisible colours do not bleed into others."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = to_pillow(pixels)
    resized = np.asarray(image.resize((width, height), RESIZE_FILTERS[resize_filter]))
    return resized.reshape(height, width, -1)


def force_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert to `channels`, with loss if necessary: RGBA is composited over white, colour becomes luma (ITU-R 601)."""
    fitted = fit_channels(pixels, channels)
    if fitted is not None:
        return fitted
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:].astype(np.float32) / 255
        pixels = np.rint(pixels[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def fit_channels(pixels: np.ndarray, channels: int) -> np.ndarray | None:
    """Convert without loss (gray to RGB and back, opaque alpha added or removed), or return None."""
    if pixels.shape[2] == channels:
        return pixels
    if pixels.shape[2] == 4:
        return fit_channels(pixels[:, :, :3], channels) if (pixels[:, :, 3] == 255).all() else None
    if channels == 1:
        return pixels[:, :, :1] if (pixels == pixels[:, :, :1]).all() else None
    colors = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return colors if channels == 3 else np.dstack([colors, np.full(pixels.shape[:2], 255, np.uint8)])


class WrongSizeError(Exception):
    """Image that differs in size from the others although no output size is specified."""


class Converted(NamedTuple):
    """Converted image of a dataset.

    png: content of the PNG file, or the error that excludes the image.
    size: (width, height) of the original, None for an unreadable image.
    """

    png: bytes | BrokenImageError | TooSmallError | WrongSizeError
    size: tuple[int, int] | None


def load(item: Item) -> np.ndarray:
    """Return the pixels uint8 [H, W, C] of an item. Raises BrokenImageError."""
    content = item.content
    if isinstance(content, np.ndarray):
        return content
    return decode_image(encoded(item))


def encoded(item: Item) -> bytes:
    """Return the encoded image of an item whose content is not an array. Raises BrokenImageError."""
    content = item.content
    if isinstance(content, BrokenImageError):
        raise content
    assert not isinstance(content, np.ndarray)
    return read_image_file(content) if isinstance(content, Path) else content


def is_all_gray(items: Iterable[Item]) -> bool:
    """Return whether all readable images are stored as grayscale; stop at the first image that is not."""
    found = None
    for item in items:
        try:
            found = item.content.shape[2] == 1 if isinstance(item.content, np.ndarray) else is_gray(encoded(item))
        except BrokenImageError:
            continue
        if not found:
            return False
    return bool(found)


def convert_items(items: list[Item], conversion: Conversion, shape: tuple[int, int, int]) -> list[Converted]:
    """Convert a chunk of items to PNG files of `shape` (H, W, C)."""
    return [_convert(item, conversion, shape) for item in items]


def _convert(item: Item, conversion: Conversion, shape: tuple[int, int, int]) -> Converted:
    size = None
    try:
        pixels = load(item)
        size = pixels.shape[1], pixels.shape[0]
        pixels = conversion(pixels)
        if pixels.shape != shape:
            raise WrongSizeError(f"{size[0]}x{size[1]}")
        return Converted(encode_png(pixels), size)
    except (BrokenImageError, TooSmallError, WrongSizeError) as error:
        return Converted(error, size)
