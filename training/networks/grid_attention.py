"""Variants of self-attention on a grid of tokens: within cells, along axes, and with landmarks (Nystrom).

Token y W + x is at position (y, x). TransGAN compares the variants (Jiang et al. 2021, table 3).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from training.networks import execution
from training.networks.attention import Attention, attend, split_heads
from training.networks.generator import Grid

AttentionType = Literal["full", "grid", "axis", "nystrom"]


class RelativePosition(nn.Module):
    """Learned attention bias per head and relative position (Shaw et al. 2018; as a bias table, Liu et al. 2021).

        R_h[(y, x), (y', x')] = T[y - y' + H - 1, x - x' + W - 1, h]

    The table T (2H - 1, 2W - 1, heads) is initialized from N(0, 0.02^2).
    """

    def __init__(self, num_heads: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        height, width = grid
        self.table = nn.Parameter(torch.empty(2 * height - 1, 2 * width - 1, num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        """Return the bias (heads, N, N) of every pair of query and key."""
        height, width = self.grid
        windows = self.table.unfold(0, height, 1).unfold(1, width, 1)  # [y, x, h, H-1-y', W-1-x']
        return windows.flip(3, 4).permute(2, 0, 1, 3, 4).flatten(3, 4).flatten(1, 2)


class CellAttention(Attention):
    """Self-attention softmax(Q K^T / sqrt(D) + R) V within each cell of the grid.

    A single cell that covers the grid gives full attention. Smaller cells give TransGAN's grid self-attention, with a
    cost linear in the number of cells. R is the optional relative position bias, shared by all cells.
    """

    def __init__(self, num_heads: int, grid: Grid, cell: Grid, *, use_relative: bool) -> None:
        super().__init__(num_heads)
        self.grid, self.cell = grid, cell
        self.relative = RelativePosition(num_heads, cell) if use_relative else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = None if self.relative is None else self.relative()
        q, k, v = (split_heads(to_cells(x, self.grid, self.cell), self.num_heads) for x in (q, k, v))
        y = attend(q, k, v, bias).transpose(1, 2).flatten(2)  # (B cells, tokens of a cell, C)
        return from_cells(y, self.grid, self.cell)


class AxisAttention(Attention):
    """Attention within rows, followed by attention within columns of the result (Ho et al. 2019, "Axial attention").

        V'[y, x] = sum_x' A_row[y; x, x'] V[y, x'],   out[y, x] = sum_y' A_column[x; y, y'] V'[y', x]

    Both passes use the same queries and keys, so the parameters of a block are independent of the attention type.
    """

    def __init__(self, num_heads: int, grid: Grid, *, use_relative: bool) -> None:
        super().__init__(num_heads)
        height, width = grid
        self.rows = CellAttention(num_heads, grid, (1, width), use_relative=use_relative)
        self.columns = CellAttention(num_heads, grid, (height, 1), use_relative=use_relative)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.columns(q, k, self.rows(q, k, v))
        return out


class NystromAttention(Attention):
    """Nystrom approximation of softmax attention, with a cost linear in N (Xiong et al. 2021, "Nyströmformer").

        F = softmax(Q K~^T / sqrt(D)),   A = softmax(Q~ K~^T / sqrt(D)),   B = softmax(Q~ K^T / sqrt(D))
        out = F A+ (B V)

    The landmarks Q~ and K~ (landmarks, D) are means over segments of consecutive tokens. The pseudo-inverse A+ of A is
    the result of ITERATIONS steps of

        Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,   Z_0 = A^T / (|A|_1 |A|_inf)

    With one token per landmark the approximation is exact up to the convergence of this iteration. Unlike in the paper,
    there is no convolution of the values. Relative positions are not defined between landmarks and are not used. A and
    its pseudo-inverse are computed in float32.
    """

    ITERATIONS = 6

    def __init__(self, num_heads: int, landmarks: int) -> None:
        super().__init__(num_heads)
        self.landmarks = landmarks

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(x, self.num_heads) for x in (q, k, v))  # each (B, H, N, D)
        q = q / math.sqrt(q.shape[3])
        q_mean, k_mean = (x.unflatten(2, (self.landmarks, -1)).mean(dim=3) for x in (q, k))  # (B, H, landmarks, D)
        inverse = pseudo_inverse(
            (execution.full_precision(q_mean) @ execution.full_precision(k_mean).mT).softmax(dim=3), self.ITERATIONS
        )
        summary = (q_mean @ k.mT).softmax(dim=3) @ v  # (B, H, landmarks, D)
        y = (q @ k_mean.mT).softmax(dim=3) @ (inverse @ execution.full_precision(summary)).to(v.dtype)
        return y.transpose(1, 2).flatten(2)


def pseudo_inverse(A: Tensor, iterations: int) -> Tensor:
    """Iterative pseudo-inverse of A (..., n, n), with third-order convergence (Razavi et al. 2014)."""
    norms = A.abs().sum(dim=-2).amax(dim=-1) * A.abs().sum(dim=-1).amax(dim=-1)
    Z = A.mT / norms[..., None, None]
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * one - AZ @ (15 * one - AZ @ (7 * one - AZ))) / 4
    return Z


def to_cells(x: Tensor, grid: Grid, cell: Grid) -> Tensor:
    """Partition the tokens of a grid (B, H W, C) into cells in row-major order, (B cells, h w, C)."""
    (H, W), (h, w) = grid, cell
    cells = x.unflatten(1, (H // h, h, W // w, w)).transpose(2, 3)
    return cells.reshape(-1, h * w, x.shape[2])


def from_cells(x: Tensor, grid: Grid, cell: Grid) -> Tensor:
    """Invert `to_cells`."""
    (H, W), (h, w) = grid, cell
    return x.reshape(-1, H // h, W // w, h, w, x.shape[2]).transpose(2, 3).reshape(-1, H * W, x.shape[2])
