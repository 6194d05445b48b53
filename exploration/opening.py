"""Snapshots as the commands of generate.py open them: on a device, with the label and settings of their options."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError
from exploration.model import Model, label_of, vector_label
from torch_utils import custom_ops, distributed
from torch_utils.misc import name_user
from training.networks import execution
from training.snapshots.reading import load_network
from training.snapshots.snapshot import Snapshot


def open_network(network: Path | str, device: str | None) -> tuple[Snapshot, torch.device]:
    """Read a snapshot onto the device that is asked for, or the best one, and get that ready."""
    name_user()
    tune_allocator()
    where = distributed.use_device(device)
    snapshot = load_network(network, where)
    for note in snapshot.notes():
        click.echo(note, err=True)
    snapshot.require_generator("images are made by")
    channels = snapshot.G_ema.img_shape[0]
    if channels not in (1, 3, 4):
        raise UserError(f"--network={network}: its images have {channels} channels, and picture files 1, 3 or 4")
    if where.type == "cuda":
        click.echo(custom_ops.prepare(where))
    execution.set_gpu_arithmetic()
    return snapshot, where


def open_model(
    *,
    network: Path | str,
    class_index: int | None,
    label: tuple[float, ...] | None,
    noise_mode: str,
    batch: int,
    precision: str,
    device: str | None,
    trunc: float = 1.0,
    class_flag: str = "--class",
    needs_class: bool = True,
) -> Model:
    """Return the averaged generator of a snapshot as MODEL_OPTIONS say."""
    snapshot, where = open_network(network, device)
    c = choose_label(snapshot, class_index, label, class_flag, is_needed=needs_class)
    return build_model(snapshot, where, c, noise_mode=noise_mode, batch=batch, precision=precision, trunc=trunc)


def choose_label(
    snapshot: Snapshot,
    class_index: int | None,
    label: tuple[float, ...] | None,
    class_flag: str = "--class",
    *,
    is_needed: bool = True,
) -> Tensor:
    """Return the label (1, c_dim) that --class or --label asks for, of zeros where none is needed.

    Raises UserError for one that the network does not have, and for a class of a network whose labels are vectors.
    """
    c_dim, kind = snapshot.config.generator.c_dim, snapshot.label_kind()
    if label is not None:
        if class_index is not None:
            raise UserError("--class and --label: give one of them")
        return vector_label(c_dim, label)
    if kind == "vectors" and class_index is not None:
        raise UserError(
            f"{class_flag}={class_index}: labels of this network are vectors; give its {c_dim} numbers with --label"
        )
    if kind == "vectors" and is_needed:
        raise UserError(f"--label: labels of this network are vectors; give its {c_dim} numbers, e.g. --label=0.5,...")
    if c_dim and kind is None and class_index is not None:
        click.echo(
            f"Warning: {snapshot.path}: does not say whether its labels are classes; taken for {c_dim} classes",
            err=True,
        )
    return label_of(c_dim, class_index, class_flag, is_needed=is_needed)


def build_model(
    snapshot: Snapshot,
    where: torch.device,
    c: Tensor,
    *,
    noise_mode: str,
    batch: int,
    precision: str,
    trunc: float,
) -> Model:
    """Return the averaged generator of a snapshot for labels c (1, c_dim)."""
    return Model(
        G=snapshot.G_ema,
        device=where,
        c=c.to(where),
        truncation_psi=trunc,
        noise_mode=noise_mode,
        batch=batch,
        execution=execution_of(snapshot, precision),
    )


def execution_of(snapshot: Snapshot, precision: str) -> execution.Execution:
    """Return the execution that --precision asks for."""
    return execution.Execution(reduced=execution.REDUCED[precision], min_grid=snapshot.config.reduced_from)


def is_mapping(seeds: tuple[int, ...] | None, projected_w: Path | None) -> bool:
    """Whether a command that takes both maps latents to styles, for which a conditional network needs a class."""
    return seeds is not None or projected_w is None
