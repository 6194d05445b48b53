"""One HTML file that shows runs: figures, curves, and what was generated over time. It asks nothing of a network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from dnnlib.config import differences
from dnnlib.util import format_time
from reporting.charts import Picture
from reporting.runs import Curve, Grid, Run

MAX_SIDE = 768  # pixels of a grid in the page

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1140px; padding: 1.5em 1em 4em; color: #24292f;
 background: #f3f4f6 }}
h1 {{ font-size: 1.7em; margin: .4em 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.2em; margin: 2em 0 .6em }}
h3 {{ font-size: 1em; margin: 0 0 .8em; overflow-wrap: anywhere }}
img {{ max-width: 100%; display: block }}
.card {{ background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 1em; margin: 0 0 1em;
 overflow-x: auto; box-shadow: 0 1px 3px #0000000f }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid #e1e4e8; padding: .4em 1em .4em 0; text-align: left; vertical-align: top }}
th {{ color: #57606a; font-weight: 600; font-size: .9em }}
tr:last-child td {{ border-bottom: none }}
figure {{ margin: 0 }}
figure img {{ border-radius: 4px; width: 100% }}
figcaption {{ color: #57606a; font-size: .9em; padding-top: .4em }}
summary {{ cursor: pointer }}
.grids {{ display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-end }}
.grids input {{ width: 100% }}
.grids > div {{ flex: 1 1 320px; max-width: 530px }}
pre {{ overflow-x: auto; background: #f6f8fa; border-radius: 6px; padding: 1em }}
.problems {{ color: #a40e26; list-style-position: inside }}
</style>
</head>
<body>
"""

# The slider shows one grid of its box; without scripts all of them stand below each other.
SCRIPT = """<script>
for (const box of document.querySelectorAll(".frames")) {
  const slider = box.querySelector("input"), frames = box.querySelectorAll("figure");
  const show = () => frames.forEach((frame, i) => { frame.hidden = i != slider.value; });
  slider.hidden = false;
  slider.addEventListener("input", show);
  show();
}
</script>
"""


def build_page(runs: Sequence[Run], pictures: Iterable[Picture], max_images: int) -> str:
    """Return the page; of a run's grids it has about `max_images`, evenly spaced, with the first and the last."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>", _overview(runs)]
    parts.append("<h2>Generated images</h2>")
    parts += [_grids(run, max_images) for run in runs]
    parts.append("<h2>Curves</h2>")
    curves = [
        f'<div class="card"><img src="{_data_uri(picture.png, "png")}" alt="{escape(picture.title)}"></div>'
        for picture in pictures
    ]
    parts += curves or ["<p>No figures yet: the first come with the first tick.</p>"]
    parts += ["<h2>Options</h2>", _options(runs)]
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    if problems:  # the last to be known, the first to be read
        items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        parts.insert(2, f'<ul class="card problems">{items}</ul>')
    return "\n".join([*parts, SCRIPT, "</body>\n</html>\n"])


def _overview(runs: Sequence[Run]) -> str:
    """How far each run has come, and where its metrics stand."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    rows = [["run", "kimg", "time", "sec/kimg", *(f"{name}, last (lowest, highest)" for name in metrics)]]
    for run in runs:
        seconds = run.last("Timing/total_sec")
        rows.append(
            [
                run.name,
                f"{_number(run.last('Progress/kimg'))} of {_number(run.total_kimg)}",
                format_time(seconds) if math.isfinite(seconds) else "",
                _number(run.last("Timing/sec_per_kimg")),
                *(_summary(run.metrics.get(name)) for name in metrics),
            ]
        )
    return _table(rows)


def _summary(curve: Curve | None) -> str:
    if curve is None:
        return ""
    last, low, high = curve.values[-1], min(curve.values), max(curve.values)
    return f"{last:.5g} ({low:.5g}, {high:.5g})"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "?"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<CELL>{escape(cell)}</CELL>" for cell in row) for row in rows]
    lines = [head.replace("CELL>", "th>"), *(row.replace("CELL>", "td>") for row in body)]
    return '<div class="card"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _grids(run: Run, max_images: int) -> str:
    """The real images beside a slider over the generated ones."""
    frames = []
    for grid in _spread(run.grids, max_images):
        uri = _shrunk(grid.path, run.problems)
        if uri:
            frames.append(
                _figure(uri, f"kimg {grid.kimg:g}, {grid.path.name}", f"{run.name}: generated at kimg {grid.kimg:g}")
            )
    reals = _shrunk(run.reals, run.problems) if run.reals else None
    parts = [f'<div class="card"><h3>{escape(run.name)}</h3>', '<div class="grids">']
    if reals:
        parts.append(f"<div>{_figure(reals, 'real images', f'{run.name}: real images')}</div>")
    if frames:
        last = len(frames) - 1
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="kimg" hidden>'
        parts.append(f'<div class="frames">{slider}{"".join(frames)}</div>')
    else:
        parts.append("<p>None yet: the next come with the next snapshot.</p>")
    return "\n".join([*parts, "</div></div>"])


def _spread(items: Sequence[Grid], count: int) -> list[Grid]:
    """About `count` items in order, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _figure(uri: str, caption: str, alt: str) -> str:
    return f'<figure><img src="{uri}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _shrunk(path: Path, problems: list[str]) -> str | None:
    """A picture as JPEG of at most MAX_SIDE pixels, transparency over white; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGBA" if file.mode == "RGBA" else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _options(runs: Sequence[Run]) -> str:
    """What the other runs have otherwise than the first, and all options of each."""
    first, *others = runs
    parts = []
    for run in others:
        changed = differences(first.options, run.options)
        text = "\n".join(changed) or "nothing"
        sentence = f"{escape(run.name)} differs from {escape(first.name)} in:"
        parts.append(f'<div class="card">{sentence}<pre>{escape(text)}</pre></div>')
    for run in runs:
        text = json.dumps(run.options, indent=2)
        summary = f"<summary>{escape(run.name)}: all options</summary>"
        parts.append(f'<details class="card">{summary}<pre>{escape(text)}</pre></details>')
    return "\n".join(parts)
