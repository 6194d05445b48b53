"""Images in the rows of tables: Parquet and Arrow files, as on the Hugging Face hub and in the library `datasets`."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dnnlib.config import UserError
from dnnlib.image_files import BrokenImageError
from dnnlib.util import describe_error, import_extra, parse_json
from training.data_sources.arrow_file import ArrowFile
from training.data_sources.dataset_json import refuse_unnamed
from training.data_sources.items import Item, SourceBase, oversize
from training.data_sources.labels import to_labels
from training.data_sources.parquet_file import ParquetFile
from training.data_sources.parts import LABEL_NAMES, Parts

_FILES: dict[str, type[ParquetFile | ArrowFile]] = {"parquet": ParquetFile, "arrow": ArrowFile}
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
_CHANNELS = {"L": 1, "RGB": 3}  # keyed by the mode of an Image feature


class Columns(NamedTuple):
    """Names of the image and label columns of a table, class names, number of channels, and a note on the labels."""

    image: str
    label: str | None
    class_names: list[str] | None
    channels: int | None
    note: str | None


class TableSource(SourceBase):
    """Images in tables of one kind. Labels are read up front; images are streamed, a few megabytes at a time."""

    def __init__(self, parts: Parts, name: str, split: str | None, *, skip_missing: bool) -> None:
        super().__init__()
        self.name = name
        self._parts = parts
        self._paths, splits = parts.choose(split, self._count, skip_missing=skip_missing)
        self._num_rows, values, self._columns = self._read_labels()
        self.channels = self._columns.channels
        self.labels, self.class_names = to_labels(values, self._place) if values else (None, None)
        if self.labels:
            self.class_names = self._columns.class_names or self.class_names
        self.left_out = parts.left_out
        label = f"its label in column {self._columns.label!r}" if self.labels else "no label"
        note = f"the image of a row is in column {self._columns.image!r}, {label}"
        self.notes = [*parts.notes, *splits, note, *([self._columns.note] if self._columns.note else [])]
        refuse_unnamed(self.labels or (), self._columns.class_names, self._place)

    def _count(self, paths: Iterable[Path]) -> str:
        total = 0
        for path in paths:
            with self._open(path) as table:
                total += table.num_rows
        return f"{total:,}"

    @contextmanager
    def _open(self, path: Path) -> Iterator[ParquetFile | ArrowFile]:
        """Open a table. Raises UserError if the table cannot be opened, or read within the context."""
        pa = import_extra("pyarrow", "parquet")
        try:
            table = _FILES[self._parts.kind](path)
            try:
                yield table
            finally:
                table.close()
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, struct.error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read ({describe_error(error)}): download or write it again") from error

    def _read_labels(self) -> tuple[list[int], list[Any], Columns]:
        """Return the number of rows of each file, the labels of all rows (empty without labels), and the columns."""
        first: Columns | None = None
        num_rows: list[int] = []
        values: list[Any] = []
        for path in self._paths:
            with self._open(path) as table:
                columns = find_columns(table.schema, path)
                first = first or columns
                if columns != first:
                    raise UserError(f"{path} and {self._paths[0]} differ in columns or classes: give only one of them")
                num_rows.append(table.num_rows)
                if columns.label is not None:
                    values += _values(table, columns.label, path)
        if first is None or not sum(num_rows):
            raise UserError(f"{self._parts.root} holds no rows: check the path")
        return num_rows, values, first

    def _place(self, k: int) -> str:
        """Describe the location of the label of image k."""
        for path, count in zip(self._paths, self._num_rows, strict=True):
            if k < count:
                return f"{path}: row {k}, column {self._columns.label!r}"
            k -= count
        raise IndexError(k)

    def __len__(self) -> int:
        return sum(self._num_rows)

    def __iter__(self) -> Iterator[Item]:
        for path, count in zip(self._paths, self._num_rows, strict=True):
            row = 0
            with self._open(path) as table:
                for array in table.slices(self._columns.image):
                    for value in array.to_pylist():
                        yield Item(f"{path.name}: row {row}", self._content(value))
                        row += 1
                if row != count:
                    raise ValueError(f"it ends after {row} of {count} rows")

    def _content(self, value: Any) -> bytes | Path | BrokenImageError:
        """Return the bytes of an image, or the path of an image file in the folder of the table."""
        data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return oversize(len(data)) or data
        if not isinstance(name, str) or not name or "\0" in name:
            return BrokenImageError("the row has no image")
        folder = os.path.abspath(self._parts.root if self._parts.root.is_dir() else self._parts.root.parent)
        path = Path(os.path.normpath(os.path.join(folder, name)))
        if not path.is_relative_to(folder):
            return BrokenImageError(
                f"the row has no bytes but the path {name!r:.200}, outside of {folder}: write the images into the "
                "table, with to_parquet() or save_to_disk() of the library datasets"
            )
        return path


def find_columns(schema: Any, path: Path) -> Columns:
    """Find the image and label columns of an Arrow schema, by name, feature of the library `datasets`, or type.

    The criteria are applied in this order. Raises UserError, with the columns, if the image column is not unique.
    """
    features = _features(schema)
    held = [field.name for field in schema if _holds_images(field.type)]
    image = _choose(held, _IMAGE_NAMES, features, "Image") or (held[0] if len(held) == 1 else None)
    if image is None or schema.names.count(image) > 1:
        shown = ", ".join(f"{field.name} ({field.type!s:.80})" for field in schema)
        problem = f"several columns can hold the images, {', '.join(held)}" if held else "no column holds images"
        raise UserError(
            f"{path}: {problem} (columns: {shown:.1000}): rename the column of images to `image`, with bytes or "
            "structs of bytes and path"
        )
    others = [name for name in schema.names if name != image]
    label = _choose(others, LABEL_NAMES, features, "ClassLabel")
    classes = [name for name in others if features.get(name, {}).get("_type") == "ClassLabel"]
    note = f"columns {', '.join(classes)} are classes: rename one of them to `label`" if classes and not label else None
    names = features.get(label or "", {}).get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    channels = _CHANNELS.get(str(features.get(image, {}).get("mode")))
    return Columns(image, label, names if is_list else None, channels, note)


def _choose(columns: list[str], names: tuple[str, ...], features: dict[str, Any], kind: str) -> str | None:
    """Return the first column with one of the names, else the only column with a feature of this kind, else None."""
    by_name = {column.lower(): column for column in columns}
    found = [by_name[name] for name in names if name in by_name]
    of_kind = [column for column in columns if features.get(column, {}).get("_type") == kind]
    return found[0] if found else of_kind[0] if len(of_kind) == 1 else None


def _features(schema: Any) -> dict[str, Any]:
    """Return the features recorded by the library `datasets`, by column; empty without features."""
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _holds_images(kind: Any) -> bool:
    types = import_extra("pyarrow", "parquet").types
    if types.is_struct(kind):
        return any(kind.field(k).name == "bytes" and _holds_images(kind.field(k).type) for k in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _values(table: ParquetFile | ArrowFile, column: str, path: Path) -> list[Any]:
    """Return the labels of all rows as numbers, strings, lists or None. Raises UserError for other column types."""
    types = import_extra("pyarrow", "parquet").types
    kind = table.schema.field(column).type
    if types.is_null(kind):
        return [None] * table.num_rows
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    value = kind.value_type if is_list or types.is_dictionary(kind) else kind
    is_text = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    is_number = types.is_integer(value) or types.is_floating(value) or types.is_boolean(value)
    if not is_number and (is_list or not is_text):
        raise UserError(
            f"{path}: column {column!r} holds {kind!s:.80}, which is not a label type: rename or remove the column, or "
            "store numbers, strings or vectors"
        )
    values = [value for array in table.slices(column) for value in array.to_pylist()]
    if len(values) != table.num_rows:
        raise ValueError(f"it has {len(values)} labels for {table.num_rows} rows")
    return values
