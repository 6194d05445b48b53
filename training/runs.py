"""The folder of a run: its name, what it starts from, and which training state it goes on from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.config import UserError, differences, to_json
from dnnlib.util import write_atomically
from torch_utils import distributed
from torch_utils.checkpoint import Checkpoint
from training.config import TrainConfig, same_training
from training.dataset import ImageDataset
from training.snapshot import copy_weights, load_network
from training.training_loop import Trainer


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, the run to go on from if any, the snapshot to transfer from if any."""

    run_dir: Path
    resumes: bool
    snapshot: Path | None


def choose_start(outdir: Path, config: TrainConfig, dataset: ImageDataset, resume: str | None) -> Start:
    """Decide between going on, transferring and starting afresh. Raises UserError for a --resume that is nothing."""
    if resume == "latest":
        for run_dir in reversed(_runs(outdir)):
            if _same_run(run_dir, config) and list_states(run_dir):
                return Start(run_dir, resumes=True, snapshot=None)
    elif resume is not None and Path(resume).is_dir():
        run_dir = Path(resume)
        if not list_states(run_dir):
            raise UserError(f"--resume={resume}: this folder holds no training state (training-state-*.pt)")
        _check_same(run_dir, config)
        return Start(run_dir, resumes=True, snapshot=None)
    elif resume is not None and not Path(resume).is_file():
        raise UserError(f"--resume={resume}: neither `latest` nor a run's folder nor a snapshot file")
    snapshot = Path(resume) if resume not in (None, "latest") else None
    return Start(_new_run_dir(outdir, config, dataset), resumes=False, snapshot=snapshot)


def _runs(outdir: Path) -> list[Path]:
    """The numbered run folders in `outdir`, oldest first."""
    return sorted(path for path in outdir.glob("[0-9]*-*") if re.match(r"\d{5,}-", path.name) and path.is_dir())


def _saved_options(run_dir: Path) -> Mapping[str, Any]:
    path = run_dir / "training_options.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _same_run(run_dir: Path, config: TrainConfig) -> bool:
    return (run_dir / "training_options.json").is_file() and same_training(_saved_options(run_dir), config)


def _check_same(run_dir: Path, config: TrainConfig) -> None:
    saved = _saved_options(run_dir)
    if not same_training(saved, config):
        changed = [line for line in differences(saved, to_json(config)) if not line.startswith("run.")]
        raise UserError(
            f"--resume={run_dir}: that run was started with other options; give the same ones:\n  "
            + "\n  ".join(changed)
        )


def _new_run_dir(outdir: Path, config: TrainConfig, dataset: ImageDataset) -> Path:
    """outdir/00003-<data>-<what>: the next free number, and what the run is in short."""
    number = max((int(path.name.split("-")[0]) for path in _runs(outdir)), default=-1) + 1
    words = [re.sub(r"[^\w.]+", "_", dataset.name), config.preset]
    words += ["cond"] if config.data.use_labels else []
    words += ["mirror"] if config.data.mirror else []
    words += ["linformer"] if config.generator.linformer else []
    words += [f"gpus{config.run.num_gpus}", f"batch{config.batch_size}"]
    return outdir / f"{number:05d}-{'-'.join(words)}"


def create(start: Start, config: TrainConfig) -> None:
    """Make the run's folder, where it is new, and write the resolved options into it."""
    try:
        start.run_dir.mkdir(parents=True, exist_ok=start.resumes)
        write_atomically(start.run_dir / "training_options.json", json.dumps(to_json(config), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--outdir={start.run_dir.parent}: cannot be written ({error.strerror})") from None


def load(trainer: Trainer, start: Start) -> str:
    """Give the trainer the state that the run starts from; return what was done, for the log.

    Raises UserError when that is damaged or does not fit.
    """
    if start.resumes:
        path = load_latest(trainer, start.run_dir)
        return f"Resuming from {path} at kimg {trainer.state.nimg / 1000:g}"
    if start.snapshot:
        return _transfer(trainer, start.snapshot)
    return "Starting from random weights"


def _transfer(trainer: Trainer, path: Path) -> str:
    """Copy the weights of a snapshot, as far as they fit."""
    snapshot = load_network(path)
    lines = [f"Starting from {path} (kimg {snapshot.kimg:g}):"]
    pairs = (("G", snapshot.G, trainer.G), ("D", snapshot.D, trainer.D), ("G_ema", snapshot.G_ema, trainer.ema.module))
    for name, source, target in pairs:
        if source is None:
            raise UserError(f"--resume={path}: holds no {name}, as it was written for generation only")
        lines += copy_weights(source, target, name)
    return "\n  ".join(lines)


def list_states(run_dir: Path) -> list[Path]:
    """Return a run's training states, oldest first."""
    return sorted(run_dir.glob("training-state-*.pt"))


def load_latest(trainer: Trainer, run_dir: Path) -> Path:
    """Resume from the newest training state that is whole. Raises UserError when none is."""
    chosen = distributed.from_main(lambda: _newest_whole_state(run_dir))
    trainer.resume(chosen)
    if distributed.is_main():
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


def _cut_log(path: Path, kimg: float) -> None:
    """Drop the lines of a log that lie beyond the training state that a run goes on from."""
    if path.exists():
        lines = [(json.loads(line), line) for line in path.read_text().splitlines()]
        kept = [text for entry, text in lines if entry.get("Progress/kimg", entry.get("kimg", 0)) <= kimg]
        write_atomically(path, "".join(f"{text}\n" for text in kept))
