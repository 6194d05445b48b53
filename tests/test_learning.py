"""Laboratory and ranking benchmarks: questions, trials of fake runs, interruptions, rankings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_helpers import results
from click.testing import CliRunner, Result
from conftest import PATIENCE
from laboratory_helpers import make_question, make_trial

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import learning
import question_file
import ranking
import trials

from dnnlib.config import UserError
from metrics.registry import COMPARABLE
from reporting.laboratory import Arm, Laboratory, Question, read_laboratory
from reporting.laboratory_table import to_markdown

ROOT = Path(__file__).parent.parent
LEARNING = ROOT / "docs" / "learning.md"
SETTINGS: dict[str, Any] = {"metrics": ("swd100",), "seeds": {"screen": (0, 1), "confirm": (100, 101)}}
GOOD = """
question = "Does it help?"
evaluate = [5, 10]
base = "--cfg=tiny"
[arms]
baseline = ""
lr = "--glr=0.01"
both = { extends = "lr", options = "--dlr=0.01 --set 'a=b c'" }
"""
SHORT = 'lr = { options = "--glr=0.01", evaluate = [2, 4] }'

# Questions.


def write_question(folder: Path, text: str = GOOD) -> Path:
    path = folder / "question.toml"
    path.write_text(text)
    return path


def test_a_question_is_read(tmp_path: Path) -> None:
    question = question_file.read_question(write_question(tmp_path), **SETTINGS)
    assert question == Question(
        question="Does it help?",
        evaluate=(5, 10),
        base="--cfg=tiny",
        arms={
            "baseline": Arm(options=""),
            "lr": Arm(options="--glr=0.01", against="baseline"),
            "both": Arm(options="--glr=0.01 --dlr=0.01 --set 'a=b c'", against="lr"),
        },
        metrics=("swd100",),
        seeds={"screen": (0, 1), "confirm": (100, 101)},
    )


def test_the_questions_of_the_project_are_valid() -> None:
    files = sorted((ROOT / "benchmarks" / "questions").glob("*.toml"))
    assert files
    for file in files:
        assert question_file.read_question(file, **SETTINGS).baseline == "baseline"


def test_an_arm_extends_the_options_but_not_the_ages(tmp_path: Path) -> None:
    path = write_question(tmp_path, GOOD.replace('lr = "--glr=0.01"', SHORT))
    question = question_file.read_question(path, **SETTINGS)
    assert question.arms["lr"] == Arm(options="--glr=0.01", against="baseline", evaluate=(2, 4))
    assert question.arms["both"].evaluate is None
    assert {arm: question.ages(arm) for arm in question.arms} == {"baseline": (5, 10), "lr": (2, 4), "both": (5, 10)}


@pytest.mark.parametrize(
    ("ages", "message"),
    [
        ("[]", "evaluate = []: list whole numbers of kimg in ascending order"),
        ("[4, 2]", "evaluate = [4, 2]: list whole numbers"),
        ("[0, 2]", "evaluate = [0, 2]: list whole numbers"),
        ("[2.5]", "evaluate = [2.5]: list whole numbers"),
        ("['2']", "evaluate = ['2']: list whole numbers"),
        ("5", "evaluate is not a list of ages"),
        ("'5'", "evaluate is not a list of ages"),
        ("[1, 101]", "evaluate = [1, 101]: the interval of snapshots is 1 kimg, the greatest common divisor"),
    ],
)
def test_invalid_ages_of_an_arm_are_refused(tmp_path: Path, ages: str, message: str) -> None:
    path = write_question(tmp_path, GOOD.replace('lr = "--glr=0.01"', SHORT.replace("[2, 4]", ages)))
    with pytest.raises(UserError) as caught:
        question_file.read_question(path, **SETTINGS)
    assert str(caught.value).startswith(f"{path}: arm lr: {message}")
    assert str(caught.value).endswith("; docs/learning.md describes the file")


def test_snapshots_are_counted_for_each_arm(tmp_path: Path) -> None:
    """Ages of 1 kimg and of 150 kimg together would need more than 100 snapshots."""
    path = write_question(tmp_path, GOOD.replace('"--glr=0.01"', '{ options = "", evaluate = [1, 100] }'))
    path.write_text(path.read_text().replace("[5, 10]", "[75, 150]"))
    question = question_file.read_question(path, **SETTINGS)
    assert (question.step("lr"), question.step("both")) == (1, 75)


def test_base_is_optional(tmp_path: Path) -> None:
    assert question_file.read_question(write_question(tmp_path, GOOD.replace("base =", "# ")), **SETTINGS).base == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base =", "bases =", "unknown key bases"),
        ('question = "Does it help?"', "", "question is missing"),
        ('"Does it help?"', "5", "question, base, metrics and options are texts"),
        ("evaluate = [5, 10]", "", "evaluate is missing"),
        ("[5, 10]", "[]", "evaluate = []: list whole numbers of kimg in ascending order"),
        ("[5, 10]", "[10, 5]", "evaluate = [10, 5]: list whole numbers"),
        ("[5, 10]", "[5, 5]", "evaluate = [5, 5]: list whole numbers"),
        ("[5, 10]", "[0, 5]", "evaluate = [0, 5]: list whole numbers"),
        ("[5, 10]", "[2.5, 5]", "evaluate = [2.5, 5]: list whole numbers"),
        ("[5, 10]", '[5, "10"]', "evaluate = [5, '10']: list whole numbers"),
        ("[5, 10]", "[true]", "evaluate = [True]: list whole numbers"),
        ("[5, 10]", "5", "evaluate is not a list of ages, or arms is not a table"),
        ('"--cfg=tiny"', "3", "question, base, metrics and options are texts"),
        ('"--cfg=tiny"', '"--gamma=\'a"', 'base: "--gamma=\'a": No closing quotation'),
        ("[arms]", "[other]", "unknown key other"),
        ("[arms]", "arms = 3\n[arms]", "Cannot overwrite"),
        ("[arms]", "[arms]\n[arms]", "Cannot declare"),
        ('lr = "--glr=0.01"', "lr = 3", "arm lr: 3 is neither text with options nor a table"),
        ('lr = "--glr=0.01"', "lr = [['options', '']]", "arm lr: [['options', '']] is neither text"),
        ('lr = "--glr=0.01"', "lr = { options = 3 }", "arm lr: 3 is neither text"),
        ('lr = "--glr=0.01"', "lr = { extends = 'baseline' }", "arm lr: None is neither text"),
        (
            "[5, 10]",
            "[1, 101]",
            "evaluate = [1, 101]: the interval of snapshots is 1 kimg, the greatest common divisor",
        ),
        ('"--cfg=tiny"', '"--cfg=tiny --outdir=x"', "base: --outdir is set by the laboratory; omit it"),
        ('"--glr=0.01"', '"--seed 3"', "arm lr: --seed is set by the laboratory"),
        ('"--glr=0.01"', '"-n"', "arm lr: -n is set by the laboratory"),
        ('"--glr=0.01"', '"--dry_run"', "arm lr: --dry-run is set by the laboratory"),
        ('"--glr=0.01"', '"--set run.total_kimg=5"', "arm lr: run.total_kimg is set by the laboratory"),
        ('"--glr=0.01"', '"--set=seed=5"', "arm lr: seed is set by the laboratory"),
        ('lr = "--glr=0.01"', "lr = { options = '', colour = 1 }", "arm lr: unknown key colour"),
        ('lr = "--glr=0.01"', 'lr = "--gamma=\'a"', 'arm lr: "--gamma=\'a": No closing quotation'),
        ('baseline = ""', "'l/r' = ''", "arm 'l/r': use letters, digits and - _ . in the name"),
        ('baseline = ""', "'' = ''", "arm '': use letters"),
        ('baseline = ""', "'..' = ''", "arm '..': use letters"),
        ('extends = "lr"', 'extends = "both"', "arm both: extends both, which is not an arm above it"),
        ('"--glr=0.01"', '{ extends = "both", options = "" }', "arm lr: extends both, which is not an arm above it"),
        ('extends = "lr"', "extends = ['lr']", "arm both: extends ['lr'], which is not an arm above it"),
        ("base =", "base", "Expected '='"),
    ],
)
def test_invalid_questions_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    path = write_question(tmp_path, GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        question_file.read_question(path, **SETTINGS)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; docs/learning.md describes the file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question = ''\nevaluate = [1]\n", "arms is missing"),
        ("question = ''\nevaluate = [1]\narms = ['', '']\n", "evaluate is not a list of ages, or arms is not a table"),
        ("question = ''\nevaluate = [1]\n[arms]\n", "a question has 2 to 100 arms, got 0"),
        ("question = ''\nevaluate = [1]\n[arms]\na = ''\n", "a question has 2 to 100 arms, got 1"),
        (
            "question = ''\nevaluate = [1]\n[arms]\n" + "".join(f"a{i} = ''\n" for i in range(101)),
            "a question has 2 to 100 arms, got 101",
        ),
        ("a = " + "[" * 5000, "nested too deeply"),
    ],
)
def test_a_question_has_arms(tmp_path: Path, text: str, message: str) -> None:
    path = write_question(tmp_path, text)
    with pytest.raises(UserError) as caught:
        question_file.read_question(path, **SETTINGS)
    assert str(caught.value) == f"{path}: {message}; docs/learning.md describes the file"


def test_undecodable_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "question.toml"
    path.write_bytes(b'question = "\xff"\n')
    with pytest.raises(UserError, match=r"question\.toml: .*decode"):
        question_file.read_question(path, **SETTINGS)


# Trials of fake runs.


@dataclass
class FakeScripts:
    """Replacement of TrialRunner._run_script: writes the files that train.py and calc_metrics.py write.

    A run takes one minute of CPU time per kimg. The value of a metric is that of the arm plus the seed minus the kimg.
    `failing` are labels of trials or dry runs that fail.
    """

    values: dict[str, float]
    failing: set[str] = field(default_factory=set)
    calls: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)  # label, script, options

    def run(self, runner: trials.TrialRunner, label: str, folder: Path, script: str, options: Sequence[str]) -> None:
        self.calls.append((label, script, tuple(options)))
        given = dict(word.removeprefix("--").partition("=")[::2] for word in options)
        if label in self.failing:
            raise UserError(f"{label}: {script} failed (it broke)")
        if script == "calc_metrics.py":
            self.measure(Path(given["network"]), {name: runner.expected[name] for name in given["metrics"].split(",")})
        elif "dry-run" not in given:
            self.train(Path(given["outdir"]) / f"00000-{given['desc']}", int(given["kimg"]), int(given["tick"]))

    def train(self, run: Path, kimg: int, tick: int) -> None:
        """Write a run, or continue with it."""
        run.mkdir(parents=True, exist_ok=True)
        (run / "training_options.json").write_text("{}")
        first = max((int(path.stem[-6:]) for path in run.glob("*.pkl")), default=-tick) + tick
        with (run / "stats.jsonl").open("a") as file:
            for age in range(first, kimg + 1, tick):
                (run / f"network-snapshot-{age:06d}.pkl").touch()
                file.write(
                    json.dumps({"Progress/kimg": age + 0.016, "Timing/steps_cpu_sec": 60 * (age + 0.016)}) + "\n"
                )

    def measure(self, snapshot: Path, metrics: Mapping[str, Mapping[str, str | None]]) -> None:
        """Append a record of each metric, with its conditions."""
        run, kimg = snapshot.parent, int(snapshot.stem[-6:])
        arm, seed = run.name.partition("-")[2], int(run.parent.name.removeprefix("seed"))
        for name, conditions in metrics.items():
            results = {name: self.values[arm] + seed - kimg}
            record = {"results": results, "kimg": kimg + 0.016, "snapshot": snapshot.name, **conditions}
            with (run / f"metric-{name}.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def count(self, script: str) -> int:
        return sum(name == script and "--dry-run" not in options for _, name, options in self.calls)

    def trained(self) -> list[str]:
        """Return the labels of the trials that train.py was called for, sorted."""
        calls = [(label, options) for label, script, options in self.calls if script == "train.py"]
        return sorted(label for label, options in calls if "--dry-run" not in options)


DATA = ROOT / "tests" / "data" / "shapes.zip"
ARMS = 'question = "?"\nevaluate = [5, 10]\n[arms]\nbaseline = ""\ngood = "--glr=1"\nsame = "--glr=2"\n'


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeScripts:
    """Replace the scripts and the charts."""
    scripts = FakeScripts({"baseline": 100, "good": 50, "same": 100, "fresh": 100})
    monkeypatch.setattr(trials.TrialRunner, "_run_script", lambda runner, *given: scripts.run(runner, *given))
    monkeypatch.setattr(learning, "draw_laboratory", lambda laboratory, metric: metric.encode())
    return scripts


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    write_question(tmp_path, ARMS)
    return tmp_path / "lab"


def arguments(lab: Path, *options: str, data: Path = DATA) -> list[str]:
    given = ["--screen=3", "--confirm=2", "--metrics=swd100", "--device=cpu", "--jobs=1", *options]
    return [str(lab.parent / "question.toml"), f"--outdir={lab}", f"--data={data}", *given]


def run_learning(lab: Path, *options: str) -> Result:
    return CliRunner().invoke(learning.main, arguments(lab, *options))


def cells(laboratory: Laboratory) -> list[tuple[str, int]]:
    return [(trial.arm, trial.seed) for trial in laboratory.trials]


SCREENED = [(arm, seed) for arm in ("baseline", "good", "same") for seed in range(3)]
ALL = sorted([*SCREENED, *((arm, seed) for arm in ("baseline", "good") for seed in (100, 101))])


def test_promising_arms_are_judged_by_fresh_seeds(lab: Path, fake: FakeScripts) -> None:
    rows = results(learning.main, *arguments(lab))
    laboratory = read_laboratory(lab)
    assert sorted(cells(laboratory)) == ALL
    assert fake.trained() == sorted(f"{arm}, seed {seed}" for arm, seed in ALL)
    verdicts = {(row["stage"], row["arm"], row["axis"]): row["verdict"] for row in rows}
    assert verdicts == {
        (stage, arm, axis): verdict
        for stage, arm, verdict in (
            ("screen", "good", "promising"),
            ("screen", "same", "not promising"),
            ("confirm", "good", "better"),
        )
        for axis in ("kimg", "minutes")
    }
    assert rows[-1]["values"] == {"100": 140, "101": 141}
    assert rows[-1]["reference"] == {"100": 190, "101": 191}
    assert rows[-1]["interval"]["estimate"] == -50
    trial = laboratory.trials[0].metrics["swd100"]
    assert (trial.kimg, trial.values) == ((5.016, 10.016), (95, 90))
    assert trial.minutes == pytest.approx((5.016, 10.016))
    assert (lab / "table.md").read_text() == to_markdown(laboratory)
    assert (lab / "chart-swd100.png").read_bytes() == b"swd100"


def test_each_trial_is_a_run_of_train_py(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab)
    by_label = {label: options for label, script, options in fake.calls if script == "train.py"}
    options = by_label["good, seed 101"]
    assert options[0] == "--glr=1"
    wanted = {f"--outdir={lab / 'runs' / 'good' / 'seed101'}", "--seed=101", "--kimg=10", "--tick=5", "--snap=1"}
    assert {*options} >= wanted | {"--resume=latest", "--metrics=none", f"--data={DATA}"}
    assert [label for label, _, given in fake.calls if "--dry-run" in given] == [
        *("arm baseline", "arm good", "arm same"),
        *("arm baseline", "arm good"),  # before the fresh seeds
    ]


def test_trials_have_the_length_of_their_arm(lab: Path, fake: FakeScripts) -> None:
    """The value of `good` after 6 kimg is 44, that of the baseline after 10 kimg is 90."""
    write_question(lab.parent, ARMS.replace('"--glr=1"', '{ options = "--glr=1", evaluate = [4, 6] }'))
    rows = results(learning.main, *arguments(lab))
    trained = {label: {*options} for label, script, options in fake.calls if script == "train.py"}
    assert trained["good, seed 101"] >= {"--kimg=6", "--tick=2"}
    assert trained["baseline, seed 101"] >= {"--kimg=10", "--tick=5"}
    measured = [
        (label, Path(options[0]).stem[-6:]) for label, script, options in fake.calls if script == "calc_metrics.py"
    ]
    assert [age for label, age in measured if label == "good, seed 101"] == ["000004", "000006"]
    assert [age for label, age in measured if label == "baseline, seed 101"] == ["000005", "000010"]
    (row,) = (row for row in rows if (row["stage"], row["axis"]) == ("confirm", "end"))
    assert (row["arm"], row["at"], row["interval"]["estimate"], row["verdict"]) == ("good", 6, -46, "better")
    fake.calls.clear()
    assert results(learning.main, *arguments(lab)) == rows
    assert fake.calls == []


def test_without_screening_all_arms_get_fresh_seeds(lab: Path, fake: FakeScripts) -> None:
    rows = results(learning.main, *arguments(lab, "--screen=0"))
    laboratory = read_laboratory(lab)
    assert laboratory.question.seeds == {"screen": (), "confirm": (100, 101)}
    arms = ("baseline", "good", "same")
    assert cells(laboratory) == [(arm, seed) for arm in arms for seed in (100, 101)]
    assert {(row["stage"], row["arm"]) for row in rows} == {("confirm", "good"), ("confirm", "same")}


def test_without_screening_chosen_arms_get_fresh_seeds(lab: Path, fake: FakeScripts) -> None:
    write_question(lab.parent, f"{ARMS}fresh = {{ extends = 'same', options = '--dlr=3' }}\n")
    run_learning(lab, "--screen=0", "--arms=fresh")
    assert {arm for arm, _ in cells(read_laboratory(lab))} == {"baseline", "same", "fresh"}


def test_a_laboratory_has_seeds_of_at_least_one_stage(lab: Path, fake: FakeScripts) -> None:
    for options, message in (
        (("--screen=1",), "--screen=1: an interval needs at least 2 seeds; 0 omits this stage"),
        (("--screen=0", "--confirm=0"), "--screen=0 --confirm=0: no stage remains; specify the seeds of at least one"),
    ):
        outcome = run_learning(lab, *options)
        assert outcome.exit_code == 2
        assert outcome.stderr == f"Error: {message}\n"
    assert not lab.exists()
    assert "0: no screening, all arms are confirmed" in " ".join(
        CliRunner().invoke(learning.main, "--help").output.split()
    )


def test_seeds_of_the_stages_are_disjoint(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab, "--screen=4", "--confirm=3")
    seeds = read_laboratory(lab).question.seeds
    assert seeds == {"screen": (0, 1, 2, 3), "confirm": (100, 101, 102)}
    assert {int(label.rpartition(" ")[2]) for label in fake.trained()} == {*seeds["screen"], *seeds["confirm"]}
    assert run_learning(lab, "--screen=101").exit_code == 2
    result = run_learning(lab, "--confirm=1")
    assert result.exit_code == 2
    assert "--confirm=1: an interval needs at least 2 seeds; 0 omits this stage" in result.stderr


def test_a_repeated_command_makes_nothing_again(lab: Path, fake: FakeScripts) -> None:
    first = results(learning.main, *arguments(lab))
    written = (lab / "laboratory.json").read_bytes()
    fake.calls.clear()
    second = results(learning.main, *arguments(lab))
    assert fake.calls == []
    assert second == first
    assert (lab / "laboratory.json").read_bytes() == written


def test_trials_are_evaluated_once(lab: Path, fake: FakeScripts) -> None:
    """Without laboratory.json, e.g. after an interruption, trials are resumed and read without a new evaluation."""
    run_learning(lab)
    written = (lab / "laboratory.json").read_bytes()
    (lab / "laboratory.json").unlink()
    assert fake.count("calc_metrics.py") == 2 * len(ALL)
    fake.calls.clear()
    run_learning(lab)
    assert fake.count("train.py") == len(ALL)
    assert fake.count("calc_metrics.py") == 0
    assert (lab / "laboratory.json").read_bytes() == written


def test_no_seeds_are_fresh_if_none_are_wanted(lab: Path, fake: FakeScripts) -> None:
    rows = results(learning.main, *arguments(lab, "--confirm=0"))
    assert {row["stage"] for row in rows} == {"screen"}
    assert sorted(cells(read_laboratory(lab))) == SCREENED


def test_chosen_arms_are_confirmed(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab, "--arms=same")
    fresh = [cell for cell in cells(read_laboratory(lab)) if cell[1] >= 100]
    assert fresh == [("baseline", 100), ("baseline", 101), ("same", 100), ("same", 101)]
    result = run_learning(lab, "--arms=same,other")
    assert result.exit_code == 2
    assert "--arms=other: " in result.stderr
    assert "has no such arm, only baseline, good, same" in result.stderr


def test_a_failing_trial_is_reported_and_others_go_on(lab: Path, fake: FakeScripts) -> None:
    fake.failing = {"same, seed 1"}
    result = run_learning(lab)
    assert result.exit_code == 2
    assert result.stderr.endswith("\nError: same, seed 1: train.py failed (it broke)\n")
    assert sorted(cells(read_laboratory(lab))) == [cell for cell in ALL if cell != ("same", 1)]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["verdict"] for row in rows if row["arm"] == "same"} == {"incomplete"}
    fake.failing, fake.calls = set(), []
    assert run_learning(lab).exit_code == 0
    assert fake.trained() == ["same, seed 1"]
    assert sorted(cells(read_laboratory(lab))) == ALL


def test_an_invalid_arm_stops_before_the_first_trial(lab: Path, fake: FakeScripts) -> None:
    fake.failing = {"arm same", "arm good"}
    result = run_learning(lab)
    assert result.exit_code == 2
    problem = "train.py failed (it broke)"
    assert result.stderr == f"Error: arm good: {problem}; arm same: {problem}\n"
    assert fake.count("train.py") == 0


def test_an_unknown_metric_stops_before_the_first_trial(lab: Path, fake: FakeScripts) -> None:
    result = run_learning(lab, "--metrics=fid3x")
    assert result.exit_code == 2
    assert "fid3x" in result.stderr
    assert fake.calls == []


def test_an_unavailable_metric_stops_before_the_first_trial(
    lab: Path, fake: FakeScripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, setup: object) -> None:
        raise UserError(f"metric {name}: not here")

    monkeypatch.setattr(learning, "check_available", refuse)
    assert run_learning(lab).stderr == "Error: metric swd100: not here\n"
    assert fake.calls == []


def test_changed_options_of_a_trained_arm_are_refused(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab)
    fake.calls.clear()
    for old, new, arm in (("--glr=1", "--glr=3", "good"), ("[arms]", "base = '--batch=8'\n[arms]", "")):
        write_question(lab.parent, ARMS.replace(old, new))
        result = run_learning(lab)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: --outdir={lab}: arm {arm}")
        assert "give the arm another name, or choose another folder" in result.stderr
    assert fake.calls == []


def test_changed_options_of_an_unfinished_trial_are_refused(lab: Path, fake: FakeScripts) -> None:
    """Such a trial is not in laboratory.json, and train.py would resume it with the options of its first start."""
    fake.failing = {"same, seed 1"}
    run_learning(lab, "--confirm=0")
    (lab / "laboratory.json").unlink()
    write_question(lab.parent, ARMS.replace("--glr=2", "--glr=3"))
    fake.failing = set()
    result = run_learning(lab, "--confirm=0")
    assert result.exit_code == 2
    folder = lab / "runs" / "same" / "seed1"
    message = f"{folder}: was started with the options '--glr=2', which are now '--glr=3'"
    assert f"{message}: give the arm another name, or delete the folder" in result.stderr
    assert {arm for arm, _ in cells(read_laboratory(lab))} == {"baseline", "good"}


def test_other_data_are_refused(lab: Path, fake: FakeScripts, shapes32_zip: Path) -> None:
    run_learning(lab)
    fake.calls.clear()
    outcome = CliRunner().invoke(learning.main, arguments(lab, data=shapes32_zip))
    assert outcome.exit_code == 2
    problem = "swd100 of baseline, seed 0, was computed with another dataset: choose another folder"
    assert outcome.stderr == f"Error: --outdir={lab}: {problem}\n"
    assert fake.calls == []


def test_the_noise_of_metrics_is_a_condition(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab, "--noise-mode=random")
    assert {options[-1] for _, script, options in fake.calls if script == "calc_metrics.py"} == {"--noise-mode=random"}
    fake.calls.clear()
    result = run_learning(lab)
    assert result.exit_code == 2
    assert "was computed with another --noise-mode: choose another folder" in result.stderr
    assert fake.calls == []


def test_trials_of_a_gpu_and_a_cpu_are_not_compared(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab)
    laboratory = read_laboratory(lab)
    other = replace(laboratory.trials[-1], device="NVIDIA H100")
    laboratory.with_trial(other).write(lab)
    result = run_learning(lab)
    assert result.exit_code == 2
    assert "Error: swd100: device is gpu for same, seed 2, and cpu for baseline, seed 0" in result.stderr
    assert result.stdout == ""


def test_options_of_an_untried_arm_may_change(tmp_path: Path) -> None:
    asked = make_question(["baseline", "other", "untried"])
    trial = replace(make_trial("other", 0, (2, 1)), options="--cfg=tiny --other")
    Laboratory(question=asked, trials=(trial,)).write(tmp_path)
    changed = replace(asked, arms=asked.arms | {"untried": Arm(options="-x", against="other")})
    opened = learning.open_laboratory(tmp_path, changed, {})
    assert opened == Laboratory(question=changed, trials=(trial,))
    assert learning.open_laboratory(tmp_path / "new", changed, {}) == Laboratory(question=changed)


def test_new_arms_and_ages_extend_a_laboratory(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab)
    fake.calls.clear()
    write_question(lab.parent, ARMS.replace("[5, 10]", "[5, 10, 15]") + "fresh = '--glr=4'\n")
    result = run_learning(lab)
    assert result.exit_code == 0, result.stderr
    assert sorted(cells(read_laboratory(lab))) == sorted([*ALL, *(("fresh", seed) for seed in range(3))])
    trained = [options for _, script, options in fake.calls if script == "train.py"]
    assert all({"--resume=latest", "--kimg=15", "--tick=5"} <= {*options} for options in trained)
    measured: dict[str, list[str]] = {}
    for label, script, options in fake.calls:
        if script == "calc_metrics.py":
            measured.setdefault(label, []).append(options[0].rpartition("/")[2])
    assert measured["good, seed 100"] == ["network-snapshot-000015.pkl"]
    assert measured["fresh, seed 0"] == [f"network-snapshot-{age:06d}.pkl" for age in (5, 10, 15)]
    values = read_laboratory(lab).values("good", "swd100", "screen")[1]
    assert (values.kimg, values.values) == ((5.016, 10.016, 15.016), (46, 41, 36))


def test_a_new_metric_is_added_to_all_trials(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab)
    fake.calls.clear()
    run_learning(lab, "--metrics=swd100,swd200")
    assert fake.count("calc_metrics.py") == 2 * len(ALL)
    assert all("--metrics=swd200" in options for _, script, options in fake.calls if script == "calc_metrics.py")
    assert {name for trial in read_laboratory(lab).trials for name in trial.metrics} == {"swd100", "swd200"}


def test_an_age_between_old_ones_is_refused(lab: Path, fake: FakeScripts) -> None:
    run_learning(lab, "--confirm=0")
    write_question(lab.parent, ARMS.replace("[5, 10]", "[5, 7, 10]"))
    result = run_learning(lab, "--confirm=0")
    assert result.exit_code == 2
    assert "good, seed 2: " in result.stderr
    assert "has no snapshot at 7 kimg; new ages must follow the old ones" in result.stderr


def test_other_folders_beside_a_run_are_ignored(lab: Path, fake: FakeScripts) -> None:
    """report.py writes its folder `report` beside the run if it gets the folder of a trial."""
    run_learning(lab)
    (lab / "runs" / "good" / "seed0" / "report").mkdir()
    (lab / "laboratory.json").unlink()
    assert run_learning(lab).exit_code == 0


def test_metrics_are_required(lab: Path, fake: FakeScripts) -> None:
    given = [word.replace("swd100", "none") for word in arguments(lab)]
    result = CliRunner().invoke(learning.main, given)
    assert result.exit_code == 2
    assert result.stderr == "Error: --metrics: specify at least one metric, e.g. swd500\n"


# Programs and files.


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trials.TrialRunner:
    """Return a runner on one device of the scripts in a temporary folder."""
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    return trials.TrialRunner(
        make_question(), tmp_path / "lab", DATA, (), devices=[torch.device("cpu")], threads=3, expected={}
    )


def test_a_script_gets_its_options_device_and_threads(tmp_path: Path, runner: trials.TrialRunner) -> None:
    (tmp_path / "train.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ['OMP_NUM_THREADS'])\n")
    runner._run_script("label", tmp_path / "new", "train.py", ["--a b"])
    log = (tmp_path / "new" / "log.txt").read_text()
    assert log.startswith(f"$ {sys.executable} {tmp_path / 'train.py'} '--a b' --device=cpu\n")
    assert log.endswith("\n['--a b', '--device=cpu'] 3\n")


def test_the_error_of_a_failed_script_is_shown(tmp_path: Path, runner: trials.TrialRunner) -> None:
    log = tmp_path / "log.txt"
    program = "import sys\nprint('Error: first\\nError: second\\nmore', file=sys.stderr)\nsys.exit(2)\n"
    (tmp_path / "train.py").write_text(program)
    with pytest.raises(UserError) as caught:
        runner._run_script("good, seed 1", tmp_path, "train.py", [])
    assert str(caught.value) == f"good, seed 1: train.py failed (second); {log}"
    (tmp_path / "train.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(UserError) as caught:
        runner._run_script("good, seed 1", tmp_path, "train.py", [])
    assert str(caught.value) == f"good, seed 1: train.py failed (exit code 5); {log}"  # not the error of the first try
    assert "Error: second" in log.read_text()


def test_a_record_of_other_data_is_no_measurement(tmp_path: Path, runner: trials.TrialRunner) -> None:
    runner.expected = {"swd100": {"data_hash": "abc", "detector_sha256": None}}
    record = {"results": {"swd100": 5.0}, "snapshot": "network-snapshot-000005.pkl", "data_hash": "abc"}
    snapshot = tmp_path / "network-snapshot-000005.pkl"
    assert not runner._is_measured(tmp_path, snapshot, "swd100")
    for changes, is_measured in (
        ({"data_hash": "def"}, False),
        ({"detector_sha256": "abc"}, False),
        ({"snapshot": "network-snapshot-000010.pkl"}, False),
        ({}, True),
    ):
        (tmp_path / "metric-swd100.jsonl").write_text(json.dumps(record | changes) + "\n")
        assert runner._is_measured(tmp_path, snapshot, "swd100") == is_measured


PATIENT_SCRIPT = """
import pathlib, signal, sys, time

if "--dry-run" in sys.argv:
    sys.exit()


def stop(*_):
    pathlib.Path("FOLDER", "stopped").touch()
    sys.exit(1)


signal.signal(signal.SIGTERM, stop)
with open(pathlib.Path("FOLDER", "begun"), "a") as file:
    file.write("x")
time.sleep(8)
"""


def test_an_interrupted_laboratory_stops_its_scripts(tmp_path: Path, runner: trials.TrialRunner) -> None:
    """The running script gets SIGTERM, upon which train.py saves its state; the next trial is not begun."""
    begun = tmp_path / "begun"
    runner.outdir.mkdir()
    (tmp_path / "train.py").write_text(PATIENT_SCRIPT.replace("FOLDER", str(tmp_path)))

    def interrupt() -> None:
        while not (begun.exists() and begun.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(SystemExit):
        runner.run(Laboratory(question=runner.question), [("baseline", 0), ("other", 0)])
    thread.join()
    assert (tmp_path / "stopped").exists()
    assert begun.read_text() == "x"
    assert signal.getsignal(signal.SIGTERM) == before
    assert read_laboratory(tmp_path / "lab").trials == ()


def test_jobs_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert learning.choose_devices("cpu", None) == ([torch.device("cpu")] * cores, 1)
    assert learning.choose_devices("cpu", 1) == ([torch.device("cpu")], cores)
    assert learning.choose_devices("cpu", 2 * cores) == ([torch.device("cpu")] * 2 * cores, 1)


def write_run(run: Path, **metrics: Sequence[float]) -> Path:
    """Write a run with a tick every 2 kimg, which takes 3 minutes on a clock and 1 minute of CPU time."""
    run.mkdir(parents=True)
    ticks = [{"Progress/kimg": 2 * i, "Timing/steps_sec": 180 * i, "Timing/steps_cpu_sec": 60 * i} for i in range(7)]
    (run / "stats.jsonl").write_text("".join(json.dumps(tick) + "\n" for tick in ticks))
    for name, values in metrics.items():
        records = [{"results": {name: x}, "kimg": 2 * i, "mirror": False} for i, x in enumerate(values, start=1)]
        (run / f"metric-{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.mark.parametrize(
    ("device", "minutes", "load"), [("cpu", (1, 2, 3), "3 threads"), ("cuda", (3, 6, 9), "2 trials side by side")]
)
def test_minutes_are_cpu_time_on_a_cpu_and_elapsed_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, minutes: tuple[float, ...], load: str
) -> None:
    monkeypatch.setattr(trials, "device_name", str)
    run, asked = write_run(tmp_path / "run", swd100=(9, 8, 7)), make_question(metrics=("swd100",))
    trial = trials.read_trial(run, "other", 3, asked, [torch.device(device)] * 2, threads=3)
    assert (trial.arm, trial.seed, trial.device) == ("other", 3, f"{device}, {load}")
    assert trial.options == "--cfg=tiny --other"
    values = trial.metrics["swd100"]
    assert (values.kimg, values.minutes, values.values) == ((2, 4, 6), pytest.approx(minutes), (9, 8, 7))
    assert values.conditions["mirror"] is False
    assert values.conditions.keys() == {*COMPARABLE}


def test_a_run_without_its_times_or_metrics_is_refused(tmp_path: Path) -> None:
    run, devices = write_run(tmp_path / "run", swd100=(9, 8, 7)), [torch.device("cpu")]
    both, one = (make_question(metrics=metrics) for metrics in (("swd100", "swd200"), ("swd100",)))
    with pytest.raises(UserError, match="run: has no values of swd200"):
        trials.read_trial(run, "other", 0, both, devices, 1)
    (run / "stats.jsonl").write_text('{"Progress/kimg": 0}\n')
    with pytest.raises(UserError, match="run: has no values of Timing/steps_cpu_sec"):
        trials.read_trial(run, "other", 0, one, devices, 1)
    (run / "stats.jsonl").write_text('{"Progress/kimg": 0, "Timing/steps_cpu_sec": 0}\n{"Progress/kimg": 4}\n')
    with pytest.raises(UserError, match="run: an age or a value is not a finite number"):
        trials.read_trial(run, "other", 0, one, devices, 1)


@pytest.mark.parametrize("name", ["", "missing.toml"])
def test_a_question_is_a_file(lab: Path, fake: FakeScripts, name: str) -> None:
    path = lab.parent / name
    outcome = CliRunner().invoke(learning.main, [str(path), *arguments(lab)[1:]])
    assert outcome.exit_code == 2
    assert str(path) in outcome.stderr
    assert "Traceback" not in outcome.output
    assert fake.calls == []


def test_huge_questions_are_refused(lab: Path, fake: FakeScripts) -> None:
    write_question(lab.parent, "#" * (question_file.MAX_QUESTION_BYTES + 1))
    outcome = run_learning(lab)
    assert outcome.exit_code == 2
    assert "exceeds the limit of 1048576 bytes" in outcome.stderr


@pytest.mark.slow
def test_a_laboratory_trains_its_arms_and_is_repeated_at_once(shapes32_zip: Path, tmp_path: Path) -> None:
    base = "--cfg=tiny --g_dict=16,8,8 --cbase=128 --batch=16"
    arms = '[arms]\nbaseline = ""\nlr = "--glr=0.01"\n'
    question = write_question(tmp_path, f'question = "?"\nevaluate = [1]\nbase = "{base}"\n{arms}')
    lab = tmp_path / "lab"
    command = [sys.executable, "benchmarks/learning.py", str(question), f"--outdir={lab}", f"--data={shapes32_zip}"]
    command += ["--screen=2", "--confirm=0", "--metrics=swd100", "--device=cpu"]

    def run() -> Iterator[dict[str, Any]]:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        yield from map(json.loads, done.stdout.splitlines())

    first = [*run()]
    assert (first[0]["arm"], first[0]["axis"]) == ("lr", "kimg")  # with one age, minutes are compared only if equal
    assert first[0]["at"] == pytest.approx(1.008)  # 63 steps of 16 images
    assert {row["verdict"] for row in first} <= {"promising", "not promising"}
    assert {path.name for path in lab.iterdir()} >= {"laboratory.json", "table.md", "chart-swd100.png", "runs"}
    for trial in read_laboratory(lab).trials:
        values = trial.metrics["swd100"]
        assert 0 < values.minutes[0] < 10
        assert 0 < values.values[0] < 1000
    files = {path: path.stat().st_mtime_ns for path in (lab / "runs").rglob("*") if path.is_file()}
    assert [row["values"] for row in run()] == [row["values"] for row in first]
    assert {path: path.stat().st_mtime_ns for path in (lab / "runs").rglob("*") if path.is_file()} == files

    (lab / "laboratory.json").unlink()  # the trials are resumed, without a further step or evaluation
    assert [row["values"] for row in run()] == [row["values"] for row in first]
    kept = {path: time for path, time in files.items() if path.name.startswith(("network-", "stats.", "metric-"))}
    assert len(kept) > 8
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# Rankings.


def refused(*options: str) -> str:
    """Run ranking.py with invalid options and return its line of error."""
    outcome = CliRunner().invoke(ranking.main, options)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr


def test_metrics_of_a_run_are_ranked(tmp_path: Path) -> None:
    """One of the 45 pairs of the ten shared snapshots is discordant: tau = (44 - 1) / 45."""
    run = write_run(tmp_path / "run", first=(9, 8, 7, 6, 5, 4, 3, 2, 0, 1), second=range(90, 60, -2))
    (row,) = results(ranking.main, str(run), "--metrics=first,second")
    assert (row["metrics"], row["networks"], row["tau"]) == (["first", "second"], 10, 0.956)
    assert row["low"] < 0.956 < row["high"]
    assert row["high"] == 1


def test_metrics_are_ranked_from_best_to_worst(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fid10k=range(10), is10k=range(10))
    (row,) = results(ranking.main, str(run), "--metrics=fid10k,is10k")
    assert (row["tau"], row["low"], row["high"]) == (-1, -1, -1)


def test_networks_of_several_runs_are_ranked(tmp_path: Path) -> None:
    """Values of different runs are paired by run and kimg."""
    write_run(tmp_path / "a", first=range(5), second=range(40, 35, -1))
    write_run(tmp_path / "b", first=range(5, 10), second=range(20, 15, -1))
    write_run(tmp_path / "c", first=(5, 6))
    (row,) = results(ranking.main, str(tmp_path), "--metrics=first,second")
    assert (row["networks"], row["tau"], row["low"], row["high"]) == (10, -1, -1, -1)


def test_trials_of_a_laboratory_are_ranked(tmp_path: Path) -> None:
    """The last values count: with the last two networks swapped, tau = (44 - 1) / 45. A trial lacks a metric."""
    question = make_question(metrics=("fid", "swd"), screen=10)
    second = [*range(8), 9, 8]
    trials = [make_trial("other", seed, {"fid": (9, seed), "swd": (9 - seed, second[seed])}) for seed in range(10)]
    trials.append(make_trial("baseline", 0, {"fid": (9, 0)}))
    Laboratory(question=question, trials=tuple(trials)).write(tmp_path)
    (row,) = results(ranking.main, str(tmp_path), "--metrics=fid,swd")
    assert (row["networks"], row["tau"]) == (10, 0.956)


def test_rankings_need_two_metrics_of_ten_networks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", first=(9, 8, 7), second=(5, 6))
    hint = "specify two metrics, e.g. mind2k,fid10k_full"
    assert hint in refused(str(run), "--metrics=first")
    assert hint in refused(str(run), "--metrics=first,second,third")
    assert hint in refused(str(run), "--metrics=none")
    assert refused(str(run), "--metrics=first,second") == (
        f"Error: {run}: has 3 values of first and 2 values of second, 2 of them of the same networks; "
        "the interval needs at least 10\n"
    )
    assert "0 values of unknown, 0 of them of the same networks" in refused(str(run), "--metrics=first,unknown")
    (tmp_path / "empty").mkdir()
    assert "neither a run" in refused(str(tmp_path / "empty"), "--metrics=first,second")
    (tmp_path / "empty" / "laboratory.json").write_text("{")
    assert "not a laboratory" in refused(str(tmp_path / "empty"), "--metrics=first,second")


# The documented laboratories.


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "laboratories").iterdir()), ids=lambda folder: folder.name)
def test_documented_tables_are_those_of_the_recorded_values(folder: Path) -> None:
    laboratory = read_laboratory(folder)
    laboratory.check_conditions()
    tables = to_markdown(laboratory)
    assert (folder / "table.md").read_text(encoding="utf-8") == tables
    file = ROOT / "benchmarks" / "questions" / f"{folder.name}.toml"
    settings = {"metrics": laboratory.question.metrics, "seeds": laboratory.question.seeds}
    assert laboratory.question == question_file.read_question(file, **settings)
    documented = LEARNING.read_text(encoding="utf-8")
    main = [part for part in tables.split("\n\n") if part.startswith(f"**{laboratory.question.metrics[0]} at")]
    assert len(main) == sum(map(bool, laboratory.question.seeds.values()))  # one per stage
    for title in main:
        assert tables[tables.index(title) :].split("\n\n")[1].strip() in documented


def test_the_documented_question_is_that_of_the_project() -> None:
    file = ROOT / "benchmarks" / "questions" / "what-helps.toml"
    assert f"```toml\n{file.read_text(encoding='utf-8')}```" in LEARNING.read_text(encoding="utf-8")
