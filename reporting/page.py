"""Self-contained HTML page of runs: overview, health, options, images over time, curves. No remote resources."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from dnnlib.util import counted, format_time
from metrics.registry import COMPARABLE
from reporting.chart_section import chart_section
from reporting.charts import higher_is_better, index_of_best
from reporting.drawing import RenderedChart
from reporting.health_section import count_findings, health_section
from reporting.image_section import image_section
from reporting.markup import Html, Section, date, element, fill_template, number, run_label, table
from reporting.memorisation_section import memorisation_section
from reporting.option_section import all_options, differing_options
from reporting.run_reader import Run
from reporting.time_left import describe_state, kimg_left, measure_pace, state_of

PACE_NOTE = (
    "Pace: training time per kimg over the latest recorded ticks, including metrics and saving, without the time "
    "between two starts. A run ends at this time if it keeps its pace."
)
MAX_STARTS, MAX_COLUMNS = 50, 30  # starts shown per run, and columns of the environment table


def build_page(runs: Sequence[Run], charts: Iterable[RenderedChart], max_images: int) -> str:
    """Return the page, with at most `max_images` grids over all runs, but at least two per run."""
    now = time.time()
    images = image_section(runs, max_images)  # before the health section, which lists images that cannot be read
    sections = [
        Section("overview", "Overview", _overview(runs, now) + _time_left(runs, now)),
        health_section(runs),
        Section("options", "Options that differ", differing_options(runs) if len(runs) > 1 else ""),
        images,
        chart_section(charts),
        memorisation_section(runs),
        Section("configuration", "All options", "\n".join(map(all_options, runs))),
        Section("environment", "Environment", _environments(runs)),
    ]
    return fill_template(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", sections, now)


def _overview(runs: Sequence[Run], now: float) -> Html:
    """Return the table of runs: state, progress, speed, and best and last metrics."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    heads = [head for name in metrics for head in (f"{name}, best", "last")]
    rows = [["run", "state", "kimg", *heads, "training time", "sec/kimg", "p", "last tick"]]
    best = {name: _best_run(name, runs) for name in metrics}
    for i, run in enumerate(runs):
        seconds = run.last("Timing/total_sec")
        rows.append(
            [
                run_label(runs, i),
                _state(run, now),
                f"{number(run.last('Progress/kimg'), 6)} of {number(run.total_kimg, 6)}",
                *(cell for name in metrics for cell in _best_and_last(name, run, is_best=run is best[name])),
                format_time(seconds) if math.isfinite(seconds) else "?",
                number(run.last("Timing/sec_per_kimg")),
                number(run.last("Progress/augment")),
                date(run.last("timestamp")),
            ]
        )
    return table(rows, "overview")


def _state(run: Run, now: float) -> Html:
    """Return the state of a run, a bar with the done share of its kimg, and the number of its warnings."""
    state = element("span", describe_state(run, now), f"badge {state_of(run, now)}")
    share = run.last("Progress/kimg") / run.total_kimg if run.total_kimg > 0 else math.nan
    bar = element("span", "", style=f"width: {100 * min(share, 1):.0f}%") if math.isfinite(share) else Html()
    count = count_findings(run)
    link = element("a", counted(count, "warning"), "badge alarm", href="#health") if count else Html()
    return Html(state + link + element("span", bar, "bar"))


def _best_run(metric: str, runs: Sequence[Run]) -> Run | None:
    """Return the run with the best value of a metric; None unless several runs have comparable values."""
    having = [(run, run.metrics[metric]) for run in runs if metric in run.metrics]
    higher = higher_is_better(metric)
    origins = [[curve.origin.get(key) for key in COMPARABLE] for _, curve in having]
    if higher is None or len(having) < 2 or any(origin != origins[0] for origin in origins):
        return None
    return (max if higher else min)(having, key=lambda item: item[1].values[index_of_best(item[1], higher=higher)])[0]


def _best_and_last(metric: str, run: Run, *, is_best: bool) -> tuple[str, str]:
    """Return the best value, "" if the metric is unknown or has no better direction, and the last value."""
    curve = run.metrics.get(metric)
    if curve is None:
        return "", ""
    last = f"{curve.values[-1]:.5g}"
    higher = higher_is_better(metric)
    if higher is None:
        return "", last
    best = index_of_best(curve, higher=higher)
    text = f"{curve.values[best]:.5g} at {curve.kimg[best]:g} kimg"
    return element("strong", text, "best") if is_best else text, last


def _time_left(runs: Sequence[Run], now: float) -> str:
    """Return the table of the time that unfinished runs still need; "" if all runs are done."""
    if all(state_of(run, now) == "done" for run in runs):
        return ""
    rows: list[list[str]] = [["run", "kimg left", "pace", "measured over", "time left", "end"]]
    for i, run in enumerate(runs):
        state, left, pace = state_of(run, now), kimg_left(run), measure_pace(run)
        if state == "done":
            rows.append([run_label(runs, i), "0", "", "", "", "done"])
            continue
        seconds = left * pace.seconds_per_kimg
        needs = format_time(seconds) if math.isfinite(seconds) else "?"
        end = date(run.last("timestamp") + seconds) if state == "running" else describe_state(run, now)
        speed = f"{number(pace.seconds_per_kimg)} sec/kimg"
        rows.append([run_label(runs, i), number(left, 6), speed, counted(pace.ticks, "tick"), needs, end])
    return f"<h3>Time left</h3>\n{table(rows, 'overview')}{element('p', PACE_NOTE, 'quiet')}"


def _environments(runs: Sequence[Run]) -> str:
    """Return the table of environments: software and hardware at each start of each run."""
    starts = [(run.name, start) for run in runs for start in run.starts[-MAX_STARTS:]]
    names = list(dict.fromkeys(name for _, start in starts for name in start))[:MAX_COLUMNS]
    rows = [["run", *names]]
    rows += [[run, *(_text_or_unknown(start.get(name, "")) for name in names)] for run, start in starts]
    return table(rows) if len(rows) > 1 else ""


def _text_or_unknown(value: object) -> str:
    return "?" if value is None else str(value)
