"""Twice differentiable attention that never materializes the full attention matrix.

The fused kernels of `F.scaled_dot_product_attention` have no double backward, and the double backward of its math
implementation stores several (B, H, N, M) matrices. Here, both derivatives iterate over blocks of queries and recompute
the softmax of each block, so memory is linear in N, as in the fused forward pass (Rabe & Staats 2021, "Self-attention
does not need O(n^2) memory"). With S = s Q K^T, s = 1 / sqrt(D), P = softmax(S), O = P V and a gradient G of O:

    dV = P^T G,   dP = G V^T,   dS = J dP,   dQ = s dS K,   dK = s dS^T Q,   J x = P * (x - rowsum(P * x))

Let (a, b, c) be the gradient of a scalar function of (dQ, dK, dV). The second derivatives of <G, O> are symmetric, so
the gradients of this function with respect to (Q, K, V, G) are the derivatives of (dQ, dK, dV, O) in the direction
(a, b, c) of (Q, K, V). A dot marks a directional derivative:

    S. = s (a K^T + Q b^T),   P. = J S.,   O. = P. V + P c,   dV. = P.^T G,   dP. = G c^T
    dS. = J (P. / P * (dP - rowsum(P * dP)) + dP.),   dQ. = s (dS. K + dS b),   dK. = s (dS.^T Q + dS^T a)

A bias R, added to S and shared by all images, has the gradient dR = sum of dS over images. S. then includes the tangent
of R.
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

# Size of one float32 block of the attention matrix; the double backward needs about five blocks at once. On a CPU,
# 4 MiB is slightly faster (by a sixth at 4,096 tokens) and 64 MiB much slower. A GPU needs larger blocks.
BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**28}
MIN_BLOCK = 16  # rows; matrix products with fewer rows are inefficient

# Fused kernels are used even inside a caller's sdpa_kernel(MATH) context. MATH is the fallback for inputs that no fused
# kernel supports, such as float64 on a GPU.
FORWARD_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v, twice differentiable, for q (B, H, N, D) and k, v (B, H, M, D).

    The optional `bias` (H, N, M) is shared by all images and is differentiated too. The derivatives store
    only (B, H, block, M) elements of the attention matrix; the default `block` is derived from the device's
    BLOCK_BYTES. Derivatives are computed in float32 (in float64 for float64 inputs) and returned in the dtype of the
    inputs. A third derivative raises RuntimeError. If first derivatives suffice, `F.scaled_dot_product_attention` is
    faster. Raises ValueError if `block` is less than 1.
    """
    if block is None:
        B, H, M, _ = k.shape
        block = max(MIN_BLOCK, BLOCK_BYTES[k.device.type] // (4 * B * H * M))
    if block < 1:
        raise ValueError(f"block={block}: the number of rows per block must be at least 1")
    return _Attention.apply(block, q, k, v, *(() if bias is None else (bias,)))


class _Attention(torch.autograd.Function):
    """Attention output O from Q, K, V and an optional bias, computed by a fused kernel."""

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
    """Blockwise gradients (dQ, dK, dV), and dR with a bias, as a differentiable function of G, Q, K, V and the bias."""

    @staticmethod
    def forward(ctx: Any, block: int, g: Tensor, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, q, k, v, *bias)
        ctx.block = block
        scale = 1 / math.sqrt(q.shape[3])
        G, Q, K, V = map(_matrices, (g, q, k, v))  # each (B H, N or M, D)
        R = _promote(bias)  # (H, N, M) or empty
        Q = Q * scale
        dQ, dK, dV = torch.empty_like(Q), torch.zeros_like(K), torch.zeros_like(V)
        dR = [torch.empty_like(x) for x in R]
        with torch.autocast(q.device.type, enabled=False):
            for rows in _blocks(Q, block):
                P = _add_bias(Q[:, rows] @ K.mT, R, rows).softmax(dim=2)  # (B H, block, M)
                dV.baddbmm_(P.mT, G[:, rows])
                dS = _center(G[:, rows] @ V.mT, P).mul_(P)
                dQ[:, rows] = scale * (dS @ K)
                dK.baddbmm_(dS.mT, Q[:, rows])
                _store_sum_over_images(dS, dR, rows)
        return tuple(map(_shaped_like, (dQ, dK, dV, *dR), (q, k, v, *bias)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Map gradients (a, b, c, r) with respect to (dQ, dK, dV, dR) to gradients with respect to (G, Q, K, V, R).

        By symmetry, the results are the directional derivatives of O, dQ, dK, dV and dR; `dot_X` is the directional
        derivative of X. Without a bias R, there is no r and no dR.
        """
        g, q, k, v, *bias = inputs = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[3])
        G, Q, K, V, a, b, c = map(_matrices, (g, q, k, v, *grads[:3]))
        R, r = _promote(bias), _promote(grads[3:])
        Q, a = Q * scale, a * scale
        dot_O, dot_dQ, dot_dK, dot_dV = (torch.zeros_like(x) for x in (G, Q, K, V))
        dot_dR = [torch.empty_like(x) for x in R]
        with torch.autocast(Q.device.type, enabled=False):
            for rows in _blocks(Q, ctx.block):
                P = _add_bias(Q[:, rows] @ K.mT, R, rows).softmax(dim=2)  # (B H, block, M)
                dot = (a[:, rows] @ K.mT).baddbmm_(Q[:, rows], b.mT)
                dot = _add_bias(dot, r, rows)  # dot = S.
                dot = _center(dot, P).mul_(P)  # dot = P.
                dot_dV.baddbmm_(dot.mT, G[:, rows])
                dot_O[:, rows] = (dot @ V).baddbmm_(P, c)

                dP = _center(G[:, rows] @ V.mT, P)
                dot *= dP
                dS = dP.mul_(P)
                dot.addcmul_(G[:, rows] @ c.mT, P)
                dot.addcmul_(P, dot.sum(dim=2, keepdim=True), value=-1)  # dot = dS.
                dot_dQ[:, rows] = scale * (dot @ K).baddbmm_(dS, b)
                dot_dK.baddbmm_(dot.mT, Q[:, rows]).baddbmm_(dS.mT, a[:, rows])
                _store_sum_over_images(dot, dot_dR, rows)
        return (None, *map(_shaped_like, (dot_O, dot_dQ, dot_dK, dot_dV, *dot_dR), inputs))


def _matrices(x: Tensor) -> Tensor:
    """Flatten batch and heads, (B, H, N, D) -> (B H, N, D), in at least float32."""
    return x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _promote(biases: Sequence[Tensor]) -> list[Tensor]:
    """Convert the bias, if any, to at least float32."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in biases]


def _add_bias(x: Tensor, biases: Sequence[Tensor], rows: slice) -> Tensor:
    """Add the given rows of the bias (H, N, M), if any, to every image of x (B H, rows, M), in place."""
    for bias in biases:
        x.unflatten(0, (-1, len(bias))).add_(bias[:, rows])
    return x


def _store_sum_over_images(x: Tensor, biases: Sequence[Tensor], rows: slice) -> None:
    """Set the given rows of the bias gradient (H, N, M), if any, to the sum of x (B H, rows, M) over images."""
    for bias in biases:
        torch.sum(x.unflatten(0, (-1, len(bias))), dim=0, out=bias[:, rows])


def _shaped_like(x: Tensor, like: Tensor) -> Tensor:
    return x.view(like.shape).to(like.dtype)


def _blocks(x: Tensor, block: int) -> Iterator[slice]:
    """Split the rows of x (B H, N, D) into slices of `block` rows; the last slice may be shorter."""
    return (slice(start, start + block) for start in range(0, x.shape[1], block))


def _center(x: Tensor, P: Tensor) -> Tensor:
    """Subtract the P-weighted mean from each row of x, in place."""
    return x.sub_((x * P).sum(dim=2, keepdim=True))
