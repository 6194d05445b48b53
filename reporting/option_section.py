"""Options of runs: a table of those that differ, and all options of each run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from reporting.markup import Html, element, run_label, table
from reporting.run_reader import Run

MISSING = object()
LONG = 100  # characters of a value that is shown in a box of its own


def differing_options(runs: Sequence[Run]) -> Html:
    """Return a table of the options that differ between runs, grouped, with marks where they differ from the first."""
    flat = [dict(flatten_options(run.options)) for run in runs]
    names = list(dict.fromkeys(name for options in flat for name in options))
    differing = [
        name for name in names if any(options.get(name, MISSING) != flat[0].get(name, MISSING) for options in flat)
    ]
    equal = len(names) - len(differing)
    if not differing:
        return element("p", f"All {equal} options are equal in these {len(runs)} runs.", "card")
    heads = [run_label(runs, i) for i in range(len(runs))]
    rows: list[Sequence[str]] = [["option", *heads]]
    for group, members in groupby(sorted(differing, key=_group), key=_group):
        rows.append([group or "general"])
        rows += [[name, *_values([options.get(name, MISSING) for options in flat])] for name in members]
    note = f"Marked values differ from those of {runs[0].name}. The other {equal} options are equal in all runs."
    return Html(table(rows, "options") + element("p", note, "quiet"))


def _group(name: str) -> str:
    return name.rpartition(".")[0].partition(".")[0]


def _values(values: Sequence[object]) -> list[Html]:
    """Return the values of an option in all runs; those that differ from the first are marked."""
    texts = map(_value, values)
    tags = ["span" if value == values[0] else "mark" for value in values]
    return [element(tag, text, "long" if len(text) > LONG else "") for tag, text in zip(tags, texts, strict=True)]


def _value(value: object) -> str:
    """Return a value as text: a word as it is, anything else as JSON."""
    if value is MISSING:
        return "(no such option)"
    return value if isinstance(value, str) and value else json.dumps(value)


def flatten_options(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every option."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from flatten_options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def all_options(run: Run) -> Html:
    """Return all options of a run as JSON, folded."""
    summary = element("summary", f"{run.name}: all options")
    return element("details", Html(summary + element("pre", json.dumps(run.options, indent=2))), "card")
