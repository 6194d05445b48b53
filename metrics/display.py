"""Progress line with the remaining time, the table of results, and the description of a metric."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from dnnlib.util import format_time, redraw
from metrics.detectors import DetectorSetup
from metrics.registry import HOLDOUT_VALUES, STANDARD, MetricSpec
from metrics.sampling import Pass, Progress
from torch_utils import distributed

ANNOUNCED = 60.0  # seconds; metrics that take longer are announced
MEASURED = 3.0  # seconds after the first batch until the speed is measured
WARM_UP = 20.0  # seconds; a first batch that takes longer measures the speed too

EQUAL_NUMBERS = "_train and _holdout compare with equal numbers of training and held-out images"

Record = dict[str, Any]  # as registry.result_to_json returns it


class PassSpeed:
    """Speed of a pass, measured after the first batch, whose time includes loading and warming up."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: tuple[float, int] | None = None  # time and number of items at the end of the first batch

    def seconds_left(self, done: int, total: int) -> float | None:
        """Return the estimated time left after `done` of `total` items; None if the speed is not measured yet."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        then, first = self.first
        if now - then >= MEASURED:
            return (now - then) / (done - first) * (total - done)
        if then - self.start >= WARM_UP:
            return (then - self.start) / first * (total - done)
        return None


class ProgressLine(Progress):
    """Progress on stderr: images done in the shard of rank 0, and the estimated time left.

    Metrics that take over a minute are announced with their passes as soon as the speed of the first one is measured.
    """

    def __init__(self) -> None:
        self.plan("", ())
        self.speed, self.shown = PassSpeed(), self.start

    def plan(self, metrics: str, passes: Sequence[Pass]) -> None:
        self.metrics, self.passes, self.start = metrics, passes, time.monotonic()
        self.number, self.is_announced = 0, False  # the current pass

    def __call__(self, name: str, done: int, total: int) -> None:
        if not distributed.is_main():
            return
        now, on_screen = time.monotonic(), sys.stderr.isatty()
        if done == 0:
            self.speed, self.shown, self.number = PassSpeed(), now, self.number + 1
            return
        text = f"{name}: {done} of {total}"
        if done == total:
            _print(text)
            return
        left = self.speed.seconds_left(done, total)
        if left is not None and not self.is_announced and now - self.start + left > ANNOUNCED:
            self._announce(name, total, now - self.speed.start + left)
        if now - self.shown > (0.5 if on_screen else 30):
            self.shown = now
            text += "" if left is None else f", {format_time(left)} left"
            if on_screen:
                redraw(text, sys.stderr)
            else:
                _print(text)

    def _announce(self, name: str, total: int, seconds: float) -> None:
        """Print the passes of the metrics, if they are known, and the estimated duration of the current one."""
        self.is_announced = True
        passes = "; ".join(f"{number:,} {items}" for items, number in self.passes)
        count = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        task = f"{count} ({passes}), pass {self.number} takes" if passes else f"a pass over {total:,} {name} takes"
        _print(f"{self.metrics}: {task} about {format_time(seconds)}")


def _print(line: str) -> None:
    """Print a line on stderr, in place of a redrawn line if there is one."""
    if sys.stderr.isatty():
        redraw("", sys.stderr)
    print(line, file=sys.stderr, flush=True)


def to_table(records: Sequence[Record]) -> str:
    """Return a table with one row per value (network, kimg, metric, value), then each protocol with its metrics."""
    rows = [("network", "kimg", "metric", "value")]
    for record in records:
        kimg = "" if record["kimg"] is None else f"{record['kimg']:g}"
        rows += [(record["snapshot"], kimg, name, f"{value:.5g}") for name, value in record["results"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
    metrics: dict[str, list[str]] = {}  # by protocol
    for record in records:
        names = metrics.setdefault(_origin(record), [])
        names += [record["metric"]] if record["metric"] not in names else []
    return "\n".join([*lines, *(f"{', '.join(names)}: {origin}" for origin, names in metrics.items())])


def _origin(record: Record) -> str:
    """Return the detector, the protocol, and a note if flipped reals are included."""
    detector = f"{record['detector']}, sha256 {record['detector_sha256'][:8]}; " if record["detector"] else ""
    flips = "; flips counted" if record["mirror"] else ""
    return f"{detector}{record['protocol']}{flips}"


def describe(spec: MetricSpec, setup: DetectorSetup = STANDARD) -> list[tuple[str, str]]:
    """Return (heading, text) of everything that a user should know about a metric, in the order of reading."""

    def name_of(suffix: str) -> str:
        return f"{spec.pattern}{spec.library_suffix}{suffix}"

    flips = "counted among the reals with --mirror" if spec.counts_flips else "never counted among the reals"
    needs, missing = "; ".join(map(setup.needs, spec.roles)), spec.missing(setup)
    directed = [suffix for suffix in spec.values if spec.is_higher_better(suffix) is not None]
    better = f"{'higher' if spec.higher_is_better else 'lower'} values"
    better += f" of {', '.join(map(name_of, directed))}" if 0 < len(directed) < len(spec.values) else ""
    rows = [
        ("measures", spec.help),
        ("note", spec.note),
        ("status", "no result of a network: only reals are compared" if spec.is_floor else ""),
        ("better", better if directed else ""),
        ("values", ", ".join(map(name_of, spec.values))),
        ("curves", " against ".join(reversed(spec.axes or ()))),
        ("--holdout", EQUAL_NUMBERS if set(HOLDOUT_VALUES) <= set(spec.values) else ""),
        ("protocol", spec.protocol),
        ("--protocol=clean", spec.clean or ""),
        ("detector", "; ".join(map(setup.describe, spec.roles)) or "none"),
        ("needs", needs or ("" if missing else "nothing")),
        ("missing", missing or ""),
        ("flips", flips),
        ("paper", spec.paper),
    ]
    return [(heading, text) for heading, text in rows if text]
