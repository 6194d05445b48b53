"""End-to-end demo on this machine, without internet access: dataset, training, images, a metric.

Each step prints a command of this project and runs it. Users can repeat the commands with other options.
The demo fails unless the generator has learned: its distance to the data must be at most 0.6 of the untrained value.
(Seeds 0, 1 and 2 reached 0.22, 0.23 and 0.24. Another processor rounds differently, which acts like another seed.)
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from dnnlib.cli import Script
from dnnlib.config import UserError
from dnnlib.util import format_time, read_metric_records
from reporting.progress import TILE, progress_sheet, tiles_of_grid
from reporting.run_reader import read_run
from torch_utils.distributed import choose_device
from torch_utils.images import save_pixels
from torch_utils.misc import available_cores
from torch_utils.sheets import arranged, in_rows, sheet, tile_of, titled
from training.data_sources.codec import decode_image

ROOT = Path(__file__).resolve().parent
OUTDIR = ROOT / "out" / "demo"
METRIC = "swd500"
IMG_SIZE = (32, 32)
SIDE, STRIP = 6, 9  # images per side of each half of the overview, and per row of its progress
# Networks this small do not gain from more than two threads. Set OMP_NUM_THREADS=1 in a container that grants fewer
# cores than it reports.
THREADS = os.environ.get("OMP_NUM_THREADS") or str(min(2, available_cores()))
# R1 is stronger than for photographs; otherwise D separates drawn scenes from generated ones early.
OPTIONS = ["--cfg=styleformer2", "--gamma=2", "--set=loss.n_critic=1", "--mbstd=4", "--d-arch=resnet"]
FIRST = "--set=run.metrics_first=1"  # for the value of the untrained network
CPU_OPTIONS = [
    *("--kimg=18", "--tick=1", "--snap=6", "--g_dict=128,64,32", "--num_layers=1,1,1", "--linformer=1"),
    *("--set=generator.linformer_k=32", "--cbase=512", "--set=discriminator.channel_max=128"),
]
GPU_OPTIONS = [
    *("--kimg=200", "--tick=10", "--snap=5", "--batch=32", "--g_dict=256,128,64", "--num_layers=1,2,2"),
    *("--cbase=2048", "--set=discriminator.channel_max=256"),
]


@click.command(cls=Script)
@click.option("--outdir", type=click.Path(path_type=Path), help="New folder for the results. [out/demo, overwritten]")
@click.option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
def main(outdir: Path | None, device: str | None) -> None:
    """Build a dataset, train on it, generate images and compute a metric."""
    began = time.monotonic()
    chosen = choose_device(device)
    device_flag = f"--device={chosen}"
    outdir = prepare(outdir)
    data, runs, images = outdir / "shapes.zip", outdir / "runs", outdir / "images"

    run("dataset_tool.py", "--source=shapes", f"--dest={data}", "--max-images=8192")
    options = GPU_OPTIONS if chosen.type == "cuda" else CPU_OPTIONS
    run("train.py", f"--outdir={runs}", f"--data={data}", *OPTIONS, *options, f"--metrics={METRIC}", FIRST, device_flag)
    run_dir = next(runs.iterdir())
    snapshot = max(run_dir.glob("network-snapshot-*.pkl"))
    run("generate.py", f"--network={snapshot}", "--seeds=0-63", f"--outdir={images}", "--grid", device_flag)
    run("calc_metrics.py", f"--network={snapshot}", f"--metrics={METRIC}_floor", device_flag)

    untrained, *_, trained = read_results(run_dir, METRIC)
    floor = read_results(run_dir, f"{METRIC}_floor")[-1]
    overview = outdir / "overview.png"
    save_pixels(draw_overview(run_dir, images), overview)
    print(f"\nSliced Wasserstein distance to the data: untrained {untrained:.1f}, trained {trained:.1f}")
    print(f"(two halves of the data are {floor:.1f} apart: no generator can do better)\n")
    print(f"Real and generated:    {overview}{hint(overview)}")
    print(f"Generated images:      {images / 'grid.png'}")
    print(f"The data:              {run_dir / 'reals.png'}")
    print(f"Progress as images:    {run_dir}/fakes*.png")
    print(f"The snapshot:          {snapshot}")
    print(f"The run:               {run_dir}/log.txt, stats.jsonl, metric-{METRIC}.jsonl")
    print(f"Total time: {format_time(time.monotonic() - began)}")
    if not trained <= 0.6 * untrained:
        sys.exit("Error: the generator has not learned: its distance is more than 0.6 of the untrained value")


def prepare(outdir: Path | None) -> Path:
    """Return the output folder as an absolute path: empty the default folder, accept only new or empty ones."""
    if outdir is None:
        shutil.rmtree(OUTDIR, ignore_errors=True)
        return OUTDIR
    if outdir.exists() and not (outdir.is_dir() and not any(outdir.iterdir())):
        raise UserError(f"--outdir={outdir}: exists and is not an empty folder; specify a new folder")
    return outdir.resolve()


def run(*command: str) -> None:
    """Print a command as a user would type it, and run it; exit with its code if it fails."""
    print(f"\n$ OMP_NUM_THREADS={THREADS} python {shlex.join(command)}", flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": THREADS}
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=False).returncode
    if code:
        sys.exit(code)


def draw_overview(run_dir: Path, images: Path) -> np.ndarray:
    """Draw real beside generated images, and below them the progress of training: one row per snapshot."""
    real = [row[:SIDE] for row in tiles_of_grid(run_dir / "reals.png", IMG_SIZE)[:SIDE]]
    made = in_rows([decode_image((images / f"seed{seed:04d}.png").read_bytes()) for seed in range(SIDE**2)])
    halves = {"Real images": real, f"Generated images, seeds 0 to {SIDE**2 - 1}": made}
    top = [
        titled(sheet([[tile_of(tile, TILE) for tile in row] for row in tiles]), title)
        for title, tiles in halves.items()
    ]
    strip = progress_sheet(read_run(run_dir, run_dir.name), IMG_SIZE, columns=STRIP, metric=METRIC)
    return arranged([top, [titled(strip, "Progress: images of the same latents during training")]])


def hint(path: Path) -> str:
    """Return how to open a file, or nothing on a machine without a display."""
    viewer = {"darwin": "open", "linux": "xdg-open"}.get(sys.platform)
    if viewer is None or (viewer == "xdg-open" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        return ""
    return f"   (open it: {viewer} {shlex.quote(str(path))})"


def read_results(run_dir: Path, metric: str) -> list[float]:
    """Return the values of a metric in chronological order."""
    return [record["results"][metric] for record in read_metric_records(run_dir / f"metric-{metric}.jsonl")]


if __name__ == "__main__":
    main()
