"""A folder or zip file of images, and the dataset.json beside them."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.config import FLOAT32_MAX, OPTIONS_FILE, UserError
from dnnlib.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, BrokenImageError
from dnnlib.util import open_regular, parse_json, read_regular
from training.data_sources.bounds import unpacked_limit

Label = int | list[float]

MAX_CLASS = 2**31 - 1

_MAX_JSON_BYTES = 1 << 30
_TURNS = threading.Lock()


def _is_image(name: str) -> bool:
    basename = name.rsplit("/", 1)[-1]
    return basename.lower().endswith(IMAGE_SUFFIXES) and not basename.startswith(".")


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}): check its permissions") from error


def read_image_file(path: Path) -> bytes:
    """Return the bytes of an image file. Raises BrokenImageError, also for a device, a pipe, and one too large."""
    try:
        return read_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise BrokenImageError(error.strerror or str(error)) from error


class FolderStore:
    """Images below a folder, by their path relative to it; `names` is sorted, `num_ignored` counts other files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(
            (Path(parent) / file).relative_to(path).as_posix()
            for parent, _, files in os.walk(path, onerror=_refuse_folder)
            for file in files
        )
        self.names = [name for name in files if _is_image(name)]
        self.num_ignored = len(files) - len(self.names) - ("dataset.json" in files)
        self.has_json = "dataset.json" in files

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises BrokenImageError when it cannot be read."""
        return read_image_file(self.path / name)

    def read_start(self, name: str, size: int) -> bytes:
        """The file's first bytes. Raises BrokenImageError when it cannot be read."""
        try:
            with open_regular(self.path / name) as file:
                return file.read(size)
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error

    def read_json(self) -> bytes:
        return read_regular(self.path / "dataset.json", _MAX_JSON_BYTES)

    def fingerprint(self, name: str) -> tuple[int, ...]:
        """Size in bytes and time of last change in ns: uncompressed images of one shape all have the same size."""
        try:
            about = (self.path / name).stat()
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read ({error.strerror}): repair or remove it") from error
        return about.st_size, about.st_mtime_ns


class ZipStore:
    """Images in a zip file, by their name in it; `names` is sorted, `num_ignored` counts other files.

    Members are read at their place in the file (`_read_at`), which costs a few microseconds and, having no file
    position, is safe across forked workers and threads. Names are only ever keys, never paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            _refuse_overlaps(members.values())
        except Exception as error:  # zipfile raises BadZipFile, OSError, ValueError, IndexError, ... on damaged files
            raise UserError(f"{path} is not a complete zip file ({error}): copy or build it again") from error
        self._members = members
        self.names = sorted(filter(_is_image, members))
        self.has_json = "dataset.json" in members
        self.num_ignored = len(members) - len(self.names) - self.has_json
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a file descriptor means nothing in another process

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def read(self, name: str) -> bytes:
        """The member's bytes. Raises BrokenImageError when it is damaged."""
        return self._read(name, MAX_IMAGE_BYTES)

    def read_start(self, name: str, size: int) -> bytes:
        """The member's first bytes as they are in the file: compressed or not, and not checked."""
        info = self._members[name]
        return self._read_at_member(info, min(size, info.compress_size))

    def read_json(self) -> bytes:
        limit = unpacked_limit(self._members["dataset.json"].compress_size)
        return self._read("dataset.json", min(limit, _MAX_JSON_BYTES))

    def fingerprint(self, name: str) -> tuple[int, ...]:
        """Size in bytes and CRC-32, from the zip directory."""
        info = self._members[name]
        return info.file_size, info.CRC

    def _read(self, name: str, max_bytes: int) -> bytes:
        info = self._members[name]
        if max(info.file_size, info.compress_size) > max_bytes:
            raise BrokenImageError(f"{info.file_size} bytes, more than the {max_bytes} that one file may have")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BrokenImageError("encrypted, or compressed by other means than deflate: pack the zip file again")
        data = self._read_at_member(info, info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            data = _inflate(data, info.file_size)
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise BrokenImageError("checksum in the zip file does not match")
        return data

    def _read_at_member(self, info: zipfile.ZipInfo, size: int) -> bytes:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            # Local header (PKWARE APPNOTE 4.3.7): 30 bytes, the last four are the lengths of the name and extra field.
            lengths = _read_at(self._file, 4, info.header_offset + 26)
            start = (
                info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            )
            return _read_at(self._file, size, start)
        except OSError as error:
            raise BrokenImageError(str(error)) from error


def _read_at(file: int, size: int, place: int) -> bytes:
    """Read at a place of a file. Windows has no pread; it forks no workers either, so that threads taking turns do."""
    if hasattr(os, "pread"):
        return os.pread(file, size, place)
    with _TURNS:
        os.lseek(file, place, os.SEEK_SET)
        return os.read(file, size)


def _inflate(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # never more than was declared, plus one
    except zlib.error as error:
        raise BrokenImageError(str(error)) from error


def _refuse_overlaps(members: Iterable[zipfile.ZipInfo]) -> None:
    """Raise ValueError where members share bytes, of which few would become terabytes."""
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ValueError(f"{info.filename!r:.80} overlaps another member")
        end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size


FileStore = FolderStore | ZipStore


def open_store(path: Path) -> FileStore:
    """Open a folder or .zip of images. Raises UserError when it is missing, something else, or holds no images."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder or .zip file of images")
    if (path / OPTIONS_FILE).exists():
        raise UserError(f"{path} is the folder of a run, whose pictures are no data set: give that of the run's images")
    if path.is_dir():
        store: FileStore = FolderStore(path)
    elif path.suffix.lower() == ".zip":
        store = ZipStore(path)
    else:
        if path.suffix in (".pkl", ".pt"):
            raise UserError(f"{path} is no data set: --network takes snapshots, --resume them and training states")
        raise UserError(f"{path} is neither a folder nor a .zip file: convert it with dataset_tool.py first")
    if not store.names:
        raise UserError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}): check the path")
    return store


@dataclass(frozen=True, kw_only=True)
class DatasetJson:
    """Content of dataset.json: labels by image name (None when there are none) and all other keys as `meta`."""

    labels: dict[str, Label] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> list[str] | None:
        return self.meta.get("class_names")


def read_dataset_json(store: FileStore) -> DatasetJson:
    """Read and check `{"labels": [["00000/img00000000.png", 3], ...], ...}`; empty when the file is missing.

    All labels are class numbers, or all are vectors of one length. Raises UserError naming the first bad entry.
    """
    if not store.has_json:
        return DatasetJson()
    where = f"{store.path}: dataset.json"
    try:
        content = parse_json(store.read_json())
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}): repair or remove it") from error
    except (BrokenImageError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}): repair or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f'{where} must be an object with the key "labels", not a {type(content).__name__}')
    names = content.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f'{where}: "class_names" must be null or a list of strings, not {names!r:.80}')
    pairs = content.pop("labels", None)
    if pairs is None:
        return DatasetJson(meta=content)
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f'{where}: "labels" must be null or a list like [["00000/img00000000.png", 3], ...]')

    vector_length = len(pairs[0][1]) if _is_pair(pairs[0]) and isinstance(pairs[0][1], list) else None
    for pair in pairs:
        if not _is_pair(pair) or not _is_label(pair[1], vector_length):
            wanted = "class numbers from 0" if vector_length is None else f"lists of {vector_length} numbers"
            raise UserError(f"{where}: label {pair!r:.80}: labels are pairs [name, label], all of them {wanted}")
    return DatasetJson(labels=dict(pairs), meta=content)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _is_label(label: object, vector_length: int | None) -> bool:
    if vector_length is None:
        return type(label) is int and 0 <= label <= MAX_CLASS
    return (
        isinstance(label, list)
        and len(label) == vector_length > 0
        and all(type(value) in (int, float) and abs(value) <= FLOAT32_MAX for value in label)
    )


def labels_of(store: FileStore, content: DatasetJson) -> list[Label] | None:
    """The label of every image of `store` in order, or None. Raises UserError when an image has no label."""
    if content.labels is None:
        return None
    missing = [name for name in store.names if name not in content.labels]
    if missing:
        raise UserError(
            f"{store.path}: dataset.json has no label for {missing[0]!r} and {len(missing) - 1} other images: "
            "labels must cover all images"
        )
    return [content.labels[name] for name in store.names]
