"""Encoder block of the Styleformer generator (Park & Kim 2022, "Styleformer")."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.ops.bias_act import bias_act
from training.networks.attention import SelfAttention
from training.networks.layers import (
    FullyConnected,
    NoiseMode,
    demodulated_linear,
    limit_rows,
    modulate,
    scaled_noise,
    uniform_weight,
)

if TYPE_CHECKING:
    from training.networks.styleformer import StyleformerConfig


class EncoderBlock(nn.Module):
    """Self-attention with modulated and demodulated linear maps and no feed-forward network (Styleformer, figure 2).

        X'  = LayerNorm(s1 X)
        Q, K, V = d_q X' Wq^T, d_k X' Wk^T, s2 d_v X' Wv^T
        Y   = noise + d_o Attention(Q, K, V) Wo^T + d_u V U^T
        out = clamp(lrelu(Y + b))

    The styles s1 and s2 are affine in w. The demodulation coefficients d_q, d_k, d_v are computed from s1, and d_o, d_u
    from s2. The residual branch starts at V rather than X: after demodulation, the standard deviation of the attention
    output is sqrt(sum A^2), which vanishes for long sequences. The leaky ReLU has no gain.
    """

    noise_const: Tensor

    def __init__(self, config: StyleformerConfig, grid: tuple[int, int], width: int, out_width: int) -> None:
        super().__init__()
        N = math.prod(grid)
        use_linformer = config.linformer and config.linformer_min_tokens <= N
        self.conv_clamp = config.conv_clamp
        self.build_styles(config, width)
        self.qkv_weight = uniform_weight(3 * width, width)
        self.attention = SelfAttention(config.num_heads(width), N, config.linformer_k if use_linformer else None)
        self.build_output(config, width, out_width)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.register_buffer("noise_const", torch.randn(N, 1))

    def build_styles(self, config: StyleformerConfig, width: int) -> None:
        """Create the parameters that `styles` uses."""
        self.affine = FullyConnected(config.w_dim, 2 * width, bias_init=1.0)

    def build_output(self, config: StyleformerConfig, width: int, out_width: int) -> None:
        """Create the parameters that `output` uses."""
        self.out_weight = uniform_weight(out_width, width)
        self.residual_weight = uniform_weight(out_width, width)

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode) -> Tensor:
        """Map x (B, N, C) and w (B, w_dim) to (B, N, C_out), in the dtype of x; styles and demodulation in float32."""
        dtype = x.dtype
        s1, s2 = self.styles(w, dtype)  # each (B, C)
        gain = F.pad(s2, (2 * x.shape[2], 0), value=1.0)  # 1 for Q and K, s2 for V: (B, 3C)
        noise = scaled_noise(self.noise_const, self.noise_strength, noise_mode, len(x)).to(dtype)  # (B or 1, N, 1)

        x = self.normalize(modulate(x, s1)).to(dtype)
        q, k, v = demodulated_linear(x, self.qkv_weight, s1, gain=gain).chunk(3, dim=2)  # each (B, N, C)
        y = self.output(self.attention(q, k, v), v, s2, noise)  # (B, N, C_out)
        return bias_act(y, self.bias, dim=2, act="lrelu", gain=1.0, clamp=self.conv_clamp)

    def styles(self, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the styles s1 of the tokens and s2 of the values, each (B, C), for activations of type `dtype`."""
        s1, s2 = self.affine(w).chunk(2, dim=1)
        return s1, limit_rows(s2, dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply LayerNorm to the modulated tokens (B, N, C)."""
        return F.layer_norm(x, x.shape[2:])

    def output(self, attended: Tensor, v: Tensor, s2: Tensor, noise: Tensor) -> Tensor:
        """Return Y (B, N, C_out) for the attention output and the values, each (B, N, C)."""
        y = demodulated_linear(attended, self.out_weight, s2, plus=noise)
        return demodulated_linear(v, self.residual_weight, s2, plus=y)
