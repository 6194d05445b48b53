"""Lossless conversion of snapshots to and from folders of safetensors, readable without this project's code.

shapes/config.json            configuration, images seen, ADA's p, and a checksum of each of the other files
shapes/G_ema.safetensors      one file per network, with the tensors of its state_dict by name
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dnnlib
from dnnlib.config import UserError, WriteError
from dnnlib.download import sha256_of_file
from dnnlib.util import describe_error, import_extra, open_regular, partial_path, read_json
from torch_utils.checkpoint import check_version, digest
from training.snapshots.snapshot import (
    MIGRATIONS,
    VERSION,
    Snapshot,
    capture_network,
    check_tensors,
    network_configs,
    parts_of,
    restore_network,
    write_network,
)

FORMAT = "styleformer-folder"
NETWORKS = ("G", "D", "G_ema")
KEYS = {"format", "version", "written_by", "sha256", "config", "nimg", "ada_p", "files"}


def save_folder(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot as a folder. Raises UserError if the path exists, WriteError if it cannot be written."""
    with new_folder(folder) as temporary:
        write_folder(temporary, snapshot)


def write_folder(folder: Path, snapshot: Snapshot) -> None:
    """Write the files of a snapshot into an existing folder. Raises WriteError."""
    safetensors = import_extra("safetensors.torch", "safetensors")
    payload = capture_snapshot(snapshot)
    files = {name: safetensors.save(state, {"format": "pt"}) for name, state in payload.pop("networks").items()}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": dnnlib.__version__,
        "sha256": digest([payload, checksums]),
        **payload,
        "files": checksums,
    }
    with _write_errors(folder):
        for name, content in files.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot in the format of network-snapshot-*.pkl. Raises WriteError, and UserError if the path exists."""
    refuse_existing(path)
    make_parent(path)
    write_network(path, capture_snapshot(snapshot))


def capture_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """Return the content of a snapshot in the format of `capture_network`."""
    networks = {name: getattr(snapshot, name) for name in NETWORKS}
    metadata: dict[str, Any] = {"config": snapshot.config, "nimg": snapshot.nimg, "ada_p": snapshot.ada_p}
    metadata["labels"] = snapshot.label_kind()
    return capture_network(**networks, **metadata)


def load_folder(folder: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a folder written by `save_folder`.

    Raises UserError naming a file that is missing, corrupt or modified, or a tensor that is missing, unknown, or of
    another shape or type than the configuration requires.
    """
    folder = Path(folder)
    return restore_network(read_folder(folder)["payload"], folder, device)


def read_folder(folder: Path) -> dict[str, Any]:
    """Return config.json, with the snapshot content added as 'payload'. Raises UserError like `load_folder`."""
    document = _read_document(folder / "config.json")
    payload: dict[str, Any] = {key: document[key] for key in ("config", "nimg", "ada_p", "labels") if key in document}
    states = {name: _read_named_file(folder / f"{name}.safetensors") for name in document["files"]}
    full = {**payload, "networks": states}
    for old in range(document["version"], VERSION):
        full = MIGRATIONS[old](full)
    metadata, _ = parts_of(full, folder / "config.json")
    for name, config in network_configs(metadata["config"]).items():
        if name in states:
            check_tensors(config, states[name], f"{folder / name}.safetensors")
    for name, expected in document["files"].items():
        file = folder / f"{name}.safetensors"
        if sha256_of_file(file) != expected:
            raise UserError(f"{file}: corrupt or modified (does not match its checksum in config.json)")
    if digest([payload, document["files"]]) != document["sha256"]:
        raise UserError(f"{folder / 'config.json'}: corrupt or modified (its content does not match its checksum)")
    return {**document, "payload": full}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` at the end of the block, or removed after an error.

    Raises UserError if `folder` exists, WriteError if the folder cannot be created.
    """
    refuse_existing(folder)
    make_parent(folder)
    target = folder.absolute()
    temporary = partial_path(target)
    try:
        with _write_errors(folder):
            temporary.mkdir()
        yield temporary
        with _write_errors(folder):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise UserError if the path is a file or a folder that is not empty."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} exists and will not be overwritten: remove it or choose another name")


def make_parent(path: Path) -> None:
    """Create the parent folder of `path`. Raises WriteError."""
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Convert OSError to WriteError naming `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder with a config.json, the format of `save_folder`."""
    return (path / "config.json").is_file()


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a folder of safetensors requires it")
    try:
        document = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: corrupt, not JSON ({error})") from None
    is_known = isinstance(document, dict) and document.keys() >= KEYS and document["format"] == FORMAT
    if not is_known or type(document["version"]) is not int or not isinstance(document["files"], dict):
        raise UserError(f"{path}: not a file of this project; such a file contains {', '.join(sorted(KEYS))}")
    check_version(path, document, VERSION)
    for name in document["files"]:
        if name not in NETWORKS:
            raise UserError(
                f"{path}: lists an unknown file {name}.safetensors; known networks are {', '.join(NETWORKS)}"
            )
    return document


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file. Raises OSError, or ValueError for a corrupt file or unknown type."""
    safetensors = import_extra("safetensors", "safetensors")
    safetensors_torch = import_extra("safetensors.torch", "safetensors")
    with open_regular(path) as file:
        content = file.read()
    try:
        tensors: dict[str, Tensor] = safetensors_torch.load(content)
    except KeyError as error:
        raise ValueError(f"its tensors have the type {error.args[0]}, which is not supported") from None
    except (safetensors.SafetensorError, AssertionError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(describe_error(error)) from None
    return tensors


def _read_named_file(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but config.json lists it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: corrupt or truncated ({error}); use another copy") from None
