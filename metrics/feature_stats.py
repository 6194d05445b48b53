"""Statistics of features, accumulated over batches and processes; statistics of reals are cached on disk.

A metric plans requests such as `StatRequest(of="fake", role="inception", count=50_000, recipe=Moments())`.
`collect` groups the requests of all metrics: each image is generated or read once, passes through each network once,
and feeds every recipe. The result of a recipe is a dict of tensors, equal on all processes and independent of the batch
size.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import Detector, Role
from metrics.sampling import (
    FAKES,
    REALS,
    Batches,
    ImageGenerator,
    MetricContext,
    Part,
    choose_reals,
    fake_batches,
    gather_rows,
    own_shard,
    random_stream,
    real_batches,
)
from torch_utils.checkpoint import read_file, write_file
from torch_utils.distributed import all_reduce, from_main, is_main

Result = dict[str, Tensor]

FORMAT = "metric-statistics"
VERSION = 1
MOMENT_ROWS = 1024  # rows of a product of features, see _MomentSums
MOMENT_COLUMNS = 256  # columns of a strip of outer products
NO_CLASSES = "the detector returns no class logits: an inception score needs a network with classes"


class Accumulator(Protocol):
    """State of a recipe during one pass. `add` receives rows at consecutive positions of the set, possibly none."""

    def add(self, positions: range, features: Tensor, logits: Tensor | None) -> None: ...

    def finish(self) -> Result:
        """Return the result over all processes. Collective."""
        ...


class Recipe(Protocol):
    """A frozen dataclass whose repr identifies the statistic and is part of its cache key."""

    def start(self, count: int) -> Accumulator:
        """Return an accumulator for a set of `count` images."""
        ...


@dataclass(frozen=True, kw_only=True)
class StatRequest:
    """A statistic of the features of `count` images (None: all reals of the part); `flips` includes flipped reals."""

    of: Literal["real", "fake"]
    role: Role
    count: int | None
    recipe: Recipe
    flips: bool = False
    part: Part = "all"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison, with the sizes of both sides and the seed: the input for choosing a recipe."""

    of: Literal["real", "fake"]
    num_real: int
    num_fake: int
    seed: int


@dataclass(frozen=True)
class Moments:
    """Mean and covariance over N in float64: `count`, `mean` (F,), `cov` (F, F)."""

    def start(self, count: int) -> Accumulator:
        return _MomentSums()


class _MomentSums:
    """Sums of rows (F,) and of outer products (F, F) in float64, updated after every MOMENT_ROWS rows.

    A product of many rows is several times as fast as products of single batches, and the sums do not depend on the
    batch size. Outer products are summed in strips of columns up to the diagonal, and mirrored at the end.
    """

    def __init__(self) -> None:
        self.count = 0
        self.rows = self.total = self.outer = torch.empty(0)  # allocated when F is known

    def add(self, positions: range, features: Tensor, logits: Tensor | None) -> None:
        if not self.rows.numel():
            F = features.shape[1]
            self.rows = features.new_empty(MOMENT_ROWS, F, dtype=torch.float64)  # the first count % MOMENT_ROWS are set
            self.total, self.outer = self.rows.new_zeros(F), self.rows.new_zeros(F, F)
        while len(features):
            start = self.count % MOMENT_ROWS
            part, features = features.tensor_split([MOMENT_ROWS - start])
            self.rows[start : start + len(part)] = part
            self.count += len(part)
            if self.count % MOMENT_ROWS == 0:
                self._fold(self.rows)

    def _fold(self, x: Tensor) -> None:
        self.total += x.sum(dim=0)
        for start in range(0, x.shape[1], MOMENT_COLUMNS):
            strip = slice(start, start + MOMENT_COLUMNS)
            self.outer[strip, : strip.stop].addmm_(x[:, strip].T, x[:, : strip.stop])

    def finish(self) -> Result:
        self._fold(self.rows[: self.count % MOMENT_ROWS])
        count, total, outer = (all_reduce(x) for x in (self.total.new_full([1], self.count), self.total, self.outer))
        mean = total / count
        cov = outer.tril() + outer.tril(-1).T
        return {"count": count, "mean": mean, "cov": cov / count - mean.outer(mean)}


@dataclass(frozen=True)
class Rows:
    """All features in float32 or, with `half`, in float16: `rows` (N, F)."""

    half: bool = False

    def start(self, count: int) -> Accumulator:
        return _KeptRows(torch.float16 if self.half else torch.float32)


class _KeptRows:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.parts: list[Tensor] = []

    def add(self, positions: range, features: Tensor, logits: Tensor | None) -> None:
        self.parts.append(features.to(self.dtype))

    def finish(self) -> Result:
        return {"rows": gather_rows(torch.cat(self.parts))}


@dataclass(frozen=True)
class SubsetRows:
    """Features in `number` random subsets of `size` images: `rows` (U, F), `index` (number, size) into the rows.

    The subsets are drawn before the pass, so at most number * size rows are stored.
    """

    number: int
    size: int
    stream: str
    seed: int

    def start(self, count: int) -> Accumulator:
        stream = random_stream(self.seed, self.stream)
        return _SubsetSums(np.stack([stream.choice(count, self.size, replace=False) for _ in range(self.number)]))


class _SubsetSums:
    def __init__(self, subsets: np.ndarray) -> None:
        self.kept, index = np.unique(subsets, return_inverse=True)
        self.index = torch.from_numpy(index.reshape(subsets.shape))
        self.rows = _KeptRows(torch.float32)

    def add(self, positions: range, features: Tensor, logits: Tensor | None) -> None:
        first, last = np.searchsorted(self.kept, [positions.start, positions.start + len(features)])
        chosen = torch.from_numpy(self.kept[first:last] - positions.start).to(features.device, non_blocking=True)
        self.rows.add(positions, features[chosen], logits)

    def finish(self) -> Result:
        return {**self.rows.finish(), "index": self.index}


@dataclass(frozen=True)
class ClassSums:
    """Sums over each of `splits` equal parts of the set, with p the softmax of the logits, in float64.

    `count` (S,); `p` (S, K), the sum of p; `plogp` (S,), the sum of p log p.
    """

    splits: int

    def start(self, count: int) -> Accumulator:
        return _ClassSums(self.splits, count)


class _ClassSums:
    def __init__(self, splits: int, count: int) -> None:
        self.splits, self.total = splits, count
        self.sums: list[Tensor] = []

    def add(self, positions: range, features: Tensor, logits: Tensor | None) -> None:
        if logits is None:
            raise UserError(NO_CLASSES)
        p, log_p = logits.double().softmax(dim=1), logits.double().log_softmax(dim=1)
        # Split i covers the positions i * N // splits <= position < (i + 1) * N // splits.
        bounds = torch.arange(1, self.splits, device=p.device) * self.total // self.splits
        position = torch.arange(positions.start, positions.start + len(p), device=p.device)
        split = torch.bucketize(position, bounds, right=True)
        ones = p.new_zeros(self.splits)
        sums = [
            ones.index_add(0, split, torch.ones_like(p[:, 0])),
            p.new_zeros(self.splits, p.shape[1]).index_add(0, split, p),
            ones.index_add(0, split, (p * log_p).sum(dim=1)),
        ]
        self.sums = [total + part for total, part in zip(self.sums, sums, strict=True)] if self.sums else sums

    def finish(self) -> Result:
        count, p, plogp = (all_reduce(x) for x in self.sums)
        return {"count": count, "p": p, "plogp": plogp}


def statistics_of(context: MetricContext) -> Statistics:
    """Return the statistics that the metrics of a context share."""
    shared: Statistics = context.shared.setdefault("statistics", Statistics(context))
    return shared


def with_network(context: MetricContext, G: ImageGenerator) -> MetricContext:
    """Return a context for another network on the same data that reuses detectors and statistics of the reals."""
    old = statistics_of(context)
    new_context = replace(context, G=G, shared={})
    new = statistics_of(new_context)
    new.detectors = old.detectors
    new.results = {request: result for request, result in old.results.items() if request.of == "real"}
    new.seconds = {request: 0.0 for request in new.results}
    return new_context


class Statistics:
    """Statistics shared by the metrics of one network, by request; `seconds` is the duration of each pass."""

    def __init__(self, context: MetricContext) -> None:
        self.context = context
        self.results: dict[StatRequest, Result] = {}
        self.seconds: dict[StatRequest, float] = {}
        self.detectors: dict[Role, Detector] = {}

    def __getitem__(self, request: StatRequest) -> Result:
        self.collect([request])
        return self.results[self._normalized(request)]

    def seconds_of(self, requests: Iterable[StatRequest]) -> float:
        """Return the duration of the passes that served these requests; a shared pass counts in full."""
        passes = {(request.of, request.part): self.seconds[request] for request in map(self._normalized, requests)}
        return sum(passes.values())

    def _normalized(self, request: StatRequest) -> StatRequest:
        """Replace a count that covers all reals with None, and a part that is all of them, to share passes."""
        if request.part == "train" and self.context.train is None:
            request = replace(request, part="all")
        is_all = (
            request.of == "real" and request.count is not None and request.count >= len(self._context_of(request).reals)
        )
        return replace(request, count=None) if is_all else request

    def _context_of(self, request: StatRequest) -> MetricContext:
        """Return the context whose `reals` match the request: its part of the images, with or without flips."""
        return replace(self.context, counts_flips=request.flips, part=request.part)

    def collect(self, requests: Iterable[StatRequest], metrics: str = "statistics") -> None:
        """Compute the missing requests of `metrics`: one pass over the fakes, one over each distinct set of reals."""
        missing = [request for request in dict.fromkeys(map(self._normalized, requests)) if request not in self.results]
        for request in [request for request in missing if request.of == "real"]:
            kept = self._load(request)
            if kept is not None:
                self.results[request], self.seconds[request] = kept, 0.0
        groups: dict[Any, list[StatRequest]] = {"fake": [request for request in missing if request.of == "fake"]}
        for request in [request for request in missing if request.of == "real" and request not in self.results]:
            groups.setdefault((request.count, request.flips, request.part), []).append(request)
        passes = [group for group in groups.values() if group]
        names = [FAKES if group[0].of == "fake" else REALS[group[0].part] for group in passes]
        sizes = [max(map(self.size, group)) for group in passes]
        self.context.progress.plan(metrics, list(zip(names, sizes, strict=True)))
        for group in passes:
            self._run(group)
            for request in [request for request in group if request.of == "real"]:
                self._save(request)

    def check_detector(self, role: Role, *, with_classes: bool) -> None:
        """Run a custom detector on two batches of different size, to detect a fixed batch size.

        Raises UserError for a program that fails, or that does not return the required class logits.
        """
        if self.context.setup.program_of(role) is None:
            return
        for count in (2, 1):
            blank = torch.zeros(count, *self.context.images.img_shape, dtype=torch.uint8, device=self.context.device)
            _, logits = self._detector(role)(blank)
        if with_classes and logits is None:
            raise UserError(NO_CLASSES)

    def _run(self, requests: list[StatRequest]) -> None:
        """Run all requests in one pass over the largest requested number of images."""
        start = time.perf_counter()
        sizes = {request: self.size(request) for request in requests}
        total = max(sizes.values())
        accumulators = {request: request.recipe.start(sizes[request]) for request in requests}
        broken: dict[tuple[Role, str], Tensor] = {}  # on the device, to avoid a synchronization per batch
        for positions, images in self._batches(requests[0], total):
            for role in dict.fromkeys(request.role for request in requests):
                features, logits = self._detector(role)(images)
                for key, x in (((role, "features"), features), ((role, "class logits"), logits)):
                    if x is not None:
                        is_broken = x.isfinite().all().logical_not()
                        broken[key] = broken[key] | is_broken if key in broken else is_broken
                for request in [request for request in requests if request.role == role]:
                    inside = min(max(sizes[request] - positions.start, 0), len(features))
                    part = slice(0, inside if len(positions) else 0)
                    accumulators[request].add(positions, features[part], None if logits is None else logits[part])
        for (role, what), is_broken in broken.items():
            if is_broken:
                raise UserError(f"the detector {self._detector(role).name} returns non-finite {what}")
        for request in requests:
            self.results[request] = accumulators[request].finish()
        for request in requests:
            self.seconds[request] = time.perf_counter() - start

    def _batches(self, request: StatRequest, total: int) -> Batches:
        """Yield the images of this process in detector batches; one blank image if its shard is empty.

        The blank image has an empty range of positions and provides the shapes of the features.
        """
        context = self._context_of(request)
        if request.of == "fake":
            batches = fake_batches(context, total)
        else:
            batches = real_batches(context, choose_reals(context, total))
        share = own_shard(total)
        if not share:
            blank = torch.zeros(1, *context.images.img_shape, dtype=torch.uint8, device=context.device)
            return iter([(range(share.start, share.start), blank)])
        return rebatched(batches, context.detector_batch)

    def size(self, request: StatRequest) -> int:
        """Return the number of images of a request."""
        num_reals = len(self._context_of(request).reals)
        if request.of == "fake":
            assert request.count is not None
            return request.count
        if num_reals == 0:
            raise UserError("the dataset holds no images: metrics need real images to compare with")
        return num_reals if request.count is None else min(request.count, num_reals)

    def _detector(self, role: Role) -> Detector:
        if role not in self.detectors:
            self.detectors[role] = self.context.setup.load(role, self.context.device)
        return self.detectors[role]

    # Cache of the statistics of reals. Only rank 0 reads and writes: other processes may be on another machine.

    def _path(self, request: StatRequest) -> Path | None:
        context = self._context_of(request)
        if context.cache is None:
            return None
        size = self.size(request)
        key = {
            "version": VERSION,
            "data": context.reals.content_hash,  # differs with and without flips
            "chosen": None if size == len(context.reals) else [size, context.seed],
            "detector": context.setup.identity(request.role)["detector_sha256"],
            "library": context.setup.library_of(request.role),
            "protocol": context.setup.protocol,
            "recipe": repr(request.recipe),
        }
        return context.cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]}.pt"

    def _load(self, request: StatRequest) -> Result | None:
        def read() -> Result | None:
            path = self._path(request)
            if path is None or not path.exists():
                return None
            try:
                kept = read_file(path, FORMAT, VERSION, {})
                if not all(isinstance(x, Tensor) for x in kept.values()):
                    raise UserError(f"{path}: holds objects other than tensors")
                return kept
            except UserError as error:
                print(f"Warning: {error}: the statistics are computed again", file=sys.stderr)
                return None

        kept = from_main(read)
        return None if kept is None else {name: x.to(self.context.device) for name, x in kept.items()}

    def _save(self, request: StatRequest) -> None:
        path = self._path(request) if is_main() else None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, FORMAT, VERSION, self.results[request])
        except (OSError, UserError) as error:
            print(f"Warning: the statistics of the real images are not cached ({error})", file=sys.stderr)


def rebatched(batches: Batches, size: int) -> Iterator[tuple[range, Tensor]]:
    """Regroup a stream of batches with consecutive positions into batches of `size` images."""
    waiting: list[Tensor] = []
    start = count = 0
    for positions, images in batches:
        if not waiting:
            start = positions.start
        waiting.append(images)
        count += len(images)
        while count >= size:
            joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            yield range(start, start + size), joined[:size]
            waiting = [joined[size:]] if count > size else []
            start, count = start + size, count - size
    if count:
        yield range(start, start + count), torch.cat(waiting)
