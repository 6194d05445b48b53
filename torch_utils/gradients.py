"""Gradients of a network in one flat buffer: adding, zeroing, all-reducing and checking them take few kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils import distributed

ALIGNMENT = 64  # elements; a multiple of the vector width of vectorised kernels


class FlatGradients:
    """Flat buffer with `p.grad` of each parameter as a view.

    A parameter that no loss reaches has a zero gradient, not None, so the optimizer treats it the same for every loss
    and every implementation of an operator.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        like = parameters[0]
        self.buffer = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        offset = 0
        for p, size in zip(parameters, sizes, strict=True):
            p.grad = self.buffer.as_strided(p.shape, p.stride(), offset)  # the layout that optimizers require
            offset += size

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss. `loss.backward()` would launch one kernel per parameter for that."""
        found: Any = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        reached: Any = [(p, g) for p, g in zip(self.parameters, found, strict=True) if g is not None]
        # A foreach operator takes one kernel for many tensors only if the strides of each pair agree.
        aligned = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in reached]
        if reached:
            torch._foreach_add_([p.grad for p, _ in reached], aligned)

    def zero(self) -> None:
        """Set the gradients to zero."""
        self.buffer.zero_()

    def reduce(self) -> Tensor:
        """Average the gradients over all processes in place; return their norm, a scalar on the device.

        The norm is not finite if any gradient is not finite or if the norm overflows its dtype. A collective call with
        the same result on every process.
        """
        return distributed.average(self.buffer).norm()
