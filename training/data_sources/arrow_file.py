"""Streaming reader of Arrow IPC files, as written by the library `datasets`."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.util import import_extra, open_regular

_MAGIC = b"ARROW1\0\0"  # precedes the stream in the file format (Feather, version 2)
_MAX_ROWS, _MAX_BYTES = 4096, 1 << 22  # per slice
_HEADER, _COMPRESSION = 2, 3  # field numbers in Arrow's flatbuffers tables Message and RecordBatch


class ArrowFile:
    """Rows of an Arrow IPC stream or file. The file is memory-mapped; pages are released after they have been read.

    Raises OSError, ValueError, struct.error and pyarrow's errors for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._pa = import_extra("pyarrow", "parquet")
        with open_regular(path) as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError for an empty file
        self.schema = next(self._read_messages())
        self.num_rows = sum(batch.num_rows for batch in self._batches([]))

    def close(self) -> None:
        """Do nothing; the mapping is released with the last array that references it."""

    def slices(self, column: str) -> Iterator[Any]:
        """Yield the values of a column as validated arrays of a few megabytes."""
        for batch in self._batches([column]):
            (array,) = batch.columns
            array.validate(full=True)  # pyarrow does not check offsets on reading
            step = max(1, min(_MAX_ROWS, _MAX_BYTES * len(array) // max(array.nbytes, 1)))
            for start in range(0, len(array), step):
                yield array.slice(start, step)
                if hasattr(self._map, "madvise"):
                    self._map.madvise(mmap.MADV_DONTNEED)

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        messages = self._read_messages()
        schema = next(messages)
        for message in messages:
            if message.type != "record batch":
                raise ValueError("it has dictionary-encoded columns: save it as Parquet")
            if _is_compressed(message.metadata.to_pybytes()):
                raise ValueError("it is compressed: save it uncompressed, or as Parquet")
            batch = self._pa.ipc.read_record_batch(message, schema)
            if batch.num_rows > len(self._map):
                raise ValueError(f"it declares {batch.num_rows} rows, more rows than bytes")
            yield batch.select(columns)

    def _read_messages(self) -> Iterator[Any]:
        """Yield the schema, then the remaining messages."""
        reader = self._pa.BufferReader(self._pa.py_buffer(self._map))
        if self._map[: len(_MAGIC)] == _MAGIC:
            reader.seek(len(_MAGIC))
        messages = self._pa.ipc.MessageReader.open_stream(reader)
        first = next(messages, None)
        if first is None or first.type != "schema":
            raise ValueError("it does not start with a schema")
        yield self._pa.ipc.read_schema(first)
        yield from messages


def _is_compressed(message: bytes) -> bool:
    """Return whether the record batch in a flatbuffers message declares a compression codec."""
    batch = _follow(message, _field(message, _follow(message, 0), _HEADER))
    return _field(message, batch, _COMPRESSION) != 0


def _follow(data: bytes, position: int) -> int:
    return position + struct.unpack_from("<I", data, position)[0]


def _field(data: bytes, table: int, number: int) -> int:
    """Return the position of a field of a flatbuffers table, or 0 if the field is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size, entry = struct.unpack_from("<H", data, vtable)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", data, vtable + entry)[0] if entry < size else 0
    return table + offset if offset else 0
