"""Reader of LMDB's file format, version 1: a B+ tree in pages, of which all that it says of itself is checked.

The library maps the file into memory and believes it: one wrong number in it ends the process.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

from dnnlib.util import open_regular

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEAD = 16  # bytes of a page's header: its number, padding, flags, ends of the free space
_BRANCH, _LEAF, _DIRTY = 1, 2, 16  # flags of a page
_IN_PAGES = 1  # flag of a node whose value has pages of its own
_EMPTY = 2**64 - 1
_MAX_DEPTH = 32


class LmdbFile:
    """The keys and values in data.mdb of a folder, in the order of the keys.

    Raises OSError for a file that cannot be read, ValueError for one that is damaged. Beside the value, memory is that
    of a page of each depth.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open_regular(folder / "data.mdb")
        weakref.finalize(self, self._file.close)
        self._size = os.fstat(self._file.fileno()).st_size
        self._page_size = struct.unpack("<I", self._read(_HEAD + 24, 4))[0]
        if self._page_size not in (1 << bits for bits in range(9, 17)):
            raise ValueError(f"pages of {self._page_size} bytes")
        metas = [self._read_meta(place) for place in (0, self._page_size)]
        _, self.num_entries, self._root, last_page = max(metas)  # of the last transaction
        if self._size < (last_page + 1) * self._page_size:
            raise ValueError(f"data.mdb should have {(last_page + 1) * self._page_size} bytes")

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        self._left = self._size  # bytes of values, which share none
        self._seen: set[int] = set()
        if self._root != _EMPTY:
            yield from self._walk(self._root, 0)

    def _read_meta(self, place: int) -> tuple[int, int, int, int]:
        """Return transaction, entries, root and last page of a meta page."""
        magic, version = struct.unpack("<II", self._read(place + _HEAD, 8))
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError("not a file of LMDB, version 1")
        entries, root, last_page, transaction = struct.unpack("<QQQQ", self._read(place + _HEAD + 104, 32))
        return transaction, entries, root, last_page

    def _read(self, place: int, size: int) -> bytes:
        if place + size > self._size:
            raise ValueError(f"it ends before byte {place + size}")
        self._file.seek(place)
        return self._file.read(size)

    def _walk(self, number: int, depth: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield what is in a page and below."""
        if number in self._seen or depth > _MAX_DEPTH:
            raise ValueError(f"page {number} is in the tree twice")
        self._seen.add(number)
        page = self._read(number * self._page_size, self._page_size)
        flags, lower = struct.unpack_from("<HH", page, 10)
        if flags & ~_DIRTY not in (_BRANCH, _LEAF) or not _HEAD <= lower <= len(page):
            raise ValueError(f"page {number} is none of the tree")
        for place in struct.unpack_from(f"<{(lower - _HEAD) // 2}H", page, _HEAD):
            low, high, node_flags, key_size = _unpack("<HHHH", page, place)
            if flags & _BRANCH:
                yield from self._walk(low | high << 16 | node_flags << 32, depth + 1)
            else:
                start = place + 8 + key_size
                yield page[place + 8 : start], self._value(page, start, low | high << 16, node_flags)

    def _value(self, page: bytes, start: int, size: int, flags: int) -> bytes:
        """Return the value of a node of a leaf."""
        self._left -= size
        if flags & ~_IN_PAGES or self._left < 0 or (not flags and start + size > len(page)):
            raise ValueError(f"a value of {size} bytes")
        if not flags:
            return page[start : start + size]
        (number,) = _unpack("<Q", page, start)
        return self._read(number * self._page_size + _HEAD, size)


def _unpack(kinds: str, page: bytes, place: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(kinds, page, place)
    except struct.error:
        raise ValueError(f"a node outside of its page, at byte {place}") from None
