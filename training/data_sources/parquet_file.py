"""Parquet files in few rows at a time, whose pages are looked at before any is unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib.util import import_extra, open_regular
from training.data_sources.bounds import unpacked_limit

_MOST_ROWS, _MOST_BYTES = 4096, 1 << 22  # of a batch
_MOST_REPEATED = 1 << 26  # bytes of a batch if its values are all the same dictionary's
_BUFFER = 1 << 20
_FREE_ROWS = 1 << 16  # a file has so many rows at most, or as many as bytes
_BYTES_PER_VALUE = 16  # of the limit of a file: so many values a page may have
_DELTA_BYTE_ARRAY = 7  # an encoding in which values repeat the beginning of others

# Fields of the struct PageHeader, and where the structs in it have the encoding.
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 2, 3, 5, 7, 8
_NUM_VALUES = 1
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}
_HEAD_BYTES = (1 << 12, 1 << 24)  # of a page's header, usually and at most


class ParquetFile:
    """Rows of a Parquet file. Raises OSError, ValueError, IndexError and pyarrow's errors where it cannot be read."""

    def __init__(self, path: Path) -> None:
        parquet = import_extra("pyarrow.parquet", "parquet")
        self._file = open_regular(path)
        self._size = os.fstat(self._file.fileno()).st_size
        try:
            self._parquet = parquet.ParquetFile(
                self._file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            self.schema = self._parquet.schema_arrow
            metadata = self._parquet.metadata
            self.num_rows = sum(metadata.row_group(k).num_rows for k in range(metadata.num_row_groups))
            if self.num_rows > max(_FREE_ROWS, self._size):
                raise ValueError(f"it has {self.num_rows} rows, more than bytes")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def slices(self, column: str) -> Iterator[Any]:
        """Yield arrays of the values of a column, some megabytes at a time.

        Values in dictionaries may repeat: together they have no more bytes than a packed file may become.
        """
        num_bytes, largest = self._check_pages(column)
        rows = min(_MOST_ROWS, _MOST_BYTES * self.num_rows // max(num_bytes, 1), _MOST_REPEATED // max(largest, 1))
        left = unpacked_limit(self._size)
        for batch in self._parquet.iter_batches(batch_size=max(rows, 1), columns=[column], use_threads=False):
            array = batch.column(column)
            left -= array.nbytes
            if left < 0:
                raise ValueError(f"column {column} has more than {unpacked_limit(self._size)} bytes")
            yield array

    def _check_pages(self, column: str) -> tuple[int, int]:
        """Return the bytes of a column, and those of its largest dictionary. Raises ValueError for odd pages."""
        num_bytes = largest = 0
        for chunk in self._chunks(column):
            for header in self._pages(chunk):
                unpacked = self._check_page(header)
                num_bytes += unpacked
                largest = max(largest, unpacked if _DICTIONARY in header else 0)
        return num_bytes, largest

    def _chunks(self, column: str) -> Iterator[Any]:
        metadata = self._parquet.metadata
        for k in range(metadata.num_row_groups):
            group = metadata.row_group(k)
            for j in range(group.num_columns):
                chunk = group.column(j)
                if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}."):
                    yield chunk

    def _pages(self, chunk: Any) -> Iterator[dict[int, Any]]:
        """Yield the headers of the pages of a column chunk, as structs of Thrift."""
        place = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        end = place + chunk.total_compressed_size
        if place < 0 or end > self._size:
            raise ValueError(f"a column ends at byte {end} of {self._size}")
        while place < end:
            header, length = read_struct(self._file, place)
            packed = header.get(_PACKED)
            if not isinstance(packed, int) or packed < 0:
                raise ValueError(f"a page of {packed} bytes")
            yield header
            place += length + packed

    def _check_page(self, header: dict[int, Any]) -> int:
        """Return the bytes that a page becomes. Raises ValueError for one out of proportion to the file."""
        limit, unpacked = unpacked_limit(self._size), header.get(_UNPACKED)
        if not isinstance(unpacked, int) or not 0 <= unpacked <= limit:
            raise ValueError(f"a page that becomes {unpacked} bytes, of {limit} that it may")
        for kind, encoding in _ENCODING.items():
            about = header.get(kind) or {}
            if not 0 <= (about.get(_NUM_VALUES) or 0) <= limit // _BYTES_PER_VALUE:
                raise ValueError(f"a page of {about[_NUM_VALUES]} values")
            if about.get(encoding) == _DELTA_BYTE_ARRAY:
                raise ValueError("it is encoded as DELTA_BYTE_ARRAY: write it as PLAIN")
        return unpacked


def read_struct(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """Read a struct of Thrift's compact protocol; return its fields by number, and how many bytes it takes.

    Of fields, integers and structs have a value, others None. Raises ValueError or IndexError for what is none.
    """
    for size in _HEAD_BYTES:
        file.seek(place)
        data = file.read(size)
        try:
            return _Compact(data).read_fields()
        except IndexError:
            if len(data) < size:
                raise
    raise ValueError("a header of a page without an end")


_SIZES = {3: 1, 7: 8, 8: 0}  # kind -> bytes of a byte, a double; 0: texts, whose length comes first


class _Compact:
    """Reader of Thrift's compact protocol. Raises IndexError where the data end."""

    _DEEPEST = 8

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def read_fields(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields, self._place

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128 and shift < 64:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false have no bytes
            return None
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12 and depth < self._DEEPEST:
            return self.read_fields(depth + 1)[0]
        if kind not in _SIZES:  # lists, sets and maps: a page's header has none
            raise ValueError("a damaged header of a page")
        size = _SIZES[kind] or self._varint()
        self._place += size
        return None
