"""Shared code of the benchmarks: the README's model, timing, and one line of JSON per measurement.

Importing this module adds the project folder to the path, so that the scripts run from a clone without installation.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.config import override
from dnnlib.screen import without_secrets
from torch_utils.misc import device_name
from training.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent

# The command of the README: train.py --cfg=cifar --g_dict=256,64,16 --num_layers=1,2,2
README_EXAMPLE = override(PRESETS["cifar"], {"generator.widths": (256, 64, 16), "generator.layers": (1, 2, 2)})

# Peak rates of dense matrix products in TFLOP/s from the data sheets of SXM modules, by part of the GPU's name.
PEAK_TFLOPS = {
    "H200": {"bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "H100": {"bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
}

LOAD_AT_START = os.getloadavg()[0]  # above about 1 means that other programs were running


def emit(result: Mapping[str, Any], device: torch.device) -> None:
    """Print a result as one line of JSON, with the environment of the measurement."""
    environment = {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_at_start": round(LOAD_AT_START, 2),
        "command": without_secrets(shlex.join(["python", *sys.argv])),
    }
    click.echo(json.dumps({**result, **environment}))
    sys.stdout.flush()


def images_per_second(run: Callable[[], object], batch: int, device: torch.device, seconds: float) -> float:
    """Return the rate of `run`, which processes `batch` images, over about `seconds` after a warm-up."""
    run()
    run()
    synchronize(device)
    start, count, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        run()
        synchronize(device)
        count += 1
        elapsed = time.perf_counter() - start
    return batch * count / elapsed


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Clock:
    """Duration of a block, and busy time of the device: processor time on a CPU."""

    seconds: float = 0.0
    busy: float = 0.0


@contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    """Yield a clock that is set at the end of the block."""
    clock = Clock()
    synchronize(device)
    start, processor = time.perf_counter(), time.process_time()
    yield clock
    synchronize(device)
    clock.seconds = time.perf_counter() - start
    clock.busy = time.process_time() - processor if device.type == "cpu" else clock.seconds


def against_plain(
    own: Callable[[], Tensor], plain: Callable[[], Tensor], repeats: int, device: torch.device
) -> dict[str, float]:
    """Return the shortest busy times of two computations in alternating runs, and how far their values differ.

    `deviation` is the largest difference relative to the largest value of the plain computation.
    """
    times: dict[Callable[[], Tensor], list[float]] = {own: [], plain: []}
    values = {}
    for _ in range(repeats):
        for run in (own, plain):
            with timed(device) as clock:
                values[run] = run().double()
            times[run].append(clock.busy)
    busy, plain_busy = min(times[own]), min(times[plain])
    difference, scale = (values[own] - values[plain]).abs().max(), values[plain].abs().max()
    return {
        "busy_seconds": round(busy, 3),
        "plain_busy_seconds": round(plain_busy, 3),
        "speedup": round(plain_busy / max(busy, 1e-9), 2),
        "deviation": float(f"{difference / scale:.1e}"),
    }


def peak_mib(device: torch.device) -> int:
    """Return the peak memory in MiB: of tensors on the GPU, or of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
