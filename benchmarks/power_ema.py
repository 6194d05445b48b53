"""Measure the cost of the power-function averages (ema.profiles) as a share of a training step, in CPU time.

    python benchmarks/power_ema.py --preset=tiny --batch=8

Steps and updates alternate, and both values are medians, so that other programs on the machine affect the share little.
A phase that is due every k steps is weighted by 1/k. Without --preset, the model is the README's example.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from common import emit
from train_step import choose_config, with_synthetic_images

from dnnlib.cli import Script, option
from dnnlib.config import override
from training.config import PRESETS, resolve
from training.dataset import ImageDataset
from training.training_loop import Trainer


@click.command(cls=Script, help=__doc__)
@option("--preset", type=click.Choice(list(PRESETS)), help="Preset of train.py. [the README's example]")
@option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images per step.")
@option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs of each phase.")
def main(preset: str | None, batch: int, steps: int) -> None:
    device = torch.device("cpu")
    torch.set_num_threads(1)
    config = override(choose_config(preset, batch, device, ["fp32"]), {"ema.profiles": (0.05, 0.1)})
    with tempfile.TemporaryDirectory() as folder:
        config, env = with_synthetic_images(config, None, Path(folder), on_gpu=False)
        trainer = Trainer(resolve(config, env), ImageDataset(config.data), device)
        img, c = next(trainer._batches())
        phases = {phase.name: 1 / phase.interval for phase in trainer.phases}
        seconds: dict[str, list[float]] = {name: [] for name in [*phases, "update"]}
        for _ in range(steps + 1):
            for phase in trainer.phases:
                seconds[phase.name].append(cpu_seconds(partial(trainer.run_phase, phase, img, c)))
                seconds["update"].append(cpu_seconds(partial(trainer.profiles.update, 100_000, batch)))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    step = sum(medians[name] * share for name, share in phases.items())
    result = {
        "preset": preset or "README example",
        "batch": batch,
        "g_parameters": sum(x.numel() for x in trainer.profiles.weights),
        "profiles": len(trainer.profiles.averages),
        "step_cpu_ms": round(step * 1000, 1),
        "update_cpu_ms": round(medians["update"] * 1000, 2),
        "share_percent": round(100 * medians["update"] / step, 3),
    }
    emit(result, device)


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of a function in this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
