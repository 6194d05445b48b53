"""Output of the commands of generate.py: folders and image files."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from dnnlib.config import UserError
from torch_utils.images import save_image


def make_outdir(outdir: Path, flag: str | None = None) -> None:
    """Create the folder for results. Raises UserError if that fails."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag or f'--outdir={outdir}'}: cannot be written ({error.strerror})") from None


def save_batches(batches: Iterable[Tensor], names: list[str], outdir: Path, *, keep: bool) -> list[Tensor]:
    """Write batches of uint8 images as NAME.png, overlapping with generation. Returns the batches if `keep`."""
    kept: list[Tensor] = []
    writing: list[Future[None]] = []
    paths = (outdir / f"{name}.png" for name in names)
    with ThreadPoolExecutor() as pool, tqdm(total=len(names), unit="img") as progress:
        for images in batches:
            finish(writing)
            files = {path: image for image, path in zip(images, paths, strict=False)}  # a repeated seed is written once
            writing = [pool.submit(save_image, image, path) for path, image in files.items()]
            kept += [images] if keep else []
            progress.update(len(images))
        finish(writing)
    return kept


def finish(jobs: Iterable[Future[None]]) -> None:
    """Wait for all jobs. Re-raises the exception of a failed job."""
    for job in jobs:
        job.result()
