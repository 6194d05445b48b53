"""train.py as a separate program that a test can signal and kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import PATIENCE, SMALL
from training_helpers import without_times

from torch_utils.checkpoint import Checkpoint, digest
from training.snapshots.snapshot import load_network

ROOT = Path(__file__).parent.parent

# Results are bit-identical only for equal thread counts. A single thread also keeps tests from slowing each other down.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
OPTIONS = [*SMALL, "--batch=4", "--tick=0.004", "--snap=2", "--metrics=none", "--device=cpu", "--resume=latest"]


@dataclass(frozen=True)
class Program:
    """A running program and the file with its output."""

    process: subprocess.Popen[bytes]
    output: Path

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until the program has printed a text the given number of times or has ended."""
        while self.output.read_text().count(text) < times and self.process.poll() is None:
            time.sleep(0.02)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the program."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def finish(self) -> int:
        """Wait for the program to end and return its exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.kill()


def start_training(outdir: Path, data: Path, *options: str, output: Path | None = None) -> Program:
    """Start train.py with OPTIONS and further options in a new session."""
    output = output or outdir.with_suffix(".txt")
    command = [sys.executable, "train.py", f"--outdir={outdir}", f"--data={data}", *OPTIONS, *options]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Program(process, output)


def run_result(outdir: Path) -> dict[str, Any]:
    """Return digests of everything a run wrote, except timestamps."""
    run_dir = max(outdir.iterdir())
    parts = without_times(Checkpoint.read(max(run_dir.glob("training-state-*.pt")))["parts"])
    snapshot = load_network(max(run_dir.glob("network-snapshot-*.pkl")))
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return {
        "parts": {name: digest(part) for name, part in parts.items()},
        "G_ema": digest(snapshot.G_ema.state_dict()),
        "ticks": [line["Progress/kimg"] for line in lines],
        "leftovers": sorted(path.name for path in run_dir.glob(".*")),
    }
