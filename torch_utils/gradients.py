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
    `num_means` more numbers travel with the gradients: the batch means that a loss returns.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_means: int) -> None:
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        like = parameters[0]
        self.buffer = torch.zeros(sum(sizes) + num_means, dtype=like.dtype, device=like.device)
        self.gradients, self.means = self.buffer.split([sum(sizes), num_means])
        offset = 0
        for p, size in zip(parameters, sizes, strict=True):
            p.grad = self.buffer.as_strided(p.shape, p.stride(), offset)  # an optimizer wants the parameter's layout
            offset += size

    def zero(self) -> None:
        """Forget the gradients and the means."""
        self.buffer.zero_()

    def reduce(self) -> tuple[Tensor, Tensor]:
        """Replace gradients and means by their averages over all processes.

        Returns the norm of the gradients and whether anything among all of these is not finite, as scalars on the
        device; a norm that is too large for its type counts as that too. A collective call; every process gets the
        same answer.
        """
        if distributed.world_size() > 1:
            distributed.all_reduce(self.buffer)
            self.buffer /= distributed.world_size()
        norm = self.gradients.norm()
        return norm, ~(norm + self.means.sum()).isfinite()
