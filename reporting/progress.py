"""Progress of a training run in images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dnnlib.config import UserError
from dnnlib.images import open_image
from dnnlib.util import format_time
from reporting.run_reader import Curve, Run
from torch_utils.sheets import sheet, tile_of, to_rgb

TILE = 64  # side of a tile in pixels, at least


def progress_sheet(
    run: Run, img_size: tuple[int, int], *, columns: int, metric: str, kimg: Sequence[float] = ()
) -> np.ndarray:
    """Draw one row per snapshot, or per value in `kimg`: images of the same latents, training time and metric.

    `img_size` is (height, width) of the images in pixels.
    """
    grids = [grid for grid in run.grids if not kimg or grid.kimg in kimg]
    rows = [[tile_of(tile, TILE) for tile in tiles_of_grid(grid.path, img_size)[0][:columns]] for grid in grids]
    return sheet(rows, row_captions=[_caption(run, metric, grid.kimg) for grid in grids])


def tiles_of_grid(path: Path, img_size: tuple[int, int]) -> list[list[np.ndarray]]:
    """Split the grid of images in a file into rows of RGB tiles (H, W, 3). Raises UserError for another image size."""
    H, W = img_size
    with open_image(path.read_bytes()) as image:
        grid = to_rgb(np.asarray(image.convert("RGBA")))
    rows, columns = grid.shape[0] // H, grid.shape[1] // W
    if grid.shape[:2] != (rows * H, columns * W):
        raise UserError(f"{path}: not a grid of images of {W}x{H} pixels")
    return [[grid[r * H :, c * W :][:H, :W] for c in range(columns)] for r in range(rows)]


def _caption(run: Run, metric: str, kimg: float) -> str:
    """Return kimg, and the training time and the value of a metric if they are known."""
    time, value = _value_at(run.ticks.get("Timing/total_sec"), kimg), _value_at(run.metrics.get(metric), kimg)
    parts = [f"{kimg:g} kimg"]
    parts += [] if time is None else [format_time(time)]
    parts += [] if value is None else [f"{metric} {value:.3g}"]
    return ", ".join(parts)


def _value_at(curve: Curve | None, kimg: float) -> float | None:
    """Return the first value of a curve in a kimg, by which image files are named; None if there is none."""
    if curve is None:
        return None
    known = curve.finite()
    found = known.values[np.floor(known.kimg) == kimg]
    return float(found[0]) if len(found) else None
