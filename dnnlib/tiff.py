"""Reduction of TIFF files, and of EXIF data in TIFF format, to the directory entries that decoding needs.

Decoders read all values of all directories, and many values may refer to the same bytes.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

ORIENTATION = 0x112
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_SIZES, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, COLOR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES = 317, 320, 322, 323, 324, 325
INKS, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES = 332, 338, 339, 347
YCBCR_WEIGHTS, YCBCR_SUBSAMPLING, YCBCR_POSITION, BLACK_AND_WHITE = 529, 530, 531, 532
FAX3_OPTIONS, FAX4_OPTIONS = 292, 293
SUBFILE_TYPE, DNG_VERSION = 254, 50706
NEEDED = {
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_SIZES),
    *(PLANAR, FAX3_OPTIONS, FAX4_OPTIONS, PREDICTOR, COLOR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES),
    *(INKS, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, YCBCR_WEIGHTS, YCBCR_SUBSAMPLING, YCBCR_POSITION),
    BLACK_AND_WHITE,
}
# None, CCITT RLE, Group 3 and 4 fax, LZW, JPEG, deflate (two codes), PackBits, Zstandard. LZMA can need GiBs of memory.
COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000}
MAX_SAMPLES = 6  # samples per pixel
NEGATIVE, YCBCR, LAB = 0, 6, 8  # photometric interpretations; NEGATIVE is WhiteIsZero

_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # field type -> size in bytes
_INTEGERS = {1: "B", 3: "H", 4: "I"}


class TiffError(ValueError):
    """Corrupt or unsupported file; the message states the problem and the remedy."""


class Entry(NamedTuple):
    """Directory entry. `value` has four bytes: the values themselves, or their offset."""

    kind: int
    number: int
    value: bytes

    @property
    def size(self) -> int:
        return _UNITS[self.kind] * self.number


class Tiff(NamedTuple):
    """TIFF file with one directory and without orientation.

    bits: bits per sample.
    is_negative: the original is 16-bit grayscale with zero as white. `data` declares zero as black, which is how
        decoders interpret it.
    """

    data: bytes
    bits: int
    is_negative: bool


def byte_order(data: bytes) -> str | None:
    """Return '<' or '>' according to the first bytes of a TIFF file; None for other data."""
    return {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])


def orientation_of_exif(data: bytes) -> int:
    """Return the orientation, 1 to 8, in EXIF data or a TIFF file; 1 (upright) if unspecified."""
    order = byte_order(data)
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for tag, _, _, value in struct.iter_unpack(f"{order}HHIHxx", data[start + 2 : start + 2 + 12 * count]):
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # truncated
        pass
    return 1


def size_of_values(data: bytes, start: int) -> int:
    """Return the total size in bytes that the values of the first directory claim, for a TIFF file at `start`."""
    order = byte_order(data[start : start + 4])
    total = 0
    try:
        (place,) = struct.unpack_from(f"{order}I", data, start + 4)
        (count,) = struct.unpack_from(f"{order}H", data, start + place)
        place += start + 2
        for _, kind, number in struct.iter_unpack(f"{order}HHI4x", data[place : place + 12 * count]):
            total += _UNITS.get(kind, 0) * number
    except struct.error:  # truncated
        pass
    return total


def first_page(data: bytes, max_pixels: int) -> Tiff:
    """Return the first image of a TIFF file as a separate file. Raises TiffError.

    The strips or tiles together are at most as large as the file, and each has at most `max_pixels` pixels.
    """
    order = byte_order(data)
    if order is None:
        raise TiffError("BigTIFF: save it as an ordinary TIFF")
    return _Page(data, order).standalone(max_pixels)


class _Page:
    """First directory of a TIFF file."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order = data, order
        try:
            (start,) = struct.unpack_from(f"{order}I", data, 4)
            (count,) = struct.unpack_from(f"{order}H", data, start)
        except struct.error:
            raise TiffError("a truncated TIFF") from None
        directory = data[start + 2 : start + 2 + 12 * count]
        self.entries: dict[int, Entry] = {}
        for tag, kind, number, value in struct.iter_unpack(f"{order}HHI4s", directory[: len(directory) // 12 * 12]):
            if tag in (*NEEDED, SUBFILE_TYPE, DNG_VERSION) and kind in _UNITS:
                self.entries.setdefault(tag, Entry(kind, number, value))
        if sum(entry.size for entry in self.entries.values() if entry.size > 4) > len(data):
            raise TiffError("a TIFF whose entries claim more than the file size")

    def integers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _INTEGERS:
            return default
        content, start = entry.value, 0
        if entry.size > 4:
            content, start = self.data, struct.unpack(f"{self.order}I", entry.value)[0]
        try:
            return struct.unpack_from(f"{self.order}{entry.number}{_INTEGERS[entry.kind]}", content, start)
        except struct.error:
            raise TiffError("a truncated TIFF") from None

    def integer(self, tag: int, default: int) -> int:
        return (*self.integers(tag), default)[0]

    def standalone(self, max_pixels: int) -> Tiff:
        bits = self.integers(BITS) or (1,)
        compression, photometric = self.integer(COMPRESSION, 1), self.integer(PHOTOMETRIC, 0)
        self._check_kind(bits, compression, photometric)
        self._check_pieces(compression, max_pixels)
        is_negative = photometric == NEGATIVE and bits == (16,)
        if is_negative:
            self.entries[PHOTOMETRIC] = Entry(3, 1, struct.pack(f"{self.order}HH", 1, 0))
        entries = sorted((tag, entry) for tag, entry in self.entries.items() if tag in NEEDED)
        directory = b"".join(struct.pack(f"{self.order}HHI4s", tag, *entry) for tag, entry in entries)
        start = len(self.data) + len(self.data) % 2
        parts = [self.data[:4], struct.pack(f"{self.order}I", start), self.data[8:], bytes(len(self.data) % 2)]
        parts += [struct.pack(f"{self.order}H", len(entries)), directory, bytes(4)]
        return Tiff(b"".join(parts), bits[0], is_negative)

    def _check_kind(self, bits: tuple[int, ...], compression: int, photometric: int) -> None:
        if DNG_VERSION in self.entries or self.integer(SUBFILE_TYPE, 0) & 1 or photometric in (32803, 34892):
            raise TiffError("camera raw data or a preview: develop it and save it as PNG, TIFF or JPEG")
        if compression not in COMPRESSIONS:
            raise TiffError(f"a TIFF with compression {compression}: save it with LZW or without compression")
        if photometric == LAB:
            raise TiffError("a TIFF with Lab colours: convert it to RGB")
        if max(bits) > 16 or set(self.integers(SAMPLE_FORMAT)) - {1, 4}:
            raise TiffError("32-bit, signed or float samples: convert it to unsigned 8 or 16 bits")
        if self.integer(SAMPLES, 1) > MAX_SAMPLES:
            raise TiffError(f"a TIFF with {self.integer(SAMPLES, 1)} channels: save it as RGB or RGBA")
        is_raw = compression == 1
        if is_raw and photometric == YCBCR and self.integers(YCBCR_SUBSAMPLING, (2, 2)) != (1, 1):
            raise TiffError("a TIFF with uncompressed, subsampled YCbCr: convert it to RGB")
        if is_raw and self.integer(PLANAR, 1) == 2 and max(bits) != 8:
            raise TiffError(f"an uncompressed TIFF with separate {max(bits)}-bit planes: save it with LZW")

    def _check_pieces(self, compression: int, max_pixels: int) -> None:
        """Raise TiffError unless the strips or tiles cover the image and are in total at most as large as the file."""
        width, height = self.integer(WIDTH, 0), self.integer(HEIGHT, 0)
        if STRIP_OFFSETS in self.entries:
            across, down = width, min(self.integer(ROWS_PER_STRIP, height), height)
            offsets, sizes, sizes_tag = self.integers(STRIP_OFFSETS), self.integers(STRIP_SIZES), STRIP_SIZES
        else:
            across, down = self.integer(TILE_WIDTH, 0), self.integer(TILE_HEIGHT, 0)
            offsets, sizes, sizes_tag = self.integers(TILE_OFFSETS), self.integers(TILE_SIZES), TILE_SIZES
        if min(width, height, across, down) < 1 or across * down > max_pixels:
            raise TiffError(f"a TIFF of {width}x{height} pixels in strips or tiles of {across}x{down}")
        planes = self.integer(SAMPLES, 1) if self.integer(PLANAR, 1) == 2 else 1
        if len(offsets) != math.ceil(width / across) * math.ceil(height / down) * planes:
            raise TiffError(f"a TIFF with {len(offsets)} strips or tiles, which do not match {width}x{height} pixels")
        if compression == 1:
            return
        if not sizes and len(offsets) == 1:
            sizes = (max(len(self.data) - offsets[0], 0),)
            self.entries[sizes_tag] = Entry(4, 1, struct.pack(f"{self.order}I", sizes[0]))
        if len(sizes) != len(offsets) or sum(sizes) > len(self.data):
            raise TiffError("a TIFF whose strips or tiles have more bytes than the file, or no sizes")
