"""Parquet files in few rows at a time, whose description and pages are looked at before pyarrow reads them.

pyarrow ends the process at some descriptions that are damaged, and gives any page the memory that it asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.util import import_extra, open_regular
from training.data_sources.bounds import unpacked_limit
from training.data_sources.thrift import Compact

_MAX_ROWS, _MAX_BYTES = 4096, 1 << 22  # of a batch
_MAX_REPEATED = 1 << 26  # bytes of a batch if its values are all the same dictionary's
_BUFFER = 1 << 20
_FREE_ROWS = 1 << 16  # a file has so many rows at most, or as many as bytes
_BYTES_PER_VALUE = 16  # of the limit of a file: so many values a page may have
_HEADER_BYTES = (1 << 12, 1 << 24)  # of a page, usually and at most
_MAX_FOOTER = 1 << 26
_MAX_GROUPS = 1000  # columns that hold others, which may all be nested
_MAGIC = b"PAR1"
_DELTA_BYTE_ARRAY = 7  # an encoding in which values repeat the beginning of others

# Numbers of fields, by the name of their struct in parquet.thrift.
_SCHEMA, _ROW_GROUPS = 2, 4  # FileMetaData
_CHILDREN = 5  # SchemaElement
_COLUMNS, _GROUP_ROWS = 1, 3  # RowGroup
_OTHER_FILE, _CHUNK = 1, 3  # ColumnChunk
_PATH, _PACKED_CHUNK, _DATA_PLACE, _DICTIONARY_PLACE = 3, 7, 9, 11  # ColumnMetaData
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 2, 3, 5, 7, 8  # PageHeader
_VALUES, _ENCODING = 1, {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}  # DataPageHeader, DictionaryPageHeader, DataPageHeaderV2


class ParquetFile:
    """Rows of a Parquet file. Raises OSError, ValueError, IndexError and pyarrow's errors where it cannot be read."""

    def __init__(self, path: Path) -> None:
        parquet = import_extra("pyarrow.parquet", "parquet")
        self._file = open_regular(path)
        self._size = os.fstat(self._file.fileno()).st_size
        try:
            self._groups = self._read_footer()
            self.num_rows = sum(_whole(group, _GROUP_ROWS) for group in self._groups)
            if self.num_rows > max(_FREE_ROWS, self._size):
                raise ValueError(f"it has {self.num_rows} rows, more than bytes")
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
        """Yield arrays of the values of a column, some megabytes at a time.

        Values in dictionaries may repeat: together they have no more bytes than a packed file may become.
        """
        num_bytes, largest = self._check_pages(column)
        rows = min(_MAX_ROWS, _MAX_BYTES * self.num_rows // max(num_bytes, 1), _MAX_REPEATED // max(largest, 1))
        left = unpacked_limit(self._size)
        for batch in self._parquet.iter_batches(batch_size=max(rows, 1), columns=[column], use_threads=False):
            array = batch.column(column)
            left -= array.nbytes
            if left < 0:
                raise ValueError(f"column {column} has more than {unpacked_limit(self._size)} bytes")
            yield array

    def _read(self, place: int, size: int) -> bytes:
        self._file.seek(place)
        return self._file.read(size)

    def _read_footer(self) -> list[dict[int, Any]]:
        """Return the row groups. Raises ValueError where the columns are not those of a flat list of chunks."""
        end = self._read(max(self._size - 8, 0), 8)
        size = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or self._read(0, 4) != _MAGIC or size > min(self._size - 12, _MAX_FOOTER):
            raise ValueError("it is no complete Parquet file")
        footer = Compact(self._read(self._size - 8 - size, size)).struct()
        elements = _structs(footer, _SCHEMA)
        num_columns = sum(not element.get(_CHILDREN) for element in elements)
        if len(elements) - num_columns > _MAX_GROUPS:
            raise ValueError(f"more than {_MAX_GROUPS} columns that hold others")
        groups = _structs(footer, _ROW_GROUPS)
        if any(len(_structs(group, _COLUMNS)) != num_columns or _whole(group, _GROUP_ROWS) < 0 for group in groups):
            raise ValueError("its row groups do not have the columns that it names")
        return groups

    def _check_pages(self, column: str) -> tuple[int, int]:
        """Return the bytes of a column, and those of its largest dictionary. Raises ValueError for odd pages."""
        num_bytes = largest = 0
        for chunk in self._chunks(column.encode()):
            for header in self._pages(chunk):
                unpacked = self._check_page(header)
                num_bytes += unpacked
                largest = max(largest, unpacked if _DICTIONARY in header else 0)
        return num_bytes, largest

    def _chunks(self, column: bytes) -> Iterator[dict[int, Any]]:
        """Yield the descriptions of all that the file has of a column."""
        for group in self._groups:
            for place in _structs(group, _COLUMNS):
                chunk = place.get(_CHUNK)
                if not isinstance(chunk, dict) or not isinstance(chunk.get(_PATH), list) or place.get(_OTHER_FILE):
                    raise ValueError("a column is not in this file")
                if chunk[_PATH][:1] == [column]:
                    yield chunk

    def _pages(self, chunk: dict[int, Any]) -> Iterator[dict[int, Any]]:
        """Yield the headers of the pages of a column chunk."""
        data_place = _whole(chunk, _DATA_PLACE)
        place = min(data_place, _whole(chunk, _DICTIONARY_PLACE, 0) or data_place)
        end = place + _whole(chunk, _PACKED_CHUNK)
        if place < 0 or end > self._size:
            raise ValueError(f"a column ends at byte {end} of {self._size}")
        while place < end:
            header, length = self._read_header(place)
            packed = _whole(header, _PACKED)
            if packed < 0:
                raise ValueError(f"a page of {packed} bytes")
            yield header
            place += length + packed

    def _read_header(self, place: int) -> tuple[dict[int, Any], int]:
        """Return the header of a page, and how many bytes it takes."""
        for size in _HEADER_BYTES:
            reader = Compact(self._read(place, size))
            try:
                return reader.struct(), reader.place
            except IndexError:
                pass  # statistics of long values are in it
        raise ValueError(f"a page without a header, at byte {place}")

    def _check_page(self, header: dict[int, Any]) -> int:
        """Return the bytes that a page becomes. Raises ValueError for one out of proportion to the file."""
        limit, unpacked = unpacked_limit(self._size), _whole(header, _UNPACKED)
        if not 0 <= unpacked <= limit:
            raise ValueError(f"a page that becomes {unpacked} bytes, of {limit} that it may")
        for kind, encoding in _ENCODING.items():
            about = header.get(kind, {_VALUES: 0, encoding: 0})
            if not isinstance(about, dict) or not 0 <= _whole(about, _VALUES) <= limit // _BYTES_PER_VALUE:
                raise ValueError("a page with more values than it may have")
            if _whole(about, encoding) == _DELTA_BYTE_ARRAY:
                raise ValueError("it is encoded as DELTA_BYTE_ARRAY: write it as PLAIN")
        return unpacked


def _whole(fields: dict[int, Any], number: int, default: int | None = None) -> int:
    """Return a field that must be an integer."""
    value = fields.get(number, default)
    if type(value) is not int:
        raise ValueError(f"field {number} of its description is not an integer")
    return value


def _structs(fields: dict[int, Any], number: int) -> list[dict[int, Any]]:
    """Return a field that must be a list of structs."""
    values = fields.get(number)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"field {number} of its description is not a list of structs")
    return values
