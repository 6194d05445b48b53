"""Options of `generate.py video`, implemented in exploration/morphing.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import FloatList, IntRanges, Script, call, option, switch, with_options
from exploration.commands.options import MODEL_OPTIONS


class GridSize(click.ParamType):
    """Columns and rows, e.g. 3x2."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", str(value))
        if not match:
            self.fail(f"{value!r} is not a number of columns and rows such as 3x2", param, ctx)
        return int(match[1]), int(match[2])


@click.command("video", cls=Script)
@with_options(MODEL_OPTIONS)
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the keyframes.")
@option("--projected-w", type=click.Path(path_type=Path), help="Saved styles of further keyframes, before --seeds.")
@option("--output", required=True, type=click.Path(path_type=Path), help="Output video, .mp4 or .gif.")
@option(
    "--interpolation",
    type=click.Choice(["w", "z", "spline"]),
    default="w",
    show_default=True,
    help="Interpolation between keyframes: linear in w, spherical in z, or a cubic spline in w.",
)
@option("--grid", type=GridSize(), default="1x1", show_default=True, help="Cells; each shows consecutive keyframes.")
@option(
    "--frames",
    type=click.IntRange(min=1),
    help="Frames per keyframe interval.  [default: 2 s, and at least 4 s in total]",
)
@option("--fps", type=float, default=30, show_default=True, help="Frames per second.")
@switch("--loop", default=True, show_default=True, help="Return to the first keyframe at the end.")
@option("--classes", type=IntRanges(), help="Class labels of the keyframes in a cell, e.g. 0-9.")
@option("--trunc-to", type=float, help="Sweep psi from --trunc to this value, and back with --loop.")
@option("--direction", metavar="FILE:INDEX", help="Sweep an edit along a direction, as in images.")
@option("--strength", type=float, help="Largest edit in both directions, in standard deviations of w.  [default: 3]")
@option(
    "--translate",
    type=FloatList(),
    metavar="X,Y",
    help="Move the image to the right and down during the video, as in images, and back with --loop.",
)
@option(
    "--rotate",
    type=float,
    metavar="DEGREES",
    help="Rotate the image during the video, as in images, and back with --loop; with 360, all the way round.",
)
@option("--scale", type=click.IntRange(min=1), help="Integer upscaling of images.  [default: to at least 128 pixels]")
def video(**options: Any) -> None:
    """Write a video that interpolates between images.

    \b
    python generate.py video --network=docs/shapes.pkl --seeds=0-5 --grid=3x2 --trunc-to=0.2 --output=out/sweep.gif
    python generate.py video --network=SNAPSHOT --seeds=7 --classes=0-9 --interpolation=spline --output=out/classes.mp4
    """
    call("exploration.morphing:make_video", **options)
