"""Options of `generate.py directions`, implemented in exploration/directions.py."""

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
    help="sefa: eigenvectors of the style layers' weights; pca: principal components of w; mean, linear: from "
    "--negative to --positive by class means or by a linear classifier.",
)
@option("--styles", default="all", show_default=True, help="Styles to analyse and edit, as in mix.")
@option("--components", type=click.IntRange(min=1), help="Number of directions of sefa or pca.  [default: 5]")
@option("--samples", type=click.IntRange(min=2), default=10_000, show_default=True, help="Number of w samples.")
@option("--positive", type=IntRanges(), help="Seeds of images with an attribute.")
@option("--negative", type=IntRanges(), help="Seeds of images without this attribute.")
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the images to edit.")
@PROJECTED
@option("--strength", type=float, default=3.0, show_default=True, help="Largest edit, in standard deviations of w.")
@option("--steps", type=click.IntRange(min=2), default=7, show_default=True, help="Images per strip.")
@option(
    "--save",
    type=click.Path(path_type=Path),
    help="Output file, .npz or .safetensors.  [default: directions.npz in --outdir]",
)
@OUTDIR
def directions(**options: Any) -> None:
    """Find semantic directions in w, and draw strips of edited images.

    \b
    python generate.py directions --network=docs/shapes.pkl --method=sefa --styles=coarse --seeds=0-3 --outdir=out
    python generate.py --network=docs/shapes.pkl --seeds=7 --direction=out/directions.npz:0 --strength=2 --outdir=out
    """
    call("exploration.directions:draw_directions", **options)
