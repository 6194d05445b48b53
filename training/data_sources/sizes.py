"""Sizes of images: described, counted in powers of two, and the size that a set of them should have."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

Size = tuple[int, int]  # (width, height)
Sizes = Counter[Size]  # number of images by size

CHANNEL_NAMES = {1: "grayscale", 3: "RGB", 4: "RGBA"}
SMALLEST, LARGEST = 8, 1024  # sides of the sizes that are suggested
REACHING = 0.9  # of the images need not be enlarged


def by_short_side(sizes: Sizes) -> dict[str, int]:
    """Count images by their shorter side, in powers of two: "64" stands for 64 to 127 pixels."""
    counts: Counter[int] = Counter()
    for (width, height), count in sizes.items():
        counts[1 << (min(width, height).bit_length() - 1)] += count
    return {str(side): counts[side] for side in sorted(counts)}


def describe_sizes(sizes: Sizes) -> str:
    """Return e.g. '37 sizes, 120x90 to 4000x3000 pixels'."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    smallest, largest = (f"{width}x{height}" for width, height in (ordered[0], ordered[-1]))
    return f"{smallest} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes, {smallest} to {largest} pixels"


def candidate_sizes(sizes: Sizes, base: Size = (SMALLEST, SMALLEST)) -> list[Size]:
    """List `base` times powers of two with sides of 8 to 1024 pixels, the best size for a set of such images first.

    That is the largest that 90 % of the images reach with both sides. Then come smaller ones, at last larger ones.
    """
    doubled = [(base[0] << n, base[1] << n) for n in range(LARGEST.bit_length())]
    allowed = [size for size in doubled if min(size) >= SMALLEST and max(size) <= LARGEST]
    needed = REACHING * sizes.total()
    reached = [size for size in allowed if _count_reaching(sizes, size) >= needed]
    return reached[::-1] + [size for size in allowed if size not in reached]


def _count_reaching(sizes: Sizes, size: Size) -> int:
    return sum(count for (width, height), count in sizes.items() if width >= size[0] and height >= size[1])


def suggest_size(sizes: Sizes) -> Size:
    """Return the square of the largest power of two that 90 % of the images reach with their shorter side."""
    return candidate_sizes(sizes)[0]


def size_options(sizes: Sizes) -> list[str]:
    """Return options of dataset_tool.py that make the images one size, the one that suits them."""
    return crop_options(suggest_size(sizes))


def crop_options(size: Size) -> list[str]:
    """Return options of dataset_tool.py that make all images this size and keep their proportions."""
    return ["--transform=center-crop", f"--width={size[0]}", f"--height={size[1]}"]


def build_command(source: str, *options: str) -> str:
    """Return the command that builds a set from `source` with such options, quoted for the shell."""
    path = Path(source)
    name = (path.stem if path.suffix.lower() == ".zip" else path.resolve().name) or "images"
    dest = Path("data", f"{name}.zip")
    if dest.exists():
        dest = Path("data", f"{name}-built.zip")
    return f"python dataset_tool.py {shlex.join([f'--source={source}', f'--dest={dest.as_posix()}', *options])}"
