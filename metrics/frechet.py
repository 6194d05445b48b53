"""Frechet distance of features: FID (Heusel et al. 2017), over DINOv2 (Stein et al. 2023), and per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import Role
from metrics.feature_stats import Moments, Result, Rows, Want, statistics_of
from metrics.registry import Measurement, register_metric
from metrics.sampling import MetricContext, choose_fakes, choose_reals, own_shard, random_labels
from torch_utils.distributed import all_reduce

NUM_IMAGES = 50_000
MAX_REALS = 200_000  # of the metrics that hold every feature


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


def measure(context: MetricContext, name: str, wants: list[Want], *, unbiased: bool) -> Measurement:
    """Return the distance between the two sets of a list of wants: reals, fakes."""
    real, fake = (statistics_of(context)[want] for want in wants)
    value = distance_of(real, fake, unbiased=unbiased)
    return Measurement(
        values={name: value},
        num_real=int(real["count"]),
        num_fake=int(fake["count"]),
        warnings=few_images(int(min(real["count"], fake["count"])), len(real["mean"])),
    )


def wants_of(role: Role, num_real: int | None, num_fake: int, *, flips: bool = False) -> list[Want]:
    """Return what a Frechet distance needs."""
    return [
        Want(of="real", role=role, count=num_real, recipe=Moments(), flips=flips),
        Want(of="fake", role=role, count=num_fake, recipe=Moments()),
    ]


def _plan_full(context: MetricContext, count: int | None) -> list[Want]:
    return wants_of("inception", None, count or NUM_IMAGES)


def _plan_equal(context: MetricContext, count: int | None) -> list[Want]:
    return wants_of("inception", count or NUM_IMAGES, count or NUM_IMAGES, flips=context.has_flips)


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
    counts_flips=True,
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


# Per class.


def _plan_class(context: MetricContext, count: int | None) -> list[Want]:
    classes, reals = _classes_of(context), min(len(context.reals), MAX_REALS)
    _present(*_labels(context, reals, count or NUM_IMAGES), classes)
    return [
        Want(of="real", role="inception", count=reals, recipe=Rows()),
        Want(of="fake", role="inception", count=count or NUM_IMAGES, recipe=Rows()),
    ]


def _classes_of(context: MetricContext) -> int:
    """Return the number of classes. Raises UserError for data or networks without."""
    labels = context.images.labels
    if labels.ndim != 1 or (context.G is not None and context.G.c_dim == 0):
        raise UserError("needs classes: a data set with class numbers, and a network that was trained with --cond")
    classes = context.images.c_dim
    if context.fakes is not None and (context.fakes.labels.ndim != 1 or context.fakes.c_dim > classes):
        raise UserError(
            f"needs the classes of the generated images: give them a dataset.json with class numbers below {classes}"
        )
    return classes


def _labels(context: MetricContext, num_real: int, num_fake: int) -> tuple[Tensor, Tensor]:
    """Return the classes of the reals and of the fakes, which are known before any is made."""
    real = context.reals.labels[choose_reals(context, num_real)].to(context.device)
    if context.fakes is None:
        return real, random_labels(context, range(num_fake)).argmax(dim=1)
    return real, context.fakes.labels[choose_fakes(context, context.fakes, num_fake)].to(context.device)


def _present(real_class: Tensor, fake_class: Tensor, classes: int) -> list[int]:
    """Return the classes that have images. Raises UserError for one with a single image, or on one side only."""
    counts = [labels.bincount(minlength=classes).tolist() for labels in (real_class, fake_class)]
    present = []
    for number, found in enumerate(zip(*counts, strict=True)):
        if any(found) and min(found) < 2:
            raise UserError(f"class {number} has {found[0]} reals and {found[1]} fakes: ask for more images")
        if any(found):
            present.append(number)
    return present


def class_distances(real: Tensor, real_class: Tensor, fake: Tensor, fake_class: Tensor, classes: int) -> Tensor:
    """Return the distance of each class's rows (N, F), covariances over N: (classes,) float64, nan where it has none.

    The processes share out the classes. Raises UserError for a class with a single image, or images on one side only.
    """
    present = _present(real_class, fake_class, classes)
    distances = torch.zeros(classes, dtype=torch.float64, device=real.device)
    for number in (present[position] for position in own_shard(len(present))):
        sets = [rows[labels == number].double() for rows, labels in ((real, real_class), (fake, fake_class))]
        means = [x.mean(dim=0) for x in sets]
        covs = [(x - mean).T @ (x - mean) / len(x) for x, mean in zip(sets, means, strict=True)]
        distances[number] = frechet_distance(means[0], covs[0], means[1], covs[1])
    absent = torch.ones_like(distances, dtype=torch.bool)
    absent[present] = False
    return all_reduce(distances).masked_fill(absent, torch.nan)


@register_metric(
    "fid<N>_class",
    help="mean over classes of the FID of a class's fakes to its reals, the worst class, and each; conditional models",
    protocol="covariance over N; 50,000 fakes or <N> over all classes, all reals up to 200,000",
    paper="none: FID of Heusel et al. 2017 within each class",
    roles=("inception",),
    plan=_plan_class,
)
def fid_class(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the mean, the largest, and every class's distance."""
    wants = _plan_class(context, count)
    real, fake = (statistics_of(context)[want]["rows"] for want in wants)
    real_class, fake_class = _labels(context, len(real), len(fake))
    distances = class_distances(real, real_class, fake, fake_class, _classes_of(context))
    present = distances.isfinite().nonzero()[:, 0].tolist()  # a data set may name classes that it has no images of
    values = {name: float(distances[present].mean()), f"{name}_worst": float(distances[present].max())}
    values |= {f"{name}_{number}": float(distances[number]) for number in present}
    smallest = int(min(labels.bincount()[present].min() for labels in (real_class, fake_class)))
    return Measurement(
        values=values,
        num_real=len(real),
        num_fake=len(fake),
        warnings=few_images(smallest, real.shape[1], "in the smallest class "),
    )
