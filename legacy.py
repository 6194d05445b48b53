"""Snapshots of this project and of others: read them without running any code in them, and say what is inside."""

from __future__ import annotations

from pathlib import Path

import click
import torch

import training.snapshot
from dnnlib.cli import Script
from training.snapshot import Snapshot


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot. Raises UserError naming the file when it is missing, damaged, or of an unknown kind."""
    return training.snapshot.load_network(path, device)


@click.group()
def main() -> None:
    """Say what a snapshot holds."""


@main.command(cls=Script)
@click.argument("file", type=click.Path(path_type=Path))
def info(file: Path) -> None:
    """Print what FILE, a snapshot, holds."""
    snapshot = load_network(file)
    click.echo(f"{file}: kimg {snapshot.kimg:g}, preset {snapshot.config.preset}")


if __name__ == "__main__":
    main()
