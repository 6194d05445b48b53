"""Frechet distance within each class of a conditional model."""

from __future__ import annotations

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.feature_stats import Rows, StatRequest, statistics_of
from metrics.frechet import few_images, frechet_distance
from metrics.registry import Measurement, register_metric
from metrics.sampling import (
    MAX_REALS,
    NUM_IMAGES,
    MetricContext,
    choose_fakes,
    choose_reals,
    own_shard,
    random_labels,
)
from torch_utils.distributed import all_reduce


def _plan_class(context: MetricContext, count: int | None) -> list[StatRequest]:
    classes, reals = _classes_of(context), min(len(context.reals), MAX_REALS)
    _present_classes(*_labels(context, reals, count or NUM_IMAGES), classes)
    return [
        StatRequest(of="real", role="inception", count=reals, recipe=Rows()),
        StatRequest(of="fake", role="inception", count=count or NUM_IMAGES, recipe=Rows()),
    ]


def _classes_of(context: MetricContext) -> int:
    """Return the number of classes. Raises UserError for unlabelled data or an unconditional network."""
    labels = context.images.labels
    if labels.ndim != 1 or (context.G is not None and context.G.c_dim == 0):
        raise UserError("needs classes: a dataset with class numbers, and a network that was trained with --cond")
    classes = context.images.c_dim
    if context.fakes is not None and (context.fakes.labels.ndim != 1 or context.fakes.c_dim > classes):
        raise UserError(
            f"needs the classes of the generated images: add a dataset.json with class numbers below {classes}"
        )
    return classes


def _labels(context: MetricContext, num_real: int, num_fake: int) -> tuple[Tensor, Tensor]:
    """Return the classes of the reals and of the fakes. No image is read or generated."""
    real = context.reals.labels[choose_reals(context, num_real)].to(context.device)
    if context.fakes is None:
        return real, random_labels(context, range(num_fake)).argmax(dim=1)
    return real, context.fakes.labels[choose_fakes(context, context.fakes, num_fake)].to(context.device)


def _present_classes(real_class: Tensor, fake_class: Tensor, classes: int) -> list[int]:
    """Return the classes that have images. Raises UserError for a class with fewer than 2 images on either side."""
    counts = [labels.bincount(minlength=classes).tolist() for labels in (real_class, fake_class)]
    present = []
    for number, found in enumerate(zip(*counts, strict=True)):
        if any(found) and min(found) < 2:
            raise UserError(f"class {number} has {found[0]} reals and {found[1]} fakes: request more images")
        if any(found):
            present.append(number)
    return present


def class_distances(real: Tensor, real_class: Tensor, fake: Tensor, fake_class: Tensor, classes: int) -> Tensor:
    """Return the Frechet distance within each class: (classes,) float64, nan for a class without images.

    Features are (N, F) and covariances are divided by N. The classes are sharded over the processes. Raises UserError
    for a class with fewer than 2 images on either side.
    """
    present = _present_classes(real_class, fake_class, classes)
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
    help="FID within each class of a conditional model: the mean, the worst class, and every class",
    values=("", "_worst", "_<class>"),
    protocol="covariance over N; 50,000 fakes or <N> over all classes, all reals up to 200,000",
    paper="FID of Heusel et al. 2017, per class",
    roles=("inception",),
    plan=_plan_class,
)
def fid_class(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the mean distance, the largest distance, and the distance of every class."""
    requests = _plan_class(context, count)
    real, fake = (statistics_of(context)[request]["rows"] for request in requests)
    real_class, fake_class = _labels(context, len(real), len(fake))
    distances = class_distances(real, real_class, fake, fake_class, _classes_of(context))
    present = distances.isfinite().nonzero()[:, 0].tolist()  # a dataset may declare classes without images
    values = {name: float(distances[present].mean()), f"{name}_worst": float(distances[present].max())}
    values |= {f"{name}_{number}": float(distances[number]) for number in present}
    smallest = int(min(labels.bincount()[present].min() for labels in (real_class, fake_class)))
    return Measurement(
        values=values,
        num_real=len(real),
        num_fake=len(fake),
        warnings=few_images(smallest, real.shape[1], "in the smallest class "),
    )
