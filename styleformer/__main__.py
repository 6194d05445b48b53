"""`python -m styleformer`: the `styleformer` command, for torchrun and for inactive environments."""

from __future__ import annotations

import os
import sys


def without_working_directory(path: list[str]) -> list[str]:
    """Return sys.path without the working directory that `python -m` prepends, unless it contains this package.

    Otherwise the user's own `train.py` or `training` folder would shadow the modules of this project.
    """
    front = os.path.realpath(path[0] or os.curdir)
    ours = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
    is_working_directory = not sys.flags.safe_path and front == os.path.realpath(os.curdir)
    return path[1:] if is_working_directory and front != ours else path


if __name__ == "__main__":
    sys.path[:] = without_working_directory(sys.path)
    from styleformer.command import main

    main()
