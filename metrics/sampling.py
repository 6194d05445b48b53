"""Batches of real and of generated images for the metrics, shared out over the processes.

Everything random here is a function of (seed, purpose, position of the image in its set), so a metric's value depends
neither on the batch size nor on the number of processes. The noise of `noise_mode="random"`, which a network draws
itself, is the exception: it is seeded once for each batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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

ProgressCallback = Callable[[str, int, int], None]  # (what is counted, done so far, of how many)
Batches = Iterator[tuple[range, Tensor]]  # (positions in the set, uint8 images [B, C, H, W])
NUM_IMAGES = 50_000  # fakes of a metric whose name has no count
MAX_REALS = 200_000  # of the metrics that hold every feature
BLOCK = 64  # positions that share a stream of random numbers
READERS = 4  # threads that decode images ahead


class ImageGenerator(Protocol):
    """Interface of a generator to the metrics: latents and labels in, images in about [-1, 1] out."""

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
    """Interface of a data set to metrics. `labels` are int64 classes [len] or float32 vectors [len, c_dim]."""

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


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class MetricContext:
    """Inputs of metrics: the reals, and the fakes, which come from G or, without one, from `fakes`.

    `images` is the data set, `mirrored` the same with every image's flip (--mirror), None without. The registry sets
    `counts_flips` for each metric; metrics take their reals from `reals`. G is on `device`, in evaluation mode. `cache`
    is the folder for statistics of reals, None keeps none; `shared` is for what the metrics of one context have in
    common. Raises UserError when the two sides do not fit together.
    """

    G: ImageGenerator | None = None
    fakes: Images | None = None
    images: Images
    mirrored: Images | None = None
    counts_flips: bool = False
    device: torch.device
    batch_size: int = 64  # images generated at a time
    detector_batch: int = 64  # images that a detector sees at a time
    seed: int = 0
    truncation_psi: float = 1.0
    noise_mode: str = "const"
    setup: DetectorSetup = field(default_factory=DetectorSetup)
    cache: Path | None = None
    progress: ProgressCallback = field(default=silent, repr=False)
    shared: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for size in (self.batch_size, self.detector_batch):
            if size < 1:
                raise UserError(f"batch size {size}: metrics need batches of at least 1 image")
        source = self.G or self.fakes
        if source is None or (self.G and self.fakes):
            raise ValueError("a metric context has either a generator or a set of generated images")
        if tuple(source.img_shape) != tuple(self.images.img_shape):
            raise UserError(explain_misfit(tuple(source.img_shape), tuple(self.images.img_shape), bool(self.G)))
        if self.G and self.G.c_dim and self.G.c_dim != self.images.c_dim:
            raise UserError(
                f"the network is conditional on labels of {self.G.c_dim} values but the data's have "
                f"{self.images.c_dim}: give a data set with the labels that the network was trained on"
            )

    @property
    def has_flips(self) -> bool:
        """Whether flips are among the reals: the metric counts them, and --mirror asks for them."""
        return self.counts_flips and self.mirrored is not None

    @property
    def reals(self) -> Images:
        """The real images that the metric counts."""
        return self.mirrored if self.counts_flips and self.mirrored is not None else self.images

    @property
    def network(self) -> ImageGenerator:
        """G. Raises UserError when the fakes are files."""
        if self.G is None:
            raise UserError("needs a network, and only images are given")
        return self.G


def explain_misfit(ours: tuple[int, ...], theirs: tuple[int, ...], of_network: bool) -> str:
    """Say that images made are of another shape (C, H, W) than the data, and which options of the tool mend it."""
    options = [f"--channels={ours[0]}"] if ours[0] != theirs[0] else []
    options += [f"--width={ours[2]} --height={ours[1]}"] if ours[1:] != theirs[1:] else []
    maker = "the network makes" if of_network else "the generated set holds"
    given = "give the data set that the network was trained on, or" if of_network else "give real images like them, or"
    return (
        f"{maker} images of {shape_name(ours)} but the data has {shape_name(theirs)}: {given} build one from it with "
        f"dataset_tool.py {' '.join(options)}"
    )


def shape_name(img_shape: tuple[int, ...]) -> str:
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
    """Return the indices of the reals in order, or `count` of them at random when there are more."""
    total = len(context.reals)
    if total == 0:
        raise UserError("the data set holds no images: metrics need some to compare with")
    chosen = random_stream(context.seed, "reals").permutation(total)[:count]
    return [int(index) for index in np.sort(chosen)]


def real_batches(context: MetricContext, indices: Sequence[int], what: str = "real images") -> Batches:
    """Yield this process's share of the reals with the given indices, on the device."""
    return _read_batches(context, context.reals, indices, what)


def fake_batches(context: MetricContext, count: int) -> Batches:
    """Yield this process's share of `count` fakes as uint8, on the device: generated, or read from the set of them.

    z is standard normal; labels are those of images drawn at random from the data set. Of a set of images `count` are
    drawn at random, in random order. Raises UserError when G returns values that are not finite, and when the set
    holds too few.
    """
    if context.fakes is not None:
        return _read_batches(context, context.fakes, choose_fakes(context, context.fakes, count), "generated images")
    return _generate_batches(context, context.network, count)


def choose_fakes(context: MetricContext, fakes: Images, count: int) -> list[int]:
    """Return `count` indices of a set of generated images. In random order: such sets are often sorted by class."""
    if len(fakes) < count:
        raise UserError(
            f"{count} generated images are asked for and the set holds {len(fakes)}: "
            f"ask for fewer, e.g. fid{len(fakes)}_full, or generate more"
        )
    return [int(index) for index in random_stream(context.seed, "fakes").permutation(len(fakes))[:count]]


@torch.no_grad()
def _generate_batches(context: MetricContext, G: ImageGenerator, count: int) -> Batches:
    share = own_shard(count)
    is_finite = torch.ones([], dtype=torch.bool, device=context.device)  # there, so that the host does not wait for it
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
        context.progress("generated images", positions.stop - share.start, len(share))
    if not is_finite:
        raise UserError("the network returns values that are not finite (its training diverged): no metric exists")


def _read_batches(context: MetricContext, images: Images, indices: Sequence[int], what: str) -> Batches:
    """Yield this process's share of a set, decoded ahead in threads, so that the device does not wait for the disk."""

    def read(positions: range) -> Tensor:
        batch = images.images([indices[position] for position in positions])
        return batch.pin_memory() if context.device.type == "cuda" else batch

    share = own_shard(len(indices))
    waiting: deque[tuple[range, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for positions in cut(share, context.batch_size):
            waiting.append((positions, pool.submit(read, positions)))
            if positions.start == share.start:
                waiting[0][1].result()  # one thread opens the files
            is_last = positions.stop == share.stop
            while waiting and (is_last or len(waiting) > 2 * READERS):
                done, future = waiting.popleft()
                yield done, future.result().to(context.device, non_blocking=True)
                context.progress(what, done.stop - share.start, len(share))


def cut(positions: range, size: int) -> Iterator[range]:
    """Cut a range of positions into batches."""
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))


def latents(context: MetricContext, positions: range) -> Tensor:
    """Return z [B, z_dim], standard normal."""
    z_dim = context.network.z_dim
    z = random_rows(lambda stream, block: stream.standard_normal((block, z_dim)), context.seed, "latents", positions)
    return z.to(context.device, torch.float32)


def random_labels(context: MetricContext, positions: range) -> Tensor:
    """Return c [B, c_dim]: the labels of random images of the data set; [B, 0] for an unconditional network."""
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
