"""benchmarks/gpu_suite.py: order of the stages, time limits, and results kept after failures."""

from __future__ import annotations

import importlib
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_suite
import micro
import train_step
from gpu_suite import Options, Suite, SuiteStage

from dnnlib.config import UserError
from training.config import PRESETS

MACHINE = {"device": "a GPU", "torch": "2", "date": "today", "commit": "this"}
PRINTS = SuiteStage(command=["-c", 'print(\'{"benchmark": "networks", "network": "one"}\')'], limit=30)
FAILS = SuiteStage(command=["-c", "import sys; print('why', file=sys.stderr); sys.exit(4)"], limit=30)


def options(tmp_path: Path, **changes: Any) -> Options:
    return replace(
        Options(
            device="cuda",
            quick=False,
            data=tmp_path / "images.zip",
            detector=tmp_path / "detector.pt2",
            preset=None,
            train_seconds=100,
            outdir=tmp_path,
            workdir=tmp_path,
        ),
        **changes,
    )


def run_suite(tmp_path: Path, seconds: float = 60, **stages: SuiteStage) -> dict[str, Any]:
    """Run these stages; return the results by stage."""
    suite = Suite(
        stages=stages,
        options=options(tmp_path),
        deadline=time.monotonic() + seconds,
        rerun_command=lambda late: f"again --only={','.join(late)}",
        results={"machine": MACHINE},
    )
    suite.run()
    found: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert found == suite.results["stages"]
    return found


def test_the_most_valuable_stages_come_first(tmp_path: Path) -> None:
    names = [*gpu_suite.build_stages(options(tmp_path))]
    assert names[:16] == [
        *("machine", "build", "kernels", "large", "large-graphs", "profile", "profile-graphs", "micro", "readme"),
        *("large-compiled", "equality", "large-baselines", "data", "train", "tests", "distance"),
    ]
    assert len(names) == len(set(names)) > 20
    without = gpu_suite.build_stages(options(tmp_path, detector=None))
    assert {*names} - {*without} == {"distance", "distances"}


def test_a_cpu_run_starts_each_script_once(tmp_path: Path) -> None:
    stages = gpu_suite.build_stages(options(tmp_path, device="cpu", quick=True))
    commands = [tuple(stage.command) for stage in stages.values()]
    assert len(commands) == len(set(commands))
    scripts = {stage.command[0] for stage in gpu_suite.build_stages(options(tmp_path)).values()}
    assert {command[0] for command in commands} == scripts
    assert not [command for command in commands if "graphs" in " ".join(command) or "compile" in " ".join(command)]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("preset", [None, "stylegan2"])
def test_scripts_accept_the_options_of_the_suite(
    tmp_path: Path, quick: bool, preset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))  # missing files
    device = "cpu" if quick else "cuda"
    for name, stage in gpu_suite.build_stages(options(tmp_path, quick=quick, preset=preset, device=device)).items():
        script, *arguments = stage.command
        if script == "-m":
            continue
        main = importlib.import_module(Path(script).stem).main
        params = main.make_context(script, arguments).params
        if script == "benchmarks/train_step.py":
            assert set("+".join(params["modes"]).split("+")) <= train_step.CHANGES.keys(), name
            assert params["resolution"] or PRESETS[params["preset"]].generator.img_size, name
        if script == "benchmarks/micro.py":
            assert {*params["parts"]} <= micro.PARTS.keys()


def test_each_gpu_test_runs_once(tmp_path: Path) -> None:
    stages = gpu_suite.build_stages(options(tmp_path))
    chosen = [word for name in ("kernels", "equality") for word in stages[name].command if word.startswith("tests/")]
    assert len(chosen) == len({*chosen}) > 5
    assert all((gpu_suite.ROOT / file).is_file() for file in chosen)
    ignored = [word.partition("=")[2] for word in stages["tests"].command if word.startswith("--ignore=")]
    assert sorted(ignored) == sorted(chosen)


def test_the_dataset_has_the_image_size_of_the_preset(tmp_path: Path) -> None:
    def source(**changes: Any) -> list[str]:
        return gpu_suite.make_data(options(tmp_path, **changes))[1:-1]

    assert source() == [f"--source={tmp_path / 'images.zip'}"]
    assert source(data=None) == ["--source=shapes", "--height=32", "--width=32"]
    assert source(data=None, preset="celeba64-l") == ["--source=shapes", "--height=64", "--width=64"]


def test_a_failed_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    found = run_suite(tmp_path, first=FAILS, second=PRINTS, third=replace(PRINTS, needs=("first",)))
    assert found["first"]["problem"] == "exit 4\nwhy"
    assert found["second"]["rows"] == [{"benchmark": "networks", "network": "one"}]
    assert found["third"]["problem"] == "needs first"
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("Measured on a GPU, torch 2, today, commit this.\n")
    assert "| first | exit 4 |" in summary
    assert "### networks\n\n| network |" in summary
    assert "Problem in first:\n\n    exit 4\n    why\n" in summary
    assert "Not started" not in summary
    assert "why\n[exit 4 after " in (tmp_path / "log.txt").read_text()


def test_results_are_saved_after_each_stage(tmp_path: Path) -> None:
    reads = f"import shutil; shutil.copy({str(tmp_path / 'results.json')!r}, {str(tmp_path / 'then.json')!r})"
    run_suite(tmp_path, first=PRINTS, second=SuiteStage(command=["-c", reads], limit=30))
    then = json.loads((tmp_path / "then.json").read_text())["stages"]
    assert then["first"]["rows"]
    assert then["second"] == {"outcome": "not started"}


def test_skipped_stages_are_listed_with_their_command(tmp_path: Path) -> None:
    found = run_suite(tmp_path, seconds=gpu_suite.SHORTEST + gpu_suite.GRACE - 1, first=PRINTS, second=FAILS)
    assert [stage["outcome"] for stage in found.values()] == ["not started"] * 2
    assert (
        "Not started; to run these stages:\n\n    again --only=first,second\n" in (tmp_path / "summary.md").read_text()
    )


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: print('terminated', flush=True))
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
while True:
    signal.pause()
"""


def test_a_stage_over_its_limit_is_terminated_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE", 3)
    began = time.monotonic()
    found = run_suite(tmp_path, endless=SuiteStage(command=["-c", STUBBORN], limit=2))
    assert time.monotonic() - began < 20
    assert found["endless"]["outcome"] == "stopped at its limit"
    child, signalled = (tmp_path / "stdout").read_text().split()
    assert signalled == "terminated"
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], check=False, capture_output=True, text=True).stdout
    assert state[:1] in ("", "Z")


def test_a_training_stopped_by_the_limit_counts_as_success(tmp_path: Path) -> None:
    ends = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); time.sleep(60)"
    stage = gpu_suite.train(options(tmp_path))
    assert stage.limit == 100
    found = run_suite(tmp_path, train=replace(stage, command=["-c", ends], limit=2, needs=()))
    assert "problem" not in found["train"]


PYTEST_OUTPUT = """\
4 workers [5 items]
[gw0] [ 20%] PASSED tests/test_ops.py::test_bias_act[a b FAILED]
[gw1] [ 40%] FAILED tests/test_ops.py::test_upfirdn2d
[gw2] [ 60%] SKIPPED tests/test_equality.py::test_graphs
[gw3] [100%] ERROR tests/test_video.py::test_codec
tests/test_equality.py::test_that_hangs
ERROR tests/test_play.py - ModuleNotFoundError
{"benchmark": "truncated
"""


def test_tests_are_counted_up_to_an_interruption() -> None:
    found = gpu_suite.read_output(PYTEST_OUTPUT)
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert found["failed"] == [
        "tests/test_ops.py::test_upfirdn2d",
        "tests/test_video.py::test_codec",
        "ERROR tests/test_play.py - ModuleNotFoundError",
    ]
    assert gpu_suite.read_output("torch: 2\nresult:        built\n") == {"kernels": "built"}


def test_selected_stages_include_their_dependencies(tmp_path: Path) -> None:
    stages = gpu_suite.build_stages(options(tmp_path))
    assert [*gpu_suite.choose(stages, ["networks", "distance"], [])] == [
        *("build", "data", "train", "distance", "networks")
    ]
    assert [*gpu_suite.choose(stages, None, ["build"])] == [name for name in stages if name != "build"]
    with pytest.raises(UserError, match="--only=network: no such stage; choose from machine, build"):
        gpu_suite.choose(stages, ["network"], [])
    with pytest.raises(UserError, match="--skip=all"):
        gpu_suite.choose(stages, None, ["all"])


def test_the_curve_and_newest_image_of_a_training_are_kept(tmp_path: Path) -> None:
    run_dir, outdir = tmp_path / "runs" / "00000-data-cifar", tmp_path / "out"
    run_dir.mkdir(parents=True)
    outdir.mkdir()
    ticks = [{"Progress/kimg": kimg, "Timing/total_sec": 2.04 * kimg} for kimg in (0, 10)]
    values = [{"kimg": kimg, "results": {"swd1k": 100.12345 - kimg}} for kimg in (0, 10)]
    for name, lines in (("stats", ticks), ("metric-swd1k", values)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kimg in ("000000", "000010"):
        (run_dir / f"network-snapshot-{kimg}.pkl").write_text(kimg)
        (run_dir / f"fakes{kimg}.png").write_text(kimg)
        time.sleep(0.01)
    suite = Suite(
        stages={}, options=options(tmp_path, outdir=outdir), deadline=0, rerun_command=lambda late: "", results={}
    )
    assert suite.keep_run() == {
        "curve": [{"kimg": 0, "seconds": 0.0, "swd1k": 100.123}, {"kimg": 10, "seconds": 20.4, "swd1k": 90.123}]
    }
    assert {path.name for path in outdir.iterdir()} == {"stats.jsonl", "metric-swd1k.jsonl", "grid.png"}
    assert (outdir / "grid.png").read_text() == (tmp_path / "last.pkl").read_text() == "000010"
    assert (tmp_path / "run").resolve() == run_dir


def test_the_suite_requires_a_gpu_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = CliRunner().invoke(gpu_suite.main, [f"--outdir={tmp_path / 'out'}"])
    assert outcome.exit_code == 2
    assert "PyTorch finds no GPU; test the suite with --device=cpu --quick" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_the_printed_command_runs_the_remaining_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--device=cpu", "--quick", "--minutes=0.5", "--outdir", str(tmp_path), "--only", "attention,networks"]
    monkeypatch.setattr(gpu_suite, "SHORTEST", 60)
    outcome = CliRunner().invoke(gpu_suite.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    assert outcome.output.endswith((tmp_path / "summary.md").read_text() + "\n")
    *_, command = outcome.output.strip().splitlines()
    script, *words = shlex.split(command)[1:]
    params = gpu_suite.main.make_context(script, words).params
    assert script == "benchmarks/gpu_suite.py"
    assert (params["only"], params["outdir"]) == (("networks", "attention"), tmp_path / "rest")
    assert (params["device"], params["quick"], params["minutes"], params["data"]) == ("cpu", True, 0.5, None)


def test_the_suite_runs_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_suite.describe_machine("cpu", None)["commit"] == "unknown"
    assert gpu_suite.describe_machine("cpu", "abc")["commit"] == "abc"


def test_stopped_tests_print_a_summary_and_trainings_a_state(tmp_path: Path) -> None:
    stages = gpu_suite.build_stages(options(tmp_path))
    assert {name for name, stage in stages.items() if stage.stop is signal.SIGINT} == {"kernels", "equality", "tests"}
    assert stages["train"].expected == (0, 3)


class Detector(torch.nn.Module):
    """Detector that accepts images as small as 2x2."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean(dim=(2, 3))
        return torch.cat([x, x.square()], dim=1), x


def export_detector(path: Path) -> Path:
    program = torch.export.export(
        Detector(), (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, path)
    return path


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu(tmp_path: Path) -> None:
    detector = export_detector(tmp_path / "detector.pt2")
    outdir = tmp_path / "out"
    arguments = ["--device=cpu", "--quick", "--minutes=15", f"--outdir={outdir}", f"--detector={detector}"]
    outcome = CliRunner().invoke(gpu_suite.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert {path.name for path in outdir.iterdir()} == {
        *("summary.md", "results.json", "log.txt", "profile.txt", "grid.png", "stats.jsonl", "metric-swd32.jsonl")
    }
    found = json.loads((outdir / "results.json").read_text())["stages"]
    assert {name: stage["problem"] for name, stage in found.items() if "problem" in stage} == {}
    assert len(found["train"]["curve"]) > 1
    assert found["distance"]["rows"][0]["results"]["fid64_full_detector"] > 0
    summary = (outdir / "summary.md").read_text()
    for heading in (*gpu_suite.COLUMNS, *(f"micro: {part}" for part in micro.PARTS), "training", "snapshots"):
        assert f"### {heading}\n\n|" in summary
