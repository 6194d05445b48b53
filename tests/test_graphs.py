"""Failed CUDA graph captures with PyTorch's allocator and generator on a simulated GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_utils.graphs import Captured, GraphPool

GIB = 2**30


def reads_a_value(x: Tensor) -> Tensor:
    return x + torch.randn_like(x) * x.sum().item()


def waits(x: Tensor) -> Tensor:
    y = x + torch.randn_like(x)
    torch.cuda.synchronize()
    return y


def runs_out_of_memory(x: Tensor) -> Tensor:
    """Allocate memory that the stub refuses during the capture only."""
    y = torch.empty(GIB, dtype=torch.uint8, device=x.device)
    if torch.cuda.is_current_stream_capturing():
        y = torch.empty(100 * GIB, dtype=torch.uint8, device=x.device)
    return x + y[: len(x)]


BAD: dict[str, Callable[[Tensor], Tensor]] = {"value": reads_a_value, "wait": waits, "memory": runs_out_of_memory}


def fail_to_capture(how: str) -> dict[str, Any]:
    """Capture a phase, fail to capture another one, continue; return the resulting state."""
    stub = ctypes.CDLL(None)
    stub.stub_allow_waiting()
    stub.stub_memory_used.restype = ctypes.c_size_t
    kept: list[Tensor] = []

    def good(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing() and not kept:
            kept.append(torch.empty(2**20, device=x.device))  # such as a library's workspace, which outlives the graph
        return x + torch.randn_like(x)

    x = torch.zeros(1000, device="cuda")
    stream = torch.cuda.current_stream()
    pool: GraphPool[Tensor] = GraphPool()
    with contextlib.redirect_stderr(io.StringIO()) as messages:
        first = pool.capture("G_main", "G_main", good, x)
        second = pool.capture("D_main", "D_main", BAD[how], x)
        facts: dict[str, Any] = {
            "first": isinstance(first, Captured),
            "second is the function": second is BAD[how],
            "stream restored": torch.cuda.current_stream() == stream,
            "capturing": torch.cuda.is_current_stream_capturing(),
            "sync debug mode": torch.cuda.get_sync_debug_mode(),
        }
        torch.randn(5, device="cuda")
        for name in ("G_main", "D_reg"):
            graph = pool.capture(name, name, good, x)
            facts[name] = isinstance(graph, Captured)
            graph(x)
    del first, second, graph, pool
    gc.collect()
    torch.cuda.empty_cache()
    facts["MiB reserved"] = torch.cuda.memory_reserved() // 2**20
    # Cached memory must still be released when memory runs out.
    stub.stub_limit_memory(ctypes.c_size_t(stub.stub_memory_used() + 10 * GIB))
    for size in (6, 8):
        torch.empty(size * GIB, dtype=torch.uint8, device="cuda")
    return facts | {"messages": messages.getvalue()}


@pytest.mark.parametrize("how", BAD)
def test_a_phase_that_cannot_be_captured_has_no_side_effects(how: str, stub_gpu: Executor) -> None:
    facts = stub_gpu.submit(fail_to_capture, how).result()
    messages = facts.pop("messages").splitlines()
    has_memory = how != "memory"
    assert facts.pop("MiB reserved") < 100
    assert facts == {
        "first": True,
        "second is the function": True,
        "stream restored": True,
        "capturing": False,
        "sync debug mode": 0,
        "G_main": has_memory,  # graphs stay disabled once memory ran out
        "D_reg": has_memory,
    }
    assert messages == [f"Warning: {WARNINGS[how]}; --graphs=0 turns graphs off"]


REFUSED = "D_main cannot be captured as a CUDA graph"
WARNINGS = {
    "value": f"{REFUSED} (called a synchronizing CUDA operation) and runs without one",
    "wait": f"{REFUSED} (CUDA error: operation failed due to a previous error during capture) and runs without one",
    "memory": "GPU memory is too small for CUDA graphs, so none are used",
}
