"""Standard output and error that fail without ending the program in a traceback.

They fail when a pipe's reader has gone (`| head`), a disk is full, a terminal was closed, or the shell closed them
(`>&-`). The first failure points the descriptor at the null device, so that whoever writes to it next, a library or
another process, meets no error.
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
    """Standard output failed in a program that exists for what it prints."""


class StandardStream(io.FileIO):
    """Raw stdout or stderr. A failed write is reported once, by OutputError if `is_needed`; later ones are dropped."""

    def __init__(self, name: str) -> None:
        super().__init__(DESCRIPTORS[name], "w", closefd=False)
        self.name = f"<{name}>"
        self.title = name
        self.is_needed = False
        self.failure: str | None = None  # why it was dropped

    def write(self, data: Any) -> int:
        """Write all of `data`, also to a non-blocking pipe that is full."""
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
    """Make sys.stdout and sys.stderr survive a failure; with `needs_stdout` that of stdout raises OutputError.

    Streams that somebody has replaced already, such as a test, stay as they are. Can be called again.
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
    """Return the protected stream below sys.stdout or sys.stderr, None where it is another one."""
    buffer = getattr(stream.stream if isinstance(stream, Screen) else stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, StandardStream) else None


def _reserve_descriptors() -> None:
    """Keep the numbers of closed streams from the files that are opened next; writing there still fails."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _is_real(stream: Any, descriptor: int) -> bool:
    """Whether a text stream writes to this descriptor."""
    with suppress(OSError, ValueError, AttributeError):  # what a test puts there has none
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    return False


def _as_text(raw: StandardStream, old: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A text stream over `raw` like the one that it takes the place of; names of files can be any bytes."""
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
