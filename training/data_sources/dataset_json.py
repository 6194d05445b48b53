"""Parser of dataset.json: labels of the images of a dataset, and the record of how the dataset was built."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dnnlib.config import FLOAT32_MAX, UserError
from dnnlib.util import counted, parse_json

Label = int | list[float]

NAME = "dataset.json"
MAX_CLASS = 2**31 - 1
VECTOR_FORM = 'a vector per image, all of the same length: ["img.png", [0, 1, 0, 1]]'

SEVERAL_LABELS = f"several labels for one image need {VECTOR_FORM}; if the label is a vector, write integers as 3.0"


def is_dataset_json(name: str) -> bool:
    """Return whether the file name of a path is dataset.json, ignoring case."""
    return name.rpartition("/")[2].lower() == NAME


@dataclass(frozen=True, kw_only=True)
class DatasetJson:
    """Content of dataset.json: labels by image name (None without labels), and all other keys as `meta`.

    `notes` lists tolerated deviations from the format.
    """

    labels: dict[str, Label] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def class_names(self) -> list[str] | None:
        return self.meta.get("class_names")


def parse_dataset_json(data: bytes, where: str) -> DatasetJson:
    """Parse and check `{"labels": [["00000/img00000000.png", 3], ...], ...}`.

    Labels are either all class numbers or all vectors of one length. Raises UserError for the first invalid entry;
    `where` names the file in messages.
    """
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(f"{where} cannot be read ({error}): repair or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f'{where} must be an object with the key "labels", not a {type(content).__name__}')
    names = content.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f'{where}: "class_names" must be null or a list of strings, not {names!r:.80}')
    key, notes = _key_of_labels(content, where)
    pairs = content.pop(key, None)
    labels = None if pairs is None else _checked(pairs, f"{where}: ", key)
    refuse_unnamed(list((labels or {}).values()), names, lambda k: f"{where}: {pairs[k][0]!r:.80}")
    return DatasetJson(labels=labels, meta=content, notes=notes)


def _key_of_labels(content: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Return the key of the labels, ignoring case, and a note if the key is not lower case."""
    keys = [key for key in content if key.lower() == "labels"]
    if "labels" in keys or not keys:
        return "labels", ()
    if len(keys) > 1:
        raise UserError(f'{where} has the keys {" and ".join(map(json.dumps, keys))}: keep one, as "labels"')
    return keys[0], (f'{where}: the key {json.dumps(keys[0])} is read as "labels"',)


def _checked(pairs: Any, where: str, key: str) -> dict[str, Label]:
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f'{where}"{key}" must be null or a list like [["00000/img00000000.png", 3], ...]')
    vector_length = len(pairs[0][1]) if _is_pair(pairs[0]) and isinstance(pairs[0][1], list) else None
    for pair in pairs:
        if isinstance(pair, list) and len(pair) > 2 and isinstance(pair[0], str):
            raise UserError(f"{where}label {pair!r:.80} has several labels for one image: give {VECTOR_FORM}")
        if not _is_pair(pair) or not _is_label(pair[1], vector_length):
            wanted = "class numbers from 0" if vector_length is None else f"lists of {vector_length} numbers"
            several = _is_pair(pair) and isinstance(pair[1], list)
            remedy = f"; several labels for one image need {VECTOR_FORM}" if several else ""
            raise UserError(f"{where}label {pair!r:.80}: labels are pairs [name, label], all of them {wanted}{remedy}")
    if vector_length and (odd := find_set_of_classes([label for _, label in pairs])) is not None:
        raise UserError(f"{where}label {pairs[odd]!r:.80}: {SEVERAL_LABELS}")
    labels = dict(pairs)
    if len(labels) < len(pairs):
        refuse_several(pairs, where)
    return labels


def find_set_of_classes(vectors: Sequence[Sequence[Any]]) -> int | None:
    """Return the index of the first vector that looks like a list of class numbers of one image, else None.

    Such a vector has several integers, not only 0 and 1, in a dataset without floats such as 3.0.
    """
    if not all(type(x) is int for vector in vectors for x in vector):
        return None
    return next((k for k, vector in enumerate(vectors) if len(vector) > 1 and not {0, 1}.issuperset(vector)), None)


def refuse_unnamed(labels: Sequence[Label], class_names: Sequence[str] | None, place: Callable[[int], str]) -> None:
    """Raise UserError if only some of the classes have names. `place(k)` describes image k in the message."""
    if class_names is None:
        return
    count = len(class_names)
    unnamed = next((k for k, label in enumerate(labels) if isinstance(label, int) and label >= count), None)
    if unnamed is not None:
        raise UserError(
            f"{place(unnamed)}: label {labels[unnamed]}, but there are only {counted(count, 'class name')}: "
            "name all classes from 0, or none"
        )


def refuse_several(pairs: Iterable[Sequence[Any]], where: str) -> None:
    """Raise UserError for the first image name with several labels."""
    counts = Counter(name for name, _ in pairs)
    several = [name for name, count in counts.items() if count > 1]
    found = ", ".join(str(label) for name, label in pairs if name == several[0])
    others = f" and {len(several) - 1} other images" if len(several) > 1 else ""
    have = "have" if others else "has"
    raise UserError(
        f"{where}{several[0]!r}{others} {have} several labels ({found:.80}): give one each, or {VECTOR_FORM}"
    )


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _is_label(label: object, vector_length: int | None) -> bool:
    if vector_length is None:
        return type(label) is int and 0 <= label <= MAX_CLASS
    return (
        isinstance(label, list)
        and len(label) == vector_length > 0
        and all(type(value) in (int, float) and abs(value) <= FLOAT32_MAX for value in label)
    )
