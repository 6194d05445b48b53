"""Long runs: memory, open files and threads do not grow over thousands of steps."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_memory_and_files_do_not_grow(shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tick writes a snapshot, a state, a grid and a metric; two workers load images. Memory may grow by 2 %."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    soak = importlib.import_module("soak")
    found = soak.summarise(*soak.watch(tmp_path / "runs", shapes_zip, 2000))
    assert found["steps_between"] > 500
    early, late = found["rss_mb"]
    assert late < 1.02 * early
    for name in ("files", "python_and_native_threads", "children"):
        assert found[name][1] <= found[name][0], name
    assert found["children"][1] == 2
    assert found["processes_left"] == 0
