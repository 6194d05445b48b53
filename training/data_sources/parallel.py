"""Work on chunks of a stream in other processes: in order, in bounded memory."""

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

_ENDING = (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))  # Windows has no SIGHUP


def map_chunks(
    function: Callable[[list[T]], list[R]], chunks: Iterable[list[T]], workers: int
) -> Iterator[tuple[T, R]]:
    """Yield the items of chunks in order, each with its result, which processes compute for a chunk at a time.

    At most 2 * workers + 1 chunks wait at any time. Raises UserError when a process dies.
    """
    # spawn: forking a process that has threads (of whoever calls us) can deadlock
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
            f"a worker process died, perhaps for lack of memory: try fewer than --workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While active, SIGTERM and SIGHUP end the program by an exception, as Ctrl-C does: what it began is removed.

    A signal that is ignored, as SIGHUP is under nohup, stays so. The second one of a kind ends the program at once.
    """
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def _prepare_worker() -> None:
    tune_allocator()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it has gone, in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _finish(pending: deque[tuple[list[T], Future[list[R]]]]) -> Iterator[tuple[T, R]]:
    chunk, future = pending.popleft()
    return zip(chunk, future.result(), strict=True)
