"""Sizes of images: a mixture in words, the size that a set of it should have, and the command that builds that set."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

Size = tuple[int, int]  # (width, height)

CHANNEL_NAMES = {1: "grayscale", 3: "RGB", 4: "RGBA"}
SMALLEST, LARGEST = 8, 1024  # sides of the sizes that are suggested
REACHING = 0.9  # of the images are not enlarged


def describe_sizes(sizes: Counter[Size]) -> str:
    """Return '37 sizes, 120x90 to 4000x3000' (width x height, by area), of a single size '120x90'."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    first, last = (f"{width}x{height}" for width, height in (ordered[0], ordered[-1]))
    return first if len(ordered) == 1 else f"{len(ordered)} sizes, {first} to {last}"


def describe_channels(channels: Counter[int]) -> str:
    """Return '480 RGB, 20 grayscale', the most common first."""
    return ", ".join(f"{count} {CHANNEL_NAMES[kind]}" for kind, count in channels.most_common())


def candidate_sizes(sizes: Counter[Size], base: Size = (SMALLEST, SMALLEST)) -> list[Size]:
    """List `base` times powers of two, sides of 8 to 1024 pixels, best first: (width, height).

    The best is the largest that 90 % of the images reach with both sides. Then come smaller ones, at last larger ones.
    """
    doubled = [(base[0] << n, base[1] << n) for n in range(LARGEST.bit_length())]
    allowed = [size for size in doubled if SMALLEST <= min(size) and max(size) <= LARGEST]
    needed = REACHING * sizes.total()
    reached = {(w, h): sum(count for (W, H), count in sizes.items() if W >= w and H >= h) >= needed for w, h in allowed}
    return [size for size in reversed(allowed) if reached[size]] + [size for size in allowed if not reached[size]]


def suggest_size(sizes: Counter[Size]) -> Size:
    """Return the side, twice, of the largest power of two that 90 % of the images reach with their shorter side."""
    return candidate_sizes(sizes)[0]


def build_command(
    source: str | Path, size: Size | None = None, *, channels: int | None = None, skip_bad: bool = False
) -> str:
    """Return the command line that builds a set from `source`, cropped to `size` if that is given."""
    path = Path(source)
    name = (path.stem if path.suffix.lower() == ".zip" else path.resolve().name) or "images"
    shape = "" if size is None else f"-{size[0]}x{size[1]}"
    dest = Path("data", f"{name}.zip")
    if dest.exists():
        dest = Path("data", f"{name}{shape or '-built'}.zip")
    words = [f"--source={shlex.quote(str(source))}", f"--dest={shlex.quote(dest.as_posix())}"]
    words += ["--transform=center-crop", f"--width={size[0]}", f"--height={size[1]}"] if size else []
    words += [f"--channels={channels}"] if channels else []
    words += ["--skip-bad"] if skip_bad else []
    return " ".join(["python dataset_tool.py", *words])
