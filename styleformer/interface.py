"""Functions of the package `styleformer`; see styleformer/__init__.py for an example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import calc_metrics
from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError
from exploration.model import check_seeds
from exploration.opening import choose_label, execution_of, open_network
from exploration.seed_images import seed_images
from metrics.detectors import read_detectors
from metrics.registry import resolve
from torch_utils import custom_ops, distributed
from training import startup
from training.dataset import ImageFolderDataset as Dataset
from training.networks import execution
from training.resume import RunRequest
from training.snapshots import reading
from training.snapshots.snapshot import Snapshot

__all__ = ["Dataset", "compute_metric", "generate", "load_network", "train"]

NoiseMode = Literal["const", "random", "none"]


def load_network(network: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot: `styleformer snapshot info` shows the same file.

    `network` is network-snapshot-*.pkl, a snapshot of another code base of the family, a folder of safetensors, the
    folder of a run (its newest snapshot), or an http(s) address. No code in the file is run.

    The result has the networks `G`, `D` and `G_ema`, in evaluation mode on `device` (None for a network that the file
    does not hold), and the configuration `config` that they were trained with. The averaged generator is called as

        img = snapshot.G_ema(z, c, truncation_psi=0.7)   # z [N, z_dim], c [N, c_dim] -> [N, C, H, W] in about [-1, 1]

    Raises UserError with the name of the file if it is missing, corrupt, of an unknown kind, or not finite.
    """
    return reading.load_network(network, device)


def generate(
    network: Snapshot | str | Path,
    seeds: Iterable[int],
    *,
    truncation_psi: float = 1.0,
    class_index: int | None = None,
    label: Sequence[float] | None = None,
    noise_mode: NoiseMode = "const",
    batch: int = 16,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str | None = None,
) -> Tensor:
    """Return the images of seeds as uint8 [N, C, H, W], on the CPU: those of `styleformer generate images`.

    An image is a function of its seed, whatever `batch` is. `network` is a result of `load_network`, which stays on its
    device, or anything that `load_network` reads; such a file goes to `device`: "cpu", "cuda" or "cuda:N", by default a
    GPU if there is one. A conditional network needs `class_index`, or `label` with c_dim numbers if its labels are
    vectors. The function turns TF32 off for the whole process, so that images do not depend on it.

    Raises UserError for a file that cannot be read, a seed outside of 0 ... 2**32 - 1, and a label that does not fit.
    """
    seeds = tuple(seeds)
    if not seeds or min(seeds) < 0:
        raise UserError(f"seeds={seeds}: give one or more whole numbers from 0")
    check_seeds("seeds", seeds)
    if batch < 1:
        raise UserError(f"batch={batch}: give a number of images, at least 1")
    if isinstance(network, Snapshot):
        if device is not None:
            raise UserError(f"device={device}: the network is loaded; give the device to load_network")
        snapshot = network
        snapshot.require_generator("images are made by")
        execution.set_gpu_arithmetic()
    else:
        snapshot, _ = open_network(network, device)
    G = snapshot.G_ema
    vector = None if label is None else tuple(label)
    c = choose_label(snapshot, class_index, vector, "class_index").to(next(G.parameters()).device)
    parts = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    with torch.no_grad(), execution.using(execution_of(snapshot, precision)):
        return torch.cat([seed_images(G, part, c, truncation_psi, noise_mode).cpu() for part in parts])


def compute_metric(
    network: str | Path,
    metric: str,
    data: str | Path | None = None,
    *,
    mirror: bool | None = None,
    detectors: Sequence[str] = (),
    protocol: Literal["stylegan", "clean"] = "stylegan",
    truncation_psi: float = 1.0,
    noise_mode: NoiseMode = "const",
    seed: int = 0,
    batch: int = 64,
    device: str | None = None,
    use_cache: bool = True,
    verbose: bool = False,
) -> dict[str, Any]:
    """Return one metric of a network, such as "fid50k_full" or "swd5k": the record that `styleformer metrics` prints.

    The values are in record["results"], by name; the other keys state what they depend on (docs/metrics.md). Nothing
    is written beside the network. This process computes alone; `styleformer metrics --gpus=N` shares the work.

    `network` is what `load_network` reads, or a zip file or folder of generated images, which needs `data`. `data` is
    the zip file or folder of real images, by default the training images. `mirror` counts their flips in the metrics
    that count flips, by default as in training. `detectors` and `protocol` are the options of these names. `batch` is
    the number of images that are generated at a time.

    Raises UserError for an unknown metric, a detector that cannot be had, and files that cannot be used.
    """
    setup = read_detectors(tuple(detectors), protocol)
    if not (names := tuple(resolve([metric], setup))):
        raise UserError("metric='': name a metric, e.g. fid50k_full or swd5k")
    path = reading.local_file(network)
    subjects = calc_metrics.list_subjects(path)
    if subjects is None and data is None:
        raise UserError(f"{network}: for images instead of a network, give the real ones as `data`")
    tune_allocator()
    where = distributed.use_device(device)
    custom_ops.prepare(where)
    fields = {"data.path": None if data is None else str(data), "data.mirror": mirror}
    job = calc_metrics.Job(
        network=path,
        folder=None,
        changes={field: value for field, value in fields.items() if value is not None},
        metric_names=names,
        setup=setup,
        device=device,
        batch_size=batch,
        detector_batch=64,
        seed=seed,
        truncation_psi=truncation_psi,
        noise_mode=noise_mode,
        use_cache=use_cache,
        plot=False,
        verbose=verbose,
    )
    measure = calc_metrics.measure_images if subjects is None else partial(_measure_newest, subjects)
    return _raise_errors(next(iter(measure(job, where))))


def _measure_newest(subjects: list[Path], job: calc_metrics.Job, device: torch.device) -> Any:
    return calc_metrics.measure_snapshots(job, subjects[-1:], device)


def _raise_errors(record: dict[str, Any] | UserError) -> dict[str, Any]:
    if isinstance(record, UserError):
        raise record
    return record


def train(
    outdir: str | Path,
    data: str | Path | None = None,
    *,
    preset: str | None = None,
    resume: str | Path | None = None,
    override: bool = False,
    dry_run: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Train, as `styleformer train` does: the run gets a numbered folder of its own in `outdir`.

    `preset` is --cfg, `resume`, `override` and `dry_run` are the options of these names. `settings` are fields of the
    configuration, by the paths in docs/configuration.md, and their values: numbers, truth values, sequences, or the
    texts that --set takes.

        styleformer.train("runs", "data/mine.zip", preset="tiny", settings={"run.total_kimg": 1, "run.metrics": "swd"})

    With "run.num_gpus" above 1, processes are started that import the calling script: it needs
    `if __name__ == "__main__":` around its calls. Returns when the training has ended, or raises SystemExit after a
    signal that stops it. Raises UserError for settings or data that cannot be used, before anything is written.
    """
    texts = {path: _text(path, value) for path, value in (settings or {}).items()}
    if data is not None:
        texts["data.path"] = str(data)
    request = RunRequest(
        outdir=Path(outdir),
        resume=None if resume is None else str(resume),
        override=override,
        preset=preset,
        texts=texts,
    )
    startup.train(request, dry_run=dry_run)


def _text(path: str, value: Any) -> str:
    """Return a value as --set takes it."""
    if value is None:
        raise UserError(f"{path}=None: give the text that --set takes, 'none' or 'auto', or leave the field out")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value)
