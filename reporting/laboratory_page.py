"""HTML page of a laboratory: charts, tables of all comparisons, and images of one run of each arm."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from pathlib import Path

from reporting.health_section import health_section
from reporting.image_section import image_section
from reporting.laboratory import Laboratory
from reporting.laboratory_table import arms_table, result_tables
from reporting.markup import Html, Section, element, fill_template, table
from reporting.run_reader import Run, is_run, read_run

CAPTION = (
    "Above: differences of means with Welch's 95 % intervals. An arm is better, or worse, if the interval of its fresh "
    "seeds excludes 0. Below: thin lines are runs, strong lines their mean, bands one standard deviation, of the fresh "
    "seeds if there are any."
)
SHOWN = "Of each arm the newest run with the lowest seed is shown."


def build_laboratory_page(laboratory: Laboratory, charts: Mapping[str, str], folder: Path, max_images: int) -> str:
    """Return the page, with an SVG for each metric, and the images of the runs in the folder of the laboratory."""
    tables = [f"<h3>{escape(title)}</h3>\n{table(rows)}" for title, rows in result_tables(laboratory)]
    runs = list(filter(None, (first_run(folder, arm) for arm in laboratory.question.arms)))
    sections = [
        Section("comparisons", "Comparisons", "\n".join(_chart(metric, svg) for metric, svg in charts.items())),
        Section("results", "Results", "\n".join(tables)),
        Section("arms", "Arms", table(arms_table(laboratory))),
    ]
    if runs:
        images = image_section(runs, max_images)
        health = health_section(runs)
        note = element("p", SHOWN, "quiet")
        sections += [Section(part.name, part.title, note + part.body) for part in (images, health)]
    return fill_template(laboratory.question.question, sections, time.time())


def _chart(metric: str, svg: str) -> Html:
    """Return the chart of a metric as a card."""
    drawing = element("div", Html(svg), "drawing", role="img", **{"aria-label": f"Comparison of the arms by {metric}"})
    image = element("figure", Html(drawing + element("figcaption", CAPTION)))
    return element("div", Html(element("h3", metric) + image), "card")


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
