"""Snapshots of any kind, ours, folders of safetensors and foreign ones, from a path or an address on the web."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import training.snapshots.snapshot
from dnnlib.config import UserError
from dnnlib.download import fetch, is_url
from training.snapshots.exchange import is_folder, load_folder, read_folder
from training.snapshots.foreign import PRESET, is_foreign, read_foreign
from training.snapshots.snapshot import Snapshot, build_networks, list_snapshots, parts_of, read_network


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot, ours, a folder of safetensors or a foreign one, from a path or an address on the web.

    The folder of a run stands for its newest snapshot.

    Raises UserError naming the file when it is missing, damaged, of an unknown kind, or holds values that are not
    finite.
    """
    path = local_snapshot(path)
    if is_folder(path):
        return load_folder(path, device)
    if not is_foreign(path):
        return training.snapshots.snapshot.load_network(path, device)
    foreign = read_foreign(path)
    networks = build_networks(foreign.config, foreign.states, path, device)
    about: dict[str, Any] = {"config": foreign.config, "nimg": foreign.nimg, "ada_p": foreign.ada_p}
    return Snapshot(**networks, **about, path=path, left_out=foreign.left_out)


def transfer_options(path: str | Path) -> dict[str, Any]:
    """Return what a foreign snapshot says about a training that starts from it: the bound of its p, if it had one."""
    path = local_file(path)
    if is_foreign(path):
        config = read_foreign(path).config
    else:
        config = parts_of((read_folder(path) if is_folder(path) else read_network(path))["payload"], path)[0]["config"]
    is_bound = config.preset == PRESET and config.augment.max_p < 1  # also where it was converted
    return {"augment.max_p": config.augment.max_p} if is_bound else {}


def local_file(path: str | Path) -> Path:
    """Return the path, or where the file behind an address is kept; it is fetched the first time."""
    return fetch(str(path)) if is_url(path) else Path(path)


def local_snapshot(path: str | Path) -> Path:
    """Return what `local_file` does, of a run's folder its newest snapshot. Raises UserError where there is none."""
    path = local_file(path)
    if not path.is_dir() or is_folder(path):
        return path
    if snapshots := list_snapshots(path):
        return snapshots[-1]
    raise UserError(f"{path}: neither a run (network-snapshot-*.pkl) nor a folder of safetensors (config.json)")
