"""Images with their labels as an array; those of a large zip file are read once and kept in an index beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnnlib.config import UserError
from training.data_sources.dataset_json import DatasetJson
from training.data_sources.files import FileStore, ZipStore, labels_of, open_store, read_dataset_json
from training.data_sources.zip_index import Index, identify, read_index, write_index

LARGE = 100_000  # images of a zip file that has an index


class LabelledImages(NamedTuple):
    """Images of a folder or zip file, and the content of dataset.json.

    labels  int64 class numbers [images], float32 vectors [images, c_dim], None without labels, or the error to raise
            if labels are used, because an image has none
    meta    the other keys of dataset.json
    notes   messages for the user about files or labels in an unusual place or format
    """

    store: FileStore
    labels: np.ndarray | UserError | None
    meta: dict[str, Any]
    notes: list[str]

    @property
    def class_names(self) -> list[str] | None:
        return self.meta.get("class_names")


def open_labelled(path: Path) -> LabelledImages:
    """Open a folder or zip file with its labels, a large zip file by its index. Raises UserError as `open_store`."""
    if index := read_index(path):
        return _from_index(path, index)
    record = identify(path)
    store = open_store(path)
    content = read_dataset_json(store)
    images = LabelledImages(store, _label_array(store, content), content.meta, [*store.notes, *content.notes])
    if isinstance(store, ZipStore) and len(store.names) >= LARGE and record is not None and identify(path) == record:
        _write_index(path, record, store, images)
        if index := read_index(path):
            return _from_index(path, index)
    return images


def _label_array(store: FileStore, content: DatasetJson) -> np.ndarray | UserError | None:
    try:
        labels = labels_of(store, content)
    except UserError as error:
        return error
    if labels is None:
        return None
    return np.array(labels, np.int64 if isinstance(labels[0], int) else np.float32)


def _write_index(path: Path, record: dict[str, Any], store: ZipStore, images: LabelledImages) -> None:
    """Write the index, unless an image has no label."""
    if isinstance(images.labels, UserError):
        return
    values, arrays = store.to_index()
    labels = {} if images.labels is None else {"labels": images.labels}
    write_index(path, record, values | {"meta": images.meta, "notes": images.notes}, arrays | labels)


def _from_index(path: Path, index: Index) -> LabelledImages:
    store = ZipStore.of_index(path, index)
    return LabelledImages(store, index.arrays.get("labels"), index.values["meta"], list(index.values["notes"]))
