"""Time a training step phase by phase, on synthetic images: images per second, seconds per kimg, memory.

    python benchmarks/train_step.py --device=cuda --batch=64

Prints one line of JSON. A phase that is due every k steps is timed on its own and counts 1/k in a step.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from common import README_EXAMPLE, emit, peak_mib
from torch import Tensor

import dataset_tool
from dnnlib.cli import IntList, Script, option
from dnnlib.config import UserError, override
from torch_utils import distributed
from torch_utils.misc import tune_allocator
from training.config import PRESETS, Circumstances, TrainConfig, resolve
from training.dataset import ImageDataset
from training.networks import winograd
from training.training_loop import Trainer

NUM_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and with which of the two accelerations that concern a CPU only."""

    config: TrainConfig
    steps: int
    warmup: int
    threads: int
    tunes_allocator: bool
    uses_winograd: bool


@click.command(cls=Script, help=__doc__)
@option("--preset", type=click.Choice(list(PRESETS)), help="Preset of train.py. [the README's example]")
@option("--g_dict", type=IntList(), help="Hidden size per resolution, as for train.py.")
@option("--num_layers", type=IntList(), help="Encoder blocks per resolution, as for train.py.")
@option("--resolution", type=click.IntRange(min=8), help="Side of the images. [what the preset's generator makes]")
@option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images per step.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs of each phase.")
@option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Runs before them.")
@option("--threads", type=click.IntRange(min=1), help="CPU threads. [PyTorch's choice]")
@option("--no-tune-allocator", is_flag=True, help="Leave glibc's allocator as it is.")
@option("--no-winograd", is_flag=True, help="Leave all convolutions to PyTorch.")
@option("--nhwc", is_flag=True, help="Channels-last memory layout.")
@option("--allow-tf32", is_flag=True, help="TF32 matrix units for float32.")
@option(
    "--compare", is_flag=True, help="On a CPU: also without Winograd, and without allocator tuning, and the ratios."
)
def main(
    preset: str | None,
    g_dict: tuple[int, ...] | None,
    num_layers: tuple[int, ...] | None,
    resolution: int | None,
    batch: int,
    device: str | None,
    steps: int,
    warmup: int,
    threads: int | None,
    no_tune_allocator: bool,
    no_winograd: bool,
    nhwc: bool,
    allow_tf32: bool,
    compare: bool,
) -> None:
    where = distributed.choose_device(device)
    if compare and where.type != "cpu":
        raise UserError("--compare: what it compares concerns the CPU; give --device=cpu or leave it out")
    if threads is not None:
        torch.set_num_threads(threads)
    values: dict[str, Any] = {"batch_size": batch, "channels_last": nhwc, "allow_tf32": allow_tf32}
    values |= {"run.device": str(where)}
    values |= {"generator.widths": g_dict} if g_dict else {}
    values |= {"generator.layers": num_layers} if num_layers else {}
    config = override(PRESETS[preset] if preset else README_EXAMPLE, values)

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            config=with_synthetic_images(config, resolution, Path(folder)),
            steps=steps,
            warmup=warmup,
            threads=torch.get_num_threads(),
            tunes_allocator=where.type == "cpu" and not no_tune_allocator,
            uses_winograd=where.type == "cpu" and not no_winograd,
        )
        for result in comparison(settings) if compare else [measure(settings)]:
            emit(result, where)


def with_synthetic_images(config: TrainConfig, resolution: int | None, folder: Path) -> TrainConfig:
    """Make a data set of drawn scenes that suits the generator, and complete the configuration for it."""
    if resolution is None and not config.generator.widths:
        raise UserError(f"--preset={config.preset} is for images of any size: give --resolution")
    height, width = (resolution, resolution) if resolution else config.generator.img_size
    config = override(config, {"data.path": str(folder / "scenes.zip")})
    config = resolve(config, Circumstances(img_shape=(3, height, width), c_dim=0))
    size = [f"--width={width}", f"--height={height}", f"--max-images={NUM_IMAGES}"]
    with contextlib.redirect_stdout(sys.stderr):
        dataset_tool.main(
            ["--source=shapes", f"--dest={config.data.path}", *size, "--workers=1"], standalone_mode=False
        )
    return config


def comparison(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure without both accelerations, with the allocator alone, with both; each in a process of its own."""
    plain = replace(settings, tunes_allocator=False, uses_winograd=False)
    seconds = 0.0
    for variant in (plain, replace(plain, tunes_allocator=True), settings):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(measure, variant).result()
        seconds = seconds or result["sec_per_kimg"]
        yield {**result, "speedup": round(seconds / result["sec_per_kimg"], 2)}


def measure(settings: Settings) -> dict[str, Any]:
    """Time the parts of a step in milliseconds and combine them."""
    config = settings.config
    torch.set_num_threads(settings.threads)
    if settings.tunes_allocator:
        tune_allocator()
    torch.backends.cudnn.benchmark = config.run.cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    trainer = Trainer(config, ImageDataset(config.data), torch.device(config.run.device or "cpu"))
    data = trainer._batches()
    without = contextlib.nullcontext() if settings.uses_winograd else patch.object(winograd, "pays", never)
    with without:
        take_steps(trainer, data, settings.warmup)
        trainer.stopwatch.collect()
        take_steps(trainer, data, settings.steps)
        milliseconds = trainer.stopwatch.collect()

    intervals = {phase.name: phase.interval for phase in trainer.phases}
    step = sum(ms / intervals.get(name, 1) for name, ms in milliseconds.items())
    return {
        "benchmark": "train_step",
        "preset": config.preset,
        "widths": config.generator.widths,
        "layers": config.generator.layers,
        "img_shape": trainer.dataset.img_shape,
        "batch": trainer.batch_size,
        "img_per_s": round(trainer.batch_size / step * 1000, 2),
        "sec_per_kimg": round(step / trainer.batch_size, 3),
        "step_ms": round(step, 2),
        "ms": {name: round(ms, 2) for name, ms in milliseconds.items()},
        "intervals": intervals,
        "peak_mib": peak_mib(trainer.device),
        "steps": settings.steps,
        "tunes_allocator": settings.tunes_allocator,
        "uses_winograd": settings.uses_winograd,
        "channels_last": config.channels_last,
        "allow_tf32": config.allow_tf32,
    }


def never(x: Tensor, weight: Tensor) -> bool:
    """Stand in for `winograd.pays`."""
    return False


def take_steps(trainer: Trainer, data: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
    """Train for `count` steps without the lazy phases, then run those `count` times on the last batch."""
    clock = trainer.stopwatch
    lazy = [phase for phase in trainer.phases if phase.interval > 1]
    for i in range(count):
        with clock.section("data"):
            img, c = next(data)
        for phase in trainer.phases:
            if phase.interval == 1:
                with clock.section(phase.name):
                    trainer.run_phase(phase, img, c)
        with clock.section("ema"):
            trainer.ema.update(trainer.state.nimg, trainer.batch_size)
        trainer.state.nimg += trainer.batch_size
        trainer.state.step += 1
        if i == count - 1:
            for phase in lazy * count:
                with clock.section(phase.name):
                    trainer.run_phase(phase, img, c)


if __name__ == "__main__":
    main()
