"""Memorisation: the latest AuthPct, FLD and distances to training and held-out images, with reference values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from metrics import registry
from reporting.markup import Section, element, number, run_label, table
from reporting.run_reader import Curve, Run

# Metric and suffix of a value -> what the value means, and the values to compare with (docs/metrics.md).
REFERENCES = {
    ("authpct<N>", ""): (
        "percentage of authentic images, which are no copies of training images",
        "0 for copies; the goal is the value of held-out images in place of generated ones (62.9 in the example of the "
        "documentation). Images of anything else have 100",
    ),
    ("fld<N>", ""): (
        "feature likelihood divergence; lower is better. It penalises poor images, missing modes and copies",
        "about 0 or slightly below for new real images",
    ),
    ("fld<N>", "_generalisation_gap"): (
        "likelihood of the training images compared with that of held-out images",
        "slightly below 0 without memorisation; far below 0 indicates memorisation",
    ),
}
GAP = (
    "distance to held-out images minus distance to as many training images",
    "near 0 without memorisation; positive if the images are nearer to the training images. A random sample of copies "
    "is not detected",
)
NOTE = 'docs/metrics.md, "Memorisation", describes these values. They are those of the last evaluation.'


def memorisation_section(runs: Sequence[Run]) -> Section:
    """Return a table of the values that detect copies of training images; empty if none was computed."""
    rows: list[Sequence[str]] = [["name", "value", "meaning", "reference"]]
    for i, run in enumerate(runs):
        found = [row for curve in run.metrics.values() for row in _values(curve)]
        if found and len(runs) > 1:
            rows.append([run_label(runs, i)])
        rows += found
    body = table(rows, "prose") + element("p", NOTE, "quiet") if len(rows) > 1 else ""
    return Section("memorisation", "Memorisation", body)


def _values(curve: Curve) -> Iterator[Sequence[str]]:
    """Yield name, value with its kimg, meaning and reference of each value that detects memorisation."""
    at = f" at {curve.kimg[-1]:g} kimg"
    train, holdout = registry.HOLDOUT_VALUES
    for name, value in curve.last.items():
        spec, suffix = registry.find_recorded(name) or (None, "")
        known = REFERENCES.get((spec.pattern.removesuffix("_dinov2"), suffix)) if spec else None
        if known:
            yield name, number(value) + at, *known
        other = curve.last.get(name.removesuffix(holdout) + train)
        if suffix == holdout and other is not None:
            yield f"{name} minus {train}", number(value - other) + at, *GAP
