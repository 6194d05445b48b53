"""Image files built byte by byte, where Pillow cannot write them or would not write them so."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

ORDERS = {"<": b"II*\0", ">": b"MM\0*"}


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    rows: list[bytes], width: int, bits: int, color_type: int, before: bytes = b"", after: bytes = b"", lace: int = 0
) -> bytes:
    """Make a PNG of packed rows, with chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, lace)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [png_chunk(b"IHDR", header), before, png_chunk(b"IDAT", pixels), after, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def packed(values: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Pack samples [H, n] of 1, 2, 4, 8, 12 or 16 bits into rows, the first one in the highest bits."""
    if bits == 16:
        return [row.astype(f"{order}u2").tobytes() for row in values]
    places = np.arange(bits)[::-1]
    flags = (values[:, :, None] >> places & 1).reshape(len(values), -1)
    return [row.tobytes() for row in np.packbits(flags.astype(np.uint8), axis=1)]


def tiff(
    rows: list[bytes], width: int, tags: dict[int, tuple[int, list[int]]], order: str = "<", next_page: int = 0
) -> bytes:
    """Make an uncompressed TIFF of one strip. `tags`: number -> type (1 byte, 3 short, 4 long) and values, in addition."""
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
    place = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}{' BsHI'[kind]}", *numbers)
        if len(content) > 4:
            value = struct.pack(f"{order}I", place + len(values))
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
    lines = [bytes([n - 1]) + row.tobytes() for plane in planes for row in plane]  # n bytes as they are
    return head + b"\0\1" + struct.pack(f">{C * H}H", *map(len, lines)) + b"".join(lines)


def icon(*pictures: tuple[int, int, int, bytes]) -> bytes:
    """Make an ICO file of pictures: width, height, bits per pixel, and a PNG or a bitmap with its mask."""
    place = 6 + 16 * len(pictures)
    entries = b""
    for width, height, bits, data in pictures:
        entries += struct.pack("<BBBBHHII", width % 256, height % 256, 0, 0, 1, bits, len(data), place)
        place += len(data)
    return struct.pack("<HHH", 0, 1, len(pictures)) + entries + b"".join(data for *_, data in pictures)


def bitmap_of_icon(pixels: np.ndarray, mask: np.ndarray | None = None) -> bytes:
    """Make the bitmap of an icon: pixels uint8 [H, W, 3 or 4], and a mask [H, W] of what is transparent."""
    H, W, C = pixels.shape
    head = struct.pack("<IiiHHIIiiII", 40, W, 2 * H, 1, 8 * C, 0, 0, 0, 0, 0, 0)
    mask = np.zeros((H, W), bool) if mask is None else mask
    order = [2, 1, 0, 3][:C]
    rows = b"".join(row[:, order].tobytes() + bytes(-W * C % 4) for row in pixels[::-1])
    bits = b"".join(row.tobytes() + bytes(-len(row) % 4) for row in np.packbits(mask[::-1], axis=1))
    return head + rows + bits


def exif(orientation: int, order: str = "<") -> bytes:
    """Make EXIF data of an orientation alone, which are a TIFF file without an image."""
    return ORDERS[order] + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Add segments to a JPEG, before its own."""
    added = (bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments)
    return b"".join([data[:2], *added, data[2:]])


def claims(count: int, order: str = "<") -> bytes:
    """Make EXIF data of `count` tags whose values are the same 60,000 bytes."""
    place = 8 + 2 + 12 * count + 4
    tags = (struct.pack(f"{order}HHII", 1000 + k, 7, 60_000, place) for k in range(count))
    return ORDERS[order] + struct.pack(f"{order}IH", 8, count) + b"".join(tags) + bytes(4) + bytes(60_000)
