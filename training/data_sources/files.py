"""Stores of image files: folders and zip files, with the dataset.json that belongs to the images."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from dnnlib.config import OPTIONS_FILE, UserError
from dnnlib.image_files import BrokenImageError
from dnnlib.images import MAX_IMAGE_BYTES
from dnnlib.util import counted, open_regular, read_regular
from training.data_sources.bounds import unpacked_limit
from training.data_sources.dataset_json import (
    NAME,
    DatasetJson,
    Label,
    is_dataset_json,
    parse_dataset_json,
    refuse_several,
)
from training.data_sources.listing import LeftOut, Listing, describe_left_out, list_files, split_images
from training.data_sources.parts import find_parts
from training.data_sources.sizes import build_command

MAX_JSON_BYTES = 1 << 30
_SEEK_LOCK = threading.Lock()


def read_image_file(path: Path) -> bytes:
    """Return the bytes of an image file. Raises BrokenImageError for a device, pipe, unreadable or oversized file."""
    try:
        return read_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise BrokenImageError(error.strerror or str(error)) from error


class FolderStore:
    """Image files below a folder; `listing` is the list of files, if already known.

    names      sorted paths of the images, relative to the folder
    left_out   other files by kind, see listing.py
    json_name  relative path of dataset.json, None if missing
    notes      lines about an unusual location of dataset.json
    """

    def __init__(self, path: Path, listing: Listing | None = None) -> None:
        self.path = path
        files, links = listing or list_files(path)
        self.names, self.json_name, self.left_out, self.notes = _arrange(files)
        self.left_out |= links

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises BrokenImageError if it cannot be read."""
        return read_image_file(self.path / name)

    def read_start(self, name: str, size: int) -> bytes:
        """Return the first `size` bytes of a file. Raises BrokenImageError if it cannot be read."""
        try:
            with open_regular(self.path / name) as file:
                return file.read(size)
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error

    def read_json(self) -> bytes:
        assert self.json_name is not None
        return read_regular(self.path / self.json_name, MAX_JSON_BYTES)

    def fingerprint(self, name: str) -> tuple[int, ...]:
        """Return the size in bytes and the modification time in ns; uncompressed images of one shape have equal sizes.

        Returns () for a missing file, such as the target of a broken link; `read` then reports the error.
        """
        try:
            status = (self.path / name).stat()
        except OSError:
            return ()
        return status.st_size, status.st_mtime_ns


class ZipStore:
    """Image files in a zip file, keyed by member name, with the attributes of FolderStore.

    Each member is read at an explicit offset (`_read_at`) in a few microseconds. Forked workers and threads can read
    concurrently, because they share no file position. Member names are used as keys only, never as paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
            _refuse_overlaps(infos)
        except Exception as error:  # zipfile raises BadZipFile, OSError, ValueError, IndexError, ... for corrupt files
            raise UserError(f"{path} is not a complete zip file ({error}): copy or build it again") from error
        self._members = _members(infos)
        if len(self._members) < len(infos):
            _refuse_repeated_names(path, infos)
        self.names, self.json_name, self.left_out, self.notes = _arrange(self._members)
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a file descriptor is not valid in another process

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def read(self, name: str) -> bytes:
        """Return the bytes of a member. Raises BrokenImageError if the member is corrupt."""
        return self._read(name, MAX_IMAGE_BYTES)

    def read_start(self, name: str, size: int) -> bytes:
        """Return the first `size` stored bytes of a member, without decompression and without verification."""
        info = self._members[name]
        return self._read_at_member(info, min(size, info.compress_size))

    def read_json(self) -> bytes:
        assert self.json_name is not None
        limit = unpacked_limit(self._members[self.json_name].compress_size)
        return self._read(self.json_name, min(limit, MAX_JSON_BYTES))

    def fingerprint(self, name: str) -> tuple[int, ...]:
        """Return the size in bytes and the CRC-32, from the zip directory.

        Of uncompressed PNG files of one shape, whose chunks end in CRCs, the CRC-32 takes only 2^16 values.
        """
        info = self._members[name]
        return info.file_size, info.CRC

    def _read(self, name: str, max_bytes: int) -> bytes:
        info = self._members[name]
        if max(info.file_size, info.compress_size) > max_bytes:
            raise BrokenImageError(f"{info.file_size} bytes, more than the limit of {max_bytes}")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BrokenImageError("encrypted, or not compressed with deflate: build the zip file again")
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
            # The local header (PKWARE APPNOTE 4.3.7) has 30 bytes. The last four are the lengths of the name and of the
            # extra field. The lengths usually match the directory, so one read suffices.
            guess = 30 + len(info.orig_filename)
            found = _read_at(self._file, guess + size, info.header_offset)
            head = 30 + int.from_bytes(found[26:28], "little") + int.from_bytes(found[28:30], "little")
            if head == guess:
                return found[guess:]
            return _read_at(self._file, size, info.header_offset + head)
        except OSError as error:
            raise BrokenImageError(str(error)) from error


def _members(infos: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    r"""Key members by name. If no name contains `/`, `\` separates folders, as in files of some Windows programs."""
    has_slashes = any("/" in info.filename for info in infos)
    return {info.filename if has_slashes else info.filename.replace("\\", "/"): info for info in infos}


def _read_at(file: int, size: int, offset: int) -> bytes:
    """Read at an offset of a file. Windows has neither pread nor forked workers, so a lock suffices there."""
    if hasattr(os, "pread"):
        return os.pread(file, size, offset)
    with _SEEK_LOCK:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, size)


def _inflate(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # at most one byte more than declared
    except zlib.error as error:
        raise BrokenImageError(str(error)) from error


def _refuse_overlaps(members: Iterable[zipfile.ZipInfo]) -> None:
    """Raise ValueError if members overlap, as in zip bombs, which unpack a few shared bytes many times."""
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ValueError(f"{info.filename!r:.80} overlaps another member")
        end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size


def _refuse_repeated_names(path: Path, members: Iterable[zipfile.ZipInfo]) -> None:
    counts = Counter(info.filename for info in members)
    repeated = [name for name, count in counts.items() if count > 1]
    others = f", and {counted(len(repeated) - 1, 'other name')} more than once" if len(repeated) > 1 else ""
    raise UserError(
        f"{path} holds {repeated[0]!r:.80} {counts[repeated[0]]} times{others}: build the zip file again with unique "
        "names"
    )


FileStore = FolderStore | ZipStore


class LabelledStore(Protocol):
    """Store with image names and an optional dataset.json."""

    path: Path
    names: list[str]
    json_name: str | None

    def read_json(self) -> bytes: ...


def open_store(path: Path, listing: Listing | None = None) -> FileStore:
    """Open a folder or .zip file of images; `listing` is the list of files of a folder, if already known.

    Raises UserError if the path does not exist, is neither a folder nor a .zip file, or contains no images.
    """
    check_exists(path)
    if (path / OPTIONS_FILE).exists():
        raise UserError(f"{path} is the folder of a run, not a dataset: give the dataset that the run was trained on")
    if path.is_dir():
        store: FileStore = FolderStore(path, listing or _list_images(path))
    elif path.suffix.lower() == ".zip":
        store = ZipStore(path)
    else:
        if path.suffix in (".pkl", ".pt"):
            raise UserError(
                f"{path} is not a dataset: give snapshots as --network or --resume, training states as --resume"
            )
        raise UserError(
            f"{path} is neither a folder nor a .zip file: build a dataset from it: {build_command(str(path))}"
        )
    if not store.names:
        others = describe_left_out(store.left_out, verbose=False)
        held = f"; it holds{','.join(line.removeprefix(' ') for line in others)}" if others else ""
        raise UserError(f"{path} holds no images{held}: check the path")
    return store


def check_exists(path: Path) -> None:
    """Raise UserError if the path of a dataset does not exist."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder or .zip file of images")


def _list_images(path: Path) -> Listing:
    """List the files below a folder. Raises UserError if the folder is a dataset of tables, tar shards or lmdb."""
    listing = list_files(path)
    parts = find_parts(path, listing)
    if parts or (path / "data.mdb").exists():
        kind = f".{parts.kind}" if parts else "lmdb"
        raise UserError(
            f"{path} holds a dataset in {kind} files, not image files: build a dataset from it: "
            f"{build_command(str(path))}"
        )
    return listing


def read_dataset_json(store: LabelledStore) -> DatasetJson:
    """Read and check dataset.json, see `parse_dataset_json`; the result is empty if the file is missing.

    Names in the file are relative to its folder; names in the result are relative to the top of the store.
    """
    if store.json_name is None:
        return DatasetJson()
    where = f"{store.path}: {store.json_name}"
    try:
        data = store.read_json()
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}): repair or remove it") from error
    except BrokenImageError as error:
        raise UserError(f"{where} cannot be read ({error}): repair or remove it") from error
    return _with_store_names(parse_dataset_json(data, where), store, where)


def _with_store_names(content: DatasetJson, store: LabelledStore, where: str) -> DatasetJson:
    """Return the content with labels keyed by the image names of the store.

    Names in the file may be relative to its folder or to the top of the store, with `./` or `\\`. The interpretation
    that matches the most names in the store is used.
    """
    labels = content.labels
    assert store.json_name is not None
    folder = store.json_name[: -len(NAME)]
    if labels is None or (not folder and all(name in labels for name in store.names)):
        return _with_note_on_missing(content, store)
    known = set(store.names)
    resolvers: list[Callable[[str], str]] = [folder.__add__, lambda name: folder + _plain(name), _plain]
    resolve = max(resolvers, key=lambda resolve: sum(resolve(name) in known for name in labels))
    pairs = [(resolve(name), label) for name, label in labels.items()]
    if len(dict(pairs)) < len(pairs):
        refuse_several(pairs, f"{where}: ")
    first = next(iter(labels))
    found = f"{store.json_name}: the label of {first!r:.80} is assigned to {resolve(first)!r:.80}"
    note = () if resolve is resolvers[0] else (found,)
    return _with_note_on_missing(replace(content, labels=dict(pairs), notes=(*content.notes, *note)), store)


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _with_note_on_missing(content: DatasetJson, store: LabelledStore) -> DatasetJson:
    """Return the content with an additional note if images of some labels are missing."""
    if content.labels is None or len(content.labels) <= len(store.names):
        return content
    missing = content.labels.keys() - set(store.names)
    others = f" and {counted(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
    note = f"{store.json_name} has labels of missing images: {min(missing)!r:.80}{others}"
    return replace(content, notes=(*content.notes, note))


def labels_of(store: LabelledStore, content: DatasetJson) -> list[Label] | None:
    """Return the label of every image of `store` in order, or None. Raises UserError if an image has no label."""
    if content.labels is None:
        return None
    missing = [name for name in store.names if name not in content.labels]
    if missing:
        others = f" and {counted(len(missing) - 1, 'other image')}" if len(missing) > 1 else ""
        raise UserError(
            f"{store.path}: {store.json_name} has no label for {missing[0]!r}{others}: label all images, or remove "
            "the unlabelled ones"
        )
    return [content.labels[name] for name in store.names]


def _arrange(files: Iterable[str]) -> tuple[list[str], str | None, LeftOut, list[str]]:
    """Split files into image names, the path of dataset.json, other files by kind, and notes."""
    names, left_out = split_images(files)
    found = [file for file in left_out.get(".json", ()) if is_dataset_json(file)]
    json_name, notes = find_json(found, names)
    if json_name is not None:
        left_out[".json"].remove(json_name)
    return names, json_name, {kind: others for kind, others in left_out.items() if others}, notes


def find_json(found: Sequence[str], names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Select the dataset.json to read, at the top or in a folder that contains all images, and return notes.

    The notes report an unusual name or location of the file, or a file that is not read.
    """
    if not found or NAME in found:
        return (NAME if found else None), []
    if top := [file for file in found if "/" not in file]:
        return top[0], [f"{top[0]} is read as {NAME}"]
    common = [file for file in found if all(name.startswith(file[: -len(NAME)]) for name in names)]
    if common:
        common.sort(key=lambda file: not file.endswith(NAME))
        return common[0], [f"{common[0]} is read: all images are in its folder"]
    return None, [f"{found[0]} is not read, because images are outside its folder: to use it, give its folder"]
