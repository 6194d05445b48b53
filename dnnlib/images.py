"""The one place where image files are opened: formats whose decoders start no program, within bounds."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of others, Pillow runs Ghostscript for EPS
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_IMAGE_BYTES = 1 << 28  # of one encoded image; a larger size in an archive's directory is damage or a trap
MAX_SCANS = 64  # of a progressive JPEG: each goes over all pixels, however few bytes it has; encoders write about 10
MAX_EXIF_SEGMENTS = 2  # of a JPEG, of 64 KB each: in k of them, k^2 times 90 MB of values that overlap have room

FREE_PIXELS, PIXELS_PER_BYTE = 1 << 24, 10_000  # an image has so many at most; deflate has 8000 to a byte
ORIENTATION = 0x112
TURNS = {  # by the orientation that EXIF tells, to stand upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"  # after a byte 255
_EXIF = b"Exif\0\0"
# Heads of the segments before the first scan, which Pillow and libjpeg read alike; and of any segment as libjpeg finds
# them: in coded pixels a byte 255 is followed by 0 or by the number of a restart.
_HEADER = re.compile(rb"\xff+([\xc0-\xc7\xc9-\xcf\xda-\xef\xfe])")
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")


class BrokenImageError(Exception):
    """The bytes are not an image that can be used; the message is the reason, without the file's name."""


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open a PNG, JPEG, WebP or BMP lazily; whatever goes wrong with it inside raises BrokenImageError.

    So does an image of 16 bits per channel, of more than PIL.Image.MAX_IMAGE_PIXELS, and a JPEG that would take time or
    memory out of proportion to its size.
    """
    if data[:8] == PNG_SIGNATURE and len(data) > 24 and data[24] == 16:
        raise BrokenImageError("16 bits per channel: convert it to 8 bits first")
    if data[:3] == _JPEG_SIGNATURE:
        _check_jpeg(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max(FREE_PIXELS, PIXELS_PER_BYTE * len(data)):
                    raise BrokenImageError(f"{image.width}x{image.height} pixels in {len(data)} bytes")
                yield image
    except BrokenImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImageError("not a PNG, JPEG, WebP or BMP image") from None
    except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged data
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def _check_jpeg(data: bytes) -> None:
    """Refuse JPEGs that take disproportionate decode time. What segments hold, and what follows the image, is free."""
    position = 2
    while (match := _HEADER.match(data, position)) and match[1] != _START_OF_SCAN:
        position = _end_of_segment(data, match)
    if data.count(_EXIF, 0, position if match else len(data)) > MAX_EXIF_SEGMENTS:
        raise BrokenImageError("EXIF data of more than 128 KB: save it without them")
    num_scans = 0
    while (match := _MARKER.search(data, position)) and match[1] != _END_OF_IMAGE:
        position = _end_of_segment(data, match)
        num_scans += match[1] == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            raise BrokenImageError(f"a JPEG of more than {MAX_SCANS} scans: save it again")


def _end_of_segment(data: bytes, head: re.Match[bytes]) -> int:
    return head.end() + max(2, int.from_bytes(data[head.end() : head.end() + 2]))


def orientation_of(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, that a file's EXIF data give; 1, upright, where they do not.

    Of a PNG they may come after the pixels: load it first. Pillow would read all tags, whose values may overlap.
    """
    exif = image.info.get("exif", b"").removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for tag, _, _, value in struct.iter_unpack(f"{order}HHIHxx", exif[start + 2 : start + 2 + 12 * count]):
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # cut off
        pass
    return 1


def remedy(suffix: str) -> str:
    return ""
