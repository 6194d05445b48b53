"""Alias-free Styleformer: self-attention on the coarse grids of StyleGAN3's layers, in place of convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from training.networks import execution
from training.networks.alias_free import Band, FilteredActivation, positions
from training.networks.attention import Attention, attend, split_heads
from training.networks.generator import Generator
from training.networks.layers import FullyConnected, normalize_2nd_moment, to_map, to_tokens
from training.networks.stylegan3 import AliasFreeConfig, StyleGAN3Synthesis


@dataclass(frozen=True, kw_only=True)
class StyleformerAConfig(AliasFreeConfig):
    """Configuration of an alias-free Styleformer.

    Layers whose input has at most `attention_rate` samples per image side attend to all tokens of their grid, with its
    margin; the others are StyleGAN3's convolutions. A layer has max(1, channels // depth) heads.
    """

    attention_rate: int = setting(16, "Highest sampling rate of the input of an attention layer.", at_least=8)
    depth: int = setting(32, "Channels per attention head.", at_least=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side is not None and self.num_layers and self.channel_base:
            for channels in self.attention_channels():
                heads = self.num_heads(channels)
                if channels % (4 * heads):
                    problem = f"{channels} channels are not a multiple of 4 for each of {heads} heads"
                    raise ConfigError("channel_max", self.channel_max, problem)

    def attention_channels(self) -> list[int]:
        """Return the channels of the inputs of the attention layers."""
        return [self.channels()[max(i - 1, 0)] for i in range(self.num_layers) if self.attends(i)]

    def attends(self, index: int) -> bool:
        """Return whether a layer has attention; the critically sampled layers and ToRGB have none."""
        band = self.bands()[max(index - 1, 0)]
        return band.rate <= self.attention_rate and band.size > band.rate and index < self.num_layers

    def num_heads(self, channels: int) -> int:
        """Number of heads of a layer."""
        return max(1, channels // self.depth)

    def build(self) -> StyleformerAGenerator:
        self.check_resolved()
        return StyleformerAGenerator(self)


class RelativeAttention(Attention):
    """Self-attention in which positions enter only as differences: rotations of queries and keys, and a window.

        softmax(q_i . R(p_j - p_i) k_j / sqrt(D) - |p_j - p_i|^2 / (2 sigma^2) + log m_j) v_j        per head

    R rotates pairs of channels by angles proportional to the difference in x or y (Su et al. 2021, "RoFormer"). The
    width sigma of the window is learned per head, in units of the image. The mask m fades from 1 to 0 in the outer half
    of the margin, where a shift of the image changes the set of tokens.
    """

    points: Tensor  # (N, 2)
    angles: Tensor  # (N, D / 2)
    log_mask: Tensor  # (N,)

    def __init__(self, num_heads: int, channels: int, band: Band) -> None:
        super().__init__(num_heads)
        self.band = band
        self.margin = (band.size - band.rate) // 2
        points = positions(band.grid, band.rate)
        self.log_width = nn.Parameter(torch.linspace(math.log(0.1), math.log(0.4), num_heads))
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("angles", rotation_angles(points, channels // num_heads, band), persistent=False)
        self.register_buffer("log_mask", fading_mask(points, band).log(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(x, self.num_heads) for x in (q, k, v))
        q, k = self._rotated(q), self._rotated(k)
        # The window is a product of augmented queries and keys: |p_i - p_j|^2 = |p_i|^2 - 2 p_i . p_j + |p_j|^2, of
        # which softmax cancels the first term.
        scale = math.sqrt(q.shape[3] + 4)
        inverse = (-self.log_width).exp()[:, None, None].to(q.dtype)  # 1 / sigma
        near = (self.points.to(q.dtype) * inverse).expand(len(q), -1, -1, -1)  # (B, H, N, 2)
        bias = self.log_mask.to(q.dtype)[:, None] - near.square().sum(dim=3, keepdim=True) / 2
        ones = torch.ones_like(bias)
        zeros = torch.zeros_like(bias)
        temperature = scale / math.sqrt(q.shape[3])  # `attend` divides by the square root of the augmented depth
        q = torch.cat([q * temperature, near * scale, ones * scale, zeros], dim=3)
        k = torch.cat([k, near, bias, zeros], dim=3)
        v = torch.nn.functional.pad(v, (0, 4))
        return attend(q, k, v)[..., :-4].transpose(1, 2).flatten(2)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotate the pairs of channels (2j, 2j + 1) of tokens (B, H, N, D)."""
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3)


def rotation_angles(points: Tensor, depth: int, band: Band) -> Tensor:
    """Return the angles (N, depth / 2) of pairs of channels: the first half follow x, the second y.

    The wavelengths fall geometrically from twice the image to the shortest of the band.
    """
    count = depth // 4
    wavelengths = torch.logspace(math.log10(2), math.log10(1 / band.cutoff), count)
    return 2 * math.pi * torch.cat([points[:, :1] / wavelengths, points[:, 1:] / wavelengths], dim=1)


def fading_mask(points: Tensor, band: Band) -> Tensor:
    """Return the mask (N,) of tokens: 1 up to half the margin, then falling along a cosine to the edge of the grid."""
    edge = band.size / band.rate / 2
    start = 0.5 + (edge - 0.5) / 2
    depth = ((points.abs() - start) / (edge - start)).clamp(0, 1)
    return (0.5 + 0.5 * (math.pi * depth).cos()).prod(dim=1)


class AttentionLayer(nn.Module):
    """Alias-free encoder block: the block of Styleformer with running normalisation and a filtered activation.

        Q, K, V = d_q X' Wq^T, d_k X' Wk^T, s2 d_v X' Wv^T        X' = s1 X / sqrt(magnitude)
        out = act(d_o Attention(Q, K, V) Wo^T + d_u V U^T)

    LayerNorm would divide by a norm per token, which creates frequencies beyond the band. Weights are normalised as in
    StyleGAN3.
    """

    def __init__(self, config: StyleformerAConfig, index: int) -> None:
        super().__init__()
        bands, channels, before = config.bands(), config.channels(), max(index - 1, 0)
        self.band, width, out = bands[before], channels[before], channels[index]
        self.place = f"attention{index}"
        self.affine = FullyConnected(config.w_dim, 2 * width, bias_init=1.0)
        self.qkv_weight = nn.Parameter(torch.randn(3 * width, width))
        self.out_weight = nn.Parameter(torch.randn(out, width))
        self.residual_weight = nn.Parameter(torch.randn(out, width))
        self.attention = RelativeAttention(config.num_heads(width), width, self.band)
        self.activation = FilteredActivation(out, self.band, bands[index], extra=0, clamp=config.conv_clamp)

    def forward(self, x: Tensor, style: Tensor, magnitude: Tensor) -> Tensor:
        """Map x (B, C, H, W), its style (B, 2C) and the running mean of x^2, a scalar, to the band of the output."""
        x = to_tokens(execution.cast(x, (self.band.rate, self.band.rate)))
        s1, s2 = (normalize_2nd_moment(s) for s in style.chunk(2, dim=1))
        qkv = modulated_linear(x, self.qkv_weight, s1, magnitude.rsqrt())
        q, k, v = qkv.chunk(3, dim=2)
        y = modulated_linear(self.attention(q, k, v), self.out_weight, s2)
        y = (y + modulated_linear(v, self.residual_weight, s2)) * math.sqrt(0.5)
        return self.activation(to_map(y, self.band.grid))


def modulated_linear(x: Tensor, weight: Tensor, style: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """Return d (s x) W^T * gain for tokens x (B, N, in), styles (B, in) and the demodulation d (B, out)."""
    weight = normalize_2nd_moment(weight)
    d = (style.square() @ weight.square().t() + 1e-8).rsqrt() * gain
    return (x * style.unsqueeze(1).to(x.dtype)) @ weight.t().to(x.dtype) * d.unsqueeze(1).to(x.dtype)


class StyleformerASynthesis(StyleGAN3Synthesis):
    """StyleGAN3's synthesis network with attention layers on the coarse grids."""

    def build_layer(self, config: StyleformerAConfig, index: int) -> nn.Module:
        return AttentionLayer(config, index) if config.attends(index) else super().build_layer(config, index)


class StyleformerAGenerator(Generator):
    """Mapping network and alias-free Styleformer synthesis network."""

    def build_synthesis(self, config: StyleformerAConfig) -> StyleformerASynthesis:
        return StyleformerASynthesis(config)
