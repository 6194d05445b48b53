"""Standard output and error streams that can fail without a traceback.

Writing fails when the reader of a pipe has exited (`| head`), a disk is full, a terminal was closed, or the shell
closed the stream (`>&-`). The first failure redirects the descriptor to the null device, so that later writes by
libraries or child processes succeed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from dnnlib.config import UserError
from dnnlib.screen import Screen

DESCRIPTORS = {"stdout": 1, "stderr": 2}


class OutputError(UserError):
    """Standard output failed in a program that requires it."""


class StandardStream(io.FileIO):
    """Raw stdout or stderr. The first failed write raises OutputError if `is_needed`; later output is discarded."""

    def __init__(self, name: str) -> None:
        super().__init__(DESCRIPTORS[name], "w", closefd=False)
        self.name = f"<{name}>"
        self.title = name
        self.is_needed = False
        self.failure: str | None = None  # the reason, after a failed write

    def write(self, data: Any) -> int:
        """Write all of `data`, waiting if a non-blocking pipe is full."""
        left = memoryview(data).cast("B")
        try:
            while left:
                written = super().write(left)
                if written is None:
                    select.select([], [self.fileno()], [])
                left = left[written or 0 :]
        except OSError as error:
            self._drop("it is closed" if error.errno == errno.EBADF else error.strerror or type(error).__name__)
        return memoryview(data).nbytes

    def _drop(self, reason: str) -> None:
        self.failure = reason
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.is_needed:
            raise OutputError(f"{self.title}: cannot be written ({reason})")


def protect(*, needs_stdout: bool) -> None:
    """Replace sys.stdout and sys.stderr by StandardStreams. With `needs_stdout`, a failed stdout raises OutputError.

    Streams that were already replaced, e.g. by a test, are unchanged. May be called repeatedly.
    """
    _reserve_descriptors()
    for name, descriptor in DESCRIPTORS.items():
        stream = getattr(sys, name)
        raw = raw_stream(stream)
        if raw is None and (stream is None or _is_real(stream, descriptor)):
            raw = StandardStream(name)
            setattr(sys, name, _as_text(raw, stream))
        if raw is not None:
            raw.is_needed = needs_stdout and name == "stdout"


def raw_stream(stream: TextIO | None) -> StandardStream | None:
    """Return the StandardStream below sys.stdout or sys.stderr; None if it is another kind of stream."""
    buffer = getattr(stream.stream if isinstance(stream, Screen) else stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, StandardStream) else None


def _reserve_descriptors() -> None:
    """Reserve closed descriptors 0 to 2, so that files opened later do not reuse them. Writes still fail."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _is_real(stream: Any, descriptor: int) -> bool:
    """Return whether a text stream writes to this descriptor."""
    with suppress(OSError, ValueError, AttributeError):  # a test's replacement has no fileno
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    return False


def _as_text(raw: StandardStream, old: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Return a text stream over `raw` with the settings of `old`; undecodable file names are escaped."""
    if old is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace")
    old.flush()
    buffer: Any = raw if old.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=old.encoding,
        errors="backslashreplace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )
