"""Options of `generate.py play`, implemented in exploration/play.py."""

from __future__ import annotations

from typing import Any

import click

from dnnlib.cli import Script, call, option, with_options
from exploration.commands.options import BATCH, DEVICE, EMA, LABEL, NETWORK, PRECISION


@click.command("play", cls=Script)
@with_options((NETWORK, EMA, LABEL, BATCH, PRECISION, DEVICE))
@option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port.")
def play(**options: Any) -> None:
    """Explore seeds, truncation, mixing and attention in a browser on this machine.

    \b
    python generate.py play --network=docs/shapes.pkl
    """
    call("exploration.play:play", **options)
