"""Tables of a laboratory: every arm with all seeds, and every comparison with its intervals."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence

from reporting.laboratory import AXES, SCREENING_CONFIDENCE, SEEDS, STAGES, Comparison, Laboratory, Stage, Values

Table = list[list[str]]  # rows of cells; the first row is the head
NOTES: dict[Stage, str] = {
    "screen": f"; promising: the {100 * SCREENING_CONFIDENCE:.0f} % interval excludes 0",
    "confirm": "",
}
HEAD = ["arm", "values by seed", "mean ± deviation", "minutes", "against", "at equal kimg", "at equal minutes"]


def arms_table(laboratory: Laboratory) -> Table:
    """Return the options of every arm."""
    question = laboratory.question
    rows = [[name, arm.options] for name, arm in question.arms.items()]
    return [["arm", "options of train.py"], ["all", question.base], *rows]


def result_tables(laboratory: Laboratory) -> Iterator[tuple[str, Table]]:
    """Yield a title and a table for each metric and stage that has results."""
    for metric in laboratory.question.metrics:
        for stage in STAGES:
            rows = list(_results(laboratory, metric, stage))
            if rows:
                seeds = ", ".join(map(str, laboratory.question.seeds[stage]))
                yield (
                    f"{metric} at {laboratory.question.evaluate[-1]} kimg, {SEEDS[stage]} {seeds}{NOTES[stage]}",
                    [HEAD, *rows],
                )


def _results(laboratory: Laboratory, metric: str, stage: Stage) -> Iterator[list[str]]:
    """Yield a row for each arm that has runs, and one more for each further reference."""
    found = {(item.arm, item.against, item.axis): item for item in laboratory.comparisons(metric, [stage])}
    digits = _decimals(laboratory, metric)
    for arm in laboratory.question.arms:
        runs = laboratory.values(arm, metric, stage)
        if not runs:
            continue
        last = [run.values[-1] for run in runs.values()]
        spread = f" ± {statistics.stdev(last):.{digits}f}" if len(last) > 1 else ""
        minutes = statistics.fmean(run.minutes[-1] for run in runs.values())
        values = ", ".join(_with_age(run, digits, laboratory.question.evaluate[-1]) for run in runs.values())
        if len(runs) < (planned := len(laboratory.question.seeds[stage])):
            values += f" ({len(runs)} of {planned} runs)"
        cells = [arm, values, f"{statistics.fmean(last):.{digits}f}{spread}", f"{minutes:.1f}"]
        for against in laboratory.question.references(arm) or [""]:
            compared = [_describe(found.get((arm, against, axis)), digits) if against else "" for axis in AXES]
            yield [*cells, against, *compared]
            cells = ["", "", "", ""]


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
    place = f" at {item.at:.3g} minutes" if item.axis == "minutes" else ""
    return f"{estimate} [{low}, {high}]{place} {item.verdict}"


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
    return re.sub(r"(\]| minutes) (better|worse|promising)", r"\1 **\2**", text)


def _escape(cell: str) -> str:
    """Escape what would end a cell or a row."""
    return cell.replace("|", r"\|").replace("\n", " ")
