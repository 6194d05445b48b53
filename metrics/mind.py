"""MIND: a sliced squared Wasserstein-2 distance between features (Berthet et al. 2026, arXiv 2605.06797)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metrics.feature_stats import Result
from metrics.sampling import own_shard, random_stream
from torch_utils.distributed import all_reduce

DIRECTIONS = 1000
CHUNK = 100  # directions projected at once


def sliced_distance(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Return 3 F mean_u mean_j (sort(x u)_j - sort(y u)_j)^2 over unit vectors u, in float64. Collective.

    x, y (N, F) are features of equal number, `directions` (F, M). The inner mean is the squared Wasserstein-2 distance
    of the projections; a shift of x by v alone has the expected distance 3 |v|^2. Each process computes a share of the
    directions.
    """
    x, y, directions = x.double(), y.double(), directions.to(x.device)
    share = own_shard(directions.shape[1])
    total = x.new_zeros([])
    for part in directions[:, share.start : share.stop].split(CHUNK, dim=1):
        gaps = (x @ part).sort(dim=0).values - (y @ part).sort(dim=0).values
        total += gaps.square().sum()
    return float(3 * x.shape[1] * all_reduce(total) / (len(x) * directions.shape[1]))


def random_directions(dimensions: int) -> Tensor:
    """Return the unit vectors of the metric, (F, M) float64: the same for every seed, so that values are comparable."""
    vectors = random_stream(0, "mind").standard_normal((DIRECTIONS, dimensions))
    return torch.from_numpy((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T.copy())


def mind_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return the distance as the only value of the metric."""
    x, y = real["rows"], fake["rows"]
    return {"": sliced_distance(x, y, random_directions(x.shape[1]))}
