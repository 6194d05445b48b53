"""Multi-head attention over tokens: common interface, and full self-attention with an optional Linformer projection."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.networks import execution
from training.networks.blockwise import blockwise_attention
from training.networks.weights import effective

# Backends of run.attention besides "auto", PyTorch's choice.
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_reported: set[tuple[Any, ...]] = set()  # pairs of a backend and a kind of inputs


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v of shape (B, H, N, D).

    q has shape (B, H, N, D), k and v have shape (B, H, M, D), and the optional bias has shape (H, N, M).

    Uses the twice differentiable implementation if `execution.current` requires it, else PyTorch's fused kernels.
    """
    if execution.current.twice_differentiable:
        return blockwise_attention(q, k, v, bias=bias)
    if bias is None:
        return _fused(q, k, v)
    return _attend_biased(q, k, v, bias.to(q.dtype).unsqueeze(0))


def _attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Compute biased attention, zero-padding 16-bit heads to a multiple of 8 channels.

    The memory-efficient kernel requires such a multiple for 16-bit types with a bias. Zero padding does not change any
    dot product.
    """
    D = q.shape[3]
    if q.dtype.itemsize == 2 and D % 8:
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
    return _fused(q, k, v, bias, scale=1 / math.sqrt(D))[..., :D]


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Call PyTorch's attention, with the backend of `execution.current` for inputs that this backend supports."""
    name = execution.current.attention
    if name == "auto":
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    backends = [BACKENDS[name], *(x for x in BACKENDS.values() if x != BACKENDS[name])]
    with sdpa_kernel(backends[:1] if name == "math" else backends, set_priority=True):
        if not torch.compiler.is_compiling():
            _report_replacement(name, q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def _report_replacement(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Print one line if PyTorch replaces the backend for inputs of this kind."""
    case = name, q.device.type, q.dtype, q.shape[3], bias is not None
    if case not in _reported:
        _reported.add(case)
        if torch._fused_sdp_choice(q, k, v, bias) != BACKENDS[name].value:
            inputs = f"{q.dtype} heads of {q.shape[3]} channels on {q.device.type}"
            print(f"Attention: {name} does not support {inputs}; using PyTorch's choice", file=sys.stderr, flush=True)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split tokens (B, N, C) into heads (B, H, N, D), where C = H D is the concatenation of the heads."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Base class of self-attention. The inputs are the projected Q, K and V, which makes them visible to forward hooks.

    In every subclass, the output of a head is A(Q, K) V, linear in V. Attention maps show A. `margin` is the number of
    tokens beyond each edge of the image.
    """

    margin: int = 0

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q, k, v (B, N, C), with the heads concatenated along C, to (B, N, C)."""
        raise NotImplementedError


class SelfAttention(Attention):
    """Full self-attention, softmax(Q K^T / sqrt(D)) V per head.

    With `projected_tokens` = k, a learned matrix E (k, N) first projects keys and values from N to k tokens, which
    makes the cost linear in N (Wang et al. 2020, "Linformer"). E is shared by keys, values and all heads and is
    initialized from U(-1/sqrt(N), 1/sqrt(N)).
    """

    def __init__(self, num_heads: int, num_tokens: int, projected_tokens: int | None = None) -> None:
        super().__init__(num_heads)
        self.token_projection: nn.Parameter | None = None
        if projected_tokens is not None:
            bound = 1 / math.sqrt(num_tokens)
            self.token_projection = nn.Parameter(torch.empty(projected_tokens, num_tokens).uniform_(-bound, bound))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.queries_and_keys(q, k)
        return attend(q, k, self._split(self._project(v))).transpose(1, 2).flatten(2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the attention weights that `forward` applies to the (projected) values, (B, H, N, N or k)."""
        q, k = self.queries_and_keys(q, k)
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)

    def queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries (B, H, N, D) and the (projected) keys (B, H, N or k, D) of the heads."""
        return self._split(q), self._split(self._project(k))

    def _project(self, x: Tensor) -> Tensor:
        return x if self.token_projection is None else effective(self.token_projection, x.dtype) @ x

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class NormalizedSelfAttention(SelfAttention):
    """Self-attention with normalised queries and keys (Henry et al. 2020, "Query-key normalization").

        softmax(t q k^T / (|q| |k|)) v        per head

    The temperature t is learned for each head as t / sqrt(D), initially 1: the logits then start within +-sqrt(D),
    whatever the scale of the queries and keys becomes.
    """

    def __init__(self, num_heads: int, num_tokens: int, projected_tokens: int | None = None) -> None:
        super().__init__(num_heads, num_tokens, projected_tokens)
        self.temperature = nn.Parameter(torch.ones(num_heads))

    def queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().queries_and_keys(q, k)
        q, k = (F.rms_norm(x, x.shape[3:], eps=1e-6) for x in (q, k))
        return q * effective(self.temperature, q.dtype)[:, None, None], k
