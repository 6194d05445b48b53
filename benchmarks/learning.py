"""Train several configurations (arms) with the same seeds, and compare them at equal kimg and at equal minutes.

\b
python benchmarks/learning.py benchmarks/questions/what-helps.toml --data=data/cifar10.zip --outdir=runs/what-helps

QUESTION is a TOML file; docs/learning.md describes it. The first --screen seeds suggest which arms are better than
their reference; --confirm fresh seeds decide. A comparison is printed as a line of JSON with Welch's 95 % interval of
the difference of means: an arm is `better` if the interval of its fresh seeds excludes 0.

Trials run side by side, one per core on a CPU. Minutes are CPU time of the training steps on a CPU, elapsed time on a
GPU, without evaluation and saving. An interrupted command continues when it is repeated. --outdir then contains
laboratory.json with all results, table.md, a chart for each metric, and the folder of each run; report.py shows them.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import ROOT, emit

from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError
from dnnlib.util import read_metric_records, read_regular, write_atomically
from metrics.detectors import read_detectors
from metrics.registry import check_available, resolve
from reporting.drawing import check_matplotlib
from reporting.laboratory import LABORATORY_FILE, Arm, Laboratory, Question, Trial, Values, read_laboratory
from reporting.laboratory_chart import draw_laboratory
from reporting.laboratory_table import to_markdown
from reporting.run_reader import is_run, read_run
from torch_utils import distributed
from torch_utils.misc import device_name

MAX_QUESTION_BYTES = 1 << 20
FRESH = 100  # first seed of the confirming stage


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Everything that a trial needs besides its arm and seed."""

    question: Question
    outdir: Path
    data: Path
    detectors: tuple[str, ...]
    device: torch.device
    threads: int

    def folder(self, arm: str, seed: int) -> Path:
        """Return the folder of a trial; it contains the folder of the run."""
        return self.outdir / arm / f"seed{seed}"


@click.command(cls=Script, help=__doc__)
@click.argument("question", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option("--outdir", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Folder of the laboratory.")
@option("--data", metavar="PATH", required=True, type=click.Path(exists=True, path_type=Path), help="Training dataset.")
@option("--metrics", type=NameList(), help="Metrics; the first one decides. [fid10k_full with a detector, then swd500]")
@option(
    "--detector", "detectors", metavar="FILE", multiple=True, help="Feature network or weight file, as in train.py."
)
@option("--screen", metavar="N", type=click.IntRange(2, FRESH), default=3, show_default=True,
        help="Seeds of every arm.")  # fmt: skip
@option("--confirm", metavar="N", type=click.IntRange(min=0), default=5, show_default=True,
        help="Fresh seeds of promising arms and of their references; 0: none.")  # fmt: skip
@option("--arms", type=NameList(), help="Arms to confirm, instead of the promising ones.")
@option("--jobs", metavar="N", type=click.IntRange(min=1), help="Trials side by side. [cores; 1 on a GPU]")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
def main(
    question: Path,
    outdir: Path,
    data: Path,
    metrics: tuple[str, ...] | None,
    detectors: tuple[str, ...],
    screen: int,
    confirm: int,
    arms: tuple[str, ...] | None,
    jobs: int | None,
    device: str | None,
) -> None:
    check_matplotlib()
    if confirm == 1:
        raise UserError("--confirm=1: an interval needs at least 2 seeds; 0 omits this stage")
    on = distributed.use_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (1 if on.type == "cuda" else cores)
    seeds = {"screen": tuple(range(screen)), "confirm": tuple(range(FRESH, FRESH + confirm))}
    setup = read_detectors(detectors)
    names = metrics or (("fid10k_full", "swd500") if detectors else ("swd500",))
    names = tuple(resolve(names, setup))
    for name in names:
        check_available(name, setup)
    asked = read_question(question, metrics=names, seeds=seeds)
    for name in set(arms or ()) - set(asked.arms):
        raise UserError(f"--arms={name}: {question} has no such arm, only {', '.join(asked.arms)}")
    laboratory = open_laboratory(outdir, asked)
    workshop = Workshop(
        question=asked,
        outdir=outdir,
        data=data.resolve(),
        detectors=detectors,
        device=on,
        threads=max(cores // jobs, 1),
    )
    laboratory, failures = run_trials(workshop, laboratory, [(a, s) for s in seeds["screen"] for a in asked.arms], jobs)
    winners = arms if arms is not None else laboratory.promising()
    chosen = dict.fromkeys([*(r for arm in winners for r in asked.references(arm)), *winners])
    cells = [(arm, seed) for seed in seeds["confirm"] for arm in chosen]
    laboratory, more = run_trials(workshop, laboratory, cells, jobs)
    finish(laboratory, outdir, on)
    if failures or more:
        raise UserError("; ".join([*failures, *more]))


def read_question(path: Path, **settings: Any) -> Question:
    """Read a question from a TOML file. Raises UserError, with the path, for invalid content."""
    try:
        content = tomllib.loads(read_regular(path, MAX_QUESTION_BYTES).decode())
        unknown = set(content) - {"question", "evaluate", "base", "arms"}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)}")
        ages, base = content["evaluate"], content.get("base", "")
        if not isinstance(ages, list) or not isinstance(content["arms"], dict):
            raise ValueError("evaluate is not a list of ages, or arms is not a table")
        question = Question(
            question=content["question"],
            evaluate=tuple(ages),
            base=base,
            arms=dict(_arms(content["arms"])),
            **settings,
        )
        _check_quotes("base", base)
        return question
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; docs/learning.md describes the file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; docs/learning.md describes the file") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}; docs/learning.md describes the file") from None


def _arms(content: dict[str, Any]) -> Iterator[tuple[str, Arm]]:
    """Yield the arms of a question, with the options of the arm that an arm extends."""
    known: dict[str, Arm] = {}
    for name, entry in content.items():
        fields = {**entry} if isinstance(entry, dict) else {"options": entry}
        parent, own = fields.pop("extends", None), fields.pop("options")
        if parent is not None and parent not in [*known]:
            raise ValueError(f"arm {name}: extends {parent}, which is not an arm above it")
        if not isinstance(own, str):
            raise ValueError(f"arm {name}: {own!r:.100} is neither text with options nor a table with this text")
        if fields:
            raise ValueError(f"arm {name}: unknown key {min(fields)}")
        _check_quotes(f"arm {name}", own)
        options = " ".join(filter(None, [known[parent].options if parent else "", own]))
        known[name] = Arm(options=options, against=parent or next(iter(known), None))
        yield name, known[name]


def _check_quotes(name: str, options: str) -> None:
    """Raise ValueError if options cannot be split into words as in a shell."""
    try:
        shlex.split(options)
    except ValueError as error:
        raise ValueError(f"{name}: {options!r}: {error}") from None


def open_laboratory(outdir: Path, question: Question) -> Laboratory:
    """Return the laboratory in a folder with its question replaced, or a new one.

    Raises UserError if the trials in the folder were made with other options of an arm.
    """
    if not (outdir / LABORATORY_FILE).exists():
        return Laboratory(question=question)
    old = read_laboratory(outdir)
    for name in {trial.arm for trial in old.trials} & set(question.arms):
        before, now = (f"{q.base} {q.arms[name].options}".strip() for q in (old.question, question))
        if before != now:
            raise UserError(
                f"--outdir={outdir}: arm {name} was trained with the options {before!r}, and is now {now!r}: give the "
                "arm another name, or choose another folder"
            )
    return replace(old, question=question)


def run_trials(
    workshop: Workshop, laboratory: Laboratory, cells: Sequence[tuple[str, int]], jobs: int
) -> tuple[Laboratory, list[str]]:
    """Make the missing trials of (arm, seed), several side by side; return the new laboratory and the failures.

    The laboratory is written after each trial.
    """
    done = {(trial.arm, trial.seed) for trial in laboratory.trials if trial.answers(workshop.question)}
    missing = [cell for cell in cells if cell not in done]
    check_arms(workshop, [*dict.fromkeys(arm for arm, _ in missing)], jobs)
    failures = []
    workshop.outdir.mkdir(parents=True, exist_ok=True)
    laboratory.write(workshop.outdir)
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(make_trial, workshop, *cell) for cell in missing]
        for count, future in enumerate(as_completed(futures), start=1):
            try:
                trial = future.result()
            except UserError as error:
                failures.append(str(error))
                click.echo(f"[{count} of {len(missing)}] {error}", err=True)
                continue
            laboratory = laboratory.with_trial(trial)
            laboratory.write(workshop.outdir)
            click.echo(f"[{count} of {len(missing)}] {describe(trial)}", err=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return laboratory, failures


def describe(trial: Trial) -> str:
    """Return the last values of a trial as text."""
    values = "  ".join(f"{name} {own.values[-1]:.4g}" for name, own in trial.metrics.items())
    own = next(iter(trial.metrics.values()))
    return f"{trial.arm}, seed {trial.seed}: {values}  at {own.kimg[-1]:g} kimg, {own.minutes[-1]:.1f} min"


def check_arms(workshop: Workshop, arms: Sequence[str], jobs: int) -> None:
    """Resolve the options of arms in dry runs, several side by side. Raises UserError if one is invalid."""
    checks = []
    with ThreadPoolExecutor(jobs) as pool:
        for arm in arms:
            options = [*train_options(workshop, arm, 0), "--dry-run"]
            checks.append(pool.submit(run_script, workshop, f"arm {arm}", workshop.outdir / arm, "train.py", options))
    for check in checks:
        check.result()


def train_options(workshop: Workshop, arm: str, seed: int) -> list[str]:
    """Return the arguments of train.py for a trial."""
    question = workshop.question
    return [
        *shlex.split(f"{question.base} {question.arms[arm].options}"),
        f"--outdir={workshop.folder(arm, seed)}",
        "--resume=latest",
        f"--data={workshop.data}",
        f"--seed={seed}",
        f"--desc={arm}",
        f"--kimg={question.evaluate[-1]}",
        f"--tick={math.gcd(*question.evaluate)}",
        "--snap=1",
        "--metrics=none",
        "--log=none",
    ]


def make_trial(workshop: Workshop, arm: str, seed: int) -> Trial:
    """Train and evaluate a run, or continue with it. Raises UserError if a command fails."""
    question, folder = workshop.question, workshop.folder(arm, seed)
    label = f"{arm}, seed {seed}"
    run_script(workshop, label, folder, "train.py", train_options(workshop, arm, seed))
    run = max(filter(is_run, folder.iterdir()))
    snapshots = {int(path.stem.rpartition("-")[2]): path for path in run.glob("network-snapshot-*.pkl")}
    for age in question.evaluate:
        snapshot = snapshots.get(age)
        if snapshot is None:
            raise UserError(f"{label}: {run} has no snapshot at {age} kimg; an age between old ones needs a new folder")
        names = [name for name in question.metrics if not is_measured(run, snapshot, name)]
        if names:
            run_script(workshop, label, folder, "calc_metrics.py", [
                f"--network={snapshot}", f"--metrics={','.join(names)}", f"--data={workshop.data}",
                *(f"--detector={file}" for file in workshop.detectors),
            ])  # fmt: skip
    return read_trial(run, arm, seed, question.metrics, workshop.device)


def run_script(workshop: Workshop, label: str, folder: Path, script: str, options: Sequence[str]) -> None:
    """Run a script of the project; its output goes to log.txt in the folder. Raises UserError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / script), *options, f"--device={workshop.device}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(workshop.threads)}
    with (folder / "log.txt").open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        start = log.tell()
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if result.returncode:
        lines = (folder / "log.txt").read_bytes()[start:].decode(errors="replace").splitlines()
        problem = next(
            (line for line in reversed(lines) if line.startswith("Error: ")), f"exit code {result.returncode}"
        )
        raise UserError(f"{label}: {script} failed ({problem.removeprefix('Error: ')}); {folder / 'log.txt'}")


def is_measured(run: Path, snapshot: Path, metric: str) -> bool:
    """Return whether a metric of a snapshot is recorded in the folder of its run."""
    return any(
        record.get("snapshot") == snapshot.name for record in read_metric_records(run / f"metric-{metric}.jsonl")
    )


def read_trial(path: Path, arm: str, seed: int, metrics: Sequence[str], device: torch.device) -> Trial:
    """Read the results of a run. Raises UserError if its files lack a metric or the time of the steps."""
    run = read_run(path, arm)
    try:
        clock = run.ticks["Timing/steps_sec" if device.type == "cuda" else "Timing/steps_cpu_sec"]
        values = {
            name: Values(
                kimg=tuple(curve.kimg.tolist()),
                minutes=tuple((np.interp(curve.kimg, clock.kimg, clock.values) / 60).tolist()),
                values=tuple(curve.values.tolist()),
            )
            for name, curve in ((name, run.metrics[name]) for name in metrics)
        }
    except KeyError as error:
        raise UserError(f"{path}: has no values of {error.args[0]}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Trial(arm=arm, seed=seed, device=device_name(device), metrics=values)


def finish(laboratory: Laboratory, outdir: Path, device: torch.device) -> None:
    """Print all comparisons, and write the table and the charts."""
    for metric in laboratory.question.metrics:
        for comparison in laboratory.comparisons(metric):
            emit({"benchmark": "learning", **asdict(comparison)}, device)
        write_atomically(outdir / f"chart-{metric}.png", draw_laboratory(laboratory, metric))
    write_atomically(outdir / "table.md", to_markdown(laboratory).encode())


if __name__ == "__main__":
    main()
