"""generate.py neighbours: the search against NumPy, the sheet and its records, copies and flips, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_shapes
from exploration_helpers import make_snapshot, pixels, run, run_ok
from metric_helpers import SmallDetector, natural_images, script_program
from PIL import Image
from torch import Tensor

from exploration import neighbours
from exploration.neighbours import Neighbour, find_nearest, search, small_pixels
from torch_utils.sheets import TEXT_SIZE, column_width
from training.dataset import DatasetConfig, ImageDataset

CPU = torch.device("cpu")


def save_images(folder: Path, images: Tensor) -> Path:
    """Write uint8 images (n, 3, H, W) as a dataset."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"img{number:04d}.png")
    return folder


def in_parts(rows: Tensor, size: int) -> list[tuple[range, Tensor]]:
    return [
        (range(start, min(start + size, len(rows))), rows[start : start + size]) for start in range(0, len(rows), size)
    ]


def read_lines(outdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outdir / "neighbours.jsonl").read_text().splitlines()]


def make_run(folder: Path) -> tuple[Path, Path]:
    """Make a dataset of 40 scenes of 16x16 pixels, and a snapshot of an untrained network of this size."""
    data = make_shapes(folder / "data.zip", 16, 40)
    return data, make_snapshot(folder / "network.pkl", data, widths=(16, 8), layers=(1, 1))


def test_the_search_equals_a_full_sort() -> None:
    stream = np.random.RandomState(0)
    rows, views = stream.standard_normal((50, 7)), stream.standard_normal((2, 9, 7))
    skip = torch.arange(9) * 5
    tables = np.linalg.norm(views[:, :, None] - rows, axis=3)  # (V, Q, N)
    tables[:, np.arange(9), skip.numpy()] = np.inf
    expected = tables.min(axis=0).argsort(axis=1)[:, :4]
    distances, indices, found = find_nearest(torch.from_numpy(views), in_parts(torch.from_numpy(rows), 11), 4, skip)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(distances, np.take_along_axis(tables.min(axis=0), expected, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(found, np.take_along_axis(tables.argmin(axis=0), expected, axis=1))


def test_pixel_distances_are_in_grey_levels() -> None:
    images = natural_images(3, (3, 24, 40))
    shifted = (images.float() + 9).clamp(0, 255)
    difference = (shifted - images.float()).square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.allclose((small_pixels(shifted) - small_pixels(images)).norm(dim=1), difference, rtol=1e-4)
    grey = torch.stack([torch.full((3, 100, 70), level, dtype=torch.uint8) for level in (50, 90)])
    features = small_pixels(grey)
    assert features.shape == (2, 3 * 25 * 18)  # halved until the shorter side is at most 32
    assert float((features[0] - features[1]).norm()) == pytest.approx(40, rel=1e-4)


@pytest.mark.parametrize("kept_bytes", [2**30, 0])  # features kept, and computed twice
def test_copies_and_flips_of_training_images_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(neighbours, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(neighbours, "BATCH", 8)
    images = natural_images(30)
    data = save_images(tmp_path / "data", images)
    queries = torch.stack([images[7], images[12].flip(2), natural_images(1, seed=5)[0]])
    plain, mirrored = (
        search(queries, ImageDataset(DatasetConfig(path=str(data), mirror=mirror)), small_pixels, 3, CPU)
        for mirror in (False, True)
    )
    assert [(row[0].index, row[0].flipped, row[0].distance) for row in mirrored[:2]] == [(7, False, 0), (12, True, 0)]
    assert (plain[0][0].index, plain[0][0].distance) == (7, 0)
    assert plain[1][0].distance > 10
    assert [neighbours.is_authentic(row) for row in mirrored] == [False, False, True]

    levels = images.double().flatten(1)  # 32 pixels: not reduced
    table = torch.cdist(levels, levels).numpy() / np.sqrt(levels.shape[1])
    np.fill_diagonal(table, np.inf)
    for each in plain[2]:
        expected = (queries[2].double() - images[each.index].double()).square().mean().sqrt()
        assert each.distance == pytest.approx(float(expected), rel=1e-5)
        assert each.own_distance == pytest.approx(table[each.index].min(), rel=1e-5)


def test_the_command_writes_a_sheet_and_its_records(tmp_path: Path) -> None:
    _, network = make_run(tmp_path)
    output = run_ok("neighbours", f"--network={network}", "--seeds=3,5", "--count=4", f"--outdir={tmp_path / 'out'}")
    records = read_lines(tmp_path / "out")
    assert [record["image"] for record in records] == ["seed0003", "seed0005"]
    authentic = sum(record["authentic"] for record in records)
    assert f"{authentic} of 2 images authentic among 40 training images" in output
    dataset = ImageDataset(DatasetConfig(path=records[0]["data"]))
    for record in records:
        distances = [each["distance"] for each in record["neighbours"]]
        assert distances == sorted(distances)
        assert len(distances) == 4
        first = record["neighbours"][0]
        assert record["authentic"] == (first["distance"] > first["own_distance"])
        assert first["file"] == dataset.file_name(first["index"])
        assert record["features"] == "pixels at 16x16"
    H, W, _ = pixels(tmp_path / "out" / "neighbours.png").shape
    assert W > 5 * 96
    assert H > 2 * 96


@pytest.mark.parametrize(("side", "name"), [(16, "16x16"), (32, "32x32"), (48, "24x24"), (96, "24x24"), (65, "17x17")])
def test_the_compared_resolution_is_stated(side: int, name: str) -> None:
    embed, features = neighbours.choose_embedding(None, (3, side, side), CPU)
    assert features == f"pixels at {name}"
    assert embed(torch.zeros(2, 3, side, side)).shape == (2, 3 * int(name[:2]) ** 2)
    assert neighbours.choose_embedding(None, (1, 40, 100), CPU)[1] == "pixels at 50x20"


def test_rows_of_a_sheet_are_aligned_under_wide_captions(tmp_path: Path) -> None:
    """Tiles of white frames: the columns of frames have one width and one pitch in all rows."""
    images = torch.zeros(32, 3, 24, 64, dtype=torch.uint8)
    images[:, 0] = 255  # red
    dataset = ImageDataset(DatasetConfig(path=str(save_images(tmp_path / "data", images))))
    own = (0.000615, 7.0, 0.00152)
    found = [
        [
            Neighbour(index=index, flipped=False, distance=own[(index + row) % 3], own_distance=own[row])
            for index in range(32)
        ]
        for row in range(3)
    ]
    drawn = neighbours.draw(images[:3], ["1", "2", "3"], found, dataset).astype(int)
    is_red = (drawn[:, :, 0] == 255) & (drawn[:, :, 1] == 0)
    starts = [np.flatnonzero(np.diff(row.astype(int), prepend=0) == 1) for row in is_red if row.sum() > 32]
    assert all(row.tolist() == starts[0].tolist() for row in starts)
    assert len(starts[0]) == 33
    assert len(set(np.diff(starts[0][1:]))) == 1
    assert is_red[:, -1].sum() == 0  # the last tile is narrower than its caption, so it is not cut off
    pitch = starts[0][2] - starts[0][1]
    assert pitch > column_width(0, ["0.000615 / 0.00152"], TEXT_SIZE)


def test_features_of_a_detector_are_compared(tmp_path: Path) -> None:
    data, network = make_run(tmp_path)
    detector = script_program(tmp_path / "small.pt", SmallDetector())
    options = [f"--network={network}", "--seeds=3", "--count=2", f"--data={data}", f"--outdir={tmp_path / 'out'}"]
    run_ok("neighbours", *options, f"--detector={detector}")
    run_ok("images", f"--network={network}", "--seeds=3", f"--outdir={tmp_path / 'out'}")
    [record] = read_lines(tmp_path / "out")
    assert record["features"] == "features of small.pt"
    dataset = ImageDataset(DatasetConfig(path=str(data)))
    made = torch.from_numpy(pixels(tmp_path / "out" / "seed0003.png").copy()).permute(2, 0, 1)[None]
    rows, query = SmallDetector()(dataset.images(range(40)))[0].double(), SmallDetector()(made)[0].double()
    distances = (rows - query).norm(dim=1).sort()
    assert [each["index"] for each in record["neighbours"]] == distances.indices[:2].tolist()
    assert [each["distance"] for each in record["neighbours"]] == pytest.approx(distances.values[:2].tolist(), rel=1e-4)


class NoFeatures(torch.nn.Module):
    """Detector that returns maps instead of vectors."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def test_a_missing_dataset_is_reported_before_loading(tmp_path: Path) -> None:
    (tmp_path / "network.pkl").write_bytes(b"no network")
    result = run(
        "neighbours", f"--network={tmp_path / 'network.pkl'}", f"--outdir={tmp_path}", "--data=none", "--seeds=0"
    )
    assert result.stderr.endswith("Error: --data=none does not exist: give a folder or .zip file of images\n")


def test_bad_input_is_refused_before_anything_is_written(shapes32_zip: Path, tmp_path: Path) -> None:
    data, network = make_run(tmp_path)
    maps = script_program(tmp_path / "maps.pt", NoFeatures())
    lpips = tmp_path / "weights-vgg16-lpips.pth"
    torch.save({}, lpips)
    for arguments, message in (
        ([], "--seeds: specify images"),
        (["--seeds=0-299"], "--seeds: 300 images; a sheet shows at most 256"),
        (["--seeds=0", "--count=33"], "33 is not in the range 1<=x<=32"),
        (
            ["--seeds=0", f"--data={tmp_path / 'none.zip'}"],
            f"Error: --data={tmp_path / 'none.zip'} does not exist: give",
        ),
        (["--seeds=0", f"--data={shapes32_zip}"], "the network generates images of 3x16x16"),
        (["--seeds=0", f"--detector={maps}"], "expected features [B, F]"),
        (["--seeds=0", "--detector=none.pt2"], "--detector=none.pt2: no such file or folder"),
        (["--seeds=0", f"--detector={lpips}"], "LPIPS compares pairs of images"),
    ):
        result = run("neighbours", f"--network={network}", f"--outdir={tmp_path / 'out'}", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr.splitlines()[-1], result.stderr
        assert not (tmp_path / "out" / "neighbours.png").exists()
    few = make_shapes(tmp_path / "few.zip", 16, 3)
    result = run("neighbours", f"--network={network}", f"--outdir={tmp_path}", "--seeds=0", f"--data={few}")
    assert result.stderr.endswith(f"--count=6: {few} has 3 images; specify at most 3\n")
    single = make_shapes(tmp_path / "single.zip", 16, 1)
    result = run("neighbours", f"--network={network}", f"--outdir={tmp_path}", "--seeds=0", f"--data={single}")
    assert result.stderr.endswith(f"--data={single}: has 1 image; specify at least 2 training images\n")
    data.unlink()
    result = run("neighbours", f"--network={network}", f"--outdir={tmp_path}", "--seeds=0")
    assert "network.pkl): specify the dataset with --data" in result.stderr
