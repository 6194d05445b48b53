"""Time the generation of images as generate.py makes them, from seeds to uint8 pixels in main memory.

    python benchmarks/generation.py --network=network-snapshot-000200.pkl --batch=1,16,256

Prints one line of JSON for each batch size.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from common import README_EXAMPLE, emit, images_per_second, peak_mib
from torch import Tensor

from dnnlib.cli import IntList, Script, option
from dnnlib.config import UserError
from generate import seed_images
from torch_utils import distributed
from torch_utils.misc import tune_allocator
from training.snapshot import load_network


@click.command(cls=Script, help=__doc__)
@option("--network", type=click.Path(path_type=Path), help="Snapshot. [the README's example, untrained]")
@option("--batch", "batches", type=IntList(), default="1,4,16,64,256", show_default=True, help="Images at a time.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--threads", type=click.IntRange(min=1), help="CPU threads. [PyTorch's choice]")
@option("--seconds", type=float, default=3.0, show_default=True, help="Time per measurement.")
def main(
    network: Path | None, batches: tuple[int, ...], device: str | None, threads: int | None, seconds: float
) -> None:
    if min(batches) < 1:
        raise UserError(f"--batch={','.join(map(str, batches))}: a batch has at least 1 image")
    tune_allocator()
    where = distributed.choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    G = load_network(network, where).G_ema if network else README_EXAMPLE.generator.build().to(where).eval()
    c = torch.eye(1, G.c_dim, device=where)  # class 0 of a conditional network

    for batch in batches:

        def generate(seeds: tuple[int, ...] = tuple(range(batch))) -> Tensor:
            return seed_images(G, seeds, c).cpu()

        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        with torch.no_grad():
            rate = images_per_second(generate, batch, where, seconds)
        result = {
            "benchmark": "generation",
            "network": network.name if network else "README example, untrained",
            "img_shape": G.img_shape,
            "batch": batch,
            "img_per_s": round(rate, 1),
            "ms_per_batch": round(batch / rate * 1000, 2),
            "peak_mib": peak_mib(where),
        }
        emit(result, where)


if __name__ == "__main__":
    main()
