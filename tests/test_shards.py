"""WebDataset tar shards and plain tar archives of images as sources of dataset_tool.py, written by tarfile."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_helpers import assert_refused, build, encode, label_values, random_images, run

from dnnlib.image_files import BrokenImageError
from training.data_sources.bounds import open_packed, read_tar
from training.data_sources.listing import LINKS, SPECIAL_FILES
from training.data_sources.shards import ShardSource
from training.data_sources.sources import Drawing, open_source

N = 5
PIXELS = random_images(N, 8, 8, 3)
PNGS = [encode(pixels) for pixels in PIXELS]


def write(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    modes = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
    with tarfile.open(path, modes.get(path.suffix, "w"), format=form) as archive:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def open_shards(path: Path) -> ShardSource:
    source = open_source(str(path), labels_from_folders=None, drawing=Drawing(0, 1, 8, 8))
    assert isinstance(source, ShardSource)
    return source


def samples(extension: str, labels: list[Any]) -> list[tuple[str, bytes]]:
    """Make samples of an image, a caption and a label; the label alternately precedes and follows the image."""
    files = []
    for k, label in enumerate(labels):
        members = [(f"a/{k:03}.png", PNGS[k % N]), (f"a/{k:03}.txt", b"a caption")]
        if label is not None:
            members.insert(
                2 * (k % 2), (f"a/{k:03}.{extension}", label if isinstance(label, bytes) else str(label).encode())
            )
        files += members
    return files


CAPTIONS = [f"a/{k:03}.txt" for k in range(N)]
LABELS: dict[str, tuple[str, list[Any], Any, Any]] = {  # extension, contents -> labels, class names
    "numbers": ("cls", [0, 1, 2, 1, 0], [0, 1, 2, 1, 0], None),
    "numbers with line breaks": ("cls", [b"3\n", b" 4 ", b"0", b"0", b"7\r\n"], [3, 4, 0, 0, 7], None),
    "names": ("cls", ["dog", "cat", "dog", "öwl", "cat"], [1, 0, 1, 2, 0], ["cat", "dog", "öwl"]),
    "names and numbers": ("CLS", ["7", "cat", "7", "7", "cat"], [0, 1, 0, 0, 1], ["7", "cat"]),
    **{
        f"json {key}": ("json", [json.dumps({"url": "x", key: k}) for k in (2, 0, 1, 1, 0)], [2, 0, 1, 1, 0], None)
        for key in ("label", "labels", "cls", "class", "class_id")
    },
    "json names": ("json", [json.dumps({"class_name": name}) for name in "baabb"], [1, 0, 0, 1, 1], ["a", "b"]),
    "json vectors": ("json", [json.dumps({"label": [k, 0.5]}) for k in range(N)], [[k, 0.5] for k in range(N)], None),
    "json without labels": ("json", ['{"caption": "x"}', "[1]", '{"label": null}', "3", "{}"], None, None),
    "empty": ("cls", [b""] * N, None, None),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_labels_of_samples_are_read(tmp_path: Path, kind: str, suffix: str) -> None:
    extension, contents, labels, class_names = LABELS[kind]
    source = open_shards(write(tmp_path / f"set.{suffix}", samples(extension, contents)))
    assert source.labels == labels
    assert source.class_names == class_names
    assert [item.content for item in source] == PNGS


INVALID_LABELS: dict[str, tuple[str, list[Any], list[str]]] = {
    "missing label": ("cls", [0, None, 1, None, 1], ["sample 'a/001' has no label", "2 of 5"]),
    "negative": ("cls", [0, -3, 1, 0, 0], ["sample 'a/001'", "-3"]),
    "not UTF-8": ("cls", [b"\xff\xfe", 0, 0, 0, 0], ["'a/000.cls' cannot be read"]),
    "invalid JSON": ("json", ["{"] * N, ["'a/000.json' cannot be read"]),
    "deep JSON": ("json", ["[" * 10_000] * N, ["'a/000.json' cannot be read"]),
    "large": ("cls", [bytes(2 << 20)] * N, ["'a/000.cls' has 2097152 bytes"]),
    "several": ("json", [json.dumps({"label": [k, 3]}) for k in range(N)], ["several labels", "[0, 1, 0, 1]"]),
    "several in a list": ("json", [json.dumps({"labels": [k, 3]}) for k in range(N)], ["several labels"]),
    "several in a string": ("cls", ["1 2"] * N, ["'a/000': label [1, 2]: several labels", "[0, 1, 0, 1]"]),
    "several with commas": ("label", ["1, 2", "3,4", "1", "2", "3"], ["'a/002': label 1"]),
    "several in lines": ("cls", ["0\n5"] * N, ["several labels"]),
    "more dots": ("05.0.cls", ["0"] * N, ["'a/000.05.0.cls'", "without dots in the names"]),
    "more dots in some": (
        "coarse.class",
        ["0", None, None, None, None],
        ["'a/000.coarse.class'", "without dots in the names"],
    ),
    "object": ("json", [json.dumps({"label": {}})] * N, ["sample 'a/000'", "label {}"]),
}


@pytest.mark.parametrize("kind", INVALID_LABELS)
def test_invalid_labels_are_refused(tmp_path: Path, kind: str) -> None:
    extension, contents, parts = INVALID_LABELS[kind]
    message = assert_refused(tmp_path, write(tmp_path / "set.tar", samples(extension, contents)))
    assert [part for part in ("set.tar", *parts) if part not in message] == []


def test_label_vectors_are_read_from_text(tmp_path: Path) -> None:
    source = open_shards(write(tmp_path / "set.tar", samples("cls", ["0 1", "1 1", "1,0", "0, 0", "0\n1"])))
    assert (source.labels, source.class_names) == ([[0, 1], [1, 1], [1, 0], [0, 0], [0, 1]], None)


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("kind", ["cls", "json"])
def test_labels_apart_from_their_images_are_refused(tmp_path: Path, kind: str, step: int) -> None:
    label = b"1" if kind == "cls" else b'{"label": 1}'
    images, labels = [(f"{k}.png", PNGS[k]) for k in range(3)], [(f"{k}.{kind}", label) for k in range(3)]
    path = write(tmp_path / "set.tar", [*images, *labels][::step])
    message = assert_refused(tmp_path, path)
    assert "set.tar: the image and the label of sample '" in message
    assert "one after the other" in message
    named_alike = [
        *images,
        *[(f"labels/{name}", data) for name, data in labels],
    ]  # members in another folder are separate samples
    assert open_shards(write(tmp_path / "set.tar", named_alike)).left_out == {
        "samples without an image": ["labels/0", "labels/1", "labels/2"]
    }


def test_other_members_of_a_sample_are_counted(tmp_path: Path) -> None:
    members = {
        "txt": b"a caption",
        "coarse.cls": b"3",
        "json": b"{}",
        "meta.json": b'{"label": 3}',
        "npy": b"",
        "x": b"",
    }
    files = [(f"0.{kind}", data) for kind, data in {"png": PNGS[0], "cls": b"7", **members, "label": b""}.items()]
    source = open_shards(write(tmp_path / "set.tar", files))
    assert source.labels == [7]
    assert source.left_out == {
        ".txt": ["0.txt"],
        ".cls": ["0.coarse.cls"],
        ".json": ["0.json", "0.meta.json"],
        ".npy": ["0.npy"],
        ".x": ["0.x"],
        ".label": ["0.label"],
    }


def test_a_folder_of_shards_is_read_in_order(tmp_path: Path) -> None:
    files = samples("cls", [0, 1, 2, 3, 4])
    for k, part in enumerate((files[6:], files[:6])):
        write(tmp_path / "set" / f"x-train-{1 - k:06}.tar", part)
    write(tmp_path / "set" / "x-test-000000.tar.gz", files[:3])
    made, content = build(tmp_path / "set", tmp_path / "made.zip")
    np.testing.assert_array_equal(made, PIXELS)
    assert label_values(content) == [0, 1, 2, 3, 4]
    assert len(build(tmp_path / "set", tmp_path / "all.zip", "--split=all")[0]) == N + 1
    assert "test 1 shard, train 2 shards" in assert_refused(tmp_path, tmp_path / "set", "--split=other")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_plain_tar_archives_of_images_are_read(tmp_path: Path, suffix: str) -> None:
    """Images are separate samples even if their names differ only after the first dot."""
    files = [
        ("./x/img.1.png", PNGS[0]),
        ("x/img.2.png", PNGS[1]),
        ("x/README", b""),
        ("y/.png", b""),
        ("y/b.JPG", PNGS[2]),
    ]
    path = write(tmp_path / f"set.{suffix}", files)
    source = open_shards(path)
    assert source.names == ["x/img.1.png", "x/img.2.png", "y/b.JPG"]
    assert source.left_out == {"hidden files": ["y/.png"], "samples without an image": ["x/README"]}
    np.testing.assert_array_equal(build(path, tmp_path / "made.zip")[0], PIXELS[:3])
    assert "holds no images" in assert_refused(tmp_path, write(tmp_path / f"none.{suffix}", files[2:4]))


def test_only_one_image_of_a_sample_is_read(tmp_path: Path) -> None:
    files = [
        ("0.left.png", PNGS[0]),
        ("0.png", PNGS[1]),
        ("0.cls", b"0"),
        ("1.cls", b"1"),
        ("2.cls", b"2"),
        ("2.png", PNGS[2]),
    ]
    source = open_shards(write(tmp_path / "set.tar", files))
    assert source.labels == [0, 2]
    assert [item.content for item in source] == PNGS[1:3]
    assert source.left_out == {"samples without an image": ["1"], "further images of a sample": ["0.left.png"]}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a" * 90, "b/" * 70 + "c", "d" * 99 + "/" + "é" * 40, "f" * 80 + "/" + "g" * 90])
def test_long_member_names_equal_those_of_tarfile(tmp_path: Path, form: int, name: str) -> None:
    files = [("0.png", PNGS[0]), (f"{name}.png", PNGS[1]), ("1.png", PNGS[2])]
    path = write(tmp_path / "set.tar", files, form)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.size) for info in archive]
    assert expected[1][0] == f"{name}.png"
    with open_packed(path) as stream:
        assert [(member.name, member.size) for member in read_tar(stream)] == expected
    assert [item.content for item in open_shards(path)] == PNGS[:3]


def test_images_are_read_lazily(tmp_path: Path) -> None:
    """Iteration yields the images before the truncation; opening the source detects the truncation."""
    path = write(tmp_path / "set.tar", samples("cls", [0, 1, 2, 3, 4]))
    source = open_shards(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-6000])
    items = iter(source)
    assert next(items).content == PNGS[0]
    assert "set.tar is damaged" in assert_refused(tmp_path, path)


HIDDEN = ("._0.cls", "._0.png", "a/._000.cls", ".DS_Store", "__MACOSX/a/000.png", "@eaDir/x.cls", ".git/config.json")


@pytest.mark.parametrize("where", ["before", "between", "behind"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_members_do_not_belong_to_samples(tmp_path: Path, hidden: str, where: str) -> None:
    files = samples("cls", [0, 1, 2, 1, 0])
    files.insert({"before": 0, "between": 1, "behind": len(files)}[where], (hidden, b"\xff\xfe of macOS"))
    source = open_shards(write(tmp_path / "set.tar", files))
    assert source.labels == [0, 1, 2, 1, 0]
    assert [item.content for item in source] == PNGS
    assert list(source.left_out.values()) == [[hidden], CAPTIONS]


def test_an_archive_made_on_macos_keeps_its_labels(tmp_path: Path) -> None:
    files = [(f"{k}.{kind}", data) for k in range(N) for kind, data in (("cls", b"%d" % k), ("png", PNGS[k]))]
    doubled = [file for name, data in files for file in ((f"._{name}", b"\0\5\x16\7"), (name, data))]
    path = write(tmp_path / "set.tar", doubled)
    made, content = build(path, tmp_path / "made.zip")
    np.testing.assert_array_equal(made, PIXELS)
    assert label_values(content) == list(range(N))
    assert open_shards(path).left_out == {"hidden files": [f"._{name}" for name, _ in files]}


OTHER_FILES: dict[str, tuple[str, bytes]] = {
    "large": ("annotations.json", b'{"a": "' + bytes(2 << 20) + b'"}'),
    "lines": ("captions.json", b'{"file": "0.png"}\n{"file": "1.png"}\n'),
    "not UTF-8": ("x/info.json", "{}".encode("utf-16")),
    "no JSON": ("a/meta.json", b"{"),
    "large text": ("names.label", bytes(2 << 20)),
    "binary": ("java.class", b"\xca\xfe\xba\xbe"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("labels", [[None] * N, [0, 1, 2, 1, 0]])
def test_files_without_an_image_are_ignored(tmp_path: Path, kind: str, labels: list[Any]) -> None:
    name, data = OTHER_FILES[kind]
    files = samples("cls", labels)
    for place in (0, len(files)):
        source = open_shards(write(tmp_path / "set.tar", [*files[:place], (name, data), *files[place:]]))
        assert source.labels == (None if labels[0] is None else labels)
        assert [item.content for item in source] == PNGS
        assert source.left_out == {".txt": CAPTIONS, "samples without an image": [name.rpartition(".")[0]]}


@pytest.mark.parametrize("folder", ["", "set/", "a/b/"])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("last", [True, False])
def test_a_built_dataset_in_an_archive_keeps_its_labels(tmp_path: Path, folder: str, suffix: str, last: bool) -> None:
    names = [f"00000/img{k:08}.png" for k in range(N)]
    labels = [3, 0, 1, 1, 2]
    content = {"labels": list(map(list, zip(names, labels, strict=True)))[::-1], "class_names": list("abcd")}
    files = [(folder + name, png) for name, png in zip(names, PNGS, strict=True)]
    files.insert(len(files) if last else 0, (f"{folder}dataset.json", json.dumps(content).encode()))
    path = write(tmp_path / f"set.{suffix}", files)
    made, built = build(path, tmp_path / "made.zip")
    np.testing.assert_array_equal(made, PIXELS)
    assert label_values(built) == labels
    assert built["class_names"] == list("abcd")
    assert open_shards(path).notes == (
        [f"{folder}dataset.json is read: all images are in its folder"] if folder else []
    )


def test_an_unused_dataset_json_is_noted(tmp_path: Path) -> None:
    member = ("dataset.json", b'{"labels": [["0.png", 0]]}')
    images = [("x/0.png", PNGS[0]), ("y/1.png", PNGS[1])]
    cases: dict[str, tuple[list[tuple[str, bytes]], str]] = {
        "labels": ([*samples("cls", [0, 1]), member], "dataset.json is not read: the samples have labels"),
        "outside": ([*images, (f"x/{member[0]}", member[1])], "x/dataset.json is not read, because images are outside"),
    }
    for name, (files, note) in cases.items():
        assert any(note in line for line in open_shards(write(tmp_path / f"{name}.tar", files)).notes)
    write(tmp_path / "set" / "0.tar", [*images, member])
    write(tmp_path / "set" / "1.tar", [("z.png", PNGS[2])])
    source = open_shards(tmp_path / "set")
    assert (source.labels, len(source)) == (None, 3)
    assert (
        source.notes[0] == "dataset.json is not read: to use it, unpack all 2 shards into a folder, and give the folder"
    )
    path = write(tmp_path / "missing.tar", [*images, member])
    assert "missing.tar: dataset.json has no label for 'x/0.png'" in assert_refused(tmp_path, path)
    assert len(build(path, tmp_path / "made.zip", "--labels-from-folders")[0]) == 2
    path = write(tmp_path / "bad.tar", [*images, (member[0], b"{")])
    assert "bad.tar: dataset.json cannot be read" in assert_refused(tmp_path, path)


@pytest.mark.parametrize("others", [(), ("backup.tar",), ("backup-20240501_0930.tar.gz", "old/x.tgz"), ("train.tar",)])
def test_images_are_read_and_archives_beside_them_are_not(tmp_path: Path, others: tuple[str, ...]) -> None:
    root = tmp_path / "pets"
    for name in others:
        (root / "old").mkdir(parents=True, exist_ok=True)
        write(root / name, [(f"{k}.png", PNGS[k]) for k in range(N)] * 9)
    for k, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNGS[k])
    made, content = build(root, tmp_path / "made.zip", "--labels-from-folders")
    np.testing.assert_array_equal(made, PIXELS[:4])
    assert content["class_names"] == ["cat", "dog"]
    notes = open_source(str(root), labels_from_folders="auto", drawing=Drawing(0, 1, 8, 8)).notes
    more = " and 1 more" if len(others) > 1 else ""
    expected = [
        f"the images are read, not {name!r}{more} beside them: to read such a file, give it as --source"
        for name in others
    ]
    assert [note for note in notes if "the images are read" in note] == expected[:1]


def test_shards_are_read_and_images_beside_them_are_not(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root / "x-000000.tar", samples("cls", [0, 1, 2, 1, 0]))
    for name in ("logo.png", "sample.png"):
        (root / name).write_bytes(PNGS[0])
    source = open_shards(root)
    assert (source.labels, source.left_out["images beside them"]) == ([0, 1, 2, 1, 0], ["logo.png", "sample.png"])
    assert source.notes[0].startswith("1 .tar file is read, not 2 images beside them, such as 'logo.png': ")


def test_shards_with_equal_names_and_without_a_split_are_read(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "more"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        write(tmp_path / "set" / folder / "0.tar", samples("cls", [0, 1])[:6])
    assert len(open_shards(tmp_path / "set")) == 4
    assert "splits others 1 shard, train 2 shards, but not" in assert_refused(tmp_path, tmp_path / "set", "--split=dev")
    assert len(build(tmp_path / "set", tmp_path / "others.zip", "--split=others")[0]) == 2
    assert len(build(tmp_path / "set", tmp_path / "all.zip", "--split=all")[0]) == 6


def test_skipped_members_are_counted_in_singular_and_plural(tmp_path: Path) -> None:
    path = write(tmp_path / "set.tar", [("0.png", PNGS[0]), ("a.txt", b""), (".b", b""), (".c", b"")])
    output = run(f"--source={path}", f"--dest={tmp_path / 'made.zip'}").output
    assert "  1 sample without an image\n" in output
    assert "  2 hidden files\n" in output


MEMBERS = {
    "hard link": (tarfile.LNKTYPE, LINKS),
    "symbolic link": (tarfile.SYMTYPE, LINKS),
    "sparse file": (tarfile.GNUTYPE_SPARSE, SPECIAL_FILES),
    "device": (tarfile.CHRTYPE, SPECIAL_FILES),
    "pipe": (tarfile.FIFOTYPE, SPECIAL_FILES),
    "folder": (tarfile.DIRTYPE, None),
}


@pytest.mark.parametrize("kind", MEMBERS)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_links_and_special_members_are_counted(tmp_path: Path, kind: str, suffix: str) -> None:
    """The images of such members are missing from the dataset; the user can unpack the archive."""
    member_type, listed = MEMBERS[kind]
    path = tmp_path / f"set.{suffix}"
    for images in (PNGS[:2], []):
        with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as archive:
            for name, png in (("x/0.png", None), *((f"x/{k}.png", png) for k, png in enumerate(images, 1))):
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = (tarfile.REGTYPE, "", len(png)) if png else (member_type, "y", 0)
                archive.addfile(info, io.BytesIO(png or b""))
        if images:
            assert open_shards(path).left_out == ({listed: ["x/0.png"]} if listed else {})
            output = run(f"--source={path}", f"--dest={tmp_path / 'made.zip'}").output
            assert (": to use them, unpack the archive into a folder, and give the folder\n" in output) == bool(listed)
        else:
            kind_name = listed.replace("links", "link").replace("files", "file") if listed else "nothing"
            assert f"it holds {'1 ' if listed else ''}{kind_name}" in assert_refused(tmp_path, path)


def make_tar(names: Iterable[int]) -> bytes:
    """Make a tar archive with the module tarfile; member k.png is PNGS[k]."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for k in names:
            info = tarfile.TarInfo(f"{k}.png")
            info.size = len(PNGS[k])
            archive.addfile(info, io.BytesIO(PNGS[k]))
    return content.getvalue()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("blocks", range(8))
def test_truncated_archives_are_refused(tmp_path: Path, pack: Callable[[bytes], bytes], blocks: int) -> None:
    """Each image occupies two blocks of 512 bytes. The end of a member is not the end of the archive."""
    path = tmp_path / "set.tar"
    whole = make_tar(range(4))
    path.write_bytes(pack(whole[: 512 * blocks]))
    assert ("set.tar is damaged (it is truncated)" if blocks else "of an unknown kind") in assert_refused(
        tmp_path, path
    )
    path.write_bytes(pack(whole[: 512 * 9]))  # some programs end an archive with a single block of zeros
    assert len(open_shards(path)) == 4


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("parts", [(range(3), range(3, 5)), (range(1), (), range(1, 5)), ((), range(5))])
def test_concatenated_archives_are_read_completely(
    tmp_path: Path, pack: Callable[[bytes], bytes], parts: tuple[Iterable[int], ...]
) -> None:
    """Archives joined by `cat` or `tar --concatenate`, compressed together or separately."""
    path = tmp_path / "set.tar"
    archives = [make_tar(part) for part in parts]
    for content in (pack(b"".join(archives)), b"".join(map(pack, archives))):
        path.write_bytes(content)
        source = open_shards(path)
        assert source.names == [f"{k}.png" for k in range(5)]
        assert [item.content for item in source] == PNGS
    path.write_bytes(pack(b"".join(archives) + b"a note"))
    assert "set.tar is damaged" in assert_refused(tmp_path, path)


def test_broken_images_in_shards_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "set.tar", [("0.png", PNGS[0]), ("1.png", bytes(4000)), ("2.png", b"none")])
    assert "set.tar: 2.png: not a" in assert_refused(tmp_path, path)
    monkeypatch.setattr("training.data_sources.items.MAX_IMAGE_BYTES", 3000)
    contents = [item.content for item in open_shards(path)]
    assert [isinstance(content, BrokenImageError) for content in contents] == [False, True, False]
    assert str(contents[1]) == "4000 bytes, more than the limit of 3000 for an image: reduce its size"
