"""Small helpers without torch: durations as text, files and folders, a log that goes to the screen and to a file."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dnnlib.config import UserError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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


def import_extra(module: str, extra: str) -> Any:
    """Return a module of a package that not everyone installs. Raises UserError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise UserError(f"the package {package} cannot be imported ({error}): pip install '.[{extra}]'") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python, of torch or of the libraries below it, says that memory is not enough.

    Or was raised, where that had been said, by what had to end early: the recording of a CUDA graph.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if not isinstance(error, RuntimeError):
        return False
    before = None if error.__suppress_context__ else error.__context__
    return any(sign in str(error) for sign in signs) or (before is not None and is_out_of_memory(before))


def describe_error(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file. Raises WriteError when it cannot be written."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


class FolderLock:
    """Keeps a folder for this process, until it ends in whatever way or leaves the block.

    A record lock (fcntl) on the file `.lock` in it: the kernel gives it back, processes that are forked do not inherit
    it, and NFS knows it.
    """

    NAME = ".lock"

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()

    def acquire(self, folder: Path) -> None:
        """Take the lock. Raises UserError naming the process that has it; warns where the file system has no locks."""
        try:
            self.file = (folder / self.NAME).open("a+")
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no fcntl")
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if self.file is None:
                raise WriteError(f"{folder}: cannot be written ({error.strerror})") from None
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.file.seek(0)
                raise UserError(
                    f"{folder}: in use by another program ({self.file.read().strip() or 'unknown'}): stop that one or "
                    "wait for its end; without --resume a new run starts beside it"
                ) from None
            print(
                f"Warning: {folder}: this file system has no locks ({error.strerror}): see to it that no other program "
                "goes on with this run",
                file=sys.stderr,
            )
            return
        with suppress(OSError):  # of a full disk; the lock holds all the same
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()


class TeeLog:
    """While active, everything printed to stdout and stderr also goes to a file, except lines that '\\r' redraws.

    The file ends with the error, if one ended the block. What the disk has no room for is on the screen only.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1, errors="backslashreplace")
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
