"""The StyleGAN2 discriminator (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN")."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from torch_utils.ops.upfirdn2d import downsample2d
from training.networks import execution
from training.networks.discriminator import Discriminator, DiscriminatorConfig, halved_grids, project
from training.networks.layers import Conv2d, FullyConnected, MinibatchStd, resample_filter
from training.networks.mapping import LabelMapping
from training.networks.stylegan2 import Architecture, channels_on_grid, check_channel_base, default_channel_base


@dataclass(frozen=True, kw_only=True)
class StyleGAN2DiscriminatorConfig(DiscriminatorConfig):
    """A StyleGAN2 discriminator for images of `img_size` (height, width).

    The grid is halved while both sides are even and larger than 4. A grid whose longer side is R has
    min(channel_base // R, channel_max) channels. `mbstd_group_size` 0 leaves minibatch-std out, `mapping_layers` and
    `cmap_dim`, the width of the label's projection (None: the channels of the smallest grid), matter with labels only.
    `channel_base` 0 means "not chosen yet": such a config cannot be built.
    """

    architecture: Architecture = setting(
        "resnet", "Architecture: plain (orig), skip connections from RGB, or residual blocks."
    )
    channel_base: int = setting(32768, "Channels x resolution of the convolutions; 0: by the images.", at_least=0)
    channel_max: int = setting(512, "Maximum number of channels on a grid.", at_least=1)
    mapping_layers: int = setting(8, "Layers of the mapping of labels; without labels there are none.", at_least=0)
    cmap_dim: int | None = setting(
        None, "Size of the projection of labels; None: the channels of the smallest grid.", at_least=1
    )
    mbstd_group_size: int = setting(4, "Group size of minibatch-std; 0: without it.", at_least=0)
    conv_clamp: float | None = setting(
        256.0, "Bound of activations; None: no clamp.", above=0, note="None clamps nothing"
    )

    AUTO: ClassVar[Mapping[str, Any]] = {"channel_base": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.grids) == 1:
            problem = "cannot be halved: both sides must be even and larger than 4, so resize the images"
            raise ConfigError("img_size", self.img_size, problem)
        check_channel_base(self, self.img_size)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) at every level, from the image down to the epilogue."""
        return halved_grids(self.img_size)

    def num_channels(self, grid: tuple[int, int]) -> int:
        """How many channels a grid of this size has."""
        return channels_on_grid(self, grid)

    @property
    def group_size(self) -> int:
        return self.mbstd_group_size

    def fit(self, height: int, width: int) -> Self:
        """Choose the channels that the images ask for where they are open. Raises ConfigError."""
        channel_base = self.channel_base or default_channel_base(max(height, width))
        return replace(self, img_size=(height, width), channel_base=channel_base)

    def build(self) -> StyleGAN2Discriminator:
        if not self.channel_base:
            raise ConfigError("channel_base", self.channel_base, "not chosen yet")
        return StyleGAN2Discriminator(self)


class FromRGB(Conv2d):
    """The convolution that reads the image on one grid."""

    def __init__(
        self, config: StyleGAN2DiscriminatorConfig, grid: tuple[int, int], channels: int, clamp: float | None
    ) -> None:
        super().__init__(config.img_channels, channels, 1, activation="lrelu", clamp=clamp)
        self.place = "{}x{}".format(*grid)


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions that halve the grid; for 'resnet' a filtered linear shortcut around them.

    Both branches of the sum carry sqrt(1/2), which keeps its variance.
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
        """x (B, C, H, W) -> (B, C_out, H/2, W/2)."""
        x = execution.cast(x, (x.shape[2], x.shape[3]))
        y: Tensor = self.conv1(self.conv0(x))
        return y if self.skip is None else y + self.skip(x)


class DiscriminatorEpilogue(nn.Module):
    """Minibatch-std in groups of `group_size` (0: without) and the last layers, from the last grid to (B, out_dim)."""

    def __init__(
        self, channels: int, grid: tuple[int, int], out_dim: int, *, group_size: int, clamp: float | None
    ) -> None:
        super().__init__()
        C = channels
        self.mbstd = MinibatchStd(group_size) if group_size else None
        extra = 0 if self.mbstd is None else 1
        self.conv = Conv2d(C + extra, C, 3, activation="lrelu", clamp=clamp)
        self.fc = FullyConnected(C * math.prod(grid), C, activation="lrelu")
        self.out = FullyConnected(C, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.mbstd is not None:
            x = self.mbstd(x)  # (B, C+1, h, w)
        x = self.conv(x).flatten(1)  # (B, C h w)
        out: Tensor = self.out(self.fc(x))  # (B, out_dim)
        return out


class StyleGAN2Discriminator(Discriminator):
    """With labels it is a projection discriminator. fromRGB is read at the image's resolution, for 'skip' at every
    resolution of an image pyramid, including the epilogue's."""

    resample_filter: Tensor

    def __init__(self, config: StyleGAN2DiscriminatorConfig) -> None:
        super().__init__(config)
        self.is_skip = config.architecture == "skip"
        channels = [config.num_channels(grid) for grid in config.grids]
        clamps = [config.conv_clamp] * (len(channels) - 1) + [None]  # the epilogue's fromRGB has no clamp
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
            self.cmap_dim if config.c_dim else 1,
            group_size=config.mbstd_group_size,
            clamp=config.conv_clamp,
        )
        self.mapping = None
        if config.c_dim:
            self.mapping = LabelMapping(c_dim=config.c_dim, out_dim=self.cmap_dim, num_layers=config.mapping_layers)
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, img: Tensor, c: Tensor | None) -> Tensor:
        self.check_inputs(img, c)
        x: Tensor = self.fromrgb[0](execution.cast(img, (img.shape[2], img.shape[3])))  # (B, ch, H, W)
        for level, block in enumerate(self.blocks, start=1):
            x = execution.run_block(block, x)  # (B, ch, H/2^level, W/2^level)
            if self.is_skip:
                img = downsample2d(img, self.resample_filter)
                small = execution.cast(img, (img.shape[2], img.shape[3]))
                x = x.to(small.dtype) + self.fromrgb[level](small)

        logits: Tensor = self.epilogue(execution.full_precision(x))  # (B, 1), with labels (B, cmap_dim)
        if self.mapping is not None:
            logits = project(logits, self.mapping(c))
        return logits

    def layers_from_image(self) -> list[nn.Module]:
        """Per level fromRGB if there is one, conv0, conv1, skip; the epilogue is not among them."""
        layers: list[nn.Module] = []
        for level, block in enumerate(self.blocks):
            if level < len(self.fromrgb):
                layers.append(self.fromrgb[level])
            layers.extend(block.children())  # conv0, conv1, skip
        return layers
