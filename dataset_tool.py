"""Build a data set for training from images, archives or published sets, and check one that exists.

python dataset_tool.py --source=cifar-10-python.tar.gz --dest=data/cifar10.zip
python dataset_tool.py check data/cifar10.zip
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from dnnlib.cli import DefaultGroup, Script, option
from dnnlib.config import UserError
from dnnlib.images import BrokenImageError
from dnnlib.util import partial_path
from training.data_sources.codec import SLOW_DECODER, decode_as, decode_image
from training.data_sources.convert import (
    RESIZE_FILTERS,
    TRANSFORMS,
    Conversion,
    Converted,
    Expected,
    TooSmallError,
    convert_items,
    load,
)
from training.data_sources.files import Label, labels_of, open_store, read_dataset_json
from training.data_sources.sources import SUPPORTED, Drawing, Item, Source, open_source

FORMAT_VERSION = 1

_CHUNK_BYTES = 1 << 22  # of pixels that one task of a worker returns
_CHUNK_IMAGES = 256
_SHAPES_SIZE = 32
_SHAPES_COUNT = 4096
_MAX_PAD = 1024

Writer = Callable[[str, bytes], None]


@click.group(cls=DefaultGroup, default="build")
def main() -> None:
    """Build a data set, or check one."""


@main.command(
    cls=Script,
    help=f"""Build a data set for training from SOURCE.

    SOURCE is {SUPPORTED}. The result is a .zip file, or a folder if DEST does not end in .zip, of uncompressed PNG
    images of one size and a dataset.json with labels, class names and how the set was made.

    The first image decides how many channels the set has; others are converted where that loses nothing.

    `dataset_tool.py check PATH` reads a finished set and lists everything that is wrong with it.""",
)
@option("--source", metavar="PATH", required=True, help="What to read")
@option("--dest", metavar="PATH", required=True, type=click.Path(path_type=Path), help=".zip file or folder to write")
@option("--width", type=click.IntRange(min=1), help="Width of the result in pixels [default: as it is; 32 for shapes]")
@option(
    "--height", type=click.IntRange(min=1), help="Height of the result in pixels [default: as it is; 32 for shapes]"
)
@option("--resolution", metavar="WxH", help="Width and height in one, such as 256x256")
@option(
    "--transform",
    type=click.Choice(TRANSFORMS),
    help="center-crop: crop to width:height, then resize; center-crop-wide: StyleGAN2-ADA's for LSUN Car, in a black "
    "square of side width; center-crop-letterbox: center-crop in such a square [default: resize only]",
)
@option(
    "--pad",
    type=click.IntRange(min=0, max=_MAX_PAD),
    help="First add this many pixels of black on each side [default: 2 for MNIST, else 0]",
)
@option(
    "--resize-filter",
    type=click.Choice(list(RESIZE_FILTERS)),
    default="lanczos",
    show_default=True,
    help="Resampling; the published numbers for FFHQ at 256x256 need box",
)
@option(
    "--channels",
    type=click.Choice(["1", "3", "4"]),
    help="Convert to grayscale, RGB (transparency over white) or RGBA [default: as the first image]",
)
@option("--max-images", type=click.IntRange(min=1), help="Use the first N images [default: all; 4096 for shapes]")
@option("--labels-from-folders", is_flag=True, help="The top-level folder of an image is its class")
@option("--skip-bad", is_flag=True, help="Leave out images that cannot be decoded, and list them")
@option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which scenes --source=shapes draws")
@option("--workers", type=click.IntRange(min=1), help="Number of processes [default: one per core]")
def build(
    source: str,
    dest: Path,
    width: int | None,
    height: int | None,
    resolution: str | None,
    transform: str | None,
    pad: int | None,
    resize_filter: str,
    channels: str | None,
    max_images: int | None,
    labels_from_folders: bool,
    skip_bad: bool,
    seed: int,
    workers: int | None,
) -> None:
    if resolution is not None:
        width, height = read_resolution(resolution, width, height)
    conversion = Conversion(
        width=width,
        height=height,
        transform=transform,
        resize_filter=resize_filter,
        channels=int(channels) if channels else None,
    )
    refuse_existing(dest)
    drawing = Drawing(seed, max_images or _SHAPES_COUNT, width or _SHAPES_SIZE, height or _SHAPES_SIZE)
    images = open_source(source, labels_from_folders=labels_from_folders, drawing=drawing)
    conversion = replace(conversion, pad=images.pad if pad is None else pad)
    num_images = min(len(images), max_images or len(images))
    expected = probe(images, conversion, num_images, skip_bad)

    labels: list[list[str | Label | None]] = []
    skipped: list[str] = []
    num_small = 0
    with new_dataset(dest) as write:
        progress = tqdm(islice(images, num_images), total=num_images, unit="images", disable=None)
        for item, result in convert_all(progress, conversion, expected, num_images, workers or os.cpu_count() or 1):
            if isinstance(result, BrokenImageError):
                skipped.append(refuse_broken(item, result, skip_bad))
                continue
            if isinstance(result, TooSmallError):
                num_small += 1
                continue
            name = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
            write(name, result)
            labels.append([name, item.label])
        write("dataset.json", json.dumps(describe(images, conversion, expected, labels)).encode())
    report(dest, images, expected, labels, skipped)
    if num_small:
        click.echo(f"{num_small} images are smaller than {width}x{height} and were left out ({transform})")


def read_resolution(text: str, *others: int | None) -> tuple[int, int]:
    """Width and height of e.g. 256x128. Raises UserError for anything else, and where one of them is given already."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise UserError(f"--resolution={text}: give width and height in pixels, such as 256x256")
    if any(others):
        raise UserError(f"--resolution={text}: give it, or --width and --height")
    return int(match[1]), int(match[2])


def refuse_existing(dest: Path) -> None:
    if not dest.name:
        raise UserError(f"--dest={dest}: give the name of a .zip file or folder to write")
    if dest.is_file() or (dest.is_dir() and any(dest.iterdir())):
        raise UserError(f"--dest={dest} exists: remove it or choose another name")


def refuse_broken(item: Item, error: BrokenImageError, skip_bad: bool) -> str:
    """One line about a broken image; raises UserError with it unless such images are to be left out."""
    line = f"{item.name}: {error}"
    if not skip_bad:
        raise UserError(f"cannot read {line}; --skip-bad leaves such images out")
    return line


def probe(source: Source, conversion: Conversion, num_images: int, skip_bad: bool) -> Expected:
    """Size and channels of the result, from the first image that can be read and is not too small."""
    num_small = 0
    for item in islice(source, num_images):
        try:
            H, W, C = conversion(load(item)).shape
        except BrokenImageError as error:
            refuse_broken(item, error, skip_bad)
        except TooSmallError:
            num_small += 1
        else:
            unpadded = (H - 2 * conversion.pad, W - 2 * conversion.pad, C)
            is_copied = isinstance(item.content, np.ndarray) and item.content.shape == unpadded
            return Expected((H, W, C), item.name, is_copied)
    if num_small:
        raise UserError(
            f"--width={conversion.width} --height={conversion.height}: --transform=center-crop-wide drops smaller "
            f"images, and leaves none of the {num_images} of {source.name}: choose a smaller size"
        )
    raise UserError(f"none of the {num_images} images of {source.name} can be read: check the source")


def convert_all(
    items: Iterable[Item], conversion: Conversion, expected: Expected, num_images: int, workers: int
) -> Iterator[tuple[Item, Converted]]:
    """Convert in order, in chunks, in other processes; a bounded number of chunks is in memory at any time."""
    H, W, C = expected.shape
    chunk_size = min(max(_CHUNK_BYTES // (H * W * C), 1), _CHUNK_IMAGES)
    iterator = iter(items)
    chunks = iter(lambda: list(islice(iterator, chunk_size)), [])
    if workers == 1 or num_images <= chunk_size or expected.is_copied:  # sending pixels costs more than encoding them
        for chunk in chunks:
            yield from zip(chunk, convert_items(chunk, conversion, expected), strict=True)
        return

    # spawn: forking a process that has threads (of whoever calls us) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending: deque[tuple[list[Item], Future[list[Converted]]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(convert_items, chunk, conversion, expected)))
            if len(pending) > 2 * workers:
                yield from _finish(pending)
        while pending:
            yield from _finish(pending)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died, perhaps for lack of memory: try fewer than --workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(pending: deque[tuple[list[Item], Future[list[Converted]]]]) -> Iterator[tuple[Item, Converted]]:
    chunk, future = pending.popleft()
    return zip(chunk, future.result(), strict=True)


@contextmanager
def new_dataset(dest: Path) -> Iterator[Writer]:
    """Give a function that adds a file; the set gets its name when all is written, and nothing is left if not."""
    temporary = partial_path(dest)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        if dest.suffix.lower() == ".zip":
            with zipfile.ZipFile(temporary, "w") as archive:
                yield lambda name, data: _add_to_zip(archive, name, data)
        else:
            temporary.mkdir()
            yield lambda name, data: _add_to_folder(temporary, name, data)
        os.replace(temporary, dest)
    except OSError as error:
        raise UserError(f"cannot write --dest={dest}: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _add_to_zip(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)  # of 1980: the same images give the same file
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def _add_to_folder(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def describe(source: Source, conversion: Conversion, expected: Expected, labels: list[list[Any]]) -> dict[str, Any]:
    """Content of dataset.json."""
    H, W, C = expected.shape
    return {
        "labels": None if labels[0][1] is None else labels,
        "class_names": source.class_names,
        "source": source.name,
        "num_images": len(labels),
        "width": W,
        "height": H,
        "channels": C,
        "pad": conversion.pad,
        "transform": conversion.transform,
        "resize_filter": conversion.resize_filter if conversion.width else None,
        "format_version": FORMAT_VERSION,
    }


def report(dest: Path, source: Source, expected: Expected, labels: list[list[Any]], skipped: list[str]) -> None:
    H, W, C = expected.shape
    labelled = "without labels" if labels[0][1] is None else "with labels"
    click.echo(f"{dest}: {len(labels)} images of {W}x{H} pixels and {C} channels, {labelled}")
    if source.num_ignored:
        click.echo(f"{source.num_ignored} files of {source.name} are not images and were left out")
    if skipped:
        click.echo(f"{len(skipped)} images could not be read and were left out:")
        for line in skipped:
            click.echo(f"  {line}")


@main.command(cls=Script)
@click.argument("path", type=click.Path(path_type=Path))
def check(path: Path) -> None:
    """Read every image of a finished set and list everything that is wrong; exit code 1 if anything is."""
    store = open_store(path)
    content = read_dataset_json(store)
    problems = []
    try:
        labels_of(store, content)
    except UserError as error:
        problems.append(str(error))
    known = set(store.names)
    problems += [f"{name}: has a label, but is not in the set" for name in content.labels or () if name not in known]

    if SLOW_DECODER:
        click.echo(SLOW_DECODER, err=True)
    shape: tuple[int, int, int] | None = None
    for name in tqdm(store.names, unit="images", disable=None):
        try:
            data = store.read(name)
            found = (decode_as(data, shape) if shape else decode_image(data)).shape
        except BrokenImageError as error:
            problems.append(f"{name}: {error}")
            continue
        shape = shape or found
        if found != shape:
            problems.append(f"{name}: is {found[1]}x{found[0]}x{found[2]}, not {shape[1]}x{shape[0]}x{shape[2]}")

    for problem in problems:
        click.echo(problem)
    if problems:
        raise SystemExit(1)
    assert shape is not None
    labelled = "without labels" if content.labels is None else "with labels"
    click.echo(f"{path}: {len(store.names)} images of {shape[1]}x{shape[0]} pixels and {shape[2]} channels, {labelled}")


if __name__ == "__main__":
    main()
