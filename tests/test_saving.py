"""Background writing: files hold the copied values, failures are reported, and the right files are kept."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENCE, OnStep, new_saver, small_config
from PIL import Image

from dnnlib.config import OPTIONS_FILE, UserError, WriteError
from dnnlib.util import FolderLock, TeeLog, redraw
from torch_utils.background import BackgroundWriter
from torch_utils.checkpoint import Checkpoint, digest
from training import hooks, saving
from training.config import read_config
from training.dataset import ImageDataset
from training.evaluation import Evaluation, build_context
from training.loggers import Loggers
from training.run_folder import RunFolder, list_states
from training.saving import Saver, obsolete
from training.snapshots.snapshot import load_network
from training.training_loop import Trainer

ROOT = Path(__file__).parent.parent
OTHER = """
import sys
from pathlib import Path
from dnnlib.util import FolderLock
lock = FolderLock()
lock.acquire(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_program(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a program that holds the lock of a folder."""
    command = [sys.executable, "-c", OTHER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "locked\n"
        yield process


def new_trainer(data: Path, **changes: object) -> Trainer:
    config = small_config(data, run__snapshot_ticks=1, run__tick_kimg=0.016, **changes)
    return Trainer(config, ImageDataset(config.data), torch.device("cpu"))


def train_steps(trainer: Trainer, steps: int) -> None:
    trainer.total_nimg = trainer.state.nimg + steps * trainer.batch_size
    trainer.train()


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit file sizes so that the kernel refuses writes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_state_is_written_as_copied(shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(shapes_zip)
    saver = new_saver(tmp_path, trainer.config)
    train_steps(trainer, 1)
    expected = digest(trainer.capture()["parts"])
    may_write = threading.Event()
    write = Checkpoint.write

    def write_later(path: Path, payload: dict[str, Any]) -> None:
        assert may_write.wait(PATIENCE)
        write(path, payload)

    monkeypatch.setattr(Checkpoint, "write", write_later)
    saver.save(trainer, snapshot=False)
    train_steps(trainer, 2)  # the writer is still blocked
    assert not (tmp_path / "training-state-000000.pt").exists()
    may_write.set()
    saver.finish()
    assert digest(Checkpoint.read(tmp_path / "training-state-000000.pt")["parts"]) == expected
    assert digest(trainer.capture()["parts"]) != expected


def test_a_snapshot_holds_each_network_under_its_name(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip)
    trainer.augment.p.fill_(0.25)
    train_steps(trainer, 2)
    saver = new_saver(tmp_path, trainer.config)
    saver.save(trainer, snapshot=True)
    saver.finish()
    snapshot = load_network(tmp_path / "network-snapshot-000000.pkl")
    networks = {"G": trainer.G, "D": trainer.D, "G_ema": trainer.ema.module}
    assert len({digest(network.state_dict()) for network in networks.values()}) == 3
    for name, network in networks.items():
        assert digest(getattr(snapshot, name).state_dict()) == digest(network.state_dict()), name
    assert (snapshot.nimg, snapshot.ada_p) == (32, float(trainer.augment.p))
    assert snapshot.ada_p != 0
    assert not any(getattr(snapshot, name).training for name in networks)


def test_metrics_and_grids_use_g_ema(shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(shapes_zip, ema__rampup=None, run__metrics=("swd20",), run__metrics_first=True)
    evaluated: list[Any] = []

    def evaluate(names: Any, context: Any) -> list[Any]:
        evaluated.append(context.G)
        return []

    monkeypatch.setattr("metrics.registry.compute_all", evaluate)
    loggers = Loggers((), tmp_path, trainer.config)
    pictures = hooks.ImageGrids(tmp_path, 1, loggers)
    monkeypatch.setattr(hooks, "grid_count", lambda img_shape: 16)
    trainer.hooks = [Evaluation(new_saver(tmp_path, trainer.config), build_context(trainer), loggers), pictures]
    train_steps(trainer, 1)
    assert all(G is trainer.ema.module for G in evaluated)
    assert len(evaluated) == 2
    with Image.open(tmp_path / "fakes000000.png") as file:
        _, side, _ = trainer.G.img_shape
        first = torch.from_numpy(np.array(file))[:side, :side].permute(2, 0, 1)
    z = torch.randn([16, trainer.G.z_dim], generator=torch.Generator().manual_seed(trainer.config.seed))
    expected, other = (G(z, torch.zeros(16, 0))[0] for G in (trainer.ema.module, trainer.G))
    assert (first - (expected * 127.5 + 128).clamp(0, 255)).abs().max() <= 1
    assert (expected - other).abs().max() > 0.02


def test_at_most_one_write_is_in_flight() -> None:
    running, most = [], []

    def job(number: int) -> None:
        running.append(number)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(number)

    writer = BackgroundWriter()
    for number in range(4):
        writer.submit(partial(job, number))
        assert writer.job  # the call does not wait for the writer
    assert writer.join() == []
    assert most == [1, 1, 1, 1]


def test_nothing_is_copied_while_a_write_is_in_flight(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(shapes_zip)
    train_steps(trainer, 1)
    saver = new_saver(tmp_path, trainer.config)
    in_flight: list[object] = []

    def capture(*args: object) -> dict[str, object]:
        in_flight.append(saver.writer.job)
        return {}

    monkeypatch.setattr(trainer, "capture", capture)
    monkeypatch.setattr(saving, "capture_snapshot", capture)
    saver.writer.submit(partial(time.sleep, 0.05))
    saver.save(trainer, snapshot=True)
    assert in_flight == [None, None]
    saver.writer.submit(partial(time.sleep, 0.05))
    saver.save(trainer, snapshot=False)  # the same step: nothing to write or wait for
    assert saver.writer.job
    saver.writer.wait()


def test_job_errors_are_raised_and_full_disks_reported() -> None:
    def fail(error: Exception) -> None:
        raise error

    writer = BackgroundWriter()
    writer.submit(lambda: fail(WriteError("f: the disk is full")))
    writer.submit(lambda: None)
    assert [str(error) for error in writer.join()] == ["f: the disk is full"]
    assert writer.join() == []
    writer.submit(lambda: fail(TypeError("ours")))
    with pytest.raises(TypeError, match="ours"):
        writer.join()


def test_training_continues_when_the_disk_is_full(
    shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = new_trainer(shapes_zip)
    saver = new_saver(tmp_path, trainer.config)
    grids = hooks.ImageGrids(tmp_path, 100, Loggers((), tmp_path, trainer.config))
    trainer.hooks = [hooks.Snapshots(saver, 1), hooks.JsonLog(tmp_path), grids]
    with full_disk(), pytest.raises(WriteError, match="cannot be written"):  # only the last failure stops the run
        train_steps(trainer, 2)
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_size} == {FolderLock.NAME}
    train_steps(trainer, 1)
    assert Checkpoint.read(tmp_path / "training-state-000000.pt")["parts"]["state"]["nimg"] == 48
    messages = capsys.readouterr().err
    for name in ("network-snapshot-000000.pkl", "training-state-000000.pt", "stats.jsonl", "reals.png"):
        assert f"{name}: cannot be written" in messages
    assert "File too large); earlier files are intact; training continues" in messages
    saver.saved_nimg = 0
    with full_disk():
        saver.save(trainer, snapshot=False)
        with pytest.raises(WriteError, match="cannot be written"):
            saver.finish()
    assert Checkpoint.read(tmp_path / "training-state-000000.pt")["parts"]["state"]["nimg"] == 48


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(document: Any, file: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(WriteError, match=r"\(the disk is full\); earlier files are intact"):
        Checkpoint.write(tmp_path / "state.pt", {})
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_folder_is_recreated_with_the_state(
    shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = new_trainer(shapes_zip)
    run_dir = tmp_path / "runs" / "00000-run"
    run_dir.mkdir(parents=True)

    def remove(trainer: Trainer) -> None:
        if trainer.state.step == 2:
            shutil.rmtree(tmp_path / "runs")

    with FolderLock() as lock, TeeLog(run_dir / "log.txt") as log:
        lock.acquire(run_dir)
        (run_dir / OPTIONS_FILE).write_text("{}")
        saver = Saver(RunFolder(run_dir, trainer.config, lock, log))
        trainer.hooks = [OnStep(remove), hooks.Folder(saver), hooks.JsonLog(run_dir)]
        train_steps(trainer, 4)
        saver.finish()
        assert lock.holds(run_dir)
        print("the end")
    assert capsys.readouterr().err == (
        f"Warning: {run_dir}: files were removed or moved during the run; options, log and a training state "
        "are written again\n"
    )
    assert Checkpoint.read(run_dir / "training-state-000000.pt")["parts"]["state"]["step"] == 2
    assert read_config(json.loads((run_dir / OPTIONS_FILE).read_text())) == trainer.config
    assert len((run_dir / "stats.jsonl").read_text().splitlines()) == 3  # the states of steps 2 to 4
    assert (run_dir / "log.txt").read_text().endswith("the end\n")


def test_an_unwritable_folder_stops_the_run_with_a_rescued_state(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer = new_trainer(shapes_zip)
    (tmp_path / "runs").mkdir()
    saver = new_saver(tmp_path / "runs", trainer.config)
    trainer.hooks = [hooks.Folder(saver)]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("another file")
    with pytest.raises(UserError, match="cannot be created again") as error:
        train_steps(trainer, 3)
    (state,) = tmp_path.glob("styleformer-*/training-state-000000.pt")
    assert f"--resume={state}" in str(error.value)
    assert Checkpoint.read(state)["parts"]["state"]["step"] == 1
    assert (tmp_path / "runs").read_text() == "another file"
    shutil.rmtree(state.parent)
    state.parent.touch()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix, dir: str(state.parent))
    with pytest.raises(UserError, match="the training state could not be saved elsewhere"):
        saver.check_folder(trainer)


def test_a_folder_used_by_another_run_is_not_written_to(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was moved and a new run took its name, or the lock was deleted and a second run continued the run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainer = new_trainer(shapes_zip)
    (tmp_path / "run").mkdir()
    saver = new_saver(tmp_path / "run", trainer.config)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    with other_program(tmp_path / "run") as process:
        (tmp_path / "run" / OPTIONS_FILE).write_text("theirs")
        with pytest.raises(UserError, match=f"in use by another program .process {process.pid} .*--resume="):
            saver.check_folder(trainer)
        assert (tmp_path / "run" / OPTIONS_FILE).read_text() == "theirs"
    (state,) = tmp_path.glob("styleformer-*/training-state-000000.pt")
    assert Checkpoint.read(state)["parts"]["state"]["step"] == 0


def test_a_deleted_lock_is_acquired_again(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip)
    saver = new_saver(tmp_path, trainer.config)
    (tmp_path / FolderLock.NAME).unlink()
    saver.check_folder(trainer)
    assert saver.folder.lock.holds(tmp_path)


def test_copies_and_folders_named_like_states_are_not_touched(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip, run__keep_last=1, run__keep_every=1)
    names = ["training-state-000000-backup.pt", "training-state-best.pt", "training-state-000003.pt.old"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "training-state-000001.pt").mkdir()
    saver = new_saver(tmp_path, trainer.config)
    trainer.hooks = [hooks.Snapshots(saver, 1)]
    trainer.state.nimg = 8000
    train_steps(trainer, 1)
    saver.finish()
    assert all((tmp_path / name).read_bytes() == b"mine" for name in names)
    assert [path.name for path in list_states(tmp_path)] == ["training-state-000008.pt"]


def test_a_full_disk_loses_only_log_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TeeLog(tmp_path / "log.txt") as log:
        log.file.close()
        log.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        print("on the screen")
    assert capsys.readouterr().out == "on the screen\n"


def test_printed_output_overwrites_redrawn_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "21")
    with TeeLog(tmp_path / "log.txt"):
        redraw("kimg 1.0 of 2, 9 img/s", sys.stdout)
        redraw("kimg 1.1 of 2", sys.stdout)
        print("tick 1")
        print("tick 2")
    blank = 20 * " "  # the width of the terminal minus its last column
    assert capsys.readouterr().out == f"\rkimg 1.0 of 2, 9 img\r\rkimg 1.1 of 2       \r\r{blank}\rtick 1\ntick 2\n"
    assert (tmp_path / "log.txt").read_text() == "tick 1\ntick 2\n"


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(2, None, [9, 10]), (1, 4, [4, 8, 10]), (3, 100, [8, 9, 10]), (1, 2.5, [3, 5, 8, 10]), (99, None, range(1, 11))],
)
def test_the_last_states_are_kept_and_some_permanently(last: int, every: float | None, kept: list[int]) -> None:
    """The result is the same whether files are deleted one by one, as in a run, or all at once."""

    def path(kimg: int) -> Path:
        return Path(f"training-state-{kimg:06d}.pt")

    expected = [path(kimg) for kimg in kept]
    states: list[Path] = []
    for kimg in range(1, 11):
        states.append(path(kimg))
        states = [state for state in states if state not in obsolete(states, last, every)]
    assert states == expected
    everything = [path(kimg) for kimg in range(1, 11)]
    assert [state for state in everything if state not in obsolete(everything, last, every)] == expected


def test_corrupt_newer_states_do_not_count_as_kept(shapes_zip: Path, tmp_path: Path) -> None:
    """Otherwise, a run resumed from an earlier state would delete its own new states."""
    trainer = new_trainer(shapes_zip, run__keep_last=1, ema__profiles=())
    for kimg in (7, 9):
        (tmp_path / f"training-state-{kimg:06d}.pt").write_bytes(b"damaged")
    saver = new_saver(tmp_path, trainer.config)
    trainer.hooks = [hooks.Snapshots(saver, 1)]
    trainer.state.nimg = 8000
    train_steps(trainer, 1)
    saver.finish()
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == [
        "training-state-000008.pt",
        "training-state-000009.pt",
    ]
    assert Checkpoint.read(tmp_path / "training-state-000008.pt")["parts"]["state"]["nimg"] == 8016


def test_keep_states_sets_the_number_of_kept_states(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip, run__keep_last=1, ema__profiles=())
    for kimg in (3, 5):
        trainer.save(tmp_path / f"training-state-{kimg:06d}.pt")
    saver = new_saver(tmp_path, trainer.config)
    trainer.hooks = [hooks.Snapshots(saver, 1)]
    trainer.state.nimg = 8000
    train_steps(trainer, 1)
    saver.finish()
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == ["training-state-000008.pt"]
    saver.report(trainer)
    assert trainer.last_snapshot == tmp_path / "network-snapshot-000008.pkl"
