"""Multi-process execution: launch, ranks, collectives. Every function is a no-op in a single process.

Workers read the environment variables of torchrun. `--gpus=N`, which starts torch's elastic launcher on this machine,
and `torchrun --nnodes=... train.py` therefore share one code path.

Processes trust each other: a client that reaches their sockets or their store can run code in them. Workers started by
`--gpus=N` therefore rendezvous through a file that only this user can open, and communicate over loopback.
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
from torch_utils.misc import available_cores
from torch_utils.watchdog import Watchdog

T = TypeVar("T")
DEFAULT_TIMEOUT = 1800.0  # seconds
MAX_ON_A_CPU = 16  # process limit on a CPU; the number of cores if that is larger
MAX_PROCESSES = 10**6  # world size


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process has rank 0, which writes files and prints."""
    return rank() == 0


def launched_world_size() -> int | None:
    """Return the number of processes that torchrun started, None outside torchrun.

    Raises UserError for missing or inconsistent environment variables of the launcher.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    world_size = _launcher_variable("WORLD_SIZE", 1, MAX_PROCESSES)
    _launcher_variable("RANK", 0, world_size - 1)
    _launcher_variable("LOCAL_RANK", 0, _launcher_variable("LOCAL_WORLD_SIZE", 1, world_size) - 1)
    _launcher_variable("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is missing from the environment (host name of rank 0); torchrun sets it")
    return world_size


def launched_rank() -> int:
    """Return the rank that torchrun assigned, available before the process group exists; 0 outside torchrun."""
    return 0 if launched_world_size() is None else _launcher_variable("RANK", 0, MAX_PROCESSES)


def _launcher_variable(name: str, low: int, high: int) -> int:
    """Return an integer environment variable of the launcher. Raises UserError if it is missing or out of range."""
    text = os.environ.get(name)
    if text is None:
        raise UserError(
            f"{name} is missing from the environment (a whole number from {low} to {high}); torchrun sets it"
        )
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(
            f"{name}={text[:40]}: this environment variable must be a whole number from {low} to {high}; torchrun sets "
            "it; unset it when running without torchrun"
        )
    return int(text)


def choose_device(requested: str | None = None) -> torch.device:
    """Return the requested device; by default this process's GPU, else the CPU. Raises UserError if it is unavailable.

    Does not initialize the device, because a process that only launches workers would then occupy GPU memory.
    """
    local_rank = _launcher_variable("LOCAL_RANK", 0, MAX_PROCESSES) if "LOCAL_RANK" in os.environ else 0
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
    """Return whether a device has bfloat16 matrix units: NVIDIA from compute capability 8.0 on, and AMD GPUs."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def use_device(requested: str | None = None) -> torch.device:
    """Return the device of `choose_device`, and make it the current CUDA device of this process."""
    device = choose_device(requested)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_processes(count: int, requested: str | None, device: torch.device) -> None:
    """Raise UserError if this machine has fewer GPUs than `count` processes, or `count` is too large for a CPU."""
    if device.type != "cuda":
        most = max(MAX_ON_A_CPU, os.cpu_count() or 1)
        if launched_world_size() is None and count > most:
            raise UserError(f"--gpus={count}: too many processes for this machine without GPUs; at most {most}")
        return
    if count > 1 and requested is not None and ":" in requested:
        raise UserError(f"--device={requested}: {count} processes need a GPU each; use --device=cuda")
    flag = "--gpus"
    if launched_world_size() is not None:
        flag, count = "torchrun --nproc-per-node", _launcher_variable("LOCAL_WORLD_SIZE", 1, MAX_PROCESSES)
    if count > torch.cuda.device_count():
        raise UserError(f"{flag}={count}: this machine has {torch.cuda.device_count()} CUDA devices")


def launch(
    function: Callable[..., None],
    num_processes: int,
    *args: Any,
    device_type: str = "cpu",
    timeout: float = DEFAULT_TIMEOUT,
) -> None:
    """Call `function(*args)` in `num_processes` processes that form one process group; return when all have finished.

    A single process runs in place. Under torchrun this process is already a worker. `function` and `args` must be
    picklable. Raises SystemExit with the exit code of a failed worker, which has printed its error. If a process keeps
    the others waiting for `timeout` seconds, an error names its rank and all processes exit.
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
    # Workers handle SIGTERM at the end of a step, which they never reach if another worker has failed.
    if not os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "").isdigit():
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"
    # The folder has mode 0700, so only this user can open the rendezvous file.
    with tempfile.TemporaryDirectory() as folder, _loopback(), _forward_signals():
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
            signals_to_handle="SIGQUIT",  # for any other signal, elastic would kill the workers after 30 s
        )
        try:
            elastic_launch(config, _work)(function, args, device_type, timeout, os.path.join(folder, "store"))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                cause = f"signal {-failure.exitcode} (9: killed manually, or out of host memory)"
                print(f"Error: process {rank} was killed by {cause}", file=sys.stderr)
            raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None


@contextmanager
def _loopback() -> Iterator[None]:
    """While active, processes started here communicate over loopback, unless the user has set an interface."""
    interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    values = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    values["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # do not start the launcher's TCP store
    added = {name: value for name, value in values.items() if value and name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _forward_signals() -> Iterator[None]:
    """While active, forward signals to the workers and keep waiting for them; a second SIGINT kills all workers.

    SIGINT is forwarded as SIGTERM, because the terminal has already sent SIGINT to the workers.
    """
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        at_once = interrupts > 1
        for worker in multiprocessing.active_children():
            if worker.pid:
                os.kill(worker.pid, signal.SIGKILL if at_once else _FORWARDED[signal.Signals(number)])
        if at_once:
            raise SystemExit(128 + signal.SIGINT)

    previous = {number: signal.signal(number, forward) for number in not_ignored(_FORWARDED)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def not_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the given signals without the ones that this process ignores, e.g. SIGHUP under `nohup`."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


_FORWARDED = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGTERM}
if hasattr(signal, "SIGUSR1"):  # Windows has neither SIGHUP nor SIGUSR1
    _FORWARDED |= {signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}


def _work(
    function: Callable[..., None], args: tuple[Any, ...], device_type: str, timeout: float, store: str | None
) -> None:
    """Run one worker: join the process group, call the function, leave. A UserError becomes one line and exit code 2.

    `store` is the path of the FileStore of a single machine; None selects the TCP store of torchrun's variables.
    """
    streams.protect(needs_stdout=True)
    screen.guard()
    try:
        _join(device_type, timedelta(seconds=2 * timeout), store)  # the watchdog times out first, with a better error
    except UserError as error:
        print(f"Error (process {os.environ.get('RANK', 0)}): {error}", file=sys.stderr)
        _leave(2)
    watchdog = Watchdog(rank(), world_size(), timeout, position=lambda: _calls, open_store=partial(_open_store, store))
    watchdog.start()
    codes = [0]
    # gloo's destructors occasionally abort a process that exits normally.
    atexit.register(lambda: _leave(codes[-1]))
    try:
        function(*args)
        sys.stdout.flush()
        barrier()
    except UserError as error:
        print(f"Error: {error}" if is_main() else f"Error (process {rank()}): {error}", file=sys.stderr)
        _leave(2)
    except SystemExit as error:
        if error.code == 2:  # rank 0 raised a UserError and reports it
            _leave(2)
        codes.append(error.code if isinstance(error.code, int) else 1)
        watchdog.stop()
        dist.destroy_process_group()
        raise
    except Exception as error:
        if message := explain(error):
            print(f"Error (process {rank()}): {message}", file=sys.stderr)
            _leave(2)
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # the rank that failed first prints the cause
            print(f"Error (process {rank()}): lost contact with another process", file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(1)
    watchdog.stop()
    dist.destroy_process_group()


def _open_store(file: str | None) -> dist.Store:
    """Return the store shared by all processes, on a separate connection."""
    if file is not None:
        return dist.FileStore(file, -1)  # with world size -1, its destructor does not delete the file
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _join(device_type: str, timeout: timedelta, file: str | None = None) -> None:
    """Create the process group, and a group for CPU tensors. Raises UserError if gloo finds no network."""
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
            # Divide the available cores evenly: more threads than cores would wait for each other.
            torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
            dist.init_process_group("gloo", timeout=timeout, **meeting)
        _host_group = dist.new_group(backend="gloo", timeout=timeout) if device_type == "cuda" else dist.group.WORLD
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"the processes cannot reach each other over TCP ({describe_error(error)}): set GLOO_SOCKET_IFNAME to the "
            "network interface shared by all machines (see `ip addr`), or to lo on a single machine"
        ) from None


def _leave(code: int) -> NoReturn:
    """Exit immediately: gloo may abort a process that is still shutting down after its peers have exited."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_host_group: Any = None  # process group of all ranks for CPU tensors
_calls = 0  # collective calls that this process has entered; per process, like the default process group


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
    """Replace `x` by its mean over all processes and return it. A collective call."""
    if world_size() > 1:
        all_reduce(x)
        x /= world_size()
    return x


def maximum(values: Sequence[int]) -> list[int]:
    """Return the maximum of each value over all processes, without synchronizing with the GPUs."""
    if world_size() == 1:
        return list(values)
    _enter_call()
    table = torch.tensor(values)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=_host_group)
    return [int(x) for x in table.tolist()]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors on every process, in place, with the values of rank 0."""
    if world_size() > 1:
        for x in tensors:
            _enter_call()
            dist.broadcast(x, src=0)


def count_failures(attempt: Callable[[], str | None], device: torch.device) -> int:
    """Call `attempt`, which returns None or the reason for a failure, in each process; return the number of failures.

    Local rank 0 of each machine goes first, because its result may be cached on the disk. The others make no attempt if
    one of the first ones failed. A collective call on `device`.
    """
    failures, reason = 0, None
    for turn in (True, False):
        if (int(os.environ.get("LOCAL_RANK", 0)) == 0) == turn and not failures:
            reason = attempt()
        failures = round(all_reduce(torch.tensor(float(reason is not None), device=device)).item())
    return failures


def from_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank.

    A UserError is raised and reported on rank 0; the other ranks exit silently with code 2.
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
    """Wait until every process has called this function."""
    if world_size() > 1:
        _enter_call()
        dist.barrier()
