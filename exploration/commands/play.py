"""Options of `generate.py play`, implemented in exploration/play.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import FileOrURL, Script, call, option, with_options
from exploration.commands.options import BATCH, DEVICE, EMA, LABEL, PRECISION, PROJECTED


@click.command("play", cls=Script)
@option("--network", required=True, type=FileOrURL(), help="Snapshot, its URL, or the folder of a run: all snapshots.")
@with_options((EMA, LABEL))
@PROJECTED
@option(
    "--directions",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File of `directions`, whose sliders the page offers. Can be repeated.",
)
@with_options((BATCH, PRECISION, DEVICE))
@option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port.")
def play(**options: Any) -> None:
    """Explore images, edits, style mixing, morphs and attention in a browser on this machine.

    \b
    python generate.py play --network=docs/shapes.pkl
    python generate.py play --network=runs/00000-mine-cifar-gpus1-batch32
    """
    call("exploration.play:play", **options)
