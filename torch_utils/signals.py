"""Signals from users and schedulers, handled by all processes at the same step.

SIGTERM, SIGINT and SIGHUP (terminal closed) save a training state and stop; SIGUSR1 saves a training state and
continues. A second SIGINT exits immediately.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from torch_utils import distributed

EXIT_STOPPED = 3  # stopped by a signal after saving: the same command with --resume=latest continues
EXIT_INTERRUPTED = 128 + signal.SIGINT  # stopped without saving

SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # not available on Windows
STOPPING = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
INTERVAL = 4  # steps between collective checks of several processes; a single process checks at every step
REPEAT_SECONDS = 1.0  # one Ctrl-C reaches a worker twice, via the terminal and via the launcher, and counts once


@dataclass(frozen=True, kw_only=True)
class SignalRequest:
    """Pending request: whether to save a training state, and the signal to stop for afterwards (None: continue)."""

    save: bool
    stop: signal.Signals | None


class Signals:
    """Context manager that records signals instead of exiting; `agree` returns the pending request.

    It must be entered in the main thread. After a stop request, the handlers stay installed on exit. A separate thread
    responds to Ctrl-C immediately, because Python's handlers run only after the current operator of the main thread,
    which can take minutes on a CPU.
    """

    HANDLED = (*STOPPING, *SAVING)

    def __init__(self) -> None:
        self.save, self.stop = False, 0
        self.interrupted = math.inf  # time of the first SIGINT
        self.previous: dict[signal.Signals, Any] = {}
        self.pipe: tuple[int, int] | None = None
        self.wakeup = -1  # the previous wakeup descriptor

    def __enter__(self) -> Signals:
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        threading.Thread(target=self._handle_all, args=self.pipe[:1], name="signals", daemon=True).start()
        self.wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, self._note) for number in distributed.not_ignored(self.HANDLED)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.stop and self.pipe:  # otherwise the program is about to exit, and the signal may be repeated
            for number, handler in self.previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.wakeup)
            os.close(self.pipe[1])  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in SAVING:
            self.save = True
        else:
            self.stop = number

    def _handle_all(self, pipe: int) -> None:
        """Handle the signal numbers read from a pipe, until the pipe is closed."""
        while number := os.read(pipe, 1):
            self._handle(number[0])
        os.close(pipe)

    def _handle(self, number: int) -> None:
        """Print a notice on the first SIGINT; exit on the second. Other signals are ignored here."""
        if number != signal.SIGINT:
            return
        if time.monotonic() > self.interrupted + REPEAT_SECONDS:
            os._exit(EXIT_INTERRUPTED)
        is_first, self.interrupted = self.interrupted == math.inf, min(self.interrupted, time.monotonic())
        if is_first and distributed.is_main():
            message = "\nCtrl-C: stopping after this step and saving the state; press again to exit without saving"
            with suppress(OSError, ValueError):  # stderr fails, or is closed while the program exits
                print(message, file=sys.stderr, flush=True)

    def agree(self, step: int) -> SignalRequest:
        """Return the requests of all processes since the last check. A collective call: required at every step.

        With several processes only every INTERVAL-th step communicates; the other steps return no request.
        """
        if distributed.world_size() > 1 and step % INTERVAL:
            return SignalRequest(save=False, stop=None)
        save, stop = distributed.maximum([int(self.save), self.stop])
        if save:
            self.save = False
        return SignalRequest(save=bool(save), stop=signal.Signals(stop) if stop else None)
