"""Options of `generate.py images`, implemented in exploration/seed_images.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import IntRanges, Script, call, option, switch, with_options
from exploration.commands.options import (
    BATCH,
    CLASS,
    DEVICE,
    DIRECTION,
    EMA,
    LABEL,
    NETWORK,
    POSE_OPTIONS,
    PRECISION,
    PROJECTED,
    STRENGTH,
    TRUNC,
)


@click.command("images", cls=Script)
@NETWORK
@EMA
@option("--seeds", "--seed", type=IntRanges(), help="Seeds, e.g. 0-35,40; a seed always gives the same image.")
@PROJECTED
@option("--outdir", required=True, type=click.Path(path_type=Path), help="Folder for seed0000.png and so on.")
@TRUNC
@CLASS
@LABEL
@option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    show_default=True,
    help="Noise of the network.",
)
@DIRECTION
@STRENGTH
@with_options(POSE_OPTIONS)
@option("--grid", is_flag=True, help="Also write grid.png: all images, enlarged, with their seeds.")
@BATCH
@PRECISION
@switch("--compile", "use_compile", help="Compile the generator; worthwhile for thousands of images.")
@switch("--graphs", "use_graphs", help="Use CUDA graphs; worthwhile for small batches on a GPU.")
@DEVICE
def images(**options: Any) -> None:
    """Generate images with the averaged generator (G_ema) of a snapshot.

    \b
    python generate.py --network=docs/shapes.pkl --seeds=0-35 --outdir=out --grid
    """
    call("exploration.seed_images:make_images", **options)
