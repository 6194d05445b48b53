"""Bounds on what becomes of packed files, and archives read in pieces within them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dnnlib.util import open_regular

# A packed file becomes at most UNPACKED_AT_LEAST bytes or, if that is more, UNPACKED_RATIO times its size. Published
# sets of photographs become 1.2 times as large, drawn digits 5 times; gzip makes a file of zeros 1000 times as small.
UNPACKED_AT_LEAST = 1 << 26
UNPACKED_RATIO = 100

PACKED_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)

_BLOCK = tarfile.BLOCKSIZE
_MAX_MEMBERS = 10_000  # published sets of images in tar archives have ten
_MAX_NAME_BYTES = 1 << 16  # of what holds a long name
_PIECE = 1 << 20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_HEADERS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_PAX_RECORD = re.compile(rb"(\d{1,5}) ([^=]{1,100})=")
_OPENERS: Mapping[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


def unpacked_limit(packed: int) -> int:
    """Return how many bytes a packed file of so many may become."""
    return max(UNPACKED_AT_LEAST, UNPACKED_RATIO * packed)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in an .npz file, without running code in it. Raises OSError, and whatever numpy raises."""
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            size = sum(info.file_size for info in archive.infolist())
        limit = unpacked_limit(os.fstat(file.fileno()).st_size)
        if size > limit:
            raise ValueError(
                f"it unpacks to {size} bytes, more than the {limit} that it may: save it uncompressed, by numpy.savez"
            )
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)


class Unpacked:
    """The bytes of a file that is packed by gzip, bzip2 or xz, or not at all, from its start to its end.

    `limit` is how many there may be; to read more raises OSError.
    """

    def __init__(self, stream: BinaryIO, limit: int, *, is_packed: bool) -> None:
        self.limit = limit
        self._stream = stream
        self._is_packed = is_packed
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes, fewer than `size` only at the end; memory is taken for bytes that are there."""
        parts = []
        while size and (part := self._stream.read(min(size, _PIECE))):
            self.position += len(part)
            if self.position > self.limit:
                raise OSError(f"it unpacks to more than {self.limit} bytes: unpack it first")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Pass over bytes. Raises EOFError where there are fewer."""
        if not self._is_packed:  # its limit is its size
            if size > self.limit - self.position:
                raise EOFError("it is cut off")
            self._stream.seek(size, os.SEEK_CUR)
            self.position += size
            return
        while size:
            piece = min(size, _PIECE)
            if len(self.read(piece)) < piece:
                raise EOFError("it is cut off")
            size -= piece


@contextmanager
def open_packed(path: Path) -> Iterator[Unpacked]:
    """Open a file, packed or not, as its first bytes say. Raises OSError; reading it raises PACKED_ERRORS."""
    with ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        packed = os.fstat(file.fileno()).st_size
        opener = _OPENERS.get(file.read(2))
        file.seek(0)
        if opener is None:
            yield Unpacked(file, packed, is_packed=False)
        else:
            yield Unpacked(stack.enter_context(opener(file)), unpacked_limit(packed), is_packed=True)


class Member(NamedTuple):
    """A member of a tar archive, and its type as the module tarfile has it."""

    name: str
    size: int
    type: bytes

    @property
    def is_plain(self) -> bool:
        """Whether it is a file, and no link, folder or sparse file."""
        return self.type in (tarfile.REGTYPE, tarfile.AREGTYPE)

    @property
    def is_folder(self) -> bool:
        return self.type == tarfile.DIRTYPE

    @property
    def is_link(self) -> bool:
        return self.type in (tarfile.LNKTYPE, tarfile.SYMTYPE)


def read_tar(stream: Unpacked, max_members: int | None = None) -> Iterator[Member]:
    """Yield the members of a tar archive one after the other; until the next one, the stream is at the member's bytes.

    An archive that is appended to another one is read, too. Of what extends a header (PAX, long names), which takes the
    module tarfile time and memory out of all proportion, only names are read. Raises PACKED_ERRORS, also for more
    members than `max_members` (default: 10,000), and for an archive without an end.
    """
    long_name = None
    max_members = max_members or _MAX_MEMBERS
    for _ in range(max_members):
        header = _read_header(stream)
        if header is None:
            return
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.HeaderError("a negative size")
        end = stream.position
        if info.type not in _WITHOUT_CONTENT:
            end += info.size + -info.size % _BLOCK
        if info.type in _HEADERS:
            long_name = _read_long_name(stream, info) or long_name
        else:
            name, long_name = long_name or info.name, None
            yield Member(name.removeprefix("./"), info.size, info.type)
        stream.skip(end - stream.position)
    raise tarfile.HeaderError(f"more than {max_members} members")


def _read_header(stream: Unpacked) -> bytes | None:
    """Return the next block that is not of zeros, of which one at least ends an archive; None at the end.

    Raises EOFError where the archive has no such end.
    """
    has_end = stream.position == 0  # an empty file is no archive, and none that is cut off
    while block := stream.read(_BLOCK):
        if block.strip(b"\0"):
            return block
        has_end = True
    if not has_end:
        raise EOFError("it is cut off")
    return None


def _read_long_name(stream: Unpacked, info: tarfile.TarInfo) -> str | None:
    """Return the name of the next member that a header holds; None where it holds none, or too much."""
    if info.size > _MAX_NAME_BYTES:
        return None
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return stream.read(info.size).partition(b"\0")[0].decode(errors="surrogateescape")
    if info.type not in _PAX:
        return None
    name, records = None, stream.read(info.size)
    while match := _PAX_RECORD.match(records):  # "LENGTH KEY=VALUE\n", the length that of all
        length = int(match[1])
        if match[2] == b"path":
            name = records[match.end() : length - 1].decode(errors="surrogateescape")
        if length <= match.end():
            raise tarfile.HeaderError("a PAX record of no length")
        records = records[length:]
    return name
