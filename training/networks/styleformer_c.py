"""Styleformer-C: Styleformer encoder blocks at low and StyleGAN2 stages at high resolutions (Park & Kim 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from training.networks.generator import (
    Generator,
    Grid,
    NoiseMode,
    count_resolutions,
    doubled_grids,
)
from training.networks.layers import to_map
from training.networks.modulation import Reader, read_styles
from training.networks.styleformer import StyleformerConfig, StyleformerSynthesis
from training.networks.stylegan2 import StyleGAN2Stage, channels_on_grid, check_channel_base, default_channel_base


@dataclass(frozen=True, kw_only=True)
class StyleformerCConfig(StyleformerConfig):
    """Configuration of a generator with encoder blocks up to resolution `handover` and StyleGAN2 stages above it.

    The resolution of a grid is its longer side. `widths` and `layers` hold one entry per resolution up to the
    hand-over, as in `StyleformerConfig`. Above it, a grid of resolution R has min(channel_base // R, channel_max)
    channels. `resolutions` is the total number of resolutions. `fit` chooses `resolutions` if it is None and
    `channel_base` if it is 0.
    """

    widths: tuple[int, ...] = setting(
        (512, 256, 256),
        "Hidden size per resolution up to the hand-over, lowest first; (): chosen from the image size.",
        at_least=1,
    )
    layers: tuple[int, ...] = setting(
        (1, 2, 2),
        "Number of encoder blocks per resolution up to the hand-over, lowest first; (): from the image size.",
        at_least=1,
    )
    handover: int = setting(
        32, "Highest resolution with encoder blocks; higher resolutions have convolutions.", at_least=1
    )
    resolutions: int | None = setting(
        5, "Total number of resolutions of both parts; None: chosen from the image size.", auto=True, at_least=1
    )
    channel_base: int = setting(
        16384, "Channels times resolution of the convolutions; 0: chosen from the image size.", at_least=0
    )
    channel_max: int = setting(512, "Maximum number of channels at any resolution.", at_least=1)

    AUTO: ClassVar[Mapping[str, Any]] = {**StyleformerConfig.AUTO, "resolutions": None, "channel_base": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths and max(self.grids[-1]) != self.handover:
            last, count = max(self.grids[-1]), len(self.widths)
            problem = f"base={self.base} with {count} widths ends at {last}: set {last}, or change the number of widths"
            raise ConfigError("handover", self.handover, problem)
        if self.resolutions is not None:
            if self.resolutions <= len(self.widths):
                problem = f"leaves none of the {self.resolutions} resolutions for StyleGAN2 stages: reduce it"
                raise ConfigError("handover", self.handover, problem)
            check_channel_base(self, self.img_size)

    @property
    def img_size(self) -> Grid:
        """Image size (height, width). Raises ConfigError if `resolutions` is None."""
        if self.resolutions is None:
            raise ConfigError("resolutions", None, "not chosen yet: it is derived from the image size")
        return doubled_grids(self.base, self.resolutions)[-1]

    @property
    def fixed_size(self) -> Grid | None:
        return None  # `fit` adapts the number of convolutional stages

    @property
    def conv_grids(self) -> tuple[Grid, ...]:
        """Grid (height, width) of every resolution with convolutions, from the first one above the hand-over."""
        return doubled_grids(self.base, self.resolutions or 0)[len(self.widths) :]

    @property
    def num_layout_ws(self) -> int:
        """Number of leading styles in `ws` that the encoder blocks read; these styles control the layout."""
        return sum(self.layers)

    @property
    def num_ws(self) -> int:
        """One style per encoder block and convolution, one for the last ToRGB. Raises ConfigError if `layers` is ()."""
        self.require_widths()
        return self.num_layout_ws + 2 * len(self.conv_grids) + 1

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """Grid of each encoder block, of each convolution and of the last ToRGB."""
        convs = [grid for grid in self.conv_grids for _ in range(2)]
        return (*super().style_grids[:-1], *convs, convs[-1])

    def style_groups(self) -> dict[str, tuple[int, ...]]:
        """Return the groups by resolution and the groups of the two parts, "transformer" and "conv"."""
        parts = {"transformer": range(self.num_layout_ws), "conv": range(self.num_layout_ws, self.num_ws)}
        return {**super().style_groups(), **{name: tuple(part) for name, part in parts.items()}}

    def fit(self, height: int, width: int) -> Self:
        """Choose all unresolved fields for images of this size."""
        resolutions = count_resolutions(self.base, height, width)
        sides = [max(grid) for grid in doubled_grids(self.base, resolutions)]
        if self.handover not in sides[:-1]:
            options = ", ".join(map(str, sides[:-1])) or "none, choose a smaller base"
            problem = f"is not a resolution below {height}x{width} with base={self.base}; possible: {options}"
            raise ConfigError("handover", self.handover, problem)
        fitted = self._with_defaults(sides.index(self.handover) + 1, f"up to handover={self.handover}")
        channel_base = self.channel_base or default_channel_base(max(height, width))
        return replace(fitted, resolutions=resolutions, channel_base=channel_base)

    def _default_widths(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return defaults with a large last width, because it is the number of input channels of the convolutions."""
        return (512, *[256] * (count - 1)), (1, *[2] * (count - 1))

    def build(self) -> Generator:
        """Build the generator, initialized from torch's global RNG."""
        self.require_widths()
        if not self.channel_base:
            raise ConfigError("channel_base", self.channel_base, "not chosen yet")
        return StyleformerCGenerator(self)


class StyleformerCSynthesis(StyleformerSynthesis):
    """Styleformer-C synthesis network: Styleformer stages up to the hand-over, then StyleGAN2 stages.

    The StyleGAN2 stages start from the tokens of the last encoder block as a feature map. Each stage upsamples the RGB
    image of the previous stage and adds its own. Encoder blocks read ws[:, :num_layout_ws]. The ToRGB at the hand-over
    shares its style with the first convolution.
    """

    def __init__(self, config: StyleformerCConfig) -> None:
        super().__init__(config)
        self.num_layout_ws = config.num_layout_ws
        self.handover = config.grids[-1]
        channels = [config.widths[-1], *(channels_on_grid(config, grid) for grid in config.conv_grids)]
        self.conv_stages: Any = nn.ModuleList(
            StyleGAN2Stage(config, before, after, grid)
            for before, after, grid in zip(channels[:-1], channels[1:], config.conv_grids, strict=True)
        )

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        styles = read_styles(self.style_readers(), ws)
        x, (*_, rgb) = self.encode(styles, noise_mode)  # (B, N, C)
        x = to_map(x, self.handover)  # (B, C, h, w)
        for stage in self.conv_stages:
            x, rgb = stage(x, rgb, styles, noise_mode)
        return rgb

    def style_readers(self) -> list[Reader]:
        readers = super().style_readers()
        for level, stage in enumerate(self.conv_stages):
            readers += stage.style_readers(self.num_layout_ws + 2 * level)
        return readers


class StyleformerCGenerator(Generator):
    """Mapping network and Styleformer-C synthesis network."""

    def build_synthesis(self, config: StyleformerCConfig) -> StyleformerCSynthesis:
        return StyleformerCSynthesis(config)
