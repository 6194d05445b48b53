"""Ablations of the encoder block from the Styleformer paper (docs/ablations.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.ops.bias_act import bias_act
from training.networks.layers import FullyConnected, uniform_weight
from training.networks.styleformer_block import EncoderBlock, Modulation, project
from training.networks.weights import effective

if TYPE_CHECKING:
    from training.networks.styleformer import StyleformerConfig


def is_ablated(config: StyleformerConfig) -> bool:
    """Return whether the configuration enables any ablation of `EncoderBlock`."""
    return config.ffn or config.layernorm == "after" or not config.style_attention or not config.residual


class FeedForward(nn.Module):
    """Transformer feed-forward network X + gelu(LayerNorm(X) W1^T + b1) W2^T + b2 with a hidden width of 4C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight1, self.bias1 = uniform_weight(4 * width, width), nn.Parameter(torch.zeros(4 * width))
        self.weight2, self.bias2 = uniform_weight(width, 4 * width), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, N, C) to (B, N, C), in the dtype of x."""
        weight1, bias1, weight2, bias2 = (
            effective(p, x.dtype) for p in (self.weight1, self.bias1, self.weight2, self.bias2)
        )
        hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[2:]), weight1, bias1))  # (B, N, 4C)
        return x + F.linear(hidden, weight2, bias2)


class AblatedEncoderBlock(EncoderBlock):
    """Encoder block with one or more ablations, in the notation of `EncoderBlock`.

    style_attention=False: s1 = 1. layernorm="after": X' = s1 X, and LayerNorm is applied to Y before the noise is
    added. residual=False: Y has no term V U^T. ffn=True: Y passes through a `FeedForward` before the noise is added.
    """

    def __init__(self, config: StyleformerConfig, grid: tuple[int, int], width: int, out_width: int) -> None:
        super().__init__(config, grid, width, out_width)
        self.style_attention = config.style_attention
        self.norm_after = config.layernorm == "after"
        self.has_residual = config.residual

    def build_styles(self, config: StyleformerConfig, width: int) -> None:
        self.affine = FullyConnected(config.w_dim, 2 * width if config.style_attention else width, bias_init=1.0)

    def build_output(self, config: StyleformerConfig, width: int, out_width: int) -> None:
        self.out_weight = uniform_weight(out_width, width)
        if config.residual:
            self.residual_weight = uniform_weight(out_width, width)
        self.ffn = FeedForward(out_width) if config.ffn else None

    def demodulated_maps(self) -> list[tuple[Tensor, int]]:
        return super().demodulated_maps() if self.has_residual else [(self.qkv_weight, 0), (self.out_weight, 1)]

    def split_style(self, style: Tensor) -> tuple[Tensor, ...]:
        return super().split_style(style) if self.style_attention else (torch.ones_like(style), style)

    def normalize(self, x: Tensor, style: Tensor) -> Tensor:
        return x * style.unsqueeze(1).to(x.dtype) if self.norm_after else super().normalize(x, style)

    def output(self, attended: Tensor, v: Tensor, modulation: Modulation) -> Tensor:
        dtype = v.dtype
        out, *residual = (scale.unsqueeze(1).to(dtype) for scale in modulation.scales)
        y = project(attended, modulation.weights[1]) * out
        for scale in residual:
            y = torch.addcmul(y, project(v, modulation.weights[2]), scale)
        if self.norm_after:
            y = F.layer_norm(y, y.shape[2:])
        y = y if self.ffn is None else self.ffn(y)
        y = y + (modulation.noise * self.noise_strength).unsqueeze(2).to(dtype)
        return bias_act(y, self.bias, dim=2, act="lrelu", gain=1.0, clamp=self.conv_clamp)
