"""Small helpers without torch: durations as text, a log that goes to the screen and to a file."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from dnnlib.config import UserError, WriteError


def format_time(seconds: float) -> str:
    """Return '42s', '3m 07s', '2h 05m' or '4d 03h'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m"
    return f"{s // 86400}d {s // 3600 % 24:02}h"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. Raises WriteError when it cannot be written."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


class TeeLog:
    """While active, everything printed to stdout and stderr also goes to a file, except lines that '\\r' redraws.

    The file ends with the error, if one ended the block. What the disk has no room for is on the screen only.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)
        self.streams = (sys.stdout, sys.stderr)

    def __enter__(self) -> TeeLog:
        sys.stdout, sys.stderr = (_Tee(stream, self.file) for stream in self.streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self.streams
        with suppress(OSError):
            if isinstance(error, UserError):
                self.file.write(f"Error: {error}\n")
            elif error is not None:
                self.file.write("".join(traceback.format_exception(error)))
        with suppress(OSError):
            self.file.close()


class _Tee:
    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if not text.startswith("\r"):
            with suppress(OSError):
                self.file.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()
