"""What all generators share: the configuration of latents and mapping network, and mapping and synthesis as one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, get_args

from torch import Tensor, nn

from dnnlib.config import ConfigError, bounds_of, check_bounds, field_names, parse_size, setting
from training.networks import execution
from training.networks.layers import ImageShape, NoiseMode, require_reasonable
from training.networks.mapping import MappingNetwork, StyleMapping

Grid = tuple[int, int]  # (height, width)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(ABC):
    """The part of a generator's configuration that all families share.

    A family adds its own fields. Some of them may be open, to be chosen from the data by `fit`; a configuration with
    open fields cannot be built.
    """

    z_dim: int = setting(512, "Size of the latent z.", at_least=1)
    c_dim: int = setting(0, "Number of classes or length of label vectors; follows from the data.", at_least=0)
    w_dim: int = setting(512, "Size of the style w.", at_least=1)
    mapping_layers: int = setting(2, "Layers of the mapping network.", at_least=1)
    img_channels: int = setting(3, "Channels of the images; follows from the data.", at_least=1)
    conv_clamp: float | None = setting(
        256.0, "Bound of activations; None: no clamp.", above=0, note="None clamps nothing"
    )

    AUTO: ClassVar[Mapping[str, Any]] = {}  # the values that leave fields of the family open

    def __post_init__(self) -> None:
        check_bounds(self)
        require_reasonable(self)

    @classmethod
    def convert_from(cls, other: GeneratorConfig) -> Self:
        """Return this family with the shared fields of `other`, and open where it can be.

        Where `other` has no mapping network and this family needs one, it gets its own default.
        """
        shared = {name: getattr(other, name) for name in field_names(GeneratorConfig)}
        if bounds_of(cls)["mapping_layers"].problem(other.mapping_layers):
            del shared["mapping_layers"]
        return cls(**shared, **cls.AUTO)

    @property
    def folder_words(self) -> tuple[str, ...]:
        """Words that tell a run's folder from others with the same preset."""
        return ()

    @property
    @abstractmethod
    def img_size(self) -> Grid:
        """(height, width) of the images. Raises ConfigError while it is open."""

    @property
    def fixed_size(self) -> Grid | None:
        """(height, width) of the only images that this generator can be for; None where `fit` adapts it to others."""
        return None

    @property
    @abstractmethod
    def num_ws(self) -> int:
        """How many styles the synthesis network reads."""

    @property
    def style_grids(self) -> tuple[Grid, ...]:
        """For each style, the grid of the first block or convolution that reads it; () where a family does not say."""
        return ()

    def style_groups(self) -> dict[str, tuple[int, ...]]:
        """Styles by name: coarse, middle and fine are those of the lower, middle and upper third of the resolutions.

        Of two resolutions the first is coarse and the second fine; a single one is coarse.
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
        """Return the configuration with all that is open chosen for images of this size.

        Raises ConfigError, naming what would fit, when this generator cannot make them.
        """

    @abstractmethod
    def build(self) -> Generator:
        """A generator with weights from torch's global random generator. Raises ConfigError while fields are open."""


@dataclass(frozen=True, kw_only=True)
class DoublingConfig(GeneratorConfig):
    """A generator whose grid doubles from resolution to resolution: images of base * 2^(resolutions - 1) pixels.

    `resolutions` None stands for a choice that is still to be made.
    """

    base: Grid = setting(
        (4, 4),
        "Base grid, the lowest resolution: height and width.",
        parse=parse_size,
        at_least=1,
        note="height and width",
    )
    resolutions: int | None = setting(
        4, "Number of resolutions, from the base grid up; None: by the images.", auto=True, at_least=1
    )

    AUTO: ClassVar[Mapping[str, Any]] = {"resolutions": None}

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(height, width) of every resolution, from the base up. Raises ConfigError while `resolutions` is open."""
        if self.resolutions is None:
            raise ConfigError("resolutions", None, "not chosen yet: it follows from the size of the images")
        return doubled_grids(self.base, self.resolutions)

    @property
    def img_size(self) -> Grid:
        """(height, width) of the images. Raises ConfigError while `resolutions` is open."""
        return self.grids[-1]

    def fit(self, height: int, width: int) -> Self:
        """Choose the number of resolutions for images of this size. Raises ConfigError naming bases that can."""
        return replace(self, resolutions=count_resolutions(self.base, height, width))


@dataclass(frozen=True, kw_only=True)
class StagedConfig(GeneratorConfig):
    """A generator of images of base * 2^(len(widths) - 1) pixels, with a hidden size and blocks for each resolution.

    `widths` and `layers` hold one number per resolution, from the base grid up. `widths=()` stands for a choice that is
    still to be made.
    """

    base: Grid = setting(
        (8, 8),
        "Base grid, the lowest resolution: height and width.",
        parse=parse_size,
        at_least=1,
        note="height and width",
    )
    widths: tuple[int, ...] = setting((), "Hidden size per resolution, lowest first; (): by the images.", at_least=1)
    layers: tuple[int, ...] = setting((), "Blocks per resolution, lowest first; (): by the images.", at_least=0)

    AUTO: ClassVar[Mapping[str, Any]] = {"widths": (), "layers": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths and len(self.layers) != len(self.widths):
            problem = f"must have one entry per resolution, as widths={self.widths} has {len(self.widths)}"
            raise ConfigError("layers", self.layers, problem)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(height, width) of every resolution that has blocks, from the base up."""
        return doubled_grids(self.base, len(self.widths))

    @property
    def img_size(self) -> Grid:
        """(height, width) of the images. Raises ConfigError while `widths` is empty."""
        self.require_widths()
        return self.grids[-1]

    @property
    def fixed_size(self) -> Grid | None:
        return self.grids[-1] if self.widths else None

    def require_widths(self) -> None:
        """Raise ConfigError while `widths` is empty."""
        if not self.widths:
            raise ConfigError("widths", self.widths, "no widths chosen: give one hidden size per resolution")

    def check_img_size(self, height: int, width: int) -> None:
        """Raise ConfigError when this generator makes images of another size, naming what would fit."""
        if self.widths and self.img_size == (height, width):
            return
        options = [f"base={grid} with {count} width{'s' * (count > 1)}" for grid, count in base_grids(height, width)]
        problem = f"with base={self.base} this does not make images of {height}x{width} (height x width); what does"
        raise ConfigError("widths", self.widths, f"{problem}: {', '.join(options)}")


class Generator(nn.Module, ImageShape, ABC):
    """Mapping and synthesis: z (B, z_dim), c (B, c_dim) or None -> images (B, C, H, W) in about [-1, 1].

    `synthesis` is called with ws (B, num_ws, w_dim) and a noise mode: 'const' (the same image for the same ws),
    'random' (fresh, from torch's global generator) or 'none'. Further keyword arguments of a call go to it.
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
        """The mapping network, for most families StyleGAN's."""
        return MappingNetwork(
            z_dim=config.z_dim,
            c_dim=config.c_dim,
            w_dim=config.w_dim,
            num_ws=config.num_ws,
            num_layers=config.mapping_layers,
        )

    @abstractmethod
    def build_synthesis(self, config: Any) -> nn.Module:
        """The synthesis network of the family."""

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

    `block_resolutions` has the longer side of each grid, from the lowest up.
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
        """Images of styles. Raises ValueError for other shapes or noise modes.

        `force_fp32` computes in full precision inside `execution.using(reduced=...)` too. `fused_modconv` chose between
        two implementations in StyleGAN2-ADA; here there is one, so either value gives the same images.
        """
        check_synthesis_inputs(ws, self.num_ws, self.w_dim, noise_mode)
        if force_fp32:
            with execution.using(reduced=None):
                return self.render(ws, noise_mode)
        return self.render(ws, noise_mode)

    @abstractmethod
    def render(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        """Images (B, img_channels, H, W) of styles ws (B, num_ws, w_dim), in float32."""


def check_synthesis_inputs(ws: Tensor, num_ws: int, w_dim: int, noise_mode: str) -> None:
    """Raise ValueError unless ws is (B, num_ws, w_dim) and the noise mode is one."""
    if ws.shape[1:] != (num_ws, w_dim):
        raise ValueError(f"ws has shape {tuple(ws.shape)}, this network needs (batch, {num_ws}, {w_dim})")
    if noise_mode not in get_args(NoiseMode):
        raise ValueError(f"noise_mode={noise_mode!r} is not one of {', '.join(get_args(NoiseMode))}")


def base_grids(height: int, width: int) -> list[tuple[Grid, int]]:
    """Every (base grid, number of resolutions) that makes images of this size, from the largest grid down."""
    halvings = math.gcd(height, width)
    count = (halvings & -halvings).bit_length()  # 1 + how often both sides can be halved
    return [((height >> n, width >> n), n + 1) for n in range(count)]


def doubled_grids(base: Grid, count: int) -> tuple[Grid, ...]:
    """(height, width) of `count` resolutions, from the base grid up."""
    return tuple((base[0] << n, base[1] << n) for n in range(count))


def count_resolutions(base: Grid, height: int, width: int) -> int:
    """Return how many resolutions from `base` up make images of this size. Raises ConfigError naming bases that can."""
    bases = dict(base_grids(height, width))
    if base not in bases:
        options = ", ".join(f"{h}x{w}" for h, w in bases)
        problem = f"doubled again and again does not become {height}x{width} (height x width); what does: {options}"
        raise ConfigError("base", base, problem)
    return bases[base]
