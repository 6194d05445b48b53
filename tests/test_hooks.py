"""Hooks: order of the calls, with and without errors or an early stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import small_config

from training.dataset import ImageDataset
from training.hooks import Hook, Profile
from training.training_loop import Tick, Trainer


class Notes(Hook):
    """Hook that records every call and can stop the training or raise an error after a step."""

    def __init__(self, name: str, calls: list[str], stop: int | None = None, error: int | None = None) -> None:
        self.name, self.calls, self.stop, self.error = name, calls, stop, error

    def on_start(self, trainer: Trainer) -> None:
        self.calls.append(f"{self.name} start {trainer.state.step}")

    def on_step(self, trainer: Trainer) -> None:
        self.calls.append(f"{self.name} step {trainer.state.step}")
        trainer.is_stopped = trainer.state.step == self.stop
        if trainer.state.step == self.error:
            raise KeyboardInterrupt

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        assert (tick.is_first, tick.is_last) == (trainer.state.step == 0, trainer.state.step == 3)
        self.calls.append(f"{self.name} tick {tick.number}")

    def on_end(self, trainer: Trainer) -> None:
        self.calls.append(f"{self.name} end {trainer.state.step}")


def new_trainer(data: Path) -> Trainer:
    """Return a trainer of three steps with ticks after the second step and at the end."""
    config = small_config(data, batch_size=8, run__tick_kimg=0.016, run__total_kimg=0.024)
    return Trainer(config, ImageDataset(config.data), torch.device("cpu"))


def test_hooks_run_in_order_and_end_in_reverse(shapes_zip: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    trainer = new_trainer(shapes_zip)
    trainer.hooks = [Notes("a", calls), Hook(), Notes("b", calls, stop=1)]
    trainer.train()
    begun = ["a start 0", "b start 0", "a tick 0", "b tick 0"]
    assert calls == [*begun, "a step 1", "b step 1", "b end 1", "a end 1"]
    trainer.save(tmp_path / "state.pt")

    calls.clear()
    resumed = new_trainer(shapes_zip)
    resumed.resume(tmp_path / "state.pt")
    resumed.hooks = [Notes("a", calls), Notes("b", calls)]
    resumed.train()
    rest = ["a step 2", "a tick 1", "b step 2", "b tick 1", "a step 3", "a tick 1", "b step 3", "b tick 1"]
    assert calls == ["a start 1", "b start 1", *rest, "b end 3", "a end 3"]


def test_hooks_do_not_end_after_an_error(shapes_zip: Path) -> None:
    calls: list[str] = []
    trainer = new_trainer(shapes_zip)
    trainer.hooks = [Notes("a", calls, error=1)]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert calls == ["a start 0", "a tick 0", "a step 1"]


@pytest.mark.parametrize(("total", "steps", "traced"), [(3, 9, None), (4, 9, 1), (9, 2, 2)])
def test_a_profile_starts_after_three_steps(
    tmp_path: Path, shapes_zip: Path, capsys: pytest.CaptureFixture[str], total: int, steps: int, traced: int | None
) -> None:
    trainer = new_trainer(shapes_zip)
    trainer.total_nimg = total * trainer.batch_size
    trainer.hooks = [Profile(tmp_path, steps)]
    trainer.train()
    told = capsys.readouterr()
    assert (tmp_path / "trace.json").exists() == bool(traced)
    if traced is None:
        assert "training ended before the steps to profile" in told.err
    else:
        assert f"Profile of {traced} steps: " in told.out
