"""Compute metrics of a network snapshot: a line of JSON for each, printed and appended to metric-<name>.jsonl."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import NameList, Script, config_values, option, switch
from dnnlib.config import UserError, override
from metrics.registry import (
    append_result,
    check_available,
    compute,
    default_metrics,
    registered_metrics,
    resolve,
    result_to_json,
    to_line,
)
from metrics.sampling import MetricContext
from torch_utils import distributed
from torch_utils.misc import tune_allocator
from training.dataset import ImageDataset
from training.snapshot import load_network


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compute; `changes` are config paths and values that replace those of the snapshot's configuration."""

    network: Path
    changes: dict[str, Any]
    metric_names: tuple[str, ...]
    device: str | None
    batch_size: int
    seed: int
    truncation_psi: float
    noise_mode: str


class MetricScript(Script):
    """A command whose help ends with the metrics."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each metric: what it is, by which protocol, after which paper."""
        with formatter.section("Metrics (<N>: a number of images such as 500 or 5k, or nothing for the usual one)"):
            rows = [(spec.pattern, f"{spec.help}. {spec.protocol} ({spec.paper})") for spec in registered_metrics()]
            formatter.write_dl(rows)


@click.command(cls=MetricScript, context_settings={"max_content_width": 110, "show_default": True})
@option("--network", metavar="PKL", type=click.Path(path_type=Path), required=True, help="Network snapshot.")
@option("--metrics", "names", type=NameList(), help="What to compute, see below.  [default: fid50k_full or swd]")
@option("--data", field="data.path", metavar="PATH", help="Real images, zip or folder.  [default: the training images]")
@switch("--mirror", field="data.mirror", help="Also count every real image flipped.  [default: as in training]")
@option("--gpus", type=click.IntRange(min=1), default=1, help="Processes on this machine, one per GPU.")
@option("--device", metavar="NAME", help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")
@option("--batch", "batch_size", type=click.IntRange(min=1), default=64, help="Images at a time, per process.")
@option("--seed", type=int, default=0, help="Seed of latents, labels, noise, and what a metric draws.")
@option("--trunc", "truncation_psi", type=float, default=1.0, help="Truncation psi; 1 is none.")
@option("--noise-mode", type=click.Choice(["const", "random", "none"]), default="const", help="Noise of the network.")
@click.pass_context
def main(context: click.Context, network: Path, names: tuple[str, ...] | None, gpus: int, **options: Any) -> None:
    """Compute metrics of a network snapshot against its data.

    Each result is one line of JSON on stdout, appended to metric-<name>.jsonl beside the snapshot.

    \b
    python calc_metrics.py --network=runs/00000-run/network-snapshot-000200.pkl --metrics=swd5k
    """
    if names is None:
        names, why = default_metrics()
        click.echo(f"No --metrics given; {why}", err=True)
    names = tuple(resolve(names))
    if not names:
        raise UserError("--metrics names nothing to compute; leave it out for the default")
    for name in names:
        check_available(name)

    device = distributed.choose_device(options["device"])
    distributed.check_processes(gpus, options["device"], device)
    job = Job(
        network=network,
        changes=config_values(context),
        metric_names=names,
        device=options["device"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        truncation_psi=options["truncation_psi"],
        noise_mode=options["noise_mode"],
    )
    distributed.launch(run, gpus, job, device_type=device.type)


def run(job: Job) -> None:
    """Compute a job's metrics; every process takes its share, the first one prints and records."""
    tune_allocator()
    device = distributed.choose_device(job.device)
    snapshot = load_network(job.network, device)
    config = override(snapshot.config, job.changes)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    dataset = ImageDataset(config.data)
    pair = MetricContext(
        G=snapshot.G_ema,
        images=dataset,
        device=device,
        batch_size=job.batch_size,
        seed=job.seed,
        truncation_psi=job.truncation_psi,
        noise_mode=job.noise_mode,
        progress=show_progress,
    )
    for name in job.metric_names:
        result = compute(name, pair)
        if distributed.is_main():
            record = result_to_json(
                result,
                snapshot=job.network,
                kimg=snapshot.kimg,
                data=config.data.path,
                data_hash=dataset.content_hash,
                mirror=config.data.mirror,
            )
            click.echo(to_line(record))
            append_result(job.network.parent, record)


def show_progress(what: str, done: int, total: int) -> None:
    """Say on stderr how far the first process is with its share of the images."""
    if distributed.is_main() and (done == total or sys.stderr.isatty()):
        click.echo(f"\r{what}: {done} of {total}", err=True, nl=done == total)


if __name__ == "__main__":
    main()
