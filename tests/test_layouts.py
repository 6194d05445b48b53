"""Folders and archives left behind by downloads, other programs and incomplete copies, read by dataset_tool.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from dataset_helpers import (
    assert_refused,
    build,
    encode,
    label_values,
    random_images,
    run,
    write_files,
    write_tar,
    write_zip,
)

from dnnlib.config import UserError
from training.dataset import DatasetConfig, ImageDataset

PNG = encode(random_images(8, 8, 3))


def write_parts(folder: Path, names: list[str]) -> Path:
    """Write one table or shard with a single image per name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if ".parquet" in name:
            pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
            pytest.importorskip("pyarrow.parquet").write_table(pa.table({"image": [PNG], "label": [0]}), path)
        else:
            write_tar(path, {"0.png": PNG})
    return folder


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["train-00001-of-00002.parquet"], [], "1 of 2 files is missing, such as train-00000-of-00002:"),
        (["train-00000-of-00003-0a1b.parquet"], [], "2 of 3 files are missing, such as train-00001-of-00003:"),
        (["a/x-00000-of-00002.parquet", "a/x-00001-of-00002.parquet", "b/y-00002-of-00003.tar"], [], ""),
        (["data/x-00000-of-00003.tar", "data/x-00002-of-00003.tar"], [], "such as x-00001-of-00003:"),
        (["x-000001-of-000003.tar", "x-000003-of-000003.tar"], [], "1 of 3 files is missing, such as x-000002-of"),
        (["test-00000-of-00001.tar", "train-00000-of-00002.tar"], [], "such as train-00001-of-00002"),
        (["test-00001-of-00002.tar", "train-00000-of-00001.tar"], ["--split=all"], "such as test-00000-of-00002"),
        (["test-00001-of-00002.tar", "train-00000-of-00001.tar"], [], ""),
        (["x-000000000-of-999999999.tar"], [], "999,999,998 of 999,999,999 files are missing"),
        (["x-00001-of-00002.tar", "x-00002-of-00002.tar"], [], ""),
    ],
)
def test_missing_shards_of_a_known_total_are_an_error(
    tmp_path: Path, names: list[str], options: list[str], message: str
) -> None:
    source = write_parts(tmp_path / "set", names)
    command = [f"--source={source}", f"--dest={tmp_path / 'made.zip'}", "--workers=1", *options]
    result = run(*command)
    assert result.exit_code == (2 if message else 0), result.output
    assert message in result.stderr
    assert ("with --skip-bad" in result.stderr) == bool(message)
    if message:
        result = run(*command, "--skip-bad")
        assert result.exit_code == 0, result.output
        assert message.rstrip(":") in result.stdout
        assert "the existing files are read" in result.stdout


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["00000.tar", "00002.tar"], "00001"),
        (["x-000000.tar.gz", "x-000009.tar.gz"], "000001, 000002, 000003, ..."),
        (["0000.parquet", "0001.parquet", "0003.parquet"], "0002"),
        (["0000000000.tar", "4000000000.tar"], ""),
        (["00000.tar", "00001.tar"], ""),
        (["00004.tar"], ""),
        (["2019.tar", "2021.tar"], ""),
    ],
)
def test_gaps_in_shard_numbers_are_noted(tmp_path: Path, names: list[str], numbers: str) -> None:
    source = write_parts(tmp_path / "set", names)
    result = run(f"--source={source}", f"--dest={tmp_path / 'made.zip'}", "--workers=1")
    assert result.exit_code == 0, result.output
    assert ("Note: no file has the number" in result.stdout) == bool(numbers)
    assert not numbers or f"the number {numbers}, but files" in result.stdout


def write_images(folder: Path, names: list[str], suffix: str) -> Path:
    """Write images into a folder, or into a zip file if a suffix is given."""
    files = {f"{name}.png": PNG for name in names}
    return write_zip(folder / f"pets{suffix}", files) if suffix else write_files(folder / "pets", files)


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize(
    ("names", "option", "message"),
    [
        (["train/cat/0", "train/dog/0", "test/0"], "", "Note: test/ and train/ look like splits, and all are read"),
        (["train/0", "val/0"], "", "Note: train/ and val/ look like splits, and all are read"),
        (["x/Train/cat/0", "x/TEST/0"], "", "Note: TEST/ and Train/ look like splits"),
        (
            ["train/cat/0", "train/dog/0", "test/0"],
            "auto",
            "which may be classes, in train/, but directly in test/: give",
        ),
        (["train/cat/0", "val/cat/0", "test/0"], "auto", "in train/ and val/, but directly in test/"),
        (
            ["x/train/cat/0", "x/train/0", "x/val/dog/0"],
            "auto",
            "the splits as classes with --labels-from-folders=2",
        ),
        (["train/cat/0", "test/0"], "1", "2 classes: test 1, train 1"),
        (["train/cat/0", "test/0"], "2", "'test/0.png' is not: move such images into class folders, or give a smaller"),
        (["train/cat/0", "test/0", "test/1"], "2", "and 1 other are not: move"),
        (["0", "cat/0"], "auto", "at level 1, but '0.png' is not: move such images into class folders\n"),
        (["0", "1", "2", "cat/0"], "3", "'0.png' and 3 others are not: move such images into class folders\n"),
        (["a/b/0", "a/0"], "3", "--labels-from-folders=1\n"),
    ],
)
def test_splits_are_distinguished_from_classes(
    tmp_path: Path, suffix: str, names: list[str], option: str, message: str
) -> None:
    source = write_images(tmp_path, names, suffix)
    options = [f"--labels-from-folders={option}"] if option else []
    result = run(f"--source={source}", f"--dest={tmp_path / 'made.zip'}", "--workers=1", *options)
    assert message in result.output
    is_fine = "Note" in message or "2 classes" in message
    assert result.exit_code == (0 if is_fine else 2)
    assert (tmp_path / "made.zip").exists() == is_fine


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ([r"cat\0.png", r"dog\0.png", "cat\\", "dog\\"], ["cat", "dog"]),
        ([r"pets\cat\0.png", r"pets\dog\0.png", r"pets\note.txt"], ["cat", "dog"]),
        (["a/x\\0.png", "b/y\\0.png"], ["a", "b"]),  # part of the name, as usual on Unix
    ],
)
def test_backslashes_separate_folders_in_zips_without_slashes(
    tmp_path: Path, names: list[str], classes: list[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in names:
            archive.writestr(name, PNG if name.endswith("png") else b"")
    result = run(f"--source={tmp_path / 'in.zip'}", f"--dest={tmp_path / 'made.zip'}", "--labels-from-folders")
    assert result.exit_code == 0, result.output
    assert f"2 classes: {classes[0]} 1, {classes[1]} 1" in result.stdout
    assert "in.zip: 2 images\n" in result.stdout


def write_json(*pairs: tuple[str, int]) -> bytes:
    return json.dumps({"labels": pairs}).encode()


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar"])
@pytest.mark.parametrize(
    ("json_name", "names", "note"),
    [
        ("dataset.json", "{}", ""),
        ("dataset.json", "./{}", "dataset.json: the label of './a/x.png' is assigned to 'a/x.png'"),
        ("dataset.json", ".\\{}", r"the label of '.\\a/x.png' is assigned to 'a/x.png'"),
        ("Dataset.json", "{}", "Dataset.json is read as dataset.json"),
        ("DATASET.JSON", "./{}", "DATASET.JSON is read as dataset.json"),
        ("a/dataset.json", "{}", "a/dataset.json: the label of 'a/x.png' is assigned to 'a/x.png'"),
        ("a/dataset.json", "./{}", "a/dataset.json: the label of './a/x.png' is assigned to 'a/x.png'"),
        ("a/DataSet.json", "{}", "a/DataSet.json is read: all images are in its folder"),
    ],
)
def test_labels_match_images_despite_different_path_spellings(
    tmp_path: Path, suffix: str, json_name: str, names: str, note: str
) -> None:
    pairs = [(names.format(name), label) for label, name in enumerate(["a/x.png", "a/y.png"])]
    files = {"a/x.png": PNG, "a/y.png": PNG, json_name: write_json(*pairs)}
    write = {"": write_files, ".zip": write_zip, ".tar": write_tar}[suffix]
    _, content = build(write(tmp_path / f"in{suffix}", files), tmp_path / "made.zip")
    assert label_values(content) == [0, 1]
    result = run(f"--source={tmp_path / f'in{suffix}'}", f"--dest={tmp_path / 'again.zip'}", "--workers=1")
    assert note in result.stdout
    assert ("Note: " in result.stdout) == bool(note)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a.png", 0), ("./a.png", 1), ("./b.png", 0)], "'a.png' has several labels (0, 1)"),
        ([("./a.png", 0)], "has no label for 'b.png'"),
        ([("q/a.png", 0), ("q/b.png", 1)], "has no label for 'a.png' and 1 other image"),
    ],
)
def test_labels_that_match_no_image_are_refused(tmp_path: Path, pairs: list[tuple[str, int]], message: str) -> None:
    files = {"a.png": PNG, "b.png": PNG, "dataset.json": write_json(*pairs)}
    assert message in assert_refused(tmp_path, write_files(tmp_path / "in", files))


@pytest.mark.parametrize(("extra", "note"), [(["q.png"], "'q.png'\n"), (["z/a.png", "q.png"], "'q.png' and 1 other\n")])
def test_labels_of_missing_images_are_noted(tmp_path: Path, extra: list[str], note: str) -> None:
    pairs = [(name, 1) for name in [*extra, "a.png"]]
    source = write_files(tmp_path / "in", {"a.png": PNG, "dataset.json": write_json(*pairs)})
    result = run(f"--source={source}", f"--dest={tmp_path / 'made.zip'}", "--workers=1")
    assert f"Note: dataset.json has labels of missing images: {note}" in result.stdout
    assert result.exit_code == 0
    (stored_note,) = ImageDataset(DatasetConfig(path=str(source))).notes
    assert stored_note.endswith(note.rstrip("\n"))


@pytest.mark.parametrize(
    "folder", ["@Recycle", "@Recently-Snapshot", "#snapshot", "~snapshot", "@tmp", "#recycle", "@eaDir", "$RECYCLE.BIN"]
)
def test_snapshot_folders_of_file_servers_are_skipped(tmp_path: Path, folder: str) -> None:
    source = write_files(tmp_path / "in", {"a.png": PNG, f"{folder}/old/b.png": PNG, f"c/{folder}/d.png": PNG})
    result = run(f"--source={source}", f"--dest={tmp_path / 'made.zip'}", "--workers=1")
    assert f"in: 1 image\nSkipped 2 files:\n  2 in {folder}/\n" in result.stdout


@pytest.mark.parametrize(
    "names",
    [
        ["label=cat/0.parquet", "label=dog/0.parquet"],
        ["label=cat/0.parquet", "label=dog/1.parquet"],
        ["train/Class=1/0.parquet"],
        ["year=2020/cls=a/part-0.parquet", "year=2021/cls=b/part-0.parquet"],
    ],
)
def test_labels_in_folder_names_of_tables_are_refused(tmp_path: Path, names: list[str]) -> None:
    message = assert_refused(tmp_path, write_parts(tmp_path / "set", names))
    assert "the labels are in folder names, such as '" in message
    assert f"parquet.write_table(parquet.read_table('{tmp_path / 'set'}'), 'FILE.parquet')" in message


def test_the_remedy_for_labels_in_folder_names_works(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional package")
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [PNG] * 3, "label": ["cat", "dog", "cat"]})
    parquet.write_to_dataset(table, tmp_path / "set", partition_cols=["label"])
    assert "'label=cat'" in assert_refused(tmp_path, tmp_path / "set")
    parquet.write_table(parquet.read_table(tmp_path / "set"), tmp_path / "one.parquet")
    _, content = build(tmp_path / "one.parquet", tmp_path / "made.zip")
    assert content["class_names"] == ["cat", "dog"]
    assert label_values(content) == [0, 0, 1]


@pytest.mark.parametrize("unknown", [-1, -1.0])
@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_unknown_labels_of_a_test_split_are_explained(tmp_path: Path, suffix: str, unknown: float) -> None:
    if suffix == ".tar":
        (tmp_path / "set").mkdir()
        for split, label in [("train", 3), ("test", int(unknown))]:
            write_tar(tmp_path / "set" / f"{split}.tar", {"0.png": PNG, "0.cls": str(label).encode()})
    else:
        pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
        write_parts(tmp_path / "set", ["train.parquet"])
        table = pa.table({"image": [PNG], "label": [unknown]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "set" / "test.parquet")
    message = assert_refused(tmp_path, tmp_path / "set", "--split=all")
    assert "label -1 means that the class is unknown" in message
    assert "choose a labelled split with --split=NAME" in message


LOGO = {"logo.png": encode(random_images(9, 9, 3))}
STATE = {
    "state.json": b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}',
    "data-00000-of-00001.arrow": b"",
}
NEEDS_BUILD: dict[str, tuple[dict[str, bytes], str]] = {
    "tables and a logo": ({"train-00000-of-00001.parquet": bytes(10_000), **LOGO}, "in .parquet files"),
    "a hub's cache": ({"refs/main": b"1", "blobs/2": b"", "snapshots/1/0000.parquet": b""}, "in .parquet files"),
    "save_to_disk": (STATE, "in .arrow files"),
    "save_to_disk of splits": (
        {"dataset_dict.json": b'{"splits": ["train"]}', **{f"train/{name}": data for name, data in STATE.items()}},
        "in .arrow files",
    ),
    "shards": ({"00000.tar": bytes(1024), "00001.tar": bytes(1024), "sizes.json": b"{}"}, "in .tar files"),
    "lmdb": ({"data.mdb": b"", "lock.mdb": b""}, "in lmdb files"),
}


@pytest.mark.parametrize("kind", NEEDS_BUILD)
def test_unbuilt_folders_are_refused_with_the_build_command(tmp_path: Path, kind: str) -> None:
    files, message = NEEDS_BUILD[kind]
    source = write_files(tmp_path / "my set", files)
    result = run("check", str(source))
    assert result.exit_code == 2
    assert f"{source} holds a dataset {message}, not image files: build a dataset from it: python data" in result.stderr
    assert f"dataset_tool.py '--source={source}' '--dest=data/my set.zip'" in result.stderr
    with pytest.raises(UserError) as error:
        ImageDataset(DatasetConfig(path=str(source)))
    assert f"Error: {error.value}\n" == result.stderr


@pytest.mark.parametrize("name", ["x.parquet", "x.tar.gz", "x.npz", "train-images-idx3-ubyte.gz"])
def test_unbuilt_files_are_refused_with_the_build_command(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    result = run("check", str(tmp_path / name))
    assert result.exit_code == 2
    assert (
        f"build a dataset from it: python dataset_tool.py --source={tmp_path / name} --dest=data/{name}.zip\n"
        in result.stderr
    )


def test_images_beside_an_archive_are_checked(tmp_path: Path) -> None:
    result = run("check", str(write_files(tmp_path / "in", {"a.png": PNG, "b.png": PNG, "train.tar": bytes(10_000)})))
    assert result.exit_code == 0, result.output
