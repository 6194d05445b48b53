"""Style mixing: some layers use the styles of one image, and the other layers use the styles of a second image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib.util import counted
from exploration.directions import edited, read_edits
from exploration.model import check_seeds, gather_styles
from exploration.opening import open_model
from exploration.output import make_outdir, save_batches
from exploration.style_groups import choose_styles, describe_styles
from torch_utils.images import save_pixels
from torch_utils.sheets import caption_of, sheet, tiles_of


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
    direction: Sequence[str],
    strength: Sequence[float],
    outdir: Path,
    **options: Any,
) -> None:
    """Run `generate.py mix`."""
    edits = read_edits(direction, strength)
    model = open_model(**options)
    groups = getattr(model.G, "style_groups", {})
    chosen = choose_styles(styles, model.G.num_ws, groups)
    check_seeds("--rows", rows)
    check_seeds("--cols", cols)
    row_names, row_ws = gather_styles(model, rows, projected_w, flag="--rows", name="{}")
    col_ws = model.styles_of(cols)
    mixed = mix(row_ws, col_ws, chosen)  # (R, C, num_ws, w_dim)
    (batch,) = edited(iter([mixed.flatten(0, 1)]), edits, model)
    make_outdir(outdir)
    names = [f"{row}-{col}" for row in row_names for col in cols]
    made = torch.cat(save_batches(model.render(batch), names, outdir, keep=True))
    left, top = model.images(torch.cat([row_ws, col_ws])).split([len(row_ws), len(col_ws)])
    made = made.unflatten(0, (len(row_ws), len(col_ws)))
    described = describe_styles(chosen, model.G.num_ws, groups)
    title = f"{described.capitalize()} from the column" + ", all others from the row" * (len(chosen) < model.G.num_ws)
    save_pixels(mixing_sheet(left, top, made, row_names, [str(col) for col in cols], title), outdir / "grid.png")
    click.echo(
        f"{counted(len(names), 'mixture')} in {outdir}, with {described} of the column images; grid.png shows all "
        "mixtures"
    )
