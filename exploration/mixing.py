"""Style mixing: some layers of the generator get the styles of one image, the others those of another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dnnlib.config import UserError
from exploration.sheets import sheet, tiles_of


def choose_styles(text: str, num_ws: int, groups: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Return the indices that e.g. '0-3,5', 'coarse,7' or 'all' means, in order and once each.

    Raises UserError for what is neither a number below num_ws nor a range nor a name of the network.
    """
    chosen: set[int] = set()
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if part == "all":
            chosen |= set(range(num_ws))
        elif part in groups:
            chosen |= set(groups[part])
        elif match and int(match[1]) <= int(match[2] or match[1]) < num_ws:
            chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        else:
            names = ", ".join(["all", *(f"{name} ({spell(indices)})" for name, indices in groups.items())])
            raise UserError(
                f"--styles={text}: {part!r} is no choice; this network has {spell(range(num_ws))}, or {names}"
            )
    return tuple(sorted(chosen))


def spell(indices: Sequence[int]) -> str:
    """Write ascending indices as ranges: (0, 1, 2, 5) as '0-2,5'."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def mix(rows: Tensor, cols: Tensor, styles: Sequence[int]) -> Tensor:
    """Combine styles rows (R, num_ws, w_dim) and cols (C, num_ws, w_dim) to (R, C, num_ws, w_dim).

    Those of `styles` come from the column's image, all others from the row's.
    """
    mixed = rows[:, None].repeat(1, len(cols), 1, 1)
    mixed[:, :, list(styles)] = cols[None, :, list(styles)]
    return mixed


def mixing_sheet(rows: Tensor, cols: Tensor, mixed: Tensor) -> np.ndarray:
    """Draw uint8 images: those of the rows (R, C, H, W) on the left, of the columns on top, their mixtures between."""
    lines = [[left, *tiles_of(mixtures)] for left, mixtures in zip(tiles_of(rows), mixed, strict=True)]
    corner = np.full_like(lines[0][0], 255)
    return sheet([[corner, *tiles_of(cols)], *lines], has_frame=True)
