"""Watchdog that reports a stopped rank and ends the run; the other ranks would otherwise hang."""

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

MIN_SILENCE = 5.0  # seconds; on a busy machine a live rank can miss heartbeats for a shorter time


@dataclass(frozen=True)
class RankStatus:
    """Progress of a rank as a count of collective calls, and its host name."""

    position: int
    host: str


def find_stopped(statuses: dict[int, RankStatus], silent: Collection[int] = ()) -> list[int]:
    """Return the ranks that the other ranks wait for.

    These are the `silent` ranks, whose heartbeats have stopped; if there are none, the ranks that have entered the
    fewest collective calls. The list is empty if all ranks are alive and have entered the same number of calls.
    """
    if silent:
        return sorted(silent)
    positions = [status.position for status in statuses.values()]
    if min(positions) == max(positions):
        return []
    return [rank for rank, status in statuses.items() if status.position == min(positions)]


class Pulse:
    """Heartbeat monitor: the local time at which the beat counter of each rank last changed."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.beats: dict[int, tuple[int, float]] = {}  # rank -> last beat, time of its arrival

    def find_silent(self, beats: dict[int, int], now: float) -> list[int]:
        """Record the beats at time `now` (seconds); return the ranks whose beat has not changed for the timeout."""
        for rank, beat in beats.items():
            if rank not in self.beats or self.beats[rank][0] != beat:
                self.beats[rank] = beat, now
        return [rank for rank, (_, since) in self.beats.items() if now - since > self.timeout]


class Watchdog:
    """Thread on every rank that publishes the progress of its process in the launcher's store.

    A rank counts as stopped if for `timeout` seconds the others have waited for it, or its heartbeat has been missing
    (frozen process). The lowest of the other ranks then prints the stopped ranks and exits, and the
    launcher ends all processes.
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
        """Start the thread."""
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self.over.set()
        self.thread.join(1.0)  # with a timeout, because the thread may block on a store that is shutting down

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
                # The lowest of the waiting ranks reports.
                if stopped and self.rank == min(set(statuses) - set(stopped), default=None):
                    self._abort(stopped, statuses)
        except RuntimeError:  # the launcher and its store have exited
            return

    def _abort(self, stopped: list[int], statuses: dict[int, RankStatus]) -> None:
        names = ", ".join(f"{rank} on {statuses[rank].host}" for rank in stopped)
        plural = "es" if len(stopped) > 1 else ""
        print(
            f"Error: process{plural} {names}: no progress for {self.timeout:g} seconds while the others wait; resume "
            "from the last training state with --resume=latest; --set run.timeout=SECONDS sets the limit",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _read(text: bytes) -> tuple[int, RankStatus]:
    """Parse the record that a rank has published; return its beat and status."""
    beat, position, host = text.decode().split(" ", 2)
    return int(beat), RankStatus(int(position), host)
