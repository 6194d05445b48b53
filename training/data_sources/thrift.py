"""Reader of Thrift's compact protocol, in which Parquet files describe themselves."""

from __future__ import annotations

import struct
from typing import Any

_DEEPEST = 16


class Compact:
    """Structs in bytes, one behind the other. Raises IndexError where the data end, ValueError where they are none.

    A struct is a dictionary by the numbers of its fields; texts are bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the struct at the place, which moves behind it."""
        if depth > _DEEPEST:
            raise ValueError("structs nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)  # these have no bytes
        return fields

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self.place:
            raise IndexError("it is cut off")
        self.place += size
        return self._data[self.place - size : self.place]

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
            case 1 | 2 | 3:  # truth in lists, and bytes
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
        raise ValueError(f"values of kind {kind}")  # maps, which Parquet does not have

    def _list(self, depth: int) -> list[Any]:
        head = self._take(1)[0]
        size = self._varint() if head >> 4 == 15 else head >> 4
        if size > len(self._data) - self.place:
            raise IndexError("it is cut off")
        return [self._value(head & 15, depth) for _ in range(size)]
