"""Sliced Wasserstein distance between the patches of two sets of images, Karras et al. 2018, section 5 (ProGAN).

Each image is decomposed into a Laplacian pyramid, from the full resolution down to 16 pixels. Each level is sampled at
128 random patches of 7x7 pixels, and each channel is normalised by its mean and standard deviation over all patches of
the set. The distance between two sets x, y of K patches on a level is

    1000 * mean_u 1/K sum_k |sort(u x)_k - sort(u y)_k|        u: 4 * 128 random unit vectors

and `swd` is the mean over the levels. The metric needs no network and no weights.

16,384 images give two million patches of 147 values, too many to hold in float32. Pixels are therefore stored as int16
in steps of 1/128 grey level, and a level that is smaller than its patches is stored whole. Integer sums are exact, so
mean and standard deviation do not depend on the batch size. Patches are projected onto a few directions at a time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.registry import Measurement, register_metric
from metrics.sampling import (
    FAKES,
    REALS,
    Batches,
    MetricContext,
    choose_reals,
    fake_batches,
    gather_rows,
    own_shard,
    random_rows,
    random_stream,
    real_batches,
    shape_name,
)
from torch_utils.distributed import all_reduce

PATCH = 7  # side of a patch, in pixels
PATCHES = 128  # per image and level
MIN_SIDE = 16  # minimum shorter side of a level, in pixels
DIRECTIONS = 4 * 128  # four repeats of 128 directions, averaged
NUM_IMAGES = 16_384
STEPS = 128  # stored steps per grey level; a Laplacian level lies within +-255, and 255 * 128 < 2^15
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # binomial low-pass filter
CHUNK = 32  # images projected at a time
MAX_PROJECTED = 2**25  # projections of a set at a time
MAX_SORTED = 2**14  # projections of a set on a direction that are sorted on a CPU; more are counted in BINS
BINS = 2**18

PAPER = "Karras et al. 2018, section 5"
VALUES = ("", "_<side>")  # mean over the levels, then each level
PROTOCOL = (
    "7x7 patches, 128 per image and level of a Laplacian pyramid down to 16 px, channels normalised per set, "
    "512 directions, x 1e3, mean over levels; 16,384 images or <N>, at most all reals"
)


@register_metric(
    "swd<N>",
    help="sliced Wasserstein distance between patches of N reals and N fakes; needs no detector",
    note="compare only values with equal num_real",
    values=VALUES,
    protocol=PROTOCOL,
    paper=PAPER,
    counts_flips=True,
)
def swd(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance between min(N, all) reals and as many fakes: 'swd', then 'swd_32', ... per level."""
    check_size(context.images.img_shape)
    indices = choose_reals(context, count or NUM_IMAGES)
    context.progress.plan(name, [(REALS["all"], len(indices)), (FAKES, len(indices))])
    reals = collect(context, len(indices), real_batches(context, indices))
    fakes = collect(context, len(indices), fake_batches(context, len(indices)))
    values = named(name, compare_shards(reals, fakes, context.seed))
    return Measurement(values=values, num_real=len(indices), num_fake=len(indices))


@register_metric(
    "swd<N>_floor",
    help="no result, but the swd<N> of a perfect generator: distance between two sets of N reals",
    note="compare with swd<N>; use --mirror=0 and an N of at most half the dataset",
    values=VALUES,
    is_floor=True,
    protocol="as swd<N>, between two disjoint random sets of reals, at most half of all each",
    paper=PAPER,
    counts_flips=True,
)
def swd_floor(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the distance between two disjoint random sets of min(N, half of all) reals; the network is not used."""
    check_size(context.images.img_shape)
    first, second = disjoint_halves(context, count or NUM_IMAGES)
    context.progress.plan(name, [("real images, first set", len(first)), ("real images, second set", len(second))])
    first_set = collect(context, len(first), real_batches(context, first, "real images, first set"))
    second_set = collect(context, len(second), real_batches(context, second, "real images, second set"))
    values = named(name, compare_shards(first_set, second_set, context.seed))
    return Measurement(values=values, num_real=len(first) + len(second), num_fake=0)


def sliced_wasserstein(real: Tensor, fake: Tensor, *, seed: int = 0, batch_size: int = 64) -> dict[str, float]:
    """Return the distance between two sets of uint8 images [B, C, H, W] of equal size: 'mean', then each level by name.

    Runs on the device of the images and is not collective. Raises UserError for sets of unequal size or shape.
    """
    if real.shape != fake.shape or real.ndim != 4 or len(real) == 0 or {real.dtype, fake.dtype} != {torch.uint8}:
        raise UserError(
            f"sliced Wasserstein distance of {real.dtype} {tuple(real.shape)} and {fake.dtype} {tuple(fake.shape)}: "
            "the two sets must be uint8 images [B, C, H, W], equal in number and shape"
        )
    count, C, H, W = real.shape
    check_size((C, H, W))
    one, other = (PatchSet(range(count), (C, H, W), seed=seed, device=images.device) for images in (real, fake))
    for start in range(0, count, batch_size):
        positions = range(start, min(start + batch_size, count))
        one.add(positions, real[start : positions.stop])
        other.add(positions, fake[start : positions.stop])
    return compare(one, other, seed)


def check_size(img_shape: tuple[int, int, int]) -> None:
    """Raise UserError for images smaller than a patch."""
    if min(img_shape[1:]) < PATCH:
        raise UserError(
            f"sliced Wasserstein distance of images of {shape_name(img_shape)}: needs at least {PATCH} pixels per side"
        )


def disjoint_halves(context: MetricContext, count: int) -> tuple[list[int], list[int]]:
    """Return the indices of two disjoint random sets, each of min(`count`, half of all) reals."""
    total = len(context.reals)
    size = min(count, total // 2)
    if size == 0:
        raise UserError(f"the floor needs two disjoint sets of reals, but the dataset holds {total}")
    order = random_stream(context.seed, "halves").permutation(total)
    return sorted(order[:size].tolist()), sorted(order[size : 2 * size].tolist())


def named(name: str, values: dict[str, float]) -> dict[str, float]:
    """Return the values under the metric's name: 'swd5k' for 'mean', 'swd5k_32' for '32'."""
    return {name if key == "mean" else f"{name}_{key}": value for key, value in values.items()}


# Images to patches.


def pyramid_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (height, width) of every level, finest first: halved and rounded up while both sides are at least 16."""
    shapes = [(height, width)]
    while min((side + 1) // 2 for side in shapes[-1]) >= MIN_SIDE:
        height, width = shapes[-1]
        shapes.append(((height + 1) // 2, (width + 1) // 2))
    return shapes


def laplacian_pyramid(img: Tensor) -> list[Tensor]:
    """Return the Laplacian pyramid of images [B, C, H, W], finest level first.

    Each level is the image minus the upsampled next coarser image; the last level is the coarsest image itself.
    """
    levels = []
    for height, width in pyramid_shapes(img.shape[2], img.shape[3])[1:]:
        coarse = downsample(img)
        assert coarse.shape[2:] == (height, width)
        levels.append(img - upsample(coarse, img.shape[2], img.shape[3]))
        img = coarse
    return [*levels, img]


def downsample(img: Tensor) -> Tensor:
    """Low-pass filter an image and keep every second pixel, (H + 1) // 2 by (W + 1) // 2."""
    return _filter(_filter(img, dim=2, stride=2), dim=3, stride=2)


def upsample(img: Tensor, height: int, width: int) -> Tensor:
    """Insert zeros between the pixels, low-pass filter, and scale to preserve the mean."""
    spread = img.new_zeros(*img.shape[:2], height, width)
    spread[:, :, ::2, ::2] = img
    return 4 * _filter(_filter(spread, dim=2), dim=3)


def _filter(x: Tensor, dim: int, stride: int = 1) -> Tensor:
    """Filter images along one axis with TAPS and reflection padding.

    The sum of five shifted images has a fixed order of summation and never runs in TF32, unlike a convolution.
    """
    size = x.shape[dim]
    radius = len(TAPS) // 2
    mirrored = F.pad(x, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), mode="reflect")
    shifted = [mirrored.narrow(dim, shift, size) for shift in range(len(TAPS))]
    strides = (slice(None),) * dim + (slice(None, None, stride),)
    return sum((tap * part[strides] for tap, part in zip(TAPS, shifted, strict=True)), start=x.new_zeros(()))


def random_corners(seed: int, level_number: int, shape: tuple[int, int], positions: range) -> Tensor:
    """Return the upper left pixels (y, x) of the patches of images at the given positions of a set, (B, P, 2).

    Images at the same position of two sets have the same corners, so identical sets have distance 0.
    """
    bounds = (shape[0] - PATCH + 1, shape[1] - PATCH + 1)
    purpose = f"patches {level_number}"
    return random_rows(
        lambda stream, block: stream.randint(0, bounds, size=(block, PATCHES, 2)), seed, purpose, positions
    )


def cut_patches(level: Tensor, corners: Tensor) -> Tensor:
    """Return the patches (B, P, 49 * C) of a level (B, h, w, C) at upper left pixels (y, x), given as (B, P, 2).

    A row of a patch is 7 * C contiguous values, which are copied at once.
    """
    B, h, w, C = level.shape
    rows = level.flatten().as_strided((B * h * w - PATCH + 1, PATCH * C), (C, 1))  # PATCH pixels starting at each pixel
    image = torch.arange(B, device=level.device).unsqueeze(1)  # (B, 1)
    y, x = corners.long().unbind(2)  # each (B, P)
    first = ((image * h + y) * w + x).unsqueeze(2) + w * torch.arange(PATCH, device=level.device)  # (B, P, 7)
    return rows.index_select(0, first.flatten()).reshape(B, corners.shape[1], -1)


class PatchLevel:
    """The patches of one pyramid level of a set of images, as int16 in steps of 1/128 grey level.

    `values` are whole levels (n, h, w, C) if `whole`, else patches (n, P, 49 * C), whichever is smaller; `corners`
    (n, P, 2) int16 are the upper left pixels (y, x) of the patches; `moments` (2, C) int64 are the sum and the sum of
    squares of each channel over all patches.
    """

    def __init__(self, *, whole: bool, values: Tensor, corners: Tensor, moments: Tensor) -> None:
        self.whole = whole
        self.values = values
        self.corners = corners
        self.moments = moments

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.moments.shape[1]

    @classmethod
    def empty(cls, count: int, channels: int, shape: tuple[int, int], device: torch.device) -> PatchLevel:
        """Allocate a level for `count` images."""
        whole = shape[0] * shape[1] <= PATCHES * PATCH * PATCH
        kept = (*shape, channels) if whole else (PATCHES, PATCH * PATCH * channels)
        return cls(
            whole=whole,
            values=torch.empty(count, *kept, dtype=torch.int16, device=device),
            corners=torch.empty(count, PATCHES, 2, dtype=torch.int16, device=device),
            moments=torch.zeros(2, channels, dtype=torch.int64, device=device),
        )

    def add(self, rows: slice, level: Tensor, corners: Tensor) -> None:
        """Store a batch of levels (B, C, h, w), float32 in grey levels, with corners (B, P, 2)."""
        steps = (level * STEPS).round().to(torch.int16).permute(0, 2, 3, 1).contiguous()
        patches = cut_patches(steps, corners)  # (B, P, 49 * C)
        self.values[rows] = steps if self.whole else patches
        self.corners[rows] = corners
        x = patches.flatten(0, 1).double()
        moments = torch.stack([x.sum(dim=0), x.square_().sum(dim=0)])  # (2, 49 * C), exact: at most B * 128 * 2^30
        self.moments += moments.long().unflatten(1, (-1, self.channels)).sum(dim=1)

    def gathered(self) -> PatchLevel:
        """Return the level with the images of all processes."""
        return PatchLevel(
            whole=self.whole,
            values=gather_rows(self.values),
            corners=gather_rows(self.corners),
            moments=all_reduce(self.moments.clone()),
        )

    def patches(self, rows: slice) -> Tensor:
        """Return the patches of the images in `rows`, (n, P, 49 * C) int16."""
        return cut_patches(self.values[rows], self.corners[rows]) if self.whole else self.values[rows]

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and 1 / standard deviation of each channel in stored steps, (C,) float64.

        A constant channel has scale 0. Python integers make mean(x^2) - mean(x)^2 exact, so a constant
        channel is detected reliably.
        """
        number = len(self.values) * PATCHES * PATCH * PATCH
        sums, squares = self.moments.tolist()
        variances = [(number * square - total * total) / number**2 for total, square in zip(sums, squares, strict=True)]
        means = [total / number for total in sums]
        scales = [variance**-0.5 if variance else 0.0 for variance in variances]
        to_tensor = self.moments.new_tensor
        return to_tensor(means, dtype=torch.float64), to_tensor(scales, dtype=torch.float64)


class PatchSet:
    """The patches of images at a contiguous range of positions of a set, by level, finest first."""

    def __init__(self, positions: range, img_shape: tuple[int, int, int], *, seed: int, device: torch.device) -> None:
        C, H, W = img_shape
        self.positions = positions
        self.shapes = pyramid_shapes(H, W)
        self.levels = [PatchLevel.empty(len(positions), C, shape, device) for shape in self.shapes]
        self.seed = seed

    def add(self, positions: range, images: Tensor) -> None:
        """Add the patches of uint8 images [B, C, H, W] at consecutive positions of the set."""
        rows = slice(positions.start - self.positions.start, positions.stop - self.positions.start)
        levels = zip(self.levels, self.shapes, laplacian_pyramid(images.float()), strict=True)
        for number, (level, shape, pixels) in enumerate(levels):
            corners = random_corners(self.seed, number, shape, positions)
            level.add(rows, pixels, corners.to(images.device))

    def names(self) -> list[str]:
        """Return '32' for a level of 32x32 pixels, '32x48' for a level of height 32 and width 48."""
        return [f"{height}" if height == width else f"{height}x{width}" for height, width in self.shapes]


def collect(context: MetricContext, count: int, batches: Batches) -> PatchSet:
    """Return the patches of this process's shard of a set of `count` images."""
    patches = PatchSet(own_shard(count), context.images.img_shape, seed=context.seed, device=context.device)
    for positions, images in batches:
        patches.add(positions, images)
    return patches


# Patches to distance.


def compare(real: PatchSet, fake: PatchSet, seed: int) -> dict[str, float]:
    """Return the distance between two complete sets: 'mean' over the levels, then the distance on each level."""
    distances = [
        level_distances(one, other, random_directions(seed, number, one.channels))
        for number, (one, other) in enumerate(zip(real.levels, fake.levels, strict=True))
    ]
    return _summary(real.names(), distances)


def compare_shards(real: PatchSet, fake: PatchSet, seed: int) -> dict[str, float]:
    """Compare two sets that are sharded over the processes. Each process computes a shard of the directions."""
    share = own_shard(DIRECTIONS)
    distances = []
    for number, (one, other) in enumerate(zip(real.levels, fake.levels, strict=True)):
        directions = random_directions(seed, number, one.channels)[:, :, share.start : share.stop]
        result = torch.zeros(DIRECTIONS, dtype=torch.float64, device=one.values.device)
        result[share.start : share.stop] = level_distances(one.gathered(), other.gathered(), directions)
        distances.append(all_reduce(result))
    return _summary(real.names(), distances)


def _summary(names: list[str], distances: list[Tensor]) -> dict[str, float]:
    levels = {name: 1000 * float(distance.mean()) for name, distance in zip(names, distances, strict=True)}
    return {"mean": sum(levels.values()) / len(levels), **levels}


def random_directions(seed: int, level_number: int, channels: int) -> Tensor:
    """Return random unit vectors in the space of a level's patches, (C, 49, 512) float64."""
    stream = random_stream(seed, "directions", level_number)
    vectors = stream.standard_normal((channels * PATCH * PATCH, DIRECTIONS))
    vectors /= np.linalg.norm(vectors, axis=0)
    return torch.from_numpy(vectors).reshape(channels, PATCH * PATCH, DIRECTIONS)


def level_distances(real: PatchLevel, fake: PatchLevel, directions: Tensor) -> Tensor:
    """Return the Wasserstein-1 distance of normalised patches along each of the directions (C, 49, J): (J,) float64."""
    number = len(real.values) * PATCHES
    parts = directions.split(max(1, MAX_PROJECTED // number), dim=2)
    memory = torch.empty(2, parts[0].shape[2], number, device=real.values.device)  # reused for all parts
    distances = []
    for part in parts:
        x, y = memory[:, : part.shape[2]]
        project(real, part, out=x)
        project(fake, part, out=y)
        distances.append(wasserstein_1d(x, y))
    return torch.cat(distances)


def project(level: PatchLevel, directions: Tensor, *, out: Tensor) -> None:
    """Write u (x - mean) / std for every patch x and each of the directions u (C, 49, J) into out (J, n * P) float32.

    The rounded mean is subtracted from x, which is exact; without it, the products of channels of low contrast would
    cancel. The remainder of the mean and the standard deviation are folded into the directions.
    """
    mean, scale = level.mean_and_scale()  # each (C,)
    centre = mean.round()
    weight = directions.to(scale.device) * scale[:, None, None]  # (C, 49, J)
    offset = (weight * (mean - centre)[:, None, None]).sum(dim=(0, 1)).float().unsqueeze(1)  # (J, 1)
    weight = weight.permute(2, 1, 0).flatten(1).float()  # (J, 49 * C)
    centre = centre.float().repeat(PATCH * PATCH)  # (49 * C,)
    for start in range(0, len(level.values), CHUNK):
        patches = level.patches(slice(start, start + CHUNK)).flatten(0, 1).float().sub_(centre)  # (m * P, 49 * C)
        columns = slice(start * PATCHES, start * PATCHES + len(patches))
        with full_float32():
            out[:, columns] = torch.addmm(offset, weight, patches.T, beta=-1)


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """Return the Wasserstein-1 distance between rows, (J, K), (J, K) -> (J,) float64. May overwrite x and y.

    This is the mean of |sort(x)_k - sort(y)_k|, and equals the integral of |F_x - F_y| over the distribution functions.
    On the CPU, the integral of long rows is computed from histograms, which is several times as fast as sorting.
    """
    if x.device.type == "cpu" and x.shape[1] > MAX_SORTED:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.tensor(list(pool.map(_from_histograms, x.numpy(), y.numpy())), dtype=torch.float64)
    return _sorted(x).sub_(_sorted(y)).abs_().mean(dim=1, dtype=torch.float64)


def _sorted(x: Tensor) -> Tensor:
    """Sort the rows. On the CPU, sort in place with NumPy in all threads, which is three times as fast as torch."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(np.ndarray.sort, x.numpy()))
    return x


def _from_histograms(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Wasserstein-1 distance between two arrays of equal length, which are overwritten.

    Rounding to the centres of BINS bins moves a value by up to half a bin, but hardly the mean over values and
    directions: the distances between bins are right on average.
    """
    lowest, highest = min(x.min(), y.min()), max(x.max(), y.max())
    if lowest == highest:
        return 0.0
    scale = (BINS - 1) / (highest - lowest)  # bins per unit
    counts = []
    for values in (x, y):
        values -= lowest
        values *= scale
        counts.append(np.bincount(np.rint(values, out=values).astype(np.uint32), minlength=BINS))
    return float(np.abs(np.cumsum(counts[0] - counts[1])).sum() / (float(scale) * len(x)))
