"""Finds out which of several processes has stopped, instead of leaving all of them waiting for it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import distributed as dist


@dataclass(frozen=True)
class Sign:
    """How far a process has come, in collective calls, and on which machine it runs."""

    position: int
    host: str


def find_stopped(signs: dict[int, Sign]) -> list[int]:
    """Return the ranks that the others wait for: those that have entered the fewest collective calls.

    There are none when all are equally far: they compute, or wait for something outside.
    """
    positions = [sign.position for sign in signs.values()]
    if min(positions) == max(positions):
        return []
    return [rank for rank, sign in signs.items() if sign.position == min(positions)]


class Watchdog:
    """A thread on every rank that tells the others, through the launcher's store, how far its process has come.

    When a rank has kept the others waiting for `timeout` seconds, the lowest of those prints which, and ends its
    process; the launcher then ends all.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, position: Callable[[], int]) -> None:
        self.rank, self.world_size, self.timeout, self.position = rank, world_size, timeout, position
        self.pause = min(max(timeout / 10, 0.1), 10.0)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch. The store is that of torchrun's environment variables."""
        self.thread.start()

    def stop(self) -> None:
        """End watching."""
        self.over.set()
        self.thread.join(1.0)  # longer, if it talks to a store that is going away

    def _watch(self) -> None:
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            shared = dist.PrefixStore("watchdog", store)
            everyone = [str(rank) for rank in range(self.world_size)]
            last: dict[int, Sign] = {}
            since = time.monotonic()
            while not self.over.wait(self.pause):
                shared.set(str(self.rank), f"{self.position()} {socket.gethostname()}")
                if not shared.check(everyone):
                    continue
                signs = {rank: _read(shared.get(str(rank))) for rank in range(self.world_size)}
                if signs != last:
                    last, since = signs, time.monotonic()
                stopped = find_stopped(signs)
                # Of the ranks that wait, the lowest speaks.
                if stopped and time.monotonic() - since > self.timeout and self.rank == min(set(signs) - set(stopped)):
                    self._give_up(stopped, signs)
        except RuntimeError:  # the store has gone, and with it the launcher
            return

    def _give_up(self, stopped: list[int], signs: dict[int, Sign]) -> None:
        names = ", ".join(f"{rank} on {signs[rank].host}" for rank in stopped)
        plural = "es" if len(stopped) > 1 else ""
        print(
            f"Error: process{plural} {names}: stopped {self.timeout:g} seconds ago, and the others wait; "
            "--resume=latest goes on from the last training state. --timeout sets how long they do",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _read(text: bytes) -> Sign:
    position, _, host = text.decode().partition(" ")
    return Sign(int(position), host)
