"""Confidence intervals: Welch's interval of a difference of means, and the interval of Kendall's tau."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnnlib.config import UserError

CONFIDENCE = 0.95
MIN_PAIRS = 10


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether 0 lies outside of the interval."""
        return self.low > 0 or self.high < 0


def welch_interval(x: Sequence[float], y: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return mean(x) - mean(y) with the interval of Welch's t-test (Welch 1947), which allows unequal variances:

    mean(x) - mean(y) +- t s,   s^2 = a + b,   a = var(x) / n,   b = var(y) / m,
    with t the quantile of Student's distribution with s^4 / (a^2 / (n - 1) + b^2 / (m - 1)) degrees of freedom.

    Raises UserError for fewer than two values on a side.
    """
    from scipy import stats

    if min(len(x), len(y)) < 2:
        raise UserError(f"an interval needs at least 2 values on each side, got {len(x)} and {len(y)}: add seeds")
    own, other = (np.asarray(values) - values[0] for values in (x, y))  # exactly 0 for a constant sample
    difference = float(x[0] - y[0] + own.mean() - other.mean())
    a, b = (float(values.var(ddof=1)) / len(values) for values in (own, other))
    if a + b == 0:
        return Interval(estimate=difference, low=difference, high=difference)
    share = a / (a + b)
    freedom = 1 / (share**2 / (len(x) - 1) + (1 - share) ** 2 / (len(y) - 1))
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(a + b)
    return Interval(estimate=difference, low=difference - reach, high=difference + reach)


def kendall_interval(x: Sequence[float], y: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return Kendall's rank correlation tau of paired values with an asymptotic distribution-free interval.

    With C_i the sum over j of the sign of (x_i - x_j) (y_i - y_j), tau = sum C_i / (n (n - 1)) and
    var = 2 / (n (n - 1)) (2 (n - 2) / (n (n - 1)^2) sum (C_i - mean C)^2 + 1 - tau^2)
    (Samara and Randles 1988). The interval is clipped to -1..1. A tie counts as neither concordant nor discordant.

    The pairs should be independent. Raises UserError for fewer than MIN_PAIRS pairs, whose interval is too short.
    """
    from scipy import stats

    n = len(x)
    if n < MIN_PAIRS or n != len(y):
        raise UserError(f"Kendall's tau needs at least {MIN_PAIRS} pairs of values, got {n} and {len(y)} values")
    signs = np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))
    counts = signs.sum(axis=1)
    tau = counts.sum() / (n * (n - 1))
    spread = 2 * (n - 2) / (n * (n - 1) ** 2) * ((counts - counts.mean()) ** 2).sum()
    deviation = np.sqrt(2 / (n * (n - 1)) * (spread + 1 - tau**2))
    reach = stats.norm.ppf((1 + confidence) / 2) * deviation
    return Interval(estimate=float(tau), low=float(max(tau - reach, -1)), high=float(min(tau + reach, 1)))
