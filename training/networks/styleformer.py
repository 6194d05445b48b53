"""The Styleformer generator, plain and Linformer (Park & Kim 2022, "Styleformer")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, setting
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upsample2d
from training.networks import execution
from training.networks.attention import SelfAttention
from training.networks.generator import (
    Generator,
    Grid,
    NoiseMode,
    StagedConfig,
    Synthesis,
    count_resolutions,
)
from training.networks.layers import (
    FullyConnected,
    Resampling,
    demodulation,
    limit_rows,
    resample_filter,
    to_map,
    to_tokens,
)

# Widths and blocks per resolution, by the number of resolutions, where a configuration leaves them open.
DEFAULT_WIDTHS: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    1: ((256,), (2,)),
    2: ((256, 64), (1, 3)),
    3: ((256, 64, 16), (1, 3, 3)),
    4: ((512, 256, 128, 64), (1, 2, 1, 1)),
    5: ((512, 256, 128, 64, 32), (1, 2, 1, 1, 1)),
    6: ((512, 256, 128, 64, 32, 32), (1, 2, 1, 1, 1, 1)),
    7: ((512, 256, 128, 64, 32, 32, 32), (1, 2, 1, 1, 1, 1, 1)),
    8: ((512, 256, 128, 64, 32, 32, 32, 32), (1, 2, 1, 1, 1, 1, 1, 1)),
}


LayerNormPlace = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class StyleformerConfig(StagedConfig):
    """A Styleformer generator for images of base * 2^(len(widths) - 1) pixels.

    `widths` and `layers` hold one number per resolution, from the base grid up: the hidden size and the number of
    encoder blocks. A block has max(minimum_head, width // depth) heads. With `linformer`, blocks of at least
    `linformer_min_tokens` tokens attend to `linformer_k` projected tokens. `widths=()` stands for a choice that is
    still to be made; such a config cannot be built. `ffn`, `layernorm`, `style_attention` and `residual` are the
    paper's ablations: EncoderBlock says what each is.
    """

    widths: tuple[int, ...] = setting(
        (256, 64, 16), "Hidden size per resolution, lowest first; (): by the images.", least=1
    )
    layers: tuple[int, ...] = setting(
        (1, 3, 3), "Encoder blocks per resolution, lowest first; (): by the images.", least=1
    )
    depth: int = setting(32, "Channels per attention head.", least=1)
    minimum_head: int = setting(1, "Minimum number of heads.", least=1)
    linformer: bool | None = setting(
        False, "Linformer attention where there are many tokens; None: with more than 3 resolutions.", auto=True
    )
    linformer_k: int = setting(256, "Tokens that Linformer projects keys and values to.", least=1)
    linformer_min_tokens: int = setting(1024, "Minimum number of tokens for Linformer to apply.", least=1)
    ffn: bool = setting(False, "Feed-forward network in every encoder block (ablation).")
    layernorm: LayerNormPlace = setting("before", "Place of LayerNorm: before Q, K, V, or after attention (ablation).")
    style_attention: bool = setting(True, "Modulation of the input of attention, besides its values (ablation).")
    residual: bool = setting(True, "Residual connection around attention, from the values (ablation).")

    OPEN: ClassVar[Mapping[str, Any]] = {**StagedConfig.OPEN, "linformer": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in self.widths:
            self._check_width(width)

    def _check_width(self, width: int) -> None:
        if width % self.num_heads(width):
            below = next((w for w in range(width - 1, 0, -1) if w % self.num_heads(w) == 0), None)
            above = next(w for w in range(width + 1, 3 * width + self.minimum_head) if w % self.num_heads(w) == 0)
            nearest = above if below is None else f"{below} or {above}"
            raise ConfigError(
                "widths",
                self.widths,
                f"{width} is not a multiple of its {self.num_heads(width)} heads (depth={self.depth}, "
                f"minimum_head={self.minimum_head}); the nearest widths that work: {nearest}",
            )

    def num_heads(self, width: int) -> int:
        """How many heads a block of this width has."""
        return max(self.minimum_head, width // self.depth)

    @property
    def folder_words(self) -> tuple[str, ...]:
        """Whether attention is Linformer's."""
        return ("linformer",) if self.linformer else ()

    @property
    def num_ws(self) -> int:
        """One style per encoder block, and one more for the last ToRGB."""
        return sum(self.layers) + 1

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """The grid of each block, and of the last ToRGB."""
        blocks = [grid for grid, count in zip(self.grids, self.layers, strict=True) for _ in range(count)]
        return (*blocks, self.grids[-1])

    def fit(self, height: int, width: int) -> Self:
        """Choose what is open of widths, blocks and Linformer by the doublings from the base grid to the image."""
        count = len(self.widths) or count_resolutions(self.base, height, width)
        fitted = self._with_defaults(count, f"for images of {height}x{width}")
        fitted.check_img_size(height, width)
        return fitted

    def _with_defaults(self, count: int, where: str) -> Self:
        """Choose what is open for `count` resolutions; `where` says in a message why there are so many."""
        widths, layers = self._default_widths(count)
        if self.layers and not self.widths and len(self.layers) != len(widths):
            raise ConfigError("layers", self.layers, f"must have one entry per resolution, {len(widths)} {where}")
        linformer = count > 3 if self.linformer is None else self.linformer
        return replace(self, widths=self.widths or widths, layers=self.layers or layers, linformer=linformer)

    def _default_widths(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths and blocks for `count` resolutions."""
        return DEFAULT_WIDTHS.get(count, DEFAULT_WIDTHS[max(DEFAULT_WIDTHS)])

    def build(self) -> Generator:
        """A generator with weights from torch's global random generator."""
        self.require_widths()
        return StyleformerGenerator(self)


def uniform_weight(out_features: int, in_features: int) -> nn.Parameter:
    """A plain weight matrix (out, in) from U(+-1/sqrt(in))."""
    bound = 1 / math.sqrt(in_features)
    return nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))


class FeedForward(nn.Module):
    """X + gelu(LayerNorm(X) W1^T + b1) W2^T + b2, four times as wide inside: what other transformers have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight1, self.bias1 = uniform_weight(4 * width, width), nn.Parameter(torch.zeros(4 * width))
        self.weight2, self.bias2 = uniform_weight(width, 4 * width), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C), in x's type."""
        weight1, bias1, weight2, bias2 = (p.to(x.dtype) for p in (self.weight1, self.bias1, self.weight2, self.bias2))
        hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[2:]), weight1, bias1))  # (B, N, 4C)
        return x + F.linear(hidden, weight2, bias2)


class EncoderBlock(nn.Module):
    """Attention with modulated, demodulated linear maps; no feed-forward network. Styleformer, figure 2.

        X'  = LayerNorm(s1 X)
        Q, K, V = d_q X' Wq^T, d_k X' Wk^T, s2 d_v X' Wv^T
        Y   = d_o Attention(Q, K, V) Wo^T + d_u V U^T + noise + b
        out = clamp(lrelu(Y))

    with styles s1, s2 affine in w and demodulations d (d_q, d_k, d_v by s1, d_o, d_u by s2). The residual branch
    starts at V, not at X: after demodulation the attention output has a standard deviation of sqrt(sum A^2), which
    vanishes for long sequences. The leaky ReLU has no gain.

    Ablations: without `style_attention`, s1 = 1; with `layernorm` after, X' = s1 X, and Y is normalised before noise
    and bias join it; without `residual`, Y has no term in U; with `ffn`, Y then passes through a FeedForward.
    """

    noise_const: Tensor

    def __init__(self, config: StyleformerConfig, grid: tuple[int, int], width: int, out_width: int) -> None:
        super().__init__()
        N = math.prod(grid)
        use_linformer = config.linformer and config.linformer_min_tokens <= N
        self.conv_clamp = config.conv_clamp
        self.style_attention = config.style_attention
        self.norm_after = config.layernorm == "after"
        self.affine = FullyConnected(config.w_dim, 2 * width if config.style_attention else width, bias_init=1.0)
        self.qkv_weight = uniform_weight(3 * width, width)
        self.attention = SelfAttention(config.num_heads(width), N, config.linformer_k if use_linformer else None)
        self.out_weight = uniform_weight(out_width, width)
        self.residual_weight = uniform_weight(out_width, width) if config.residual else None
        self.ffn = FeedForward(out_width) if config.ffn else None
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.register_buffer("noise_const", torch.randn(N, 1))

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode) -> Tensor:
        """x (B, N, C), w (B, w_dim) -> (B, N, C_out), computed in x's type; styles and demodulations in float32."""
        B, _, C = x.shape
        dtype = x.dtype
        style_input, style_value = self._styles(w)  # each (B, C)
        weights: list[Tensor] = [self.qkv_weight, self.out_weight]
        weights += [] if self.residual_weight is None else [self.residual_weight]
        if dtype == torch.float16:  # its largest number is 65,504; the demodulations undo these scalings
            x, style_value, weights = x.float(), limit_rows(style_value), [limit_rows(weight) for weight in weights]
        qkv_weight, out_weight, *residual_weight = weights

        # Gains per channel: those of Q and K meet in the dot product, so Q carries both.
        gain_q, gain_k, gain_v = demodulation(qkv_weight, style_input).unsqueeze(1).chunk(3, dim=2)
        x = x * style_input.unsqueeze(1).to(x.dtype)
        x = (x if self.norm_after else F.layer_norm(x, (C,))).to(dtype)
        q, k, v = F.linear(x, qkv_weight.to(dtype)).chunk(3, dim=2)  # each (B, N, C)
        gain_qk = gain_q * gain_k
        if dtype == torch.float16:  # small styles make it large
            gain_qk = gain_qk.sqrt()
            k = k * gain_qk.to(dtype)
        q = q * gain_qk.to(dtype)
        v = v * (gain_v * style_value.unsqueeze(1)).to(dtype)

        gain_out = demodulation(out_weight, style_value).unsqueeze(1).to(dtype)  # (B, 1, C_out)
        attended = F.linear(self.attention(q, k, v), out_weight.to(dtype))  # (B, N, C_out)
        noise = self._noise(B, noise_mode).to(dtype)
        is_complete = self.ffn is None and not self.norm_after
        x = torch.addcmul(noise, attended, gain_out) if is_complete else attended * gain_out
        for weight in residual_weight:  # one or none
            gain = demodulation(weight, style_value).unsqueeze(1).to(dtype)
            x = torch.addcmul(x, F.linear(v, weight.to(dtype)), gain)
        if not is_complete:
            x = self._after_attention(x) + noise
        return bias_act(x, self.bias, dim=2, act="lrelu", gain=1.0, clamp=self.conv_clamp)

    def _styles(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The styles of the input and of the values, (B, C) each."""
        styles: Tensor = self.affine(w)
        if not self.style_attention:
            return torch.ones_like(styles), styles
        style_input, style_value = styles.chunk(2, dim=1)
        return style_input, style_value

    def _after_attention(self, x: Tensor) -> Tensor:
        """What ablations do to Y."""
        if self.norm_after:
            x = F.layer_norm(x, x.shape[2:])
        return x if self.ffn is None else self.ffn(x)

    def _noise(self, batch: int, mode: NoiseMode) -> Tensor:
        """Noise (B or 1, N, 1), the same for all channels of a token."""
        noise = self.noise_const.reshape(-1, *self.noise_const.shape[-2:])  # whoever projects has one for each image
        if mode == "none":
            return torch.zeros_like(noise)
        if mode == "random":
            noise = torch.randn(batch, *self.noise_const.shape, dtype=noise.dtype, device=noise.device)
        return noise * self.noise_strength


class ToRGB(nn.Module):
    """Modulated and demodulated linear map from tokens to image channels, without clamp.

    y_o = (sum_i W_oi s_i x_i) (sum_i (W_oi s_i)^2 + 1e-8)^(-1/2) + b_o
    """

    def __init__(self, in_features: int, img_channels: int, w_dim: int) -> None:
        super().__init__()
        self.affine = FullyConnected(w_dim, in_features, bias_init=1.0)
        self.weight = uniform_weight(img_channels, in_features)
        self.bias = nn.Parameter(torch.zeros(img_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, N, C), w (B, w_dim) -> (B, N, img_channels), in float32 whatever x's type."""
        x = execution.full_precision(x)
        # With so few outputs, weights per image are far smaller than a modulated copy of x.
        style = self.affine(w)  # (B, C)
        weight = self.weight * style.unsqueeze(1) * demodulation(self.weight, style).unsqueeze(2)
        return torch.baddbmm(self.bias, x, weight.transpose(1, 2))


class Upsampling(Resampling):
    """Tokens (B, h w, C) to (B, 2h 2w, C) by the filter that images are upsampled with."""

    resample_filter: Tensor

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__(grid)
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(upsample2d(to_map(x, self.grid), self.resample_filter))


class Stage(nn.Module):
    """All that happens at one resolution: position embedding, encoder blocks, ToRGB, upsampling."""

    resample_filter: Tensor

    def __init__(self, config: StyleformerConfig, index: int) -> None:
        super().__init__()
        is_last = index + 1 == len(config.widths)
        self.grid = config.grids[index]
        self.place = "{}x{}".format(*self.grid)
        width = config.widths[index]
        out_width = width if is_last else config.widths[index + 1]  # the last block already changes the width
        num_blocks = config.layers[index]
        out_widths = [width] * (num_blocks - 1) + [out_width]
        self.pos_embedding = nn.Parameter(torch.zeros(1, math.prod(self.grid), width))
        self.blocks = nn.ModuleList(EncoderBlock(config, self.grid, width, out) for out in out_widths)
        self.torgb = ToRGB(out_width, config.img_channels, config.w_dim)
        self.register_buffer("resample_filter", resample_filter(), persistent=False)
        self.upsampling: nn.Module = nn.Identity() if is_last else Upsampling(self.grid)

    def forward(self, x: Tensor, rgb: Tensor | None, ws: Tensor, noise_mode: NoiseMode) -> tuple[Tensor, Tensor]:
        """x (B, N, C), rgb at half this resolution or None, ws (B, number of blocks + 1, w_dim) -> x, rgb."""
        x = execution.cast(x, self.grid)
        x = x + self.pos_embedding.to(x.dtype)
        for block, w in zip(self.blocks, ws.unbind(dim=1), strict=False):
            x = execution.run_block(block, x, w, noise_mode)

        y = to_map(self.torgb(x, ws[:, -1]), self.grid)  # (B, img_channels, H, W)
        rgb = y if rgb is None else upsample2d(rgb, self.resample_filter) + y
        return self.upsampling(x), rgb  # (B, 4N, C_out) but for the last stage


class SynthesisNetwork(Synthesis):
    """From a learned constant on the base grid to the image, one stage per resolution.

    Block i reads ws[:, i]; the ToRGB after it reads ws[:, i + 1], which it shares with the next stage's first block.
    """

    def __init__(self, config: StyleformerConfig) -> None:
        super().__init__(config)
        self.layers = config.layers
        self.const = nn.Parameter(torch.randn(math.prod(config.base), config.widths[0]))
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.widths)))

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        return self.encode(ws, noise_mode)[1]

    def encode(self, ws: Tensor, noise_mode: NoiseMode) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) after the last encoder block, and the image so far."""
        x = self.const.expand(len(ws), -1, -1)  # (B, N, C)
        rgb = None
        first = 0
        for stage, num_blocks in zip(self.stages, self.layers, strict=True):
            x, rgb = stage(x, rgb, ws[:, first : first + num_blocks + 1], noise_mode)
            first += num_blocks
        assert rgb is not None
        return x, rgb


class StyleformerGenerator(Generator):
    """Mapping and Styleformer synthesis."""

    def build_synthesis(self, config: StyleformerConfig) -> SynthesisNetwork:
        return SynthesisNetwork(config)
