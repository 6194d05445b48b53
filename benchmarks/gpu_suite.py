"""All measurements that need a GPU, in one command of less than ten minutes.

    python benchmarks/gpu_suite.py --data=cifar10-images.zip --outdir=out/gpu_suite

Builds the kernels, runs the tests marked `gpu`, the benchmarks, and a short training with the README's options;
measures its snapshots. A part that fails or runs out of time is recorded and does not stop the others: the time is too
short for all benchmarks, and --only runs those that were left. Writes results.json, summary.md (tables for
docs/benchmarks.md) and log.txt (all output), and from the training grid.png, stats.jsonl and the metric's lines.
With --device=cpu --quick it shows in a minute that everything works; those figures mean nothing. With --preset it
trains that preset instead and measures nothing else: this is how families are compared.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
README_MODEL = ["--g_dict=256,64,16", "--num_layers=1,2,2"]
QUICK_MODEL = ["--g_dict=32,16,16", "--num_layers=1,1,1"]
TRAINING_MODE = "bf16"  # what train.py does unasked
NUM_SNAPSHOTS = 8
SHORTEST = 5.0  # seconds; with less left, nothing is started any more
EVALUATIONS = 1.5  # a training with its start and its evaluations, in units of its steps alone
FOR_SNAPSHOTS = 40.0  # seconds for the Frechet distances
BATCH = 256  # images at a time through the detector


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything, and the seconds that each command may take."""

    preset: str
    model: list[str]
    batch: int
    benchmarks: dict[str, list[str]]  # by name; the first has the step of the short training
    metric: str
    num_images: int | None  # of the training set; None takes all
    num_fakes: int
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
        "training step, batch 64": step("cifar", 64, "plain,bf16,bf16+graphs,fp32", *README_MODEL, *LONG),
        "networks": ["networks.py", "--batch=64", "--seconds=0.5"],
        "generation": ["generation.py", "--seconds=0.5", "--batch=1,16,256", "--modes=fp32,fp32+graphs,bf16+graphs"],
        "attention": ["attention.py", "--tokens=1024,4096,16384", "--repeats=3", "--batch=4"],
        "attention on a grid": ["grid_attention.py", "--resolutions=32,64,128", "--repeats=3", "--batch=4"],
        "operators": ["operators.py", "--repeats=20", "--dtype=float32,bfloat16", "--impl=cuda,reference"],
        "training step, cifar-large, batch 64": step("cifar-large", 64, "plain,bf16,bf16+graphs", *LONG),
        "training step, stylegan2": step("cifar-stylegan2", 64, "plain,bf16+graphs", *LONG),
        "training step, transgan": step("transgan-cifar", 64, "plain,bf16+graphs", *LONG),
        "training step, styleformer-c": step("styleformer-c256", 16, "plain,bf16+graphs", *LONG),
        "training step, batch 32": step("cifar", 32, "plain,bf16,bf16+graphs", *README_MODEL, *LONG),
        "training step, cifar-large, batch 32": step("cifar-large", 32, "plain,bf16+graphs", *LONG),
        "operators, channels last": [
            "operators.py",
            "--repeats=20",
            "--dtype=bfloat16",
            "--impl=cuda,reference",
            "--channels-last",
        ],
        "training step, options": step("cifar", 64, "tf32,fp16+graphs,bf16+nchw", *README_MODEL, *LONG),
        "training step, compiled": step("cifar", 64, "bf16+compile+graphs", *README_MODEL, *LONG),
        "operators, compiled": ["operators.py", "--repeats=20", "--dtype=bfloat16", "--impl=compiled"],
    },
    benchmark_limits={"training step, batch 64": 120, "training step, compiled": 150, "operators, compiled": 150},
    metric="swd1k",
    num_images=None,
    num_fakes=10_000,
)
QUICK = Sizes(
    preset="tiny",
    model=QUICK_MODEL,
    batch=4,
    benchmarks={
        "training step": step("tiny", 4, "bf16", *QUICK_MODEL, "--steps=1", "--warmup=1"),
        "networks": ["networks.py", "--batch=1", "--seconds=0.01"],
        "generation": ["generation.py", "--batch=1,2", "--seconds=0.01"],
        "operators": ["operators.py", "--repeats=1", "--only=RGB pyramid up, 16 px"],
        "attention": ["attention.py", "--tokens=64", "--repeats=1", "--forms=fused"],
        "attention on a grid": ["grid_attention.py", "--resolutions=16", "--repeats=1", "--forms=grid"],
    },
    benchmark_limits={"networks": 240},
    metric="swd32",
    num_images=256,
    num_fakes=64,
)


def only_training(sizes: Sizes, preset: str) -> Sizes:
    """The sizes for training a preset: its step, which says how far the time goes, is all that is measured before."""
    steps = step(preset, sizes.batch, TRAINING_MODE, "--steps=10", "--warmup=3")
    return replace(sizes, preset=preset, model=[], benchmarks={f"training step, {preset}": steps})


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
            return {"command": shown, "seconds": 0.0, "code": None, "lines": [], "problem": "not started: no time left"}
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
    """Run the tests that need a GPU and count outcomes."""
    command = ["-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    finished = suite.run(command, suite.sizes.tests_limit)
    lines = finished.pop("lines")
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", lines[-1] if lines else "")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {**finished, "counts": {outcome: int(number) for number, outcome in counts}, "failures": failures[:20]}


def run_benchmarks(suite: Suite) -> dict[str, Any]:
    """Run the scripts beside this one; each result is the list of its lines of JSON."""
    runs: dict[str, Any] = {}
    for name, (script, *options) in suite.sizes.benchmarks.items():
        for_training = suite.train_seconds * EVALUATIONS + FOR_SNAPSHOTS if "training" in suite.parts else 0
        limit = suite.sizes.benchmark_limits.get(name, suite.sizes.benchmark_limit)
        command = [f"benchmarks/{script}", *options, f"--device={suite.device}"]
        finished = suite.run(command, min(limit, suite.left() - for_training))
        rows = [json.loads(line) for line in finished.pop("lines") if line.startswith("{")]
        runs[name] = {**finished, "rows": rows}
    return {"runs": runs}


def train(suite: Suite) -> dict[str, Any]:
    """Build the data set and train for about `train_seconds`, with as many images as the measured speed allows."""
    sizes = suite.sizes
    dataset, runs = suite.workdir / "data.zip", suite.workdir / "runs"
    first, *_ = suite.results["benchmarks"]["runs"].values()
    if not first["rows"]:
        return {"problem": "the length cannot be chosen: the first training step was not measured"}
    speed = next((row for row in first["rows"] if row["mode"] == TRAINING_MODE), first["rows"][0])["sec_per_kimg"]
    source = [f"--source={suite.data or 'shapes'}", f"--dest={dataset}"]
    source += [f"--max-images={sizes.num_images}"] if sizes.num_images else []
    built = suite.run(["dataset_tool.py", *source], sizes.data_limit)
    if "problem" in built:
        return built
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
    return {**finished, "dataset": built["lines"], "sec_per_kimg": speed, "curve": curve(run_dir, sizes.metric)}


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
    stats, measured = read_lines(run_dir / "stats.jsonl"), read_lines(run_dir / f"metric-{metric}.jsonl")
    seconds = {line["Progress/kimg"]: line["Timing/total_sec"] for line in stats}
    return [
        {"kimg": line["kimg"], "seconds": round(seconds[line["kimg"]], 1), metric: round(line["results"][metric], 3)}
        for line in measured
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@torch.no_grad()
def measure_snapshots(suite: Suite) -> dict[str, Any]:
    """Add the Frechet distance to the curve: of features of the detector, between data set and fakes."""
    if suite.detector is None:
        return {"problem": "not computed: no --detector"}
    snapshots = sorted(suite.workdir.glob("runs/*/network-snapshot-*.pkl"))
    if not snapshots:
        return {"problem": "not computed: the training wrote no snapshot"}
    sys.path.insert(0, str(ROOT))
    from torch_utils.images import to_uint8
    from training.dataset import DatasetConfig, ImageDataset
    from training.networks import execution
    from training.snapshot import load_network

    execution.set_gpu_arithmetic()
    device = torch.empty(0, device=suite.device).device  # with the GPU's index
    features = load_detector(suite.detector, device)
    images = ImageDataset(DatasetConfig(path=str(suite.workdir / "data.zip")))
    parts = [range(first, min(first + BATCH, len(images))) for first in range(0, len(images), BATCH)]
    real = gaussian(features(images.images(part).to(device)) for part in parts)
    seconds = {row["kimg"]: row["seconds"] for row in suite.results["training"].get("curve", [])}
    rows = []
    for path in snapshots:
        if suite.left() < SHORTEST:
            break
        snapshot = load_network(path, device)
        G = snapshot.G_ema
        z = torch.randn([suite.sizes.num_fakes, G.z_dim], generator=torch.Generator().manual_seed(0)).to(device)
        fake = gaussian(features(to_uint8(G(part, None))) for part in z.split(BATCH))
        distance = round(frechet_distance(*real, *fake), 3)
        rows.append({"kimg": snapshot.kimg, "seconds": seconds.get(snapshot.kimg), "frechet": distance})
    counts = {"num_real": len(images), "num_fake": suite.sizes.num_fakes}
    return {"detector": suite.detector.name, **counts, "curve": rows}


def load_detector(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from uint8 images (B, C, H, W) to features (B, F) in a torch.export or TorchScript file."""
    if path.suffix == ".pt2":
        from torch.export.passes import move_to_device_pass

        network: Any = move_to_device_pass(torch.export.load(path), str(device)).module()
    else:
        network = torch.jit.load(path, map_location=device)
    return lambda images: network(images)[0]


def gaussian(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean (F,) and covariance (F, F) of batches of features (B, F), in float64 on the CPU."""
    rows = torch.cat([batch.cpu() for batch in features]).double()
    return rows.mean(dim=0), rows.T.cov()


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982), as FID uses it.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)

    The matrix under the last root is symmetric, so its eigenvalues are real; the tiny negative ones are rounding.
    """
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C1^1/2
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


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
    problems = [(name, part) for name, part in {**results, **runs}.items() if "problem" in part]
    lines += [f"\nProblem in {name}:\n\n    {indent(part['problem'])}" for name, part in problems]
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
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    place = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "commit": commit or described.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


PARTS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "build": build,
    "tests": run_tests,
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
@click.option("--preset", help="Train this one, and do nothing else.")
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
        sizes, skipped = only_benchmarks(sizes, only.split(",")), skipped | {"tests", "training", "snapshots"}
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
                suite.results[name] = {"problem": traceback.format_exc()}
            suite.save()
            click.echo(f"{name}: {suite.left():.0f} s left")
    click.echo((outdir / "summary.md").read_text())


if __name__ == "__main__":
    main()
