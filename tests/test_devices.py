"""Devices, process groups and graph captures on GPUs and several machines, as far as a CPU can test them."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import launch_as

from dnnlib.config import UserError
from torch_utils import distributed, graphs
from torch_utils.graphs import Captured, CaptureError, GraphPool, no_synchronisation


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Simulate two GPUs with this process on the second; return the devices set as current."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return devices


def test_a_gpu_is_named_without_initialising_it(used: list[torch.device]) -> None:
    names = ["cuda:0", "cuda", None]
    assert [str(distributed.choose_device(name)) for name in names] == ["cuda:0", "cuda:1", "cuda:1"]
    with pytest.raises(UserError, match="--device=cuda:2: this machine has 2 CUDA devices"):
        distributed.choose_device("cuda:2")
    assert used == []


def test_each_process_of_a_machine_needs_a_gpu(used: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, the first process has a GPU and reports the error for the processes without a GPU."""
    device = distributed.choose_device()
    distributed.check_processes(2, None, device)
    with pytest.raises(UserError, match="--gpus=3: this machine has 2 CUDA devices"):
        distributed.check_processes(3, None, device)
    launch_as(monkeypatch, WORLD_SIZE="6")
    distributed.check_processes(6, None, device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--nproc-per-node=3: this machine has 2 CUDA devices"):
        distributed.check_processes(6, None, device)


def test_each_process_uses_its_own_gpu(used: list[torch.device]) -> None:
    assert str(distributed.use_device()) == "cuda:1"
    assert str(distributed.use_device("cpu")) == "cpu"
    assert list(map(str, used)) == ["cuda:1"]


def test_sync_errors_are_enabled_only_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | int] = []

    def set_mode(mode: str | int) -> None:
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(UserWarning, match="of the block"), no_synchronisation():
        warnings.warn("of the block", stacklevel=1)
    assert modes == ["error", 1]


def test_bfloat16_support_is_checked_on_the_chosen_gpu(
    used: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=(7, 8)[device.index]))
    assert [distributed.has_bf16(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")] == [False, True, False]
    assert used == []


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Record process groups instead of creating them."""
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(distributed, "_host_group", None)
    return made


def test_gpu_processes_get_a_device_and_a_host_group(
    used: list[torch.device], groups: list[tuple[str, dict[str, Any]]]
) -> None:
    timeout = timedelta(seconds=60)
    distributed._join("cuda", timeout)
    assert groups == [
        ("nccl", {"device_id": torch.device("cuda:1"), "timeout": timeout}),
        ("gloo", {"timeout": timeout}),
    ]
    assert list(map(str, used)) == ["cuda:1"]


def test_a_network_unusable_by_gloo_is_reported(
    used: list[torch.device], groups: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError("[enforce fail at third_party/gloo/gloo/transport/tcp/device.cc:84] Unable to find address")

    monkeypatch.setattr(dist, "new_group", fail)
    with pytest.raises(UserError, match=r"over TCP \(.enforce fail .*\): set GLOO_SOCKET_IFNAME to the network"):
        distributed._join("cuda", timedelta(seconds=60))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: fail_otherwise())
    with pytest.raises(RuntimeError, match="NCCL error"):
        distributed._join("cuda", timedelta(seconds=60))


def fail_otherwise() -> None:
    raise RuntimeError("NCCL error: unhandled system error")


def nothing() -> None:
    """Stand in for the work of a process."""


def test_workers_report_errors_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(SystemExit) as stopped:
        distributed.launch(nothing, 2)
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("Error (process ")] == []
    assert "GLOO_SOCKET_IFNAME" in lines[0]


class Stream:
    wait_stream: Callable[..., None] = staticmethod(lambda other: None)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulate a GPU that runs functions eagerly; return the capture calls in their order."""
    done: list[str] = []

    @contextlib.contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        done.append("capture")
        yield

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: done.append("restore the stream"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("free memory"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: done.append(f"waiting: {mode}"))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "_renew_generator", lambda: done.append("renew the generator"))
    return done


def test_synchronisation_before_a_capture_is_an_error(captures: list[str]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        captures.append("run")
        return x

    Captured(function, torch.zeros(1))
    assert captures == ["run", "run", "waiting: error", "run", "waiting: 0", "capture", "run"]


class Freed:
    """A reference cycle, as between networks and hooks."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_freed_during_a_capture(captures: list[str]) -> None:
    garbage: list[weakref.ref[Freed]] = []
    left: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        if "capture" in captures:
            left.append(sum(ref() is not None for ref in garbage))
        garbage.append(weakref.ref(Freed()))
        return x

    gc.disable()
    try:
        Captured(function, torch.zeros(1))
    finally:
        gc.enable()
    assert len(garbage) == 4
    assert left == [0]


class Failing:
    """A function that raises an error before or during a capture."""

    def __init__(self, captures: list[str], error: Exception, *, early: bool = False) -> None:
        self.captures, self.error, self.early, self.calls = captures, error, early, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.early or self.captures[-1:] == ["capture"]:
            raise self.error
        return x


def test_an_aborted_capture_leaves_the_gpu_usable(captures: list[str]) -> None:
    with pytest.raises(CaptureError, match=r"^operation not permitted when stream is capturing$"):
        Captured(Failing(captures, RuntimeError("operation not permitted when stream is capturing\nAt ...")), NOTHING)
    assert captures[-2:] == ["restore the stream", "renew the generator"]


NOTHING = torch.zeros(1)


@pytest.mark.parametrize("early", [False, True])
def test_a_phase_that_cannot_be_captured_runs_eagerly(
    captures: list[str], early: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool: GraphPool[torch.Tensor] = GraphPool()
    bad = Failing(captures, RuntimeError("called a synchronizing CUDA operation"), early=early)
    assert isinstance(pool.capture("G_main", "G_main", lambda x: x, NOTHING), Captured)
    for _ in range(2):
        assert pool.capture("D_reg", "D_reg", bad, NOTHING) is bad
    assert bad.calls <= 4
    message = capsys.readouterr().err
    assert message == (
        "Warning: D_reg cannot be captured as a CUDA graph (called a synchronizing CUDA operation) and runs without "
        "one; --graphs=0 turns graphs off\n"
    )
    assert not pool.captured  # random numbers would not follow the seed
    assert isinstance(pool.capture("G_main", "G_main", lambda x: x, NOTHING), Captured)


def test_graphs_are_disabled_when_memory_runs_out(captures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bad = Failing(captures, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    pool: GraphPool[torch.Tensor] = GraphPool(must_fit=True)
    with pytest.raises(torch.OutOfMemoryError):
        pool.capture("G_main", "G_main", bad, NOTHING)
    pool = GraphPool()
    pool.capture("G_main", "G_main", lambda x: x, NOTHING)
    assert pool.capture("D_main", "D_main", bad, NOTHING) is bad
    assert captures[-1] == "free memory"
    assert not pool.captured

    def other(x: torch.Tensor) -> torch.Tensor:
        return x

    assert pool.capture("G_main", "G_main", other, NOTHING) is other
    assert capsys.readouterr().err.count("GPU memory is too small for CUDA graphs, so none are used") == 1


def test_errors_in_a_captured_function_are_raised(captures: list[str]) -> None:
    pool: GraphPool[torch.Tensor] = GraphPool()
    with pytest.raises(TypeError, match="a mistake"):
        pool.capture("G_main", "G_main", Failing(captures, TypeError("a mistake"), early=True), NOTHING)


@pytest.mark.gpu
@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()])
def test_the_gpu_works_after_an_aborted_capture(wait: Callable[[torch.Tensor], object]) -> None:
    """Reading a value is detected in the warm-up; any other synchronisation aborts the capture."""

    def draws(x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)

    def waits(x: torch.Tensor) -> torch.Tensor:
        wait(x)
        return draws(x)

    x, drawn = torch.zeros(1000, device="cuda"), []
    with pytest.raises(CaptureError):
        Captured(waits, x)
    for function in (draws, Captured(draws, x)):
        torch.manual_seed(7)
        drawn.append(function(x).clone())
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].std() > 0.9
