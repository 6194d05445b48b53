"""Measure speed and memory of the sliced Wasserstein distance; print one line of JSON per size.

python benchmarks/swd.py --size=32 --images=1024 --device=cpu
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import click
import torch
from common import emit, peak_mib

from metrics.sliced_wasserstein import PatchSet, compare


def measure(size: int, images: int, device_name: str) -> dict[str, object]:
    """Return the time to extract patches of two sets of random images and to compare them, and the peak memory."""
    device = torch.device(device_name)
    batches = [range(start, min(start + 64, images)) for start in range(0, images, 64)]
    before = peak_mib(device)
    start = time.perf_counter()
    sets = []
    for _ in range(2):
        patches = PatchSet(range(images), (3, size, size), seed=0, device=device)
        for positions in batches:
            pixels = torch.randint(0, 256, (len(positions), 3, size, size), dtype=torch.uint8, device=device)
            patches.add(positions, pixels)
        sets.append(patches)
    cut = time.perf_counter() - start
    compare(sets[0], sets[1], seed=0)
    total = time.perf_counter() - start
    return {
        "benchmark": "swd",
        "size": size,
        "images": images,
        "cut_images_per_second": round(2 * images / cut, 1),
        "images_per_second": round(2 * images / total, 1),
        "seconds": round(total, 2),
        "peak_mib": peak_mib(device) - before,
    }


@click.command()
@click.option("--size", "sizes", type=int, multiple=True, default=(32, 128), show_default=True, help="Image side.")
@click.option("--images", type=int, default=1024, show_default=True, help="Images in each of the two sets.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, help="Device.")
def main(sizes: tuple[int, ...], images: int, device: str) -> None:
    """Print one line of JSON per size; each size is measured in a separate process."""
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            emit(pool.submit(measure, size, images, device).result(), torch.device(device))


if __name__ == "__main__":
    main()
