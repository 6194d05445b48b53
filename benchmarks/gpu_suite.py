"""Run all GPU measurements, the most important first, within a few minutes.

    python benchmarks/gpu_suite.py --data=cifar10-images.zip --detector=features.pt2 --outdir=out/gpu_suite

Builds the kernels, runs the tests marked `gpu`, times and profiles the training step of cifar-large and of the README's
example, compares alternatives, and trains on the data. Every stage is a separate process with a time limit. Its results
are saved when it ends, and a failing stage does not stop the others. The summary ends with the stages that were not
started for lack of time, and the command that runs them.

--outdir contains summary.md (tables for docs/benchmarks.md), results.json, log.txt (all output), profile.txt, and from
the training run grid.png, stats.jsonl and the metric's lines. `--device=cpu --quick` tests the suite in two minutes
without a GPU; the numbers are then meaningless.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT

from dnnlib.cli import NameList, Script, option
from dnnlib.config import ConfigError, UserError
from dnnlib.screen import without_secrets
from dnnlib.util import read_json_lines, source_commit
from training.config import PRESETS

GRACE = 10.0  # seconds between the signal at the time limit and SIGKILL
SHORTEST = 8.0  # no stage is started with fewer seconds left
METRIC = "swd1k"  # metric of the training run
NOT_STARTED = "not started"

KERNEL_TESTS = ("test_kernels", "test_ops", "test_encoder_ops", "test_conv2d", "test_grid_sample", "test_devices")
TRAINING_TESTS = ("test_training", "test_equality")
README_MODEL = ["--preset=cifar", "--g_dict=256,64,16", "--num_layers=1,2,2"]
README_TRAINING = ["--cfg=cifar", "--g_dict=256,64,16", "--num_layers=1,2,2"]


@dataclass(frozen=True, kw_only=True)
class SuiteStage:
    """A Python command with a time limit in seconds. At the limit it receives the signal `stop`, then SIGKILL.

    `needs`: stages that must have succeeded before. `expected`: exit codes of success.
    """

    command: list[str]
    limit: float
    needs: tuple[str, ...] = ()
    stop: signal.Signals = signal.SIGTERM
    expected: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command, and the folders in which stages exchange files."""

    device: str
    quick: bool
    data: Path | None
    detector: Path | None
    preset: str | None
    train_seconds: float
    outdir: Path
    workdir: Path


def build_stages(options: Options) -> dict[str, SuiteStage]:
    """Return the stages in the order of execution: the most information per second first."""
    stages = {
        "machine": SuiteStage(command=benchmark("micro", options, "--parts=machine", *quick(options)), limit=40),
        "build": SuiteStage(command=["-m", "torch_utils.custom_ops"], limit=90),
        "kernels": run_tests(options, 70, *KERNEL_TESTS),
        "large": step(options, 70, "large", "bf16"),
        "large-graphs": step(options, 100, "large", "bf16+graphs,bf16+graphs+operators"),
        "profile": profile_step(options, "bf16"),
        "profile-graphs": profile_step(options, "bf16+graphs"),
        "micro": SuiteStage(
            command=benchmark("micro", options, "--parts=attention,warp,convolution", *quick(options)), limit=60
        ),
        "readme": step(options, 70, "readme-32", "bf16,bf16+graphs"),
        "large-compiled": step(options, 120, "large", "bf16+compile+graphs"),
        "equality": run_tests(options, 80, *TRAINING_TESTS),
        "large-baselines": step(options, 100, "large", "fp32+nchw+loader,plain"),
        "data": SuiteStage(command=make_data(options), limit=40),
        "train": train(options),
        "tests": run_tests(options, 120),
        "distance": measure_snapshots(options, "last.pkl"),
        # Stages for a second run:
        "distances": measure_snapshots(options, "run"),
        "large-attention": step(options, 100, "large", "bf16+graphs+cudnn,bf16+graphs+flash,bf16+graphs+efficient"),
        "readme-64": step(options, 90, "readme-64", "fp32,tf32,fp16+graphs,bf16,bf16+graphs,bf16+compile+graphs"),
        "stylegan2": step(options, 60, "stylegan2", "bf16,bf16+graphs"),
        "transgan": step(options, 90, "transgan", "bf16,bf16+graphs"),
        "styleformer-c": step(options, 60, "styleformer-c", "bf16,bf16+graphs"),
        "r3gan": step(options, 90, "r3gan", "bf16,bf16+graphs"),
        "penalties": SuiteStage(command=benchmark("penalties", options, *PENALTIES[options.quick]), limit=60),
        "networks": SuiteStage(command=benchmark("networks", options, *NETWORKS[options.quick]), limit=90),
        "generation": SuiteStage(command=benchmark("generation", options, *GENERATION[options.quick]), limit=60),
        "attention": SuiteStage(command=benchmark("self_attention", options, *ATTENTION[options.quick]), limit=60),
        "grid-attention": SuiteStage(
            command=benchmark("grid_attention", options, *GRID_ATTENTION[options.quick]), limit=60
        ),
        "operators": SuiteStage(command=benchmark("operators", options, *OPERATORS[options.quick]), limit=90),
    }
    skipped = [] if options.device != "cpu" else ["build", "profile-graphs", "large-graphs", "large-compiled"]
    skipped += [] if options.detector else ["distance", "distances"]
    commands = [stage.command for stage in stages.values()]
    skipped += [name for i, name in enumerate(stages) if commands[i] in commands[:i]]  # duplicates, with --quick
    return {name: stage for name, stage in stages.items() if name not in skipped}


# Options of the other benchmark scripts, without and with --quick.
NETWORKS = (["--batch=64", "--seconds=0.5"], ["--batch=1", "--seconds=0.01", "--only=layers 1,2,2"])
GENERATION = (
    ["--seconds=0.5", "--batch=1,16,256", "--modes=fp32,fp32+graphs,bf16+graphs"],
    ["--seconds=0.01", "--batch=1,2"],
)
ATTENTION = (["--tokens=1024,4096,16384", "--repeats=3", "--batch=4"], ["--tokens=64", "--repeats=1", "--forms=fused"])
GRID_ATTENTION = (
    ["--resolutions=32,64,128", "--repeats=3", "--batch=4"],
    ["--resolutions=16", "--repeats=1", "--forms=grid"],
)
OPERATORS = (
    ["--repeats=20", "--dtype=float32,bfloat16", "--impl=cuda,reference,compiled"],
    ["--repeats=1", "--only=RGB pyramid up, 16 px"],
)
PENALTIES = (
    ["--batch=64", "--rounds=20", "--precisions=bf16", "--draws=4", "--sigmas=0.01,0.02"],
    ["--batch=4", "--rounds=1", "--precisions=none", "--discriminators=styleformer"],
)
STEPS = {
    "large": ["--preset=cifar-large", "--batch=64"],
    "readme-32": [*README_MODEL, "--batch=32"],
    "readme-64": [*README_MODEL, "--batch=64"],
    "stylegan2": ["--preset=cifar-stylegan2", "--resolution=32", "--batch=64"],
    "transgan": ["--preset=transgan-cifar", "--batch=64"],
    "r3gan": ["--preset=r3gan-cifar", "--batch=64"],
    "styleformer-c": ["--preset=styleformer-c256", "--resolution=256", "--batch=16"],
}
TINY = ["--preset=tiny", "--batch=4"]


def quick(options: Options) -> list[str]:
    return ["--quick"] if options.quick else []


def benchmark(script: str, options: Options, *arguments: str) -> list[str]:
    return [f"benchmarks/{script}.py", f"--device={options.device}", *arguments]


def step(options: Options, limit: float, model: str, modes: str) -> SuiteStage:
    """Time a training step. On a CPU, graphs are not available and compiling takes too long, so both are removed."""
    if options.device == "cpu":
        words = [[word for word in mode.split("+") if word not in ("graphs", "compile")] for mode in modes.split(",")]
        modes = ",".join(dict.fromkeys("+".join(mode) for mode in words))
    if options.quick:
        modes = modes.split(",")[-1]
        return SuiteStage(command=benchmark("train_step", options, *TINY, f"--modes={modes}", *SHORT), limit=limit)
    return SuiteStage(command=benchmark("train_step", options, *STEPS[model], f"--modes={modes}", *LONG), limit=limit)


SHORT, LONG = ["--steps=1", "--warmup=1"], ["--steps=10", "--warmup=4"]


def profile_step(options: Options, mode: str) -> SuiteStage:
    model = [*TINY, "--calls=1"] if options.quick else STEPS["large"]
    mode = mode.replace("bf16", "fp32") if options.device == "cpu" else mode  # bf16 is slow on most CPUs
    tables = f"--tables={options.outdir / 'profile.txt'}"
    return SuiteStage(command=benchmark("profile_step", options, *model, f"--modes={mode}", tables), limit=60)


def run_tests(options: Options, limit: float, *modules: str) -> SuiteStage:
    """Run the GPU tests of some modules; by default, of all modules that no other stage runs."""
    processes = f"--numprocesses={2 if options.quick else 8}"
    command = ["-m", "pytest", "-m", "gpu and not slow", processes, "-v", "-rfE", "-p", "no:cacheprovider"]
    files = [f"tests/{module}.py" for module in modules]
    if not modules:
        files = [f"--ignore=tests/{module}.py" for module in (*KERNEL_TESTS, *TRAINING_TESTS)]
    # On SIGINT, pytest prints its summary.
    return SuiteStage(command=[*command, *files, "--continue-on-collection-errors"], limit=limit, stop=signal.SIGINT)


def make_data(options: Options) -> list[str]:
    """Return the command that builds the training set from --data, or from synthetic scenes of the preset's size."""
    source = [f"--source={options.data}"] if options.data else scenes(options.preset or "cifar")
    if options.quick:
        source += ["--max-images=256"]
    return ["dataset_tool.py", *source, f"--dest={options.workdir / 'data.zip'}"]


def scenes(preset: str) -> list[str]:
    """Return dataset_tool.py options for scenes of the preset's size, or of 32 pixels if the preset has none."""
    try:
        height, width = PRESETS[preset].generator.img_size
    except ConfigError:
        height, width = 32, 32
    return ["--source=shapes", f"--height={height}", f"--width={width}"]


def train(options: Options) -> SuiteStage:
    """Train until the time limit; on the signal, train.py saves and exits with code 3."""
    model = [f"--cfg={options.preset}"] if options.preset else README_TRAINING
    length = ["--batch=64", "--tick=10", "--snap=1", f"--metrics={METRIC}"]
    if options.quick:
        model, length = ["--cfg=tiny"], ["--batch=8", "--tick=0.032", "--snap=1", "--metrics=swd32", "--kimg=0.064"]
    folders = [f"--outdir={options.workdir / 'runs'}", f"--data={options.workdir / 'data.zip'}"]
    command = ["train.py", *folders, *model, *length, f"--device={options.device}"]
    return SuiteStage(command=command, limit=options.train_seconds, needs=("data",), expected=(0, 3))


def measure_snapshots(options: Options, network: str) -> SuiteStage:
    """Compute Frechet distances on the detector's features for one snapshot, or for all snapshots of a run."""
    metric = "fid64_full" if options.quick else "fid10k_full"
    command = ["calc_metrics.py", f"--network={options.workdir / network}", f"--metrics={metric}"]
    command += [f"--detector={options.detector}", f"--device={options.device}", "--no-cache", "--detector-batch=256"]
    return SuiteStage(command=command, limit=90, needs=("train",))


@dataclass(kw_only=True)
class Suite:
    """Stages to run until a deadline, and their results."""

    stages: dict[str, SuiteStage]
    options: Options
    deadline: float
    rerun_command: Callable[[Sequence[str]], str]  # returns the command for the stages that were not started
    results: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run the stages in order."""
        outcomes = self.results["stages"] = {name: {"outcome": NOT_STARTED} for name in self.stages}
        self.save()
        for name, stage in self.stages.items():
            left = self.deadline - time.monotonic()
            done = [name for name, found in outcomes.items() if "seconds" in found and "problem" not in found]
            missing = [need for need in stage.needs if need not in done]
            if left < SHORTEST + GRACE:
                continue
            if missing:
                outcomes[name] = {"outcome": "skipped", "problem": f"needs {missing[0]}"}
            else:
                outcomes[name] = self.run_stage(stage, min(stage.limit, left - GRACE))
            self.save()
            self.report(name)

    def run_stage(self, stage: SuiteStage, limit: float) -> dict[str, Any]:
        """Run one command, log its output, and return its results."""
        shown = shlex.join(["python", *stage.command])
        output, errors = self.options.workdir / "stdout", self.options.workdir / "stderr"
        began = time.monotonic()
        with output.open("w") as stdout, errors.open("w") as stderr:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            process = subprocess.Popen([sys.executable, *stage.command], cwd=ROOT, start_new_session=True, **streams)
            is_late = not ends_within(process, limit, stage.stop)
        text, error_text = output.read_text(errors="replace"), errors.read_text(errors="replace")
        seconds, code = round(time.monotonic() - began, 1), process.returncode
        with (self.options.outdir / "log.txt").open("a") as log:
            log.write(f"\n$ {shown}\n{text}{error_text}[exit {code} after {seconds} s]\n")
        outcome = "stopped at its limit" if is_late else f"exit {code}"
        found = {"command": shown, "seconds": seconds, "outcome": outcome, **read_output(text)}
        if code not in stage.expected:
            found["problem"] = "\n".join([outcome, *error_text.strip().splitlines()[-5:]])
        if stage.command[0] == "train.py":
            found |= self.keep_run()
        return found

    def keep_run(self) -> dict[str, Any]:
        """Copy the newest image grid and the logs of a run, link the inputs of later stages, and return the curve."""
        run_dir = next(self.options.workdir.glob("runs/[0-9]*"), None)
        if run_dir is None:
            return {}
        (self.options.workdir / "run").symlink_to(run_dir)
        for path in sorted(run_dir.glob("network-snapshot-*.pkl"))[-1:]:
            (self.options.workdir / "last.pkl").symlink_to(path)
        logs = [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]
        for path in logs:
            if path.exists():
                shutil.copy(path, self.options.outdir)
        grids = sorted(run_dir.glob("fakes*.png"), key=lambda path: path.stat().st_mtime)
        if grids:
            shutil.copy(grids[-1], self.options.outdir / "grid.png")
        return {"curve": [*training_curve(run_dir)]}

    def save(self) -> None:
        """Write the results so far."""
        (self.options.outdir / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.options.outdir / "summary.md").write_text(summary(self.results, self.rerun_command))

    def report(self, name: str) -> None:
        """Print the outcome of a stage."""
        found = self.results["stages"][name]
        left = self.deadline - time.monotonic()
        click.echo(f"== {name}: {found['outcome']} after {found.get('seconds', 0):.0f} s, {left:.0f} s left")
        lines = [cell({key: row[key] for key in columns_of(row) if key in row}) for row in found.get("rows", [])]
        lines += [cell(found[key]) for key in ("tests", "failed", "kernels") if found.get(key)]
        for line in lines + found.get("problem", "").splitlines()[1:]:
            click.echo(f"   {line[:250]}")


def ends_within(process: subprocess.Popen[bytes], limit: float, stop: signal.Signals) -> bool:
    """Wait for a process; after `limit` seconds send `stop`, then kill the process and its children."""
    try:
        process.wait(limit)
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE - 2)
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


OUTCOME = re.compile(r"\[gw\d+\] \[ *\d+%\] (?P<outcome>PASSED|FAILED|ERROR|SKIPPED) (?P<test>\S+::.*?) *")


def read_output(text: str) -> dict[str, Any]:
    """Parse the output of a stage: lines of JSON, outcomes of tests, or the result of a build."""
    found: dict[str, Any] = {}
    lines = text.splitlines()
    for line in lines:
        with suppress(json.JSONDecodeError):  # the last line may be truncated
            if line.startswith("{"):
                found.setdefault("rows", []).append(json.loads(line))
    tests = [match for line in lines if (match := OUTCOME.fullmatch(line))]
    if tests:
        found["tests"] = Counter(match["outcome"].lower() for match in tests)
        found["failed"] = [match["test"] for match in tests if match["outcome"] in ("FAILED", "ERROR")]
        found["failed"] += [line for line in lines if line.startswith("ERROR ")]  # modules that cannot be imported
    if lines and lines[-1].startswith("result:"):
        found["kernels"] = lines[-1].partition(":")[2].strip()
    return found


def training_curve(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield kimg, seconds since the start of training (including metrics) and the metric, at every snapshot."""
    seconds = {line["Progress/kimg"]: line["Timing/total_sec"] for line in read_json_lines(run_dir / "stats.jsonl")}
    for path in run_dir.glob("metric-*.jsonl"):
        for line in read_json_lines(path):
            yield {"kimg": line["kimg"], "seconds": round(seconds.get(line["kimg"], 0), 1), **rounded(line["results"])}


def rounded(results: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in results.items()}


# Columns of the tables in summary.md, by benchmark.
COLUMNS = {
    "train_step": ["preset", "widths", "batch", "mode", "img_per_s", "step_ms", "ms", "model_flop_utilisation",
                   "graphs", "peak_mib"],
    "profile": ["mode", "phase", "graph", "kernels", "busy_ms", "span_ms"],
    "networks": ["network", "batch", "gflop_per_image", "forward_img_per_s", "forward_backward_img_per_s", "peak_mib"],
    "generation": ["mode", "batch", "img_per_s", "ms_per_batch", "peak_mib"],
    "self_attention": ["form", "derivatives", "tokens", "ms", "peak_mib", "problem"],
    "grid_attention": ["form", "derivatives", "resolution", "ms", "peak_mib", "problem"],
    "operators": ["case", "impl", "dtype", "channels_last", "forward", "backward"],
}  # fmt: skip

# Keys common to the rows of all benchmarks.
SHARED = {"benchmark", "part", "device", "torch", "threads", "cores", "load_at_start", "command"}


def summary(results: dict[str, Any], rerun_command: Callable[[Sequence[str]], str]) -> str:
    """Return the results as Markdown tables."""
    machine, stages = results["machine"], results["stages"]
    intro = f"Measured on {machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}."
    lines = [intro, "", "| stage | outcome | seconds | tests |", "| --- | --- | --- | --- |"]
    for name, found in stages.items():
        lines.append(f"| {name} | {found['outcome']} | {found.get('seconds', '')} | {cell(found.get('tests', ''))} |")
    lines += [f"\nKernels: {found['kernels']}." for found in stages.values() if "kernels" in found]
    failed = [test for found in stages.values() for test in found.get("failed", [])]
    lines += ["", *(f"- {test}" for test in failed[:40])] if failed else []
    rows = [row for found in stages.values() for row in found.get("rows", [])]
    for name in COLUMNS:
        lines += table(name, [row for row in rows if row.get("benchmark") == name])
    micro = [row for row in rows if row.get("benchmark") == "micro"]
    for part in dict.fromkeys(row["part"] for row in micro):
        lines += table(f"micro: {part}", [row for row in micro if row["part"] == part])
    lines += table("training", stages.get("train", {}).get("curve", []))
    snapshots = [{"kimg": row["kimg"], **rounded(row["results"])} for row in rows if "results" in row]
    lines += table("snapshots", snapshots)
    problems = {name: found["problem"] for name, found in stages.items() if "problem" in found}
    lines += [f"\nProblem in {name}:\n\n    {indent(problem)}" for name, problem in problems.items()]
    not_started = [name for name, found in stages.items() if found["outcome"] == NOT_STARTED]
    lines += ["", "Not started; to run these stages:", "", f"    {rerun_command(not_started)}"] if not_started else []
    return "\n".join(lines) + "\n"


def table(title: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return rows as a Markdown table, or nothing without rows."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in columns_of(row)))
    body = ["| " + " | ".join(cell(row.get(key, "")) for key in columns) + " |" for row in rows]
    return ["", f"### {title}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), *body]


def columns_of(row: dict[str, Any]) -> list[str]:
    """Return the keys of a row that become columns."""
    return COLUMNS.get(row.get("benchmark", ""), [key for key in row if key not in SHARED])


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def indent(text: str) -> str:
    return text.strip().replace("\n", "\n    ")


def describe_machine(device: str, commit: str | None) -> dict[str, Any]:
    """Return hardware, software versions, commit, date and command."""
    torch_device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "commit": commit or source_commit() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_secrets(shlex.join(["python", *sys.argv])),
    }


def choose(stages: dict[str, SuiteStage], only: Sequence[str] | None, skip: Sequence[str]) -> dict[str, SuiteStage]:
    """Return the named stages, the stages they need, and always the build. Raises UserError for unknown names."""
    for flag, names in (("--only", only or ()), ("--skip", skip)):
        for name in names:
            if name not in stages:
                raise UserError(f"{flag}={name}: no such stage; choose from {', '.join(stages)}")
    chosen = {*stages} if only is None else {*only, "build"}
    while missing := {need for name in chosen & stages.keys() for need in stages[name].needs} - chosen:
        chosen |= missing
    return {name: stage for name, stage in stages.items() if name in chosen and name not in skip}


def rerun(minutes: float, commit: str | None, options: Options, names: Sequence[str]) -> str:
    """Return the command that runs these stages with the same options and a subfolder of --outdir."""
    given = {"device": options.device, "minutes": minutes, "train-seconds": options.train_seconds}
    given |= {"data": options.data, "detector": options.detector, "preset": options.preset, "commit": commit}
    given |= {"outdir": options.outdir / "rest", "only": ",".join(names)}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None] + quick(options)
    return shlex.join(["python", "benchmarks/gpu_suite.py", *words])


EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path, resolve_path=True)


@click.command(cls=Script, help=__doc__)
@option("--data", type=EXISTING_FILE, help="Training images, any source of dataset_tool.py. [synthetic scenes]")
@option("--detector", type=EXISTING_FILE, help="Feature network for Frechet distances: .pt2 or TorchScript.")
@option("--outdir", type=click.Path(path_type=Path, resolve_path=True), default=Path("out/gpu_suite"),
        show_default=True, help="Folder for the results.")  # fmt: skip
@option("--device", default="cuda", show_default=True, help="cuda, cuda:N or cpu.")
@option("--minutes", type=click.FloatRange(min=0.5), default=7.5, show_default=True, help="Total time limit.")
@option("--train-seconds", type=click.FloatRange(min=1), default=100.0, show_default=True, help="Duration of training.")
@option("--preset", type=click.Choice(list(PRESETS)), help="Preset of the training run. [the README's example]")
@option("--only", type=NameList(), help="Run only these stages and the stages they need.")
@option("--skip", type=NameList(), default="none", help="Skip these stages.")
@option("--commit", help="Measured commit. [from git]")
@click.option("--quick", is_flag=True, help="Use tiny sizes, to test the suite.")
def main(
    minutes: float,
    only: tuple[str, ...] | None,
    skip: tuple[str, ...],
    commit: str | None,
    outdir: Path,
    device: str,
    **options: Any,
) -> None:
    deadline = time.monotonic() + minutes * 60
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device={device}: PyTorch finds no GPU; test the suite with --device=cpu --quick")
    outdir.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "profile.txt"):  # stages append to these files
        (outdir / name).unlink(missing_ok=True)

    with tempfile.TemporaryDirectory() as workdir:
        chosen = Options(device=device, outdir=outdir, workdir=Path(workdir), **options)
        suite = Suite(
            stages=choose(build_stages(chosen), only, skip),
            options=chosen,
            deadline=deadline,
            rerun_command=partial(rerun, minutes, commit, chosen),
            results={"machine": describe_machine(device, commit)},
        )
        suite.run()
    click.echo((outdir / "summary.md").read_text())


if __name__ == "__main__":
    main()
