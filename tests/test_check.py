"""dataset_tool.py check: reported problems of known images, and the sheet of examples."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset_tool
from training.data_sources.checking import (
    defect_of,
    histogram,
    inspect_all,
    short_sides,
)
from training.data_sources.codec import encode_png
from training.data_sources.dataset_json import DatasetJson
from training.data_sources.files import open_store
from training.data_sources.sheet import MAX_TILES, Tile, choose_tiles, draw_sheet, spread
from training.data_sources.sources import items_of

NOISE = np.random.RandomState(0)


def noise(*shape: int) -> np.ndarray:
    return NOISE.randint(0, 256, shape, np.uint8)


def write_dataset(folder: Path, images: dict[str, np.ndarray], **content: object) -> Path:
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_png(pixels))
    if content:
        (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def check(*arguments: object) -> Result:
    result = CliRunner().invoke(dataset_tool.main, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- problems


def test_problems_are_grouped_and_ten_of_each_are_shown(tmp_path: Path) -> None:
    images = {f"{k:03d}.png": noise(8, 8, 3) for k in range(60)}
    images |= {f"size{k:02d}.png": noise(8, 9, 3) for k in range(12)} | {"gray.png": noise(8, 8, 1)}
    path = write_dataset(tmp_path / "set", images)
    for k in range(11):
        (path / f"broken{k:02d}.png").write_bytes(b"no image")
    result = check(path)
    assert result.exit_code == 1
    assert "11 images that cannot be read:\n  broken00.png: " in result.stdout
    assert "  broken09.png: " in result.stdout
    assert "broken10.png" not in result.stdout
    assert "12 images that differ in size from the most common, 8x8:\n  size00.png: 9x8\n" in result.stdout
    assert result.stdout.count("  and 1 more (--verbose lists them)\n") == 1
    assert result.stdout.count("  and 2 more (--verbose lists them)\n") == 1
    assert "1 image that differs in kind from the most common, RGB:\n  gray.png: grayscale\n" in result.stdout
    in_full = check(path, "--verbose")
    assert in_full.exit_code == 1
    assert len([line for line in in_full.stdout.splitlines() if line.startswith("  ")]) == 11 + 12 + 1
    assert "more (" not in in_full.stdout


def test_many_sizes_are_reported_as_a_histogram(tmp_path: Path) -> None:
    sides = [8, 9, 20, 40, 40, 70]
    path = write_dataset(tmp_path / "set", {f"{k}.png": noise(side, 2 * side, 3) for k, side in enumerate(sides)})
    result = check(path)
    assert result.exit_code == 1
    assert "6 images of 5 sizes:\n  80x40: 2 images\n  16x8: 1 image\n" in result.stdout
    rows = re.findall(r"^ +(\d+) to (\d+) +(\d+)  (#+)$", result.stdout, re.MULTILINE)
    assert [(int(a), int(b), int(count)) for a, b, count, _ in rows] == [
        (8, 15, 2),
        (16, 31, 1),
        (32, 63, 2),
        (64, 127, 1),
    ]
    assert [len(bar) for *_, bar in rows] == [40, 20, 40, 20]
    assert "Shorter sides of the images" in result.stdout


def test_skipped_files_and_detected_labels_are_reported(tmp_path: Path) -> None:
    images = {f"{kind}/{k}.png": noise(8, 8, 3) for kind, count in (("cat", 3), ("dog", 2)) for k in range(count)}
    path = write_dataset(tmp_path / "set", images)
    (path / "notes.txt").touch()
    result = check(path)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:3] == [
        "Note: images are in 2 folders: cat 3, dog 2: --labels-from-folders uses the folders as classes",
        "Skipped 1 file:",
        "  1 .txt",
    ]
    nested = write_dataset(tmp_path / "outer" / "inner", {"a.png": noise(8, 8, 3)}, Labels=[["a.png", 0]])
    assert "Note: inner/dataset.json is read: all images are in its folder\n" in check(nested.parent).stdout


def test_a_dataset_without_readable_images_is_reported(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"no image")
    result = check(tmp_path / "set", f"--sheet={tmp_path / 'sheet.png'}")
    assert result.exit_code == 1
    assert result.stdout.startswith("1 image that cannot be read:\n  a.png: ")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 100


def test_remarks_do_not_change_the_exit_code(tmp_path: Path) -> None:
    images = {f"{k}.png": noise(8, 8, 3) for k in range(4)}
    images |= {"copy.png": images["1.png"], "other.png": images["2.png"], "third.png": images["2.png"]}
    images |= {"red.png": np.full((8, 8, 3), (200, 0, 0), np.uint8), "dark.png": noise(8, 8, 3) // 16}
    labels = [[name, k % 2] for k, name in enumerate(images)]
    path = write_dataset(
        tmp_path / "set", images, labels=labels, class_names=["cat", "dog", "owl"], short_sides={"64": 3, "256": 6}
    )
    result = check(path)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "5 images in 2 groups of exact copies:",
        "  1.png = copy.png",
        "  2.png = other.png = third.png",
        "1 constant image, all pixels the same:",
        "  red.png",
        "1 nearly black image, 99.9% of the values at most 16 of 255, typical of 12-bit data in 16-bit files:",
        "  dark.png",
        "1 of 3 classes without images:",
        "  owl",
        "2 classes: cat 5, dog 4; 1 of 3 class numbers have no images",
        "Shorter sides of the originals, in pixels:",
        "   64 to 127  3  ####################",
        "  256 to 511  6  ########################################",
        f"{path}: 9 images of 8x8 pixels and 3 channels, with labels",
    ]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((9, 7, 3), 3, np.uint8), "constant"),
        (np.full((9, 7, 1), 255, np.uint8), "constant"),
        (np.dstack([noise(9, 7, 3), np.zeros((9, 7), np.uint8)]), "constant"),
        (np.full((1, 1, 3), 200, np.uint8), "constant"),
        (noise(32, 32, 3) // 16, "nearly black"),
        (noise(32, 32, 1) // 16, "nearly black"),
        (np.dstack([noise(32, 32, 3) // 16, np.full((32, 32), 255, np.uint8)]), "nearly black"),
        (
            np.dstack([noise(32, 32, 3) // 16, np.arange(1024).reshape(32, 32) // 4]).astype(np.uint8),
            "",
        ),  # composed over white
        (noise(32, 32, 3) // 12, ""),
        (noise(32, 32, 3), ""),
        (np.eye(64, dtype=np.uint8)[:, :, None] * 255, ""),  # 1.6 % of the pixels
        ((np.arange(4096).reshape(64, 64, 1) < 3).astype(np.uint8) * 255, "nearly black"),  # 3 pixels of 4096
    ],
)
def test_constant_and_nearly_black_images_are_detected(pixels: np.ndarray, expected: str) -> None:
    assert defect_of(pixels) == expected


def test_twelve_bit_values_in_16_bit_files_are_nearly_black(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "set", {"bright.png": noise(32, 32, 1)})
    for bits in (12, 14):
        values = np.random.RandomState(1).randint(0, 2**bits, (32, 32)).astype(np.uint16)
        Image.fromarray(values).save(path / f"{bits}.png")
    output = check(path).output
    assert "1 nearly black image, " in output
    assert "\n  12.png\n" in output
    assert "14.png" not in output


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 3))
def test_copies_are_images_with_equal_pixels(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[int], side: int
) -> None:
    path = tmp_path_factory.mktemp("set")
    names = [f"{k:02d}.png" for k in range(len(kinds))]
    write_dataset(
        path, {name: np.full((side, side, 1), kind, np.uint8) for name, kind in zip(names, kinds, strict=True)}
    )
    store = open_store(path)
    found = inspect_all(store.names, items_of(store), 1).duplicates()
    expected = [[k for k, other in enumerate(kinds) if other == kind] for kind in set(kinds)]
    assert found == sorted(group for group in expected if len(group) > 1)


def test_images_of_different_shapes_are_not_copies(tmp_path: Path) -> None:
    flat = np.arange(48, dtype=np.uint8)
    path = write_dataset(tmp_path / "set", {"a.png": flat.reshape(4, 4, 3), "b.png": flat.reshape(2, 8, 3)})
    store = open_store(path)
    assert inspect_all(store.names, items_of(store), 1).duplicates() == []


def test_the_number_of_workers_does_not_change_the_report(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(300):
            pixels = np.full((4, 4 + k % 2, 1 + 2 * (k % 3 == 0)), k % 50, np.uint8)
            archive.writestr(f"{k:03d}.png", b"no image" if k % 37 == 5 else encode_png(pixels))
    one, two = check(path, "--workers=1", "--verbose"), check(path, "--workers=2", "--verbose")
    assert one.exit_code == two.exit_code == 1
    assert one.stdout == two.stdout
    assert "8 images that cannot be read:" in one.stdout


@pytest.mark.parametrize(
    "recorded", [None, 3, [], {}, {"64": "3"}, {"-8": 1}, {"x": 1}, {"64": 0}, {"64": True}, {"٦٤": 1}, {"9" * 5000: 1}]
)
def test_invalid_records_of_original_sizes_are_ignored(tmp_path: Path, recorded: object) -> None:
    path = write_dataset(tmp_path / "set", {"a.png": noise(8, 8, 3), "b.png": noise(8, 8, 3)}, short_sides=recorded)
    result = check(path)
    assert result.exit_code == 0
    assert "Shorter" not in result.stdout


def test_check_shows_the_original_sizes_recorded_by_build(tmp_path: Path) -> None:
    sides = [20, 33, 40, 70, 80, 90]
    write_dataset(tmp_path / "raw", {f"{k}.png": noise(side, side + 5, 3) for k, side in enumerate(sides)})
    command = [f"--source={tmp_path / 'raw'}", f"--dest={tmp_path / 'set.zip'}", "--resolution=16x16", "--workers=1"]
    assert CliRunner().invoke(dataset_tool.main, command).exit_code == 0
    raw, built = check(tmp_path / "raw"), check(tmp_path / "set.zip")
    rows = [[line for line in result.stdout.splitlines() if "#" in line] for result in (raw, built)]
    assert rows[0] == rows[1] != []
    assert "Shorter sides of the originals" in built.stdout


def test_a_histogram_of_a_single_bar_is_omitted() -> None:
    assert histogram({64: 10}, True) == []
    assert short_sides(inspect_all([], [], 1), DatasetJson()) == ({}, False)


# --- the sheet


@given(st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=50, derandomize=True, deadline=None, database=None)
def test_spread_is_even(count: int, maximum: int) -> None:
    chosen = spread(count, maximum)
    assert len(chosen) == len({*chosen}) == min(count, maximum)
    assert chosen[0] == 0
    gaps = np.diff([*chosen, count])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1000], [64]),
        ([3], [3]),
        ([100, 100], [32, 32]),
        ([1, 100, 2], [1, 61, 2]),
        ([50] * 10, [7, 7, 7, 7, 6, 6, 6, 6, 6, 6]),
        ([2] * 1000, [1] * 64),
        ([1] * 64, [1] * 64),
    ],
)
def test_tiles_are_balanced_between_classes(sizes: list[int], expected: list[int]) -> None:
    labels = [k for k, size in enumerate(sizes) for _ in range(size)]
    random.Random(0).shuffle(labels)
    chosen = choose_tiles(range(len(labels)), dict(enumerate(labels)))
    found = Counter(labels[position] for position in chosen)
    assert len({*chosen}) == len(chosen) == min(MAX_TILES, len(labels))
    assert [found[k] for k in sorted(found)] == expected
    assert [labels[position] for position in chosen] == sorted(labels[position] for position in chosen)


def make_sheet(tmp_path: Path, images: dict[str, np.ndarray], **content: object) -> np.ndarray:
    path = write_dataset(tmp_path / "set", images, **content)
    result = check(path, f"--sheet={tmp_path / 'new' / 'sheet.png'}")
    assert f"Written: {tmp_path / 'new' / 'sheet.png'}" in result.output
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        return np.asarray(sheet.convert("RGB"))


@pytest.mark.parametrize("side", [1, 3, 8, 32, 128])
def test_small_images_are_enlarged_by_an_integer(tmp_path: Path, side: int) -> None:
    """Each pixel of an image becomes a square of its colour in the sheet."""
    pixels = noise(side, side, 3)
    sheet = make_sheet(tmp_path, {"a.png": pixels})
    enlarged = pixels.repeat(128 // side, 0).repeat(128 // side, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:300], enlarged.shape)[:, 40:41, 0]
    assert any((window == enlarged).all() for window in windows[:, 0])


@pytest.mark.parametrize(
    "shape", [(1024, 1024, 3), (1, 3000, 3), (3000, 1, 1), (384, 512, 4), (2, 2, 4), (200, 100, 1)]
)
def test_images_of_all_sizes_fit_into_the_sheet(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    sheet = make_sheet(tmp_path, {"a.png": noise(*shape), "b.png": noise(*shape)})
    assert sheet.shape[1] == 2 * 40 + 5 * 128 + 4 * 20
    assert (sheet[:, -30:] == 255).all()


def test_transparent_images_are_drawn_on_a_checkerboard(tmp_path: Path) -> None:
    sheet = make_sheet(tmp_path, {"a.png": np.zeros((64, 64, 4), np.uint8), "b.png": noise(64, 64, 4)})
    tile = sheet[:, 40 : 40 + 128]
    rows = np.flatnonzero((tile == 224).all(axis=2).sum(axis=1) == 64)  # half of each row of the tile
    assert len(rows) == 128
    assert {*np.unique(tile[rows[0] : rows[-1] + 1])} == {224, 255}


def test_class_names_of_any_script_and_length_are_drawn(tmp_path: Path) -> None:
    names = ["猫", "собака", "café", "ناقلة", "x" * 500, "a\nb\x1b[0m", "", "🦉"]
    images = {f"{k}.png": noise(8, 8, 3) for k in range(len(names))}
    sheet = make_sheet(tmp_path, images, labels=[[name, k] for k, name in enumerate(images)], class_names=names)
    assert sheet.shape[1] == 2 * 40 + 8 * 128 + 7 * 20
    for k in range(len(names)):
        left = 40 + k * (128 + 20)
        class_name, name = (sheet[top : top + 18, left : left + 128] for top in (-40 - 36, -40 - 18))
        assert (class_name < 128).any(), names[k]
        assert (name < 150).any(), names[k]
    assert (sheet[:, -30:] == 255).all()  # the margin stays empty


def test_characters_without_a_font_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data_sources.sheet._other_fonts", lambda size: [])
    pixels = noise(8, 8, 3)
    sheets = [
        np.asarray(draw_sheet("title", [], [Tile(pixels, "a.png", name, 7)], {}, "images"))
        for name in ("猫", "class 7", "café", "cafe", "猫猫")
    ]
    np.testing.assert_array_equal(sheets[0], sheets[1])
    np.testing.assert_array_equal(sheets[2], sheets[3])
    np.testing.assert_array_equal(sheets[4], sheets[1])
    assert (sheets[1] != sheets[3]).any()


def test_a_sheet_shows_a_thousand_classes_and_a_histogram(tmp_path: Path) -> None:
    images = {f"{k:04d}.png": noise(2, 2, 1) for k in range(1000)}
    labels = [[name, k] for k, name in enumerate(images)]
    sheet = make_sheet(tmp_path, images, labels=labels, short_sides={"8": 10, "16": 20, "1024": 970})
    assert sheet.shape == (2 * 40 + 92 + 8 * (128 + 44 + 20) - 20, 2 * 40 + 8 * 128 + 7 * 20, 3)
    bars = (sheet == (0x4C, 0x78, 0xA8)).all(axis=2)
    heights = bars.sum(axis=0)
    assert sorted({*heights[heights > 0].tolist()}) == [1, 44]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.png", "exists: remove it or choose another name"),
        ("sheet.jpg", "must be the name of a .png file"),
        ("sheet", "must be the name of a .png file"),
        ("folder.png", "exists: remove it"),
        ("there.png/sheet.png", "cannot be"),
        ("set/sheet.png", "would become part of the dataset: choose another folder"),
        ("set/new/sheet.png", "would become part of the dataset"),
        ("alias/sheet.png", "would become part of the dataset"),
        ("new/../set/a/../sheet.png", "would become part of the dataset"),
    ],
)
def test_a_sheet_never_overwrites_or_enters_the_dataset(tmp_path: Path, name: str, message: str) -> None:
    path = write_dataset(tmp_path / "set", {"a.png": noise(8, 8, 3)})
    (tmp_path / "there.png").write_bytes(b"precious")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "alias").symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    result = check(path, f"--sheet={tmp_path / name}")
    assert sorted(tmp_path.rglob("*")) == before
    assert result.exit_code == 2
    assert message in result.stderr
    assert (tmp_path / "there.png").read_bytes() == b"precious"
