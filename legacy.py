"""Read, inspect and convert snapshots of this and other projects, without running any code in the files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, get_args

import click

from dnnlib import EasyDict
from dnnlib.cli import DefaultGroup, FileOrURL, Script, option
from dnnlib.config import UserError, to_json
from metrics.registry import results_of, sha256_of_snapshot
from torch_utils.misc import count_parameters
from training.augment.pipe import MODE_FIELDS
from training.config import TrainConfig
from training.snapshots.exchange import is_folder, read_folder, save_folder, save_snapshot
from training.snapshots.foreign import is_foreign, read_foreign
from training.snapshots.onnx import FixedNoise, export_onnx
from training.snapshots.reading import load_network, local_snapshot, transfer_options
from training.snapshots.snapshot import (
    network_configs,
    outline,
    parts_of,
    read_network,
)

__all__ = ["load_network", "load_network_pkl", "transfer_options"]

# Suffix of --dest -> default of --format; a name without suffix is a folder.
FORMATS = {".pkl": "snapshot", "": "safetensors", ".onnx": "onnx"}


def load_network_pkl(f: BinaryIO, force_fp16: bool = False) -> EasyDict:
    """Read a snapshot from a binary file object like StyleGAN2-ADA's `load_network_pkl`, but without running its code.

    The result has the items, or attributes, 'G', 'D' and 'G_ema' (networks in evaluation mode on the CPU; None if
    missing in the file); 'training_set_kwargs', the arguments of ImageFolderDataset, or None if the dataset is unknown;
    'augment_pipe', always None. Raises UserError like `load_network`, and for `force_fp16`.
    """
    if isinstance(f, io.TextIOBase) or not hasattr(f, "read"):
        raise TypeError(f"{f!r} is not a binary file object; open the file with dnnlib.util.open_url(PATH)")
    if force_fp16:
        raise UserError(
            "force_fp16=True: precision is not a property of a network here; call the network inside "
            "`with training.networks.execution.using(reduced=torch.float16):`"
        )
    with _on_disk(f) as path:
        try:
            snapshot = load_network(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), _name_of(f))) from None
    for note in snapshot.notes():
        click.echo(note.replace(str(path), _name_of(f)), err=True)
    return EasyDict(
        G=snapshot.G,
        D=snapshot.D,
        G_ema=snapshot.G_ema,
        training_set_kwargs=_training_set_kwargs(snapshot.config),
        augment_pipe=None,
    )


@contextmanager
def _on_disk(f: BinaryIO) -> Iterator[Path]:
    """Yield a path to the unread content of a file object: its own file if nothing was read, else a temporary copy."""
    if _is_at_start_of_file(f):
        yield Path(f.name)
        return
    with TemporaryDirectory() as folder:
        name = re.search(r"network-snapshot-\d{1,12}\.pkl$", _name_of(f))  # keep the name, which contains kimg
        path = Path(folder) / (name[0] if name else "snapshot.pkl")
        with path.open("wb") as copy:
            shutil.copyfileobj(f, copy)
        yield path


def _is_at_start_of_file(f: BinaryIO) -> bool:
    """Return whether a file object is an unread file on disk, as open(f.name, "rb") returns it."""
    if not (isinstance(f, io.BufferedReader) and isinstance(f.raw, io.FileIO) and isinstance(f.name, str)):
        return False  # in memory, in an archive, compressed
    return (
        f.seekable()
        and f.tell() == 0
        and Path(f.name).is_file()
        and os.path.samestat(os.fstat(f.fileno()), os.stat(f.name))
    )


def _name_of(f: BinaryIO) -> str:
    """Return the name of a file object for messages; its type if it has no name."""
    name = getattr(f, "name", None)
    return name if isinstance(name, str) and name else type(f).__name__


def _training_set_kwargs(config: TrainConfig) -> EasyDict | None:
    """Return the arguments of ImageFolderDataset for the dataset of a run; None if it is unknown."""
    if not config.data.path:
        return None
    height, width = config.generator.img_size
    return EasyDict(
        path=config.data.path,
        use_labels=config.data.use_labels,
        max_size=config.data.max_images,
        xflip=config.data.mirror,
        random_seed=config.data.seed,
        resolution=height if height == width else None,
    )


@click.group(cls=DefaultGroup, default="convert")
def main() -> None:
    """Inspect and convert snapshots."""


@main.command(cls=Script)
@option("--source", type=FileOrURL(), required=True, help="Snapshot or safetensors folder.")
@option("--dest", metavar="PATH", type=click.Path(path_type=Path), required=True, help="Output path; see above.")
@option(
    "--format",
    "kind",
    type=click.Choice([*FORMATS.values(), "hub"]),
    help="Output format; hub: folder for the Hugging Face Hub.  [default: by the suffix of --dest]",
)
@option("--noise-mode", type=click.Choice(get_args(FixedNoise)), help="Noise in ONNX graphs.  [default: const]")
@option(
    "--license", metavar="NAME", help="For the Hub: licence of the weights, such as cc-by-4.0.  [default: unspecified]"
)
def convert(
    source: Path | str, dest: Path, kind: str | None, noise_mode: FixedNoise | None, license: str | None
) -> None:
    """Convert a snapshot to another format. Existing files are not overwritten.

    \b
    --dest=NAME.pkl           snapshot, e.g. from a safetensors folder or from another project's file
    --dest=NAME               folder with safetensors and config.json; lossless
    --dest=NAME.onnx          NAME-mapping.onnx and NAME-synthesis.onnx of G_ema
    --dest=NAME --format=hub  folder for upload: G_ema, model card, samples
    """
    kind = kind or kind_of(dest)
    for name, value, of in (("--noise-mode", noise_mode, "onnx"), ("--license", license, "hub")):
        if value is not None and kind != of:
            raise UserError(f"{name}={value}: applies to --format={of} only, not to {kind}; omit it")
    snapshot = load_network(source)
    for note in snapshot.notes():
        click.echo(note, err=True)
    if kind == "onnx":
        for path in export_onnx(dest, snapshot, noise_mode or "const"):
            click.echo(f"Written: {path}")
        return
    if kind == "snapshot":
        save_snapshot(dest, snapshot)
    elif kind == "safetensors":
        save_folder(dest, snapshot)
    else:
        from training.snapshots.hub import save_hub_folder  # requires an optional package

        save_hub_folder(dest, snapshot, license)
    click.echo(f"Written: {dest}")
    if kind == "hub":
        click.echo(f"Upload it with: hf upload NAME/MODEL {dest}")


def kind_of(dest: Path) -> str:
    """Return the format implied by the suffix of --dest. Raises UserError for an unknown suffix."""
    if dest.suffix.lower() not in FORMATS:
        raise UserError(
            f"--dest={dest}: unknown suffix: use .pkl for a snapshot, .onnx for ONNX, no suffix for a safetensors "
            "folder; or specify --format"
        )
    return FORMATS[dest.suffix.lower()]


@main.command(cls=Script)
@click.argument("file", type=FileOrURL())
@option("--json", "as_json", is_flag=True, help="Print all information, including the full configuration, as JSON.")
def info(file: Path | str, as_json: bool) -> None:
    """Describe FILE: a snapshot of this or another project (path or URL), or a safetensors folder.

    Prints its networks, configuration and metrics. Networks are not allocated, and no code in the file is run.
    """
    description = describe(local_snapshot(file))
    click.echo(json.dumps(description, indent=2) if as_json else "\n".join(_lines(description)))


def describe(path: Path) -> dict[str, Any]:
    """Return the description of a snapshot as plain values for JSON. Raises UserError."""
    if is_folder(path):
        document = read_folder(path)
        config, description = _describe_own(document, path)
        size = sum(file.stat().st_size for file in path.iterdir())
    else:
        config, description = _describe_foreign(path) if is_foreign(path) else _describe_own(read_network(path), path)
        size = path.stat().st_size
    sha256 = sha256_of_snapshot(path)
    names = description.pop("networks")
    return {
        "file": str(path),
        "bytes": size,
        "sha256": sha256,
        **description,
        "networks": {name: _describe_network(config, name, path) for name in network_configs(config) if name in names},
        "metrics": [
            {key: record.get(key) for key in ("metric", "results", "mirror")} for record in results_of(path, sha256)
        ],
        "config": to_json(config),
    }


def _describe_own(document: Mapping[str, Any], path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    description, states = parts_of(document["payload"], path)
    return description["config"], {
        "source": "Styleformer, this project",
        "format_version": document["version"],
        "written_by": document["written_by"],
        "kimg": description["nimg"] / 1000,
        "ada_p": description["ada_p"],
        "labels": description["labels"],
        "networks": list(states),
        "left_out": {},
    }


def _describe_foreign(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    foreign = read_foreign(path)
    return foreign.config, {
        "source": foreign.origin,
        "format_version": None,
        "written_by": None,
        "kimg": foreign.nimg / 1000 if foreign.nimg else None,
        "ada_p": foreign.ada_p,
        "labels": None,
        "networks": list(foreign.states),
        "left_out": dict(foreign.left_out),
    }


def _describe_network(config: TrainConfig, name: str, path: Path) -> dict[str, Any]:
    part = "discriminator" if name == "D" else "generator"
    network = outline(getattr(config, part), f"{path}: {name}")
    return {"family": to_json(config)[part]["family"], "parameters": count_parameters(network)}


def _lines(description: dict[str, Any]) -> Iterator[str]:
    """Yield the description of a snapshot as lines of text."""
    config = description["config"]
    G, augment, origin = config["generator"], config["augment"], config["origin"]
    height, width = config["discriminator"]["img_size"]
    yield f"file           {description['file']}, {description['bytes']:,} bytes"
    yield f"sha256         {description['sha256']}"
    version = (
        f", format {description['format_version']}, release {description['written_by']}"
        if description["written_by"]
        else ""
    )
    yield f"source         {description['source']}{version}"
    labels = {"classes": f"{G['c_dim']} classes", "vectors": f"labels of {G['c_dim']} numbers"}
    condition = labels.get(description["labels"], f"{G['c_dim']} classes or numbers") if G["c_dim"] else "no labels"
    yield f"images         {height}x{width}, {G['img_channels']} channels, {condition}"
    for name, network in description["networks"].items():
        yield f"{name:14} {network['family']}, {network['parameters']:,} parameters"
    kimg = "not known" if description["kimg"] is None else f"{description['kimg']:g}"
    yield f"trained        kimg {kimg}, preset {config['preset']}, data {config['data']['path'] or 'not known'}"
    pipe = f" {augment['pipe']}" if "pipe" in MODE_FIELDS[augment["mode"]] else ""
    p = "" if augment["mode"] == "noaug" else f", p {description['ada_p']:.3f}"
    yield f"augmentation   {augment['mode']}{pipe}{p}"
    if origin["source"]:
        yield f"started from   {origin['source']}, kimg {origin['kimg']:g}"
    for name, reason in description["left_out"].items():
        yield f"left out       {name}: {reason}"
    for record in description["metrics"]:
        values = ", ".join(f"{key} {value:.4g}" for key, value in record["results"].items())
        yield f"metric         {values}{' (flips counted)' if record['mirror'] else ''}"
    for part in ("generator", "discriminator") if "D" in description["networks"] else ("generator",):
        settings = (f"{key} {_text(value)}" for key, value in config[part].items() if key != "family")
        yield f"{part:14} {', '.join(settings)}"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
