"""Index of a large zip file: a file beside it, NAME.zip.index, which all processes map into memory and share.

    signature | SHA-256 of the rest | bytes of the header, uint64 | header, JSON | arrays, at multiples of 64 bytes

An index is used if its checksum is correct and its header describes the zip file as it is: size, modification time, and
SHA-256 of the directory. Any other index is ignored and replaced. It holds numbers and text only, never code.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import dnnlib
from dnnlib.util import open_regular, parse_json, replaced
from training.data_sources.zip_directory import MEMBER, directory_bytes

_SIGNATURE = b"styleformer zip index 1\n"  # increase the number if names or labels are read by other rules
_CONTENT = len(_SIGNATURE) + 32  # start of the part that has the checksum
_HEADER = _CONTENT + 8
_ALIGNMENT = 64
_DTYPES: dict[str, np.dtype] = {"names": np.dtype("u1"), "ends": np.dtype("<i8"), "members": MEMBER}
_LABEL_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<i8"),
    2: np.dtype("<f4"),
}  # class numbers [images], vectors [images, c_dim]


class Index(NamedTuple):
    """Values, and arrays `names`, `ends` (see `Names`), `members` and optionally `labels`; `checksum` covers both."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]
    checksum: bytes


def index_path(path: Path) -> Path:
    """Return the path of the index of a zip file."""
    return path.with_name(f"{path.name}.index")


def identify(path: Path) -> dict[str, Any] | None:
    """Return a record of a zip file as it is; None if it cannot be read or its directory has an unusual place."""
    with suppress(OSError, ValueError), open_regular(path) as file:  # ValueError: not a path
        status, directory = os.fstat(file.fileno()), directory_bytes(file)
        if directory is not None:
            digest = hashlib.sha256(directory).hexdigest()
            return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "directory": digest}
    return None


def write_index(path: Path, record: dict[str, Any], values: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the index of the zip file that `record` identifies; nothing if the folder is not writable."""
    shapes = {name: array.shape for name, array in arrays.items()}
    header = {"version": dnnlib.__version__, "zip": record, "shapes": shapes, "values": values}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(_HEADER + len(encoded)) % _ALIGNMENT)
    parts: list[bytes | memoryview] = [len(encoded).to_bytes(8, "little"), encoded]
    for array in arrays.values():
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        parts += [data, bytes(-len(data) % _ALIGNMENT)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with suppress(OSError), replaced(index_path(path)) as temporary, temporary.open("xb") as file:
        file.writelines([_SIGNATURE, digest.digest(), *parts])


def read_index(path: Path) -> Index | None:
    """Map the index of a zip file into memory; None if it is missing, damaged, or of another state of the file."""
    try:
        with open_regular(index_path(path)) as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        checksum = hashlib.sha256(data[_CONTENT:]).digest()
        if data[:_CONTENT] != _SIGNATURE + checksum:
            return None
        end = _HEADER + int.from_bytes(data[_CONTENT:_HEADER], "little")
        header = parse_json(bytes(data[_HEADER:end]))
        if header["version"] != dnnlib.__version__ or header["zip"] != identify(path):
            return None
        return Index(header["values"], dict(_arrays(data, end, header["shapes"])), checksum)
    except Exception:  # not a file, empty, or written by another program: any error of mmap, JSON, numpy, ...
        return None


def _arrays(data: memoryview, start: int, shapes: Mapping[str, list[int]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in shapes.items():
        dtype = _LABEL_DTYPES[len(shape)] if name == "labels" else _DTYPES[name]
        array = np.frombuffer(data, dtype, prod(shape), start).reshape(shape)
        yield name, array
        start += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
