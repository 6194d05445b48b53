"""Options of `generate.py attention`; exploration/attention_maps.py does the work."""

from __future__ import annotations

from typing import Any

import click

from dnnlib.cli import IntRanges, Script, call, option, with_options
from exploration.commands.options import MODEL_OPTIONS, OUTDIR, PROJECTED


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
    help="Whose attention: a pixel X,Y; grid:N, the centres of N x N cells; most:N, those that are attended to most. "
    "Can be repeated.",
)
@option("--heads", is_flag=True, help="Also draw every head of every block.")
@OUTDIR
def attention(**options: Any) -> None:
    """Draw what positions of an image attend to, in every transformer block.

    \b
    python generate.py attention --network=docs/shapes.pkl --seeds=0-3 --query=16,16 --query=most:2 --outdir=out
    """
    call("exploration.attention_maps:draw_attention", **options)
