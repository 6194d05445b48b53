"""StyleGAN2 discriminator (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN")."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from torch_utils.ops.upfirdn2d import downsample2d
from training.networks import execution
from training.networks.discriminator import Discriminator, DiscriminatorConfig, SlicingHead, halved_grids, to_logits
from training.networks.layers import Conv2d, FullyConnected, MinibatchStd, resample_filter
from training.networks.mapping import LabelMapping
from training.networks.stylegan2 import Architecture, channels_on_grid, check_channel_base, default_channel_base


@dataclass(frozen=True, kw_only=True)
class StyleGAN2DiscriminatorConfig(DiscriminatorConfig):
    """Configuration of a StyleGAN2 discriminator for images of `img_size` (height, width).

    The grid is halved while both sides are even and larger than 4. A grid whose longer side is R has
    min(channel_base // R, channel_max) channels. `mapping_layers` and `cmap_dim` apply to conditional models only.
    `fit` chooses `channel_base` if it is 0.
    """

    architecture: Architecture = setting(
        "resnet", "Architecture: plain (orig), skip connections from RGB (skip), or residual blocks (resnet)."
    )
    channel_base: int = setting(
        32768, "Channels times resolution of the convolutions; 0: chosen from the image size.", at_least=0
    )
    channel_max: int = setting(512, "Maximum number of channels at any resolution.", at_least=1)
    mapping_layers: int = setting(8, "Number of layers of the label mapping (conditional models only).", at_least=0)
    cmap_dim: int | None = setting(
        None, "Dimensionality of the label projection; None: number of channels of the smallest grid.", at_least=1
    )
    mbstd_group_size: int = setting(
        4, "Group size of the minibatch standard deviation layer; 0: no such layer.", at_least=0
    )
    conv_clamp: float | None = setting(
        256.0, "Clamp activations to +- this value; None: no clamp.", above=0, note="None disables the clamp"
    )
    san: bool = setting(
        False, "Slicing adversarial network: a normalised last layer with a loss of its own (logistic, hinge)."
    )

    AUTO: ClassVar[Mapping[str, Any]] = {"channel_base": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.grids) == 1:
            problem = "cannot be halved: both sides must be even and larger than 4; resize the images"
            raise ConfigError("img_size", self.img_size, problem)
        check_channel_base(self, self.img_size)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Grid (height, width) at every level, from the image to the epilogue."""
        return halved_grids(self.img_size)

    def num_channels(self, grid: tuple[int, int]) -> int:
        """Number of channels on a grid of this size."""
        return channels_on_grid(self, grid)

    @property
    def is_slicing(self) -> bool:
        return self.san

    @property
    def group_size(self) -> int:
        return self.mbstd_group_size

    def fit(self, height: int, width: int) -> Self:
        """Choose `channel_base` if it is 0. Raises ConfigError if the image size is not supported."""
        channel_base = self.channel_base or default_channel_base(max(height, width))
        return replace(self, img_size=(height, width), channel_base=channel_base)

    def build(self) -> StyleGAN2Discriminator:
        if not self.channel_base:
            raise ConfigError("channel_base", self.channel_base, "not chosen yet")
        return StyleGAN2Discriminator(self)


class FromRGB(Conv2d):
    """1x1 convolution from image channels to the features of one grid."""

    def __init__(
        self, config: StyleGAN2DiscriminatorConfig, grid: tuple[int, int], channels: int, clamp: float | None
    ) -> None:
        super().__init__(config.img_channels, channels, 1, activation="lrelu", clamp=clamp)
        self.place = "{}x{}".format(*grid)


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions, the second with downsampling by 2, and for 'resnet' a filtered linear shortcut.

    Both branches of 'resnet' have a gain of sqrt(1/2), which preserves the variance of their sum.
    """

    def __init__(
        self, config: StyleGAN2DiscriminatorConfig, grid: tuple[int, int], channels: int, out_channels: int
    ) -> None:
        super().__init__()
        self.place = "{}x{}".format(*grid)
        clamp = config.conv_clamp
        gain = math.sqrt(0.5) if config.architecture == "resnet" else 1.0
        self.conv0 = Conv2d(channels, channels, 3, activation="lrelu", clamp=clamp)
        self.conv1 = Conv2d(channels, out_channels, 3, down=2, activation="lrelu", gain=gain, clamp=clamp)
        self.skip = None
        if config.architecture == "resnet":
            self.skip = Conv2d(channels, out_channels, 1, down=2, bias=False, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C_out, H/2, W/2)."""
        x = execution.cast(x, (x.shape[2], x.shape[3]))
        y: Tensor = self.conv1(self.conv0(x))
        return y if self.skip is None else y + self.skip(x)


class DiscriminatorEpilogue(nn.Module):
    """Final layers, from the smallest grid to (B, out_dim): minibatch std, 3x3 convolution, two fully connected layers.

    With `group_size` 0, there is no minibatch std. With `out_dim` None, there is no second fully connected layer, and
    the result is (B, channels). All layers but the convolution compute in full precision.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int], out_dim: int | None, *, group_size: int, clamp: float | None
    ) -> None:
        super().__init__()
        C = channels
        self.grid = grid
        self.mbstd = MinibatchStd(group_size) if group_size else None
        extra = 0 if self.mbstd is None else 1
        self.conv = Conv2d(C + extra, C, 3, activation="lrelu", clamp=clamp)
        self.fc = FullyConnected(C * math.prod(grid), C, activation="lrelu")
        self.out = None if out_dim is None else FullyConnected(C, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = execution.full_precision(x)
        if self.mbstd is not None:
            x = self.mbstd(x)  # (B, C+1, h, w)
        x = execution.full_precision(self.conv(execution.cast(x, self.grid))).flatten(1)  # (B, C h w)
        x = self.fc(x)  # (B, C)
        return x if self.out is None else self.out(x)  # (B, out_dim)


class StyleGAN2Discriminator(Discriminator):
    """StyleGAN2 discriminator; conditional models use label projection.

    FromRGB is applied at the resolution of the image. 'skip' applies a FromRGB at every level of an image pyramid,
    including the grid of the epilogue.
    """

    resample_filter: Tensor

    def __init__(self, config: StyleGAN2DiscriminatorConfig) -> None:
        super().__init__(config)
        self.is_skip = config.architecture == "skip"
        channels = [config.num_channels(grid) for grid in config.grids]
        clamps = [config.conv_clamp] * (len(channels) - 1) + [None]  # no clamp in the FromRGB of the epilogue
        num_inputs = len(channels) if self.is_skip else 1
        self.fromrgb = nn.ModuleList(
            FromRGB(config, grid, C, clamp)
            for grid, C, clamp in zip(config.grids[:num_inputs], channels, clamps, strict=False)
        )
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(config, grid, C, C_out)
            for grid, (C, C_out) in zip(config.grids, itertools.pairwise(channels), strict=False)
        )
        self.cmap_dim = config.cmap_dim or channels[-1]
        self.epilogue = DiscriminatorEpilogue(
            channels[-1],
            config.grids[-1],
            self.cmap_dim if config.c_dim else None if config.san else 1,
            group_size=config.mbstd_group_size,
            clamp=config.conv_clamp,
        )
        self.mapping = None
        if config.c_dim:
            self.mapping = LabelMapping(c_dim=config.c_dim, out_dim=self.cmap_dim, num_layers=config.mapping_layers)
        self.head = None
        if config.san:
            dim = self.cmap_dim if config.c_dim else channels[-1]
            self.head = SlicingHead(dim, conditional=bool(config.c_dim))
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, img: Tensor, c: Tensor | None) -> Tensor:
        self.check_inputs(img, c)
        if img.device.type == "cpu":
            img = img.contiguous(memory_format=torch.channels_last)  # the layout of Winograd and pointwise convolutions
        x: Tensor = self.fromrgb[0](execution.cast(img, (img.shape[2], img.shape[3])))  # (B, ch, H, W)
        for level, block in enumerate(self.blocks, start=1):
            x = execution.run_block(block, x)  # (B, ch, H/2^level, W/2^level)
            if self.is_skip:
                img = downsample2d(img, self.resample_filter)
                small = execution.cast(img, (img.shape[2], img.shape[3]))
                x = x.to(small.dtype) + self.fromrgb[level](small)

        return to_logits(self.epilogue(x), None if self.mapping is None else self.mapping(c), self.head)

    def layers_from_image(self) -> list[nn.Module]:
        """Return fromRGB (if any), conv0, conv1 and skip of each level, without the epilogue."""
        layers: list[nn.Module] = []
        for level, block in enumerate(self.blocks):
            if level < len(self.fromrgb):
                layers.append(self.fromrgb[level])
            layers.extend(block.children())  # conv0, conv1, skip
        return layers
