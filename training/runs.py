"""The folder of a run: what a run starts from, its name, and which training state it goes on from."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import dnnlib
from dnnlib.config import OPTIONS_FILE, ConfigError, UserError, WriteError, differences, override, to_json
from dnnlib.download import is_url
from dnnlib.util import (
    PARTIAL,
    FolderLock,
    TeeLog,
    append_line,
    read_json,
    read_json_lines,
    source_commit,
    warn_on_write_error,
    write_atomically,
)
from torch_utils import distributed
from torch_utils.checkpoint import Checkpoint
from torch_utils.misc import device_name
from training.config import (
    PRESETS,
    Circumstances,
    TrainConfig,
    micro_batches,
    read_config,
    resolve,
    same_training,
)
from training.dataset import ImageDataset
from training.snapshots.exchange import is_folder
from training.snapshots.snapshot import Snapshot
from training.snapshots.transfer import Origin, check_frozen, copy_weights
from training.training_loop import Trainer

NAME_BYTES = 40  # of the data set in the name of a run's folder, which has at most 255 bytes
# The data sets of the networks that StyleGAN2-ADA's --resume knows by name.
PUBLISHED = {
    "ffhq256": "FFHQ at 256x256",
    "ffhq512": "FFHQ at 512x512",
    "ffhq1024": "FFHQ at 1024x1024",
    "celebahq256": "CelebA-HQ at 256x256",
    "lsundog256": "LSUN Dog at 256x256",
}

STATE_NAME = re.compile(r"training-state-\d+\.pt")

# Files that training writes in one step, before they get their names.
OWN_PARTIAL = re.compile(
    rf"\.(network|training|state|stats|metric|fakes\d*|reals|wandb)[-_.].*\.\d+{re.escape(PARTIAL)}", re.DOTALL
)


def names_snapshot(resume: str | None) -> bool:
    """Whether --resume names a snapshot: an address, or a file or folder that is no training state."""
    if resume is None or is_url(resume):
        return resume is not None
    path = Path(resume)
    return is_folder(path) or (path.is_file() and path.suffix != ".pt")


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
    def transfers(self) -> bool:
        """Whether a run starts from the weights of a snapshot."""
        return names_snapshot(self.resume)

    @property
    def config(self) -> TrainConfig:
        """The configuration of a new run."""
        return self.transfer if self.transfers else self.plain


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run begins: its configuration, and the run that it goes on with, or the file that a new one starts from."""

    config: TrainConfig
    run_dir: Path | None = None
    state: Path | None = None
    snapshot: str | None = None  # a path or an address
    is_to_fit: bool = False  # whether the micro-batch is to be found (rehearsal.py)


def choose_start(request: Request, lock: FolderLock) -> Start:
    """Decide between going on, transferring and starting afresh; lock the folder of a run that goes on.

    Raises UserError for a --resume that is nothing, and for a run that another program goes on with.
    """
    start = find_start(request)
    if start.run_dir:
        lock.acquire(start.run_dir)
    return _keep_micro_batch(start) if request.plain.run.batch_gpu == "auto" and request.about.on_gpu else start


def _keep_micro_batch(start: Start) -> Start:
    """Take over the micro-batch of a run that goes on with as many processes; else let it be found."""
    if start.run_dir:
        saved = _saved_config(start.run_dir).run
        if saved.num_gpus == start.config.run.num_gpus and saved.batch_gpu in micro_batches(start.config):
            return replace(start, config=override(start.config, {"run.batch_gpu": saved.batch_gpu}))
    return replace(start, is_to_fit=True)


def find_start(request: Request) -> Start:
    """Decide as `choose_start` does, and lock nothing."""
    new = Start(config=resolve(request.config, request.about))
    if request.override and (request.resume is None or request.transfers):
        raise UserError("--override: changes the options of a run that goes on; give --resume=latest or its folder")
    if request.resume is None:
        return new
    if request.resume == "latest":
        return _choose_latest(request) or new
    path = Path(request.resume)
    if request.transfers:
        return replace(new, snapshot=request.resume)
    if path.is_file():
        return _choose_named(path, _config_in(path), request)
    if not path.is_dir():
        raise UserError(f"--resume={path}: {_explain_missing(request.resume)}")
    if not list_states(path):
        hint = f"; to go on with the newest of its runs: --outdir={path} --resume=latest" if _list_runs(path) else ""
        raise UserError(f"--resume={path}: this folder holds no training state (training-state-*.pt){hint}")
    return _choose_named(path, _saved_config(path), request)


def _explain_missing(name: str) -> str:
    """Say what a --resume that is no file or folder means in StyleGAN2-ADA, or what it can be here."""
    if name == "noresume":
        return "trains from random weights in StyleGAN2-ADA; leave --resume out for that"
    if name in PUBLISHED:
        return (
            f"the network that StyleGAN2-ADA published for {PUBLISHED[name]}, under a non-commercial licence; it is no "
            "part of this project: download the file and give its path, or give its URL, as --resume=PATH|URL"
        )
    return "neither `latest` nor a run's folder nor a training state or snapshot"


def _choose_named(path: Path, saved: TrainConfig, request: Request) -> Start:
    """How to go on with the run in a folder, or from a training state, which `saved` tells how it was started."""
    config = _continued_config(saved, request, adopt=True)
    if config is None and not request.override:
        raise UserError(
            f"--resume={path}: that run was started with other options; give the same ones, or --override:\n"
            f"  {_list_changes(saved, request)}"
        )
    return _start_at(path, config) if config else _override(path, saved, request)


def _start_at(path: Path, config: TrainConfig) -> Start:
    return Start(config=config, run_dir=path) if path.is_dir() else Start(config=config, state=path)


def _choose_latest(request: Request) -> Start | None:
    """How to go on with the newest run that has a state and the requested options, None when there is none."""
    runs = [*_readable_runs(request.outdir)]
    for adopt in (False, True):
        for run_dir, saved in runs:
            if config := _continued_config(saved, request, adopt):
                return Start(config=config, run_dir=run_dir)
    if not runs:
        return None
    newest, saved = runs[0]
    if request.override:
        return _override(newest, saved, request)
    print(
        f"Warning: --resume=latest: no run in {request.outdir} has these options, so a new one starts. "
        f"--override goes on with {newest} and changes\n  {_list_changes(saved, request)}",
        file=sys.stderr,
    )
    return None


def _readable_runs(outdir: Path) -> Iterator[tuple[Path, TrainConfig]]:
    """The runs that have a training state, newest first, and how they were started; warns where that is not known."""
    for run_dir in reversed(_list_runs(outdir)):
        if list_states(run_dir):
            try:
                yield run_dir, _saved_config(run_dir)
            except UserError as error:
                print(f"Warning: {error}", file=sys.stderr)


def _override(path: Path, saved: TrainConfig, request: Request) -> Start:
    """Go on with a run, or from a training state, under the requested options, whatever it was started with."""
    print(f"--override: going on with {path} and changing\n  {_list_changes(saved, request)}", file=sys.stderr)
    return _start_at(path, replace(resolve(request.plain, request.about), origin=saved.origin))


def _list_changes(saved: TrainConfig, request: Request) -> str:
    """The options in which a request differs from a saved run, one per line."""
    variants = [differences(to_json(saved), to_json(config)) for config in _requested_there(saved, request, adopt=True)]
    changed = [line for line in min(variants, key=len, default=[]) if not line.startswith(("run.", "origin."))]
    return "\n  ".join(changed or ["nothing that computes"])


def _continued_config(saved: TrainConfig, request: Request, adopt: bool) -> TrainConfig | None:
    """The configuration to go on with where a run computes what is requested, else None. `adopt`: _requested_there."""
    if not any(same_training(saved, config) for config in _requested_there(saved, request, adopt)):
        return None
    return resolve(replace(saved, run=request.plain.run), request.about)


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
    path = run_dir / OPTIONS_FILE
    try:
        return read_config(read_json(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _config_in(state: Path) -> TrainConfig:
    """The configuration in a training state."""
    try:
        return read_config(Checkpoint.read(state).get("config"))
    except ConfigError as error:
        raise UserError(f"{state}: its configuration cannot be read ({error})") from None


def create(start: Start, outdir: Path, dataset: ImageDataset, lock: FolderLock) -> Path:
    """Return the run's folder with the resolved options in it; make and lock it if it is new."""
    try:
        run_dir = start.run_dir or _make_run_dir(outdir, start.config, dataset)
        if start.run_dir is None:
            lock.acquire(run_dir)
        _write_options(run_dir, start.config)
    except OSError as error:
        raise UserError(f"--outdir={outdir}: cannot be written ({error.strerror})") from None
    return run_dir


def _write_options(run_dir: Path, config: TrainConfig) -> None:
    write_atomically(run_dir / OPTIONS_FILE, json.dumps(to_json(config), indent=2) + "\n")


class RunFolder:
    """The folder of a run, as this process uses it: it can be made again when somebody has removed it meanwhile."""

    def __init__(self, path: Path, config: TrainConfig, lock: FolderLock, log: TeeLog | None = None) -> None:
        self.path, self.config, self.lock, self.log = path, config, lock, log

    def restore(self) -> bool:
        """Make the folder again, with its options, lock and log, if it has gone or is empty; return whether it had.

        Another folder of its name, in which another program runs, is none to write into. A disk that does not answer
        for the moment has not gone. Raises OSError, UserError.
        """
        try:
            if self.lock.holds(self.path) and os.path.exists(self.path / OPTIONS_FILE):
                return False
        except OSError:
            return False
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.acquire(self.path)
        _write_options(self.path, self.config)
        if self.log:
            self.log.reopen()
        return True


def note_start(run_dir: Path, trainer: Trainer) -> str:
    """Append what the run is computed with from here on to environment.jsonl; return it in words."""
    environment = {
        "kimg": trainer.state.nimg / 1000,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(trainer.device),
        "processes": distributed.world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "styleformer": dnnlib.__version__,
        "commit": source_commit(),
    }
    append_line(run_dir / "environment.jsonl", json.dumps(environment))
    commit = f" ({environment['commit']})" if environment["commit"] else ""
    versions = f"Styleformer {dnnlib.__version__}{commit}, torch {torch.__version__}, Python {environment['python']}"
    return f"{versions}, {environment['processes']} x {environment['device']}"


def _make_run_dir(outdir: Path, config: TrainConfig, dataset: ImageDataset) -> Path:
    """outdir/00003-<data>-<what>: the next free number, and what the run is in short."""
    words = [re.sub(r"[^\w.]+", "_", dataset.name).encode()[:NAME_BYTES].decode(errors="ignore"), config.preset]
    words += ["cond"] if config.data.use_labels else []
    words += ["mirror"] if config.data.mirror else []
    words += _departures(config)
    words += config.generator.folder_words
    words += [f"gpus{config.run.num_gpus}", f"batch{config.batch_size}"]
    words += [config.run.desc] if config.run.desc else []
    number = max((int(path.name.split("-")[0]) for path in _list_runs(outdir)), default=-1) + 1
    run_dir = outdir / f"{number:05d}-{'-'.join(words)}"
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        if not run_dir.is_dir():
            raise
        return _make_run_dir(outdir, config, dataset)  # another run took the number in this moment
    return run_dir


def _departures(config: TrainConfig) -> list[str]:
    """The names of the families and the objective that are not the preset's."""
    new, old = to_json(config), to_json(PRESETS.get(config.preset, config))
    names = {"generator.family": "", "discriminator.family": "d-", "loss.objective": ""}
    paths = [(path.split("."), prefix) for path, prefix in names.items()]
    return [prefix + new[part][name] for (part, name), prefix in paths if new[part][name] != old[part][name]]


def load(trainer: Trainer, start: Start, load_network: Callable[[str], Snapshot]) -> str:
    """Give the trainer the state that the run starts from, and its configuration where that is; return what was done.

    Raises UserError when that is damaged or does not fit.
    """
    if start.run_dir:
        path = load_latest(trainer, start.run_dir)
        return f"Resuming from {path} at kimg {trainer.state.nimg / 1000:g}"
    if start.state:
        if problem := _resume(trainer, start.state):
            raise UserError(problem)
        return f"Starting from {start.state} at kimg {trainer.state.nimg / 1000:g}"
    if start.snapshot:
        networks = {"G": trainer.G, "D": trainer.D, "G_ema": trainer.ema.module}
        trainer.config, report = transfer(trainer.config, networks, start.snapshot, load_network(start.snapshot))
        return report
    return "Starting from random weights"


def transfer(
    config: TrainConfig, networks: Mapping[str, nn.Module], name: str, snapshot: Snapshot
) -> tuple[TrainConfig, str]:
    """Copy the weights of a snapshot to G, D and G_ema, as far as they fit; return the configuration with their origin.

    And what was done, for the log. Raises UserError when the snapshot, whose name is given, does not fit.
    """
    for net in ("G", "D"):
        if getattr(snapshot, net) is None:
            reason = snapshot.left_out.get(net, "it is not there, as in a snapshot for generation only")
            raise UserError(f"--resume={name}: {net} cannot be taken from it: {reason}")
    copied = {net: copy_weights(getattr(snapshot, net), network, net) for net, network in networks.items()}
    check_frozen(networks["D"], config.freeze_layers, copied["D"])
    origin = Origin(
        source=name,
        kimg=snapshot.kimg,
        copied_g=copied["G"].share,
        copied_d=copied["D"].share,
        copied_g_ema=copied["G_ema"].share,
        partial=tuple(f"{net}: {place}" for net in ("G", "D") for place in copied[net].partial),
        new=tuple(f"{net}: {place}" for net in ("G", "D") for place in copied[net].new),
    )
    lines = [f"Starting from {name} (kimg {snapshot.kimg:g}):", *notes_on(name, snapshot)]
    if origin.source != name:
        lines.append("The address is recorded without user, password and query: give all of it to start anew from it")
    lines += [line for net, what in copied.items() for line in what.describe(net)]
    return replace(config, origin=origin), "\n  ".join(lines)


def notes_on(name: str, snapshot: Snapshot) -> list[str]:
    """Return what a user should know of a snapshot that weights are taken from, a line each."""
    notes = snapshot.notes()
    folder = Path(name).parent
    if not is_url(name) and (states := list_states(folder)):
        notes.append(f"{states[-1].name} lies beside it: to go on with that run, --resume={folder}")
    return notes


def list_states(run_dir: Path) -> list[Path]:
    """Return a run's training states, oldest first: files that are named as training names them, and no copies."""
    return sorted(
        path for path in run_dir.glob("training-state-*.pt") if STATE_NAME.fullmatch(path.name) and path.is_file()
    )


def load_latest(trainer: Trainer, run_dir: Path) -> Path:
    """Resume from the newest training state that can be used. Raises UserError when none can."""
    chosen = _resume_newest(trainer, run_dir)
    newest = run_dir / f"network-snapshot-{trainer.state.nimg // 1000:06d}.pkl"
    snapshots = [path for path in run_dir.glob("network-snapshot-*.pkl") if path <= newest]
    trainer.last_snapshot = max(snapshots, default=None)
    if distributed.is_main():
        _remove_leftovers(run_dir)
        for log in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
            with warn_on_write_error():
                _cut_log(log, trainer.state.nimg / 1000)
    return chosen


def _resume_newest(trainer: Trainer, run_dir: Path) -> Path:
    """Try the training states of a run, the newest first; warn of those that cannot be used."""
    for path in reversed(distributed.from_main(lambda: list_states(run_dir))):
        problem = _resume(trainer, path)
        if problem is None:
            return path
        if distributed.is_main():
            print(f"Warning: {problem}", file=sys.stderr)
    return distributed.from_main(lambda: _refuse_run(run_dir))


def _refuse_run(run_dir: Path) -> NoReturn:
    raise UserError(f"{run_dir}: holds no training state that can be used, as the warnings say; start a new run")


def _resume(trainer: Trainer, state: Path) -> str | None:
    """Resume from a training state; return why any process could not. A collective call."""
    problem, is_same = None, True
    try:
        is_same = trainer.resume(state)
    except UserError as error:
        problem = str(error)
    if distributed.maximum([problem is not None]) == [1]:
        return problem or f"{state}: another process could not use it"
    if not is_same and distributed.is_main():
        print(f"Warning: {trainer.config.data.path} has changed since this run was stopped", file=sys.stderr)
    return None


def _remove_leftovers(run_dir: Path) -> None:
    """Remove the temporary files of processes of this run that were killed while they wrote."""
    for path in run_dir.glob(f".*{PARTIAL}"):
        if OWN_PARTIAL.fullmatch(path.name) and path.is_file():
            with warn_on_write_error():
                path.unlink(missing_ok=True)


def _cut_log(path: Path, kimg: float) -> None:
    """Drop the lines of a log that lie beyond the training state that a run goes on from, and a last one cut short.

    Raises WriteError.
    """
    if not path.is_file():
        return
    kept = "".join(f"{json.dumps(entry)}\n" for entry, age in _read_log(path) if age is None or age <= kimg)
    try:
        if kept.encode() != path.read_bytes():
            write_atomically(path.resolve(), kept)  # resolved: a link that leads to another disk stays one
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from None


def read_ages(path: Path) -> set[float]:
    """Return the kimg of the lines of stats.jsonl or metric-<name>.jsonl; none where there is no such file."""
    return {age for _, age in _read_log(path) if age is not None}


def _read_log(path: Path) -> Iterator[tuple[dict[str, Any], float | None]]:
    """Yield the entries of a log with their kimg. A metric of images has none."""
    for entry in read_json_lines(path):
        age = entry.get("Progress/kimg", entry.get("kimg"))
        if age is None or isinstance(age, (int, float)):
            yield entry, age
