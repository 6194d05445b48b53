"""--batch-gpu=auto: candidate sizes, agreement of all processes, no side effects, out-of-memory errors."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import PATIENCE, SMALL, small_config

import train
from dnnlib.config import ConfigError, UserError, override
from dnnlib.util import is_out_of_memory
from torch_utils import distributed
from torch_utils.checkpoint import digest
from training import auto_batch, resume
from training.config import TrainConfig, micro_batches
from training.dataset import ImageDataset
from training.training_loop import Trainer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batch", "gpus", "group", "pl_weight", "sizes"),
    [
        (64, 2, 4, 0, [32, 16, 8, 4]),
        (24, 1, 4, 0, [24, 12, 8, 4]),
        (32, 1, 32, 0, [32]),  # smaller micro-batches would have smaller minibatch-std groups
        (16, 1, 32, 0, [16]),
        (6, 1, 0, 0, [6, 3, 2, 1]),
        (6, 1, 0, 2, [6, 3, 2]),  # path length uses half of a micro-batch
    ],
)
def test_micro_batches_respect_minibatch_std_groups(
    shapes_zip: Path, batch: int, gpus: int, group: int, pl_weight: float, sizes: list[int]
) -> None:
    values = {"batch_size": batch, "run__num_gpus": gpus, "loss__pl_weight": pl_weight, "loss__pl_interval": 4}
    config = small_config(shapes_zip, **values, discriminator__mbstd_group_size=group, run__batch_gpu="auto")
    assert micro_batches(config) == sizes
    assert config.run.batch_gpu == sizes[0]  # the value before the search, and the final value on a CPU


def test_an_indivisible_batch_is_refused(shapes_zip: Path) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of 18"):
        small_config(shapes_zip, batch_size=17, run__num_gpus=3, run__batch_gpu="auto")


def limit_images(monkeypatch: pytest.MonkeyPatch, phase_name: str, max_images: int) -> list[tuple[str, int]]:
    """Make a phase run out of memory above `max_images` images; return a list of the computed phases and sizes."""
    computed: list[tuple[str, int]] = []
    accumulate = Trainer._accumulate

    def limited(self: Trainer, phase: Any, img: torch.Tensor, c: torch.Tensor) -> Any:
        if phase.name == phase_name and len(img) > max_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        computed.append((phase.name, len(img)))
        return accumulate(self, phase, img, c)

    monkeypatch.setattr(Trainer, "_accumulate", limited)
    return computed


@pytest.mark.parametrize("phase", ["G_main", "G_reg", "D_main", "D_reg"])
def test_the_trial_step_runs_every_phase(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    config = small_config(shapes_zip, batch_size=8, loss__pl_weight=2.0, loss__pl_interval=4, run__batch_gpu="auto")
    computed = limit_images(monkeypatch, phase, max_images=4)
    chosen = auto_batch.choose_batch_gpu(config, ImageDataset(config.data), CPU)
    assert chosen == override(config, {"run.batch_gpu": 4})
    assert [name for name, size in computed if size == 4] == ["G_main", "G_reg", "D_main", "D_reg"] * 2
    assert auto_batch.describe_choice(chosen, micro_batches(config)) == (
        "--batch-gpu=auto: 4 images at a time (8 did not fit)"
    )


def test_a_trial_step_leaves_no_trace(shapes_zip: Path) -> None:
    """A trial step changes neither its trainer's weights nor the subsequent training."""

    def trained() -> dict[str, Any]:
        trainer = Trainer(config, dataset, CPU)
        trainer.total_nimg = 32
        trainer.train()
        return trainer.capture()["parts"] | {"state": None}

    config = small_config(shapes_zip, run__batch_gpu=8, loss__pl_weight=2.0, loss__pl_interval=2)
    dataset = ImageDataset(config.data)
    expected = digest(trained())
    trainer = Trainer(config, dataset, CPU)
    parts = ("G", "D", "G_ema", "ada", "pl_mean", "state")
    before = [digest(trainer.capture()["parts"][part]) for part in parts]
    trainer.trial_step()
    assert [digest(trainer.capture()["parts"][part]) for part in parts] == before
    assert auto_batch.fits_in_memory(config, dataset, CPU)
    assert digest(trained()) == expected


def test_a_batch_that_never_fits_and_other_errors_are_reported(
    shapes_zip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(shapes_zip, run__batch_gpu="auto")
    dataset = ImageDataset(config.data)
    limit_images(monkeypatch, "D_reg", max_images=0)
    with pytest.raises(UserError, match=r"out of memory even with 4 images at a time \(tried 16, 8, 4\)"):
        auto_batch.choose_batch_gpu(config, dataset, CPU)
    with pytest.raises(UserError, match="choose --graphs=0, --grad-checkpoint"):
        auto_batch.choose_batch_gpu(override(config, {"run.graphs": True}), dataset, CPU, fits=lambda *_: False)

    def broken(*args: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "_accumulate", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        auto_batch.choose_batch_gpu(config, dataset, CPU)


def in_two_processes(folder: Path, data: Path) -> None:
    def fits(candidate: TrainConfig, dataset: None, device: torch.device) -> bool:
        limit = 4 if distributed.rank() == 1 else 8
        assert isinstance(candidate.run.batch_gpu, int)
        return candidate.run.batch_gpu <= limit

    config = small_config(data, batch_size=32, run__num_gpus=2, run__batch_gpu="auto")
    chosen = auto_batch.choose_batch_gpu(config, None, CPU, fits)  # type: ignore[arg-type]
    (folder / f"{distributed.rank()}").write_text(str(chosen.run.batch_gpu))


def test_the_smallest_size_over_all_processes_is_chosen(together: Path) -> None:
    assert [(together / "test_auto_batch" / rank).read_text() for rank in "01"] == ["4", "4"]


SHORT = [*SMALL, "--batch-gpu=auto", "--tick=0.016", "--snap=1", "--metrics=none", "--device=cpu"]


def test_the_chosen_size_is_saved_and_reused_on_resume(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*options: str) -> tuple[str, int]:
        arguments = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, *options]
        result = CliRunner().invoke(train.main, arguments)
        assert result.exit_code == 0, result.output
        options_file = max(tmp_path.iterdir()) / "training_options.json"
        return result.stdout, json.loads(options_file.read_text())["run"]["batch_gpu"]

    assert run("--kimg=0.016")[1] == 16  # no search on a CPU
    monkeypatch.setattr(resume, "is_on_gpu", lambda config: True)
    computed = limit_images(monkeypatch, "D_main", max_images=8)
    printed, chosen = run("--kimg=0.016", "--seed=1")
    assert ("--batch-gpu=auto: 8 images at a time (16 did not fit)" in printed, chosen) == (True, 8)
    computed.clear()
    printed, chosen = run("--kimg=0.032", "--seed=1", "--resume=latest")
    assert ("auto" in printed, chosen) == (False, 8)
    assert ("Resuming" in printed, [size for _, size in computed]) == (True, [8] * 4)  # G_main and D_main, twice each


@pytest.mark.gpu
def test_micro_batches_are_small_on_a_gpu_with_little_memory(shapes_zip: Path) -> None:
    device = torch.device("cuda", 0)
    config = small_config(shapes_zip, batch_size=256, run__batch_gpu="auto")
    dataset = ImageDataset(config.data)
    assert auto_batch.choose_batch_gpu(config, dataset, device).run.batch_gpu == 256
    reserved = torch.cuda.max_memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(reserved / total / 2, device)
    try:
        chosen = auto_batch.choose_batch_gpu(config, dataset, device)
        assert chosen.run.batch_gpu in (128, 64, 32, 16)
        trainer = Trainer(chosen, dataset, device)
        trainer.total_nimg = 512
        trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def capture_error_after(first: Exception, cause: Exception | None = None) -> Exception:
    """Return the error of a CUDA graph capture that another error aborted."""
    recording = contextlib.ExitStack()

    def end() -> None:
        error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if cause:
            raise error from cause
        raise error

    recording.callback(end)
    with pytest.raises(RuntimeError, match="during capture") as caught, recording:
        raise first
    return caught.value


def test_out_of_memory_is_recognised_under_a_capture_error() -> None:
    lack = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert is_out_of_memory(capture_error_after(lack))
    assert not is_out_of_memory(capture_error_after(lack, cause=ValueError("another reason")))
    assert not is_out_of_memory(capture_error_after(ValueError("a shape")))


@pytest.mark.slow
def test_out_of_memory_ends_with_one_line(shapes32_zip: Path, tmp_path: Path) -> None:
    """The address space is limited to 2 GiB above its size after start-up; one step needs more."""
    limited = """
import resource, sys
import train, training.startup  # with torch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
sys.argv = ["train.py", *sys.argv[1:]]
train.main()
"""
    options = [
        "--cfg=tiny",
        "--batch=4096",
        "--set=discriminator.channel_max=512",
        "--cbase=16384",
        "--kimg=5",
        "--metrics=none",
        "--device=cpu",
    ]
    result = subprocess.run(
        [sys.executable, "-c", limited, f"--outdir={tmp_path}", f"--data={shapes32_zip}", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: out of host memory with --batch-gpu=4096 (")
    assert "choose --batch-gpu=2048, --grad-checkpoint, or fewer --workers" in last
