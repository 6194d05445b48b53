"""Encoder block of the Styleformer generator (Park & Kim 2022, "Styleformer")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    from training.networks.styleformer import EncoderConfig


@dataclass(frozen=True)
class Modulation:
    """Inputs of an encoder block besides its tokens, in full precision.

    `weights` are the matrices of `demodulated_maps`: `qkv` scales the outputs of the first, `scales` of the others.
    """

    weights: Sequence[Tensor]
    styles: Sequence[Tensor]  # s1, s2, ... (B, C)
    qkv: Tensor  # d_q, d_k and s2 d_v (B, 3C)
    scales: Sequence[Tensor]  # demodulation of each further map: d_o, d_u (B, C_out)
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
    noise_strength: Tensor

    def __init__(self, config: EncoderConfig, grid: tuple[int, int], width: int, out_width: int) -> None:
        super().__init__()
        N = math.prod(grid)
        use_linformer = config.linformer and config.linformer_min_tokens <= N
        self.grid = grid
        self.conv_clamp = config.conv_clamp
        self.build_styles(config, width)
        self.qkv_weight = self.build_weight(config, 3 * width, width)
        self.attention = self.build_attention(config, width, config.linformer_k if use_linformer else None)
        self.build_output(config, width, out_width)
        self.build_noise(config)
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.register_buffer("noise_const", torch.randn(N, 1))

    def build_styles(self, config: Any, width: int) -> None:
        """Create the parameters that `split_style` uses."""
        self.affine = FullyConnected(config.w_dim, 2 * width, bias_init=1.0)

    def build_noise(self, config: Any) -> None:
        """Create the strength of the noise, a scalar that is initially 0."""
        self.noise_strength = nn.Parameter(torch.zeros(()))

    def build_weight(self, config: Any, out_features: int, in_features: int) -> nn.Parameter:
        """Return the initial weight (out, in) of a demodulated linear map."""
        return uniform_weight(out_features, in_features)

    def build_attention(self, config: Any, width: int, projected_tokens: int | None) -> SelfAttention:
        """Return the attention module."""
        return SelfAttention(config.num_heads(width), math.prod(self.grid), projected_tokens)

    def build_output(self, config: Any, width: int, out_width: int) -> None:
        """Create the parameters that `output` uses."""
        self.out_weight = self.build_weight(config, out_width, width)
        self.residual_weight = self.build_weight(config, out_width, width)

    def demodulated_maps(self) -> list[tuple[Tensor, int]]:
        """Return the weight of each demodulated map, first that of Q, K and V, with the index of its style."""
        return [(self.qkv_weight, 0), (self.out_weight, 1), (self.residual_weight, 1)]

    def split_style(self, style: Tensor) -> tuple[Tensor, ...]:
        """Return s1, s2, ..., each (B, C), for the output of the affine layer."""
        return style.chunk(2, dim=1)

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Map x (B or 1, N, C) to (B, N, C_out), in the dtype of x."""
        style = modulation.styles[0]
        x = self.normalize(x.expand(len(style), -1, -1), style)
        q, k, v = scale_and_split(project(x, modulation.weights[0]), modulation.qkv)  # each (B, N, C)
        return self.output(self.attention(q, k, v), v, modulation)

    def normalize(self, x: Tensor, style: Tensor) -> Tensor:
        """Return X' (B, N, C) for tokens (B, N, C) and s1 (B, C)."""
        return modulated_layer_norm(x, style)

    def output(self, attended: Tensor, v: Tensor, modulation: Modulation) -> Tensor:
        """Return the output (B, N, C_out) for the attention output and the values, each (B, N, C)."""
        a, r = project(attended, modulation.weights[1]), project(v, modulation.weights[2])
        out, residual = modulation.scales
        noise = (modulation.noise, self.noise_strength)
        return residual_lrelu(a, r, out, residual, *noise, self.bias, clamp=self.conv_clamp)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply tokens x (B, N, in) by a weight (out, in), in the dtype of x."""
    return F.linear(x, effective(weight, x.dtype))


def modulate_blocks(
    blocks: Sequence[EncoderBlock], styles: Mapping[FullyConnected, Tensor], noise_mode: NoiseMode
) -> list[Modulation]:
    """Return the modulation of each block for the outputs of the affine layers, in few kernels for all blocks.

    With float16, the rows of the weights and of s2 are limited to 1, which demodulation cancels.
    """
    block_styles, pairs = [], []  # styles of each block; weight and style of each linear map
    for block in blocks:
        s1, s2, *rest = block.split_style(styles[block.affine])
        dtype = execution.dtype_on(block.grid, s1.dtype)
        own = (s1, limit_rows(s2, dtype), *rest)
        block_styles.append(own)
        pairs += [(limit_rows(weight, dtype), own[index]) for weight, index in block.demodulated_maps()]
    count = len(pairs) // len(blocks)  # linear maps per block
    d = demodulations(pairs)

    # Multiply the columns of d_v by s2, for all blocks at once.
    ones = torch.ones_like(block_styles[0][1][:, :1])
    factors = [x for _, s2, *_ in block_styles for x in (ones.expand(-1, 2 * s2.shape[1]), s2)]
    qkv_scales = torch.cat(d[::count], dim=1) * torch.cat(factors, dim=1)
    widths = [3 * s2.shape[1] for _, s2, *_ in block_styles]
    noises = noise_maps([block.noise_const for block in blocks], noise_mode, len(ones))
    return [
        Modulation(
            weights=[weight for weight, _ in pairs[i : i + count]],
            styles=own,
            qkv=qkv_scale,
            scales=d[i + 1 : i + count],
            noise=noise,
        )
        for i, own, qkv_scale, noise in zip(
            range(0, len(pairs), count), block_styles, qkv_scales.split(widths, dim=1), noises, strict=True
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
