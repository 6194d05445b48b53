"""Frechet distance between features of Inception (FID, Heusel et al. 2017) or DINOv2 (Stein et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.feature_stats import Result


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), computed in float64.

    tr((S1 S2)^(1/2)) is the sum of the singular values of S1^(1/2) S2^(1/2). Unlike a matrix square root of the
    product, this sum is real by construction and accurate to rounding even for singular covariances.
    """
    cross = torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()
    distance = (mean1 - mean2).double().square().sum() + cov1.double().trace() + cov2.double().trace() - 2 * cross
    return float(distance)


def _root(cov: Tensor) -> Tensor:
    """Return a square root R of cov (R R^T = cov); eigenvalues below 0, which are rounding errors, are clamped to 0."""
    values, vectors = torch.linalg.eigh(cov.double())
    return vectors * values.clamp(min=0).sqrt()


def distance_of(real: Result, fake: Result, *, unbiased: bool = False) -> float:
    """Return the distance between two Moments; `unbiased` divides covariances by N - 1 instead of N."""
    covariances = []
    for moments in (real, fake):
        count = float(moments["count"])
        covariances.append(moments["cov"] * (count / max(count - 1, 1) if unbiased else 1))
    return frechet_distance(real["mean"], covariances[0], fake["mean"], covariances[1])


def few_images(count: int, dimensions: int, where: str = "") -> tuple[str, ...]:
    """Return a warning if there are no more images than feature dimensions."""
    if count > dimensions:
        return ()
    problem = "the covariance is singular and the distance too high"
    return (f"{count} images {where}for {dimensions} feature dimensions: {problem}",)


def frechet_numbers(real: Result, fake: Result, *, unbiased: bool = False) -> dict[str, float]:
    """Return the distance as the only value of the metric."""
    return {"": distance_of(real, fake, unbiased=unbiased)}


def warn_few_images(real: Result, fake: Result) -> tuple[str, ...]:
    """Return the warning of `few_images` for two Moments."""
    return few_images(int(min(real["count"], fake["count"])), len(real["mean"]))
