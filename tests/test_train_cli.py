"""train.py as a user runs it: options, dry run, run folder, resume, transfer learning, several processes, errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SMALL, launch_as, make_shapes, small_config
from PIL import Image
from training_helpers import without_times

import dataset_tool
import metrics.registry
import train
from dnnlib.cli import HEAD_START, Script
from dnnlib.config import from_json, override, to_json
from metrics.registry import MetricResult
from torch_utils.checkpoint import Checkpoint, digest
from torch_utils.signals import EXIT_STOPPED
from training import startup, worker
from training.config import PRESETS, Environment, TrainConfig, resolve
from training.dataset import ImageDataset
from training.hooks import Requests
from training.restore import OWN_PARTIAL
from training.snapshots.snapshot import load_network
from training.training_loop import Trainer

SHORT = [*SMALL, "--kimg=0.064", "--tick=0.032", "--snap=1", "--metrics=none", "--device=cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(argument) for argument in arguments])


def run_ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def run_dirs(outdir: Path) -> list[Path]:
    return sorted(outdir.iterdir())


def last_state(run_dir: Path) -> dict[str, Any]:
    return without_times(Checkpoint.read(max(run_dir.glob("training-state-*.pt")))["parts"])


@pytest.mark.parametrize(("local_rank", "waits"), [("0", []), ("1", [HEAD_START])])
def test_under_torchrun_local_rank_0_reports_errors_first(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, waits: list[float]
) -> None:
    """Other ranks wait before reporting an error, so torchrun usually kills them first."""
    launch_as(monkeypatch, RANK="2", LOCAL_RANK=local_rank, WORLD_SIZE="4")
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    result = run("--outdir=x", "--data=missing.zip", "--kimg=long")
    assert (result.exit_code, slept) == (2, waits)
    assert "--kimg=long: expected a number" in result.stderr


def test_only_one_process_checks_the_data(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_as(monkeypatch)
    checked: list[ImageDataset] = []
    monkeypatch.setattr(ImageDataset, "check_shapes", lambda self, choose_size: checked.append(self))
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        run_ok("--outdir=x", f"--data={shapes_zip}", *SHORT, "-n")
        assert len(checked) == count


def test_flags_accept_dashes_and_underscores() -> None:
    spelled = {flag for option in train.main.params for flag in option.opts}
    for flag in ("--g_dict", "--g-dict", "--num_layers", "--num-layers", "--minimum-head", "--allow_tf32", "--dry_run"):
        assert flag in spelled


def test_a_tilde_is_expanded_after_an_equals_sign(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(shapes_zip.parent))
    monkeypatch.setenv("USERPROFILE", str(shapes_zip.parent))
    plan = json.loads(run_ok(f"--outdir={tmp_path}", "--data=~/shapes.zip", *SHORT, "--desc=a-b", "-n"))
    assert plan["options"]["data"]["path"] == str(shapes_zip)
    assert plan["options"]["run"]["desc"] == "a-b"


@pytest.mark.parametrize(
    ("program", "flag", "value", "message"),
    [
        (dataset_tool.main, "--labels-from-folders", "-1", "-1 is not in the range x>=1"),
        (dataset_tool.main, "--labels_from_folders", "-x", "'-x' is not a valid integer"),
        (train.main, "--mirror", "-1", "'-1' is not a valid boolean"),
        (train.main, "--cond", "--yes", "'--yes' is not a valid boolean"),
        (train.main, "--grad_checkpoint", "-", "'-' is not a valid"),
    ],
)
def test_a_negative_value_is_not_parsed_as_a_flag(program: click.Command, flag: str, value: str, message: str) -> None:
    result = CliRunner().invoke(program, [f"{flag}={value}"])
    assert result.exit_code == 2
    assert f"Invalid value for '{flag[:6]}" in result.stderr
    assert message in result.stderr
    assert "No such option" not in result.stderr


def test_the_command_of_the_public_readme_is_accepted(shapes32_zip: Path, tmp_path: Path) -> None:
    arguments = f"--outdir={tmp_path / 'runs'} --data={shapes32_zip} --gpus=1 --batch=32 --cfg=cifar --g_dict=256,64,16"
    output = run_ok(*arguments.split(), "--num_layers=1,2,2", "--depth=32", "-n")
    plan = json.loads(output)  # all of stdout
    assert plan["parameters"] == {"G": 1_334_142, "D": 20_720_641}
    config = from_json(TrainConfig, plan["options"])
    assert (config.batch_size, config.loss.r1_gamma, config.run.total_kimg) == (32, 0.01, 100_000)
    assert not (tmp_path / "runs").exists()


def test_switches_accept_values_as_in_older_commands(shapes32_zip: Path) -> None:
    arguments = ["--outdir=x", f"--data={shapes32_zip}", "--cfg=cifar", "-n"]
    plan = json.loads(
        run_ok(*arguments, "--mirror=1", "--cond=true", "--fp32", "--nhwc", "--nobench=1", "--allow-tf32=0")
    )
    options = plan["options"]
    assert options["data"] | {"mirror": True, "use_labels": True} == options["data"]
    assert options["precision"] == "fp32"
    assert (options["channels_last"], options["allow_tf32"]) == (True, False)
    assert options["run"]["cudnn_benchmark"] is False
    assert options["generator"]["c_dim"] == 5
    assert plan["images"] == 512


def test_a_dry_run_downloads_nothing(shapes32_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(metrics.registry, "check_available", fetch)
    for arguments in ([], ["--metrics=fid50k_full", "--set=run.tick_metrics=is5k"]):
        assert run("--outdir=x", f"--data={shapes32_zip}", "--cfg=cifar", "-n", *arguments).exit_code == 0
    assert run("--outdir=x", f"--data={shapes32_zip}", "--cfg=cifar", "-n", "--metrics=fid50k_ful").exit_code == 2


def test_the_default_metric_is_reported_with_its_reason(shapes32_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SLOW_DECODER", None)
    about = Environment(img_shape=(3, 32, 32), c_dim=0)
    config = resolve(override(PRESETS["cifar"], {"data.path": str(shapes32_zip)}), about)
    (note,) = worker._notes(config)
    assert note.startswith("No --metrics given; computing ")
    assert worker._notes(override(config, {"run.metrics": ()})) == []
    estimate = {"run.metrics": (), "loss.penalty": "estimate", "loss.penalty_share": 1.0, "loss.penalty_sigma": 0.02}
    assert worker._notes(override(config, estimate)) == []
    (note,) = worker._notes(override(config, estimate | {"precision": "bf16"}))
    assert note.startswith("loss.penalty=estimate in bf16: rounding makes R1 and R2 several times too large")
    monkeypatch.setattr(worker, "SLOW_DECODER", "Pillow decodes the images")
    assert worker._notes(override(config, {"run.metrics": ()})) == ["Pillow decodes the images"]


def test_a_run_folder_holds_the_expected_files(shapes_zip: Path, tmp_path: Path) -> None:
    extra = ["--desc=first.try", "--mbstd=32"]
    output = run_ok(
        f"--outdir={tmp_path}",
        f"--data={shapes_zip}",
        *SHORT,
        "--metrics=swd100",
        "--set=run.profile_steps=9",
        *extra,
    )
    (run_dir,) = run_dirs(tmp_path)
    assert run_dir.name == "00000-shapes-tiny-gpus1-batch16-first.try"
    assert "Minibatch-std: groups of 16 instead of 32" in output
    names = {path.name for path in run_dir.iterdir()}
    expected = {"training_options.json", "log.txt", "stats.jsonl", "reals.png", "fakes_init.png"}
    expected |= {"environment.jsonl", "metric-swd100.jsonl", "trace.json"}
    assert expected | {"network-snapshot-000000.pkl", "training-state-000000.pt", "fakes000000.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "THE DATASET HAS LABELS" in output

    config = from_json(TrainConfig, json.loads((run_dir / "training_options.json").read_text()))
    snapshot = load_network(run_dir / "network-snapshot-000000.pkl")
    assert snapshot.config == config
    assert snapshot.kimg == 0.064
    ticks = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [tick["Progress/kimg"] for tick in ticks] == [0.0, 0.032, 0.064]
    assert {"Timing/sec_per_kimg", "Timing/maintenance_sec", "Gradients/D_main_norm"} <= ticks[1].keys()
    assert {"Loss/G/loss", "Loss/D/loss", "Timing/G_main_ms", "Timing/data_ms", "Progress/augment"} <= ticks[1].keys()
    assert ticks[1]["Loss/scores/real"]["num"] == 32
    metrics = [json.loads(line) for line in (run_dir / "metric-swd100.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in metrics] == [0.032, 0.064]
    written = hashlib.sha256((run_dir / "network-snapshot-000000.pkl").read_bytes()).hexdigest()
    assert metrics[-1]["snapshot_sha256"] == written  # the file that the background writer wrote
    assert "kimg 0.064" in (run_dir / "log.txt").read_text()
    with Image.open(run_dir / "reals.png") as image:
        assert image.size == (16 * 16, 16 * 16)


def test_resume_latest_continues_the_same_run_exactly(shapes_zip: Path, tmp_path: Path) -> None:
    data = f"--data={shapes_zip}"
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    run_ok(f"--outdir={uninterrupted}", data, *SHORT)
    for kimg in (0.032, 0.064):  # the first call starts a run, the second call resumes it
        output = run_ok(f"--outdir={stopped}", data, *SHORT, f"--kimg={kimg}", "--resume=latest")
    assert "Resuming from" in output
    (run_dir,) = run_dirs(stopped)
    assert digest(last_state(run_dir)) == digest(last_state(run_dirs(uninterrupted)[0]))
    ticks = [json.loads(line)["Progress/kimg"] for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert ticks == [0.0, 0.032, 0.064]

    run_ok(
        f"--outdir={stopped}", data, *SHORT, "--gamma=3", "--resume=latest"
    )  # another configuration starts a new run
    assert [path.name[:6] for path in run_dirs(stopped)] == ["00000-", "00001-"]
    run_ok(f"--outdir={stopped}", data, *SHORT, "--kimg=0.08", f"--resume={run_dir}")
    assert last_state(run_dir)["state"]["nimg"] == 80
    run_ok(f"--outdir={stopped}", data, *SHORT)  # a new run without --resume
    assert len(run_dirs(stopped)) == 3
    refused = run(f"--outdir={stopped}", data, *SHORT, "--gamma=3", f"--resume={run_dir}")
    assert refused.exit_code == 2
    assert "loss.r1_gamma: 0.5 -> 3.0" in refused.output


def test_transfer_learning_starts_from_a_snapshot(shapes_zip: Path, tmp_path: Path) -> None:
    run_ok(f"--outdir={tmp_path / 'a'}", f"--data={shapes_zip}", *SHORT)
    source = run_dirs(tmp_path / "a")[0] / "network-snapshot-000000.pkl"
    arguments = [f"--outdir={tmp_path / 'b'}", f"--data={shapes_zip}", *SHORT, "--kimg=0.016", f"--resume={source}"]
    output = run_ok(*arguments, "--cond")
    assert "G: new: mapping.embed.weight" in output
    assert "G: copied in part: mapping.layers.0.weight" in output  # the first layer reads the label too
    (run_dir,) = run_dirs(tmp_path / "b")
    options = json.loads((run_dir / "training_options.json").read_text())
    assert options["augment"]["ada_kimg"] == 100
    assert options["ema"]["rampup"] is None
    first = load_network(source).G.state_dict()
    then = load_network(run_dir / "network-snapshot-000000.pkl").G.state_dict()
    assert then["synthesis.const"].sub(first["synthesis.const"]).abs().max() < 0.01  # after one step

    mismatch = run(f"--outdir={tmp_path / 'c'}", f"--data={shapes_zip}", *SHORT, "--g_dict=64,32", f"--resume={source}")
    assert mismatch.exit_code == 2
    assert "of the parameters are in the snapshot" in mismatch.output
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=/nowhere.zip"], "/nowhere.zip"),
        (["--g_dict=32"], "--num_layers=1,1: must have one entry per resolution"),
        (["--g_dict=32,33", "--minimum_head=2"], "33 is not a multiple of its 2 heads"),
        (["--base=12"], "--g_dict=32,16: does not produce images of 16x16 (height x width) with base=(12, 12)"),
        (["--desc=a/b"], "--desc=a/b: at most 60 letters"),
        (["--batch=30", "--batch-gpu=8"], "--batch=30: must be a multiple of 8"),
        (["--metrics=fud5k"], "unknown metric 'fud5k'"),
        (["--aug=fixed"], "needs the probability"),
        (["--freezed=99"], "--freezed=99: this discriminator has 7 layers"),
        (["--resume=/nowhere"], "not `latest`, a run's folder, a training state or a snapshot"),
        (["--device=gpu"], "--device=gpu: no such kind of device"),
        (["--gamma=-1"], "--gamma=-1.0: must be at least 0; 0 turns the regulariser off"),
        (["--outdir=/proc/nowhere"], "--outdir=/proc/nowhere: cannot be written"),
        (["--seed=-1"], "--seed=-1"),
        (["--workers=2", "--set=run.data_on_gpu=true"], "--workers=2: cannot be combined with run.data_on_gpu"),
        (["--set=run.keep_last=0"], "--set run.keep_last=0: must be at least 1"),
        (["--override"], "--override: applies to resumed runs only; give --resume=latest"),
    ],
)
def test_mistakes_get_one_line_and_leave_no_files(
    shapes_zip: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.startswith("Error: ")
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_missing_labels_are_reported(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "a.png")
    result = run(f"--outdir={tmp_path / 'runs'}", f"--data={tmp_path / 'data'}", *SHORT, "--cond")
    assert result.exit_code == 2
    assert "label" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_missing_option_is_named() -> None:
    result = run("--outdir=x", "--cfg=tiny")
    assert result.exit_code == 2
    assert "missing option --data" in result.output


def test_the_stored_configuration_round_trips(shapes_zip: Path) -> None:
    plan = json.loads(run_ok("--outdir=x", f"--data={shapes_zip}", "--cfg=auto", "-n"))
    config = from_json(TrainConfig, plan["options"])
    assert to_json(config) == plan["options"]


def test_impossible_starts_are_refused_before_launch(shapes_zip: Path, tmp_path: Path) -> None:
    result = run(f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--gpus=2", f"--resume={tmp_path}")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert "contains no training state" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("mode", "size"), [("RGB", (16, 32)), ("RGBA", (16, 16)), ("L", (16, 16))])
def test_mixed_image_sizes_are_found_before_launch(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    (tmp_path / "data").mkdir()
    for number in range(20):
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / f"{number:02d}.png")
    Image.new(mode, size).save(tmp_path / "data" / "17.png")
    result = run(f"--outdir={tmp_path / 'runs'}", f"--data={tmp_path / 'data'}", *SHORT)
    assert result.exit_code == 2
    kind = {"RGB": "RGB", "RGBA": "RGBA", "L": "grayscale"}[mode]
    assert f"the first different image is '17.png', {size[0]}x{size[1]} {kind}: build a dataset of one" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_transferred_run_can_be_resumed(shapes_zip: Path, tmp_path: Path) -> None:
    common = [f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT]
    run_ok(f"--outdir={tmp_path / 'a'}", f"--data={shapes_zip}", *SHORT, "--kimg=0.016")
    source = run_dirs(tmp_path / "a")[0] / "network-snapshot-000000.pkl"
    run_ok(*common, "--kimg=0.016", f"--resume={source}")
    (run_dir,) = run_dirs(tmp_path / "runs")
    run_ok(*common, "--kimg=0.032", "--resume=latest")
    run_ok(*common, "--kimg=0.048", f"--resume={run_dir}")
    assert run_dirs(tmp_path / "runs") == [run_dir]
    assert last_state(run_dir)["state"]["nimg"] == 48


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(shapes_zip: Path, tmp_path: Path) -> None:
    """The run keeps its batch size, even with `auto`, and the micro-batch size that divides it: results stay equal."""
    auto = ["--cfg=auto", *SMALL[1:6], "--tick=0.064", "--snap=1", "--metrics=swd60", "--device=cpu"]
    common = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *auto]
    run_ok(*common, "--kimg=0.064", "--gpus=2")
    (run_dir,) = run_dirs(tmp_path)
    assert run_dir.name.endswith("gpus2-batch64")
    run_ok(*common, "--kimg=0.128", "--gpus=1", "--resume=latest")
    assert run_dirs(tmp_path) == [run_dir]
    options = json.loads((run_dir / "training_options.json").read_text())
    assert (options["batch_size"], options["run"]["batch_gpu"], options["run"]["num_gpus"]) == (64, 32, 1)
    assert last_state(run_dir)["state"]["nimg"] == 128
    for name in ("stats", "metric-swd60"):
        assert len((run_dir / f"{name}.jsonl").read_text().splitlines()) == 3


def test_a_truncated_log_does_not_prevent_resuming(shapes_zip: Path, tmp_path: Path) -> None:
    common = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT]
    run_ok(*common, "--kimg=0.032")
    (run_dir,) = run_dirs(tmp_path)
    with (run_dir / "stats.jsonl").open("a") as log:
        log.write('{"Progress/ti')
    of_images = '{"metric": "fid50k_full", "kimg": null}\n'  # as calc_metrics.py writes for a folder of images
    (run_dir / "metric-fid50k_full.jsonl").write_text(of_images + '{"metric": "fid50k_full", "kimg": 9}\n')
    (tmp_path / "00001-other").mkdir()
    (tmp_path / "00001-other" / "training-state-000000.pt").touch()
    (tmp_path / "00001-other" / "training_options.json").write_text("[]")
    run_ok(*common, "--resume=latest")
    ticks = [json.loads(line)["Progress/kimg"] for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert ticks == [0.0, 0.032, 0.064]
    assert (run_dir / "metric-fid50k_full.jsonl").read_text() == of_images


def test_a_run_shorter_than_a_tick_logs_start_and_end(shapes_zip: Path, tmp_path: Path) -> None:
    run_ok(f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--tick=1", "--set=run.profile_steps=100")
    (run_dir,) = run_dirs(tmp_path)
    first, last = (run_dir / name for name in ("fakes_init.png", "fakes000000.png"))
    assert first.read_bytes() != last.read_bytes()
    assert load_network(run_dir / "network-snapshot-000000.pkl").kimg == 0.064
    assert (run_dir / "trace.json").exists()  # a profile of the completed steps


def test_a_profile_of_a_short_run_is_written_or_reported(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [f"--data={shapes_zip}", *SHORT, "--tick=1", "--set=run.profile_steps=100"]
    result = run(f"--outdir={tmp_path / 'short'}", *common, "--kimg=0.048")  # 3 steps
    assert result.stderr.count("Warning: run.profile_steps: training ended before") == 1

    def stop(self: Requests, trainer: Trainer) -> None:
        trainer.is_stopped = trainer.state.step == 5

    monkeypatch.setattr(Requests, "on_step", stop)
    result = run(f"--outdir={tmp_path / 'stopped'}", *common, "--kimg=1")
    assert result.exit_code == EXIT_STOPPED
    assert "Profile of 2 steps" in result.stdout
    (run_dir,) = run_dirs(tmp_path / "stopped")
    assert (run_dir / "trace.json").exists()


def test_a_changed_dataset_is_detected_on_resume(shapes_zip: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.zip"
    shutil.copy(shapes_zip, data)
    common = [f"--outdir={tmp_path / 'runs'}", f"--data={data}", *SHORT, "--resume=latest"]
    run_ok(*common, "--kimg=0.016")
    assert "has changed" not in run(*common, "--kimg=0.032").stderr
    data.unlink()
    make_shapes(data, 16, 20)
    result = run(*common, "--kimg=0.048")
    assert result.exit_code == 0
    assert f"{data} has changed since this run was stopped" in result.stderr


@pytest.mark.parametrize(
    ("given", "layers", "linformer"),
    [
        ([], [1, 2, 1, 1], True),
        (["--num_layers=2,2,2,2"], [2, 2, 2, 2], True),
        (["--linformer=0"], [1, 2, 1, 1], False),
    ],
)
def test_auto_fills_in_only_missing_values(
    tmp_path: Path, given: list[str], layers: list[int], linformer: bool
) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    arguments = ["--outdir=x", f"--data={tmp_path / 'data'}", "--cfg=auto", "--device=cpu", "-n"]
    generator = json.loads(run_ok(*arguments, *given))["options"]["generator"]
    assert (generator["layers"], generator["linformer"]) == (layers, linformer)
    refused = run(*arguments, "--num_layers=1,2")
    assert (refused.exit_code, "must have one entry per resolution, 4 for images of 64x64" in refused.stderr) == (
        2,
        True,
    )


def test_override_resumes_with_other_options(shapes_zip: Path, tmp_path: Path) -> None:
    """Learning rates and a fixed p are stored in the training state too; the options take precedence."""
    common = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--aug=fixed"]
    run_ok(*common, "--p=0.25", "--kimg=0.016")
    (run_dir,) = run_dirs(tmp_path)
    other = ["--p=0.5", "--glr=0.003", "--gamma=2"]
    plain = run(*common, *other, "--kimg=0.016", "--resume=latest")
    assert plain.exit_code == 0
    assert f"so a new run starts. --override resumes {run_dir}" in plain.stderr
    assert "g_optimizer.lr: 0.001 -> 0.003" in plain.stderr
    shutil.rmtree(run_dirs(tmp_path)[1])
    refused = run(*common, *other, f"--resume={run_dir}")
    assert refused.exit_code == 2
    for line in ("augment.p: 0.25 -> 0.5", "g_optimizer.lr: 0.001 -> 0.003", "loss.r1_gamma: 0.5 -> 2.0"):
        assert line in refused.stderr

    for resume, kimg in (("latest", 0.032), (run_dir, 0.048)):
        result = run(*common, *other, f"--kimg={kimg}", f"--resume={resume}", "--override")
        assert result.exit_code == 0, result.output
    assert run_dirs(tmp_path) == [run_dir]
    state = last_state(run_dir)
    assert state["state"]["nimg"] == 48
    assert state["g_optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.003 * 4 / 5)  # lazy regularisation
    assert float(state["ada"]["p"]) == 0.5
    assert json.loads((run_dir / "training_options.json").read_text())["loss"]["r1_gamma"] == 2
    for mismatch in ("--cbase=128", "--freezed=2"):
        refused = run(*common, *other, mismatch, "--kimg=0.064", f"--resume={run_dir}", "--override")
        assert (refused.exit_code, "the run used other options" in refused.stderr) == (2, True), refused.output


def test_out_of_memory_suggests_disabling_graphs_first(shapes_zip: Path) -> None:
    config = small_config(shapes_zip)
    with_graphs = override(config, {"run.graphs": True})
    on_gpu, on_host = torch.OutOfMemoryError("CUDA out of memory"), MemoryError()
    assert "choose --graphs=0, --batch-gpu=8" in worker._advise_on_memory(with_graphs, on_gpu)
    assert "--graphs" not in worker._advise_on_memory(config, on_gpu)
    assert "--graphs" not in worker._advise_on_memory(with_graphs, on_host)


def test_out_of_memory_names_the_flags_that_help(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exceed_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "run_phase", exceed_memory)
    result = run(f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: out of GPU memory with --batch-gpu=16: choose --batch-gpu=8, --grad-checkpoint, "
        "--linformer (another network)"
    )
    for options, answer in (
        (["--batch-gpu=2"], "choose --grad-checkpoint, --linformer"),  # path length uses half of a micro-batch
        (
            ["--mbstd=8", "--batch=24", "--batch-gpu=24"],
            "choose --batch-gpu=8, --grad-checkpoint",
        ),  # a micro-batch of 12 has no minibatch-std groups
        (["--batch-gpu=2", "--linformer=1", "--grad-checkpoint"], "choose a smaller network\n"),
    ):
        result = run(f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--pl-weight=2", *options)
        assert (result.exit_code, answer in result.stderr) == (2, True), result.stderr


def test_the_best_state_is_kept_and_starts_a_new_run(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metric values are 1, 2 and, on resume, 4: the best is the first tick; --resume=latest uses the last state."""
    scores = iter([1.0, 2.0, 4.0, 0.5])
    compute_all = metrics.registry.compute_all

    def compute(*args: Any) -> Iterator[MetricResult]:
        for result in compute_all(*args):
            yield replace(result, results={result.metric: next(scores)})

    monkeypatch.setattr(metrics.registry, "compute_all", compute)
    rename, renamed = os.replace, set()

    def record_rename(source: Path, dest: Path) -> None:
        renamed.add(Path(source).name)
        rename(source, dest)

    monkeypatch.setattr(os, "replace", record_rename)
    common = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--set=run.keep_last=1", "--keep-best"]
    scored = [*common, "--metrics=swd100"]
    run_ok(*scored, "--kimg=0.064")
    assert "at kimg 0.064" in run_ok(*scored, "--kimg=0.096", "--resume=latest")
    (run_dir,) = run_dirs(tmp_path)
    best = run_dir / "state-best-swd100.pt"
    assert Checkpoint.read(best)["parts"]["state"]["nimg"] == 32
    assert load_network(run_dir / "network-best-swd100.pkl").kimg == 0.032

    output = run_ok(*scored, "--kimg=0.064", f"--resume={best}")
    assert f"Starting from {best} at kimg 0.032" in output
    assert len(renamed) > 6
    assert all(OWN_PARTIAL.fullmatch(name) for name in renamed)  # names that a resumed run removes after a kill
    new = run_dirs(tmp_path)[1]
    assert last_state(new)["state"]["nimg"] == 64
    assert Checkpoint.read(best)["parts"]["state"]["nimg"] == 32
    uninterrupted = tmp_path / "uninterrupted"
    run_ok(f"--outdir={uninterrupted}", f"--data={shapes_zip}", *SHORT)
    assert digest(last_state(new)) == digest(last_state(run_dirs(uninterrupted)[0]))
    run_ok(*common, "--metrics=none", "--keep-best=0", "--kimg=0.032", f"--resume={best}")  # no steps left
    assert last_state(run_dirs(tmp_path)[2])["state"]["nimg"] == 32  # the new run has its own copy for --resume=latest

    refused = run(*common, "--metrics=none")
    assert (refused.exit_code, "--keep-best=True: needs a metric" in refused.stderr) == (2, True)
    refused = run(*scored, "--glr=0.1", f"--resume={best}")
    assert (refused.exit_code, "g_optimizer.lr: 0.001 -> 0.1" in refused.stderr) == (2, True)


def test_repeated_list_options_are_joined(shapes32_zip: Path) -> None:
    arguments = ["--outdir=x", f"--data={shapes32_zip}", "--cfg=tiny", "--device=cpu", "-n"]

    def planned(*options: str) -> Any:
        return json.loads(run_ok(*arguments, *options))["options"]["run"]["metrics"]

    assert planned("--metrics=swd100", "--metrics=swd60,swd100") == ["swd100", "swd60"]
    assert planned("--metrics=none") == planned("--metrics=none", "--metrics=none") == []
    assert planned("--metrics=none", "--metrics=swd60") == ["swd60"]


def test_a_closed_stderr_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `command 2>&-`, progress and warnings are discarded."""

    @click.command(cls=Script)
    def command() -> None:
        print("progress", file=sys.stderr)
        assert not sys.stderr.isatty()

    monkeypatch.setattr(sys, "stderr", None)
    command.main([], standalone_mode=False)
    sys.stderr.close()


def test_ranks_share_the_open_dataset(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a large zip file takes seconds; the ranks map the arrays of the launcher."""
    launched: list[Any] = []
    monkeypatch.setattr(startup, "launch", lambda function, config: launched.append(function))
    arguments = [f"--data={shapes_zip}", "--outdir=runs", "--cfg=auto", "--device=cpu", "--metrics=none"]
    outcome = CliRunner().invoke(train.main, arguments)
    assert outcome.exit_code == 0, outcome.output
    (function,) = launched
    (dataset,) = (arg for arg in function.args if isinstance(arg, ImageDataset))
    assert dataset.config.path == str(shapes_zip)
