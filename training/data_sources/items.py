"""Images as dataset_tool.py takes them from a source, whatever that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dnnlib.image_files import BrokenImageError
from dnnlib.images import MAX_IMAGE_BYTES
from training.data_sources.dataset_json import Label
from training.data_sources.listing import LeftOut

SHAPES = "shapes"  # the source that is no file


class Item(NamedTuple):
    """One image of a source.

    name: where it is in the source, for messages only.
    content: an encoded image, the file that holds one, pixels uint8 [H, W, C], or what is wrong with it.
    """

    name: str
    content: bytes | Path | np.ndarray | BrokenImageError


def oversize(size: int) -> BrokenImageError | None:
    """Return what is wrong with an encoded image of more bytes than are read; None for others."""
    if size <= MAX_IMAGE_BYTES:
        return None
    return BrokenImageError(f"{size} bytes, more than the {MAX_IMAGE_BYTES} of an image: save it smaller")


class Source(Protocol):
    """An iterable of Items of known length; iterating again starts anew.

    name         of the file or folder
    pad          pixels of 0 that are usually added on each side
    labels       of all images in their order, None without
    class_names  None where the classes have only numbers, and without classes
    channels     1 or 3, as the source says of its images; None where their headers tell
    left_out     files that are not images, by kind
    notes        lines on how the source is read where that is not plain
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
    """Attributes of a Source that says nothing of its images; see there."""

    name = ""
    pad = 0
    labels: Sequence[Label] | None = None
    class_names: list[str] | None = None
    channels: int | None = None

    def __init__(self) -> None:
        self.left_out: LeftOut = {}
        self.notes: list[str] = []
