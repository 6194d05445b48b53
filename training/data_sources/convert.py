"""From an item of a source to the PNG of a data set: channels, padding, crop, resize, encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dnnlib.config import UserError
from dnnlib.images import BrokenImageError
from training.data_sources.codec import decode_image, encode_png
from training.data_sources.files import read_image_file
from training.data_sources.sources import Item

TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-letterbox")
LETTERBOXED = ("center-crop-wide", "center-crop-letterbox")
RESIZE_FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class TooSmallError(Exception):
    """The image is smaller than the target, and center-crop-wide drops such images."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Pixel operations: `pad` pixels of 0 on each side, the transform, the resize.

    `width` and `height` are both given or both None; `channels` None keeps the channels. The transforms:

    None                    the whole image, resized to width x height, whatever its aspect ratio
    center-crop             the largest centred rectangle of the aspect ratio width:height, resized
    center-crop-wide        round(width * H / W) centred rows of an image of W x H, at full width, resized, letterboxed:
                            StyleGAN2-ADA's geometry for LSUN Car
    center-crop-letterbox   center-crop, letterboxed

    Letterboxed: in the middle of a width x width square that is otherwise 0 (black; in RGBA transparent).
    """

    width: int | None = None
    height: int | None = None
    transform: str | None = None
    resize_filter: str = "lanczos"
    channels: int | None = None
    pad: int = 0

    def __post_init__(self) -> None:
        if (self.width is None) != (self.height is None):
            raise UserError("--width and --height belong together: give both or neither")
        if self.width is None and self.transform:
            raise UserError(f"--transform={self.transform} needs the size of the result: give --width and --height")
        if self.width and self.height and self.transform in LETTERBOXED and self.height > self.width:
            raise UserError(
                f"--height={self.height} is more than --width={self.width}: --transform={self.transform} lays wide "
                "images into a square of side --width"
            )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> [height, width, channels]. Raises TooSmallError for an image that is to be dropped."""
        if self.channels:
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
    """The round(width * H / W) rows in the middle of an image [H, W, C].

    The aspect ratio of the result is not width:height unless W is `width`. Raises TooSmallError where W < width, or
    there are fewer rows than `height`.
    """
    H, W, _ = pixels.shape
    rows = round(width * H / W)
    if width > W or height > rows:
        raise TooSmallError(f"{W}x{H} pixels")
    top = (H - rows) // 2
    return pixels[top : top + rows]


def letterbox(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [W, W, C]: bars of 0 above and below, the lower one a row higher if W - H is odd."""
    H, W, _ = pixels.shape
    top = (W - H) // 2
    return np.pad(pixels, ((top, W - H - top), (0, 0), (0, 0)))


def center_crop(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest centred rectangle whose sides are as width : height, to the nearest pixel."""
    H, W, _ = pixels.shape
    if W * height > H * width:
        crop_w, crop_h = max(round(H * width / height), 1), H
    else:
        crop_w, crop_h = W, max(round(W * height / width), 1)
    top, left = (H - crop_h) // 2, (W - crop_w) // 2
    return pixels[top : top + crop_h, left : left + crop_w]


def resize(pixels: np.ndarray, width: int, height: int, resize_filter: str) -> np.ndarray:
    """Antialiased resampling, of RGBA with premultiplied alpha so that hidden colours do not bleed out."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize((width, height), RESIZE_FILTERS[resize_filter]))
    return resized.reshape(height, width, -1)


def force_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert by losing what has to be lost: RGBA is laid over white, colour becomes luma (ITU-R 601)."""
    fitted = fit_channels(pixels, channels)
    if fitted is not None:
        return fitted
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:].astype(np.float32) / 255
        pixels = np.rint(pixels[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def fit_channels(pixels: np.ndarray, channels: int) -> np.ndarray | None:
    """Convert if nothing is lost, else None: gray to RGB and back, opaque alpha added and dropped."""
    if pixels.shape[2] == channels:
        return pixels
    if pixels.shape[2] == 4:
        return fit_channels(pixels[:, :, :3], channels) if (pixels[:, :, 3] == 255).all() else None
    if channels == 1:
        return pixels[:, :, :1] if (pixels == pixels[:, :, :1]).all() else None
    colors = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return colors if channels == 3 else np.dstack([colors, np.full(pixels.shape[:2], 255, np.uint8)])


Converted = bytes | BrokenImageError | TooSmallError  # a PNG file, or why there is none


class Expected(NamedTuple):
    """What the first image of the source decides.

    shape: (H, W, C) of all images of the set.
    first: its name, for messages.
    is_copied: it came as pixels and is at most padded, so that the images of this source only have to be encoded.
    """

    shape: tuple[int, int, int]
    first: str
    is_copied: bool


def load(item: Item) -> np.ndarray:
    """Pixels uint8 [H, W, C] of an item. Raises BrokenImageError."""
    content = item.content
    if isinstance(content, BrokenImageError):
        raise content
    if isinstance(content, np.ndarray):
        return content
    if isinstance(content, Path):
        content = read_image_file(content)
    return decode_image(content)


def convert_items(items: list[Item], conversion: Conversion, expected: Expected) -> list[Converted]:
    """PNG files, or what is wrong, for a chunk of items. Raises UserError for an image that does not fit the others."""
    results: list[Converted] = []
    for item in items:
        try:
            results.append(encode_png(_fit(conversion(load(item)), item.name, expected)))
        except (BrokenImageError, TooSmallError) as error:
            results.append(error)
    return results


def _fit(pixels: np.ndarray, name: str, expected: Expected) -> np.ndarray:
    H, W, C = expected.shape
    fitted = fit_channels(pixels, C)
    if fitted is None:
        raise UserError(
            f"{name!r} has {pixels.shape[2]} channels, but the first image, {expected.first!r}, has {C}: "
            "choose what all should have with --channels=1 (grayscale), 3 (RGB) or 4 (RGBA)"
        )
    if fitted.shape != expected.shape:
        raise UserError(
            f"{name!r} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but the first image, {expected.first!r}, is "
            f"{W}x{H}: give --width and --height, and --transform=center-crop to keep proportions"
        )
    return fitted
