"""Snapshots of this project and of others: read them without running any code in them, and say what is inside."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click
import torch

import training.snapshot
from dnnlib.cli import Script, option
from dnnlib.config import UserError
from training.exchange import is_folder, load_folder, save_folder, save_snapshot
from training.onnx_export import FixedNoise, export_onnx
from training.snapshot import Snapshot

# What --format says, by the ending of --dest that means it; a name without one is a folder.
FORMATS = {".pkl": "snapshot", "": "safetensors", ".onnx": "onnx"}


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot, or a folder of safetensors. Raises UserError for what is missing, damaged or of another kind."""
    if is_folder(Path(path)):
        return load_folder(path, device)
    return training.snapshot.load_network(path, device)


@click.group()
def main() -> None:
    """Say what a snapshot holds, and convert it."""


@main.command(cls=Script)
@click.argument("file", type=click.Path(path_type=Path))
def info(file: Path) -> None:
    """Print what FILE, a snapshot, holds."""
    snapshot = load_network(file)
    click.echo(f"{file}: kimg {snapshot.kimg:g}, preset {snapshot.config.preset}")


@main.command(cls=Script)
@option("--source", metavar="PATH", type=click.Path(path_type=Path), required=True, help="Snapshot, or its folder.")
@option("--dest", metavar="PATH", type=click.Path(path_type=Path), required=True, help="What to write; see above.")
@option(
    "--format",
    "kind",
    type=click.Choice([*FORMATS.values(), "hub"]),
    help="hub: a folder for the Hugging Face Hub.  [default: by the name of --dest]",
)
@option("--noise-mode", type=click.Choice(get_args(FixedNoise)), help="Of ONNX graphs.  [default: const]")
@option(
    "--license", metavar="NAME", help="For the Hub: licence of the weights, such as cc-by-4.0.  [default: left open]"
)
def convert(source: Path, dest: Path, kind: str | None, noise_mode: FixedNoise | None, license: str | None) -> None:
    """Write a snapshot in another form. Nothing that exists is written over.

    \b
    --dest=NAME.pkl           a snapshot, from a folder
    --dest=NAME               a folder of safetensors and config.json, without any loss
    --dest=NAME.onnx          NAME-mapping.onnx and NAME-synthesis.onnx, of the averaged generator
    --dest=NAME --format=hub  a folder to upload: averaged generator, model card, samples
    """
    kind = kind or kind_of(dest)
    for name, value, of in (("--noise-mode", noise_mode, "onnx"), ("--license", license, "hub")):
        if value is not None and kind != of:
            raise UserError(f"{name}={value}: is for --format={of}, this is {kind}; leave it out")
    snapshot = load_network(source)
    if kind == "onnx":
        for path in export_onnx(dest, snapshot, noise_mode or "const"):
            click.echo(f"Written: {path}")
        return
    if kind == "snapshot":
        save_snapshot(dest, snapshot)
    elif kind == "safetensors":
        save_folder(dest, snapshot)
    else:
        from training.hub import save_hub_folder  # which needs the package

        save_hub_folder(dest, snapshot, license)
    click.echo(f"Written: {dest}")
    if kind == "hub":
        click.echo(f"To upload it: hf upload NAME/MODEL {dest}")


def kind_of(dest: Path) -> str:
    """Return which form a name means. Raises UserError for one that means none."""
    if dest.suffix.lower() not in FORMATS:
        raise UserError(
            f"--dest={dest}: which form is that? .pkl is a snapshot, .onnx ONNX, a name without ending a folder of "
            "safetensors; or give --format"
        )
    return FORMATS[dest.suffix.lower()]


if __name__ == "__main__":
    main()
