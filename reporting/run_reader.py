"""Reader of the folder of a finished or ongoing run: ticks, metrics, image grids, options and warnings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from dnnlib.config import OPTIONS_FILE, UserError
from dnnlib.util import MAX_LINE_BYTES, parse_json, read_json, read_lines
from metrics.registry import COMPARABLE
from reporting.log_reader import Log, read_log

MAX_AGE = 1e15  # kimg or seconds; a larger value is corrupt
MAX_VALUE = 1e100  # larger plotted values would overflow the arithmetic of axes
INITIAL_GRID = "fakes_init.png"
MAX_STATISTICS = 300  # statistics per run; typical runs have about 60


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A statistic of a run in ascending order of kimg; nan for a tick without a value.

    `origin` contains the COMPARABLE fields of the records of a metric, `last` all values of its last record.
    """

    kimg: np.ndarray
    seconds: np.ndarray  # training time without pauses; nan if unknown
    values: np.ndarray
    origin: dict[str, Any] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def finite(self) -> Curve:
        """Return the points with a finite value."""
        known = np.isfinite(self.values)
        return replace(self, kimg=self.kimg[known], seconds=self.seconds[known], values=self.values[known])


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An image file with a grid of generated images."""

    path: Path
    kimg: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run's folder.

    `starts` are the environments of each start, `log` is None without a readable log, and `problems` are errors while
    reading the files.
    """

    name: str
    path: Path
    options: dict[str, Any]
    ticks: dict[str, Curve]
    metrics: dict[str, Curve]
    grids: Sequence[Grid]
    reals: Path | None
    starts: Sequence[dict[str, Any]] = ()
    log: Log | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """True if the run has no ticks, metrics or images yet."""
        return not (self.ticks or self.metrics or self.grids)

    @property
    def total_kimg(self) -> float:
        """Planned length of the run in kimg; nan if unknown."""
        part = self.options.get("run")
        total = part.get("total_kimg") if isinstance(part, dict) else None
        return float(total) if is_number(total, MAX_AGE) else math.nan

    def last(self, name: str) -> float:
        """Return the latest value of a statistic; nan if the run has none."""
        return self.ticks[name].values[-1] if name in self.ticks else math.nan


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Expand paths to the folders of runs, without duplicates. A path is a run or a folder of runs.

    Raises UserError for any other path.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            problem = "not a folder" if path.exists() else "no such folder"
            raise UserError(f"{path}: {problem}; specify the folder of a run, or a folder of runs")
        inside = [path] if is_run(path) else sorted(filter(is_run, path.iterdir()))
        if not inside:
            raise UserError(f"{path}: neither a run ({OPTIONS_FILE} or stats.jsonl) nor a folder of runs")
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(path: Path) -> bool:
    """Return whether a path is the folder of a run."""
    return (path / OPTIONS_FILE).is_file() or (path / "stats.jsonl").is_file()


def read_run(path: Path, name: str) -> Run:
    """Read the folder of a run. Corrupt parts are skipped and listed in `problems`."""
    problems: list[str] = []
    ticks = _read_ticks(path / "stats.jsonl", problems)
    clock = ticks.get("Timing/total_sec")
    metrics = {}
    for file in sorted(path.glob("metric-*.jsonl")):
        curve = _read_metric(file, clock, problems)
        if curve:
            metrics[file.stem.removeprefix("metric-")] = curve
    reals = path / "reals.png"
    return Run(
        name=name,
        path=path,
        options=_read_options(path / OPTIONS_FILE, problems),
        ticks=ticks,
        metrics=metrics,
        grids=sorted(_list_grids(path), key=lambda grid: (grid.kimg, grid.path.name != INITIAL_GRID)),
        reals=reals if reals.is_file() else None,
        starts=list(_read_lines(path / "environment.jsonl", "kimg", problems)),
        log=read_log(path / "log.txt"),
        problems=problems,
    )


def _read_ticks(path: Path, problems: list[str]) -> dict[str, Curve]:
    """Return a curve for each statistic in stats.jsonl."""
    rows = {row["Progress/kimg"]: row for row in map(_flatten, _read_lines(path, "Progress/kimg", problems))}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if len(names) > MAX_STATISTICS:
        problems.append(f"{path.name}: skipped {len(names) - MAX_STATISTICS} of {len(names)} statistics")
        names = names[:MAX_STATISTICS]
    ordered = [rows[kimg] for kimg in sorted(rows)]
    columns = {name: np.array([row.get(name, _missing_value(name)) for row in ordered]) for name in sorted(names)}
    kimg = columns.get("Progress/kimg", np.zeros(0))
    seconds = columns.get("Timing/total_sec", np.full(len(kimg), math.nan))
    return {name: Curve(kimg=kimg, seconds=seconds, values=values) for name, values in columns.items()}


def _missing_value(name: str) -> float:
    """Return the value of a statistic missing from a tick: 0 for skipped updates, which are logged only if not 0."""
    return 0.0 if name.startswith("Skipped/") else math.nan


def _flatten(line: dict[str, Any]) -> dict[str, float]:
    """Return the values of a tick by name. An entry with mean and standard deviation is reduced to its mean."""
    values = {name: value.get("mean") if isinstance(value, dict) else value for name, value in line.items()}
    limits = {"Timing/total_sec": MAX_AGE}
    return {name: float(value) for name, value in values.items() if is_number(value, limits.get(name, MAX_VALUE))}


def _read_metric(path: Path, clock: Curve | None, problems: list[str]) -> Curve | None:
    """Return the finite main values of a metric against kimg; None if there are none.

    The file may also contain records of calc_metrics.py with other data or options. Only records that are comparable
    with the last record are used.
    """
    records = [line for line in _read_lines(path, "kimg", problems) if _main_value(line) is not None]
    if not records:
        return None
    origin = {key: records[-1].get(key) for key in COMPARABLE}
    comparable = [record for record in records if all(record.get(key) == origin[key] for key in COMPARABLE)]
    if len(comparable) < len(records):
        count = len(records) - len(comparable)
        problems.append(
            f"{path.name}: skipped {count} lines that are not comparable with the last line (other data or settings)"
        )
    latest = {record["kimg"]: record for record in comparable}
    kimg = np.array(sorted(latest), dtype=float)
    seconds = np.interp(kimg, clock.kimg, clock.values, right=math.nan) if clock else np.full(len(kimg), math.nan)
    values = np.array([_main_value(latest[x]) for x in kimg.tolist()], dtype=float)
    results = latest[kimg[-1]]["results"]
    last = {name: float(value) for name, value in results.items() if is_number(value, MAX_VALUE)}
    return Curve(kimg=kimg, seconds=seconds, values=values, origin=origin, last=last)


def _main_value(record: dict[str, Any]) -> float | None:
    results = record.get("results")
    value = next(iter(results.values()), None) if isinstance(results, dict) else None
    return float(value) if is_number(value, MAX_VALUE) else None


def _read_lines(path: Path, age: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file with a number in the field `age`.

    Objects with null in this field are skipped: they are metrics of image folders. A last line without a line break is
    skipped, too: it is still being written.
    """
    count = corrupt = 0
    try:
        for line in read_lines(path):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                break
            count += 1
            try:
                entry = parse_json(line.decode(errors="replace"))
                if entry[age] is not None and not is_number(entry[age], MAX_AGE):
                    raise ValueError
            except (ValueError, KeyError, TypeError):  # not JSON, nested too deeply, no such number, or not an object
                corrupt += 1
                continue
            if entry[age] is not None:
                yield entry
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
    if corrupt:
        problems.append(f"{path.name}: skipped {corrupt} corrupt lines of {count}")


def is_number(value: object, limit: float) -> TypeGuard[float]:
    """Return whether a JSON value is a number from -limit to limit."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -limit <= value <= limit


def _list_grids(path: Path) -> Iterator[Grid]:
    for file in path.glob("fakes*.png"):
        if file.name == INITIAL_GRID:
            yield Grid(path=file, kimg=0)
        elif match := re.fullmatch(r"fakes(\d+)\.png", file.name):
            yield Grid(path=file, kimg=int(match[1]))


def _read_options(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        options = read_json(path, MAX_LINE_BYTES)
        if isinstance(options, dict):
            return options
        problems.append(f"{path.name}: is not a JSON object")
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"{path.name}: cannot be read ({error})")
    return {}
