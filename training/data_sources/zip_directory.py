"""Central directory of a zip file as arrays, which need less time and memory than a ZipInfo object per member.

The directories that archivers usually write, including Zip64, are parsed here. Every other file is read, or refused, by
the module zipfile, which is also the reference in the tests. Numbers of sections refer to PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np

Array = Any  # a NumPy array, or a tensor in the memory of the CPU; np.asarray returns the array without a copy
LOCAL_HEADER = 30  # bytes before the name of a member (4.3.7)
# Member of a zip file: position of its local header, bytes in the file, bytes after decompression, CRC-32, bytes of its
# name, compression method, flags.
MEMBER = np.dtype(
    [
        *[("offset", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4")],
        *[("name_length", "<u2"), ("method", "<u2"), ("flags", "<u2")],
    ]
)
# Header of a member in the directory (4.3.12), without name, extra fields and comment.
_HEADER = np.dtype(
    [
        *[("signature", "S4"), ("writer", "u1"), ("writer_system", "u1"), ("version", "u1"), ("system", "u1")],
        *[("flags", "<u2"), ("method", "<u2"), ("time", "<u4"), ("crc", "<u4"), ("packed", "<u4"), ("size", "<u4")],
        *[("name_length", "<u2"), ("extra_length", "<u2"), ("comment_length", "<u2"), ("attributes", "V8")],
        ("offset", "<u4"),
    ]
)
_LENGTHS, _LENGTHS_PLACE = struct.Struct("<HHH"), 28  # of name, extra fields and comment
_END, _END_64, _LOCATOR = map(struct.Struct, ("<4sHHHHIIH", "<4sQHHIIQQQQ", "<4sIQI"))  # 4.3.16, 4.3.14, 4.3.15
_FIELD = np.dtype([("kind", "<u2"), ("length", "<u2")])  # head of an extra field (4.5.1)
_ZIP64, _UNICODE_PATH = 1, 0x7075  # kinds of extra fields (4.5.3, 4.6.9)
_MAX_32 = 0xFFFFFFFF  # marks a value that is in the Zip64 field
_NEWEST = 63  # version 6.3 of the format
_UTF_8 = 1 << 11  # flag: the name is UTF-8
_FAR = 1 << 61  # larger positions and sizes are clipped, so that sums do not overflow
_CHUNK = 1 << 12  # names decoded at a time


class Names(Sequence[str]):
    """Names in one buffer of UTF-8, each followed by a zero byte.

    text  uint8 [bytes]
    ends  int64 [names]: positions of the zero bytes
    """

    def __init__(self, text: Array, ends: Array) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def of_text(cls, text: np.ndarray) -> Names:
        """Find the names in a buffer."""
        return cls(text, np.flatnonzero(text == 0))

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Store names without zero characters."""
        return cls.of_text(np.frombuffer(bytearray("".join(f"{name}\0" for name in names).encode()), np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = range(len(self.ends))[index]
        return list(self.at(found)) if isinstance(found, range) else next(self.at([found]))

    def __iter__(self) -> Iterator[str]:
        return self.at(range(len(self.ends)))

    def at(self, positions: Sequence[int] | np.ndarray) -> Iterator[str]:
        """Yield the names at nonnegative positions."""
        text, all_ends = memoryview(np.asarray(self.text)), np.asarray(self.ends)  # type: ignore[arg-type]
        for first in range(0, len(positions), _CHUNK):
            index = np.asarray(positions[first : first + _CHUNK], np.int64)
            starts = np.where(index > 0, all_ends[index - 1] + 1, 0)
            for start, end in zip(starts.tolist(), all_ends[index].tolist(), strict=True):
                yield str(text[start:end], "utf-8")


class OverlapError(ValueError):
    """Members of a zip file overlap, as in zip bombs, which unpack a few shared bytes many times."""


class Directory(NamedTuple):
    """Members of a zip file, without folders.

    names    list of str
    members  MEMBER [members]
    digest   SHA-256 of the encoded directory; None if it is not at the usual place
    """

    names: list[str]
    members: np.ndarray
    digest: str | None


class _Encoded(NamedTuple):
    data: bytes
    num_members: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def read_directory(file: BinaryIO) -> Directory:
    """Read the directory of a zip file. Raises OverlapError, and the errors of zipfile for a corrupt file."""
    encoded = _read_encoded(file)
    names, members = (encoded and _parse(encoded)) or _read_with_zipfile(file)
    _refuse_overlaps(names, members)
    return Directory(names, members, encoded and encoded.digest)


def directory_digest(file: BinaryIO) -> str | None:
    """Return the `digest` of a zip file's directory without parsing it."""
    encoded = _read_encoded(file)
    return encoded and encoded.digest


def _read_encoded(file: BinaryIO) -> _Encoded | None:
    """Return the encoded directory, if it is complete and only end records follow it."""
    position = file.seek(0, os.SEEK_END) - _END.size
    if position < 0:
        return None
    signature, _, _, _, count, size, start, comment = _END.unpack(_read_at(file, position, _END.size))
    if signature != b"PK\5\6" or comment:
        return None
    locator = position - _LOCATOR.size
    if locator >= _END_64.size and (found := _read_at(file, locator, _LOCATOR.size)).startswith(b"PK\6\7"):
        position = locator - _END_64.size
        end = _END_64.unpack(_read_at(file, position, _END_64.size))
        if end[0] != b"PK\6\6" or _LOCATOR.unpack(found)[1:] != (0, position, 1):
            return None
        count, size, start = end[7:]
    return _Encoded(_read_at(file, start, size), count) if start + size == position else None


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _parse(encoded: _Encoded) -> tuple[list[str], np.ndarray] | None:
    """Return names and members from a directory of the usual form; None if zipfile has to read or refuse the file."""
    data = encoded.data
    starts = _header_starts(data, encoded.num_members)
    if starts is None:
        return None
    headers = _records(data, _HEADER, starts)
    starts = starts + _HEADER.itemsize
    ends = starts + headers["name_length"]
    names = _decode(data, starts, ends, (headers["flags"] & _UTF_8) != 0)
    if names is None or (headers["version"] > _NEWEST).any():
        return None
    members = np.zeros(len(headers), MEMBER)
    for field in MEMBER.names or ():
        members[field] = headers[field]
    if not _read_extra_fields(data, ends, ends + headers["extra_length"], members):
        return None
    is_file = np.array([not name.endswith("/") for name in names])
    return list(compress(names, is_file)), members[is_file]


def _header_starts(data: bytes, count: int) -> np.ndarray | None:
    """Return the start of each header; None unless `count` headers, at least one, fill the data."""
    starts, position = array("q"), 0
    try:
        while data.startswith(b"PK\1\2", position):
            starts.append(position)
            position += _HEADER.itemsize + sum(_LENGTHS.unpack_from(data, position + _LENGTHS_PLACE))
    except struct.error:  # truncated
        return None
    return np.frombuffer(starts, np.int64) if 0 < count == len(starts) and position == len(data) else None


def _records(data: bytes, dtype: np.dtype, starts: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), dtype.itemsize)
    return np.ascontiguousarray(windows[starts]).view(dtype)[:, 0]


def _decode(data: bytes, starts: np.ndarray, ends: np.ndarray, is_utf_8: np.ndarray) -> list[str] | None:
    """Decode names; None if zipfile has to decode or change one: another encoding, backslashes, zeros, empty names."""
    try:
        names = [data[start:end].decode() for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    except UnicodeDecodeError:
        return None
    if not all(names) or any("\\" in name or "\0" in name for name in names):
        return None
    return names if all(map(str.isascii, compress(names, ~is_utf_8))) else None


def _read_extra_fields(data: bytes, starts: np.ndarray, ends: np.ndarray, members: np.ndarray) -> bool:
    """Set the values of more than 32 bits from Zip64 fields; False if zipfile has to read the fields.

    All members are processed together: the first field of each, then the second, ...
    """
    index = np.flatnonzero(starts < ends)
    starts, ends = starts[index], ends[index]
    while len(index):
        if (starts + _FIELD.itemsize > ends).any():
            return False
        fields = _records(data, _FIELD, starts)
        starts = starts + _FIELD.itemsize
        stops = starts + fields["length"]
        if (stops > ends).any() or (fields["kind"] == _UNICODE_PATH).any():
            return False
        is_64 = fields["kind"] == _ZIP64
        if not _read_zip64(data, starts[is_64], stops[is_64], index[is_64], members):
            return False
        has_more = stops < ends
        index, starts, ends = index[has_more], stops[has_more], ends[has_more]
    return True


def _read_zip64(data: bytes, starts: np.ndarray, stops: np.ndarray, index: np.ndarray, members: np.ndarray) -> bool:
    """Set the marked values of members[index] from their Zip64 fields; False if a field is too short."""
    for name in ("size", "packed", "offset"):
        is_marked = members[name][index] == _MAX_32
        if (starts[is_marked] + 8 > stops[is_marked]).any():
            return False
        members[name][index[is_marked]] = np.minimum(_records(data, np.dtype("<u8"), starts[is_marked]), _FAR)
        starts = starts + 8 * is_marked
    return True


def _read_with_zipfile(file: BinaryIO) -> tuple[list[str], np.ndarray]:
    r"""Read any zip file. If no name contains `/`, `\` separates folders, as in files of some Windows programs."""
    with zipfile.ZipFile(file) as archive:
        infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
    has_slashes = any("/" in info.filename for info in infos)
    names = [info.filename if has_slashes else info.filename.replace("\\", "/") for info in infos]
    return names, np.array(list(map(_member_of, infos)), MEMBER)


def _member_of(info: zipfile.ZipInfo) -> tuple[int, ...]:
    """Return the values of a MEMBER."""
    places = (min(value, _FAR) for value in (info.header_offset, info.compress_size, info.file_size))
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF_8 else "cp437", "replace")
    return *places, info.CRC, len(name), info.compress_type, info.flag_bits


def _refuse_overlaps(names: list[str], members: np.ndarray) -> None:
    order = np.argsort(members["offset"], kind="stable")
    ordered = members[order]
    ends = ordered["offset"] + LOCAL_HEADER + ordered["name_length"] + ordered["packed"]
    overlapping = np.flatnonzero(ordered["offset"][1:] < ends[:-1])
    if len(overlapping):
        raise OverlapError(f"{names[order[overlapping[0] + 1]]!r:.80} overlaps another member")
