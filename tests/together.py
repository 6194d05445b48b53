"""One launch of two processes, shared by the tests of several files because a launch takes seconds."""

from __future__ import annotations

import importlib
from pathlib import Path

# Each module has a function `in_two_processes(folder, data)` that both processes call, and tests of the output.
MODULES = ("test_training", "test_objectives", "test_auto_batch", "test_signals", "test_custom_ops", "test_hostile_web")


def work(folder: Path, data: Path) -> None:
    """Call `in_two_processes` of every module; run by each of the two processes."""
    for name in MODULES:
        importlib.import_module(name).in_two_processes(folder / name, data)
