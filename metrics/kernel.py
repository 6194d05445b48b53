"""Kernel inception distance: the squared MMD of features with a cubic kernel (Binkowski et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.feature_stats import Result, Side, SubsetRows

SUBSETS = 100
SUBSET_SIZE = 1000


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate for x, y (m, F) of equal size, in float64:

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 mean_ij k(x_i, y_j),     k(a, b) = (a b / F + 1)^3
    """
    m, F = x.shape
    x, y = x.double(), y.double()
    kxx, kyy, kxy = ((a @ b.T / F + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()
    return within / (m * (m - 1)) - 2 * kxy.mean()


def kernel_distance(real: Result, fake: Result) -> tuple[float, float]:
    """Return the mean and standard deviation over the subsets of two SubsetRows."""
    pairs = zip(real["index"], fake["index"], strict=True)
    values = torch.stack([squared_mmd(real["rows"][i], fake["rows"][j]) for i, j in pairs])
    return float(values.mean()), float(values.std(correction=0))


def kernel_numbers(real: Result, fake: Result) -> dict[str, float]:
    """Return the values of the metric: the mean and, for more than one subset, the standard deviation."""
    mean, std = kernel_distance(real, fake)
    return {"": mean} if len(real["index"]) == 1 else {"": mean, "_std": std}


def subsets(side: Side) -> SubsetRows:
    """Return the recipe for one side: random subsets, or a single subset if every subset would be the whole set.

    Raises UserError if a side has fewer than 2 images.
    """
    size = min(side.num_real, side.num_fake, SUBSET_SIZE)
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, got {size}")
    is_whole = side.num_fake == size == side.num_real  # all subsets would be equal
    return SubsetRows(1 if is_whole else SUBSETS, size, f"kid-{side.of}", side.seed)
