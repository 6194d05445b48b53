"""Laboratory: repeated runs of several training configurations, and their comparison with intervals.

`laboratory.json` contains a question and the results of its trials. A trial is a run of one arm with one seed.
benchmarks/learning.py trains the runs and writes the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dnnlib.config import UserError
from dnnlib.util import read_json, write_atomically
from reporting.charts import higher_is_better
from reporting.intervals import CONFIDENCE, Interval, welch_interval
from reporting.run_reader import MAX_AGE, MAX_VALUE, is_number

LABORATORY_FILE = "laboratory.json"
SCREENING_CONFIDENCE = 0.8  # an arm whose interval excludes equality at this confidence is promising
Stage = Literal["screen", "confirm"]
Axis = Literal["kimg", "minutes"]
Basis = Literal[Axis, "end"]  # of a comparison: equal kimg, equal minutes, or each arm at its own last age
STAGES: tuple[Stage, ...] = ("screen", "confirm")
SEEDS: dict[Stage, str] = {"screen": "first seeds", "confirm": "fresh seeds"}
AXES: tuple[Axis, ...] = ("kimg", "minutes")
BASES: tuple[Basis, ...] = (*AXES, "end")
PLACES: dict[Basis, str] = {"kimg": "at equal kimg", "minutes": "at equal minutes", "end": "at their ends"}
MAX_ARMS = 100  # a chart of more arms would be too large for matplotlib
NAME = re.compile(r"\w[\w.-]*")  # names of arms and metrics, which are also names of files


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A training configuration: options of train.py, and the name of the arm that it is compared with, its reference.

    The baseline has no reference. `evaluate` lists the ages of an arm that is not evaluated at those of the question.
    """

    options: str
    against: str | None = None
    evaluate: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """Arms, evaluated at the ages `evaluate` in kimg unless an arm has its own; the first arm is the baseline.

    The seeds of the two stages are disjoint: an arm that is promising with the first is judged by the others.
    Raises ValueError for fields that are not as described.
    """

    question: str
    evaluate: tuple[int, ...]
    base: str
    arms: dict[str, Arm]
    metrics: tuple[str, ...]
    seeds: dict[Stage, tuple[int, ...]]

    def __post_init__(self) -> None:
        seeds = [seed for stage in STAGES for seed in self.seeds[stage]]
        _check_ages(self.evaluate)
        if not 2 <= len(self.arms) <= MAX_ARMS:
            raise ValueError(f"a question has 2 to {MAX_ARMS} arms, got {len(self.arms)}")
        texts = [self.question, self.base, *self.metrics, *(arm.options for arm in self.arms.values())]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("question, base, metrics and options are texts")
        for kind, names in (("arm", self.arms), ("metric", self.metrics)):
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(f"{kind} {name!r}: use letters, digits and - _ . in the name")
        above: list[str] = []
        for name, arm in self.arms.items():
            if arm.against not in above and (above or arm.against is not None):
                raise ValueError(f"arm {name}: {arm.against!r} is not an arm above it")
            if arm.evaluate is not None:
                _check_ages(arm.evaluate, f"arm {name}: ")
            above.append(name)
        if not self.metrics or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError("a question has metrics, and different whole numbers as seeds")

    def ages(self, arm: str) -> tuple[int, ...]:
        """Return the ages in kimg at which an arm is evaluated."""
        return self.arms[arm].evaluate or self.evaluate

    def step(self, arm: str) -> int:
        """Return the interval of an arm's snapshots in kimg: the greatest common divisor of its ages."""
        return math.gcd(*self.ages(arm))

    def length(self, arm: str) -> int:
        """Return the last age of an arm in kimg, at which its runs end."""
        return self.ages(arm)[-1]

    @property
    def has_equal_lengths(self) -> bool:
        """Return whether the runs of all arms end at the same age."""
        return len({self.length(arm) for arm in self.arms}) == 1

    def options(self, arm: str) -> str:
        """Return all options of an arm."""
        return " ".join(filter(None, [self.base, self.arms[arm].options]))

    @property
    def baseline(self) -> str:
        """Name of the first arm."""
        return next(iter(self.arms))

    def references(self, arm: str) -> list[str]:
        """Return the arms that an arm is compared with: its reference and the baseline."""
        own = self.arms[arm].against
        return [] if own is None else list(dict.fromkeys([own, self.baseline]))

    def axes(self, arm: str, against: str) -> tuple[Basis, ...]:
        """Return the axes along which two arms are compared: `end` only if their lengths differ."""
        return AXES if self.length(arm) == self.length(against) else BASES

    def decisive(self, arm: str, against: str) -> Basis:
        """Return the axis along which an arm is promising or not: `end` if it is one of theirs, else `kimg`."""
        return "end" if "end" in self.axes(arm, against) else "kimg"


def _check_ages(ages: tuple[int, ...], label: str = "") -> None:
    """Raise ValueError, with the label, unless ages are positive whole numbers in ascending order."""
    if not ages or not all(type(age) is int and age > 0 for age in ages) or list(ages) != sorted(set(ages)):
        raise ValueError(
            f"{label}evaluate = {str([*ages])[:100]}: list whole numbers of kimg in ascending order, e.g. [5, 10]"
        )


@dataclass(frozen=True, kw_only=True)
class Values:
    """Values of a metric of one run in ascending order of age. `minutes` is the time of the training steps alone.

    `conditions` are the COMPARABLE fields of the metric's records. Raises ValueError for no values, different numbers
    of them, ages that do not ascend from above 0, and numbers that are not finite.
    """

    kimg: tuple[float, ...]
    minutes: tuple[float, ...]
    values: tuple[float, ...]
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.values) == len(self.kimg) == len(self.minutes):
            counts = f"{len(self.kimg)} kimg, {len(self.minutes)} minutes and {len(self.values)} values"
            raise ValueError(f"an evaluated run has as many ages as values, got {counts}")
        ages = [*self.kimg, *self.minutes]
        if not all(is_number(x, MAX_AGE) for x in ages) or not all(is_number(x, MAX_VALUE) for x in self.values):
            raise ValueError("an age or a value is not a finite number")
        if any(list(own) != sorted(own) or own[0] <= 0 for own in (self.kimg, self.minutes)):
            raise ValueError("kimg or minutes do not ascend from above 0")

    def before(self, kimg: float) -> Values | None:
        """Return the values before an age; None if there are none."""
        count = sum(age < kimg for age in self.kimg)
        if not count:
            return None
        return replace(self, kimg=self.kimg[:count], minutes=self.minutes[:count], values=self.values[:count])

    def at(self, axis: Axis, position: float) -> float:
        """Return the value at a position on an axis, between two evaluations interpolated as a power law.

        A straight line would overestimate a learning curve, which is convex. Values that are not positive are
        interpolated linearly in the logarithm of the position.
        """
        positions: tuple[float, ...] = getattr(self, axis)
        if position in positions:  # exactly, without rounding
            return self.values[positions.index(position)]
        x, values = np.log(positions), np.array(self.values)
        if values.min() > 0:
            return float(np.exp(np.interp(np.log(position), x, np.log(values))))
        return float(np.interp(np.log(position), x, values))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Results of one run, by metric; its options, and the device and number of threads that trained it."""

    arm: str
    seed: int
    options: str
    device: str
    metrics: dict[str, Values]

    def answers(self, question: Question) -> bool:
        """Return whether the run is of an arm of a question, and was evaluated with all metrics at all ages of it."""
        if self.arm not in question.arms:
            return False
        ages, step = question.ages(self.arm), question.step(self.arm)
        known = [self.metrics[name].kimg if name in self.metrics else () for name in question.metrics]
        return all(any(age <= x < age + step for x in kimg) for kimg in known for age in ages)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm and its reference: values by seed, and the interval of the difference of means.

    `at` and `reference_at` are their positions in kimg or minutes: equal, or along `end` their last ages. `interval`
    has a confidence of 95 %. `verdict` is `better` or `worse` if it excludes 0, else `no difference shown`. In the
    screening stage it is `promising` or `not promising`. In both stages it is `higher` or `lower` if the interval of a
    value without a better direction excludes 0, and `incomplete` if a run is missing or has not reached the last age of
    its arm.
    """

    stage: Stage
    arm: str
    against: str
    metric: str
    axis: Basis
    at: float
    reference_at: float
    values: dict[int, float]
    reference: dict[int, float]
    interval: Interval
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """A question and the trials made so far."""

    question: Question
    trials: tuple[Trial, ...] = ()

    def values(self, arm: str, metric: str, stage: Stage) -> dict[int, Values]:
        """Return the values of an arm by seed, up to its last age."""
        limit = self.question.length(arm) + self.question.step(arm)
        known = [trial for trial in self._trials_of(arm, stage) if metric in trial.metrics]
        found = {trial.seed: trial.metrics[metric].before(limit) for trial in known}
        return {seed: own for seed in self.question.seeds[stage] if (own := found.get(seed))}

    def _trials_of(self, arm: str, stage: Stage) -> list[Trial]:
        seeds = self.question.seeds[stage]
        return [trial for trial in self.trials if trial.arm == arm and trial.seed in seeds]

    def compare(self, stage: Stage, arm: str, against: str, metric: str, axis: Basis) -> Comparison | None:
        """Compare two arms at the last position on an axis that all their runs have reached, or each at its last age.

        None if either arm has fewer than two runs, if a run has no value at or before this position, along minutes if
        the runs were made on different devices, and along `end` if both arms have the same last age. Along `end`, only
        runs that have reached the last age count. Along kimg, a value at 10.016 kimg also counts as one at 10: runs are
        evaluated after the first whole batch.
        """
        ours, theirs = self.values(arm, metric, stage), self.values(against, metric, stage)
        devices = {trial.device for name in (arm, against) for trial in self._trials_of(name, stage)}
        if axis not in self.question.axes(arm, against) or (axis == "minutes" and len(devices) > 1):
            return None
        finished = _finished(ours, self.question.length(arm)), _finished(theirs, self.question.length(against))
        is_complete = all(len(own) == len(self.question.seeds[stage]) for own in finished)
        if axis == "end":
            ours, theirs = finished
        if min(len(ours), len(theirs)) < 2:
            return None
        if axis == "end":
            at, reference_at = float(self.question.length(arm)), float(self.question.length(against))
            values = {seed: run.values[-1] for seed, run in ours.items()}
            reference = {seed: run.values[-1] for seed, run in theirs.items()}
        else:
            positions = [getattr(run, axis) for run in (*ours.values(), *theirs.values())]
            at = reference_at = min(own[-1] for own in positions)
            if at < max(math.floor(own[0]) if axis == "kimg" else own[0] for own in positions):
                return None
            values = {seed: run.at(axis, at) for seed, run in ours.items()}
            reference = {seed: run.at(axis, at) for seed, run in theirs.items()}
        return Comparison(
            stage=stage,
            arm=arm,
            against=against,
            metric=metric,
            axis=axis,
            at=at,
            reference_at=reference_at,
            values=values,
            reference=reference,
            interval=welch_interval([*values.values()], [*reference.values()]),
            verdict=_judge(stage, metric, values, reference) if is_complete else "incomplete",
        )

    def comparisons(self, metric: str, stages: Sequence[Stage] = STAGES) -> Iterator[Comparison]:
        """Yield all comparisons of a metric: of each arm with its reference and with the baseline, along all axes."""
        for stage in stages:
            for arm in self.question.arms:
                for against in self.question.references(arm):
                    for axis in self.question.axes(arm, against):
                        if comparison := self.compare(stage, arm, against, metric, axis):
                            yield comparison

    def promising(self) -> list[str]:
        """Return the arms that the first seeds suggest to be better than their reference.

        One comparison decides, by the first metric, so that few arms look promising by chance: at equal kimg, or at
        their ends if the two arms have different lengths.
        """
        question = self.question
        found = [item for item in self.comparisons(question.metrics[0], ["screen"]) if item.verdict == "promising"]
        own = [item for item in found if item.against == question.arms[item.arm].against]
        return [item.arm for item in own if item.axis == question.decisive(item.arm, item.against)]

    def with_trial(self, trial: Trial) -> Laboratory:
        """Return a laboratory with a trial added.

        It replaces an earlier trial of this arm and seed, whose other metrics are kept.
        """
        others = []
        for own in self.trials:
            if (own.arm, own.seed) == (trial.arm, trial.seed):
                trial = replace(trial, metrics={**own.metrics, **trial.metrics})
            else:
                others.append(own)
        order = {name: i for i, name in enumerate(self.question.arms)}
        trials = sorted([*others, trial], key=lambda own: (order.get(own.arm, len(order)), own.arm, own.seed))
        return replace(self, trials=tuple(trials))

    def check_conditions(self) -> None:
        """Raise UserError if the values of a metric are not comparable, e.g. because their datasets differ."""
        for metric in self.question.metrics:
            known = [trial for trial in self.trials if metric in trial.metrics and trial.arm in self.question.arms]
            for trial in known[1:]:
                first, own = (
                    {"device": "cpu" if item.device.startswith("cpu") else "gpu", **item.metrics[metric].conditions}
                    for item in (known[0], trial)
                )
                for key in first:
                    if own.get(key) != first[key]:
                        raise UserError(
                            f"{metric}: {key} is {own.get(key)} for {trial.arm}, seed {trial.seed}, and {first[key]} "
                            f"for {known[0].arm}, seed {known[0].seed}: values are not comparable; use one dataset, "
                            "detector and device in a laboratory"
                        )

    def write(self, folder: Path) -> None:
        """Write the laboratory to a folder."""
        content = asdict(self)
        for arm in content["question"]["arms"].values():
            if arm["evaluate"] is None:
                del arm["evaluate"]
        write_atomically(folder / LABORATORY_FILE, (json.dumps(content, indent=1) + "\n").encode())


def _finished(runs: dict[int, Values], age: int) -> dict[int, Values]:
    """Return the runs that have reached an age."""
    return {seed: run for seed, run in runs.items() if run.kimg[-1] >= age}


def _judge(stage: Stage, metric: str, values: dict[int, float], reference: dict[int, float]) -> str:
    """Return the verdict of a complete comparison."""
    confidence = SCREENING_CONFIDENCE if stage == "screen" else CONFIDENCE
    interval = welch_interval([*values.values()], [*reference.values()], confidence)
    is_higher, higher = interval.estimate > 0, higher_is_better(metric)
    if interval.excludes_zero and higher is None:
        return "higher" if is_higher else "lower"
    is_better = interval.excludes_zero and is_higher == higher
    if stage == "screen":
        return "promising" if is_better else "not promising"
    return "better" if is_better else "worse" if interval.excludes_zero else "no difference shown"


def read_laboratory(folder: Path) -> Laboratory:
    """Read the laboratory in a folder. Raises UserError, with the path, for a missing or corrupt file."""
    path = folder / LABORATORY_FILE
    try:
        content = read_json(path)
        return Laboratory(
            question=_to_question(content["question"]), trials=tuple(_to_trial(item) for item in content["trials"])
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; benchmarks/learning.py writes it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise UserError(f"{path}: not a laboratory ({error.args[0]} is missing)") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a laboratory ({error})") from None


def _to_question(content: dict[str, Any]) -> Question:
    if set(content["seeds"]) != set(STAGES):
        raise ValueError(f"the seeds are not those of the stages {' and '.join(STAGES)}")
    arms = {name: _to_arm(arm) for name, arm in content["arms"].items()}
    seeds: dict[Stage, tuple[int, ...]] = {stage: _to_tuple(content["seeds"][stage]) for stage in STAGES}
    lists = {name: _to_tuple(content[name]) for name in ("evaluate", "metrics")}
    return Question(**{**content, **lists, "arms": arms, "seeds": seeds})


def _to_arm(content: dict[str, Any]) -> Arm:
    ages = content.get("evaluate")
    return Arm(**{**content, "evaluate": None if ages is None else _to_tuple(ages)})


def _to_trial(content: dict[str, Any]) -> Trial:
    metrics = {
        name: Values(**{**values, **{axis: _to_tuple(values[axis]) for axis in ("kimg", "minutes", "values")}})
        for name, values in content["metrics"].items()
    }
    trial = Trial(**{**content, "metrics": metrics})
    if not all(isinstance(own.conditions, dict) for own in metrics.values()):
        raise ValueError("the conditions of a metric are not a table")
    texts = (trial.arm, trial.options, trial.device)
    if type(trial.seed) is not int or not all(isinstance(text, str) for text in texts):
        raise ValueError("a trial has an arm, a whole number as seed, options, and a device")
    return trial


def _to_tuple(value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} is in the place of a list")
    return tuple(value)
