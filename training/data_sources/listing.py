"""Listing of the files of a folder or archive: images, and all other files by kind."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.images import IMAGE_SUFFIXES, remedy
from dnnlib.screen import printable

# Folders in which other programs store copies and thumbnails. Names that start with a dot are hidden as well.
TOOL_FOLDERS = frozenset(
    (
        *("@eaDir", "@Recycle", "@Recently-Snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot"),  # file servers
        *("__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
    )
)
_IMAGE_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_MAX_KINDS = 12  # kinds shown without --verbose
_SUFFIX = re.compile(r"\.[a-z0-9_+-]{1,10}")

_PLURAL = re.compile(r"\b(cache|file|folder|image|link|sample)s\b")  # nouns in names of kinds

LINKS, SPECIAL_FILES = "links in a tar file", "sparse or special files in a tar file"
_UNPACK = "to use them, unpack the archive into a folder, and give the folder"
_ADVICE = {LINKS: _UNPACK, SPECIAL_FILES: _UNPACK}

LeftOut = dict[str, list[str]]  # kind, such as ".txt" -> names
Listing = tuple[list[str], LeftOut]  # all files below a folder; links to folders that are not followed


def is_hidden(folder: str) -> bool:
    """Return whether a folder name is hidden or listed in TOOL_FOLDERS."""
    return (folder.startswith(".") and folder not in (".", "..")) or folder in TOOL_FOLDERS


def split_images(names: Iterable[str]) -> tuple[list[str], LeftOut]:
    """Split file names (separator `/`) into sorted images and other files by kind."""
    images: list[str] = []
    left_out: LeftOut = {}
    for name in sorted(names):
        kind = _kind_if_not_image(name)
        if kind is None:
            images.append(name)
        else:
            left_out.setdefault(kind, []).append(name)
    return images, left_out


def hidden_kind(name: str) -> str | None:
    """Return the kind of a hidden file or a file in a hidden folder, None for other files."""
    *folders, file = name.split("/")
    hidden = next(filter(is_hidden, folders), None)
    if hidden is not None:
        return f"in {hidden}/"
    return "hidden files" if file.startswith(".") else None


def _kind_if_not_image(name: str) -> str | None:
    """Return the kind of a file that is not an image, None for an image."""
    if hidden := hidden_kind(name):
        return hidden
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    suffix = f".{ending.lower()}" if dot else ""
    if suffix in _IMAGE_SUFFIXES:
        return None
    return suffix if _SUFFIX.fullmatch(suffix) else "without an extension"


def count_left_out(left_out: LeftOut) -> int:
    return sum(map(len, left_out.values()))


def describe_left_out(left_out: LeftOut, *, verbose: bool) -> list[str]:
    """Describe files that are not images, one line per kind, most frequent first; `verbose` also lists all names."""
    kinds = sorted(left_out, key=lambda kind: (-len(left_out[kind]), kind))
    lines = []
    for kind in kinds if verbose else kinds[:_MAX_KINDS]:
        advice = _ADVICE.get(kind) or remedy(kind)
        lines.append(f"  {printable(_counted_kind(len(left_out[kind]), kind))}{': ' if advice else ''}{advice}")
        if verbose:
            lines += [f"    {printable(name)}" for name in left_out[kind]]
    if len(kinds) > len(lines) and not verbose:
        rest = sum(len(left_out[kind]) for kind in kinds[_MAX_KINDS:])
        lines.append(f"  {rest} of {len(kinds) - _MAX_KINDS} other kinds")
    return lines


def _counted_kind(count: int, kind: str) -> str:
    if count == 1 and not kind.startswith((".", "in ")):
        kind = _PLURAL.sub(r"\1", kind, count=1)
    return f"{count} {kind}"


def list_files(root: Path) -> Listing:
    """List the files below a folder, as relative paths, and the links to folders that are not followed.

    A link to a folder is followed unless the folder has already been read, directly or as part of another folder. Files
    in hidden folders are listed, too. Raises UserError for a folder that cannot be listed.
    """
    names: list[str] = []
    followed: set[tuple[int, int]] = set()
    repeated: list[str] = []
    pending = deque([""])
    while pending:
        start = pending.popleft()
        if start and _identity(root / start) in followed:
            repeated.append(start)
            continue
        files = _walk(root, start, followed, pending)
        names += tqdm(files, desc="listing", unit=" files", disable=None, delay=1, leave=False)
    return names, {"linked folders already read": repeated} if repeated else {}


def _walk(root: Path, start: str, followed: set[tuple[int, int]], links: deque[str]) -> Iterator[str]:
    """Yield the files below `start` in `root`; add folders to `followed`, and links to folders to `links`."""
    for parent, folders, files in os.walk(root / start, onerror=_refuse_folder):
        below = os.path.relpath(parent, root)
        prefix = "" if below == "." else Path(below).as_posix() + "/"
        identity = _identity(parent)
        if identity in followed:  # already read through a link to one of the parents
            folders.clear()
            continue
        followed.add(identity)
        yield from (prefix + file for file in files)
        for folder in sorted(folders):
            if is_hidden(folder):
                yield from _walk_hidden(root, prefix + folder)
            elif os.path.islink(os.path.join(parent, folder)):
                links.append(prefix + folder)
        folders[:] = [folder for folder in folders if not is_hidden(folder)]


def _walk_hidden(root: Path, start: str) -> Iterator[str]:
    """Yield the files in a hidden folder; folders without read permission are skipped."""
    for parent, _, files in os.walk(root / start):
        yield from (f"{Path(os.path.relpath(parent, root)).as_posix()}/{file}" for file in files)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}): check its permissions") from error
