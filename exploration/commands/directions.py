"""Options of `generate.py directions`; exploration/directions.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import IntRanges, Script, call, option, with_options
from exploration.commands.options import MODEL_OPTIONS, OUTDIR, PROJECTED


@click.command("directions", cls=Script)
@with_options(MODEL_OPTIONS)
@option(
    "--method",
    type=click.Choice(["sefa", "pca", "mean", "linear"]),
    default="sefa",
    show_default=True,
    help="sefa: eigenvectors of the layers' weights; pca: principal components of w; mean, linear: from --negative to "
    "--positive, by the means or by a linear classifier.",
)
@option("--styles", default="all", show_default=True, help="Which styles to look at and to move, as for mix.")
@option("--components", type=click.IntRange(min=1), help="How many, of sefa and pca.  [default: 5]")
@option("--samples", type=click.IntRange(min=2), default=10_000, show_default=True, help="w drawn for their spread.")
@option("--positive", type=IntRanges(), help="Seeds of images that have an attribute.")
@option("--negative", type=IntRanges(), help="Seeds of images that do not have it.")
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the images to edit.")
@PROJECTED
@option("--strength", type=float, default=3.0, show_default=True, help="Largest edit, in standard deviations of w.")
@option("--steps", type=click.IntRange(min=2), default=7, show_default=True, help="Edits of each image.")
@option("--save", type=click.Path(path_type=Path), help=".npz or .safetensors.  [default: directions.npz in --outdir]")
@OUTDIR
def directions(**options: Any) -> None:
    """Find directions of w that change images in one way, and draw strips of edits.

    \b
    python generate.py directions --network=docs/shapes.pkl --method=sefa --styles=coarse --seeds=0-3 --outdir=out
    python generate.py --network=docs/shapes.pkl --seeds=7 --direction=out/directions.npz:0 --strength=2 --outdir=out
    """
    call("exploration.directions:draw_directions", **options)
