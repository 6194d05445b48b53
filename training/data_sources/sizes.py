"""Sizes of images: described, and counted in powers of two."""

from __future__ import annotations

from collections import Counter

Sizes = Counter[tuple[int, int]]  # images by (width, height)


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


def size_options(sizes: Sizes) -> list[str]:
    """Return options of dataset_tool.py that make the images one size."""
    side = 8
    return ["--transform=center-crop", f"--width={side}", f"--height={side}"]
