"""Reader of the LMDB file format, version 1, a paged B+ tree; all offsets and sizes in the file are checked.

The lmdb library maps the file into memory without such checks, so a single corrupt number can crash the process.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

from dnnlib.util import open_regular

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEAD = 16  # bytes of a page header: page number, padding, flags, bounds of the free space
_BRANCH, _LEAF, _DIRTY = 1, 2, 16  # page flags
_IN_PAGES = 1  # node flag: the value is stored in overflow pages
_EMPTY = 2**64 - 1
_MAX_DEPTH = 32


class LmdbFile:
    """Iterable over the (key, value) pairs in data.mdb of a folder, in key order.

    Raises OSError for an unreadable file and ValueError for a corrupt file. Memory use is one page per level of the
    tree, plus the current value.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open_regular(folder / "data.mdb")
        weakref.finalize(self, self._file.close)
        self._size = os.fstat(self._file.fileno()).st_size
        self._page_size = struct.unpack("<I", self._read(_HEAD + 24, 4))[0]
        if self._page_size not in (1 << bits for bits in range(9, 17)):
            raise ValueError(f"invalid page size of {self._page_size} bytes")
        metas = [self._read_meta(offset) for offset in (0, self._page_size)]
        _, self.num_entries, self._root, last_page = max(metas)  # the last transaction
        if self._size < (last_page + 1) * self._page_size:
            raise ValueError(f"data.mdb should have {(last_page + 1) * self._page_size} bytes")

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        self._remaining = self._size  # remaining bytes for values, which cannot overlap
        self._seen: set[int] = set()
        if self._root != _EMPTY:
            yield from self._walk(self._root, 0)

    def _read_meta(self, offset: int) -> tuple[int, int, int, int]:
        """Return transaction number, number of entries, root page and last page of a meta page."""
        magic, version = struct.unpack("<II", self._read(offset + _HEAD, 8))
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError("not an LMDB file of version 1")
        entries, root, last_page, transaction = struct.unpack("<QQQQ", self._read(offset + _HEAD + 104, 32))
        return transaction, entries, root, last_page

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise ValueError(f"it ends before byte {offset + size}")
        self._file.seek(offset)
        return self._file.read(size)

    def _walk(self, number: int, depth: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield the entries of the subtree of a page."""
        if number in self._seen or depth > _MAX_DEPTH:
            raise ValueError(f"page {number} is in the tree twice")
        self._seen.add(number)
        page = self._read(number * self._page_size, self._page_size)
        flags, lower = struct.unpack_from("<HH", page, 10)
        if flags & ~_DIRTY not in (_BRANCH, _LEAF) or not _HEAD <= lower <= len(page):
            raise ValueError(f"page {number} is not a page of the tree")
        for offset in struct.unpack_from(f"<{(lower - _HEAD) // 2}H", page, _HEAD):
            low, high, node_flags, key_size = _unpack("<HHHH", page, offset)
            if flags & _BRANCH:
                yield from self._walk(low | high << 16 | node_flags << 32, depth + 1)
            else:
                start = offset + 8 + key_size
                yield page[offset + 8 : start], self._value(page, start, low | high << 16, node_flags)

    def _value(self, page: bytes, start: int, size: int, flags: int) -> bytes:
        """Return the value of a leaf node."""
        self._remaining -= size
        if flags & ~_IN_PAGES or self._remaining < 0 or (not flags and start + size > len(page)):
            raise ValueError(f"a value has an invalid size of {size} bytes")
        if not flags:
            return page[start : start + size]
        (number,) = _unpack("<Q", page, start)
        return self._read(number * self._page_size + _HEAD, size)


def _unpack(layout: str, page: bytes, offset: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, page, offset)
    except struct.error:
        raise ValueError(f"a node extends beyond its page, at byte {offset}") from None
