"""Compute metrics of a snapshot, of all snapshots of a run, or of a set of images: a table, and lines of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.allocator import tune_allocator
from dnnlib.cli import FileOrURL, NameList, Script, option, switch
from dnnlib.config import UserError, WriteError, override
from dnnlib.download import cache_dir, is_url
from dnnlib.util import write_atomically
from metrics.detectors import PROTOCOLS, DetectorSetup, read_detectors
from metrics.display import ProgressLine, to_table
from metrics.feature_stats import with_network
from metrics.registry import (
    MetricSpec,
    append_result,
    check_available,
    compute_all,
    default_metrics,
    find,
    registered_metrics,
    resolve,
    result_to_json,
    to_line,
)
from metrics.sampling import MetricContext, silent
from reporting.charts import find_charts
from reporting.drawing import check_matplotlib, draw_png
from reporting.run_reader import read_run
from torch_utils import custom_ops, distributed
from training.data_sources.codec import SLOW_DECODER
from training.dataset import DatasetConfig, ImageDataset
from training.networks import execution
from training.snapshots.exchange import is_folder
from training.snapshots.reading import load_network, local_file
from training.snapshots.snapshot import Snapshot, list_snapshots


@dataclass(frozen=True, kw_only=True)
class Job:
    """Metrics to compute; `changes` are config paths and values that replace those of the snapshot's configuration."""

    network: Path
    folder: Path | None  # for lines of JSON and plots
    changes: dict[str, Any]
    metric_names: tuple[str, ...]
    setup: DetectorSetup
    device: str | None
    batch_size: int
    detector_batch: int
    seed: int
    truncation_psi: float
    noise_mode: str
    use_cache: bool
    plot: bool
    verbose: bool


class MetricScript(Script):
    """A command whose help ends with the metrics."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each metric: what it is, by which protocol, after which paper."""
        with formatter.section("Metrics (<N>: a number of images such as 500 or 5k, or nothing for the usual one)"):
            formatter.write_dl([(spec.pattern, explain(spec)) for spec in registered_metrics()])
        with formatter.section("With --protocol=clean, whose numbers do not compare with the usual ones"):
            clean = DetectorSetup(protocol="clean")
            formatter.write_dl([(spec.pattern, spec.protocol_of(clean)) for spec in registered_metrics() if spec.clean])


def explain(spec: MetricSpec) -> str:
    """Return what a metric is, its protocol and paper."""
    flips = "; counts flips" if spec.counts_flips else ""
    return f"{spec.help}. {spec.protocol_of()}{flips} ({spec.paper})"


@click.command(cls=MetricScript, context_settings={"max_content_width": 110, "show_default": True})
@option(
    "--network",
    metavar="PKL|URL|RUN|IMAGES",
    type=FileOrURL(),
    required=True,
    help="Snapshot or folder of safetensors; folder of a run, for all its snapshots; or zip or folder of images made "
    "by other means.",
)
@option("--metrics", "names", type=NameList(), help="What to compute, see below.  [default: fid50k_full or swd]")
@option("--data", metavar="PATH", help="Real images, zip or folder.  [default: the training images]")
@switch(
    "--mirror",
    help="Also count every real image flipped, in the metrics below that count flips.  [default: as in training]",
)
@option(
    "--detector",
    "detectors",
    type=NameList(),
    metavar="FILE,...",
    help="A feature network of your own (.pt2, TorchScript; vgg16:FILE: it is that one), weights, a folder of DINOv2. "
    "Such a network is a program: use only those you trust.",
)
@option("--protocol", type=click.Choice(PROTOCOLS), default="stylegan", help="Resize and covariance of FID and KID.")
@option("--no-cache", is_flag=True, help="Neither use nor keep statistics of the real images on disk.")
@option("--plot", is_flag=True, help="Draw each metric against kimg: metric-<name>.png beside the snapshots.")
@switch("--verbose", default=True, help="Show progress on stderr.")
@option("--gpus", type=click.IntRange(min=1), default=1, help="Processes on this machine, one per GPU.")
@option("--device", metavar="NAME", help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")
@option("--batch", "batch_size", type=click.IntRange(min=1), default=64, help="Images made at a time, per process.")
@option("--detector-batch", type=click.IntRange(min=1), default=64, help="Images that a detector sees at a time.")
@option("--seed", type=int, default=0, help="Seed of latents, labels, noise, and what a metric draws.")
@option("--trunc", "truncation_psi", type=float, default=1.0, help="Truncation psi; 1 is none.")
@option("--noise-mode", type=click.Choice(["const", "random", "none"]), default="const", help="Noise of the network.")
@click.pass_context
def main(
    context: click.Context,
    network: Path | str,
    names: tuple[str, ...] | None,
    detectors: tuple[str, ...] | None,
    protocol: str,
    gpus: int,
    no_cache: bool,
    **options: Any,
) -> None:
    """Compute metrics of a network snapshot against its data.

    Each result is one line of JSON on stdout, appended to metric-<name>.jsonl beside the snapshot, if that is a file
    here; a table follows on stderr.

    \b
    python calc_metrics.py --network=runs/00000-run/network-snapshot-000200.pkl --metrics=swd5k
    python calc_metrics.py --network=runs/00000-run --metrics=fid50k_full,kid50k_full --plot
    python calc_metrics.py --network=their-images.zip --data=data/mine.zip --metrics=fid10k_full
    """
    setup = read_detectors(detectors or (), protocol)
    if names is None:
        names, why = default_metrics(setup)
        click.echo(f"No --metrics given; {why}", err=True)
    names = tuple(resolve(names, setup))
    path = local_file(network)
    subjects = list_subjects(path)
    folder = None if is_url(network) else path if subjects and path not in subjects else path.parent
    if subjects is None and context.params["data"] is None:
        raise UserError(f"--network={network}: for images instead of a network, name the real ones with --data")
    if options["plot"]:
        check_plot(subjects, folder)
    if not names:
        click.echo("--metrics=none: nothing to compute", err=True)
        return
    for name in names if distributed.launched_rank() == 0 else ():  # one process fetches
        check_available(name, setup)

    device = distributed.choose_device(options["device"])
    distributed.check_processes(gpus, options["device"], device)
    given = {"data.path": options.pop("data"), "data.mirror": options.pop("mirror")}
    job = Job(
        network=path,
        folder=folder,
        changes={path: value for path, value in given.items() if value is not None},
        metric_names=names,
        setup=setup,
        use_cache=not no_cache,
        **options,
    )
    distributed.launch(run, gpus, job, device_type=device.type)


def list_subjects(network: Path) -> list[Path] | None:
    """Return the snapshots that --network stands for, oldest first; None when it is a set of images.

    Raises UserError for what is not there.
    """
    if not network.exists():
        raise UserError(f"--network={network}: no such file or folder")
    if network.suffix.lower() == ".zip":
        return None
    if network.is_file() or is_folder(network):
        return [network]
    return list_snapshots(network) or None


def check_plot(subjects: list[Path] | None, folder: Path | None) -> None:
    """Raise UserError when nothing can be drawn, or there is no place for it."""
    if subjects is None:
        raise UserError("--plot: images have no kimg to draw a metric against")
    if folder is None:
        raise UserError("--plot: draws beside the snapshot, which an address has no place for; fetch it to a folder")
    check_matplotlib()


def run(job: Job) -> None:
    """Compute a job's metrics; every process takes its share, the first one prints and records."""
    tune_allocator()
    device = distributed.use_device(job.device)
    operators = custom_ops.prepare(device)
    if distributed.is_main():
        for line in filter(None, [operators if device.type == "cuda" else None, SLOW_DECODER, uncounted_flips(job)]):
            click.echo(line, err=True)
    subjects = list_subjects(job.network)
    records, is_complete = [], True
    for record in measure_images(job, device) if subjects is None else measure_snapshots(job, subjects, device):
        if isinstance(record, UserError):
            is_complete = False
            if distributed.is_main():
                click.echo(f"Warning: {record}: left out", err=True)
            continue
        records.append(record)
        is_complete &= distributed.from_main(partial(show, record, job.folder))
    if distributed.is_main():
        click.echo(to_table(records), err=True)
        if job.plot and job.folder:
            plot(job.folder, {f"metric-{record['metric']}" for record in records})
    if not distributed.from_main(lambda: is_complete):
        raise SystemExit(1)


def show(record: dict[str, Any], folder: Path | None) -> bool:
    """Append a record to the file in a folder and print it; return whether it could be appended, if that was asked."""
    is_written = True
    try:
        if folder:
            append_result(folder, record)
    except WriteError as error:
        click.echo(f"Warning: {error}", err=True)
        is_written = False
    click.echo(to_line(record))
    for warning in record["warnings"]:
        click.echo(f"Warning: {record['metric']}: {warning}", err=True)
    return is_written


def uncounted_flips(job: Job) -> str | None:
    """Return a line that names the metrics to which --mirror means nothing; None without either."""
    if not job.changes.get("data.mirror"):
        return None
    names = [name for name in job.metric_names if not find(name, job.setup)[0].counts_flips]
    return f"--mirror: flips are not counted in {', '.join(names)}, by protocol" if names else None


def plot(folder: Path, names: set[str]) -> None:
    """Draw the charts metric-<name>.png of what a folder now holds, earlier results that compare with these too."""
    for chart in find_charts([read_run(folder, folder.name)]):
        if chart.name in names:
            path = folder / f"{chart.name}.png"
            write_atomically(path, draw_png(chart))
            click.echo(f"Drawn: {path}", err=True)


def measure_snapshots(job: Job, paths: list[Path], device: torch.device) -> Iterator[dict[str, Any] | UserError]:
    """Yield a record for each snapshot and metric, or why a snapshot of several cannot be read.

    The statistics of the reals serve all snapshots of a run.
    """
    context: MetricContext | None = None
    data = None
    for path in paths:
        try:
            snapshot = load_network(path, device)
        except UserError as error:
            if len(paths) == 1:
                raise
            yield error
            continue
        for note in snapshot.notes():
            click.echo(note, err=True)
        snapshot.require_generator("metrics are computed of")
        config = snapshot_config(job, snapshot)
        execution.set_gpu_arithmetic(allow_tf32=config.allow_tf32)  # as in training
        if context is None or config.data != data:
            data = config.data
            context = build_context(job, device, open_reals(job, path, data), G=snapshot.G_ema)
        else:
            context = with_network(context, snapshot.G_ema)
        for result in compute_all(job.metric_names, context):
            yield result_to_json(result, context, snapshot=path, kimg=snapshot.kimg, data=config.data.path)


def open_reals(job: Job, snapshot: Path, data: DatasetConfig) -> ImageDataset:
    """Open the real images. Raises UserError, which says where a path came from that the user did not give."""
    try:
        return ImageDataset(data)
    except UserError as error:
        if "data.path" in job.changes:
            raise
        raise UserError(f"{error} (what {snapshot} was trained with): name the real images with --data") from None


def snapshot_config(job: Job, snapshot: Snapshot) -> Any:
    """Return a snapshot's configuration with the user's changes, and all reals even if it was trained on a subset."""
    return override(snapshot.config, {"data.max_images": None, "data.holdout": 0} | job.changes)


def measure_images(job: Job, device: torch.device) -> Iterator[dict[str, Any] | UserError]:
    """Yield a record for each metric of a set of images."""
    data = DatasetConfig(path=job.changes["data.path"], mirror=job.changes.get("data.mirror", False))
    reals, fakes = (with_labels(config) for config in (data, DatasetConfig(path=str(job.network))))
    context = build_context(job, device, reals, fakes=fakes)
    for result in compute_all(job.metric_names, context):
        yield result_to_json(result, context, snapshot=job.network, kimg=None, data=data.path)


def with_labels(config: DatasetConfig) -> ImageDataset:
    """Open a data set with its labels, if it has any."""
    dataset = ImageDataset(config)
    return ImageDataset(replace(config, use_labels=True)) if dataset.has_labels else dataset


def build_context(job: Job, device: torch.device, reals: ImageDataset, **generated: Any) -> MetricContext:
    """Return what the metrics see of a job; `generated` is G or the fakes. Prints notes on sets of images."""
    for dataset in (reals, generated.get("fakes")):
        for note in dataset.notes if dataset and distributed.is_main() else ():
            click.echo(f"Note: {note}", err=True)
    return MetricContext(
        **generated,
        images=reals.with_mirror(False),
        mirrored=reals if reals.config.mirror else None,
        device=device,
        batch_size=job.batch_size,
        detector_batch=job.detector_batch,
        seed=job.seed,
        truncation_psi=job.truncation_psi,
        noise_mode=job.noise_mode,
        setup=job.setup,
        cache=cache_dir() / "statistics" if job.use_cache else None,
        progress=ProgressLine() if job.verbose else silent,
    )


if __name__ == "__main__":
    main()
