"""Conversion of a source into the files of a dataset: in parallel, in order, in bounded memory."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.config import UserError
from dnnlib.image_files import BrokenImageError
from dnnlib.images import MAX_IMAGE_BYTES
from dnnlib.screen import printable
from dnnlib.util import partial_path
from training.data_sources.convert import (
    Conversion,
    Converted,
    TooSmallError,
    WrongSizeError,
    convert_items,
    load,
)
from training.data_sources.items import SHAPES, Item
from training.data_sources.parallel import map_chunks
from training.data_sources.sizes import Sizes
from training.data_sources.stored_zip import StoredZip
from training.data_sources.zip_index import remove_index

Writer = Callable[[str, bytes], None]

MAX_LISTED = 10  # lines per kind of problem, without --verbose

_CHUNK_BYTES = 1 << 22  # pixel bytes that one worker task returns
_CHUNK_IMAGES = 256
_PNG_BYTES = 1 << 17  # upper bound of the overhead of an uncompressed PNG of MAX_IMAGE_BYTES


@dataclass
class Problems:
    """Problems with images that cannot be added to the dataset, by kind; each line names an image."""

    skip_bad: bool
    broken: list[str] = field(default_factory=list)
    other_size: list[str] = field(default_factory=list)
    num_small: int = 0
    sizes: Sizes = field(default_factory=Counter)  # original sizes of all readable images

    @property
    def total(self) -> int:
        return sum(self.sizes.values()) + len(self.broken)

    @property
    def stop_the_build(self) -> bool:
        """True after a problem that is not skipped. The remaining images are then checked but not written."""
        return bool(self.other_size) or (bool(self.broken) and not self.skip_bad)

    def note(self, item: Item, converted: Converted) -> bytes | None:
        """Return the PNG of a converted image; for a failed conversion record the problem and return None."""
        if converted.size:
            self.sizes[converted.size] += 1
        match converted.png:
            case bytes():
                return converted.png
            case TooSmallError():
                self.num_small += 1
            case WrongSizeError():
                self.other_size.append(f"{item.name}: {converted.png}")
            case BrokenImageError():
                self.broken.append(f"{item.name}: {converted.png}")
        return None

    def num_smaller_than(self, width: int, height: int) -> int:
        """Count the original images with a width below `width` or a height below `height`."""
        return sum(count for (w, h), count in self.sizes.items() if w < width or h < height)


def listed(lines: list[str], *, verbose: bool) -> list[str]:
    """Indent lines for output: the first MAX_LISTED and the number of omitted lines, or all lines if `verbose`."""
    shown = lines if verbose else lines[:MAX_LISTED]
    rest = len(lines) - len(shown)
    return [f"  {printable(line)}" for line in shown] + ([f"  and {rest} more (--verbose lists them)"] if rest else [])


def probe(items: Iterable[Item], conversion: Conversion) -> tuple[int, int, int] | None:
    """Return the converted shape (H, W, C) of the first image that is readable and large enough; None if all fail."""
    for item in items:
        try:
            shape = conversion(load(item)).shape
        except (BrokenImageError, TooSmallError):
            continue
        _refuse_large(item, shape)
        return shape
    return None


def _refuse_large(item: Item, shape: tuple[int, int, int]) -> None:
    """Raise UserError for an image whose PNG would exceed the limits of the dataset reader."""
    H, W, C = shape
    max_pixels = Image.MAX_IMAGE_PIXELS or math.inf
    if H * (1 + W * C) > MAX_IMAGE_BYTES - _PNG_BYTES or max_pixels < H * W:
        raise UserError(
            f"{item.name}: an image of {W}x{H} pixels and {C} channels exceeds the size limit of a dataset: choose a "
            "smaller size with --width and --height"
        )


def convert_all(
    items: Iterable[Item], conversion: Conversion, shape: tuple[int, int, int], workers: int
) -> Iterator[tuple[Item, Converted]]:
    """Convert items to PNG files of `shape` (H, W, C), in order.

    Encoded images are converted in worker processes, with a bounded number of chunks in memory. Decoded pixels are
    converted in this process, because sending them costs more than encoding them. Raises UserError if a worker dies.
    """
    H, W, C = shape
    chunk_size = min(max(_CHUNK_BYTES // (H * W * C), 1), _CHUNK_IMAGES)
    iterator = iter(items)
    chunks = iter(lambda: list(islice(iterator, chunk_size)), [])
    first = next(chunks, [])
    if workers == 1 or len(first) < chunk_size or isinstance(first[0].content, np.ndarray):
        for chunk in chain([first], chunks):
            yield from zip(chunk, convert_items(chunk, conversion, shape), strict=True)
        return

    convert = partial(convert_items, conversion=conversion, shape=shape)
    yield from map_chunks(convert, chain([first], chunks), workers)


@contextmanager
def new_dataset(dest: Path) -> Iterator[Writer]:
    """Context manager that yields a function to add a file to a new dataset.

    The dataset is written under a temporary name and renamed to `dest` on success; on an error it is removed.
    """
    temporary = partial_path(dest)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        if _is_zip(dest):
            with StoredZip(temporary) as archive:
                yield archive.add
        else:
            temporary.mkdir()
            yield lambda name, data: _add_to_folder(temporary, name, data)
        refuse_existing(dest)  # another program may have created `dest` in the meantime
        os.replace(temporary, dest)
        remove_index(dest)  # of an earlier file of this name
    except OSError as error:
        raise UserError(f"cannot write --dest={dest}: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def refuse_dest(dest: Path, source: str) -> None:
    """Raise UserError if `dest` cannot be written or is inside `source`, where the next build would include `dest`."""
    if not dest.name:
        raise UserError(f"--dest={dest}: give the name of a .zip file or folder to write")
    refuse_existing(dest)
    above = next(folder for folder in dest.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"--dest={dest}: {above} is not a folder: choose another path")
    if not _is_zip(dest) and source != SHAPES and dest.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(
            f"--dest={dest} is inside --source={source}, so its images would become part of the source: choose a "
            "path outside, or a .zip file"
        )


def refuse_existing(dest: Path) -> None:
    """Raise UserError if `dest` exists; an existing empty folder is accepted unless `dest` ends in .zip."""
    is_usable = not _is_zip(dest) and dest.is_dir() and not dest.is_symlink() and not any(dest.iterdir())
    if os.path.lexists(dest) and not is_usable:
        raise UserError(f"--dest={dest} exists: remove it or choose another name")


def _is_zip(dest: Path) -> bool:
    return dest.suffix.lower() == ".zip"


def _add_to_folder(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
