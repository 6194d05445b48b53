"""Bytes <-> pixels. Images are uint8 arrays [H, W, C] with C = 1 (grayscale), 3 (RGB) or 4 (RGBA, straight alpha)."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

from dnnlib.images import PNG_SIGNATURE, TURNS, BrokenImageError, open_image, orientation_of

try:
    import pyspng
except ImportError:  # no wheel for this platform or Python, say
    pyspng = None


# For the log where images are read; None with pyspng, which is an order of magnitude faster.
SLOW_DECODER = None if pyspng else "Pillow decodes the images: pyspng, which is faster, is not installed"

PNG_START = 41  # bytes: signature, header chunk, length and name of the next one

_PNG_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> colour type of the PNG header
_PNG_FORMATS = {1: "L", 3: "RGB", 4: "RGBA"}


def decode_image(data: bytes) -> np.ndarray:
    """Decode PNG, JPEG, WebP or BMP to uint8 [H, W, C], turned upright as its EXIF orientation says.

    Palettes become RGB, transparency of any kind becomes RGBA. Raises BrokenImageError for everything else, including
    16 bits per channel and images of more than PIL.Image.MAX_IMAGE_PIXELS.
    """
    with open_image(data) as image:
        image.load()
        return _to_array(image)


def read_shape(data: bytes) -> tuple[int, int, int]:
    """Return the (H, W, C) that `decode_image` would give, from the header. Raises BrokenImageError.

    A PNG is decoded for it, whose orientation may come after the pixels.
    """
    with open_image(data) as image:
        if image.format == "PNG":
            image.load()
        width, height = image.size
        if orientation_of(image) >= 5:  # turned by 90 degrees
            width, height = height, width
        return height, width, len(_mode(image))


def is_gray(data: bytes) -> bool:
    """Whether an image is stored as grayscale, with or without transparency. Raises BrokenImageError."""
    with open_image(data) as image:
        return image.mode in ("1", "L", "LA", "I;16", "I;16B", "I")


def _to_array(image: Image.Image) -> np.ndarray:
    turn = TURNS.get(orientation_of(image))
    mode = _mode(image)
    if turn is not None:
        image = image.transpose(turn)
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _mode(image: Image.Image) -> str:
    """L, RGB or RGBA: what the image is converted to; a letter for each channel."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return "RGBA"
    if image.mode in ("1", "L"):
        return "L"
    if image.mode in ("P", "RGB", "CMYK", "YCbCr"):
        return "RGB"
    raise BrokenImageError(f"pixel format {image.mode!r} has no 8-bit grayscale, RGB or RGBA form")


def decode_as(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image that should have `shape` (H, W, C); the result has the shape that the image really has.

    A plain 8-bit PNG whose header promises that shape is decoded by pyspng where that is installed (6 us for an
    uncompressed 32x32 image, 71 us with Pillow).
    """
    is_plain = _has_plain_header(data, shape) and b"tRNS" not in data[: data.find(b"IDAT")]  # a transparent colour
    if not is_plain or pyspng is None:
        return decode_image(data)
    try:
        return pyspng.load(data, format=_PNG_FORMATS[shape[2]]).reshape(shape)
    except RuntimeError as error:
        raise BrokenImageError(str(error)) from error


def starts_as_plain_png(start: bytes, shape: tuple[int, int, int]) -> bool:
    """Whether the first PNG_START bytes of an image promise a PNG of `shape` that nothing turns or makes transparent.

    Such chunks come between the header and the pixels, where encoders that write none have nothing.
    """
    return _has_plain_header(start, shape) and start[37:PNG_START] == b"IDAT"


def _has_plain_header(data: bytes, shape: tuple[int, int, int]) -> bool:
    """Whether data begin as a PNG of `shape` with 8 bits per channel, neither palette nor interlacing."""
    H, W, C = shape
    header = struct.pack(">IIBBBBB", W, H, 8, _PNG_COLOR_TYPES.get(C, 255), 0, 0, 0)
    return data[:8] == PNG_SIGNATURE and data[12:29] == b"IHDR" + header


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C] as an uncompressed PNG: decoding one costs a third of decoding a compressed one."""
    H, W, C = pixels.shape
    rows = np.zeros((H, 1 + W * C), dtype=np.uint8)  # every row starts with its filter type, 0 = none
    rows[:, 1:] = pixels.reshape(H, W * C)
    header = struct.pack(">IIBBBBB", W, H, 8, _PNG_COLOR_TYPES[C], 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 0)
    return PNG_SIGNATURE + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")


def _png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return b"".join((struct.pack(">I", len(content)), name, content, struct.pack(">I", checksum)))
