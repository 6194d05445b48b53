"""Options of `generate.py project`; exploration/projection.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import NameList, Script, call, option, switch, with_options
from exploration.commands.options import (
    BATCH,
    CLASS,
    DEVICE,
    FIXED_NOISE,
    LABEL,
    NETWORK,
    OUTDIR,
    PRECISION,
)

PROJECTION_OPTIONS = (
    option(
        "--loss",
        type=click.Choice(["lpips", "features", "pixels"]),
        help="Distance: LPIPS, of features of --detector's program, or of pixels at several scales.  [default: "
        "features if there is a program, else lpips]",
    ),
    option(
        "--detector",
        "detectors",
        type=NameList(),
        metavar="FILE,...",
        help="A program (.pt2, TorchScript) for features, or the two files of weights of LPIPS.",
    ),
    option(
        "--num-steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps of the optimisation."
    ),
    option(
        "--space",
        type=click.Choice(["w", "w+"]),
        default="w",
        show_default=True,
        help="One style for all layers, or each.",
    ),
    option("--lr", type=float, default=0.1, show_default=True, help="Largest learning rate."),
    option("--fix-noise", is_flag=True, help="Leave the network's noise as it is, instead of looking for it too."),
)


@click.command("project", cls=Script)
@with_options((NETWORK, CLASS, LABEL, FIXED_NOISE, BATCH, PRECISION, DEVICE))
@option("--target", required=True, type=click.Path(path_type=Path), help="An image, or a folder or zip of images.")
@with_options(PROJECTION_OPTIONS)
@option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
@switch("--save-video", help="Also film the optimisation beside its target: proj00.mp4.")
@OUTDIR
def project(**options: Any) -> None:
    """Look for the styles of given images.

    They are written to projected_w.npz, which other commands take as --projected-w, and their images to proj00.png and
    so on. Those are made with the noise of the network, like all others.

    \b
    python generate.py project --network=SNAPSHOT --target=photos --outdir=out
    python generate.py --network=SNAPSHOT --projected-w=out/projected_w.npz --outdir=out
    """
    call("exploration.projection:project_images", **options)
