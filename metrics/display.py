"""Progress line with the remaining time, the table of results, and the description of a metric."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from dnnlib.util import format_time, redraw
from metrics.detectors import DetectorSetup
from metrics.registry import STANDARD, MetricSpec
from torch_utils import distributed

Record = dict[str, Any]  # as registry.result_to_json returns it


class ProgressLine:
    """Progress on stderr: images done in the shard of rank 0, and the estimated time left."""

    def __init__(self) -> None:
        self.name, self.start, self.shown = "", 0.0, 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        if not distributed.is_main():
            return
        now, on_screen = time.monotonic(), sys.stderr.isatty()
        if name != self.name:
            self.name, self.start, self.shown = name, now, now
        text = f"{name}: {done} of {total}"
        if done == total:
            self.name = ""
            if on_screen:
                redraw("", sys.stderr)
            print(text, file=sys.stderr, flush=True)
        elif now - self.shown > (0.5 if on_screen else 30):
            self.shown = now
            text += f", {format_time((now - self.start) * (total - done) / done)} left"
            if on_screen:
                redraw(text, sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)


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
    flips = "counted among the reals with --mirror" if spec.counts_flips else "never counted among the reals"
    needs, missing = "; ".join(map(setup.needs, spec.roles)), spec.missing(setup)
    rows = [
        ("measures", spec.help),
        ("note", spec.note),
        ("status", "no result of a network: only reals are compared" if spec.is_floor else ""),
        ("better", f"{'higher' if spec.higher_is_better else 'lower'} values" if not spec.is_floor else ""),
        ("values", ", ".join(f"{spec.pattern}{spec.library_suffix}{suffix}" for suffix in spec.values)),
        ("protocol", spec.protocol),
        ("--protocol=clean", spec.clean or ""),
        ("detector", "; ".join(map(setup.describe, spec.roles)) or "none"),
        ("needs", needs or ("" if missing else "nothing")),
        ("missing", missing or ""),
        ("flips", flips),
        ("paper", spec.paper),
    ]
    return [(heading, text) for heading, text in rows if text]
