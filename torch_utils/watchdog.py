"""Finds out which of several processes has stopped, instead of leaving all of them waiting for it."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import distributed as dist

MIN_SILENCE = 5.0  # seconds; who is silent for less may be slow on a busy machine


@dataclass(frozen=True)
class RankStatus:
    """How far a process has come, in collective calls, and on which machine it runs."""

    position: int
    host: str


def find_stopped(statuses: dict[int, RankStatus], silent: Collection[int] = ()) -> list[int]:
    """Return the ranks that the others wait for.

    They are the `silent` ranks, whose heartbeats have stopped, or else the ranks that have entered the fewest
    collective calls. The list is empty if all ranks are alive and have entered equally many calls.
    """
    if silent:
        return sorted(silent)
    positions = [status.position for status in statuses.values()]
    if min(positions) == max(positions):
        return []
    return [rank for rank, status in statuses.items() if status.position == min(positions)]


class Pulse:
    """When each rank was last seen to be alive, by a clock of this process: its beats are numbers that change."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.beats: dict[int, tuple[int, float]] = {}  # by rank: the last beat, and when it came

    def find_silent(self, beats: dict[int, int], now: float) -> list[int]:
        """Take in the beats at a time, in seconds; return the ranks whose last one is longer ago than the timeout."""
        for rank, beat in beats.items():
            if rank not in self.beats or self.beats[rank][0] != beat:
                self.beats[rank] = beat, now
        return [rank for rank, (_, since) in self.beats.items() if now - since > self.timeout]


class Watchdog:
    """A thread on every rank that tells the others, through the launcher's store, how far its process has come.

    When a rank has kept the others waiting for `timeout` seconds, or has said nothing for as long, because it is frozen
    inside a call that all have entered, the lowest of the others prints which, and ends its process; the launcher then
    ends all.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        position: Callable[[], int],
        open_store: Callable[[], dist.Store],
    ) -> None:
        self.rank, self.world_size, self.timeout, self.position = rank, world_size, timeout, position
        self.open_store = open_store
        self.pause = min(max(timeout / 10, 0.1), 10.0)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self.thread.start()

    def stop(self) -> None:
        """End watching."""
        self.over.set()
        self.thread.join(1.0)  # longer, if it talks to a store that is going away

    def _watch(self) -> None:
        try:
            shared = dist.PrefixStore("watchdog", self.open_store())
            everyone = [str(rank) for rank in range(self.world_size)]
            pulse = Pulse(max(self.timeout, MIN_SILENCE))
            last: dict[int, RankStatus] = {}
            since = time.monotonic()
            for beat in itertools.count():
                if self.over.wait(self.pause):
                    return
                shared.set(str(self.rank), f"{beat} {self.position()} {socket.gethostname()}")
                if not shared.check(everyone):
                    continue
                received = {rank: _read(shared.get(str(rank))) for rank in range(self.world_size)}
                statuses = {rank: status for rank, (_, status) in received.items()}
                now = time.monotonic()
                if statuses != last:
                    last, since = statuses, now
                silent = pulse.find_silent({rank: number for rank, (number, _) in received.items()}, now)
                stopped = find_stopped(statuses, silent) if silent or now - since > self.timeout else []
                # Of the ranks that wait, the lowest speaks.
                if stopped and self.rank == min(set(statuses) - set(stopped), default=None):
                    self._give_up(stopped, statuses)
        except RuntimeError:  # the store has gone, and with it the launcher
            return

    def _give_up(self, stopped: list[int], statuses: dict[int, RankStatus]) -> None:
        names = ", ".join(f"{rank} on {statuses[rank].host}" for rank in stopped)
        plural = "es" if len(stopped) > 1 else ""
        print(
            f"Error: process{plural} {names}: stopped {self.timeout:g} seconds ago, and the others wait; "
            "--resume=latest goes on from the last training state. --set run.timeout=SECONDS sets how long they do",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _read(text: bytes) -> tuple[int, RankStatus]:
    """Return what a rank has told: its beat, and its status."""
    beat, position, host = text.decode().split(" ", 2)
    return int(beat), RankStatus(int(position), host)
