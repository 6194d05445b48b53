"""Batches of real and generated images for the metrics, sharded over the processes.

Random values are a function of (seed, purpose, position of the image in the set), so a metric does not depend on the
batch size or the number of processes. The exception is `noise_mode="random"`: the network draws this noise itself, and
the generator is seeded once per batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import DetectorSetup
from torch_utils.distributed import rank, world_size
from torch_utils.images import to_uint8
from torch_utils.misc import derive_seed

Pass = tuple[str, int]  # name and number of the items, e.g. ("real images", 500) or ("fitting steps", 100)
Batches = Iterator[tuple[range, Tensor]]  # (positions in the set, uint8 images [B, C, H, W])
FAKES = "generated images"  # name of a pass
Part = Literal["all", "train", "holdout"]  # of the reals: the whole dataset, the training images, held-out images
NUM_IMAGES = 50_000  # number of fakes if the name of a metric has no count
MAX_REALS = 200_000  # upper bound for metrics that hold all features in memory
BLOCK = 64  # positions that share a stream of random numbers
REALS: dict[Part, str] = {"all": "real images", "train": "training images", "holdout": "held-out images"}  # of passes
READERS = 4  # prefetching threads that decode images


class ImageGenerator(Protocol):
    """Interface of a generator for metrics: maps latents and labels to images in about [-1, 1]."""

    @property
    def z_dim(self) -> int: ...
    @property
    def c_dim(self) -> int: ...
    @property
    def img_shape(self) -> tuple[int, int, int]: ...

    def __call__(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> Tensor: ...


# Returns a context manager in which matrices (1 or B, 3, 3) are applied to the positions at the input of a generator,
# (x, y, 1) in units of the image from its centre. Raises UserError if the generator does not support it.
InputTransform = Callable[[ImageGenerator, Tensor], AbstractContextManager[None]]


class Images(Protocol):
    """Interface of a dataset for metrics. `labels` are int64 classes [len] or float32 vectors [len, c_dim]."""

    def __len__(self) -> int: ...
    @property
    def img_shape(self) -> tuple[int, int, int]: ...
    @property
    def c_dim(self) -> int: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def content_hash(self) -> str: ...
    @property
    def meta(self) -> dict[str, Any]: ...

    def images(self, indices: Sequence[int]) -> Tensor: ...


class Progress:
    """Receiver of progress reports; this base class discards them."""

    def plan(self, metrics: str, passes: Sequence[Pass]) -> None:
        """Start metrics with the given passes over images; an empty sequence if they are not known."""

    def __call__(self, name: str, done: int, total: int) -> None:
        """Report the progress of a pass in the shard of this process; `done` is 0 at the start of the pass."""


@dataclass(frozen=True, kw_only=True)
class MetricContext:
    """Inputs of metrics: real images, and fakes from either `G` or `fakes`.

    `images` is the dataset; `mirrored` is the dataset with the flip of every image (--mirror), or None. The registry
    sets `counts_flips` and `part` for each metric; metrics read their reals from `reals`. `train` are the images that
    the network was trained on, or None if these are `images`; `held_out` are images of the same kind that it was not
    trained on, or None. With `compares_holdout`, Frechet distances to both are reported, and `images` are the training
    images. G is on `device` in evaluation mode. `transform_input` transforms its input, for metrics of equivariance.
    `cache` is the folder for statistics of reals; None disables caching. `shared` is state that the metrics of a
    context share. Raises UserError if the shapes or labels of reals and fakes do not match.
    """

    G: ImageGenerator | None = None
    fakes: Images | None = None
    transform_input: InputTransform | None = None
    images: Images
    mirrored: Images | None = None
    train: Images | None = None
    held_out: Images | None = None
    compares_holdout: bool = False
    counts_flips: bool = False
    part: Part = "all"
    device: torch.device
    batch_size: int = 64  # batch size of the generator
    detector_batch: int = 64  # batch size of the detectors
    seed: int = 0
    truncation_psi: float = 1.0
    noise_mode: str = "const"
    setup: DetectorSetup = field(default_factory=DetectorSetup)
    cache: Path | None = None
    progress: Progress = field(default_factory=Progress, repr=False)
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for size in (self.batch_size, self.detector_batch):
            if size < 1:
                raise UserError(f"batch size {size}: metrics need batches of at least 1 image")
        source = self.G or self.fakes
        if source is None or (self.G and self.fakes):
            raise ValueError("a metric context needs either a generator or a set of generated images")
        if tuple(source.img_shape) != tuple(self.images.img_shape):
            raise UserError(explain_shape_mismatch(tuple(source.img_shape), tuple(self.images.img_shape), bool(self.G)))
        if self.G and self.G.c_dim and self.G.c_dim != self.images.c_dim:
            raise UserError(
                f"the network is conditional on labels of {self.G.c_dim} values, but the labels of the data have "
                f"{self.images.c_dim}: specify a dataset with the labels that the network was trained on"
            )
        if self.held_out:
            self._check_held_out(self.held_out)

    def _check_held_out(self, held_out: Images) -> None:
        """Raise UserError if the held-out images have another shape than the dataset, or are the training images."""
        shapes = tuple(held_out.img_shape), tuple(self.images.img_shape)
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--holdout: the images are {shape_name(shapes[0])}, but those of the dataset {shape_name(shapes[1])}: "
                "convert them with dataset_tool.py"
            )
        if held_out.content_hash == (self.train or self.images).content_hash:
            raise UserError("--holdout: these are the training images; specify images that were not used in training")

    @property
    def has_flips(self) -> bool:
        """True if flipped reals are included: the metric counts flips and --mirror is set."""
        return self.counts_flips and self.mirrored is not None and self.part == "all"

    @property
    def reals(self) -> Images:
        """The real images of `part`. All images are with flips if the metric includes them; other parts never are.

        Raises UserError if the held-out images are requested and there are none.
        """
        if self.part == "train":
            return self.train or self.images
        if self.part == "holdout":
            if self.held_out is None:
                raise UserError(
                    "needs images that the network was not trained on: specify a dataset of such images with "
                    "calc_metrics.py --holdout=PATH, or train with --holdout=N"
                )
            return self.held_out
        return self.mirrored if self.counts_flips and self.mirrored is not None else self.images

    @property
    def network(self) -> ImageGenerator:
        """The generator. Raises UserError if the fakes are images on disk."""
        if self.G is None:
            raise UserError("needs a network, but only generated images are given")
        return self.G


def explain_shape_mismatch(fake_shape: tuple[int, ...], real_shape: tuple[int, ...], of_network: bool) -> str:
    """Return the error message for fakes and reals of different shape (C, H, W), with the dataset_tool.py options."""
    options = [f"--channels={fake_shape[0]}"] if fake_shape[0] != real_shape[0] else []
    options += [f"--width={fake_shape[2]} --height={fake_shape[1]}"] if fake_shape[1:] != real_shape[1:] else []
    source = "the network generates" if of_network else "the generated set holds"
    remedy = "use the dataset that the network was trained on or" if of_network else "use real images of this shape or"
    return (
        f"{source} images of {shape_name(fake_shape)}, but the dataset has {shape_name(real_shape)}: {remedy} convert "
        f"it with dataset_tool.py {' '.join(options)}"
    )


def shape_name(img_shape: tuple[int, ...]) -> str:
    """Return '3x32x32 (channels x height x width)'."""
    return "x".join(map(str, img_shape)) + " (channels x height x width)"


def random_stream(seed: int, purpose: str, number: int = 0) -> np.random.RandomState:
    """Return the random stream for (seed, purpose, number).

    NumPy guarantees that RandomState and SeedSequence produce the same numbers in every version.
    """
    sequence = np.random.SeedSequence(derive_seed(seed, purpose, number))
    return np.random.RandomState(np.random.MT19937(sequence))


def random_rows(
    draw: Callable[[np.random.RandomState, int], np.ndarray], seed: int, purpose: str, positions: range
) -> Tensor:
    """Return one random row per position. A row depends on its position only, not on the range.

    Creating a stream is slow, so each stream serves a block of positions: `draw(stream, BLOCK)` returns its rows.
    """
    blocks = range(positions.start // BLOCK, (positions.stop - 1) // BLOCK + 1)
    rows = np.concatenate([draw(random_stream(seed, purpose, block), BLOCK) for block in blocks])
    start = positions.start - blocks.start * BLOCK
    return torch.from_numpy(rows[start : start + len(positions)])


def shard(count: int, rank: int, world_size: int) -> range:
    """Return the shard of positions 0..count-1 for a rank. The shards of all ranks, in order, cover every position."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def own_shard(count: int) -> range:
    """Return the shard of positions 0..count-1 for this process."""
    return shard(count, rank(), world_size())


def choose_reals(context: MetricContext, count: int) -> list[int]:
    """Return the sorted indices of `count` random reals, or of all reals if there are no more than `count`."""
    total = len(context.reals)
    if total == 0:
        raise UserError("the dataset holds no images: metrics need real images to compare with")
    chosen = random_stream(context.seed, "reals").permutation(total)[:count]
    return [int(index) for index in np.sort(chosen)]


def real_batches(context: MetricContext, indices: Sequence[int], name: str | None = None) -> Batches:
    """Yield this process's shard of the reals with the given indices, on the device; `name` is that of the pass."""
    return _read_batches(context, context.reals, indices, name or REALS[context.part])


def fake_batches(context: MetricContext, count: int) -> Batches:
    """Yield this process's shard of `count` fakes as uint8 on the device, from G or from `context.fakes`.

    Latents are standard normal, and labels are taken from random images of the dataset. `context.fakes` is sampled
    without replacement, in random order. Raises UserError if G returns non-finite values, and if `context.fakes` has
    fewer than `count` images.
    """
    if context.fakes is not None:
        return _read_batches(context, context.fakes, choose_fakes(context, context.fakes, count), FAKES)
    return _generate_batches(context, context.network, count)


def choose_fakes(context: MetricContext, fakes: Images, count: int) -> list[int]:
    """Return `count` random indices of generated images. The order is random, since sets are often sorted by class."""
    if len(fakes) < count:
        raise UserError(
            f"{count} generated images are requested, but the set holds {len(fakes)}: "
            f"specify metrics of at most that number, e.g. fid{len(fakes)}_full or swd{len(fakes)}, or generate more"
        )
    return [int(index) for index in random_stream(context.seed, "fakes").permutation(len(fakes))[:count]]


@torch.no_grad()
def _generate_batches(context: MetricContext, G: ImageGenerator, count: int) -> Batches:
    share = own_shard(count)
    is_finite = torch.ones([], dtype=torch.bool, device=context.device)  # on the device, to avoid a synchronization
    context.progress(FAKES, 0, len(share))
    for positions in cut(share, context.batch_size):
        with torch.random.fork_rng([context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(context.seed, "noise", positions.start))
            img = G(
                latents(context, positions),  # [B, z_dim]
                random_labels(context, positions),  # [B, c_dim]
                truncation_psi=context.truncation_psi,
                noise_mode=context.noise_mode,
            )
        is_finite &= img.isfinite().all()
        yield positions, to_uint8(img)
        context.progress(FAKES, positions.stop - share.start, len(share))
    if not is_finite:
        raise UserError("the network returns non-finite values, so its training diverged: metrics are undefined")


def _read_batches(context: MetricContext, images: Images, indices: Sequence[int], name: str) -> Batches:
    """Yield this process's shard of a set. Threads prefetch images, so that the device does not wait for the disk."""

    def read(positions: range) -> Tensor:
        batch = images.images([indices[position] for position in positions])
        return batch.pin_memory() if context.device.type == "cuda" else batch

    share = own_shard(len(indices))
    context.progress(name, 0, len(share))
    waiting: deque[tuple[range, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for positions in cut(share, context.batch_size):
            waiting.append((positions, pool.submit(read, positions)))
            if positions.start == share.start:
                waiting[0][1].result()  # a single thread opens the files
            is_last = positions.stop == share.stop
            while waiting and (is_last or len(waiting) > 2 * READERS):
                done, future = waiting.popleft()
                yield done, future.result().to(context.device, non_blocking=True)
                context.progress(name, done.stop - share.start, len(share))


def cut(positions: range, size: int) -> Iterator[range]:
    """Split a range of positions into batches."""
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))


def latents(context: MetricContext, positions: range) -> Tensor:
    """Return z [B, z_dim], standard normal."""
    z_dim = context.network.z_dim
    z = random_rows(lambda stream, block: stream.standard_normal((block, z_dim)), context.seed, "latents", positions)
    return z.to(context.device, torch.float32)


def random_labels(context: MetricContext, positions: range) -> Tensor:
    """Return c [B, c_dim], the labels of random images of the dataset; [B, 0] for an unconditional network."""
    c_dim = context.network.c_dim
    if c_dim == 0:
        return torch.zeros(len(positions), 0, device=context.device)
    total = len(context.images)
    drawn = random_rows(lambda stream, block: stream.randint(total, size=block), context.seed, "labels", positions)
    labels = context.images.labels[drawn]
    if not labels.is_floating_point():
        labels = F.one_hot(labels, c_dim)
    return labels.to(context.device, torch.float32)


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all processes, concatenated in rank order, on every process. Collective."""
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = [int(count) for count in counts]

    # Gather bytes, because backends do not support all dtypes. Pad, because shard sizes differ by up to one row.
    padded = F.pad(x.flatten(1), (0, 0, 0, max(sizes) - len(x))).view(torch.uint8)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    rows = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    return rows.view(x.dtype).reshape(-1, *x.shape[1:])
