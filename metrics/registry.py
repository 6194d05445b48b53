"""The metrics by name: what each needs and means, how one is computed, and the JSON line that records a result.

A metric is one file in this folder with one decorated function; `metrics/__init__.py` imports every file here:

    @register_metric("fid<N>_full", help=..., protocol=..., paper=..., needs=...)
    def fid(context: MetricContext, name: str, count: int | None) -> Measurement: ...
"""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dnnlib
from dnnlib.config import UserError
from metrics.sampling import MetricContext


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a metric function returns: numbers by name, the first one under the metric's own, and what went in."""

    values: dict[str, float]
    num_real: int
    num_fake: int


MetricFunction = Callable[[MetricContext, str, int | None], Measurement]


def _nothing() -> None:
    """Report nothing missing."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One family of metrics. `<N>` in the pattern is a count (`500`, `5k`, or left out for the usual one).

    `needs` is called before anything is generated and returns what is missing and the remedy, or None.
    """

    pattern: str
    function: MetricFunction
    help: str
    protocol: str
    paper: str
    needs: Callable[[], str | None] = _nothing

    def match(self, name: str) -> re.Match[str] | None:
        """Return the match of a metric's name, with the count in group 'N' where the pattern has one."""
        count = r"(?P<N>[1-9]\d*k?)?"
        return re.fullmatch(re.escape(self.pattern).replace(re.escape("<N>"), count), name)


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """One metric's numbers together with everything that they depend on, apart from the network and the data."""

    metric: str
    results: dict[str, float]
    seconds: float
    num_real: int
    num_fake: int
    seed: int
    truncation_psi: float
    noise_mode: str
    protocol: str


_METRICS: dict[str, MetricSpec] = {}


def register_metric(
    pattern: str, *, help: str, protocol: str, paper: str, needs: Callable[[], str | None] = _nothing
) -> Callable[[MetricFunction], MetricFunction]:
    """Register the decorated function as the metric `pattern`; see MetricSpec for the arguments."""

    def register(function: MetricFunction) -> MetricFunction:
        assert pattern not in _METRICS, f"metric {pattern} is registered twice"
        _METRICS[pattern] = MetricSpec(
            pattern=pattern, function=function, help=help, protocol=protocol, paper=paper, needs=needs
        )
        return function

    return register


def registered_metrics() -> tuple[MetricSpec, ...]:
    """Return every metric, in the order of their patterns."""
    return tuple(_METRICS[pattern] for pattern in sorted(_METRICS))


def find(name: str) -> tuple[MetricSpec, int | None]:
    """Return the metric that a name asks for and the count in it. Raises UserError for an unknown name."""
    for spec in registered_metrics():
        match = spec.match(name)
        if match:
            count = match.groupdict().get("N")
            return spec, int(count.replace("k", "000")) if count else None
    patterns = [spec.pattern for spec in registered_metrics()]
    close = difflib.get_close_matches(name, [pattern.replace("<N>", "") for pattern in patterns] + patterns, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"unknown metric {name!r}: {hint}registered are {', '.join(patterns)} (<N>: a count, e.g. 500, 5k)")


def resolve(names: str | Iterable[str]) -> list[str]:
    """Return the names of a comma-separated or other list, each once and known. Raises UserError for an unknown one."""
    parts = names.split(",") if isinstance(names, str) else names
    unique = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    for name in unique:
        find(name)
    return unique


def check_available(name: str) -> None:
    """Raise UserError when something that a metric needs is not there, e.g. a weight file."""
    missing = find(name)[0].needs()
    if missing:
        raise UserError(f"metric {name}: {missing}")


def default_metrics() -> tuple[tuple[str, ...], str]:
    """Return the metrics to compute when none are named, and one line that says why these."""
    detector_metrics = [spec for spec in registered_metrics() if spec.match("fid50k_full")]
    if not detector_metrics:
        return ("swd",), "computing swd, the sliced Wasserstein distance, which needs no detector weights"
    missing = detector_metrics[0].needs()
    if missing:
        return ("swd",), f"computing swd instead of fid50k_full, because {missing}"
    return ("fid50k_full",), "computing fid50k_full, whose detector is there"


def compute(name: str, context: MetricContext) -> MetricResult:
    """Compute one metric. Every process calls it with its own copies and gets the same result.

    Raises UserError for an unknown name, for something missing, and for data that the metric cannot use.
    """
    spec, count = find(name)
    check_available(name)
    start = time.perf_counter()
    measured = spec.function(context, name, count)
    return MetricResult(
        metric=name,
        results=measured.values,
        seconds=time.perf_counter() - start,
        num_real=measured.num_real,
        num_fake=measured.num_fake,
        seed=context.seed,
        truncation_psi=context.truncation_psi,
        noise_mode=context.noise_mode,
        protocol=spec.protocol,
    )


def result_to_json(
    result: MetricResult, *, snapshot: Path | None, kimg: float, data: str, data_hash: str, mirror: bool
) -> dict[str, Any]:
    """Return the record of a result: one line of metric-<name>.jsonl. `snapshot` is None for weights not in a file."""
    return {
        **asdict(result),
        "seconds": round(result.seconds, 3),
        "snapshot": snapshot.name if snapshot else None,
        "snapshot_sha256": _sha256(snapshot) if snapshot else None,
        "kimg": kimg,
        "data": data,
        "data_hash": data_hash,
        "mirror": mirror,
        "versions": {
            "styleformer": dnnlib.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append_result(folder: Path, record: dict[str, Any]) -> None:
    """Append a record to metric-<name>.jsonl in `folder`. Call it on the main process only.

    Raises UserError when the file cannot be written.
    """
    path = folder / f"metric-{record['metric']}.jsonl"
    try:
        with path.open("a") as file:
            file.write(to_line(record) + "\n")
    except OSError as error:
        raise UserError(f"{path}: the result cannot be appended ({error.strerror})") from None


def to_line(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(record, allow_nan=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
