"""Base classes of generators, synthesis networks and their configurations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, get_args

from torch import Tensor, nn

from dnnlib.config import ConfigError, bounds_of, check_bounds, field_names, parse_size, setting
from training.networks import execution
from training.networks.layers import ImageShape, NoiseMode, check_limits
from training.networks.mapping import LR_MULTIPLIER, MappingNetwork, StyleMapping

Grid = tuple[int, int]  # (height, width)


def base_grid(default: Grid) -> Any:
    """Return the setting of the lowest resolution of a family."""
    text, note = "Base grid (lowest resolution): height and width.", "height and width"
    return setting(default, text, parse=parse_size, at_least=1, note=note)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(ABC):
    """Configuration shared by all generator families.

    A family adds its own fields. `fit` chooses the values of unresolved fields from the image size; `build` requires
    that all fields are resolved.
    """

    z_dim: int = setting(512, "Dimensionality of the latent z.", at_least=1)
    c_dim: int = setting(0, "Number of classes or length of label vectors; determined by the dataset.", at_least=0)
    w_dim: int = setting(512, "Dimensionality of the style w.", at_least=1)
    mapping_layers: int = setting(2, "Number of layers of the mapping network.", at_least=1)
    img_channels: int = setting(3, "Number of image channels; determined by the dataset.", at_least=1)
    conv_clamp: float | None = setting(
        256.0, "Clamp activations to +- this value; None: no clamp.", above=0, note="None disables the clamp"
    )

    AUTO: ClassVar[Mapping[str, Any]] = {}  # fields that `fit` can resolve -> their unresolved values

    def __post_init__(self) -> None:
        check_bounds(self)
        check_limits(self)

    @classmethod
    def convert_from(cls, other: GeneratorConfig) -> Self:
        """Return a configuration of this family with the shared fields of `other` and the AUTO fields unresolved.

        Shared fields with values that this family does not allow have the family's defaults, such as
        `mapping_layers` if `other` has no mapping network but this family requires one.
        """
        shared = {name: getattr(other, name) for name in field_names(GeneratorConfig)}
        allowed = {name: value for name, value in shared.items() if not bounds_of(cls)[name].problem(value)}
        return cls(**(allowed | dict(cls.AUTO)))

    @property
    def folder_words(self) -> tuple[str, ...]:
        """Words added to the name of the run folder to distinguish runs with the same preset."""
        return ()

    @property
    @abstractmethod
    def img_size(self) -> Grid:
        """Image size (height, width). Raises ConfigError if unresolved."""

    @property
    def fixed_size(self) -> Grid | None:
        """Single supported image size (height, width); None if `fit` can adapt the configuration to other sizes."""
        return None

    @property
    def supported_sizes(self) -> str:
        """Supported image sizes, and the reason, for error messages; "" if they follow from the base grid."""
        return ""

    @property
    def other_sizes(self) -> tuple[Grid, ...]:
        """Sizes (width, height) to suggest if no smaller size than that of the images is supported."""
        return ()

    @property
    @abstractmethod
    def num_ws(self) -> int:
        """Number of styles that the synthesis network reads."""

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """Grid of the first block or convolution that reads each style; () if the family does not define the grids."""
        return ()

    @property
    def num_rgb_heads(self) -> int:
        """Number of images per latent in D's input; `execution.current.all_rgb_heads` requests them."""
        return 1

    def style_groups(self) -> dict[str, tuple[int, ...]]:
        """Return the style indices of the groups coarse, middle and fine: the thirds of the resolutions, in order.

        With two resolutions the first is coarse and the second fine; a single resolution is coarse.
        """
        grids = sorted(set(self.style_grids))
        first = max(len(grids) // 3, 1)
        second = max(2 * len(grids) // 3, first)
        thirds = {"coarse": grids[:first], "middle": grids[first:second], "fine": grids[second:]}
        members = {
            name: [i for i, grid in enumerate(self.style_grids) if grid in part] for name, part in thirds.items()
        }
        return {name: tuple(indices) for name, indices in members.items() if indices}

    @abstractmethod
    def fit(self, height: int, width: int) -> Self:
        """Return the configuration for images of this size, with all unresolved fields chosen.

        Raises ConfigError if this generator does not support the size; the message lists supported values.
        """

    @abstractmethod
    def build(self) -> Generator:
        """Build the generator, initialized from torch's global RNG. Raises ConfigError for unresolved fields."""


@dataclass(frozen=True, kw_only=True)
class DoublingConfig(GeneratorConfig):
    """Configuration of a generator whose grid doubles at each stage, for images of base * 2^(resolutions - 1) pixels.

    `fit` chooses `resolutions` if it is None.
    """

    base: Grid = base_grid((4, 4))
    resolutions: int | None = setting(
        4, "Number of resolutions, from the base grid up; None: chosen from the image size.", auto=True, at_least=1
    )

    AUTO: ClassVar[Mapping[str, Any]] = {"resolutions": None}

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grid (height, width) of every resolution, from the base up. Raises ConfigError if `resolutions` is None."""
        if self.resolutions is None:
            raise ConfigError("resolutions", None, "not chosen yet: it is derived from the image size")
        return doubled_grids(self.base, self.resolutions)

    @property
    def img_size(self) -> Grid:
        """Image size (height, width). Raises ConfigError if `resolutions` is None."""
        return self.grids[-1]

    def fit(self, height: int, width: int) -> Self:
        """Choose the number of resolutions for the image size. Raises ConfigError with the possible base grids."""
        return replace(self, resolutions=count_resolutions(self.base, height, width))


@dataclass(frozen=True, kw_only=True)
class StagedConfig(GeneratorConfig):
    """Configuration of a generator with a stage of blocks per resolution, for base * 2^(len(widths) - 1) pixels.

    `widths` and `layers` hold the hidden size and the number of blocks of each resolution, from the base grid up. `fit`
    chooses `widths` and `layers` if they are ().
    """

    base: Grid = base_grid((8, 8))
    widths: tuple[int, ...] = setting(
        (), "Hidden size per resolution, lowest first; (): chosen from the image size.", at_least=1
    )
    layers: tuple[int, ...] = setting(
        (), "Number of blocks per resolution, lowest first; (): chosen from the image size.", at_least=0
    )

    AUTO: ClassVar[Mapping[str, Any]] = {"widths": (), "layers": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths and len(self.layers) != len(self.widths):
            problem = f"must have one entry per resolution, {len(self.widths)} with widths={self.widths}"
            raise ConfigError("layers", self.layers, problem)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grid (height, width) of every resolution that has blocks, from the base up."""
        return doubled_grids(self.base, len(self.widths))

    @property
    def img_size(self) -> Grid:
        """Image size (height, width). Raises ConfigError if `widths` is empty."""
        self.require_widths()
        return self.grids[-1]

    @property
    def fixed_size(self) -> Grid | None:
        return self.grids[-1] if self.widths else None

    def require_widths(self) -> None:
        """Raise ConfigError if `widths` is empty."""
        if not self.widths:
            raise ConfigError("widths", self.widths, "not chosen yet: give one hidden size per resolution")

    def check_img_size(self, height: int, width: int) -> None:
        """Raise ConfigError unless the generated images have this size; the message lists matching base grids."""
        if self.widths and self.img_size == (height, width):
            return
        options = [f"base={grid} with {count} width{'s' * (count > 1)}" for grid, count in base_grids(height, width)]
        problem = f"does not produce images of {height}x{width} (height x width) with base={self.base}"
        raise ConfigError("widths", self.widths, f"{problem}; possible: {', '.join(options)}")


class Generator(nn.Module, ImageShape, ABC):
    """Mapping and synthesis networks: z (B, z_dim), c (B, c_dim) or None -> images (B, C, H, W), roughly in [-1, 1].

    `synthesis` takes ws (B, num_ws, w_dim) and a noise mode: 'const' (fixed noise buffers), 'random' (fresh noise from
    torch's global RNG) or 'none'. `forward` passes further keyword arguments to `synthesis`.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.z_dim = config.z_dim
        self.c_dim = config.c_dim
        self.w_dim = config.w_dim
        self.num_ws = config.num_ws
        self.img_shape = (config.img_channels, *config.img_size)
        self.style_groups = config.style_groups()
        self.mapping = self.build_mapping(config)
        self.synthesis = self.build_synthesis(config)

    def build_mapping(self, config: Any) -> StyleMapping:
        """Build the mapping network. The default is StyleGAN2-ADA's; a family may override this method."""
        return MappingNetwork(
            z_dim=config.z_dim,
            c_dim=config.c_dim,
            w_dim=config.w_dim,
            num_ws=config.num_ws,
            num_layers=config.mapping_layers,
            lr_multiplier=self.mapping_lr(config),
        )

    def mapping_lr(self, config: Any) -> float:
        """Return the learning rate multiplier of the mapping network; a family may override this method."""
        return LR_MULTIPLIER

    @abstractmethod
    def build_synthesis(self, config: Any) -> nn.Module:
        """Build the synthesis network of the family."""

    def forward(
        self,
        z: Tensor,
        c: Tensor | None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "const",
        **synthesis_kwargs: Any,
    ) -> Tensor:
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)  # (B, num_ws, w_dim)
        img: Tensor = self.synthesis(ws, noise_mode, **synthesis_kwargs)
        return img


class Synthesis(nn.Module, ImageShape, ABC):
    """Base class of synthesis networks: styles ws (B, num_ws, w_dim) -> images (B, img_channels, H, W).

    `block_resolutions` lists the longer side of each grid in ascending order.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.num_ws, self.w_dim = config.num_ws, config.w_dim
        self.img_shape = (config.img_channels, *config.img_size)
        self.block_resolutions = sorted({max(grid) for grid in config.style_grids})

    def forward(
        self,
        ws: Tensor,
        noise_mode: NoiseMode = "const",
        *,
        force_fp32: bool = False,
        fused_modconv: bool | None = None,
    ) -> Tensor:
        """Synthesize images from styles. Raises ValueError if the shape of `ws` or the noise mode is invalid.

        `force_fp32` computes in full precision even inside `execution.using(reduced=...)`. `fused_modconv` is accepted
        for compatibility with StyleGAN2-ADA, where it selects one of two implementations, and has no effect.
        """
        check_synthesis_inputs(ws, self.num_ws, self.w_dim, noise_mode)
        if force_fp32:
            with execution.using(reduced=None):
                return self.render(ws, noise_mode)
        return self.render(ws, noise_mode)

    @abstractmethod
    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        """Synthesize images (B, img_channels, H, W), in float32, from styles ws (B, num_ws, w_dim).

        If `execution.current.all_rgb_heads` is set, a family with several RGB heads returns the images of all of them
        at full size, the last one first: (B, num_rgb_heads img_channels, H, W).
        """


def check_synthesis_inputs(ws: Tensor, num_ws: int, w_dim: int, noise_mode: str) -> None:
    """Raise ValueError unless `ws` has shape (B, num_ws, w_dim) and `noise_mode` is a NoiseMode."""
    if ws.shape[1:] != (num_ws, w_dim):
        raise ValueError(f"ws has shape {tuple(ws.shape)}, this network needs (batch, {num_ws}, {w_dim})")
    if noise_mode not in get_args(NoiseMode):
        raise ValueError(f"noise_mode={noise_mode!r} is not one of {', '.join(get_args(NoiseMode))}")


def base_grids(height: int, width: int) -> list[tuple[Grid, int]]:
    """List the pairs (base grid, number of resolutions) that produce images of this size, largest grid first."""
    common = math.gcd(height, width)
    count = (common & -common).bit_length()  # 1 + the number of times that 2 divides both sides
    return [((height >> n, width >> n), n + 1) for n in range(count)]


def doubled_grids(base: Grid, count: int) -> tuple[Grid, ...]:
    """Return the grids (height, width) of `count` resolutions, from the base grid up."""
    return tuple((base[0] << n, base[1] << n) for n in range(count))


def count_resolutions(base: Grid, height: int, width: int) -> int:
    """Return the number of resolutions from `base` to the image size. Raises ConfigError with the possible bases."""
    bases = dict(base_grids(height, width))
    if base not in bases:
        options = ", ".join(f"{h}x{w}" for h, w in bases)
        problem = f"cannot be doubled to {height}x{width} (height x width); possible: {options}"
        raise ConfigError("base", base, problem)
    return bases[base]
