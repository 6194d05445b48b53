"""Several processes of which one fails: all end soon, and what is printed says who and why."""

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


def _one_raises() -> None:
    if distributed.rank() == 1:
        raise ArithmeticError("out of numbers")
    distributed.all_reduce(torch.zeros(1))


def test_one_process_that_raises_ends_all_with_one_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_one_raises, 3)
    assert stop.value.code == 1
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == 1
    assert "ArithmeticError: out of numbers" in printed


def _one_stops() -> None:
    for _ in range(3):
        distributed.all_reduce(torch.zeros(1))
    if distributed.rank() == 0:
        time.sleep(PATIENCE)
    distributed.all_reduce(torch.zeros(1))


def test_a_process_that_stops_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """Also when it is the one that prints otherwise."""
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_one_stops, 2, timeout=3.0)
    assert stop.value.code == 1
    assert time.monotonic() - began < PATIENCE
    printed = capfd.readouterr().err
    assert printed.count("Error: process 0 on ") == printed.count("Error: process") == 1
    assert "stopped 3 seconds ago, and the others wait" in printed


def test_only_who_is_behind_has_stopped() -> None:
    def stopped(*positions: int) -> list[int]:
        return find_stopped({rank: RankStatus(position, "here") for rank, position in enumerate(positions)})

    assert stopped(5, 5, 5) == []
    assert stopped(5, 4, 5) == [1]
    assert stopped(3, 7, 3) == [0, 2]


def test_who_gives_no_sign_of_life_has_stopped_wherever_it_is() -> None:
    statuses = {rank: RankStatus(5, "here") for rank in range(3)}
    assert find_stopped(statuses, silent=[2]) == [2]
    pulse = Pulse(timeout=10)
    assert pulse.find_silent({0: 1, 1: 1}, now=100) == []
    assert pulse.find_silent({0: 2, 1: 1}, now=110) == []
    assert pulse.find_silent({0: 3, 1: 1}, now=111) == [1]
    assert pulse.find_silent({0: 3, 1: 2}, now=112) == []


def _one_freezes_in_a_call() -> None:
    if distributed.rank() == 1:
        own = os.getpid()
        # Frozen, it would not hear the launcher either, which waits for half a minute before it kills.
        subprocess.Popen(["sh", "-c", f"sleep 2; kill -STOP {own}; sleep 12; kill -CONT {own}"])
    distributed.from_main(lambda: time.sleep(PATIENCE))


@pytest.mark.slow
def test_a_process_that_freezes_where_the_others_are_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_one_freezes_in_a_call, 2, timeout=6.0)
    assert stop.value.code == 1
    printed = capfd.readouterr().err
    assert printed.count("Error: process 1 on ") == printed.count("Error: process") == 1


def _differ(data: Path) -> None:
    config = small_config(data, run__num_gpus=2)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    with torch.no_grad():
        trainer.G.synthesis.const[0] += distributed.rank()
    trainer.synchronise()
    trainer.check_replicas()
    with torch.no_grad():
        trainer.D.epilogue.out.weight.view(-1)[0].view(torch.int32).bitwise_xor_(distributed.rank())
    trainer.check_replicas()


def test_processes_begin_alike_and_one_bit_that_differs_later_is_found(
    shapes_zip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        distributed.launch(_differ, 2, shapes_zip)
    assert stop.value.code == 2
    printed = capfd.readouterr().err
    assert printed.count("Error") == 1
    assert "Error: the processes differ in D at kimg 0, so nothing is saved" in printed


def test_a_killed_worker_ends_the_run_with_one_line(shapes_zip: Path, tmp_path: Path) -> None:
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
    assert "Error: a process that decodes images has ended (DataLoader worker" in printed.splitlines()[-1]
