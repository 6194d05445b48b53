"""Snapshots as folders of safetensors, which other programs read without this project, and back without any loss.

shapes/config.json            configuration, images seen, ADA's p, and a checksum for each of the other files
shapes/G_ema.safetensors      one file per network: its tensors, under the names of its state_dict
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
    """Write a snapshot as a folder. Raises UserError if there is something by this name, WriteError if it cannot be."""
    with new_folder(folder) as temporary:
        write_folder(temporary, snapshot)


def write_folder(folder: Path, snapshot: Snapshot) -> None:
    """Write the files of a snapshot into a folder that exists. Raises WriteError."""
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
    with _reported(folder):
        for name, content in files.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot as network-snapshot-*.pkl are. Raises UserError if there is a file of this name, WriteError."""
    refuse_existing(path)
    make_parent(path)
    write_network(path, capture_snapshot(snapshot))


def capture_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """Return the content of a snapshot, as `capture_network` does."""
    networks = {name: getattr(snapshot, name) for name in NETWORKS}
    about: dict[str, Any] = {"config": snapshot.config, "nimg": snapshot.nimg, "ada_p": snapshot.ada_p}
    about["labels"] = snapshot.label_kind()
    return capture_network(**networks, **about)


def load_folder(folder: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read what `save_folder` wrote.

    Raises UserError, naming the file, when one is missing, damaged or was changed, and naming the tensor that is
    missing, not known, or of another shape or type than the configuration says.
    """
    folder = Path(folder)
    return restore_network(read_folder(folder)["payload"], folder, device)


def read_folder(folder: Path) -> dict[str, Any]:
    """Return config.json with the content as it is in a snapshot under 'payload'. Raises UserError as load_folder."""
    document = _read_document(folder / "config.json")
    payload: dict[str, Any] = {key: document[key] for key in ("config", "nimg", "ada_p", "labels") if key in document}
    states = {name: _read_named_file(folder / f"{name}.safetensors") for name in document["files"]}
    full = {**payload, "networks": states}
    for old in range(document["version"], VERSION):
        full = MIGRATIONS[old](full)
    about, _ = parts_of(full, folder / "config.json")
    for name, config in network_configs(about["config"]).items():
        if name in states:
            check_tensors(config, states[name], f"{folder / name}.safetensors")
    for name, expected in document["files"].items():
        if sha256_of_file(folder / f"{name}.safetensors") != expected:
            raise UserError(f"{folder / name}.safetensors: damaged or changed: not what config.json has a checksum of")
    if digest([payload, document["files"]]) != document["sha256"]:
        raise UserError(f"{folder / 'config.json'}: damaged or changed (its content does not match its checksum)")
    return {**document, "payload": full}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `folder` at the end, or disappears if there was an error.

    Raises UserError when something by this name is there, WriteError when a folder cannot be made.
    """
    refuse_existing(folder)
    make_parent(folder)
    whole = folder.absolute()
    temporary = partial_path(whole)
    try:
        with _reported(folder):
            temporary.mkdir()
        yield temporary
        with _reported(folder):
            os.replace(temporary, whole)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise UserError when there is a file or a folder with content by this name."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} exists and is not written over: remove it or choose another name")


def make_parent(path: Path) -> None:
    """Make the folder that `path` goes into. Raises WriteError."""
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Raise WriteError for what the file system refuses to do for `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


def is_folder(path: Path) -> bool:
    """Whether a path is a folder with a config.json, as `save_folder` writes them."""
    return (path / "config.json").is_file()


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a folder of safetensors has one")
    try:
        document = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from None
    is_ours = isinstance(document, dict) and document.keys() >= KEYS and document["format"] == FORMAT
    if not is_ours or type(document["version"]) is not int or not isinstance(document["files"], dict):
        raise UserError(f"{path}: not a file of this project, which has {', '.join(sorted(KEYS))}")
    check_version(path, document, VERSION)
    for name in document["files"]:
        if name not in NETWORKS:
            raise UserError(f"{path}: names the file {name}.safetensors; known are {', '.join(NETWORKS)}")
    return document


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of safetensors. Raises OSError; ValueError, also for a type that torch lacks."""
    safetensors = import_extra("safetensors", "safetensors")
    safetensors_torch = import_extra("safetensors.torch", "safetensors")
    with open_regular(path) as file:
        content = file.read()
    try:
        tensors: dict[str, Tensor] = safetensors_torch.load(content)
    except KeyError as error:
        raise ValueError(f"its numbers are of the type {error.args[0]}, which is not known here") from None
    except (safetensors.SafetensorError, AssertionError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(describe_error(error)) from None
    return tensors


def _read_named_file(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, and config.json names it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged or incomplete ({error}); use another copy") from None
