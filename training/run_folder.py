"""Folder of a run: name, options, lock, training states and logs."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dnnlib
from dnnlib.config import OPTIONS_FILE, UserError, to_json
from dnnlib.util import (
    FolderLock,
    TeeLog,
    append_line,
    read_json_lines,
    source_commit,
    write_atomically,
)
from torch_utils import distributed
from torch_utils.misc import device_name
from training.config import (
    PRESETS,
    TrainConfig,
)
from training.dataset import ImageDataset
from training.training_loop import Trainer

NAME_BYTES = 40  # limit on the dataset's name in the folder name, which has at most 255 bytes
STATE_NAME = re.compile(r"training-state-\d+\.pt")


def list_runs(outdir: Path) -> list[Path]:
    """Return the numbered run folders in `outdir`, oldest first."""
    return sorted(path for path in outdir.glob("[0-9]*-*") if re.match(r"\d{5,}-", path.name) and path.is_dir())


def create(
    run_dir: Path | None, outdir: Path | None, config: TrainConfig, dataset: ImageDataset, lock: FolderLock
) -> Path:
    """Write the resolved options into a run's folder; create and lock a new folder if `run_dir` is None.

    Raises UserError if the folder cannot be written or is locked by another program.
    """
    try:
        if run_dir is None:
            assert outdir is not None
            run_dir = _make_run_dir(outdir, config, dataset)
            lock.acquire(run_dir)
        _write_options(run_dir, config)
    except OSError as error:
        raise UserError(f"--outdir={outdir or run_dir}: cannot be written ({error.strerror})") from None
    return run_dir


def _write_options(run_dir: Path, config: TrainConfig) -> None:
    write_atomically(run_dir / OPTIONS_FILE, json.dumps(to_json(config), indent=2) + "\n")


class RunFolder:
    """Locked folder of the run of this process; `restore` recreates the folder after a removal."""

    def __init__(self, path: Path, config: TrainConfig, lock: FolderLock, log: TeeLog | None = None) -> None:
        self.path, self.config, self.lock, self.log = path, config, lock, log

    def restore(self) -> bool:
        """Create the folder with options, lock and log if it was removed or emptied; return whether this was necessary.

        A temporary I/O error of the disk does not count as a removal. Raises OSError, or UserError if another program
        has locked a folder of this name.
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


def log_start(run_dir: Path, trainer: Trainer) -> str:
    """Append the device, processes and versions in use to environment.jsonl; return a line for the log."""
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
    """Create outdir/00003-<dataset>-<preset>-<options>, with the next free number."""
    words = [re.sub(r"[^\w.]+", "_", dataset.name).encode()[:NAME_BYTES].decode(errors="ignore"), config.preset]
    words += ["cond"] if config.data.use_labels else []
    words += ["mirror"] if config.data.mirror else []
    words += _changed_names(config)
    words += config.generator.folder_words
    words += [f"gpus{config.run.num_gpus}", f"batch{config.batch_size}"]
    words += [config.run.desc] if config.run.desc else []
    number = max((int(path.name.split("-")[0]) for path in list_runs(outdir)), default=-1) + 1
    run_dir = outdir / f"{number:05d}-{'-'.join(words)}"
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        if not run_dir.is_dir():
            raise
        return _make_run_dir(outdir, config, dataset)  # another run has just claimed the number
    return run_dir


def _changed_names(config: TrainConfig) -> list[str]:
    """Return the names of network families and objective where they differ from the preset."""
    new, old = to_json(config), to_json(PRESETS.get(config.preset, config))
    names = {"generator.family": "", "discriminator.family": "d-", "loss.objective": ""}
    paths = [(path.split("."), prefix) for path, prefix in names.items()]
    return [prefix + new[part][name] for (part, name), prefix in paths if new[part][name] != old[part][name]]


def list_states(run_dir: Path) -> list[Path]:
    """Return a run's training states, oldest first. Copies under other names are ignored."""
    return sorted(
        path for path in run_dir.glob("training-state-*.pt") if STATE_NAME.fullmatch(path.name) and path.is_file()
    )


def read_kimgs(path: Path) -> set[float]:
    """Return the kimg of all lines of stats.jsonl or metric-<name>.jsonl; empty if the file does not exist."""
    return {kimg for _, kimg in read_log(path) if kimg is not None}


def read_log(path: Path) -> Iterator[tuple[dict[str, Any], float | None]]:
    """Yield each entry of a log with its kimg, which is None for a metric computed on a folder of images."""
    for entry in read_json_lines(path):
        kimg = entry.get("Progress/kimg", entry.get("kimg"))
        if kimg is None or isinstance(kimg, (int, float)):
            yield entry, kimg
