"""Conversion of labels in tables and tar shards: class numbers, class names, vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dnnlib.config import FLOAT32_MAX, UserError
from training.data_sources.dataset_json import MAX_CLASS, SEVERAL_LABELS, VECTOR_FORM, Label, find_set_of_classes

_FORMS = "class numbers from 0, names of classes, or vectors of one length"

Labels = tuple[list[Label] | None, list[str] | None]  # labels of all images, class names


def to_labels(values: list[Any], place: Callable[[int], str]) -> Labels:
    """Convert one value per image (integer, class name, list of numbers or None) to labels and class names.

    Returns (None, None) if all values are None or all are -1, as in published test sets. `place(k)` describes image k
    in messages. Raises UserError for the first invalid label.
    """
    kinds = set(map(type, values))
    if kinds <= {type(None)} or (kinds == {int} and set(values) == {-1}):
        return None, None
    if type(None) in kinds:
        missing = [k for k, value in enumerate(values) if value is None]
        raise UserError(
            f"{place(missing[0])} has no label ({len(missing):,} of {len(values):,} images are unlabelled): label all "
            "images, or none"
        )
    if kinds <= {int, str} and str in kinds:
        texts = list(map(str, values))
        class_names = sorted(set(texts))
        number = {name: k for k, name in enumerate(class_names)}
        return [number[text] for text in texts], class_names
    if kinds <= {int, bool, float}:
        return _classes(values, place), None
    if kinds == {list} and all(len(value) == 1 and type(value[0]) is int for value in values):
        return to_labels([value[0] for value in values], place)
    if kinds == {list}:
        return _vectors(values, place), None
    odd = next((k for k, value in enumerate(values) if type(value) is not type(values[0])), 0)
    raise UserError(f"{place(odd)}: label {values[odd]!r:.80}: labels are {_FORMS}")


def _classes(values: Iterable[int | float], place: Callable[[int], str]) -> list[Label]:
    classes: list[Label] = []
    for k, value in enumerate(values):
        if value == -1:
            raise UserError(
                f"{place(k)}: label -1 means that the class is unknown, as in test sets, but other images have labels: "
                "choose a labelled split with --split=NAME, or label all images"
            )
        if not 0 <= value <= MAX_CLASS or value != int(value):
            raise UserError(f"{place(k)}: label {value!r}: labels are {_FORMS}")
        classes.append(int(value))
    return classes


def _vectors(values: list[list[Any]], place: Callable[[int], str]) -> list[Label]:
    """Check vectors of one length. Raises UserError for vectors that look like lists of class numbers."""
    length = len(values[0])
    for k, value in enumerate(values):
        if not all(isinstance(x, int | float) and abs(x) <= FLOAT32_MAX for x in value):
            raise UserError(f"{place(k)}: label {value!r:.80}: labels are {_FORMS}")
        if len(value) != length or not length:
            raise UserError(
                f"{place(k)}: label {value!r:.80}: several labels for one image need {VECTOR_FORM}; here the first "
                f"has {length} numbers"
            )
    if (odd := find_set_of_classes(values)) is not None:
        raise UserError(f"{place(odd)}: label {values[odd]!r:.80}: {SEVERAL_LABELS}")
    return [list(map(float, value)) for value in values]
