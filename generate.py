"""Generate images from a snapshot, and explore the model.

python generate.py --network=docs/shapes.pkl --seeds=0-35 --outdir=out --grid
python generate.py mix --network=docs/shapes.pkl --rows=0-3 --cols=4-9 --styles=coarse --outdir=out

exploration/commands/ defines the options without importing torch; exploration/ implements the commands.
"""

from __future__ import annotations

import click

from dnnlib.cli import DefaultGroup
from exploration.commands.attention import attention
from exploration.commands.directions import directions
from exploration.commands.images import images
from exploration.commands.mix import mix
from exploration.commands.neighbours import neighbours
from exploration.commands.play import play
from exploration.commands.project import project
from exploration.commands.video import video

COMMANDS = (images, mix, video, directions, attention, neighbours, project, play)


@click.group(cls=DefaultGroup, default="images", commands=COMMANDS)
def main() -> None:
    """Generate images from a snapshot, and explore the model."""


if __name__ == "__main__":
    main()
