"""The gradients of a network in one buffer, so that zeroing, averaging and checking them are one kernel each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_utils import distributed

ALIGNMENT = 64  # numbers; a multiple of what vectorised kernels load at once


class FlatGradients:
    """Makes `p.grad` of each parameter a view of one buffer, and keeps it so.

    A backward pass adds to the views in place. A parameter that a loss does not reach has a gradient of zero, not None,
    so that what an optimizer does with it depends neither on the loss nor on how an operator is implemented.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        like = parameters[0]
        self.buffer = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        offset = 0
        for p, size in zip(parameters, sizes, strict=True):
            p.grad = self.buffer.as_strided(p.shape, p.stride(), offset)  # an optimizer wants the parameter's layout
            offset += size

    def zero(self) -> None:
        """Forget the gradients."""
        self.buffer.zero_()

    def reduce(self) -> Tensor:
        """Replace the gradients by their averages over all processes; return their norm, a scalar on the device.

        It is not finite if any gradient is not, or if it is too large for its type. A collective call; every process
        gets the same answer.
        """
        return distributed.average(self.buffer).norm()
