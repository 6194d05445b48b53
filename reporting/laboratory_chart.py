"""Chart of a laboratory: intervals of all differences, and the curves of each arm beside its reference."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reporting.charts import COLOURS, higher_is_better
from reporting.drawing import escape_text, page_style, to_svg
from reporting.laboratory import AXES, BASES, PLACES, SEEDS, STAGES, Axis, Basis, Comparison, Laboratory, Stage, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARM, REFERENCE = COLOURS[0], COLOURS[-1]
STAGE_COLOURS: dict[Stage, str] = {"screen": COLOURS[4], "confirm": COLOURS[0]}
KEYS: dict[Basis, str] = {"kimg": "equal kimg", "minutes": "equal minutes", "end": "at their ends"}
ROW = 0.44  # height of a row of up to LINES intervals, in inches
LINES = 4  # two stages along two axes
ARMS_PER_ROW = 3  # of the curves; each arm has a panel for each axis


def draw_laboratory(laboratory: Laboratory, metric: str) -> bytes:
    """Draw the chart of a metric as PNG."""
    buffer = io.BytesIO()
    _figure(laboratory, metric).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_laboratory_svg(laboratory: Laboratory, metric: str) -> str:
    """Draw the chart of a metric as SVG in the colours of the page."""
    with page_style(metric):
        return to_svg(_figure(laboratory, metric))


def _figure(laboratory: Laboratory, metric: str) -> Figure:
    """Return the chart of a metric."""
    os.environ["MPLBACKEND"] = "agg"  # no window, regardless of the user's backend
    from matplotlib.figure import Figure

    arms = [name for name in laboratory.question.arms if laboratory.question.arms[name].against]
    comparisons = list(laboratory.comparisons(metric))
    pairs = list(dict.fromkeys((item.arm, item.against) for item in comparisons))
    columns = min(len(arms), ARMS_PER_ROW)
    rows = -(-len(arms) // columns)
    row = ROW * _most_lines(comparisons) / LINES
    heights = [1.3 + row * len(pairs), 2.6 * rows]
    figure = Figure(figsize=(12.5, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(escape_text(laboratory.question.question), x=0.01, ha="left", fontsize=14)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_intervals(upper.subplots(), comparisons, pairs, metric)
    panels = lower.subplots(rows, 2 * columns, sharey=True, squeeze=False)
    panels[0, 0].set_ylim(*_limits(laboratory, metric))
    for axes in panels[:, 0]:
        axes.set_ylabel(metric)
    for arm, pair in zip(arms, panels.reshape(-1, 2), strict=False):
        _draw_curves(pair, laboratory, arm, metric)
    for axes in panels.flatten()[2 * len(arms) :]:
        axes.set_visible(False)
    return figure


def _draw_intervals(
    axes: Axes, comparisons: Sequence[Comparison], pairs: Sequence[tuple[str, str]], metric: str
) -> None:
    """Draw the interval of each difference: a row for each pair of arms, a line for each stage and axis."""
    from matplotlib import rcParams

    limit = _reach(comparisons)
    spacing = 0.8 / _most_lines(comparisons)
    for row, pair in enumerate(pairs):
        own = [item for item in comparisons if (item.arm, item.against) == pair]
        for i, item in enumerate(own):
            _draw_interval(axes, item, spacing * ((len(own) - 1) / 2 - i) - row, limit)
    for y, text in _verdicts(comparisons, pairs):
        axes.text(1.04 * limit, y, text, va="center", fontsize=9)
    axes.axvline(0, color=rcParams["axes.edgecolor"], linewidth=0.8)
    labels = [escape_text(f"{arm} minus {against}") for arm, against in pairs]
    axes.set(xlim=(-limit, limit), ylim=(0.6 - max(len(pairs), 1), 0.6))
    axes.set_yticks([-i for i in range(len(pairs))], labels)
    direction = {True: " (higher is better)", False: " (lower is better)", None: ""}[higher_is_better(metric)]
    axes.set_xlabel(escape_text(f"difference of mean {metric} with Welch's 95 % interval{direction}"))
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _add_key(axes, comparisons)


def _verdicts(comparisons: Sequence[Comparison], pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[float, str]]:
    """Yield the verdict of each row, with its position: of the last stage, at the ends if the lengths differ.

    The heading says at which positions; a row that differs from it says so itself.
    """
    last = {(item.arm, item.against): item for item in comparisons if item.axis != "minutes"}
    heading: Basis = "end" if {item.axis for item in last.values()} == {"end"} else "kimg"
    yield 0.75, f"{PLACES[heading]}:"
    for row, pair in enumerate(pairs):
        if pair in last:
            item = last[pair]
            yield -row, item.verdict if item.axis == heading else f"{PLACES[item.axis]}: {item.verdict}"


def _most_lines(comparisons: Sequence[Comparison]) -> int:
    """Return the largest number of intervals in a row, or LINES if it is smaller."""
    return max([LINES, *Counter((item.arm, item.against) for item in comparisons).values()])


def _marker(stage: Stage, axis: Basis) -> dict[str, Any]:
    """Return the marker of an estimate: filled at equal kimg, hollow at equal minutes, a diamond at the ends."""
    face = "white" if axis == "minutes" else STAGE_COLOURS[stage]
    return {"marker": "D" if axis == "end" else "o", "markerfacecolor": face}


def _draw_interval(axes: Axes, item: Comparison, y: float, limit: float) -> None:
    """Draw an interval; an arrow marks an end beyond the axis."""
    colour, low, high = STAGE_COLOURS[item.stage], item.interval.low, item.interval.high
    axes.plot([low, high], [y, y], color=colour, linewidth=1.6)
    axes.plot(item.interval.estimate, y, markersize=5, color=colour, **_marker(item.stage, item.axis))
    for is_beyond, end, marker in ((low < -limit, -limit, "<"), (high > limit, limit, ">")):
        if is_beyond:
            axes.plot(end, y, marker=marker, color=colour, markersize=6, clip_on=False)


def _add_key(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """Explain colours and markers above the intervals."""
    from matplotlib.lines import Line2D

    shown = {(item.stage, item.axis) for item in comparisons}
    handles = [
        Line2D([], [], color=STAGE_COLOURS[stage], label=f"{SEEDS[stage]}, {KEYS[axis]}", **_marker(stage, axis))
        for stage in STAGES
        for axis in BASES
        if (stage, axis) in shown
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def _reach(comparisons: Sequence[Comparison]) -> float:
    """Return the end of the axis of differences: all estimates fit, and the widest intervals are cut."""
    ends = [abs(end) for item in comparisons for end in (item.interval.low, item.interval.high)]
    largest = max([abs(item.interval.estimate) for item in comparisons], default=1.0)
    return max(1.1 * float(np.quantile(ends or [1.0], 0.8)), 1.2 * largest) or 1.0


def _limits(laboratory: Laboratory, metric: str) -> tuple[float, float]:
    """Return the limits of the value axis, beyond which a run that diverged may leave it."""
    runs = [
        run
        for stage in STAGES
        for arm in laboratory.question.arms
        for run in laboratory.values(arm, metric, stage).values()
    ]
    values = np.array([value for run in runs for value in run.values] or [0.0, 1.0])
    low, high = np.quantile(values, [0.02, 0.98])
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    return max(low - margin, values.min() - margin / 3), min(high + margin, values.max() + margin / 3)


def _draw_curves(pair: Sequence[Axes], laboratory: Laboratory, arm: str, metric: str) -> None:
    """Draw every run of an arm and of its reference as a thin line, and their means with one standard deviation.

    The mean is that of the fresh seeds, if there are any: an arm is chosen by its first seeds, which flatter it.
    """
    against = laboratory.question.arms[arm].against or arm
    stages = [stage for stage in STAGES if laboratory.values(arm, metric, stage)]
    for axes, axis in zip(pair, AXES, strict=True):
        for name, colour in ((against, REFERENCE), (arm, ARM)):
            for stage in stages:
                for run in laboratory.values(name, metric, stage).values():
                    axes.plot(getattr(run, axis), run.values, color=colour, linewidth=0.6, alpha=0.5)
            runs = laboratory.values(name, metric, stages[-1]) if stages else {}
            if len(runs) > 1:
                x, mean, deviation = _mean_curve(laboratory.question.ages(name), runs, axis)
                axes.plot(x, mean, color=colour, linewidth=2, marker=".")
                axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(axis)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    pair[0].set_title(escape_text(arm), fontsize=10, loc="left", color=ARM, fontweight="bold")
    pair[1].set_title(escape_text(against), fontsize=10, loc="left", color=REFERENCE, fontweight="bold")


def _mean_curve(
    ages: Sequence[int], runs: Mapping[int, Values], axis: Axis
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions, mean and standard deviation over runs at the ages that all runs have reached."""
    reached = [age for age in ages if all(run.kimg[0] <= age + 1 and run.kimg[-1] >= age for run in runs.values())]
    values = np.array([[run.at("kimg", age) for age in reached] for run in runs.values()])
    positions = np.array([np.interp(reached, run.kimg, getattr(run, axis)) for run in runs.values()])
    return positions.mean(axis=0), values.mean(axis=0), values.std(axis=0, ddof=1)
