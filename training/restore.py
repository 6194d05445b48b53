"""Initial weights and state of a run: from a training state, a snapshot, or random weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from torch import nn

from dnnlib.config import UserError, WriteError
from dnnlib.download import is_url
from dnnlib.util import PARTIAL, warn_on_write_error, write_atomically
from torch_utils import distributed
from training.config import TrainConfig
from training.resume import Start
from training.run_folder import list_states, read_log
from training.snapshots.post_hoc import list_files
from training.snapshots.reading import load_network
from training.snapshots.snapshot import Snapshot
from training.snapshots.transfer import Origin, check_frozen, copy_weights
from training.training_loop import Trainer, run_id

# Temporary names of files that training writes atomically.
OWN_PARTIAL = re.compile(
    rf"\.(network|training|state|stats|metric|fakes\d*|reals|wandb)[-_.].*\.\d+{re.escape(PARTIAL)}", re.DOTALL
)


def load(trainer: Trainer, start: Start) -> str:
    """Load the initial weights and state into the trainer, and record their origin; return a message for the log.

    Writes nothing. Raises UserError if a file is corrupt or does not fit.
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
        trainer.profiles.start(run_id(trainer.config))
        return report
    return "Starting from random weights"


def transfer(
    config: TrainConfig, networks: Mapping[str, nn.Module], name: str, snapshot: Snapshot
) -> tuple[TrainConfig, str]:
    """Copy the weights of a snapshot that fit G, D and G_ema.

    Returns the configuration with the origin of the weights, and a message for the log. Raises UserError, naming the
    snapshot by `name`, if the snapshot does not fit.
    """
    for net in ("G", "D"):
        if getattr(snapshot, net) is None:
            reason = snapshot.left_out.get(net, "it is missing, as in a snapshot for generation only")
            raise UserError(f"--resume={name}: {net} cannot be used: {reason}")
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
        lines.append("The URL is recorded without user, password and query: give the full URL to start from it again")
    lines += [line for net, result in copied.items() for line in result.describe(net)]
    return replace(config, origin=origin), "\n  ".join(lines)


def notes_on(name: str, snapshot: Snapshot) -> list[str]:
    """Return notes for the user, one line each, about a snapshot used for transfer learning."""
    notes = snapshot.notes()
    folder = Path(name).parent
    if not is_url(name) and (states := list_states(folder)):
        notes.append(f"{states[-1].name} is next to the snapshot: to resume that run, give --resume={folder}")
    return notes


def load_latest(trainer: Trainer, run_dir: Path) -> Path:
    """Resume from the newest usable training state. Raises UserError if there is none."""
    chosen = _resume_newest(trainer, run_dir)
    newest = run_dir / f"network-snapshot-{trainer.state.nimg // 1000:06d}.pkl"
    snapshots = [path for path in run_dir.glob("network-snapshot-*.pkl") if path <= newest]
    trainer.last_snapshot = max(snapshots, default=None)
    return chosen


def discard_later(run_dir: Path, nimg: int) -> None:
    """Remove from a resumed run what it wrote after the training state, which is at `nimg` images: it is repeated."""
    if not distributed.is_main():
        return
    _remove_leftovers(run_dir)
    _remove_later_averages(run_dir, nimg)
    for log in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
        with warn_on_write_error():
            _truncate_log(log, nimg / 1000)


def _resume_newest(trainer: Trainer, run_dir: Path) -> Path:
    """Try the training states of a run, newest first, and warn about each unusable state."""
    for path in reversed(distributed.from_main(lambda: list_states(run_dir))):
        problem = _resume(trainer, path)
        if problem is None:
            return path
        if distributed.is_main():
            print(f"Warning: {problem}", file=sys.stderr)
    return distributed.from_main(lambda: _refuse_run(run_dir))


def _refuse_run(run_dir: Path) -> NoReturn:
    raise UserError(f"{run_dir}: contains no usable training state (see the warnings); start a new run")


def _resume(trainer: Trainer, state: Path) -> str | None:
    """Resume from a training state; return the problem if any process failed. A collective call."""
    problem, is_same = None, True
    try:
        is_same = trainer.resume(state)
    except UserError as error:
        problem = str(error)
    if distributed.maximum([problem is not None]) == [1]:
        return problem or f"{state}: another process could not load it"
    if not is_same and distributed.is_main():
        print(f"Warning: {trainer.config.data.path} has changed since this run was stopped", file=sys.stderr)
    return None


def _remove_leftovers(run_dir: Path) -> None:
    """Remove temporary files left by processes of this run that were killed during a write."""
    for path in run_dir.glob(f".*{PARTIAL}"):
        if OWN_PARTIAL.fullmatch(path.name) and path.is_file():
            with warn_on_write_error():
                path.unlink(missing_ok=True)


def _remove_later_averages(run_dir: Path, nimg: int) -> None:
    """Remove the averages after the training state: the run may now continue with other weights or snapshots."""
    for path, kimg in list_files(run_dir).items():
        if kimg > nimg // 1000:
            with warn_on_write_error():
                path.unlink(missing_ok=True)


def _truncate_log(path: Path, kimg: float) -> None:
    """Remove the lines of a log after the training state at `kimg`, and a truncated last line.

    Raises WriteError.
    """
    if not path.is_file():
        return
    kept = "".join(f"{json.dumps(entry)}\n" for entry, at in read_log(path) if at is None or at <= kimg)
    try:
        if kept.encode() != path.read_bytes():
            write_atomically(path.resolve(), kept)  # resolved, so that a symlink to another disk is kept
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from None
