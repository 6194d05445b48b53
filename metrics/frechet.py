"""Frechet distance between features of Inception (FID, Heusel et al. 2017) or DINOv2 (Stein et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.feature_stats import Result

MIN_PIVOT = 1e-8  # smallest pivot of a regular covariance, relative to the largest


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), computed in float64."""
    cov1, cov2 = cov1.double(), cov2.double()
    distance = (mean1 - mean2).double().square().sum() + cov1.trace() + cov2.trace()
    return float(distance - 2 * _trace_of_root(cov1, cov2))


def _trace_of_root(cov1: Tensor, cov2: Tensor) -> Tensor:
    """Return tr((S1 S2)^(1/2)). Unlike a matrix square root of the product, both forms are real by construction.

    Regular covariances: the sum of the square roots of the eigenvalues of L^T S2 L, with L L^T = S1. The errors of
    small eigenvalues remain small if the features are ordered by variance.

    Singular covariances: the sum of the singular values of S1^(1/2) S2^(1/2), which is accurate to rounding and takes
    four times as long. The first form would take roots of rounding errors.
    """
    order = (cov1.diagonal() * cov2.diagonal()).argsort(descending=True)
    ordered = [cov[order][:, order] for cov in (cov1, cov2)]
    factors = [torch.linalg.cholesky_ex(cov) for cov in ordered]
    pivots = [factor.L.diagonal().square() for factor in factors]
    if all(factor.info == 0 and x.min() > MIN_PIVOT * x.max() for factor, x in zip(factors, pivots, strict=True)):
        L = factors[0].L
        return torch.linalg.eigvalsh(L.T @ ordered[1] @ L).clamp(min=0).sqrt().sum()
    return torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()


def _root(cov: Tensor) -> Tensor:
    """Return a square root R of cov (R R^T = cov); eigenvalues below 0, which are rounding errors, are clamped to 0."""
    values, vectors = torch.linalg.eigh(cov)
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
