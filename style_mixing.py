"""Style mixing with the flags of StyleGAN2-ADA's style_mixing.py; equivalent to `generate.py mix`.

python style_mixing.py --outdir=out --rows=85,100,75,458,1500 --cols=55,821,1789,293 --network=SNAPSHOT
"""

from __future__ import annotations

from typing import Any

import click

from dnnlib.cli import Script, call, with_options
from exploration.commands.mix import MIX_OPTIONS, mixed_styles


@click.command(cls=Script)
@with_options(MIX_OPTIONS)
@mixed_styles("0-6")
def main(**options: Any) -> None:
    """Mix the styles of row and column images, like `generate.py mix`. Writes ROW-COL.png per pair, and grid.png.

    \b
    python style_mixing.py --outdir=out --rows=85,100,75,458,1500 --cols=55,821,1789,293 --network=SNAPSHOT
    """
    call("exploration.mixing:make_mixtures", **options)


if __name__ == "__main__":
    main()
