"""Tables of a laboratory: every arm with all seeds, and every comparison with its intervals."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence

from reporting.laboratory import SEEDS, STAGES, Comparison, Laboratory, Stage

Table = list[list[str]]  # rows of cells; the first row is the head
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
                yield f"{metric} at {laboratory.question.evaluate[-1]} kimg, {SEEDS[stage]} {seeds}", [HEAD, *rows]


def _results(laboratory: Laboratory, metric: str, stage: Stage) -> Iterator[list[str]]:
    """Yield a row for each arm that has runs, and one more for each further reference."""
    found = {(item.arm, item.against, item.axis): item for item in laboratory.comparisons(metric, [stage])}
    for arm in laboratory.question.arms:
        runs = laboratory.values(arm, metric, stage)
        if not runs:
            continue
        last = [run.values[-1] for run in runs.values()]
        spread = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        minutes = statistics.fmean(run.minutes[-1] for run in runs.values())
        cells = [arm, ", ".join(f"{x:.2f}" for x in last), f"{statistics.fmean(last):.2f}{spread}", f"{minutes:.1f}"]
        for against in laboratory.question.references(arm) or [""]:
            yield [*cells, against, *(_describe(found.get((arm, against, axis))) for axis in ("kimg", "minutes"))]
            cells = ["", "", "", ""]


def _describe(item: Comparison | None) -> str:
    """Return the difference of means, its interval and the verdict."""
    if item is None:
        return ""
    low, estimate, high = item.interval.low, item.interval.estimate, item.interval.high
    return f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}] {item.verdict}"


def to_markdown(laboratory: Laboratory) -> str:
    """Return all tables in Markdown, with bold verdicts if they are not neutral."""
    arms = [[name, f"`{options}`" if options else ""] for name, options in arms_table(laboratory)[1:]]
    parts = [_to_markdown([["arm", "options of train.py"], *arms])]
    for title, rows in result_tables(laboratory):
        parts += [f"**{title}**", _to_markdown(rows)]
    return "\n\n".join(parts) + "\n"


def _to_markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return re.sub(r"\] (better|worse|promising)", r"] **\1**", text)
