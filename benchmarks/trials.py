"""Trials of a laboratory: runs of train.py and calc_metrics.py, several side by side, that can be interrupted."""

from __future__ import annotations

import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import click
import numpy as np
import torch
from common import ROOT

from dnnlib.config import UserError
from dnnlib.util import counted, read_metric_records, write_atomically
from metrics.registry import COMPARABLE
from reporting.laboratory import Laboratory, Question, Trial, Values
from reporting.run_reader import read_run
from torch_utils.misc import device_name
from training.data_sources.parallel import ended_by_signals
from training.run_folder import list_runs

Cell = tuple[str, int]  # arm and seed of a trial
OPTIONS_FILE = "options.txt"


class TrialRunner:
    """Runner of the trials of a question in the folder `outdir`, one at a time on each entry of `devices`.

    `metric_options` are options of calc_metrics.py for all trials; `expected` are conditions of all records, by metric;
    `threads` is the number of CPU threads of a trial.
    """

    def __init__(
        self,
        question: Question,
        outdir: Path,
        data: Path,
        metric_options: Sequence[str],
        *,
        devices: Sequence[torch.device],
        threads: int,
        expected: dict[str, dict[str, str | None]],
    ) -> None:
        self.question, self.outdir, self.data, self.metric_options = question, outdir, data, metric_options
        self.devices, self.threads, self.expected = devices, threads, expected
        self.free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
        for device in devices:
            self.free.put(device)
        self.stopping = threading.Event()
        self.processes: set[subprocess.Popen[bytes]] = set()

    def folder(self, arm: str, seed: int) -> Path:
        """Return the folder of a trial; it contains the folder of the run."""
        return self.outdir / "runs" / arm / f"seed{seed}"

    def run(self, laboratory: Laboratory, cells: Sequence[Cell]) -> tuple[Laboratory, list[str]]:
        """Make the missing trials; return the new laboratory, which is written after each trial, and the failures."""
        done = {(trial.arm, trial.seed) for trial in laboratory.trials if trial.answers(self.question)}
        missing = [cell for cell in cells if cell not in done]
        laboratory.write(self.outdir)
        failures = []
        with ended_by_signals(), ThreadPoolExecutor(len(self.devices)) as pool:
            try:
                self._check_arms(pool, [*dict.fromkeys(arm for arm, _ in missing)])
                futures = [pool.submit(self._make_trial, *cell) for cell in missing]
                for count, future in enumerate(as_completed(futures), start=1):
                    place = f"[{count} of {len(missing)}]"
                    try:
                        trial = future.result()
                    except (UserError, OSError) as error:
                        failures.append(str(error))
                        click.echo(f"{place} {error}", err=True)
                        continue
                    laboratory = laboratory.with_trial(trial)
                    laboratory.write(self.outdir)
                    click.echo(f"{place} {describe(trial)}", err=True)
            except BaseException:
                self._stop(pool)
                raise
        return laboratory, failures

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        """Stop the running scripts, which save their state, and wait for them."""
        self.stopping.set()
        running = list(self.processes)
        if running:
            click.echo(f"Stopping {len(running)} scripts; repeat the command to continue", err=True)
        for process in running:
            process.terminate()
        pool.shutdown(cancel_futures=True)

    def _check_arms(self, pool: ThreadPoolExecutor, arms: Sequence[str]) -> None:
        """Resolve the options of arms in dry runs. Raises UserError with all that are invalid."""
        options = [[*self._train_options(arm, 0), "--dry-run"] for arm in arms]
        folders = [self.outdir / "runs" / arm for arm in arms]
        checks = [
            pool.submit(self._run_script, f"arm {arm}", folder, "train.py", own)
            for arm, folder, own in zip(arms, folders, options, strict=True)
        ]
        problems = [str(error) for check in checks if (error := check.exception())]
        if problems:
            raise UserError("; ".join(problems))

    def _train_options(self, arm: str, seed: int) -> list[str]:
        """Return the arguments of train.py for a trial."""
        return [
            *shlex.split(self.question.options(arm)),
            f"--outdir={self.folder(arm, seed)}",
            "--resume=latest",
            f"--data={self.data}",
            f"--seed={seed}",
            f"--desc={arm}",
            f"--kimg={self.question.length(arm)}",
            f"--tick={self.question.step(arm)}",
            "--snap=1",
            "--metrics=none",
            "--log=none",
        ]

    def _make_trial(self, arm: str, seed: int) -> Trial:
        """Train and evaluate a run, or continue with it. Raises UserError if a script fails."""
        folder, label = self.folder(arm, seed), f"{arm}, seed {seed}"
        self._check_options(folder, arm)
        self._run_script(label, folder, "train.py", self._train_options(arm, seed))
        run = list_runs(folder)[-1]
        snapshots = {int(path.stem.rpartition("-")[2]): path for path in run.glob("network-snapshot-*.pkl")}
        for age in self.question.ages(arm):
            found = [kimg for kimg in snapshots if age <= kimg < age + self.question.step(arm)]
            if not found:
                raise UserError(f"{label}: {run} has no snapshot at {age} kimg; new ages must follow the old ones")
            snapshot = snapshots[min(found)]
            names = [name for name in self.question.metrics if not self._is_measured(run, snapshot, name)]
            if names:
                options = [f"--network={snapshot}", f"--metrics={','.join(names)}", f"--data={self.data}", "--mirror=0"]
                self._run_script(label, folder, "calc_metrics.py", [*options, *self.metric_options])
        return read_trial(run, arm, seed, self.question, self.devices, self.threads)

    def _check_options(self, folder: Path, arm: str) -> None:
        """Record the options of a trial. Raises UserError if a run was started with others.

        `train.py --resume=latest` alone would keep an option that was removed from the arm.
        """
        path, options = folder / OPTIONS_FILE, self.question.options(arm)
        if path.exists() and path.read_text(encoding="utf-8") != options:
            raise UserError(
                f"{folder}: was started with the options {path.read_text(encoding='utf-8')!r}, which are now "
                f"{options!r}: give the arm another name, or delete the folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, options.encode())

    def _is_measured(self, run: Path, snapshot: Path, metric: str) -> bool:
        """Return whether a metric of a snapshot is recorded in the folder of its run, with this data and detector."""
        wanted = {"snapshot": snapshot.name, **self.expected[metric]}
        records = read_metric_records(run / f"metric-{metric}.jsonl")
        return any(all(record.get(key) == value for key, value in wanted.items()) for record in records)

    def _run_script(self, label: str, folder: Path, script: str, options: Sequence[str]) -> None:
        """Run a script of the project on a free device, with its output in log.txt in the folder.

        The script has a session of its own, so that Ctrl-C reaches this process only. Raises UserError if it fails.
        """
        if self.stopping.is_set():
            raise UserError(f"{label}: interrupted")
        device = self.free.get()
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        command = [sys.executable, str(ROOT / script), *options, f"--device={device}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        try:
            with log.open("ab") as output:
                output.write(f"$ {shlex.join(command)}\n".encode(errors="backslashreplace"))
                output.flush()
                start = output.tell()
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self.processes.add(process)
                if self.stopping.is_set():
                    process.terminate()
                code = process.wait()
                self.processes.discard(process)
        finally:
            self.free.put(device)
        if code:
            lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
            errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
            raise UserError(f"{label}: {script} failed ({errors[-1] if errors else f'exit code {code}'}); {log}")


def describe(trial: Trial) -> str:
    """Return the last values of a trial as text."""
    values = "  ".join(f"{name} {own.values[-1]:.4g}" for name, own in trial.metrics.items())
    own = next(iter(trial.metrics.values()))
    return f"{trial.arm}, seed {trial.seed}: {values}  at {own.kimg[-1]:g} kimg, {own.minutes[-1]:.1f} minutes"


def read_trial(
    path: Path, arm: str, seed: int, question: Question, devices: Sequence[torch.device], threads: int
) -> Trial:
    """Read the results of a run. Raises UserError if its files lack a metric or the time of the steps."""
    run, device = read_run(path, arm), devices[0]
    shared = len(devices) // len(set(devices))  # trials side by side on a GPU
    try:
        clock = run.ticks["Timing/steps_sec" if device.type == "cuda" else "Timing/steps_cpu_sec"]
        metrics = {
            name: Values(
                kimg=tuple(curve.kimg.tolist()),
                minutes=tuple((np.interp(curve.kimg, clock.kimg, clock.values) / 60).tolist()),
                values=tuple(curve.values.tolist()),
                conditions={key: curve.origin.get(key) for key in COMPARABLE},
            )
            for name, curve in ((name, run.metrics[name]) for name in question.metrics)
        }
    except KeyError as error:
        raise UserError(f"{path}: has no values of {error.args[0]}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    load = counted(threads, "thread") if device.type == "cpu" else f"{counted(shared, 'trial')} side by side"
    return Trial(
        arm=arm, seed=seed, options=question.options(arm), device=f"{device_name(device)}, {load}", metrics=metrics
    )
