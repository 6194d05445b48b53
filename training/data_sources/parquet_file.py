"""Streaming reader of Parquet files. Metadata and page headers are validated before pyarrow reads them.

pyarrow crashes on some corrupt metadata, and allocates as much memory as a page header declares.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.util import import_extra, open_regular
from training.data_sources.bounds import unpacked_limit
from training.data_sources.thrift import Compact

_MAX_ROWS, _MAX_BYTES = 4096, 1 << 22  # per batch
_MAX_REPEATED = 1 << 26  # bytes of a batch whose values are all the same dictionary entry
_BUFFER = 1 << 20
_MIN_ROW_LIMIT = 1 << 16  # the row limit of a file is the larger of this value and the file size in bytes
_BYTES_PER_VALUE = 16  # a page has at most (limit of the file in bytes) / _BYTES_PER_VALUE values
_HEADER_BYTES = (1 << 12, 1 << 24)  # usual and maximum size of a page header
_MAX_FOOTER = 1 << 26
_MAX_GROUPS = 1000  # group columns, which contain other columns and can be nested
_MAGIC = b"PAR1"
_DELTA_BYTE_ARRAY = 7  # encoding in which values share prefixes with previous values

# Field numbers, by the name of the struct in parquet.thrift.
_SCHEMA, _ROW_GROUPS = 2, 4  # FileMetaData
_CHILDREN = 5  # SchemaElement
_COLUMNS, _GROUP_ROWS = 1, 3  # RowGroup
_OTHER_FILE, _CHUNK = 1, 3  # ColumnChunk
_PATH, _PACKED_CHUNK, _DATA_OFFSET, _DICTIONARY_OFFSET = 3, 7, 9, 11  # ColumnMetaData
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 2, 3, 5, 7, 8  # PageHeader
_VALUES, _ENCODING = 1, {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}  # DataPageHeader, DictionaryPageHeader, DataPageHeaderV2


class ParquetFile:
    """Rows of a Parquet file. Raises OSError, ValueError, IndexError and pyarrow's errors for a malformed file."""

    def __init__(self, path: Path) -> None:
        parquet = import_extra("pyarrow.parquet", "parquet")
        self._file = open_regular(path)
        self._size = os.fstat(self._file.fileno()).st_size
        try:
            self._groups = self._read_footer()
            self.num_rows = sum(_integer(group, _GROUP_ROWS) for group in self._groups)
            if self.num_rows > max(_MIN_ROW_LIMIT, self._size):
                raise ValueError(f"it declares {self.num_rows} rows, more rows than bytes")
            self._parquet = parquet.ParquetFile(
                self._file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            self.schema = self._parquet.schema_arrow
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def slices(self, column: str) -> Iterator[Any]:
        """Yield the values of a column as arrays of a few megabytes.

        Values from dictionaries may repeat; their total size is at most the `unpacked_limit` of the file.
        """
        num_bytes, largest = self._check_pages(column)
        rows = min(_MAX_ROWS, _MAX_BYTES * self.num_rows // max(num_bytes, 1), _MAX_REPEATED // max(largest, 1))
        remaining = unpacked_limit(self._size)
        for batch in self._parquet.iter_batches(batch_size=max(rows, 1), columns=[column], use_threads=False):
            array = batch.column(column)
            remaining -= array.nbytes
            if remaining < 0:
                raise ValueError(f"column {column} has more than {unpacked_limit(self._size)} bytes")
            yield array

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)

    def _read_footer(self) -> list[dict[int, Any]]:
        """Return the row groups. Raises ValueError unless every row group has one chunk per column of the schema."""
        end = self._read(max(self._size - 8, 0), 8)
        size = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or self._read(0, 4) != _MAGIC or size > min(self._size - 12, _MAX_FOOTER):
            raise ValueError("it is not a complete Parquet file")
        footer = Compact(self._read(self._size - 8 - size, size)).struct()
        elements = _structs(footer, _SCHEMA)
        num_columns = sum(not element.get(_CHILDREN) for element in elements)
        if len(elements) - num_columns > _MAX_GROUPS:
            raise ValueError(f"more than {_MAX_GROUPS} group columns")
        groups = _structs(footer, _ROW_GROUPS)
        if any(len(_structs(group, _COLUMNS)) != num_columns or _integer(group, _GROUP_ROWS) < 0 for group in groups):
            raise ValueError("its row groups do not match the columns of its schema")
        return groups

    def _check_pages(self, column: str) -> tuple[int, int]:
        """Return the sizes in bytes of a column and of its largest dictionary. Raises ValueError for invalid pages."""
        num_bytes = largest = 0
        for chunk in self._chunks(column.encode()):
            for header in self._pages(chunk):
                unpacked = self._check_page(header)
                num_bytes += unpacked
                largest = max(largest, unpacked if _DICTIONARY in header else 0)
        return num_bytes, largest

    def _chunks(self, column: bytes) -> Iterator[dict[int, Any]]:
        """Yield the metadata of all chunks of a column."""
        for group in self._groups:
            for entry in _structs(group, _COLUMNS):
                chunk = entry.get(_CHUNK)
                if not isinstance(chunk, dict) or not isinstance(chunk.get(_PATH), list) or entry.get(_OTHER_FILE):
                    raise ValueError("a column is stored in another file")
                if chunk[_PATH][:1] == [column]:
                    yield chunk

    def _pages(self, chunk: dict[int, Any]) -> Iterator[dict[int, Any]]:
        """Yield the headers of the pages of a column chunk."""
        data_offset = _integer(chunk, _DATA_OFFSET)
        offset = min(data_offset, _integer(chunk, _DICTIONARY_OFFSET, 0) or data_offset)
        end = offset + _integer(chunk, _PACKED_CHUNK)
        if offset < 0 or end > self._size:
            raise ValueError(f"a column ends at byte {end} of {self._size}")
        while offset < end:
            header, length = self._read_header(offset)
            packed = _integer(header, _PACKED)
            if packed < 0:
                raise ValueError(f"a page has a size of {packed} bytes")
            yield header
            offset += length + packed

    def _read_header(self, offset: int) -> tuple[dict[int, Any], int]:
        """Return the header of a page and the size of the header in bytes."""
        for size in _HEADER_BYTES:
            reader = Compact(self._read(offset, size))
            try:
                return reader.struct(), reader.position
            except IndexError:
                pass  # the header is longer, because of statistics of long values
        raise ValueError(f"no page header at byte {offset}")

    def _check_page(self, header: dict[int, Any]) -> int:
        """Return the unpacked size of a page. Raises ValueError if the size or the number of values is too large."""
        limit, unpacked = unpacked_limit(self._size), _integer(header, _UNPACKED)
        if not 0 <= unpacked <= limit:
            raise ValueError(f"a page unpacks to {unpacked} bytes, more than the limit of {limit}")
        for kind, encoding in _ENCODING.items():
            details = header.get(kind, {_VALUES: 0, encoding: 0})
            if not isinstance(details, dict) or not 0 <= _integer(details, _VALUES) <= limit // _BYTES_PER_VALUE:
                raise ValueError("the number of values of a page exceeds the limit")
            if _integer(details, encoding) == _DELTA_BYTE_ARRAY:
                raise ValueError("it is encoded as DELTA_BYTE_ARRAY: write it as PLAIN")
        return unpacked


def _integer(fields: dict[int, Any], number: int, default: int | None = None) -> int:
    """Return an integer field. Raises ValueError for another type."""
    value = fields.get(number, default)
    if type(value) is not int:
        raise ValueError(f"field {number} of its metadata is not an integer")
    return value


def _structs(fields: dict[int, Any], number: int) -> list[dict[int, Any]]:
    """Return a field that is a list of structs. Raises ValueError for another type."""
    values = fields.get(number)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"field {number} of its metadata is not a list of structs")
    return values
