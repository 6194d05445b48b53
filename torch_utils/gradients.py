"""Gradients of a network in one flat buffer: zeroing, all-reducing and checking them take one kernel each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_utils import distributed

ALIGNMENT = 64  # elements; a multiple of the vector width of vectorised kernels


class FlatGradients:
    """Flat buffer with `p.grad` of each parameter as a view.

    A backward pass accumulates into the views in place. A parameter that the loss does not reach has a zero gradient,
    not None, so the optimizer treats it the same for every loss and every implementation of an operator.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        like = parameters[0]
        self.buffer = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        offset = 0
        for p, size in zip(parameters, sizes, strict=True):
            p.grad = self.buffer.as_strided(p.shape, p.stride(), offset)  # the layout that optimizers require
            offset += size

    def zero(self) -> None:
        """Set the gradients to zero."""
        self.buffer.zero_()

    def reduce(self) -> Tensor:
        """Average the gradients over all processes in place; return their norm, a scalar on the device.

        The norm is not finite if any gradient is not finite or if the norm overflows its dtype. A collective call with
        the same result on every process.
        """
        return distributed.average(self.buffer).norm()
