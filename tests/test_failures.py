"""Failure of one of several processes: all processes end soon, and the output names the process and the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, small_config
from process_helpers import start_training

from torch_utils import distributed
from torch_utils.watchdog import Pulse, RankStatus, find_stopped
from training.dataset import ImageDataset
from training.training_loop import Trainer


def _rank_1_raises() -> None:
    if distributed.rank() == 1:
        raise ArithmeticError("out of numbers")
    distributed.all_reduce(torch.zeros(1))


def test_an_exception_in_one_process_ends_all_processes(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_rank_1_raises, 3)
    assert stop.value.code == 1
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == 1
    assert "ArithmeticError: out of numbers" in printed


def _rank_0_sleeps() -> None:
    for _ in range(3):
        distributed.all_reduce(torch.zeros(1))
    if distributed.rank() == 0:
        time.sleep(PATIENCE)
    distributed.all_reduce(torch.zeros(1))


def test_a_process_that_stops_responding_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """The process that stops is rank 0, which prints all other output."""
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_rank_0_sleeps, 2, timeout=3.0)
    assert stop.value.code == 1
    assert time.monotonic() - began < PATIENCE
    printed = capfd.readouterr().err
    assert printed.count("Error: process 0 on ") == printed.count("Error: process") == 1
    assert "no progress for 3 seconds while the others wait" in printed


def test_ranks_behind_the_others_have_stopped() -> None:
    def stopped(*positions: int) -> list[int]:
        return find_stopped({rank: RankStatus(position, "here") for rank, position in enumerate(positions)})

    assert stopped(5, 5, 5) == []
    assert stopped(5, 4, 5) == [1]
    assert stopped(3, 7, 3) == [0, 2]


def test_silent_ranks_have_stopped_regardless_of_their_position() -> None:
    statuses = {rank: RankStatus(5, "here") for rank in range(3)}
    assert find_stopped(statuses, silent=[2]) == [2]
    pulse = Pulse(timeout=10)
    assert pulse.find_silent({0: 1, 1: 1}, now=100) == []
    assert pulse.find_silent({0: 2, 1: 1}, now=110) == []
    assert pulse.find_silent({0: 3, 1: 1}, now=111) == [1]
    assert pulse.find_silent({0: 3, 1: 2}, now=112) == []


def _rank_1_is_frozen() -> None:
    if distributed.rank() == 1:
        own = os.getpid()
        # Resume the process later: a frozen process ignores the SIGTERM of the launcher for half a minute.
        subprocess.Popen(["sh", "-c", f"sleep 2; kill -STOP {own}; sleep 12; kill -CONT {own}"])
    distributed.from_main(lambda: time.sleep(PATIENCE))


@pytest.mark.slow
def test_a_frozen_process_at_the_common_position_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_rank_1_is_frozen, 2, timeout=6.0)
    assert stop.value.code == 1
    printed = capfd.readouterr().err
    assert printed.count("Error: process 1 on ") == printed.count("Error: process") == 1


def _change_one_bit(data: Path) -> None:
    config = small_config(data, run__num_gpus=2)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    with torch.no_grad():
        trainer.G.synthesis.const[0] += distributed.rank()
    trainer.synchronise()
    trainer.check_replicas()
    with torch.no_grad():
        trainer.D.epilogue.out.weight.view(-1)[0].view(torch.int32).bitwise_xor_(distributed.rank())
    trainer.check_replicas()


def test_replicas_that_differ_in_one_bit_are_detected(shapes_zip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_change_one_bit, 2, shapes_zip)
    assert stop.value.code == 2
    printed = capfd.readouterr().err
    assert printed.count("Error") == 1
    assert "Error: the processes differ in D at kimg 0, so nothing is saved" in printed


def test_a_killed_data_worker_ends_the_run_with_one_line(shapes_zip: Path, tmp_path: Path) -> None:
    options = ["--workers=1", "--kimg=99", "--resume=latest", "--snap=999"]
    program = start_training(tmp_path / "runs", shapes_zip, *options)
    try:
        program.wait_for("tick 1 ")
        pid = program.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        assert program.finish() == 2
    finally:
        program.kill()
    printed = program.output.read_text()
    assert "Traceback" not in printed
    assert "Error: a data worker was killed (DataLoader worker" in printed.splitlines()[-1]
