"""Style mixing: some layers use the styles of one image, and the other layers use the styles of a second image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib.config import UserError
from dnnlib.util import counted
from exploration.model import check_seeds, gather_styles
from exploration.opening import open_model
from exploration.output import make_outdir, save_batches
from torch_utils.images import save_pixels
from torch_utils.sheets import caption_of, sheet, tiles_of


def choose_styles(text: str, num_ws: int, groups: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Parse style indices such as '0-3,5', 'coarse,7' or 'all' into sorted, unique indices.

    Raises UserError for a part that is not an index below num_ws, a range, or a style group of the network.
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
        elif num_ws == 1:
            raise UserError(
                f"--styles={text}: this generator has a single style, without layers to mix: give --styles=all"
            )
        else:
            names = ", ".join(["all", *(f"{name} ({format_ranges(indices)})" for name, indices in groups.items())])
            raise UserError(
                f"--styles={text}: {part!r} is not a style; choose from {format_ranges(range(num_ws))}, {names}"
            )
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


def mix(rows: Tensor, cols: Tensor, styles: Sequence[int]) -> Tensor:
    """Combine rows (R, num_ws, w_dim) and cols (C, num_ws, w_dim) into mixtures (R, C, num_ws, w_dim).

    The indices `styles` come from the column image, all others from the row image.
    """
    mixed = rows[:, None].repeat(1, len(cols), 1, 1)
    mixed[:, :, list(styles)] = cols[None, :, list(styles)]
    return mixed


def mixing_sheet(
    rows: Tensor, cols: Tensor, mixed: Tensor, row_names: Sequence[str], col_names: Sequence[str], title: str
) -> np.ndarray:
    """Draw a sheet of uint8 images: row images (R, C, H, W) on the left, column images on top, mixtures inside."""
    columns = 1 + len(cols)
    lines = [
        [left, *tiles_of(mixtures, columns)] for left, mixtures in zip(tiles_of(rows, columns), mixed, strict=True)
    ]
    corner = np.full_like(lines[0][0], 255)
    captions, row_captions = (["", *map(caption_of, names)] for names in (col_names, row_names))
    return sheet([[corner, *tiles_of(cols, columns)], *lines], captions, row_captions, title=title, has_frame=True)


def make_mixtures(
    *,
    rows: tuple[int, ...] | None,
    projected_w: Path | None,
    cols: tuple[int, ...],
    styles: str,
    outdir: Path,
    **options: Any,
) -> None:
    """Run `generate.py mix`."""
    model = open_model(**options)
    groups = getattr(model.G, "style_groups", {})
    chosen = choose_styles(styles, model.G.num_ws, groups)
    check_seeds("--rows", rows)
    check_seeds("--cols", cols)
    row_names, row_ws = gather_styles(model, rows, projected_w, flag="--rows", name="{}")
    col_ws = model.styles_of(cols)
    make_outdir(outdir)
    mixed = mix(row_ws, col_ws, chosen)  # (R, C, num_ws, w_dim)
    names = [f"{row}-{col}" for row in row_names for col in cols]
    made = torch.cat(save_batches(model.render(mixed.flatten(0, 1)), names, outdir, keep=True))
    left, top = model.images(torch.cat([row_ws, col_ws])).split([len(row_ws), len(col_ws)])
    made = made.unflatten(0, (len(row_ws), len(col_ws)))
    described = describe_styles(chosen, model.G.num_ws, groups)
    title = f"{described.capitalize()} from the column" + ", all others from the row" * (len(chosen) < model.G.num_ws)
    save_pixels(mixing_sheet(left, top, made, row_names, [str(col) for col in cols], title), outdir / "grid.png")
    click.echo(
        f"{counted(len(names), 'mixture')} in {outdir}, with {described} of the column images; grid.png shows all "
        "mixtures"
    )
