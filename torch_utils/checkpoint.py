"""Checkpoint files of tensors and plain values: written atomically, checksummed, read without running code.

A file is written by `torch.save` from

    {"format": "training-state", "version": 1, "written_by": "0.1.0", "sha256": "...", "payload": {...}}

and can be read anywhere by `torch.load(path, weights_only=True)`. This project reads it with `read_torch_file`, at a
cost proportional to the file size. The checksum covers the content of the payload (keys, types, numbers and the bytes
of every tensor), because a flipped bit inside a tensor would otherwise load without an error.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import dnnlib
from dnnlib.config import UserError, WriteError
from dnnlib.images import IMAGE_SUFFIXES
from dnnlib.util import describe_error, open_regular, replaced
from torch_utils.pickles import describe_torch_file, is_pickle, read_torch_file

Migration = Callable[[dict[str, Any]], dict[str, Any]]


class Stateful(Protocol):
    """Interface of a part of a checkpoint, e.g. a module or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def _fuse_optimizers(payload: dict[str, Any]) -> dict[str, Any]:
    """Migrate to version 2: optimizers are fused, so that they can skip a step."""
    for part in payload["parts"].values():
        for group in part.get("param_groups", ()):
            group["fused"] = True
    return payload


def _add_statistics(payload: dict[str, Any]) -> dict[str, Any]:
    """Migrate to version 3: a state saved within a tick holds the statistics collected since the tick began."""
    payload["parts"] |= {"stats": {}, "failures": {}}
    return payload


def _add_averages(payload: dict[str, Any]) -> dict[str, Any]:
    """Migrate to version 4: a state holds power-function averages and mean logits; earlier versions tracked none."""
    payload["parts"] |= {
        "profiles": {"run": "", "averages": {}},
        "logit_means": {"values": torch.zeros(2), "steps": torch.zeros([], dtype=torch.int64)},
    }
    return payload


class Checkpoint:
    """The mutable state of a training run, as named parts that are saved and restored together."""

    FORMAT = "training-state"
    VERSION = 4
    # version -> function that upgrades a payload to the next version
    MIGRATIONS: Mapping[int, Migration] = {1: _fuse_optimizers, 2: _add_statistics, 3: _add_averages}

    def __init__(self, **parts: Stateful) -> None:
        self.parts = parts

    def save(self, path: Path, **extra: Any) -> None:
        """Write all parts, and the plain values `extra`."""
        self.write(path, self.capture(**extra))

    def capture(self, **extra: Any) -> dict[str, Any]:
        """Return a copy of the current state of all parts, which can be written while training continues."""
        parts: dict[str, Any] = copy_to_cpu({name: part.state_dict() for name, part in self.parts.items()})
        return {"parts": parts, **extra}

    @classmethod
    def write(cls, path: Path, payload: dict[str, Any]) -> None:
        """Write a payload returned by `capture`. Raises WriteError."""
        write_file(path, cls.FORMAT, cls.VERSION, payload)

    def fingerprints(self) -> dict[str, int]:
        """Return an integer hash per part, the sum of the bit patterns of its tensors; equal for identical parts."""
        return {name: _sum_of_bits(part.state_dict()) for name, part in self.parts.items()}

    def load(self, path: Path) -> dict[str, Any]:
        """Restore all parts from a file and return its payload. Raises UserError, with the path, on any mismatch.

        The names of the parts and the shapes of the network tensors are checked before any part is modified.
        """
        payload = self.read(path)
        saved = payload.get("parts")
        if not isinstance(saved, dict) or not all(isinstance(state, dict) for state in saved.values()):
            raise UserError(f"{path}: contains no parts of a training state; use another copy")
        if saved.keys() != self.parts.keys():
            raise UserError(f"{path}: contains the parts {sorted(map(str, saved))}, expected {sorted(self.parts)}")
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and _shapes(part.state_dict()) != _shapes(saved[name]):
                raise UserError(f"{path}: the tensor shapes of {name} do not match; the run used other options")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(saved[name])
                if isinstance(part, torch.optim.Optimizer):
                    _match_layouts(part)
            except _LOAD_ERRORS as error:  # an optimizer raises ValueError for other parameters
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{path}: {name} does not match ({reason}); the run used other options") from None
        return payload

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Return the verified payload of a training state."""
        return read_file(path, cls.FORMAT, cls.VERSION, cls.MIGRATIONS)


# Format of a file of this project -> the options that accept it.
REMEDIES = {
    "training-state": "pass it to --resume; the snapshots of the run are network-snapshot-*.pkl in the same folder",
    "network-snapshot": "pass it to --network, or to --resume for transfer learning",
    "network-ema": "use a network-snapshot-*.pkl of the same folder; --ema of generate.py selects a length",
}
# Signature -> description of files that users mistake for files of this project.
SIGNATURES = {
    b"\x1f\x8b": "compressed with gzip; decompress it with gunzip",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x93NUMPY": "a NumPy array",
}

# Errors of load_state_dict for values of a wrong type or shape.
_LOAD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def _sum_of_bits(value: Any) -> int:
    if isinstance(value, Tensor):
        return int(value.detach().contiguous().view(_INTEGERS[value.element_size()]).sum(dtype=torch.int64))
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return sum(map(_sum_of_bits, value)) if isinstance(value, (list, tuple)) else 0


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Convert the optimizer state of each parameter to the parameter's memory layout, which may differ from the file's.

    Fused optimizers iterate over both in storage order. If the layouts differ, the GPU kernel raises; the CPU
    kernel does not check them. Raises ValueError for a state of another shape.
    """
    for parameter, memory in optimizer.state.items():
        for name, x in memory.items():
            if name != "step" and isinstance(x, Tensor):
                if x.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(x.shape)}, its parameter {tuple(parameter.shape)}")
                memory[name] = torch.empty_like(parameter, dtype=x.dtype).copy_(x)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: tuple(x.shape) if isinstance(x, Tensor) else None for name, x in state.items()}


def write_file(path: Path, file_format: str, version: int, payload: dict[str, Any]) -> None:
    """Write a checksummed file atomically: a crash or a full disk leaves the old file or none, never a partial one.

    Raises WriteError if the folder is not writable or the disk is full.
    """
    payload = copy_to_cpu(payload, always=False)
    document = {
        "format": file_format,
        "version": version,
        "written_by": dnnlib.__version__,
        "sha256": digest(payload),
        "payload": payload,
    }
    try:
        with replaced(path) as temporary, temporary.open("wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "inline_container" in str(error)
        reason = "the disk is full" if is_full else describe_error(error)
        raise WriteError(f"{path}: cannot be written ({reason}); earlier files are intact") from error


def read_file(path: Path, file_format: str, version: int, migrations: Mapping[int, Migration]) -> dict[str, Any]:
    """Return the payload of a file on the CPU, upgraded to `version`. Raises UserError, with the path."""
    payload: dict[str, Any] = read_document(path, file_format, version, migrations)["payload"]
    return payload


def read_document(path: Path, file_format: str, version: int, migrations: Mapping[int, Migration]) -> dict[str, Any]:
    """Return the upgraded payload with the format, version, project version and checksum stored in the file."""
    try:
        document = _read_document(path)
    except UserError:
        _reject_other_formats(path)
        raise
    kinds = {"format": str, "version": int, "sha256": str, "payload": dict, "written_by": str}
    if not isinstance(document, dict) or not all(type(document.get(key)) is kind for key, kind in kinds.items()):
        _reject_other_formats(path)
        raise UserError(f"{path}: not a file of this project")
    if document["format"] != file_format:
        remedy = REMEDIES.get(document["format"], "specify another file")
        raise UserError(f"{path}: this is a {document['format']} file, expected a {file_format} file: {remedy}")
    check_version(path, document, version)
    payload: dict[str, Any] = document["payload"]
    try:
        if digest(payload) != document["sha256"]:
            raise UserError(f"{path}: damaged (its content does not match its checksum); use another copy")
        for old in range(document["version"], version):
            payload = migrations[old](payload)
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:  # RecursionError is a RuntimeError
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a valid {file_format} file ({reason}); use another copy") from None
    return {**document, "payload": payload}


def check_version(path: Path, document: Mapping[str, Any], newest: int) -> None:
    """Raise UserError, with the path, for a format version that is newer than `newest` or below 1."""
    version = document["version"]
    if version > newest:
        raise UserError(
            f"{path}: format version {version} was written by release {document['written_by']}, "
            f"this is {dnnlib.__version__}; update to read it"
        )
    if version < 1:
        raise UserError(f"{path}: format version {version}, but the first is 1; use another copy")


def _reject_other_formats(path: Path) -> None:
    """Raise UserError for a file of another program that is recognised by its content."""
    if not path.is_file():
        return
    if what := _describe_zip(path):
        raise UserError(f"{path}: not a file of this project: {what}")
    if what := describe_torch_file(path):
        raise UserError(
            f"{path}: {what}, which is not supported: use a file of this project, or a .pkl file of "
            "StyleGAN2-ADA-PyTorch, of Styleformer, or of StyleGAN3 with a StyleGAN2 network"
        )


def _read_document(path: Path) -> Any:
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {kind}")
    _check_kind(path)
    try:
        return read_torch_file(path)
    except UserError as error:
        raise UserError(f"{path}: {error}; use another copy") from None
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, KeyError, EOFError, RuntimeError, ... for corrupt files
        raise UserError(f"{path}: damaged or incomplete ({describe_error(error)}); use another copy") from None


def _check_kind(path: Path) -> None:
    """Raise UserError, with a description, for a file that is not a zip file written by `torch.save`."""
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if what := _describe_start(path, start):
        raise UserError(f"{path}: not a file of this project: {what}")


def _describe_start(path: Path, start: bytes) -> str | None:
    """Describe a file by its first bytes; return None if torch.save may have written it."""
    if start.startswith(b"PK"):
        return None
    if not start:
        return "empty"
    if is_pickle(path):
        return "a pickle, not opened because unpickling could run code"
    return next((what for first, what in SIGNATURES.items() if start.startswith(first)), "unknown format")


def _describe_zip(path: Path) -> str | None:
    """Describe a zip file of another program; return None for torch.save files, corrupt files and other formats."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises BadZipFile, OSError, ValueError, IndexError, ...
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays, as accepted by --projected-w and --direction"
    if any(name == "dataset.json" or name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return "a dataset, as accepted by --data"
    return None


def digest(value: Any) -> str:
    """Return the sha256 of nested dicts, lists, tuples, plain values and tensors: types, order and all bytes."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _feed(sha, key)
            _feed(sha, item)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(f"{type(value).__name__} {value!r};".encode())


def copy_to_cpu(value: Any, *, always: bool = True) -> Any:
    """Copy nested containers and their tensors to the CPU; with always=False, share tensors already on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=always)
    if isinstance(value, Mapping):
        return {key: copy_to_cpu(item, always=always) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_cpu(item, always=always) for item in value)
    return value
