"""Generated images of runs: a slider per run over its grids, beside the real images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.image_files import BrokenImageError
from dnnlib.images import MAX_IMAGE_BYTES, open_image
from dnnlib.util import read_regular
from reporting.charts import colour_of_run
from reporting.markup import Html, Section, element, figure, run_label
from reporting.run_reader import Curve, Grid, Run

MAX_SIDE = 768  # longer side of a grid in the page, in pixels
SWITCH = (
    '<p class="switch"><label hidden><input type="checkbox" id="link" checked> '
    "Link the sliders: each run shows its images nearest to the chosen kimg.</label></p>"
)


def image_section(runs: Sequence[Run], max_images: int) -> Section:
    """Return the images of all runs: at most `max_images` grids in all, but at least two per run."""
    per_run = max(max_images // max(len(runs), 1), 2)
    cards = [_grids(runs, i, per_run) for i in range(len(runs))]
    switch = SWITCH if len(runs) > 1 else ""
    body = "\n".join([switch, '<div class="runs">', *_real_images(runs), *cards, "</div>"])
    return Section("images", "Generated images", body)


def _real_images(runs: Sequence[Run]) -> list[Html]:
    """Return a card for each distinct grid of real images; with several grids, the caption names the runs."""
    names: dict[str, list[str]] = {}
    for run in runs:
        uri = thumbnail_uri(run.reals, run.problems) if run.reals else None
        if uri:
            names.setdefault(uri, []).append(run.name)
    cards = []
    for uri, some in names.items():
        owners = ", ".join(some)
        image = figure(uri, "reals.png" if len(names) == 1 else owners, f"{owners}: real images")
        cards.append(element("div", Html(element("h3", "Real images") + image), "card"))
    return cards


def _grids(runs: Sequence[Run], i: int, count: int) -> Html:
    """Return a slider over at most `count` grids of the i-th run. Without scripts, all grids are stacked."""
    run, frames = runs[i], []
    for grid in _evenly_spaced(run.grids, count):
        uri = thumbnail_uri(grid.path, run.problems)
        if uri:
            caption, alt = f"kimg {grid.kimg:g}, {grid.path.name}", f"{run.name}: generated at kimg {grid.kimg:g}"
            seconds = _seconds_at(grid.kimg, run.ticks.get("Timing/total_sec"))
            frames.append(figure(uri, caption, alt, **{"data-kimg": f"{grid.kimg:g}", "data-seconds": seconds}))
    title = element("h3", run_label(runs, i))
    if not frames:
        return element("div", Html(f"{title}<p>No image grids yet; the next snapshot adds them.</p>"), "card")
    controls = ""
    if len(frames) > 1:
        last, name = len(frames) - 1, escape(run.name)
        controls = (
            f'<div class="controls" hidden><button type="button" aria-label="Play the images of {name}">Play</button>'
            f'<input type="range" min="0" max="{last}" value="{last}" aria-label="kimg of the images of {name}"></div>'
        )
    content = Html(f"{title}<div>{''.join(frames)}</div>{controls}")
    return element("div", content, "card frames", **{"data-colour": colour_of_run(i, len(runs))})


def _seconds_at(kimg: float, clock: Curve | None) -> str:
    """Return the training time at a kimg as the value of an attribute; "" if unknown."""
    known = clock.finite() if clock else None
    if known is None or not len(known.kimg):
        return ""
    seconds = float(np.interp(kimg, known.kimg, known.values, left=math.nan, right=math.nan))
    return f"{seconds:.6g}" if math.isfinite(seconds) else ""


def _evenly_spaced(items: Sequence[Grid], count: int) -> list[Grid]:
    """Select at most `count` evenly spaced items, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def thumbnail_uri(path: Path, problems: list[str]) -> str | None:
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
