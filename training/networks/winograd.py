"""3x3 convolution with a quarter of the multiplications, for wide layers on a CPU.

Winograd's minimal filtering algorithm F(4x4, 3x3) (Lavin & Gray 2016, "Fast algorithms for convolutional neural
networks") computes a 4x4 output tile Y from a 6x6 input tile d and a 3x3 kernel g:

    Y = A^T [ (G g G^T) * (B^T d B) ] A

The product * is elementwise over the tile, so the sum over input channels amounts to 36 matrix products. All steps are
linear maps in PyTorch operations and can be differentiated any number of times.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Finite interpolation points, in addition to infinity. The points 0, +-1, +-2 give a two to four times larger error.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)

# Minimum sizes for which the saved multiplications outweigh the transforms (measured on AVX-512 cores).
MIN_CHANNELS = 256
MIN_GRID = 16


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return B^T, G and A^T of the Toom-Cook construction as matrices that act on a flattened 2-D tile."""
    size = len(POINTS) + 1
    data, kernel, output = np.zeros((size, size)), np.zeros((size, 3)), np.zeros((4, size))
    for i, point in enumerate(POINTS):
        others = np.delete(POINTS, i)
        data[i, :-1] = np.poly(others)[::-1]
        kernel[i] = point ** np.arange(3) / np.prod(point - others)
        output[:, i] = point ** np.arange(4)
    data[-1] = np.poly(POINTS)[::-1]  # the last row and column represent the point at infinity
    kernel[-1, -1] = output[-1, -1] = 1
    return tuple(torch.from_numpy(np.kron(m, m)) for m in (data, kernel, output))  # type: ignore[return-value]


DATA, KERNEL, OUTPUT = _transforms()  # (36, 36), (36, 9), (16, 36)


def is_profitable(x: Tensor, weight: Tensor) -> bool:
    """Return whether `conv3x3` supports x (B, C, H, W) and weight (C_out, C, 3, 3) and is faster than F.conv2d.

    The decision ignores the batch size, so the result for an image does not depend on its batch. Exported graphs
    use the convolutions of their runtime.
    """
    if torch.compiler.is_exporting():
        return False
    H, W = x.shape[2:]
    fits = tuple(weight.shape[2:]) == (3, 3) and H % 4 == 0 and W % 4 == 0
    return fits and x.device.type == "cpu" and min(weight.shape[:2]) >= MIN_CHANNELS and min(H, W) >= MIN_GRID


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Compute F.conv2d(x, weight, padding=1) for H and W divisible by 4, with about five times its rounding error."""
    B, C, H, W = x.shape
    C_out = len(weight)
    tiles = F.pad(x, [1, 1, 1, 1]).unfold(2, 6, 4).unfold(3, 6, 4)  # (B, C, H/4, W/4, 6, 6)
    data = DATA.to(x) @ tiles.permute(4, 5, 1, 0, 2, 3).reshape(36, -1)  # (36, C B H/4 W/4)
    kernel = KERNEL.to(x) @ weight.reshape(-1, 9).t()  # (36, C_out C)
    product = kernel.view(36, C_out, C) @ data.view(36, C, -1)  # (36, C_out, B H/4 W/4)
    out = OUTPUT.to(x) @ product.view(36, -1)  # (16, C_out B H/4 W/4)
    out = out.view(4, 4, C_out, B, H // 4, W // 4)
    return out.permute(3, 2, 4, 0, 5, 1).reshape(B, C_out, H, W)
