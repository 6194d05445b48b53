"""All measurements that need a GPU, in one command of less than ten minutes.

    python benchmarks/gpu_suite.py --data=cifar10-images.zip --outdir=out/gpu_suite

Builds the kernels, runs the tests marked `gpu`, the benchmarks, and a short training with the README's options;
measures its snapshots. A part that fails or runs out of time is recorded and does not stop the others: the time is too
short for all benchmarks, and the summary has the --only that runs those that were left. Writes results.json, summary.md
(tables for docs/benchmarks.md) and log.txt (all output), and from the training grid.png, stats.jsonl and the metric's
lines. With --device=cpu --quick it shows in a minute that everything works; those figures mean nothing. With --preset
it trains that preset instead and measures nothing else: this is how families are compared.
"""

from __future__ import annotations

import contextlib
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
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT

from dnnlib.config import ConfigError
from dnnlib.util import read_json_lines, source_commit
from training.config import PRESETS
from training.dataset import DatasetConfig, ImageDataset

README_MODEL = ["--g_dict=256,64,16", "--num_layers=1,2,2"]
QUICK_MODEL = ["--g_dict=32,16,16", "--num_layers=1,1,1"]
TRAINING_MODE = "bf16"  # what train.py does unasked
NUM_SNAPSHOTS = 8
SHORTEST = 5.0  # seconds; with less left, nothing is started any more
EVALUATIONS = 1.5  # a training with its start and its evaluations, in units of its steps alone
FOR_SNAPSHOTS = 40.0  # seconds for the Frechet distances
NOT_STARTED = "not started: no time left"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything, and the seconds that each command may take."""

    preset: str
    model: list[str]
    batch: int
    benchmarks: dict[str, list[str]]  # by name, none part of another; the first has the step of the short training
    any_side: bool = False  # these are training steps of a preset, to be measured on images as large as the data's
    metric: str
    num_images: int | None  # of the training set; None takes all
    distance: str  # what calc_metrics.py computes of the snapshots
    build_limit: float = 200
    tests_limit: float = 200
    benchmark_limit: float = 60
    benchmark_limits: dict[str, float] = field(default_factory=dict)  # by name, where it is another
    data_limit: float = 60


def step(preset: str, batch: int, modes: str, *options: str) -> list[str]:
    return ["train_step.py", f"--preset={preset}", f"--batch={batch}", f"--modes={modes}", *options]


LONG = ["--steps=20", "--warmup=3"]
FULL = Sizes(
    preset="cifar",
    model=README_MODEL,
    batch=64,
    benchmarks={
        # First something for each table.
        "training-step-64": step("cifar", 64, "plain,bf16,bf16+graphs", *README_MODEL, "--steps=10", "--warmup=3"),
        "networks": ["networks.py", "--batch=64", "--seconds=0.5"],
        "generation": ["generation.py", "--seconds=0.5", "--batch=1,16,256", "--modes=fp32,fp32+graphs,bf16+graphs"],
        "token-attention": ["attention.py", "--tokens=1024,4096,16384", "--repeats=3", "--batch=4"],
        "grid-attention": ["grid_attention.py", "--resolutions=32,64,128", "--repeats=3", "--batch=4"],
        "operators-contiguous": [
            "operators.py",
            "--repeats=20",
            "--dtype=float32,bfloat16",
            "--impl=cuda,reference",
        ],
        "training-step-cifar-large-64": step("cifar-large", 64, "plain,bf16,bf16+graphs", *LONG),
        "training-step-stylegan2": step("cifar-stylegan2", 64, "plain,bf16+graphs", "--resolution=32", *LONG),
        "training-step-transgan": step("transgan-cifar", 64, "plain,bf16+graphs", *LONG),
        "training-step-styleformer-c": step("styleformer-c256", 16, "plain,bf16+graphs", "--resolution=256", *LONG),
        "training-step-32": step("cifar", 32, "plain,bf16,bf16+graphs", *README_MODEL, *LONG),
        "training-step-cifar-large-32": step("cifar-large", 32, "plain,bf16+graphs", *LONG),
        "operators-channels-last": [
            "operators.py",
            "--repeats=20",
            "--dtype=bfloat16",
            "--impl=cuda,reference",
            "--channels-last",
        ],
        "training-step-options": step("cifar", 64, "fp32,tf32,fp16+graphs,bf16+nchw", *README_MODEL, *LONG),
        "training-step-compiled": step("cifar", 64, "bf16+compile+graphs", *README_MODEL, *LONG),
        "operators-compiled": ["operators.py", "--repeats=20", "--dtype=bfloat16", "--impl=compiled"],
    },
    benchmark_limits={"training-step-64": 120, "training-step-compiled": 150, "operators-compiled": 150},
    metric="swd1k",
    num_images=None,
    distance="fid10k_full",
)
QUICK = Sizes(
    preset="tiny",
    model=QUICK_MODEL,
    batch=4,
    benchmarks={
        "training-step": step("tiny", 4, "bf16", *QUICK_MODEL, "--steps=1", "--warmup=1"),
        "networks": ["networks.py", "--batch=1", "--seconds=0.01"],
        "generation": ["generation.py", "--batch=1,2", "--seconds=0.01"],
        "operators": ["operators.py", "--repeats=1", "--only=RGB pyramid up, 16 px"],
        "token-attention": ["attention.py", "--tokens=64", "--repeats=1", "--forms=fused"],
        "grid-attention": ["grid_attention.py", "--resolutions=16", "--repeats=1", "--forms=grid"],
    },
    benchmark_limits={"networks": 240},
    metric="swd32",
    num_images=256,
    distance="fid64_full",
)


def only_training(sizes: Sizes, preset: str) -> Sizes:
    """The sizes for training a preset: its step, which says how far the time goes, is all that is measured before."""
    name, steps = f"training-step-{preset}", step(preset, sizes.batch, TRAINING_MODE, "--steps=10", "--warmup=3")
    limits = {name: 120.0}  # it may have much to count
    return replace(sizes, preset=preset, model=[], benchmarks={name: steps}, benchmark_limits=limits, any_side=True)


def only_benchmarks(sizes: Sizes, texts: Sequence[str]) -> Sizes:
    """The sizes with the benchmarks whose names contain one of `texts`, and no others."""
    chosen = {name: run for name, run in sizes.benchmarks.items() if any(text in name for text in texts)}
    if not chosen:
        names = "; ".join(sizes.benchmarks)
        raise click.UsageError(f"--only={','.join(texts)}: no benchmark has that in its name: {names}")
    return replace(sizes, benchmarks=chosen)


@dataclass(kw_only=True)
class Suite:
    """What the parts share: settings, the clock, the log, and the results so far."""

    sizes: Sizes
    parts: Sequence[str]
    device: str
    data: Path | None
    detector: Path | None
    train_seconds: float
    deadline: float
    outdir: Path
    workdir: Path
    results: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Return how many seconds are left."""
        return self.deadline - time.monotonic()

    def run(self, command: Sequence[str], limit: float) -> dict[str, Any]:
        """Run a Python script in the project's folder and log its output. Return seconds, exit code, output lines.

        After `limit` seconds it is killed with all processes that it started; its exit code is then None.
        """
        limit = min(limit, self.left())
        shown = shlex.join(["python", *command])
        if limit < SHORTEST:
            return {"command": shown, "seconds": 0.0, "code": None, "lines": [], "problem": NOT_STARTED}
        began = time.monotonic()
        output, errors = self.workdir / "stdout", self.workdir / "stderr"
        with output.open("w") as stdout, errors.open("w") as stderr:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True, **streams)
            code = wait_or_kill(process, limit)
        finished: dict[str, Any] = {
            "command": shown,
            "seconds": round(time.monotonic() - began, 1),
            "code": code,
            "lines": output.read_text(errors="replace").splitlines(),
        }
        if code != 0:
            end = errors.read_text(errors="replace").splitlines()[-5:]
            finished["problem"] = "\n".join([f"stopped after {limit:.0f} s" if code is None else f"exit {code}", *end])
        with (self.outdir / "log.txt").open("a") as log:
            log.write(f"\n$ {shown}\n{output.read_text(errors='replace')}{errors.read_text(errors='replace')}")
            log.write(f"[exit {code} after {finished['seconds']} s]\n")
        return finished

    def save(self) -> None:
        """Write what is known so far."""
        (self.outdir / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.outdir / "summary.md").write_text(summary(self.results))


def wait_or_kill(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Return the exit code, or None when the process and its children had to be killed."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def build(suite: Suite) -> dict[str, Any]:
    """Build the kernels, which a test that is stopped at its limit would take along."""
    return suite.run(["-m", "torch_utils.custom_ops"], suite.sizes.build_limit)


def run_tests(suite: Suite) -> dict[str, Any]:
    """Run the tests that need a GPU and count outcomes, also of those that came before the limit."""
    command = ["-m", "pytest", "-m", "gpu and not slow", "-v", "-rfE", "-o", "console_output_style=classic"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    finished = suite.run(command, suite.sizes.tests_limit)
    lines = finished.pop("lines")
    outcomes = [match for line in lines if (match := OUTCOME.fullmatch(line))]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]  # the summary at the end
    failures = failures or [match[0] for match in outcomes if match["outcome"] in ("FAILED", "ERROR")]
    return {**finished, "counts": Counter(match["outcome"].lower() for match in outcomes), "failures": failures[:20]}


OUTCOME = re.compile(r"\S+::.* (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)( \(.*)?")  # with the reason for skipping


def make_data(suite: Suite) -> dict[str, Any]:
    """Build the training set: of --data, else of drawn scenes that the preset can be trained on."""
    dataset, count = suite.workdir / "data.zip", suite.sizes.num_images
    source = [f"--source={suite.data}"] if suite.data else scenes(suite.sizes.preset)
    source += [f"--max-images={count}"] if count else []
    built = suite.run(["dataset_tool.py", *source, f"--dest={dataset}"], suite.sizes.data_limit)
    return (
        built if "problem" in built else {**built, "side": ImageDataset(DatasetConfig(path=str(dataset))).img_shape[1]}
    )


def scenes(preset: str) -> list[str]:
    """Options for scenes of the preset's size; of 32 pixels if it leaves that open."""
    try:
        height, width = PRESETS[preset].generator.img_size
    except ConfigError:
        height, width = 32, 32
    return ["--source=shapes", f"--height={height}", f"--width={width}"]


def run_benchmarks(suite: Suite) -> dict[str, Any]:
    """Run the scripts beside this one; each result is the list of its lines of JSON."""
    runs: dict[str, Any] = {}
    suite.results["benchmarks"] = {"runs": runs}
    side = suite.results.get("data", {}).get("side")
    more = [f"--resolution={side}"] if suite.sizes.any_side and side else []
    for name, (script, *options) in suite.sizes.benchmarks.items():
        command = [f"benchmarks/{script}", *options, *more, f"--device={suite.device}"]
        finished = suite.run(command, benchmark_limit(suite, name))
        rows = json_rows(finished.pop("lines"))
        runs[name] = {**finished, "rows": rows}
        suite.save()
    return {"runs": runs}


def benchmark_limit(suite: Suite, name: str) -> float:
    """Return the seconds for a benchmark: what is left, if nothing follows. All but the first spare the training."""
    if "training" not in suite.parts:
        return suite.left()
    limit = suite.sizes.benchmark_limits.get(name, suite.sizes.benchmark_limit)
    is_first = name == next(iter(suite.sizes.benchmarks))
    return limit if is_first else min(limit, suite.left() - suite.train_seconds * EVALUATIONS - FOR_SNAPSHOTS)


def json_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the objects in lines of JSON, of which the last may be cut off and others are no JSON."""
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows += [json.loads(line)] if line.startswith("{") else []
    return rows


def train(suite: Suite) -> dict[str, Any]:
    """Train for about `train_seconds`, with as many images as the measured speed allows."""
    sizes = suite.sizes
    dataset, runs = suite.workdir / "data.zip", suite.workdir / "runs"
    if not dataset.exists():
        return {"problem": "there is no data set"}
    first, *_ = suite.results["benchmarks"]["runs"].values()
    if not first["rows"]:
        return {"problem": "the length cannot be chosen: the first training step was not measured"}
    speed = next((row for row in first["rows"] if row["mode"] == TRAINING_MODE), first["rows"][0])["sec_per_kimg"]
    available = suite.left() - (FOR_SNAPSHOTS if suite.detector else 0)
    kimg = min(suite.train_seconds, available / EVALUATIONS) / speed
    length = [f"--kimg={kimg:.3f}", f"--tick={kimg / NUM_SNAPSHOTS:.3f}", "--snap=1", f"--metrics={sizes.metric}"]
    options = [f"--cfg={sizes.preset}", *sizes.model, f"--batch={sizes.batch}", f"--device={suite.device}"]
    finished = suite.run(["train.py", f"--outdir={runs}", f"--data={dataset}", *options, *length], available)
    finished.pop("lines")
    run_dir = next(runs.glob("[0-9]*"), None)
    if run_dir is None:
        return finished
    keep(run_dir, suite.outdir)
    return {**finished, "sec_per_kimg": speed, "curve": curve(run_dir, sizes.metric)}


def keep(run_dir: Path, outdir: Path) -> None:
    """Copy the newest picture and the logs of figures."""
    for path in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
        if path.exists():
            shutil.copy(path, outdir)
    pictures = sorted(run_dir.glob("fakes*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        shutil.copy(pictures[-1], outdir / "grid.png")


def curve(run_dir: Path, metric: str) -> list[dict[str, float]]:
    """Return kimg, seconds since the start of training (evaluations included) and the metric, at every snapshot."""
    measured = read_json_lines(run_dir / f"metric-{metric}.jsonl")
    seconds = {line["Progress/kimg"]: line["Timing/total_sec"] for line in read_json_lines(run_dir / "stats.jsonl")}
    return [
        {"kimg": line["kimg"], "seconds": round(seconds[line["kimg"]], 1), metric: round(line["results"][metric], 3)}
        for line in measured
    ]


def measure_snapshots(suite: Suite) -> dict[str, Any]:
    """Add the Frechet distance to the curve: of features of the detector, between data set and fakes.

    That of the last snapshot comes first, should there be no time for the others.
    """
    if suite.detector is None:
        return {"problem": "not computed: no --detector"}
    snapshots = sorted(suite.workdir.glob("runs/*/network-snapshot-*.pkl"))
    if not snapshots:
        return {"problem": "not computed: the training wrote no snapshot"}
    options = [f"--metrics={suite.sizes.distance}", f"--detector={suite.detector}", f"--device={suite.device}"]
    options += ["--no-cache", "--batch=256", "--detector-batch=256"]
    seconds = {row["kimg"]: row["seconds"] for row in suite.results["training"].get("curve", [])}
    points: dict[float, dict[str, Any]] = {}
    for network in [snapshots[-1], snapshots[-1].parent][: len(snapshots)]:
        finished = suite.run(["calc_metrics.py", f"--network={network}", *options], suite.left())
        for record in json_rows(finished.pop("lines")):
            kimg = record["kimg"]
            values = {name: round(value, 3) for name, value in record["results"].items()}
            points[kimg] = {"kimg": kimg, "seconds": seconds.get(kimg), **values}
        if "problem" in finished:
            break
    return {**finished, "detector": suite.detector.name, "curve": [points[kimg] for kimg in sorted(points)]}


COLUMNS = {
    "train_step": [
        "preset",
        "widths",
        "layers",
        "batch",
        "mode",
        "img_per_s",
        "speedup",
        "model_flop_utilisation",
        "ms",
        "peak_mib",
    ],
    "networks": ["network", "batch", "gflop_per_image", "forward_img_per_s", "forward_backward_img_per_s", "peak_mib"],
    "generation": ["mode", "batch", "img_per_s", "ms_per_batch", "peak_mib"],
    "attention": ["form", "derivatives", "tokens", "ms", "peak_mib", "problem"],
    "grid_attention": ["form", "derivatives", "resolution", "ms", "peak_mib", "problem"],
    "operators": ["case", "impl", "dtype", "channels_last", "forward", "backward"],
}


def summary(results: dict[str, Any]) -> str:
    """Return the figures as Markdown tables."""
    machine = results["machine"]
    lines = [
        f"Measured on {machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}."
    ]
    if reported := results.get("build", {}).get("lines"):
        lines += ["", f"Kernels: {reported[-1].partition(':')[2].strip()}."]
    if tests := results.get("tests"):
        lines += ["", f"Tests marked `gpu`: {cell(tests.get('counts', {}))}; exit code {tests.get('code')}.", ""]
        lines += [f"- {failure}" for failure in tests.get("failures", [])]
    runs = results.get("benchmarks", {}).get("runs", {})
    rows = [row for run in runs.values() for row in run["rows"]]
    for benchmark, keys in COLUMNS.items():
        lines += table(rows, benchmark, keys)
    for name in ("training", "snapshots"):
        points = results.get(name, {}).get("curve", [])
        lines += table([{"benchmark": name, **point} for point in points], name, list(points[0]) if points else [])
    problems = {name: part["problem"] for name, part in {**results, **runs}.items() if "problem" in part}
    late = [name for name, problem in problems.items() if problem == NOT_STARTED]
    lines += [f"\nProblem in {name}:\n\n    {indent(problems[name])}" for name in problems if name not in late]
    if parts := [name for name in late if name in results]:
        lines += ["", f"Parts not started: {', '.join(parts)}."]
    if benchmarks := [name for name in late if name in runs]:
        lines += ["", f"Benchmarks not started: `--only={','.join(benchmarks)}`"]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]], benchmark: str, keys: Sequence[str]) -> list[str]:
    """Return the chosen columns of a benchmark's rows as a Markdown table, or nothing."""
    chosen = [row for row in rows if row["benchmark"] == benchmark]
    if not chosen:
        return []
    body = ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in chosen]
    return ["", f"### {benchmark}", "", f"| {' | '.join(keys)} |", "|" + " --- |" * len(keys), *body]


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def indent(text: str) -> str:
    return text.strip().replace("\n", "\n    ")


def describe_machine(device: str, commit: str | None) -> dict[str, Any]:
    """Return where and when this is."""
    place = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "commit": commit or source_commit() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


PARTS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "build": build,
    "tests": run_tests,
    "data": make_data,
    "benchmarks": run_benchmarks,
    "training": train,
    "snapshots": measure_snapshots,
}

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path, resolve_path=True)


@click.command(help=__doc__)
@click.option("--data", type=EXISTING_FILE, help="Training images, as dataset_tool.py reads them. [drawn scenes]")
@click.option("--detector", type=EXISTING_FILE, help="Feature network for Frechet distances: .pt2 or TorchScript.")
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("out/gpu_suite"), show_default=True)
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N or cpu.")
@click.option("--minutes", type=float, default=9.0, show_default=True, help="Everything stops before this is over.")
@click.option("--train-seconds", type=float, default=100.0, show_default=True, help="Length of the training.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Train this one, and do nothing else.")
@click.option("--only", metavar="TEXT,...", help="Run the benchmarks with one of these in their names, nothing else.")
@click.option("--commit", help="What is measured. [what git says]")
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that everything works.")
def main(
    data: Path | None,
    detector: Path | None,
    outdir: Path,
    device: str,
    minutes: float,
    train_seconds: float,
    preset: str | None,
    only: str | None,
    commit: str | None,
    quick: bool,
) -> None:
    deadline = time.monotonic() + minutes * 60 - SHORTEST
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.UsageError(f"--device={device}: PyTorch sees no GPU; --device=cpu --quick tries the suite without")
    if preset and only:
        raise click.UsageError("--preset and --only: give one of the two")
    sizes, skipped = QUICK if quick else FULL, set() if device.startswith("cuda") else {"build"}
    if preset:
        sizes, skipped = only_training(sizes, preset), skipped | {"tests"}
    if only:
        sizes, skipped = only_benchmarks(sizes, only.split(",")), skipped | {"tests", "data", "training", "snapshots"}
    outdir.mkdir(parents=True, exist_ok=True)
    (outdir / "log.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as workdir:
        suite = Suite(
            sizes=sizes,
            parts=[name for name in PARTS if name not in skipped],
            device=device,
            data=data,
            detector=detector,
            train_seconds=train_seconds,
            deadline=deadline,
            outdir=outdir,
            workdir=Path(workdir),
            results={"machine": describe_machine(device, commit)},
        )
        for name in suite.parts:
            try:
                suite.results[name] = PARTS[name](suite)
            except Exception:  # a part that fails must not take the results of the others with it
                suite.results[name] = {**suite.results.get(name, {}), "problem": traceback.format_exc()}
            suite.save()
            click.echo(f"{name}: {suite.left():.0f} s left")
    click.echo((outdir / "summary.md").read_text())


if __name__ == "__main__":
    main()
