"""Projection of one image by the flags and file names of StyleGAN2-ADA's script; the same as `generate.py project`.

python projector.py --outdir=out --target=photo.png --network=SNAPSHOT
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import Script, option, switch, with_options
from dnnlib.config import UserError
from generate import (
    CLASS,
    DEVICE,
    FIXED_NOISE,
    LABEL,
    NETWORK,
    OUTDIR,
    PRECISION,
    PROJECTION_OPTIONS,
    prepare_projection,
    run_projection,
)
from torch_utils.images import save_image


@click.command(cls=Script)
@with_options((NETWORK, CLASS, LABEL, FIXED_NOISE, PRECISION, DEVICE))
@option("--target", required=True, type=click.Path(path_type=Path), help="The image to look for.")
@with_options(PROJECTION_OPTIONS)
@option("--seed", type=int, default=303, show_default=True, help="Seed of what is drawn.")
@switch("--save-video", default=True, show_default=True, help="Film the optimisation beside its target: proj.mp4.")
@OUTDIR
def main(target: Path, save_video: bool, outdir: Path, **options: Any) -> None:
    """Look for the styles of one image, as `generate.py project` does for many.

    Writes target.png (the image as it is compared, cropped and resized), proj.png, projected_w.npz and proj.mp4.

    \b
    python projector.py --outdir=out --target=photo.png --network=SNAPSHOT
    python generate.py --outdir=out --projected-w=out/projected_w.npz --network=SNAPSHOT
    """
    job = prepare_projection(target=target, batch=1, **options)
    if len(job.names) > 1:
        raise UserError(f"--target={target}: {len(job.names)} images; name one, or use generate.py project")
    run_projection(job, outdir, ["proj"], save_video=save_video)
    save_image(job.targets[0], outdir / "target.png")
    click.echo(f"1 projection in {outdir}; its styles are in projected_w.npz, for generate.py --projected-w")


if __name__ == "__main__":
    main()
