"""Print a table of everything that is faster on a CPU than PyTorch's plain form, with the speedups.

    python benchmarks/cpu_suite.py

Runs the other benchmarks in their own processes, one after the other, with one thread each; takes about ten minutes.
The last column is the largest difference of the results, relative to the largest value. "Plain" denotes: for training,
the same networks in float32 without this project's kernels, Winograd's algorithm and allocator settings; for layers,
`F.conv2d`; for metrics, the formulas in float64, or whole tables of distances; for files, `zipfile` and `torch.load`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common import LOAD_AT_START

from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError
from dnnlib.util import source_commit
from torch_utils.misc import device_name, product_rate

# Name, seconds of the plain form, seconds here, and deviation; None: not compared.
Row = tuple[str, float, float, float | None]

ORDERS = ("forward", "both gradients", "second derivative")
METRICS = {
    "covariance": "covariance of {features:,} features",
    "frechet": "Frechet distance",
    "kid": "KID of {subsets} subsets",
    "precision_recall": "precision and recall of {features:,} features",
    "density_coverage": "density and coverage of {features:,} features",
}


def of_training(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    plain, *others = results
    for result in others:
        name = "training, README example, {mode}, batch {batch}: s/kimg".format(**result)
        yield name, plain["sec_per_kimg"], result["sec_per_kimg"], None


def of_layers(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for result in results:
        name = "{layer}, {channels} channels, {side}x{side}, batch {batch}: ".format(**result)
        yield name + ORDERS[result["order"]], *seconds_of(result)


def of_metrics(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for result in results:
        yield METRICS[result["part"]].format(**result), *seconds_of(result)


def of_swd(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for result in results:
        yield "swd of {images:,} images, {size}x{size}".format(**result), *seconds_of(result)


def of_files(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    archive, snapshot = (result["cpu_s"] for result in results)
    images = "open a zip of {num_images:,} images: ".format(**results[0])
    yield images + "first start", archive["plain"], archive["first"], None
    yield images + "next starts", archive["plain"], archive["second"], None
    name = "read and verify a snapshot of {mib:.0f} MiB".format(**results[1])
    yield name, snapshot["torch_load"], snapshot["read"], None


def seconds_of(result: dict[str, Any]) -> tuple[float, float, float]:
    """Return the plain time, the own time and the deviation."""
    return result["plain_busy_seconds"], result["busy_seconds"], result["deviation"]


PARTS: dict[str, tuple[list[str], Callable[[Sequence[dict[str, Any]]], Iterator[Row]]]] = {
    "training": (
        ["train_step.py", "--device=cpu", "--threads=1", "--steps=2", "--warmup=1", "--modes=plain,fp32,bf16"],
        of_training,
    ),
    "layers": (["convolutions.py"], of_layers),
    "metrics": (
        ["feature_metrics.py", "--parts=covariance,frechet,kid,precision_recall,density_coverage", "--device=cpu"],
        of_metrics,
    ),
    "swd": (["swd.py", "--size=32", "--device=cpu"], of_swd),
    "files": (["loading.py"], of_files),
}


@click.command(cls=Script, help=__doc__)
@option("--parts", type=NameList(), help=f"Parts to measure: {', '.join(PARTS)}. [all]")
def main(parts: tuple[str, ...] | None) -> None:
    for part in parts or ():
        if part not in PARTS:
            raise UserError(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    rates = {name: product_rate(dtype) / 1e9 for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    rows = [row for part in parts or PARTS for row in measure(part)]
    click.echo(
        f"{device_name(torch.device('cpu'))}, one thread; matrix products at {rates['fp32']:.0f} GFLOP/s in fp32 and "
        f"{rates['bf16']:.0f} in bf16; torch {torch.__version__}, commit {source_commit() or 'unknown'}; load average "
        f"{LOAD_AT_START:.2f} before and {os.getloadavg()[0]:.2f} after.\n"
    )
    click.echo("\n".join(table(rows)))


def measure(part: str) -> list[Row]:
    """Run a benchmark and return the rows of its results."""
    (script, *options), rows_of = PARTS[part]
    click.echo(f"{part}: {script} ...", err=True)
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if found.returncode:
        raise UserError(f"{script} ended with exit code {found.returncode}; its messages are above")
    return list(rows_of([json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]))


def table(rows: Sequence[Row]) -> list[str]:
    """Return rows as a Markdown table."""
    lines = ["| | plain s | here s | speedup | deviation |", "| --- | --- | --- | --- | --- |"]
    for name, plain, own, deviation in rows:
        error = "" if deviation is None else f"{deviation:.0e}"
        lines.append(f"| {name} | {plain:.3g} | {own:.3g} | {plain / own:.2f} | {error} |")
    return lines


if __name__ == "__main__":
    main()
