"""Base classes of discriminators and their configurations, and the label projection."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.config import check_bounds, field_names, parse_size, setting
from training.networks import execution
from training.networks.layers import ImageShape, check_labels, check_limits


def halved_grids(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return `grid` (height, width) and its successive halvings while both sides are even and larger than 4."""
    grids = [grid]
    while all(side % 2 == 0 and side > 4 for side in grids[-1]):
        grids.append((grids[-1][0] // 2, grids[-1][1] // 2))
    return tuple(grids)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(ABC):
    """Configuration shared by all discriminator families, for images of `img_size`.

    A family adds its own fields. `fit` chooses the values of unresolved fields from the image size; `build` requires
    that all fields are resolved.
    """

    img_channels: int = setting(
        3, "Number of input channels: image channels times RGB heads of G; determined by dataset and G.", at_least=1
    )
    img_size: tuple[int, int] = setting(
        (32, 32),
        "Height and width of the images; determined by the dataset.",
        parse=parse_size,
        at_least=1,
        note="height and width",
    )
    c_dim: int = setting(0, "Number of classes or length of label vectors; determined by the dataset.", at_least=0)

    AUTO: ClassVar[Mapping[str, Any]] = {}  # fields that `fit` can resolve -> their unresolved values

    def __post_init__(self) -> None:
        check_bounds(self)
        check_limits(self)

    @classmethod
    def convert_from(cls, other: DiscriminatorConfig) -> Self:
        """Return a configuration of this family with the shared fields of `other` and the AUTO fields unresolved."""
        return cls(**{name: getattr(other, name) for name in field_names(DiscriminatorConfig)}, **cls.AUTO)

    @property
    def is_slicing(self) -> bool:
        """Return whether the last layer is a SlicingHead."""
        return False

    @property
    def group_size(self) -> int:
        """Number of images that share minibatch statistics; 0 if the logits of each image are independent."""
        return 0

    @property
    def has_noise(self) -> bool:
        """Return whether the logits depend on noise that is drawn at every call during training."""
        return False

    def fit(self, height: int, width: int) -> Self:
        """Return the configuration for images of this size, with all unresolved fields chosen.

        Raises ConfigError if this discriminator does not support the size; the message lists supported values.
        """
        return replace(self, img_size=(height, width))

    @abstractmethod
    def build(self) -> Discriminator:
        """Build the discriminator, initialized from torch's global RNG. Raises ConfigError for unresolved fields."""


class Discriminator(nn.Module, ImageShape, ABC):
    """Base class of discriminators: images (B, C, H, W), labels (B, c_dim) or None -> logits (B, 1), high for reals."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.c_dim = config.c_dim
        self.img_shape = (config.img_channels, *config.img_size)

    def check_inputs(self, img: Tensor, c: Tensor | None) -> None:
        """Raise ValueError if the shape of `img` or `c` does not match the network."""
        if tuple(img.shape[1:]) != self.img_shape:
            needed = ", ".join(map(str, self.img_shape))
            raise ValueError(f"images have shape {tuple(img.shape)}, this network needs (batch, {needed})")
        check_labels(c, self.c_dim, len(img))

    @abstractmethod
    def layers_from_image(self) -> list[nn.Module]:
        """Return the layers in the order in which Freeze-D (Mo et al. 2020) freezes them, without the final layers."""


class SlicingHead(nn.Module):
    """Last layer of a slicing adversarial network: features h (B, dim) -> logits (B, 1) (Takida et al. 2024, "SAN").

        logit = scale <omega, h + b>,   |omega| = 1

    omega is the parameter `direction` (or the label embedding of a conditional model), normalised here at every call
    and not after every step. The loss of D trains omega by a term of its own. While `execution.current.slicing` is set,
    the result is (B, 2) instead: the logit with gradients to h, b and scale only, and the same value with gradients to
    omega only.
    """

    def __init__(self, dim: int, *, conditional: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.ones([]))
        self.direction = None if conditional else nn.Parameter(torch.randn(1, dim))

    def forward(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """Return logits for features h and label embeddings, both (B, dim); the embedding is None if unconditional."""
        direction = self.direction if embedding is None else embedding
        assert direction is not None
        omega = F.normalize(direction, dim=1)
        h = h + self.bias
        if not execution.current.slicing:
            return self.scale * (h * omega).sum(dim=1, keepdim=True)
        logit = self.scale * (h * omega.detach()).sum(dim=1, keepdim=True)
        slice_ = self.scale.detach() * (h.detach() * omega).sum(dim=1, keepdim=True)
        return torch.cat([logit, slice_], dim=1)


def project(out: Tensor, embedding: Tensor) -> Tensor:
    """Projection of (B, dim) onto (B, dim), sum_j out_j embedding_j / sqrt(dim), (B, 1) (Miyato & Koyama 2018)."""
    return (out * embedding).sum(dim=1, keepdim=True) / math.sqrt(out.shape[1])


def to_logits(out: Tensor, embedding: Tensor | None, head: SlicingHead | None) -> Tensor:
    """Return logits (B, 1) for the output (B, dim) of D's last layers: sliced, projected on labels, or unchanged."""
    if head is not None:
        logits: Tensor = head(out, embedding)
        return logits
    return out if embedding is None else project(out, embedding)
