"""Sizes of images: described, counted, and the size that a set of them should have."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dnnlib.util import counted

Shape = tuple[int, int, int]  # (H, W, C)
Size = tuple[int, int]  # (width, height)
Sizes = Counter[Size]  # number of images by size

CHANNEL_NAMES = {1: "grayscale", 3: "RGB", 4: "RGBA"}
MIN_SIDE, MAX_SIDE = 8, 1024  # sides of the sizes that are suggested
REACHING = 0.9  # of the images need not be enlarged
MAJORITY = 0.9  # of the images are of one shape where the others are called exceptions


def sizes_of(shapes: Mapping[Shape, int]) -> Sizes:
    """Count images by (width, height), from their number by shape."""
    sizes: Sizes = Counter()
    for (H, W, _), count in shapes.items():
        sizes[W, H] += count
    return sizes


def channels_of(shapes: Mapping[Shape, int]) -> Counter[int]:
    """Count images by number of channels, from their number by shape."""
    channels: Counter[int] = Counter()
    for (_, _, C), count in shapes.items():
        channels[C] += count
    return channels


def describe_shape(shape: tuple[int, ...]) -> str:
    """Return (H, W, C) as "32x48 RGB", width before height."""
    return f"{shape[1]}x{shape[0]} {CHANNEL_NAMES[shape[2]]}"


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


def candidate_sizes(sizes: Sizes, base: Size = (MIN_SIDE, MIN_SIDE)) -> list[Size]:
    """List `base` times powers of two with sides of 8 to 1024 pixels, the best size for a set of such images first.

    That is the largest that 90 % of the images reach with both sides. Then come smaller ones, at last larger ones.
    """
    doubled = [(base[0] << n, base[1] << n) for n in range(MAX_SIDE.bit_length())]
    allowed = [size for size in doubled if min(size) >= MIN_SIDE and max(size) <= MAX_SIDE]
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


@dataclass
class Survey:
    """Shapes (H, W, C) of images: how many have each, the first one's name, and those that cannot be read, and why."""

    counts: Counter[Shape] = field(default_factory=Counter)
    firsts: dict[Shape, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def note(self, name: str, shape: Shape) -> None:
        """Count an image."""
        self.counts[shape] += 1
        self.firsts.setdefault(shape, name)

    def describe_mixture(self, source: str, choose_size: Callable[[Sizes], Size | None]) -> str | None:
        """Say what keeps the images from being a set, and the command that builds one; None if nothing does."""
        sizes, channels = sizes_of(self.counts), channels_of(self.counts)
        if len(self.counts) < 2 and not self.broken:
            return None
        found = [counted(self.counts.total() + len(self.broken), "image")]
        if len(sizes) > 1:
            found[0] += f" of {describe_sizes(sizes)}"
        if len(channels) > 1:
            found += [f"{count:,} {CHANNEL_NAMES[kind]}" for kind, count in channels.most_common()]
        found += self._exceptions()
        if self.broken:
            found.append(f"{len(self.broken):,} cannot be read, the first is {self.broken[0]}")
        kind = "one size" if len(sizes) > 1 else "one kind" if len(channels) > 1 else "the others"
        return f"{', '.join(found)}: build a set of {kind} first: {build_command(source, *self.options(choose_size))}"

    def options(self, choose_size: Callable[[Sizes], Size | None]) -> list[str]:
        """Return the options of dataset_tool.py that make the images a set."""
        sizes = sizes_of(self.counts)
        crop = crop_options(choose_size(sizes) or suggest_size(sizes)) if len(sizes) > 1 else []
        return crop + (["--skip-bad"] if self.broken else [])

    def _exceptions(self) -> list[str]:
        """Name the first image that is not as most are; none where they differ all around."""
        if len(self.counts) < 2:
            return []
        usual, count = self.counts.most_common(1)[0]
        if count < MAJORITY * self.counts.total():
            return []
        shape, name = next(first for first in self.firsts.items() if first[0] != usual)
        return [f"the first that differs is {name!r}, {describe_shape(shape)}"]
