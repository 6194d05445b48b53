"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their Python archives, without running any code of the pickles."""

from __future__ import annotations

import io
import math
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.config import UserError

_MAX_MEMBER_BYTES = 1 << 28  # CIFAR-100's training set is 155 MB

# Folder in the archive -> training files, key of the labels, file and key of the class names.
_LAYOUTS = {
    "cifar-10-batches-py": (
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        b"labels",
        ("batches.meta", b"label_names"),
    ),
    "cifar-100-python": (("train",), b"fine_labels", ("meta", b"fine_label_names")),
}


def read_cifar(archive: tarfile.TarFile, path: Path, folder: str) -> tuple[np.ndarray, list[Any], list[str] | None]:
    """Return the training images uint8 [N, 32, 32, 3], class numbers and class names (None if the archive has none)."""
    files, label_key, (names_file, names_key) = _LAYOUTS[folder]
    contents = _read_pickles(archive, path, folder, (*files, names_file))
    planes, labels = [], []
    for file in files:
        batch = contents.get(file, {})
        planes.append(_pixels(batch.get(b"data"), path, file))  # [n, 3072]
        batch_labels = batch.get(label_key)
        if not isinstance(batch_labels, list) or len(batch_labels) != len(planes[-1]) or not _are_numbers(batch_labels):
            raise UserError(f"{path}: {file} has no list of class numbers for its images: get the archive again")
        labels += batch_labels
    images = np.concatenate(planes).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    names = contents.get(names_file, {}).get(names_key) or []
    return images, labels, [name.decode() if isinstance(name, bytes) else str(name) for name in names] or None


def _are_numbers(labels: list[Any]) -> bool:
    return all(type(label) is int and label >= 0 for label in labels)


def _pixels(data: object, path: Path, file: str) -> np.ndarray:
    if not isinstance(data, _PickledArray) or data.pixels is None or data.pixels.shape[1:] != (3072,):
        raise UserError(f"{path}: {file} holds no uint8 array of 32x32 RGB images: get the archive again")
    return data.pixels


def _read_pickles(
    archive: tarfile.TarFile, path: Path, folder: str, files: tuple[str, ...]
) -> dict[str, dict[bytes, Any]]:
    """Content by file name, in one pass over the archive: going back in it would mean to unpack it again."""
    contents = {}
    for member in archive:
        file = member.name.removeprefix("./").removeprefix(f"{folder}/")
        if file not in files:
            continue
        if not member.isreg() or member.size > _MAX_MEMBER_BYTES:
            raise UserError(f"{path}: {file} is not a plain file of a possible size: get the archive again")
        stream = archive.extractfile(member)
        assert stream is not None
        contents[file] = _unpickle(stream.read(), path, file)
    return contents


def _unpickle(data: bytes, path: Path, file: str) -> dict[bytes, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{path}: {file}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: {file} cannot be read ({error}): get the archive again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {file} is not a dictionary: get the archive again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


class _PickledDtype:
    """Stands in for numpy.dtype while unpickling: keeps the name only."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: bytes have neither."""


class _PickledArray:
    """Stands in for numpy.ndarray while unpickling; `pixels` is the array if it is one of uint8 in C or F order."""

    def __init__(self, *_: object) -> None:
        self.pixels: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        is_bytes = isinstance(dtype, _PickledDtype) and dtype.name in ("u1", "|u1", "uint8")
        if is_bytes and isinstance(data, bytes) and len(data) == math.prod(shape):
            self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes into old protocols for bytes: _codecs.encode(text, 'latin1')."""
    if encoding not in ("latin1", b"latin1"):
        raise ValueError(f"unexpected encoding {encoding!r}")
    return (text.decode() if isinstance(text, bytes) else text).encode("latin1")


_ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, strings, numbers and arrays; the few globals it knows all stand for code above."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise UserError(
                f"the pickle asks for {module}.{name}, which a CIFAR archive has no use for: nothing was run; "
                "get the archive from its authors"
            )
        return _ALLOWED_GLOBALS[module, name]
