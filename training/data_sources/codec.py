"""Image decoding and encoding: uint8 arrays [H, W, C], C = 1 (grayscale), 3 (RGB) or 4 (RGBA, straight alpha)."""

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
except ImportError:  # for example, no wheel for this platform or Python version
    pyspng = None


# Log message of image readers; None with pyspng, which is an order of magnitude faster than Pillow.
SLOW_DECODER = None if pyspng else "Pillow decodes the images: pyspng, which is faster, is not installed"

PNG_START = 41  # bytes: signature, header chunk, length and name of the next chunk

_DEPTH, _COLOR_TYPE = 24, 25  # byte positions in a PNG
_PNG_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> colour type of the PNG header
_PNG_FORMATS = {1: "L", 3: "RGB", 4: "RGBA"}


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image in any of dnnlib.images.FORMATS to uint8 [H, W, C], applying the EXIF orientation.

    Palettes and CMYK are converted to RGB, any kind of transparency to RGBA, and 16-bit samples to their upper 8 bits.
    Raises BrokenImageError for everything else, such as 32-bit samples or more than PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
    with open_image(data) as image:
        mode, size = _mode(image), image.size
        image.load()
        if image.size != size:  # happens for corrupt HEIC files
            found, declared = ("{}x{}".format(*pair) for pair in (image.size, size))
            raise BrokenImageError(f"its size {found} differs from {declared} in its header")
        turn = TURNS.get(orientation_of(image))
        image = _with_8_bits(image)
        if turn is not None:
            image = image.transpose(turn)
        data = (image if image.mode == mode else image.convert(mode)).tobytes()
        return np.frombuffer(data, np.uint8).reshape(image.height, image.width, len(mode))


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """Convert uint8 [H, W, C] to a Pillow image of mode L, RGB or RGBA."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def read_shape(data: bytes) -> tuple[int, int, int]:
    """Read the shape (H, W, C) of the decoded image from the header. Raises BrokenImageError."""
    with open_image(data) as image:
        width, height = image.size
        if orientation_of(image) >= 5:  # rotated by 90 degrees
            width, height = height, width
        return height, width, len(_mode(image))


def is_gray(data: bytes) -> bool:
    """Return whether the header declares grayscale, with or without alpha. Raises BrokenImageError."""
    with open_image(data) as image:
        if image.format == "PNG":  # Pillow reports 16-bit grayscale with alpha as RGBA
            return file_of(image).data[_COLOR_TYPE] in (0, 4)
        return image.mode in ("1", "L", "LA", "La") or _has_16_bit_gray(image)


def _mode(image: Image.Image) -> str:
    """Return the mode to which the image is converted, L, RGB or RGBA, with one letter per channel."""
    if image.mode in ("F", "I", "LAB", "HSV") and not _has_16_bit_gray(image):
        raise BrokenImageError(
            f"pixels of mode {image.mode!r} (32 bits or another colour space): convert the image to grayscale or RGB "
            "with 8 or 16 bits"
        )
    if image.has_transparency_data:
        return "RGBA"
    return "L" if image.mode in ("1", "L") or _has_16_bit_gray(image) else "RGB"


def _has_16_bit_gray(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Reduce 9- to 16-bit samples to their upper 8 bits, and convert transparent colours to alpha.

    Transparent colours are compared at full precision, before the reduction.
    """
    file = file_of(image)
    if _has_16_bit_gray(image):
        values = np.asarray(image).astype(np.uint16)
        colors = (values >> (file.bits - 8)).astype(np.uint8)
    elif image.format == "PNG" and image.mode == "RGB" and file.data[_DEPTH] == 16 and "transparency" in image.info:
        colors = np.asarray(image)
        values = colors.astype(np.uint16) << 8 | _low_bytes(file.data)
    elif image.format == "PNG" and image.mode == "L" and file.data[_DEPTH] < 8:
        colors = np.asarray(image)
        values = colors // (255 // (2 ** file.data[_DEPTH] - 1))  # undo the scaling to 8 bits
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
    """Return the lower 8 bits of the pixels of a 16-bit RGB PNG, by making Pillow decode the PNG in LSB order."""
    with open_image(data) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # type: ignore[attr-defined]
        return np.asarray(image)


def decode_as(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image that is expected to have `shape` (H, W, C); the result has the actual shape of the image.

    If pyspng is installed, it decodes plain 8-bit PNGs whose header declares that shape (6 us for an uncompressed 32x32
    image, 71 us with Pillow).
    """
    if pyspng is None or not _is_plain_png(data, shape):
        return decode_image(data)
    try:
        return pyspng.load(data, format=_PNG_FORMATS[shape[2]]).reshape(shape)
    except RuntimeError as error:
        raise BrokenImageError(str(error)) from error


def _is_plain_png(data: bytes, shape: tuple[int, int, int]) -> bool:
    """Return whether `data` is a PNG of `shape` without an EXIF orientation or transparency chunk anywhere."""
    if not _has_plain_header(data, shape):
        return False
    only_pixels = PNG_START + int.from_bytes(data[PNG_START - 8 : PNG_START - 4]) + 16  # size with only these chunks
    if len(data) == only_pixels and data[PNG_START - 4 : PNG_START] == b"IDAT":
        return True
    return not any(name == b"tRNS" or is_exif(data, name, start) for name, start, _ in png_chunks(data))


def starts_as_plain_png(start: bytes, shape: tuple[int, int, int]) -> bool:
    """Return whether the first PNG_START bytes belong to a PNG of `shape` without orientation and transparency.

    The pixel data must directly follow the header; orientation and transparency chunks would precede the pixel data.
    """
    return _has_plain_header(start, shape) and start[37:PNG_START] == b"IDAT"


def _has_plain_header(data: bytes, shape: tuple[int, int, int]) -> bool:
    """Return whether `data` starts as a PNG of `shape` with 8 bits per channel, no palette and no interlacing."""
    H, W, C = shape
    header = struct.pack(">IIBBBBB", W, H, 8, _PNG_COLOR_TYPES.get(C, 255), 0, 0, 0)
    return data[:8] == PNG_SIGNATURE and data[12:29] == b"IHDR" + header


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C] as an uncompressed PNG, which decodes three times as fast as a compressed PNG."""
    H, W, C = pixels.shape
    rows = np.zeros((H, 1 + W * C), dtype=np.uint8)  # each row starts with its filter type, 0 = none
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
