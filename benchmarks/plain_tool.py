"""Build a dataset with one process, Pillow and zipfile, one image at a time: the baseline for dataset_tool.py.

python benchmarks/plain_tool.py SOURCE DEST [SIDE]
"""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np
from PIL import Image


def images_in_zip(path: str) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.lower().endswith((".jpg", ".jpeg", ".png")):
                with archive.open(name) as file:
                    yield np.array(Image.open(file, formats=("JPEG", "PNG")).convert("RGB"))


def images_in_cifar(path: str) -> Iterator[np.ndarray]:
    with tarfile.open(path, "r:gz") as archive:
        files = [archive.extractfile(f"cifar-10-batches-py/data_batch_{k}") for k in range(1, 6)]
        batches = [pickle.load(file, encoding="latin1") for file in files if file]
    for batch in batches:
        yield from batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def crop_and_resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """Crop the central square and resize it."""
    crop = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
    image = Image.fromarray(pixels[top : top + crop, left : left + crop])
    return np.array(image.resize((side, side), Image.Resampling.LANCZOS))


def main(source: str, dest: str, side: str = "") -> None:
    images = images_in_cifar(source) if source.endswith(".tar.gz") else images_in_zip(source)
    with zipfile.ZipFile(dest, "w", zipfile.ZIP_STORED) as archive:
        for k, pixels in enumerate(images):
            if side:
                pixels = crop_and_resize(pixels, int(side))
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png", compress_level=0)
            archive.writestr(f"{k // 1000:05d}/img{k:08d}.png", buffer.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
