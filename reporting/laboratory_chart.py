"""Chart of a laboratory: intervals of all differences, and the curves of each arm beside its reference."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reporting.charts import COLOURS, higher_is_better
from reporting.drawing import escape_text
from reporting.laboratory import AXES, SEEDS, STAGES, Axis, Comparison, Laboratory, Stage, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARM, REFERENCE = COLOURS[0], COLOURS[-1]
STAGE_COLOURS: dict[Stage, str] = {"screen": COLOURS[4], "confirm": COLOURS[0]}
ROW = 0.42  # height of a row of intervals, in inches
ARMS_PER_ROW = 3  # of the curves; each arm has a panel for each axis


def draw_laboratory(laboratory: Laboratory, metric: str) -> bytes:
    """Draw the chart of a metric as PNG."""
    os.environ["MPLBACKEND"] = "agg"  # no window, regardless of the user's backend
    from matplotlib.figure import Figure

    arms = [name for name in laboratory.question.arms if laboratory.question.arms[name].against]
    comparisons = list(laboratory.comparisons(metric))
    pairs = list(dict.fromkeys((item.arm, item.against) for item in comparisons))
    rows = -(-len(arms) // ARMS_PER_ROW)
    heights = [1.3 + ROW * len(pairs), 2.6 * rows]
    figure = Figure(figsize=(12.5, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(escape_text(laboratory.question.question), x=0.01, ha="left", fontsize=14)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_intervals(upper.subplots(), comparisons, pairs, metric)
    panels = lower.subplots(rows, 2 * ARMS_PER_ROW, sharey=True, squeeze=False).flatten()
    for arm, pair in zip(arms, panels.reshape(-1, 2), strict=False):
        for axes, axis in zip(pair, AXES, strict=True):
            _draw_curves(axes, laboratory, arm, metric, axis)
        pair[0].set_title(escape_text(f"{arm} and {laboratory.question.arms[arm].against}"), fontsize=10, loc="left")
    for axes in panels[2 * len(arms) :]:
        axes.set_visible(False)
    for axes in panels[:: 2 * ARMS_PER_ROW]:
        axes.set_ylabel(metric)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_intervals(
    axes: Axes, comparisons: Sequence[Comparison], pairs: Sequence[tuple[str, str]], metric: str
) -> None:
    """Draw the interval of each difference: a row for each pair of arms, a line for each stage and axis."""
    from matplotlib.lines import Line2D

    lines = sorted({(STAGES.index(item.stage), AXES.index(item.axis)) for item in comparisons})
    offsets = {key: 0.2 * ((len(lines) - 1) / 2 - i) for i, key in enumerate(lines)}
    for item in comparisons:
        y = -pairs.index((item.arm, item.against)) + offsets[STAGES.index(item.stage), AXES.index(item.axis)]
        colour, interval = STAGE_COLOURS[item.stage], item.interval
        axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=1.6)
        face = colour if item.axis == "kimg" else "white"
        axes.plot(interval.estimate, y, marker="o", markersize=5, color=colour, markerfacecolor=face)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([-i for i in range(len(pairs))], [escape_text(f"{arm} minus {against}") for arm, against in pairs])
    axes.set_ylim(0.6 - max(len(pairs), 1), 0.6)
    ends = [abs(end) for item in comparisons for end in (item.interval.low, item.interval.high)]
    largest = max([abs(item.interval.estimate) for item in comparisons], default=1.0)
    limit = max(1.1 * float(np.quantile(ends or [1.0], 0.8)), 1.2 * largest) or 1.0  # cuts the widest intervals
    axes.set_xlim(-limit, limit)
    direction = "higher is better" if higher_is_better(metric) else "lower is better"
    axes.set_xlabel(escape_text(f"difference of mean {metric} with Welch's 95 % interval ({direction})"))
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Line2D([], [], color=STAGE_COLOURS[stage], marker="o", markerfacecolor=face, label=f"{label}, equal {axis}")
        for stage, label in SEEDS.items()
        if any(item.stage == stage for item in comparisons)
        for axis, face in (("kimg", None), ("minutes", "white"))
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9)


def _draw_curves(axes: Axes, laboratory: Laboratory, arm: str, metric: str, axis: Axis) -> None:
    """Draw every run of an arm and of its reference as a thin line, and their means with one standard deviation."""
    against = laboratory.question.arms[arm].against or arm
    for name, colour in ((against, REFERENCE), (arm, ARM)):
        runs = {seed: run for stage in STAGES for seed, run in laboratory.values(name, metric, stage).items()}
        for run in runs.values():
            axes.plot(getattr(run, axis), run.values, color=colour, linewidth=0.6, alpha=0.5)
        if len(runs) > 1:
            x, mean, deviation = _mean_curve(runs, axis)
            axes.plot(x, mean, color=colour, linewidth=2, marker=".", label=name)
            axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(axis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _mean_curve(runs: Mapping[int, Values], axis: Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions, mean and standard deviation over runs at the evaluations that all runs have."""
    count = min(len(run.values) for run in runs.values())
    values = np.array([run.values[:count] for run in runs.values()])
    positions = np.array([getattr(run, axis)[:count] for run in runs.values()])
    return positions.mean(axis=0), values.mean(axis=0), values.std(axis=0, ddof=1)
