"""State of a run, and the time that the rest of it takes at the pace of its latest ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dnnlib.util import format_time
from reporting.run_reader import Run, is_number

MIN_TICKS = 20  # over which the pace is measured, if the run has as many
OVERDUE = 3  # a run has probably stopped after this multiple of the longest interval between the latest ticks

State = Literal["done", "stopped", "failed", "overdue", "running"]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds per kimg over the latest ticks, including metrics and saving but not the time between two starts.

    `ticks` is a whole number of intervals between snapshots, after which most metrics are computed, unless the run has
    fewer ticks. `interval` is the longest time between two of these ticks in seconds. Unknown values are nan.
    """

    seconds_per_kimg: float
    ticks: int
    interval: float


def measure_pace(run: Run) -> Pace:
    """Return the pace of the latest ticks of a run."""
    clock = run.ticks["Timing/total_sec"].finite() if "Timing/total_sec" in run.ticks else None
    known = len(clock.kimg) - 1 if clock else 0
    if clock is None or known < 1:
        return Pace(seconds_per_kimg=math.nan, ticks=0, interval=math.nan)
    options = run.options.get("run")
    every = options.get("snapshot_ticks") if isinstance(options, dict) else None
    period = max(int(every), 1) if is_number(every, 1e9) else 1
    ticks = period * -(-MIN_TICKS // period)
    ticks = min(ticks, known - known % period or known)
    kimg, seconds = (float(x[-1] - x[-1 - ticks]) for x in (clock.kimg, clock.values))
    pace = seconds / kimg if kimg > 0 and seconds > 0 else math.nan
    return Pace(seconds_per_kimg=pace, ticks=ticks, interval=float(np.diff(clock.values[-1 - ticks :]).max()))


def kimg_left(run: Run) -> float:
    """Return the kimg from the last tick to the end of the run; nan if unknown."""
    left = run.total_kimg - run.last("Progress/kimg")
    return 0.0 if left < 5e-4 else left  # half an image


def state_of(run: Run, now: float) -> State:
    """Return the state of a run at a time in seconds since 1970, from the end of its log and its last tick."""
    if run.log and run.log.outcome:
        return run.log.outcome
    if kimg_left(run) == 0:
        return "done"
    age = now - run.last("timestamp")
    return "overdue" if age > OVERDUE * measure_pace(run).interval else "running"


def describe_state(run: Run, now: float) -> str:
    """Return the state of a run in words."""
    age = now - run.last("timestamp")
    is_known = 0 <= age < math.inf
    return {
        "done": "done",
        "stopped": "stopped",
        "failed": "ended with an error",
        "overdue": f"no tick for {format_time(age)}" if is_known else "not done",
        "running": f"last tick {format_time(age)} ago" if is_known else "not done",
    }[state_of(run, now)]
