"""TransGAN discriminator, a transformer on multi-scale patches of the image (Jiang et al. 2021)."""

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
from training.networks.weights import effective


@dataclass(frozen=True, kw_only=True)
class TransGANDiscriminatorConfig(BlockConfig, DiscriminatorConfig):
    """Configuration of a TransGAN discriminator for images of `img_size` (height, width).

    Scale i embeds patches of patch * 2^i pixels into `widths[i]` channels and concatenates them with the tokens of the
    previous scale, average-pooled by 2; `layers[i]` blocks follow. The first `local_layers[i]` blocks use the attention
    type `attention`, the others full attention. Without `multi_scale`, the first scale has all channels and the other
    scales only pool. With `overlap`, the patches of the first scale are twice as large as their stride. `fit` chooses
    `patch` if it is 0, and `widths`, `layers` and `local_layers` if they are ().
    """

    norm: Norm = setting("layer", "Normalisation: token-wise (token) or LayerNorm (layer).")
    patch: int = setting(2, "Side of the finest patches in pixels; 0: chosen from the image size.", at_least=0)
    widths: tuple[int, ...] = setting(
        (288, 96), "Channels added by each scale, finest first; (): chosen from the image size.", at_least=0
    )
    layers: tuple[int, ...] = setting(
        (3, 3), "Number of blocks per scale, finest first; (): chosen from the image size.", at_least=0
    )
    local_layers: tuple[int, ...] = setting(
        (0, 0),
        "Number of leading blocks per scale that use `attention`, not full attention; (): from the image size.",
        at_least=0,
    )
    multi_scale: bool = setting(True, "Add image patches at every scale, not only at the finest scale.")
    overlap: bool = setting(False, "Overlap the finest patches by half their size.")

    AUTO: ClassVar[Mapping[str, Any]] = {"patch": 0, "widths": (), "layers": (), "local_layers": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap and self.patch % 2:
            raise ConfigError("overlap", True, f"needs an even patch size, but patch={self.patch}")
        if self.patch and self.widths and self.layers and self.local_layers:
            self._check_scales()

    def _check_scales(self) -> None:
        for name in ("layers", "local_layers"):
            if len(getattr(self, name)) != len(self.widths):
                problem = f"must have one entry per scale, {len(self.widths)} with widths={self.widths}"
                raise ConfigError(name, getattr(self, name), problem)
        for count, local in zip(self.layers, self.local_layers, strict=True):
            if local > count:
                problem = f"must be between 0 and the number of blocks of each scale, layers={self.layers}"
                raise ConfigError("local_layers", self.local_layers, problem)
        for width in self.stage_widths:
            self.check_width("widths", width)
        largest = self.patch << (len(self.widths) - 1)
        if any(side % largest for side in self.img_size):
            problem = f"{len(self.widths)} scales from patches of {self.patch} need sides divisible by {largest}"
            raise ConfigError(
                "img_size", self.img_size, f"{problem}: choose another discriminator.patch or fewer scales"
            )
        for grid, local in zip(self.grids, self.local_layers, strict=True):
            if local:
                self.check_grid(grid)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grid (height, width) of the tokens at every scale, finest first."""
        height, width = self.img_size
        patches = [self.patch << i for i in range(len(self.widths))]
        return tuple((height // patch, width // patch) for patch in patches)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Number of channels of the blocks at each scale."""
        if not self.multi_scale:
            return (sum(self.widths),) * len(self.widths)
        return tuple(sum(self.widths[: i + 1]) for i in range(len(self.widths)))

    @property
    def has_noise(self) -> bool:
        return self.attention_noise

    def fit(self, height: int, width: int) -> Self:
        """Choose unresolved patch size, widths and numbers of blocks as in the published models."""
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
                raise ConfigError(name, getattr(self, name), "not chosen yet: it is derived from the image size")
        return TransGANDiscriminator(self)


class PatchConv(nn.Conv2d):
    """Patch embedding by a strided convolution, images (B, C, H, W) -> tokens (B, N, width)."""

    def __init__(self, img_channels: int, width: int, patch: int, *, overlap: bool) -> None:
        size = 2 * patch if overlap else patch
        self.patch, self.margin = patch, (size - patch) // 2
        super().__init__(img_channels, width, size, stride=self.patch, padding=self.margin)

    def forward(self, img: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = effective(self.weight, img.dtype), effective(self.bias, img.dtype)
        return to_tokens(conv2d(img, weight, bias, stride=self.patch, padding=self.margin))


class Embedding(nn.Module):
    """Input of a scale: average-pooled tokens of the previous scale, concatenated with embedded image patches."""

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
        """Map img (B, img_channels, H, W) and x (B, 4N, C) or None to (B, N, C'), in the dtype of the grid."""
        parts = []
        if x is not None:
            assert self.before is not None
            parts.append(to_tokens(F.avg_pool2d(to_map(x, self.before), 2)))  # (B, N, C)
        if self.conv is not None:
            parts.append(self.conv(execution.cast(img, self.grid)))
        x = torch.cat([execution.cast(part, self.grid) for part in parts], dim=2)
        return x if self.position is None else x + effective(self.position, x.dtype)


class TransGANDiscriminator(Discriminator):
    """TransGAN discriminator: blocks at every scale, a final block with a class token, and a linear head.

        x_0 = P_0(img),   x_i = [pool2(blocks_{i-1}(x_{i-1})), P_i(img)],   y = block([cls, blocks_n(x_n)])
        logit = h . norm(y_cls) + b + norm(y_cls) . E c / sqrt(C)

    The class token is an input of the last block only. The last block is computed in float32 and has no relative
    positions. The last term is the label projection of conditional models (Miyato & Koyama 2018), with E initialized
    from N(0, 1). The paper has no conditional models; the projection is an addition of this project.

    With `attention_noise`, each call draws fresh noise if `execution.current.random_noise` is set, as in training.
    Otherwise the noise is constant: logits are a deterministic function of the image, and tokens have the same variance
    as in training.
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
        """Initialize linear layers from N(0, 0.02^2), convolutions with Xavier initialization, biases with zero."""
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
        """Return the patch embedding and the blocks of each scale, without the last block and the head."""
        layers: list[nn.Module] = []
        for embedding, blocks in zip(self.embeddings, self.scales, strict=True):
            layers += [embedding, *blocks.children()]
        return layers
