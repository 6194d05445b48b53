"""Class labels: derive classes from folders, summarize them, renumber class numbers with gaps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from dnnlib.config import UserError
from dnnlib.screen import printable
from dnnlib.util import counted
from training.data_sources.dataset_json import Label

# Lower-case folder or file names of splits -> canonical names on the command line.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    "eval": "eval",
}

_MAX_SHOWN = 10
_SINGULAR = {"classes": "class", "folders": "folder"}
_ONE_SPLIT = "give the folder of one split as --source (unpack an archive first)"
_SHARD = re.compile(r"\d{5}")  # folder of 1000 images, as written by dataset tools of the StyleGAN family


class FolderClasses(NamedTuple):
    """Class number of each image, class names, and notes on how the classes were found."""

    labels: list[Label]
    class_names: list[str]
    notes: list[str]


def classes_from_folders(names: Sequence[str], level: int | None, where: str) -> FolderClasses:
    """Use each folder at a level as a class. Level 1 is the top of `where`; None: the level found by `find_level`.

    Raises UserError if an image is not in a folder at that level.
    """
    folders = [name.split("/")[:-1] for name in names]
    notes: list[str] = []
    if level is None:
        level, notes = find_level(folders)
        _refuse_mixed_splits(folders, level, where)
    outside = [name for name in names if name.count("/") < level]
    if outside:
        others = f" and {counted(len(outside) - 1, 'other')} are" if len(outside) > 1 else " is"
        deepest = min(name.count("/") for name in outside)
        another = f", or give a smaller level, such as --labels-from-folders={deepest}" if deepest else ""
        raise UserError(
            f"{where}: --labels-from-folders needs every image in a folder named after its class, at level {level}, "
            f"but {outside[0]!r}{others} not: move such images into class folders{another}"
        )
    class_names = sorted({parts[level - 1] for parts in folders})
    number = {name: k for k, name in enumerate(class_names)}
    if len(class_names) == 1:
        notes.append(
            f"all images are of one class, {class_names[0]!r}: leave out --labels-from-folders, or give the level of "
            "the folders that are classes as --labels-from-folders=N (1 is the top)"
        )
    return FolderClasses([number[parts[level - 1]] for parts in folders], class_names, notes)


def find_level(folders: Sequence[Sequence[str]]) -> tuple[int, list[str]]:
    """Return the level of the class folders, and notes if it is not the top level.

    Skips a folder that contains all images, and split folders such as `train/` and `val/` if they contain folders.
    """
    level, notes = 1, []
    while _are_all_deeper(folders, level):
        tops = sorted({parts[level - 1] for parts in folders})
        if len(tops) == 1:
            notes.append(f"everything is in {'/'.join(folders[0][:level])}/: looking for classes in this folder")
        elif SPLITS.keys() >= {top.lower() for top in tops}:
            notes.append(
                f"{_listed(tops)} are splits: their subfolders are the classes, and all splits are read; "
                f"to read one split, give its folder as --source"
            )
        else:
            break
        level += 1
    if found := _flat_splits(folders, level):
        notes.append(
            f"{_listed(found)} look like splits, but are used as classes, because images "
            f"are directly in them: to read one split, {_ONE_SPLIT}"
        )
    return level, notes


def _refuse_mixed_splits(folders: Sequence[Sequence[str]], level: int, where: str) -> None:
    """Raise UserError if some splits contain class folders and others only images, such as test sets on Kaggle."""
    found = _flat_splits(folders, level)
    flat = sorted({parts[level - 1] for parts in folders if len(parts) == level})
    if found and flat != found:
        raise UserError(
            f"{where}: images are in folders, which may be classes, in {_listed(set(found).difference(flat))}, but "
            f"directly in {_listed(flat)}: {_ONE_SPLIT}, or use the splits as classes with "
            f"--labels-from-folders={level}"
        )


def _listed(folders: Iterable[str]) -> str:
    return " and ".join(f"{folder}/" for folder in sorted(folders))


def _flat_splits(folders: Sequence[Sequence[str]], level: int) -> list[str]:
    """Return the folders at a level if all are named after splits, else []."""
    tops = sorted({parts[level - 1] for parts in folders if len(parts) >= level})
    return tops if len(tops) > 1 and SPLITS.keys() >= {top.lower() for top in tops} else []


def _are_all_deeper(folders: Sequence[Sequence[str]], level: int) -> bool:
    return bool(folders) and all(len(parts) > level for parts in folders)


def note_on_folders(names: Sequence[str]) -> str | None:
    """Return a note on folders that could be classes, for a dataset built without labels."""
    folders = [name.split("/")[:-1] for name in names]
    level, _ = find_level(folders)
    if any(len(parts) < level for parts in folders):
        return None
    if found := _flat_splits(folders, level):
        return f"{_listed(found)} look like splits, and all are read: to read one split, {_ONE_SPLIT}"
    counts = Counter(sorted(parts[level - 1] for parts in folders))
    if len(counts) < 2 or all(_SHARD.fullmatch(name) for name in counts):
        return None
    return f"images are in {_describe(counts, 'folders')}: --labels-from-folders uses the folders as classes"


def describe_classes(labels: Sequence[Label], class_names: Sequence[str] | None) -> str:
    """Return a line such as '3 classes: cat 120, dog 98, owl 4'."""
    if isinstance(labels[0], list):
        return f"labels are vectors of {len(labels[0])} numbers"
    counts, num_classes = _count(labels, class_names)
    names = class_names or ()
    text = _describe({names[k] if k < len(names) else str(k): counts[k] for k in sorted(counts)}, "classes")
    missing = num_classes - len(counts)
    return f"{text}; {missing:,} of {num_classes:,} class numbers have no images" if missing else text


def _count(labels: Sequence[Label], class_names: Sequence[str] | None) -> tuple[dict[int, int], int]:
    """Return the number of images per class number, without empty classes, and the number of classes."""
    counts = Counter(label for label in labels if isinstance(label, int))
    return counts, max(max(counts) + 1, len(class_names or ()))


def _describe(counts: Mapping[str, int], noun: str) -> str:
    shown = ", ".join(f"{printable(name)} {count:,}" for name, count in islice(counts.items(), _MAX_SHOWN))
    if len(counts) == 1:
        return f"1 {_SINGULAR[noun]}: {shown}"
    if len(counts) <= _MAX_SHOWN:
        return f"{len(counts)} {noun}: {shown}"
    return f"{len(counts):,} {noun} of {min(counts.values()):,} to {max(counts.values()):,} images: {shown}, ..."


class Classes(NamedTuple):
    """Labels and class names of a dataset, None without labels; `notes` describes changes to the source's labels."""

    labels: Sequence[Label] | None
    names: list[str] | None
    notes: list[str]


def choose_classes(labels: Sequence[Label] | None, class_names: list[str] | None) -> Classes:
    """Renumber classes from 0 if most class numbers up to the maximum are unused, as in a subset of a dataset.

    The old numbers become the class names. Named classes keep their numbers.
    """
    if labels is None or isinstance(labels[0], list) or not (gaps := _describe_gaps(labels, class_names)):
        return Classes(labels, class_names, [])
    new = {old: k for k, old in enumerate(sorted(label for label in set(labels) if isinstance(label, int)))}
    note = f"{gaps}: the classes are renumbered from 0, and named after the old numbers"
    return Classes([new[label] for label in labels if isinstance(label, int)], [str(old) for old in new], [note])


def note_on_gaps(labels: Sequence[Label], class_names: list[str] | None) -> list[str]:
    """Return a note if most class numbers up to the maximum are unused, for images not built into a dataset."""
    gaps = _describe_gaps(labels, class_names)
    return [f"{gaps}: building a dataset with dataset_tool.py renumbers the classes from 0"] if gaps else []


def _describe_gaps(labels: Sequence[Label], class_names: list[str] | None) -> str:
    """Return a clause if most class numbers up to the maximum are unused and the classes are unnamed, else ''."""
    counts, num_classes = _count(labels, None)
    if class_names is not None or 2 * len(counts) >= num_classes:
        return ""
    return f"class numbers go up to {num_classes - 1}, but only {len(counts)} of them occur"
