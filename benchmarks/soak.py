"""Train a tiny network for thousands of steps and monitor its process: memory, open files, threads, child processes.

python benchmarks/soak.py --steps=4000

Every 50 steps, a tick writes a snapshot, a training state, image grids and a metric. Two workers decode the images.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT, emit

NETWORKS = [
    "--cfg=tiny",
    "--g_dict=16,16",
    "--num_layers=1,1",
    "--linformer=0",
    "--cbase=128",
    "--set=discriminator.channel_max=16",
]
OPTIONS = [*NETWORKS, "--batch=4", "--tick=0.2", "--snap=1", "--metrics=swd60", "--kimg=1000000", "--device=cpu"]
EXIT_STOPPED = 3


@dataclass(frozen=True)
class Sample:
    """Resources of a process at one time."""

    steps: int
    rss_mb: float
    files: int
    threads: int
    children: int


def take_sample(pid: int, run_dir: Path) -> Sample:
    """Read /proc. Raises OSError if the process has ended."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = (proc / "task" / str(pid) / "children").read_text().split()
    last = (run_dir / "stats.jsonl").read_text().splitlines()[-1:]
    return Sample(
        steps=int(json.loads(last[0])["Progress/step"]) if last else 0,
        rss_mb=int(status["VmRSS"].split()[0]) / 1024,
        files=len(list((proc / "fd").iterdir())),
        threads=int(status["Threads"]),
        children=len(children),
    )


def watch(folder: Path, data: Path, steps: int) -> tuple[list[Sample], int]:
    """Train for `steps` steps, stop by SIGTERM; return one sample per second and the number of remaining processes."""
    command = [sys.executable, "train.py", f"--outdir={folder}", f"--data={data}", *OPTIONS, "--workers=2"]
    devnull = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=devnull, stderr=devnull, start_new_session=True)
    samples: list[Sample] = []
    try:
        while not list(folder.glob("*/stats.jsonl")):
            if process.poll() is not None:
                raise click.ClickException(f"train.py ended with code {process.returncode}")
            time.sleep(0.2)
        (run_dir,) = folder.iterdir()
        while not samples or samples[-1].steps < steps:
            time.sleep(1)
            samples.append(take_sample(process.pid, run_dir))
        process.send_signal(signal.SIGTERM)
        if process.wait(120) != EXIT_STOPPED:
            raise click.ClickException(f"train.py ended with code {process.returncode}")
        return samples, count_session(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def count_session(session: int) -> int:
    """Return the number of processes in a session."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            found += int(stat.read_text().rpartition(")")[2].split()[3]) == session
        except OSError:  # the process has just ended
            continue
    return found


def summarise(samples: Sequence[Sample], survivors: int) -> dict[str, Any]:
    """Compare the second quarter of the steps with the last, by minimum counts and median memory."""
    steps = samples[-1].steps
    earlier = [sample for sample in samples if steps / 4 <= sample.steps <= steps / 2]
    later = [sample for sample in samples if steps * 3 / 4 <= sample.steps]

    def both(name: str) -> list[float]:
        return [min(getattr(sample, name) for sample in part) for part in (earlier, later)]

    rss = [sorted(sample.rss_mb for sample in part)[len(part) // 2] for part in (earlier, later)]
    return {
        "benchmark": "soak",
        "steps": steps,
        "steps_between": later[len(later) // 2].steps - earlier[len(earlier) // 2].steps,
        "rss_mb": [round(x, 1) for x in rss],
        "rss_mb_highest": round(max(sample.rss_mb for sample in samples), 1),
        "files": both("files"),
        "python_and_native_threads": both("threads"),
        "children": both("children"),
        "processes_left": survivors,
    }


@click.command()
@click.option("--steps", type=click.IntRange(min=400), default=4000, show_default=True, help="Training steps.")
def main(steps: int) -> None:
    """Print one line of JSON; pairs of values are for the second and the last quarter of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.zip"
        make = ["--source=shapes", f"--dest={data}", "--max-images=256", "--width=16", "--height=16", "--workers=1"]
        subprocess.run([sys.executable, "dataset_tool.py", *make], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        emit(summarise(*watch(Path(folder) / "runs", data, steps)), torch.device("cpu"))


if __name__ == "__main__":
    main()
