"""Measure memory and time of TransGAN's types of attention for increasing grids, as in figure 8 of its paper.

\b
full      among all tokens, as the paper's standard attention
grid      inside windows of --window x --window tokens
axis      within rows, then columns
nystrom   approximated with --landmarks landmarks

All but nystrom have a learned relative position bias per head. Derivatives, `peak_mib`, times and problems are defined
as in benchmarks/self_attention.py: one derivative as in a training step; two as in a gradient penalty, where full, grid
and axis compute their matrices in blocks. The measured code is training/networks/grid_attention.py.

\b
    python benchmarks/grid_attention.py --device=cuda --batch=8
    python benchmarks/grid_attention.py --resolutions=16,32,64 --derivatives=1

Prints one line of JSON for each type, number of derivatives and resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import click
import torch
from self_attention import BLOCKS, DTYPES, MATRICES, SHARED, check_choices, run_cases
from torch import Tensor

from dnnlib.cli import IntList, Script, option, with_options
from dnnlib.config import ConfigError, UserError, check_bounds
from training.networks import execution
from training.networks.blockwise import BLOCK_BYTES
from training.networks.vit import BlockConfig

FORMS = ("full", "grid", "axis", "nystrom")


@dataclass(frozen=True, kw_only=True)
class GridCase:
    """A measurement: type of attention, number of derivatives, side of the square grid, and other sizes."""

    form: str
    derivatives: int
    resolution: int
    batch: int
    heads: int
    head_dim: int
    window: int
    landmarks: int
    dtype: str

    def block_config(self) -> BlockConfig:
        """Return the configuration of a block with this attention. Raises ConfigError if it does not fit the grid."""
        config = BlockConfig(
            num_heads=self.heads,
            attention=self.form,  # type: ignore[arg-type]
            window=self.window,
            landmarks=self.landmarks,
        )
        check_bounds(config)
        config.check_grid((self.resolution, self.resolution))
        return config

    def matrix_gib(self) -> float:
        """Return the predicted memory of the attention matrices and relative position biases in GiB."""
        tokens = self.resolution**2
        keys = {"full": tokens, "grid": self.window**2, "axis": 2 * self.resolution, "nystrom": 2 * self.landmarks}
        matrix = self.heads * tokens * keys[self.form] * 4 / 2**30
        if self.derivatives == 2 and self.form != "nystrom":
            return BLOCKS * BLOCK_BYTES["cpu"] / 2**30 + (MATRICES[1] * matrix if self.form == "full" else 0)
        return MATRICES[self.derivatives] * self.batch * matrix

    def small(self) -> GridCase:
        """Return a tiny case of the same type for the warm-up."""
        return replace(self, form="full" if self.form == "grid" else self.form, resolution=8, landmarks=4)

    def prepare(self, device: torch.device) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Return queries, keys, values and position tables, and a function that computes the output."""
        grid = (self.resolution, self.resolution)
        attention = self.block_config().build_attention(grid, is_full=False).to(device)
        shape = (self.batch, self.resolution**2, self.heads * self.head_dim)
        tokens = [torch.randn(shape, device=device, dtype=DTYPES[self.dtype], requires_grad=True) for _ in range(3)]
        twice = self.derivatives == 2

        def run() -> Tensor:
            with execution.using(twice_differentiable=twice):
                out: Tensor = attention(*tokens)
            return out

        return [*tokens, *attention.parameters()], run


@click.command(cls=Script, help=__doc__)
@option("--resolutions", type=IntList(), default="16,32,64,128,256", show_default=True, help="Sides of the grid.")
@option("--forms", default=",".join(FORMS), show_default=True, help="Types of attention.")
@option("--heads", type=click.IntRange(min=1), default=4, show_default=True, help="Heads H.")
@option("--head-dim", type=click.IntRange(min=1), default=16, show_default=True, help="Channels per head D.")
@option("--window", type=click.IntRange(min=1), default=16, show_default=True, help="Side of a window, in tokens.")
@option("--landmarks", type=click.IntRange(min=1), default=64, show_default=True, help="Landmarks of nystrom.")
@with_options(SHARED)
def main(
    resolutions: tuple[int, ...],
    forms: str,
    heads: int,
    head_dim: int,
    window: int,
    landmarks: int,
    derivatives: tuple[int, ...],
    batch: int,
    dtype: str,
    **machine: Any,
) -> None:
    sizes = partial(GridCase, batch=batch, heads=heads, head_dim=head_dim, window=window, landmarks=landmarks)
    cases = [
        sizes(form=form, derivatives=order, resolution=resolution, dtype=dtype)
        for form in check_choices(forms, FORMS, derivatives)
        for order in derivatives
        for resolution in resolutions
    ]
    for case in cases:
        try:
            case.block_config()
        except ConfigError as error:
            raise UserError(f"--{error.field}={error.value}: {error.problem}") from None
    run_cases("grid_attention", cases, **machine)


if __name__ == "__main__":
    main()
