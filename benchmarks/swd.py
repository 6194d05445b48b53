"""Measure speed and memory of the sliced Wasserstein distance; print one line of JSON per size.

    python benchmarks/swd.py --size=32 --images=1024 --device=cpu

`busy_seconds` of the comparison is processor time on a CPU. The plain comparison projects in float64 and sorts.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import click
import numpy as np
import torch
from common import against_plain, emit, peak_mib, timed
from torch import Tensor

from dnnlib.allocator import tune_allocator
from metrics.sliced_wasserstein import PatchLevel, PatchSet, compare, random_directions


def measure(size: int, images: int, repeats: int, device_name: str) -> dict[str, object]:
    """Return the time to extract patches of two sets of random images and to compare them, and the peak memory.

    The comparison is then repeated, in turns with the plain one.
    """
    tune_allocator()
    device = torch.device(device_name)
    batches = [range(start, min(start + 64, images)) for start in range(0, images, 64)]
    before = peak_mib(device)
    sets = []
    with timed(device) as cut:
        for _ in range(2):
            patches = PatchSet(range(images), (3, size, size), seed=0, device=device)
            for positions in batches:
                pixels = torch.randint(0, 256, (len(positions), 3, size, size), dtype=torch.uint8, device=device)
                patches.add(positions, pixels)
            sets.append(patches)
    real, fake = sets
    with timed(device) as comparison:
        compare(real, fake, seed=0)
    peak = peak_mib(device) - before

    def own() -> Tensor:
        return torch.tensor([compare(real, fake, seed=0)["mean"]], dtype=torch.float64)

    total = cut.seconds + comparison.seconds
    return {
        "benchmark": "swd",
        "size": size,
        "images": images,
        "cut_images_per_second": round(2 * images / cut.seconds, 1),
        "images_per_second": round(2 * images / total, 1),
        "seconds": round(total, 2),
        "peak_mib": peak,
        **against_plain(own, lambda: plain_distance(real, fake), repeats, device),
    }


def plain_distance(real: PatchSet, fake: PatchSet) -> Tensor:
    """Return the mean distance over the levels, (1,), from float64 projections that are sorted."""
    values = []
    for number, levels in enumerate(zip(real.levels, fake.levels, strict=True)):
        directions = random_directions(0, number, real.levels[0].channels)
        for part in directions.split(64, dim=2):
            x, y = (plain_projection(level, part) for level in levels)
            values.append((x - y).abs().mean(dim=1, dtype=torch.float64))
    return 1000 * torch.cat(values).mean(dim=0, keepdim=True)


def plain_projection(level: PatchLevel, directions: Tensor) -> Tensor:
    """Return the sorted projections of normalised patches on directions (C, 49, J): (J, n * P) float32."""
    mean, scale = level.mean_and_scale()
    weight = directions.to(scale.device) * scale[:, None, None]
    offset = (weight * mean[:, None, None]).sum(dim=(0, 1))[:, None]
    weight = weight.permute(2, 1, 0).flatten(1)
    rows = [slice(start, start + 64) for start in range(0, len(level.values), 64)]
    patches = (level.patches(part).flatten(0, 1).double() for part in rows)
    x = torch.cat([(weight @ part.T - offset).float() for part in patches], dim=1)
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == "cpu" else x.sort(dim=1).values


@click.command()
@click.option("--size", "sizes", type=int, multiple=True, default=(32, 128), show_default=True, help="Image side.")
@click.option("--images", type=int, default=1024, show_default=True, help="Images in each of the two sets.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Runs; the fastest counts.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, help="Device.")
def main(sizes: tuple[int, ...], images: int, repeats: int, device: str) -> None:
    """Print one line of JSON per size; each size is measured in a separate process."""
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            emit(pool.submit(measure, size, images, repeats, device).result(), torch.device(device))


if __name__ == "__main__":
    main()
