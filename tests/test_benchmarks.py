"""The benchmark scripts with tiny settings: lines of JSON with the promised keys; what the suite starts."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import data
import generation
import gpu_suite
import networks
import operators
import swd
import train_step

import dataset_tool
from training.config import PRESETS
from training.networks import DISCRIMINATORS, GENERATORS, winograd
from training.snapshot import save_network

CIRCUMSTANCES = {"benchmark", "device", "torch", "threads", "cores", "load_at_start", "command"}
TINY_STEP = ["--preset=tiny", "--g_dict=16,16,16", "--batch=4", "--steps=1", "--warmup=0", "--device=cpu"]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(command: click.Command, *options: str) -> list[dict[str, Any]]:
    """Run a benchmark in this process and return its lines."""
    outcome = CliRunner().invoke(command, options, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row.keys() >= CIRCUMSTANCES
        assert row["torch"] == torch.__version__
        assert row["device"].startswith("cpu")
        assert row["command"].startswith("python ")
    return rows


def test_train_step_combines_phases_by_their_intervals() -> None:
    (row,) = results(train_step.main, *TINY_STEP, "--threads=1")
    assert row["threads"] == 1
    assert row["intervals"] == {"G_main": 1, "D_main": 1, "D_reg": 16}
    assert row["ms"].keys() == {"data", "G_main", "D_main", "D_reg", "ema"}
    ms = row["ms"]
    step = ms["data"] + ms["G_main"] + ms["D_main"] + ms["ema"] + ms["D_reg"] / 16
    assert row["step_ms"] == pytest.approx(step, abs=0.05)
    assert row["sec_per_kimg"] == pytest.approx(step / 4, abs=0.02)  # ms per image = s per 1000 images
    assert row["img_per_s"] == pytest.approx(1000 / row["sec_per_kimg"], rel=1e-3)
    assert row["peak_mib"] > 0
    assert (row["widths"], row["img_shape"]) == ([16, 16, 16], [3, 32, 32])


def test_train_step_measures_each_phase_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, bool]] = []
    run_phase = train_step.Trainer.run_phase

    def spy(self: Any, phase: Any, img: torch.Tensor, c: torch.Tensor) -> None:
        uses_winograd = winograd.pays(torch.empty(1, 256, 32, 32), torch.empty(256, 256, 3, 3))
        calls.append((phase.name, len(img), uses_winograd))
        run_phase(self, phase, img, c)

    monkeypatch.setattr(train_step.Trainer, "run_phase", spy)
    (row,) = results(train_step.main, *TINY_STEP, "--batch=8", "--steps=2", "--warmup=1", "--modes=bf16+no-winograd")
    names = [name for name, batch, _ in calls if batch == 8]  # the others count operations
    assert {name: names.count(name) for name in names} == {"G_main": 3, "D_main": 3, "D_reg": 3}
    assert not any(used for _, _, used in calls)
    assert winograd.pays(torch.empty(1, 256, 32, 32), torch.empty(256, 256, 3, 3))  # and was put back
    assert (row["mode"], row["precision"], row["speedup"]) == ("bf16+no-winograd", "bf16", 1)


def test_train_step_counts_operations() -> None:
    """A discriminator of known cost under a generator that costs next to nothing: 3 passes for G, 6 for D, 9/16 for R1.

    A backward pass to weights and inputs is worth two forward ones. D sees no gradient of its own in G_main, the first
    layer none of its input in D_main, which makes the sum a little smaller.
    """
    (row,) = results(train_step.main, *TINY_STEP, "--steps=1", "--warmup=0")
    config = train_step.override(PRESETS["tiny"], {"generator.widths": (16, 16, 16), "generator.layers": (1, 1, 1)})
    forward = networks.gflop_per_image(config.discriminator)
    generator = networks.gflop_per_image(config.generator)
    least, most = 2 * forward + 3 * generator + 5 * forward, (3 + 6 + 9 / 16) * forward + 5 * generator
    assert least < row["gflop_per_image"] < most
    assert row["tflop_per_s"] == pytest.approx(row["gflop_per_image"] * row["img_per_s"] / 1000, abs=1e-3)


def test_train_step_asks_for_a_resolution_where_the_preset_leaves_it_open() -> None:
    outcome = CliRunner().invoke(train_step.main, ["--preset=auto", "--device=cpu"])
    assert outcome.exit_code == 2
    assert "--resolution" in outcome.output


@pytest.mark.slow
def test_train_step_compares_in_processes_of_their_own() -> None:
    rows = results(train_step.main, *TINY_STEP, "--modes=plain,fp32,bf16+checkpoint")
    assert [row["mode"] for row in rows] == ["plain", "fp32", "bf16+checkpoint"]
    assert rows[0]["speedup"] == 1
    for row in rows:
        assert row["speedup"] == pytest.approx(rows[0]["sec_per_kimg"] / row["sec_per_kimg"], abs=0.01)


def test_train_step_refuses_unknown_modes() -> None:
    outcome = CliRunner().invoke(train_step.main, [*TINY_STEP, "--modes=fp32,fast"])
    assert outcome.exit_code == 2
    assert "'fast' is none of fp32, tf32" in outcome.output


def test_generation_measures_each_batch(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    path = tmp_path / "network-snapshot-000001.pkl"
    save_network(path, config=config, G_ema=config.generator.build())
    options = ["--batch=1,9", "--seconds=0.01", "--device=cpu", "--modes=fp32,bf16"]
    rows = results(generation.main, f"--network={path}", *options)
    assert [(row["mode"], row["batch"]) for row in rows] == [("fp32", 1), ("fp32", 9), ("bf16", 1), ("bf16", 9)]
    for row in rows:
        assert row["network"] == path.name
        assert row["img_per_s"] * row["ms_per_batch"] == pytest.approx(1000 * row["batch"], rel=0.02)


def test_networks_count_parameters_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["tiny"].generator
    monkeypatch.setattr(networks, "CONFIGS", {"tiny": config})
    (row,) = results(networks.main, "--batch=2", "--seconds=0.01")
    assert row["parameters"] == sum(p.numel() for p in config.build().parameters())
    assert row.keys() >= {"gflop_per_image", "forward_img_per_s", "forward_backward_img_per_s"}
    assert row["peak_mib"] * 2**20 > 8 * row["parameters"]  # they and their gradients


def test_networks_of_every_family_are_measured() -> None:
    found = {type(config) for config in networks.CONFIGS.values()}
    assert found == {*GENERATORS.values(), *DISCRIMINATORS.values()}


def test_operators() -> None:
    rows = results(operators.main, "--only=RGB pyramid up, 16 px", "--repeats=1")
    assert [row["case"] for row in rows] == ["RGB pyramid up, 16 px"]
    assert rows[0]["forward"].keys() == {"ms", "gb_per_s", "of_copy"}
    assert rows[0]["impl"] == "reference"


def test_operators_counts_the_bytes_that_a_fused_kernel_moves() -> None:
    options = ("--only=bias_act lrelu, 32 px", "--repeats=1", "--dtype=float32,bfloat16", "--impl=reference")
    for row, size in zip(results(operators.main, *options), (4, 2), strict=True):
        tensor = 32 * 512 * 32 * 32 * size / 1e9
        assert row["forward"]["gb_per_s"] * row["forward"]["ms"] / 1e3 == pytest.approx(2 * tensor, rel=1e-2)
        assert row["backward"]["gb_per_s"] * row["backward"]["ms"] / 1e3 == pytest.approx(3 * tensor, rel=1e-2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--impl=triton", "'triton' is none of cuda, reference, compiled"),
        ("--impl=cuda", "the kernels need --device=cuda"),
        ("--dtype=float32,int8", "'int8' is none of float32, float16, bfloat16"),
    ],
)
def test_operators_refuses(option: str, message: str) -> None:
    outcome = CliRunner().invoke(operators.main, [option])
    assert outcome.exit_code == 2
    assert message in outcome.output


def test_data() -> None:
    (row,) = results(data.main, "--max-images=32", "--workers=1", "--batch-size=8")
    assert row["num_images"] == 32
    assert row["img_per_s"].keys() == {
        "tool",
        "tool_pillow",
        "decode",
        "decode_pillow",
        "batches",
        "batches_workers",
    }


def test_swd() -> None:
    (row,) = results(swd.main, "--size=32", "--images=16", "--device=cpu")
    assert (row["size"], row["images"]) == (32, 16)
    assert row.keys() >= {"cut_images_per_second", "images_per_second", "peak_mib"}


def new_suite(tmp_path: Path, seconds: float = 60) -> gpu_suite.Suite:
    return gpu_suite.Suite(
        sizes=gpu_suite.QUICK,
        parts=list(gpu_suite.PARTS),
        device="cpu",
        data=None,
        detector=None,
        train_seconds=1,
        deadline=gpu_suite.time.monotonic() + seconds,
        outdir=tmp_path,
        workdir=tmp_path,
    )


def test_the_suite_stops_a_command_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "SHORTEST", 0.1)
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"  # it keeps the outputs open
    endless = f"import subprocess, sys; print('started', flush=True); subprocess.run({child})"
    finished = new_suite(tmp_path).run(["-c", endless], limit=3)
    assert finished["code"] is None
    assert finished["problem"].startswith("stopped after 3 s")
    assert finished["lines"] == ["started"]
    assert "started" in (tmp_path / "log.txt").read_text()
    assert new_suite(tmp_path, seconds=0).run(["-c", "pass"], limit=1)["problem"] == "not started: no time left"


def test_the_suite_reports_how_a_command_failed(tmp_path: Path) -> None:
    finished = new_suite(tmp_path).run(["-c", "import sys; sys.exit('no such thing')"], limit=30)
    assert (finished["code"], finished["problem"]) == (1, "exit 1\nno such thing")


def test_the_suite_is_for_a_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = CliRunner().invoke(gpu_suite.main, [])
    assert outcome.exit_code == 2
    assert "--device=cpu --quick" in outcome.output


class Detector(torch.nn.Module):
    """Features (B, 2): mean and brightest pixel; logits (B, 2), the same again."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.flatten(1).float()
        features = torch.stack([pixels.mean(dim=1), pixels.amax(dim=1)], dim=1)
        return features, features.clone()


def export_detector(path: Path) -> Path:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    program = torch.export.export(Detector(), (images,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},))
    torch.export.save(program, path)
    return path


STEP = {"benchmark": "train_step", "mode": "bf16", "sec_per_kimg": 1.0}
MACHINE = {"device": "a GPU", "torch": "2", "date": "today", "commit": "this"}


def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> list[tuple[str, float]]:
    """The commands that the suite starts on a machine with a GPU, and their limits."""
    commands: list[tuple[str, float]] = []

    def run(suite: gpu_suite.Suite, command: list[str], limit: float) -> dict[str, Any]:
        commands.append((shlex.join(command), limit))
        if command[0] == "dataset_tool.py":
            dataset_tool.main([*command[1:], "--max-images=1", "--workers=1"], standalone_mode=False)
        return {"lines": [json.dumps(STEP), '{"cut', "result:        built"], "code": 0}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "describe_machine", lambda *_: MACHINE)
    monkeypatch.setattr(gpu_suite.Suite, "run", run)
    outcome = CliRunner().invoke(gpu_suite.main, [f"--outdir={tmp_path}", *options], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return commands


def understood(command: str) -> dict[str, Any]:
    """The parameters that one of this project's scripts reads from a command line."""
    script, *options = shlex.split(command)
    params: dict[str, Any] = importlib.import_module(Path(script).stem).main.make_context(script, options).params
    return params


@pytest.mark.parametrize("options", [(), ("--preset=cifar",), ("--preset=stylegan2",)])
def test_scripts_understand_how_the_suite_starts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...]
) -> None:
    commands = [command for command, _ in started(monkeypatch, tmp_path, *options)]
    commands = [command for command in commands if not command.startswith(("-m", "dataset_tool.py"))]
    assert {command.partition(" ")[0] for command in commands} >= {"train.py", "benchmarks/train_step.py"}
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))  # folders that are gone
    for command in commands:
        params = understood(command)
        if command.startswith("benchmarks/train_step"):
            assert set("+".join(params["modes"]).split("+")) <= train_step.CHANGES.keys()
            config = PRESETS[params["preset"]]
            assert params["resolution"] or config.generator.img_size, command  # which raises where it is open


def test_the_step_of_a_preset_is_measured_on_images_like_those_to_train_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shapes_zip: Path
) -> None:
    def side_of_step(*options: str) -> int:
        _, _, (step, _), (training, _) = started(monkeypatch, tmp_path, *options)
        assert "--cfg=" in training
        return int(understood(step)["resolution"])

    assert side_of_step("--preset=stylegan2") == 32
    assert side_of_step("--preset=celeba64-l") == 64
    assert side_of_step("--preset=stylegan2", f"--data={shapes_zip}") == 16


def test_the_suite_builds_the_kernels_before_anything_needs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second, _, third, *_ = started(monkeypatch, tmp_path)
    assert first == ("-m torch_utils.custom_ops", 200)
    assert second[0].startswith("-m pytest -m 'gpu and not slow' -v")
    assert third[0].startswith("benchmarks/train_step.py --preset=cifar --batch=64 --modes=plain,bf16,")
    assert third[1] == 120
    assert "Kernels: built." in (tmp_path / "summary.md").read_text()
    assert started(monkeypatch, tmp_path, "--preset=tiny")[0] == first


def test_the_suite_spares_the_training_its_time_but_for_the_step_that_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = [limit for command, limit in started(monkeypatch, tmp_path, "--minutes=3") if "benchmarks/" in command]
    assert limits[0] == 120
    assert max(limits[1:]) < gpu_suite.SHORTEST  # it wants 190 s


def test_the_suite_runs_chosen_benchmarks_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = started(monkeypatch, tmp_path, "--only=networks,compiled")
    assert min(limit for _, limit in commands[1:]) > 500  # what is left of nine minutes
    assert [command.split()[:2] for command, _ in commands] == [
        ["-m", "torch_utils.custom_ops"],
        ["benchmarks/networks.py", "--batch=64"],
        ["benchmarks/train_step.py", "--preset=cifar"],
        ["benchmarks/operators.py", "--repeats=20"],
    ]
    outcome = CliRunner().invoke(gpu_suite.main, ["--device=cpu", "--only=nothing"])
    assert outcome.exit_code == 2
    assert "no benchmark has that in its name" in outcome.output


def test_the_suite_measures_something_for_each_table_first() -> None:
    scripts = [command[0] for command in gpu_suite.FULL.benchmarks.values()]
    assert {f"{name}.py" for name in gpu_suite.COLUMNS} == set(scripts[: len(gpu_suite.COLUMNS)])


def test_the_suite_says_how_to_run_what_was_not_started() -> None:
    for name in gpu_suite.FULL.benchmarks:
        assert list(gpu_suite.only_benchmarks(gpu_suite.FULL, [name]).benchmarks) == [name]
    late = {"rows": [], "problem": gpu_suite.NOT_STARTED}
    runs = {"networks": late, "generation": {"rows": [], "problem": "exit 1"}, "operators-compiled": late}
    text = gpu_suite.summary({"machine": MACHINE, "benchmarks": {"runs": runs}, "training": late})
    assert "Benchmarks not started: `--only=networks,operators-compiled`\n" in text
    assert "Parts not started: training.\n" in text
    assert text.count("Problem in") == text.count("Problem in generation:\n\n    exit 1\n") == 1


def test_the_suite_keeps_the_results_of_a_part_that_fails_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: list[dict[str, Any]] = []

    def fail_at_the_second(suite: gpu_suite.Suite, name: str) -> float:
        if name == "networks":
            saved.append(json.loads((tmp_path / "results.json").read_text()))
            raise OSError("no more")
        return 1

    monkeypatch.setattr(gpu_suite, "benchmark_limit", fail_at_the_second)
    started(monkeypatch, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert "no more" in found["benchmarks"].pop("problem")
    assert found["benchmarks"] == saved[0]["benchmarks"] == {"runs": {"training-step-64": {"code": 0, "rows": [STEP]}}}


PYTEST_OUTPUT = """\
tests/test_ops.py::test_bias_act[a b PASSED] FAILED
tests/test_ops.py::test_upfirdn2d PASSED
tests/test_ops.py::test_upfirdn2d ERROR
tests/test_equality.py::test_graphs SKIPPED (needs a CUDA device, and
tests/test_equality.py::test_that_hangs """


def test_the_suite_counts_the_tests_before_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = PYTEST_OUTPUT.splitlines()
    monkeypatch.setattr(gpu_suite.Suite, "run", lambda *_: {"lines": lines, "code": None})
    found = gpu_suite.run_tests(new_suite(tmp_path))
    assert found["counts"] == {"failed": 1, "passed": 1, "error": 1, "skipped": 1}
    assert [line.rpartition(" ")[2] for line in found["failures"]] == ["FAILED", "ERROR"]
    lines += ["ERROR tests/test_video.py", "FAILED tests/test_ops.py::test_bias_act - no"]
    assert gpu_suite.run_tests(new_suite(tmp_path))["failures"] == lines[-2:]


def test_the_suite_runs_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_suite.describe_machine("cpu", None)["commit"] == "unknown"
    assert gpu_suite.describe_machine("cpu", "abc")["commit"] == "abc"


def test_the_suite_measures_the_last_snapshot_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "00000-run"
    folder.mkdir(parents=True)
    for kimg in (0, 1, 2):
        (folder / f"network-snapshot-{kimg:06d}.pkl").touch()
    networks: list[str] = []

    def run(suite: gpu_suite.Suite, command: list[str], limit: float) -> dict[str, Any]:
        networks.append(Path(command[1].partition("=")[2]).name)
        lines = [json.dumps({"kimg": kimg, "results": {"fid": kimg + 0.12345}}) for kimg in found[len(networks)]]
        return {"lines": [*lines, '{"kimg'], "code": 0}

    found = {1: [2], 2: [0, 1]}  # the second time is stopped before the last
    monkeypatch.setattr(gpu_suite.Suite, "run", run)
    suite = new_suite(tmp_path)
    suite.detector, suite.results = tmp_path / "detector.pt2", {"training": {"curve": [{"kimg": 0, "seconds": 7}]}}
    assert gpu_suite.measure_snapshots(suite)["curve"] == [
        {"kimg": 0, "seconds": 7, "fid": 0.123},
        {"kimg": 1, "seconds": None, "fid": 1.123},
        {"kimg": 2, "seconds": None, "fid": 2.123},
    ]
    assert networks == ["network-snapshot-000002.pkl", "00000-run"]


@pytest.mark.slow
def test_the_suite_on_a_cpu(tmp_path: Path) -> None:
    detector = export_detector(tmp_path / "detector.pt2")
    outdir = tmp_path / "out"
    options = ["--device=cpu", "--quick", "--train-seconds=2", f"--outdir={outdir}", f"--detector={detector}"]
    outcome = CliRunner().invoke(gpu_suite.main, options, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert {path.name for path in outdir.iterdir()} == {
        "results.json",
        "summary.md",
        "log.txt",
        "grid.png",
        "stats.jsonl",
        "metric-swd32.jsonl",
    }
    found = json.loads((outdir / "results.json").read_text())
    assert [name for name, run in found["benchmarks"]["runs"].items() if "problem" in run or not run["rows"]] == []
    assert found["tests"]["code"] == 0
    assert torch.cuda.is_available() or found["tests"]["counts"].keys() == {"skipped"}
    assert "problem" not in found["training"]
    assert len(found["training"]["curve"]) > 1
    assert "problem" not in found["snapshots"]
    assert found["snapshots"]["curve"][-1]["kimg"] == found["training"]["curve"][-1]["kimg"]
    assert found["snapshots"]["curve"][-1]["fid64_full_detector"] > 0
    summary = (outdir / "summary.md").read_text()
    for heading in ("train_step", "networks", "generation", "attention", "operators", "training", "snapshots"):
        assert f"### {heading}\n\n|" in summary
