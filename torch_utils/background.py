"""Writing files while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dnnlib.config import WriteError


class BackgroundWriter:
    """Runs one job at a time in a thread of its own; a job writes files.

    At most one is in flight, so that there is never more than one copy of a training state in memory.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self.job: Future[None] | None = None
        self.failed: list[WriteError] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job in flight, then start this one. What the former ran into is kept for `collect`."""
        self.wait()
        self.job = self.thread.submit(job)

    def collect(self) -> list[WriteError]:
        """Return the files that could not be written since the last call, without waiting.

        Any other error of a job is a mistake of ours: it is raised.
        """
        if self.job and self.job.done():
            self.wait()
        failed, self.failed = self.failed, []
        return failed

    def join(self) -> list[WriteError]:
        """`collect`, after the job in flight is done."""
        self.wait()
        return self.collect()

    def wait(self) -> None:
        """Wait for the job in flight; what it ran into is kept for `collect`."""
        job, self.job = self.job, None
        if job:
            try:
                job.result()
            except WriteError as error:
                self.failed.append(error)
