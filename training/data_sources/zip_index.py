"""Index of a large zip file: a file beside it, NAME.zip.index, from which later starts read names, offsets and labels.

The index is a line of text followed by arrays in .npz format, which has a CRC-32 per array. It holds numbers and text
only, never code. It is used only if its content is valid, if its header describes the zip file as it is, and if nobody
can have written it but the user, root and the owner of the zip file.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import dnnlib
from dnnlib.util import PARTIAL, open_regular, parse_json, replaced
from training.data_sources.bounds import open_npz
from training.data_sources.dataset_json import MAX_CLASS, DatasetJson, parse_dataset_json
from training.data_sources.files import ZipContents, ZipState
from training.data_sources.zip_directory import MEMBER, Names, directory_digest

FORMAT = 2  # increase the number if names or labels are read by other rules

_SIGNATURE = b"styleformer zip index\n"
_TOKEN_BYTES = 8  # random part of the names of temporary files


class Index(NamedTuple):
    """Images of a zip file; dataset.json without labels; int64 [images] or float32 [images, c_dim] labels, or None."""

    contents: ZipContents
    content: DatasetJson
    labels: np.ndarray | None


def index_path(path: Path) -> Path:
    """Return the path of the index of a zip file."""
    return path.with_name(f"{path.name}.index")


def write_index(path: Path, index: Index) -> None:
    """Write the index of a zip file, and remove parts of an index that killed processes have left.

    Nothing is written if the folder is not writable, its file system keeps no owners and permissions, or another
    program's file has the name of the index.
    """
    target = index_path(path)
    if not _is_replaceable(target):
        return
    contents, text = index.contents, json.dumps({**index.content.meta, "labels": None})
    arrays = {"names": contents.names.text, "members": contents.members}
    if index.labels is not None:
        arrays["labels"] = index.labels
    values = {"json_name": contents.json_name, "dataset_json": text, "arrays": [*arrays]}
    header = json.dumps({**_rules(), "zip": contents.state, **values}).encode()
    opener = partial(os.open, mode=0o644)  # not writable by the group, see `is_trusted`
    with (
        suppress(OSError),
        replaced(target, f".{secrets.token_hex(_TOKEN_BYTES)}") as temporary,  # containers have equal process ids
        open(temporary, "xb", opener=opener) as file,
    ):
        if not is_trusted(os.fstat(file.fileno()), path.stat()):
            raise PermissionError("the index would not be used")
        file.write(_SIGNATURE)
        np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)
    token = "[0-9a-f]" * 2 * _TOKEN_BYTES
    for part in target.parent.glob(f".{escape(target.name[:40])}.*{PARTIAL}.{token}"):
        with suppress(OSError):
            part.unlink()


def remove_index(path: Path) -> None:
    """Remove the index of a zip file, if there is one and its folder is writable."""
    if _is_replaceable(index_path(path)):
        with suppress(OSError):
            index_path(path).unlink()


def read_index(path: Path) -> Index | None:
    """Read the index of a zip file; None if it is missing, invalid, not trusted, or of another state of the file."""
    if path.suffix.lower() != ".zip":
        return None
    try:
        with open_regular(index_path(path)) as file:
            is_own = file.read(len(_SIGNATURE)) == _SIGNATURE
            if not is_own or not is_trusted(os.fstat(file.fileno()), path.stat()):
                return None
            with open_npz(file) as arrays:
                header = parse_json(arrays["header"].tobytes())
                return _index_of(header, arrays) if _is_current(header, path) else None
    except Exception:  # missing or damaged: any error of zipfile, JSON, numpy, ...
        return None


def is_trusted(index: os.stat_result, archive: os.stat_result) -> bool:
    """Return whether only the user, root and the owner of the zip file can have written an index."""
    if not hasattr(os, "geteuid"):  # Windows
        return True
    owners = {os.geteuid(), 0, archive.st_uid}
    return index.st_uid in owners and not index.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_replaceable(target: Path) -> bool:
    """Return whether there is no file, or an index, possibly truncated."""
    try:
        with open_regular(target) as file:
            return _SIGNATURE.startswith(file.read(len(_SIGNATURE)))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _rules() -> dict[str, Any]:
    return {"format": FORMAT, "version": dnnlib.__version__}


def _is_current(header: dict[str, Any], path: Path) -> bool:
    if {key: header[key] for key in _rules()} != _rules():
        return False
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        return header["zip"] == [status.st_size, status.st_mtime_ns, directory_digest(file)]


def _index_of(header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Index:
    """Check the content of an index. Raises an exception of any type if it is invalid."""
    text, members, json_name = arrays["names"], arrays["members"], header["json_name"]
    str(memoryview(text), "utf-8")  # type: ignore[arg-type]  # raises an error for invalid names
    names = Names.of_text(text)
    labels = arrays["labels"] if "labels" in header["arrays"] else None
    is_valid = (
        text.dtype == np.uint8
        and text.shape == (names.ends[-1] + 1,)
        and members.dtype == MEMBER
        and members.shape == (len(names) + (json_name is not None),)
        and isinstance(json_name, str | None)
        and (labels is None or (len(labels) == len(names) and _are_labels(labels)))
    )
    if not is_valid:
        raise ValueError("inconsistent arrays")
    contents = ZipContents(ZipState(*header["zip"]), names, members, json_name, left_out={}, notes=[])
    return Index(contents, parse_dataset_json(header["dataset_json"], str(json_name)), labels)


def _are_labels(labels: np.ndarray) -> bool:
    if labels.ndim == 1:
        return labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() <= MAX_CLASS
    return labels.dtype == np.float32 and labels.ndim == 2 and labels.shape[1] > 0 and bool(np.isfinite(labels).all())
