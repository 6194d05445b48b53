"""Derivatives of convolutions and other functions of two tensors, for comparison with a reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Convolve = Callable[[Tensor, Tensor], Tensor]


def derivatives(convolve: Convolve, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the output, its gradients, and the gradients of the gradient norms."""
    y = convolve(x, weight)
    first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
    second = [torch.autograd.grad(g.square().sum(), (x, weight), retain_graph=True) for g in first]
    return [y, *first, *(g for pair in second for g in pair)]


def third_derivatives(convolve: Convolve, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Return gradients of a function of the weight gradient of a function of the input gradient."""
    (dx,) = torch.autograd.grad(convolve(x, weight).pow(3).sum(), x, create_graph=True)
    (dw,) = torch.autograd.grad(dx.pow(3).sum(), weight, create_graph=True)
    return torch.autograd.grad(dw.pow(3).sum(), (x, weight))
