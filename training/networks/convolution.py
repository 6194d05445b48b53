"""Convolutions that dispatch to the fastest implementation for the device and the required derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops import conv2d as conv2d_op
from torch_utils.ops import winograd
from torch_utils.ops.upfirdn2d import upfirdn2d
from training.networks import execution
from training.networks.weights import transformed


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Compute F.conv2d of x (B, I, H, W) with weight (O, I / groups, k, k) and bias (O,)."""
    is_plain = stride == padding == groups == 1 and bias is None
    if is_plain and winograd.is_profitable(x, weight, 1, is_cached=execution.current.transforms is not None):
        return _winograd(x, weight, winograd.same(x.shape[3], x.dtype))
    if _is_pointwise_product(x, weight, stride, padding, groups):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    if _has_slow_derivatives(x):
        y = conv2d_op.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
        return y if bias is None else y + bias[:, None, None]
    return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)


def halving_conv2d(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Filter x (B, I, H, W) with `blur` (4,), then convolve it with weight (O, I, k, k) and stride 2: (B, O, H/2, W/2).

    The image is padded with zeros.
    """
    if winograd.is_profitable(x, weight, 2, is_cached=execution.current.transforms is not None):
        return _winograd(x, weight, winograd.halving(tuple(blur.tolist())))
    return conv2d(upfirdn2d(x, blur, padding=weight.shape[2] // 2 + 1), weight, stride=2)


def conv_transpose2d(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """Compute F.conv_transpose2d of x (B, I, H, W) with weight (I, O, k, k)."""
    if _has_slow_derivatives(x):
        return conv2d_op.conv_transpose2d(x, weight, stride=stride)
    return F.conv_transpose2d(x, weight, stride=stride)


def _winograd(x: Tensor, weight: Tensor, algorithm: winograd.Algorithm) -> Tensor:
    return winograd.convolve(x, transformed(weight, algorithm), algorithm)


def _is_pointwise_product(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    """Return whether the convolution is a matrix product of the pixels in memory, on a CPU.

    The second derivatives of a product are products; those of F.conv2d take several times as long.
    """
    is_pointwise = weight.shape[2:] == (1, 1) and stride == groups == 1 and padding == 0
    return is_pointwise and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


def _has_slow_derivatives(x: Tensor) -> bool:
    """Return whether second derivatives are needed on a GPU, where PyTorch's implementation is slow.

    On a CPU, PyTorch's second derivatives are 8 to 32 % faster than those of torch_utils.ops.conv2d, and equally fast
    for grouped convolutions.
    """
    return execution.current.twice_differentiable and x.is_cuda
