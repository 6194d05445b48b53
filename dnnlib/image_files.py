"""Recognition of image files by content, and the part of them that a decoder gets.

What a file has beside its first image stays out of the decoder where that could take
time or memory out of proportion: further images, directories whose values overlap, comments.
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

MAX_SCANS = 64  # of a progressive JPEG: each goes over all pixels, however few bytes it has; encoders write about 10
MAX_EXIF_SEGMENTS = 2  # of a JPEG, of 64 KB each: in k of them, k^2 times 90 MB of values that overlap have room
MAX_PROFILE = 1 << 20  # bytes of the text of EXIF data in a PNG, of which the rest does not count
MAX_COMMENTS = 1 << 20  # bytes before the first image of a GIF
MAX_BLOCKS = 1 << 17  # code blocks and precincts of a JPEG 2000, which take 400 bytes each, however few the file has
MAX_LAYERS = 256  # of a JPEG 2000
MAX_EXIF_STREAMS = 16  # in an AVIF or HEIC file, of what looks like the beginning of EXIF data

FREE_PIXELS, PIXELS_PER_BYTE = 1 << 24, 10_000  # an image has so many at most; deflate has 8000 to a byte
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_START_OF_SCAN, _END_OF_IMAGE, _APP2 = b"\xda", b"\xd9", b"\xe2"  # after a byte 255
_EXIF, _LIST = b"Exif\0\0", b"MPF\0"
_RAW_PROFILE = b"Raw profile type exif\0"
# Heads of the segments before the first scan, which Pillow and libjpeg read alike; and of any segment as libjpeg finds
# them: in coded pixels a byte 255 is followed by 0 or by the number of a restart.
_HEADER = re.compile(rb"\xff+([\xc0-\xc7\xc9-\xcf\xda-\xef\xfe])")
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")

_FREQUENT = {b"\xff\xd8\xff": "JPEG", PNG_SIGNATURE: "PNG"}
_FORMATS = {  # beginnings of what else is read
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
_CONVERT, _REDUCE, _FRAMES = "convert to PNG", "convert to 8 or 16 bits", "take the frames, with ffmpeg for example"
_RAW = (
    ".cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .dng .raf .orf .rw2 .pef .srw .raw .3fr .iiq .x3f .kdc .dcr .mrw .rwl",
    rb"FUJIFILMCCD-RAW|IIR[OS]|IIU\0|II\*\0.{4}CR|....ftypcrx ",
)
_FILM = (
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .mts .m2ts",
    rb"....ftyp|....moov|RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01\xba",
)
_OTHERS = (  # suffixes and beginnings of what is not read, its name, and what to do
    ("", rb"\Z", "an empty file", "copy or download it again"),
    (".eps .ps", rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS document", _EXPORT),
    (".pdf .ai", rb"\s*%PDF", "a PDF document", _EXPORT),
    ("", rb"(?i)\s*(\xef\xbb\xbf)?(<!doctype html|<html)", "a web page", "download the image itself"),
    (".svg .svgz", rb"(?i)\s*(\xef\xbb\xbf)?(<\?xml.*)?(<!--.*)?<svg", "an SVG drawing", _EXPORT),
    (".wmf .emf", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", _EXPORT),
    ("", rb"version https://git-lfs", "a pointer of git LFS", "git lfs pull"),
    (*_RAW, "a camera's raw file", _DEVELOP),
    (*_FILM, "a film", _FRAMES),
    (".jxl", rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
    (".exr .hdr .pfm", rb"v/1\x01|#\?RADIANCE|P[fF]\n", "an image of floats", _REDUCE),
    (".xcf", rb"gimp xcf", "a GIMP project", _EXPORT),
    ("", rb"PK\x03\x04|\x1f\x8b", "a packed archive", "unpack it"),
)
_SUFFIXES = {".cdr .kra .psb .odg": _EXPORT, ".jxr .wdp .hdp .dds .qoi .avifs .heics .cur": _CONVERT}  # by these alone
REMEDIES = {
    suffix: remedy
    for suffixes, remedy in [*((suffixes, remedy) for suffixes, _, _, remedy in _OTHERS), *_SUFFIXES.items()]
    for suffix in suffixes.split()
}
_KNOWN = [(re.compile(pattern, re.DOTALL), name) for name, pattern in _FORMATS.items()]
_UNREAD = [(re.compile(pattern, re.DOTALL), name, remedy) for _, pattern, name, remedy in _OTHERS]


class BrokenImageError(Exception):
    """The bytes are not an image that can be used; the message is the reason, without the file's name."""


class File(NamedTuple):
    """An image file as a decoder gets it.

    kind: Pillow's name of the format.
    orientation: 1 to 8, as its EXIF data say; None where the decoder has these.
    bits: of a sample of grayscale that has 9 to 16.
    is_negative: white is its zero.
    """

    kind: str
    data: bytes
    orientation: int | None = None
    bits: int = 16
    is_negative: bool = False


def recognise(data: bytes) -> str:
    """Return Pillow's name of the format. Raises BrokenImageError saying what else the data are, where that is known.

    Targa files have no signature: they are known by a header whose every number fits the rest of the file.
    """
    for signature, kind in _FREQUENT.items():
        if data.startswith(signature):
            return kind
    for pattern, name, remedy in _UNREAD:
        if pattern.match(data[:1024]) and not _brands(data) & _ISO_IMAGES:
            raise BrokenImageError(f"{name}, which is not read: {remedy}")
    for pattern, kind in _KNOWN:
        if pattern.match(data):
            return kind
    if brands := _brands(data):
        return "AVIF" if brands & _AVIF and data[8:12] not in _HEIC else "HEIF"
    if _is_targa(data):
        return "TGA"
    raise BrokenImageError("not an image of a format that is read")


def prepared(data: bytes) -> File:
    """Return an image file without what takes time or memory out of proportion to its size. Raises BrokenImageError."""
    kind = recognise(data)
    if kind == "ICO":
        image = _largest_image(data)
        if image.startswith(PNG_SIGNATURE):
            return prepared(image)
        return File("ICO", image)
    return _PREPARE.get(kind, lambda data: File(kind, data))(data)


def check_pixels(width: int, height: int, data: bytes) -> None:
    """Raise BrokenImageError for a size that is out of proportion to the file, or beyond Pillow's limit."""
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise BrokenImageError(f"{width}x{height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that are read")
    if width * height > max(FREE_PIXELS, PIXELS_PER_BYTE * len(data)):
        raise BrokenImageError(f"{width}x{height} pixels in {len(data)} bytes")


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of a file of the ISO base format: what it holds."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4]), 256)
    return {data[8:12], *(data[k : k + 4] for k in range(16, end, 4))}


# --- PNG


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the content of each chunk of a PNG, up to the last one or to damage."""
    position = len(PNG_SIGNATURE)
    while len(head := data[position : position + 8]) == 8 and head[4:] != b"IEND":
        start = position + 8
        position = start + int.from_bytes(head[:4])
        yield head[4:], start, position
        position += 4  # a checksum


def is_exif(data: bytes, name: bytes, start: int) -> bool:
    """Tell whether a chunk of a PNG holds EXIF data: as such, or as text as ImageMagick writes them."""
    return name == b"eXIf" or (name in (b"tEXt", b"zTXt") and data.startswith(_RAW_PROFILE, start))


def _png(data: bytes) -> File:
    """Find the orientation. As in Pillow the last chunk of its kind counts, and text only where there is no other."""
    found = [chunk for chunk in png_chunks(data) if is_exif(data, *chunk[:2])]
    if not found:
        return File("PNG", data, 1)
    name, start, end = max(reversed(found), key=lambda chunk: chunk[0] == b"eXIf")
    exif = data[start:end] if name == b"eXIf" else _exif_of_profile(name, data[start:end])
    return File("PNG", data, tiff.orientation_of_exif(exif))


def _exif_of_profile(name: bytes, content: bytes) -> bytes:
    """Return EXIF data in a text chunk: three lines, of which the last is a length, then hexadecimal digits."""
    text = content[len(_RAW_PROFILE) :]
    try:
        if name == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], MAX_PROFILE)  # behind the method, which is always 0
        return bytes.fromhex(text[:MAX_PROFILE].decode("ascii").split("\n", 3)[3]).removeprefix(_EXIF)
    except (zlib.error, ValueError, IndexError):  # damaged
        return b""


# --- JPEG


def _jpeg(data: bytes) -> File:
    """Refuse JPEGs that take disproportionate decode time. What segments hold, and what follows the image, is free.

    Of several images, as in an MPO, the first is read: the list of the others stays out. Most files need no walk over
    their segments: they have few bytes that could begin a scan or EXIF data, and no list.
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
        raise BrokenImageError("EXIF data of more than 128 KB: save it without them")
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
    """Refuse what older versions of Pillow take quadratic time for."""
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
        raise BrokenImageError(f"a damaged PPM file: {error}") from None


def _psd(data: bytes) -> File:
    if len(data) < 26:
        raise BrokenImageError("a PSD file that is cut off")
    version, bits, mode = (int.from_bytes(data[place : place + 2]) for place in (4, 22, 24))
    if version == 2:
        raise BrokenImageError("a PSB file, which is not read: save it as TIFF or PSD")
    if bits not in (1, 8) or mode == 9:
        raise BrokenImageError(
            f"a PSD file of {'Lab colours' if mode == 9 else f'{bits} bits per channel'}: save it as TIFF, or convert "
            "it to RGB of 8 bits"
        )
    return File("PSD", _without_layers(data), is_negative=bits == 1)


def _without_layers(data: bytes) -> bytes:
    """Return a PSD file without its resources and layers, beside which it has the image that they make up."""
    end_of_colors = position = 30 + int.from_bytes(data[26:30])
    for _ in range(2):
        position += 4 + int.from_bytes(data[position : position + 4])
    if position > len(data):
        raise BrokenImageError("a PSD file that is cut off")
    return data[:end_of_colors] + bytes(8) + data[position:]


# --- icons


def _largest_image(data: bytes) -> bytes:
    """Return the largest image of an icon, of the most colours: a PNG, or an icon of that image alone."""
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
        raise BrokenImageError("an icon that is cut off")
    head, width, height = struct.unpack("<Iii", image[:12])
    if head != 40:
        raise BrokenImageError(f"an icon whose bitmap has a header of {head} bytes, not of 40: convert to PNG")
    if not (0 < width <= 256 and 0 < height <= 512):  # with its mask, as high again
        raise BrokenImageError(f"an icon of {width}x{height // 2} pixels, which have at most 256x256")
    sides = bytes([width % 256, height // 2 % 256])
    return data[:4] + b"\1\0" + sides + entry[2:8] + struct.pack("<II", len(image), 22) + image


# --- JPEG 2000

_SIZE, _STYLE, _STYLE_OF_ONE, _TILE_PART, _PIXELS = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93


def _jpeg2000(data: bytes) -> File:
    """Refuse what has many more tiles, blocks or layers than bytes: the decoder allocates memory for all of them."""
    width = height = parts = 0
    for marker, content in _segments_of_jpeg2000(data, _start_of_codestream(data)):
        try:
            if marker == _SIZE:
                _, right, bottom, left, top, across, down, x, y, parts = struct.unpack_from(">HIIIIIIIIH", content)
                width, height = right - left, bottom - top
                check_pixels(max(width, 0), max(height, 0), data)
                tiles = math.ceil((right - x) / across) * math.ceil((bottom - y) / down)
                if not (width > 0 and height > 0 and 0 < parts <= 4 and tiles <= max(1, len(data) // 14)):
                    raise BrokenImageError(f"a JPEG 2000 of {width}x{height} pixels, {parts} channels, {tiles} tiles")
            elif marker == _STYLE:
                if int.from_bytes(content[2:4]) > MAX_LAYERS:
                    raise BrokenImageError(f"a JPEG 2000 of more than {MAX_LAYERS} layers: save it again")
                _check_blocks(width, height, parts, content[5:], bool(content[0] & 1), data)
            elif marker == _STYLE_OF_ONE:
                _check_blocks(width, height, 1, content[2:], bool(content[1] & 1), data)
        except (struct.error, IndexError, ZeroDivisionError):
            raise BrokenImageError("a damaged JPEG 2000") from None
    if not parts:
        raise BrokenImageError("a JPEG 2000 without a size")
    return File("JPEG2000", data)


def _check_blocks(width: int, height: int, parts: int, style: bytes, has_precincts: bool, data: bytes) -> None:
    """Count the code blocks and precincts of all resolutions, from a number of these and two exponents of blocks."""
    levels, block_x, block_y = style[0], style[1] + 2, style[2] + 2
    if levels > 32:
        raise BrokenImageError("a damaged JPEG 2000")
    count = 0
    for level in range(levels + 1):
        w, h = (-(-side >> levels - level) for side in (width, height))
        precinct = style[5 + level] if has_precincts else 0xFF
        sides = precinct & 15, precinct >> 4
        count += math.ceil(w / 2 ** min(block_x, sides[0])) * math.ceil(h / 2 ** min(block_y, sides[1]))
    if count * parts > max(MAX_BLOCKS, len(data)):
        raise BrokenImageError(f"a JPEG 2000 of {count * parts} blocks in {len(data)} bytes: save it again")


def _start_of_codestream(data: bytes) -> int:
    """Return where the pixels' data begin: at once, or in a box."""
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
    """Yield marker and content of the segments before the pixels of each part of a tile."""
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
    """Refuse EXIF data whose values overlap; wherever they are, they begin in one of two ways."""
    found = (match.start() for match in re.finditer(rb"II\*\0|MM\0\*", data))
    places = list(islice(found, MAX_EXIF_STREAMS + 1))
    sizes = [tiff.size_of_values(data, place) for place in places if _fits(data, place)]
    if len(places) > MAX_EXIF_STREAMS or max(sizes, default=0) > len(data):
        raise BrokenImageError("EXIF data that claim more than the file has: save it without them")
    return File(kind, data)


def _fits(data: bytes, start: int) -> bool:
    """Tell whether what begins a TIFF file at `start` goes on as one: coded pixels may begin so by chance."""
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
