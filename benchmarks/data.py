"""Images per second of dataset_tool.py and of ImageDataset, each beside the plain way of doing the same with Pillow.

python benchmarks/data.py --source=photos.zip
"""

from __future__ import annotations

import io
import os
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

from dnnlib.images import FORMATS
from training.data_sources.convert import load
from training.data_sources.sources import Drawing, open_source
from training.dataset import DatasetConfig, ImageDataset, batches

TOOL = ROOT / "dataset_tool.py"


@click.command()
@click.option("--source", default="shapes", show_default=True, help="What dataset_tool.py reads; images of one size")
@click.option("--max-images", type=click.IntRange(min=1), default=20000, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
def main(source: str, max_images: int, workers: int, batch_size: int) -> None:
    """Print one line of JSON with images per second; *_pillow are the baselines, in one process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dest = Path(folder) / "set.zip"
        command = [sys.executable, str(TOOL), f"--source={source}", f"--dest={dest}", f"--max-images={max_images}"]
        tool_seconds = seconds(
            lambda: subprocess.run([*command, f"--workers={workers}"], check=True, stdout=subprocess.DEVNULL)
        )
        dataset = ImageDataset(DatasetConfig(path=str(dest)))
        n = len(dataset)
        C, H, W = dataset.img_shape
        drawing = Drawing(0, n, W, H)
        rates = {
            "tool": n / tool_seconds,
            "tool_pillow": n / seconds(lambda: build_with_pillow(source, drawing, Path(folder) / "pillow.zip")),
            "decode": n / seconds(lambda: [dataset.images(range(i, min(i + 64, n))) for i in range(0, n, 64)]),
            "decode_pillow": n / seconds(lambda: decode_with_pillow(dest)),
            "batches": rate_of_batches(dataset, batch_size, 0),
            "batches_workers": rate_of_batches(dataset, batch_size, workers),
        }
    rounded = {name: round(rate) for name, rate in rates.items()}
    setup = {
        "benchmark": "data",
        "source": Path(source).name,
        "num_images": n,
        "img_shape": [C, H, W],
        "workers": workers,
    }
    emit({**setup, "batch": batch_size, "img_per_s": rounded}, torch.device("cpu"))


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def build_with_pillow(source: str, drawing: Drawing, dest: Path) -> None:
    items = open_source(source, labels_from_folders=None, drawing=drawing)
    with zipfile.ZipFile(dest, "w") as archive:
        for k, item in zip(range(drawing.num_images), items, strict=False):
            pixels = load(item)
            buffer = io.BytesIO()
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "png", compress_level=0)
            archive.writestr(f"{k:08d}.png", buffer.getvalue())


def decode_with_pillow(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".png"):
                np.asarray(Image.open(io.BytesIO(archive.read(name)), formats=FORMATS))


def rate_of_batches(dataset: ImageDataset, batch_size: int, workers: int) -> float:
    """Images per second of the training stream, without its start."""
    stream = batches(dataset, seed=0, position=0, batch_size=batch_size, workers=workers)
    next(stream)
    count = max(len(dataset) // batch_size, 1)
    return count * batch_size / seconds(lambda: [next(stream) for _ in range(count)])


if __name__ == "__main__":
    main()
