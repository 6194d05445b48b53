"""Progress of a training run in images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.util import format_time
from reporting.run_reader import Curve, Run
from torch_utils.sheets import enlarged, sheet

TILE = 64  # side of a tile in pixels, at least


def progress_sheet(
    run: Run, img_size: tuple[int, int], *, columns: int, metric: str, kimg: Sequence[float] = ()
) -> np.ndarray:
    """Draw a row of images per snapshot, or per age in `kimg`, of the same latents, with training time and metric.

    `img_size` is (height, width) of the images in pixels.
    """
    grids = [grid for grid in run.grids if not kimg or grid.kimg in kimg]
    rows = [[enlarged(tile, TILE) for tile in tiles_of_grid(grid.path, img_size)[0][:columns]] for grid in grids]
    return sheet(rows, row_captions=[_caption(run, metric, grid.kimg) for grid in grids])


def tiles_of_grid(path: Path, img_size: tuple[int, int]) -> list[list[np.ndarray]]:
    """Split the grid of images in a file into rows of RGB tiles (H, W, 3)."""
    H, W = img_size
    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))
    rows, columns = grid.shape[0] // H, grid.shape[1] // W
    return [[grid[r * H :, c * W :][:H, :W] for c in range(columns)] for r in range(rows)]


def _caption(run: Run, metric: str, kimg: float) -> str:
    """Return the age, and if they are known the training time and the value of a metric."""
    time, value = _value_at(run.ticks.get("Timing/total_sec"), kimg), _value_at(run.metrics.get(metric), kimg)
    parts = [f"{kimg:g} kimg"]
    parts += [] if time is None else [format_time(time)]
    parts += [] if value is None else [f"{metric} {value:.0f}"]
    return ", ".join(parts)


def _value_at(curve: Curve | None, kimg: float) -> float | None:
    """Return the value of a curve at an age; None if it is unknown there."""
    return None if curve is None else next(iter(curve.finite().values[curve.finite().kimg == kimg].tolist()), None)
