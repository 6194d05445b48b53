"""Selection of styles by index or by the name of a style group, such as `0-3,5` or `coarse`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dnnlib.config import UserError


def choose_styles(
    text: str, num_ws: int, groups: Mapping[str, Sequence[int]], where: str | None = None
) -> tuple[int, ...]:
    """Parse style indices such as '0-3,5', 'coarse,7' or 'all' into sorted, unique indices.

    Raises UserError, prefixed with `where`, for a part that is not an index below num_ws, a range, or a style group of
    the network.
    """
    where = where or f"--styles={text}"
    chosen: set[int] = set()
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if part == "all":
            chosen |= set(range(num_ws))
        elif part in groups:
            chosen |= set(groups[part])
        elif match and int(match[1]) <= int(match[2] or match[1]) < num_ws:
            chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        elif num_ws == 1:
            raise UserError(f"{where}: this generator has a single style, without layers to choose from: give all")
        else:
            names = ", ".join(["all", *(f"{name} ({format_ranges(indices)})" for name, indices in groups.items())])
            raise UserError(f"{where}: {part!r} is not a style; choose from {format_ranges(range(num_ws))}, {names}")
    return tuple(sorted(chosen))


def format_ranges(indices: Sequence[int]) -> str:
    """Format ascending indices as ranges: (0, 1, 2, 5) as '0-2,5'."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def describe_styles(chosen: Sequence[int], num_ws: int, groups: Mapping[str, Sequence[int]]) -> str:
    """Return e.g. "style 0 (coarse)", "styles 1,4-5" or "all styles"."""
    if len(chosen) == num_ws:
        return "all styles"
    names = [f" ({name})" for name, indices in groups.items() if tuple(indices) == tuple(chosen)]
    return f"style{'s' * (len(chosen) != 1)} {format_ranges(chosen)}{''.join(names[:1])}"
