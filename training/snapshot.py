"""network-snapshot-*.pkl: the networks and their configuration, to generate images from and to start training from.

`load_network(path)` is the way to read one; `pickle.load` cannot, because the file holds tensors and plain values
only and runs no code (see torch_utils/checkpoint.py for its layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.config import ConfigError, UserError, to_json
from torch_utils.checkpoint import Migration, copy_to_cpu, read_document, read_file, write_file
from training.config import TrainConfig, read_config

FORMAT = "network-snapshot"
VERSION = 1
MIGRATIONS: Mapping[int, Migration] = {}  # version -> function from its payload to that of the next version


@dataclass(frozen=True)
class Snapshot:
    """Networks in evaluation mode, and how they came about. G and D are None in a snapshot for generation only."""

    G: Any
    D: Any
    G_ema: Any
    config: TrainConfig
    nimg: int
    ada_p: float
    path: Path

    @property
    def kimg(self) -> float:
        """Thousands of real images that D has seen."""
        return self.nimg / 1000


def save_network(
    path: Path,
    *,
    config: TrainConfig,
    G_ema: nn.Module,
    G: nn.Module | None = None,
    D: nn.Module | None = None,
    nimg: int = 0,
    ada_p: float = 0.0,
) -> None:
    """Write a snapshot; without G and D it serves for generation and metrics only, at a fraction of the size."""
    write_network(path, capture_network(config=config, G_ema=G_ema, G=G, D=D, nimg=nimg, ada_p=ada_p))


def capture_network(
    *,
    config: TrainConfig,
    G_ema: nn.Module,
    G: nn.Module | None = None,
    D: nn.Module | None = None,
    nimg: int = 0,
    ada_p: float = 0.0,
) -> dict[str, Any]:
    """Return the content of a snapshot, a copy that can be written while training goes on."""
    networks = {"G": G, "D": D, "G_ema": G_ema}
    states = copy_to_cpu({name: net.state_dict() for name, net in networks.items() if net is not None})
    return {"config": to_json(config), "nimg": nimg, "ada_p": ada_p, "networks": states}


def write_network(path: Path, payload: dict[str, Any]) -> None:
    """Write what `capture_network` returned. Raises WriteError."""
    write_file(path, FORMAT, VERSION, payload)


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot. Raises UserError naming the file when it is missing, damaged, or not one of ours."""
    path = Path(path)
    return restore_network(read_file(path, FORMAT, VERSION, MIGRATIONS), path, device)


def restore_network(payload: Mapping[str, Any], path: Path, device: torch.device | str = "cpu") -> Snapshot:
    """Rebuild the networks that `capture_network` saw; `path` is where they come from. Raises UserError naming it."""
    config, states, nimg, ada_p = parts_of(payload, path)
    networks = {
        name: rebuild(kind, states[name], f"{path}: {name}", device) if name in states else None
        for name, kind in network_configs(config).items()
    }
    return Snapshot(**networks, config=config, nimg=nimg, ada_p=ada_p, path=path)


def parts_of(payload: Mapping[str, Any], path: Path) -> tuple[TrainConfig, dict[str, Any], int, float]:
    """Return configuration, tensors by network, images seen and ADA's p in the content of a snapshot.

    Raises UserError naming `path` where there are none.
    """
    try:
        config = read_config(payload.get("config"))
    except ConfigError as error:
        raise UserError(f"{path}: its configuration cannot be read ({error})") from None
    states, nimg, ada_p = (payload.get(name) for name in ("networks", "nimg", "ada_p"))
    if not (isinstance(states, dict) and isinstance(nimg, int) and isinstance(ada_p, (int, float))):
        raise UserError(f"{path}: does not hold what a snapshot holds; use another copy")
    return config, states, nimg, ada_p


def read_network(path: Path) -> dict[str, Any]:
    """Return all of a snapshot's file, as `read_document` does. Raises UserError."""
    return read_document(path, FORMAT, VERSION, MIGRATIONS)


def network_configs(config: TrainConfig) -> dict[str, Any]:
    """Return what builds each network that a snapshot can hold."""
    return {"G": config.generator, "D": config.discriminator, "G_ema": config.generator}


def rebuild(config: Any, state: Mapping[str, torch.Tensor], name: str, device: torch.device | str) -> nn.Module:
    """Return the network of a configuration with these tensors. Raises UserError beginning with `name` otherwise."""
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away; leave no trace of drawing them
        network: nn.Module = config.build()
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: its tensors do not fit its configuration ({error})") from None
    return network.eval().requires_grad_(False).to(device)
