"""What only matters with GPUs or several machines, as far as a CPU can tell: devices, groups, recordings."""

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
from conftest import no_synchronisation

from dnnlib.config import UserError
from torch_utils import distributed
from torch_utils.graphs import Captured


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs, of which this process is given the second; the devices that it makes its own."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return devices


def test_a_gpu_is_named_without_being_used(used: list[torch.device]) -> None:
    names = ["cuda:0", "cuda", None]
    assert [str(distributed.choose_device(name)) for name in names] == ["cuda:0", "cuda:1", "cuda:1"]
    with pytest.raises(UserError, match="--device=cuda:2: this machine has 2 CUDA devices"):
        distributed.choose_device("cuda:2")
    assert used == []


def test_each_process_of_a_machine_needs_a_gpu(used: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchrun too, whose first process has one and says so for those that have none."""
    device = distributed.choose_device()
    distributed.check_processes(2, None, device)
    with pytest.raises(UserError, match="--gpus=3: this machine has 2 CUDA devices"):
        distributed.check_processes(3, None, device)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    distributed.check_processes(6, None, device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--nproc-per-node=3: this machine has 2 CUDA devices"):
        distributed.check_processes(6, None, device)


def test_a_gpu_that_is_used_is_this_processes(used: list[torch.device]) -> None:
    assert str(distributed.use_device()) == "cuda:1"
    assert str(distributed.use_device("cpu")) == "cpu"
    assert list(map(str, used)) == ["cuda:1"]


def test_the_mode_in_which_waiting_for_a_gpu_is_an_error_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(UserWarning, match="of the block"), no_synchronisation():
        warnings.warn("of the block", stacklevel=1)
    assert modes == ["error", "default"]


def test_the_chosen_gpu_is_asked_for_bfloat16(used: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=(7, 8)[device.index]))
    assert [distributed.has_bf16(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")] == [False, True, False]
    assert used == []


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The process groups that are made, none of them real."""
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(distributed, "_host_group", None)
    return made


def test_processes_on_gpus_form_a_group_that_knows_theirs_and_one_for_the_host(
    used: list[torch.device], groups: list[tuple[str, dict[str, Any]]]
) -> None:
    timeout = timedelta(seconds=60)
    distributed._join("cuda", timeout)
    assert groups == [
        ("nccl", {"device_id": torch.device("cuda:1"), "timeout": timeout}),
        ("gloo", {"timeout": timeout}),
    ]
    assert list(map(str, used)) == ["cuda:1"]


def test_a_network_that_gloo_cannot_use_is_explained(
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
    """What workers would do."""


def test_workers_say_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(SystemExit) as stopped:
        distributed.launch(nothing, 2)
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("Error (process ")] == []
    assert "GLOO_SOCKET_IFNAME" in lines[0]


class Freed:
    """Garbage in a cycle, as networks and hooks are."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_freed_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    garbage: list[weakref.ref[Freed]] = []
    left: list[bool] = []

    @contextlib.contextmanager
    def recording(*args: Any, **options: Any) -> Iterator[None]:
        left.extend(x() is not None for x in garbage)
        yield

    class Stream:
        wait_stream: Callable[..., None] = staticmethod(lambda other: None)

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", recording)

    def function(x: torch.Tensor) -> torch.Tensor:
        garbage.append(weakref.ref(Freed()))
        return x

    gc.disable()
    try:
        Captured(function, torch.zeros(1))
    finally:
        gc.enable()
    assert left == [False] * 3
