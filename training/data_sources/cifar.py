"""Reader of CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their Python archives, without running code from pickles."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dnnlib.config import UserError
from dnnlib.util import describe_error
from training.data_sources.bounds import Member, Unpacked
from training.data_sources.dataset_json import MAX_CLASS, Label

_MAX_MEMBER_BYTES = 1 << 28  # CIFAR-100's training set is 155 MB
_MAX_READS = 1 << 22  # read calls per pickle; CIFAR-100's training set needs 0.6 million
_PIXELS = 3 * 32 * 32

# Folder in the archive -> training files, key of the labels, (file, key) of the class names.
_LAYOUTS = {
    "cifar-10-batches-py": (
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        b"labels",
        ("batches.meta", b"label_names"),
    ),
    "cifar-100-python": (("train",), b"fine_labels", ("meta", b"fine_label_names")),
}


def read_cifar(
    stream: Unpacked, members: Iterable[Member], path: Path, folder: str
) -> tuple[np.ndarray, list[Label], list[str] | None]:
    """Return the training images uint8 [N, 32, 32, 3], class numbers, and class names (None if not in the archive)."""
    files, label_key, (names_file, names_key) = _LAYOUTS[folder]
    contents = _read_pickles(stream, members, path, folder, (*files, names_file))
    planes, labels = [], []
    for file in files:
        batch = contents.get(file, {})
        planes.append(_pixels(batch.get(b"data"), path, file))  # [n, 3072]
        batch_labels = batch.get(label_key)
        if not isinstance(batch_labels, list) or len(batch_labels) != len(planes[-1]) or not _are_numbers(batch_labels):
            raise UserError(f"{path}: {file} has no list of class numbers, one per image: download the archive again")
        labels += batch_labels
    images = np.concatenate(planes).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, labels, _class_names(contents.get(names_file, {}).get(names_key), path, names_file)


def _are_numbers(labels: list[Any]) -> bool:
    return all(type(label) is int and 0 <= label <= MAX_CLASS for label in labels)


def _class_names(names: object, path: Path, file: str) -> list[str] | None:
    if not names:
        return None
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise UserError(f"{path}: {file} has no list of strings with the class names: download the archive again")
    return [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names]


def _pixels(data: object, path: Path, file: str) -> np.ndarray:
    if not isinstance(data, _PickledArray) or data.pixels is None:
        raise UserError(f"{path}: {file} holds no uint8 array of 32x32 RGB images: download the archive again")
    return data.pixels


def _read_pickles(
    stream: Unpacked, members: Iterable[Member], path: Path, folder: str, files: tuple[str, ...]
) -> dict[str, dict[bytes, Any]]:
    """Read the files of the dataset, keyed by name, in one pass; seeking back would unpack the archive again."""
    contents: dict[str, dict[bytes, Any]] = {}
    for member in members:
        file = member.name.removeprefix(f"{folder}/")
        if file not in files:
            continue
        if not member.is_plain or member.size > _MAX_MEMBER_BYTES or file in contents:
            problem = "is not a regular file within the size limit, or occurs twice"
            raise UserError(f"{path}: {file} {problem}: download the archive again")
        contents[file] = _unpickle(stream.read(member.size), path, file)
    return contents


def _unpickle(data: bytes, path: Path, file: str) -> dict[bytes, Any]:
    try:
        unpickler = _ArrayUnpickler(data)
        content = unpickler.load()
        unpickler.memo.clear()  # breaks a reference cycle that would keep the unpickler and its data in memory
    except UserError as error:
        raise UserError(f"{path}: {file}: {error}") from error
    except Exception as error:  # a corrupt pickle can raise any exception
        problem = f"cannot be read ({describe_error(error)}): download the archive again"
        raise UserError(f"{path}: {file} {problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {file} is not a dictionary: download the archive again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


class _PickledDtype:
    """Substitute for numpy.dtype while unpickling; stores only the name."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which do not matter for uint8."""


class _PickledArray:
    """Substitute for numpy.ndarray while unpickling; `pixels` is the array if it is uint8 in C or Fortran order."""

    def __init__(self, *_: object) -> None:
        self.pixels: np.ndarray | None = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, is_fortran, data = state
        is_bytes = isinstance(dtype, _PickledDtype) and dtype.name in ("u1", "|u1", "uint8")
        if is_bytes and isinstance(data, bytes) and shape == [len(data) // _PIXELS, _PIXELS]:
            self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
}


# Opcodes that the module pickle implements with time and memory proportional to the size of their input.
_OPCODES = """
    PROTO STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE BUILD
"""


class _CountedBytes(io.BytesIO):
    """Byte stream with a limited number of reads; each byte of a pickle can create an object of 64 bytes."""

    num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.num_reads += 1
        if self.num_reads > _MAX_READS:
            raise ValueError(f"more parts than the limit of {_MAX_READS}")
        return super().read(size)


class _ArrayUnpickler(pickle._Unpickler):
    """Unpickler for dictionaries, lists, strings, numbers and arrays; all accepted globals map to the code above.

    Unlike pickle.Unpickler, this class takes time and memory in proportion to the size of the input. Tuples are read as
    lists, which cannot be dictionary keys, because hashing nested shared tuples takes exponential time. The memo is a
    dictionary, because a list would be allocated up to its largest index. The total size of repeated strings is
    bounded. (`torch_utils.pickles`, the interpreter for snapshots, requires torch; dataset readers do not.)
    """

    memo: dict[int, Any]
    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes) -> None:
        super().__init__(_CountedBytes(data), encoding="bytes")
        self._encode_budget = len(data)  # remaining characters that `_encode` accepts

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _GLOBALS:
            raise UserError(
                f"the pickle refers to {module}.{name}, which does not occur in CIFAR archives: no code was run; "
                "download the archive from its authors"
            )
        return _GLOBALS[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """Implement _codecs.encode(text, 'latin1'), which pickles of bytes in old protocols call."""
        if encoding not in ("latin1", b"latin1"):
            raise ValueError(f"unexpected encoding {encoding!r:.80}")
        self._encode_budget -= len(text)
        if self._encode_budget < 0:
            raise ValueError("its strings encode to more bytes than the file has")
        return (text.decode() if isinstance(text, bytes) else text).encode("latin1")

    def _read_tuple1(self) -> None:
        self.stack[-1:] = [self.stack[-1:]]

    def _read_tuple2(self) -> None:
        self.stack[-2:] = [self.stack[-2:]]

    def _read_tuple3(self) -> None:
        self.stack[-3:] = [self.stack[-3:]]

    def _read_frame(self) -> None:
        self.read(8)  # length of the frame, a hint for reading ahead

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, code)[0]: pickle._Unpickler.dispatch[getattr(pickle, code)[0]] for code in _OPCODES.split()
    } | {
        pickle.FRAME[0]: _read_frame,
        pickle.TUPLE[0]: pickle._Unpickler.dispatch[pickle.LIST[0]],
        pickle.EMPTY_TUPLE[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
        pickle.TUPLE1[0]: _read_tuple1,
        pickle.TUPLE2[0]: _read_tuple2,
        pickle.TUPLE3[0]: _read_tuple3,
    }
