"""WebDataset's tar shards, and plain tar archives of images, as sources of dataset_tool.py, written by tarfile."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_dataset_tool import as_file, build, numbers, random_images, refused

from dnnlib.image_files import BrokenImageError
from training.data_sources.bounds import open_packed, read_tar
from training.data_sources.shards import ShardSource
from training.data_sources.sources import Drawing, open_source

N = 5
PIXELS = random_images(N, 8, 8, 3)
PNGS = [as_file(pixels) for pixels in PIXELS]


def write(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    modes = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
    with tarfile.open(path, modes.get(path.suffix, "w"), format=form) as archive:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(path: Path) -> ShardSource:
    source = open_source(str(path), labels_from_folders=None, drawing=Drawing(0, 1, 8, 8))
    assert isinstance(source, ShardSource)
    return source


def samples(extension: str, labels: list[Any]) -> list[tuple[str, bytes]]:
    """Samples with the label before the image and behind it, and a caption."""
    files = []
    for k, label in enumerate(labels):
        members = [(f"a/{k:03}.png", PNGS[k % N]), (f"a/{k:03}.txt", b"a caption")]
        if label is not None:
            members.insert(
                2 * (k % 2), (f"a/{k:03}.{extension}", label if isinstance(label, bytes) else str(label).encode())
            )
        files += members
    return files


LABELS: dict[str, tuple[str, list[Any], Any, Any]] = {  # extension, contents, labels, names of classes
    "numbers": ("cls", [0, 1, 2, 1, 0], [0, 1, 2, 1, 0], None),
    "numbers in lines": ("cls", [b"3\n", b" 4 ", b"0", b"0", b"7\r\n"], [3, 4, 0, 0, 7], None),
    "names": ("cls", ["dog", "cat", "dog", "öwl", "cat"], [1, 0, 1, 2, 0], ["cat", "dog", "öwl"]),
    "names and numbers": ("CLS", ["7", "cat", "7", "7", "cat"], [0, 1, 0, 0, 1], ["7", "cat"]),
    **{
        f"json {key}": ("json", [json.dumps({"url": "x", key: k}) for k in (2, 0, 1, 1, 0)], [2, 0, 1, 1, 0], None)
        for key in ("label", "cls", "class", "class_id")
    },
    "json names": ("json", [json.dumps({"class_name": name}) for name in "baabb"], [1, 0, 0, 1, 1], ["a", "b"]),
    "json vectors": ("json", [json.dumps({"label": [k, 0.5]}) for k in range(N)], [[k, 0.5] for k in range(N)], None),
    "json without labels": ("json", ['{"caption": "x"}', "[1]", '{"label": null}', "3", "{}"], None, None),
    "empty": ("cls", [b""] * N, None, None),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_labels(tmp_path: Path, kind: str, suffix: str) -> None:
    extension, contents, labels, class_names = LABELS[kind]
    source = opened(write(tmp_path / f"set.{suffix}", samples(extension, contents)))
    assert source.labels == labels
    assert source.class_names == class_names
    assert [item.content for item in source] == PNGS


BAD: dict[str, tuple[str, list[Any], list[str]]] = {
    "a hole": ("cls", [0, None, 1, None, 1], ["sample 'a/001' has no label", "2 of 5"]),
    "negative": ("cls", [0, -3, 1, 0, 0], ["sample 'a/001'", "-3"]),
    "not UTF-8": ("cls", [b"\xff\xfe", 0, 0, 0, 0], ["'a/000.cls' cannot be read"]),
    "no JSON": ("json", ["{"] * N, ["'a/000.json' cannot be read"]),
    "deep JSON": ("json", ["[" * 10_000] * N, ["'a/000.json' cannot be read"]),
    "large": ("cls", [bytes(2 << 20)] * N, ["'a/000.cls' has 2097152 bytes"]),
    "several": ("json", [json.dumps({"label": [k, 3]}) for k in range(N)], ["several labels", "[0, 1, 0, 1]"]),
    "object": ("json", [json.dumps({"label": {}})] * N, ["sample 'a/000'", "label {}"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_labels_that_are_none(tmp_path: Path, kind: str) -> None:
    extension, contents, parts = BAD[kind]
    message = refused(tmp_path, write(tmp_path / "set.tar", samples(extension, contents)))
    assert [part for part in ("set.tar", *parts) if part not in message] == []


def test_folder_of_shards(tmp_path: Path) -> None:
    files = samples("cls", [0, 1, 2, 3, 4])
    for k, part in enumerate((files[6:], files[:6])):
        write(tmp_path / "set" / f"x-train-{1 - k:06}.tar", part)
    write(tmp_path / "set" / "x-test-000000.tar.gz", files[:3])
    made, content = build(tmp_path / "set", tmp_path / "made.zip")
    np.testing.assert_array_equal(made, PIXELS)
    assert numbers(content) == [0, 1, 2, 3, 4]
    assert len(build(tmp_path / "set", tmp_path / "all.zip", "--split=all")[0]) == N + 1
    assert "test 1 shard, train 2 shards" in refused(tmp_path, tmp_path / "set", "--split=other")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_plain_archives(tmp_path: Path, suffix: str) -> None:
    """Every image counts, also where names differ after their first dot only."""
    files = [
        ("./x/img.1.png", PNGS[0]),
        ("x/img.2.png", PNGS[1]),
        ("x/README", b""),
        ("y/.png", b""),
        ("y/b.JPG", PNGS[2]),
    ]
    path = write(tmp_path / f"set.{suffix}", files)
    source = opened(path)
    assert source.names == ["x/img.1.png", "x/img.2.png", "y/b.JPG"]
    assert source.left_out == {"samples without an image": ["x/README", "y/"]}
    np.testing.assert_array_equal(build(path, tmp_path / "made.zip")[0], PIXELS[:3])
    assert "holds no images" in refused(tmp_path, write(tmp_path / f"none.{suffix}", files[2:4]))


def test_one_image_of_a_sample_counts(tmp_path: Path) -> None:
    files = [
        ("0.left.png", PNGS[0]),
        ("0.png", PNGS[1]),
        ("0.cls", b"0"),
        ("1.cls", b"1"),
        ("2.cls", b"2"),
        ("2.png", PNGS[2]),
    ]
    source = opened(write(tmp_path / "set.tar", files))
    assert source.labels == [0, 2]
    assert [item.content for item in source] == PNGS[1:3]
    assert source.left_out == {"samples without an image": ["1"], "further images of a sample": ["0.left.png"]}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a" * 90, "b/" * 70 + "c", "d" * 99 + "/" + "é" * 40, "f" * 80 + "/" + "g" * 90])
def test_long_names_equal_tarfiles(tmp_path: Path, form: int, name: str) -> None:
    files = [("0.png", PNGS[0]), (f"{name}.png", PNGS[1]), ("1.png", PNGS[2])]
    path = write(tmp_path / "set.tar", files, form)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.size) for info in archive]
    assert expected[1][0] == f"{name}.png"
    with open_packed(path) as stream:
        assert [(member.name, member.size) for member in read_tar(stream)] == expected
    assert [item.content for item in opened(path)] == PNGS[:3]


def test_images_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """A shard that is cut off gives the images before its end; the index finds it first."""
    path = write(tmp_path / "set.tar", samples("cls", [0, 1, 2, 3, 4]))
    source = opened(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-6000])
    items = iter(source)
    assert next(items).content == PNGS[0]
    assert "set.tar is damaged" in refused(tmp_path, path)


def test_broken_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "set.tar", [("0.png", PNGS[0]), ("1.png", bytes(4000)), ("2.png", b"none")])
    assert "set.tar: 2.png: not a" in refused(tmp_path, path)
    monkeypatch.setattr("training.data_sources.shards.MAX_IMAGE_BYTES", 3000)
    contents = [item.content for item in opened(path)]
    assert [isinstance(content, BrokenImageError) for content in contents] == [False, True, False]
