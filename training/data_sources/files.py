"""Stores of image files: folders and zip files, with the dataset.json that belongs to the images."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

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
from training.data_sources.zip_directory import LOCAL_HEADER, MEMBER, Array, Names, read_directory

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

    def read(self, position: int) -> bytes:
        """Return the bytes of an image. Raises BrokenImageError if it cannot be read."""
        return read_image_file(self.path / self.names[position])

    def read_start(self, position: int, size: int) -> bytes:
        """Return the first `size` bytes of an image. Raises BrokenImageError if it cannot be read."""
        try:
            with open_regular(self.path / self.names[position]) as file:
                return file.read(size)
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error

    def read_json(self) -> bytes:
        assert self.json_name is not None
        return read_regular(self.path / self.json_name, MAX_JSON_BYTES)

    def names_at(self, positions: np.ndarray) -> Iterator[str]:
        """Yield the names of images."""
        return map(self.names.__getitem__, positions)

    def records(self, positions: np.ndarray) -> Iterator[str]:
        """Yield name, size in bytes and modification time in ns of images; uncompressed images have equal sizes.

        A missing file, such as the target of a broken link, has neither; `read` then reports the error.
        """
        for name in self.names_at(positions):
            try:
                status = (self.path / name).stat()
            except OSError:
                yield f"\n{name!r} ()"
            else:
                yield f"\n{name!r} ({status.st_size}, {status.st_mtime_ns})"


class ZipState(NamedTuple):
    """State of a zip file: size in bytes, modification time in ns, and SHA-256 of its directory (see `Directory`)."""

    size: int
    mtime_ns: int
    directory: str | None


class ZipContents(NamedTuple):
    """Images in a zip file, sorted by name.

    state      of the zip file when it was read
    members    MEMBER [images]; if `json_name` is not None, followed by the member of dataset.json
    names, json_name, left_out, notes   as in FolderStore
    """

    state: ZipState
    names: Names
    members: Array
    json_name: str | None
    left_out: LeftOut
    notes: list[str]


def read_zip(path: Path) -> ZipContents:
    """Read the directory of a zip file. Raises UserError if it is corrupt or contains a name twice."""
    try:
        with open_regular(path) as file:
            status, found = os.fstat(file.fileno()), read_directory(file)
    except Exception as error:  # zipfile raises BadZipFile, OSError, ValueError, IndexError, ... for corrupt files
        raise UserError(f"{path} is not a complete zip file ({error}): copy or build it again") from error
    place = {name: k for k, name in enumerate(found.names)}
    if len(place) < len(found.names):
        _refuse_repeated_names(path, found.names)
    names, json_name, left_out, notes = _arrange(found.names)
    members = found.members[[place[name] for name in ([*names, json_name] if json_name else names)]]
    state = ZipState(status.st_size, status.st_mtime_ns, found.digest)
    return ZipContents(state, Names.of(names), members, json_name, left_out, notes)


class ZipStore:
    """Image files in a zip file, with the attributes of FolderStore; `names` is a compact sequence.

    Each member is read at an explicit offset (`_read_at`) in a few microseconds. Forked workers and threads can read
    concurrently, because they share no file position. Member names are never used as paths. A process that opens a zip
    file after it has changed raises UserError.
    """

    def __init__(self, path: Path, contents: ZipContents) -> None:
        self.path = path
        self.contents = contents
        self.json_name, self.left_out, self.notes = contents.json_name, contents.left_out, contents.notes
        self._file: int | None = None

    @property
    def names(self) -> Names:
        return self.contents.names

    @cached_property
    def _members(self) -> np.ndarray:
        return np.asarray(self.contents.members).view(MEMBER)

    def convert_arrays(self, convert: Callable[[np.ndarray], Array]) -> None:
        """Convert the arrays of numbers that describe the images, e.g. to tensors, which data workers share."""
        names = Names(convert(self.names.text), convert(self.names.ends))
        self.contents = self.contents._replace(names=names, members=convert(self._members.view(np.uint8)))
        del self._members

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the file descriptor, and without the view of a tensor that may move.

        A tensor moves to shared memory when it is pickled for another process.
        """
        self.__dict__.pop("_members", None)
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def read(self, position: int) -> bytes:
        """Return the bytes of an image. Raises BrokenImageError if it is corrupt."""
        return self._read(self._members[position].item(), MAX_IMAGE_BYTES)

    def read_start(self, position: int, size: int) -> bytes:
        """Return the first `size` stored bytes of an image, without decompression and without verification."""
        offset, packed, _, _, name_length, _, _ = self._members[position].item()
        return self._read_at_member(offset, name_length, min(size, packed))

    def read_json(self) -> bytes:
        assert self.json_name is not None
        member = self._members[-1].item()
        return self._read(member, min(unpacked_limit(member[1]), MAX_JSON_BYTES))

    def names_at(self, positions: np.ndarray) -> Iterator[str]:
        """Yield the names of images."""
        return self.names.at(positions)

    def records(self, positions: np.ndarray) -> Iterator[str]:
        """Yield name, size in bytes and CRC-32 of images, from the zip directory."""
        members = self._members[positions]
        columns = self.names_at(positions), members["size"].tolist(), members["crc"].tolist()
        return (f"\n{name!r} ({size}, {crc})" for name, size, crc in zip(*columns, strict=True))

    def fingerprints(self, positions: np.ndarray) -> np.ndarray:
        """Return size in bytes and CRC-32 of images as uint64 [images].

        Of uncompressed PNG files of one shape, whose chunks end in CRCs, the CRC-32 takes only 2^16 values.
        """
        members = self._members[positions]
        return members["size"].astype(np.uint64) << np.uint64(32) | members["crc"]

    def _read(self, member: Sequence[int], max_bytes: int) -> bytes:
        offset, packed, size, crc, name_length, method, flags = member
        if max(size, packed) > max_bytes:
            raise BrokenImageError(f"{size} bytes, more than the limit of {max_bytes}")
        if flags & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BrokenImageError("encrypted, or not compressed with deflate: build the zip file again")
        data = self._read_at_member(offset, name_length, packed)
        if method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise BrokenImageError("checksum in the zip file does not match")
        return data

    def _read_at_member(self, offset: int, name_length: int, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            # The last four bytes of the local header are the lengths of the name and of the extra field. The lengths
            # usually match the directory, so one read suffices.
            guess = LOCAL_HEADER + name_length
            found = _read_at(self._file, guess + size, offset)
            head = LOCAL_HEADER + int.from_bytes(found[26:28], "little") + int.from_bytes(found[28:30], "little")
            if head == guess:
                return found[guess:]
            return _read_at(self._file, size, offset + head)
        except OSError as error:
            raise BrokenImageError(str(error)) from error

    def _open(self) -> int:
        """Return a descriptor of the zip file. Raises UserError if it is no longer the file that was read."""
        file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        status = os.fstat(file)
        if (status.st_size, status.st_mtime_ns) != self.contents.state[:2]:
            os.close(file)
            raise UserError(f"{self.path} has changed while it was in use: start again")
        return file


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


def _refuse_repeated_names(path: Path, names: Iterable[str]) -> None:
    counts = Counter(names)
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
    json_name: str | None

    @property
    def names(self) -> Sequence[str]: ...

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
        store = ZipStore(path, read_zip(path))
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
    return _with_store_names(parse_dataset_json(json_bytes(store), where), store, where)


def json_bytes(store: LabelledStore) -> bytes:
    """Return the content of dataset.json; empty if the file is missing. Raises UserError if it cannot be read."""
    try:
        return b"" if store.json_name is None else store.read_json()
    except (OSError, BrokenImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        where = f"{store.path}: {store.json_name}"
        raise UserError(f"{where} cannot be read ({reason}): repair or remove it") from error


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
