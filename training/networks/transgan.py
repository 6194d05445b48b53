"""TransGAN generator, built from transformer blocks (Jiang et al. 2021, "TransGAN")."""

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
from training.networks.weights import effective


@dataclass(frozen=True, kw_only=True)
class TransGANConfig(BlockConfig, StagedConfig):
    """Configuration of a TransGAN generator for images of base * 2^(len(widths) - 1) pixels.

    `widths` and `layers` hold the numbers of channels and blocks of each resolution, from the base grid up. Each
    width equals the width of the resolution below (bicubic upsampling) or a quarter of that width (pixel shuffle). The
    last `antialias` upsamplings are followed by a low-pass filter. Grids whose longer side is at most `full_upto` use
    full attention, larger grids the attention type `attention`. Every block also attends to `latent_tokens` tokens
    computed from the latent. Without mapping layers, w is z plus a learned embedding of the class. `fit` chooses
    `widths` and `layers` if they are ().
    """

    mapping_layers: int = setting(0, "Number of layers of the mapping network; 0: w is z.", at_least=0)
    widths: tuple[int, ...] = setting(
        (1024, 256, 64), "Number of channels per resolution, lowest first; (): chosen from the image size.", at_least=1
    )
    layers: tuple[int, ...] = setting(
        (5, 4, 2), "Number of blocks per resolution, lowest first; (): chosen from the image size.", at_least=0
    )
    full_upto: int = setting(32, "Highest resolution with full attention, regardless of `attention`.", at_least=0)
    latent_tokens: int = setting(
        0, "Number of tokens computed from the latent for cross-attention in every block; 0: none.", at_least=0
    )
    antialias: int = setting(0, "Number of final upsamplings that are followed by a low-pass filter.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mapping_layers == 0 and self.w_dim != self.z_dim:
            problem = (
                f"without a mapping network w is z, so it must equal z_dim={self.z_dim}: set --z-dim and "
                "generator.w_dim to the same value, or add a mapping network (--map-depth)"
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
                problem = f"the width after {before} must be {before} (bicubic upsampling)"
                raise ConfigError("widths", self.widths, f"{problem} or {before / 4:g} (pixel shuffle), not {after}")
        for grid in self.grids:
            if max(grid) > self.full_upto:
                self.check_grid(grid)

    @classmethod
    def convert_from(cls, other: GeneratorConfig) -> Self:
        """Return a TransGAN configuration with the shared fields of `other`, but without a mapping network."""
        shared = {name: getattr(other, name) for name in field_names(GeneratorConfig)}
        return cls(**(shared | {"mapping_layers": 0, "w_dim": other.z_dim}), **cls.AUTO)

    @property
    def num_ws(self) -> int:
        """One style, read by the stem."""
        return 1

    def fit(self, height: int, width: int) -> Self:
        """Choose unresolved widths and numbers of blocks as in the published models."""
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
        """Build the generator, initialized from torch's global RNG."""
        self.require_widths()
        return TransGANGenerator(self)


def published_stages(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the published widths and numbers of blocks, extended to `count` resolutions by stages of width 1024."""
    if count <= 3:
        return (1024, 256, 64)[:count], (5, 4, 2)[:count]
    first = max(count - 3, 3)
    return (*[1024] * first, 256, 64, 16)[:count], (5, *[4] * (count - 1))


class PixelShuffle(Resampling):
    """Upsample tokens (B, h w, C) to (B, 2h 2w, C / 4); channels 4c to 4c + 3 form 2x2 pixels (Shi et al. 2016)."""

    GROUP = 4

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(F.pixel_shuffle(to_map(x, self.grid), 2))


class BicubicUpsampling(Resampling):
    """Bicubic upsampling of tokens (B, h w, C) to (B, 2h 2w, C) with one matrix product per axis.

    Unlike `F.interpolate`, matrix products have derivatives of any order that are deterministic on every device.
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
    """Return the matrix (2n, n) of bicubic upsampling from n to 2n samples."""
    impulses = torch.eye(n).view(1, n, n, 1)  # channel i is 1 at row i
    doubled = F.interpolate(impulses, size=(2 * n, 1), mode="bicubic", align_corners=False)  # (1, n, 2n, 1)
    return doubled[0, :, :, 0].t().contiguous()


class Antialias(Resampling):
    """Separable low-pass filter [1, 2, 1] / 4 with zero padding (Zhang 2019)."""

    taps: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("taps", torch.tensor([1.0, 2.0, 1.0]) / 4, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(upfirdn2d(to_map(x, self.grid), self.taps, padding=1))


class TransGANStage(nn.Module):
    """Synthesis stage at one resolution: upsampling, position embedding, transformer blocks."""

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
        context_width = config.widths[0] if config.latent_tokens else None
        self.blocks = nn.ModuleList(
            Block(
                config,
                width,
                config.build_attention(self.grid, is_full=is_full),
                noise=config.build_noise(math.prod(self.grid)),
                context_width=context_width,
                clamp=config.conv_clamp,
            )
            for _ in range(config.layers[index])
        )

    def forward(self, x: Tensor, latents: Tensor | None, noise_mode: NoiseMode) -> Tensor:
        """Map x (B, N/4, C or 4C), or (B, N, C) in the first stage, to (B, N, C)."""
        x = execution.cast(self.upsampling(x), self.grid)
        if self.position is not None:
            x = x + effective(self.position, x.dtype)
        for block in self.blocks:
            x = execution.run_block(block, x, latents, noise_mode)
        return x


class TransGANSynthesis(Synthesis):
    """TransGAN synthesis network: linear stem from the style to the base grid, one stage per resolution, linear ToRGB.

    There is no tanh. Without `attention_noise`, all noise modes give the same image. Linear layers have PyTorch's
    default initialization, except for the Xavier initialization of the ToRGB weight.
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
    """TransGAN synthesis network with the identity mapping or, with mapping layers, StyleGAN2-ADA's mapping network."""

    def build_mapping(self, config: TransGANConfig) -> StyleMapping:
        if config.mapping_layers:
            return super().build_mapping(config)
        return LatentMapping(z_dim=config.z_dim, c_dim=config.c_dim, num_ws=config.num_ws)

    def build_synthesis(self, config: TransGANConfig) -> TransGANSynthesis:
        return TransGANSynthesis(config)
