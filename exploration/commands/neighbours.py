"""Options of `generate.py neighbours`, implemented in exploration/neighbours.py."""

from __future__ import annotations

from typing import Any

import click

from dnnlib.cli import IntRanges, Script, call, option, with_options
from exploration.commands.options import MODEL_OPTIONS, OUTDIR, PROJECTED


@click.command("neighbours", cls=Script)
@with_options(MODEL_OPTIONS)
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the generated images.")
@PROJECTED
@option("--data", metavar="PATH", help="Training images, zip or folder.  [default: the training dataset]")
@option(
    "--detector",
    metavar="FILE",
    help="Compare features of a network: a program (.pt2, TorchScript), the weight file of Inception or VGG16, or a "
    "DINOv2 folder. A program can do anything: use only files that you trust.  [default: pixels at a low resolution]",
)
@option("--count", type=click.IntRange(1, 32), default=6, show_default=True, help="Training images per row.")
@OUTDIR
def neighbours(**options: Any) -> None:
    """Show generated images beside the most similar training images, to find copies.

    Each row of neighbours.png is a generated image and its nearest training images. Under each training image is its
    distance to the generated image and, for comparison, to the training image that is nearest to it.

    \b
    python generate.py neighbours --network=SNAPSHOT --seeds=0-7 --outdir=out
    python generate.py neighbours --network=SNAPSHOT --seeds=0-7 --data=data/mine.zip --detector=mine.pt2 --outdir=out
    """
    call("exploration.neighbours:show_neighbours", **options)
