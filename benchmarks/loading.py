"""Measure the CPU time to open a large zip file of images and to read a snapshot, compared with the plain forms.

    python benchmarks/loading.py --images=1000000

Prints a line of JSON for the zip file and one for the snapshot: processor seconds, and ratios to the plain forms,
`zipfile.ZipFile` with `json`, and `torch.load`.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import emit
from PIL import Image

from dnnlib.cli import Script, option
from dnnlib.config import override
from training.config import PRESETS, Environment, resolve
from training.data_sources.stored_zip import StoredZip
from training.data_sources.zip_index import index_path
from training.dataset import DatasetConfig, ImageDataset
from training.snapshots.snapshot import load_network, read_network, save_network

ROUNDS = 3  # of the snapshot's measurements, alternating


@click.command(cls=Script, help=__doc__)
@option("--images", type=click.IntRange(min=1), default=200_000, show_default=True, help="Images to write and open.")
@option("--cfg", type=click.Choice([*PRESETS]), default="cifar-large", show_default=True, help="Networks to read.")
def main(images: int, cfg: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        emit({"benchmark": "loading", **measure_zip(Path(folder) / "set.zip", images)}, torch.device("cpu"))
        emit({"benchmark": "loading", **measure_snapshot(Path(folder) / "net.pkl", cfg)}, torch.device("cpu"))


def measure_zip(path: Path, images: int) -> dict[str, Any]:
    """Open labelled images by zipfile and json, then as a dataset without and, from 100,000 images, with an index."""
    write_images(path, images)
    config = DatasetConfig(path=str(path), use_labels=True)
    plain = cpu_seconds(lambda: open_plainly(path))
    first, second = (cpu_seconds(lambda: ImageDataset(config)) for _ in range(2))
    index = index_path(path)
    return {
        "file": "zip",
        "num_images": images,
        "index_mib": round(index.stat().st_size / 2**20, 1) if index.exists() else None,
        "cpu_s": {"plain": round(plain, 3), "first": round(first, 3), "second": round(second, 3)},
        "ratio": {"first": round(first / plain, 3), "second": round(second / plain, 3)},
    }


def write_images(path: Path, count: int) -> None:
    """Write a dataset of one tiny image under many names, with random labels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    names = [f"{k // 1000:05d}/img{k:08d}.png" for k in range(count)]
    labels = np.random.RandomState(0).randint(1000, size=count).tolist()
    with StoredZip(path) as archive:
        for name in names:
            archive.add(name, buffer.getvalue())
        content = {"labels": list(zip(names, labels, strict=True)), "format_version": 1}
        archive.add("dataset.json", json.dumps(content).encode())


def open_plainly(path: Path) -> tuple[zipfile.ZipFile, list[int]]:
    """Return the open zip file, and the label of each image in the order of the names."""
    with zipfile.ZipFile(path) as archive:
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        return archive, [labels[name] for name in sorted(archive.namelist()) if name.endswith(".png")]


def measure_snapshot(path: Path, cfg: str) -> dict[str, Any]:
    """Hash the file, read it by torch.load, read and verify it, and build the networks; the best of several rounds."""
    config = resolve(override(PRESETS[cfg], {"data.path": "set.zip"}), Environment(img_shape=(3, 32, 32), c_dim=0))
    G, D, G_ema = config.generator.build(), config.discriminator.build(), config.generator.build()
    save_network(path, config=config, G=G, D=D, G_ema=G_ema)
    content = path.read_bytes()
    forms: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(content),
        "torch_load": lambda: torch.load(path, weights_only=True),
        "read": lambda: read_network(path),
        "load_network": lambda: load_network(path),
    }
    rounds = [{name: cpu_seconds(form) for name, form in forms.items()} for _ in range(ROUNDS)]
    best = {name: min(times[name] for times in rounds) for name in forms}
    return {
        "file": "snapshot",
        "cfg": cfg,
        "mib": round(path.stat().st_size / 2**20, 1),
        "cpu_s": {name: round(value, 3) for name, value in best.items()},
        "ratio": {name: round(best[name] / best["torch_load"], 2) for name in ("read", "load_network")},
    }


def cpu_seconds(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


if __name__ == "__main__":
    main()
