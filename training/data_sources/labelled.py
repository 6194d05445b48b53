"""Images with their labels as an array; those of a large zip file are read once and kept in an index beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.config import UserError
from training.data_sources.dataset_json import DatasetJson
from training.data_sources.files import FileStore, ZipStore, labels_of, open_store, read_dataset_json
from training.data_sources.zip_index import Index, read_index, remove_index, write_index

LARGE = 100_000  # images of a zip file that has an index


@dataclass(frozen=True)
class LabelledImages:
    """Images of a folder or zip file, and the content of dataset.json; `array` holds the labels if already read."""

    store: FileStore
    content: DatasetJson
    array: np.ndarray | None = None

    @property
    def meta(self) -> dict[str, Any]:
        return self.content.meta

    @property
    def notes(self) -> list[str]:
        return [*self.store.notes, *self.content.notes]

    @property
    def has_labels(self) -> bool:
        return self.array is not None or self.content.labels is not None

    def labels(self) -> np.ndarray | None:
        """Return class numbers int64 [images] or vectors float32 [images, c_dim]; None if there are no labels.

        Raises UserError if an image has no label.
        """
        if self.array is not None:
            return self.array
        labels = labels_of(self.store, self.content)
        return None if labels is None else np.array(labels, np.int64 if isinstance(labels[0], int) else np.float32)


def open_labelled(path: Path) -> LabelledImages:
    """Open a folder or zip file with its labels, a large zip file by its index. Raises UserError as `open_store`."""
    if index := read_index(path):
        return LabelledImages(ZipStore(path, index.contents), index.content, index.labels)
    store = open_store(path)
    images = LabelledImages(store, read_dataset_json(store))
    if not isinstance(store, ZipStore):
        return images
    if len(store.names) < LARGE or images.notes or store.contents.state.directory is None:
        remove_index(path)  # of an earlier state of the zip file
        return images
    return _with_index(images, store)


def _with_index(images: LabelledImages, store: ZipStore) -> LabelledImages:
    """Return the images with `array`, after writing their index; unchanged if an image has no label."""
    try:
        labels = images.labels()
    except UserError:
        remove_index(store.path)
        return images
    if read_index(store.path) is None:  # no other process has written it in the meantime
        write_index(store.path, Index(store.contents, images.content, labels))
    return replace(images, array=labels)
