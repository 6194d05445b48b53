"""`python -m styleformer`: the command `styleformer`, for torchrun and for environments that are not activated."""

from __future__ import annotations

import os
import sys


def without_working_directory(path: list[str]) -> list[str]:
    """Return a sys.path without the working directory that `python -m` puts in front, unless this package is there.

    A `train.py` or a folder `training` of the user's would otherwise be imported in place of ours.
    """
    front = os.path.realpath(path[0] or os.curdir)
    ours = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
    is_working_directory = not sys.flags.safe_path and front == os.path.realpath(os.curdir)
    return path[1:] if is_working_directory and front != ours else path


if __name__ == "__main__":
    sys.path[:] = without_working_directory(sys.path)
    from styleformer.command import main

    main()
