"""Rendering of charts as PNG files and as SVG for the page, against kimg and against training time.

A curve with many points is drawn as a moving average over the faint raw curve.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dnnlib.config import UserError
from reporting.charts import Chart, Line, css_colour
from reporting.run_reader import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS_BELOW = 40  # a curve with fewer points is drawn with markers
SECTIONS = 200  # number of sections of a long curve; a section is reduced to its minimum and maximum
INK, GRID = "#0a0b0c", "#0a0b0d"  # placeholder colours of text and axes, and of the grid; the page replaces them


@dataclass(frozen=True)
class Axis:
    """Horizontal axis of a panel: the field `name` of a curve, in units of `unit`."""

    name: str
    unit: float
    label: str

    def values_of(self, curve: Curve) -> np.ndarray:
        return np.asarray(getattr(curve, self.name)) / self.unit


@dataclass(frozen=True)
class Panel:
    """SVG of a chart along one axis, with axis values `first`, `last` at the fractions `left`, `right` of the width."""

    svg: str
    axis: Axis
    left: float
    right: float
    first: float
    last: float


@dataclass(frozen=True)
class RenderedChart:
    """A rendered chart: a PNG of all axes, and a panel for each axis."""

    chart: Chart
    png: bytes
    panels: tuple[Panel, ...]


def check_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the package matplotlib is not installed: pip install '.[metrics]'")


def draw(chart: Chart) -> RenderedChart:
    """Render a chart as PNG and SVG."""
    os.environ["MPLBACKEND"] = "agg"  # no window, regardless of the user's backend
    return RenderedChart(chart, draw_png(chart), tuple(_draw_panel(chart, axis) for axis in _x_axes(chart.lines)))


def _x_axes(lines: Sequence[Line]) -> list[Axis]:
    """Return the kimg axis and, if training times are known, the time axis."""
    seconds = np.concatenate([line.curve.seconds for line in lines])
    longest = seconds[np.isfinite(seconds)].max(initial=-1)
    if longest < 0:
        return [Axis("kimg", 1, "kimg")]
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    unit = next((name for name, size in units.items() if longest > 2 * size), "minutes")
    return [Axis("kimg", 1, "kimg"), Axis("seconds", units[unit], f"{unit} of training")]


def draw_png(chart: Chart) -> bytes:
    """Draw a chart as PNG, along each axis, with title and legend."""
    from matplotlib.figure import Figure

    x_axes = _x_axes(chart.lines)
    columns = 1 if chart.compares else 4
    rows = -(-len(chart.legend()) // columns)
    figure = Figure(figsize=(11, 3.6 + 0.2 * rows), layout="constrained")
    title = chart.title + (f" ({chart.note})" if chart.note else "")
    figure.suptitle(escape_text(title), x=0.01, ha="left", fontsize=12)
    for axes, axis in zip(figure.subplots(1, len(x_axes), squeeze=False)[0], x_axes, strict=True):
        _plot(axes, chart, axis)
    _add_legend(figure, chart, columns)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot(axes: Axes, chart: Chart, axis: Axis) -> None:
    """Draw the lines of a chart along an x axis."""
    for line in chart.lines:
        style: dict[str, Any] = {"color": line.colour, "linestyle": _style(line.dashes), "linewidth": 1.4}
        x, y = _extremes(axis.values_of(line.curve), line.curve.values)
        if line.is_smoothed:
            axes.plot(x, y, color=line.colour, linewidth=0.5, alpha=0.3)
            trend = line.trend()
            x, y = _extremes(axis.values_of(trend), trend.values)
        axes.plot(x, y, marker="." if len(x) < MARKERS_BELOW else None, **style)
        if line.best is not None:
            best = axis.values_of(line.curve)[line.best], line.curve.values[line.best]
            axes.plot(*best, marker="*", markersize=11, color=line.colour, linestyle="")
    if chart.is_log:
        _use_decades(axes)
    axes.set(xlabel=axis.label, ylabel=escape_text(chart.unit))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _use_decades(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with ticks at 1, 2 and 5 if it spans few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1000 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a long curve to the minimum and maximum of each of SECTIONS sections."""
    if len(y) <= 2 * SECTIONS:
        return x, y
    bounds = np.linspace(0, len(y), SECTIONS + 1).astype(int)
    parts = [(a, y[a:b]) for a, b in itertools.pairwise(bounds)]
    index = np.unique([a + offset for a, part in parts for offset in (part.argmin(), part.argmax())])
    return x[index], y[index]


def _add_legend(figure: Figure, chart: Chart, columns: int) -> None:
    """Draw the legend below the curves."""
    from matplotlib.lines import Line2D

    entries = chart.legend()
    handles = [Line2D([], [], color=entry.colour or "black", linestyle=_style(entry.dashes)) for entry in entries]
    labels = [escape_text(entry.label) for entry in entries]
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=8, frameon=False, handlelength=4)


def _style(dashes: tuple[int, ...]) -> Any:
    """Convert dashes to a matplotlib line style."""
    return (0, dashes) if dashes else "-"


def escape_text(text: str) -> str:
    """Escape text for matplotlib: dollar signs, which would start a formula, and undecodable bytes of file names."""
    return text.replace("$", r"\$").encode(errors="backslashreplace").decode()


def _draw_panel(chart: Chart, axis: Axis) -> Panel:
    """Draw a chart along one axis as SVG. The page adds title and legend."""
    from matplotlib.figure import Figure

    with page_style(f"{chart.name} {axis.name}"):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        _plot(axes, chart, axis)
        svg = to_svg(figure)
    box = axes.get_position()
    return Panel(svg, axis, box.x0, box.x1, *axes.get_xlim())


@contextmanager
def page_style(name: str) -> Iterator[None]:
    """Draw in the placeholder colours that `to_svg` replaces. Different names lead to different ids in the SVG."""
    import matplotlib

    settings: dict[Any, Any] = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "grid.color": GRID}
    with matplotlib.rc_context(settings | {"svg.fonttype": "none", "svg.hashsalt": name}):
        yield


def to_svg(figure: Figure) -> str:
    """Return a figure drawn in `page_style` as SVG for inlining: in the colours of the page, with unique ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Strip an SVG, and replace its colours by those of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    return re.sub(r' style="[^"]*"', lambda style: re.sub(r"#[0-9a-f]{6}\b", _page_colour, style[0]), svg)


def _page_colour(colour: re.Match[str]) -> str:
    own = {INK: "currentColor", GRID: "var(--grid)", "#ffffff": "var(--card)"}
    return own.get(colour[0]) or css_colour(colour[0].upper())
