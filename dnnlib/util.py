"""Helpers that do not import torch: formatting, files and folders, JSON, errors, a log to the screen and a file.

`EasyDict` and `open_url` exist for code written for StyleGAN2-ADA (docs/migrating.md).
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dnnlib.config import UserError, WriteError
from dnnlib.screen import shown
from dnnlib.streams import raw_stream

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # suffix of files that are being written
MAX_JSON_BYTES = 1 << 26  # size of a JSON file of this project
MAX_JSON_DEPTH = 100  # nesting of a JSON document; comparing and writing it must not exceed Python's recursion limit
LIMITS = {  # errno of an exceeded system limit -> remedy
    errno.EMFILE: "raise the limit of this shell, `ulimit -n 4096`",
    errno.ENFILE: "the limit of the whole machine is reached; end other programs",
    errno.EAGAIN: "raise the limit of processes and threads, `ulimit -u`, or use fewer --workers",
}
WIDEST = 500  # maximum columns of a redrawn line; larger values of COLUMNS are ignored
MAX_LINE_BYTES = 1 << 20  # length of a line of a log


class EasyDict(dict[str, Any]):
    """Dict whose items can also be read, set and deleted as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no item {name!r}; the items are {', '.join(map(repr, self)) or 'none'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no item {name!r}") from None


def open_url(url: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for binary reading: a local path, a file:// URL, or an http(s) URL, which is cached on disk.

    Raises OSError for a file that cannot be opened, UserError for a URL that cannot be fetched.
    """
    from dnnlib.download import fetch, is_url  # here, to avoid a circular import

    name = os.fspath(url)
    if is_url(name):
        name = os.fspath(fetch(name))
    elif name.startswith("file://"):
        name = url2pathname(urlsplit(name).path)
    return open(name, "rb")


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


def counted(count: int, noun: str) -> str:
    """Return e.g. '1 image', '1,300 images'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def home_folder(override_variable: str) -> Path:
    """Return the user's home folder. Raises UserError, with `override_variable` as the remedy, if there is none."""
    try:
        return Path.home()
    except RuntimeError:
        raise UserError(
            "HOME is not set, and this user has no entry in the password file: "
            f"set HOME, or {override_variable} to a folder"
        ) from None


def partial_path(path: Path, ending: str = "") -> Path:
    """Return the temporary path, in the same folder, that this process writes before renaming it to `path`."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}{PARTIAL}{ending}")  # file names are limited to 255 bytes


@contextmanager
def replaced(path: Path, ending: str = "") -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end of the block, unless the block raises.

    `ending` is the suffix of the temporary path, for writers that require one.
    """
    temporary = partial_path(path, ending)
    try:
        temporary.unlink(missing_ok=True)  # left by an earlier process, or a planted link
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # already renamed, or its folder is gone
            temporary.unlink()


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace a file atomically: readers see the old or the new content, never a part. `mode` is as in os.open."""
    with replaced(path) as temporary, open(temporary, "xb", opener=partial(os.open, mode=mode)) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def source_commit() -> str | None:
    """Return the git commit of the sources, with `-dirty` if they are modified; None outside a git checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed as a package; a parent folder may be another repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional dependency. Raises UserError, with the extra that installs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch version
        package, problem = module.partition(".")[0].replace("_", "-"), describe_error(error)
        raise UserError(f"the package {package} cannot be imported ({problem}): pip install '.[{extra}]'") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch or a lower-level library means that host or device memory ran out.

    This includes errors raised while such an error was handled, e.g. by an aborted CUDA graph capture.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if not isinstance(error, RuntimeError):
        return False
    before = None if error.__suppress_context__ else error.__context__
    return any(sign in str(error) for sign in signs) or (before is not None and is_out_of_memory(before))


def explain(error: BaseException) -> str | None:
    """Return a one-line message for errors of memory, system limits and files; None for other errors (bugs)."""
    if is_out_of_memory(error):
        return f"out of memory ({describe_error(error)}): process less at a time"
    if isinstance(error, OSError) and error.errno in LIMITS:
        return f"{error.strerror}: {LIMITS[error.errno]}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be used ({error.strerror})"
    return None


def describe_error(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; the class name if there is no message."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


@contextmanager
def warn_on_write_error() -> Iterator[None]:
    """Turn write errors of non-essential files in the block into a warning."""
    try:
        yield
    except (OSError, WriteError) as error:
        print(f"Warning: {error}; training continues", file=sys.stderr, flush=True)


def append_line(path: Path, line: str) -> None:
    """Append a line to a regular text file. Raises WriteError."""
    try:
        with open_regular(path, to_append=True) as file:
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


def open_regular(path: str | os.PathLike[str], *, to_append: bool = False) -> BinaryIO:
    """Open a regular file in binary mode for reading, or for appending, which creates a missing file.

    Raises OSError for a pipe, device, socket or folder, without blocking, and for other errors of `open`.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT if to_append else os.O_RDONLY
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "ab" if to_append else "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, including for a file larger than `limit` bytes."""
    with open_regular(path) as file:
        content = b""  # read in pieces, because read(n) allocates n bytes
        while len(content) <= limit and (piece := file.read(min(1 << 24, limit + 1 - len(content)))):
            content += piece
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"exceeds the limit of {limit} bytes", os.fspath(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises ValueError, also for nesting deeper than MAX_JSON_DEPTH and for integers of more than 64 bits.
    """
    try:
        document = json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [document]
    for _ in range(MAX_JSON_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return document
    raise ValueError("nested too deeply")


def _parse_int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"{digits[:20]}... is an integer of more than 64 bits")
    return int(digits)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse the JSON document in a regular file of at most `limit` bytes. Raises OSError, ValueError."""
    return parse_json(read_regular(path, limit))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file with line ends, truncated to MAX_LINE_BYTES. Raises OSError."""
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                pass


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file with one JSON object per line; nothing if the file does not exist.

    Lines that are truncated, longer than MAX_LINE_BYTES, or not a JSON object are skipped.
    """
    for line in read_lines(path) if path.is_file() else ():
        try:
            entry = parse_json(line.decode(errors="replace"))
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def read_metric_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records with finite results in a metric-<name>.jsonl file; nothing if the file does not exist.

    Only `results` is guaranteed to be present in a record.
    """
    for record in read_json_lines(path):
        results = record.get("results")
        if isinstance(results, dict) and results and all(map(_is_finite, results.values())):
            yield record


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class FolderLock:
    """Exclusive lock on a folder, held until the process exits or leaves the block.

    Implemented as a record lock (fcntl) on the file `.lock` in the folder: the kernel releases it when the process
    exits, forked processes do not inherit it, and it works on NFS.
    """

    NAME = ".lock"

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self.file:
            self.file.close()
            self.file = None

    def holds(self, folder: Path) -> bool:
        """Return whether the locked file is still `.lock` of this folder. Raises OSError if that is unknown."""
        try:
            return self.file is not None and os.path.samestat(os.stat(folder / self.NAME), os.fstat(self.file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def acquire(self, folder: Path) -> None:
        """Acquire the lock. Raises UserError, naming any other holder; warns if the file system has no locks."""
        try:
            self.release()
            open_regular(folder / self.NAME, to_append=True).close()
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
                    f"{folder}: in use by another program ({self.file.read().strip() or 'unknown'}): stop it or wait "
                    "until it ends; without --resume a new run starts in another folder"
                ) from None
            print(
                f"Warning: {folder}: this file system has no locks ({error.strerror}): make sure that no other program "
                "continues this run",
                file=sys.stderr,
            )
            return
        with suppress(OSError):  # e.g. a full disk; the lock is held regardless
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()


def redraw(text: str, stream: TextIO) -> None:
    """Overwrite the last redrawn line of a terminal with a new one; an empty text clears the line."""
    width = min(shutil.get_terminal_size().columns - 1, WIDEST)  # a full line would wrap
    stream.write(f"\r{text[:width]:<{width}}\r")
    stream.flush()


class TeeLog:
    """Context manager that copies everything printed to stdout and stderr to a file, except redrawn lines.

    Redrawn lines are overwritten on the screen by the next output. If an error ends the block, it is the last entry of
    the file. If the disk is full, output goes to the screen only; if a stream fails, one warning is logged and output
    goes to the file only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = self._open()
        self.streams = (sys.stdout, sys.stderr)
        self.dropped: list[TextIO] = []  # streams whose failure has been reported
        self.redrawn: TextIO | None = None  # stream whose redrawn line the next output overwrites

    def _open(self) -> TextIO:
        return TextIOWrapper(open_regular(self.path, to_append=True), errors="backslashreplace", line_buffering=True)

    def reopen(self) -> None:
        """Continue in a new file at the same path, after the old one was removed. Raises OSError."""
        old, self.file = self.file, self._open()
        with suppress(OSError):
            old.close()

    def __enter__(self) -> TeeLog:
        sys.stdout, sys.stderr = (_Tee(stream, self) for stream in self.streams)
        self.note_failures()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self.streams
        with suppress(OSError):
            if isinstance(error, UserError):
                self.file.write(shown(f"Error: {error}\n"))
            elif error is not None:
                self.file.write(shown("".join(traceback.format_exception(error))))
        with suppress(OSError):
            self.file.close()

    def note_failures(self) -> None:
        """Report streams that have failed since the last call, in the file and on the other stream."""
        for stream in self.streams:
            raw = raw_stream(stream)
            if raw and raw.failure and stream not in self.dropped:
                self.dropped.append(stream)
                line = f"Warning: {raw.title} failed ({raw.failure}) and is dropped; output goes to {self.path} only\n"
                for target in (self.file, *self.streams):
                    with suppress(OSError):
                        target.write(line)


class _Tee:
    def __init__(self, stream: TextIO, log: TeeLog) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self.log.redrawn = self.stream
            return self.stream.write(text)
        if self.log.redrawn:
            redraw("", self.log.redrawn)
            self.log.redrawn = None
        with suppress(OSError):
            self.log.file.write(shown(text))
        written = self.stream.write(text)
        if text.endswith("\n"):  # at the end of a line, so that a warning does not split it
            self.log.note_failures()
        return written

    def flush(self) -> None:
        self.stream.flush()
        self.log.note_failures()

    def isatty(self) -> bool:
        return self.stream.isatty()
