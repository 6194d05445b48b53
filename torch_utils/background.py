"""Background thread that writes files while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dnnlib.config import WriteError


class BackgroundWriter:
    """Worker thread for jobs that write files.

    At most one job is in flight, so memory holds at most one copy of the training state.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self.job: Future[None] | None = None
        self.failed: list[WriteError] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job in flight, then start a new one. `collect` returns the write errors of the earlier job."""
        self.wait()
        self.job = self.thread.submit(job)

    def collect(self) -> list[WriteError]:
        """Return the write errors since the last call, without waiting.

        Any other exception of a job is a bug and is raised here.
        """
        if self.job and self.job.done():
            self.wait()
        failed, self.failed = self.failed, []
        return failed

    def join(self) -> list[WriteError]:
        """Wait for the job in flight, then `collect`."""
        self.wait()
        return self.collect()

    def wait(self) -> None:
        """Wait for the job in flight; `collect` returns its write error, if any."""
        job, self.job = self.job, None
        if job:
            try:
                job.result()
            except WriteError as error:
                self.failed.append(error)
