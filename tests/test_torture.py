"""A run that is killed, signalled and started again ends as if nothing had happened; train.py runs as a program."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, SMALL

from torch_utils.checkpoint import Checkpoint, digest
from torch_utils.signals import EXIT_STOPPED
from training.snapshots.snapshot import load_network

ROOT = Path(__file__).parent.parent
# Bits depend on the number of threads. With one, the tests do not disturb each other either.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
OPTIONS = [*SMALL, "--batch=4", "--tick=0.004", "--snap=2", "--metrics=none", "--device=cpu", "--resume=latest"]


@dataclass(frozen=True)
class Program:
    """A run of train.py in processes of its own."""

    process: subprocess.Popen[bytes]
    output: Path

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until the program has printed a text so many times or has ended."""
        while self.output.read_text().count(text) < times and self.process.poll() is None:
            time.sleep(0.02)

    def kill(self) -> None:
        """End all its processes the hard way."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def finish(self) -> int:
        """Wait for its end and return its exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.kill()


def start(outdir: Path, data: Path, *options: str, output: Path | None = None) -> Program:
    output = output or outdir.with_suffix(".txt")
    command = [sys.executable, "train.py", f"--outdir={outdir}", f"--data={data}", *OPTIONS, *options]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Program(process, output)


def result(outdir: Path) -> dict[str, Any]:
    """All that a run has come to, except for times."""
    run_dir = max(outdir.iterdir())
    parts = Checkpoint.read(max(run_dir.glob("training-state-*.pt")))["parts"]
    parts["state"].pop("elapsed")
    snapshot = load_network(max(run_dir.glob("network-snapshot-*.pkl")))
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return {
        "parts": {name: digest(part) for name, part in parts.items()},
        "G_ema": digest(snapshot.G_ema.state_dict()),
        "ticks": [line["Progress/kimg"] for line in lines],
        "leftovers": sorted(path.name for path in run_dir.glob(".*")),
    }


def torture(outdir: Path, data: Path, options: list[str], kills: int, loading: float) -> None:
    """Kill a run at random moments of its life, start it again each time, and at last let it end.

    `loading` is how many seconds the program takes to begin: one in five is killed about then.
    """
    moments = random.Random(kills)
    for _ in range(kills):
        program = start(outdir, data, *options)
        if moments.random() < 0.8:
            program.wait_for("tick ", times=moments.randint(1, 3))
            time.sleep(moments.uniform(0, 0.2))
        else:
            time.sleep(moments.uniform(0, 1.2 * loading))
        assert program.process.poll() in (None, 0), program.output.read_text()  # 0: looked at too late
        program.kill()
    assert start(outdir, data, *options, output=Path("/dev/full")).finish() == 0
    log = (max(outdir.iterdir()) / "log.txt").read_text()
    assert log.count("stdout failed (No space left on device) and is dropped") == 1
    assert f"\nDone: {outdir}" in log


@pytest.mark.parametrize(
    ("steps", "kills"), [(16, 1), pytest.param(400, 50, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    shapes_zip: Path, tmp_path: Path, steps: int, kills: int
) -> None:
    options = [f"--kimg={steps * 4 / 1000}"]
    began = time.monotonic()
    straight = start(tmp_path / "straight", shapes_zip, *options)
    try:
        straight.wait_for("tick ")
        torture(tmp_path / "killed", shapes_zip, options, kills, loading=time.monotonic() - began)
        assert straight.finish() == 0
    finally:
        straight.kill()
    assert result(tmp_path / "killed") == result(tmp_path / "straight")
    assert len(result(tmp_path / "killed")["ticks"]) == steps + 1


def test_signals_reach_all_processes_of_a_run(shapes_zip: Path, tmp_path: Path) -> None:
    """To the launcher alone, as a scheduler sends them. --snap is out of reach: only signals save anything."""
    program = start(tmp_path / "runs", shapes_zip, "--gpus=2", "--snap=999", "--kimg=99")
    try:
        program.wait_for("tick 1 ")
        program.process.send_signal(signal.SIGUSR1)
        program.wait_for("SIGUSR1 at kimg")
        program.process.send_signal(signal.SIGHUP)  # which is passed on as SIGTERM
        assert program.finish() == EXIT_STOPPED, program.output.read_text()
    finally:
        program.kill()
    printed = program.output.read_text()
    assert printed.count("SIGUSR1 at kimg") == printed.count("SIGTERM at kimg") == 1
    assert "Traceback" not in printed
    (run_dir,) = (tmp_path / "runs").iterdir()
    saved = Checkpoint.read(max(run_dir.glob("training-state-*.pt")))["parts"]["state"]["nimg"] / 1000
    assert f"SIGTERM at kimg {saved:g}: " in printed
