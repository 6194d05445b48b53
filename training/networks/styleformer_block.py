"""Encoder block of the Styleformer generator (Park & Kim 2022, "Styleformer")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.ops.encoder import modulated_layer_norm, residual_lrelu, scale_and_split
from training.networks import execution
from training.networks.attention import SelfAttention
from training.networks.layers import FullyConnected, NoiseMode, limit_rows, uniform_weight
from training.networks.modulation import demodulations
from training.networks.weights import effective

if TYPE_CHECKING:
    from training.networks.styleformer import StyleformerConfig


@dataclass(frozen=True)
class Modulation:
    """Inputs of an encoder block besides its tokens, in full precision.

    `weights` are the matrices whose outputs are scaled by `qkv`, `out` and `residual`.
    """

    weights: Sequence[Tensor]
    style: Tensor  # s1 (B, C)
    qkv: Tensor  # d_q, d_k and s2 d_v (B, 3C)
    out: Tensor  # d_o (B, C_out)
    residual: Tensor | None  # d_u (B, C_out)
    noise: Tensor  # n (B or 1, N)


class EncoderBlock(nn.Module):
    """Self-attention with modulated and demodulated linear maps and no feed-forward network (Styleformer, figure 2).

        X'  = LayerNorm(s1 X)
        Q, K, V = d_q X' Wq^T, d_k X' Wk^T, s2 d_v X' Wv^T
        Y   = d_o Attention(Q, K, V) Wo^T + d_u V U^T + noise_strength n
        out = clamp(lrelu(Y + b))

    The styles s1 and s2 are affine in w. The demodulation coefficients d_q, d_k, d_v are computed from s1, and d_o, d_u
    from s2; `modulate_blocks` computes them for all blocks of a network. The noise n ~ N(0, 1) is shared by all
    channels (StyleGAN, section 3.2). The residual branch starts at V rather than X: after demodulation, the standard
    deviation of the attention output is sqrt(sum A^2), which vanishes for long sequences. The leaky ReLU has no gain.
    """

    noise_const: Tensor

    def __init__(self, config: StyleformerConfig, grid: tuple[int, int], width: int, out_width: int) -> None:
        super().__init__()
        N = math.prod(grid)
        use_linformer = config.linformer and config.linformer_min_tokens <= N
        self.grid = grid
        self.conv_clamp = config.conv_clamp
        self.build_styles(config, width)
        self.qkv_weight = uniform_weight(3 * width, width)
        self.attention = SelfAttention(config.num_heads(width), N, config.linformer_k if use_linformer else None)
        self.build_output(config, width, out_width)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.register_buffer("noise_const", torch.randn(N, 1))

    def build_styles(self, config: StyleformerConfig, width: int) -> None:
        """Create the parameters that `split_style` uses."""
        self.affine = FullyConnected(config.w_dim, 2 * width, bias_init=1.0)

    def build_output(self, config: StyleformerConfig, width: int, out_width: int) -> None:
        """Create the parameters that `output` uses."""
        self.out_weight = uniform_weight(out_width, width)
        self.residual_weight = uniform_weight(out_width, width)

    def demodulated_weights(self) -> list[Tensor]:
        """Return the demodulated weights: first that of Q, K and V, modulated by s1; the others are modulated by s2."""
        return [self.qkv_weight, self.out_weight, self.residual_weight]

    def split_style(self, style: Tensor) -> tuple[Tensor, Tensor]:
        """Return s1 and s2, each (B, C), for the output of the affine layer."""
        s1, s2 = style.chunk(2, dim=1)
        return s1, s2

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Map x (B or 1, N, C) to (B, N, C_out), in the dtype of x."""
        x = self.normalize(x.expand(len(modulation.style), -1, -1), modulation.style)
        q, k, v = scale_and_split(project(x, modulation.weights[0]), modulation.qkv)  # each (B, N, C)
        return self.output(self.attention(q, k, v), v, modulation)

    def normalize(self, x: Tensor, style: Tensor) -> Tensor:
        """Return X' (B, N, C) for tokens (B, N, C) and s1 (B, C)."""
        return modulated_layer_norm(x, style)

    def output(self, attended: Tensor, v: Tensor, modulation: Modulation) -> Tensor:
        """Return the output (B, N, C_out) for the attention output and the values, each (B, N, C)."""
        assert modulation.residual is not None
        a, r = project(attended, modulation.weights[1]), project(v, modulation.weights[2])
        noise = (modulation.noise, self.noise_strength)
        return residual_lrelu(a, r, modulation.out, modulation.residual, *noise, self.bias, clamp=self.conv_clamp)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply tokens x (B, N, in) by a weight (out, in), in the dtype of x."""
    return F.linear(x, effective(weight, x.dtype))


def modulate_blocks(
    blocks: Sequence[EncoderBlock], styles: Mapping[FullyConnected, Tensor], noise_mode: NoiseMode
) -> list[Modulation]:
    """Return the modulation of each block for the outputs of the affine layers, in few kernels for all blocks.

    With float16, the rows of the weights and of s2 are limited to 1, which demodulation cancels.
    """
    value_styles, pairs = [], []  # s2 of each block; weight and style of each linear map
    for block in blocks:
        s1, s2 = block.split_style(styles[block.affine])
        dtype = execution.dtype_on(block.grid, s1.dtype)
        value_styles.append(limit_rows(s2, dtype))
        qkv, *rest = (limit_rows(weight, dtype) for weight in block.demodulated_weights())
        pairs += [(qkv, s1), *((weight, value_styles[-1]) for weight in rest)]
    count = len(pairs) // len(blocks)  # linear maps per block
    d = demodulations(pairs)

    # Multiply the columns of d_v by s2, for all blocks at once.
    ones = torch.ones_like(value_styles[0][:, :1])
    factors = [x for s2 in value_styles for x in (ones.expand(-1, 2 * s2.shape[1]), s2)]
    qkv_scales = torch.cat(d[::count], dim=1) * torch.cat(factors, dim=1)
    widths = [3 * s2.shape[1] for s2 in value_styles]
    noises = noise_maps([block.noise_const for block in blocks], noise_mode, len(ones))
    return [
        Modulation(
            weights=[weight for weight, _ in pairs[i : i + count]],
            style=pairs[i][1],
            qkv=qkv_scale,
            out=d[i + 1],
            residual=d[i + 2] if count > 2 else None,
            noise=noise,
        )
        for i, qkv_scale, noise in zip(
            range(0, len(pairs), count), qkv_scales.split(widths, dim=1), noises, strict=True
        )
    ]


def noise_maps(consts: Sequence[Tensor], mode: NoiseMode, batch: int) -> list[Tensor]:
    """Return the noise of several blocks, (batch or 1, N) each, as in `scaled_noise` but without the strength.

    Random noise takes one draw for all blocks. The constants are (N, 1), or (batch, N, 1) in a projection.
    """
    if mode != "random":
        maps = [const.reshape(-1, const.shape[-2]) for const in consts]
        return [torch.zeros_like(x) for x in maps] if mode == "none" else maps
    sizes = [batch * const.shape[-2] for const in consts]
    noise = torch.randn(sum(sizes), dtype=consts[0].dtype, device=consts[0].device)
    return [x.view(batch, -1) for x in noise.split(sizes)]
