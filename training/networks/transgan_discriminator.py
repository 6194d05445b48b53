"""The TransGAN discriminator: a transformer that sees the image in patches of several sizes (Jiang et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, setting
from training.networks import execution
from training.networks.convolution import conv2d
from training.networks.discriminator import Discriminator, DiscriminatorConfig, project
from training.networks.generator import Grid, NoiseMode
from training.networks.grid_attention import CellAttention
from training.networks.layers import to_map, to_tokens
from training.networks.vit import Block, BlockConfig, Linear, Norm, position_embedding


@dataclass(frozen=True, kw_only=True)
class TransGANDiscriminatorConfig(BlockConfig, DiscriminatorConfig):
    """A TransGAN discriminator for images of `img_size` (height, width).

    Scale i sees patches of patch * 2^i pixels as `widths[i]` channels, which join those of the scale before it, halved
    by average pooling; then follow `layers[i]` blocks. The first `local_layers[i]` of them attend as `attention` says,
    the others among all tokens. Without `multi_scale` the first scale has all channels and the others only pool. With
    `overlap` the first patches are twice as large as their distance. `patch` 0 stands for a choice that is still to be
    made, with `widths`, `layers` and `local_layers`; such a config cannot be built.
    """

    norm: Norm = setting("layer", "Normalisation: token-wise or LayerNorm.")
    patch: int = setting(2, "Side of the finest patches, in pixels; 0: by the images.", at_least=0)
    widths: tuple[int, ...] = setting(
        (288, 96), "Channels that each scale adds, finest first; (): by the images.", at_least=0
    )
    layers: tuple[int, ...] = setting((3, 3), "Blocks per scale, finest first; (): by the images.", at_least=0)
    local_layers: tuple[int, ...] = setting(
        (0, 0), "First blocks per scale, which attend as `attention` says; (): by the images.", at_least=0
    )
    multi_scale: bool = setting(True, "Patches of the image that join at every scale, not at the finest alone.")
    overlap: bool = setting(False, "Overlap, by half, of the finest patches.")

    AUTO: ClassVar[Mapping[str, Any]] = {"patch": 0, "widths": (), "layers": (), "local_layers": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap and self.patch % 2:
            raise ConfigError("overlap", True, f"needs patches of an even size, patch={self.patch} is not")
        if self.patch and self.widths and self.layers and self.local_layers:
            self._check_scales()

    def _check_scales(self) -> None:
        for name in ("layers", "local_layers"):
            if len(getattr(self, name)) != len(self.widths):
                problem = f"must have one entry per scale, as widths={self.widths} has {len(self.widths)}"
                raise ConfigError(name, getattr(self, name), problem)
        for count, local in zip(self.layers, self.local_layers, strict=True):
            if local > count:
                problem = f"must lie between 0 and the number of blocks of each scale, layers={self.layers}"
                raise ConfigError("local_layers", self.local_layers, problem)
        for width in self.stage_widths:
            self.check_width("widths", width)
        largest = self.patch << (len(self.widths) - 1)
        if any(side % largest for side in self.img_size):
            problem = f"{len(self.widths)} scales from patches of {self.patch} need sides that {largest} divides"
            raise ConfigError(
                "img_size", self.img_size, f"{problem}: choose another discriminator.patch or fewer scales"
            )
        for grid, local in zip(self.grids, self.local_layers, strict=True):
            if local:
                self.check_grid(grid)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(height, width) of every scale, from the finest down."""
        height, width = self.img_size
        patches = [self.patch << i for i in range(len(self.widths))]
        return tuple((height // patch, width // patch) for patch in patches)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the blocks at each scale."""
        if not self.multi_scale:
            return (sum(self.widths),) * len(self.widths)
        return tuple(sum(self.widths[: i + 1]) for i in range(len(self.widths)))

    def fit(self, height: int, width: int) -> Self:
        """Choose patches, scales and blocks, where they are open, as the published models have them."""
        side = max(height, width)
        is_small = side <= 48
        patch = self.patch or max(2, side // 64)
        widths = self.widths or ((288, 96) if is_small else (288, 48, 48))
        layers = self.layers or (3, 3, *[4] * len(widths))[: len(widths)]
        local = self.local_layers or (0 if is_small else min(2, layers[0]), *[0] * (len(layers) - 1))
        return replace(self, img_size=(height, width), patch=patch, widths=widths, layers=layers, local_layers=local)

    def build(self) -> Discriminator:
        for name in self.AUTO:
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "not chosen yet: it follows from the size of the images")
        return TransGANDiscriminator(self)


class PatchConv(nn.Conv2d):
    """A strided convolution that makes of each patch one token: images (B, C, H, W) -> (B, N, width)."""

    def __init__(self, img_channels: int, width: int, patch: int, *, overlap: bool) -> None:
        size = 2 * patch if overlap else patch
        self.patch, self.margin = patch, (size - patch) // 2
        super().__init__(img_channels, width, size, stride=self.patch, padding=self.margin)

    def forward(self, img: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = self.weight.to(img.dtype), self.bias.to(img.dtype)
        return to_tokens(conv2d(img, weight, bias, stride=self.patch, padding=self.margin))


class Embedding(nn.Module):
    """What the first block of a scale gets: the pooled tokens of the scale before, beside them patches of the image."""

    def __init__(self, config: TransGANDiscriminatorConfig, index: int) -> None:
        super().__init__()
        self.grid = config.grids[index]
        self.before = config.grids[index - 1] if index else None
        self.conv: PatchConv | None = None
        if config.multi_scale or index == 0:
            width = config.widths[index] if config.multi_scale else config.stage_widths[0]
            overlap = config.overlap and index == 0
            self.conv = PatchConv(config.img_channels, width, config.patch << index, overlap=overlap)
        self.position = position_embedding(self.grid, config.stage_widths[index]) if config.has_absolute else None

    def forward(self, img: Tensor, x: Tensor | None) -> Tensor:
        """img (B, channels, H, W), x (B, 4N, C) or None -> (B, N, C'), in the type of the grid."""
        parts = []
        if x is not None:
            assert self.before is not None
            parts.append(to_tokens(F.avg_pool2d(to_map(x, self.before), 2)))  # (B, N, C)
        if self.conv is not None:
            parts.append(self.conv(execution.cast(img, self.grid)))
        x = torch.cat([execution.cast(part, self.grid) for part in parts], dim=2)
        return x if self.position is None else x + self.position.to(x.dtype)


class TransGANDiscriminator(Discriminator):
    """Blocks at every scale, one more with a class token, and a linear map of that to the logit.

        x_0 = P_0(img),   x_i = [pool2(blocks_{i-1}(x_{i-1})), P_i(img)],   y = block([cls, blocks_n(x_n)])
        logit = h . norm(y_cls) + b + norm(y_cls) . E c / sqrt(C)

    The class token joins the last block only, which computes in float32 and has no relative positions. The last term,
    with E ~ N(0, 1), is there with labels alone (Miyato & Koyama 2018); that is this project's choice, the paper has
    no labels.

    With `attention_noise` a training step draws fresh noise at each call (`execution.random_noise`); otherwise the
    noise is constant, so that logits are a function of the image and tokens have the variance of training.
    """

    def __init__(self, config: TransGANDiscriminatorConfig) -> None:
        super().__init__(config)
        count = len(config.widths)
        self.embeddings = nn.ModuleList(Embedding(config, index) for index in range(count))
        self.scales = nn.ModuleList(
            nn.ModuleList(
                Block(
                    config,
                    width,
                    config.build_attention(grid, is_full=number >= local),
                    noise=config.build_noise(math.prod(grid)),
                )
                for number in range(config.layers[index])
            )
            for index, (grid, width, local) in enumerate(
                zip(config.grids, config.stage_widths, config.local_layers, strict=True)
            )
        )
        width, num_tokens = config.stage_widths[-1], 1 + math.prod(config.grids[-1])
        self.cls = position_embedding(1, width)
        whole = (1, num_tokens)
        attention = CellAttention(config.num_heads, whole, whole, use_relative=False)
        self.last_block = Block(config, width, attention, noise=config.build_noise(num_tokens))
        self.norm = config.build_norm(width)
        self.head = Linear(width, 1)
        self._init_weights()
        self.embed = nn.Parameter(torch.randn(config.c_dim, width)) if config.c_dim else None

    def _init_weights(self) -> None:
        """Linear layers from N(0, 0.02^2), convolutions from Xavier's distribution, biases 0."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, PatchConv):
                nn.init.xavier_uniform_(module.weight)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, img: Tensor, c: Tensor | None) -> Tensor:
        self.check_inputs(img, c)
        noise_mode: NoiseMode = "random" if execution.current.random_noise else "const"
        x: Tensor | None = None
        for embedding, blocks in zip(self.embeddings, self.scales, strict=True):
            x = embedding(img, x)  # (B, N / 4^i, C_i)
            for block in blocks.children():
                x = execution.run_block(block, x, None, noise_mode)
        assert x is not None

        x = execution.full_precision(x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, C)
        features = self.norm(self.last_block(x, None, noise_mode)[:, :1])[:, 0]  # (B, C)
        logits: Tensor = self.head(features)  # (B, 1)
        if self.embed is not None and c is not None:
            logits = logits + project(features, c @ self.embed)
        return logits

    def layers_from_image(self) -> list[nn.Module]:
        """Per scale the patches with their positions, then the blocks; neither the last block nor the head."""
        layers: list[nn.Module] = []
        for embedding, blocks in zip(self.embeddings, self.scales, strict=True):
            layers += [embedding, *blocks.children()]
        return layers
