"""Laboratories of drawn and chosen numbers: false winners, verdicts, lengths, files, tables, charts and pages."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from laboratory_helpers import FD, drawn_trial, make_question, make_trial, with_last_values
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import ttest_ind

import report
from dnnlib.config import UserError
from reporting.laboratory import Arm, Basis, Comparison, Laboratory, Question, Stage, Trial, read_laboratory
from reporting.laboratory_chart import draw_laboratory
from reporting.laboratory_table import result_tables, to_markdown

TWELVE = [f"arm{i}" for i in range(12)]

# Statistics of the procedure.


def draw_trials(rng: np.random.RandomState, question: Question, stage: Stage, arms: Sequence[str]) -> list[Trial]:
    """Draw a trial of each arm and seed of a stage; the arm `helpful` is better by 12."""
    means = {arm: 88 if arm == "helpful" else 100 for arm in arms}
    return [drawn_trial(rng, arm, seed, mean) for arm, mean in means.items() for seed in question.seeds[stage]]


def confirm(rng: np.random.RandomState, screened: Laboratory, promising: Sequence[str]) -> set[str]:
    """Return the promising arms that fresh seeds find better, at equal kimg or at equal minutes."""
    question = screened.question
    fresh = draw_trials(rng, question, "confirm", [question.baseline, *promising])
    found = replace(screened, trials=(*screened.trials, *fresh)).comparisons(FD, ["confirm"])
    return {item.arm for item in found if item.verdict == "better"}


def below_two_errors(laboratory: Laboratory) -> set[str]:
    """Return the arms whose mean of the first seeds is two standard errors of the difference below the baseline's."""
    question = laboratory.question
    last = {arm: [run.values[-1] for run in laboratory.values(arm, FD, "screen").values()] for arm in question.arms}
    mean = {arm: np.mean(values) for arm, values in last.items()}
    variance = {arm: np.var(values, ddof=1) / len(values) for arm, values in last.items()}
    base = question.baseline
    return {arm for arm in TWELVE if mean[arm] - mean[base] < -2 * math.sqrt(float(variance[arm] + variance[base]))}


def test_equal_arms_are_rarely_confirmed() -> None:
    """With twelve arms like the baseline, the naive rule finds winners in a third of laboratories, fresh seeds in 4 %.

    An equal arm has a difference of two standard errors in 6 % of the cases. It is promising in 10 %, and then better
    in 2.5 %, which is 3 % for twelve arms along one axis.
    """
    rng, question = np.random.RandomState(0), make_question(["baseline", *TWELVE])
    naive, promising, better = [], [], []
    for _ in range(100):
        screened = Laboratory(question=question, trials=(*draw_trials(rng, question, "screen", [*question.arms]),))
        naive.append(below_two_errors(screened))
        promising.append(screened.promising())
        better.append(confirm(rng, screened, promising[-1]))
    assert sum(map(bool, naive)) >= 20
    assert sum(map(len, naive)) >= 40
    assert sum(map(len, promising)) >= 60  # the fresh seeds reject them
    assert sum(map(bool, better)) <= 5


def test_a_large_improvement_is_confirmed() -> None:
    rng, question = np.random.RandomState(1), make_question(["baseline", *TWELVE[1:], "helpful"])
    found = 0
    for _ in range(25):
        screened = Laboratory(question=question, trials=(*draw_trials(rng, question, "screen", [*question.arms]),))
        found += "helpful" in confirm(rng, screened, screened.promising())
    assert found >= 24


# Verdicts.


def compare(laboratory: Laboratory, stage: Stage = "confirm", metric: str = FD) -> Comparison:
    """Compare the arm `other` with the baseline at equal kimg."""
    found = laboratory.compare(stage, "other", "baseline", metric, "kimg")
    assert found is not None
    return found


LOW, HIGH = (10.0, 11.0, 12.0, 11.0, 11.0), (20.0, 21.0, 22.0, 21.0, 21.0)
WIDE = (11.0, 13.0, 9.0, 10.0, 14.0)


@pytest.mark.parametrize(
    ("metric", "stage", "other", "baseline", "verdict"),
    [
        (FD, "confirm", LOW, HIGH, "better"),
        (FD, "confirm", HIGH, LOW, "worse"),
        (FD, "confirm", WIDE, LOW, "no difference shown"),
        (FD, "confirm", LOW, LOW, "no difference shown"),
        (FD, "screen", LOW, HIGH, "promising"),
        (FD, "screen", HIGH, LOW, "not promising"),
        (FD, "screen", LOW, LOW, "not promising"),
        ("is50k", "confirm", LOW, HIGH, "worse"),
        ("is50k", "confirm", HIGH, LOW, "better"),
        ("is50k", "screen", HIGH, LOW, "promising"),
        ("is50k", "screen", LOW, HIGH, "not promising"),
        ("fld5k_det_generalisation_gap", "confirm", LOW, HIGH, "lower"),
        ("kid5k_full_std", "screen", HIGH, LOW, "higher"),
        ("kid5k_full_std", "confirm", LOW, LOW, "no difference shown"),
        (FD, "confirm", LOW[:4], HIGH, "incomplete"),
        (FD, "confirm", LOW, HIGH[:4], "incomplete"),
        (FD, "screen", LOW[:2], HIGH, "incomplete"),
        (FD, "screen", LOW, HIGH[:2], "incomplete"),
    ],
)
def test_verdicts(metric: str, stage: Stage, other: Sequence[float], baseline: Sequence[float], verdict: str) -> None:
    question = make_question(metrics=(metric,))
    laboratory = with_last_values(question, stage, {"baseline": baseline, "other": other})
    assert compare(laboratory, stage, metric).verdict == verdict


def test_promising_needs_less_confidence_than_better() -> None:
    """The interval of the difference is -3 +- 1.533 * 1.633 at 80 %, and -3 +- 2.776 * 1.633 at 95 %."""
    first, second = (8.0, 10.0, 12.0), (11.0, 13.0, 15.0)
    question = make_question(confirm=3)
    verdicts = {
        stage: compare(with_last_values(question, stage, {"other": first, "baseline": second}), stage)
        for stage in question.seeds
    }
    assert verdicts["screen"].verdict == "promising"
    assert verdicts["confirm"].verdict == "no difference shown"
    assert verdicts["screen"].interval == verdicts["confirm"].interval
    assert verdicts["screen"].interval.low == pytest.approx(-3 - 2.776445 * math.sqrt(8 / 3))


def test_a_run_behind_the_last_age_makes_a_comparison_incomplete() -> None:
    question = make_question(confirm=3)
    laboratory = with_last_values(question, "confirm", {"other": LOW[:3], "baseline": HIGH[:3]})
    short = make_trial("other", 101, (31.0,), kimg=(5.0,), minutes=(1.0,))
    found = compare(laboratory.with_trial(short))
    assert (found.at, found.verdict) == (5, "incomplete")
    assert found.values == {100: 30, 101: 31, 102: 32}
    assert found.reference == {100: 40, 101: 41, 102: 42}
    assert found.interval.estimate == pytest.approx(-10)


def test_stages_do_not_share_seeds() -> None:
    """Trials of the first seeds say nothing in the confirming stage."""
    laboratory = with_last_values(make_question(), "screen", {"other": LOW[:3], "baseline": HIGH[:3]})
    assert laboratory.values("other", FD, "confirm") == {}
    assert laboratory.compare("confirm", "other", "baseline", FD, "kimg") is None
    assert {item.stage for item in laboratory.comparisons(FD)} == {"screen"}


# Equal kimg and equal minutes.


def slow_laboratory(first: float = 20.0, device: str = "cpu") -> Laboratory:
    """Return a laboratory whose arm `other` takes about twice as long; the values of seeds are 1, 1.1 and 1.2 times."""
    trials = []
    for seed, scale in enumerate((1.0, 1.1, 1.2)):
        fast = make_trial("baseline", seed, (100 * scale, 80 * scale), minutes=(12.0, 24.0))
        slow = make_trial("other", seed, (90 * scale, 45 * scale), minutes=(first, 40.0), device=device)
        trials += [fast, slow]
    return Laboratory(question=make_question(), trials=tuple(trials))


def test_whole_batches_do_not_prevent_a_comparison_at_one_age() -> None:
    question = make_question(["baseline", "other"], evaluate=(10,))
    ages = {"baseline": 10.0, "other": 10.016}
    trials = [
        make_trial(arm, seed, (value,), kimg=(kimg,), minutes=(2.0,))
        for arm, kimg in ages.items()
        for seed, value in zip(question.seeds["confirm"], HIGH if arm == "other" else LOW, strict=True)
    ]
    found = compare(Laboratory(question=question, trials=tuple(trials)))
    assert found.at == 10.0
    assert [*found.values.values()] == pytest.approx(HIGH)
    assert [*found.reference.values()] == pytest.approx(LOW)


def test_arms_are_compared_at_equal_minutes() -> None:
    """The slow runs have a distance of 90 after 20 minutes and 45 after 40: 1800 / minutes, which is 75 after 24."""
    laboratory = slow_laboratory()
    at_kimg = laboratory.compare("screen", "other", "baseline", FD, "kimg")
    at_minutes = laboratory.compare("screen", "other", "baseline", FD, "minutes")
    assert at_kimg is not None
    assert at_minutes is not None
    assert (at_kimg.at, at_minutes.at) == (10, 24)
    assert at_kimg.values == pytest.approx({0: 45, 1: 49.5, 2: 54})
    assert at_minutes.values == pytest.approx({0: 75, 1: 82.5, 2: 90})
    assert at_kimg.reference == at_minutes.reference == pytest.approx({0: 80, 1: 88, 2: 96})
    assert (at_kimg.interval.estimate, at_minutes.interval.estimate) == pytest.approx((-38.5, -5.5))
    assert (at_kimg.verdict, at_minutes.verdict) == ("promising", "not promising")


def test_negative_values_are_interpolated_in_logarithmic_time() -> None:
    own = make_trial("other", 0, (-1.0, 3.0), kimg=(1.0, 16.0), minutes=(2.0, 8.0)).metrics[FD]
    assert (own.at("kimg", 4), own.at("minutes", 4)) == pytest.approx((1, 1))
    assert (own.at("kimg", 1), own.at("kimg", 16)) == (-1, 3)


def test_minutes_before_the_first_evaluation_are_not_compared() -> None:
    laboratory = slow_laboratory(first=24.5)
    assert laboratory.compare("screen", "other", "baseline", FD, "minutes") is None
    assert laboratory.compare("screen", "other", "baseline", FD, "kimg") is not None
    assert slow_laboratory(first=24.0).compare("screen", "other", "baseline", FD, "minutes") is not None


def test_minutes_on_different_devices_are_not_compared() -> None:
    laboratory = slow_laboratory(device="NVIDIA H100")
    assert laboratory.compare("screen", "other", "baseline", FD, "minutes") is None
    assert laboratory.compare("screen", "other", "baseline", FD, "kimg") is not None


@pytest.mark.parametrize(("ours", "theirs"), [(1, 3), (3, 1), (0, 3), (3, 0)])
def test_a_comparison_needs_two_runs_of_each_arm(ours: int, theirs: int) -> None:
    last = {"other": LOW[:ours], "baseline": HIGH[:theirs]}
    laboratory = with_last_values(make_question(), "screen", last)
    assert laboratory.compare("screen", "other", "baseline", FD, "kimg") is None
    assert list(laboratory.comparisons(FD)) == []


# Arms of different lengths.

SPREAD = (-1.0, 0.0, 1.0)  # of the values by seed, with a deviation of 1
WELCH = 2.776445 * math.sqrt(2 / 3)  # half of the interval of 95 % for two arms with these values: 4 degrees of freedom


def unequal(
    at_20: float = 40.0, at_40: float = 20.0, base_40: float = 30.0, base_80: float = 25.0, stage: Stage = "screen"
) -> Laboratory:
    """Return a laboratory with the means of a baseline of 80 kimg and of an arm `other` of 40 kimg."""
    question = make_question(evaluate=(20, 40, 80), own_ages={"other": (20, 40)}, confirm=3)
    trials = [
        trial
        for seed, x in zip(question.seeds[stage], SPREAD, strict=True)
        for trial in (
            make_trial(
                "baseline",
                seed,
                (50 + x, base_40 + x, base_80 + x),
                kimg=(20.032, 40.0, 80.032),
                minutes=(20.0, 40.0, 80.0),
            ),
            make_trial("other", seed, (at_20 + x, at_40 + x), kimg=(20.032, 40.0), minutes=(40.0, 80.0)),
        )
    ]
    return Laboratory(question=question, trials=tuple(trials))


def with_long_arm(laboratory: Laboratory) -> Laboratory:
    """Return a laboratory with an arm `long`, whose runs are those of the baseline."""
    question = laboratory.question
    arms = question.arms | {"long": Arm(options="", against="baseline")}
    runs = [replace(trial, arm="long") for trial in laboratory.trials if trial.arm == "baseline"]
    return Laboratory(question=replace(question, arms=arms), trials=(*laboratory.trials, *runs))


def compare_along(laboratory: Laboratory, axis: Basis, stage: Stage = "screen") -> Comparison:
    """Compare the arm `other` with the baseline along an axis."""
    found = laboratory.compare(stage, "other", "baseline", FD, axis)
    assert found is not None
    return found


def test_arms_have_ages_of_their_own() -> None:
    own_ages = {"parent": (20, 40), "child": (15, 40, 80)}
    question = make_question(FAMILY, parents={"child": "parent"}, evaluate=(40, 80), own_ages=own_ages)
    assert [question.ages(arm) for arm in FAMILY] == [(40, 80), (20, 40), (15, 40, 80)]
    assert [question.step(arm) for arm in FAMILY] == [40, 20, 5]
    assert [question.length(arm) for arm in FAMILY] == [80, 40, 80]


def test_arms_of_different_lengths_are_compared_at_their_ends() -> None:
    laboratory = unequal(stage="confirm")
    found = {item.axis: item for item in laboratory.comparisons(FD)}
    assert [*found] == ["kimg", "minutes", "end"]
    positions = {axis: (item.at, item.reference_at) for axis, item in found.items()}
    assert positions == {"kimg": (40, 40), "minutes": (80, 80), "end": (40, 80)}
    ends = found["end"]
    assert ends.values == {100: 19, 101: 20, 102: 21}
    assert ends.reference == {100: 24, 101: 25, 102: 26}
    assert (ends.interval.low, ends.interval.high) == pytest.approx((-5 - WELCH, -5 + WELCH), rel=1e-6)
    assert found["kimg"].reference == {100: 29, 101: 30, 102: 31}
    assert {item.verdict for item in found.values()} == {"better"}
    assert compare_along(unequal(base_80=10.0, stage="confirm"), "end", "confirm").verdict == "worse"
    assert compare_along(unequal(base_80=21.0, stage="confirm"), "end", "confirm").verdict == "no difference shown"


def test_intervals_at_the_ends_are_those_of_scipy() -> None:
    ours, theirs = (19.1, 24.7, 21.3), (27.9, 26.4, 26.8)
    question = make_question(evaluate=(20, 80), own_ages={"other": (20, 40)})
    trials = [make_trial("other", seed, (50.0, x), kimg=(20.0, 40.0)) for seed, x in enumerate(ours)]
    trials += [make_trial("baseline", seed, (50.0, x), kimg=(20.0, 80.0)) for seed, x in enumerate(theirs)]
    found = compare_along(Laboratory(question=question, trials=tuple(trials)), "end").interval
    expected = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_arms_of_equal_length_are_not_compared_at_their_ends() -> None:
    """Ages before the last one may differ."""
    trials = [make_trial(arm, seed, (9.0 + seed, 8.0 + seed)) for arm in ("baseline", "other") for seed in range(3)]
    laboratory = Laboratory(question=make_question(own_ages={"other": (2, 10)}), trials=tuple(trials))
    assert {item.axis for item in laboratory.comparisons(FD)} == {"kimg", "minutes"}
    assert laboratory.compare("screen", "other", "baseline", FD, "end") is None


def cut(laboratory: Laboratory, arm: str, count: int) -> Laboratory:
    """Return a laboratory with only the first values of the run of an arm with seed 0."""
    (trial,) = (trial for trial in laboratory.trials if (trial.arm, trial.seed) == (arm, 0))
    own = trial.metrics[FD]
    short = make_trial(arm, 0, own.values[:count], kimg=own.kimg[:count], minutes=own.minutes[:count])
    return laboratory.with_trial(short)


@pytest.mark.parametrize(("arm", "count"), [("other", 1), ("baseline", 2)])
def test_runs_that_have_not_ended_are_left_out_at_the_ends(arm: str, count: int) -> None:
    """The baseline with seed 0 has reached the end of the other arm, but not its own."""
    laboratory = cut(unequal(), arm, count)
    at_kimg, at_ends = compare_along(laboratory, "kimg"), compare_along(laboratory, "end")
    assert (at_kimg.verdict, at_ends.verdict) == ("incomplete", "incomplete")
    assert (len(at_kimg.values), len(at_kimg.reference)) == (3, 3)
    values = {"other": {0: 19, 1: 20, 2: 21}, "baseline": {0: 24, 1: 25, 2: 26}}
    del values[arm][0]
    assert {"other": at_ends.values, "baseline": at_ends.reference} == values
    assert laboratory.promising() == []
    trials = tuple(trial for trial in laboratory.trials if (trial.arm, trial.seed) != (arm, 1))
    assert replace(laboratory, trials=trials).compare("screen", "other", "baseline", FD, "end") is None


@pytest.mark.parametrize(
    ("base_40", "base_80", "verdicts", "promising"),
    [
        (30.0, 20.0, ("promising", "not promising"), []),
        (20.0, 25.0, ("not promising", "promising"), ["other"]),
        (30.0, 25.0, ("promising", "promising"), ["other"]),
    ],
)
def test_arms_of_different_lengths_are_promising_at_their_ends(
    base_40: float, base_80: float, verdicts: tuple[str, str], promising: list[str]
) -> None:
    laboratory = unequal(base_40=base_40, base_80=base_80)
    assert (compare_along(laboratory, "kimg").verdict, compare_along(laboratory, "end").verdict) == verdicts
    assert laboratory.promising() == promising


def test_values_after_the_last_age_of_an_arm_are_ignored() -> None:
    question = make_question(evaluate=(40, 80), own_ages={"other": (20, 40)})
    trials = [make_trial(arm, 0, (9.0, 8.0), kimg=(40.0, end)) for arm, end in (("baseline", 80.0), ("other", 65.0))]
    laboratory = Laboratory(question=question, trials=tuple(trials))
    assert laboratory.values("baseline", FD, "screen")[0].kimg == (40, 80)
    assert laboratory.values("other", FD, "screen")[0].kimg == (40,)


# References.

FAMILY = ("baseline", "parent", "child")


def family(baseline: float, parent: float, child: float, metrics: tuple[str, ...] = (FD,)) -> Laboratory:
    """Return a laboratory whose arm `child` extends `parent`, with means of three seeds."""
    question = make_question(FAMILY, parents={"child": "parent"}, metrics=metrics)
    means = dict(zip(FAMILY, (baseline, parent, child), strict=True))
    return with_last_values(question, "screen", {arm: (mean - 1, mean, mean + 1) for arm, mean in means.items()})


def test_an_arm_is_compared_with_its_parent_and_the_baseline() -> None:
    laboratory = family(100, 90, 80)
    question = laboratory.question
    assert [question.references(arm) for arm in FAMILY] == [[], ["baseline"], ["parent", "baseline"]]
    found = {(item.arm, item.against, item.axis): item.interval.estimate for item in laboratory.comparisons(FD)}
    assert found == {
        ("parent", "baseline", "kimg"): pytest.approx(-10),
        ("parent", "baseline", "minutes"): pytest.approx(-10),
        ("child", "parent", "kimg"): pytest.approx(-10),
        ("child", "parent", "minutes"): pytest.approx(-10),
        ("child", "baseline", "kimg"): pytest.approx(-20),
        ("child", "baseline", "minutes"): pytest.approx(-20),
    }


@pytest.mark.parametrize(
    ("means", "promising"),
    [
        ((100, 90, 80), ["parent", "child"]),
        ((100, 90, 90), ["parent"]),  # better than the baseline only
        ((100, 120, 110), ["child"]),  # better than its parent only
        ((100, 110, 120), []),
    ],
)
def test_an_arm_is_promising_against_its_own_reference(means: tuple[float, float, float], promising: list[str]) -> None:
    assert family(*means).promising() == promising


def test_an_arm_is_promising_by_the_first_metric_alone() -> None:
    question = make_question(["baseline", "first", "second"], metrics=(FD, "swd500"))
    means = {"baseline": (100, 100), "first": (90, 100), "second": (100, 90)}
    trials = [
        make_trial(arm, seed, {FD: (0, fd + seed), "swd500": (0, swd + seed)})
        for arm, (fd, swd) in means.items()
        for seed in range(3)
    ]
    laboratory = Laboratory(question=question, trials=tuple(trials))
    assert laboratory.promising() == ["first"]
    assert {item.arm for item in laboratory.comparisons("swd500") if item.verdict == "promising"} == {"second"}


def test_an_arm_is_promising_at_equal_kimg() -> None:
    """At equal minutes the arm `other` is better by far, because its runs take a third of the time."""
    trials = []
    for seed in range(3):
        trials.append(make_trial("baseline", seed, (100.0 + seed, 50.0 + seed), minutes=(15.0, 30.0)))
        trials.append(make_trial("other", seed, (100.0 + seed, 50.0 + seed), minutes=(5.0, 15.0)))
    laboratory = Laboratory(question=make_question(), trials=tuple(trials))
    assert {item.axis: item.verdict for item in laboratory.comparisons(FD)} == {
        "kimg": "not promising",
        "minutes": "promising",
    }
    assert laboratory.promising() == []


# Trials.


def test_a_trial_answers_a_question_with_all_metrics_and_ages() -> None:
    question = make_question(metrics=(FD, "swd500"), evaluate=(5, 10))
    trial = make_trial("other", 0, {FD: (9, 8), "swd500": (7, 6)}, kimg=(5.016, 10.0))
    assert trial.answers(question)
    assert trial.answers(make_question(evaluate=(10,)))
    assert not trial.answers(make_question(evaluate=(5, 10, 20)))
    assert not trial.answers(make_question(evaluate=(2,)))
    assert not trial.answers(make_question(evaluate=(4, 5, 10)))
    assert not trial.answers(make_question(metrics=(FD, "kid50k_full")))
    assert not make_trial("other", 0, (9, 8), kimg=(4.9, 10.0)).answers(make_question())
    assert make_trial("other", 0, (9, 8), kimg=(6.144, 10.24)).answers(make_question())  # batches of 2048


def test_a_trial_answers_a_question_with_the_ages_of_its_arm() -> None:
    question = make_question(evaluate=(10, 20), own_ages={"other": (5, 10)})
    assert make_trial("other", 0, (9, 8), kimg=(5.0, 10.0)).answers(question)
    assert not make_trial("other", 0, (9, 8), kimg=(10.0, 20.0)).answers(question)
    assert not make_trial("baseline", 0, (9, 8), kimg=(5.0, 10.0)).answers(question)
    assert make_trial("baseline", 0, (9, 8), kimg=(10.0, 20.0)).answers(question)
    assert make_trial("other", 0, (9, 8), kimg=(5.0, 14.0)).answers(question)
    assert not make_trial("other", 0, (9, 8), kimg=(5.0, 16.0)).answers(question)  # at most one interval late
    assert not make_trial("removed", 0, (9, 8), kimg=(10.0, 20.0)).answers(question)


def test_a_trial_replaces_an_earlier_one_of_its_arm_and_seed() -> None:
    laboratory = Laboratory(question=make_question(FAMILY, parents={"child": "parent"}))
    cells = [("removed", 0), ("child", 1), ("baseline", 1), ("baseline", 0), ("parent", 100)]
    for arm, seed in cells:
        laboratory = laboratory.with_trial(make_trial(arm, seed, (2.0, 1.0)))
    newer = make_trial("baseline", 1, (4.0, 3.0))
    replaced = laboratory.with_trial(newer)
    order = [("baseline", 0), ("baseline", 1), ("parent", 100), ("child", 1), ("removed", 0)]
    assert [(trial.arm, trial.seed) for trial in laboratory.trials] == order
    assert [(trial.arm, trial.seed) for trial in replaced.trials] == order
    assert [trial for trial in replaced.trials if trial not in laboratory.trials] == [newer]


def test_a_new_trial_keeps_the_other_metrics_of_an_earlier_one() -> None:
    old = make_trial("other", 1, {FD: (4.0, 3.0), "swd500": (8.0, 7.0)})
    new = make_trial("other", 1, {FD: (2.0, 1.0)}, device="H100")
    (kept,) = Laboratory(question=make_question(), trials=(old,)).with_trial(new).trials
    assert kept.metrics == {FD: new.metrics[FD], "swd500": old.metrics["swd500"]}
    assert kept.device == "H100"


def test_values_after_the_last_age_of_a_question_are_ignored() -> None:
    """A question may be shortened; runs then have evaluations after its end."""
    trials = [
        make_trial(arm, seed, (mean + seed, seed), kimg=(5.016, 10.016))
        for arm, mean in (("baseline", 20.0), ("other", 10.0))
        for seed in range(3)
    ]
    laboratory = Laboratory(question=make_question(evaluate=(5,)), trials=tuple(trials))
    assert laboratory.values("other", FD, "screen")[2] == trials[5].metrics[FD].before(10)
    assert laboratory.values("other", FD, "screen")[2].kimg == (5.016,)
    found = compare(laboratory, "screen")
    assert (found.at, found.interval.estimate, found.verdict) == (5.016, pytest.approx(-10), "promising")
    later = Laboratory(question=make_question(evaluate=(2,)), trials=tuple(trials))
    assert later.values("other", FD, "screen") == {}


CONDITIONS = {"data_hash": "abc", "mirror": False}


@pytest.mark.parametrize(
    ("conditions", "device", "problem"),
    [
        (CONDITIONS, "cpu, 1 threads", None),
        (
            {**CONDITIONS, "data_hash": "def"},
            "cpu, 1 threads",
            "data_hash is def for other, seed 1, and abc for baseline",
        ),
        ({"data_hash": "abc"}, "cpu, 1 threads", "mirror is None for other, seed 1, and False for baseline"),
        (CONDITIONS, "NVIDIA H100", "device is gpu for other, seed 1, and cpu for baseline"),
    ],
)
def test_values_of_different_conditions_are_refused(
    conditions: dict[str, Any], device: str, problem: str | None
) -> None:
    first = make_trial("baseline", 0, (9.0, 8.0), device="cpu, 2 threads", conditions=CONDITIONS)
    other = make_trial("other", 1, (9.0, 8.0), device=device, conditions=conditions)
    laboratory = Laboratory(question=make_question(), trials=(first, other))
    if problem is None:
        laboratory.check_conditions()
        return
    with pytest.raises(UserError, match=f"^{FD}: {problem}, seed 0: values are not comparable"):
        laboratory.check_conditions()
    removed = make_question(["baseline", "third"])  # trials of arms that are no longer asked about
    replace(laboratory, question=removed).check_conditions()


# The file.


def small_laboratory() -> Laboratory:
    """Return a laboratory with a helpful arm, and an arm without trials."""
    question = make_question(["baseline", "other", "untried"], confirm=2)
    trials = [
        make_trial(arm, seed, (mean + 20 + seed, mean + seed), minutes=(minutes / 2, minutes))
        for arm, mean, minutes in (("baseline", 100, 2.0), ("other", 90, 4.0))
        for seed in range(3)
    ]
    return Laboratory(question=question, trials=tuple(trials))


def test_a_laboratory_is_read_as_it_was_written(tmp_path: Path) -> None:
    others = family(3, 2, 1, metrics=(FD, "is50k")), slow_laboratory(device="H100"), unequal()
    for laboratory in (small_laboratory(), *others):
        laboratory.write(tmp_path)
        assert read_laboratory(tmp_path) == laboratory


def test_a_laboratory_without_own_ages_is_written_as_before(tmp_path: Path) -> None:
    recorded = Path(__file__).parent.parent / "docs" / "laboratories" / "what-helps"
    read_laboratory(recorded).write(tmp_path)
    assert (tmp_path / "laboratory.json").read_bytes() == (recorded / "laboratory.json").read_bytes()


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "question missing": lambda content: content.pop("question"),
    "trials missing": lambda content: content.pop("trials"),
    "trials null": lambda content: content.update(trials=None),
    "trials a table": lambda content: content.update(trials={"a": 1}),
    "trial a number": lambda content: content["trials"].append(3),
    "question a list": lambda content: content.update(question=[]),
    "question a number": lambda content: content["question"].update(question=3),
    "unknown field": lambda content: content["question"].update(colour="red"),
    "base missing": lambda content: content["question"].pop("base"),
    "base a number": lambda content: content["question"].update(base=5),
    "evaluate missing": lambda content: content["question"].pop("evaluate"),
    "evaluate empty": lambda content: content["question"].update(evaluate=[]),
    "evaluate a number": lambda content: content["question"].update(evaluate=5),
    "evaluate fractional": lambda content: content["question"].update(evaluate=[2.5]),
    "evaluate unsorted": lambda content: content["question"].update(evaluate=[10, 5]),
    "evaluate mixed": lambda content: content["question"].update(evaluate=[5, "10"]),
    "ages of an arm empty": lambda content: content["question"]["arms"]["other"].update(evaluate=[]),
    "ages of an arm a number": lambda content: content["question"]["arms"]["other"].update(evaluate=5),
    "ages of an arm unsorted": lambda content: content["question"]["arms"]["other"].update(evaluate=[10, 5]),
    "ages of an arm texts": lambda content: content["question"]["arms"]["other"].update(evaluate=["5"]),
    "metrics empty": lambda content: content["question"].update(metrics=[]),
    "metrics text": lambda content: content["question"].update(metrics="swd5k"),
    "metrics numbers": lambda content: content["question"].update(metrics=[5]),
    "metric a path": lambda content: content["question"].update(metrics=["../swd5k"]),
    "arms empty": lambda content: content["question"].update(arms={}),
    "arms a list": lambda content: content["question"].update(arms=["baseline", "other"]),
    "one arm": lambda content: [content["question"]["arms"].pop(name) for name in ("other", "untried")],
    "many arms": lambda content: content["question"]["arms"].update(
        {f"arm{i}": {"options": "", "against": "baseline"} for i in range(100)}
    ),
    "arm a text": lambda content: content["question"]["arms"].update(other="--lr=1"),
    "arm a path": lambda content: content["question"]["arms"].update({"../x": {"options": "", "against": "other"}}),
    "arm without options": lambda content: content["question"]["arms"]["other"].pop("options"),
    "options a number": lambda content: content["question"]["arms"]["other"].update(options=5),
    "unknown reference": lambda content: content["question"]["arms"]["other"].update(against="nobody"),
    "reference a list": lambda content: content["question"]["arms"]["other"].update(against=[1]),
    "no reference": lambda content: content["question"]["arms"]["other"].update(against=None),
    "own reference": lambda content: content["question"]["arms"]["other"].update(against="other"),
    "baseline with reference": lambda content: content["question"]["arms"]["baseline"].update(against="other"),
    "unknown stage": lambda content: content["question"]["seeds"].update(third=[7]),
    "stage missing": lambda content: content["question"]["seeds"].pop("screen"),
    "seeds a list": lambda content: content["question"].update(seeds=[1, 2]),
    "seeds a number": lambda content: content["question"]["seeds"].update(screen=3),
    "seeds fractional": lambda content: content["question"]["seeds"].update(screen=[0.5]),
    "seeds of both stages": lambda content: content["question"]["seeds"].update(confirm=[2, 3]),
    "arm of trial a number": lambda content: content["trials"][0].update(arm=1),
    "seed missing": lambda content: content["trials"][0].pop("seed"),
    "seed a text": lambda content: content["trials"][0].update(seed="0"),
    "seed fractional": lambda content: content["trials"][0].update(seed=0.5),
    "options missing": lambda content: content["trials"][0].pop("options"),
    "options of trial a number": lambda content: content["trials"][0].update(options=5),
    "conditions a number": lambda content: content["trials"][0]["metrics"][FD].update(conditions=5),
    "conditions a list": lambda content: content["trials"][0]["metrics"][FD].update(conditions=["mirror"]),
    "kimg zero": lambda content: content["trials"][0]["metrics"][FD].update(kimg=[0, 5]),
    "minutes zero": lambda content: content["trials"][0]["metrics"][FD].update(minutes=[0.0, 1.0]),
    "device null": lambda content: content["trials"][0].update(device=None),
    "metrics of trial a list": lambda content: content["trials"][0].update(metrics=[FD]),
    "values a list": lambda content: content["trials"][0]["metrics"].update({FD: [1, 2]}),
    "kimg missing": lambda content: content["trials"][0]["metrics"][FD].pop("kimg"),
    "kimg a text": lambda content: content["trials"][0]["metrics"][FD].update(kimg="12"),
    "kimg too short": lambda content: content["trials"][0]["metrics"][FD]["kimg"].pop(),
    "kimg descending": lambda content: content["trials"][0]["metrics"][FD].update(kimg=[10, 5]),
    "minutes too long": lambda content: content["trials"][0]["metrics"][FD]["minutes"].append(9.0),
    "minutes descending": lambda content: content["trials"][0]["metrics"][FD].update(minutes=[2, 1]),
    "minutes huge": lambda content: content["trials"][0]["metrics"][FD].update(minutes=[1, 1e300]),
    "values empty": lambda content: content["trials"][0]["metrics"][FD].update(kimg=[], minutes=[], values=[]),
    "value a text": lambda content: content["trials"][0]["metrics"][FD].update(values=[1, "2"]),
    "value null": lambda content: content["trials"][0]["metrics"][FD].update(values=[1, None]),
    "value true": lambda content: content["trials"][0]["metrics"][FD].update(values=[1, True]),
    "value nan": lambda content: content["trials"][0]["metrics"][FD].update(values=[1, math.nan]),
    "value infinite": lambda content: content["trials"][0]["metrics"][FD].update(values=[1, math.inf]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_corrupt_laboratories_are_refused(tmp_path: Path, change: Change) -> None:
    small_laboratory().write(tmp_path)
    path = tmp_path / "laboratory.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_laboratory(tmp_path)
    assert str(caught.value).startswith(f"{path}: not a laboratory (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[1, 2]", "null", "3", '"text"', "{}", '{"question": ', "[" * 10000, "\x00", "1" * 5000]
)
def test_files_that_are_no_laboratory_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "laboratory.json").write_text(text)
    with pytest.raises(UserError, match=r"laboratory\.json: not a laboratory \(") as caught:
        read_laboratory(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_unreadable_laboratories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"laboratory\.json: no such file; benchmarks/learning\.py writes it"):
        read_laboratory(tmp_path)
    (tmp_path / "laboratory.json").mkdir()
    with pytest.raises(UserError, match=r"laboratory\.json: cannot be read \("):
        read_laboratory(tmp_path)


# Tables.

GOLDEN = """\
| arm | options of train.py |
| --- | --- |
| all | `--cfg=tiny` |
| baseline |  |
| other | `--other` |
| untried | `--untried` |

**fid10k_full at 10 kimg, first seeds 0, 1, 2; promising: the 80 % interval excludes 0**

| arm | values by seed | mean ± deviation | minutes | against | at equal kimg | at equal minutes |
| --- | --- | --- | --- | --- | --- | --- |
| baseline | 100.00, 101.00, 102.00 | 101.00 ± 1.00 | 2.0 |  |  |  |
| other | 90.00, 91.00, 92.00 | 91.00 ± 1.00 | 4.0 | baseline | -10.00 [-12.27, -7.73] **promising** \
| +10.00 [+7.73, +12.27] at 2 minutes not promising |
"""


def test_the_table_has_every_arm_and_comparison() -> None:
    """The intervals are +- 2.776 sqrt(2 / 3) = 2.27; at 2 minutes, the slow arm is at 5 kimg with 20 more."""
    assert to_markdown(small_laboratory()) == GOLDEN


def test_tables_list_each_reference_of_an_arm() -> None:
    ((_, rows),) = result_tables(family(100, 90, 80))
    assert [(row[0], row[4]) for row in rows[1:]] == [
        ("baseline", ""),
        ("parent", "baseline"),
        ("child", "parent"),
        ("", "baseline"),
    ]


def test_verdicts_of_the_confirming_stage_are_bold() -> None:
    question = make_question(["baseline", "good", "bad", "same"], confirm=3)
    last = {"baseline": (50.0, 51.0, 52.0), "good": LOW[:3], "bad": (90.0, 91.0, 92.0), "same": (51.0, 50.0, 52.0)}
    text = to_markdown(with_last_values(question, "confirm", last))
    assert "**fid10k_full at 10 kimg, fresh seeds 100, 101, 102**" in text
    assert [word for word in ("**better**", "**worse**", "no difference shown") if text.count(word) == 2] == [
        "**better**",
        "**worse**",
        "no difference shown",
    ]


def test_a_single_run_has_no_deviation_and_no_comparison() -> None:
    laboratory = with_last_values(make_question(), "screen", {"baseline": (17.0,), "other": (18.0,)})
    ((_, rows),) = result_tables(laboratory)
    assert rows[1:] == [
        ["baseline", "17.00 (1 of 3 runs)", "17.00", "2.0", "", "", ""],
        ["other", "18.00 (1 of 3 runs)", "18.00", "2.0", "baseline", "no comparison", "no comparison"],
    ]


def test_runs_behind_the_last_age_are_marked() -> None:
    laboratory = with_last_values(make_question(), "screen", {"baseline": (17.0,)})
    short = make_trial("baseline", 1, (31.0,), kimg=(5.016,), minutes=(1.0,))
    ((_, rows),) = result_tables(laboratory.with_trial(short))
    assert rows[1][1:4] == ["17.00, 31.00 (at 5.016 kimg) (2 of 3 runs)", "24.00 ± 9.90", "1.5"]


def test_small_values_are_shown_with_more_decimals() -> None:
    question = make_question(metrics=("kid10k_full",), screen=2)
    last = {"baseline": (0.0123, 0.0125), "other": (0.0101, 0.0103)}
    ((_, rows),) = result_tables(with_last_values(question, "screen", last))
    assert rows[2][1:3] == ["0.01010, 0.01030", "0.01020 ± 0.00014"]
    assert rows[2][5].startswith("-0.00220 [")


def test_bars_and_line_breaks_stay_within_a_cell() -> None:
    question = make_question()
    other = replace(question.arms["other"], options="--set=a|b\n--glr=1")
    laboratory = Laboratory(question=replace(question, arms=question.arms | {"other": other}))
    assert "| other | `--set=a\\|b --glr=1` |\n" in to_markdown(laboratory)


UNEQUAL = """\
**fid10k_full at the end of each run, fresh seeds 100, 101, 102**

| arm | values by seed | mean ± deviation | kimg | minutes | against | at equal kimg | at equal minutes \
| at their ends |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| baseline | 24.00, 25.00, 26.00 | 25.00 ± 1.00 | 80 | 80.0 |  |  |  |  |
| other | 19.00, 20.00, 21.00 | 20.00 ± 1.00 | 40 | 80.0 | baseline | -10.00 [-12.27, -7.73] **better** \
| -5.00 [-7.27, -2.73] at 80 minutes **better** | -5.00 [-7.27, -2.73] at 40 and 80 kimg **better** |
"""


def test_the_table_shows_different_lengths_and_their_ends() -> None:
    assert to_markdown(unequal(stage="confirm")).endswith(f"\n\n{UNEQUAL}")


def test_the_title_of_a_table_has_the_length_of_all_arms() -> None:
    ages = {"baseline": (2, 10), "other": (5, 10)}
    laboratory = with_last_values(make_question(evaluate=(20,), own_ages=ages), "screen", {"other": LOW[:3]})
    ((title, rows),) = result_tables(laboratory)
    assert title.startswith(f"{FD} at 10 kimg, ")
    assert "at their ends" not in rows[0]


def test_the_title_of_a_table_states_random_noise() -> None:
    trials = [make_trial("other", 0, (20, 10), conditions={"noise_mode": mode}) for mode in ("random", "const")]
    titles = [
        title for own in trials for title, _ in result_tables(Laboratory(question=make_question(), trials=(own,)))
    ]
    assert [title.partition(", ")[2].startswith("random noise, ") for title in titles] == [True, False]


def test_arms_of_equal_length_have_no_cell_of_their_ends() -> None:
    laboratory = with_long_arm(unequal())
    trials = tuple(trial for trial in laboratory.trials if trial.arm != "other" or trial.seed == 0)
    ((_, rows),) = result_tables(replace(laboratory, trials=trials))
    assert [(row[0], row[3], row[8]) for row in rows[1:]] == [
        ("baseline", "80", ""),
        ("other", "40", "no comparison"),
        ("long", "80", ""),
    ]


def test_runs_behind_the_last_age_of_their_arm_are_marked() -> None:
    ((_, rows),) = result_tables(cut(unequal(), "other", 1))
    assert rows[1][1] == "24.00, 25.00, 26.00"
    assert rows[2][1] == "39.00 (at 20.032 kimg), 20.00, 21.00"


# Charts and pages.


def one_evaluation() -> Laboratory:
    """Return a laboratory of runs with one value each."""
    trials = [make_trial(arm, seed, (9.0 + seed,), kimg=(5.0,), minutes=(1.0,)) for arm in FAMILY for seed in range(3)]
    question = make_question(FAMILY, parents={"child": "parent"}, evaluate=(5,))
    return Laboratory(question=question, trials=tuple(trials))


def constant() -> Laboratory:
    return with_last_values(make_question(), "screen", {"baseline": (5.0, 5.0, 5.0), "other": (5.0, 5.0, 5.0)})


def huge() -> Laboratory:
    return with_last_values(make_question(), "screen", {"baseline": (1e99, 3e99, 2e99), "other": (-1e99, 0, 1.0)})


def unusual() -> Laboratory:
    """Return a laboratory whose question contains an invalid formula, HTML and half of a surrogate pair."""
    laboratory = small_laboratory()
    text = "Is $x_^ > $y^2 | <b>better</b>? \ud800"
    return replace(laboratory, question=replace(laboratory.question, question=text))


@pytest.mark.parametrize(
    "make",
    [
        one_evaluation,
        constant,
        huge,
        unusual,
        unequal,
        lambda: Laboratory(question=make_question()),  # no trials
        lambda: with_last_values(make_question(), "screen", {"other": (1.0,)}),  # no comparisons
        lambda: with_last_values(make_question(["baseline", *TWELVE[:4]]), "screen", {"arm3": (1.0, 2.0)}),
    ],
)
def test_charts_are_png_files(make: Callable[[], Laboratory]) -> None:
    with Image.open(io.BytesIO(draw_laboratory(make(), FD))) as image:
        image.load()
        assert image.format == "PNG"
        assert image.size[0] == 1375  # 12.5 inches
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures of charts instead of rendering them."""
    collected: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: collected.append(figure))
    return collected


def texts_beside(figure: Any) -> list[str]:
    """Return the texts beside the intervals of a chart: the heading and the verdicts."""
    return [text.get_text() for text in figure.axes[0].texts]


def key_of(figure: Any) -> dict[str, tuple[str, str]]:
    """Return the marker and its face in the key of a chart."""
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return {
        text.get_text(): (line.get_marker(), to_hex(line.get_markerfacecolor()))
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }


def test_a_chart_shows_the_verdict_at_equal_kimg(figures: list[Any]) -> None:
    draw_laboratory(small_laboratory(), FD)
    assert texts_beside(figures[0]) == ["at equal kimg:", "promising"]
    assert [*key_of(figures[0])] == ["first seeds, equal kimg", "first seeds, equal minutes"]


def test_a_chart_of_different_lengths_shows_their_ends(figures: list[Any]) -> None:
    """A diamond marks the difference of -5; equal minutes are drawn at the same place, with another marker."""
    draw_laboratory(unequal(base_40=20.0), FD)
    assert texts_beside(figures[0]) == ["at their ends:", "promising"]
    key = key_of(figures[0])
    assert [*key] == ["first seeds, equal kimg", "first seeds, equal minutes", "first seeds, at their ends"]
    assert len({*key.values()}) == 3
    lines = figures[0].axes[0].lines
    assert [line.get_xdata()[0] for line in lines if line.get_marker() == "D"] == [pytest.approx(-5)]


def test_rows_of_a_chart_state_the_ends_if_lengths_are_mixed(figures: list[Any]) -> None:
    draw_laboratory(with_long_arm(unequal()), FD)
    assert texts_beside(figures[0]) == ["at equal kimg:", "at their ends: promising", "not promising"]


def test_the_mean_curve_of_each_arm_has_its_own_ages(figures: list[Any]) -> None:
    question = make_question(evaluate=(20, 80), own_ages={"other": (40,)}, confirm=3)
    draw_laboratory(replace(unequal(), question=question), FD)
    baseline, other = (line.get_xydata() for line in figures[0].axes[1].lines if line.get_marker() == ".")
    assert baseline == pytest.approx(np.array([(20, 50), (80, 25)]), rel=2e-3)
    assert other == pytest.approx(np.array([(40, 20)]))


def test_intervals_of_a_row_stay_apart_from_those_of_the_next(figures: list[Any]) -> None:
    """Two stages along three axes are six intervals in a row, which is higher than a row of up to four."""
    first, fresh = unequal(), unequal(stage="confirm")
    draw_laboratory(first, FD)
    draw_laboratory(replace(first, trials=(*first.trials, *fresh.trials)), FD)
    heights = [line.get_ydata()[0] for line in figures[1].axes[0].lines if len(line.get_xdata()) == 2][:6]
    assert len(set(heights)) == 6
    assert max(map(abs, heights)) < 0.4
    assert figures[1].get_figheight() - figures[0].get_figheight() == pytest.approx(0.22)


def run_report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(report.main, [str(argument) for argument in arguments])


def assert_refused(result: Result, message: str) -> None:
    """Assert that a command failed with one line of error."""
    assert result.exit_code == 2, result.output
    assert result.stderr == f"Error: {message}\n"


@pytest.fixture
def _without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip chart rendering in tests of other parts."""
    monkeypatch.setattr(report, "draw_laboratory", lambda laboratory, metric: metric.encode())
    monkeypatch.setattr(report, "draw_laboratory_svg", lambda laboratory, metric: "")


def test_a_report_of_a_laboratory_has_charts_tables_and_images(tmp_path: Path) -> None:
    small_laboratory().write(tmp_path)
    names = ("seed10/00000-other", "seed9/00000-other", "seed9/00001-other", "seed9-old/00000-other")
    for kimg, name in enumerate(names):
        run = tmp_path / "runs" / "other" / name
        run.mkdir(parents=True)
        (run / "training_options.json").write_text("{}")
        (run / "stats.jsonl").write_text('{"Progress/kimg": 5}\nnonsense\n')
        Image.new("RGB", (32, 32), "red").save(run / f"fakes{kimg:06d}.png")
    result = run_report(tmp_path)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text()
    chart = (tmp_path / "report" / f"chart-{FD}.png").read_bytes()
    with Image.open(io.BytesIO(chart)) as image:
        assert image.format == "PNG"
    assert f'aria-label="Comparison of the arms by {FD}"' in page
    for text in ("at equal kimg:", "other minus baseline", "promising"):
        assert re.search(rf"<text[^>]*>{text}</text>", page)
    assert "<h1>Does it help?</h1>" in page
    for row in next(iter(result_tables(small_laboratory())))[1][1:]:
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "<tr><td>other</td><td>--other</td></tr>" in page
    assert page.count("<figure") == 2  # the chart, and the images of the newest run with the lowest seed
    assert 'alt="other, seed9: generated at kimg 2"' in page
    assert "stats.jsonl: skipped 1 corrupt lines of 2" in page
    assert "log.txt cannot be read: other, seed9." in page


@pytest.mark.usefixtures("_without_charts")
def test_unusual_texts_are_escaped_in_a_report(tmp_path: Path) -> None:
    laboratory = unusual()
    arms = laboratory.question.arms
    other = replace(arms["other"], options="--desc='<i>&$body|'")
    question = replace(laboratory.question, arms=arms | {"other": other}, metrics=(FD, "is50k"))
    replace(laboratory, question=question).write(tmp_path)
    result = run_report(tmp_path, f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<title>Is $x_^ &gt; $y^2 | &lt;b&gt;better&lt;/b&gt;? \\ud800</title>" in page
    assert "<td>--desc=&#x27;&lt;i&gt;&amp;$body|&#x27;</td>" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        f"chart-{FD}.png",
        "chart-is50k.png",
    }


@pytest.mark.usefixtures("_without_charts")
def test_a_laboratory_is_reported_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        small_laboratory().write(folder)
    message = "a laboratory has a report of its own; specify no other folders"
    assert_refused(run_report(first, second), f"{first}: {message}")
    assert_refused(run_report(tmp_path / "no", second), f"{second}: {message}")
    assert not (first / "report").exists()


@pytest.mark.usefixtures("_without_charts")
def test_a_laboratory_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    Laboratory(question=make_question()).write(tmp_path)
    assert_refused(run_report(tmp_path), f"{tmp_path}: there is nothing to show yet: no trial has ended")
    (tmp_path / "laboratory.json").write_text("[]")
    assert run_report(tmp_path).stderr.startswith(f"Error: {tmp_path / 'laboratory.json'}: not a laboratory (")
    small_laboratory().write(tmp_path)
    (tmp_path / "file").touch()
    result = run_report(tmp_path, f"--outdir={tmp_path / 'file'}")
    assert_refused(result, f"--outdir={tmp_path / 'file'}: cannot be written (File exists)")
