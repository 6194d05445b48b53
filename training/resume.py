"""Choice of a run's start from the command line: a new run, or the run given by --resume.

There is one rule: a run continues with its saved configuration plus the options given on the command line. Options may
change the part `run` (duration, machine, logging). All other changes are listed, and refused without --override.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dnnlib.config import OPTIONS_FILE, ConfigError, UserError, differences, override, to_json
from dnnlib.config_text import parse_texts
from dnnlib.download import is_url
from dnnlib.util import read_json
from torch_utils import distributed
from torch_utils.checkpoint import Checkpoint
from training.config import (
    PRESETS,
    TRANSFER_LEARNING,
    Environment,
    RunConfig,
    TrainConfig,
    apply_options,
    fitting_size,
    read_config,
    resolve,
)
from training.dataset import DatasetConfig, ImageDataset
from training.run_folder import list_runs, list_states
from training.snapshots.exchange import is_folder

# Datasets of the pretrained networks that StyleGAN2-ADA's --resume accepts by name.
PUBLISHED = {
    "ffhq256": "FFHQ at 256x256",
    "ffhq512": "FFHQ at 512x512",
    "ffhq1024": "FFHQ at 1024x1024",
    "celebahq256": "CelebA-HQ at 256x256",
    "lsundog256": "LSUN Dog at 256x256",
}


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """Command line: `texts` are the values given for fields, {config path: text}; `preset` is None if not given.

    `transfer_options` returns the options, {path: value}, that transfer learning from a snapshot implies.
    """

    outdir: Path | None
    resume: str | None = None
    override: bool = False  # allow options that change the results of a resumed run
    preset: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    transfer_options: Callable[[str], Mapping[str, Any]] = lambda path: {}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start of a run: its resolved configuration, and the run to continue or the file to load."""

    config: TrainConfig
    outdir: Path | None
    run_dir: Path | None = None
    state: Path | None = None
    snapshot: str | None = None  # a path or URL
    needs_batch_gpu: bool = False  # auto_batch.py must choose the micro-batch


def names_snapshot(resume: str | None) -> bool:
    """Return whether --resume names a snapshot: a URL, or a file or folder other than a training state."""
    if resume is None or is_url(resume):
        return resume is not None
    path = Path(resume)
    return is_folder(path) or (path.is_file() and path.suffix != ".pt")


def choose_start(request: RunRequest) -> Start:
    """Decide how the run starts. Raises UserError for invalid options, data or --resume.

    Locks nothing and writes no files.
    """
    if request.override and (request.resume is None or names_snapshot(request.resume)):
        raise UserError("--override: applies to resumed runs only; give --resume=latest or its folder")
    if request.resume is None or names_snapshot(request.resume):
        return _new_run(request)
    if request.resume == "latest":
        return _latest(request) or _new_run(replace(request, resume=None))
    path = Path(request.resume)
    if path.is_file():
        return _continue(request, path, _config_in(path))
    if not path.is_dir():
        raise UserError(f"--resume={path}: {_explain_missing(request.resume)}")
    if not list_states(path):
        hint = f"; to resume the newest of its runs: --outdir={path} --resume=latest" if list_runs(path) else ""
        raise UserError(f"--resume={path}: this folder contains no training state (training-state-*.pt){hint}")
    return _continue(request, path, saved_config(path))


def _new_run(request: RunRequest) -> Start:
    preset = PRESETS[request.preset or "auto"]
    if request.resume is not None:
        preset = override(preset, {**TRANSFER_LEARNING, **request.transfer_options(request.resume)})
    config = complete(apply_options(preset, parse_texts(preset, request.texts)))
    return Start(
        config=config,
        outdir=_outdir(request),
        snapshot=request.resume,
        needs_batch_gpu=_needs_batch_gpu(request, config),
    )


def _outdir(request: RunRequest) -> Path:
    if request.outdir is None:
        raise UserError("missing option --outdir: give the folder in which to create the run's folder")
    return request.outdir


def _latest(request: RunRequest) -> Start | None:
    """Return the start from the newest run that fits the options, or None; warn if the options contradict all runs."""
    outdir = _outdir(request)
    newest: tuple[Path, TrainConfig] | None = None
    for run_dir, saved in _readable_runs(outdir):
        newest = newest or (run_dir, saved)
        if not _changes(request, saved):
            return _continue(request, run_dir, saved)
    if newest is None:
        return None
    if request.override:
        return _continue(request, *newest)
    print(
        f"Warning: --resume=latest: the options contradict every run in {outdir}, so a new run starts. --override "
        f"resumes {newest[0]} and changes\n  {_list(_changes(request, newest[1]))}",
        file=sys.stderr,
    )
    return None


def _readable_runs(outdir: Path) -> Iterator[tuple[Path, TrainConfig]]:
    """Yield the runs with a training state, newest first, and their configurations; warn about unreadable runs."""
    for run_dir in reversed(list_runs(outdir)):
        if list_states(run_dir):
            try:
                yield run_dir, saved_config(run_dir)
            except UserError as error:
                print(f"Warning: {error}", file=sys.stderr)


def _continue(request: RunRequest, path: Path, saved: TrainConfig) -> Start:
    """Return the start from a run's folder or a training state with the configuration `saved`.

    Raises UserError if options change anything outside `run` and --override is not given.
    """
    config = _merge(request, saved)
    _check_profiles(path, saved.ema.profiles, config.ema.profiles)
    if changes := _differences(saved, config):
        if not request.override:
            raise UserError(
                f"--resume={path}: these options contradict that run; leave them out, or give --override:\n"
                f"  {_list(changes)}"
            )
        print(f"--override: resuming {path} and changing\n  {_list(changes)}", file=sys.stderr)
    if path.is_dir():
        return Start(
            config=config, outdir=request.outdir, run_dir=path, needs_batch_gpu=_needs_batch_gpu(request, config, saved)
        )
    return Start(config=config, outdir=_outdir(request), state=path, needs_batch_gpu=_needs_batch_gpu(request, config))


def _check_profiles(path: Path, saved: Sequence[float], chosen: Sequence[float]) -> None:
    """Raise UserError for a power-function average that a run did not track from its first image."""
    if added := [f"{sigma:g}" for sigma in chosen if sigma not in saved]:
        tracked = ",".join(f"{sigma:g}" for sigma in saved) or "none"
        raise UserError(
            f"--resume={path}: ema.profiles={','.join(added)}: the averages of a run begin at its first image, so a "
            f"resumed run cannot add lengths: give --set ema.profiles={tracked}, or start a new run"
        )


def _changes(request: RunRequest, saved: TrainConfig) -> list[str]:
    """Return a line for each field outside `run` that the options change, or the error for invalid options."""
    try:
        return _differences(saved, _merge(request, saved))
    except ConfigError as error:
        return [str(error)]


def _differences(saved: TrainConfig, config: TrainConfig) -> list[str]:
    lines = differences(to_json(saved), to_json(config))
    return [line for line in lines if not line.startswith(("run.", "origin."))]


def _list(changes: Sequence[str]) -> str:
    return "\n  ".join(changes)


def _merge(request: RunRequest, saved: TrainConfig) -> TrainConfig:
    """Return a saved configuration with the options of the command line, resolved for this machine."""
    base = saved
    if request.preset not in (None, saved.preset):
        base = replace(PRESETS[request.preset or ""], data=saved.data, origin=saved.origin, run=saved.run)
    config = apply_options(base, parse_texts(base, request.texts))
    if config.data != saved.data and not request.override:  # will be refused, so do not open the dataset
        return config
    return complete(replace(config, run=_fit_run(config, saved, request)))


def _fit_run(config: TrainConfig, saved: TrainConfig, request: RunRequest) -> RunConfig:
    """Reset values chosen for another machine: CUDA graphs on a CPU, a micro-batch for another number of processes."""
    run = config.run
    if run.graphs and "run.graphs" not in request.texts and not is_on_gpu(config):
        run = replace(run, graphs=None)
    is_given = "run.batch_gpu" in request.texts or "batch_size" in request.texts
    if run.batch_gpu == saved.run.batch_gpu and isinstance(run.batch_gpu, int) and not is_given:
        share = -(-(config.batch_size or run.batch_gpu) // run.num_gpus)
        if share % run.batch_gpu:
            run = replace(run, batch_gpu=None)
    if request.texts.get("run.batch_gpu") == "auto" and run.num_gpus == saved.run.num_gpus:
        run = replace(run, batch_gpu=saved.run.batch_gpu)  # found by an earlier search
    return run


def _needs_batch_gpu(request: RunRequest, config: TrainConfig, saved: TrainConfig | None = None) -> bool:
    """Return whether --batch-gpu=auto needs a search; on the same number of GPUs, a resumed run reuses the result."""
    is_found = saved is not None and config.run.num_gpus == saved.run.num_gpus
    return is_on_gpu(config) and request.texts.get("run.batch_gpu") == "auto" and not is_found


def complete(config: TrainConfig) -> TrainConfig:
    """Resolve a configuration for its dataset and this machine. Raises UserError if they do not fit together."""
    if not config.data.path:
        raise UserError("missing option --data: give a zip file or folder of images, made by dataset_tool.py")
    dataset = open_dataset(config.data)
    dataset.check_shapes(partial(fitting_size, config))
    env = Environment(
        img_shape=dataset.img_shape,
        c_dim=dataset.c_dim,
        is_raw=dataset.is_raw,
        on_gpu=is_on_gpu(config),
        has_bf16=distributed.has_bf16(distributed.choose_device(config.run.device)),
    )
    return resolve(config, env)


def is_on_gpu(config: TrainConfig) -> bool:
    """Return whether a run of this configuration uses a GPU. Raises UserError for an unavailable device."""
    return distributed.choose_device(config.run.device).type == "cuda"


@functools.lru_cache(maxsize=1)
def open_dataset(config: DatasetConfig) -> ImageDataset:
    """Open the images of a configuration; the last dataset is cached."""
    return ImageDataset(config)


def saved_config(run_dir: Path) -> TrainConfig:
    """Read the configuration in a run's folder. Raises UserError."""
    path = run_dir / OPTIONS_FILE
    try:
        return read_config(read_json(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _config_in(state: Path) -> TrainConfig:
    """Read the configuration in a training state."""
    try:
        return read_config(Checkpoint.read(state).get("config"))
    except ConfigError as error:
        raise UserError(f"{state}: its configuration cannot be read ({error})") from None


def _explain_missing(name: str) -> str:
    """Return why a --resume value that is not a file or folder is refused, with a hint for StyleGAN2-ADA's values."""
    if name == "noresume":
        return "trains from random weights in StyleGAN2-ADA; omit --resume for that"
    if name in PUBLISHED:
        return (
            f"the network that StyleGAN2-ADA published for {PUBLISHED[name]}, under a non-commercial licence; it is "
            "not part of this project: download the file and give its path, or give its URL, as --resume=PATH|URL"
        )
    return "not `latest`, a run's folder, a training state or a snapshot"
