"""StyleGAN2 generator (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upfirdn2d, upsample2d
from training.networks import execution
from training.networks.convolution import conv2d, conv_transpose2d
from training.networks.generator import (
    DoublingConfig,
    Generator,
    GeneratorConfig,
    Grid,
    NoiseMode,
    Synthesis,
)
from training.networks.layers import (
    ACTIVATION_GAINS,
    FullyConnected,
    limit_rows,
    resample_filter,
    scaled_noise,
)
from training.networks.modulation import Reader, read_styles
from training.networks.weights import effective

Architecture = Literal["orig", "skip", "resnet"]


def default_channel_base(resolution: int) -> int:
    """Return the `channel_base` that `fit` chooses for a resolution (StyleGAN2-ADA's `auto` configuration)."""
    return 32768 if resolution >= 512 else 16384


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Config(DoublingConfig):
    """Configuration of a StyleGAN2 generator for images of base * 2^(resolutions - 1) pixels.

    A grid whose longer side is R has min(channel_base // R, channel_max) channels. 'skip' sums the RGB outputs of all
    resolutions. 'resnet' and 'orig' have a ToRGB at the last resolution only; 'resnet' adds a linear shortcut around
    each pair of convolutions. `fit` chooses `resolutions` if it is None and `channel_base` if it is 0.
    """

    architecture: Architecture = setting(
        "skip", "Architecture: plain (orig), skip connections to RGB (skip), or residual blocks (resnet)."
    )
    channel_base: int = setting(
        32768, "Channels times resolution of the convolutions; 0: chosen from the image size.", at_least=0
    )
    channel_max: int = setting(512, "Maximum number of channels at any resolution.", at_least=1)

    AUTO: ClassVar[Mapping[str, Any]] = {**DoublingConfig.AUTO, "channel_base": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolutions is not None:
            check_channel_base(self, self.img_size)

    @property
    def num_ws(self) -> int:
        """One style per convolution (one on the base grid, two on each other grid), plus one for the last ToRGB."""
        return 2 * len(self.grids)

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """Grid of each convolution and of the last ToRGB."""
        base, *above = self.grids
        return (base, *(grid for grid in above for _ in range(2)), self.grids[-1])

    def fit(self, height: int, width: int) -> Self:
        """Choose the number of resolutions, and `channel_base` if it is 0, for images of this size."""
        channel_base = self.channel_base or default_channel_base(max(height, width))
        return replace(super().fit(height, width), channel_base=channel_base)

    def build(self) -> StyleGAN2Generator:
        """Build the generator, initialized from torch's global RNG."""
        if not self.channel_base:
            raise ConfigError("channel_base", self.channel_base, "not chosen yet")
        return StyleGAN2Generator(self)


def channels_on_grid(config: Any, grid: Grid) -> int:
    """Return the number of channels on a grid, min(channel_base // longer side, channel_max)."""
    channels: int = min(config.channel_base // max(grid), config.channel_max)
    return channels


def check_channel_base(config: Any, grid: Grid) -> None:
    """Raise ConfigError if a nonzero `channel_base` gives zero channels on a grid of this size."""
    if 0 < config.channel_base < max(grid):
        problem = f"leaves no channel at {grid[0]}x{grid[1]}: must be at least {max(grid)}"
        raise ConfigError("channel_base", config.channel_base, problem)


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, *, up_filter: Tensor | None = None
) -> Tensor:
    """Modulated and demodulated convolution, plus noise (StyleGAN2, section 2.2).

        W'_boikl = s_bi W_oikl,   W''_boikl = W'_boikl (sum_ikl W'_boikl^2 + 1e-8)^(-1/2)

    x (B, I, H, W), weight (O, I, k, k), style (B, I) -> (B, O, H, W) in the dtype of x; demodulation is computed in the
    dtype of `style`. With `up_filter`, a transposed convolution y[2i + k, 2j + l] += W''_kl x[i, j] followed by the
    filter gives (B, O, 2H, 2W). `noise` must broadcast to the output.

    The implementation scales inputs and outputs instead of weights, so all images share one convolution.
    """
    style = limit_rows(style, x.dtype)
    if x.dtype == torch.float16:
        weight = limit_rows(weight.flatten(1), x.dtype).view_as(weight) / math.sqrt(weight[0].numel())
    gain = (style.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()  # (B, O)
    y = _convolve(x * style[:, :, None, None].to(x.dtype), effective(weight, x.dtype), up_filter)
    return torch.addcmul(noise, y, gain[:, :, None, None].to(x.dtype))


def _convolve(x: Tensor, weight: Tensor, up_filter: Tensor | None) -> Tensor:
    """Convolve x (B, I, H, W) with weight (O, I, k, k); with `up_filter`, upsample by transposed convolution."""
    if up_filter is not None:
        x = conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # (B, O, 2H + 1, 2W + 1)
        return upfirdn2d(x, up_filter, padding=1, gain=4)
    return conv2d(x, weight, padding=weight.shape[2] // 2)


class ModulatedConv(nn.Module):
    """Synthesis layer: modulated 3x3 convolution, noise, bias, leaky ReLU with gain sqrt(2), clamp.

    `gain` multiplies the output and the clamp. up=2 upsamples the input by 2. `grid` is the size of the output.
    """

    noise_const: Tensor
    up_filter: Tensor

    def __init__(
        self,
        config: GeneratorConfig,
        in_channels: int,
        out_channels: int,
        grid: Grid,
        *,
        up: Literal[1, 2] = 1,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.up = up
        self.place = "up" if up == 2 else "same"
        self.gain = ACTIVATION_GAINS["lrelu"] * gain
        self.clamp = None if config.conv_clamp is None else config.conv_clamp * gain
        self.affine = FullyConnected(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(*grid))
        self.register_buffer("up_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor, style: Tensor, noise_mode: NoiseMode) -> Tensor:
        """Map x (B, C, H, W) and its style (B, C) to (B, C_out, up H, up W), in the dtype of x."""
        noise = scaled_noise(self.noise_const, self.noise_strength, noise_mode, len(x)).unsqueeze(1).to(x.dtype)
        up_filter = self.up_filter if self.up == 2 else None
        x = modulated_conv2d(x, self.weight, style, noise, up_filter=up_filter)
        return bias_act(x, self.bias, act="lrelu", gain=self.gain, clamp=self.clamp)


class StyleGAN2ToRGB(nn.Module):
    """ToRGB layer: 1x1 convolution to image channels, modulated but not demodulated, with clamp.

    y_o = clamp(sum_i W_oi s_i x_i + b_o),   s = affine(w) / sqrt(C)
    """

    def __init__(self, config: GeneratorConfig, channels: int) -> None:
        super().__init__()
        self.clamp = config.conv_clamp
        self.affine = FullyConnected(config.w_dim, channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(config.img_channels, channels))
        self.bias = nn.Parameter(torch.zeros(config.img_channels))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Map x (B, C, H, W) and the output (B, C) of the affine layer to (B, img_channels, H, W), in float32."""
        x = execution.full_precision(x)
        # Modulate the weights: with few output channels, per-image weights are far smaller than a modulated copy of x.
        weight = self.weight * (style / math.sqrt(x.shape[1])).unsqueeze(1)  # (B, img_channels, C)
        y = (weight @ x.flatten(2)).unflatten(2, x.shape[2:])
        return bias_act(y, self.bias, clamp=self.clamp)


class Shortcut(nn.Module):
    """Linear shortcut around two convolutions in 'resnet': 1x1 convolution, upsampling, gain sqrt(1/2)."""

    up_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight_gain = math.sqrt(0.5 / in_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.register_buffer("up_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # A pointwise convolution commutes with upsampling, so convolve at the lower resolution.
        return upsample2d(conv2d(x, effective(self.weight, x.dtype, self.weight_gain)), self.up_filter)


class StyleGAN2Stage(nn.Module):
    """Synthesis stage at one resolution: an upsampling convolution, a second convolution, ToRGB.

    The first stage (`in_channels` None) starts from the constant and has one convolution.
    """

    resample_filter: Tensor

    def __init__(
        self,
        config: GeneratorConfig,
        in_channels: int | None,
        channels: int,
        grid: Grid,
        *,
        has_torgb: bool = True,
        has_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.place = "{}x{}".format(*grid)
        self.shortcut = None
        layers = []
        gain = 1.0
        if in_channels is not None:
            layers.append(ModulatedConv(config, in_channels, channels, grid, up=2))
            if has_shortcut:
                self.shortcut = Shortcut(in_channels, channels)
                gain = math.sqrt(0.5)  # on both branches, which preserves the variance of their sum
        layers.append(ModulatedConv(config, channels, channels, grid, gain=gain))
        self.convs: Any = nn.ModuleList(layers)
        self.torgb = StyleGAN2ToRGB(config, channels) if has_torgb else None
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def style_readers(self, first: int) -> list[Reader]:
        """Return the affine layers with the indices of their styles, starting at `first`."""
        layers: list[Any] = [*self.convs, *([] if self.torgb is None else [self.torgb])]
        return [(layer.affine, first + i) for i, layer in enumerate(layers)]

    def forward(
        self, x: Tensor, rgb: Tensor | None, styles: Mapping[FullyConnected, Tensor], noise_mode: NoiseMode
    ) -> tuple[Tensor, Tensor | None]:
        """Map x and rgb (or None) at half this resolution to new x and rgb; `styles` as from `read_styles`."""
        x = execution.run_block(self._features, execution.cast(x, self.grid), styles, noise_mode)  # (B, C, H, W)
        if self.torgb is None:
            return x, rgb
        y: Tensor = self.torgb(x, styles[self.torgb.affine])  # (B, img_channels, H, W)
        return x, y if rgb is None else upsample2d(rgb, self.resample_filter) + y

    def _features(self, x: Tensor, styles: Mapping[FullyConnected, Tensor], noise_mode: NoiseMode) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(y, styles[conv.affine], noise_mode)
        return y if self.shortcut is None else y + self.shortcut(x)


class StyleGAN2Synthesis(Synthesis):
    """StyleGAN2 synthesis network: a learned constant on the base grid, then one stage per resolution.

    Convolution i reads ws[:, i]. A ToRGB after convolution i reads ws[:, i + 1], which is also the style of convolution
    i + 1.
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__(config)
        grids = config.grids
        channels = [channels_on_grid(config, grid) for grid in grids]
        self.const = nn.Parameter(torch.randn(channels[0], *config.base))
        self.stages: Any = nn.ModuleList(
            StyleGAN2Stage(
                config,
                before,
                after,
                grid,
                has_torgb=config.architecture == "skip" or grid == grids[-1],
                has_shortcut=config.architecture == "resnet",
            )
            for before, after, grid in zip([None, *channels], channels, grids, strict=False)
        )

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        x = self.const.expand(len(ws), -1, -1, -1)  # (B, C, h, w)
        rgb = None
        # The first stage has one convolution, the others two.
        readers = [stage.style_readers(max(2 * level - 1, 0)) for level, stage in enumerate(self.stages)]
        styles = read_styles([reader for part in readers for reader in part], ws)
        for stage in self.stages:
            x, rgb = stage(x, rgb, styles, noise_mode)
        assert rgb is not None
        return rgb


class StyleGAN2Generator(Generator):
    """Mapping network and StyleGAN2 synthesis network."""

    def build_synthesis(self, config: StyleGAN2Config) -> StyleGAN2Synthesis:
        return StyleGAN2Synthesis(config)
