"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

The manifold of a set is the union of balls around its features; each radius is the distance to the k-th nearest
neighbour in the set. Distances are computed in blocks of at most BLOCK x N. Rows are sharded over the processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.feature_stats import Result
from metrics.sampling import gather_rows, own_shard

PR_NEIGHBOURS = 3
DC_NEIGHBOURS = 5
BLOCK = 4096


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances (len(x), len(y)), computed in float32 and rounded to the dtype of x.

    |x|^2 + |y|^2 - 2 x y, after subtracting the mean of y: a common offset would cancel and cost precision.
    """
    centre = y.mean(dim=0, dtype=torch.float32)
    x32 = x.float() - centre
    squares = x32.square().sum(dim=1, keepdim=True)
    result = x.new_empty(len(x), len(y))
    for start in range(0, len(y), BLOCK):  # to avoid a float32 copy of all of y
        y32 = y[start : start + BLOCK].float() - centre
        with full_float32():
            part = torch.addmm(y32.square().sum(dim=1), x32, y32.T, alpha=-2) + squares
        result[:, start : start + BLOCK] = part.clamp(min=0).sqrt()
    return result


def nearest(x: Tensor, others: Tensor, rank: int = 1, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the distance of each row of x to the nearest of the others, (N,), and its index, (N,). Collective.

    `rank` 2 is the second nearest, and so on. `skip` (N,) is for each row the index of one of the others to ignore.
    """
    share = own_shard(len(x))
    values, indices = [x.new_empty(0)], [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for start in range(share.start, share.stop, BLOCK):
        stop = min(start + BLOCK, share.stop)
        table = distances(x[start:stop], others).float()
        if skip is not None:
            table.scatter_(1, skip[start:stop, None], math.inf)
        found = table.min(dim=1) if rank == 1 else table.kthvalue(rank, dim=1)
        values.append(found.values.to(x.dtype))
        indices.append(found.indices)
    return gather_rows(torch.cat(values)[:, None])[:, 0], gather_rows(torch.cat(indices)[:, None])[:, 0]


def radii(x: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (N,), on every process. Collective."""
    if len(x) <= neighbours:
        raise UserError(f"{len(x)} images are too few for {neighbours} neighbours each: use more images")
    return nearest(x, x, neighbours, skip=torch.arange(len(x), device=x.device))[0]


def count_balls(x: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return the number of balls that contain each row of x, (N,) int64. Collective."""
    share = own_shard(len(x))
    parts = [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for start in range(share.start, share.stop, BLOCK):
        rows = x[start : min(start + BLOCK, share.stop)]
        parts.append((distances(rows, centres) <= radius).sum(dim=1))
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = PR_NEIGHBOURS) -> tuple[float, float]:
    """Return the fraction of fakes inside the reals' manifold, and the fraction of reals inside the fakes' manifold."""
    precision = (count_balls(fake, real, radii(real, neighbours)) > 0).double().mean()
    recall = (count_balls(real, fake, radii(fake, neighbours)) > 0).double().mean()
    return float(precision), float(recall)


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = DC_NEIGHBOURS) -> tuple[float, float]:
    """Return density (mean number of real balls around a fake / k) and coverage (share of real balls with a fake)."""
    radius = radii(real, neighbours)
    density = count_balls(fake, real, radius).double().mean() / neighbours
    coverage = (nearest(real, fake)[0] <= radius).double().mean()
    return float(density), float(coverage)


def precision_recall_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return precision and recall of two Rows in float16. Raises UserError if distances would overflow float16."""
    longest = max(float(side["rows"].float().norm(dim=1).max()) for side in (real, fake))
    if 2 * longest > torch.finfo(torch.float16).max:
        raise UserError("the detector's features are too large for distances in float16: scale them down")
    precision, recall = precision_recall(real["rows"], fake["rows"])
    return {"_precision": precision, "_recall": recall}


def density_coverage_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return density and coverage of two Rows."""
    density, coverage = density_coverage(real["rows"], fake["rows"])
    return {"_density": density, "_coverage": coverage}
