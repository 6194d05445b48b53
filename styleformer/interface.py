"""Functions of the `styleformer` package; see styleformer/__init__.py for an example."""

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
from torch_utils import distributed, kernels
from training import startup
from training.dataset import ImageFolderDataset as Dataset
from training.networks import execution
from training.resume import RunRequest
from training.snapshots import post_hoc, reading
from training.snapshots.snapshot import Snapshot

__all__ = ["Dataset", "compute_metric", "generate", "load_network", "train"]

NoiseMode = Literal["const", "random", "none"]


def load_network(network: str | Path, device: torch.device | str = "cpu", *, ema: float | None = None) -> Snapshot:
    """Read a snapshot. `styleformer snapshot info` prints a description of the same file.

    `network` is network-snapshot-*.pkl, a snapshot of a related code base, a safetensors folder, a run folder (selects
    the newest snapshot), or an http(s) URL. No code in the file is run.

    The result has the networks `G`, `D` and `G_ema`, in evaluation mode on `device` (None for a network missing in the
    file), and the training configuration `config`. Call the averaged generator as

        img = snapshot.G_ema(z, c, truncation_psi=0.7)   # z [N, z_dim], c [N, c_dim] -> [N, C, H, W] in about [-1, 1]

    `ema` is the length of the moving average of `G_ema`, e.g. 0.1, rebuilt from the files of the run (docs/ema.md); by
    default `G_ema` is the average in the snapshot.

    Raises UserError, with the path, for a file that is missing, corrupt, of unknown format, or has non-finite weights,
    and for a length that cannot be rebuilt.
    """
    snapshot = reading.load_network(network, device)
    if ema is None:
        return snapshot
    snapshot.require_generator("is needed for `ema`")
    return post_hoc.rebuild(snapshot, [post_hoc.plan(snapshot, ema)])[0]


def generate(
    network: Snapshot | str | Path,
    seeds: Iterable[int],
    *,
    ema: float | None = None,
    truncation_psi: float = 1.0,
    class_index: int | None = None,
    label: Sequence[float] | None = None,
    noise_mode: NoiseMode = "const",
    batch: int = 16,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str | None = None,
) -> Tensor:
    """Generate images from seeds like `styleformer generate images`; return uint8 [N, C, H, W] on the CPU.

    An image depends on its seed, not on `batch`. `network` is a snapshot from `load_network`, used on its device, or an
    argument of `load_network`, loaded to `device`: "cpu", "cuda" or "cuda:N", by default a GPU if there is one, with
    `ema` as in `load_network`, reported on stderr.
    A conditional network requires `class_index`, or, if its labels are vectors, `label` with c_dim numbers. TF32, which
    would change the images, is turned off for the whole process.

    Raises UserError for an unreadable file, a seed outside of 0 ... 2**32 - 1, and an invalid label.
    """
    seeds = tuple(seeds)
    if not seeds or min(seeds) < 0:
        raise UserError(f"seeds={seeds}: specify at least one seed, none below 0")
    check_seeds("seeds", seeds)
    if batch < 1:
        raise UserError(f"batch={batch}: must be at least 1")
    if isinstance(network, Snapshot):
        for name, value in {"device": device, "ema": ema}.items():
            if value is not None:
                raise UserError(f"{name}={value}: the network is already loaded; pass {name} to load_network")
        snapshot = network
        snapshot.require_generator("is needed to generate images")
        execution.set_gpu_arithmetic()
    else:
        snapshot, _ = open_network(network, device, ema)
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
    holdout: str | Path | None = None,
    ema: float | None = None,
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
    """Compute a metric such as "fid50k_full" or "swd5k"; return the record that `styleformer metrics` prints.

    record["results"] maps names to values; the other keys state the conditions of the measurement (docs/metrics.md).
    The snapshot's folder is not modified. Only this process computes; `styleformer metrics --gpus=N` starts several.

    `network` is an argument of `load_network`, or a zip file or folder of generated images, which requires `data`.
    `data` is the zip file or folder of real images, by default the training dataset. `mirror` includes flipped real
    images in the metrics that count flips, by default as in training. `holdout`, `detectors` and `protocol` are as on
    the command line. `batch` is the batch size of the generator. `ema` is as in `load_network`; names of values then
    end in it: "swd5k_ema0.1".

    Raises UserError for an unknown metric, an unavailable detector, and unusable files.
    """
    setup = read_detectors(tuple(detectors), protocol)
    if not (names := tuple(resolve([metric], setup))):
        raise UserError("metric='': specify a metric, e.g. fid50k_full or swd5k")
    path = reading.local_file(network)
    subjects = _list_subjects(path, data, ema, holdout)
    tune_allocator()
    where = distributed.use_device(device)
    kernels.prepare(where)
    fields = {"data.path": None if data is None else str(data), "data.mirror": mirror}
    job = calc_metrics.Job(
        network=path,
        folder=None,
        changes={field: value for field, value in fields.items() if value is not None},
        holdout=None if holdout is None else str(holdout),
        metric_names=names,
        ema=() if ema is None else (ema,),
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


def _list_subjects(
    path: Path, data: str | Path | None, ema: float | None, holdout: str | Path | None
) -> list[Path] | None:
    """Return the snapshots, or None for a set of images, which needs `data`, and for which `ema` cannot be used.

    Raises UserError for arguments that do not fit.
    """
    subjects = calc_metrics.list_subjects(path)
    if subjects is None and data is None:
        raise UserError(f"{path}: is a set of images: specify the real images with `data`")
    calc_metrics.check_lengths(subjects, ema is not None)
    calc_metrics.check_holdout(subjects, holdout)
    return subjects


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
    """Train like `styleformer train`; a new run creates a numbered folder in `outdir`.

    `preset` is --cfg; `resume`, `override` and `dry_run` correspond to the options. `settings` maps the paths of config
    fields (docs/configuration.md) to values: numbers, booleans, sequences, or text as for --set.

        styleformer.train("runs", "data/mine.zip", preset="tiny", settings={"run.total_kimg": 1, "run.metrics": "swd"})

    With "run.num_gpus" above 1, worker processes import the calling script, which must therefore protect its calls with
    `if __name__ == "__main__":`. Returns at the end of training; a stop signal raises SystemExit. Raises UserError for
    unusable settings or data before anything is written.
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
    """Return a value as text for --set."""
    if value is None:
        raise UserError(f"{path}=None: specify 'none' or 'auto', as for --set, or omit the field")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value)
