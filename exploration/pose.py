"""Pose of an image: a rotation and a shift, as a transform of the input of a generator with Fourier features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnnlib.config import UserError
from training.input_transform import can_rotate, can_shift

MAX_SHIFT = 0.5  # of the image, along each axis; beyond, the frame shows more of its surroundings than of the image
MAX_DEGREES = 360.0  # a whole turn


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Rotation of an image by `degrees` counterclockwise about its centre, then a shift by (x, y), right and down.

    Shifts are fractions of the longer side of the image.
    """

    x: float = 0.0
    y: float = 0.0
    degrees: float = 0.0

    @property
    def flags(self) -> tuple[str, ...]:
        """Options of generate.py for this pose."""
        shift = [f"--translate={self.x:.12g},{self.y:.12g}"] if self.x or self.y else []
        return (*shift, *([f"--rotate={self.degrees:.12g}"] if self.degrees else []))

    @property
    def transform(self) -> Tensor:
        """Transform of positions (3, 3), the inverse of the image's motion."""
        one = torch.ones(1)
        return self.transforms(one, one)[0]

    def transforms(self, shift: Tensor, turn: Tensor) -> Tensor:
        """Return transforms of positions (n, 3, 3) for fractions (n,) of the shift and of the rotation."""
        x, y, angle = self.x * shift.double(), self.y * shift.double(), math.radians(self.degrees) * turn.double()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        rows = [cos, -sin, sin * y - cos * x, sin, cos, -sin * x - cos * y, zero, zero, zero + 1]
        return torch.stack(rows, dim=1).unflatten(1, (3, 3)).float()


def read_pose(translate: Sequence[float] | None, rotate: float | None) -> Pose:
    """Return the pose of --translate and --rotate. Raises UserError for values that are not allowed."""
    shift = ",".join(f"{number:g}" for number in translate or ())
    if translate is not None and len(translate) != 2:
        raise UserError(f"--translate={shift}: specify two numbers, to the right and down, e.g. --translate=0.25,0")
    x, y = translate or (0.0, 0.0)
    if not max(abs(x), abs(y)) <= MAX_SHIFT:
        raise UserError(
            f"--translate={shift}: must be {-MAX_SHIFT:g} to {MAX_SHIFT:g} of the image along each axis; beyond, the "
            "frame shows more of its surroundings than of the image"
        )
    degrees = rotate or 0.0
    if not abs(degrees) <= MAX_DEGREES:
        raise UserError(f"--rotate={degrees:g}: must be {-MAX_DEGREES:g} to {MAX_DEGREES:g} degrees, a whole turn")
    return Pose(x=x, y=y, degrees=degrees)


def check_pose(pose: Pose, G: Any, family: str) -> None:
    """Raise UserError if the images of a generator cannot be moved to a pose."""
    if pose.flags and not can_shift(G):
        raise UserError(
            f"{' '.join(pose.flags)}: this {family} network has no Fourier features at its input, so its images cannot "
            "be moved; use a network trained with --cfg=stylegan3-t, stylegan3-r, styleformer-a or styleformer-f"
        )
    if pose.degrees and not can_rotate(G):
        raise UserError(
            f"{pose.flags[-1]}: this {family} network is not equivariant to rotation, because its filters follow the "
            "axes of the image; use --translate, or a network trained with --cfg=stylegan3-r"
        )
