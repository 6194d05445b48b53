"""Images of a run's progress, and the overview of the demo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
from reporting.progress import progress_sheet, tiles_of_grid
from reporting.run_reader import Run, read_run
from torch_utils.sheets import tile_of


def tile(number: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Return a colour image that differs for each number."""
    return np.random.RandomState(number).randint(0, 256, (*size, 3), dtype=np.uint8)


def write_grid(path: Path, first: int, *, side: int, size: tuple[int, int] = (32, 32)) -> None:
    """Write a square grid of the tiles `first`, `first` + 1 and so on."""
    rows = [np.hstack([tile(first + side * r + c, size) for c in range(side)]) for r in range(side)]
    Image.fromarray(np.vstack(rows)).save(path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run with snapshots at 0, 4 and 8 kimg and metric values at 0 and 8."""
    lines: dict[str, list[dict[str, object]]] = {
        "stats.jsonl": [{"Progress/kimg": k, "Timing/total_sec": 30.0 * k} for k in (0.0, 4.016, 8.0)],
        "metric-swd500.jsonl": [{"kimg": k, "results": {"swd500": 100.0 - k}} for k in (0.0, 8.0)],
    }
    for name, records in lines.items():
        (tmp_path / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    for number, name in enumerate(("reals", "fakes_init", "fakes000004", "fakes000008")):
        write_grid(tmp_path / f"{name}.png", 100 * number, side=9)
    return read_run(tmp_path, "run")


def test_a_grid_is_split_into_its_tiles(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", 5, side=3, size=(4, 6))
    rows = tiles_of_grid(tmp_path / "grid.png", (4, 6))
    assert [len(row) for row in rows] == [3, 3, 3]
    for number, found in enumerate(found for row in rows for found in row):
        assert np.array_equal(found, tile(5 + number, (4, 6)))


def test_progress_shows_the_same_positions_at_all_ages(run: Run) -> None:
    drawn = progress_sheet(run, (32, 32), columns=2, metric="swd500")
    height, width, _ = drawn.shape
    assert height == 3 * 64 + 2 * 2
    for row in range(3):
        for column in range(2):
            x, y = width - 130 + 66 * column, 66 * row
            assert np.array_equal(drawn[y : y + 64, x : x + 64], tile_of(tile(100 * (row + 1) + column), 64))
    chosen = progress_sheet(run, (32, 32), columns=2, metric="swd500", kimg=[0, 8])
    assert np.array_equal(chosen[:64], drawn[:64])
    assert np.array_equal(chosen[66:], drawn[132:])


def test_captions_give_age_time_and_metric(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr("reporting.progress.sheet", lambda rows, row_captions: captions.extend(row_captions))
    progress_sheet(run, (32, 32), columns=1, metric="swd500")
    assert captions == ["0 kimg, 0s, swd500 100", "4 kimg, 2m 00s", "8 kimg, 4m 00s, swd500 92"]


def test_the_overview_of_the_demo_shows_reals_and_seeds(run: Run, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(36):
        Image.fromarray(tile(1000 + seed)).save(images / f"seed{seed:04d}.png")
    drawn = demo.draw_overview(run.path, images)
    panel = 6 * 64 + 5 * 2
    left, right, top = 16, 16 + panel + 16, 16 + 32
    for row in range(6):
        for column in range(6):
            x, y = 66 * column, top + 66 * row
            assert np.array_equal(drawn[y : y + 64, left + x :][:, :64], tile_of(tile(9 * row + column), 64))
            assert np.array_equal(drawn[y : y + 64, right + x :][:, :64], tile_of(tile(1000 + 6 * row + column), 64))


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, ""),
        ("linux", {"DISPLAY": ":0"}, "xdg-open 'a b.png'"),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, "xdg-open 'a b.png'"),
        ("darwin", {}, "open 'a b.png'"),
        ("win32", {}, ""),
    ],
)
def test_a_display_adds_how_to_open_the_sheet(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.sys, "platform", platform)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert demo.hint(Path("a b.png")).strip(" ()").removeprefix("open it: ") == expected
