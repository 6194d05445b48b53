"""Reader of Thrift's compact protocol, the format of Parquet metadata."""

from __future__ import annotations

import struct
from typing import Any

_MAX_DEPTH = 16


class Compact:
    """Sequential reader of structs. Raises IndexError at the end of the data and ValueError for malformed data.

    A struct is a dictionary keyed by field number; strings are bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read the struct at the current position."""
        if depth > _MAX_DEPTH:
            raise ValueError("structs are nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)  # booleans have no further bytes
        return fields

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self.position:
            raise IndexError("it is truncated")
        self.position += size
        return self._data[self.position - size : self.position]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._take(1)[0]) & 128 and shift < 63:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2 | 3:  # booleans in lists, and bytes
                return self._take(1)[0]
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return struct.unpack("<d", self._take(8))[0]
            case 8:
                return self._take(self._varint())
            case 9 | 10:
                return self._list(depth)
            case 12:
                return self.struct(depth + 1)
        raise ValueError(f"unsupported type {kind}")  # such as maps, which Parquet metadata does not use

    def _list(self, depth: int) -> list[Any]:
        head = self._take(1)[0]
        size = self._varint() if head >> 4 == 15 else head >> 4
        if size > len(self._data) - self.position:
            raise IndexError("it is truncated")
        return [self._value(head & 15, depth) for _ in range(size)]
