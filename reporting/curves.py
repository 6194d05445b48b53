"""Charts of the curves that a metric computes for the real and the generated images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from metrics import registry
from reporting.charts import line_colour
from reporting.drawing import escape_text

REAL = "#000000"


def draw_curves(records: Sequence[dict[str, Any]]) -> bytes:
    """Draw the curves of records of one metric as PNG: those of the reals and fakes, and their difference."""
    from matplotlib.figure import Figure

    name = records[0]["metric"]
    found = registry.find_recorded(name)
    assert found is not None
    assert found[0].axes is not None
    x_label, y_label = found[0].axes
    rows = -(-(len(records) + 1) // 4)
    figure = Figure(figsize=(11, 3.8 + 0.2 * rows), layout="constrained")
    figure.suptitle(f"Metric {name}: {found[0].help}", x=0.01, ha="left", fontsize=12)
    both, difference = figure.subplots(1, 2)
    x, real, _ = records[-1]["curves"].values()
    both.plot(x, real, color=REAL, linewidth=2, label="real images")
    difference.axhline(0, color=REAL, linewidth=2)
    for i, record in enumerate(records):
        x, real, fake = record["curves"].values()
        style: dict[str, Any] = {"color": line_colour(i, len(records)), "linewidth": 1.4}
        both.plot(x, fake, label=escape_text(_label(record)), **style)
        difference.plot(x, [b - a for a, b in zip(real, fake, strict=True)], **style)
    both.set(xlabel=x_label, ylabel=y_label)
    difference.set(xlabel=x_label, ylabel=f"{y_label}, generated minus real")
    for axes in (both, difference):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=4, fontsize=8, frameon=False, handlelength=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _label(record: dict[str, Any]) -> str:
    """Return the training length or the file name of a record's network, and the main value."""
    network = record["snapshot"] if record["kimg"] is None else f"{record['kimg']:g} kimg"
    return f"generated, {network}: {next(iter(record['results'].values())):.3g}"
