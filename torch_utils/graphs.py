"""CUDA graphs: a function of tensors, recorded once and replayed as one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARMUPS = 3  # calls before the recording, in which libraries choose algorithms and allocate workspaces


class Captured(Generic[T]):
    """`function(*inputs)` as a CUDA graph for inputs of these shapes, types and memory layouts.

    A call copies its arguments to where the graph reads them, replays it and returns what the function returned when
    it was recorded: the same tensors every time, with new contents, so use them before the next call of any graph of
    the `pool` (of torch.cuda.graph_pool_handle), which shares memory. The function must not wait for the device. What
    it draws from torch's generator follows the seed at the time of the call. It is run a few times while this object is
    made, so undo afterwards what it accumulates.
    """

    def __init__(self, function: Callable[..., T], *inputs: Tensor, pool: Any = None) -> None:
        self.inputs = [x.clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUPS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        gc.collect()  # what is freed while the graph is recorded, another graph say, would end the recording
        self.graph = torch.cuda.CUDAGraph()
        # Thread-local: the thread that pins memory for the data loader may go on with its own calls.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> T:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.result
