"""Work on chunks of a stream in other processes: in order, in bounded memory."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError

T = TypeVar("T")
R = TypeVar("R")


def map_chunks(
    function: Callable[[list[T]], list[R]], chunks: Iterable[list[T]], workers: int
) -> Iterator[tuple[T, R]]:
    """Yield the items of chunks in order, each with its result, which processes compute for a chunk at a time.

    At most 2 * workers + 1 chunks wait at any time. Raises UserError when a process dies.
    """
    # spawn: forking a process that has threads (of whoever calls us) can deadlock
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=tune_allocator)
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


def _finish(pending: deque[tuple[list[T], Future[list[R]]]]) -> Iterator[tuple[T, R]]:
    chunk, future = pending.popleft()
    return zip(chunk, future.result(), strict=True)
