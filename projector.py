"""Projection of one image with the flags and file names of StyleGAN2-ADA's projector.py; see `generate.py project`.

python projector.py --outdir=out --target=photo.png --network=SNAPSHOT
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import Script, call, option, switch, with_options
from exploration.commands.options import CLASS, DEVICE, FIXED_NOISE, LABEL, NETWORK, OUTDIR, PRECISION
from exploration.commands.project import PROJECTION_OPTIONS


@click.command(cls=Script)
@with_options((NETWORK, CLASS, LABEL, FIXED_NOISE, PRECISION, DEVICE))
@option("--target", required=True, type=click.Path(path_type=Path), help="Image to project.")
@with_options(PROJECTION_OPTIONS)
@option("--seed", type=int, default=303, show_default=True, help="Random seed.")
@switch("--save-video", default=True, show_default=True, help="Save a video of the optimisation, proj.mp4.")
@OUTDIR
def main(**options: Any) -> None:
    """Project one image to the latent space W, like `generate.py project` for several images.

    Writes target.png (the target after cropping and resizing), proj.png, projected_w.npz and proj.mp4.

    \b
    python projector.py --outdir=out --target=photo.png --network=SNAPSHOT
    python generate.py --outdir=out --projected-w=out/projected_w.npz --network=SNAPSHOT
    """
    call("exploration.projection:project_image", **options)


if __name__ == "__main__":
    main()
