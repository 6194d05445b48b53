"""Loading of snapshots for the commands of generate.py: device, label, and settings from the options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError, family_of
from exploration.model import Model, label_of, vector_label
from exploration.pose import Pose, check_pose, read_pose
from torch_utils import distributed, kernels
from torch_utils.misc import name_user
from training.config import GENERATORS
from training.networks import execution
from training.snapshots import post_hoc
from training.snapshots.reading import load_network
from training.snapshots.snapshot import Snapshot


def open_network(network: Path | str, device: str | None, ema: float | None = None) -> tuple[Snapshot, torch.device]:
    """Load a snapshot onto the requested or best available device, and prepare the device.

    With `ema`, G_ema is rebuilt as the average of this length.
    """
    name_user()
    tune_allocator()
    torch_device = distributed.use_device(device)
    snapshot = load_network(network, torch_device)
    for note in snapshot.notes():
        click.echo(note, err=True)
    snapshot.require_generator("is needed to generate images")
    if ema is not None:
        plan = post_hoc.plan(snapshot, ema)
        click.echo(plan, err=True)
        snapshot = post_hoc.rebuild(snapshot, [plan])[0]
    channels = snapshot.G_ema.img_shape[0]
    if channels not in (1, 3, 4):
        raise UserError(f"--network={network}: its images have {channels} channels, but image files have 1, 3 or 4")
    if torch_device.type == "cuda":
        click.echo(kernels.prepare(torch_device))
    execution.set_gpu_arithmetic()
    return snapshot, torch_device


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
    ema: float | None = None,
    translate: Sequence[float] | None = None,
    rotate: float | None = None,
    class_flag: str = "--class",
    needs_class: bool = True,
) -> Model:
    """Return the averaged generator of a snapshot, configured by MODEL_OPTIONS and POSE_OPTIONS."""
    pose = read_pose(translate, rotate)
    snapshot, torch_device = open_network(network, device, ema)
    c = choose_label(snapshot, class_index, label, class_flag, is_needed=needs_class)
    return build_model(
        snapshot, torch_device, c, noise_mode=noise_mode, batch=batch, precision=precision, trunc=trunc, pose=pose
    )


def choose_label(
    snapshot: Snapshot,
    class_index: int | None,
    label: tuple[float, ...] | None,
    class_flag: str = "--class",
    *,
    is_needed: bool = True,
) -> Tensor:
    """Return the label (1, c_dim) of --class or --label, or zeros if no label is given or needed.

    Raises UserError for a label that the network does not support, such as a class if labels are vectors.
    """
    c_dim, kind = snapshot.config.generator.c_dim, snapshot.label_kind()
    if label is not None:
        if class_index is not None:
            raise UserError("--class and --label: cannot be combined; specify only one")
        return vector_label(c_dim, label)
    if kind == "vectors" and class_index is not None:
        raise UserError(
            f"{class_flag}={class_index}: labels of this network are vectors; specify {c_dim} numbers with --label"
        )
    if kind == "vectors" and is_needed:
        raise UserError(f"--label: labels of this network are vectors; specify {c_dim} numbers, e.g. --label=0.5,...")
    if c_dim and kind is None and class_index is not None:
        click.echo(
            f"Warning: {snapshot.path}: does not state whether labels are classes; assuming {c_dim} classes",
            err=True,
        )
    return label_of(c_dim, class_index, class_flag, is_needed=is_needed)


def build_model(
    snapshot: Snapshot,
    device: torch.device,
    c: Tensor,
    *,
    noise_mode: str,
    batch: int,
    precision: str,
    trunc: float,
    pose: Pose | None = None,
) -> Model:
    """Return the averaged generator of a snapshot with the label c (1, c_dim).

    Raises UserError if its images cannot be moved to the pose.
    """
    pose = pose or Pose()
    if pose.flags:
        check_pose(pose, snapshot.G_ema, family_of(snapshot.config.generator, GENERATORS))
    return Model(
        G=snapshot.G_ema,
        device=device,
        c=c.to(device),
        truncation_psi=trunc,
        noise_mode=noise_mode,
        batch=batch,
        pose=pose,
        execution=execution_of(snapshot, precision),
    )


def execution_of(snapshot: Snapshot, precision: str) -> execution.Execution:
    """Return the execution settings for --precision."""
    return execution.Execution(reduced=execution.REDUCED[precision], min_grid=snapshot.config.reduced_from)


def is_mapping(seeds: tuple[int, ...] | None, projected_w: Path | None) -> bool:
    """Return whether a command maps latents to styles, which requires a class if the network is conditional."""
    return seeds is not None or projected_w is None
