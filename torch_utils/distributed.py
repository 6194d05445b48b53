"""Several processes as one: launch, rank, averages. Everything is a no-op on one process.

Workers read the environment variables of torchrun, so that `--gpus=N` (which starts torch's own elastic launcher on
this machine) and `torchrun --nnodes=... train.py` (which has started it already) take the same path.

Processes trust each other: who reaches their sockets or their store can run code in them. So those that `--gpus=N`
starts meet in a file that this user alone can open, and talk over the loopback interface.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dnnlib import screen, streams
from dnnlib.config import UserError
from dnnlib.util import describe_error, explain
from torch_utils.watchdog import Watchdog

T = TypeVar("T")
DEFAULT_TIMEOUT = 1800.0  # seconds
MAX_ON_A_CPU = 16  # processes, however few cores there are
MAX_PROCESSES = 10**6  # on all machines


def rank() -> int:
    """Return this process's number among all processes, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def launched_world_size() -> int | None:
    """Return the number of processes that torchrun started, None outside torchrun.

    Raises UserError for environment variables that no launcher sets so.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    world_size = _launched("WORLD_SIZE", 1, MAX_PROCESSES)
    _launched("RANK", 0, world_size - 1)
    _launched("LOCAL_RANK", 0, _launched("LOCAL_WORLD_SIZE", 1, world_size) - 1)
    _launched("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is missing from the environment, the name of the first machine; torchrun sets it")
    return world_size


def launched_rank() -> int:
    """Return this process's number as torchrun gave it, before there is a group; 0 outside torchrun."""
    return 0 if launched_world_size() is None else _launched("RANK", 0, MAX_PROCESSES)


def _launched(name: str, low: int, high: int) -> int:
    """Return a number in the environment that a launcher sets. Raises UserError for one that is none or not there."""
    text = os.environ.get(name)
    if text is None:
        raise UserError(
            f"{name} is missing from the environment, a whole number from {low} to {high}; torchrun sets it"
        )
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(
            f"{name}={text[:40]}: in the environment, must be a whole number from {low} to {high}; torchrun sets it, "
            "without which it is to be unset"
        )
    return int(text)


def choose_device(requested: str | None = None) -> torch.device:
    """Return the requested device, or this process's GPU, or the CPU. Raises UserError for one that is not there.

    Does not touch it: a process that only launches others would hold memory of a GPU.
    """
    local_rank = _launched("LOCAL_RANK", 0, MAX_PROCESSES) if "LOCAL_RANK" in os.environ else 0
    if requested is None:
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device={requested}: no such kind of device; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device={requested}: torch sees no CUDA device here; use --device=cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device={device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether a device has matrix units for bfloat16: NVIDIA GPUs from compute capability 8.0 on, and those of AMD."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def use_device(requested: str | None = None) -> torch.device:
    """Return what `choose_device` does, made the one that "cuda" means in this process."""
    device = choose_device(requested)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_processes(count: int, requested: str | None, device: torch.device) -> None:
    """Raise UserError when `count` processes on this machine cannot have a device each, or are too many for a CPU."""
    if device.type != "cuda":
        most = max(MAX_ON_A_CPU, os.cpu_count() or 1)
        if launched_world_size() is None and count > most:
            raise UserError(f"--gpus={count}: too many processes for this machine without GPUs; at most {most}")
        return
    if count > 1 and requested is not None and ":" in requested:
        raise UserError(f"--device={requested}: {count} processes need a GPU each; use --device=cuda")
    flag = "--gpus"
    if launched_world_size() is not None:
        flag, count = "torchrun --nproc-per-node", _launched("LOCAL_WORLD_SIZE", 1, MAX_PROCESSES)
    if count > torch.cuda.device_count():
        raise UserError(f"{flag}={count}: this machine has {torch.cuda.device_count()} CUDA devices")


def launch(
    function: Callable[..., None],
    num_processes: int,
    *args: Any,
    device_type: str = "cpu",
    timeout: float = DEFAULT_TIMEOUT,
) -> None:
    """Call `function(*args)` in `num_processes` processes that form one group and return when all are done.

    One process is this one. Under torchrun this process is one of them already. `function` and `args` must be
    picklable. Raises SystemExit with a worker's exit code when a worker fails, after it was printed why. A process that
    keeps the others waiting for `timeout` seconds is named and ends all.
    """
    if launched_world_size() is not None:
        _work(function, args, device_type, timeout, None)
    elif num_processes == 1:
        function(*args)
    else:
        _launch_local(function, num_processes, args, device_type, timeout)


def _launch_local(
    function: Callable[..., None], num_processes: int, args: tuple[Any, ...], device_type: str, timeout: float
) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # workers print their errors themselves
    # Workers note SIGTERM and go on to the end of a step, which never comes when one of them has failed.
    if not os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "").isdigit():
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"
    # The folder has mode 0700: what the processes meet in is for this user alone.
    with tempfile.TemporaryDirectory() as folder, _loopback(), _signals_passed_on():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            rdzv_backend="c10d",
            rdzv_endpoint=os.path.join(folder, "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            run_id=f"styleformer-{os.getpid()}",
            max_restarts=0,
            monitor_interval=0.2,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGQUIT",  # of the others, elastic would give workers 30 s to live
        )
        try:
            elastic_launch(config, _work)(function, args, device_type, timeout, os.path.join(folder, "store"))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                cause = f"signal {-failure.exitcode} (9: by hand, or the machine ran out of memory)"
                print(f"Error: process {rank} was killed by {cause}", file=sys.stderr)
            raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None


@contextmanager
def _loopback() -> Iterator[None]:
    """While active, processes that are started open no socket to other machines, unless the user names an interface."""
    interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    values = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    values["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a server of the launcher, for workers to meet at
    added = {name: value for name, value in values.items() if value and name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """While active, pass signals on to the workers and wait for what they do; a second SIGINT ends all at once.

    SIGINT goes on as SIGTERM, because a terminal has sent it to the workers already.
    """
    interrupts = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        at_once = interrupts > 1
        for worker in multiprocessing.active_children():
            if worker.pid:
                os.kill(worker.pid, signal.SIGKILL if at_once else _PASSED_ON[signal.Signals(number)])
        if at_once:
            raise SystemExit(128 + signal.SIGINT)

    previous = {number: signal.signal(number, pass_on) for number in heeded(_PASSED_ON)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return those of the signals that this program was not started to ignore, as `nohup` does with SIGHUP."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


_PASSED_ON = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGTERM}
if hasattr(signal, "SIGUSR1"):  # Windows has neither
    _PASSED_ON |= {signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}


def _work(
    function: Callable[..., None], args: tuple[Any, ...], device_type: str, timeout: float, store: str | None
) -> None:
    """One worker: join the group, run, leave. A UserError becomes one line and exit code 2.

    `store` is the file in which the processes of one machine meet; None: torchrun's variables say where.
    """
    streams.protect(needs_stdout=True)
    screen.guard()
    try:
        _join(device_type, timedelta(seconds=2 * timeout), store)  # the watchdog speaks first, and knows more
    except UserError as error:
        print(f"Error (process {os.environ.get('RANK', 0)}): {error}", file=sys.stderr)
        _leave(2)
    watchdog = Watchdog(rank(), world_size(), timeout, position=lambda: _calls, open_store=partial(_open_store, store))
    watchdog.start()
    codes = [0]
    # gloo's destructors abort a process now and then when it ends in the usual way.
    atexit.register(lambda: _leave(codes[-1]))
    try:
        function(*args)
        sys.stdout.flush()
        barrier()
    except UserError as error:
        print(f"Error: {error}" if is_main() else f"Error (process {rank()}): {error}", file=sys.stderr)
        _leave(2)
    except SystemExit as error:
        if error.code == 2:  # rank 0 has refused something, and says it
            _leave(2)
        codes.append(error.code if isinstance(error.code, int) else 1)
        watchdog.stop()
        dist.destroy_process_group()
        raise
    except Exception as error:
        if message := explain(error):
            print(f"Error (process {rank()}): {message}", file=sys.stderr)
            _leave(2)
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # who failed first says more
            print(f"Error (process {rank()}): lost contact with another process", file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(1)
    watchdog.stop()
    dist.destroy_process_group()


def _open_store(file: str | None) -> dist.Store:
    """Return the store of all processes, on a connection of its own."""
    if file is not None:
        return dist.FileStore(file, -1)  # which leaves the file there for others
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _join(device_type: str, timeout: timedelta, file: str | None = None) -> None:
    """Form the group of all processes, and that for tensors on the CPU. Raises UserError if gloo finds no network."""
    global _host_group
    meeting: dict[str, Any] = {}
    if file is not None:
        ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        meeting = {"store": _open_store(file), **ranks}
    try:
        if device_type == "cuda":
            device = use_device("cuda")
            dist.init_process_group("nccl", device_id=device, timeout=timeout, **meeting)
        else:
            # The cores that this program may use, shared out evenly: threads that outnumber them wait for each other.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
            dist.init_process_group("gloo", timeout=timeout, **meeting)
        _host_group = dist.new_group(backend="gloo", timeout=timeout) if device_type == "cuda" else dist.group.WORLD
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"the processes cannot reach each other over TCP ({describe_error(error)}): set GLOO_SOCKET_IFNAME to the "
            "network interface that they share, as `ip addr` lists them; lo for one machine alone"
        ) from None


def _leave(code: int) -> NoReturn:
    """End this process at once: gloo aborts a process that takes its time while others have gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_host_group: Any = None  # of all processes, for tensors on the CPU
_calls = 0  # collective calls that this process has entered, as the process group itself one for the process


def _enter_call() -> None:
    global _calls
    _calls += 1


def all_reduce(x: Tensor) -> Tensor:
    """Sum `x` over all processes, in place."""
    if world_size() > 1:
        _enter_call()
        dist.all_reduce(x)
    return x


def average(x: Tensor) -> Tensor:
    """Replace x by its mean over all processes, and return it. A collective call."""
    if world_size() > 1:
        all_reduce(x)
        x /= world_size()
    return x


def maximum(values: Sequence[int]) -> list[int]:
    """Return the largest of each value over all processes. Does not wait for GPUs."""
    if world_size() == 1:
        return list(values)
    _enter_call()
    table = torch.tensor(values)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=_host_group)
    return [int(x) for x in table.tolist()]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of rank 0, in place."""
    if world_size() > 1:
        for x in tensors:
            _enter_call()
            dist.broadcast(x, src=0)


def from_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return what it returned there, on every rank.

    A UserError is raised on rank 0, which reports it; the other processes leave quietly with exit code 2.
    """
    if world_size() == 1:
        return function()
    _enter_call()
    box: list[Any] = [None, None]  # result, error
    if is_main():
        try:
            box[0] = function()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1] if is_main() else SystemExit(2)
    return box[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        _enter_call()
        dist.barrier()
