"""Parquet and Arrow files as sources of dataset_tool.py, in the layouts of model hubs and the package `datasets`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
import pyarrow as pa
import pyarrow.parquet as pq
from dataset_helpers import assert_refused, build, encode, label_values, random_images, run

from dnnlib.config import UserError
from dnnlib.image_files import BrokenImageError
from training.data_sources import bounds, parquet_file
from training.data_sources.items import Source
from training.data_sources.parts import split_of
from training.data_sources.sources import Drawing, open_source

N = 6
PIXELS = random_images(N, 8, 8, 3)
PNGS = [encode(pixels) for pixels in PIXELS]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRUCTS = pa.array([{"bytes": png, "path": f"{k}.png"} for k, png in enumerate(PNGS)], IMAGE)


def write(path: Path, table: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def with_features(table: Any, **features: Any) -> Any:
    """Add the schema metadata in which `datasets` records features."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def open_tables(path: Path, split: str | None = None) -> Source:
    return open_source(str(path), labels_from_folders=None, drawing=Drawing(0, 1, 8, 8), split=split)


def labelled_table(labels: Any, kind: Any = None) -> Any:
    return pa.table({"image": STRUCTS, "label": pa.array(labels, kind)})


CLASSES = {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", [IMAGE, pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "IMG", "jpg", "anything"])
def test_pixels_and_class_names_are_read(tmp_path: Path, suffix: str, kind: Any, name: str) -> None:
    images = STRUCTS if kind == IMAGE else pa.array(PNGS, kind)
    table = with_features(pa.table({"id": range(N), name: images, "label": [2, 0, 1] * 2}), label=CLASSES)
    made, content = build(write(tmp_path / f"set.{suffix}", table), tmp_path / "made.zip")
    np.testing.assert_array_equal(made, PIXELS)
    assert label_values(content) == [2, 0, 1] * 2
    assert content["class_names"] == ["cat", "dog", "owl"]


LABELS: dict[str, tuple[Any, Any, Any, Any]] = {  # values, Arrow type -> labels, class names
    "numbers": ([0, 1, 2] * 2, pa.uint8(), [0, 1, 2] * 2, None),
    "whole floats": ([0.0, 1.0] * 3, pa.float64(), [0, 1] * 3, None),
    "booleans": ([True, False] * 3, pa.bool_(), [1, 0] * 3, None),
    "strings": (["b", "a", "ä"] * 2, pa.string(), [1, 0, 2] * 2, ["a", "b", "ä"]),
    "categories": (["b", "a"] * 3, pa.dictionary(pa.int8(), pa.string()), [1, 0] * 3, ["a", "b"]),
    "vectors": ([[0.5, 1.0]] * N, pa.list_(pa.float32()), [[0.5, 1.0]] * N, None),
    "vectors of fixed length": ([[0.5, 1.0]] * N, pa.list_(pa.float32(), 2), [[0.5, 1.0]] * N, None),
    "zeros and ones": ([[0, 1, 1]] * N, pa.list_(pa.int64()), [[0, 1, 1]] * N, None),
    "lists of booleans": ([[False, True]] * N, pa.list_(pa.bool_()), [[0, 1]] * N, None),
    "lists of one": ([[2], [0], [5]] * 2, pa.list_(pa.int64()), [2, 0, 5] * 2, None),
    "vectors of one": ([[0.25]] * N, pa.list_(pa.float64()), [[0.25]] * N, None),
    "unknown": ([-1] * N, pa.int64(), None, None),
    "nulls": ([None] * N, pa.null(), None, None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_column_type(tmp_path: Path, kind: str) -> None:
    values, arrow_type, labels, class_names = LABELS[kind]
    source = open_tables(write(tmp_path / "set.parquet", labelled_table(values, arrow_type)))
    assert source.labels == labels
    assert source.class_names == class_names


UNUSABLE: dict[str, tuple[Any, list[str]]] = {
    "two columns": (pa.table({"left": STRUCTS, "right": STRUCTS}), ["left", "right", "struct<", "rename the column"]),
    "no column": (pa.table({"caption": ["a"]}), ["no column holds images", "caption (string)"]),
    "no rows": (pa.table({"image": STRUCTS[:0]}), ["holds no rows"]),
    "missing label": (labelled_table([0, None, 1, 0, None, 1]), ["row 1, column 'label' has no label", "2 of 6"]),
    "negative": (labelled_table([0, -2, 1] * 2), ["row 1", "-2"]),
    "too many": (labelled_table([0, 2**31, 1] * 2), ["row 1", str(2**31)]),
    "floats": (labelled_table([0.0, 0.5, 1] * 2), ["row 1", "0.5"]),
    "not a number": (labelled_table([float("nan")] * N), ["row 0", "nan"]),
    "several": (
        labelled_table([[1], [0, 2]] * 3),
        ["several labels", "row 1", "several labels", '["img.png", [0, 1, 0, 1]]'],
    ),
    "infinite": (labelled_table([[0.5, 1e300]] * N), ["row 0", "1e+300"]),
    "structs": (labelled_table([{"box": 1}] * N), ["column 'label' holds struct<box: int64>"]),
    "no name": (with_features(labelled_table([0, 1, 3] * 2), label=CLASSES), ["row 2", "label 3", "3 class names"]),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_unusable_tables_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    table, parts = UNUSABLE[kind]
    message = assert_refused(tmp_path, write(tmp_path / f"set.{suffix}", table))
    assert [part for part in (f"set.{suffix}", *parts) if part not in message] == []


def test_recorded_features_resolve_ambiguous_columns(tmp_path: Path) -> None:
    table = pa.table({"a": STRUCTS, "b": STRUCTS, "kind": [0, 1] * 3, "breed": [1, 0] * 3})
    features: dict[str, Any] = {
        "b": {"_type": "Image", "mode": "L"},
        "kind": {"_type": "ClassLabel", "names": ["x", "y"]},
    }
    source = open_tables(write(tmp_path / "set.parquet", with_features(table, **features)))
    assert (source.channels, source.labels, source.class_names) == (1, [0, 1] * 3, ["x", "y"])
    source = open_tables(
        write(tmp_path / "set.parquet", with_features(table, breed={"_type": "ClassLabel"}, **features))
    )
    assert source.labels is None
    assert any("columns kind, breed are classes" in note for note in source.notes)


def test_rows_may_only_name_files_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    for path in (tmp_path / "secret.png", tmp_path / "set" / "images" / "0.png"):
        path.write_bytes(PNGS[0])
    paths = ["images/0.png", "../secret.png", str(tmp_path / "secret.png"), "images/../../secret.png", "a\0b", None]
    table = pa.table({"image": pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)})
    contents = [item.content for item in open_tables(write(tmp_path / "set" / "set.parquet", table).parent)]
    assert contents[0] == tmp_path / "set" / "images" / "0.png"
    assert all(isinstance(content, BrokenImageError) for content in contents[1:])
    assert "'../secret.png', outside of" in str(contents[1])
    assert "no image" in str(contents[-1])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("unlabeled-00000-of-00002.parquet", "unlabeled"),
        ("cifar10-test.arrow", "test"),
        ("cifar10-val-00000-of-00002.arrow", "validation"),
        ("data-00000-of-00002.parquet", ""),
        ("validation/0000.parquet", "validation"),
        ("train/a/0000.parquet", "train"),
        ("imagenet-train-{000000}.tar", "train"),
        ("training.parquet", "train"),
        ("constrained.parquet", ""),
    ],
)
def test_split_names_are_read_from_paths(name: str, split: str) -> None:
    assert split_of(name) == split


def test_splits_can_be_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name, rows in (("train-00000-of-00002", 2), ("train-00001-of-00002", 1), ("test-00000-of-00001", 3)):
        write(folder / "data" / f"{name}.parquet", labelled_table([0] * N)[:rows])
    write(folder / "data" / "cache-0123abc.arrow", labelled_table([0] * N)[:1])
    assert "splits: test 3, train 3: train is read" in run(f"--source={folder}", f"--dest={tmp_path / 'a.zip'}").output
    for option, expected in (("train", [0, 1, 0]), ("test", [0, 1, 2]), ("all", [0, 1, 2, 0, 1, 0])):
        made, _ = build(folder, tmp_path / f"{option}.zip", f"--split={option}")
        np.testing.assert_array_equal(made, PIXELS[expected])
    assert "splits test 3, train 3, but not dev: choose one" in assert_refused(tmp_path, folder, "--split=dev")
    assert "has no splits: leave the option out" in assert_refused(tmp_path, "shapes", "--split=test")
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        os.remove(folder / "data" / f"{name}.parquet")
    write(folder / "data" / "dev.parquet", labelled_table([0] * N)[:1])
    assert "splits test 3, validation 1: choose one as --split=NAME" in assert_refused(tmp_path, folder)
    write(folder / "other" / "dev.parquet", labelled_table([0] * N))
    assert "several datasets, with a dev.parquet in each of data, other" in assert_refused(tmp_path, folder)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "names",
    [
        ("en/0000", "de/0000"),
        ("data", "de/data"),
        ("en/train-00000-of-00001", "de/train-00000-of-00002"),
        ("en/test/0000", "de/test/0000", "fr/train/0000"),
        ("en/x", "de/x", "train"),
    ],
)
def test_several_configurations_in_a_folder_are_refused(tmp_path: Path, suffix: str, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / "set" / f"{name}.{suffix}", labelled_table([0] * N))
    message = assert_refused(tmp_path, tmp_path / "set")
    assert "set holds several datasets, with a " in message
    assert "fr" not in message
    assert ("in each of ., de: give" if names[0] == "data" else "in each of de") in message


def test_tables_of_several_folders_and_without_a_split_are_read(tmp_path: Path) -> None:
    for name, rows in (("a/0000", 1), ("b/0001", 2), ("train", 3)):
        write(tmp_path / "set" / f"{name}.parquet", labelled_table([0] * N)[:rows])
    assert len(open_tables(tmp_path / "set")) == 3
    assert len(open_tables(tmp_path / "set", "others")) == 3
    assert len(open_tables(tmp_path / "set", "all")) == N
    assert "splits others 3, train 3" in assert_refused(tmp_path, tmp_path / "set", "--split=dev")
    os.remove(tmp_path / "set" / "train.parquet")
    assert "has no splits: leave the option out" in assert_refused(tmp_path, tmp_path / "set", "--split=others")


def test_tables_refuse_labels_from_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "set" / "cap" / "a.parquet", labelled_table([0] * N)).parent
    message = assert_refused(tmp_path, path, "--labels-from-folders")
    assert f"{path} holds tables, whose labels come from a column: leave out --labels-from-folders" in message


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "0000.parquet", "data/train.parquet", "x-test.arrow"])
def test_tables_are_read_and_images_beside_them_are_not(tmp_path: Path, name: str) -> None:
    write(tmp_path / "set" / name, labelled_table([0, 1, 2] * 2))
    for image in ("logo.png", "assets/sample.png"):
        (tmp_path / "set" / image).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / image).write_bytes(PNGS[0])
    source = open_tables(tmp_path / "set")
    assert (source.labels, source.left_out) == (
        [0, 1, 2] * 2,
        {"images beside them": ["assets/sample.png", "logo.png"]},
    )
    assert source.notes[0].startswith(f"1 {Path(name).suffix} file is read, not 2 images beside them")


def test_images_are_read_beside_a_larger_table_of_embeddings(tmp_path: Path) -> None:
    write(tmp_path / "set" / "embeddings.parquet", pa.table({"x": np.random.RandomState(0).rand(9000)}))
    for k in range(3):
        (tmp_path / "set" / f"{k}.png").write_bytes(PNGS[k])
    source = open_tables(tmp_path / "set")
    assert [item.content for item in source] == [tmp_path / "set" / f"{k}.png" for k in range(3)]
    assert (
        "the images are read, not 'embeddings.parquet' beside them: to read such a file, give it as --source"
        in source.notes
    )


def test_cache_files_of_datasets_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "set" / "cache-0123abc.arrow", labelled_table([0] * N))
    assert "holds no images; it holds 1 .arrow" in assert_refused(tmp_path, tmp_path / "set")


def test_rows_that_are_too_large_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "set.parquet", pa.table({"image": [PNGS[0], bytes(4000), b""]}))
    monkeypatch.setattr("training.data_sources.items.MAX_IMAGE_BYTES", 3000)
    contents = [item.content for item in open_tables(path)]
    assert contents[::2] == [PNGS[0], b""]
    assert str(contents[1]) == "4000 bytes, more than the limit of 3000 for an image: reduce its size"


@pytest.mark.parametrize("content", ["images", "tables", "both"])
def test_each_folder_is_scanned_once(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "set" / name for name in ("", "a", "b", "b/c")]
    for folder in folders:
        folder.mkdir()
        if content != "tables":
            (folder / "0.png").write_bytes(PNGS[0])
        if content != "images":
            write(folder / f"{folder.name}.parquet", labelled_table([0] * N))
    scanned: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(os.path.abspath(path)) or scandir(path))  # type: ignore[func-returns-value]
    assert len(open_tables(tmp_path / "set")) == (4 if content == "images" else 4 * N)
    assert sorted(scanned) == sorted(map(str, folders))


def save(folder: Path, table: Any, **state: Any) -> None:
    """Write the files of `Dataset.save_to_disk`: two tables, listed in order in state.json."""
    files = [{"filename": f"data-0000{k}-of-00002.arrow"} for k in (1, 0)]
    for k in (0, 1):
        write(folder / f"data-0000{k}-of-00002.arrow", table[3 * k : 3 * k + 3])
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))


def test_datasets_saved_by_save_to_disk_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / "set" / split, labelled_table([0, 1, 2, 3, 4, 5]))
    made, content = build(tmp_path / "set" / "test", tmp_path / "one.zip")
    np.testing.assert_array_equal(made, PIXELS[[3, 4, 5, 0, 1, 2]])
    assert label_values(content) == [3, 4, 5, 0, 1, 2]
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_tables(tmp_path / "set")
    assert (len(source), source.labels) == (N, [3, 4, 5, 0, 1, 2])
    assert len(open_tables(tmp_path / "set", "all")) == 2 * N
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../set"]}')
    assert "no list of folders" in assert_refused(tmp_path, tmp_path / "set")
    save(tmp_path / "mapped", labelled_table([0] * N), _indices_data_files=[{"filename": "indices.arrow"}])
    assert "flatten_indices()" in assert_refused(tmp_path, tmp_path / "mapped")
    (tmp_path / "mapped" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    assert "state.json has no list of files" in assert_refused(tmp_path, tmp_path / "mapped")


@pytest.mark.parametrize("content", ["parquet", "png"])
def test_snapshots_in_a_hub_cache_are_read(tmp_path: Path, content: str) -> None:
    root = tmp_path / "datasets--somebody--some"
    blob = (
        write(root / "blobs" / f"abc.{content}", labelled_table([0] * N))
        if content == "parquet"
        else root / "blobs" / "abc"
    )
    if content == "png":
        blob.parent.mkdir(parents=True)
        blob.write_bytes(PNGS[0])
    for snapshot in ("123", "456"):
        (root / "snapshots" / snapshot / "data").mkdir(parents=True)
    (root / "snapshots" / "123" / "data" / f"train.{content}").symlink_to(f"../../../blobs/{blob.name}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("789")
    assert "holds 2 snapshots (123, 456): give the folder of one" in assert_refused(tmp_path, root)
    (root / "refs" / "main").write_text("123")
    for source in (root, root / "snapshots" / "123"):
        np.testing.assert_array_equal(build(source, tmp_path / f"{source.name}.zip")[0][0], PIXELS[0])


def test_the_kind_of_file_with_more_bytes_is_read(tmp_path: Path) -> None:
    write(tmp_path / "set" / "metadata.parquet", pa.table({"file_name": ["0.png"]}))
    (tmp_path / "set" / "0.png").write_bytes(encode(random_images(64, 64, 3)))
    assert len(open_tables(tmp_path / "set")) == 1
    write(tmp_path / "set" / "set.parquet", pa.table({"image": [encode(random_images(99, 99, 3))] * 2}))
    os.remove(tmp_path / "set" / "metadata.parquet")
    source = open_tables(tmp_path / "set")
    assert (len(source), source.left_out) == (2, {"images beside them": ["0.png"]})


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_missing_package_is_named(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / f"set.{suffix}", labelled_table([0] * N))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install '.[parquet]'" in assert_refused(tmp_path, path)


def test_repeated_values_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary-encoded image of 1 MB that 70 rows refer to is stored once."""
    monkeypatch.setattr(bounds, "UNPACKED_RATIO", 1)
    path = write(
        tmp_path / "set.parquet", pa.table({"image": [PNGS[0] + np.random.RandomState(0).bytes(1 << 20)] * 70})
    )
    assert path.stat().st_size < 2 << 20
    source = open_tables(path)
    with pytest.raises(UserError, match="column image has more than"):
        for _ in source:
            pass
    monkeypatch.setattr(parquet_file, "_MIN_ROW_LIMIT", 500)
    write(path, pa.table({"image": PNGS[:1] * 20_000}))
    assert "20000 rows, more rows than bytes" in assert_refused(tmp_path, path)
