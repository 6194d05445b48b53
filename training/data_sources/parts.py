"""Multi-file datasets: tables or tar shards in a folder, and their splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dnnlib.config import UserError
from dnnlib.util import counted, describe_error, parse_json, read_regular
from training.data_sources.classes import SPLITS
from training.data_sources.listing import LeftOut, Listing, split_images
from training.data_sources.numbering import gaps, missing_parts

SUFFIXES = {
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"),
}
_ALL_SUFFIXES = tuple(chain.from_iterable(SUFFIXES.values()))
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label")  # lower-case column names in order of preference
_OTHERS = "others"  # split of files without a split in their names, if other files have one
_NUMBERED = re.compile(r"(?:.*-)?(\w+)-(\d{5})-of-(\d{5})")  # stem of a file, such as NAME-train-00000-of-00005
_SERIAL = re.compile(r"(?<!\d)00\d")  # zero-padded number of a file in a series, such as 000017
_MAX_JSON_BYTES = 1 << 24


@dataclass(kw_only=True)
class Parts:
    """Files of one kind (a key of SUFFIXES) by split; if no file name contains a split, all files are in the split "".

    `left_out` and `notes` are defined as in Source.
    """

    root: Path
    kind: str
    splits: dict[str, list[Path]]
    left_out: LeftOut = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def choose(
        self, split: str | None, count: Callable[[Sequence[Path]], str], *, skip_missing: bool
    ) -> tuple[list[Path], list[str]]:
        """Return the files of a split, `train` by default, and notes.

        `count` summarizes the content of files for the notes. Raises UserError if the split does not exist, and, unless
        `skip_missing`, if the file names show that files are missing.
        """
        paths, notes = self._of_split(split, count)
        if missing := missing_parts(paths):
            if not skip_missing:
                raise UserError(
                    f"{self.root}: {missing}: download the missing files, or read the existing ones with --skip-bad"
                )
            notes.append(f"{missing}: the existing files are read")
        if numbers := gaps(paths):
            notes.append(f"no file has the number {numbers}, but files with lower and higher numbers exist")
        return paths, notes

    def _of_split(self, split: str | None, count: Callable[[Sequence[Path]], str]) -> tuple[list[Path], list[str]]:
        if list(self.splits) == [""]:
            if split is not None:
                raise UserError(f"--split={split}: {self.root} has no splits: leave the option out")
            return self.splits[""], []
        chosen = _canonical(split) if split else "train" if len(self.splits) > 1 else next(iter(self.splits))
        shown = ", ".join(f"{name} {count(files)}" for name, files in sorted(self.splits.items()))
        if chosen == "all":
            return [file for _, files in sorted(self.splits.items()) for file in files], [
                f"splits: {shown}: all are read"
            ]
        if chosen not in self.splits:
            raise UserError(
                f"{self.root} has the splits {shown}"
                f"{f', but not {split}' if split else ''}: choose one as --split=NAME, or --split=all"
            )
        if len(self.splits) == 1:
            return self.splits[chosen], []
        others = "" if split else "; --split=NAME reads another split, --split=all reads all splits"
        return self.splits[chosen], [f"splits: {shown}: {chosen} is read{others}"]


def find_parts(path: Path, listing: Listing | None) -> Parts | None:
    """Find the tables or tar shards of a folder, or recognize a single table file; None for anything else.

    `listing` is the list of files of a folder, None for a file. In a folder, the dataset is the kind with the
    most bytes, unless `_are_dataset` selects the images. Raises UserError for datasets saved by the library `datasets`
    in an unsupported format.
    """
    if listing is None:
        kind = next((kind for kind in ("parquet", "arrow") if path.name.lower().endswith(SUFFIXES[kind])), None)
        return Parts(root=path, kind=kind, splits={"": [path]}) if kind else None
    if (path / "dataset_dict.json").is_file():
        return Parts(root=path, kind="arrow", splits=_saved_splits(path))
    if (path / "state.json").is_file():
        return Parts(root=path, kind="arrow", splits={"": _saved_files(path)})
    files, links = listing
    if not any(name.lower().endswith(_ALL_SUFFIXES) for name in files):
        return None
    images, left_out = split_images(files)
    found = {kind: _of_kind(left_out, suffixes) for kind, suffixes in SUFFIXES.items()}
    by_kind = {kind: names for kind, names in found.items() if not all(map(_is_cache, names))}
    if not by_kind:
        return None
    kind = max(by_kind, key=lambda kind: _total_size(path, by_kind[kind]))
    names = sorted(by_kind[kind])
    if images and not _are_dataset(path, kind, names, images):
        return None
    selected = set(names)
    others = {other: [name for name in found if name not in selected] for other, found in left_out.items()}
    others |= {"images beside them": images, "caches of datasets": list(filter(_is_cache, names)), **links}
    parts = [name for name in names if not _is_cache(name)]
    return Parts(
        root=path,
        kind=kind,
        splits=_by_split(path, parts, are_tables=kind != "tar"),
        left_out={other: found for other, found in others.items() if found},
        notes=_note_on_images(kind, parts, images),
    )


def _are_dataset(root: Path, kind: str, names: list[str], images: list[str]) -> bool:
    """Return whether tables or shards, rather than the images beside them, are the dataset.

    The tables or shards must have more bytes than the images. They must also be at least as numerous, or be named like
    parts, such as `0017.tar` or `train.parquet`. A single `train.tar` may be an archive of the same images.
    """
    files = [name.rpartition("/")[2] for name in names]
    are_parts = any(_SERIAL.search(file) or (kind != "tar" and split_of(file)) for file in files)
    return (are_parts or len(names) >= len(images)) and _total_size(root, names) > _total_size(root, images)


def _note_on_images(kind: str, parts: list[str], images: list[str]) -> list[str]:
    """Return a note if images are ignored in favour of tables or tar files."""
    if not images:
        return []
    are = "is" if len(parts) == 1 else "are"
    return [
        f"{counted(len(parts), f'.{kind} file')} {are} read, not {counted(len(images), 'image')} beside them, such as "
        f"{images[0]!r:.80}: to read the images, give a folder with images only"
    ]


def note_on_parts(left_out: LeftOut) -> list[str]:
    """Return a note if tables or tar files are ignored in favour of images."""
    names = sorted(_of_kind(left_out, _ALL_SUFFIXES))
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"the images are read, not {names[0]!r:.80}{more} beside them: to read such a file, give it as --source"]


def _of_kind(left_out: LeftOut, suffixes: tuple[str, ...]) -> list[str]:
    """Return the visible files with the given suffixes."""
    visible = chain.from_iterable(names for kind, names in left_out.items() if kind.startswith("."))
    return [name for name in visible if name.lower().endswith(suffixes)]


def _total_size(root: Path, names: Iterable[str]) -> int:
    return sum((root / name).stat().st_size for name in names if (root / name).is_file())


def _is_cache(name: str) -> bool:
    """Return whether a file is a cache of `Dataset.map`, which duplicates the images of the dataset."""
    return re.search(r"(^|/)(cache-\w+|tmp\w{8})\.arrow$", name) is not None


def _by_split(root: Path, names: list[str], *, are_tables: bool) -> dict[str, list[Path]]:
    """Group files by split. Raises UserError if a folder contains several datasets of tables."""
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_of(name), []).append(name)
    if len(splits) > 1 and "" in splits:
        splits.setdefault(_OTHERS, []).extend(splits.pop(""))
    if are_tables:
        _refuse_partitions(root, names)
    for files in splits.values() if are_tables else ():
        _refuse_configurations(root, files)
    return {split: [root / name for name in files] for split, files in splits.items()}


def _refuse_configurations(root: Path, files: list[str]) -> None:
    """Raise UserError if several folders contain the same file name, as for the configurations of a dataset."""
    folders: dict[str, list[str]] = {}
    for name in files:
        folder, _, file = name.rpartition("/")
        folders.setdefault(re.sub(r"-of-\d+", "", file), []).append(folder or ".")
    for file, found in folders.items():
        if len(set(found)) > 1:
            raise UserError(
                f"{root} holds several datasets, with a {file} in each of {', '.join(sorted(set(found))):.200}: give "
                "one of these folders"
            )


def _refuse_partitions(root: Path, names: list[str]) -> None:
    """Raise UserError if labels are stored in folder names such as `label=cat/` rather than in a column."""
    for name in names:
        for folder in name.split("/")[:-1]:
            key, equals, _ = folder.partition("=")
            if equals and key.lower() in LABEL_NAMES:
                raise UserError(
                    f"{root}: the labels are in folder names, such as {folder!r:.80}, which is not supported: convert "
                    "them to a column with pyarrow.parquet: "
                    f"parquet.write_table(parquet.read_table({str(root)!r}), 'FILE.parquet')"
                )


def split_of(name: str) -> str:
    """Return the split in a path: train, validation, test, or NAME of NAME-00000-of-00005; "" if absent."""
    *folders, file = name.split("/")
    stem = file.partition(".")[0]
    if (numbered := _NUMBERED.fullmatch(stem)) and numbered[1] != "data":
        return _canonical(numbered[1])
    for text in (stem, *reversed(folders)):
        words = [word for word in re.split(r"[-_. ]", text.lower()) if word in SPLITS]
        if words:
            return _canonical(words[-1])
    return ""


def _canonical(split: str) -> str:
    return SPLITS.get(split.lower(), split)


def _saved_splits(path: Path) -> dict[str, list[Path]]:
    """Return the files of a dataset saved by `DatasetDict.save_to_disk`, by split."""
    names: Any = _read_object(path / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names or not all(map(_is_plain_name, names)):
        raise UserError(f'{path / "dataset_dict.json"} has no list of folders as "splits": save the dataset again')
    return {_canonical(name): _saved_files(path / name) for name in names}


def _saved_files(path: Path) -> list[Path]:
    """Return the files of a dataset saved by `Dataset.save_to_disk`, in order."""
    state = _read_object(path / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{path} was saved with an indices mapping: save dataset.flatten_indices() instead")
    files = state.get("_data_files")
    names: Any = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or len(names) != len(files or ()) or not all(map(_is_plain_name, names)):
        raise UserError(f'{path / "state.json"} has no list of files as "_data_files": save the dataset again')
    return [path / name for name in names]


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_regular(path, _MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({describe_error(error)}): save the dataset again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: save the dataset again")
    return content


def snapshot_folder(path: Path) -> Path:
    """Return the snapshot folder of a repository in a hub cache, `datasets--USER--NAME`; `path` for other folders.

    Raises UserError if the cache has several snapshots and no valid reference to the current one.
    """
    folder = path / "snapshots"
    if not folder.is_dir() or not (path / "refs").is_dir():
        return path
    try:
        current = read_regular(path / "refs" / "main", 256).decode(errors="replace").strip()
    except OSError:
        current = ""
    if _is_plain_name(current) and (folder / current).is_dir():
        return folder / current
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} snapshots ({', '.join(found):.200}): give the folder of one snapshot"
        )
    return folder / found[0]
