"""Directories of zip files in comparison with zipfile, and the index of a large zip file."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
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
from training.data_sources import labelled, zip_directory
from training.data_sources.files import ZipStore
from training.data_sources.stored_zip import StoredZip
from training.data_sources.zip_directory import Directory, Names, OverlapError, read_directory
from training.data_sources.zip_index import identify, index_path, read_index
from training.dataset import DatasetConfig, ImageDataset

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


def write_dataset(path: Path, labels: list[Any] | None, seed: int = 0) -> Path:
    images = np.random.RandomState(seed).randint(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    names = [f"{k % 2}/img{5 - k}.png" for k in range(6)]
    pairs = labels and [[name, label] for name, label in zip(names, labels, strict=True)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, pixels in zip(names, images, strict=True):
            archive.writestr(name, encode(pixels))
        archive.writestr("dataset.json", json.dumps({"labels": pairs, "format_version": 1, "note": "ä"}))
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
    data[-70] ^= 1
    path.write_bytes(data)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILED: dict[str, Callable[[Path], Any]] = {
    "damaged": damage,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-64]),
    "foreign": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a folder": replace_by_a_folder,
    "another signature": lambda path: path.write_bytes(b"S" + path.read_bytes()[1:]),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_unusable_index_is_ignored_and_replaced(tmp_path: Path, large: None, kind: str) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    expected = facts(path)
    SPOILED[kind](index_path(path))
    assert read_index(path) is None
    assert facts(path) == expected
    assert (read_index(path) is None) == (kind == "a folder")
    assert {file.name for file in tmp_path.iterdir()} == {"set.zip", "set.zip.index"}


@pytest.mark.parametrize("with_valid_checksum", [False, True])
def test_any_bytes_as_an_index_are_ignored(tmp_path: Path, large: None, with_valid_checksum: bool) -> None:
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    facts(path)
    whole = index_path(path).read_bytes()
    start = whole.index(b"\n") + 1

    @for_all(100, CORRUPTION)
    def check(corruption: Any) -> None:
        content = corrupted(whole[start + 32 :], corruption)
        digest = hashlib.sha256(content).digest() if with_valid_checksum else whole[start : start + 32]
        index_path(path).write_bytes(whole[:start] + digest + content)
        found = read_index(path)
        assert found is None or with_valid_checksum or content == whole[start + 32 :]


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


def test_an_unwritable_folder_needs_no_index(tmp_path: Path, large: None) -> None:
    """A folder stands in the place of the index, because root may write everywhere."""
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    index_path(path).mkdir()
    found = facts(path)
    index_path(path).rmdir()
    assert facts(path) == found


@pytest.mark.parametrize("path", ["a\0b.zip", "no-such.zip", ".", ".."])
def test_paths_without_a_zip_file_have_no_index(path: str) -> None:
    assert identify(Path(path)) is None
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


def test_other_processes_map_the_index_again(tmp_path: Path, large: None) -> None:
    """A pickled dataset is small. Without its index, the process reads the zip file itself."""
    path = write_dataset(tmp_path / "set.zip", CLASSES)
    for has_index in (True, False):
        dataset = ImageDataset(DatasetConfig(path=str(path), use_labels=True))
        expected = dataset.images(range(6)), dataset.file_name(3)
        if has_index:
            assert isinstance(dataset._store, ZipStore)
            assert b"img" not in pickle.dumps(dataset._store)
        else:
            dataset = pickle.loads(pickle.dumps(dataset))
            index_path(path).unlink()
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy.images(range(6)), expected[0])
        assert copy.file_name(3) == expected[1]
        assert torch.equal(copy.labels, dataset.labels)


def test_spawned_processes_receive_little(tmp_path: Path, large: None) -> None:
    """Labels and positions are in shared memory, names and offsets in the index."""
    path = tmp_path / "set.zip"
    image = encode(np.zeros((4, 4, 3), np.uint8))
    with StoredZip(path) as archive:
        for k in range(20_000):
            archive.add(f"{k:05d}.png", image)
    dataset = ImageDataset(DatasetConfig(path=str(path)))
    assert len(ForkingPickler.dumps(dataset)) < 4000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(ImageDataset.file_name, (dataset, 12_345)) == "12345.png"
