"""The folder of a run: what a run starts from, its name, and which training state it goes on from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dnnlib.config import ConfigError, UserError, differences, override, to_json
from dnnlib.download import is_url
from dnnlib.util import write_atomically
from torch_utils import distributed
from torch_utils.checkpoint import Checkpoint
from training.config import PRESETS, Circumstances, TrainConfig, read_config, resolve, same_training
from training.dataset import ImageDataset
from training.snapshot import Snapshot
from training.training_loop import Trainer
from training.transfer import Origin, check_frozen, copy_weights


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for: --outdir, --resume, and the options, not yet resolved, over either base."""

    outdir: Path
    resume: str | None
    override: bool = False  # go on with a run that was started with other options
    plain: TrainConfig  # the options over the preset
    transfer: TrainConfig  # the options over the preset as transfer learning changes it
    about: Circumstances

    @property
    def config(self) -> TrainConfig:
        """The configuration of a new run."""
        return self.transfer if _is_snapshot(self.resume) else self.plain


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run begins: its configuration, and the run that it goes on with or the snapshot that it starts from."""

    config: TrainConfig
    run_dir: Path | None = None
    snapshot: str | None = None


def choose_start(request: Request) -> Start:
    """Decide between going on, transferring and starting afresh. Raises UserError for a --resume that is nothing."""
    new = Start(config=resolve(request.config, request.about))
    if request.override and (request.resume is None or _is_snapshot(request.resume)):
        raise UserError("--override: changes the options of a run that goes on; give --resume=latest or its folder")
    if request.resume is None:
        return new
    if request.resume == "latest":
        return _choose_latest(request) or new
    if _is_snapshot(request.resume):
        return replace(new, snapshot=request.resume)
    path = Path(request.resume)
    if not path.is_dir():
        raise UserError(f"--resume={path}: neither `latest` nor a run's folder nor a snapshot file")
    if not list_states(path):
        raise UserError(f"--resume={path}: this folder holds no training state (training-state-*.pt)")
    start = _continue(path, request, adopt=True)
    if start is None and not request.override:
        raise UserError(
            f"--resume={path}: that run was started with other options; give the same ones, or --override:\n"
            f"  {_list_changes(path, request)}"
        )
    return start or _override(path, request)


def _is_snapshot(resume: str | None) -> bool:
    """Whether --resume names a snapshot to start from, here or on the web."""
    return resume is not None and (is_url(resume) or Path(resume).is_file())


def _choose_latest(request: Request) -> Start | None:
    """How to go on with the newest run that has a state and the requested options, None when there is none."""
    with_states = [run_dir for run_dir in reversed(_list_runs(request.outdir)) if list_states(run_dir)]
    continued = (_continue(run_dir, request, adopt) for adopt in (False, True) for run_dir in with_states)
    start = next((start for start in continued if start), None)
    newest = next((run_dir for run_dir in with_states if _is_readable(run_dir)), None)
    if start or newest is None:
        return start
    if request.override:
        return _override(newest, request)
    print(
        f"Warning: --resume=latest: no run in {request.outdir} has these options, so a new one starts. "
        f"--override goes on with {newest} and changes\n  {_list_changes(newest, request)}",
        file=sys.stderr,
    )
    return None


def _override(run_dir: Path, request: Request) -> Start:
    """Go on with a run under the requested options, whatever it was started with."""
    print(f"--override: going on with {run_dir} and changing\n  {_list_changes(run_dir, request)}", file=sys.stderr)
    config = replace(resolve(request.plain, request.about), origin=_saved_config(run_dir).origin)
    return Start(config=config, run_dir=run_dir)


def _list_changes(run_dir: Path, request: Request) -> str:
    """The options in which a request differs from a saved run, one per line."""
    saved = _saved_config(run_dir)
    variants = [differences(to_json(saved), to_json(config)) for config in _requested_there(saved, request, adopt=True)]
    changed = [line for line in min(variants, key=len, default=[]) if not line.startswith(("run.", "origin."))]
    return "\n  ".join(changed or ["nothing that computes"])


def _continue(run_dir: Path, request: Request, adopt: bool) -> Start | None:
    """How to go on with a run, None when it has no state or computes something else than what is requested.

    `adopt` as in `_requested_there`.
    """
    if not list_states(run_dir):
        return None
    try:
        saved = _saved_config(run_dir)
    except UserError as error:
        print(f"Warning: {error}", file=sys.stderr)
        return None
    if not any(same_training(saved, config) for config in _requested_there(saved, request, adopt)):
        return None
    return Start(config=resolve(replace(saved, run=request.plain.run), request.about), run_dir=run_dir)


def _requested_there(saved: TrainConfig, request: Request, adopt: bool) -> Iterator[TrainConfig]:
    """What the request comes to with the processes of a saved run, as plain training and as transfer learning.

    With `adopt`, a precision that was not asked for becomes the run's, if another machine could have chosen it.
    """
    there: dict[str, Any] = {"run.num_gpus": saved.run.num_gpus, "run.batch_gpu": saved.run.batch_gpu}
    if adopt and request.plain.precision is None and saved.precision in ("fp32", "bf16"):
        there["precision"] = saved.precision
        if request.plain.channels_last is None:
            there["channels_last"] = saved.channels_last
    for config in (request.plain, request.transfer):
        try:
            yield resolve(override(config, there), request.about)
        except ConfigError:  # it cannot run there, so it is not what ran there
            continue


def _list_runs(outdir: Path) -> list[Path]:
    """The numbered run folders in `outdir`, oldest first."""
    return sorted(path for path in outdir.glob("[0-9]*-*") if re.match(r"\d{5,}-", path.name) and path.is_dir())


def _saved_config(run_dir: Path) -> TrainConfig:
    path = run_dir / "training_options.json"
    try:
        return read_config(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, ConfigError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _is_readable(run_dir: Path) -> bool:
    try:
        _saved_config(run_dir)
    except UserError:
        return False
    return True


def create(start: Start, outdir: Path, dataset: ImageDataset) -> Path:
    """Return the run's folder with the resolved options in it; make it if it is new."""
    try:
        run_dir = start.run_dir or _make_run_dir(outdir, start.config, dataset)
        write_atomically(run_dir / "training_options.json", json.dumps(to_json(start.config), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--outdir={outdir}: cannot be written ({error.strerror})") from None
    return run_dir


def _make_run_dir(outdir: Path, config: TrainConfig, dataset: ImageDataset) -> Path:
    """outdir/00003-<data>-<what>: the next free number, and what the run is in short."""
    words = [re.sub(r"[^\w.]+", "_", dataset.name), config.preset]
    words += ["cond"] if config.data.use_labels else []
    words += ["mirror"] if config.data.mirror else []
    words += [to_json(config)["generator"]["family"]] if _has_other_generator(config) else []
    words += config.generator.folder_words
    words += [f"gpus{config.run.num_gpus}", f"batch{config.batch_size}"]
    number = max((int(path.name.split("-")[0]) for path in _list_runs(outdir)), default=-1) + 1
    run_dir = outdir / f"{number:05d}-{'-'.join(words)}"
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        if not run_dir.is_dir():
            raise
        return _make_run_dir(outdir, config, dataset)  # another run took the number in this moment
    return run_dir


def _has_other_generator(config: TrainConfig) -> bool:
    """Whether the family of the generator is not the preset's."""
    return config.preset in PRESETS and type(PRESETS[config.preset].generator) is not type(config.generator)


def load(trainer: Trainer, start: Start, load_network: Callable[[str], Snapshot]) -> str:
    """Give the trainer the state that the run starts from, and its configuration where that is; return what was done.

    Raises UserError when that is damaged or does not fit.
    """
    if start.run_dir:
        path = load_latest(trainer, start.run_dir)
        return f"Resuming from {path} at kimg {trainer.state.nimg / 1000:g}"
    if start.snapshot:
        return _transfer(trainer, start.snapshot, load_network(start.snapshot))
    return "Starting from random weights"


def _transfer(trainer: Trainer, name: str, snapshot: Snapshot) -> str:
    """Copy the weights of a snapshot, as far as they fit."""
    if snapshot.G is None or snapshot.D is None:
        raise UserError(f"--resume={name}: holds no G or no D, as it was written for generation only")
    copied = {
        "G": copy_weights(snapshot.G, trainer.G, "G"),
        "D": copy_weights(snapshot.D, trainer.D, "D"),
        "G_ema": copy_weights(snapshot.G_ema, trainer.ema.module, "G_ema"),
    }
    check_frozen(trainer.D, trainer.config.freeze_layers, copied["D"])
    origin = Origin(
        source=name,
        kimg=snapshot.kimg,
        copied_g=copied["G"].share,
        copied_d=copied["D"].share,
        copied_g_ema=copied["G_ema"].share,
        partial=tuple(f"{net}: {place}" for net in ("G", "D") for place in copied[net].partial),
        new=tuple(f"{net}: {place}" for net in ("G", "D") for place in copied[net].new),
    )
    trainer.config = replace(trainer.config, origin=origin)
    lines = [f"Starting from {name} (kimg {snapshot.kimg:g}):"]
    lines += [line for net, what in copied.items() for line in what.describe(net)]
    return "\n  ".join(lines)


def list_states(run_dir: Path) -> list[Path]:
    """Return a run's training states, oldest first."""
    return sorted(run_dir.glob("training-state-*.pt"))


def load_latest(trainer: Trainer, run_dir: Path) -> Path:
    """Resume from the newest training state that is whole. Raises UserError when none is."""
    chosen = distributed.from_main(lambda: _newest_whole_state(run_dir))
    same_data = trainer.resume(chosen)
    trainer.last_snapshot = max(run_dir.glob("network-snapshot-*.pkl"), default=None)
    if distributed.is_main():
        if not same_data:
            print(f"Warning: {trainer.config.data.path} has changed since this run was stopped", file=sys.stderr)
        _remove_leftovers(run_dir)
        for log in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
            _cut_log(log, trainer.state.nimg / 1000)
    return chosen


def _newest_whole_state(run_dir: Path) -> Path:
    for path in reversed(list_states(run_dir)):
        try:
            Checkpoint.read(path)
            return path
        except UserError as error:
            print(f"Warning: {error}", file=sys.stderr)
    raise UserError(f"{run_dir}: holds no whole training state to resume from")


def _remove_leftovers(run_dir: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    for path in run_dir.iterdir():
        if re.fullmatch(r"\..+\.\d+", path.name):
            path.unlink(missing_ok=True)


def _cut_log(path: Path, kimg: float) -> None:
    """Drop the lines of a log that lie beyond the training state that a run goes on from, and a last one cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        age = entry.get("Progress/kimg", entry.get("kimg"))
        if age is None or age <= kimg:  # a metric of images has no age
            kept.append(line)
    write_atomically(path, "".join(f"{line}\n" for line in kept))
