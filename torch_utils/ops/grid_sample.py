"""Bilinear image resampling with derivatives of any order.

`F.grid_sample` has a second derivative only in recent versions of PyTorch. Resampling is linear in the image, so its
derivative is its adjoint, independent of the image, and the derivative of the adjoint is the resampling again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Arguments of aten's operator: bilinear interpolation, zero padding, align_corners=False.
_MODE = (0, 0, False)


def grid_sample(images: Tensor, grid: Tensor) -> Tensor:
    """Return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).

    images (B, C, H, W), grid (B, h, w, 2) of x and y in [-1, 1] -> (B, C, h, w). Differentiable with respect to the
    images any number of times. Raises ValueError for a grid that requires a gradient (not implemented).
    """
    if grid.requires_grad:
        raise ValueError("grid_sample has no gradient with respect to the grid: detach the grid")
    return _Resampling.apply(images, grid)


class _Resampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Adjoint.apply(*grads, *ctx.saved_tensors, ctx.shape), None


class _Adjoint(torch.autograd.Function):
    """Adjoint (transpose) of _Resampling as a linear map on images of `shape`."""

    @staticmethod
    def forward(ctx: Any, grads: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        images = grads.new_empty([]).expand(shape)  # only their shape matters
        return torch.ops.aten.grid_sampler_2d_backward(grads, images, grid, *_MODE, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Resampling.apply(*grads, *ctx.saved_tensors), None, None
