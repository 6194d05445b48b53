"""Mapping networks: latents and labels to generator styles, and labels to the projection vectors of a discriminator."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from training.networks.layers import FullyConnected, check_labels, normalize_2nd_moment

LR_MULTIPLIER = 0.01  # learning rate multiplier of mapping layers; StyleGAN, appendix C


def _mapping_layers(in_features: int, width: int, num_layers: int, multiplier: float = LR_MULTIPLIER) -> nn.Sequential:
    """Build an MLP of `num_layers` leaky ReLU layers, in_features -> width -> ... -> width."""
    sizes = [in_features, *[width] * num_layers][:num_layers]
    return nn.Sequential(*(FullyConnected(size, width, activation="lrelu", multiplier=multiplier) for size in sizes))


class StyleMapping(nn.Module, ABC):
    """Base class of generator mapping networks f(z, c) = w, which broadcast w to all inputs of the synthesis network.

    Truncation uses `w_avg`, the moving average of w. The training loop updates `w_avg`.
    """

    w_avg: Tensor

    def __init__(self, *, z_dim: int, c_dim: int, w_dim: int, num_ws: int) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.num_ws = num_ws
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @abstractmethod
    def style(self, z: Tensor, c: Tensor | None) -> Tensor:
        """Map z (B, z_dim) and c (B, c_dim), None if unconditional, to w (B, w_dim)."""

    def forward(
        self, z: Tensor, c: Tensor | None, truncation_psi: float = 1, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Map z (B, z_dim) and c (B, c_dim), None if unconditional, to ws (B, num_ws, w_dim).

        Truncation replaces the first `truncation_cutoff` styles (None: all) by w_avg + psi (w - w_avg). Inputs are cast
        to the dtype of the network. Raises ValueError if the shape of `z` or `c` does not match the network.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}, this network needs (batch, {self.z_dim})")
        check_labels(c, self.c_dim, len(z))
        z = z.to(self.w_avg.dtype)
        c = None if c is None else c.to(self.w_avg.dtype)

        ws = self.style(z, c).unsqueeze(1).expand(-1, self.num_ws, -1)  # (B, num_ws, w_dim)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)


class MappingNetwork(StyleMapping):
    """StyleGAN2-ADA's mapping network: an MLP on z and the embedded label, each normalised to unit mean square."""

    def __init__(
        self,
        *,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        num_layers: int,
        lr_multiplier: float = LR_MULTIPLIER,
    ) -> None:
        super().__init__(z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=num_ws)
        self.embed = FullyConnected(c_dim, w_dim) if c_dim else None
        self.layers = _mapping_layers(z_dim + (w_dim if c_dim else 0), w_dim, num_layers, lr_multiplier)

    def style(self, z: Tensor, c: Tensor | None) -> Tensor:
        x = normalize_2nd_moment(z)
        if self.embed is not None:
            x = torch.cat([x, normalize_2nd_moment(self.embed(c))], dim=1)  # (B, z_dim + w_dim)
        w: Tensor = self.layers(x)
        return w


class LatentMapping(StyleMapping):
    """Identity mapping w = z; w = z + E c in conditional models, with a learned class embedding E, initially N(0, 1).

    Truncation therefore scales both z and the distances between classes, about the mean of w.
    """

    def __init__(self, *, z_dim: int, c_dim: int, num_ws: int) -> None:
        super().__init__(z_dim=z_dim, c_dim=c_dim, w_dim=z_dim, num_ws=num_ws)
        self.embed = nn.Parameter(torch.randn(c_dim, z_dim)) if c_dim else None

    def style(self, z: Tensor, c: Tensor | None) -> Tensor:
        return z if self.embed is None or c is None else torch.addmm(z, c, self.embed)


class ConcatenatingMapping(StyleMapping):
    """Identity mapping w = z; w = [z, E c] in conditional models, with a learned class embedding E.

    E (c_dim, label_dim) is initialized from N(0, 1 / c_dim), a linear layer of gain 1 on c (R3GAN). Truncation scales
    both z and the distances between classes, about the mean of w.
    """

    def __init__(self, *, z_dim: int, c_dim: int, label_dim: int, num_ws: int) -> None:
        super().__init__(z_dim=z_dim, c_dim=c_dim, w_dim=z_dim + label_dim, num_ws=num_ws)
        self.embed = nn.Parameter(torch.randn(c_dim, label_dim) / math.sqrt(c_dim)) if c_dim else None

    def style(self, z: Tensor, c: Tensor | None) -> Tensor:
        return z if self.embed is None or c is None else torch.cat([z, c @ self.embed], dim=1)


class LabelMapping(nn.Module):
    """Label mapping c (B, c_dim) -> (B, out_dim) for the projection head of a discriminator."""

    def __init__(self, *, c_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        self.embed = FullyConnected(c_dim, out_dim)
        self.layers = _mapping_layers(out_dim, out_dim, num_layers)

    def forward(self, c: Tensor) -> Tensor:
        out: Tensor = self.layers(normalize_2nd_moment(self.embed(c)))
        return out
