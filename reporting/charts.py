"""Charts of runs: grouping of statistics into charts, colours, dashes and legends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from metrics import registry
from reporting.run_reader import Curve, Run


@dataclass(frozen=True)
class Group:
    """Statistics of one chart: all matches of `patterns` that are not in an earlier group."""

    name: str
    title: str
    unit: str
    patterns: tuple[str, ...]
    is_log: bool = False


GROUPS = (
    Group("losses", "Losses of G and D", "loss", ("Loss/G/loss", "Loss/D/loss")),
    Group("signs", "Logit signs of D: 1 = real, -1 = generated", "mean sign", ("Loss/signs/*",)),
    Group("scores", "Logits of D", "mean logit", ("Loss/scores/*",)),
    Group("augment", "Augmentation probability p", "p", ("Progress/augment",)),
    Group("schedule-lr", "Scheduled learning rates", "learning rate", ("Schedule/*.lr",), is_log=True),
    Group("schedule-beta2", "Scheduled beta2 of Adam", "beta2", ("Schedule/*.beta2",)),
    Group("schedule-gamma", "Scheduled weight gamma of R1 and R2", "gamma", ("Schedule/loss.r1_gamma",), is_log=True),
    Group("schedule-ema", "Scheduled half-life of G_ema", "kimg", ("Schedule/ema.kimg",)),
    Group("gradients", "Gradient norms", "norm", ("Gradients/*",), is_log=True),
    Group("regularisers", "Regularisers and other loss terms", "mean", ("Loss/*",), is_log=True),
    Group("diversity", "Diversity of generated images: 1 = as diverse as real images", "ratio", ("Images/diversity",)),
    Group("overfitting", "Overfitting of D: 0 = none, 1 = complete", "r", ("Overfitting/r_*",)),
    Group("holdout", "Logits of D for held-out and other images", "mean logit", ("Overfitting/score_*",)),
    Group("holdout-signs", "Logit signs of D for held-out and other images", "mean sign", ("Overfitting/sign_*",)),
    Group("skipped", "Updates skipped because of non-finite values", "updates per tick", ("Skipped/*",)),
    Group("pace", "Training speed", "seconds per kimg", ("Timing/sec_per_kimg",)),
    Group("", "", "", ("Progress/*", "Timing/*", "Resources/*", "Schedule/augment.p", "timestamp")),  # not plotted
    Group("others", "Other statistics", "", ("*",)),
)
# Okabe-Ito palette, suitable for colour blindness, without the colours that are faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
# The same hues on a dark page, with a lightness that keeps them apart for colour blindness too.
DARK = ("#3C86F7", "#FC883C", "#00C58F", "#FFA8D9", "#FFDD59", "#BEF9FF", "#878787")
DASH, DOT = (5, 2), (1, 2)  # lengths of stroke and gap, in line widths
SMOOTHED_ABOVE = 200  # a curve with more points is drawn as a moving average


@dataclass(frozen=True, kw_only=True)
class Line:
    """A statistic of a run: the finite points of its curve, and its style."""

    run: str
    statistic: str
    curve: Curve
    colour: str
    dashes: tuple[int, ...] = ()
    best: int | None = None  # index of the best value of a metric

    @property
    def is_smoothed(self) -> bool:
        """True if `trend` differs from the raw curve."""
        return len(self.curve.values) > SMOOTHED_ABOVE

    def trend(self) -> Curve:
        """Centred moving average over 2 % of the curve, shorter at both ends; the raw curve if it has few points."""
        if not self.is_smoothed:
            return self.curve
        half = len(self.curve.values) // 100
        sums = np.concatenate([[0.0], np.cumsum(self.curve.values)])
        index = np.arange(len(self.curve.values))
        first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(index))
        return replace(self.curve, values=(sums[end] - sums[first]) / (end - first))


@dataclass(frozen=True)
class Entry:
    """An entry of the legend. Without a colour, the entry stands for all lines with these dashes."""

    label: str
    colour: str | None
    dashes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines in one plot. `compares` states whether the lines belong to several runs.

    `differing` lists the keys of metric records that differ between the runs, so the values are not comparable.
    """

    name: str
    title: str
    unit: str
    is_log: bool
    compares: bool
    lines: tuple[Line, ...]
    differing: tuple[str, ...] = ()

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the plotted statistics."""
        return tuple(dict.fromkeys(line.statistic for line in self.lines))

    @property
    def note(self) -> str:
        """Caption: the meaning of faint and strong lines, and a warning if the runs are not comparable."""
        notes = []
        if any(line.is_smoothed for line in self.lines):
            notes.append("faint: every tick; strong: moving average over 2 % of the run")
        if self.differing:
            notes.append(f"values not comparable: the runs differ in {', '.join(self.differing)}")
        return "; ".join(notes)

    def label(self, line: Line) -> str:
        """Return the label of a line: the statistic, or the run if runs are compared."""
        if not self.compares:
            return line.statistic
        return f"{line.run} {line.statistic}" if len(self.statistics) > 1 else line.run

    def legend(self) -> list[Entry]:
        """Return the legend: colours denote statistics or, with several runs, runs; dashes then denote statistics."""
        if not self.compares:
            return [Entry(line.statistic + _best_of(line), line.colour) for line in self.lines]
        runs = {line.run: Entry(line.run + _best_of(line), line.colour) for line in self.lines}
        statistics = {line.statistic: Entry(line.statistic, None, line.dashes) for line in self.lines}
        return [*runs.values(), *(statistics.values() if len(statistics) > 1 else ())]


def find_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield every chart that has values in at least one run, metrics first."""
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
    """Return the chart of a metric; logarithmic for a lower-is-better metric that spans more than a factor of ten."""
    higher = higher_is_better(name)
    lines = _lines([(run.name, run.metrics) for run in runs], [name])
    values = np.concatenate([line.curve.values for line in lines])
    if higher is not None:
        lines = tuple(replace(line, best=index_of_best(line.curve, higher=higher)) for line in lines)
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
    """Return whether a higher number of a recorded metric or value is better; None if unknown, or if neither is."""
    found = registry.find_recorded(metric)
    return found[0].is_higher_better(found[1]) if found else None


def index_of_best(curve: Curve, *, higher: bool) -> int:
    """Return the index of the best value of a curve; the first of equal values."""
    return int(curve.values.argmax() if higher else curve.values.argmin())


def _best_of(line: Line) -> str:
    if line.best is None:
        return ""
    return f" (best {line.curve.values[line.best]:.5g} at {line.curve.kimg[line.best]:g} kimg)"


def _is_positive(lines: Sequence[Line]) -> bool:
    return all((line.curve.values > 0).all() for line in lines)


def _lines(runs: Sequence[tuple[str, dict[str, Curve]]], statistics: Sequence[str]) -> tuple[Line, ...]:
    """Return the lines of these statistics. With several runs, colours denote runs and dashes denote statistics."""
    lines = []
    for i, (run, curves) in enumerate(runs):
        for j, statistic in enumerate(statistics):
            curve = curves[statistic].finite() if statistic in curves else None
            if curve is None or not len(curve.values):
                continue
            colour = line_colour(i, len(runs)) if len(runs) > 1 else line_colour(j, len(statistics))
            dashes = _dashes(j) if len(runs) > 1 else ()
            lines.append(Line(run=run, statistic=statistic, curve=curve, colour=colour, dashes=dashes))
    return tuple(lines)


def _dashes(i: int) -> tuple[int, ...]:
    """Return the i-th dash pattern: solid, dashes, dots, then dashes with 1, 2, 3, ... dots between them."""
    return ((), DASH, DOT)[i] if i < 3 else DASH + (i - 2) * DOT


def colour_of_run(i: int, count: int) -> str:
    """Return the CSS colour of the i-th of several runs; "" for a single run."""
    return css_colour(line_colour(i, count)) if count > 1 else ""


def css_colour(colour: str) -> str:
    """Return a CSS colour that is legible on a light and on a dark page."""
    if colour in COLOURS:
        return f"light-dark({colour}, {DARK[COLOURS.index(colour)]})"
    light, dark = (f"oklch(from {colour} {lightness} c h)" for lightness in ("min(l, .75)", "calc(.5 + .45 * l)"))
    return f"light-dark({light}, {dark})"


def line_colour(i: int, count: int) -> str:
    """Return the i-th of `count` colours: from COLOURS, or from a colour map if COLOURS has too few."""
    if count <= len(COLOURS):
        return COLOURS[i]
    from matplotlib import colormaps, colors

    return colors.to_hex(colormaps["viridis"](0.9 * i / (count - 1)))
