"""Charts of runs: which statistics each shows, as lines of their own colour and dashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from dnnlib.config import UserError
from metrics import registry
from reporting.run_reader import Curve, Run


@dataclass(frozen=True)
class Group:
    """Numbers that belong into one chart: those that match a pattern and that no earlier group has."""

    name: str
    title: str
    unit: str
    patterns: tuple[str, ...]
    is_log: bool = False


GROUPS = (
    Group("losses", "Losses of G and D", "loss", ("Loss/G/loss", "Loss/D/loss")),
    Group("signs", "Signs of D's logits: 1 is real, -1 is generated", "mean sign", ("Loss/signs/*",)),
    Group("scores", "D's logits", "mean logit", ("Loss/scores/*",)),
    Group("augment", "Probability p of the augmentation", "p", ("Progress/augment",)),
    Group("gradients", "Norms of the gradients", "norm", ("Gradients/*",), is_log=True),
    Group("regularisers", "Regularisers and other terms of the losses", "mean", ("Loss/*",), is_log=True),
    Group("diversity", "Spread of generated images: 1 is that of real ones", "share", ("Images/diversity",)),
    Group("overfitting", "Overfitting of D: 0 is none, 1 is complete", "r", ("Overfitting/r_*",)),
    Group("holdout", "D's logits of held-out and other images", "mean logit", ("Overfitting/score_*",)),
    Group("holdout-signs", "Signs of D's logits of held-out and other images", "mean sign", ("Overfitting/sign_*",)),
    Group("skipped", "Updates left out: their values were not finite", "updates per tick", ("Skipped/*",)),
    Group("pace", "Pace", "seconds per kimg", ("Timing/sec_per_kimg",)),
    Group("", "", "", ("Progress/*", "Timing/*", "Resources/*", "timestamp")),  # not drawn
    Group("others", "Other figures", "", ("*",)),
)
# Okabe and Ito's colours, which colour-blind people tell apart as well, but for those that are faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASH, DOT = (5, 2), (1, 2)  # widths of a line, drawn and left out
MANY = 200  # points: of more a running mean is drawn, too


@dataclass(frozen=True, kw_only=True)
class Line:
    """A number of a run: the points of its curve that are finite, and how they are drawn."""

    run: str
    number: str
    curve: Curve
    colour: str
    dashes: tuple[int, ...] = ()
    best: int | None = None  # the place of a metric's best value

    @property
    def is_smoothed(self) -> bool:
        """Whether `trend` is something else than the curve."""
        return len(self.curve.values) > MANY

    def trend(self) -> Curve:
        """Centred moving average over 2 % of the curve, shorter at both ends; the raw curve if it has few points."""
        if not self.is_smoothed:
            return self.curve
        half = len(self.curve.values) // 100
        sums = np.concatenate([[0.0], np.cumsum(self.curve.values)])
        places = np.arange(len(self.curve.values))
        first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(places))
        return replace(self.curve, values=(sums[end] - sums[first]) / (end - first))


@dataclass(frozen=True)
class Entry:
    """A line of the legend; without a colour it stands for all that have these dashes."""

    label: str
    colour: str | None
    dashes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over each other; `compares` says whether they are of several runs.

    `differing` are the keys of metric records in which the runs differ, so that their values do not compare.
    """

    name: str
    title: str
    unit: str
    is_log: bool
    compares: bool
    lines: tuple[Line, ...]
    differing: tuple[str, ...] = ()

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the statistics that are drawn."""
        return tuple(dict.fromkeys(line.number for line in self.lines))

    @property
    def note(self) -> str:
        """Caption: how faint and strong lines differ, where there are both, and whether the runs are comparable."""
        notes = []
        if any(line.is_smoothed for line in self.lines):
            notes.append("faint: every tick; strong: the mean over a fiftieth of the run")
        if self.differing:
            notes.append(f"values not comparable: the runs differ in {', '.join(self.differing)}")
        return "; ".join(notes)

    def label(self, line: Line) -> str:
        """Label of a line: its statistic, or its run where runs are compared."""
        if not self.compares:
            return line.number
        return f"{line.run} {line.number}" if len(self.numbers) > 1 else line.run

    def legend(self) -> list[Entry]:
        """Legend entries: the statistics of one run by colour; several runs by colour, then statistics by dashes."""
        if not self.compares:
            return [Entry(line.number + _best_of(line), line.colour) for line in self.lines]
        runs = {line.run: Entry(line.run + _best_of(line), line.colour) for line in self.lines}
        numbers = {line.number: Entry(line.number, None, line.dashes) for line in self.lines}
        return [*runs.values(), *(numbers.values() if len(numbers) > 1 else ())]


def find_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield the charts that any of the runs has numbers for, metrics first."""
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        yield _metric_chart(name, runs)
    names = sorted({name for run in runs for name in run.ticks})
    for group in GROUPS:
        matching = [name for name in names if any(fnmatchcase(name, pattern) for pattern in group.patterns)]
        names = [name for name in names if name not in matching]
        lines = _lines([(run.name, run.ticks) for run in runs], matching)
        if group.name and lines:
            yield Chart(
                name=group.name,
                title=group.title,
                unit=group.unit,
                is_log=group.is_log and _is_positive(lines),
                compares=len(runs) > 1,
                lines=lines,
            )


def _metric_chart(name: str, runs: Sequence[Run]) -> Chart:
    """The chart of a metric, logarithmic where low values are good and span more than a factor of ten."""
    higher = higher_is_better(name)
    lines = _lines([(run.name, run.metrics) for run in runs], [name])
    values = np.concatenate([line.curve.values for line in lines])
    if higher is not None:
        lines = tuple(replace(line, best=place_of_best(line.curve, higher=higher)) for line in lines)
    return Chart(
        name=f"metric-{name}",
        title=f"Metric {name}" + ("" if higher is None else f": {'higher' if higher else 'lower'} is better"),
        unit=name,
        is_log=higher is False and _is_positive(lines) and values.max() > 10 * values.min(),
        compares=len(runs) > 1,
        lines=lines,
        differing=tuple(key for key in registry.COMPARABLE if _differs(key, lines)),
    )


def _differs(key: str, lines: Sequence[Line]) -> bool:
    values = [line.curve.origin.get(key) for line in lines]
    return any(value != values[0] for value in values)


def higher_is_better(metric: str) -> bool | None:
    """Whether high values of a metric are good; None if that is not known here."""
    for name in (metric, metric.rpartition("_")[0]):  # a detector of one's own is named behind the last "_"
        try:
            return registry.find(name)[0].higher_is_better
        except UserError:
            continue
    return None


def place_of_best(curve: Curve, *, higher: bool) -> int:
    """Return the index of the best value in a curve, the first of equal ones."""
    return int(curve.values.argmax() if higher else curve.values.argmin())


def _best_of(line: Line) -> str:
    if line.best is None:
        return ""
    return f" (best {line.curve.values[line.best]:.5g} at {line.curve.kimg[line.best]:g} kimg)"


def _is_positive(lines: Sequence[Line]) -> bool:
    return all((line.curve.values > 0).all() for line in lines)


def _lines(runs: Sequence[tuple[str, dict[str, Curve]]], numbers: Sequence[str]) -> tuple[Line, ...]:
    """Return the lines of these statistics. With several runs, colour tells the run and dashes the statistic."""
    lines = []
    for i, (run, curves) in enumerate(runs):
        for j, number in enumerate(numbers):
            curve = curves[number].finite() if number in curves else None
            if curve is None or not len(curve.values):
                continue
            colour = _colour(i, len(runs)) if len(runs) > 1 else _colour(j, len(numbers))
            dashes = _dashes(j) if len(runs) > 1 else ()
            lines.append(Line(run=run, number=number, curve=curve, colour=colour, dashes=dashes))
    return tuple(lines)


def _dashes(i: int) -> tuple[int, ...]:
    """The dashes of the i-th of some things: none, dashes, dots, then dashes with one, two, three, ... dots between."""
    return ((), DASH, DOT)[i] if i < 3 else DASH + (i - 2) * DOT


def _colour(i: int, count: int) -> str:
    """The colour of the i-th of some things: one of COLOURS, or if there are more, steps of a scale."""
    if count <= len(COLOURS):
        return COLOURS[i]
    from matplotlib import colormaps, colors

    return colors.to_hex(colormaps["viridis"](0.9 * i / (count - 1)))
