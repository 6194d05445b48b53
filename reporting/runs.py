"""What a run's folder tells: its ticks, metrics, grids of images and options, also while the run is going on."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.config import UserError
from metrics.registry import COMPARABLE

OPTIONS_FILE = "training_options.json"
SHOWN_WARNINGS = 20


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number that changes during a run, in ascending order of kimg; nan where a tick has none.

    `origin` is what the values of a metric depend on: its records' values of the keys COMPARABLE.
    """

    kimg: np.ndarray
    seconds: np.ndarray  # of training, pauses left out; nan where it is not known
    values: np.ndarray
    origin: dict[str, Any] = field(default_factory=dict)

    def finite(self) -> Curve:
        """The points that have a finite value."""
        known = np.isfinite(self.values)
        return replace(self, kimg=self.kimg[known], seconds=self.seconds[known], values=self.values[known])


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A picture of generated images."""

    path: Path
    kimg: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as far as it has come.

    `starts` says what each start was computed with, `warnings` what the log warns of, and `problems` what of the files
    could not be read.
    """

    name: str
    path: Path
    options: dict[str, Any]
    ticks: dict[str, Curve]
    metrics: dict[str, Curve]
    grids: Sequence[Grid]
    reals: Path | None
    starts: Sequence[dict[str, Any]] = ()
    warnings: Sequence[str] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show yet."""
        return not (self.ticks or self.metrics or self.grids)

    @property
    def total_kimg(self) -> float:
        """How long the run is meant to be; nan if that is not known."""
        part = self.options.get("run")
        total = part.get("total_kimg") if isinstance(part, dict) else None
        return float(total) if isinstance(total, int | float) else math.nan

    def last(self, name: str) -> float:
        """The newest value of a tick's number; nan without any."""
        return self.ticks[name].values[-1] if name in self.ticks else math.nan


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the folders of runs that paths stand for, each once: themselves, or the runs in a folder of runs.

    Raises UserError for what is neither.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; name the folder of a run, or one that holds runs")
        inside = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()))
        if not inside:
            raise UserError(f"{path}: neither a run ({OPTIONS_FILE} or stats.jsonl) nor a folder of runs")
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(path: Path) -> bool:
    return (path / OPTIONS_FILE).is_file() or (path / "stats.jsonl").is_file()


def read_run(path: Path, name: str) -> Run:
    """Read a run's folder. What is damaged is left out and listed in `problems`."""
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
        grids=sorted(_list_grids(path), key=lambda grid: grid.kimg),
        reals=reals if reals.is_file() else None,
        starts=list(_read_lines(path / "environment.jsonl", "kimg", problems)),
        warnings=_read_warnings(path / "log.txt"),
        problems=problems,
    )


def _read_ticks(path: Path, problems: list[str]) -> dict[str, Curve]:
    """Return a curve for each number in stats.jsonl."""
    rows = {row["Progress/kimg"]: row for row in map(_flatten, _read_lines(path, "Progress/kimg", problems))}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    ordered = [rows[kimg] for kimg in sorted(rows)]
    columns = {name: np.array([row.get(name, _unsaid(name)) for row in ordered]) for name in sorted(names)}
    kimg = columns.get("Progress/kimg", np.zeros(0))
    seconds = columns.get("Timing/total_sec", np.full(len(kimg), math.nan))
    return {name: Curve(kimg=kimg, seconds=seconds, values=values) for name, values in columns.items()}


def _unsaid(name: str) -> float:
    """What a number is in a tick that does not have it: updates are only counted where some were left out."""
    return 0.0 if name.startswith("Skipped/") else math.nan


def _flatten(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a tick by name; of a loss term, whose mean and deviation are given, the mean."""
    values = {name: value.get("mean") if isinstance(value, dict) else value for name, value in line.items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _read_metric(path: Path, clock: Curve | None, problems: list[str]) -> Curve | None:
    """Return the main number of a metric against kimg, where it is finite; None where no line has one.

    The file may also hold what calc_metrics.py made of other data or by other options: those that compare with the
    newest line count.
    """
    records = [line for line in _read_lines(path, "kimg", problems) if _main_value(line) is not None]
    if not records:
        return None
    origin = {key: records[-1].get(key) for key in COMPARABLE}
    comparable = [record for record in records if all(record.get(key) == origin[key] for key in COMPARABLE)]
    if len(comparable) < len(records):
        count = len(records) - len(comparable)
        problems.append(
            f"{path.name}: left out {count} lines that do not compare with the last one (other data or way)"
        )
    values = {record["kimg"]: _main_value(record) or 0.0 for record in comparable}
    kimg = np.array(sorted(values), dtype=float)
    seconds = np.interp(kimg, clock.kimg, clock.values, right=math.nan) if clock else np.full(len(kimg), math.nan)
    return Curve(kimg=kimg, seconds=seconds, values=np.array([values[x] for x in kimg.tolist()]), origin=origin)


def _main_value(record: dict[str, Any]) -> float | None:
    results = record.get("results")
    value = next(iter(results.values()), None) if isinstance(results, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _read_lines(path: Path, age: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file that have a number `age`; null is that of images, which have none.

    A last line without its end is one that is being written.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
        return
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    damaged = 0
    for line in lines:
        try:
            entry = _parse(line)
            if entry[age] is not None and not math.isfinite(entry[age]):
                raise ValueError
        except (ValueError, RecursionError, KeyError, TypeError):  # no JSON, too deep, no such number, no object
            damaged += 1
            continue
        if entry[age] is not None:
            yield entry
    if damaged:
        problems.append(f"{path.name}: left out {damaged} of {len(lines)} lines, which are damaged")


def _parse(text: str) -> Any:
    """Parse JSON, in which an integer that no float can hold is infinite, as 1e999 is."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else math.inf)


def _read_warnings(path: Path) -> list[str]:
    """The last warnings and errors in a log, each once, where it came last, with the number of lines that say so."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    counts = Counter(line for line in reversed(lines) if line.startswith(("Warning: ", "Error: ")))
    newest = list(counts.items())[:SHOWN_WARNINGS]
    return [line + (f" ({count} times)" if count > 1 else "") for line, count in reversed(newest)]


def _list_grids(path: Path) -> Iterator[Grid]:
    for file in path.glob("fakes*.png"):
        match = re.fullmatch(r"fakes(_init|\d+)\.png", file.name)
        if match:
            yield Grid(path=file, kimg=0 if match[1] == "_init" else int(match[1]))


def _read_options(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        options = _parse(path.read_text())
        if isinstance(options, dict):
            return options
        problems.append(f"{path.name}: is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
    return {}
