"""R3GAN generator, a ResNet with grouped convolutions (Huang et al. 2024, "The GAN is dead; long live the GAN!")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upsample2d
from training.networks import execution
from training.networks.convolution import conv2d
from training.networks.generator import (
    Generator,
    Grid,
    NoiseMode,
    StagedConfig,
    Synthesis,
    base_grid,
    count_resolutions,
    doubled_grids,
)
from training.networks.layers import resample_filter
from training.networks.mapping import ConcatenatingMapping, StyleMapping
from training.networks.vit import Linear
from training.networks.weights import effective

EXPANSION = 2  # hidden channels of a residual block per channel of its input
BLOCKS = 2  # residual blocks per stage of the published models
LABEL_WIDTH = 64  # dimensionality of the label embedding of the published models
LRELU_GAIN = math.sqrt(2 / (1 + 0.2**2))  # preserves the variance through a leaky ReLU of slope 0.2 (He et al. 2015)


def published_width(grid: Grid) -> int:
    """Return the number of channels of the FFHQ models on a grid: 768 up to a side of 32, then half per doubling.

    The smallest width is 24, on grids of 1024 and more pixels per side, which the paper does not use.
    """
    doublings = max((max(grid) - 1).bit_length() - 5, 0)
    return max(768 >> doublings, 24)


def check_groups(widths: tuple[int, ...], group_width: int) -> None:
    """Raise ConfigError unless `group_width` divides the hidden channels of every stage."""
    for width in widths:
        if EXPANSION * width % group_width:
            problem = f"does not divide the {EXPANSION * width} hidden channels of the stage of width {width}"
            raise ConfigError("group_width", group_width, f"{problem}: choose another width or a divisor of them")


@dataclass(frozen=True, kw_only=True)
class R3GANConfig(StagedConfig):
    """Configuration of an R3GAN generator for images of base * 2^(len(widths) - 1) pixels.

    `widths` and `layers` hold the numbers of channels and residual blocks of each resolution, from the base grid up.
    There is no mapping network: w is the latent z, followed in conditional models by a learned embedding of the label
    with w_dim - z_dim dimensions. `fit` chooses `w_dim` if it is 0, and `widths` and `layers` if they are ().
    """

    z_dim: int = setting(64, "Dimensionality of the latent z.", at_least=1)
    w_dim: int = setting(
        0, "Dimensionality of w, the latent and the label embedding; 0: z_dim, plus 64 with labels.", at_least=0
    )
    mapping_layers: int = setting(
        0, "Always 0: there is no mapping network.", at_least=0, at_most=0, note="R3GAN has no mapping network"
    )
    conv_clamp: float | None = setting(
        None, "Clamp hidden activations to +- this value; None: no clamp.", above=0, note="None disables the clamp"
    )
    base: Grid = base_grid((4, 4))
    widths: tuple[int, ...] = setting(
        (768, 768, 768, 768),
        "Number of channels per resolution, lowest first; (): chosen from the image size.",
        at_least=1,
    )
    layers: tuple[int, ...] = setting(
        (2, 2, 2, 2),
        "Number of residual blocks per resolution, lowest first; (): chosen from the image size.",
        at_least=0,
    )
    group_width: int = setting(16, "Number of channels per group of the 3x3 convolutions.", at_least=1)

    AUTO: ClassVar[Mapping[str, Any]] = {**StagedConfig.AUTO, "w_dim": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.widths, self.group_width)
        if not self.w_dim:
            return
        if self.c_dim and self.w_dim <= self.z_dim:
            problem = f"must exceed z_dim={self.z_dim}: w is the latent followed by the label embedding"
            raise ConfigError("w_dim", self.w_dim, f"{problem}; 0 chooses z_dim + {LABEL_WIDTH}")
        if not self.c_dim and self.w_dim != self.z_dim:
            problem = f"without labels w is the latent, so it must equal z_dim={self.z_dim}; 0 chooses that"
            raise ConfigError("w_dim", self.w_dim, problem)

    @property
    def num_ws(self) -> int:
        """One style, which scales the channels of the base grid."""
        return 1

    def fit(self, height: int, width: int) -> Self:
        """Choose unresolved widths and numbers of blocks as in the published models, and `w_dim` for the labels."""
        w_dim = self.w_dim or self.z_dim + (LABEL_WIDTH if self.c_dim else 0)
        if self.widths:
            self.check_img_size(height, width)
            return replace(self, w_dim=w_dim)
        count = count_resolutions(self.base, height, width)
        if self.layers and len(self.layers) != count:
            problem = f"must have one entry per resolution, {count} for images of {height}x{width}"
            raise ConfigError("layers", self.layers, problem)
        widths = tuple(published_width(grid) for grid in doubled_grids(self.base, count))
        return replace(self, w_dim=w_dim, widths=widths, layers=self.layers or (BLOCKS,) * count)

    def build(self) -> Generator:
        """Build the generator, initialized from torch's global RNG."""
        return R3GANGenerator(self.fit(*self.img_size))  # chooses w_dim


def gaussian(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """Create a weight (out, in, ...) from N(0, gain^2 / fan_in), without equalised learning rate."""
    weight = torch.empty(*shape)
    return nn.Parameter(weight.normal_(std=gain / math.sqrt(math.prod(shape[1:]))))


class Pointwise(nn.Module):
    """1x1 convolution without bias, computed in the dtype of its input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = gaussian(out_channels, in_channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, effective(self.weight, x.dtype))


class ResidualBlock(nn.Module):
    """Residual block with an inverted bottleneck and a grouped convolution (R3GAN, section 4, configuration E).

        y = x + W3 a(W2 * a(W1 x + b1) + b2),   a(u) = lrelu(u), slope 0.2, gain 1

    W1 and W3 are 1x1, W2 is 3x3 in groups of `group_width` channels. W1 and W2 are initialized with gain
    sqrt(2 / 1.04) L^(-1/4) for a network of L = `num_blocks` blocks, W3 and the biases with zero (Fixup, Zhang et al.
    2019): each block starts as the identity. `clamp` limits the hidden activations.
    """

    def __init__(self, width: int, *, group_width: int, num_blocks: int, clamp: float | None = None) -> None:
        super().__init__()
        hidden = EXPANSION * width
        gain = LRELU_GAIN * num_blocks**-0.25
        self.groups = hidden // group_width
        self.clamp = clamp
        self.expand = gaussian(hidden, width, 1, 1, gain=gain)
        self.expand_bias = nn.Parameter(torch.zeros(hidden))
        self.spatial = gaussian(hidden, group_width, 3, 3, gain=gain)
        self.spatial_bias = nn.Parameter(torch.zeros(hidden))
        self.reduce = nn.Parameter(torch.zeros(width, hidden, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape and dtype."""
        y = conv2d(x, effective(self.expand, x.dtype))  # (B, 2C, H, W)
        y = bias_act(y, self.expand_bias, act="lrelu", gain=1.0, clamp=self.clamp)
        y = conv2d(y, effective(self.spatial, x.dtype), padding=1, groups=self.groups)
        y = bias_act(y, self.spatial_bias, act="lrelu", gain=1.0, clamp=self.clamp)
        return x + conv2d(y, effective(self.reduce, x.dtype))


class R3GANStage(nn.Module):
    """Synthesis stage at one resolution: a 1x1 convolution if the width changes, upsampling, residual blocks."""

    up_filter: Tensor

    def __init__(self, config: R3GANConfig, index: int) -> None:
        super().__init__()
        self.grid, width = config.grids[index], config.widths[index]
        self.place = "{}x{}".format(*self.grid)
        self.is_upsampled = index > 0
        before = config.widths[max(index - 1, 0)]
        self.transition = Pointwise(before, width) if before != width else None
        self.blocks = nn.ModuleList(
            ResidualBlock(width, group_width=config.group_width, num_blocks=sum(config.layers), clamp=config.conv_clamp)
            for _ in range(config.layers[index])
        )
        self.register_buffer("up_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C', H/2, W/2), or (B, C, H, W) in the first stage, to (B, C, H, W)."""
        x = execution.cast(x, self.grid)
        if self.transition is not None:  # a pointwise convolution commutes with upsampling
            x = self.transition(x)
        if self.is_upsampled:
            x = upsample2d(x, self.up_filter)
        for block in self.blocks:
            x = execution.run_block(block, x)
        return x


class R3GANSynthesis(Synthesis):
    """R3GAN synthesis network: a learned basis on the base grid, one stage per resolution, and a 1x1 ToRGB.

        x_0 = basis * (W w),   img = W_rgb stages(x_0)

    The basis (C, h, w) is initialized from N(0, 1). There are no styles in the stages, no noise, no normalisation, no
    RGB skips and no tanh. All noise modes give the same image.
    """

    def __init__(self, config: R3GANConfig) -> None:
        super().__init__(config)
        self.block_resolutions = [max(grid) for grid in config.grids]
        self.basis = nn.Parameter(torch.randn(config.widths[0], *config.base))
        self.scale = Linear(config.w_dim, config.widths[0], bias=False)
        self.scale.weight = gaussian(config.widths[0], config.w_dim)
        self.stages = nn.ModuleList(R3GANStage(config, index) for index in range(len(config.widths)))
        self.torgb = Pointwise(config.widths[-1], config.img_channels)

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        x = self.basis * self.scale(ws[:, 0])[:, :, None, None]  # (B, C, h, w)
        for stage in self.stages:
            x = stage(x)
        img: Tensor = self.torgb(execution.full_precision(x))
        return img


class R3GANGenerator(Generator):
    """R3GAN synthesis network with the mapping w = [z, E c]."""

    def build_mapping(self, config: R3GANConfig) -> StyleMapping:
        return ConcatenatingMapping(
            z_dim=config.z_dim, c_dim=config.c_dim, label_dim=config.w_dim - config.z_dim, num_ws=config.num_ws
        )

    def build_synthesis(self, config: R3GANConfig) -> R3GANSynthesis:
        return R3GANSynthesis(config)
