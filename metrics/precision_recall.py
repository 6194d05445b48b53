"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

The manifold of a set is the union of balls around its features; each radius is the distance to the k-th nearest
neighbour in the set. Distances are computed in square blocks, and those within a set only once per pair. The
processes take turns in rows of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.feature_stats import Result
from metrics.sampling import gather_rows
from torch_utils.distributed import all_reduce, rank, world_size

PR_NEIGHBOURS = 3
DC_NEIGHBOURS = 5
BLOCKS = {"cpu": 512, "cuda": 2048}  # rows of a block of features; a table of 512 x 512 stays in a processor's cache
GROUP = 8  # blocks of features that are in float32 at a time; with fewer, conversions take longer


def distances(x: Tensor, y: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of Euclidean distances: rows of x, rows of y, and the distances between them in float32.

    Each block belongs to one process. Without y, the blocks are those of x and x up to the diagonal. Distances are
    computed in float32 and rounded to the dtype of x. They are |x|^2 + |y|^2 - 2 x y, after subtracting the mean of y:
    a common offset would cancel and cost precision. Only GROUP blocks of y are in float32 at a time.
    """
    others, block = x if y is None else y, BLOCKS[x.device.type]
    sums = [part.sum(dim=0, dtype=torch.float64) for part in others.split(block)]  # a sum of all would convert all
    centre = (torch.stack(sums).sum(dim=0) / len(others)).float()
    for start in range(0, len(others), GROUP * block):
        y32 = others[start : start + GROUP * block].to(torch.float32, copy=True).sub_(centre)
        y_squares = torch.cat([part.square().sum(dim=1) for part in y32.split(block)])
        for first in range(rank() * block, len(x), world_size() * block):
            rows = slice(first, min(first + block, len(x)))
            x32 = x[rows].to(torch.float32, copy=True).sub_(centre)
            x_squares = x32.square().sum(dim=1, keepdim=True)
            stop = min(start + len(y32), rows.stop if y is None else len(others))
            for column in range(start, stop, block):
                columns = slice(column, min(column + block, stop))
                part = slice(columns.start - start, columns.stop - start)
                with full_float32():
                    table = torch.addmm(y_squares[part], x32, y32[part].T, alpha=-2)
                yield rows, columns, table.add_(x_squares).clamp_(min=0).sqrt_().to(x.dtype).float()


def nearest(x: Tensor, others: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the distance of each row of x to the nearest of the others, (N,), and its index, (N,). Collective.

    `skip` (N,) is for each row the index of one of the others to ignore. Raises UserError for a row without a finite
    distance, for example because squares overflow.
    """
    best = torch.full([len(x)], math.inf, device=x.device)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for rows, columns, table in distances(x, others):
        if skip is not None:
            numbers = torch.arange(columns.start, columns.stop, device=x.device)
            table.masked_fill_(numbers == skip[rows, None], math.inf)
        found = table.min(dim=1)
        is_nearer = found.values < best[rows]
        best[rows] = torch.where(is_nearer, found.values, best[rows])
        index[rows] = torch.where(is_nearer, found.indices + columns.start, index[rows])
    best, index = (gather_rows(each[:, None]).reshape(world_size(), len(x)) for each in (best, index))
    least = best.min(dim=0, keepdim=True)
    if not least.values.isfinite().all():
        raise UserError("distances between features are not finite: correct the detector, or scale its features down")
    return least.values[0], index.gather(0, least.indices)[0]


def radii(x: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (N,), on every process. Collective."""
    if len(x) <= neighbours:
        raise UserError(f"{len(x)} images are too few for {neighbours} neighbours each: use more images")
    best = torch.full([len(x), neighbours], math.inf, device=x.device)
    for rows, columns, table in distances(x):
        if rows == columns:
            table.fill_diagonal_(math.inf)
        else:
            best[columns] = _smallest(best[columns], table.T)
        best[rows] = _smallest(best[rows], table)
    best = gather_rows(best).reshape(world_size(), len(x), neighbours)
    return _smallest(*best)[:, -1]


def _smallest(best: Tensor, *others: Tensor) -> Tensor:
    """Return the k smallest values in each row of `best` (N, k) and of the others (N, M), ascending, (N, k)."""
    return torch.cat([best, *others], dim=1).topk(best.shape[1], dim=1, largest=False).values


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = PR_NEIGHBOURS) -> tuple[float, float]:
    """Return the fraction of fakes inside the reals' manifold, and the fraction of reals inside the fakes' manifold.

    Collective.
    """
    real_radius, fake_radius = radii(real, neighbours), radii(fake, neighbours)
    real_balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # number around each fake
    fake_balls = torch.zeros(len(real), dtype=torch.int64, device=real.device)  # number around each real
    for rows, columns, table in distances(fake, real):
        real_balls[rows] += (table <= real_radius[columns]).sum(dim=1)
        fake_balls[columns] += (table <= fake_radius[rows, None]).sum(dim=0)
    precision, recall = ((all_reduce(balls) > 0).double().mean() for balls in (real_balls, fake_balls))
    return float(precision), float(recall)


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = DC_NEIGHBOURS) -> tuple[float, float]:
    """Return density (mean number of real balls around a fake / k) and coverage (share of real balls with a fake).

    Collective.
    """
    radius = radii(real, neighbours)
    counts = torch.zeros(len(real), dtype=torch.int64, device=real.device)  # of fakes in each ball
    for _, columns, table in distances(fake, real):
        counts[columns] += (table <= radius[columns]).sum(dim=0)
    counts = all_reduce(counts).double()
    return float(counts.sum() / len(fake) / neighbours), float((counts > 0).double().mean())


def precision_recall_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return precision and recall of two Rows in float16. Raises UserError if distances would overflow float16."""
    blocks = (part for side in (real, fake) for part in side["rows"].split(max(BLOCKS.values())))
    longest = max(float(part.float().norm(dim=1).max()) for part in blocks)
    if 2 * longest > torch.finfo(torch.float16).max:
        raise UserError("the detector's features are too large for distances in float16: scale them down")
    precision, recall = precision_recall(real["rows"], fake["rows"])
    return {"_precision": precision, "_recall": recall}


def density_coverage_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return density and coverage of two Rows."""
    density, coverage = density_coverage(real["rows"], fake["rows"])
    return {"_density": density, "_coverage": coverage}
