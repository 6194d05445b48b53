"""StyleGAN3 generator (Karras et al. 2021, "Alias-free generative adversarial networks")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, setting
from training.networks import execution
from training.networks.alias_free import Band, FilteredActivation, FourierInput
from training.networks.convolution import conv2d
from training.networks.generator import Generator, GeneratorConfig, Grid, NoiseMode, Synthesis
from training.networks.layers import FullyConnected, normalize_2nd_moment
from training.networks.modulation import read_styles

NUM_LAYERS = 14  # of the published networks, without the input and ToRGB
NUM_CRITICAL = 2  # last layers with a cutoff of half the sampling rate and no margin
FIRST_CUTOFF, FIRST_STOPBAND = 2.0, 2**2.1  # cycles per image
LAST_STOPBAND = 2**0.3  # relative to the last cutoff
OUTPUT_GAIN = 0.25
MIN_SIDE = 64  # pixels of the smallest images for which `fit` chooses the number of layers


@dataclass(frozen=True, kw_only=True)
class AliasFreeConfig(GeneratorConfig):
    """Configuration of a generator whose layers are alias-free up to cutoffs that grow from layer to layer.

    `fit` chooses `side`, the image size in pixels, if it is None, and `num_layers` and `channel_base` if they are 0.
    """

    side: int | None = setting(
        64, "Side of the images in pixels, a power of two; None: chosen from the image size.", auto=True, at_least=8
    )
    num_layers: int = setting(
        14, "Layers between the input and ToRGB; 0: 14, for images of 64 pixels or more.", auto=True, at_least=0
    )
    margin: int = setting(10, "Samples beyond each edge of the image on all but the last layers.", at_least=1)
    channel_base: int = setting(
        16384, "Channels times twice the cutoff frequency of a layer; 0: chosen from the image size.", at_least=0
    )
    channel_max: int = setting(512, "Maximum number of channels of a layer.", at_least=1)

    AUTO: ClassVar[Mapping[str, Any]] = {"side": None, "num_layers": 0, "channel_base": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.num_layers <= NUM_CRITICAL:
            raise ConfigError("num_layers", self.num_layers, f"must be more than {NUM_CRITICAL}")
        if self.side is not None and self.side & (self.side - 1):
            raise ConfigError("side", self.side, "must be a power of two")
        if self.side is not None and 0 < self.channel_base < self.side:
            raise ConfigError("channel_base", self.channel_base, f"leaves no channel: must be at least {self.side}")

    @property
    def kernel_size(self) -> int:
        """Side of the kernels of the convolutions."""
        return 3

    @property
    def has_radial_filters(self) -> bool:
        """True if the filters for downsampling are radially symmetric."""
        return False

    @property
    def img_size(self) -> Grid:
        if self.side is None:
            raise ConfigError("side", None, "not chosen yet: it is derived from the image size")
        return self.side, self.side

    @property
    def supported_sizes(self) -> str:
        return (
            f"square, 2^n pixels, from {MIN_SIDE}: below, margins make {NUM_LAYERS} layers 19 times as expensive as "
            "StyleGAN2"
        )

    @property
    def other_sizes(self) -> tuple[Grid, ...]:
        return ((MIN_SIDE, MIN_SIDE),)

    @property
    def num_ws(self) -> int:
        """One style for the input, one per layer, and one for ToRGB."""
        return self.num_layers + 2

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """Samples per image of the input and of each layer's output."""
        rates = [band.rate for band in self.bands()]
        return tuple((rate, rate) for rate in [rates[0], *rates])

    def bands(self) -> tuple[Band, ...]:
        """Return the band of the output of every layer and of ToRGB (appendix C); the input has that of the first.

        Cutoffs and stopbands grow geometrically until the first critical layer. Raises ConfigError if unresolved.
        """
        if not self.num_layers:
            raise ConfigError("num_layers", self.num_layers, "not chosen yet: it is derived from the image size")
        side, found = self.img_size[0], []
        for i in range(self.num_layers + 1):
            e = min(i / (self.num_layers - NUM_CRITICAL), 1)
            cutoff = FIRST_CUTOFF * (side / 2 / FIRST_CUTOFF) ** e
            stopband = FIRST_STOPBAND * (side / 2 * LAST_STOPBAND / FIRST_STOPBAND) ** e
            rate = 2 ** math.ceil(math.log2(min(2 * stopband, side)))
            size = side if i >= self.num_layers - 1 else rate + 2 * self.margin
            found.append(Band(rate=rate, size=size, cutoff=cutoff, half_width=max(stopband, rate / 2) - cutoff))
        return tuple(found)

    def channels(self) -> tuple[int, ...]:
        """Return the number of output channels of every layer and of ToRGB."""
        inner = [min(round(self.channel_base / 2 / band.cutoff), self.channel_max) for band in self.bands()[:-1]]
        return (*inner, self.img_channels)

    def fit(self, height: int, width: int) -> Self:
        side = max(height, width)
        if height != width or side & (side - 1) or side < 8:
            problem = f"does not support {width}x{height}: alias-free generators need square images of 2^n pixels"
            raise ConfigError("side", side, problem)
        if not self.num_layers and side < MIN_SIDE:
            problem = (
                f"not chosen for images of {side} pixels, where margins make 14 layers 19 times as expensive as "
                f"StyleGAN2; use --gen=stylegan2, images of {MIN_SIDE} pixels, or choose a number of layers"
            )
            raise ConfigError("num_layers", 0, problem)
        channel_base = self.channel_base or self.default_channel_base(side)
        return replace(self, side=side, num_layers=self.num_layers or NUM_LAYERS, channel_base=channel_base)

    def default_channel_base(self, side: int) -> int:
        """Return the `channel_base` that `fit` chooses for a size."""
        return 32768 if side >= 512 else 16384

    def check_resolved(self) -> None:
        """Raise ConfigError if `channel_base` is not chosen."""
        if not self.channel_base:
            raise ConfigError("channel_base", self.channel_base, "not chosen yet")


@dataclass(frozen=True, kw_only=True)
class StyleGAN3Config(AliasFreeConfig):
    """Configuration of a StyleGAN3 generator: equivariant to translation (T) or also to rotation (R)."""

    rotation: bool = setting(False, "Configuration R: 1x1 convolutions and radial filters, equivariant to rotation.")

    @property
    def kernel_size(self) -> int:
        return 1 if self.rotation else 3

    @property
    def has_radial_filters(self) -> bool:
        return self.rotation

    def default_channel_base(self, side: int) -> int:
        return super().default_channel_base(side) * (2 if self.rotation else 1)

    def build(self) -> StyleGAN3Generator:
        self.check_resolved()
        return StyleGAN3Generator(self)


class StyleGAN3Layer(nn.Module):
    """Synthesis layer: modulated convolution of the input at unit magnitude, then a filtered leaky ReLU.

    Weights and styles are normalised to unit mean square, and demodulated. ToRGB is a 1x1 convolution that is modulated
    only, without filters. `magnitude` is a running mean of x^2 of the input x.
    """

    def __init__(self, config: AliasFreeConfig, index: int) -> None:
        super().__init__()
        bands, channels, before = config.bands(), config.channels(), max(index - 1, 0)
        source, target = bands[before], bands[index]
        self.is_torgb = index == config.num_layers
        self.rate = max(source.rate, target.rate)
        self.place = f"{'torgb' if self.is_torgb else 'layer'}{index}"
        kernel = 1 if self.is_torgb else config.kernel_size
        self.affine = FullyConnected(config.w_dim, channels[before], bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(channels[index], channels[before], kernel, kernel))
        self.activation = FilteredActivation(
            channels[index],
            source,
            target,
            extra=kernel - 1,
            clamp=config.conv_clamp,
            is_linear=self.is_torgb,
            is_radial=config.has_radial_filters and index < config.num_layers - NUM_CRITICAL,
        )

    def forward(self, x: Tensor, style: Tensor, magnitude: Tensor) -> Tensor:
        """Map x (B, C, H, W), its style (B, C) and the running mean of x^2, a scalar, to the band of the output."""
        x = execution.full_precision(x) if self.is_torgb else execution.cast(x, (self.rate, self.rate))
        gain = magnitude.rsqrt()
        if self.is_torgb:
            scaled = style * (gain / math.sqrt(self.weight[0].numel()))
            weight = self.weight.flatten(1) * scaled.unsqueeze(1)  # (B, img_channels, C)
            return self.activation((weight @ x.flatten(2)).unflatten(2, x.shape[2:]))
        weight = normalize_2nd_moment(self.weight.flatten(1)).view_as(self.weight)
        style = normalize_2nd_moment(style)
        d = (style.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt() * gain  # (B, O)
        y = conv2d(x * style[:, :, None, None].to(x.dtype), weight.to(x.dtype), padding=weight.shape[2] - 1)
        return self.activation(y * d[:, :, None, None].to(x.dtype))


class StyleGAN3Synthesis(Synthesis):
    """StyleGAN3 synthesis network: Fourier features, then layers that are alias-free up to their cutoffs.

    The input reads ws[:, 0], layer i reads ws[:, i + 1]. `input_magnitudes` are running means of x^2 of the input of
    every layer; `execution.current.magnitudes` collects the means of a forward pass.
    """

    input_magnitudes: Tensor

    def __init__(self, config: AliasFreeConfig) -> None:
        super().__init__(config)
        band = config.bands()[0]
        self.has_radial_filters = config.has_radial_filters
        self.input = FourierInput(config.w_dim, config.channels()[0], band.grid, rate=band.rate, cutoff=band.cutoff)
        self.layers: Any = nn.ModuleList(self.build_layer(config, index) for index in range(config.num_layers + 1))
        self.register_buffer("input_magnitudes", torch.ones(len(self.layers)))

    def build_layer(self, config: Any, index: int) -> nn.Module:
        """Return a layer; the last is ToRGB."""
        return StyleGAN3Layer(config, index)

    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        readers = [(self.input.affine, 0), *((layer.affine, i + 1) for i, layer in enumerate(self.layers))]
        styles = read_styles(readers, ws)
        x = self.input(styles[self.input.affine])
        means = []
        for layer, magnitude in zip(self.layers, self.input_magnitudes, strict=True):
            if execution.current.magnitudes is not None:
                means.append(x.detach().to(magnitude.dtype).square().mean())
            x = execution.run_block(layer, x, styles[layer.affine], magnitude)
        if execution.current.magnitudes is not None:
            execution.current.magnitudes.append(torch.stack(means))
        return x * OUTPUT_GAIN


class StyleGAN3Generator(Generator):
    """Mapping network and StyleGAN3 synthesis network."""

    def build_synthesis(self, config: StyleGAN3Config) -> StyleGAN3Synthesis:
        return StyleGAN3Synthesis(config)
