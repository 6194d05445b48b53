"""network-snapshot-*.pkl: networks and their configuration, for generation and transfer learning.

`load_network(path)` reads a snapshot. `pickle.load` cannot read it: the file contains only tensors and plain
values, no code (torch_utils/checkpoint.py describes the layout).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dnnlib.config import FLOAT32_MAX, OPTIONS_FILE, ConfigError, UserError, show, to_json
from dnnlib.util import describe_error
from torch_utils.checkpoint import Migration, copy_to_cpu, read_document, read_file, write_file
from torch_utils.misc import EmptyRandn, OnMeta, is_finite
from torch_utils.pickles import is_pickle
from training.config import TrainConfig, read_config
from training.dataset import LabelKind, kind_of_labels

SNAPSHOT_NAME = re.compile(r"network-snapshot-\d+\.pkl")  # excludes copies under other names
FORMAT = "network-snapshot"
VERSION = 1
MAX_IMAGES = 2**53  # upper bound of nimg, exact in a float
MAX_DERIVED = 2**25  # maximum elements of buffers that are not stored, such as resampling matrices
MIGRATIONS: Mapping[int, Migration] = {}  # version -> function that converts a payload to the next version


@dataclass(frozen=True)
class Snapshot:
    """Networks in evaluation mode, and metadata. G and D are None in a snapshot for generation only.

    `labels` is the kind of labels of a conditional network, or None if the file does not record it. `left_out` maps
    the entries of a foreign snapshot that were not read to the reasons.
    """

    G: Any
    D: Any
    G_ema: Any
    config: TrainConfig
    nimg: int
    ada_p: float
    path: Path
    labels: LabelKind | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def require_generator(self, use: str) -> None:
        """Raise UserError if the file does not contain G_ema; `use` completes "G_ema, which ..."."""
        if self.G_ema is None:
            raise UserError(f"{self.path}: contains no averaged generator (G_ema), which {use}")

    @property
    def kimg(self) -> float:
        """Thousands of real images that D has seen."""
        return self.nimg / 1000

    def notes(self) -> list[str]:
        """Return a line that lists the entries of the file that were not read, if any."""
        reasons = [f"{name} ({reason})" for name, reason in self.left_out.items()]
        return [f"{self.path}: skipped: {', '.join(reasons)}"] if reasons else []

    def label_kind(self) -> LabelKind | None:
        """Return the kind of labels recorded in the file or read from its dataset; None if unknown or unconditional."""
        return (self.labels or kind_of_labels(self.config.data.path)) if self.config.generator.c_dim else None


def save_network(
    path: Path,
    *,
    config: TrainConfig,
    G_ema: nn.Module,
    G: nn.Module | None = None,
    D: nn.Module | None = None,
    nimg: int = 0,
    ada_p: float = 0.0,
    labels: LabelKind | None = None,
) -> None:
    """Write a snapshot; without G and D it is smaller and supports only generation and metrics."""
    content = capture_network(config=config, G_ema=G_ema, G=G, D=D, nimg=nimg, ada_p=ada_p, labels=labels)
    write_network(path, content)


def capture_network(
    *,
    config: TrainConfig,
    G_ema: nn.Module,
    G: nn.Module | None = None,
    D: nn.Module | None = None,
    nimg: int = 0,
    ada_p: float = 0.0,
    labels: LabelKind | None = None,
) -> dict[str, Any]:
    """Return a copy of the content of a snapshot, which can be written while training continues."""
    networks = {"G": G, "D": D, "G_ema": G_ema}
    states = copy_to_cpu({name: net.state_dict() for name, net in networks.items() if net is not None})
    metadata = {"config": to_json(config), "nimg": nimg, "ada_p": ada_p} | ({"labels": labels} if labels else {})
    return {**metadata, "networks": states}


def write_network(path: Path, payload: dict[str, Any]) -> None:
    """Write the return value of `capture_network`. Raises WriteError."""
    write_file(path, FORMAT, VERSION, payload)


def list_snapshots(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, oldest first. Raises UserError for a run's folder without snapshots."""
    snapshots = sorted(path for path in folder.glob("network-snapshot-*.pkl") if SNAPSHOT_NAME.fullmatch(path.name))
    if not snapshots and (folder / OPTIONS_FILE).exists():
        raise UserError(f"{folder}: this run has written no snapshot yet")
    return snapshots


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot. Raises UserError naming the file if it is missing, corrupt, or not of this project."""
    path = Path(path)
    if path.is_dir() or (path.is_file() and is_pickle(path)):
        raise UserError(
            f"{path}: not a snapshot file of this project: legacy.load_network also reads folders of safetensors and, "
            "without running their code, the pickles of other projects"
        )
    return restore_network(read_file(path, FORMAT, VERSION, MIGRATIONS), path, device)


def restore_network(payload: Mapping[str, Any], path: Path, device: torch.device | str = "cpu") -> Snapshot:
    """Build the networks from the return value of `capture_network`. Raises UserError naming the file `path`."""
    metadata, states = parts_of(payload, path)
    return Snapshot(**build_networks(metadata["config"], states, path, device), **metadata, path=path)


def parts_of(payload: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config, nimg, ada_p and labels of a snapshot's content, and the tensors by network.

    Raises UserError naming `path` if any of them is missing or invalid.
    """
    try:
        config = read_config(payload.get("config"))
    except ConfigError as error:
        raise UserError(f"{path}: its configuration cannot be read ({error})") from None
    states, nimg, ada_p, labels = (payload.get(name) for name in ("networks", "nimg", "ada_p", "labels"))
    if not isinstance(states, dict) or not set(states) & {*network_configs(config)}:
        raise UserError(f"{path}: contains no networks; use another copy")
    is_valid = {
        "nimg": type(nimg) is int and 0 <= nimg < MAX_IMAGES,
        "ada_p": isinstance(ada_p, (int, float)) and 0 <= ada_p <= FLOAT32_MAX,
        "labels": labels in (None, *get_args(LabelKind)),
    }
    for name in is_valid:
        if not is_valid[name]:
            raise UserError(f"{path}: {name}={show(payload.get(name))} is not valid in a snapshot; use another copy")
    return {"config": config, "nimg": nimg, "ada_p": ada_p, "labels": labels}, states


def read_network(path: Path) -> dict[str, Any]:
    """Return the whole content of a snapshot file, in the form of `read_document`. Raises UserError."""
    return read_document(path, FORMAT, VERSION, MIGRATIONS)


def network_configs(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration of each network that a snapshot can contain."""
    return {"G": config.generator, "D": config.discriminator, "G_ema": config.generator}


def build_networks(
    config: TrainConfig, states: Mapping[str, Mapping[str, Tensor]], path: Path, device: torch.device | str
) -> dict[str, Any]:
    """Return G, D and G_ema with the tensors in `states`; a network without tensors is None.

    Raises UserError naming `path` and the network whose tensors do not fit or contain non-finite values.
    """
    return {
        name: _rebuild(kind, states[name], f"{path}: {name}", device) if name in states else None
        for name, kind in network_configs(config).items()
    }


def _rebuild(config: Any, state: Mapping[str, Tensor], name: str, device: torch.device | str) -> nn.Module:
    check_tensors(config, state, name)
    with torch.random.fork_rng(devices=[]), EmptyRandn():  # functions of torch.nn.init advance the global generator
        network: nn.Module = config.build()
    network.load_state_dict(state)
    for key, x in network.state_dict().items():
        if not is_finite(x):
            raise UserError(
                f"{name}: {key} contains non-finite values: training had already failed; use an earlier snapshot"
            )
    return network.eval().requires_grad_(False).to(device)


def check_tensors(config: Any, tensors: Any, where: str) -> None:
    """Raise UserError, with the prefix `where`, for the first tensor that does not fit the network of `config`.

    The network is not allocated: the configuration in a file may describe a far larger network than its tensors.
    """
    expected = outline(config, where).state_dict()
    if not isinstance(tensors, Mapping):
        raise UserError(f"{where}: not a mapping of tensors by name, as the configuration requires")
    for key in [*expected, *tensors]:
        if key not in tensors:
            raise UserError(f"{where}: the tensor {key} is missing; the configuration requires it")
        if key not in expected:
            raise UserError(f"{where}: the tensor {key} does not exist in the network of the configuration")
        if _kind(tensors[key]) != _kind(expected[key]):
            raise UserError(f"{where}: {key} is {_kind(tensors[key])}, the configuration needs {_kind(expected[key])}")


def outline(config: Any, where: str) -> nn.Module:
    """Return the network of `config` on the meta device, without values.

    Raises UserError, with the prefix `where`, if the configuration is invalid.
    """
    try:
        with OnMeta():
            network: nn.Module = config.build()
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:  # the last three: sizes beyond 64 bits
        raise UserError(f"{where}: no network can be built from its configuration ({describe_error(error)})") from None
    stored = network.state_dict()
    derived = sum(x.numel() for name, x in network.named_buffers() if name not in stored)
    if derived > MAX_DERIVED:
        raise UserError(f"{where}: needs {derived} buffer elements besides its weights; the limit is {MAX_DERIVED}")
    return network


def _kind(x: Any) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}" if isinstance(x, Tensor) else show(x)
