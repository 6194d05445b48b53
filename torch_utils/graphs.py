"""CUDA graphs: a function of tensors, recorded once and replayed as one launch."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dnnlib.util import describe_error, is_out_of_memory

T = TypeVar("T")
WARMUPS = 3  # calls before the recording, in which libraries choose algorithms and allocate workspaces


class CaptureError(Exception):
    """A function cannot be recorded; the message says why. It still runs as it is.

    Graphs recorded earlier may no longer follow the seed: discard them.
    """


class Captured(Generic[T]):
    """`function(*inputs)` as a CUDA graph for inputs of these shapes, types and memory layouts.

    A call copies its arguments to where the graph reads them, replays it and returns what the function returned when
    it was recorded: the same tensors every time, with new contents, so use them before the next call of any graph of
    the `pool` (of torch.cuda.graph_pool_handle), which shares memory. What the function draws from torch's generator
    follows the seed at the time of the call. The constructor calls the function several times, so discard what it has
    accumulated; the generator's state is restored.

    Raises CaptureError for a function that waits for the device or cannot be recorded otherwise, and what PyTorch
    raises where memory is not enough (`is_out_of_memory`).
    """

    def __init__(self, function: Callable[..., T], *inputs: Tensor, pool: Any = None) -> None:
        self.inputs = [x.clone() for x in inputs]
        with _capture_errors(), torch.random.fork_rng([torch.cuda.current_device()]):
            self._warm_up(function)
            self.result = self._record(function, pool)

    def _warm_up(self, function: Callable[..., T]) -> None:
        """Run the function aside; the last time, waiting for the device is an error: here it costs nothing yet."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARMUPS - 1):
                    function(*self.inputs)
                with no_synchronisation():
                    function(*self.inputs)
        finally:
            torch.cuda.current_stream().wait_stream(aside)

    def _record(self, function: Callable[..., T], pool: Any) -> T:
        gc.collect()  # what is freed while the graph is recorded, another graph say, would end the recording
        self.graph = torch.cuda.CUDAGraph()
        pool = pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            # Thread-local: the thread that pins memory for the data loader may go on with its own calls.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                return function(*self.inputs)
        except BaseException:
            torch.cuda.set_stream(stream)  # a recording that cannot be ended leaves its own
            _leave_pool(pool)
            _renew_generator()
            raise

    def __call__(self, *inputs: Tensor) -> T:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result


class GraphPool(Generic[T]):
    """CUDA graphs by key, in shared memory; a function that cannot be recorded runs as it is, with one warning.

    Where memory is too small for a graph, none is kept or recorded from then on; with `must_fit` that is an error.
    """

    def __init__(self, *, must_fit: bool = False) -> None:
        self.must_fit = must_fit
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded: dict[Hashable, Captured[T]] = {}
        self.refused: set[Hashable] = set()
        self.is_closed = False  # memory was too small

    def record(self, name: str, key: Hashable, function: Callable[..., T], *inputs: Tensor) -> Callable[..., T]:
        """Return the graph of `key`, recorded from function(*inputs) if it is new, or else the function.

        `name` stands for the function in the warning. Raises what PyTorch raises for memory, if graphs must fit.
        """
        if self.is_closed or key in self.refused:
            return function
        try:
            if key not in self.recorded:
                self.recorded[key] = Captured(function, *inputs, pool=self.pool)
            return self.recorded[key]
        except CaptureError as error:
            self.refused.add(key)
            problem = f"{name} cannot be recorded as a CUDA graph ({error}) and runs without"
        except RuntimeError as error:
            if self.must_fit or not is_out_of_memory(error):
                raise
            self.is_closed = True
            problem = "GPU memory is too small for CUDA graphs, so none are used"
        self.recorded.clear()
        self.pool = torch.cuda.graph_pool_handle()  # in the old one nothing can be recorded any more
        gc.collect()
        torch.cuda.empty_cache()
        print(f"Warning: {problem}; --graphs=0 turns graphs off", file=sys.stderr, flush=True)
        return function


@contextmanager
def _capture_errors() -> Iterator[None]:
    """Raise CaptureError for errors of PyTorch inside, but for those of memory."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CaptureError(describe_error(error)) from error


def _leave_pool(pool: Any) -> None:
    """Let the allocator forget a recording that could not be ended, whose memory PyTorch 2.11 would keep reserved."""
    with suppress(RuntimeError):  # it was ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


def _renew_generator() -> None:
    """Give the device's default generator a fresh state: that of a recording which broke off refuses to draw."""
    device = torch.cuda.current_device()
    fresh = torch.Generator(torch.device("cuda", device))
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(action="ignore"):  # that this is a prototype, said after the mode was set
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
