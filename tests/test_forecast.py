"""The forecast of a run's time and disk space, against a run with these settings and against written-out values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SMALL, launch_as

import train
from training.forecast import ForecastLine, Pace, Probe, describe, describe_time, duration
from training.training_loop import TrainState

SHORT = [
    *SMALL,
    "--batch=64",
    "--kimg=2",
    "--tick=1",
    "--snap=1",
    "--metrics=none",
    "--device=cpu",
    "--set=ema.profiles=0.05,0.1",
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 seconds"),
        (100, "100 seconds"),
        (125, "2.1 minutes"),
        (119 * 60, "2 hours"),
        (47 * 3600, "2 days"),
        (61.3 * 86400, "61 days"),
        (123_456 * 86400, "120,000 days"),
    ],
)
def test_durations_are_rounded_to_two_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_is_the_pace_times_the_images() -> None:
    """52.8 s per kimg: 100,000 kimg in 5,280,000 s = 61.1 days, and 3600 / 52.8 = 68.2 kimg per hour."""
    expected = "100,000 kimg: about 61 days here (68.2 kimg per hour, without metrics)"
    assert describe_time(100_000, 52.8) == expected


def test_the_first_step_counts_only_while_it_is_alone() -> None:
    state = TrainState(nimg=64, step_seconds=100.0)
    pace = Pace(state)
    for seconds, images, expected in [(90, 8, 90), (2, 8, 2), (3, 8, 5), (4, 8, 9)]:
        state.step_seconds += seconds
        state.nimg += images
        pace.update(state)
        assert pace.seconds == expected
    assert pace.seconds_per_kimg == pytest.approx(1000 * 9 / 24)


@pytest.mark.parametrize(
    ("first", "later", "printed_at", "hint"),
    [
        (5.0, 2.0, 17, False),  # 16 steps of 2 s after the first step
        (5.0, 0.5, 41, False),  # 40 steps of half a second take 20 s
        (5.0, 25.0, 4, True),  # three steps take more than a minute
        (70.0, 70.0, 2, True),
        (70.0, 0.5, 41, False),  # the first step compiles
    ],
)
def test_the_line_is_printed_once_the_pace_is_known(
    first: float, later: float, printed_at: int, hint: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SimpleNamespace(preset="cifar")
    state = TrainState()
    trainer = SimpleNamespace(state=state, config=config, total_nimg=1_000_000, device=torch.device("cpu"))
    line = ForecastLine()
    line.on_start(trainer)  # type: ignore[arg-type]
    for step in range(1, 60):
        state.step_seconds += first if step == 1 else later
        state.nimg += 64
        line.on_step(trainer)  # type: ignore[arg-type]
        output = capsys.readouterr().out
        assert output.startswith("Forecast: ") == (step == printed_at)
        assert ("--cfg=tiny" in output) == (hint and step == printed_at)


def test_the_disk_space_is_that_of_the_run(shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a run of these options. PNG compresses the grids, which count as 256 images of 16 x 16 x 3 bytes."""
    monkeypatch.setattr(Probe, "ENOUGH", 0.02)
    options = [f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT]
    result = run(*options, "--dry-run", "--forecast")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "runs").exists()
    forecast = json.loads(result.stdout)["forecast"]
    assert forecast["kimg"] == 2
    assert forecast["hours"] == pytest.approx(2 / forecast["kimg_per_hour"], rel=1e-3)
    assert result.stderr.splitlines()[-1].startswith("2 kimg: about ")
    assert run(*options).exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    grids = sum(name.startswith("fakes") for name in sizes) * 256 * 16 * 16 * 3
    kept = ("network-snapshot", "training-state", "network-ema")
    written = grids + sum(size for name, size in sizes.items() if name.startswith(kept))
    assert forecast["disk_gb"] * 2**30 == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize(
    ("first", "later", "steps"), [(60.0, 0.1, 202), (5.0, 3.0, 8), (30.0, 30.0, 2), (0.1, 0.1, 202)]
)
def test_a_probe_times_steps_for_twenty_seconds(first: float, later: float, steps: int) -> None:
    """The first step does not count: 20 s are 200 steps of 0.1 s, or 7 of 3 s; rounding may add a step."""
    state = TrainState()
    trainer = SimpleNamespace(state=state, is_stopped=False)
    probe = Probe()
    probe.on_start(trainer)  # type: ignore[arg-type]
    while not trainer.is_stopped:
        state.step_seconds += later if state.nimg else first
        state.nimg += 32
        probe.on_step(trainer)  # type: ignore[arg-type]
    assert probe.pace.steps in (steps, steps + 1)
    assert probe.pace.seconds_per_kimg == pytest.approx(1000 * later / 32)


def test_large_numbers_are_written_without_exponents() -> None:
    values = {"kimg": 24_999.456, "kimg_per_hour": 4230.0, "hours": 5.9, "disk_gb": 138.2, "memory_gb": 0.0213}
    time = "25,000 kimg: about 5.9 hours here (4,230 kimg per hour, without metrics)"
    assert describe(values) == f"{time}; memory per process 0.021 GB; disk space 140 GB"


def test_a_forecast_of_a_resumed_run_writes_nothing(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results after the training state, which resuming would remove, stay, as do files that another process writes."""
    monkeypatch.setattr(Probe, "ENOUGH", 0.02)
    assert run(f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, "--set=run.keep_last=1").exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    with (folder / "stats.jsonl").open("a") as log:
        log.write(json.dumps({"Progress/kimg": 3}) + "\n")
    (folder / ".network-snapshot-000003.pkl.12345.partial").write_bytes(b"written")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(f"--resume={folder}", "--kimg=4", "--override", "--dry-run", "--forecast")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["forecast"]["kimg"] == pytest.approx(4 - 2.048)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_forecast_needs_a_dry_run(
    under_torchrun: bool, shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if under_torchrun:
        launch_as(monkeypatch)
    result = run(f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--forecast", *["--dry-run"] * under_torchrun)
    assert (result.exit_code, "--forecast: only with --dry-run" in result.stderr) == (2, True)
