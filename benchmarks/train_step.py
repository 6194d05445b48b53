"""Time a training step phase by phase, on synthetic images: images per second, seconds per kimg, memory, FLOP/s.

    python benchmarks/train_step.py --device=cuda --batch=64 --modes=plain,fp32,bf16,bf16+graphs

Each mode is measured in a separate process and prints one line of JSON, with the speedup over the first mode. A phase
that is due every k steps is timed separately and weighted by 1/k.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from common import PEAK_TFLOPS, README_EXAMPLE, emit, peak_mib
from fake import fake_tensors, new_batch, new_trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dataset_tool
from dnnlib.allocator import tune_allocator
from dnnlib.cli import IntList, NameList, Script, option
from dnnlib.config import ConfigError, UserError, override, to_json
from torch_utils import distributed
from torch_utils.misc import device_name
from torch_utils.ops import winograd
from training.config import PRESETS, Environment, TrainConfig, resolve
from training.dataset import ImageDataset
from training.training_loop import Trainer, set_arithmetic

NUM_IMAGES = 256
FLOP_BATCH = 4  # images in the step whose operations are counted

# Words of a mode, joined by +, and the configuration values that each changes.
CHANGES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "fp32", "allow_tf32": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "nchw": {"channels_last": False},
    "nhwc": {"channels_last": True},
    "graphs": {"run.graphs": True},
    "compile": {"run.compile": True},
    "checkpoint": {"run.recompute": True},
    "loader": {"run.data_on_gpu": False},
    "operators": {"run.kernels": "operators"},
    "cudnn": {"run.attention": "cudnn"},
    "flash": {"run.attention": "flash"},
    "efficient": {"run.attention": "efficient"},
    # Disable this project's optimisations, individually and all:
    "reference": {"run.kernels": "none"},
    "no-allocator": {},
    "no-winograd": {},
    "plain": {"precision": "fp32", "channels_last": False, "run.data_on_gpu": False},
}
PLAIN = {"reference", "no-allocator", "no-winograd"}  # implied by `plain`


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, environment, and mode of a measurement."""

    config: TrainConfig
    env: Environment
    steps: int
    warmup: int
    threads: int
    mode: str

    @property
    def words(self) -> set[str]:
        words = set(self.mode.split("+"))
        return words | PLAIN if "plain" in words else words


@click.command(cls=Script, help=__doc__)
@option("--preset", type=click.Choice(list(PRESETS)), help="Preset of train.py. [the README's example]")
@option("--g_dict", type=IntList(), help="Hidden size per resolution, as for train.py.")
@option("--num_layers", type=IntList(), help="Encoder blocks per resolution, as for train.py.")
@option("--resolution", type=click.IntRange(min=8), help="Image side in pixels. [the preset's image size]")
@option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images per step.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--modes", type=NameList(), default="fp32", show_default=True,
        help=f"Modes to measure, each one or more words joined by +: {', '.join(CHANGES)}.")  # fmt: skip
@option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs of each phase.")
@option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Untimed runs of each phase.")
@option("--threads", type=click.IntRange(min=1), help="CPU threads. [PyTorch's choice]")
def main(
    preset: str | None,
    g_dict: tuple[int, ...] | None,
    num_layers: tuple[int, ...] | None,
    resolution: int | None,
    batch: int,
    device: str | None,
    modes: tuple[str, ...],
    steps: int,
    warmup: int,
    threads: int | None,
) -> None:
    where = distributed.choose_device(device)
    config = choose_config(preset, batch, where, modes)
    config = override(config, {"generator.widths": g_dict} if g_dict else {})
    config = override(config, {"generator.layers": num_layers} if num_layers else {})

    with tempfile.TemporaryDirectory() as folder:
        config, env = with_synthetic_images(config, resolution, Path(folder), on_gpu=where.type == "cuda")
        gflop = gflop_per_image(config, env)
        run = measure if len(modes) == 1 else in_own_process
        seconds = 0.0
        for mode in modes:
            threads = threads or torch.get_num_threads()
            settings = Settings(config=config, env=env, steps=steps, warmup=warmup, threads=threads, mode=mode)
            result = run(settings)
            seconds = seconds or result["sec_per_kimg"]
            emit({**result, "speedup": round(seconds / result["sec_per_kimg"], 2)} | rates(result, gflop, where), where)


def choose_config(preset: str | None, batch: int, device: torch.device, modes: Sequence[str]) -> TrainConfig:
    """Return the configuration that the modes modify. Raises UserError for an unknown word in a mode."""
    for word in "+".join(modes).split("+"):
        if word not in CHANGES:
            raise UserError(f"--modes: {word!r} is not one of {', '.join(CHANGES)}")
    values = {"batch_size": batch, "run.device": str(device), "run.graphs": False}
    return override(PRESETS[preset] if preset else README_EXAMPLE, values)


def in_own_process(settings: Settings) -> dict[str, Any]:
    """Measure in a fresh process, whose memory and caches are not affected by other measurements."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, settings).result()


def with_synthetic_images(
    config: TrainConfig, resolution: int | None, folder: Path, *, on_gpu: bool
) -> tuple[TrainConfig, Environment]:
    """Build a dataset of synthetic scenes for the generator; return the arguments of `resolve`."""
    try:
        height, width = (resolution, resolution) if resolution else config.generator.img_size
    except ConfigError:
        raise UserError(f"--preset={config.preset} has no fixed image size: specify --resolution") from None
    config = override(config, {"data.path": str(folder / "scenes.zip")})
    size = [f"--width={width}", f"--height={height}", f"--max-images={NUM_IMAGES}"]
    with contextlib.redirect_stdout(sys.stderr):
        dataset_tool.main(
            ["--source=shapes", f"--dest={config.data.path}", *size, "--workers=1"], standalone_mode=False
        )
    c_dim = ImageDataset(config.data).c_dim
    return config, Environment(img_shape=(3, height, width), c_dim=c_dim, on_gpu=on_gpu)


class CountOperations(TorchDispatchMode):
    """Sum of the FLOP of all matrix products and convolutions; FlopCounterMode does not count second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if function.overloadpacket is torch.ops.aten.convolution_backward:
            self.flop += convolution_backward_flop(*args)
        elif count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=result)
        return result


def convolution_backward_flop(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> int:
    """Return the FLOP of a convolution's gradients; each costs as much as the forward pass.

    PyTorch's formula counts the weight gradient of a grouped convolution as if it had one group.
    """
    *_, is_transposed, _, _, (needs_x, needs_weight, _) = settings
    positions = (x if is_transposed else grad).shape
    return 2 * positions[0] * math.prod(positions[2:]) * weight.numel() * (needs_x + needs_weight)


def gflop_per_image(config: TrainConfig, env: Environment) -> float:
    """Count multiplications and additions of the matrix products and convolutions of a step, per image.

    Counts all phases with their derivatives, in float32 and on fake tensors; a phase that is due every k steps counts
    1/k. Recomputation and Winograd's algorithm in a mode do not change the count.
    """
    small = resolve(override(config, {"batch_size": FLOP_BATCH, "precision": "fp32"}), replace(env, on_gpu=False))
    flop = 0.0
    with fake_tensors(), patch.object(winograd, "is_profitable", never), sdpa_kernel(SDPBackend.MATH):
        trainer = new_trainer(small, env, torch.device("cpu"))
        for phase in trainer.phases:
            with CountOperations() as counter:
                trainer.run_phase(phase, *new_batch(trainer))
            flop += counter.flop / phase.interval
    return flop / FLOP_BATCH / 1e9


def rates(result: dict[str, Any], gflop: float, device: torch.device) -> dict[str, Any]:
    """Return the model's operations per second, and their share of the device's peak rate if that is known."""
    tflops = result["img_per_s"] * gflop / 1000
    arithmetic = result["precision"] if not result["allow_tf32"] else "tf32"
    peaks = [peaks for name, peaks in PEAK_TFLOPS.items() if device.type == "cuda" and name in device_name(device)]
    share = {"model_flop_utilisation": round(tflops / peaks[0][arithmetic], 4)} if peaks else {}
    return {"gflop_per_image": round(gflop, 2), "tflop_per_s": round(tflops, 3)} | share


@contextlib.contextmanager
def trainer_in_mode(settings: Settings) -> Iterator[Trainer]:
    """Yield a trainer in the mode of the settings; the context selects the operators of the mode."""
    words = settings.words
    config = settings.config
    for word in words:
        config = override(config, CHANGES[word])
    config = resolve(config, settings.env)
    torch.set_num_threads(settings.threads)
    device = distributed.use_device(config.run.device)
    if device.type == "cpu" and "no-allocator" not in words:
        tune_allocator()
    set_arithmetic(config)
    with contextlib.ExitStack() as stack:
        if "no-winograd" in words:
            stack.enter_context(patch.object(winograd, "is_profitable", never))
        yield Trainer(config, ImageDataset(config.data), device)


def measure(settings: Settings) -> dict[str, Any]:
    """Time the parts of a step in milliseconds and combine them."""
    with trainer_in_mode(settings) as trainer:
        data = trainer._batches()
        take_steps(trainer, data, settings.warmup)
        trainer.stopwatch.collect()
        take_steps(trainer, data, settings.steps)
        milliseconds = trainer.stopwatch.collect()
    config = trainer.config

    intervals = {phase.name: phase.interval for phase in trainer.phases}
    step = sum(ms / intervals.get(name, 1) for name, ms in milliseconds.items())
    return {
        "benchmark": "train_step",
        "preset": config.preset,
        **{name: value for name, value in to_json(config.generator).items() if name in ("widths", "layers")},
        "img_shape": trainer.dataset.img_shape,
        "batch": trainer.batch_size,
        "mode": settings.mode,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "allow_tf32": config.allow_tf32,
        "img_per_s": round(trainer.batch_size / step * 1000, 2),
        "sec_per_kimg": round(step / trainer.batch_size, 3),
        "step_ms": round(step, 2),
        "ms": {name: round(ms, 2) for name, ms in milliseconds.items()},
        "intervals": intervals,
        "graphs": [*trainer.graphs.captured] if trainer.graphs else [],
        "peak_mib": peak_mib(trainer.device),
        "steps": settings.steps,
        "threads": settings.threads,
    }


def never(x: Tensor, weight: Tensor, stride: int, *, is_cached: bool) -> bool:
    """Replacement of `winograd.is_profitable` that disables Winograd's algorithm."""
    return False


def take_steps(trainer: Trainer, data: Iterator[tuple[Tensor, Tensor]], count: int) -> None:
    """Train for `count` steps without the lazy phases, then run each lazy phase `count` times on the last batch."""
    clock = trainer.stopwatch
    lazy = [phase for phase in trainer.phases if phase.interval > 1]
    for i in range(count):
        with clock.section("data"):
            reals = [next(data) for _ in range(trainer.batches_per_step)]
        for phase in trainer.phases:
            if phase.interval == 1:
                with clock.section(phase.name):
                    trainer.run_phase(phase, *reals[phase.batch])
        with clock.section("ema"):
            trainer.ema.update(trainer.state.nimg, trainer.batch_size)
            trainer.profiles.update(trainer.state.nimg, trainer.batch_size)
        trainer.state.nimg += trainer.batch_size
        trainer.state.step += 1
        if i == count - 1:
            for phase in lazy * count:
                with clock.section(phase.name):
                    trainer.run_phase(phase, *reals[phase.batch])


if __name__ == "__main__":
    main()
