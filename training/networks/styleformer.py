"""Styleformer generator, with full or Linformer attention (Park & Kim 2022, "Styleformer")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from torch_utils.ops.upfirdn2d import upsample2d
from training.networks import execution
from training.networks.alias_free import FourierInput
from training.networks.generator import (
    Generator,
    Grid,
    NoiseMode,
    StagedConfig,
    Synthesis,
    count_resolutions,
)
from training.networks.layers import (
    FullyConnected,
    Resampling,
    resample_filter,
    to_map,
    to_tokens,
    uniform_weight,
)
from training.networks.modulation import Reader, demodulations, read_styles
from training.networks.styleformer_ablations import AblatedEncoderBlock, is_ablated
from training.networks.styleformer_block import EncoderBlock, Modulation, modulate_blocks
from training.networks.weights import effective

# Default hidden sizes and numbers of blocks per resolution, keyed by the number of resolutions.
DEFAULT_WIDTHS: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    1: ((256,), (2,)),
    2: ((256, 64), (1, 3)),
    3: ((256, 64, 16), (1, 3, 3)),
    4: ((512, 256, 128, 64), (1, 2, 1, 1)),
    5: ((512, 256, 128, 64, 32), (1, 2, 1, 1, 1)),
    6: ((512, 256, 128, 64, 32, 32), (1, 2, 1, 1, 1, 1)),
    7: ((512, 256, 128, 64, 32, 32, 32), (1, 2, 1, 1, 1, 1, 1)),
    8: ((512, 256, 128, 64, 32, 32, 32, 32), (1, 2, 1, 1, 1, 1, 1, 1)),
}


LayerNormPlace = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(StagedConfig):
    """Configuration of the encoder blocks of a generator, for images of base * 2^(len(widths) - 1) pixels.

    `widths` and `layers` hold the hidden size and the number of encoder blocks of each resolution, from the base grid
    up. A block has max(minimum_head, width // depth) heads. With `linformer`, blocks with at least
    `linformer_min_tokens` tokens attend to `linformer_k` projected tokens. `fit` chooses `widths` and `layers` if they
    are (), and `linformer` if it is None.
    """

    widths: tuple[int, ...] = setting(
        (256, 64, 16), "Hidden size per resolution, lowest first; (): chosen from the image size.", at_least=1
    )
    layers: tuple[int, ...] = setting(
        (1, 3, 3),
        "Number of encoder blocks per resolution, lowest first; (): chosen from the image size.",
        at_least=1,
    )
    depth: int = setting(32, "Channels per attention head.", at_least=1)
    minimum_head: int = setting(1, "Minimum number of attention heads.", at_least=1)
    linformer: bool | None = setting(
        False, "Use Linformer attention on large grids; None: only with more than 3 resolutions.", auto=True
    )
    linformer_k: int = setting(256, "Number of tokens to which Linformer projects keys and values.", at_least=1)
    linformer_min_tokens: int = setting(1024, "Minimum number of tokens for Linformer attention.", at_least=1)

    AUTO: ClassVar[Mapping[str, Any]] = {**StagedConfig.AUTO, "linformer": None}
    fourier_input: ClassVar[bool] = False  # a field of StyleformerConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in self.widths:
            self._check_width(width)

    def _check_width(self, width: int) -> None:
        if width % self.num_heads(width):
            below = next((w for w in range(width - 1, 0, -1) if w % self.num_heads(w) == 0), None)
            above = next(w for w in range(width + 1, 3 * width + self.minimum_head) if w % self.num_heads(w) == 0)
            nearest = above if below is None else f"{below} or {above}"
            raise ConfigError(
                "widths",
                self.widths,
                f"{width} is not a multiple of its {self.num_heads(width)} heads (depth={self.depth}, "
                f"minimum_head={self.minimum_head}); nearest valid widths: {nearest}",
            )

    def num_heads(self, width: int) -> int:
        """Number of attention heads of a block of this width."""
        return max(self.minimum_head, width // self.depth)

    @property
    def folder_words(self) -> tuple[str, ...]:
        """The word "linformer" if Linformer attention is enabled."""
        return ("linformer",) if self.linformer else ()

    @property
    def num_ws(self) -> int:
        """One style per encoder block, plus one for the last ToRGB. Raises ConfigError if `layers` is ()."""
        self.require_widths()
        return sum(self.layers) + 1

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """Grid of each block and of the last ToRGB."""
        blocks = [grid for grid, count in zip(self.grids, self.layers, strict=True) for _ in range(count)]
        return (*blocks, self.grids[-1])

    def fit(self, height: int, width: int) -> Self:
        """Choose unresolved widths, numbers of blocks and `linformer` from the number of resolutions."""
        count = len(self.widths) or count_resolutions(self.base, height, width)
        fitted = self._with_defaults(count, f"for images of {height}x{width}")
        fitted.check_img_size(height, width)
        return fitted

    def _with_defaults(self, count: int, context: str) -> Self:
        """Choose unresolved fields for `count` resolutions; `context` explains `count` in an error message."""
        widths, layers = self._default_widths(count)
        if self.layers and not self.widths and len(self.layers) != len(widths):
            raise ConfigError("layers", self.layers, f"must have one entry per resolution, {len(widths)} {context}")
        linformer = count > 3 if self.linformer is None else self.linformer
        return replace(self, widths=self.widths or widths, layers=self.layers or layers, linformer=linformer)

    def _default_widths(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the default hidden sizes and numbers of blocks for `count` resolutions."""
        return DEFAULT_WIDTHS.get(count, DEFAULT_WIDTHS[max(DEFAULT_WIDTHS)])


@dataclass(frozen=True, kw_only=True)
class StyleformerConfig(EncoderConfig):
    """Configuration of a Styleformer generator.

    `ffn`, `layernorm`, `style_attention` and `residual` select the ablations of the paper (see `AblatedEncoderBlock`).
    """

    ffn: bool = setting(False, "Add a feed-forward network to every encoder block (ablation).")
    layernorm: LayerNormPlace = setting(
        "before", "Position of LayerNorm: before the Q, K, V projection or after attention (ablation)."
    )
    style_attention: bool = setting(True, "Modulate the input of attention in addition to its values (ablation).")
    residual: bool = setting(True, "Residual connection from the values to the attention output (ablation).")
    fourier_input: bool = setting(  # type: ignore[misc]
        False, "Input of StyleGAN3's Fourier features, which w moves, in place of learned constants and positions."
    )

    def build(self) -> Generator:
        """Build the generator, initialized from torch's global RNG."""
        self.require_widths()
        return StyleformerGenerator(self)


class StyleformerToRGB(nn.Module):
    """ToRGB layer: modulated and demodulated linear map from tokens to image channels, without clamp.

    y_o = (sum_i W_oi s_i x_i) (sum_i (W_oi s_i)^2 + 1e-8)^(-1/2) + b_o,   s = affine(w)
    """

    def __init__(self, in_features: int, img_channels: int, affine: FullyConnected) -> None:
        super().__init__()
        self.affine = affine
        self.weight = uniform_weight(img_channels, in_features)
        self.bias = nn.Parameter(torch.zeros(img_channels))

    def forward(self, x: Tensor, style: Tensor, d: Tensor) -> Tensor:
        """Map x (B, N, C) to (B, N, img_channels), always in float32, for s (B, C) and its demodulation d (B, out)."""
        # Modulate the weights: with few output channels, per-image weights are far smaller than a modulated copy of x.
        weight = self.weight * style.unsqueeze(1) * d.unsqueeze(2)
        return torch.baddbmm(self.bias, execution.full_precision(x), weight.transpose(1, 2))


class Upsampling(Resampling):
    """Upsample tokens (B, h w, C) to (B, 2h 2w, C) with the same filter as images."""

    resample_filter: Tensor

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__(grid)
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(upsample2d(to_map(x, self.grid), self.resample_filter))


class StyleformerStage(nn.Module):
    """Synthesis stage at one resolution: position embedding, encoder blocks, ToRGB, upsampling."""

    blocks: nn.ModuleList
    resample_filter: Tensor

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        is_last = index + 1 == len(config.widths)
        self.grid = config.grids[index]
        self.place = "{}x{}".format(*self.grid)
        out_width = self.build_blocks(config, index)
        self.torgb = StyleformerToRGB(out_width, config.img_channels, self.build_affine(config, out_width))
        self.register_buffer("resample_filter", resample_filter(), persistent=False)
        self.upsampling: nn.Module = nn.Identity() if is_last else Upsampling(self.grid)

    def build_blocks(self, config: Any, index: int) -> int:
        """Create the position embedding and the blocks; return the width of the last block's output."""
        width, following = config.widths[index], config.widths[index + 1 :]
        out_width = following[0] if following else width  # the last block projects to the next width
        self.pos_embedding: nn.Parameter | None = None
        if not config.fourier_input:
            self.pos_embedding = nn.Parameter(torch.zeros(1, math.prod(self.grid), width))
        block_class = AblatedEncoderBlock if is_ablated(config) else EncoderBlock
        out_widths = [width] * (config.layers[index] - 1) + [out_width]
        self.blocks = nn.ModuleList(block_class(config, self.grid, width, out) for out in out_widths)
        return out_width

    def build_affine(self, config: Any, width: int) -> FullyConnected:
        """Return the affine layer of ToRGB."""
        return FullyConnected(config.w_dim, width, bias_init=1.0)

    def add_positions(self, x: Tensor) -> Tensor:
        """Return the input (B or 1, N, C) of the first block for the output of the previous stage."""
        x = execution.cast(x, self.grid)
        return x if self.pos_embedding is None else x + effective(self.pos_embedding, x.dtype)

    def forward(
        self, x: Tensor, rgb: Tensor | None, modulations: Sequence[Modulation], style: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map x (B or 1, N, C) and rgb at half this resolution (or None) to new x and rgb.

        `modulations` has an entry per block; `style` and `d` are the style of ToRGB and its demodulation.
        """
        x = self.add_positions(x)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = execution.run_block(block, x, modulation)

        y = to_map(self.torgb(x, style, d), self.grid)  # (B, img_channels, H, W)
        rgb = y if rgb is None else upsample2d(rgb, self.resample_filter) + y
        return self.upsample(x), rgb  # x (B, 4N, C_out), or (B, N, C_out) in the last stage

    def upsample(self, x: Tensor) -> Tensor:
        """Map the output of the last block to the input of the next stage."""
        y: Tensor = self.upsampling(x)
        return y


class StyleformerSynthesis(Synthesis):
    """Styleformer synthesis network: a learned constant on the base grid, then one stage per resolution.

    With `fourier_input`, Fourier features replace the constant. Block i reads ws[:, i]. A ToRGB after block i reads
    ws[:, i + 1], which is also the style of block i + 1.
    """

    stage_class: ClassVar[type[StyleformerStage]] = StyleformerStage
    const: Tensor  # (N, C) on the base grid
    input: FourierInput  # with `fourier_input`

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.layers = config.layers
        self.build_input(config)
        self.stages: Any = nn.ModuleList(self.stage_class(config, index) for index in range(len(config.widths)))

    def build_input(self, config: Any) -> None:
        """Create `const` or `input`."""
        if config.fourier_input:
            self.input = FourierInput(
                config.w_dim, config.widths[0], config.base, rate=max(config.base), cutoff=max(config.base) / 4
            )
            return
        self.const = nn.Parameter(torch.randn(math.prod(config.base), config.widths[0]))

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        return self.encode(read_styles(self.style_readers(), ws), noise_mode)[1][-1]

    def encode(self, styles: Mapping[FullyConnected, Tensor], noise_mode: NoiseMode) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens (B, N, C) after the last encoder block, and the accumulated RGB image of each stage."""
        modulations = modulate_blocks([block for stage in self.stages for block in stage.blocks], styles, noise_mode)
        torgb_styles = [styles[stage.torgb.affine] for stage in self.stages]
        d = demodulations([(stage.torgb.weight, s) for stage, s in zip(self.stages, torgb_styles, strict=True)])
        x = self.input_tokens(styles)
        images: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            first, rgb = sum(self.layers[:i]), images[-1] if images else None
            x, rgb = stage(x, rgb, modulations[first : first + self.layers[i]], torgb_styles[i], d[i])
            images.append(rgb)
        return x, images

    def input_tokens(self, styles: Mapping[FullyConnected, Tensor]) -> Tensor:
        """Return the tokens (B or 1, N, C) on the base grid."""
        return to_tokens(self.input(styles[self.input.affine])) if self._has_input() else self.const.unsqueeze(0)

    def _has_input(self) -> bool:
        return hasattr(self, "input")

    def style_readers(self) -> list[Reader]:
        """Return the affine layers with the indices of their styles."""
        readers: list[Reader] = [(self.input.affine, 0)] if self._has_input() else []
        first = 0
        for stage in self.stages:
            readers += [(block.affine, first + i) for i, block in enumerate(stage.blocks)]
            first += len(stage.blocks)
            readers.append((stage.torgb.affine, first))
        return readers


class StyleformerGenerator(Generator):
    """Mapping network and Styleformer synthesis network."""

    def build_synthesis(self, config: StyleformerConfig) -> StyleformerSynthesis:
        return StyleformerSynthesis(config)
