"""R3GAN discriminator, the mirror image of the generator (Huang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from torch_utils.ops.upfirdn2d import downsample2d
from training.networks import execution
from training.networks.discriminator import Discriminator, DiscriminatorConfig, halved_grids
from training.networks.generator import Grid
from training.networks.layers import resample_filter
from training.networks.r3gan import BLOCKS, Pointwise, ResidualBlock, check_groups, gaussian, published_width
from training.networks.vit import Linear


@dataclass(frozen=True, kw_only=True)
class R3GANDiscriminatorConfig(DiscriminatorConfig):
    """Configuration of an R3GAN discriminator for images of `img_size` (height, width).

    The grid is halved while both sides are even and larger than 4. `widths` and `layers` hold the numbers of channels
    and residual blocks of each grid, smallest first as in the generator. `fit` chooses them if they are ().
    """

    widths: tuple[int, ...] = setting(
        (768, 768, 768, 768), "Number of channels per grid, smallest first; (): chosen from the image size.", at_least=1
    )
    layers: tuple[int, ...] = setting(
        (2, 2, 2, 2), "Number of residual blocks per grid, smallest first; (): chosen from the image size.", at_least=0
    )
    group_width: int = setting(16, "Number of channels per group of the 3x3 convolutions.", at_least=1)

    AUTO: ClassVar[Mapping[str, Any]] = {"widths": (), "layers": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.grids) == 1:
            problem = "cannot be halved: both sides must be even and larger than 4; resize the images"
            raise ConfigError("img_size", self.img_size, problem)
        check_groups(self.widths, self.group_width)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grid (height, width) of every stage, smallest first."""
        return halved_grids(self.img_size)[::-1]

    def fit(self, height: int, width: int) -> Self:
        """Choose unresolved widths and numbers of blocks as in the published models."""
        grids = halved_grids((height, width))[::-1]
        widths = self.widths or tuple(published_width(grid) for grid in grids)
        layers = self.layers or (BLOCKS,) * len(grids)
        fitted = replace(self, img_size=(height, width), widths=widths, layers=layers)
        fitted._check_stages()
        return fitted

    def _check_stages(self) -> None:
        height, width = self.img_size
        for name in ("widths", "layers"):
            if len(getattr(self, name)) != len(self.grids):
                problem = f"must have one entry per grid, {len(self.grids)} for images of {height}x{width}"
                raise ConfigError(name, getattr(self, name), problem)

    def build(self) -> R3GANDiscriminator:
        for name in self.AUTO:
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "not chosen yet: it is derived from the image size")
        self._check_stages()
        return R3GANDiscriminator(self)


class R3GANDiscriminatorStage(nn.Module):
    """Residual blocks on one grid; above the smallest grid, downsampling and a 1x1 convolution if the width changes."""

    down_filter: Tensor

    def __init__(self, config: R3GANDiscriminatorConfig, index: int) -> None:
        super().__init__()
        self.grid, width = config.grids[index], config.widths[index]
        self.place = "{}x{}".format(*self.grid)
        self.is_downsampled = index > 0
        after = config.widths[max(index - 1, 0)]
        self.blocks = nn.ModuleList(
            ResidualBlock(width, group_width=config.group_width, num_blocks=sum(config.layers))
            for _ in range(config.layers[index])
        )
        self.transition = Pointwise(width, after) if after != width else None
        self.register_buffer("down_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C', H/2, W/2), or on the smallest grid to the same shape."""
        x = execution.cast(x, self.grid)
        for block in self.blocks:
            x = execution.run_block(block, x)
        if self.is_downsampled:
            x = downsample2d(x, self.down_filter)
        return x if self.transition is None else self.transition(x)


class R3GANDiscriminator(Discriminator):
    """R3GAN discriminator: 1x1 FromRGB, one stage per grid from the image down, and a linear head.

        x = stages(W_rgb img),   h_c = sum_ij K_cij x_cij,   logit = V h,   with labels: logit = (V h) . (E c)

    K is a depthwise convolution as large as the smallest grid. With labels, V has as many outputs as inputs, C, and E
    is initialized with gain 1 / sqrt(C). There are no minibatch statistics. The head computes in full precision.
    """

    def __init__(self, config: R3GANDiscriminatorConfig) -> None:
        super().__init__(config)
        self.grid = config.img_size
        C = config.widths[0]
        self.fromrgb = Pointwise(config.img_channels, config.widths[-1])
        self.stages: Any = nn.ModuleList(
            R3GANDiscriminatorStage(config, index) for index in reversed(range(len(config.widths)))
        )
        self.kernel = gaussian(C, *config.grids[0])  # a depthwise convolution has one input channel per output
        self.head = Linear(C, C if config.c_dim else 1, bias=False)
        self.head.weight = gaussian(C if config.c_dim else 1, C)
        self.embed = None
        if config.c_dim:
            self.embed = nn.Parameter(torch.randn(config.c_dim, C) / math.sqrt(C * config.c_dim))

    def forward(self, img: Tensor, c: Tensor | None) -> Tensor:
        self.check_inputs(img, c)
        x: Tensor = self.fromrgb(execution.cast(img, self.grid))  # (B, C_n, H, W)
        for stage in self.stages:
            x = stage(x)  # (B, C_i, H_i / 2, W_i / 2)
        features = (execution.full_precision(x) * self.kernel).sum(dim=(2, 3))  # (B, C)
        logits: Tensor = self.head(features)  # (B, 1), or (B, C) if conditional
        if self.embed is not None and c is not None:
            logits = (logits * (c @ self.embed)).sum(dim=1, keepdim=True)
        return logits

    def layers_from_image(self) -> list[nn.Module]:
        """Return FromRGB, the blocks and the 1x1 convolutions of each stage, without the smallest grid and the head."""
        layers: list[nn.Module] = [self.fromrgb]
        for stage in self.stages[:-1]:
            layers += [*stage.blocks, *([] if stage.transition is None else [stage.transition])]
        return layers
