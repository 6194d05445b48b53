"""Transforms of the positions at the input of a generator."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from dnnlib.config import UserError
from training.networks import execution
from training.networks.alias_free import FourierInput


def can_shift(G: Any) -> bool:
    """Return whether a generator has Fourier features at its input, which shift its images."""
    return isinstance(getattr(getattr(G, "synthesis", None), "input", None), FourierInput)


def can_rotate(G: Any) -> bool:
    """Return whether a generator is equivariant to rotation, like configuration R of StyleGAN3."""
    return can_shift(G) and getattr(G.synthesis, "has_radial_filters", False)


def transform_input(G: Any, matrices: Tensor) -> AbstractContextManager[None]:
    """Context manager in which matrices (1 or B, 3, 3) are applied to the positions of a generator's Fourier features.

    Raises UserError if `G.synthesis.input` is not a FourierInput.
    """
    if not can_shift(G):
        raise UserError(
            f"the input of {type(G).__name__} cannot be moved: equivariance is defined for generators with Fourier "
            "features at their input; use such a network, e.g. of --cfg=stylegan3-t or styleformer-a, or omit the "
            "metric"
        )
    return execution.using(input_transform=matrices)
