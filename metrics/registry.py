"""Registry of metrics: specifications by name, computation, and the JSON record of a result.

A metric on detector features is a row of metrics/feature_metrics.py. Any other metric is a file in this folder with a
decorated function; `metrics/__init__.py` imports every file here:

    @register_metric("swd<N>", help=..., protocol=..., paper=...)
    def swd(context: MetricContext, name: str, count: int | None) -> Measurement: ...
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dnnlib
from dnnlib.config import UserError
from dnnlib.download import sha256_of_file
from dnnlib.util import append_line, read_metric_records
from metrics.detectors import DetectorSetup, Role
from metrics.feature_stats import ClassSums, StatRequest, statistics_of
from metrics.sampling import MetricContext, Part

COMPARABLE = (  # two records of a metric are comparable if these fields are equal
    "detector_sha256",
    "protocol",
    "data_hash",
    "mirror",
    "seed",
    "truncation_psi",
    "noise_mode",
    "num_real",
    "num_fake",
    "holdout_hash",
)
HOLDOUT_VALUES = ("_train", "_holdout")  # against equal numbers of training and held-out images
STANDARD = DetectorSetup()  # the networks of the literature, with the protocol of the StyleGAN family


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Result of a metric function: values by name, the main value first, and the numbers of images.

    `num_holdout` counts the held-out images; 0 if the metric does not use them. `curves` are equally long: the points
    of the x axis, then the values of the reals and of the fakes at them.
    """

    values: dict[str, float]
    num_real: int
    num_fake: int
    num_holdout: int = 0
    curves: dict[str, list[float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


MetricFunction = Callable[[MetricContext, str, int | None], Measurement]
Plan = Callable[[MetricContext, int | None], Sequence[StatRequest]]


def _no_needs() -> None:
    """Return None: nothing is missing."""


def _no_plan(context: MetricContext, count: int | None) -> Sequence[StatRequest]:
    """Return an empty plan, for metrics without detector features."""
    return ()


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A family of metrics. `<N>` in the pattern is a number of images (`500`, `5k`, or empty for the default).

    help            one line: what the metric measures
    note            what else a user should know
    values          suffixes of the values' names, the main value first; `<...>` stands for a level, class or similar
    undirected      suffixes of the values of which neither higher nor lower ones are better, such as deviations
    axes            the labels of the x and y axes of the metric's curves; None if it has no curves
    is_floor        the metric compares reals with reals: a value to compare with, no result of a network
    roles           the detectors
    plan            returns the requested statistics of their features, so that metrics share passes over images
    counts_flips    include flipped reals under --mirror; in the protocol of the StyleGAN family, metrics with
                    equal numbers of reals and fakes include flips, and metrics with all reals do not
    part            the reals to compare with: all images, or the training images, in metrics of memorisation
    protocol        description, appended to the description of the detectors
    clean           replacement of `protocol` under --protocol=clean; None if the metric does not support it
    library_suffix  appended to the metric's name if its default network differs from the network of the literature and
                    the user does not specify a network
    needs           check of other requirements, called before any image is generated; returns a message with the
                    missing requirement and the remedy, or None
    """

    pattern: str
    function: MetricFunction
    help: str
    protocol: str
    paper: str
    note: str = ""
    values: tuple[str, ...] = ("",)
    undirected: tuple[str, ...] = ()
    axes: tuple[str, str] | None = None
    is_floor: bool = False
    roles: tuple[Role, ...] = ()
    plan: Plan = _no_plan
    counts_flips: bool = False
    part: Part = "all"
    clean: str | None = None
    library_suffix: str = ""
    higher_is_better: bool = False
    needs: Callable[[], str | None] = _no_needs

    def match(self, name: str) -> re.Match[str] | None:
        """Match the name of a metric; group 'N' is the count if the pattern contains <N>."""
        return re.fullmatch(self._expression(), name)

    def match_value(self, name: str, value: str) -> re.Match[str] | None:
        """Match the recorded name of a value, one of `values`; the groups 'detector' and 'part' are what varies."""
        detector = "(?P<detector>_.+)?" if self.roles else "(?P<detector>)"
        part = re.sub("<.*>", "(?P<part>[^_]+)", re.escape(value)) if "<" in value else f"{re.escape(value)}(?P<part>)"
        return re.fullmatch(f"{self._expression()}{detector}{part}", name)

    def _expression(self) -> str:
        pattern = re.escape(self.pattern).replace(re.escape("<N>"), r"(?P<N>[1-9]\d*k?)?")
        return f"{pattern}(?P<library>{self.library_suffix})?"

    def is_higher_better(self, value: str = "") -> bool | None:
        """Return whether higher numbers of a value, one of `values`, are better; None if it has no direction."""
        return None if self.is_floor or value in self.undirected else self.higher_is_better

    def missing(self, setup: DetectorSetup) -> str | None:
        """Return a message with the missing file or package and its remedy, or None. Fetches nothing."""
        return next(filter(None, (setup.missing(role) for role in self.roles)), None) or self.needs()

    def protocol_of(self, setup: DetectorSetup = STANDARD) -> str:
        """Return a description of the detectors and the processing of their features."""
        networks = [setup.describe(role) for role in self.roles]
        text = "; ".join([*networks, self.clean if self.clean and setup.protocol == "clean" else self.protocol])
        return f"{setup.protocol}: {text}" if self.clean else text


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """Values of a metric and all settings that they depend on, except the network and the data.

    `mirror` states whether flipped reals are included. `seconds` includes passes over images that the metric shares
    with other metrics.
    """

    metric: str
    results: dict[str, float]
    curves: dict[str, list[float]]
    seconds: float
    num_real: int
    num_fake: int
    num_holdout: int
    mirror: bool
    seed: int
    truncation_psi: float
    noise_mode: str
    protocol: str
    detector: str | None
    detector_sha256: str | None
    warnings: tuple[str, ...]


_METRICS: dict[str, MetricSpec] = {}


def register_metric(
    pattern: str, *, help: str, protocol: str, paper: str, **options: Any
) -> Callable[[MetricFunction], MetricFunction]:
    """Register the decorated function as the metric `pattern`; see MetricSpec for the arguments and options."""

    def register(function: MetricFunction) -> MetricFunction:
        assert pattern not in _METRICS, f"metric {pattern} is registered twice"
        _METRICS[pattern] = MetricSpec(
            pattern=pattern, function=function, help=help, protocol=protocol, paper=paper, **options
        )
        return function

    return register


def registered_metrics() -> tuple[MetricSpec, ...]:
    """Return all metrics, sorted by pattern."""
    return tuple(_METRICS[pattern] for pattern in sorted(_METRICS))


def find(name: str, setup: DetectorSetup = STANDARD) -> tuple[MetricSpec, int | None]:
    """Return the metric with a given or recorded name, and the count in the name. Raises UserError if unknown."""
    for spec in registered_metrics():
        match = spec.match(name.removesuffix(_suffix(spec, setup)))
        if match:
            count = match.groupdict().get("N")
            return spec, int(count.replace("k", "000")) if count else None
    patterns = [spec.pattern for spec in registered_metrics()]
    close = difflib.get_close_matches(name, [pattern.replace("<N>", "") for pattern in patterns] + patterns, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"unknown metric {name!r}: {hint}registered metrics are {', '.join(patterns)} (<N>: a count, e.g. 500, 5k)"
    )


def find_recorded(name: str) -> tuple[MetricSpec, str] | None:
    """Return the metric of a recorded name, and the suffix of the value among its `values`; None if unknown.

    The name is that of a metric ("") or a value: the metric, the suffix of a custom detector, the suffix of the value,
    and the length of a rebuilt average of weights. The reading in which the least of it is arbitrary text is chosen.
    """
    name = re.sub(r"_ema[\d.e+-]+$", "", name)
    found = []
    for spec in registered_metrics():
        for value in ("", *spec.values):
            if match := spec.match_value(name, value):
                found.append((len(match["detector"] or "") + len(match["part"]), spec, value))
    return min(found, key=lambda reading: reading[0])[1:] if found else None


def resolve(names: str | Iterable[str], setup: DetectorSetup = STANDARD) -> list[str]:
    """Return the recorded names, without duplicates, of a comma-separated list or an iterable.

    Raises UserError for an unknown metric, and for a metric that does not support the protocol or the detector.
    """
    parts = names.split(",") if isinstance(names, str) else names
    return list(dict.fromkeys(_recorded_name(part.strip(), setup) for part in parts if part.strip()))


def _recorded_name(name: str, setup: DetectorSetup) -> str:
    """Return the name under which results are recorded: with the suffix of a non-standard network."""
    spec, _ = find(name, setup)
    if setup.protocol == "clean" and spec.clean is None:
        with_clean = ", ".join(spec.pattern for spec in registered_metrics() if spec.clean)
        raise UserError(f"--protocol=clean: metric {name} does not support this protocol, only {with_clean} do")
    if spec.library_suffix and name.endswith(spec.library_suffix) and _has_program(spec, setup):
        raise UserError(f"metric {name}: the suffix denotes a different network than --detector; omit the suffix")
    _check_suffix(name, spec, setup)
    suffix = _suffix(spec, setup) or ("" if _has_program(spec, setup) else spec.library_suffix)
    return name.removesuffix(suffix) + suffix if suffix else name


def _check_suffix(name: str, spec: MetricSpec, setup: DetectorSetup) -> None:
    """Raise UserError if the suffix of a custom detector turns the name of a metric into another metric or value."""
    suffix = _suffix(spec, setup)
    standard = name.removesuffix(suffix)
    recorded = standard + suffix
    if suffix and (suffix in spec.values or any(other.match(recorded) for other in registered_metrics())):
        raise UserError(
            f"--detector={setup.program}: results of {standard} would be saved as {recorded}, which is another metric "
            "or value; rename the file"
        )


def _has_program(spec: MetricSpec, setup: DetectorSetup) -> bool:
    return any(setup.program_of(role) for role in spec.roles)


def _suffix(spec: MetricSpec, setup: DetectorSetup) -> str:
    """Return the suffix of a metric's name if a custom detector computes the metric, else ''."""
    return next(filter(None, map(setup.suffix_of, spec.roles)), "")


def check_available(name: str, setup: DetectorSetup = STANDARD) -> None:
    """Fetch the missing files of a metric. Raises UserError if a requirement is not available."""
    spec = find(name, setup)[0]
    with _prefixed_errors(name):
        for role in spec.roles:
            setup.prepare(role)
        missing = spec.needs()
        if missing:
            raise UserError(missing)


def default_metrics(setup: DetectorSetup = STANDARD) -> tuple[tuple[str, ...], str]:
    """Return the default metrics, and a line that states the reason for the choice. Fetches nothing."""
    missing = find("fid50k_full")[0].missing(setup)
    if missing:
        return ("swd",), f"computing swd instead of fid50k_full, because {missing}"
    return tuple(resolve("fid50k_full", setup)), "computing fid50k_full, because its detector is available"


def prepare(names: Iterable[str], context: MetricContext) -> dict[str, tuple[StatRequest, ...]]:
    """Check and fetch the requirements of metrics before any image is generated; return their plans.

    Raises UserError for a missing requirement, a detector that fails, and data that a metric cannot use.
    """
    plans = {}
    for name in resolve(names, context.setup):
        check_available(name, context.setup)
        spec, count = find(name, context.setup)
        with _prefixed_errors(name):
            plans[name] = tuple(spec.plan(_own_context(spec, context), count))
            for role in spec.roles:
                with_classes = any(isinstance(request.recipe, ClassSums) for request in plans[name])
                statistics_of(context).check_detector(role, with_classes=with_classes)
    return plans


def compute(name: str, context: MetricContext) -> MetricResult:
    """Compute one metric; see compute_all."""
    return next(compute_all([name], context))


def compute_all(names: Iterable[str], context: MetricContext) -> Iterator[MetricResult]:
    """Compute metrics. All metrics that use a detector share one pass over the generated images.

    Collective: every process passes an equal context and receives equal results. Raises UserError for an unknown
    name, a missing requirement, and data that a metric cannot use.
    """
    specs = {name: find(name, context.setup) for name in resolve(names, context.setup)}
    plans = prepare(specs, context)
    statistics = statistics_of(context)
    statistics.collect(
        (request for plan in plans.values() for request in plan),
        metrics=", ".join(name for name, plan in plans.items() if plan),
    )
    for name, (spec, count) in specs.items():
        start = time.perf_counter()
        own = _own_context(spec, context)
        context.progress.plan(name, ())
        with _prefixed_errors(name):
            measured = spec.function(own, name, count)
            for key, value in measured.values.items():
                if not math.isfinite(value):
                    raise UserError(f"{key} is {value}: the features are too large or too few to compute it")
        identity = context.setup.identity(spec.roles[0]) if spec.roles else {"detector": None, "detector_sha256": None}
        yield MetricResult(
            metric=name,
            results=measured.values,
            curves=measured.curves,
            seconds=time.perf_counter() - start + statistics.seconds_of(plans[name]),
            num_real=measured.num_real,
            num_fake=measured.num_fake,
            num_holdout=measured.num_holdout,
            mirror=own.has_flips,
            seed=context.seed,
            truncation_psi=context.truncation_psi,
            noise_mode=context.noise_mode,
            protocol=spec.protocol_of(context.setup),
            **identity,
            warnings=measured.warnings,
        )


def _own_context(spec: MetricSpec, context: MetricContext) -> MetricContext:
    """Return the context whose `reals` are those of a metric."""
    return replace(context, counts_flips=spec.counts_flips, part=spec.part)


@contextmanager
def _prefixed_errors(name: str) -> Iterator[None]:
    """Prefix the message of a UserError raised inside with the name of the metric."""
    try:
        yield
    except UserError as error:
        raise UserError(f"metric {name}: {error}") from None


def result_to_json(
    result: MetricResult, context: MetricContext, *, snapshot: Path | None, kimg: float | None, data: str
) -> dict[str, Any]:
    """Return the record of a result: one line of metric-<name>.jsonl.

    `snapshot` is the snapshot file, the folder or zip of `context.fakes`, or None for weights that are not in a file.
    """
    part = find(result.metric, context.setup)[0].part
    fakes, reals = context.fakes, replace(context, counts_flips=result.mirror, part=part).reals
    record = asdict(result)
    if not result.curves:
        del record["curves"]
    return {
        **record,
        "seconds": round(result.seconds, 3),
        "warnings": list(result.warnings),
        "snapshot": snapshot.name if snapshot else None,
        "snapshot_sha256": sha256_of_snapshot(snapshot) if snapshot and not fakes else None,
        "fakes_hash": fakes.content_hash if fakes else None,
        "kimg": kimg,
        "data": data,
        "data_hash": reals.content_hash,
        "holdout_hash": context.held_out.content_hash if context.held_out and result.num_holdout else None,
        "resize_filter": reals.meta.get("resize_filter"),
        "versions": _versions(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sha256_of_snapshot(path: Path) -> str:
    """Return the sha256 of a snapshot. For a safetensors folder, hash config.json, which lists the other checksums."""
    return sha256_of_file(path / "config.json" if path.is_dir() else path)


def results_of(snapshot: Path, sha256: str) -> list[dict[str, Any]]:
    """Return the records of a snapshot from the metric-<name>.jsonl files beside it, oldest first per file."""
    records = [
        record for path in sorted(snapshot.parent.glob("metric-*.jsonl")) for record in read_metric_records(path)
    ]
    return [record for record in records if record.get("snapshot_sha256") == sha256]


def is_best(record: dict[str, Any], folder: Path, *, higher_is_better: bool) -> bool:
    """Return whether a record is better than all comparable records in metric-<name>.jsonl of `folder`.

    The file may also contain records of calc_metrics.py with other data, detectors or seeds.
    """
    name, value = next(iter(record["results"].items()))
    earlier = read_metric_records(folder / f"metric-{record['metric']}.jsonl")
    comparable = [other["results"] for other in earlier if _comparable_fields(other) == _comparable_fields(record)]
    others = [results[name] for results in comparable if name in results]
    return all(value > other if higher_is_better else value < other for other in others)


def _comparable_fields(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in COMPARABLE)


def append_result(folder: Path, record: dict[str, Any]) -> None:
    """Append a record to metric-<name>.jsonl in `folder`; for rank 0 only. Raises WriteError if writing fails."""
    append_line(folder / f"metric-{record['metric']}.jsonl", to_line(record))


def to_line(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(record, allow_nan=False)


def _versions() -> dict[str, str]:
    """Return the versions of this project, torch, Python, and the packages of detectors if imported."""
    own = {"styleformer": dnnlib.__version__, "torch": torch.__version__, "python": platform.python_version()}
    packages = ("torch_fidelity", "torchvision", "transformers")
    return own | {name: importlib.metadata.version(name) for name in packages if name in sys.modules}
