"""Interface between the sources of images and dataset_tool.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dnnlib.image_files import BrokenImageError
from dnnlib.images import MAX_IMAGE_BYTES
from training.data_sources.dataset_json import Label
from training.data_sources.listing import LeftOut

SHAPES = "shapes"  # value of --source for drawn scenes


class Item(NamedTuple):
    """One image of a source.

    name: location of the image in the source, for messages only.
    content: encoded image, path of an image file, pixels uint8 [H, W, C], or the error that prevents reading the image.
    """

    name: str
    content: bytes | Path | np.ndarray | BrokenImageError


def oversize(size: int) -> BrokenImageError | None:
    """Return an error if the size of an encoded image exceeds the limit, else None."""
    if size <= MAX_IMAGE_BYTES:
        return None
    return BrokenImageError(f"{size} bytes, more than the limit of {MAX_IMAGE_BYTES} for an image: reduce its size")


class Source(Protocol):
    """Sized iterable of Items. Each iteration starts at the first image.

    name         name of the file or folder
    pad          zero pixels to add on each side by default
    labels       labels of all images in order, None without labels
    class_names  None without classes or class names
    channels     number of channels of all images, 1 or 3; None: determined from the image headers
    left_out     files that are not images, by kind
    notes        lines about the interpretation of the source, for the user
    """

    name: str
    pad: int
    labels: Sequence[Label] | None
    class_names: list[str] | None
    channels: int | None
    left_out: LeftOut
    notes: list[str]

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class SourceBase:
    """Default attributes of a Source."""

    name = ""
    pad = 0
    labels: Sequence[Label] | None = None
    class_names: list[str] | None = None
    channels: int | None = None

    def __init__(self) -> None:
        self.left_out: LeftOut = {}
        self.notes: list[str] = []
