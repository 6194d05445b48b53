"""Inspection of the images of a dataset before training: problems, duplicates, defects, statistics."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dnnlib.image_files import BrokenImageError
from dnnlib.util import counted
from training.data_sources.classes import describe_classes
from training.data_sources.codec import decode_as, decode_image
from training.data_sources.convert import encoded, force_channels
from training.data_sources.dataset_json import DatasetJson, Label
from training.data_sources.items import Item
from training.data_sources.parallel import map_chunks
from training.data_sources.sizes import CHANNEL_NAMES, Shape, Sizes, by_short_side, channels_of, sizes_of

# An image is nearly black if at most one value in a thousand, composited over white, exceeds BLACK. 12-bit camera data
# in 16-bit files is an example: its 8-bit values are 0 to 16.
BLACK = 16
BRIGHT_FRACTION = 0.001

_DIGEST_BYTES = 16
_BAR = 40  # characters of the longest histogram bar
_CHUNK_BYTES = 1 << 22  # encoded images per worker task
_CHUNK_IMAGES = 64
_MAX_COPIES = 5  # names shown per group of copies
_MAX_SERIAL = 256  # images; larger datasets are inspected in worker processes


class Inspection(NamedTuple):
    """Shape, digest and defect (see `defect_of`) of the pixels of an image."""

    shape: Shape
    digest: bytes
    defect: str


def inspect_items(items: Iterable[Item]) -> list[Inspection | BrokenImageError]:
    """Decode and inspect images."""
    found: list[Inspection | BrokenImageError] = []
    shape: Shape | None = None
    for item in items:
        try:
            data = encoded(item)
            pixels = decode_image(data) if shape is None else decode_as(data, shape)
        except BrokenImageError as error:
            found.append(error)
            continue
        H, W, C = shape = pixels.shape
        digest = hashlib.sha1(b"%dx%dx%d" % shape, usedforsecurity=False)
        digest.update(np.ascontiguousarray(pixels).data)
        found.append(Inspection((H, W, C), digest.digest()[:_DIGEST_BYTES], defect_of(pixels)))
    return found


def defect_of(pixels: np.ndarray) -> str:
    """Return the defect of pixels [H, W, C]: "constant" if all are equal or all transparent, "nearly black", or ""."""
    subset = pixels[::4, ::4]  # sufficient in most cases
    if (subset == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all():
        return "constant"
    if pixels.shape[2] == 4 and not pixels[:, :, 3].any():
        return "constant"
    max_bright = BRIGHT_FRACTION * pixels[:, :, :3].size
    if np.count_nonzero(subset[:, :, :3] > BLACK) > max_bright:  # compositing over white cannot darken a value
        return ""
    shown = force_channels(pixels, 3) if pixels.shape[2] == 4 else pixels
    return "nearly black" if np.count_nonzero(shown > BLACK) <= max_bright else ""


@dataclass
class Findings:
    """Results of the inspection of images, in the order of their names, with a few bytes per image.

    shapes       distinct shapes, in order of first appearance
    shape_index  index into `shapes` for each image, -1 for an unreadable image
    digests      16-byte digest of the pixels of each image
    broken       lines about unreadable images
    by_defect    names of images, keyed by `Inspection.defect`
    """

    names: Sequence[str]
    shapes: list[Shape] = field(default_factory=list)
    shape_index: array[int] = field(default_factory=lambda: array("i"))
    digests: bytearray = field(default_factory=bytearray)
    broken: list[str] = field(default_factory=list)
    by_defect: dict[str, list[str]] = field(default_factory=lambda: {"constant": [], "nearly black": []})

    @property
    def readable(self) -> np.ndarray:
        """Positions of the readable images."""
        return np.flatnonzero(np.frombuffer(self.shape_index, np.int32) >= 0)

    @property
    def shape_counts(self) -> Counter[Shape]:
        """Number of images by (H, W, C)."""
        counts = Counter(self.shape_index)
        return Counter({shape: counts[k] for k, shape in enumerate(self.shapes)})

    @property
    def sizes(self) -> Sizes:
        """Number of images by (width, height)."""
        return sizes_of(self.shape_counts)

    @property
    def channels(self) -> Counter[int]:
        """Number of images by number of channels."""
        return channels_of(self.shape_counts)

    def shape_of(self, position: int) -> Shape:
        """Return the shape (H, W, C) of a readable image."""
        return self.shapes[self.shape_index[position]]

    def duplicates(self) -> list[list[int]]:
        """Return groups of positions of images with identical pixels, each group in ascending order."""
        positions = self.readable
        halves = np.frombuffer(self.digests, np.uint64).reshape(-1, 2)[positions]
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal digests stay in order
        differs = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
        groups = np.split(positions[order], np.flatnonzero(differs) + 1)
        return sorted(group.tolist() for group in groups if len(group) > 1)


def inspect_all(names: Sequence[str], items: Iterable[Item], workers: int) -> Findings:
    """Inspect all images, in worker processes if there are many. Raises UserError if a worker dies."""
    findings = Findings(names)
    known: dict[Shape, int] = {}
    chunks = _chunks(items)
    results: Iterator[tuple[Item, Inspection | BrokenImageError]]
    if workers == 1 or len(names) <= _MAX_SERIAL:
        results = (pair for chunk in chunks for pair in zip(chunk, inspect_items(chunk), strict=True))
    else:
        results = map_chunks(inspect_items, chunks, workers)
    for item, result in results:
        if isinstance(result, BrokenImageError):
            findings.broken.append(f"{item.name}: {result}")
            findings.shape_index.append(-1)
            findings.digests += bytes(_DIGEST_BYTES)
            continue
        findings.shape_index.append(known.setdefault(result.shape, len(known)))
        findings.digests += result.digest
        if result.defect:
            findings.by_defect[result.defect].append(item.name)
    findings.shapes = list(known)
    return findings


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += len(item.content) if isinstance(item.content, bytes) else 0
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_IMAGES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def find_problems(findings: Findings, content: DatasetJson) -> dict[str, list[str]]:
    """Return the problems that make the images unusable as a dataset, as lines under headings."""
    problems = {f"{counted(len(findings.broken), 'image')} that cannot be read:": findings.broken}
    problems |= _differing(findings, "size", {(H, W, C): f"{W}x{H}" for H, W, C in findings.shapes})
    problems |= _differing(findings, "kind", {shape: CHANNEL_NAMES[shape[2]] for shape in findings.shapes})
    if content.labels is not None:
        known = set(findings.names)
        unlabelled = [name for name in findings.names if name not in content.labels]
        missing = [name for name in content.labels if name not in known]
        problems[f"{counted(len(unlabelled), 'image')} without a label:"] = unlabelled
        problems[f"{counted(len(missing), 'label')} without an image:"] = missing
    return {heading: lines for heading, lines in problems.items() if lines}


def _differing(findings: Findings, attribute: str, kinds: Mapping[Shape, str]) -> dict[str, list[str]]:
    """Return lines about images that are not of the most common kind; `kinds` maps each shape to a kind."""
    counts: Counter[str] = Counter()
    for shape, count in findings.shape_counts.items():
        counts[kinds[shape]] += count
    if len(counts) < 2:
        return {}
    majority, count = counts.most_common(1)[0]
    if count < counts.total() / 2:
        lines = [f"{kind}: {counted(count, 'image')}" for kind, count in counts.most_common()]
        return {f"{counts.total():,} images of {len(counts):,} {attribute}s:": lines}
    found = ((findings.names[position], kinds[findings.shape_of(position)]) for position in findings.readable)
    lines = [f"{name}: {kind}" for name, kind in found if kind != majority]
    differ = "differs" if len(lines) == 1 else "differ"
    return {f"{counted(len(lines), 'image')} that {differ} in {attribute} from the most common, {majority}:": lines}


def find_remarks(findings: Findings, content: DatasetJson, *, verbose: bool) -> dict[str, list[str]]:
    """Return observations that are not errors, as lines under headings. `verbose` lists all copies of an image."""
    groups = findings.duplicates()
    limit = len(findings.names) if verbose else _MAX_COPIES
    copies = []
    for group in groups:
        num_hidden = len(group) - limit
        named = " = ".join(findings.names[position] for position in group[:limit])
        copies.append(f"{named} and {num_hidden} more" if num_hidden > 0 else named)
    constant, black = findings.by_defect["constant"], findings.by_defect["nearly black"]
    remarks = {
        f"{counted(sum(map(len, groups)), 'image')} in {counted(len(groups), 'group')} of exact copies:": copies,
        f"{counted(len(constant), 'constant image')}, all pixels the same:": constant,
        f"{counted(len(black), 'nearly black image')}, {1 - BRIGHT_FRACTION:.1%} of the values at most {BLACK} of 255, "
        "typical of 12-bit data in 16-bit files:": black,
    }
    return {heading: lines for heading, lines in remarks.items() if lines} | _empty_classes(findings, content)


def _empty_classes(findings: Findings, content: DatasetJson) -> dict[str, list[str]]:
    labels, names = labels_in(findings, content), content.class_names
    if not labels or not names or isinstance(labels[0], list):
        return {}
    present = {label for label in labels if isinstance(label, int)}
    empty = [name for k, name in enumerate(names) if k not in present]
    return {f"{len(empty)} of {len(names)} classes without images:": empty} if empty else {}


def labels_in(findings: Findings, content: DatasetJson) -> list[Label]:
    """Return the labels of the labelled images."""
    labels = content.labels or {}
    return [labels[name] for name in findings.names if name in labels]


def describe_findings(findings: Findings, content: DatasetJson) -> list[str]:
    """Return lines such as '3 classes: cat 120, dog 98, owl 4', and a histogram of sizes."""
    labels = labels_in(findings, content)
    classes = [describe_classes(labels, content.class_names)] if labels else []
    return [*classes, *histogram(*short_sides(findings, content))]


def short_sides(findings: Findings, content: DatasetJson) -> tuple[dict[int, int], bool]:
    """Return image counts by shorter side in power-of-two bins, and whether they describe the original images.

    The dataset builder records the shorter sides of the originals in dataset.json.
    """
    recorded: Any = content.meta.get("short_sides")
    if isinstance(recorded, dict) and recorded and all(map(_is_count, recorded.items())):
        return {int(side): count for side, count in sorted(recorded.items(), key=lambda pair: int(pair[0]))}, True
    return {int(side): count for side, count in by_short_side(findings.sizes).items()}, False


def _is_count(pair: tuple[str, Any]) -> bool:
    side, count = pair
    return (
        isinstance(side, str)
        and side.isascii()
        and side.isdigit()
        and len(side) < 10
        and type(count) is int
        and count > 0
    )


def histogram(counts: Mapping[int, int], is_original: bool) -> list[str]:
    """Draw a text histogram of the counts by shorter side; no lines for a single bin."""
    if len(counts) < 2:
        return []
    maximum = max(counts.values())
    rows = [(f"{side} to {2 * side - 1}", f"{count:,}", -(-_BAR * count // maximum)) for side, count in counts.items()]
    widths = [max(map(len, column)) for column in ([row[0] for row in rows], [row[1] for row in rows])]
    subject = "originals" if is_original else "images"
    lines = [f"  {sides:>{widths[0]}}  {count:>{widths[1]}}  {'#' * length}" for sides, count, length in rows]
    return [f"Shorter sides of the {subject}, in pixels:", *lines]
