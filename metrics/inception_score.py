"""Inception score: how sure a classifier is of each image, and how evenly the classes occur (Salimans et al. 2016)."""

from __future__ import annotations

import torch

from dnnlib.config import UserError
from metrics.feature_stats import ClassSums, Result, Want, statistics_of
from metrics.frechet import NUM_IMAGES
from metrics.registry import Measurement, register_metric
from metrics.sampling import MetricContext

SPLITS = 10


def inception_score(sums: Result) -> tuple[float, float]:
    """Return mean and standard deviation over the splits of exp E_x KL(p(y|x) || p(y)), from ClassSums.

    E_x KL = mean_x sum_y p log p - sum_y q log q, with q the mean of p over the split.
    """
    q = sums["p"] / sums["count"][:, None]
    scores = (sums["plogp"] / sums["count"] - torch.special.xlogy(q, q).sum(dim=1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def _plan(context: MetricContext, count: int | None) -> list[Want]:
    return [Want(of="fake", role="inception", count=count or NUM_IMAGES, recipe=ClassSums(SPLITS))]


@register_metric(
    "is<N>",
    help="inception score of N fakes; no reals take part",
    protocol="class logits (of Inception: 1008, without bias), 10 splits; 50,000 fakes or <N>",
    paper="Salimans et al. 2016",
    roles=("inception",),
    plan=_plan,
    higher_is_better=True,
)
def score(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return mean and standard deviation over 10 splits."""
    [want] = _plan(context, count)
    assert want.count is not None
    if want.count < SPLITS:
        raise UserError(f"{SPLITS} splits need at least {SPLITS} images")
    mean, std = inception_score(statistics_of(context)[want])
    return Measurement(values={f"{name}_mean": mean, f"{name}_std": std}, num_real=0, num_fake=want.count)
