"""Datasets built from folders and zip files: symlinks, class folders, labels, skipped files."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_helpers import (
    assert_refused,
    build,
    encode,
    random_images,
    run,
    write_files,
    write_tar,
    write_zip,
)

from training.data_sources.classes import choose_classes, describe_classes, find_level
from training.data_sources.files import open_store
from training.data_sources.stored_zip import StoredZip
from training.dataset import DatasetConfig, ImageDataset

PNG = encode(np.zeros((2, 2, 3), np.uint8))


def images(*names: str) -> dict[str, bytes]:
    return {name: encode(random_images(2, 2, 3)) for name in names}


def write_images(tmp_path: Path, files: dict[str, bytes], packed: bool) -> Path:
    return write_zip(tmp_path / "in.zip", files) if packed else write_files(tmp_path / "in", files)


def build_labels(source: Path, dest: Path, *options: str) -> tuple[list[Any], list[str] | None, str]:
    """Build a dataset and return the labels in order, the class names and the output."""
    result = run(f"--source={source}", f"--dest={dest}", "--workers=1", *options)
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(dest) as archive:
        content = json.loads(archive.read("dataset.json"))
    return [label for _, label in content["labels"] or []], content["class_names"], result.output


# Skipped files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "folder",
    [".ipynb_checkpoints", ".thumbnails", "@eaDir", ".Trash-1000", "__MACOSX", "lost+found", ".git", "#recycle"],
)
def test_folders_of_other_programs_are_skipped_and_counted(tmp_path: Path, folder: str, packed: bool) -> None:
    names = ("a.png", f"{folder}/b.png", f"c/{folder}/d/e.png")
    source = write_images(tmp_path, images(*names), packed)
    _, _, output = build_labels(source, tmp_path / "out.zip")
    assert ": 1 image\n" in output
    assert f"Skipped 2 files:\n  2 in {folder}/\n" in output
    assert "b.png" not in output
    _, _, output = build_labels(source, tmp_path / "again.zip", "--verbose")
    assert f"  2 in {folder}/\n" + "".join(f"    {name}\n" for name in sorted(names[1:])) in output


@pytest.mark.parametrize("packed", [False, True])
def test_skipped_files_are_counted_by_kind(tmp_path: Path, packed: bool) -> None:
    others = ["1.TXT", "2.txt", "x/3.txt", "README", "v1.final version", "movie.mp4", "._a.png", "x/dataset.json"]
    source = write_images(tmp_path, {**images("a.png", "x/b.png"), **dict.fromkeys(others, b"text")}, packed)
    _, _, output = build_labels(source, tmp_path / "out.zip")
    lines = output.splitlines()
    start = lines.index("Skipped 8 files:")
    assert lines[start + 1 : start + 3] == ["  3 .txt", "  2 without an extension"]
    assert {line.split(":")[0] for line in lines[start + 3 : start + 6]} == {
        "  1 .json",
        "  1 .mp4",
        "  1 hidden file",
    }


def test_rare_kinds_of_skipped_files_are_summarised(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {**images("a.png"), **{f"x.k{k}": b"" for k in range(20)}})
    _, _, output = build_labels(source, tmp_path / "out.zip")
    assert output.count("  1 .k") == 12
    assert "\n  8 of 8 other kinds\n" in output
    _, _, output = build_labels(source, tmp_path / "all.zip", "--verbose")
    assert output.count("  1 .k") == 20


def test_the_error_for_a_folder_without_images_lists_its_files(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"a.txt": b"", "b.txt": b"", ".c.png": b""})
    assert "holds no images; it holds 2 .txt, 1 hidden file: check the path" in assert_refused(tmp_path, source)


def test_symlinked_folders_are_read_once_without_loops(tmp_path: Path) -> None:
    root = write_files(tmp_path / "in", images("real/a.png", "real/deep/b.png"))
    outside = write_files(tmp_path / "outside", images("c.png", "more/d.png"))
    (root / "again").symlink_to("real")
    (root / "linked").symlink_to(outside)
    (root / "twice").symlink_to(outside)
    (root / "real" / "loop").symlink_to(root)
    (outside / "back").symlink_to(root / "real")
    (outside / "self").symlink_to(".")
    store = open_store(root)
    assert store.names == ["linked/c.png", "linked/more/d.png", "real/a.png", "real/deep/b.png"]
    assert sorted(store.left_out["linked folders already read"]) == [
        "again",
        "linked/back",
        "linked/self",
        "real/loop",
        "twice",
    ]


def test_a_symlink_to_the_parent_folder_adds_only_new_images(tmp_path: Path) -> None:
    outside = write_files(tmp_path / "outside", images("in/a.png", "b.png"))
    (outside / "in" / "up").symlink_to(outside)
    assert open_store(outside / "in").names == ["a.png", "up/b.png"]


def test_unreadable_hidden_folders_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files(tmp_path / "in", images("a.png", "lost+found/b.png"))

    def scandir(path: Any) -> Any:
        if str(path).endswith("lost+found"):  # file permissions would not stop root
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    assert open_store(root).names == ["a.png"]


# Classes


LAYOUTS = {  # files -> the class of each file, and the expected note
    ("cat/1", "dog/1"): (["cat", "dog"], None),
    ("cat/x/1", "dog/1"): (["cat", "dog"], None),
    ("pets/cat/1", "pets/dog/1"): (["cat", "dog"], "everything is in pets/: looking for classes in this folder"),
    ("a/b/cat/1", "a/b/dog/x/1"): (["cat", "dog"], "everything is in a/b/: looking for classes in this folder"),
    ("train/cat/1", "val/cat/1", "val/dog/1"): (["cat", "cat", "dog"], "train/ and val/ are splits: their subfolders"),
    ("Training/cat/1", "Test/dog/1"): (["dog", "cat"], "Test/ and Training/ are splits: their subfolders are"),
    ("d/train/cat/1", "d/test/dog/1"): (["dog", "cat"], "test/ and train/ are splits: their subfolders are the"),
    ("train/1", "val/1"): (["train", "val"], "train/ and val/ look like splits, but are used as classes, because"),
    ("cat/1", "cat/2"): (["cat", "cat"], "all images are of one class, 'cat': leave out --labels-from-folders"),
    ("a/cat/1", "a/cat/2"): (["cat", "cat"], "all images are of one class, 'cat': leave out --labels-from-folders"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_names_become_classes(tmp_path: Path, layout: tuple[str, ...], packed: bool) -> None:
    expected, note = LAYOUTS[layout]
    source = write_images(tmp_path, images(*(f"{name}.png" for name in layout)), packed)
    labels, names, output = build_labels(source, tmp_path / "out.zip", "--labels-from-folders")
    assert names == sorted(set(expected))
    assert [names[label] for label in labels] == expected
    assert (f"\nNote: {note}" in output) if note else ("Note: " not in output)
    plural = "1 class" if len(names) == 1 else f"{len(names)} classes"
    assert f"\n{plural}: " + ", ".join(f"{name} {expected.count(name)}" for name in names) + "\n" in output


def test_the_folder_level_of_the_classes_can_be_chosen(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", images("train/cat/a/1.png", "train/dog/a/1.png", "val/cat/b/1.png"))
    for level, expected in [("1", ["train", "train", "val"]), ("2", ["cat", "dog", "cat"]), ("3", ["a", "a", "b"])]:
        labels, names, _ = build_labels(source, tmp_path / f"{level}.zip", f"--labels-from-folders={level}")
        assert names is not None
        assert [names[label] for label in labels] == expected
    message = assert_refused(tmp_path, source, "--labels-from-folders=4")
    assert "at level 4, but 'train/cat/a/1.png' and 2 others are not: move" in message
    for level in ("0", "x"):
        result = run(f"--source={source}", f"--dest={tmp_path / 'x.zip'}", f"--labels-from-folders={level}")
        assert result.exit_code == 2
        assert "--labels-from-folders" in result.stderr


def test_possible_class_folders_are_noted(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", images("x/cat/1.png", "x/cat/2.png", "x/owl/1.png"))
    labels, _, output = build_labels(source, tmp_path / "out.zip")
    assert labels == []
    assert "Note: images are in 2 folders: cat 2, owl 1: --labels-from-folders uses the folders as classes\n" in output
    for name, files in [
        ("shards", images("00000/1.png", "00001/1.png")),
        ("flat", images("1.png", "2.png")),
        ("some", images("1.png", "cat/2.png", "dog/2.png")),
        ("one", images("cat/1.png")),
        ("known", images("cat/1.png", "dog/1.png") | {"dataset.json": b'{"labels": null}'}),
    ]:
        _, _, output = build_labels(write_files(tmp_path / name, files), tmp_path / f"{name}.zip")
        assert "Note: " not in output


def test_folders_in_a_tar_file_become_classes(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "in.tar.gz", images("x/train/cat/1.png", "x/train/dog/1.png", "x/val/cat/1.png"))
    labels, names, _ = build_labels(source, tmp_path / "out.zip", "--labels-from-folders")
    assert (labels, names) == ([0, 1, 0], ["cat", "dog"])
    _, _, output = build_labels(source, tmp_path / "plain.zip")
    assert "Note: images are in 2 folders: cat 2, dog 1: --labels-from-folders uses the folders as classes\n" in output


def test_many_classes_are_summarised() -> None:
    text = describe_classes([k for k in range(1200) for _ in range(1 + (k == 7))], None)
    assert text == "1,200 classes of 1 to 2 images: 0 1, 1 1, 2 1, 3 1, 4 1, 5 1, 6 1, 7 2, 8 1, 9 1, ..."
    assert describe_classes([[0.0, 1.0]], None) == "labels are vectors of 2 numbers"
    assert describe_classes([0, 2], ["cat", "dog", "owl"]) == (
        "2 classes: cat 1, owl 1; 1 of 3 class numbers have no images"
    )


@pytest.mark.parametrize(
    ("numbers", "expected", "names"),
    [
        ([7, 20190, 7], [0, 1, 0], ["7", "20190"]),
        ([5], [0], ["5"]),
        ([0, 2], [0, 2], None),  # 2 of 3 numbers occur: a class may have no images yet
        ([1, 2, 3], [1, 2, 3], None),
        ([0, 0], [0, 0], None),
        ([2**31 - 1, 0], [1, 0], ["0", str(2**31 - 1)]),
    ],
)
def test_sparse_class_numbers_become_dense(numbers: list[int], expected: list[int], names: list[str] | None) -> None:
    classes = choose_classes(numbers, None)
    assert (classes.labels, classes.names, len(classes.notes)) == (expected, names, 0 if names is None else 1)
    assert choose_classes(numbers, ["named"]).labels == numbers


def test_renumbered_classes_are_noted(tmp_path: Path) -> None:
    files = images("a.png", "b.png") | {"dataset.json": b'{"labels": [["a.png", 20190], ["b.png", 7]]}'}
    labels, names, output = build_labels(write_files(tmp_path / "in", files), tmp_path / "out.zip")
    assert (labels, names) == ([1, 0], ["7", "20190"])
    assert "Note: class numbers go up to 20190, but only 2 of them occur: the classes are renumbered from 0" in output
    assert "\n2 classes: 7 1, 20190 1\n" in output


def test_the_class_level_of_no_images_is_one() -> None:
    assert find_level([]) == (1, [])


# dataset.json


@pytest.mark.parametrize("packed", [False, True])
def test_a_dataset_json_beside_all_images_is_read(tmp_path: Path, packed: bool) -> None:
    content = {"labels": [["x/b.png", 1], ["a.png", 0]], "class_names": ["cat", "dog"]}
    files = images("my/set/a.png", "my/set/x/b.png") | {"my/set/dataset.json": json.dumps(content).encode()}
    source = write_images(tmp_path, files, packed)
    labels, names, output = build_labels(source, tmp_path / "out.zip")
    assert (labels, names) == ([0, 1], ["cat", "dog"])
    assert "Note: my/set/dataset.json is read: all images are in its folder\n" in output
    assert "Skipped" not in output
    result = run("check", source)
    assert result.exit_code == 0, result.output
    assert "with labels" in result.output


def test_a_dataset_json_beside_some_images_is_ignored(tmp_path: Path) -> None:
    files = images("a.png", "set/b.png") | {"set/dataset.json": b'{"labels": [["b.png", 0]]}'}
    labels, _, output = build_labels(write_files(tmp_path / "in", files), tmp_path / "out.zip")
    assert labels == []
    assert "Note: set/dataset.json is not read, because images are outside its folder: to use it, give its" in output


@pytest.mark.parametrize("key", ["Labels", "LABELS"])
def test_the_labels_key_is_case_insensitive(tmp_path: Path, key: str) -> None:
    files = images("a.png") | {"dataset.json": json.dumps({key: [["a.png", 0]]}).encode()}
    labels, _, output = build_labels(write_files(tmp_path / "in", files), tmp_path / "out.zip")
    assert labels == [0]
    assert f'dataset.json: the key "{key}" is read as "labels"\n' in output


LABEL_LISTS = {
    "two entries": [["a.png", 3], ["b.png", 0], ["a.png", 5]],
    "two vectors": [["a.png", [0, 1]], ["b.png", [1, 0]], ["a.png", [1, 1]]],
    "longer entry": [["a.png", 3, 5], ["b.png", 0]],
}


@pytest.mark.parametrize("pairs", LABEL_LISTS.values(), ids=LABEL_LISTS)
def test_several_labels_of_an_image_are_refused(tmp_path: Path, pairs: list[Any]) -> None:
    files = images("a.png", "b.png") | {"dataset.json": json.dumps({"labels": pairs}).encode()}
    source = write_files(tmp_path / "in", files)
    remedy = 'a vector per image, all of the same length: ["img.png", [0, 1, 0, 1]]'
    message = assert_refused(tmp_path, source)
    assert "'a.png'" in message
    assert remedy in message
    result = run("check", source)
    assert result.exit_code == 2
    assert remedy in result.stderr


def test_duplicate_labels_keys_are_refused(tmp_path: Path) -> None:
    files = images("a.png") | {"dataset.json": b'{"Labels": null, "LABELS": null}'}
    assert 'has the keys "Labels" and "LABELS": keep one, as "labels"' in assert_refused(
        tmp_path, write_files(tmp_path / "in", files)
    )


# Results


def test_all_problems_are_reported_ten_of_each_kind(tmp_path: Path) -> None:
    files = {f"{k:02d}.png": encode(random_images(2, 2 + k % 2, 3)) for k in range(30)}
    files |= {f"x{k:02d}.png": b"" for k in range(12)}
    source = write_files(tmp_path / "in", files)
    message = assert_refused(tmp_path, source)
    assert "\n12 images that cannot be read:\n  x00.png: " in message
    assert "\n15 images of another size than the first, 2x2:\n  01.png: 3x2\n" in message
    assert "\n  and 2 more (--verbose lists them)\n" in message
    assert "\n  and 5 more (--verbose lists them)\n" in message
    assert message.count(".png: ") == 20
    assert assert_refused(tmp_path, source, "--verbose").count(".png: ") == 27


def test_original_sizes_are_reported(tmp_path: Path) -> None:
    sizes = [(100, 70), (31, 200), (64, 64)]
    files = {f"{k}.png": encode(random_images(h, w, 3)) for k, (w, h) in enumerate(sizes)}
    source = write_files(tmp_path / "in", files)
    _, _, output = build_labels(source, tmp_path / "out.zip", "--resolution=32x32")
    assert "\nOriginals: 3 sizes, 64x64 to 100x70 pixels; 1 image enlarged\n" in output
    _, content = build(source, tmp_path / "again.zip", "--resolution=32x32")
    assert content["short_sides"] == {"16": 1, "64": 2}


@pytest.mark.parametrize("count", [1, 65_536])  # more than 65,535 files need Zip64
def test_stored_zip_equals_the_output_of_zipfile(tmp_path: Path, count: int) -> None:
    files = {f"{k:05d}.png": b"%d" % k for k in range(count)}
    with StoredZip(tmp_path / "a.zip") as archive:
        for name, data in files.items():
            archive.add(name, data)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as reference:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o644 << 16
            reference.writestr(info, data)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_stored_zip_supports_offsets_beyond_4_gib(tmp_path: Path) -> None:
    with StoredZip(tmp_path / "a.zip") as archive:
        archive.add("first", b"1")
        hole = 2**32 + 5
        archive._file.seek(hole)  # a sparse file takes no space on the disk
        archive._position = hole
        archive.add("second", b"22")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive_read:
        assert archive_read.read("second") == b"22"
        assert archive_read.getinfo("second").header_offset == hole
        assert archive_read.read("first") == b"1"


def test_writing_stops_after_the_first_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(StoredZip, "add", lambda self, name, data: written.append(name))
    files = {f"{k:02d}.png": encode(random_images(2, 2 + (k == 3), 3)) for k in range(30)}
    assert "\n  03.png: 3x2\n" in assert_refused(tmp_path, write_files(tmp_path / "in", files))
    assert len(written) == 3


def test_gaps_in_class_numbers_are_noted_by_the_dataset(tmp_path: Path) -> None:
    files = images("a.png", "b.png") | {"dataset.json": b'{"labels": [["a.png", 20190], ["b.png", 7]]}'}
    source = write_files(tmp_path / "in", files)
    (note,) = ImageDataset(DatasetConfig(path=str(source), use_labels=True, max_images=1)).notes
    assert note == (
        "class numbers go up to 20190, but only 2 of them occur: building a dataset with dataset_tool.py renumbers "
        "the classes from 0"
    )


def test_an_image_without_a_label_is_named(tmp_path: Path) -> None:
    files = images("a.png", "preview.gif") | {"dataset.json": b'{"labels": [["a.png", 0]]}'}
    assert "dataset.json has no label for 'preview.gif': label all images, or remove" in assert_refused(
        tmp_path, write_files(tmp_path / "in", files)
    )
