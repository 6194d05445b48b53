"""Encoder block of the Styleformer generator (Park & Kim 2022, "Styleformer")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.ops.bias_act import bias_act
from training.networks import execution
from training.networks.attention import SelfAttention
from training.networks.layers import FullyConnected, NoiseMode, limit_rows, scaled_noises, uniform_weight
from training.networks.modulation import demodulations
from training.networks.weights import effective

if TYPE_CHECKING:
    from training.networks.styleformer import StyleformerConfig


@dataclass(frozen=True)
class Modulation:
    """Inputs of an encoder block besides its tokens, in the dtype of the activations or float32."""

    style: Tensor  # s1 (B, 1, C)
    qkv: Tensor  # d_q, d_k and s2 d_v (B, 1, 3C)
    out: Tensor  # d_o (B, 1, C_out)
    residual: Tensor | None = None  # d_u (B, 1, C_out)
    noise: Tensor = field(kw_only=True)  # (B or 1, N, 1)


class EncoderBlock(nn.Module):
    """Self-attention with modulated and demodulated linear maps and no feed-forward network (Styleformer, figure 2).

        X'  = LayerNorm(s1 X)
        Q, K, V = d_q X' Wq^T, d_k X' Wk^T, s2 d_v X' Wv^T
        Y   = noise + d_o Attention(Q, K, V) Wo^T + d_u V U^T
        out = clamp(lrelu(Y + b))

    The styles s1 and s2 are affine in w. The demodulation coefficients d_q, d_k, d_v are computed from s1, and d_o, d_u
    from s2. `modulate_blocks` computes styles, coefficients and noise for all blocks of a network. The residual branch
    starts at V rather than X: after demodulation, the standard deviation of the attention output is sqrt(sum A^2),
    which vanishes for long sequences. The leaky ReLU has no gain.
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
        """Create the parameters that `styles` uses."""
        self.affine = FullyConnected(config.w_dim, 2 * width, bias_init=1.0)

    def build_output(self, config: StyleformerConfig, width: int, out_width: int) -> None:
        """Create the parameters that `output` uses."""
        self.out_weight = uniform_weight(out_width, width)
        self.residual_weight = uniform_weight(out_width, width)

    def demodulated_weights(self) -> list[Tensor]:
        """Return the weights whose outputs are demodulated: Q, K and V in one matrix, then those modulated by s2."""
        return [self.qkv_weight, self.out_weight, self.residual_weight]

    def styles(self, style: Tensor) -> tuple[Tensor, Tensor]:
        """Return s1 and s2, each (B, C), for the output of the affine layer."""
        s1, s2 = style.chunk(2, dim=1)
        return s1, s2

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Map x (B or 1, N, C) to (B, N, C_out), in the dtype of x."""
        dtype = x.dtype
        style = modulation.style.to(torch.float32 if dtype == torch.float16 else dtype)
        x = self.normalize(x * style).to(dtype)
        q, k, v = (self.project(x, self.qkv_weight) * modulation.qkv.to(dtype)).chunk(3, dim=2)  # each (B, N, C)
        y = self.output(self.attention(q, k, v), v, modulation)  # (B, N, C_out)
        return bias_act(y, self.bias, dim=2, act="lrelu", gain=1.0, clamp=self.conv_clamp)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply LayerNorm to the modulated tokens (B, N, C)."""
        return F.layer_norm(x, x.shape[2:])

    def output(self, attended: Tensor, v: Tensor, modulation: Modulation) -> Tensor:
        """Return Y (B, N, C_out) for the attention output and the values, each (B, N, C)."""
        assert modulation.residual is not None
        y = torch.addcmul(modulation.noise, self.project(attended, self.out_weight), modulation.out.to(v.dtype))
        return torch.addcmul(y, self.project(v, self.residual_weight), modulation.residual.to(v.dtype))

    @staticmethod
    def project(x: Tensor, weight: Tensor) -> Tensor:
        """Multiply tokens x (B, N, in) by a weight (out, in), up to the scale that demodulation cancels."""
        return F.linear(x, effective(limit_rows(weight, x.dtype), x.dtype))


def modulate_blocks(
    blocks: Sequence[EncoderBlock], styles: Mapping[FullyConnected, Tensor], noise_mode: NoiseMode
) -> list[Modulation]:
    """Return the modulation of each block for the outputs of the affine layers, in few kernels for all blocks."""
    exact = styles[blocks[0].affine].dtype
    dtypes = [execution.dtype_on(block.grid, exact) for block in blocks]
    values, pairs = [], []  # s2 of each block; weight and style of each linear map
    for block, dtype in zip(blocks, dtypes, strict=True):
        s1, s2 = block.styles(styles[block.affine])
        values.append(limit_rows(s2, dtype))
        qkv, *rest = (limit_rows(weight, dtype) for weight in block.demodulated_weights())
        pairs += [(qkv, s1), *((weight, values[-1]) for weight in rest)]
    count = len(pairs) // len(blocks)  # linear maps per block

    d = demodulations(pairs)
    widths = [s2.shape[1] for s2 in values]
    d_qk, d_v = zip(*(x.split([2 * C, C], dim=1) for x, C in zip(d[::count], widths, strict=True)), strict=True)
    v_scales = (torch.cat(d_v, dim=1) * torch.cat(values, dim=1)).split(widths, dim=1)
    rows, sizes = [], []
    for i, C in enumerate(widths):
        rest = d[i * count + 1 : (i + 1) * count]
        rows += [pairs[i * count][1], d_qk[i], v_scales[i], *rest]
        sizes += [C, 3 * C, *(x.shape[1] for x in rest)]

    # One cast for all blocks. With float16 the scales stay in float32, because modulated tokens may exceed 65,504.
    common = dtypes[0] if len(set(dtypes)) == 1 and dtypes[0] != torch.float16 else exact
    scales = torch.cat(rows, dim=1).to(common).unsqueeze(1).split(sizes, dim=2)
    consts, strengths = [block.noise_const for block in blocks], [block.noise_strength for block in blocks]
    noises = scaled_noises(consts, strengths, noise_mode, len(values[0]), common)
    return [
        Modulation(*scales[i * (count + 1) : (i + 1) * (count + 1)], noise=noise.to(dtype))
        for i, (noise, dtype) in enumerate(zip(noises, dtypes, strict=True))
    ]
