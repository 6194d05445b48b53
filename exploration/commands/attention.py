"""Options of `generate.py attention`, implemented in exploration/attention_maps.py."""

from __future__ import annotations

from typing import Any

import click

from dnnlib.cli import IntRanges, Script, call, option, with_options
from exploration.commands.options import MODEL_OPTIONS, OUTDIR, POSE_OPTIONS, PROJECTED


@click.command("attention", cls=Script)
@with_options(MODEL_OPTIONS)
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the images.")
@PROJECTED
@option(
    "--query",
    "queries",
    multiple=True,
    default=("most:3",),
    show_default=True,
    help="Query positions: a pixel X,Y; grid:N, the centres of N x N cells; most:N, the N most attended positions. "
    "Can be repeated.",
)
@with_options(POSE_OPTIONS)
@option("--heads", is_flag=True, help="Also draw each head of each block.")
@OUTDIR
def attention(**options: Any) -> None:
    """Draw the attention maps of chosen positions in every transformer block.

    \b
    python generate.py attention --network=docs/shapes.pkl --seeds=0-3 --query=16,16 --query=most:2 --outdir=out
    """
    call("exploration.attention_maps:draw_attention", **options)
