"""Detection of missing files in a numbered series."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

from dnnlib.util import counted

_K_OF_N = re.compile(r"(.*?)(?<!\d)(\d{3,9})-of-(\d{3,9})")  # prefix of NAME-00000-of-00005.parquet
_SERIAL = re.compile(r"(.*?)(?<!\d)(\d{4,9})(?:\.\D.*)?")  # NAME-000017.tar


def missing_parts(paths: Iterable[Path]) -> str:
    """Return a clause about missing files of series such as NAME-00000-of-00005; '' if all series are complete."""
    groups: dict[tuple[Path, str, int, int], set[int]] = {}
    for path in paths:
        if found := _K_OF_N.match(path.name):
            series = path.parent, found[1], len(found[2]), int(found[3])
            groups.setdefault(series, set()).add(int(found[2]))
    clauses = []
    for (_, prefix, width, total), numbers in groups.items():
        first = 1 if total in numbers and 0 not in numbers else 0
        expected = range(first, first + total)
        if missing := total - sum(number in expected for number in numbers):
            example = next(number for number in expected if number not in numbers)
            are = "is" if missing == 1 else "are"
            name = f"{prefix}{example:0{width}}-of-{total:0{width}}"
            clauses.append(f"{missing:,} of {counted(total, 'file')} {are} missing, such as {name}")
    return "; ".join(clauses)


def gaps(paths: Iterable[Path]) -> str:
    """Return a clause about gaps in a series, such as 00001 between 00000.tar and 00002.tar; '' without gaps."""
    groups: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if not _K_OF_N.match(path.name) and (found := _SERIAL.fullmatch(path.name)) and found[2].startswith("0"):
            groups.setdefault((path.parent, found[1], len(found[2])), set()).add(int(found[2]))
    clauses = []
    for (_, _, width), numbers in groups.items():
        if missing := max(numbers) - min(numbers) + 1 - len(numbers):
            shown = ", ".join(f"{number:0{width}}" for number in islice(_absent(numbers), min(missing, 3)))
            clauses.append(f"{shown}{', ...' if missing > 3 else ''}")
    return "; ".join(clauses)


def _absent(numbers: set[int]) -> Iterator[int]:
    return (number for number in count(min(numbers)) if number not in numbers)
