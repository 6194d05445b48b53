"""What two processes do together, for the tests of several files: one launch for all, which takes seconds."""

from __future__ import annotations

import importlib
from pathlib import Path

# Each has a function `in_two_processes(folder, data)`, which both processes call; what it writes is tested there.
MODULES = ("test_training", "test_objectives", "test_auto_batch", "test_signals", "test_custom_ops", "test_hostile_web")


def work(folder: Path, data: Path) -> None:
    """What each of the two processes does."""
    for name in MODULES:
        importlib.import_module(name).in_two_processes(folder / name, data)
