"""Kernel inception distance: the squared MMD of features with a cubic kernel (Binkowski et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.feature_stats import Result, Side, SubsetRows

SUBSETS = 100
SUBSET_SIZE = 1000
UNSPLIT = 128  # sets of at most this size are not split
MAX_SQUARE = 4.0  # maximum of |x|^2 / F for float32; about 0.4 for Inception


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate for x, y (m, F) of equal size, in float64:

        sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 mean_ij k(x_i, y_j),     k(a, b) = (a b / F + 1)^3

    Kernels have the dtype of x and are summed in float64. The rounding errors of float32 nearly cancel in sums over m^2
    pairs: with non-negative features of mean 0.4 and m = 1000 the result is off by up to 3e-9. The errors grow with the
    cube of |x|^2 / F. If it exceeds MAX_SQUARE, kernels are computed in float64.
    """
    if max(features.square().mean(dim=1).max() for features in (x, y)) > MAX_SQUARE:
        x, y = x.double(), y.double()
    m = len(x)
    return (_sum_within(x) + _sum_within(y)) / (m * (m - 1)) - 2 * _sum_between(x, y) / m**2


def _sum_within(x: Tensor) -> Tensor:
    """Return sum_{i != j} k(x_i, x_j) in float64. Most pairs are computed only once, as pairs between two halves."""
    if len(x) <= UNSPLIT:
        return _kernel(x, x).fill_diagonal_(0).sum(dtype=torch.float64)
    first, second = x.tensor_split(2)
    return _sum_within(first) + _sum_within(second) + 2 * _sum_between(first, second)


def _sum_between(x: Tensor, y: Tensor) -> Tensor:
    """Return sum_ij k(x_i, y_j) in float64."""
    return _kernel(x, y).sum(dtype=torch.float64)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return k(x_i, y_j), (len(x), len(y))."""
    with full_float32():
        return torch.addmm(x.new_ones([]), x, y.T, alpha=1 / x.shape[1]).pow_(3)


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
