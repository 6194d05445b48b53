"""Snapshots of this project and of others: read them without running any code in them, and say what is inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

import training.snapshot
from dnnlib.cli import FileOrURL, Script, option
from dnnlib.config import to_json
from dnnlib.download import is_url, open_url, sha256_of_file
from metrics.registry import results_of
from torch_utils.misc import count_parameters
from training.config import TrainConfig
from training.foreign import is_foreign, read_foreign
from training.snapshot import Snapshot, read_network, rebuild


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot, ours or a foreign one, from a path or an address on the web.

    Raises UserError naming the file when it is missing, damaged, or of an unknown kind.
    """
    path = local_file(path)
    if not is_foreign(path):
        return training.snapshot.load_network(path, device)
    foreign = read_foreign(path)
    config, states = foreign.config, foreign.states
    kinds = {"G": config.generator, "D": config.discriminator, "G_ema": config.generator}
    networks = {
        name: rebuild(kind, states[name], f"{path}: {name}", device) if name in states else None
        for name, kind in kinds.items()
    }
    return Snapshot(**networks, config=config, nimg=foreign.nimg, ada_p=foreign.ada_p, path=path)


def local_file(path: str | Path) -> Path:
    """Return the path, or where the file behind an address is kept; it is fetched the first time."""
    return open_url(str(path)) if is_url(path) else Path(path)


@click.group()
def main() -> None:
    """Say what a snapshot holds."""


@main.command(cls=Script)
@click.argument("file", type=FileOrURL())
@option("--json", "as_json", is_flag=True, help="All of it, with the whole configuration, as JSON.")
def info(file: Path | str, as_json: bool) -> None:
    """Print what FILE holds, a snapshot of this project or a foreign one, or the address of one on the web.

    No network is built, and no code in the file is run.
    """
    about = describe(local_file(file))
    click.echo(json.dumps(about, indent=2) if as_json else "\n".join(_lines(about)))


def describe(path: Path) -> dict[str, Any]:
    """Return what a snapshot holds, as plain values for JSON. Raises UserError."""
    sha256 = sha256_of_file(path) if path.is_file() else ""
    config, about = _describe_foreign(path) if is_foreign(path) else _describe_ours(path)
    names = about.pop("networks")
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256,
        **about,
        "networks": {name: _describe_network(config, name) for name in ("G", "D", "G_ema") if name in names},
        "metrics": [{"metric": record["metric"], "results": record["results"]} for record in results_of(path, sha256)],
        "config": to_json(config),
    }


def _describe_ours(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    document, config = read_network(path)
    payload = document["payload"]
    return config, {
        "source": "Styleformer, this project",
        "format_version": document["version"],
        "written_by": document["written_by"],
        "kimg": payload["nimg"] / 1000,
        "ada_p": payload["ada_p"],
        "networks": list(payload["networks"]),
    }


def _describe_foreign(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    foreign = read_foreign(path)
    return foreign.config, {
        "source": foreign.origin,
        "format_version": None,
        "written_by": None,
        "kimg": foreign.nimg / 1000 if foreign.nimg else None,
        "ada_p": foreign.ada_p,
        "networks": list(foreign.states),
    }


def _describe_network(config: TrainConfig, name: str) -> dict[str, Any]:
    part = "discriminator" if name == "D" else "generator"
    with torch.device("meta"):
        network = getattr(config, part).build()
    return {"family": to_json(config)[part]["family"], "parameters": count_parameters(network)}


def _lines(about: dict[str, Any]) -> Iterator[str]:
    """The same for the screen."""
    config = about["config"]
    G, augment, origin = config["generator"], config["augment"], config["origin"]
    height, width = config["discriminator"]["img_size"]
    yield f"file           {about['file']}, {about['bytes']:,} bytes"
    yield f"sha256         {about['sha256']}"
    version = f", format {about['format_version']}, release {about['written_by']}" if about["written_by"] else ""
    yield f"source         {about['source']}{version}"
    yield f"images         {height}x{width}, {G['img_channels']} channels, {G['c_dim'] or 'no'} classes"
    for name, network in about["networks"].items():
        yield f"{name:14} {network['family']}, {network['parameters']:,} parameters"
    kimg = "not known" if about["kimg"] is None else f"{about['kimg']:g}"
    yield f"trained        kimg {kimg}, preset {config['preset']}, data {config['data']['path'] or 'not known'}"
    details = "" if augment["mode"] == "noaug" else f" {augment['pipe']}, p {about['ada_p']:.3f}"
    yield f"augmentation   {augment['mode']}{details}"
    if origin["source"]:
        yield f"started from   {origin['source']}, kimg {origin['kimg']:g}"
    for record in about["metrics"]:
        yield f"metric         {', '.join(f'{key} {value:.4g}' for key, value in record['results'].items())}"
    for part in ("generator", "discriminator") if "D" in about["networks"] else ("generator",):
        settings = (f"{key} {_text(value)}" for key, value in config[part].items() if key != "family")
        yield f"{part:14} {', '.join(settings)}"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
