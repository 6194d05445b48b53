"""Duration of the sections of a step, measured without host synchronization during the step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Mean milliseconds per named section. On a GPU, CUDA events measure the time and are read once per `collect`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.milliseconds: dict[str, list[float]] = defaultdict(list)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the enclosed block."""
        if self.on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self.milliseconds[name].append((time.perf_counter() - begin) * 1000)

    def collect(self) -> dict[str, float]:
        """Return the mean of each section since the last call and reset. Synchronizes with the device."""
        if self.events:
            torch.cuda.synchronize()
            for name, start, end in self.events:
                self.milliseconds[name].append(start.elapsed_time(end))
            self.events = []
        means = {name: sum(values) / len(values) for name, values in self.milliseconds.items()}
        self.milliseconds.clear()
        return means
