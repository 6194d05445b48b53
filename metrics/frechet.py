"""Frechet distance of features: FID (Heusel et al. 2017), over DINOv2 (Stein et al. 2023), and per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metrics.detectors import Role
from metrics.feature_stats import Moments, Result, Want, statistics_of
from metrics.registry import Measurement, register_metric
from metrics.sampling import MetricContext

NUM_IMAGES = 50_000


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


def singular_warning(real: Result, fake: Result) -> tuple[str, ...]:
    """Return a warning where a set has fewer images than its features have dimensions."""
    smaller, F = int(min(real["count"], fake["count"])), len(real["mean"])
    if smaller > F:
        return ()
    return (f"{smaller} images for {F} feature dimensions: the covariance is singular and the distance far too high",)


def measure(context: MetricContext, name: str, wants: list[Want], *, unbiased: bool) -> Measurement:
    """Return the distance between the two sets of a list of wants: reals, fakes."""
    real, fake = (statistics_of(context)[want] for want in wants)
    value = distance_of(real, fake, unbiased=unbiased)
    return Measurement(
        values={name: value},
        num_real=int(real["count"]),
        num_fake=int(fake["count"]),
        warnings=singular_warning(real, fake),
    )


def wants_of(role: Role, num_real: int | None, num_fake: int) -> list[Want]:
    """Return what a Frechet distance needs."""
    return [
        Want(of="real", role=role, count=num_real, recipe=Moments()),
        Want(of="fake", role=role, count=num_fake, recipe=Moments()),
    ]


def _plan_full(context: MetricContext, count: int | None) -> list[Want]:
    return wants_of("inception", None, count or NUM_IMAGES)


def _plan_equal(context: MetricContext, count: int | None) -> list[Want]:
    return wants_of("inception", count or NUM_IMAGES, count or NUM_IMAGES)


def _plan_dinov2(context: MetricContext, count: int | None) -> list[Want]:
    return wants_of("dinov2", None, count or NUM_IMAGES)


_FID: dict[str, Any] = {
    "roles": ("inception",),
    "paper": "Heusel et al. 2017",
    "clean": "covariance over N-1 (Parmar et al. 2022)",
}


@register_metric(
    "fid<N>_full",
    help="Frechet inception distance of N fakes to all reals, the usual FID",
    protocol="covariance over N; 50,000 fakes or <N>, all reals",
    plan=_plan_full,
    **_FID,
)
def fid_full(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance of N fakes to all reals."""
    return measure(context, name, _plan_full(context, count), unbiased=context.setup.protocol == "clean")


@register_metric(
    "fid<N>",
    help="Frechet inception distance of N fakes to as many reals",
    protocol="covariance over N; 50,000 or <N> fakes and as many reals, at most all",
    plan=_plan_equal,
    **_FID,
)
def fid(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance of N fakes to N reals."""
    return measure(context, name, _plan_equal(context, count), unbiased=context.setup.protocol == "clean")


@register_metric(
    "fd<N>_dinov2",
    help="Frechet distance over DINOv2 features of N fakes to all reals; another scale than FID",
    protocol="covariance over N-1; 50,000 fakes or <N>, all reals",
    paper="Stein et al. 2023",
    roles=("dinov2",),
    plan=_plan_dinov2,
)
def fd_dinov2(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance of N fakes to all reals in the features of DINOv2."""
    return measure(context, name, _plan_dinov2(context, count), unbiased=True)
