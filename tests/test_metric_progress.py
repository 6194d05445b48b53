"""Progress of metrics on stderr, with a simulated clock: announcements and the time left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from metrics import display
from metrics.display import ProgressLine

Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that reports a pass at given times and returns the lines on stderr."""
    now = 1000.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    line = ProgressLine()

    def report(
        passes: Sequence[tuple[str, int]] | None, name: str, total: int, steps: Sequence[tuple[float, int]]
    ) -> list[str]:
        """Report the steps (seconds since the start of the pass, images done); `passes` start new metrics."""
        nonlocal now
        start = now
        if passes is not None:
            line.plan("fid50k_full, is50k", passes)
        line(name, 0, total)
        for seconds, done in steps:
            now = start + seconds
            line(name, done, total)
        return capsys.readouterr().err.splitlines()

    return report


TWO = [("generated images", 50_000), ("real images", 12_000)]


def test_long_metrics_are_announced_at_the_measured_speed(run: Run) -> None:
    """10 s for the first batch, then 0.02 s per image: 10 + 49,900 * 0.02 = 1,008 s."""
    lines = run(TWO, "generated images", 50_000, [(10, 100), (12, 200), (14, 300), (16, 400), (17, 450)])
    passes = "2 passes (50,000 generated images; 12,000 real images)"
    assert lines == [f"fid50k_full, is50k: {passes}, pass 1 takes about 16m 48s"]
    assert run(None, "real images", 12_000, [(1, 100), (101, 1100), (200, 12_000)]) == [
        "real images: 1100 of 12000, 18m 10s left",  # 0.1 s per image
        "real images: 12000 of 12000",
    ]


def test_short_metrics_are_not_announced(run: Run) -> None:
    steps = [(10, 100), (14, 200), (26, 500), (50, 1100), (52, 1200)]  # 10 s + 0.04 s per image
    assert run(TWO, "generated images", 1200, steps) == [
        "generated images: 1100 of 1200, 4s left",
        "generated images: 1200 of 1200",
    ]


def test_passes_of_a_minute_together_are_announced(run: Run) -> None:
    assert run(TWO, "generated images", 100, [(1, 10), (5, 50), (10, 100)]) == ["generated images: 100 of 100"]
    lines = run(None, "real images", 600, [(2, 20), (8, 80)])  # 10 s, and 60 s at 0.1 s per image
    assert [line.partition(", pass ")[2] for line in lines] == ["2 takes about 1m 00s"]


def test_a_slow_first_batch_measures_the_speed(run: Run) -> None:
    lines = run([("steps", 100)], "steps", 100, [(25, 10), (50, 20)])
    assert lines == [
        "fid50k_full, is50k: 1 pass (100 steps), pass 1 takes about 4m 10s",
        "steps: 20 of 100, 3m 20s left",
    ]


def test_metrics_without_a_plan_are_announced_by_pass(run: Run) -> None:
    lines = run([], "real images", 5000, [(1, 10), (11, 110)])
    assert lines == ["fid50k_full, is50k: a pass over 5,000 real images takes about 8m 20s"]
