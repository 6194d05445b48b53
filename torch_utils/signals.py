"""Signals of users and schedulers as requests that all processes learn of at the same step.

SIGTERM, SIGINT and SIGHUP (the terminal was closed) ask to write a training state and to stop, SIGUSR1 to write one and
to go on. A second SIGINT exits at once.
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

EXIT_STOPPED = 3  # stopped by a signal with everything saved: the same command with --resume=latest goes on
EXIT_INTERRUPTED = 128 + signal.SIGINT  # stopped at once

SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # Windows has none
STOPPING = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
INTERVAL = 4  # steps between agreements of several processes; one process looks at every step
REPEAT_SECONDS = 1.0  # Ctrl-C reaches a worker from the terminal and from its launcher: that is one SIGINT, not two


@dataclass(frozen=True, kw_only=True)
class SignalRequest:
    """What is asked for: to write a training state, and by which signal (None: not at all) to stop afterwards."""

    save: bool
    stop: signal.Signals | None


class Signals:
    """While active, notes signals instead of dying of them; `agree` tells what they ask for.

    Only the main thread of a program may enter. Where it was asked to stop, it goes on to note signals afterwards. A
    thread of its own answers Ctrl-C at once: Python's handlers wait for the operator that the main thread is in, which
    can take minutes on a CPU.
    """

    HANDLED = (*STOPPING, *SAVING)

    def __init__(self) -> None:
        self.save, self.stop = False, 0
        self.interrupted = math.inf  # when the first SIGINT came
        self.previous: dict[signal.Signals, Any] = {}
        self.pipe: tuple[int, int] | None = None
        self.wakeup = -1  # the descriptor before

    def __enter__(self) -> Signals:
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        threading.Thread(target=self._answer_all, args=self.pipe[:1], name="signals", daemon=True).start()
        self.wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, self._note) for number in distributed.heeded(self.HANDLED)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.stop and self.pipe:  # else the program is about to end, and may be sent the signal once more
            for number, handler in self.previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.wakeup)
            os.close(self.pipe[1])  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in SAVING:
            self.save = True
        else:
            self.stop = number

    def _answer_all(self, pipe: int) -> None:
        """Answer the signals whose numbers arrive in a pipe, until it is closed."""
        while number := os.read(pipe, 1):
            self._answer(number[0])
        os.close(pipe)

    def _answer(self, number: int) -> None:
        """Say on the screen what Ctrl-C does; a second one ends the process."""
        if number != signal.SIGINT:
            return
        if time.monotonic() > self.interrupted + REPEAT_SECONDS:
            os._exit(EXIT_INTERRUPTED)
        is_first, self.interrupted = self.interrupted == math.inf, min(self.interrupted, time.monotonic())
        if is_first and distributed.is_main():
            message = "\nCtrl-C: stopping after this step, the state will be saved; press again to lose it"
            with suppress(OSError, ValueError):  # a stream that fails, or is closed at the end of the program
                print(message, file=sys.stderr, flush=True)

    def agree(self, step: int) -> SignalRequest:
        """Return what any process was asked for since the last time. A collective call for every step.

        Between the steps at which processes talk to each other the answer is: nothing.
        """
        if distributed.world_size() > 1 and step % INTERVAL:
            return SignalRequest(save=False, stop=None)
        save, stop = distributed.maximum([int(self.save), self.stop])
        if save:
            self.save = False
        return SignalRequest(save=bool(save), stop=signal.Signals(stop) if stop else None)
