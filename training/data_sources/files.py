"""A folder or zip file of images, and the dataset.json beside them."""

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
from training.data_sources.listing import LeftOut, Listing, describe_left_out, list_files, sort_out
from training.data_sources.parts import find_parts
from training.data_sources.sizes import build_command

MAX_JSON_BYTES = 1 << 30
_TURNS = threading.Lock()


def read_image_file(path: Path) -> bytes:
    """Return the bytes of an image file. Raises BrokenImageError, also for a device, a pipe, and one too large."""
    try:
        return read_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise BrokenImageError(error.strerror or str(error)) from error


class FolderStore:
    """Images below a folder, by their path relative to it; `listing` is that of the folder where it is known.

    names      sorted
    left_out   other files by kind, see `listing`
    json_name  of dataset.json, None without
    notes      on what is not where it usually is
    """

    def __init__(self, path: Path, listing: Listing | None = None) -> None:
        self.path = path
        files, links = listing or list_files(path)
        self.names, self.json_name, self.left_out, self.notes = _arrange(files)
        self.left_out |= links

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
        assert self.json_name is not None
        return read_regular(self.path / self.json_name, MAX_JSON_BYTES)

    def fingerprint(self, name: str) -> tuple[int, ...]:
        """Size in bytes and time of last change in ns: uncompressed images of one shape all have the same size.

        Nothing for a file that is not there, as a broken link's: `read` tells what is wrong with it.
        """
        try:
            about = (self.path / name).stat()
        except OSError:
            return ()
        return about.st_size, about.st_mtime_ns


class ZipStore:
    """Images in a zip file, by their name in it; with the attributes of a FolderStore.

    Members are read at their place in the file (`_read_at`), which costs a few microseconds and, having no file
    position, is safe across forked workers and threads. Names are only ever keys, never paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
            _refuse_overlaps(infos)
        except Exception as error:  # zipfile raises BadZipFile, OSError, ValueError, IndexError, ... on damaged files
            raise UserError(f"{path} is not a complete zip file ({error}): copy or build it again") from error
        self._members = _members(infos)
        if len(self._members) < len(infos):
            _refuse_repeated_names(path, infos)
        self.names, self.json_name, self.left_out, self.notes = _arrange(self._members)
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
        assert self.json_name is not None
        limit = unpacked_limit(self._members[self.json_name].compress_size)
        return self._read(self.json_name, min(limit, MAX_JSON_BYTES))

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
            # They are usually as in the directory, so that one read has all; another one follows where they are not.
            guess = 30 + len(info.orig_filename)
            found = _read_at(self._file, guess + size, info.header_offset)
            head = 30 + int.from_bytes(found[26:28], "little") + int.from_bytes(found[28:30], "little")
            if head == guess:
                return found[guess:]
            return _read_at(self._file, size, info.header_offset + head)
        except OSError as error:
            raise BrokenImageError(str(error)) from error


def _members(infos: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    r"""Return the files by name. Where no name has a `/`, `\` is between folders, as some programs of Windows write."""
    has_slashes = any("/" in info.filename for info in infos)
    return {info.filename if has_slashes else info.filename.replace("\\", "/"): info for info in infos}


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


def _refuse_repeated_names(path: Path, members: Iterable[zipfile.ZipInfo]) -> None:
    counts = Counter(info.filename for info in members)
    repeated = [name for name, count in counts.items() if count > 1]
    others = f", and {counted(len(repeated) - 1, 'other name')} more than once" if len(repeated) > 1 else ""
    raise UserError(
        f"{path} holds {repeated[0]!r:.80} {counts[repeated[0]]} times{others}: pack the files again, each once and "
        "under a name of its own"
    )


FileStore = FolderStore | ZipStore


class LabelledStore(Protocol):
    """Names of images, and the dataset.json beside them, None without."""

    path: Path
    names: list[str]
    json_name: str | None

    def read_json(self) -> bytes: ...


def open_store(path: Path, listing: Listing | None = None) -> FileStore:
    """Open a folder, of which the listing may be known to be of images, or .zip of images.

    Raises UserError when it is missing, something else, or holds no images.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder or .zip file of images")
    if (path / OPTIONS_FILE).exists():
        raise UserError(f"{path} is the folder of a run, whose pictures are no data set: give that of the run's images")
    if path.is_dir():
        store: FileStore = FolderStore(path, listing or _list_images(path))
    elif path.suffix.lower() == ".zip":
        store = ZipStore(path)
    else:
        if path.suffix in (".pkl", ".pt"):
            raise UserError(f"{path} is no data set: --network takes snapshots, --resume them and training states")
        raise UserError(f"{path} is neither a folder nor a .zip file: build a set of it: {build_command(str(path))}")
    if not store.names:
        others = describe_left_out(store.left_out, verbose=False)
        held = f"; it holds{','.join(line.removeprefix(' ') for line in others)}" if others else ""
        raise UserError(f"{path} holds no images{held}: check the path")
    return store


def _list_images(path: Path) -> Listing:
    """List the files below a folder. Raises UserError where the data set is tables, shards or lmdb among them."""
    listing = list_files(path)
    parts = find_parts(path, listing)
    if parts or (path / "data.mdb").exists():
        kind = f".{parts.kind}" if parts else "lmdb"
        raise UserError(
            f"{path} holds a data set in {kind} files, not in images: build a set of it: {build_command(str(path))}"
        )
    return listing


def read_dataset_json(store: LabelledStore) -> DatasetJson:
    """Read and check dataset.json, see `parse_dataset_json`; empty when the file is missing.

    The names in it start from its folder, those of the result from the top of the store.
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
    return _placed(parse_dataset_json(data, where), store, where)


def _placed(content: DatasetJson, store: LabelledStore, where: str) -> DatasetJson:
    """Return the content with labels by names from the top of the store.

    In the file they start from its folder, or from the top, with `./` or `\\` or without: as most of them are found.
    """
    labels = content.labels
    assert store.json_name is not None
    folder = store.json_name[: -len(NAME)]
    if labels is None or (not folder and all(name in labels for name in store.names)):
        return _with_note_on_missing(content, store)
    known = set(store.names)
    forms: list[Callable[[str], str]] = [folder.__add__, lambda name: folder + _plain(name), _plain]
    form = max(forms, key=lambda form: sum(form(name) in known for name in labels))
    pairs = [(form(name), label) for name, label in labels.items()]
    if len(dict(pairs)) < len(pairs):
        refuse_several(pairs, f"{where}: ")
    first = next(iter(labels))
    found = f"{store.json_name}: the label of {first!r:.80} is taken for {form(first)!r:.80}, from the top of the set"
    note = () if form is forms[0] else (found,)
    return _with_note_on_missing(replace(content, labels=dict(pairs), notes=(*content.notes, *note)), store)


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _with_note_on_missing(content: DatasetJson, store: LabelledStore) -> DatasetJson:
    """Return the content with a note where images that have labels are not there."""
    if content.labels is None or len(content.labels) <= len(store.names):
        return content
    missing = content.labels.keys() - set(store.names)
    others = f" and {counted(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
    note = f"{store.json_name} has labels of images that are not there: {min(missing)!r:.80}{others}"
    return replace(content, notes=(*content.notes, note))


def labels_of(store: LabelledStore, content: DatasetJson) -> list[Label] | None:
    """The label of every image of `store` in order, or None. Raises UserError when an image has no label."""
    if content.labels is None:
        return None
    missing = [name for name in store.names if name not in content.labels]
    if missing:
        others = f" and {counted(len(missing) - 1, 'other image')}" if len(missing) > 1 else ""
        raise UserError(
            f"{store.path}: {store.json_name} has no label for {missing[0]!r}{others}: give all images one, or take "
            "away those without"
        )
    return [content.labels[name] for name in store.names]


def _arrange(files: Iterable[str]) -> tuple[list[str], str | None, LeftOut, list[str]]:
    """Return of all files the images, dataset.json, the others by kind, and notes."""
    names, left_out = sort_out(files)
    found = [file for file in left_out.get(".json", ()) if is_dataset_json(file)]
    json_name, notes = find_json(found, names)
    if json_name is not None:
        left_out[".json"].remove(json_name)
    return names, json_name, {kind: others for kind, others in left_out.items() if others}, notes


def find_json(found: Sequence[str], names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return which dataset.json of those found counts: at the top, or else in the one folder that holds all images.

    And a note where it is not at the top.
    """
    if not found or NAME in found:
        return (NAME if found else None), []
    if top := [file for file in found if "/" not in file]:
        return top[0], [f"{top[0]} is read as {NAME}"]
    around = [file for file in found if all(name.startswith(file[: -len(NAME)]) for name in names)]
    if around:
        around.sort(key=lambda file: not file.endswith(NAME))
        return around[0], [f"{around[0]} is read: all images are in its folder"]
    return None, [f"{found[0]} is not read, because images lie outside its folder: to use it, give that folder"]
