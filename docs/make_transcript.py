"""Generate the transcript in docs/datasets.md: dataset_tool.py on a typical messy folder of 500 files.

`make docs` runs this script; a test fails if the page differs from the output of the commands.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from training.data_sources.shapes import draw_scenes  # noqa: E402

PAGE = ROOT / "docs" / "datasets.md"
COMMAND = "dataset_tool.py --source=pets --dest=data/pets.zip --width=64 --height=64 --transform=center-crop"
NUM_FILES = 500

_START, _END = "<!-- transcript: make docs -->\n", "<!-- end of transcript -->"
_CLASSES = ("cat", "cat", "cat", "dog", "dog", "owl")
_FORMATS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (  # suffix, Pillow format, mode, options
    (".jpg", "JPEG", "RGB", {"quality": 90}),
    (".JPG", "JPEG", "RGB", {"quality": 90, "exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
    (".jpeg", "JPEG", "CMYK", {"quality": 90}),
    (".jpg", "JPEG", "L", {"quality": 90}),
    (".png", "PNG", "RGB", {}),
    (".png", "PNG", "RGBA", {}),
    (".png", "PNG", "LA", {}),
    (".png", "PNG", "P", {}),
    (".webp", "WEBP", "RGB", {}),
    (".gif", "GIF", "P", {}),
    (".tif", "TIFF", "RGB", {"compression": "tiff_lzw"}),
    (".bmp", "BMP", "RGB", {}),
    (".tga", "TGA", "RGBA", {}),
    (".ppm", "PPM", "RGB", {}),
    (".jp2", "JPEG2000", "RGB", {}),
)
_SIZES = ((320, 240), (240, 320), (400, 300), (128, 128), (96, 64), (50, 40))
_OTHERS = {  # name pattern of files that are skipped -> count
    "IMG_{:04d}.HEIC": 12,
    "{}/.ipynb_checkpoints/{:04d}-checkpoint.png": 9,
    "{}/@eaDir/{:04d}.jpg": 14,
    "raw/DSC{:05d}.NEF": 6,
    "clips/{:03d}.mp4": 4,
    "notes/{:03d}.txt": 7,
    "{}/Thumbs{:02d}.db": 3,
}
_BROKEN = ("cat/cut-off.jpg", "owl/empty.png", "owl/page-not-found.jpg")


def messy_files() -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of NUM_FILES files: images of many formats, modes and sizes, broken images, other files."""
    others = [
        (name.format(*(["cat"] if name.startswith("{}") else []), k), b"anything")
        for name, count in _OTHERS.items()
        for k in range(count)
    ]
    yield from others
    scene = encode(draw_scenes(np.arange(1), seed=0, width=64, height=64)[0], "JPEG", "RGB", {})
    yield from zip(_BROKEN, (scene[: len(scene) // 2], b"", b"<!DOCTYPE html><title>404</title>"), strict=True)
    for k in range(NUM_FILES - len(others) - len(_BROKEN)):
        suffix, kind, mode, options = _FORMATS[k % len(_FORMATS)]
        width, height = _SIZES[k % len(_SIZES)]
        scene = draw_scenes(np.arange(k, k + 1), seed=0, width=width // 4, height=height // 4)[0]
        yield f"{_CLASSES[k % 6]}/{k:04d}{suffix}", encode(scene.repeat(4, 0).repeat(4, 1), kind, mode, options)


def encode(pixels: np.ndarray, kind: str, mode: str, options: dict[str, Any]) -> bytes:
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):  # darker pixels are more transparent
        image.putalpha(Image.fromarray(pixels.max(axis=2)))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def transcript() -> str:
    """Run the command on the folder, then the command that it suggests, and return the terminal output.

    The output that both commands share is shown once.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, data in messy_files():
            path = Path(folder, "pets", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        command = f"{COMMAND} --labels-from-folders"
        first = run(command, folder)
        proposed = first.rstrip().splitlines()[-1].strip().removeprefix("python ")
        common = first[: first.index("Error: ")]
        second = run(proposed, folder).replace(common, "...\n", 1)
        return f"$ python {command}\n{first}\n$ python {proposed}\n{second}"


# Runs a script as if pillow-heif were not installed.
_WITHOUT_HEIF = (
    "import importlib.util, runpy, sys; find = importlib.util.find_spec; "
    "importlib.util.find_spec = lambda name, *more: None if name == 'pillow_heif' else find(name, *more); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run(command: str, folder: str) -> str:
    """Run a command in a folder and return its output."""
    script, *arguments = command.split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", _WITHOUT_HEIF, str(ROOT / script), *arguments, "--workers=1"]
    result = subprocess.run(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return re.sub(r" --workers=1", "", result.stdout)


def page() -> str:
    """Return docs/datasets.md with an updated transcript."""
    before, rest = PAGE.read_text().split(_START)
    _, after = rest.split(_END)
    indented = "".join(f"    {line}\n" if line else "\n" for line in transcript().splitlines())
    return f"{before}{_START}\n{indented}\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
