"""Confidence intervals: tabulated quantiles, SciPy, and the share of intervals of drawn samples with the truth."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from dnnlib.config import UserError
from reporting.intervals import CONFIDENCE, Interval, kendall_interval, welch_interval
from reporting.laboratory import SCREENING_CONFIDENCE

DRAWS = 1500
APPROXIMATION = 0.015  # error of the coverage of the approximate intervals at these sample sizes


def assert_covers(truth: float, draw: Callable[[], Interval]) -> None:
    """Assert that 95 % of the intervals contain the truth, within three binomial standard errors."""
    intervals = [draw() for _ in range(DRAWS)]
    share = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert share == pytest.approx(CONFIDENCE, abs=APPROXIMATION + 3 * math.sqrt(0.95 * 0.05 / DRAWS))


@pytest.mark.parametrize(
    ("y", "quantile", "deviation"),
    [
        ([11.0, 12.0, 13.0], 2.776445, math.sqrt(2 / 3)),  # equal variances: 4 degrees of freedom
        ([12.0, 12.0, 12.0], 4.302653, math.sqrt(1 / 3)),  # no variance on this side: 2 degrees of freedom
    ],
)
def test_intervals_agree_with_tabulated_quantiles(y: list[float], quantile: float, deviation: float) -> None:
    interval = welch_interval([1.0, 2.0, 3.0], y)
    assert interval.estimate == pytest.approx(-10)
    assert interval.low == pytest.approx(-10 - quantile * deviation, rel=1e-6)
    assert interval.high == pytest.approx(-10 + quantile * deviation, rel=1e-6)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("n", "m", "scale"), [(3, 3, 1.0), (3, 5, 4.0), (5, 2, 0.1)])
def test_welch_intervals_agree_with_scipy(n: int, m: int, scale: float, confidence: float) -> None:
    rng = np.random.RandomState(n + m)
    x, y = rng.normal(30, 2, n).tolist(), rng.normal(31, 2 * scale, m).tolist()
    expected = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval(confidence)
    interval = welch_interval(x, y, confidence)
    assert interval.estimate == pytest.approx(np.mean(x) - np.mean(y))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("n", "m", "scale"), [(3, 3, 1.0), (3, 3, 4.0), (5, 5, 1.0), (5, 5, 4.0), (3, 5, 3.0)])
def test_welch_intervals_cover_the_difference_of_means(n: int, m: int, scale: float) -> None:
    rng = np.random.RandomState(0)
    assert_covers(2.0, lambda: welch_interval(rng.normal(5, 1, n).tolist(), rng.normal(3, scale, m).tolist()))


def test_intervals_of_equal_constant_samples_are_a_point() -> None:
    interval = welch_interval([0.1, 0.1, 0.1], [0.1, 0.1])
    assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)
    assert not interval.excludes_zero
    assert welch_interval([2.0, 2.0], [0.5, 0.5]) == Interval(estimate=1.5, low=1.5, high=1.5)


def test_nearly_equal_samples_cause_no_warning() -> None:
    """pytest turns warnings into errors."""
    interval = welch_interval([0.3, 0.1 + 0.2, 0.3], [0.5, 0.5, 0.5])
    assert (interval.low, interval.high) == pytest.approx((-0.2, -0.2))


@pytest.mark.parametrize(("x", "y"), [([], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0])])
def test_an_interval_needs_two_values_on_each_side(x: list[float], y: list[float]) -> None:
    with pytest.raises(UserError, match=f"at least 2 values on each side, got {len(x)} and {len(y)}"):
        welch_interval(x, y)


@pytest.mark.parametrize(("low", "high", "excludes"), [(-1, 1, False), (0.1, 1, True), (-2, -1, True), (0, 1, False)])
def test_an_interval_knows_whether_it_excludes_zero(low: float, high: float, excludes: bool) -> None:
    assert Interval(estimate=(low + high) / 2, low=low, high=high).excludes_zero == excludes


@pytest.mark.parametrize("seed", range(5))
def test_tau_agrees_with_scipy(seed: int) -> None:
    rng = np.random.RandomState(seed)
    x, y = rng.normal(size=(2, 10 + 3 * seed))
    interval = kendall_interval(x.tolist(), (x + y).tolist())
    assert interval.estimate == pytest.approx(scipy.stats.kendalltau(x, x + y).statistic)
    assert -1 <= interval.low <= interval.estimate <= interval.high <= 1


def test_ties_are_neither_concordant_nor_discordant() -> None:
    ascending = [*range(10)]
    assert kendall_interval([0, 0, *range(1, 9)], ascending).estimate == pytest.approx(
        44 / 45
    )  # of 45 pairs, one is tied
    assert kendall_interval([1] * 10, ascending).estimate == 0


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_intervals_of_tau_cover_the_tau_of_normal_pairs(rho: float) -> None:
    """For bivariate normal pairs with correlation rho, tau is 2 / pi asin(rho) (Greiner 1909)."""
    rng = np.random.RandomState(0)

    def draw() -> Interval:
        x, noise = rng.normal(size=(2, 20))
        return kendall_interval(x.tolist(), (rho * x + math.sqrt(1 - rho**2) * noise).tolist())

    assert_covers(2 / math.pi * math.asin(rho), draw)


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_and_opposite_rankings_have_tau_one(sign: int) -> None:
    x = [3.0, 1.0, 2.0, 10.0, -1.0, 5.0, 7.0, 6.0, 0.0, 4.0]
    interval = kendall_interval(x, [sign * value**3 for value in x])
    assert (interval.estimate, interval.low, interval.high) == (sign, sign, sign)


def test_intervals_of_tau_are_clipped() -> None:
    ascending, swapped = [*range(10)], [1, 0, 3, 2, *range(4, 10)]
    nearly = kendall_interval(ascending, swapped)
    assert nearly.estimate == pytest.approx(41 / 45)
    assert nearly.high == 1
    reverse = kendall_interval(ascending, swapped[::-1])
    assert (reverse.low, reverse.high) == pytest.approx((-1, -nearly.low))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (9, 9), (11, 10)])
def test_tau_needs_ten_pairs(n: int, m: int) -> None:
    with pytest.raises(UserError, match=f"at least 10 pairs of values, got {n} and {m} values"):
        kendall_interval([*range(n)], [*range(m)])


def shares_below_zero(rng: np.random.RandomState, improvement: float, seeds: int, confidence: float) -> float:
    """Return the share of draws in which the interval of an improved arm minus the baseline lies below 0."""
    arm, baseline = rng.normal(-improvement, 1, (20_000, seeds)), rng.normal(0, 1, (20_000, seeds))
    a, b = arm.var(axis=1, ddof=1) / seeds, baseline.var(axis=1, ddof=1) / seeds
    freedom = (a + b) ** 2 * (seeds - 1) / (a**2 + b**2)
    high = arm.mean(axis=1) - baseline.mean(axis=1) + scipy.stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(a + b)
    return float((high < 0).mean())


def test_the_documented_power_is_that_of_drawn_numbers() -> None:
    text = (Path(__file__).parent.parent / "docs" / "learning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\d+) % \| (\d+) % \| ([\d.]+) % \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    rng = np.random.RandomState(0)
    for improvement, *documented in rows:
        screened = shares_below_zero(rng, float(improvement), 3, SCREENING_CONFIDENCE)
        confirmed = shares_below_zero(rng, float(improvement), 5, CONFIDENCE)
        drawn = [screened, confirmed, screened * confirmed]
        assert np.allclose([100 * x for x in drawn], [float(x) for x in documented], atol=1.5)
