"""Styleformer with an identity path, QK-normalised attention, gated MLPs and an RGB head per resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, setting
from torch_utils.ops.encoder import modulated_layer_norm, scale_and_split
from torch_utils.ops.upfirdn2d import upsample2d
from training.networks import execution
from training.networks.attention import NormalizedSelfAttention, SelfAttention
from training.networks.convolution import conv2d
from training.networks.generator import Generator, Grid, NoiseMode
from training.networks.layers import FullyConnected, to_map, to_tokens
from training.networks.mapping import LR_MULTIPLIER
from training.networks.modulation import Reader, read_styles
from training.networks.styleformer import EncoderConfig, StyleformerStage, StyleformerSynthesis
from training.networks.styleformer_block import EncoderBlock, Modulation, project
from training.networks.weights import effective

POSITION_INIT = 0.1  # gain of the positions from the second stage on
RGB_INIT = 0.25  # gain of ToRGB: demodulation alone would fix the contrast of its image


@dataclass(frozen=True, kw_only=True)
class Styleformer2Config(EncoderConfig):
    """Configuration of a Styleformer2 generator; see `EncoderConfig` and `Styleformer2Block`."""

    sine_input: bool = setting(True, "Input of plane waves with amplitudes affine in w; off: a learned constant.")
    qk_norm: bool = setting(True, "Normalise queries and keys, with a learned temperature per head.")
    mlp_ratio: int = setting(2, "Hidden width of a block's gated MLP / width of the block; 0: no MLP.", at_least=0)
    mlp_kernel: int = setting(
        3, "Side of the depthwise convolution in the MLP, in tokens; 1: none.", at_least=1, at_most=31, note="odd"
    )
    gate_init: float = setting(
        1.0, "Initial argument a of the gates tanh(a) of attention and MLP.", at_least=-10, at_most=10
    )
    lr_width: int = setting(
        128, "Width at which G's blocks use the learning rate unchanged; it is proportional to 1 / width.", at_least=1
    )
    mapping_lr: float = setting(
        LR_MULTIPLIER, "Learning rate of the mapping network / G's (StyleGAN, appendix C).", above=0, at_most=100
    )
    noise: bool = setting(True, "Noise per token, with a learned strength per block.")
    multi_level: bool = setting(False, "Images of all resolutions, with noise, as the input of D.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_kernel % 2 == 0:
            raise ConfigError("mlp_kernel", self.mlp_kernel, "must be odd")
        if self.multi_level and len(self.widths) == 1:
            raise ConfigError("multi_level", True, "has no effect on a generator of a single resolution; omit it")

    @property
    def num_rgb_heads(self) -> int:
        """Number of images per latent in D's input: one per resolution with `multi_level`, else 1."""
        return len(self.widths) if self.multi_level else 1

    def build(self) -> Generator:
        """Build the generator, initialized from torch's global RNG."""
        self.require_widths()
        return Styleformer2Generator(self)


class Styleformer2Block(EncoderBlock):
    """Encoder block with an identity path: gated attention, then a gated MLP.

        X' = LayerNorm(s1 X)
        Q, K, V = d_q X' Wq^T, d_k X' Wk^T, s2 d_v X' Wv^T
        X <- X + tanh(a) (d_o Attention(Q, K, V) Wo^T + b) + noise_strength n
        U, G = conv(d_m LayerNorm(s3 X) Wm^T)
        X <- clamp(X + tanh(g) (silu(G) U) Wd^T)

    a and g are learned per channel, initially `gate_init`. Attention normalises queries and keys
    (`NormalizedSelfAttention`). The MLP is SwiGLU (Shazeer 2020) with a hidden width of `mlp_ratio` C, and a depthwise
    convolution on the grid of tokens before the gate (Xie et al. 2024, "SANA": Mix-FFN); its hidden values are clamped.
    The styles s1, s2, s3 are affine in w, and the demodulation coefficients d are those of `EncoderBlock`; d_m uses s3.

    A weight (out, in) learns at the rate lr lr_width / in, because the change of an output per Adam step is
    proportional to lr in (Yang et al. 2022, "Tensor programs V"): it is stored in / lr_width times as large as it is
    used. Demodulation cancels the scale of all but Wd.
    """

    def __init__(self, config: Styleformer2Config, grid: Grid, width: int) -> None:
        super().__init__(config, grid, width, width)

    def build_styles(self, config: Any, width: int) -> None:
        self.has_mlp = config.mlp_ratio > 0
        self.affine = style_affine(config, (3 if self.has_mlp else 2) * width)

    def build_noise(self, config: Any) -> None:
        if config.noise:
            super().build_noise(config)
        else:
            self.register_buffer("noise_strength", torch.zeros(()))

    def build_weight(self, config: Any, out_features: int, in_features: int) -> nn.Parameter:
        return scaled_weight(out_features, in_features, config.lr_width)

    def build_attention(self, config: Any, width: int, projected_tokens: int | None) -> SelfAttention:
        heads, tokens = config.num_heads(width), math.prod(self.grid)
        if not config.qk_norm:
            return SelfAttention(heads, tokens, projected_tokens)
        return NormalizedSelfAttention(heads, tokens, projected_tokens)

    def build_output(self, config: Any, width: int, out_width: int) -> None:
        self.out_weight = self.build_weight(config, width, width)
        self.attention_gate = nn.Parameter(torch.full((width,), config.gate_init))
        if self.has_mlp:
            hidden = config.mlp_ratio * width
            self.mlp_weight = self.build_weight(config, 2 * hidden, width)
            self.down = ScaledLinear(hidden, width, config.lr_width)
            self.mlp_gate = nn.Parameter(torch.full((width,), config.gate_init))
            self.kernel: nn.Parameter | None = None
            if config.mlp_kernel > 1:
                self.kernel = delta_kernel(2 * hidden, config.mlp_kernel)

    def split_style(self, style: Tensor) -> tuple[Tensor, ...]:
        return style.chunk(3 if self.has_mlp else 2, dim=1)

    def demodulated_maps(self) -> list[tuple[Tensor, int]]:
        maps: list[tuple[Tensor, int]] = [(self.qkv_weight, 0), (self.out_weight, 1)]
        return [*maps, (self.mlp_weight, 2)] if self.has_mlp else maps

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Map x (B or 1, N, C) to (B, N, C), in the dtype of x."""
        style, dtype = modulation.styles[0], x.dtype
        x = x.expand(len(style), -1, -1)
        y = project(modulated_layer_norm(x, style), modulation.weights[0])
        q, k, v = scale_and_split(y, modulation.qkv)  # each (B, N, C)
        # One factor per image and channel: tanh(a) d_o.
        gate = self.attention_gate.tanh()
        y = project(self.attention(q, k, v), modulation.weights[1])
        x = torch.addcmul(x, y, (gate * modulation.scales[0]).unsqueeze(1).to(dtype))
        x = x + (gate * self.bias + (modulation.noise * self.noise_strength).unsqueeze(2)).to(dtype)
        if self.has_mlp:
            x = torch.addcmul(x, self.mlp(x, modulation), self.mlp_gate.tanh().to(dtype))
        return self.clamp(x)

    def mlp(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Return (silu(G) U) Wd^T (B, N, C) for tokens (B, N, C)."""
        y = project(modulated_layer_norm(x, modulation.styles[2]), modulation.weights[2])
        y = self.clamp(y * modulation.scales[1].unsqueeze(1).to(y.dtype))
        if self.kernel is not None:
            maps, kernel = to_map(y, self.grid), effective(self.kernel, y.dtype)
            y = to_tokens(conv2d(maps, kernel, padding=kernel.shape[2] // 2, groups=len(kernel)))
        up, gate = y.chunk(2, dim=2)
        out: Tensor = self.down(self.clamp(F.silu(gate) * up))
        return out

    def clamp(self, x: Tensor) -> Tensor:
        """Clamp activations to +-`conv_clamp`, which keeps them and their products finite in float16."""
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class ScaledLinear(nn.Module):
    """Linear map without bias, with initial weights of variance 1 / in, that learns at the rate lr lr_width / in."""

    def __init__(self, in_features: int, out_features: int, lr_width: int) -> None:
        super().__init__()
        self.weight = scaled_weight(out_features, in_features, lr_width)
        self.weight_gain = lr_width / in_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, effective(self.weight, x.dtype, self.weight_gain))


def style_affine(config: Styleformer2Config, out_features: int) -> FullyConnected:
    """Create an affine layer from w to a style, initially 1 + N(0, |w|^2 / w_dim).

    The learning rate multiplier makes the change of its products per Adam step independent of w_dim.
    """
    multiplier = math.sqrt(config.lr_width / config.w_dim)
    return FullyConnected(config.w_dim, out_features, multiplier=multiplier, bias_init=1 / multiplier)


def scaled_weight(out_features: int, in_features: int, lr_width: int) -> nn.Parameter:
    """Create a weight (out, in) of variance 1 / in, times in / lr_width."""
    bound = math.sqrt(3 * in_features) / lr_width
    return nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))


def delta_kernel(channels: int, side: int) -> nn.Parameter:
    """Create a depthwise kernel (channels, 1, side, side): the identity plus U(-1/side, 1/side)."""
    kernel = torch.empty(channels, 1, side, side).uniform_(-1 / side, 1 / side)
    kernel[:, :, side // 2, side // 2] += 1
    return nn.Parameter(kernel)


class PlaneWaves(nn.Module):
    """Fixed positions (N, C): plane waves on a grid, with unit mean square in full periods.

    Channels 2j and 2j + 1 are sqrt(2) sin(p) and sqrt(2) cos(p) with p = pi (a_j y / H + b_j x / W), for pixel
    coordinates y and x. The pairs of integers (a, b) with a > 0, or a = 0 and b > 0, are in ascending order of their
    norm: the longest wavelength is two sides of the grid. Only the factors of each axis are stored.
    """

    rows: Tensor  # exp(i pi a y / H) as (H, 1, pairs, 2): cosine and sine
    columns: Tensor  # exp(i pi b x / W) as (1, W, pairs, 2)

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.width = width
        a, b = wave_numbers((width + 1) // 2).T
        for name, numbers, side, shape in (("rows", a, grid[0], (-1, 1)), ("columns", b, grid[1], (1, -1))):
            phases = np.pi * np.arange(side)[:, None] / side * numbers  # (side, pairs)
            axis = np.stack([np.cos(phases), np.sin(phases)], axis=2).astype(np.float32)
            # Unlike from_numpy, tensor() follows torch.device("meta").
            self.register_buffer(name, torch.tensor(axis.reshape(*shape, *axis.shape[1:])), persistent=False)

    def forward(self) -> Tensor:
        cos_y, sin_y = self.rows.unbind(dim=3)
        cos_x, sin_x = self.columns.unbind(dim=3)
        sine, cosine = sin_y * cos_x + cos_y * sin_x, cos_y * cos_x - sin_y * sin_x  # each (H, W, pairs)
        waves = math.sqrt(2) * torch.stack([sine, cosine], dim=3)
        return waves.flatten(2)[:, :, : self.width].flatten(0, 1)


def wave_numbers(count: int) -> np.ndarray:
    """Return the first `count` pairs (a, b) of `PlaneWaves`, sorted by norm, then by a and b: (count, 2)."""
    reach = math.isqrt(count) + 2  # more than `count` pairs have a norm below it
    a, b = (x.flatten() for x in np.mgrid[: reach + 1, -reach : reach + 1])
    is_chosen = (a > 0) | (b > 0)
    a, b = a[is_chosen], b[is_chosen]
    return np.stack([a, b], axis=1)[np.lexsort((b, a, a**2 + b**2))[:count]]


class Styleformer2Stage(StyleformerStage):
    """Synthesis stage of blocks of equal width. A linear map to this width precedes them if the previous width differs.

    The map is part of the previous stage, before its upsampling, where there are a quarter of the tokens. From the
    second stage on, the positions times a learned gain per channel, initially 0.1, are added to its tokens.
    """

    def build_blocks(self, config: Styleformer2Config, index: int) -> int:
        # Tensors with the names of Styleformer's have another meaning: transfer learning must not match them.
        self.place = f"styleformer2-{self.place}"
        width, following = config.widths[index], config.widths[index + 1 :]
        self.blocks = nn.ModuleList(Styleformer2Block(config, self.grid, width) for _ in range(config.layers[index]))
        self.rgb_gain = nn.Parameter(torch.full((config.img_channels,), RGB_INIT))
        self.positions = PlaneWaves(self.grid, width) if index else None
        self.position_gain = nn.Parameter(torch.full((width,), POSITION_INIT)) if index else None
        self.projection: nn.Module = nn.Identity()
        if following and following[0] != width:
            self.projection = ScaledLinear(width, following[0], config.lr_width)
        return width

    def build_affine(self, config: Styleformer2Config, width: int) -> FullyConnected:
        return style_affine(config, width)

    def forward(
        self, x: Tensor, rgb: Tensor | None, modulations: Sequence[Modulation], style: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x, rgb, modulations, style, d * self.rgb_gain)

    def add_positions(self, x: Tensor) -> Tensor:
        x = execution.cast(x, self.grid)
        return x if self.positions is None else x + (self.positions() * self.position_gain).to(x.dtype)

    def upsample(self, x: Tensor) -> Tensor:
        return super().upsample(self.projection(x))


class Styleformer2Synthesis(StyleformerSynthesis):
    """Styleformer2 synthesis network: plane waves on the base grid, then one stage per resolution.

    The amplitudes of the waves are affine in the first style, so that w determines the layout of the input. A learned
    offset, initially N(0, 1), keeps the norm of all tokens away from 0, where LayerNorm would draw contours. With
    `sine_input` false, the input is a learned constant instead.
    """

    stage_class = Styleformer2Stage

    def __init__(self, config: Styleformer2Config) -> None:
        super().__init__(config)
        self.num_rgb_heads = config.num_rgb_heads

    def build_input(self, config: Styleformer2Config) -> None:
        self.input_affine: FullyConnected | None = None
        if not config.sine_input:
            return super().build_input(config)
        width = config.widths[0]
        self.waves = PlaneWaves(config.base, width)
        self.input_affine = style_affine(config, width)
        self.offset = nn.Parameter(torch.randn(width))

    def input_tokens(self, styles: Mapping[FullyConnected, Tensor]) -> Tensor:
        if self.input_affine is None:
            return super().input_tokens(styles)
        return self.waves() * styles[self.input_affine].unsqueeze(1) + self.offset

    def style_readers(self) -> list[Reader]:
        first = [] if self.input_affine is None else [(self.input_affine, 0)]
        return [*first, *super().style_readers()]

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        _, images = self.encode(read_styles(self.style_readers(), ws), noise_mode)
        if self.num_rgb_heads == 1 or not execution.current.all_rgb_heads:
            return images[-1]
        stack = images[0]
        for stage, image in zip(self.stages, images[1:], strict=False):
            stack = torch.cat([image, upsample2d(stack, stage.resample_filter)], dim=1)
        return stack


class Styleformer2Generator(Generator):
    """Mapping network and Styleformer2 synthesis network."""

    def mapping_lr(self, config: Styleformer2Config) -> float:
        return config.mapping_lr

    def build_synthesis(self, config: Styleformer2Config) -> Styleformer2Synthesis:
        return Styleformer2Synthesis(config)
