"""Profile the phases of a training step: a table of operators and kernels, and the GPU busy time, for each phase.

    python benchmarks/profile_step.py --preset=cifar-large --batch=64 --modes=bf16,bf16+graphs --tables=profile.txt

Prints one line of JSON for each phase in each mode: `kernels` per call, their total time `busy_ms`, and `span_ms` from
the first kernel to the last. If the span is much longer than the busy time, the GPU waits for the host. The tables are
written to a file.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import torch
from common import emit, synchronize
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import Settings, choose_config, trainer_in_mode, with_synthetic_images

from dnnlib.cli import NameList, Script, option
from torch_utils import distributed
from training.config import PRESETS
from training.phases import Phase
from training.training_loop import Trainer

WARMUPS = 3  # calls of a phase before the profiled calls
ROWS = 45  # rows of a table


@click.command(cls=Script, help=__doc__)
@option("--preset", type=click.Choice(list(PRESETS)), help="Preset of train.py. [the README's example]")
@option("--resolution", type=click.IntRange(min=8), help="Image side in pixels. [the preset's image size]")
@option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images per step.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--modes", type=NameList(), default="fp32", show_default=True, help="As for train_step.py.")
@option("--calls", type=click.IntRange(min=1), default=3, show_default=True, help="Profiled calls of each phase.")
@option("--tables", type=click.Path(dir_okay=False, path_type=Path), default=Path("profile.txt"), show_default=True,
        help="File to append the tables to.")  # fmt: skip
def main(
    preset: str | None,
    resolution: int | None,
    batch: int,
    device: str | None,
    modes: tuple[str, ...],
    calls: int,
    tables: Path,
) -> None:
    where = distributed.choose_device(device)
    config = choose_config(preset, batch, where, modes)
    with tempfile.TemporaryDirectory() as folder:
        config, env = with_synthetic_images(config, resolution, Path(folder), on_gpu=where.type == "cuda")
        for mode in modes:
            threads = torch.get_num_threads()
            settings = Settings(config=config, env=env, steps=calls, warmup=WARMUPS, threads=threads, mode=mode)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                pool.submit(profile_phases, settings, where, tables).result()


def profile_phases(settings: Settings, device: torch.device, tables: Path) -> None:
    """Print a line for each phase and append its table to a file immediately."""
    with trainer_in_mode(settings) as trainer:
        img, c = next(trainer._batches())
        for phase in trainer.phases:
            for _ in range(settings.warmup):
                trainer.run_phase(phase, img, c)
            values, table = profile_phase(trainer, phase, img, c, settings.steps)
            is_graph = trainer.graphs is not None and phase.name in trainer.graphs.captured
            emit(
                {"benchmark": "profile", "mode": settings.mode, "phase": phase.name, "graph": is_graph} | values,
                device,
            )
            with tables.open("a") as file:
                file.write(f"\n{trainer.config.preset}, {settings.mode}, {phase.name}: {values}\n\n{table}\n")


def profile_phase(
    trainer: Trainer, phase: Phase, img: Tensor, c: Tensor, calls: int
) -> tuple[dict[str, float | int], str]:
    """Profile `calls` calls of a phase; return the measured values and the table."""
    on_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            trainer.run_phase(phase, img, c)
        synchronize(trainer.device)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=90)
    # The optimizer's record_function ranges also appear on the GPU, as user annotations.
    on_device = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    kernels = [event.time_range for event in on_device if not event.is_user_annotation]
    if not kernels:
        return {"calls": calls}, table
    busy = sum(time.elapsed_us() for time in kernels) / 1e3
    span = (max(time.end for time in kernels) - min(time.start for time in kernels)) / 1e3
    values = {"kernels": len(kernels) // calls, "busy_ms": round(busy / calls, 2), "span_ms": round(span / calls, 2)}
    return {"calls": calls, **values}, table


if __name__ == "__main__":
    main()
