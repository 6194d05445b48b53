"""Options of `generate.py mix`, implemented in exploration/mixing.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import Decorator, IntRanges, Script, call, option, with_options
from exploration.commands.options import DIRECTION, MODEL_OPTIONS, OUTDIR, POSE_OPTIONS, STRENGTH

MIX_OPTIONS = (
    *MODEL_OPTIONS,
    option("--rows", type=IntRanges(), help="Seeds of the row images."),
    option("--projected-w", type=click.Path(path_type=Path), help="Saved styles of further row images, above --rows."),
    option("--cols", required=True, type=IntRanges(), help="Seeds of the column images."),
    DIRECTION,
    STRENGTH,
    *POSE_OPTIONS,
    OUTDIR,
)


def mixed_styles(default: str) -> Decorator:
    """Return the --styles option of a mixing command."""
    return option(
        "--styles",
        "--col-styles",
        default=default,
        show_default=True,
        help="Styles taken from the column image: indices such as 0-3,5, or names of style groups. Other styles come "
        "from the row image.",
    )


@click.command("mix", cls=Script)
@with_options(MIX_OPTIONS)
@mixed_styles("coarse")
def mix(**options: Any) -> None:
    """Mix the styles of row and column images, and draw the mixtures as a grid.

    Style groups: coarse, middle and fine are the lower, middle and upper third of the resolutions; a Styleformer-C also
    has transformer (layout) and conv (colour).

    \b
    python generate.py mix --network=docs/shapes.pkl --rows=0-3 --cols=4-9 --styles=coarse --outdir=out
    """
    call("exploration.mixing:make_mixtures", **options)
