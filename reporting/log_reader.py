"""Reader of the log of a run: its warnings and errors with their kimg, and how the last start of the run ended."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dnnlib.util import read_lines

MAX_WARNINGS = 20
MAX_LENGTH = 1000  # bytes of a warning
TICK = re.compile(rb"tick \d+ +kimg (\d+(?:\.\d+)?)\b")
Outcome = Literal["", "done", "stopped", "failed"]
OUTCOMES: dict[bytes, Outcome] = {b"Done: ": "done", b"Stopped; ": "stopped", b"Error: ": "failed"}
STARTED = b"Training on "
TRACEBACK = b"Traceback (most recent call last):"
SKIPPED = re.compile(rb"Warning: \d+ updates of \w+ skipped: values were not finite")
ADVICE = re.compile(r"(?P<finding>.*?)(?:: (?P<remedy>.*))? \((?P<page>docs/\S+), \"(?P<heading>[^\"]+)\"\)")


@dataclass(frozen=True, kw_only=True)
class LogWarning:
    """A warning or error of a log, with the kimg of the ticks before its first and last of `count` occurrences.

    kimg is nan before the first tick.
    """

    text: str  # without "Warning: "
    first_kimg: float
    last_kimg: float
    count: int = 1

    @property
    def advice(self) -> re.Match[str] | None:
        """Parts of a warning about failing training: finding, remedy, page and heading; None for any other warning."""
        return ADVICE.fullmatch(self.text)


@dataclass(frozen=True)
class Log:
    """Latest warnings in order of last occurrence, and the outcome of the last start: done, stopped, failed, or "".

    `earlier` is the number of distinct warnings before them.
    """

    warnings: Sequence[LogWarning] = ()
    outcome: Outcome = ""
    earlier: int = 0


def read_log(path: Path) -> Log | None:
    """Return the latest distinct warnings and errors of a log, and its outcome; None if it cannot be read.

    Skipped updates are left to stats.jsonl, which counts them. Of a traceback, the exception is an error.
    """
    found: dict[str, LogWarning] = {}
    kimg = math.nan
    outcome: Outcome = ""
    in_traceback = False
    try:
        for line in read_lines(path):
            if tick := TICK.match(line):
                kimg = float(tick[1])
            if tick or line.startswith(STARTED):
                outcome = ""
            if in_traceback and not line.startswith(b" "):
                line = b"Error: " + line
                in_traceback = False
            in_traceback = in_traceback or line.startswith(TRACEBACK)
            outcome = next((name for start, name in OUTCOMES.items() if line.startswith(start)), outcome)
            if line.startswith((b"Warning: ", b"Error: ")) and not SKIPPED.match(line):
                text = line[:MAX_LENGTH].decode(errors="replace").rstrip("\r\n").removeprefix("Warning: ")
                new = LogWarning(text=text, first_kimg=kimg, last_kimg=kimg)
                old = found.pop(text, None)  # appended again, in order of last occurrence
                found[text] = replace(old, last_kimg=kimg, count=old.count + 1) if old else new
    except OSError:
        return None
    return Log([*found.values()][-MAX_WARNINGS:], outcome, max(len(found) - MAX_WARNINGS, 0))
