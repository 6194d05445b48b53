"""Image sizes: counts, descriptions, and the suggested size of a dataset."""

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
MIN_SIDE, MAX_SIDE = 8, 1024  # range of suggested sides
MIN_FRACTION = 0.9  # minimum fraction of images that are at least as large as the suggested size
MAJORITY = 0.9  # minimum fraction of images of one shape for reporting the other images as exceptions


def sizes_of(shapes: Mapping[Shape, int]) -> Sizes:
    """Count images by (width, height), given the counts by shape."""
    sizes: Sizes = Counter()
    for (H, W, _), count in shapes.items():
        sizes[W, H] += count
    return sizes


def channels_of(shapes: Mapping[Shape, int]) -> Counter[int]:
    """Count images by number of channels, given the counts by shape."""
    channels: Counter[int] = Counter()
    for (_, _, C), count in shapes.items():
        channels[C] += count
    return channels


def describe_shape(shape: tuple[int, ...]) -> str:
    """Format (H, W, C) as "WxH RGB", such as "32x48 RGB"."""
    return f"{shape[1]}x{shape[0]} {CHANNEL_NAMES[shape[2]]}"


def by_short_side(sizes: Sizes) -> dict[str, int]:
    """Count images by shorter side, in bins of powers of two: "64" is the bin from 64 to 127 pixels."""
    counts: Counter[int] = Counter()
    for (width, height), count in sizes.items():
        counts[1 << (min(width, height).bit_length() - 1)] += count
    return {str(side): counts[side] for side in sorted(counts)}


def describe_sizes(sizes: Sizes) -> str:
    """Return a summary such as '37 sizes, 120x90 to 4000x3000 pixels'."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    smallest, largest = (f"{width}x{height}" for width, height in (ordered[0], ordered[-1]))
    return f"{smallest} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes, {smallest} to {largest} pixels"


def candidate_sizes(sizes: Sizes, base: Size = (MIN_SIDE, MIN_SIDE)) -> list[Size]:
    """List `base` times powers of two with sides of 8 to 1024 pixels, most suitable size first.

    The first size is the largest that at least 90 % of the images reach on both sides. Smaller sizes follow in
    descending order, then larger sizes in ascending order.
    """
    doubled = [(base[0] << n, base[1] << n) for n in range(MAX_SIDE.bit_length())]
    allowed = [size for size in doubled if min(size) >= MIN_SIDE and max(size) <= MAX_SIDE]
    needed = MIN_FRACTION * sizes.total()
    reached = [size for size in allowed if _count_reaching(sizes, size) >= needed]
    return reached[::-1] + [size for size in allowed if size not in reached]


def _count_reaching(sizes: Sizes, size: Size) -> int:
    return sum(count for (width, height), count in sizes.items() if width >= size[0] and height >= size[1])


def suggest_size(sizes: Sizes) -> Size:
    """Return the largest power-of-two square that fits into at least 90 % of the images."""
    return candidate_sizes(sizes)[0]


def size_options(sizes: Sizes) -> list[str]:
    """Return options of dataset_tool.py that crop and resize all images to the suggested size."""
    return crop_options(suggest_size(sizes))


def crop_options(size: Size) -> list[str]:
    """Return options of dataset_tool.py that crop and resize all images to a size, preserving proportions."""
    return ["--transform=center-crop", f"--width={size[0]}", f"--height={size[1]}"]


def build_command(source: str, *options: str) -> str:
    """Return the shell command that builds a dataset from `source` with the given options."""
    path = Path(source)
    name = (path.stem if path.suffix.lower() == ".zip" else path.resolve().name) or "images"
    dest = Path("data", f"{name}.zip")
    if dest.exists():
        dest = Path("data", f"{name}-built.zip")
    return f"python dataset_tool.py {shlex.join([f'--source={source}', f'--dest={dest.as_posix()}', *options])}"


@dataclass
class Survey:
    """Survey of image shapes (H, W, C): count and first image of each shape, and unreadable images with the reason."""

    counts: Counter[Shape] = field(default_factory=Counter)
    firsts: dict[Shape, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def note(self, name: str, shape: Shape) -> None:
        """Count an image."""
        self.counts[shape] += 1
        self.firsts.setdefault(shape, name)

    def describe_mixture(self, source: str, choose_size: Callable[[Sizes], Size | None]) -> str | None:
        """Describe the differences between the images, with a command that removes them; None for a uniform dataset."""
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
        return (
            f"{', '.join(found)}: build a dataset of {kind} first: {build_command(source, *self.options(choose_size))}"
        )

    def options(self, choose_size: Callable[[Sizes], Size | None]) -> list[str]:
        """Return the options of dataset_tool.py that make the images a uniform dataset."""
        sizes = sizes_of(self.counts)
        crop = crop_options(choose_size(sizes) or suggest_size(sizes)) if len(sizes) > 1 else []
        return crop + (["--skip-bad"] if self.broken else [])

    def _exceptions(self) -> list[str]:
        """Describe the first image that differs from the most common shape; [] without a MAJORITY of one shape."""
        if len(self.counts) < 2:
            return []
        majority, count = self.counts.most_common(1)[0]
        if count < MAJORITY * self.counts.total():
            return []
        shape, name = next(first for first in self.firsts.items() if first[0] != majority)
        return [f"the first different image is {name!r}, {describe_shape(shape)}"]
