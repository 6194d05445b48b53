"""Leaky ReLU between up- and downsampling, which band-limits the frequencies that it creates (StyleGAN3, section 3.2).

The operator is composed of bias_act and upfirdn2d and uses their implementations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_utils.custom_ops import Impl
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import Pair, upfirdn2d


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Return D(clamp(gain * leaky_relu(U(x + b)))) for x [B, C, H, W], with up- and downsampling U and D.

    1. Add the bias b [C].
    2. Upsample by `up` with the filter `fu` and the gain up^2. `padding`, as in upfirdn2d, refers to the upsampled
       image.
    3. Apply leaky ReLU with this slope, the gain, and the clamp; None disables the clamp.
    4. Downsample by `down` with the filter `fd`.

    Filters are vectors (separable) or matrices; None is the identity. The output has
    (H up + y0 + y1 - rows of fu + 1 - rows of fd) // down + 1 rows. Twice differentiable in x and b. Raises ValueError
    like bias_act and upfirdn2d.
    """
    if b is not None:
        x = bias_act(x, b, impl=impl)
    x = upfirdn2d(x, _taps(fu, x), up=up, padding=padding, gain=up**2, flip_filter=flip_filter, impl=impl)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    return x if fd is None and down == 1 else upfirdn2d(x, _taps(fd, x), down=down, flip_filter=flip_filter, impl=impl)


def _taps(f: Tensor | None, x: Tensor) -> Tensor:
    """Return a filter; None is the identity."""
    return torch.ones(1, device=x.device) if f is None else f
