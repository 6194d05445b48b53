"""Health of runs: warnings of their logs with the values of the tick, skipped updates, and unreadable files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from dnnlib.util import counted
from reporting.log_reader import LogWarning
from reporting.markup import Html, Section, element, number, run_label, table
from reporting.run_reader import Run

HEAD = ("kimg", "warning", "what to do", "values at its first tick")
SYMPTOMS = {  # statistics that show how training fails, with their labels
    "Loss/scores/real": "logits: real",
    "Loss/scores/fake": "fake",
    "Loss/signs/real": "signs: real",
    "Loss/signs/fake": "fake",
    "Loss/D/loss": "loss of D:",
    "Images/diversity": "diversity:",
    "Progress/augment": "p:",
}
FLAG = re.compile(r"--[a-z][a-z-]*(=\w+)?")
SKIPPED = (
    "raise --gamma, lower --glr and --dlr, or use --precision=fp32",
    "docs/troubleshooting.md",
    "Non-finite values",
)


def health_section(runs: Sequence[Run]) -> Section:
    """Return a table of everything that went wrong in the runs, and the runs of which nothing is recorded."""
    rows: list[Sequence[str]] = [HEAD]
    well, unknown = [], []
    for i, run in enumerate(runs):
        found = list(_findings(run))
        if found and len(runs) > 1:
            rows.append([run_label(runs, i)])
        rows += found
        if run.log is None:
            unknown.append(run.name)
        elif not found:
            well.append(run.name)
    notes = [f"No warning was recorded: {', '.join(well)}."] if well else []
    notes += [f"Warnings are unknown, because log.txt cannot be read: {', '.join(unknown)}."] if unknown else []
    body = table(rows, "prose") if len(rows) > 1 else ""
    return Section("health", "Health", body + "".join(element("p", note, "card") for note in notes))


def count_findings(run: Run) -> int:
    """Return the number of rows of a run in the table."""
    return len(list(_findings(run)))


def _findings(run: Run) -> Iterator[Sequence[str]]:
    """Yield a row for each problem: unreadable files, skipped updates by phase, then warnings of the log."""
    for problem in run.problems:
        yield "", element("span", problem, "finding"), "", ""
    for statistic, curve in run.ticks.items():
        bad = curve.kimg[curve.values > 0]
        if statistic.startswith("Skipped/") and len(bad):
            phase = statistic.removeprefix("Skipped/")
            finding = f"{curve.values.sum():.0f} updates of {phase} skipped in {len(bad)} of {len(curve.kimg)} ticks: "
            text = element("span", f"{finding}values were not finite", "finding")
            yield _kimg(bad[0], bad[-1]), text, _remedy(*SKIPPED), ""
    if run.log and run.log.earlier:
        yield "", element("span", f"log.txt has {counted(run.log.earlier, 'earlier warning')}", "finding"), "", ""
    for warning in run.log.warnings if run.log else ():
        yield _row(warning, run)


def _row(warning: LogWarning, run: Run) -> Sequence[str]:
    """Return the row of a warning of the log. Warnings about failing training have a remedy, and values."""
    kimg, advice = _kimg(warning.first_kimg, warning.last_kimg), warning.advice
    count = f" ({warning.count} times)" if warning.count > 1 else ""
    text = element("span", (advice["finding"] if advice else warning.text) + count, "finding")
    if advice is None:
        return kimg, text, "", ""
    return kimg, text, _remedy(advice["remedy"], advice["page"], advice["heading"]), _symptoms(run, warning.first_kimg)


def _remedy(text: str | None, page: str, heading: str) -> Html:
    """Return a remedy, whose flags do not break across lines, and its place in the documentation."""
    place = element("span", f"{page}, “{heading}”", "quiet")
    if not text:
        return place
    return Html(FLAG.sub(r"<code>\g<0></code>", escape(text)) + f". {place}")


def _kimg(first: float, last: float) -> Html:
    """Return the first and the last kimg as links that the script turns into marks in the charts."""
    known = [kimg for kimg in dict.fromkeys((first, last)) if math.isfinite(kimg)]
    links = (element("a", f"{kimg:g}", href="#curves", **{"data-kimg": f"{kimg:g}"}) for kimg in known)
    return Html(" to ".join(links))


def _symptoms(run: Run, kimg: float) -> str:
    """Return the values of SYMPTOMS at the tick of this kimg, which the log rounds to six digits."""
    parts = []
    for statistic, label in SYMPTOMS.items():
        if curve := run.ticks.get(statistic):
            found = curve.values[np.isclose(curve.kimg, kimg, rtol=5e-6, atol=0)]
            parts += [f"{label} {number(value, 3)}" for value in found[np.isfinite(found)]]
    return ", ".join(parts)
