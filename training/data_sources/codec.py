"""Bytes <-> pixels. Images are uint8 arrays [H, W, C] with C = 1 (grayscale), 3 (RGB) or 4 (RGBA, straight alpha)."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

from dnnlib.image_files import PNG_SIGNATURE, BrokenImageError, is_exif, png_chunks
from dnnlib.images import TURNS, file_of, open_image, orientation_of

try:
    import pyspng
except ImportError:  # no wheel for this platform or Python, say
    pyspng = None


# For the log where images are read; None with pyspng, which is an order of magnitude faster.
SLOW_DECODER = None if pyspng else "Pillow decodes the images: pyspng, which is faster, is not installed"

PNG_START = 41  # bytes: signature, header chunk, length and name of the next one

_DEPTH, _COLOR_TYPE = 24, 25  # places in a PNG
_PNG_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> colour type of the PNG header
_PNG_FORMATS = {1: "L", 3: "RGB", 4: "RGBA"}


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image of any of dnnlib.images.FORMATS to uint8 [H, W, C], turned upright as its EXIF orientation says.

    Palettes and CMYK become RGB, transparency of any kind becomes RGBA, of 16 bits the higher 8 remain. Raises
    BrokenImageError for everything else, such as samples of 32 bits or images of more than PIL.Image.MAX_IMAGE_PIXELS.
    """
    with open_image(data) as image:
        mode, size = _mode(image), image.size
        image.load()
        if image.size != size:  # of damaged HEIC files
            raise BrokenImageError(f"pixels of another size than the {size[0]}x{size[1]} of its header")
        turn = TURNS.get(orientation_of(image))
        image = _with_8_bits(image)
        if turn is not None:
            image = image.transpose(turn)
        data = (image if image.mode == mode else image.convert(mode)).tobytes()
        return np.frombuffer(data, np.uint8).reshape(image.height, image.width, len(mode))


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """Return uint8 [H, W, C] as an image of Pillow's: L, RGB or RGBA."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def read_shape(data: bytes) -> tuple[int, int, int]:
    """Return the (H, W, C) that `decode_image` would give, from the header. Raises BrokenImageError."""
    with open_image(data) as image:
        width, height = image.size
        if orientation_of(image) >= 5:  # turned by 90 degrees
            width, height = height, width
        return height, width, len(_mode(image))


def is_gray(data: bytes) -> bool:
    """Tell from the header whether an image is stored as grayscale, with or without alpha. Raises BrokenImageError."""
    with open_image(data) as image:
        if image.format == "PNG":  # whose 16-bit grayscale with alpha Pillow has as RGBA
            return file_of(image).data[_COLOR_TYPE] in (0, 4)
        return image.mode in ("1", "L", "LA", "La") or _has_16_bit_gray(image)


def _mode(image: Image.Image) -> str:
    """L, RGB or RGBA: what the image is converted to; a letter for each channel."""
    if image.mode in ("F", "I", "LAB", "HSV") and not _has_16_bit_gray(image):
        raise BrokenImageError(
            f"pixels of the kind {image.mode!r}, with 32 bits or in other colours: convert it to grayscale or RGB of 8 "
            "or 16 bits"
        )
    if image.has_transparency_data:
        return "RGBA"
    return "L" if image.mode in ("1", "L") or _has_16_bit_gray(image) else "RGB"


def _has_16_bit_gray(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Reduce 9 to 16 bits to the higher 8; transparent colours, which count in full, become alpha."""
    file = file_of(image)
    if _has_16_bit_gray(image):
        values = np.asarray(image).astype(np.uint16)
        colors = (values >> (file.bits - 8)).astype(np.uint8)
    elif image.format == "PNG" and image.mode == "RGB" and file.data[_DEPTH] == 16 and "transparency" in image.info:
        colors = np.asarray(image)
        values = colors.astype(np.uint16) << 8 | _low_bytes(file.data)
    elif image.format == "PNG" and image.mode == "L" and file.data[_DEPTH] < 8:  # 1 or 3 is white in the file
        colors = np.asarray(image)
        values = colors // (255 // (2 ** file.data[_DEPTH] - 1))
    elif file.is_negative:
        colors = values = np.asarray(image.convert("L"))
    else:
        return image
    if file.is_negative:
        colors = 255 - colors
    if (transparent := image.info.get("transparency")) is None:
        return Image.fromarray(colors)
    is_opaque = values.reshape(*colors.shape[:2], -1) != transparent
    return Image.fromarray(np.dstack([colors, np.where(is_opaque.any(axis=2), 255, 0).astype(np.uint8)]))


def _low_bytes(data: bytes) -> np.ndarray:
    """The lower 8 bits of the pixels of a PNG with 16-bit RGB: what Pillow takes for the higher ones in LSB order."""
    with open_image(data) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # type: ignore[attr-defined]
        return np.asarray(image)


def decode_as(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image that should have `shape` (H, W, C); the result has the shape that the image really has.

    A plain 8-bit PNG whose header promises that shape is decoded by pyspng where that is installed (6 us for an
    uncompressed 32x32 image, 71 us with Pillow).
    """
    if pyspng is None or not _is_plain_png(data, shape):
        return decode_image(data)
    try:
        return pyspng.load(data, format=_PNG_FORMATS[shape[2]]).reshape(shape)
    except RuntimeError as error:
        raise BrokenImageError(str(error)) from error


def _is_plain_png(data: bytes, shape: tuple[int, int, int]) -> bool:
    """Whether data are a PNG of `shape` that nothing turns, wherever that stands, or makes transparent."""
    if not _has_plain_header(data, shape):
        return False
    pixels_alone = PNG_START + int.from_bytes(data[PNG_START - 8 : PNG_START - 4]) + 16  # to the end, as of encode_png
    if len(data) == pixels_alone and data[PNG_START - 4 : PNG_START] == b"IDAT":
        return True
    return not any(name == b"tRNS" or is_exif(data, name, start) for name, start, _ in png_chunks(data))


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
    return _png_header(H, W, C) + _png_chunk(b"IDAT", zlib.compress(rows.data, 0)) + _PNG_END


@lru_cache(16)
def _png_header(H: int, W: int, C: int) -> bytes:
    header = struct.pack(">IIBBBBB", W, H, 8, _PNG_COLOR_TYPES[C], 0, 0, 0)
    return PNG_SIGNATURE + _png_chunk(b"IHDR", header)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return b"".join((struct.pack(">I", len(content)), name, content, struct.pack(">I", checksum)))


_PNG_END = _png_chunk(b"IEND", b"")
