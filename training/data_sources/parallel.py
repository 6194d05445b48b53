"""Parallel processing of the chunks of a stream in worker processes: in order, in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError

T = TypeVar("T")
R = TypeVar("R")

_EXIT_SIGNALS = (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))  # Windows has no SIGHUP


def map_chunks(
    function: Callable[[list[T]], list[R]], chunks: Iterable[list[T]], workers: int
) -> Iterator[tuple[T, R]]:
    """Yield (item, result) for the items of all chunks in order; workers apply `function` to one chunk at a time.

    At most 2 * workers + 1 chunks are pending at any time. Raises UserError if a worker process dies.
    """
    # spawn, because forking a process with threads can deadlock
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker)
    pending: deque[tuple[list[T], Future[list[R]]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(function, chunk)))
            if len(pending) > 2 * workers:
                yield from _finish(pending)
        while pending:
            yield from _finish(pending)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died, possibly because it ran out of memory: use fewer than --workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Context manager in which SIGTERM and SIGHUP raise SystemExit, so that unfinished output is removed.

    Ignored signals, such as SIGHUP under nohup, remain ignored. A second signal of the same kind terminates the
    program immediately.
    """
    before = {number: signal.getsignal(number) for number in _EXIT_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _exit_on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def _prepare_worker() -> None:
    tune_allocator()
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process exits for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _finish(pending: deque[tuple[list[T], Future[list[R]]]]) -> Iterator[tuple[T, R]]:
    chunk, future = pending.popleft()
    return zip(chunk, future.result(), strict=True)
