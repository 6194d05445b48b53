"""Tables of a laboratory: every arm with all seeds, and every comparison with its intervals."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence

from reporting.laboratory import (
    AXES,
    BASES,
    PLACES,
    SCREENING_CONFIDENCE,
    SEEDS,
    STAGES,
    Basis,
    Comparison,
    Laboratory,
    Stage,
    Values,
)

Table = list[list[str]]  # rows of cells; the first row is the head
NOTES: dict[Stage, str] = {
    "screen": f"; promising: the {100 * SCREENING_CONFIDENCE:.0f} % interval excludes 0",
    "confirm": "",
}


def arms_table(laboratory: Laboratory) -> Table:
    """Return the options of every arm."""
    question = laboratory.question
    rows = [[name, arm.options] for name, arm in question.arms.items()]
    return [["arm", "options of train.py"], ["all", question.base], *rows]


def result_tables(laboratory: Laboratory) -> Iterator[tuple[str, Table]]:
    """Yield a title and a table for each metric and stage that has results.

    Arms of different lengths have a column with their lengths, and one with the comparisons at their ends.
    """
    question = laboratory.question
    axes = AXES if question.has_equal_lengths else BASES
    length = ["kimg"] if "end" in axes else []
    head = ["arm", "values by seed", "mean ± deviation", *length, "minutes", "against", *(PLACES[x] for x in axes)]
    place = "at the end of each run" if "end" in axes else f"at {question.length(question.baseline)} kimg"
    for metric in question.metrics:
        for stage in STAGES:
            rows = list(_results(laboratory, metric, stage, axes))
            if rows:
                seeds = ", ".join(map(str, question.seeds[stage]))
                noise = _noise(laboratory, metric)
                yield f"{metric} {place}{noise}, {SEEDS[stage]} {seeds}{NOTES[stage]}", [head, *rows]


def _noise(laboratory: Laboratory, metric: str) -> str:
    """Return ", random noise" if the images of a metric were generated with it instead of the constant noise."""
    conditions = [trial.metrics[metric].conditions for trial in laboratory.trials if metric in trial.metrics]
    return ", random noise" if conditions and conditions[0].get("noise_mode") == "random" else ""


def _results(laboratory: Laboratory, metric: str, stage: Stage, axes: Sequence[Basis]) -> Iterator[list[str]]:
    """Yield a row for each arm that has runs, and one more for each further reference."""
    question = laboratory.question
    found = {(item.arm, item.against, item.axis): item for item in laboratory.comparisons(metric, [stage])}
    digits = _decimals(laboratory, metric)
    for arm in question.arms:
        runs = laboratory.values(arm, metric, stage)
        if not runs:
            continue
        last = [run.values[-1] for run in runs.values()]
        spread = f" ± {statistics.stdev(last):.{digits}f}" if len(last) > 1 else ""
        minutes = statistics.fmean(run.minutes[-1] for run in runs.values())
        values = ", ".join(_with_age(run, digits, question.length(arm)) for run in runs.values())
        if len(runs) < (planned := len(question.seeds[stage])):
            values += f" ({len(runs)} of {planned} runs)"
        length = [str(question.length(arm))] if "end" in axes else []
        cells = [arm, values, f"{statistics.fmean(last):.{digits}f}{spread}", *length, f"{minutes:.1f}"]
        for against in question.references(arm) or [""]:
            own = question.axes(arm, against) if against else ()
            compared = [_describe(found.get((arm, against, axis)), digits) for axis in own]
            yield [*cells, against, *compared, *[""] * (len(axes) - len(own))]
            cells = [""] * len(cells)


def _with_age(run: Values, digits: int, age: int) -> str:
    """Return the last value of a run, with its age if it is below the given one."""
    return f"{run.values[-1]:.{digits}f}" + (f" (at {run.kimg[-1]:g} kimg)" if run.kimg[-1] < age else "")


def _decimals(laboratory: Laboratory, metric: str) -> int:
    """Return the decimals of a metric: four significant digits of its largest last value, but at least two decimals."""
    last = [abs(trial.metrics[metric].values[-1]) for trial in laboratory.trials if metric in trial.metrics]
    largest = max(last, default=0.0)
    return min(max(2, 3 - math.floor(math.log10(largest))), 12) if largest else 2


def _describe(item: Comparison | None, digits: int) -> str:
    """Return the difference of means, its interval and the verdict."""
    if item is None:
        return "no comparison"
    low, estimate, high = (f"{x:+.{digits}f}" for x in (item.interval.low, item.interval.estimate, item.interval.high))
    places: dict[Basis, str] = {
        "kimg": "",
        "minutes": f" at {item.at:.3g} minutes",
        "end": f" at {item.at:g} and {item.reference_at:g} kimg",
    }
    return f"{estimate} [{low}, {high}]{places[item.axis]} {item.verdict}"


def to_markdown(laboratory: Laboratory) -> str:
    """Return all tables in Markdown, with bold verdicts if they are not neutral."""
    arms = [[name, f"`{options}`" if options else ""] for name, options in arms_table(laboratory)[1:]]
    parts = [_to_markdown([["arm", "options of train.py"], *arms])]
    for title, rows in result_tables(laboratory):
        parts += [f"**{title}**", _to_markdown(rows)]
    return "\n\n".join(parts) + "\n"


def _to_markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    text = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
    return re.sub(r"(\]| minutes| kimg) (better|worse|promising)", r"\1 **\2**", text)


def _escape(cell: str) -> str:
    """Escape what would end a cell or a row."""
    return cell.replace("|", r"\|").replace("\n", " ")
