"""Runs of train.py that are killed, signalled and restarted end like uninterrupted runs."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from process_helpers import run_result, start_training

from torch_utils.checkpoint import Checkpoint
from torch_utils.signals import EXIT_STOPPED


def kill_repeatedly(outdir: Path, data: Path, options: list[str], kills: int, loading: float) -> None:
    """Start a run repeatedly and kill the process at random moments; let the last start finish.

    `loading` is the startup time of the program in seconds. One in five kills occurs within 1.2 times this time.
    """
    moments = random.Random(kills)
    for _ in range(kills):
        program = start_training(outdir, data, *options)
        if moments.random() < 0.8:
            program.wait_for("tick ", times=moments.randint(1, 3))
            time.sleep(moments.uniform(0, 0.2))
        else:
            time.sleep(moments.uniform(0, 1.2 * loading))
        assert program.process.poll() in (None, 0), program.output.read_text()  # 0: the run finished before the kill
        program.kill()
    assert start_training(outdir, data, *options, output=Path("/dev/full")).finish() == 0
    log = (max(outdir.iterdir()) / "log.txt").read_text()
    assert log.count("stdout failed (No space left on device) and is dropped") == 1
    assert f"\nDone: {outdir}" in log


@pytest.mark.parametrize(
    ("steps", "kills"), [(16, 1), pytest.param(400, 50, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_repeatedly_killed_run_ends_like_an_uninterrupted_run(
    shapes_zip: Path, tmp_path: Path, steps: int, kills: int
) -> None:
    options = [f"--kimg={steps * 4 / 1000}"]
    began = time.monotonic()
    straight = start_training(tmp_path / "straight", shapes_zip, *options)
    try:
        straight.wait_for("tick ")
        kill_repeatedly(tmp_path / "killed", shapes_zip, options, kills, loading=time.monotonic() - began)
        assert straight.finish() == 0
    finally:
        straight.kill()
    assert run_result(tmp_path / "killed") == run_result(tmp_path / "straight")
    assert len(run_result(tmp_path / "killed")["ticks"]) == steps + 1


def test_a_signal_to_the_launcher_reaches_all_processes(shapes_zip: Path, tmp_path: Path) -> None:
    """A scheduler signals only the launcher. --snap is never reached, so only signals write training states."""
    program = start_training(tmp_path / "runs", shapes_zip, "--gpus=2", "--snap=999", "--kimg=99")
    try:
        program.wait_for("tick 1 ")
        program.process.send_signal(signal.SIGUSR1)
        program.wait_for("SIGUSR1 at kimg")
        program.process.send_signal(signal.SIGHUP)  # forwarded as SIGTERM
        assert program.finish() == EXIT_STOPPED, program.output.read_text()
    finally:
        program.kill()
    printed = program.output.read_text()
    assert printed.count("SIGUSR1 at kimg") == printed.count("SIGTERM at kimg") == 1
    assert "Traceback" not in printed
    (run_dir,) = (tmp_path / "runs").iterdir()
    saved = Checkpoint.read(max(run_dir.glob("training-state-*.pt")))["parts"]["state"]["nimg"] / 1000
    assert f"SIGTERM at kimg {saved:g}: " in printed
