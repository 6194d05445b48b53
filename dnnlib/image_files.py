"""Detection of image formats by content, and preparation of image files for the decoder.

Parts of a file that could cost disproportionate time or memory are removed or rejected before decoding: additional
images, directories with overlapping values, large comments.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image

from dnnlib import pnm, tiff

MAX_SCANS = 64  # scans of a progressive JPEG; encoders write about 10; decoding even a short scan visits every pixel
MAX_EXIF_SEGMENTS = 2  # 64 KB segments of a JPEG; k segments can hold k^2 times 90 MB of overlapping values
MAX_PROFILE = 1 << 20  # bytes of EXIF text in a PNG; the rest is ignored
MAX_COMMENTS = 1 << 20  # bytes of comments before the first image of a GIF
MAX_BLOCKS = 1 << 17  # code blocks and precincts of a JPEG 2000; the decoder allocates 400 bytes for each
MAX_LAYERS = 256  # layers of a JPEG 2000
MAX_EXIF_STREAMS = 16  # TIFF signatures (possible EXIF data) in an AVIF or HEIC file

# An image has at most max(FREE_PIXELS, PIXELS_PER_BYTE * size of the file) pixels; deflate reaches 8000 pixels/byte.
FREE_PIXELS, PIXELS_PER_BYTE = 1 << 24, 10_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_START_OF_SCAN, _END_OF_IMAGE, _APP2 = b"\xda", b"\xd9", b"\xe2"  # the byte after 0xff
_EXIF, _LIST = b"Exif\0\0", b"MPF\0"
_RAW_PROFILE = b"Raw profile type exif\0"
# _HEADER matches markers before the first scan, which Pillow and libjpeg parse alike. _MARKER matches any marker as
# libjpeg finds it: in entropy-coded data 0xff is followed by 0 or by a restart marker.
_HEADER = re.compile(rb"\xff+([\xc0-\xc7\xc9-\xcf\xda-\xef\xfe])")
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")

_FREQUENT = {b"\xff\xd8\xff": "JPEG", PNG_SIGNATURE: "PNG"}
_FORMATS = {  # signatures of the other supported formats
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PSD": rb"8BPS",
    "ICO": rb"\0\0\x01\0[^\0]",
    "PPM": rb"P[1-6][\s#]",
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
    "BMP": rb"BM",
}
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_ISO_IMAGES = _AVIF | _HEIC | {b"mif1", b"msf1"}
_EXPORT, _DEVELOP = "export as PNG", "develop, and save as PNG, TIFF or JPEG"
_CONVERT, _REDUCE, _FRAMES = "convert to PNG", "convert to 8 or 16 bits", "extract the frames, e.g. with ffmpeg"
_RAW = (
    ".cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .dng .raf .orf .rw2 .pef .srw .raw .3fr .iiq .x3f .kdc .dcr .mrw .rwl",
    rb"FUJIFILMCCD-RAW|IIR[OS]|IIU\0|II\*\0.{4}CR|....ftypcrx ",
)
_VIDEO = (
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .mts .m2ts",
    rb"....ftyp|....moov|RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01\xba",
)
_OTHERS = (  # unsupported formats: suffixes, signature, name, remedy
    ("", rb"\Z", "an empty file", "copy or download it again"),
    (".eps .ps", rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS document", _EXPORT),
    (".pdf .ai", rb"\s*%PDF", "a PDF document", _EXPORT),
    ("", rb"(?i)\s*(\xef\xbb\xbf)?(<!doctype html|<html)", "a web page", "download the image itself"),
    (".svg .svgz", rb"(?i)\s*(\xef\xbb\xbf)?(<\?xml.*)?(<!--.*)?<svg", "an SVG drawing", _EXPORT),
    (".wmf .emf", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", _EXPORT),
    ("", rb"version https://git-lfs", "a Git LFS pointer", "git lfs pull"),
    (*_RAW, "a camera raw file", _DEVELOP),
    (*_VIDEO, "a video", _FRAMES),
    (".jxl", rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
    (".exr .hdr .pfm", rb"v/1\x01|#\?RADIANCE|P[fF]\n", "a floating-point image", _REDUCE),
    (".xcf", rb"gimp xcf", "a GIMP project", _EXPORT),
    ("", rb"PK\x03\x04|\x1f\x8b", "an archive", "unpack it"),
)
# Unsupported formats without a signature.
_SUFFIXES = {".cdr .kra .psb .odg": _EXPORT, ".jxr .wdp .hdp .dds .qoi .avifs .heics .cur": _CONVERT}
REMEDIES = {
    suffix: remedy
    for suffixes, remedy in [*((suffixes, remedy) for suffixes, _, _, remedy in _OTHERS), *_SUFFIXES.items()]
    for suffix in suffixes.split()
}
_KNOWN = [(re.compile(pattern, re.DOTALL), name) for name, pattern in _FORMATS.items()]
_UNREAD = [(re.compile(pattern, re.DOTALL), name, remedy) for _, pattern, name, remedy in _OTHERS]


class BrokenImageError(Exception):
    """The data is not a usable image; the message is the reason, without the file name."""


class File(NamedTuple):
    """Image file as passed to a decoder.

    kind: Pillow's name of the format.
    orientation: EXIF orientation, 1 to 8; None if the decoder reads it.
    bits: bits per sample of grayscale images with 9 to 16 bits.
    is_negative: zero is white.
    """

    kind: str
    data: bytes
    orientation: int | None = None
    bits: int = 16
    is_negative: bool = False


def recognise(data: bytes) -> str:
    """Return Pillow's name of the format. Raises BrokenImageError, with the format if known, for unsupported data.

    Targa files have no signature; they are recognised by a header that is consistent with the rest of the file.
    """
    for signature, kind in _FREQUENT.items():
        if data.startswith(signature):
            return kind
    for pattern, name, remedy in _UNREAD:
        if pattern.match(data[:1024]) and not _brands(data) & _ISO_IMAGES:
            raise BrokenImageError(f"{name}, which is not supported: {remedy}")
    for pattern, kind in _KNOWN:
        if pattern.match(data):
            return kind
    if brands := _brands(data):
        return "AVIF" if brands & _AVIF and data[8:12] not in _HEIC else "HEIF"
    if _is_targa(data):
        return "TGA"
    raise BrokenImageError("not an image of a supported format")


def prepared(data: bytes) -> File:
    """Return an image file stripped of parts that cost disproportionate time or memory. Raises BrokenImageError."""
    kind = recognise(data)
    if kind == "ICO":
        image = _largest_image(data)
        if image.startswith(PNG_SIGNATURE):
            return prepared(image)
        return File("ICO", image)
    return _PREPARE.get(kind, lambda data: File(kind, data))(data)


def check_pixels(width: int, height: int, data: bytes) -> None:
    """Raise BrokenImageError if the image size exceeds Pillow's limit or is disproportionate to the file size."""
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise BrokenImageError(f"{width}x{height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS}")
    if width * height > max(FREE_PIXELS, PIXELS_PER_BYTE * len(data)):
        raise BrokenImageError(f"{width}x{height} pixels in {len(data)} bytes")


def _brands(data: bytes) -> set[bytes]:
    """Return the brands (content types) of an ISO base media file; the empty set for other files."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4]), 256)
    return {data[8:12], *(data[k : k + 4] for k in range(16, end, 4))}


# --- PNG


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, content start and content end of each chunk of a PNG, up to IEND or corrupt data."""
    position = len(PNG_SIGNATURE)
    while len(head := data[position : position + 8]) == 8 and head[4:] != b"IEND":
        start = position + 8
        position = start + int.from_bytes(head[:4])
        yield head[4:], start, position
        position += 4  # checksum


def is_exif(data: bytes, name: bytes, start: int) -> bool:
    """Return whether a PNG chunk holds EXIF data, either eXIf or a text chunk written by ImageMagick."""
    return name == b"eXIf" or (name in (b"tEXt", b"zTXt") and data.startswith(_RAW_PROFILE, start))


def _png(data: bytes) -> File:
    """Read the orientation. As in Pillow, the last eXIf chunk counts, or the last text chunk if there is no eXIf."""
    found = [chunk for chunk in png_chunks(data) if is_exif(data, *chunk[:2])]
    if not found:
        return File("PNG", data, 1)
    name, start, end = max(reversed(found), key=lambda chunk: chunk[0] == b"eXIf")
    exif = data[start:end] if name == b"eXIf" else _exif_of_profile(name, data[start:end])
    return File("PNG", data, tiff.orientation_of_exif(exif))


def _exif_of_profile(name: bytes, content: bytes) -> bytes:
    """Return the EXIF data of a text chunk: three header lines, then hexadecimal digits."""
    text = content[len(_RAW_PROFILE) :]
    try:
        if name == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], MAX_PROFILE)  # skip the compression method
        return bytes.fromhex(text[:MAX_PROFILE].decode("ascii").split("\n", 3)[3]).removeprefix(_EXIF)
    except (zlib.error, ValueError, IndexError):  # corrupt
        return b""


# --- JPEG


def _jpeg(data: bytes) -> File:
    """Reject JPEGs with too many scans or too much EXIF data; other segments and trailing data do not count.

    The index of additional images (MPO) is erased, so that only the first image is read. Segments are parsed only if
    the file contains an index, or so many scan or EXIF markers that it may exceed a limit.
    """
    is_suspect = data.count(b"\xff" + _START_OF_SCAN) > MAX_SCANS or data.count(_EXIF) > MAX_EXIF_SEGMENTS
    if not is_suspect and _LIST not in data:
        return File("JPEG", data)
    position, lists = 2, []
    while (match := _HEADER.match(data, position)) and match[1] != _START_OF_SCAN:
        if match[1] == _APP2 and data.startswith(_LIST, match.end() + 2):
            lists.append(match.end() + 2)
        position = match.end() + _size_of_segment(data, match.end())
    if data.count(_EXIF, 0, position if match else len(data)) > MAX_EXIF_SEGMENTS:
        raise BrokenImageError("EXIF data of more than 128 KB: save it without EXIF data")
    num_scans = 0
    while (match := _MARKER.search(data, position)) and match[1] != _END_OF_IMAGE:
        position = match.end() + _size_of_segment(data, match.end())
        num_scans += match[1] == _START_OF_SCAN
        if num_scans > MAX_SCANS:
            raise BrokenImageError(f"a JPEG of more than {MAX_SCANS} scans: save it again")
    if lists:
        changed = bytearray(data)
        for place in lists:
            changed[place : place + 4] = bytes(4)
        data = bytes(changed)
    return File("JPEG", data)


def _size_of_segment(data: bytes, start: int) -> int:
    return max(2, int.from_bytes(data[start : start + 2]))


# --- GIF, TIFF, PPM, PSD


def _gif(data: bytes) -> File:
    """Reject GIFs with long comments, for which older versions of Pillow need quadratic time."""
    position, comments = 13, 0
    if len(data) > 10 and data[10] & 128:
        position += 3 << (data[10] & 7) + 1
    while data[position : position + 1] == b"!":
        kind = data[position + 1 : position + 2]
        position += 2
        while position < len(data) and (size := data[position]):
            comments += size if kind == b"\xfe" else 0
            position += size + 1
        position += 1
    if comments > MAX_COMMENTS:
        raise BrokenImageError("a GIF with comments of more than 1 MiB: save it without them")
    return File("GIF", data)


def _tiff(data: bytes) -> File:
    try:
        page = tiff.first_page(data, max(FREE_PIXELS, PIXELS_PER_BYTE * len(data)))
    except tiff.TiffError as error:
        raise BrokenImageError(str(error)) from None
    return File("TIFF", page.data, tiff.orientation_of_exif(data), page.bits, page.is_negative)


def _ppm(data: bytes) -> File:
    try:
        return File("PPM", pnm.as_bytes(data, max(FREE_PIXELS, PIXELS_PER_BYTE * len(data))))
    except ValueError as error:
        raise BrokenImageError(f"a corrupt PPM file: {error}") from None


def _psd(data: bytes) -> File:
    if len(data) < 26:
        raise BrokenImageError("a truncated PSD file")
    version, bits, mode = (int.from_bytes(data[place : place + 2]) for place in (4, 22, 24))
    if version == 2:
        raise BrokenImageError("a PSB file, which is not supported: save it as TIFF or PSD")
    if bits not in (1, 8) or mode == 9:
        raise BrokenImageError(
            f"a PSD file with {'Lab colours' if mode == 9 else f'{bits} bits per channel'}: save it as TIFF, or "
            "convert it to 8-bit RGB"
        )
    return File("PSD", _without_layers(data), is_negative=bits == 1)


def _without_layers(data: bytes) -> bytes:
    """Return a PSD file without resources and layers; the merged image is stored separately and remains."""
    end_of_colors = position = 30 + int.from_bytes(data[26:30])
    for _ in range(2):
        position += 4 + int.from_bytes(data[position : position + 4])
    if position > len(data):
        raise BrokenImageError("a truncated PSD file")
    return data[:end_of_colors] + bytes(8) + data[position:]


# --- icons


def _largest_image(data: bytes) -> bytes:
    """Return the largest image of an icon, with the most colours if several are equal, as a PNG or a one-image icon."""
    count = int.from_bytes(data[4:6], "little")
    entries = [data[6 + 16 * k : 22 + 16 * k] for k in range(min(count, len(data) // 16))]
    entries = [entry for entry in entries if len(entry) == 16]
    if not entries:
        raise BrokenImageError("an icon without images")
    entry = max(entries, key=lambda entry: ((entry[0] or 256) * (entry[1] or 256), entry[6] + 256 * entry[7]))
    size, start = struct.unpack("<II", entry[8:])
    image = data[start : start + size]
    if image.startswith(PNG_SIGNATURE):
        return image
    if len(image) < 40:
        raise BrokenImageError("a truncated icon")
    head, width, height = struct.unpack("<Iii", image[:12])
    if head != 40:
        raise BrokenImageError(f"an icon with a bitmap header of {head} bytes, expected 40: convert to PNG")
    if not (0 < width <= 256 and 0 < height <= 512):  # the height includes the mask
        raise BrokenImageError(f"an icon of {width}x{height // 2} pixels, more than 256x256")
    sides = bytes([width % 256, height // 2 % 256])
    return data[:4] + b"\1\0" + sides + entry[2:8] + struct.pack("<II", len(image), 22) + image


# --- JPEG 2000

_SIZE, _STYLE, _STYLE_OF_ONE, _TILE_PART, _PIXELS = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93


def _jpeg2000(data: bytes) -> File:
    """Reject images with too many tiles, blocks or layers for the file size: the decoder allocates memory for each."""
    width = height = components = 0
    for marker, content in _segments_of_jpeg2000(data, _start_of_codestream(data)):
        try:
            if marker == _SIZE:
                _, right, bottom, left, top, across, down, x, y, components = struct.unpack_from(">HIIIIIIIIH", content)
                width, height = right - left, bottom - top
                check_pixels(max(width, 0), max(height, 0), data)
                tiles = math.ceil((right - x) / across) * math.ceil((bottom - y) / down)
                if not (width > 0 and height > 0 and 0 < components <= 4 and tiles <= max(1, len(data) // 14)):
                    raise BrokenImageError(
                        f"a JPEG 2000 of {width}x{height} pixels, {components} channels, {tiles} tiles"
                    )
            elif marker == _STYLE:
                if int.from_bytes(content[2:4]) > MAX_LAYERS:
                    raise BrokenImageError(f"a JPEG 2000 of more than {MAX_LAYERS} layers: save it again")
                _check_blocks(width, height, components, content[5:], bool(content[0] & 1), data)
            elif marker == _STYLE_OF_ONE:
                _check_blocks(width, height, 1, content[2:], bool(content[1] & 1), data)
        except (struct.error, IndexError, ZeroDivisionError):
            raise BrokenImageError("a corrupt JPEG 2000") from None
    if not components:
        raise BrokenImageError("a JPEG 2000 without a size")
    return File("JPEG2000", data)


def _check_blocks(width: int, height: int, components: int, style: bytes, has_precincts: bool, data: bytes) -> None:
    """Reject too many code blocks and precincts over all resolutions. `style` is the parameter part of COD or COC."""
    levels, block_x, block_y = style[0], style[1] + 2, style[2] + 2
    if levels > 32:
        raise BrokenImageError("a corrupt JPEG 2000")
    count = 0
    for level in range(levels + 1):
        w, h = (-(-side >> levels - level) for side in (width, height))
        precinct = style[5 + level] if has_precincts else 0xFF
        sides = precinct & 15, precinct >> 4
        count += math.ceil(w / 2 ** min(block_x, sides[0])) * math.ceil(h / 2 ** min(block_y, sides[1]))
    if count * components > max(MAX_BLOCKS, len(data)):
        raise BrokenImageError(f"a JPEG 2000 of {count * components} blocks in {len(data)} bytes: save it again")


def _start_of_codestream(data: bytes) -> int:
    """Return the position of the codestream: at the start of the file, or in a box."""
    position = 0
    while not data.startswith(b"\xff\x4f", position):
        size, name = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16])
        position += head if name == b"jp2c" else size
        if (size < head and name != b"jp2c") or position >= len(data):
            raise BrokenImageError("a JPEG 2000 without pixels")
    return position


def _segments_of_jpeg2000(data: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of the segments before the coded data of each tile part."""
    position, end = position + 2, len(data)
    while position + 4 <= len(data):
        marker, size = struct.unpack_from(">HH", data, position)
        if marker == _PIXELS:
            position = max(end, position + 2)
            continue
        content = data[position + 4 : position + 2 + size]
        if marker == _TILE_PART and len(content) >= 6:
            length = int.from_bytes(content[2:6])
            end = position + length if length >= 14 else len(data)
        yield marker, content
        position += 2 + max(2, size)


# --- AVIF, HEIC, Targa


def _iso(kind: str, data: bytes) -> File:
    """Reject EXIF data with overlapping values. All TIFF signatures in the file are checked."""
    found = (match.start() for match in re.finditer(rb"II\*\0|MM\0\*", data))
    places = list(islice(found, MAX_EXIF_STREAMS + 1))
    sizes = [tiff.size_of_values(data, place) for place in places if _has_valid_offset(data, place)]
    if len(places) > MAX_EXIF_STREAMS or max(sizes, default=0) > len(data):
        raise BrokenImageError("EXIF data that claims more than the file size: save it without EXIF data")
    return File(kind, data)


def _has_valid_offset(data: bytes, start: int) -> bool:
    """Return whether the TIFF signature at `start` has a valid offset; coded pixels may contain one by chance."""
    order: Any = "little" if data[start] == ord("I") else "big"
    return int.from_bytes(data[start + 4 : start + 8], order) < len(data) - start


def _is_targa(data: bytes) -> bool:
    if len(data) < 18:
        return False
    fields = struct.unpack("<BBBHHBHHHHBB", data[:18])
    id_size, has_colors, kind, first, colors, color_bits, _, _, width, height, bits, flags = fields
    depths = {1: (8,), 2: (16, 24, 32), 3: (1, 8, 16)}.get(kind & 7, ())
    if kind & ~11 or bits not in depths or not width * height or flags & 0xC0:
        return False
    if has_colors and not (has_colors == 1 and color_bits in (16, 24, 32) and 0 < first + colors <= 65536):
        return False
    if not has_colors and (first or colors or color_bits or kind & 7 == 1):
        return False
    pixels = width * height * bits // 8 if kind < 8 else math.ceil(width * height / 128) * (1 + bits // 8)
    return len(data) >= 18 + id_size + colors * color_bits // 8 + pixels


_PREPARE: dict[str, Callable[[bytes], File]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "GIF": _gif,
    "TIFF": _tiff,
    "PPM": _ppm,
    "PSD": _psd,
    "JPEG2000": _jpeg2000,
    "AVIF": partial(_iso, "AVIF"),
    "HEIF": partial(_iso, "HEIF"),
}
