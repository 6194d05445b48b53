"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020): manifolds of balls.

Around each feature of a set lies a ball whose radius is the distance to its k-th nearest neighbour in that set.
Distances are computed block by block: no more than BLOCK x N exist at a time. The processes share out the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.feature_stats import Result
from metrics.sampling import gather_rows, own_shard

PR_NEIGHBOURS = 3
DC_NEIGHBOURS = 5
BLOCK = 4096


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances (len(x), len(y)) in float32, rounded to the features' own type.

    |x|^2 + |y|^2 - 2 x y around the mean of y, because what features have in common would cost digits.
    """
    centre = y.mean(dim=0, dtype=torch.float32)
    x32 = x.float() - centre
    squares = x32.square().sum(dim=1, keepdim=True)
    distances = x.new_empty(len(x), len(y))
    for start in range(0, len(y), BLOCK):  # so that y is never held in float32 as a whole
        y32 = y[start : start + BLOCK].float() - centre
        with full_float32():
            part = torch.addmm(y32.square().sum(dim=1), x32, y32.T, alpha=-2) + squares
        distances[:, start : start + BLOCK] = part.clamp(min=0).sqrt()
    return distances


def radii(x: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (N,). Collective; every process gets all."""
    if len(x) <= neighbours:
        raise UserError(f"{len(x)} images have no {neighbours} neighbours each: use more images")
    share = own_shard(len(x))
    parts = [x.new_empty(0)]
    for start in range(share.start, share.stop, BLOCK):
        rows = x[start : min(start + BLOCK, share.stop)]
        parts.append(
            _distances(rows, x).float().kthvalue(neighbours + 1, dim=1).values.to(x.dtype)
        )  # the first is itself
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def inside(x: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return in how many balls each row of x lies, (N,) int64. Collective."""
    share = own_shard(len(x))
    parts = [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for start in range(share.start, share.stop, BLOCK):
        rows = x[start : min(start + BLOCK, share.stop)]
        parts.append((_distances(rows, centres) <= radius).sum(dim=1))
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def nearest(x: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each row of x to the nearest of the others, (N,). Collective."""
    share = own_shard(len(x))
    parts = [x.new_empty(0)]
    for start in range(share.start, share.stop, BLOCK):
        parts.append(_distances(x[start : min(start + BLOCK, share.stop)], others).amin(dim=1))
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = PR_NEIGHBOURS) -> tuple[float, float]:
    """Return the share of fakes within a ball of the reals, and of reals within a ball of the fakes."""
    precision = (inside(fake, real, radii(real, neighbours)) > 0).double().mean()
    recall = (inside(real, fake, radii(fake, neighbours)) > 0).double().mean()
    return float(precision), float(recall)


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = DC_NEIGHBOURS) -> tuple[float, float]:
    """Return the mean number of the reals' balls around a fake / k, and the share of these balls that hold a fake."""
    radius = radii(real, neighbours)
    density = inside(fake, real, radius).double().mean() / neighbours
    coverage = (nearest(real, fake) <= radius).double().mean()
    return float(density), float(coverage)


def precision_recall_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return a metric's numbers from two Rows in float16. Raises UserError for features whose distances overflow it."""
    longest = max(float(side["rows"].float().norm(dim=1).max()) for side in (real, fake))
    if 2 * longest > torch.finfo(torch.float16).max:
        raise UserError("the detector's features are too large for distances in float16: scale them down")
    precision, recall = precision_recall(real["rows"], fake["rows"])
    return {"_precision": precision, "_recall": recall}


def density_coverage_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return a metric's numbers from two Rows."""
    density, coverage = density_coverage(real["rows"], fake["rows"])
    return {"_density": density, "_coverage": coverage}
