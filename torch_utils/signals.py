"""Signals of users and schedulers as requests that all processes learn of at the same step.

SIGTERM and SIGINT ask to write a training state and to stop, SIGUSR1 to write one and to go on. A second SIGINT exits
at once.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from torch_utils import distributed

EXIT_STOPPED = 3  # stopped by a signal with everything saved: the same command with --resume=latest goes on
EXIT_INTERRUPTED = 128 + signal.SIGINT  # stopped at once

SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # Windows has none
INTERVAL = 4  # steps between agreements of several processes; one process looks at every step
REPEAT_SECONDS = 1.0  # Ctrl-C reaches a worker from the terminal and from its launcher: that is one SIGINT, not two


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: to write a training state, and by which signal (None: not at all) to stop afterwards."""

    save: bool
    stop: signal.Signals | None


class Signals:
    """While active, notes signals instead of dying of them; `agree` tells what they ask for.

    Only the main thread of a program may enter. Where it was asked to stop, it goes on to note signals afterwards.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, *SAVING)

    def __init__(self) -> None:
        self.save, self.stop = False, 0
        self.interrupted = float("inf")  # when the first SIGINT came
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self.previous = {number: signal.signal(number, self._note) for number in self.HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.stop:  # else the program is about to end, and the launcher may send the signal once more
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in SAVING:
            self.save = True
            return
        self.stop = number
        if number == signal.SIGINT:
            if time.monotonic() > self.interrupted + REPEAT_SECONDS:
                os._exit(EXIT_INTERRUPTED)
            self.interrupted = min(self.interrupted, time.monotonic())

    def agree(self, step: int) -> Request:
        """Return what any process was asked for since the last time. A collective call for every step.

        Between the steps at which processes talk to each other the answer is: nothing.
        """
        if distributed.world_size() > 1 and step % INTERVAL:
            return Request(save=False, stop=None)
        save, stop = distributed.maximum([int(self.save), self.stop])
        if save:
            self.save = False
        return Request(save=bool(save), stop=signal.Signals(stop) if stop else None)
