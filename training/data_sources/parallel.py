"""Work on chunks of a stream in other processes: in order, in bounded memory."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dnnlib.config import UserError

T = TypeVar("T")
R = TypeVar("R")


def map_chunks(function: Callable[[list[T]], list[R]], chunks: Iterable[list[T]], workers: int) -> Iterator[R]:
    """Yield the results of a function for chunks, one after the other, computed by processes.

    At most 2 * workers + 1 chunks wait at any time. Raises UserError when a process dies.
    """
    # spawn: forking a process that has threads (of whoever calls us) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending: deque[Future[list[R]]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(function, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died, perhaps for lack of memory: try fewer than --workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
