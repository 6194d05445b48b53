"""Image files, built byte by byte, that Pillow cannot write or writes differently."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

ORDERS = {"<": b"II*\0", ">": b"MM\0*"}


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    rows: list[bytes], width: int, bits: int, color_type: int, before: bytes = b"", after: bytes = b"", lace: int = 0
) -> bytes:
    """Make a PNG of packed rows, with chunks before and after the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, lace)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [png_chunk(b"IHDR", header), before, png_chunk(b"IDAT", pixels), after, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def packed(values: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Pack samples [H, n] of 1, 2, 4, 8, 12 or 16 bits into rows, most significant bits first."""
    if bits == 16:
        return [row.astype(f"{order}u2").tobytes() for row in values]
    shifts = np.arange(bits)[::-1]
    flags = (values[:, :, None] >> shifts & 1).reshape(len(values), -1)
    return [row.tobytes() for row in np.packbits(flags.astype(np.uint8), axis=1)]


def tiff(
    rows: list[bytes], width: int, tags: dict[int, tuple[int, list[int]]], order: str = "<", next_page: int = 0
) -> bytes:
    """Make an uncompressed one-strip TIFF. `tags`: further tags, number -> type (1 byte, 3 short, 4 long), values."""
    pixels = b"".join(rows)
    tags = {
        256: (4, [width]),
        257: (4, [len(rows)]),
        259: (3, [1]),
        273: (4, [8]),
        278: (4, [len(rows)]),
        279: (4, [len(pixels)]),
    } | tags
    pixels += bytes(len(pixels) % 2)
    offset = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}{' BsHI'[kind]}", *numbers)
        if len(content) > 4:
            value = struct.pack(f"{order}I", offset + len(values))
            values += content
        else:
            value = content.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + value
    head = ORDERS[order] + struct.pack(f"{order}I", 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", next_page) + values


def psd(planes: np.ndarray, mode: int, bits: int = 8, size: tuple[int, int] | None = None, runs: bool = False) -> bytes:
    """Make a PSD file of planes uint8 [C, H, n] without layers. `mode`: 0 bitmap, 1 gray, 3 RGB, 4 CMYK."""
    C, H, n = planes.shape
    height, width = size or (H, n)
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, C, height, width, bits, mode) + bytes(12)
    if not runs:
        return head + b"\0\0" + planes.tobytes()
    lines = [bytes([n - 1]) + row.tobytes() for plane in planes for row in plane]  # n literal bytes
    return head + b"\0\1" + struct.pack(f">{C * H}H", *map(len, lines)) + b"".join(lines)


def icon(*images: tuple[int, int, int, bytes]) -> bytes:
    """Make an ICO file of images: width, height, bits per pixel, and a PNG or a bitmap with a mask."""
    offset = 6 + 16 * len(images)
    entries = b""
    for width, height, bits, data in images:
        entries += struct.pack("<BBBBHHII", width % 256, height % 256, 0, 0, 1, bits, len(data), offset)
        offset += len(data)
    return struct.pack("<HHH", 0, 1, len(images)) + entries + b"".join(data for *_, data in images)


def bitmap_of_icon(pixels: np.ndarray, mask: np.ndarray | None = None) -> bytes:
    """Make the bitmap of an icon: pixels uint8 [H, W, 3 or 4], and a mask [H, W] of the transparent pixels."""
    H, W, C = pixels.shape
    head = struct.pack("<IiiHHIIiiII", 40, W, 2 * H, 1, 8 * C, 0, 0, 0, 0, 0, 0)
    mask = np.zeros((H, W), bool) if mask is None else mask
    order = [2, 1, 0, 3][:C]
    rows = b"".join(row[:, order].tobytes() + bytes(-W * C % 4) for row in pixels[::-1])
    bits = b"".join(row.tobytes() + bytes(-len(row) % 4) for row in np.packbits(mask[::-1], axis=1))
    return head + rows + bits


def exif(orientation: int, order: str = "<") -> bytes:
    """Make EXIF data that contain only an orientation: a TIFF file without an image."""
    return ORDERS[order] + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Add segments to a JPEG, before the existing segments."""
    added = (bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments)
    return b"".join([data[:2], *added, data[2:]])


def claims(count: int, order: str = "<") -> bytes:
    """Make EXIF data of `count` tags that all refer to the same 60,000 bytes."""
    offset = 8 + 2 + 12 * count + 4
    tags = (struct.pack(f"{order}HHII", 1000 + k, 7, 60_000, offset) for k in range(count))
    return ORDERS[order] + struct.pack(f"{order}IH", 8, count) + b"".join(tags) + bytes(4) + bytes(60_000)


def jpeg2000(
    width: int, height: int, tile: int = 0, *, blocks: int = 4, layers: int = 1, precincts: bytes = b""
) -> bytes:
    """Make a grayscale JPEG 2000 without pixels. `blocks`: log2 of the code block side, minus 2."""

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">HH", marker, len(content) + 2) + content

    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, tile or width, tile or height, 0, 0, 1) + b"\7\1\1"
    style = struct.pack(">BBHBBBBBB", bool(precincts), 0, layers, 0, 5, blocks, blocks, 0, 1) + precincts
    head = b"\xff\x4f" + segment(0xFF51, size) + segment(0xFF52, style) + segment(0xFF5C, bytes([64] * 17))
    return head + struct.pack(">HHHIBB", 0xFF90, 10, 0, 34, 0, 1) + b"\xff\x93" + bytes(20) + b"\xff\xd9"


def overlapping_tiff() -> bytes:
    """Make a TIFF in which many tags that decoders read refer to the same megabyte."""
    tags = [*range(256, 350), *range(529, 533)]
    entries = b"".join(struct.pack("<HHII", tag, 7, 1 << 20, 8) for tag in tags)
    return (
        b"II*\0" + struct.pack("<I", 8 + (1 << 20)) + bytes(1 << 20) + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def iso_with_claims(kind: str) -> bytes:
    """Make an AVIF or HEIC file with EXIF data that claim more bytes than the file has."""
    metadata = Image.Exif()
    metadata[0x10E] = "x" * 100_000
    data = encoded(Image.new("RGB", (64, 64)), kind, exif=metadata.tobytes())
    start, false = data.index(b"MM\0*"), claims(3000, ">")
    return data[:start] + false + data[start + len(false) :]


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """Make a PNG file without pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
