"""CUDA graphs: capture a function of tensors once, then replay it with a single launch."""

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
WARMUPS = 3  # eager calls before the capture, in which libraries select algorithms and allocate workspaces


class CaptureError(Exception):
    """A function cannot be captured; the message states the reason. The function still runs eagerly.

    Graphs captured earlier may no longer follow the seed: discard them.
    """


class Captured(Generic[T]):
    """`function(*inputs)` as a CUDA graph for inputs of these shapes, dtypes and memory layouts.

    A call copies its arguments to the static inputs, replays the graph and returns the static outputs. These are the
    same tensors on every call, with new contents: use them before the next call of any graph in the same `pool` (from
    torch.cuda.graph_pool_handle), because graphs of one pool share memory. Random numbers from torch's generator follow
    the seed at the time of the call. The constructor calls the function several times, so discard any state that the
    function accumulates; the state of the generator is restored.

    Raises CaptureError if the function synchronizes with the device or cannot be captured for another reason, and
    PyTorch's error if memory runs out (`is_out_of_memory`).
    """

    def __init__(self, function: Callable[..., T], *inputs: Tensor, pool: Any = None) -> None:
        self.inputs = [x.clone() for x in inputs]
        with _capture_errors(), torch.random.fork_rng([torch.cuda.current_device()]):
            self._warm_up(function)
            self.result = self._capture(function, pool)

    def _warm_up(self, function: Callable[..., T]) -> None:
        """Run the function on a side stream. The last call raises if it synchronizes, before a capture begins."""
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side_stream):
                for _ in range(WARMUPS - 1):
                    function(*self.inputs)
                with no_synchronisation():
                    function(*self.inputs)
        finally:
            torch.cuda.current_stream().wait_stream(side_stream)

    def _capture(self, function: Callable[..., T], pool: Any) -> T:
        gc.collect()  # freeing e.g. another graph during the capture would invalidate the capture
        self.graph = torch.cuda.CUDAGraph()
        pool = pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            # Thread-local, so that the pin-memory thread of the data loader may call CUDA during the capture.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                return function(*self.inputs)
        except BaseException:
            torch.cuda.set_stream(stream)  # a failed capture leaves its stream current
            _leave_pool(pool)
            _renew_generator()
            raise

    def __call__(self, *inputs: Tensor) -> T:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return self.result


class GraphPool(Generic[T]):
    """CUDA graphs by key, in one memory pool. A function that cannot be captured runs eagerly, with one warning.

    If GPU memory is too small for a graph, all graphs are discarded and no further ones are captured; with `must_fit`,
    the out-of-memory error is raised instead.
    """

    def __init__(self, *, must_fit: bool = False) -> None:
        self.must_fit = must_fit
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Hashable, Captured[T]] = {}
        self.refused: set[Hashable] = set()
        self.is_closed = False  # GPU memory was too small

    def capture(self, name: str, key: Hashable, function: Callable[..., T], *inputs: Tensor) -> Callable[..., T]:
        """Return the graph of `key`, captured from function(*inputs) on first use; `function` itself if capture fails.

        `name` identifies the function in the warning. With `must_fit`, raises PyTorch's out-of-memory error.
        """
        if self.is_closed or key in self.refused:
            return function
        try:
            if key not in self.captured:
                self.captured[key] = Captured(function, *inputs, pool=self.pool)
            return self.captured[key]
        except CaptureError as error:
            self.refused.add(key)
            problem = f"{name} cannot be captured as a CUDA graph ({error}) and runs without one"
        except RuntimeError as error:
            if self.must_fit or not is_out_of_memory(error):
                raise
            self.is_closed = True
            problem = "GPU memory is too small for CUDA graphs, so none are used"
        self.captured.clear()
        self.pool = torch.cuda.graph_pool_handle()  # the old pool cannot be used for further captures
        gc.collect()
        torch.cuda.empty_cache()
        print(f"Warning: {problem}; --graphs=0 turns graphs off", file=sys.stderr, flush=True)
        return function


@contextmanager
def _capture_errors() -> Iterator[None]:
    """Convert PyTorch's errors to CaptureError, except out-of-memory errors."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CaptureError(describe_error(error)) from error


def _leave_pool(pool: Any) -> None:
    """Release the pool of a capture that could not be ended; PyTorch 2.11 would keep its memory reserved."""
    with suppress(RuntimeError):  # the capture was ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


def _renew_generator() -> None:
    """Replace the state of the device's default generator: after a failed capture it raises when used."""
    device = torch.cuda.current_device()
    fresh = torch.Generator(torch.device("cuda", device))
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise RuntimeError wherever the host synchronizes with the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(action="ignore"):  # "prototype feature", issued after the mode is set
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
