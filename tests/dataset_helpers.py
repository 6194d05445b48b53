"""Helpers that run dataset_tool.py on sources written by a test and read the resulting dataset."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from image_helpers import encoded
from PIL import Image

from dataset_tool import main

rng = np.random.RandomState(0)


def random_images(*shape: int) -> np.ndarray:
    """Draw uint8 pixels of this shape."""
    return rng.randint(0, 256, shape).astype(np.uint8)


def encode(pixels: np.ndarray, format: str = "png", **options: Any) -> bytes:
    """Encode pixels [H, W, C] as an image file."""
    return encoded(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), format, **options)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def run(*arguments: object) -> Result:
    """Run dataset_tool.py with these arguments."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def build(source: object, dest: Path, *options: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Build a dataset and return its images [N, H, W, C], decoded by Pillow, and the content of dataset.json."""
    result = run(f"--source={source}", f"--dest={dest}", "--workers=1", *options)
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(dest) as archive:
        content = json.loads(archive.read("dataset.json"))
        names = [name for name in archive.namelist() if name != "dataset.json"]
        assert names == [f"{k // 1000:05d}/img{k:08d}.png" for k in range(len(names))]
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    return (images[..., None] if images.ndim == 3 else images), content


def assert_refused(tmp_path: Path, source: object, *options: str) -> str:
    """Assert that a source is refused with exit code 2 and leaves no files behind; return the message."""
    before = sorted(tmp_path.rglob("*"))
    result = run(f"--source={source}", f"--dest={tmp_path / 'refused.zip'}", "--workers=1", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert "\nError: " not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    return result.stderr


def label_values(content: dict[str, Any]) -> list[Any]:
    """Return the labels of dataset.json in order."""
    return [label for _, label in content["labels"]]
