"""Inception score: confidence of a classifier per image and diversity of its classes (Salimans et al. 2016)."""

from __future__ import annotations

import torch

from dnnlib.config import UserError
from metrics.feature_stats import ClassSums, Result, Side

SPLITS = 10


def inception_score(sums: Result) -> tuple[float, float]:
    """Return the mean and standard deviation over the splits of exp E_x KL(p(y|x) || p(y)), from ClassSums.

    E_x KL = mean_x sum_y p log p - sum_y q log q, with q the mean of p over the split.
    """
    q = sums["p"] / sums["count"][:, None]
    scores = (sums["plogp"] / sums["count"] - torch.special.xlogy(q, q).sum(dim=1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def score_numbers(sums: Result) -> dict[str, float]:
    """Return the values of the metric: mean and standard deviation over the splits."""
    mean, std = inception_score(sums)
    return {"_mean": mean, "_std": std}


def class_sums(side: Side) -> ClassSums:
    """Return the recipe for 10 splits of the fakes. Raises UserError for fewer images than splits."""
    if side.num_fake < SPLITS:
        raise UserError(f"{SPLITS} splits need at least {SPLITS} images")
    return ClassSums(SPLITS)
