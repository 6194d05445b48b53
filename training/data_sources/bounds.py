"""Size limits for unpacking compressed files, and streaming readers of archives that respect the limits."""

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

# A compressed file may unpack to UNPACKED_AT_LEAST bytes or UNPACKED_RATIO times its size, whichever is larger.
# Published datasets of photographs expand by a factor of 1.2, handwritten digits by 5, a gzip file of zeros by 1000.
UNPACKED_AT_LEAST = 1 << 26
UNPACKED_RATIO = 100

PACKED_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)

_BLOCK = tarfile.BLOCKSIZE
_MAX_MEMBERS = 10_000  # published image datasets in tar archives have ten members
_MAX_NAME_BYTES = 1 << 16  # size of a header extension with a long name
_CHUNK_BYTES = 1 << 20
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
    """Return the maximum number of bytes to which a compressed file of `packed` bytes may unpack."""
    return max(UNPACKED_AT_LEAST, UNPACKED_RATIO * packed)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Load the arrays of an .npz file without unpickling. Raises OSError and any exception of numpy.load."""
    with open_regular(path) as file, open_npz(file) as arrays:
        return dict(arrays)


def open_npz(file: BinaryIO) -> Any:
    """Open arrays in .npz format, from the current position of a file, to load them one by one; see `load_npz`."""
    start = file.tell()
    with zipfile.ZipFile(file) as archive:
        size = sum(info.file_size for info in archive.infolist())
    limit = unpacked_limit(os.fstat(file.fileno()).st_size)
    if size > limit:
        raise ValueError(
            f"it unpacks to {size} bytes, more than the limit of {limit}: save it uncompressed, with numpy.savez"
        )
    file.seek(start)
    return np.load(file, allow_pickle=False)


class Unpacked:
    """Sequential reader of the unpacked bytes of a gzip, bzip2, xz or uncompressed file.

    Reading more than `limit` bytes raises OSError.
    """

    def __init__(self, stream: BinaryIO, limit: int, *, is_packed: bool) -> None:
        self.limit = limit
        self._stream = stream
        self._is_packed = is_packed
        self.position = 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end of the file. Memory is allocated as data arrives."""
        parts = []
        while size and (part := self._stream.read(min(size, _CHUNK_BYTES))):
            self.position += len(part)
            if self.position > self.limit:
                raise OSError(f"it unpacks to more than {self.limit} bytes: unpack it first")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Skip `size` bytes. Raises EOFError if fewer remain."""
        if not self._is_packed:  # the limit is the size of the file
            if size > self.limit - self.position:
                raise EOFError("it is truncated")
            self._stream.seek(size, os.SEEK_CUR)
            self.position += size
            return
        while size:
            chunk_size = min(size, _CHUNK_BYTES)
            if len(self.read(chunk_size)) < chunk_size:
                raise EOFError("it is truncated")
            size -= chunk_size


@contextmanager
def open_packed(path: Path) -> Iterator[Unpacked]:
    """Open a file, detecting compression by its first bytes. Raises OSError; reading raises PACKED_ERRORS."""
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
    """Member of a tar archive; `type` is one of the type constants of the module tarfile."""

    name: str
    size: int
    type: bytes

    @property
    def is_plain(self) -> bool:
        """True for a regular file, False for a link, folder, sparse file or other type."""
        return self.type in (tarfile.REGTYPE, tarfile.AREGTYPE)

    @property
    def is_folder(self) -> bool:
        return self.type == tarfile.DIRTYPE

    @property
    def is_link(self) -> bool:
        return self.type in (tarfile.LNKTYPE, tarfile.SYMTYPE)


def read_tar(stream: Unpacked, max_members: int | None = None) -> Iterator[Member]:
    """Yield the members of a tar archive in order, with the stream positioned at the content of the current member.

    Concatenated archives are read as one. Header extensions (PAX, GNU) are read for long names only, because the
    module tarfile can use time and memory out of proportion to their size. Raises PACKED_ERRORS for a corrupt archive,
    for more than `max_members` members (default: 10,000) and for a missing end marker.
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
    """Return the next nonzero block, or None at the end of the file.

    Raises EOFError unless the archive ends with a block of zeros, the end marker of tar.
    """
    has_end = stream.position == 0  # an empty file is not a truncated archive
    while block := stream.read(_BLOCK):
        if block.strip(b"\0"):
            return block
        has_end = True
    if not has_end:
        raise EOFError("it is truncated")
    return None


def _read_long_name(stream: Unpacked, info: tarfile.TarInfo) -> str | None:
    """Return the name of the next member from a header extension; None if absent or larger than _MAX_NAME_BYTES."""
    if info.size > _MAX_NAME_BYTES:
        return None
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return stream.read(info.size).partition(b"\0")[0].decode(errors="surrogateescape")
    if info.type not in _PAX:
        return None
    name, records = None, stream.read(info.size)
    while match := _PAX_RECORD.match(records):  # "LENGTH KEY=VALUE\n", where LENGTH counts the whole record
        length = int(match[1])
        if match[2] == b"path":
            name = records[match.end() : length - 1].decode(errors="surrogateescape")
        if length <= match.end():
            raise tarfile.HeaderError("a PAX record with an invalid length")
        records = records[length:]
    return name
