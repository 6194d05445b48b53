"""Laboratories made of chosen or drawn numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reporting.laboratory import Arm, Laboratory, Question, Stage, Trial, Values

FD = "fid10k_full"  # lower is better


def make_question(
    arms: Iterable[str] = ("baseline", "other"),
    *,
    parents: Mapping[str, str] | None = None,
    own_ages: Mapping[str, tuple[int, ...]] | None = None,
    evaluate: tuple[int, ...] = (5, 10),
    metrics: tuple[str, ...] = (FD,),
    screen: int = 3,
    confirm: int = 5,
) -> Question:
    """Return a question; every arm but the first is compared with the first, or with its entry in `parents`.

    Arms in `own_ages` are evaluated at these ages instead of those of the question.
    """
    names, ages = [*arms], {**(own_ages or {})}
    against = {name: names[0] for name in names[1:]} | {**(parents or {})}
    return Question(
        question="Does it help?",
        evaluate=evaluate,
        base="--cfg=tiny",
        arms={
            name: Arm(options=f"--{name}" * (name in against), against=against.get(name), evaluate=ages.get(name))
            for name in names
        },
        metrics=metrics,
        seeds={"screen": tuple(range(screen)), "confirm": tuple(range(100, 100 + confirm))},
    )


def make_trial(
    arm: str,
    seed: int,
    values: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    kimg: Sequence[float] = (5.0, 10.0),
    minutes: Sequence[float] = (1.0, 2.0),
    device: str = "cpu",
    conditions: Mapping[str, Any] | None = None,
) -> Trial:
    """Return a trial; `values` belong to the metric FD, or are given by metric."""
    by_metric = values if isinstance(values, Mapping) else {FD: values}
    metrics = {
        name: Values(kimg=tuple(kimg), minutes=tuple(minutes), values=tuple(own), conditions={**(conditions or {})})
        for name, own in by_metric.items()
    }
    return Trial(arm=arm, seed=seed, options=f"--{arm}", device=device, metrics=metrics)


def with_last_values(question: Question, stage: Stage, last: Mapping[str, Sequence[float]]) -> Laboratory:
    """Return a laboratory with the last values of each arm by seed; all runs take as long as each other."""
    trials = [
        make_trial(arm, seed, {metric: (value + 20, value) for metric in question.metrics})
        for arm, values in last.items()
        for seed, value in zip(question.seeds[stage], values, strict=False)
    ]
    return Laboratory(question=question, trials=tuple(trials))


def drawn_trial(rng: np.random.RandomState, arm: str, seed: int, mean: float, spread: float = 3.0) -> Trial:
    """Draw a trial with an FD around `mean` at 10 kimg, 20 above it at 5 kimg, and slightly different speeds."""
    first, last = rng.normal([mean + 20, mean], spread)
    minutes = 10 * rng.normal(1, 0.02)
    return make_trial(arm, seed, (first, last), minutes=(minutes / 2, minutes))
