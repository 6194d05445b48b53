"""Self-contained HTML page of runs: overview, generated images over time, curves, options. No remote resources."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dnnlib.image_files import BrokenImageError
from dnnlib.images import MAX_IMAGE_BYTES, open_image
from dnnlib.util import format_time, read_regular
from reporting.charts import Chart, Entry, Line, higher_is_better, index_of_best
from reporting.drawing import Panel, RenderedChart
from reporting.run_reader import Curve, Grid, Run

TEMPLATE = Path(__file__).with_name("page.html")
MAX_SIDE = 768  # longer side of a grid in the page, in pixels
MAX_STARTS, MAX_COLUMNS = 50, 30  # starts shown per run, and columns of the environment table
MAX_READINGS = 300  # points per line for the readout at the pointer


def build_page(runs: Sequence[Run], charts: Iterable[RenderedChart], max_images: int) -> str:
    """Return the page, with at most `max_images` grids over all runs, but at least two per run."""
    images = generated_images(runs, max_images)
    parts = [problems(runs), _overview(runs), *images, "<h2>Curves</h2>", *map(_chart, charts)]
    parts += ["<h2>Options</h2>", _differing_options(runs), *map(_all_options, runs)]
    parts.append(_environments(runs))
    return fill_template(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", parts)


def fill_template(title: str, parts: Iterable[str]) -> str:
    """Return a page with a title and the parts of its body; empty parts are skipped."""
    written = f"Written {_date(datetime.now(UTC).timestamp())} by report.py."
    body = "\n".join(filter(None, [f"<h1>{escape(title)}</h1>", *parts, f'<p class="quiet">{written}</p>']))
    texts = {"$title": escape(title), "$body": body}
    return re.sub(r"\$(title|body)\b", lambda place: texts[place[0]], TEMPLATE.read_text(encoding="utf-8"))


def generated_images(runs: Sequence[Run], max_images: int) -> list[str]:
    """Return a heading and the images of each run: at most `max_images` grids in all, but at least two per run."""
    per_run = max(max_images // max(len(runs), 1), 2)
    return ["<h2>Generated images</h2>", *(_grids(run, per_run) for run in runs)]


def problems(runs: Sequence[Run]) -> str:
    """List the files that could not be read, and the warnings of the runs."""
    items = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    items += [f"{run.name}: {line}" for run in runs for line in run.warnings]
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="card alarm" style="padding-left: 2em">{lines}</ul>' if items else ""


def _overview(runs: Sequence[Run]) -> str:
    """Return the table of runs: progress, speed, and best and last metrics."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    rows = [["run", "kimg", "training time", "sec/kimg", "p", "last tick"]]
    rows[0] += [head for name in metrics for head in (f"{name}, best", "last")]
    for run in runs:
        seconds = run.last("Timing/total_sec")
        rows.append(
            [
                run.name,
                f"{_number(run.last('Progress/kimg'), 6)} of {_number(run.total_kimg, 6)}",
                format_time(seconds) if math.isfinite(seconds) else "?",
                _number(run.last("Timing/sec_per_kimg")),
                _number(run.last("Progress/augment")),
                _date(run.last("timestamp")),
                *(cell for name in metrics for cell in _best_and_last(name, run.metrics.get(name))),
            ]
        )
    return table(rows)


def _best_and_last(name: str, curve: Curve | None) -> tuple[str, str]:
    """Return the best value, "" if the metric is unknown or has no better direction, and the last value."""
    if curve is None:
        return "", ""
    last = f"{curve.values[-1]:.5g}"
    higher = higher_is_better(name)
    if higher is None:
        return "", last
    best = index_of_best(curve, higher=higher)
    return f"{curve.values[best]:.5g} at {curve.kimg[best]:g} kimg", last


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "?"


def _date(timestamp: float) -> str:
    try:
        return f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):  # not finite, or out of range
        return "?"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is the head."""
    head, *body = ["".join(f"<CELL>{escape(cell)}</CELL>" for cell in row) for row in rows]
    lines = [head.replace("CELL>", "th>"), *(row.replace("CELL>", "td>") for row in body)]
    return '<div class="card wide"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _grids(run: Run, count: int) -> str:
    """Return the real images next to a slider over at most `count` grids of generated images."""
    frames = []
    for grid in _evenly_spaced(run.grids, count):
        uri = _thumbnail_uri(grid.path, run.problems)
        if uri:
            caption = f"kimg {grid.kimg:g}, {grid.path.name}"
            frames.append(figure(uri, caption, f"{run.name}: generated at kimg {grid.kimg:g}"))
    reals = _thumbnail_uri(run.reals, run.problems) if run.reals else None
    parts = [f'<div class="card"><h3>{escape(run.name)}</h3>', '<div class="grids">']
    if reals:
        parts.append(f"<div>{figure(reals, 'real images', f'{run.name}: real images')}</div>")
    if frames:
        last = len(frames) - 1
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="kimg" hidden>'
        parts.append(f'<div class="frames">{slider}{"".join(frames)}</div>')
    else:
        parts.append("<p>No image grids yet; the next snapshot adds them.</p>")
    return "\n".join([*parts, "</div></div>"])


def _evenly_spaced(items: Sequence[Grid], count: int) -> list[Grid]:
    """Select at most `count` evenly spaced items, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def figure(uri: str, caption: str, alt: str) -> str:
    """Return an image, given as a data URI, with its caption and alternative text."""
    return f'<figure><img src="{uri}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _thumbnail_uri(path: Path, problems: list[str]) -> str | None:
    """Return an image as a JPEG data URI of at most MAX_SIDE pixels, alpha blended onto white; None if unreadable."""
    try:
        with open_image(read_regular(path, MAX_IMAGE_BYTES)) as file:
            image = file.convert("RGBA" if file.mode == "RGBA" else "RGB")
    except (OSError, BrokenImageError) as error:
        problems.append(f"{path.name}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _chart(rendered: RenderedChart) -> str:
    """Return the panels of a chart, its legend, and the data for the readout at the pointer."""
    chart = rendered.chart
    lines = escape(json.dumps([_readings(chart, line) for line in chart.lines], separators=(",", ":")))
    legend = "".join(f"<li>{_swatch(entry)}{escape(entry.label)}</li>" for entry in chart.legend())
    legend += f'<li class="quiet">{chart.note}</li>' if chart.note else ""
    panels = "".join(map(_panel, rendered.panels))
    return (
        f'<section class="card chart" aria-label="{escape(chart.title)}" data-lines="{lines}">\n'
        f'<h3>{escape(chart.title)}</h3><div class="panels">{panels}</div><ul class="legend">{legend}</ul></section>'
    )


def _readings(chart: Chart, line: Line) -> dict[str, Any]:
    trend = line.trend()
    index = np.unique(np.linspace(0, len(trend.values) - 1, MAX_READINGS).round().astype(int))
    columns = {"kimg": trend.kimg, "seconds": trend.seconds, "values": trend.values}
    return {"label": chart.label(line), "colour": line.colour} | {
        name: [float(f"{x:.5g}") if math.isfinite(x) else None for x in column[index].tolist()]
        for name, column in columns.items()
    }


def _panel(panel: Panel) -> str:
    """Return the SVG of a panel, with the scale of its horizontal axis for the script."""
    axis, unit = panel.axis, panel.axis.unit
    scale = {"name": axis.name, "label": axis.label, "unit": unit, "left": panel.left, "right": panel.right}
    scale |= {"first": panel.first * unit, "last": panel.last * unit}
    return f'<div class="panel" data-axis="{escape(json.dumps(scale))}">{panel.svg}</div>'


def _swatch(entry: Entry) -> str:
    line = f'<line x2="26" y1="4" y2="4" stroke="{entry.colour or "currentColor"}" stroke-width="2"'
    return f'<svg width="26" height="8">{line} stroke-dasharray="{" ".join(map(str, entry.dashes))}"/></svg>'


def _text_or_unknown(value: object) -> str:
    return "?" if value is None else str(value)


def _differing_options(runs: Sequence[Run]) -> str:
    """Return a table of the options that differ between runs."""
    if len(runs) == 1:
        return ""
    flat = [dict(_flatten_options(run.options)) for run in runs]
    rows = [["option", *(run.name for run in runs)]]
    for name in sorted(set().union(*flat)):
        if any(options.get(name) != flat[0].get(name) for options in flat):
            rows.append([name, *(json.dumps(options[name]) if name in options else "" for options in flat)])
    return table(rows) if len(rows) > 1 else '<p class="card">All runs have the same options.</p>'


def _flatten_options(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every option."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten_options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _all_options(run: Run) -> str:
    text = escape(json.dumps(run.options, indent=2))
    return f'<details class="card"><summary>{escape(run.name)}: all options</summary><pre>{text}</pre></details>'


def _environments(runs: Sequence[Run]) -> str:
    """Return the table of environments: software and hardware at each start of each run."""
    starts = [(run.name, start) for run in runs for start in run.starts[-MAX_STARTS:]]
    names = list(dict.fromkeys(name for _, start in starts for name in start))[:MAX_COLUMNS]
    rows = [["run", *names]]
    rows += [[run, *(_text_or_unknown(start.get(name, "")) for name in names)] for run, start in starts]
    return "<h2>Environment</h2>\n" + table(rows) if len(rows) > 1 else ""
