"""Loading of snapshots of any kind: of this project, of other projects, and folders of safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dnnlib.config import UserError
from dnnlib.download import fetch, is_url
from training.dataset import DatasetConfig, ImageDataset, naming
from training.snapshots import snapshot
from training.snapshots.exchange import is_folder, load_folder, read_folder
from training.snapshots.foreign import PRESET, is_foreign, read_foreign
from training.snapshots.snapshot import Snapshot, build_networks, list_snapshots, parts_of, read_network


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot of this project, a folder of safetensors or a foreign snapshot, from a path or URL.

    For the folder of a run, the newest snapshot is read. Raises UserError naming the file if the file is missing,
    corrupt, of an unknown kind, or contains non-finite values.
    """
    path = local_snapshot(path)
    if is_folder(path):
        return load_folder(path, device)
    if not is_foreign(path):
        return snapshot.load_network(path, device)
    foreign = read_foreign(path)
    networks = build_networks(foreign.config, foreign.states, path, device)
    metadata: dict[str, Any] = {"config": foreign.config, "nimg": foreign.nimg, "ada_p": foreign.ada_p}
    return Snapshot(**networks, **metadata, path=path, left_out=foreign.left_out)


def transfer_options(path: str | Path) -> dict[str, Any]:
    """Return the options that a foreign snapshot implies for transfer learning: the upper bound of ADA's p, if any."""
    path = local_file(path)
    if is_foreign(path):
        config = read_foreign(path).config
    else:
        config = parts_of((read_folder(path) if is_folder(path) else read_network(path))["payload"], path)[0]["config"]
    is_bound = config.preset == PRESET and config.augment.max_p < 1  # PRESET also marks converted files
    return {"augment.max_p": config.augment.max_p} if is_bound else {}


def local_file(path: str | Path) -> Path:
    """Return a path unchanged; download a URL unless it is cached, and return the path of the file."""
    return fetch(str(path)) if is_url(path) else Path(path)


def local_snapshot(path: str | Path) -> Path:
    """Return `local_file(path)`, or a run's newest snapshot. Raises UserError for any other folder."""
    path = local_file(path)
    if not path.is_dir() or is_folder(path):
        return path
    if snapshots := list_snapshots(path):
        return snapshots[-1]
    raise UserError(f"{path}: neither a run (network-snapshot-*.pkl) nor a folder of safetensors (config.json)")


def open_images(config: DatasetConfig, path: Path, *, is_given: bool) -> ImageDataset:
    """Open the training dataset of the snapshot in `path` or, if `is_given`, the dataset of --data.

    Raises UserError, which names --data or states that the dataset is that of the snapshot.
    """
    if is_given:
        with naming("--data", config.path):
            return ImageDataset(config)
    try:
        return ImageDataset(config)
    except UserError as error:
        raise UserError(f"{error} (the training dataset of {path}): specify the dataset with --data") from None
