"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020): manifolds of balls.

Around each feature of a set lies a ball whose radius is the distance to its k-th nearest neighbour in that set.
Distances are computed block by block: no more than BLOCK x N exist at a time. The processes share out the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.feature_stats import Rows, Want, statistics_of
from metrics.frechet import MAX_REALS, NUM_IMAGES
from metrics.registry import Measurement, register_metric
from metrics.sampling import MetricContext, gather_rows, own_shard

PR_NEIGHBOURS = 3
DC_NEIGHBOURS = 5
BLOCK = 4096


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances (len(x), len(y)) in float32, rounded to the features' own type.

    |x|^2 + |y|^2 - 2 x y around the mean of y, because what features have in common would cost digits.
    """
    centre = y.mean(dim=0, dtype=torch.float32)
    x32 = x.float() - centre
    squares = x32.square().sum(dim=1, keepdim=True)
    distances = x.new_empty(len(x), len(y))
    for start in range(0, len(y), BLOCK):  # so that y is never held in float32 as a whole
        y32 = y[start : start + BLOCK].float() - centre
        with full_float32():
            part = torch.addmm(y32.square().sum(dim=1), x32, y32.T, alpha=-2) + squares
        distances[:, start : start + BLOCK] = part.clamp(min=0).sqrt()
    return distances


def radii(x: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (N,). Collective; every process gets all."""
    if len(x) <= neighbours:
        raise UserError(f"{len(x)} images have no {neighbours} neighbours each: use more images")
    share = own_shard(len(x))
    parts = [x.new_empty(0)]
    for start in range(share.start, share.stop, BLOCK):
        rows = x[start : min(start + BLOCK, share.stop)]
        parts.append(
            _distances(rows, x).float().kthvalue(neighbours + 1, dim=1).values.to(x.dtype)
        )  # the first is itself
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def inside(x: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return in how many balls each row of x lies, (N,) int64. Collective."""
    share = own_shard(len(x))
    parts = [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for start in range(share.start, share.stop, BLOCK):
        rows = x[start : min(start + BLOCK, share.stop)]
        parts.append((_distances(rows, centres) <= radius).sum(dim=1))
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def nearest(x: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each row of x to the nearest of the others, (N,). Collective."""
    share = own_shard(len(x))
    parts = [x.new_empty(0)]
    for start in range(share.start, share.stop, BLOCK):
        parts.append(_distances(x[start : min(start + BLOCK, share.stop)], others).amin(dim=1))
    return gather_rows(torch.cat(parts)[:, None])[:, 0]


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = PR_NEIGHBOURS) -> tuple[float, float]:
    """Return the share of fakes within a ball of the reals, and of reals within a ball of the fakes."""
    precision = (inside(fake, real, radii(real, neighbours)) > 0).double().mean()
    recall = (inside(real, fake, radii(fake, neighbours)) > 0).double().mean()
    return float(precision), float(recall)


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = DC_NEIGHBOURS) -> tuple[float, float]:
    """Return the mean number of the reals' balls around a fake / k, and the share of these balls that hold a fake."""
    radius = radii(real, neighbours)
    density = inside(fake, real, radius).double().mean() / neighbours
    coverage = (nearest(real, fake) <= radius).double().mean()
    return float(density), float(coverage)


def _wants(context: MetricContext, num_real: int, num_fake: int, *, half: bool) -> list[Want]:
    return [
        Want(of="real", role="vgg16", count=num_real, recipe=Rows(half), flips=context.has_flips),
        Want(of="fake", role="vgg16", count=num_fake, recipe=Rows(half)),
    ]


def _plan_pr_full(context: MetricContext, count: int | None) -> list[Want]:
    return _wants(context, MAX_REALS, count or NUM_IMAGES, half=True)


def _plan_pr(context: MetricContext, count: int | None) -> list[Want]:
    return _wants(context, count or NUM_IMAGES, count or NUM_IMAGES, half=True)


def _plan_dc_full(context: MetricContext, count: int | None) -> list[Want]:
    return _wants(context, MAX_REALS, count or NUM_IMAGES, half=False)


def _plan_dc(context: MetricContext, count: int | None) -> list[Want]:
    return _wants(context, count or NUM_IMAGES, count or NUM_IMAGES, half=False)


def _measure(context: MetricContext, name: str, wants: list[Want], *, kind: str) -> Measurement:
    real, fake = (statistics_of(context)[want]["rows"] for want in wants)
    longest = max(float(x.float().norm(dim=1).max()) for x in (real, fake))
    if real.dtype == torch.float16 and 2 * longest > torch.finfo(torch.float16).max:
        raise UserError("the detector's features are too large for distances in float16: scale them down")
    if kind == "precision_recall":
        values = dict(zip(("precision", "recall"), precision_recall(real, fake), strict=True))
    else:
        values = dict(zip(("density", "coverage"), density_coverage(real, fake), strict=True))
    named = {f"{name}_{key}": value for key, value in values.items()}
    return Measurement(values=named, num_real=len(real), num_fake=len(fake))


_SHARED: dict[str, Any] = {"roles": ("vgg16",), "library_suffix": "_tvgg16", "higher_is_better": True}
_NOTE = (
    "recorded as {}_tvgg16 with torchvision's VGG16, whose numbers do not compare with the StyleGAN family's vgg16.pt"
)


@register_metric(
    "pr<N>3_full",
    help=f"precision and recall of N fakes against all reals; {_NOTE.format('pr<N>3_full')}",
    protocol="3 neighbours, features and distances in float16; 50,000 fakes or <N>, all reals up to 200,000",
    paper="Kynkaanniemi et al. 2019",
    plan=_plan_pr_full,
    **_SHARED,
)
def pr_full(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return precision and recall of N fakes against all reals."""
    return _measure(context, name, _plan_pr_full(context, count), kind="precision_recall")


@register_metric(
    "pr<N>3",
    help=f"precision and recall of N fakes against as many reals; {_NOTE.format('pr<N>3')}",
    protocol="3 neighbours, features and distances in float16; 50,000 or <N> fakes and as many reals, at most all",
    paper="Kynkaanniemi et al. 2019",
    plan=_plan_pr,
    counts_flips=True,
    **_SHARED,
)
def pr(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return precision and recall of N fakes against N reals."""
    return _measure(context, name, _plan_pr(context, count), kind="precision_recall")


@register_metric(
    "dc<N>_full",
    help=f"density and coverage of N fakes against all reals; {_NOTE.format('dc<N>_full')}",
    protocol="5 neighbours, distances in float32; 50,000 fakes or <N>, all reals up to 200,000",
    paper="Naeem et al. 2020",
    plan=_plan_dc_full,
    **_SHARED,
)
def dc_full(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return density and coverage of N fakes against all reals."""
    return _measure(context, name, _plan_dc_full(context, count), kind="density_coverage")


@register_metric(
    "dc<N>",
    help=f"density and coverage of N fakes against as many reals; {_NOTE.format('dc<N>')}",
    protocol="5 neighbours, distances in float32; 50,000 or <N> fakes and as many reals, at most all",
    paper="Naeem et al. 2020",
    plan=_plan_dc,
    counts_flips=True,
    **_SHARED,
)
def dc(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return density and coverage of N fakes against N reals."""
    return _measure(context, name, _plan_dc(context, count), kind="density_coverage")
