"""Options of `generate.py mix`; exploration/mixing.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import Decorator, IntRanges, Script, call, option, with_options
from exploration.commands.options import MODEL_OPTIONS, OUTDIR

MIX_OPTIONS = (
    *MODEL_OPTIONS,
    option("--rows", type=IntRanges(), help="Seeds of the rows' images."),
    option("--projected-w", type=click.Path(path_type=Path), help="Saved styles, for rows before those of --rows."),
    option("--cols", required=True, type=IntRanges(), help="Seeds of the columns' images."),
    OUTDIR,
)


def mixed_styles(default: str) -> Decorator:
    """--styles of a command that mixes."""
    return option(
        "--styles",
        "--col-styles",
        default=default,
        show_default=True,
        help="Which styles come from the column's image: 0-3,5, or names that the network has for them; all others are "
        "the row's.",
    )


@click.command("mix", cls=Script)
@with_options(MIX_OPTIONS)
@mixed_styles("coarse")
def mix(**options: Any) -> None:
    """Mix the styles of two images: a grid of rows and columns.

    Coarse, middle and fine are the styles of the lower, middle and upper third of the resolutions; a Styleformer-C also
    has transformer (layout) and conv (colour).

    \b
    python generate.py mix --network=docs/shapes.pkl --rows=0-3 --cols=4-9 --styles=coarse --outdir=out
    """
    call("exploration.mixing:make_mixtures", **options)
