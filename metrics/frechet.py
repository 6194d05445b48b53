"""Frechet distance of features, of Inception's (FID, Heusel et al. 2017) or DINOv2's (Stein et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.feature_stats import Result


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64.

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real by construction, and exact to
    rounding where a covariance is singular, unlike a root of the product itself.
    """
    cross = torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()
    distance = (mean1 - mean2).double().square().sum() + cov1.double().trace() + cov2.double().trace() - 2 * cross
    return float(distance)


def _root(cov: Tensor) -> Tensor:
    """Return R with R R^T = cov, from the eigenvalues; those that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(cov.double())
    return vectors * values.clamp(min=0).sqrt()


def distance_of(real: Result, fake: Result, *, unbiased: bool = False) -> float:
    """Return the distance of two sets from their Moments; `unbiased` divides covariances by N - 1 instead of N."""
    covariances = []
    for moments in (real, fake):
        count = float(moments["count"])
        covariances.append(moments["cov"] * (count / max(count - 1, 1) if unbiased else 1))
    return frechet_distance(real["mean"], covariances[0], fake["mean"], covariances[1])


def few_images(count: int, dimensions: int, where: str = "") -> tuple[str, ...]:
    """Return a warning where there are fewer images than features have dimensions."""
    if count > dimensions:
        return ()
    problem = "the covariance is singular and the distance too high"
    return (f"{count} images {where}for {dimensions} feature dimensions: {problem}",)


def frechet_numbers(real: Result, fake: Result, *, unbiased: bool = False) -> dict[str, float]:
    """Return the distance as a metric's only number."""
    return {"": distance_of(real, fake, unbiased=unbiased)}


def warn_of_few(real: Result, fake: Result) -> tuple[str, ...]:
    """Return the warning of `few_images` for two Moments."""
    return few_images(int(min(real["count"], fake["count"])), len(real["mean"]))
