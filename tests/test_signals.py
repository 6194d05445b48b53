"""Signals: recorded, agreed on by all processes, handled after the step."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, OnStep, OnTick, new_saver, small_config

from dnnlib.config import UserError, override
from torch_utils import distributed
from torch_utils.checkpoint import Checkpoint, digest
from torch_utils.signals import EXIT_INTERRUPTED, INTERVAL, REPEAT_SECONDS, Signals
from training import hooks
from training.dataset import DatasetConfig, ImageDataset, batches
from training.training_loop import Tick, Trainer


def new_trainer(data: Path) -> Trainer:
    config = small_config(data)
    return Trainer(config, ImageDataset(config.data), torch.device("cpu"))


def at_step(step: int, number: signal.Signals) -> OnStep:
    """Return a hook that signals its own process."""
    return OnStep(lambda trainer: signal.raise_signal(number) if trainer.state.step == step else None)


def test_sigusr1_saves_and_sigterm_also_stops(shapes_zip: Path, tmp_path: Path) -> None:
    trainer, reference = new_trainer(shapes_zip), new_trainer(shapes_zip)
    before = signal.getsignal(signal.SIGTERM)
    saver = new_saver(tmp_path, trainer.config)
    seen: list[int] = []

    def stop_at_step_4(trainer: Trainer) -> None:
        trainer.is_stopped = trainer.state.step == 4

    def record_saved(trainer: Trainer) -> None:
        saver.writer.join()
        if list(tmp_path.glob("*.pt")):
            seen.append(Checkpoint.read(tmp_path / "training-state-000000.pt")["parts"]["state"]["nimg"])

    signals = Signals()
    requests = hooks.Requests(saver, signals)
    with signals:
        trainer.hooks = [at_step(2, signal.SIGUSR1), at_step(4, signal.SIGTERM), requests, OnStep(record_saved)]
        trainer.train()
        signals.stop = 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert seen == [32, 32, 64]
    assert trainer.is_stopped
    reference.hooks = [OnStep(stop_at_step_4)]
    reference.train()
    ours, theirs = trainer.capture()["parts"], reference.capture()["parts"]
    assert digest({**ours, "state": ours["state"]["nimg"]}) == digest({**theirs, "state": theirs["state"]["nimg"]})


def test_a_signal_before_the_first_step_is_handled_after_it(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip)
    saver = new_saver(tmp_path, trainer.config)
    with Signals() as signals:
        at_start = OnTick(lambda trainer, tick: signal.raise_signal(signal.SIGTERM) if tick.is_first else None)
        trainer.hooks = [at_start, hooks.Requests(saver, signals)]
        trainer.train()
        signals.stop = 0
    saver.finish()
    assert trainer.is_stopped
    assert Checkpoint.read(tmp_path / "training-state-000000.pt")["parts"]["state"]["step"] == 1


def test_a_tick_interrupted_by_a_signal_is_logged_in_full(shapes_zip: Path, tmp_path: Path) -> None:
    """The log includes skipped updates: D diverges at the second of four steps, before the signal."""
    ticks: list[Tick] = []

    def diverge(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.D.epilogue.out.bias.fill_(float("nan") if trainer.state.step == 1 else 0.0)

    def record(trainer: Trainer, tick: Tick) -> None:
        if not tick.is_first:
            ticks.append(tick)

    config = override(small_config(shapes_zip), {"run.nan": "skip", "run.tick_kimg": 0.064, "run.total_kimg": 0.064})
    reference, first, second = (Trainer(config, ImageDataset(config.data), torch.device("cpu")) for _ in range(3))
    reference.hooks = [OnStep(diverge), OnTick(record)]
    reference.train()
    saver = new_saver(tmp_path, config)
    with Signals() as signals:
        first.hooks = [OnStep(diverge), at_step(2, signal.SIGTERM), hooks.Requests(saver, signals)]
        first.train()
        signals.stop = 0
    saver.finish()
    second.resume(tmp_path / "training-state-000000.pt")
    second.hooks = [OnStep(diverge), OnTick(record)]
    second.train()
    uninterrupted, resumed = ticks
    assert uninterrupted.stats == resumed.stats
    assert uninterrupted.stats["Loss/G/loss"].count == 3
    for tick in ticks:
        skipped = {name: count for name, count in tick.values.items() if name.startswith("Skipped/")}
        assert skipped == {"Skipped/D_main": 1, "Skipped/G_main": 1}


def test_a_failure_is_reported_before_a_signal_saves(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip)
    with torch.no_grad():
        trainer.D.epilogue.out.weight.fill_(float("nan"))
    with Signals() as signals:
        requests = hooks.Requests(new_saver(tmp_path, trainer.config), signals)
        trainer.hooks = [at_step(1, signal.SIGUSR1), requests]
        with pytest.raises(UserError, match="G_main produced non-finite values at step 0"):
            trainer.train()
    assert list(tmp_path.glob("*.pt")) == []


def test_only_a_second_sigint_exits_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    signals = Signals()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signals._handle(number)
    assert codes == []
    clock[0] += REPEAT_SECONDS + 0.1
    signals._handle(signal.SIGTERM)
    assert codes == []
    signals._handle(signal.SIGINT)
    assert codes == [EXIT_INTERRUPTED]
    answer = "Ctrl-C: stopping after this step and saving the state; press again to exit without saving"
    assert capsys.readouterr().err == f"\n{answer}\n"


def test_ctrl_c_interrupts_a_running_operator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs the handler that sets `stop` only after C code returns; here, the C code waits for a condition."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # shells ignore SIGINT in background jobs
    seen: list[tuple[bool, int]] = []
    c = ctypes.CDLL(None)
    mutex, condition = ctypes.create_string_buffer(256), ctypes.create_string_buffer(256)
    c.pthread_mutex_init(mutex, None)
    c.pthread_cond_init(condition, None)
    c.pthread_mutex_lock(mutex)

    def press_ctrl_c(signals: Signals) -> None:
        c.pthread_mutex_lock(mutex)  # the main thread releases the mutex while waiting, and needs it to continue
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while signals.interrupted == math.inf and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((signals.interrupted < math.inf, signals.stop))
        c.pthread_cond_signal(condition)
        c.pthread_mutex_unlock(mutex)

    with Signals() as signals:
        thread = threading.Thread(target=press_ctrl_c, args=[signals])
        thread.start()
        c.pthread_cond_wait(condition, mutex)
        thread.join(PATIENCE)
        assert (seen, signals.stop) == ([(True, 0)], signal.SIGINT)
        signals.stop = 0
    assert "Ctrl-C: stopping" in capsys.readouterr().err


def test_signals_ignored_by_the_parent_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.agree(1).stop is None
            signal.raise_signal(signal.SIGTERM)
            assert signals.agree(1).stop == signal.SIGTERM
            signals.stop = 0
    finally:
        signal.signal(signal.SIGHUP, before)


def in_two_processes(folder: Path, data: Path) -> None:
    """Signal only the second process, between the steps at which processes agree."""
    requests = {}
    with Signals() as signals:
        for step in range(1, 2 * INTERVAL + 1):
            if distributed.rank() == 1 and step in (1, INTERVAL + 2):
                signal.raise_signal(signal.SIGUSR1 if step == 1 else signal.SIGTERM)
            request = signals.agree(step)
            if request.save or request.stop:
                requests[step] = [request.save, request.stop]
        signals.stop = 0
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(requests))


def test_all_processes_act_on_a_signal_at_the_same_step(together: Path) -> None:
    expected = {str(INTERVAL): [True, None], str(2 * INTERVAL): [False, int(signal.SIGTERM)]}
    requests = [json.loads((together / "test_signals" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert requests == [expected, expected]


def test_data_loader_processes_survive_a_group_signal(shapes_zip: Path) -> None:
    import multiprocessing

    dataset = ImageDataset(DatasetConfig(path=str(shapes_zip)))
    others = set(multiprocessing.active_children())
    stream = batches(dataset, seed=0, position=0, batch_size=4, workers=1)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid
    for number in Signals.HANDLED:
        os.kill(worker.pid, number)
    count = 8  # exceeds the prefetched batches
    expected = batches(dataset, seed=0, position=4, batch_size=4)
    for _ in range(count):
        assert torch.equal(next(stream)[0], next(expected)[0])
