"""Transformer discriminator modelled on the Styleformer generator. The design is original to this project.

The encoder blocks are those of the generator without styles, demodulation and noise, applied from the highest to the
lowest resolution. They are followed by the epilogue of the StyleGAN2 discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, setting
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import downsample2d
from training.networks import execution
from training.networks.attention import SelfAttention
from training.networks.discriminator import Discriminator, DiscriminatorConfig, SlicingHead, halved_grids, to_logits
from training.networks.generator import Grid
from training.networks.layers import Conv2d, resample_filter, to_map, to_tokens
from training.networks.mapping import LabelMapping
from training.networks.stylegan2 import channels_on_grid, check_channel_base
from training.networks.stylegan2_discriminator import DiscriminatorEpilogue
from training.networks.weights import effective

CHANNEL_BASE = 4096  # default for channel_base=0
FINEST_GRID = 64  # target for patch=0: maximum number of tokens along the longer side


@dataclass(frozen=True, kw_only=True)
class StyleformerDiscriminatorConfig(DiscriminatorConfig):
    """Configuration of a transformer discriminator for images of `img_size` (height, width).

    The tokens are patches of `patch` x `patch` pixels. The grid of tokens is halved while both sides are even and
    larger than 4. `layers` holds the number of encoder blocks per grid, finest grid first. A grid whose longer side is
    R has min(channel_base // R, channel_max) channels, rounded down to a multiple of `depth`, the channels per head.
    Blocks with at least `linformer_min_tokens` tokens attend to `linformer_k` projected tokens. `fit` chooses `patch`
    and `channel_base` if they are 0, and `layers` if it is ().
    """

    patch: int = setting(2, "Side of the patches in pixels; 0: chosen from the image size.", at_least=0)
    layers: tuple[int, ...] = setting(
        (2, 2, 2), "Number of encoder blocks per grid, finest first; (): chosen from the image size.", at_least=1
    )
    channel_base: int = setting(
        CHANNEL_BASE, f"Channels times longer side of the token grid; 0: {CHANNEL_BASE}.", at_least=0
    )
    channel_max: int = setting(512, "Maximum number of channels on any grid.", at_least=1)
    depth: int = setting(32, "Channels per attention head.", at_least=1)
    linformer_k: int = setting(256, "Number of tokens to which Linformer projects keys and values.", at_least=1)
    linformer_min_tokens: int = setting(1024, "Minimum number of tokens for Linformer attention.", at_least=1)
    mapping_layers: int = setting(8, "Number of layers of the label mapping (conditional models only).", at_least=1)
    mbstd_group_size: int = setting(
        4, "Group size of the minibatch standard deviation layer; 0: no such layer.", at_least=0
    )
    conv_clamp: float | None = setting(
        256.0, "Clamp activations to +- this value; None: no clamp.", above=0, note="None disables the clamp"
    )
    san: bool = setting(
        False, "Slicing adversarial network: a normalised last layer with a loss of its own (logistic, hinge)."
    )

    AUTO: ClassVar[Mapping[str, Any]] = {"patch": 0, "layers": (), "channel_base": 0}

    def _check_grids(self) -> None:
        """Raise ConfigError if patches, blocks or channels do not match the image size."""
        height, width = self.img_size
        if height % self.patch or width % self.patch:
            problem = f"does not divide images of {height}x{width}: choose a common divisor of both sides"
            raise ConfigError("patch", self.patch, problem)
        if len(self.layers) != len(self.grids):
            problem = f"must have one entry per grid, {len(self.grids)} for images of {height}x{width} in patches of"
            raise ConfigError("layers", self.layers, f"{problem} {self.patch}")
        check_channel_base(self, self.grids[0])

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grid (height, width) of the tokens at every level, from the image to the epilogue."""
        return halved_grids((self.img_size[0] // self.patch, self.img_size[1] // self.patch))

    def num_channels(self, grid: Grid) -> int:
        """Number of channels on a grid of this size."""
        channels = channels_on_grid(self, grid)
        return channels - channels % min(self.depth, channels)

    @property
    def is_slicing(self) -> bool:
        return self.san

    @property
    def group_size(self) -> int:
        return self.mbstd_group_size

    def fit(self, height: int, width: int) -> Self:
        """Choose unresolved fields: patches of at least 2 pixels, at most FINEST_GRID per side; 2 blocks per grid."""
        power = math.gcd(height, width) & -math.gcd(height, width)  # largest power of two that divides both sides
        target = max(2, 2 ** math.ceil(math.log2(max(height, width) / FINEST_GRID)))
        patch = self.patch or min(target, power)
        sized = replace(self, img_size=(height, width), patch=patch, channel_base=self.channel_base or CHANNEL_BASE)
        fitted = replace(sized, layers=self.layers or (2,) * len(sized.grids))
        fitted._check_grids()
        return fitted

    def build(self) -> StyleformerDiscriminator:
        for name, unresolved in self.AUTO.items():
            if getattr(self, name) == unresolved:
                raise ConfigError(name, unresolved, "not chosen yet")
        self._check_grids()
        return StyleformerDiscriminator(self)


class PatchEmbedding(nn.Module):
    """Patch embedding: a linear map of the pixels of each patch, equivalent to a convolution with stride `patch`."""

    def __init__(self, config: StyleformerDiscriminatorConfig) -> None:
        super().__init__()
        self.patch, self.grid = config.patch, config.grids[0]
        self.conv = Conv2d(config.img_channels * config.patch**2, config.num_channels(self.grid), 1)

    def forward(self, img: Tensor) -> Tensor:
        """Map img (B, C_img, H, W) to tokens (B, N, C)."""
        patches = F.pixel_unshuffle(execution.cast(img, self.grid), self.patch)  # (B, C_img patch^2, h, w)
        return to_tokens(self.conv(patches))


class DiscriminatorEncoderBlock(nn.Module):
    """Self-attention with a residual branch that starts at the values, without a feed-forward network.

        X'  = LayerNorm(X + P)
        Q, K, V = X' Wq^T, X' Wk^T, X' Wv^T
        Y   = Attention(Q, K, V) Wo^T + V U^T
        out = clamp(sqrt(2) lrelu(Y + b))

    P is a learned position embedding in the first block of each grid, initialized from N(0, 1). P also prevents
    tokens of blank patches from being constant over channels, where the gradient of LayerNorm is unbounded. The weights
    have an equalised learning rate, as in StyleGAN2's discriminator, so both discriminators train with the same --dlr.
    """

    def __init__(
        self, config: StyleformerDiscriminatorConfig, grid: Grid, width: int, out_width: int, *, is_first: bool
    ) -> None:
        super().__init__()
        N = math.prod(grid)
        self.grid = grid
        self.clamp = config.conv_clamp
        self.weight_gain = 1 / math.sqrt(width)
        self.pos_embedding = nn.Parameter(torch.randn(1, N, width)) if is_first else None
        self.qkv_weight = nn.Parameter(torch.randn(3 * width, width))
        projected = config.linformer_k if config.linformer_min_tokens <= N else None
        self.attention = SelfAttention(max(1, width // config.depth), N, projected)
        self.out_weight = nn.Parameter(torch.randn(out_width, width))
        self.residual_weight = nn.Parameter(torch.randn(out_width, width))
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, N, C) to (B, N, C_out), in the dtype of the grid (`execution.cast`)."""
        x = execution.cast(x, self.grid)
        if self.pos_embedding is not None:
            x = x + effective(self.pos_embedding, x.dtype)
        qkv_weight, out_weight, residual_weight = (
            effective(weight, x.dtype, self.weight_gain)
            for weight in (self.qkv_weight, self.out_weight, self.residual_weight)
        )
        q, k, v = F.linear(F.layer_norm(x, x.shape[2:]), qkv_weight).chunk(3, dim=2)  # each (B, N, C)
        y = F.linear(self.attention(q, k, v), out_weight) + F.linear(v, residual_weight)  # (B, N, C_out)
        return bias_act(y, self.bias, dim=2, act="lrelu", clamp=self.clamp)


class DiscriminatorStage(nn.ModuleList):
    """Encoder blocks of one grid."""

    def __init__(self, config: StyleformerDiscriminatorConfig, grid: Grid, out_widths: Sequence[int]) -> None:
        width = config.num_channels(grid)
        super().__init__(
            DiscriminatorEncoderBlock(config, grid, width, out, is_first=index == 0)
            for index, out in enumerate(out_widths)
        )
        self.place = "{}x{}".format(*grid)


class StyleformerDiscriminator(Discriminator):
    """Patch embedding, encoder blocks on successively halved grids, and the StyleGAN2 epilogue with minibatch std.

    The last block of a grid maps to the width of the next grid, and its output is downsampled with a low-pass filter.
    Conditional models use a projection discriminator.
    """

    resample_filter: Tensor

    def __init__(self, config: StyleformerDiscriminatorConfig) -> None:
        super().__init__(config)
        self.grids = config.grids
        widths = [config.num_channels(grid) for grid in self.grids]
        self.embedding = PatchEmbedding(config)
        self.stages = nn.ModuleList()
        for grid, count, width, next_width in zip(
            self.grids, config.layers, widths, [*widths[1:], widths[-1]], strict=True
        ):
            out_widths = [width] * (count - 1) + [next_width]
            self.stages.append(DiscriminatorStage(config, grid, out_widths))
        self.epilogue = DiscriminatorEpilogue(
            widths[-1],
            self.grids[-1],
            widths[-1] if config.c_dim else None if config.san else 1,
            group_size=config.mbstd_group_size,
            clamp=config.conv_clamp,
        )
        self.mapping = None
        if config.c_dim:
            self.mapping = LabelMapping(c_dim=config.c_dim, out_dim=widths[-1], num_layers=config.mapping_layers)
        self.head = SlicingHead(widths[-1], conditional=bool(config.c_dim)) if config.san else None
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, img: Tensor, c: Tensor | None) -> Tensor:
        self.check_inputs(img, c)
        x: Tensor = self.embedding(img)  # (B, N, C)
        for stage, grid in zip(self.stages, self.grids, strict=True):
            for block in stage.children():
                x = execution.run_block(block, x)
            x = to_map(x, grid)  # (B, C_out, h, w)
            if grid != self.grids[-1]:
                x = to_tokens(downsample2d(x, self.resample_filter))  # (B, N/4, C_out)

        return to_logits(self.epilogue(x), None if self.mapping is None else self.mapping(c), self.head)

    def layers_from_image(self) -> list[nn.Module]:
        """Return the patch embedding and the blocks, without the epilogue."""
        return [self.embedding, *(block for stage in self.stages for block in stage.children())]
