"""Curves of one or several runs as pictures: against kimg on the left, against the time of training on the right."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from dnnlib.config import UserError
from reporting.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """Numbers that are drawn into one picture: those that match a pattern and that no earlier chart has."""

    name: str
    title: str
    patterns: tuple[str, ...]
    is_log: bool = False


CHARTS = (
    Chart("losses", "Losses of G and D", ("Loss/G/loss", "Loss/D/loss")),
    Chart("signs", "Mean sign of D's logits: 1 is real, -1 is generated", ("Loss/signs/*",)),
    Chart("scores", "D's logits", ("Loss/scores/*",)),
    Chart("augment", "Probability p of the augmentation", ("Progress/augment",)),
    Chart("gradients", "Norms of the gradients", ("Gradients/*",), is_log=True),
    Chart("regularisers", "Regularisers and other terms of the losses", ("Loss/*",), is_log=True),
    Chart("diversity", "How much generated images differ, as a share of how much real ones do", ("Images/diversity",)),
    Chart("overfitting", "Overfitting of D: 0 is none, 1 is complete", ("Overfitting/r_*",)),
    Chart("pace", "Seconds per kimg", ("Timing/sec_per_kimg",)),
    Chart("", "", ("Progress/*", "Timing/*", "Resources/*", "timestamp")),  # not drawn
    Chart("others", "Other figures", ("*",)),
)
STYLES = ("-", "--", ":", "-.")
FEW = 40  # points: fewer are drawn as such


@dataclass(frozen=True)
class Picture:
    """A chart, drawn: PNG."""

    name: str
    title: str
    png: bytes


def check_matplotlib() -> None:
    """Raise UserError when nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the package matplotlib is not installed: pip install '.[metrics]'")


def draw(runs: Sequence[Run]) -> Iterator[Picture]:
    """Yield the charts that any of the runs has numbers for, metrics first."""
    everyone = [run.name for run in runs]
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        lines = {(run.name, name): run.metrics[name] for run in runs if name in run.metrics}
        yield Picture(f"metric-{name}", name, _draw(f"Metric {name}", lines, everyone))
    names = dict.fromkeys(name for run in runs for name in run.ticks)
    taken: set[str] = set()
    for chart in CHARTS:
        matching = [name for name in names if name not in taken and _matches(name, chart)]
        taken.update(matching)
        lines = {(run.name, name): run.ticks[name] for name in matching for run in runs if name in run.ticks}
        lines = {key: curve for key, curve in lines.items() if np.isfinite(curve.values).any()}
        if chart.name and lines:
            yield Picture(chart.name, chart.title, _draw(chart.title, lines, everyone, is_log=chart.is_log))


def _matches(name: str, chart: Chart) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in chart.patterns)


def _draw(title: str, lines: dict[tuple[str, str], Curve], runs: Sequence[str], *, is_log: bool = False) -> bytes:
    """Draw curves by (run, number). Of several runs the colour says which, and the dashes say which number."""
    from matplotlib.figure import Figure

    numbers = list(dict.fromkeys(number for _, number in lines))
    longest = max((x for curve in lines.values() for x in curve.seconds if math.isfinite(x)), default=0)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60)
    figure = Figure(figsize=(11, 3.6 + 0.2 * max(len(runs), len(numbers))), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    left, right = figure.subplots(1, 2, sharey=True)
    for (run, number), curve in lines.items():
        i, j = runs.index(run), numbers.index(number)
        style = (
            {"color": _colour(i, runs), "linestyle": _dashes(j)} if len(runs) > 1 else {"color": _colour(j, numbers)}
        )
        known = np.isfinite(curve.values)  # a number that not every tick has is a line too
        x, y = np.asarray(curve.kimg)[known], np.asarray(curve.values)[known]
        marker = "." if len(x) < FEW else None
        left.plot(x, y, label=number, linewidth=1.2, marker=marker, **style)
        right.plot(np.asarray(curve.seconds)[known] / seconds, y, linewidth=1.2, marker=marker, **style)
        if is_log and (y > 0).all():
            left.set_yscale("log")
    left.set_xlabel("kimg")
    right.set_xlabel(f"{unit} of training")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _add_legend(figure, left, runs, numbers)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _add_legend(figure: Figure, axes: Axes, runs: Sequence[str], numbers: Sequence[str]) -> None:
    """Below the curves: of one run its numbers; of several the runs by colour, then the numbers by dashes."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"fontsize": 8, "frameon": False}
    if len(runs) == 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4, **style)
        return
    handles = [Line2D([], [], color=_colour(i, runs)) for i in range(len(runs))]
    figure.legend(handles, runs, loc="outside lower left", ncols=1, **style)
    if len(numbers) > 1:
        handles = [Line2D([], [], color="black", linestyle=_dashes(j)) for j in range(len(numbers))]
        figure.legend(handles, numbers, loc="outside lower right", ncols=1, **style)


def _colour(i: int, items: Sequence[str]) -> Any:
    """The colour of the i-th of some things: matplotlib's ten, or steps of a colour map if there are more."""
    import matplotlib

    return f"C{i}" if len(items) <= 10 else matplotlib.colormaps["turbo"](i / (len(items) - 1))


def _dashes(j: int) -> Any:
    return STYLES[j % len(STYLES)]
