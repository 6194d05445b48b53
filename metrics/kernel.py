"""Kernel inception distance: the squared MMD of features with a cubic kernel (Binkowski et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.feature_stats import Result, SubsetRows, Want, statistics_of
from metrics.frechet import NUM_IMAGES
from metrics.registry import Measurement, register_metric
from metrics.sampling import MetricContext

SUBSETS = 100
SUBSET_SIZE = 1000
CLEAN = "100 subsets of at most 1,000 (Parmar et al. 2022)"


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate for equally large sets x, y (m, F), in float64:

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 mean_ij k(x_i, y_j),     k(a, b) = (a b / F + 1)^3
    """
    m, F = x.shape
    x, y = x.double(), y.double()
    kxx, kyy, kxy = ((a @ b.T / F + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()
    return within / (m * (m - 1)) - 2 * kxy.mean()


def kernel_distance(real: Result, fake: Result) -> tuple[float, float]:
    """Return mean and standard deviation over the subsets of two SubsetRows."""
    pairs = zip(real["index"], fake["index"], strict=True)
    values = torch.stack([squared_mmd(real["rows"][one], fake["rows"][other]) for one, other in pairs])
    return float(values.mean()), float(values.std(correction=0))


def _wants(context: MetricContext, num_real: int | None, num_fake: int) -> list[Want]:
    total = len(context.reals)
    size = min(total if num_real is None else min(num_real, total), num_fake, SUBSET_SIZE)
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, here it has {size}")
    whole = num_fake == size == (total if num_real is None else min(num_real, total))  # then all subsets are the same
    real, fake = (SubsetRows(1 if whole else SUBSETS, size, f"kid-{of}", context.seed) for of in ("real", "fake"))
    return [
        Want(of="real", role="inception", count=num_real, recipe=real, flips=context.has_flips),
        Want(of="fake", role="inception", count=num_fake, recipe=fake),
    ]


def _plan_full(context: MetricContext, count: int | None) -> list[Want]:
    return _wants(context, None, count or NUM_IMAGES)


def _plan_equal(context: MetricContext, count: int | None) -> list[Want]:
    return _wants(context, count or NUM_IMAGES, count or NUM_IMAGES)


def _measure(context: MetricContext, name: str, wants: list[Want]) -> Measurement:
    real, fake = (statistics_of(context)[want] for want in wants)
    mean, std = kernel_distance(real, fake)
    num_real, num_fake = (statistics_of(context).size(want) for want in wants)
    values = {name: mean} if len(real["index"]) == 1 else {name: mean, f"{name}_std": std}
    return Measurement(values=values, num_real=num_real, num_fake=num_fake)


_KID: dict[str, Any] = {"roles": ("inception",), "paper": "Binkowski et al. 2018", "clean": CLEAN}


@register_metric(
    "kid<N>_full",
    help="kernel inception distance of N fakes to all reals, unbiased for small sets; papers often print it x 1000",
    protocol="100 subsets of at most 1,000; 50,000 fakes or <N>, all reals",
    plan=_plan_full,
    **_KID,
)
def kid_full(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance of N fakes to all reals, and its standard deviation over the subsets."""
    return _measure(context, name, _plan_full(context, count))


@register_metric(
    "kid<N>",
    help="kernel inception distance of N fakes to as many reals",
    protocol="100 subsets of at most 1,000; 50,000 or <N> fakes and as many reals, at most all",
    plan=_plan_equal,
    counts_flips=True,
    **_KID,
)
def kid(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance of N fakes to N reals, and its standard deviation over the subsets."""
    return _measure(context, name, _plan_equal(context, count))
