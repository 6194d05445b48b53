"""Convolutions with second derivatives as fast as the first.

PyTorch computes the double backward of `F.conv2d` with respect to the weight as a convolution with an image as filter.
cuDNN has no fast kernel for that shape: on an H200 it took 5 to 30 times as long as the weight gradient itself
(benchmarks/micro.py). A convolution and its two derivatives are bilinear, and the derivatives of each are again one of
the three:

    y = x * w                 dx = I(dy, w)       dw = W(dy, x)
    I(g, w), by x             dg = dI * w         dw = W(g, dI)
    W(g, x), by w             dg = x * dW         dx = I(g, dW)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops import library


def conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """Return F.conv2d with these arguments, differentiable any number of times.

    x (B, I, H, W), weight (O, I / groups, k, k) -> (B, O, h, w).
    """
    return _Convolution.apply(x, weight, stride, padding, groups)


def conv_transpose2d(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """Return F.conv_transpose2d(x, weight, stride=stride), differentiable any number of times.

    x (B, O, h, w), weight (O, I, k, k) -> (B, I, H, W) with H = stride (h - 1) + k.
    """
    H, W = (stride * (side - 1) + k for side, k in zip(x.shape[2:], weight.shape[2:], strict=True))
    return _InputGradient.apply(x, weight, (H, W), stride, 0, 1)


class _Convolution(torch.autograd.Function):
    """Convolution x * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = stride, padding, groups
        return F.conv2d(x, w, stride=stride, padding=padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (dy,), (x, w) = grads, ctx.saved_tensors
        dx = _InputGradient.apply(dy, w, x.shape[2:], *ctx.geometry) if library.is_needed(ctx, 0) else None
        dw = _WeightGradient.apply(dy, x, w.shape, *ctx.geometry) if library.is_needed(ctx, 1) else None
        return dx, dw, None, None, None


class _InputGradient(torch.autograd.Function):
    """Input gradient I(g, w) for images of `size` (H, W)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, w: Tensor, size: tuple[int, int], stride: int, padding: int, groups: int
    ) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.geometry = stride, padding, groups
        smallest = (stride * (side - 1) + k - 2 * padding for side, k in zip(g.shape[2:], w.shape[2:], strict=True))
        output_padding = [side - minimum for side, minimum in zip(size, smallest, strict=True)]
        return F.conv_transpose2d(g, w, stride=stride, padding=padding, output_padding=output_padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (dx,), (g, w) = grads, ctx.saved_tensors
        dg = _Convolution.apply(dx, w, *ctx.geometry) if ctx.needs_input_grad[0] else None
        dw = _WeightGradient.apply(g, dx, w.shape, *ctx.geometry) if library.is_needed(ctx, 1) else None
        return dg, dw, None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """Weight gradient W(g, x) for weights of `shape`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: torch.Size, stride: int, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = stride, padding, groups
        w = x.new_empty(shape)  # only its shape matters
        sides = [stride] * 2, [padding] * 2, [1, 1]
        return torch.ops.aten.convolution_backward(g, x, w, None, *sides, False, [0, 0], groups, [False, True, False])[
            1
        ]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (dw,), (g, x) = grads, ctx.saved_tensors
        dg = _Convolution.apply(x, dw, *ctx.geometry) if ctx.needs_input_grad[0] else None
        dx = _InputGradient.apply(g, dw, x.shape[2:], *ctx.geometry) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None, None, None
