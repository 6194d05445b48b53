"""Options of `generate.py project`, implemented in exploration/projection.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import NameList, Script, call, option, switch, with_options
from exploration.commands.options import (
    BATCH,
    CLASS,
    DEVICE,
    EMA,
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
        help="Distance: LPIPS, features of the --detector program, or pixels at several scales.  [default: "
        "features if --detector is a program, else lpips]",
    ),
    option(
        "--detector",
        "detectors",
        type=NameList(),
        metavar="FILE,...",
        help="A program (.pt2, TorchScript) that computes features, or the two weight files of LPIPS.",
    ),
    option("--num-steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Optimization steps."),
    option(
        "--space",
        type=click.Choice(["w", "w+"]),
        default="w",
        show_default=True,
        help="w: one style for all layers; w+: one style per layer.",
    ),
    option("--lr", type=float, default=0.1, show_default=True, help="Maximum learning rate."),
    option("--fix-noise", is_flag=True, help="Do not optimize the noise maps of the network."),
)


@click.command("project", cls=Script)
@with_options((NETWORK, EMA, CLASS, LABEL, FIXED_NOISE, BATCH, PRECISION, DEVICE))
@option("--target", required=True, type=click.Path(path_type=Path), help="An image, or a folder or zip of images.")
@with_options(PROJECTION_OPTIONS)
@option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@switch("--save-video", help="Also write proj00.mp4 and so on: the target and the optimization side by side.")
@OUTDIR
def project(**options: Any) -> None:
    """Project images into the latent space of a generator.

    The styles are written to projected_w.npz, which other commands read with --projected-w, and the images of these
    styles to proj00.png and so on. The images use the noise of the network, not the optimized noise.

    \b
    python generate.py project --network=SNAPSHOT --target=photos --outdir=out
    python generate.py --network=SNAPSHOT --projected-w=out/projected_w.npz --outdir=out
    """
    call("exploration.projection:project_images", **options)
