"""Directories of zip files in comparison with zipfile, and the index of a large zip file."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_helpers import encode
from fuzzing import CORRUPTION, corrupted, draws, for_all
from hypothesis import strategies as st

from dnnlib.config import UserError
from training.data_sources import labelled, zip_directory, zip_index
from training.data_sources.build import new_dataset
from training.data_sources.stored_zip import StoredZip
from training.data_sources.zip_directory import Directory, Names, OverlapError, read_directory
from training.data_sources.zip_index import index_path, is_trusted, read_index
from training.dataset import DatasetConfig, ImageDataset

Arrays = dict[str, np.ndarray]

CLASSES = [k % 3 for k in range(6)]
VECTORS = [[0.1 * k, 2.0] for k in range(6)]


def directory_of_zipfile(data: bytes) -> list[tuple[Any, ...]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    return [(i.filename, i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos]


def found_directory(found: Directory) -> list[tuple[Any, ...]]:
    columns = [found.members[name].tolist() for name in ("offset", "packed", "size", "crc", "method")]
    return list(zip(found.names, *columns, strict=True))


def zip_of(names: list[str], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.comment = comment
        for k, name in enumerate(names):
            archive.writestr(name, b"" if name.endswith("/") else b"%d" % k * 20)
    return buffer.getvalue()


def info_with(name: str, extra: bytes) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.extra = extra
    return info


def zip_with_extra_fields() -> bytes:
    """Return a zip file with time stamps and owners, as written by Info-ZIP, in every second member."""
    buffer = io.BytesIO()
    fields = struct.pack("<HHBI", 0x5455, 5, 1, 7) + struct.pack("<HHBBIBI", 0x7875, 11, 1, 4, 0, 4, 0)
    with zipfile.ZipFile(buffer, "w") as archive:
        for k in range(8):
            archive.writestr(info_with(f"{k}.png", fields * (k % 2)), b"%d" % k)
    return buffer.getvalue()


USUAL = {
    "stored": zip_of(["0/a.png", "0/b.png", "dataset.json"]),
    "deflated, with folders": zip_of(["0/", "0/a.png", "1/", "1/b.png"], zipfile.ZIP_DEFLATED),
    "UTF-8": zip_of(["ä/0.png", "b/1.png", "画像/2.png"]),
    "extra fields": zip_with_extra_fields(),
}
UNUSUAL = {
    "a comment": zip_of(["a.png", "b.png"], comment=b"by hand"),
    "a program before it": b"#!/bin/sh\n" + zip_of(["a.png", "b.png"]),
    "another encoding": zip_of(["aa.png", "b.png"]).replace(b"aa.png", b"\x84a.png"),
    "no members": zip_of([]),
}


@pytest.mark.parametrize("kind", [*USUAL, *UNUSUAL])
def test_directories_equal_those_of_zipfile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of the usual form are parsed without zipfile."""
    data = (USUAL | UNUSUAL)[kind]
    if kind in USUAL:
        monkeypatch.setattr(zip_directory, "_read_with_zipfile", None)
    assert found_directory(read_directory(io.BytesIO(data))) == directory_of_zipfile(data)


def test_directories_of_zip64_equal_those_of_zipfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2^16 members, and an offset beyond 4 GiB; the file is sparse."""
    monkeypatch.setattr(zip_directory, "_read_with_zipfile", None)
    path = tmp_path / "large.zip"
    with StoredZip(path) as archive:
        for k in range(2**16):
            archive.add(f"{k:05d}.png", b"1")
        archive._position += 2**32
        archive._file.seek(archive._position)
        archive.add("last.png", b"22")
    with path.open("rb") as file, zipfile.ZipFile(path) as reference:
        found, last = read_directory(file), reference.getinfo("last.png")
    assert len(found.names) == 2**16 + 1
    assert found.names == reference.namelist()
    assert last.header_offset > 2**32
    assert found.members[-1]["offset"] == last.header_offset


def test_long_sizes_are_read_from_zip64_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three values of a member are in its Zip64 field, which follows another field."""
    data = zip_of(["a.png"])
    start, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    header = bytearray(data[start:end])
    size = struct.unpack_from("<I", header, 24)[0]
    fields = struct.pack("<HHB", 0x5455, 1, 0) + struct.pack("<HHQQQ", 1, 24, size, size, 0)
    header[20:28] = b"\xff" * 8
    header[42:46] = b"\xff" * 4
    header[30:32] = struct.pack("<H", len(fields))
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(header) + len(fields), start, 0)
    whole = data[:start] + bytes(header) + fields + tail
    monkeypatch.setattr(zip_directory, "_read_with_zipfile", None)
    assert (
        found_directory(read_directory(io.BytesIO(whole))) == directory_of_zipfile(whole) == directory_of_zipfile(data)
    )


@draws(300, 5000)
def test_corrupt_directories_are_read_as_by_zipfile(examples: int) -> None:
    """A corrupt file is either refused or has the members that zipfile finds."""

    @for_all(examples, st.sampled_from([*USUAL.values(), *UNUSUAL.values()]), CORRUPTION)
    def check(data: bytes, corruption: Any) -> None:
        changed = corrupted(data, corruption)
        try:
            expected = directory_of_zipfile(changed)
        except Exception as error:  # zipfile raises many types of errors
            with pytest.raises(type(error)):
                read_directory(io.BytesIO(changed))
            return
        with suppress(OverlapError):
            found = found_directory(read_directory(io.BytesIO(changed)))
            assert found == expected or b"\\" in changed  # another separator


def test_names_are_a_sequence() -> None:
    words = ["", "a", "画像/ä.png", "b" * 70_000]
    names = Names.of(words)
    assert list(names) == words == [names[k - 4] for k in range(4)]
    assert names[1:3] == words[1:3]
    assert list(names.at(np.array([2, 0, 2]))) == [words[2], "", words[2]]
    assert list(Names.of([])) == []
    with pytest.raises(IndexError):
        names[4]


# The index. LARGE is small, so that small files have an index.


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "LARGE", 6)


def write_dataset(path: Path, labels: list[Any] | None, seed: int = 0, key: str = "labels") -> Path:
    images = np.random.RandomState(seed).randint(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    names = [f"{k % 2}/img{5 - k}.png" for k in range(6)]
    pairs = labels and [[name, label] for name, label in zip(names, labels, strict=True)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, pixels in zip(names, images, strict=True):
            archive.writestr(name, encode(pixels))
        archive.writestr("dataset.json", json.dumps({key: pairs, "format_version": 1, "note": "ä"}))
    return path


def facts(path: Path, **changes: Any) -> dict[str, Any]:
    """Return everything that a dataset computes from its file."""
    options: dict[str, Any] = {"path": str(path), "use_labels": True} | changes
    dataset = ImageDataset(DatasetConfig(**options))
    return {
        "hash": dataset.content_hash,
        "names": [dataset.file_name(k) for k in range(len(dataset))],
        "pixels": dataset.images(range(len(dataset))).tolist(),
        "labels": dataset.labels.tolist(),
        "type": dataset.labels.dtype,
        "meta": dataset.meta,
        "notes": dataset.notes,
        "c_dim": (dataset.c_dim, dataset.label_kind, dataset.has_labels),
    }


@pytest.mark.parametrize("labels", [CLASSES, VECTORS, None])
@pytest.mark.parametrize("changes", [{}, {"holdout": 2}, {"max_images": 3, "mirror": True}])
def test_an_index_changes_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[Any] | None, changes: dict[str, Any]
) -> None:
    path = write_dataset(tmp_path / "set.zip", labels)
    options = {"use_labels": labels is not None} | changes
    expected = facts(path, **options)
    assert not index_path(path).exists()  # a small file has none
    monkeypatch.setattr(labelled, "LARGE", 6)
    assert facts(path, **options) == expected
    monkeypatch.setattr(labelled, "open_store", None)  # from here on the index is sufficient
    assert facts(path, **options) == expected


def test_the_data_hash_of_a_zip_file_is_fixed(tmp_path: Path, large: None) -> None:
    """Resuming compares this hash with that of earlier releases: SHA-256 of dataset.json, flips, names, CRCs."""
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    with zipfile.ZipFile(path) as archive:
        lines = [f"\n{i.filename!r} {(i.file_size, i.CRC)}" for i in archive.infolist() if i.filename != "dataset.json"]
        text = archive.read("dataset.json") + b"mirror=False" + "".join(sorted(lines)).encode()
    for _ in range(2):  # first without, then with an index
        assert facts(path)["hash"] == hashlib.sha256(text).hexdigest()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"0/img1.png")] ^= 1
    path.write_bytes(data)


# Own files that are not a usable index.
SPOILED: dict[str, Callable[[Path], Any]] = {
    "damaged": damage,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-64]),
    "only a signature": lambda path: path.write_bytes(path.read_bytes()[:22]),
    "writable by the group": lambda path: path.chmod(0o664),
    "writable by others": lambda path: path.chmod(0o646),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_unusable_index_is_ignored_and_replaced(tmp_path: Path, large: None, kind: str) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    expected = facts(path)
    SPOILED[kind](index_path(path))
    assert read_index(path) is None
    assert facts(path) == expected
    assert read_index(path) is not None
    assert {file.name for file in tmp_path.iterdir()} == {"set.zip", "set.zip.index"}


def test_files_of_other_programs_are_left_alone(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    expected = facts(path)
    for content in (pickle.dumps({"a": 1}), b"S" + index_path(path).read_bytes()[1:]):
        index_path(path).write_bytes(content)
        assert facts(path) == expected
        assert index_path(path).read_bytes() == content
    index_path(path).unlink()
    index_path(path).mkdir()
    assert facts(path) == expected
    assert {file.name for file in tmp_path.iterdir()} == {"set.zip", "set.zip.index"}


def test_changed_bytes_of_an_index_change_no_value(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    expected = facts(path)
    whole = index_path(path).read_bytes()

    @for_all(100, CORRUPTION)
    def check(corruption: Any) -> None:
        index_path(path).write_bytes(corrupted(whole, corruption))
        assert facts(path) == expected
        index_path(path).unlink()


def rows(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: change(arrays[name])}


def entries(**changes: Any) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        header = json.loads(arrays["header"].tobytes()) | changes
        return arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}

    return change


# Valid files with invalid content.
INVALID: dict[str, Callable[[Arrays], Arrays]] = {
    "two labels": rows("labels", lambda x: x[:2]),
    "negative labels": rows("labels", lambda x: x - 5),
    "labels of another type": rows("labels", lambda x: x.astype(np.float64)),
    "vectors that are not finite": rows("labels", lambda x: np.full((6, 2), np.nan, np.float32)),
    "labels without axes": rows("labels", lambda x: x[0]),
    "too few members": rows("members", lambda x: x[:-1]),
    "members of another type": rows("members", lambda x: x["offset"]),
    "another name": rows("names", lambda x: np.append(x, np.array([97, 0], np.uint8))),
    "an incomplete name": rows("names", lambda x: x[:-1]),
    "no names": rows("names", lambda x: x[:0]),
    "names that are not UTF-8": rows("names", lambda x: np.where(x == 0, x, np.uint8(255))),
    "no member of dataset.json": entries(json_name=None),
    "dataset.json without name": entries(json_name=3),
    "meta that is null": entries(dataset_json="null"),
    "meta that is no text": entries(dataset_json={}),
    "wrong class names": entries(dataset_json='{"class_names": [1, 2]}'),
    "other rules": entries(format=0),
    "another release": entries(version="0.0"),
    "objects": lambda arrays: arrays | {"labels": np.array([Path("a")] * 6)},
    "no header": lambda arrays: {name: x for name, x in arrays.items() if name != "header"},
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_content_of_an_index_is_ignored(tmp_path: Path, large: None, kind: str) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    expected = facts(path)
    signature, archive = index_path(path).read_bytes().split(b"\n", 1)
    for change, is_valid in ((dict, True), (INVALID[kind], False)):
        with np.load(io.BytesIO(archive)) as arrays:
            changed = change(dict(arrays))
        with index_path(path).open("wb") as file:
            file.write(signature + b"\n")
            np.savez(file, allow_pickle=True, **changed)
        assert (read_index(path) is not None) == is_valid
        assert facts(path) == expected
    assert read_index(path) is not None


def status_of(owner: int, mode: int = 0o644) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners")
def test_only_an_index_of_trusted_owners_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared folder other users can put an index beside a zip file that they cannot change."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    archive = status_of(2000)
    assert all(is_trusted(status_of(owner), archive) for owner in (0, 1000, 2000))
    assert not is_trusted(status_of(3000), archive)
    assert not any(is_trusted(status_of(1000, mode), archive) for mode in (0o664, 0o646, 0o666, 0o777))


@pytest.mark.parametrize("change", ["content", "time", "labels"])
def test_an_index_of_another_state_is_replaced(tmp_path: Path, large: None, change: str) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    facts(path)
    before, status = index_path(path).read_bytes(), path.stat()
    if change != "time":
        write_dataset(path, CLASSES if change == "content" else VECTORS, seed=1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    found = facts(path)
    assert index_path(path).read_bytes() != before
    index_path(path).unlink()
    assert facts(path) == found
    assert found["labels"] == torch.tensor(_sorted_labels(VECTORS if change == "labels" else CLASSES)).tolist()


def _sorted_labels(labels: list[Any]) -> list[Any]:
    return [label for _, label in sorted((f"{k % 2}/img{5 - k}.png", label) for k, label in enumerate(labels))]


@pytest.mark.parametrize("step", ["training.data_sources.zip_index.open", "numpy.savez", "os.replace"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_no_file_is_left_if_an_index_cannot_be_written(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    failures = []

    def fail(*_: Any, **__: Any) -> None:
        failures.append(step)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(step, fail, raising=False)
        found = facts(path)
    assert failures == [step]
    assert [file.name for file in tmp_path.iterdir()] == ["set.zip"]
    assert facts(path) == found


def test_no_index_is_written_that_would_not_be_trusted(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems give every file the same owner and permissions."""
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    monkeypatch.setattr(zip_index, "is_trusted", lambda index, archive: False)
    facts(path)
    assert [file.name for file in tmp_path.iterdir()] == ["set.zip"]


def test_two_processes_write_an_index_at_the_same_time(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes in two containers have equal ids. The second one writes while the first one does."""
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    save, names, inner = np.savez, [], []

    def save_twice(file: Any, **arrays: Any) -> None:
        names.append(file.name)
        if len(names) == 1:
            inner.append(facts(path))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", save_twice)
    assert [facts(path)] == inner == [facts(path)]
    assert len(names) == len(set(names)) == 2
    assert read_index(path) is not None
    assert {file.name for file in tmp_path.iterdir()} == {"set.zip", "set.zip.index"}


def test_parts_that_killed_writers_left_are_removed(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    names = [".set.zip.index.7.partial.0123456789abcdef", ".set.zip.7.partial", ".set.zip.index.7.partial"]
    for name in names:
        (tmp_path / name).touch()
    facts(path)
    assert {file.name for file in tmp_path.iterdir()} == {"set.zip", "set.zip.index", *names[1:]}


def test_an_index_that_appears_meanwhile_is_kept(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    open_first, written = labelled.open_store, []

    def open_second(path: Path) -> Any:
        monkeypatch.setattr(labelled, "open_store", open_first)
        facts(path)
        written.append(index_path(path).stat().st_ino)
        return open_first(path)

    monkeypatch.setattr(labelled, "open_store", open_second)
    facts(path)
    assert [index_path(path).stat().st_ino] == written


def write_one_image(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", encode(np.zeros((4, 4, 3), np.uint8)))


def add_comment(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"by hand"


def add_image(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("2/more.png", archive.read("0/img5.png"))


# Changes of a zip file after which it has no index.
UNINDEXED: dict[str, Callable[[Path], Any]] = {
    "few images": write_one_image,
    "an image without label": add_image,
    "a note": lambda path: write_dataset(path, CLASSES, key="Labels"),
    "a comment": add_comment,
}


@pytest.mark.parametrize("kind", UNINDEXED)
def test_an_index_that_is_not_replaced_is_removed(tmp_path: Path, large: None, kind: str) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    facts(path)
    assert index_path(path).exists()
    UNINDEXED[kind](path)
    facts(path, use_labels=False)
    assert [file.name for file in tmp_path.iterdir()] == ["set.zip"]


def test_a_new_dataset_has_no_index_of_an_earlier_one(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    facts(path)
    path.unlink()
    with new_dataset(path) as add:
        add("a.png", b"1")
    assert [file.name for file in tmp_path.iterdir()] == ["set.zip"]


def test_notes_name_the_zip_file_under_its_new_name(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES, key="Labels")
    assert facts(path)["notes"] == [f'{path}: dataset.json: the key "Labels" is read as "labels"']
    moved = path.rename(tmp_path / "moved.zip")
    if index_path(path).exists():
        index_path(path).rename(index_path(moved))
    assert facts(moved)["notes"] == [f'{moved}: dataset.json: the key "Labels" is read as "labels"']


@pytest.mark.parametrize("path", ["a\0b.zip", "no-such.zip", ".", ".."])
def test_paths_without_a_zip_file_have_no_index(path: str) -> None:
    assert read_index(Path(path)) is None


def test_images_without_labels_are_an_error_at_every_start(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("2/more.png", archive.read("0/img5.png"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"has no label for '2/more\.png': label all images"):
            facts(path)
        assert facts(path, use_labels=False)["c_dim"] == (0, None, True)
    assert not index_path(path).exists()


def test_an_index_may_be_overwritten_while_it_is_in_use(tmp_path: Path, large: None) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    facts(path)
    dataset = ImageDataset(DatasetConfig(path=str(path), use_labels=True))
    expected = dataset.images(range(6))
    size = index_path(path).stat().st_size
    for content in (b"x" * size, b""):
        index_path(path).write_bytes(content)
        assert torch.equal(dataset.images(range(6)), expected)
        assert dataset.file_name(0) == "0/img1.png"
        assert dataset.labels.tolist() == _sorted_labels(CLASSES)


@pytest.mark.parametrize("large", [6, 7], ids=["with an index", "without"])
def test_a_copy_detects_that_the_zip_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """The new file has the same names and labels, and other images."""
    monkeypatch.setattr(labelled, "LARGE", large)
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    dataset = ImageDataset(DatasetConfig(path=str(path), use_labels=True))
    data, expected = pickle.dumps(dataset), dataset.images(range(6))
    index_path(path).unlink(missing_ok=True)
    assert torch.equal(pickle.loads(data).images(range(6)), expected)
    status = path.stat()
    write_dataset(path, CLASSES, seed=1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"set\.zip has changed while it was in use: start again"):
        pickle.loads(data).images([0])


def test_spawned_processes_receive_little(tmp_path: Path) -> None:
    """Names, offsets, labels and positions are in shared memory, and remain valid in this process."""
    path = tmp_path / "set.zip"
    image = encode(np.zeros((4, 4, 3), np.uint8))
    with StoredZip(path) as archive:
        for k in range(20_000):
            archive.add(f"{k:05d}.png", image)
    dataset = ImageDataset(DatasetConfig(path=str(path)))
    members = dataset._store.contents.members  # type: ignore[union-attr]
    assert not members.is_shared()
    assert len(ForkingPickler.dumps(dataset)) < 4000
    assert members.is_shared()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(ImageDataset.file_name, (dataset, 12_345)) == "12345.png"
    assert dataset.file_name(12_345) == "12345.png"
    assert dataset.images([12_345]).shape == (1, 3, 4, 4)
