"""What every metric is made of: batches of real and of generated images, shared out over the processes.

Everything random here is a function of (seed, purpose, position of the image in its set), so a metric's value depends
neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import UserError
from torch_utils.distributed import rank, world_size
from torch_utils.images import to_uint8
from torch_utils.misc import derive_seed

Progress = Callable[[str, int, int], None]  # (what is counted, done so far, of how many)
Batches = Iterator[tuple[range, Tensor]]  # (positions in the set, uint8 images [B, C, H, W])
BLOCK = 64  # positions that share a stream of random numbers


class Generator(Protocol):
    """What a metric knows of a generator: latents and labels in, images in about [-1, 1] out."""

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


class Images(Protocol):
    """What a metric knows of a data set. `labels` are int64 classes [len] or float32 vectors [len, c_dim]."""

    def __len__(self) -> int: ...
    @property
    def img_shape(self) -> tuple[int, int, int]: ...
    @property
    def c_dim(self) -> int: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def content_hash(self) -> str: ...

    def images(self, indices: Sequence[int]) -> Tensor: ...


def _silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class MetricContext:
    """A generator and a data set to compare, and how. G is on `device`, in evaluation mode.

    Raises UserError when G and the images do not fit together.
    """

    G: Generator
    images: Images
    device: torch.device
    batch_size: int = 64
    seed: int = 0
    truncation_psi: float = 1.0
    noise_mode: str = "const"
    progress: Progress = field(default=_silent, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size}: metrics need batches of at least 1 image")
        if tuple(self.G.img_shape) != tuple(self.images.img_shape):
            ours, theirs = (shape_name(shape) for shape in (self.G.img_shape, self.images.img_shape))
            raise UserError(
                f"the network makes images of {ours} but the data has {theirs}: "
                "give the data set that the network was trained on, or resize it with dataset_tool.py"
            )
        if self.G.c_dim and self.G.c_dim != self.images.c_dim:
            raise UserError(
                f"the network is conditional on labels of {self.G.c_dim} values but the data's have "
                f"{self.images.c_dim}: give a data set with the labels that the network was trained on"
            )


def shape_name(img_shape: tuple[int, int, int]) -> str:
    """Return '3x32x32 (channels x height x width)'."""
    return "x".join(map(str, img_shape)) + " (channels x height x width)"


def random_stream(seed: int, purpose: str, number: int = 0) -> np.random.RandomState:
    """Return the random numbers that belong to (seed, purpose, number).

    RandomState and SeedSequence promise the same numbers in every version of NumPy.
    """
    sequence = np.random.SeedSequence(derive_seed(seed, purpose, number))
    return np.random.RandomState(np.random.MT19937(sequence))


def random_rows(
    draw: Callable[[np.random.RandomState, int], np.ndarray], seed: int, purpose: str, positions: range
) -> Tensor:
    """Return one random row for each position, whatever range of positions is asked for.

    Streams are slow to start, so one serves a block of positions: `draw(stream, BLOCK)` returns its rows.
    """
    blocks = range(positions.start // BLOCK, (positions.stop - 1) // BLOCK + 1)
    rows = np.concatenate([draw(random_stream(seed, purpose, block), BLOCK) for block in blocks])
    start = positions.start - blocks.start * BLOCK
    return torch.from_numpy(rows[start : start + len(positions)])


def shard(count: int, rank: int, world_size: int) -> range:
    """Return the positions of 0..count-1 that one process of `world_size` works on; ranks in order join to all."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def own_shard(count: int) -> range:
    """Return the positions of 0..count-1 that this process works on."""
    return shard(count, rank(), world_size())


def choose_reals(context: MetricContext, count: int) -> list[int]:
    """Return the data set's indices in order, or `count` of them at random when it holds more."""
    total = len(context.images)
    if total == 0:
        raise UserError("the data set holds no images: metrics need some to compare with")
    chosen = random_stream(context.seed, "reals").permutation(total)[:count]
    return [int(index) for index in np.sort(chosen)]


def real_batches(context: MetricContext, indices: Sequence[int], what: str = "real images") -> Batches:
    """Yield this process's share of the reals with the given data set indices, on the device."""
    for positions in _batches_of(context, len(indices), what):
        images = context.images.images([indices[position] for position in positions])
        yield positions, images.to(context.device)


@torch.no_grad()
def fake_batches(context: MetricContext, count: int) -> Batches:
    """Yield this process's share of `count` generated images as uint8, on the device.

    z is standard normal; labels are those of images drawn at random from the data set. Raises UserError when G
    returns values that are not finite.
    """
    for positions in _batches_of(context, count, "generated images"):
        with torch.random.fork_rng([context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(context.seed, "noise", positions.start))
            img = context.G(
                latents(context, positions),  # [B, z_dim]
                random_labels(context, positions),  # [B, c_dim]
                truncation_psi=context.truncation_psi,
                noise_mode=context.noise_mode,
            )
        if not img.isfinite().all():
            raise UserError("the network returns values that are not finite (its training diverged): no metric exists")
        yield positions, to_uint8(img)


def _batches_of(context: MetricContext, count: int, what: str) -> Iterator[range]:
    """Cut this process's share of 0..count-1 into batches and report progress after each."""
    share = own_shard(count)
    for start in range(share.start, share.stop, context.batch_size):
        stop = min(start + context.batch_size, share.stop)
        yield range(start, stop)
        context.progress(what, stop - share.start, len(share))


def latents(context: MetricContext, positions: range) -> Tensor:
    """Return z [B, z_dim], standard normal."""
    z_dim = context.G.z_dim
    z = random_rows(lambda stream, block: stream.standard_normal((block, z_dim)), context.seed, "latents", positions)
    return z.to(context.device, torch.float32)


def random_labels(context: MetricContext, positions: range) -> Tensor:
    """Return c [B, c_dim]: the labels of random images of the data set; [B, 0] for an unconditional network."""
    if context.G.c_dim == 0:
        return torch.zeros(len(positions), 0, device=context.device)
    total = len(context.images)
    drawn = random_rows(lambda stream, block: stream.randint(total, size=block), context.seed, "labels", positions)
    labels = context.images.labels[drawn]
    if not labels.is_floating_point():
        labels = F.one_hot(labels, context.G.c_dim)
    return labels.to(context.device, torch.float32)


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all processes joined in the order of rank; every process gets all of them."""
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = [int(count) for count in counts]

    # Bytes, because not every backend knows every dtype; padded, because shards differ by a row.
    padded = F.pad(x.flatten(1), (0, 0, 0, max(sizes) - len(x))).view(torch.uint8)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    rows = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    return rows.view(x.dtype).reshape(-1, *x.shape[1:])
