"""HTML page of a laboratory: charts, tables of all comparisons, and images of one run of each arm."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from reporting.laboratory import Laboratory
from reporting.laboratory_table import arms_table, result_tables
from reporting.page import figure, fill_template, generated_images, problems, table
from reporting.run_reader import Run, is_run, read_run

CAPTION = (
    "Above: differences of means with Welch's 95 % intervals. An arm is better, or worse, if the interval of its fresh "
    "seeds excludes 0. Below: thin lines are runs, strong lines their mean, bands one standard deviation, of the fresh "
    "seeds if there are any."
)


def build_laboratory_page(laboratory: Laboratory, charts: Mapping[str, bytes], folder: Path, max_images: int) -> str:
    """Return the page, with a PNG for each metric, and the images of the runs in the folder of the laboratory."""
    parts = [_chart(metric, png) for metric, png in charts.items()]
    for title, rows in result_tables(laboratory):
        parts += [f"<h2>{escape(title)}</h2>", table(rows)]
    runs = list(filter(None, (first_run(folder, arm) for arm in laboratory.question.arms)))
    images = generated_images(runs, max_images) if runs else []
    parts += ["<h2>Arms</h2>", table(arms_table(laboratory)), *images]
    return fill_template(laboratory.question.question, [problems(runs), *parts])


def _chart(metric: str, png: bytes) -> str:
    """Return the chart of a metric as a card."""
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = figure(uri, CAPTION, f"Comparison of the arms by {metric}")
    return f'<section class="card"><h3>{escape(metric)}</h3>{image}</section>'


def first_run(folder: Path, arm: str) -> Run | None:
    """Return the newest run with the lowest seed of an arm; None if the folder of the laboratory has none."""
    found = (
        (path.parent.name.removeprefix("seed"), path)
        for path in (folder / "runs" / arm).glob("seed*/*")
        if is_run(path)
    )
    runs = sorted(((int(seed), path) for seed, path in found if seed.isdecimal()), reverse=True)
    seed, first = min(runs, key=lambda run: run[0], default=(0, None))
    return read_run(first, f"{arm}, seed{seed}") if first else None
