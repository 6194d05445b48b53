"""Loggers: equal values and images in each, W&B continues on resume, no failure stops training."""

from __future__ import annotations

import errno
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorboard", reason="tensorboard is an optional package")
import torch
from click.testing import CliRunner, Result
from conftest import SMALL, small_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import train
from training import loggers
from training.config import LOGGERS

# Three ticks of one step, and one evaluation after the first image grid.
SHORT = [*SMALL, "--device=cpu", "--tick=0.016", "--snap=3"]
LENGTH = 0.048


def run_training(data: Path, outdir: Path, *options: str) -> Result:
    return CliRunner().invoke(train.main, [f"--data={data}", f"--outdir={outdir}", *SHORT, *options])


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use W&B offline, without an account and without the user's settings."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def read_records(run_dir: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of an offline W&B log: blocks of 32 KiB; each record starts with CRC-32, length and kind."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # the W&B process writes the last records when it exits
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a complete record, or its last part
                record = wandb_internal_pb2.Record.FromString(whole)  # type: ignore[attr-defined]
                yield record.WhichOneof("record_type"), record
                whole = b""


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows logged to W&B."""
    rows = [record.history.item for kind, record in read_records(run_dir) if kind == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def curves_of(ticks: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the curves in stats.jsonl by name, as pairs of (images, value)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for tick in ticks:
        for name, value in tick.items():
            number = value["mean"] if isinstance(value, dict) else value
            if number is not None:
                curves.setdefault(name, []).append((round(tick["Progress/kimg"] * 1000), number))
    return curves


@pytest.mark.usefixtures("_offline")
def test_tensorboard_and_wandb_hold_the_values_of_the_run(shapes_zip: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    options = (f"--kimg={LENGTH}", "--metrics=swd16", "--log=tensorboard,wandb")
    result = run_training(shapes_zip, tmp_path, *options)
    assert result.exit_code == 0, result.output
    (run_dir,) = tmp_path.glob("0*")
    ticks = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    metric = [json.loads(line) for line in (run_dir / "metric-swd16.jsonl").read_text().splitlines()]
    history = read_history(run_dir)
    board = EventAccumulator(str(run_dir), size_guidance={"images": 0}).Reload()

    expected = {name: curve for name, curve in curves_of(ticks).items() if name != "timestamp"}
    assert len(expected) > 15
    scalars = {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert {name for name in scalars if not name.startswith("Metrics/")} == set(expected)
    for name, curve in expected.items():
        assert np.array(scalars[name]) == pytest.approx(np.array(curve)), name
        logged = [(round(row["Progress/kimg"] * 1000), row[name]) for row in history if name in row]
        if name != "Progress/kimg":  # the axis, present in each row
            assert np.array(logged) == pytest.approx(np.array(curve)), name
    values = [record["results"]["swd16"] for record in metric]
    assert [event.value for event in board.Scalars("Metrics/swd16")] == pytest.approx(values)
    assert [row["Metrics/swd16"] for row in history if "Metrics/swd16" in row] == pytest.approx(values)
    assert all("Progress/kimg" in row for row in history)

    grid = np.asarray(Image.open(run_dir / "fakes000000.png"))
    encoded = board.Images("Images/fakes")
    assert [event.step for event in encoded] == [0, round(LENGTH * 1000)]
    assert [event.step for event in board.Images("Images/reals")] == [0]
    (tmp_path / "board.png").write_bytes(encoded[-1].encoded_image_string)
    shown = sorted(
        run_dir.glob("wandb/offline-run-*/files/media/images/Images/fakes_*.png"), key=lambda path: path.stat().st_mtime
    )
    assert len(shown) == 2
    for path in (tmp_path / "board.png", shown[-1]):
        assert np.array_equal(np.asarray(Image.open(path)), grid)


@pytest.mark.usefixtures("_offline")
def test_a_resumed_run_continues_its_wandb_run(shapes_zip: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    options = ("--metrics=none", "--log=wandb", "--resume=latest")
    for kimg in (LENGTH, 2 * LENGTH):
        result = run_training(shapes_zip, tmp_path, f"--kimg={kimg}", *options)
        assert result.exit_code == 0, result.output
    (run_dir,) = tmp_path.glob("0*")
    runs = [record.run for kind, record in read_records(run_dir) if kind == "run"]
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 2
    assert {run.run_id for run in runs} == {(run_dir / "wandb-id.txt").read_text().strip()}
    assert {(run.display_name, run.project) for run in runs} == {(run_dir.name, "styleformer")}
    saved = json.loads((run_dir / "training_options.json").read_text())
    shown = {item.key: json.loads(item.value_json) for item in runs[-1].config.update if item.key != "_wandb"}
    assert shown == saved
    ages = [row["Progress/kimg"] for row in read_history(run_dir) if "Loss/D/loss" in row]
    assert ages == pytest.approx([0.016 * i for i in range(1, 7)])


def test_tensorboard_has_no_duplicate_ticks_after_a_kill(shapes_zip: Path, tmp_path: Path) -> None:
    options = ("--metrics=none", "--log=tensorboard", "--resume=latest")
    assert run_training(shapes_zip, tmp_path, "--kimg=0.032", *options).exit_code == 0
    (run_dir,) = tmp_path.glob("0*")
    (state,) = run_dir.glob("training-state-*.pt")
    earlier = state.read_bytes()
    assert run_training(shapes_zip, tmp_path, "--kimg=0.064", *options).exit_code == 0
    state.write_bytes(earlier)  # as if killed before the last state was written
    result = run_training(shapes_zip, tmp_path, "--kimg=0.064", *options)
    assert "at kimg 0.032" in result.output, result.output
    steps = [event.step for event in EventAccumulator(str(run_dir)).Reload().Scalars("Loss/D/loss")]
    assert steps == [16, 32, 48, 64]


class Broken:
    """A logger whose service is unavailable."""

    def __init__(self, run_dir: Path, config: Any, nimg: int) -> None:
        self.calls = 0

    def add(self, values: Any, nimg: int) -> None:
        raise RuntimeError("the service\nhas gone")

    def add_image(self, name: str, image: Any, nimg: int) -> None:
        raise ConnectionError("no route")

    def close(self, succeeded: bool) -> None:
        raise TimeoutError("too late")


def test_a_failing_logger_stops_neither_training_nor_others(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setitem(loggers._CLASSES, "wandb", Broken)
    result = run_training(shapes_zip, tmp_path, f"--kimg={LENGTH}", "--metrics=none", "--log=wandb,tensorboard")
    assert result.exit_code == 0, result.output
    for problem in ("RuntimeError: the service has gone", "ConnectionError: no route", "TimeoutError: too late"):
        warning = f"Warning: --log=wandb: {problem}; training continues\n"
        assert result.output.count(warning) == 1, result.output  # only once, not at every tick
    (run_dir,) = tmp_path.glob("0*")
    assert len(EventAccumulator(str(run_dir)).Reload().Scalars("Loss/D/loss")) == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_loses_only_events_of_a_full_disk(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writer thread handles the error; an unhandled error would kill the thread, and later events would be lost."""
    full: list[int] = []
    write = RecordWriter.write

    def write_unless_full(self: RecordWriter, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_unless_full)
    with loggers.Loggers(("tensorboard",), tmp_path, small_config(shapes_zip)) as chosen:
        for nimg in range(6):
            full[:] = [1] if nimg in (2, 3) else []
            chosen.add({"x": 1.0}, nimg)
    warning = "Warning: --log=tensorboard: OSError: [Errno 28] No space left on device; training continues\n"
    assert capsys.readouterr().err == warning
    accumulated = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(event.step for event in accumulated.Scalars("x")) == [0, 1, 4, 5]


def test_wandb_receives_no_secrets_of_the_command_line(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional package")
    given = ["train.py", "--resume=https://u:s3cret@h/x.pkl?s3cret"]
    monkeypatch.setattr("sys.argv", given)
    seen: list[list[str]] = []

    def init(**_: Any) -> Any:
        seen.append([*sys.argv])
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr("wandb.init", init)
    with pytest.raises(RuntimeError):
        loggers.WeightsAndBiases(tmp_path, small_config(shapes_zip), 0)
    assert seen == [["train.py", "--resume=https://h/x.pkl"]]
    assert sys.argv is given


def test_a_logger_that_cannot_start_is_skipped(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(run_dir: Path, config: Any, nimg: int) -> loggers.Logger:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(loggers._CLASSES, "wandb", refuse)
    with loggers.Loggers(("wandb",), tmp_path, small_config(shapes_zip)) as chosen:
        chosen.add({"x": 1.0}, 0)
        chosen.add_image("x", torch.zeros([1, 2, 2], dtype=torch.uint8), 0)
    assert capsys.readouterr().err == "Warning: --log=wandb: RuntimeError: api_key not configured; training continues\n"


def test_unavailable_loggers_are_refused_before_writing(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_training(shapes_zip, tmp_path / "runs", "--log=wanddb")
    assert result.exit_code == 2
    assert f"--log=wanddb: 'wanddb' is not one of {', '.join(LOGGERS)}; did you mean wandb?" in result.output

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()  # a wandb/ folder left by an offline run is not the package
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    assert loggers.choose_loggers(None) == ()
    result = run_training(shapes_zip, tmp_path / "runs", "--log=wandb")
    assert result.exit_code == 2
    assert "--log=wandb: the package wandb is not installed: pip install '.[wandb]'" in result.output
    assert not (tmp_path / "runs").exists()


def test_no_logger_runs_by_default(shapes_zip: Path, tmp_path: Path) -> None:
    result = run_training(shapes_zip, tmp_path, f"--kimg={LENGTH}", "--metrics=none", "--log=none")
    assert result.exit_code == 0, result.output
    (run_dir,) = tmp_path.glob("0*")
    assert not list(run_dir.glob("events.*"))
    assert (run_dir / "stats.jsonl").exists()


def documented_keys() -> dict[str, str]:
    """Return the table of stats.jsonl in docs/running.md as {name pattern: rest of the row}."""
    text = (Path(__file__).parent.parent / "docs" / "running.md").read_text()
    section = text[text.index("## stats.jsonl") : text.index("## Several processes")]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, flags=re.MULTILINE)
    return {
        re.escape(name).replace("<phase>", "(G_main|G_reg|D_main|D_reg)").replace("<field>", r"[a-z0-9_.]+"): rest
        for names, rest in rows
        for name in re.findall(r"`(.+?)`", names)
    }


def test_stats_jsonl_keys_equal_the_documented_keys(shapes_zip: Path, tmp_path: Path) -> None:
    """The runs together enable every option that adds a key."""
    variants = (
        ["--pl-weight=2", "--set=loss.pl_interval=1", "--set=loss.r1_interval=1", "--holdout=32"],
        ["--loss=relativistic", "--set=loss.centring=0.01", "--glr=0.002:0.001@1k"],
        ["--set=loss.lecam=1", "--set=loss.bcr_real=10", "--set=loss.bcr_fake=10"],
        ["--loss=wgangp-eps", "--gamma=0"],
        ["--glr=1e30", "--set=run.nan=skip"],
    )
    found: set[str] = set()
    for i, options in enumerate(variants):
        result = run_training(shapes_zip, tmp_path / str(i), "--kimg=0.048", "--metrics=none", "--log=none", *options)
        assert result.exit_code == 0, result.output
        (path,) = (tmp_path / str(i)).glob("0*/stats.jsonl")
        for line in path.read_text().splitlines():
            tick = json.loads(line)
            found.update(tick)
            assert all(set(value) == {"mean", "std", "num"} for value in tick.values() if isinstance(value, dict))
    patterns = documented_keys()
    assert {name for name in found if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()
    unseen = {pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in found)}
    assert {pattern for pattern in unseen if "on GPUs only" not in patterns[pattern]} == set()
