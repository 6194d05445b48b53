"""Charts of a page: panels as SVG in the colours of the page, with legends and the data for the readout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from reporting.charts import Chart, Entry, Line, css_colour
from reporting.drawing import Panel, RenderedChart
from reporting.markup import Section

MAX_READINGS = 300  # points per line for the readout at the pointer
NOTE = (
    '<p class="quiet screen">Point at a chart to read its values. '
    "Dashed vertical lines: the kimg of the images above.</p>"
)


def chart_section(charts: Iterable[RenderedChart]) -> Section:
    """Return all charts; empty if there are none."""
    shown = "\n".join(map(_chart, charts))
    return Section("curves", "Curves", f'{NOTE}\n<div class="charts">\n{shown}\n</div>' if shown else "")


def _chart(rendered: RenderedChart) -> str:
    """Return the panels of a chart, its legend, and the data for the readout at the pointer."""
    chart = rendered.chart
    lines = escape(json.dumps([_readings(chart, line) for line in chart.lines], separators=(",", ":")))
    legend = "".join(f"<li>{swatch(entry)}{escape(entry.label)}</li>" for entry in chart.legend())
    legend += f'<li class="quiet">{escape(chart.note)}</li>' if chart.note else ""
    panels = "".join(map(_panel, rendered.panels))
    return (
        f'<section class="card chart" aria-label="{escape(chart.title)}" data-lines="{lines}">\n'
        f'<h3>{escape(chart.title)}</h3><div class="panels">{panels}</div><ul class="legend">{legend}</ul></section>'
    )


def _readings(chart: Chart, line: Line) -> dict[str, Any]:
    trend = line.trend()
    index = np.unique(np.linspace(0, len(trend.values) - 1, MAX_READINGS).round().astype(int))
    columns = {"kimg": trend.kimg, "seconds": trend.seconds, "values": trend.values}
    return {"label": chart.label(line), "colour": css_colour(line.colour)} | {
        name: [float(f"{x:.5g}") if math.isfinite(x) else None for x in column[index].tolist()]
        for name, column in columns.items()
    }


def _panel(panel: Panel) -> str:
    """Return the SVG of a panel, with the scale of its horizontal axis for the script."""
    axis, unit = panel.axis, panel.axis.unit
    scale = {"name": axis.name, "label": axis.label, "unit": unit, "left": panel.left, "right": panel.right}
    scale |= {"first": panel.first * unit, "last": panel.last * unit}
    return f'<div class="panel" data-axis="{escape(json.dumps(scale))}">{panel.svg}</div>'


def swatch(entry: Entry) -> str:
    """Return a piece of a line, the key of an entry of a legend."""
    colour = css_colour(entry.colour) if entry.colour else "currentColor"
    dashes = " ".join(map(str, entry.dashes))
    line = f'<line x2="26" y1="4" y2="4" style="stroke: {colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    return f'<svg width="26" height="8" aria-hidden="true">{line}</svg>'
