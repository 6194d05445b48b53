"""Time image generation as in generate.py, from seeds to uint8 pixels in main memory.

    python benchmarks/generation.py --network=network-snapshot-000200.pkl --batch=1,16,256 --modes=fp32,bf16+graphs

Prints one line of JSON for each mode and batch size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from common import README_EXAMPLE, emit, images_per_second, peak_mib
from torch import Tensor

from dnnlib.allocator import tune_allocator
from dnnlib.cli import IntList, NameList, Script, option
from dnnlib.config import UserError
from exploration.seed_images import FastGenerator, seed_images
from torch_utils import distributed
from training.networks import execution
from training.snapshots.snapshot import load_network


@click.command(cls=Script, help=__doc__)
@option("--network", type=click.Path(path_type=Path), help="Snapshot. [the README's example, untrained]")
@option("--batch", "batches", type=IntList(), default="1,4,16,64,256", show_default=True, help="Batch sizes.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--threads", type=click.IntRange(min=1), help="CPU threads. [PyTorch's choice]")
@option(
    "--modes",
    type=NameList(),
    default="fp32",
    show_default=True,
    help="Modes to measure: a precision (fp32, bf16, fp16), with +compile and +graphs as in generate.py.",
)
@option("--seconds", type=float, default=3.0, show_default=True, help="Time per measurement.")
def main(
    network: Path | None,
    batches: tuple[int, ...],
    device: str | None,
    threads: int | None,
    modes: tuple[str, ...],
    seconds: float,
) -> None:
    if min(batches) < 1:
        raise UserError(f"--batch={','.join(map(str, batches))}: must be at least 1")
    tune_allocator()
    where = distributed.use_device(device)
    execution.set_gpu_arithmetic()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    G = load_network(network, where).G_ema if network else README_EXAMPLE.generator.build().to(where).eval()
    c = torch.eye(1, G.c_dim, device=where)  # class 0 of a conditional network

    for mode in modes:
        precision, *switches = mode.split("+")
        if precision not in execution.REDUCED or not set(switches) <= {"compile", "graphs"}:
            raise UserError(f"--modes: {mode!r} is not fp32, bf16 or fp16, with or without +compile and +graphs")
        if "graphs" in switches and where.type != "cuda":
            raise UserError(f"--modes={mode}: CUDA graphs need a GPU, but the device is {where}")
        fast = FastGenerator(G, use_compile="compile" in switches, use_graphs="graphs" in switches) if switches else G
        for batch in batches:
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats(where)
            seeds = tuple(range(batch))
            run = partial(images_in_memory, fast, seeds, c)
            with torch.no_grad(), execution.using(reduced=execution.REDUCED[precision]):
                rate = images_per_second(run, batch, where, seconds)
            result = {
                "benchmark": "generation",
                "network": network.name if network else "README example, untrained",
                "img_shape": G.img_shape,
                "mode": mode,
                "batch": batch,
                "img_per_s": round(rate, 1),
                "ms_per_batch": round(batch / rate * 1000, 2),
                "peak_mib": peak_mib(where),
            }
            emit(result, where)


def images_in_memory(G: Any, seeds: tuple[int, ...], c: Tensor) -> Tensor:
    return seed_images(G, seeds, c).cpu()


if __name__ == "__main__":
    main()
