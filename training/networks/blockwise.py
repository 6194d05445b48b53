"""Attention that can be differentiated twice without ever holding its whole matrix.

The fused kernels of `F.scaled_dot_product_attention` have no double backward, and its explicit form builds several
(B, H, N, M) matrices to have one. Here both derivatives go over blocks of queries and compute the softmax of a block
anew: memory is linear in N, as with the fused forward (Rabe & Staats 2021, "Self-attention does not need O(n^2)
memory"). With S = s Q K^T, s = 1 / sqrt(D), P = softmax(S), O = P V and a gradient G at the output:

    dV = P^T G,   dP = G V^T,   dS = J dP,   dQ = s dS K,   dK = s dS^T Q,   J x = P * (x - rowsum(P * x))

A scalar of (dQ, dK, dV) whose gradient is (a, b, c) has, as second derivatives of <G, O> can be swapped, as gradients
simply the slopes of dQ, dK, dV and O where Q, K, V move along (a, b, c). Slopes are written with a dot:

    S. = s (a K^T + Q b^T),   P. = J S.,   O. = P. V + P c,   dV. = P.^T G,   dP. = G c^T
    dS. = J (P. / P * (dP - rowsum(P * dP)) + dP.),   dQ. = s (dS. K + dS b),   dK. = s (dS.^T Q + dS^T a)

A bias R that is added to S, the same for all images, has dR = sum over images of dS, and what moves it is added to S. .
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Of one block of the matrix in float32; the double backward holds about five at a time. For a CPU's caches less would
# be a little better (4 MiB: by a sixth, at 4,096 tokens) and 64 MiB much worse; a GPU needs more to be busy.
BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**28}
MIN_BLOCK = 16  # rows: fewer make the matrix products too thin

# Also within a context that asks for MATH; that one remains for what no fused kernel takes, such as float64 on a GPU.
FORWARD_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v with two derivatives; q (B, H, N, D), k and v (B, H, M, D) -> (B, H, N, D).

    `bias` (H, N, M) is shared by all images and has derivatives too. The derivatives hold (B, H, block, M) of the
    matrix; by default as many rows as the device's BLOCK_BYTES allow. They compute in float32 (float64 for float64) and
    return the inputs' type. A third derivative raises RuntimeError. Where one derivative is enough,
    `F.scaled_dot_product_attention` is faster. Raises ValueError for a block without rows.
    """
    if block is None:
        B, H, M, _ = k.shape
        block = max(MIN_BLOCK, BLOCK_BYTES[k.device.type] // (4 * B * H * M))
    if block < 1:
        raise ValueError(f"block={block} rows of the attention matrix: give 1 or more")
    return _Attention.apply(block, q, k, v, *(() if bias is None else (bias,)))


class _Attention(torch.autograd.Function):
    """The output O, by a fused kernel; inputs are Q, K, V and perhaps a bias."""

    @staticmethod
    def forward(ctx: Any, block: int, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, *bias)
        ctx.block = block
        mask = bias[0].to(q.dtype).unsqueeze(0) if bias else None
        with torch.autocast(q.device.type, enabled=False), sdpa_kernel(FORWARD_KERNELS):
            return F.scaled_dot_product_attention(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Gradient.apply(ctx.block, *grads, *ctx.saved_tensors))


class _Gradient(torch.autograd.Function):
    """(dQ, dK, dV) and with a bias dR from G, Q, K, V and the bias, block by block; and the derivative of that."""

    @staticmethod
    def forward(ctx: Any, block: int, g: Tensor, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, q, k, v, *bias)
        ctx.block = block
        scale = 1 / math.sqrt(q.shape[3])
        G, Q, K, V = map(_matrices, (g, q, k, v))  # each (B H, N or M, D)
        R = _wide(bias)  # (H, N, M) or empty
        Q = Q * scale
        dQ, dK, dV = torch.empty_like(Q), torch.zeros_like(K), torch.zeros_like(V)
        dR = [torch.empty_like(x) for x in R]
        with torch.autocast(q.device.type, enabled=False):
            for rows in _blocks(Q, block):
                P = _add_to_images(Q[:, rows] @ K.mT, R, rows).softmax(dim=2)  # (B H, block, M)
                dV.baddbmm_(P.mT, G[:, rows])
                dS = _center(G[:, rows] @ V.mT, P).mul_(P)
                dQ[:, rows] = scale * (dS @ K)
                dK.baddbmm_(dS.mT, Q[:, rows])
                _store_sum_of_images(dS, dR, rows)
        return tuple(map(_shaped_like, (dQ, dK, dV, *dR), (q, k, v, *bias)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From (a, b, c) and with a bias r, the gradients at dQ, dK, dV and dR, to the slopes of O and of those."""
        g, q, k, v, *bias = inputs = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[3])
        G, Q, K, V, a, b, c = map(_matrices, (g, q, k, v, *grads[:3]))
        R, r = _wide(bias), _wide(grads[3:])
        Q, a = Q * scale, a * scale
        slope_O, slope_dQ, slope_dK, slope_dV = (torch.zeros_like(x) for x in (G, Q, K, V))
        slope_dR = [torch.empty_like(x) for x in R]
        with torch.autocast(Q.device.type, enabled=False):
            for rows in _blocks(Q, ctx.block):
                P = _add_to_images(Q[:, rows] @ K.mT, R, rows).softmax(dim=2)  # (B H, block, M)
                slope = (a[:, rows] @ K.mT).baddbmm_(Q[:, rows], b.mT)
                slope = _add_to_images(slope, r, rows)  # of S
                slope = _center(slope, P).mul_(P)  # of P
                slope_dV.baddbmm_(slope.mT, G[:, rows])
                slope_O[:, rows] = (slope @ V).baddbmm_(P, c)

                dP = _center(G[:, rows] @ V.mT, P)
                slope *= dP
                dS = dP.mul_(P)
                slope.addcmul_(G[:, rows] @ c.mT, P)
                slope.addcmul_(P, slope.sum(dim=2, keepdim=True), value=-1)  # of dS
                slope_dQ[:, rows] = scale * (slope @ K).baddbmm_(dS, b)
                slope_dK.baddbmm_(slope.mT, Q[:, rows]).baddbmm_(dS.mT, a[:, rows])
                _store_sum_of_images(slope, slope_dR, rows)
        return (None, *map(_shaped_like, (slope_O, slope_dQ, slope_dK, slope_dV, *slope_dR), inputs))


def _matrices(x: Tensor) -> Tensor:
    """One matrix per image and head, in at least float32: (B, H, N, D) -> (B H, N, D)."""
    return x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _wide(biases: Sequence[Tensor]) -> list[Tensor]:
    """The bias, if there is one, in at least float32."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in biases]


def _add_to_images(x: Tensor, biases: Sequence[Tensor], rows: slice) -> Tensor:
    """Add these rows of the bias (H, N, M), if there is one, to every image of x (B H, rows, M), in place."""
    for bias in biases:
        x.unflatten(0, (-1, len(bias))).add_(bias[:, rows])
    return x


def _store_sum_of_images(x: Tensor, biases: Sequence[Tensor], rows: slice) -> None:
    """Set these rows of a bias (H, N, M), if there is one, to the sum over images of x (B H, rows, M)."""
    for bias in biases:
        torch.sum(x.unflatten(0, (-1, len(bias))), dim=0, out=bias[:, rows])


def _shaped_like(x: Tensor, like: Tensor) -> Tensor:
    return x.view(like.shape).to(like.dtype)


def _blocks(x: Tensor, block: int) -> Iterator[slice]:
    """The rows of x (B H, N, D) in slices of `block`; the last one may be shorter."""
    return (slice(start, start + block) for start in range(0, x.shape[1], block))


def _center(x: Tensor, P: Tensor) -> Tensor:
    """Take the P-weighted mean from each row of x, in place."""
    return x.sub_((x * P).sum(dim=2, keepdim=True))
