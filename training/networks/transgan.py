"""The TransGAN generator: transformer blocks from the latent to the pixels (Jiang et al. 2021, "TransGAN")."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, field_names, setting
from torch_utils.ops.upfirdn2d import upfirdn2d
from training.networks import execution
from training.networks.generator import (
    Generator,
    GeneratorConfig,
    Grid,
    NoiseMode,
    StagedConfig,
    Synthesis,
    count_resolutions,
)
from training.networks.layers import Resampling, to_map, to_tokens
from training.networks.mapping import LatentMapping, StyleMapping
from training.networks.vit import Block, BlockConfig, Linear, position_embedding


@dataclass(frozen=True, kw_only=True)
class TransGANConfig(BlockConfig, StagedConfig):
    """A TransGAN generator for images of base * 2^(len(widths) - 1) pixels.

    `widths` and `layers` hold one number per resolution, from the base grid up: channels and blocks. A width is that of
    the resolution below, which is then upsampled bicubically, or a quarter of it, by pixel shuffle; the last
    `antialias` of the upsamplings are low-pass filtered. Grids whose longer side is at most `full_upto` attend among
    all tokens, larger ones as `attention` says. With `latent_tokens` every block also attends to so many tokens that
    are made from the latent. Without mapping layers w is z, plus a learned vector per class. `widths=()` stands for a
    choice that is still to be made; such a config cannot be built.
    """

    mapping_layers: int = setting(0, "Layers of the mapping network; 0: w is z.", at_least=0)
    widths: tuple[int, ...] = setting(
        (1024, 256, 64), "Channels per resolution, lowest first; (): by the images.", at_least=1
    )
    layers: tuple[int, ...] = setting((5, 4, 2), "Blocks per resolution, lowest first; (): by the images.", at_least=0)
    full_upto: int = setting(
        32, "Highest resolution with attention among all tokens, whatever `attention` is.", at_least=0
    )
    latent_tokens: int = setting(0, "Tokens made from z that every block also attends to.", at_least=0)
    antialias: int = setting(0, "Upsamplings with a low-pass filter, counted from the last one.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mapping_layers == 0 and self.w_dim != self.z_dim:
            problem = (
                f"without a mapping network w is z, of z_dim={self.z_dim} numbers: give --z-dim and generator.w_dim "
                "the same value, or add a mapping network (--map-depth)"
            )
            raise ConfigError("w_dim", self.w_dim, problem)
        if self.widths:
            self._check_stages()

    def _check_stages(self) -> None:
        if self.antialias >= len(self.widths):
            raise ConfigError("antialias", self.antialias, f"there are only {len(self.widths) - 1} upsamplings")
        for width in self.widths:
            self.check_width("widths", width)
        for before, after in zip(self.widths, self.widths[1:], strict=False):
            if after not in (before, before / 4):
                problem = f"after {before} comes {before} (bicubic upsampling) or {before / 4:g} (pixel shuffle)"
                raise ConfigError("widths", self.widths, f"{problem}, not {after}")
        for grid in self.grids:
            if max(grid) > self.full_upto:
                self.check_grid(grid)

    @classmethod
    def convert_from(cls, other: GeneratorConfig) -> Self:
        """Return a TransGAN with the shared fields of `other`, but without its mapping network."""
        shared = {name: getattr(other, name) for name in field_names(GeneratorConfig)}
        return cls(**(shared | {"mapping_layers": 0, "w_dim": other.z_dim}), **cls.AUTO)

    @property
    def num_ws(self) -> int:
        """The stem alone reads the style."""
        return 1

    def fit(self, height: int, width: int) -> Self:
        """Choose widths and blocks, where they are open, as the published models have them."""
        if self.widths:
            self.check_img_size(height, width)
            return self
        count = count_resolutions(self.base, height, width)
        widths, layers = published_stages(count)
        if self.layers and len(self.layers) != count:
            problem = f"must have one entry per resolution, {count} for images of {height}x{width}"
            raise ConfigError("layers", self.layers, problem)
        return replace(self, widths=widths, layers=self.layers or layers)

    def build(self) -> Generator:
        """A generator with weights from torch's global random generator."""
        self.require_widths()
        return TransGANGenerator(self)


def published_stages(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and blocks of the published model with `count` resolutions; beyond them, more stages of the first kind."""
    if count <= 3:
        return (1024, 256, 64)[:count], (5, 4, 2)[:count]
    first = max(count - 3, 3)
    return (*[1024] * first, 256, 64, 16)[:count], (5, *[4] * (count - 1))


class PixelShuffle(Resampling):
    """Tokens (B, h w, C) to (B, 2h 2w, C / 4): channels 4c to 4c + 3 become a square of pixels (Shi et al. 2016)."""

    GROUP = 4

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(F.pixel_shuffle(to_map(x, self.grid), 2))


class BicubicUpsampling(Resampling):
    """Tokens (B, h w, C) to (B, 2h 2w, C) by bicubic interpolation, as the product of a matrix per axis.

    Products have derivatives of any order that are deterministic on every device; `F.interpolate` has not.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("rows", bicubic_matrix(grid[0]), persistent=False)
        self.register_buffer("columns", bicubic_matrix(grid[1]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        h, w = self.grid
        x = self.rows.to(x.dtype) @ x.reshape(B, h, w * C)  # (B, 2h, w C)
        x = self.columns.to(x.dtype) @ x.view(B, 2 * h, w, C)  # (B, 2h, 2w, C)
        return x.flatten(1, 2)


def bicubic_matrix(n: int) -> Tensor:
    """The linear map (2n, n) from n samples to twice as many."""
    impulses = torch.eye(n).view(1, n, n, 1)  # channel i is 1 at row i
    doubled = F.interpolate(impulses, size=(2 * n, 1), mode="bicubic", align_corners=False)  # (1, n, 2n, 1)
    return doubled[0, :, :, 0].t().contiguous()


class Antialias(Resampling):
    """The low-pass filter [1, 2, 1] / 4 along both axes, with zeros outside (Zhang 2019)."""

    taps: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("taps", torch.tensor([1.0, 2.0, 1.0]) / 4, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(upfirdn2d(to_map(x, self.grid), self.taps, padding=1))


class TransGANStage(nn.Module):
    """All that happens at one resolution: upsampling, position, blocks."""

    def __init__(self, config: TransGANConfig, index: int) -> None:
        super().__init__()
        self.grid, width = config.grids[index], config.widths[index]
        self.place = "{}x{}".format(*self.grid)
        self.upsampling: nn.Module = nn.Identity()
        if index > 0:
            below = config.grids[index - 1]
            is_bicubic = width == config.widths[index - 1]
            steps: list[nn.Module] = [BicubicUpsampling(below) if is_bicubic else PixelShuffle(below)]
            if index >= len(config.widths) - config.antialias:
                steps.append(Antialias(self.grid))
            self.upsampling = nn.Sequential(*steps)
        self.position = position_embedding(self.grid, width) if config.has_absolute else None
        is_full = max(self.grid) <= config.full_upto
        other_width = config.widths[0] if config.latent_tokens else None
        self.blocks = nn.ModuleList(
            Block(
                config,
                width,
                config.build_attention(self.grid, is_full=is_full),
                noise=config.build_noise(math.prod(self.grid)),
                other_width=other_width,
                clamp=config.conv_clamp,
            )
            for _ in range(config.layers[index])
        )

    def forward(self, x: Tensor, latents: Tensor | None, noise_mode: NoiseMode) -> Tensor:
        """x (B, N/4, C or 4C), from the first stage on (B, N, C) -> (B, N, C)."""
        x = execution.cast(self.upsampling(x), self.grid)
        if self.position is not None:
            x = x + self.position.to(x.dtype)
        for block in self.blocks:
            x = execution.run_block(block, x, latents, noise_mode)
        return x


class TransGANSynthesis(Synthesis):
    """A linear stem from the style to the base grid, one stage per resolution, and a linear map to the image.

    There is no tanh. Without `attention_noise` all noise modes give the same image. Linear layers start as PyTorch's
    do, the weight of the last one from Xavier's distribution.
    """

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__(config)
        self.grids = config.grids
        self.block_resolutions = [max(grid) for grid in self.grids]
        width = config.widths[0]
        self.stem = Linear(config.w_dim, math.prod(config.base) * width)
        self.latent_stem: Linear | None = None
        if config.latent_tokens:
            self.latent_stem = Linear(config.w_dim, config.latent_tokens * width)
            self.latent_position = position_embedding(config.latent_tokens, width)
        self.stages = nn.ModuleList(TransGANStage(config, index) for index in range(len(config.widths)))
        self.torgb = Linear(config.widths[-1], config.img_channels)
        nn.init.xavier_uniform_(self.torgb.weight)

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        w = ws[:, 0]
        x = self.stem(w).unflatten(1, (math.prod(self.grids[0]), -1))  # (B, N, C)
        latents = None
        if self.latent_stem is not None:
            latents = self.latent_stem(w).view(-1, *self.latent_position.shape) + self.latent_position
        for stage in self.stages:
            x = stage(x, latents, noise_mode)
        return to_map(self.torgb(execution.full_precision(x)), self.grids[-1])


class TransGANGenerator(Generator):
    """A latent that is its own style, and TransGAN's synthesis."""

    def build_mapping(self, config: TransGANConfig) -> StyleMapping:
        if config.mapping_layers:
            return super().build_mapping(config)
        return LatentMapping(z_dim=config.z_dim, c_dim=config.c_dim, num_ws=config.num_ws)

    def build_synthesis(self, config: TransGANConfig) -> TransGANSynthesis:
        return TransGANSynthesis(config)
