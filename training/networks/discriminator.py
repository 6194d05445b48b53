"""What all discriminators share: the images and labels that they judge, and the projection onto labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from dnnlib.config import check_bounds, field_names, parse_size, setting
from training.networks.layers import ImageShape, check_labels, require_reasonable


def halved_grids(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(height, width) of a grid and of its halves, as long as both sides are even and larger than 4."""
    grids = [grid]
    while all(side % 2 == 0 and side > 4 for side in grids[-1]):
        grids.append((grids[-1][0] // 2, grids[-1][1] // 2))
    return tuple(grids)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(ABC):
    """The part of a discriminator's configuration that all families share: it judges images of `img_size`.

    A family adds its own fields. Some of them may be open, to be chosen from the data by `fit`; a configuration with
    open fields cannot be built.
    """

    img_channels: int = setting(3, "Channels of the images; follows from the data.", at_least=1)
    img_size: tuple[int, int] = setting(
        (32, 32),
        "Height and width of the images; follows from the data.",
        parse=parse_size,
        at_least=1,
        note="height and width",
    )
    c_dim: int = setting(0, "Number of classes or length of label vectors; follows from the data.", at_least=0)

    AUTO: ClassVar[Mapping[str, Any]] = {}  # the values that leave fields of the family open

    def __post_init__(self) -> None:
        check_bounds(self)
        require_reasonable(self)

    @classmethod
    def convert_from(cls, other: DiscriminatorConfig) -> Self:
        """Return this family with the shared fields of `other`, and open where it can be."""
        return cls(**{name: getattr(other, name) for name in field_names(DiscriminatorConfig)}, **cls.AUTO)

    @property
    def group_size(self) -> int:
        """How many images of a batch are compared with each other; 0 where each is judged alone."""
        return 0

    def fit(self, height: int, width: int) -> Self:
        """Return the configuration for images of this size, with all that is open chosen.

        Raises ConfigError, naming what would fit, when this discriminator cannot judge them.
        """
        return replace(self, img_size=(height, width))

    @abstractmethod
    def build(self) -> Discriminator:
        """A discriminator with weights from torch's global generator. Raises ConfigError while fields are open."""


class Discriminator(nn.Module, ImageShape, ABC):
    """Images (B, C, H, W) and labels (B, c_dim), or None without labels -> logits (B, 1): high for real ones."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.c_dim = config.c_dim
        self.img_shape = (config.img_channels, *config.img_size)

    def check_inputs(self, img: Tensor, c: Tensor | None) -> None:
        """Raise ValueError when the shape of img or c does not fit."""
        if tuple(img.shape[1:]) != self.img_shape:
            needed = ", ".join(map(str, self.img_shape))
            raise ValueError(f"images have shape {tuple(img.shape)}, this network needs (batch, {needed})")
        check_labels(c, self.c_dim, len(img))

    @abstractmethod
    def layers_from_image(self) -> list[nn.Module]:
        """The layers in the order in which Freeze-D (Mo et al. 2020) freezes them; the last ones are not among them."""


def project(out: Tensor, embedding: Tensor) -> Tensor:
    """sum_j out_j embedding_j / sqrt(dim): (B, dim) twice -> logits (B, 1) (Miyato & Koyama 2018)."""
    return (out * embedding).sum(dim=1, keepdim=True) / math.sqrt(out.shape[1])
