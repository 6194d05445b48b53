"""Measure images per second of dataset_tool.py and of ImageDataset, each compared with a plain Pillow implementation.

python benchmarks/data.py --source=photos.zip --side=256
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from common import ROOT, emit
from PIL import Image

from dnnlib.allocator import tune_allocator
from dnnlib.images import FORMATS
from training.data_sources.shapes import draw_scenes
from training.dataset import DatasetConfig, ImageDataset, batches

TOOL = ROOT / "dataset_tool.py"
PLAIN_TOOL = ROOT / "benchmarks" / "plain_tool.py"


@click.command()
@click.option("--source", help="A .zip of images of one size, or CIFAR-10's .tar.gz [default: synthetic JPEGs]")
@click.option("--side", type=click.IntRange(min=1), help="Crop the central square and resize it [default: no]")
@click.option("--workers", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--draw", type=click.IntRange(min=1), default=20000, show_default=True, help="Synthetic images")
def main(source: str | None, side: int | None, workers: int, batch_size: int, draw: int) -> None:
    """Print one line of JSON with images per second; *_plain and *_pillow are the baselines, in one process."""
    torch.set_num_threads(1)
    tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            source = f"{folder}/drawn.zip"
            write_jpegs(Path(source), draw)
        dest = Path(folder) / "set.zip"
        crop = [f"--width={side}", f"--height={side}", "--transform=center-crop"] if side else []
        tool = [str(TOOL), f"--source={source}", f"--dest={dest}", f"--workers={workers}", *crop]
        plain = [str(PLAIN_TOOL), source, f"{folder}/plain.zip", *([str(side)] if side else [])]
        (tool_seconds, tool_cpu), (plain_seconds, plain_cpu) = run_script(tool), run_script(plain)
        dataset = ImageDataset(DatasetConfig(path=str(dest)))
        n = len(dataset)
        rates = {
            "tool": n / tool_seconds,
            "tool_plain": n / plain_seconds,
            "decode": n / seconds(lambda: [dataset.images(range(i, min(i + 64, n))) for i in range(0, n, 64)]),
            "decode_pillow": n / seconds(lambda: decode_with_pillow(dest)),
            "batches": rate_of_batches(dataset, batch_size, 0),
            "batches_workers": rate_of_batches(dataset, batch_size, workers),
        }
    setup = {
        "benchmark": "data",
        "source": Path(source).name,
        "num_images": n,
        "img_shape": list(dataset.img_shape),
        "workers": workers,
        "batch": batch_size,
    }
    results = {
        "img_per_s": {name: round(rate) for name, rate in rates.items()},
        "tool_speedup": round(plain_seconds / tool_seconds, 2),
        "tool_speedup_cpu_seconds": round(plain_cpu / tool_cpu, 2),
    }
    emit({**setup, **results}, torch.device("cpu"))


def write_jpegs(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for k, pixels in enumerate(draw_scenes(np.arange(count), seed=0, width=32, height=32)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
            archive.writestr(f"{k:08d}.jpg", buffer.getvalue())


def run_script(arguments: list[str]) -> tuple[float, float]:
    """Run a script and return its wall time and CPU time in seconds, including child processes."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, command = used(), [sys.executable, *arguments]
    taken = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    return taken, used() - before


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def decode_with_pillow(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".png"):
                np.asarray(Image.open(io.BytesIO(archive.read(name)), formats=FORMATS))


def rate_of_batches(dataset: ImageDataset, batch_size: int, workers: int) -> float:
    """Return images per second of the training stream, without startup."""
    stream = batches(dataset, seed=0, position=0, batch_size=batch_size, workers=workers)
    next(stream)
    count = max(len(dataset) // batch_size, 1)
    return count * batch_size / seconds(lambda: [next(stream) for _ in range(count)])


if __name__ == "__main__":
    main()
