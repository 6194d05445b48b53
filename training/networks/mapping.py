"""Mapping networks: from latents and labels to the styles of a generator or the projection of a discriminator."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from training.networks.layers import FullyConnected, check_labels, normalize_2nd_moment

LR_MULTIPLIER = 0.01  # of every mapping layer; StyleGAN, appendix C


def _mapping_layers(in_features: int, width: int, num_layers: int) -> nn.Sequential:
    """`num_layers` leaky-ReLU layers in_features -> width -> ... -> width at a reduced learning rate."""
    sizes = [in_features, *[width] * num_layers][:num_layers]
    return nn.Sequential(*(FullyConnected(size, width, activation="lrelu", multiplier=LR_MULTIPLIER) for size in sizes))


class StyleMapping(nn.Module, ABC):
    """The generator's mapping f(z, c) -> w, repeated once per style input of the synthesis network.

    `w_avg` is the running mean of w: calls here only read it (truncation), whoever trains the network moves it.
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
        """z (B, z_dim), c (B, c_dim) or None without labels -> w (B, w_dim)."""

    def forward(
        self, z: Tensor, c: Tensor | None, truncation_psi: float = 1, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Map z (B, z_dim) and c (B, c_dim), None without labels, to ws (B, num_ws, w_dim).

        Truncation moves the first `truncation_cutoff` of the ws (None: all) to w_avg + psi (w - w_avg). Inputs of
        another type are converted to that of the network. Raises ValueError when a shape does not fit.
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
    """StyleGAN's mapping: z and the embedded label are normalised to unit mean square each; w is not."""

    def __init__(self, *, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int) -> None:
        super().__init__(z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=num_ws)
        self.embed = FullyConnected(c_dim, w_dim) if c_dim else None
        self.layers = _mapping_layers(z_dim + (w_dim if c_dim else 0), w_dim, num_layers)

    def style(self, z: Tensor, c: Tensor | None) -> Tensor:
        x = normalize_2nd_moment(z)
        if self.embed is not None:
            x = torch.cat([x, normalize_2nd_moment(self.embed(c))], dim=1)  # (B, z_dim + w_dim)
        w: Tensor = self.layers(x)
        return w


class LatentMapping(StyleMapping):
    """w = z, with labels w = z + E c, E ~ N(0, 1): the latent is its own style, drawn around a place per class.

    So truncation scales z (and the distance of the classes).
    """

    def __init__(self, *, z_dim: int, c_dim: int, num_ws: int) -> None:
        super().__init__(z_dim=z_dim, c_dim=c_dim, w_dim=z_dim, num_ws=num_ws)
        self.embed = nn.Parameter(torch.randn(c_dim, z_dim)) if c_dim else None

    def style(self, z: Tensor, c: Tensor | None) -> Tensor:
        return z if self.embed is None or c is None else torch.addmm(z, c, self.embed)


class LabelMapping(nn.Module):
    """The discriminator's mapping of a label alone, c (B, c_dim) -> (B, out_dim), for its projection head."""

    def __init__(self, *, c_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        self.embed = FullyConnected(c_dim, out_dim)
        self.layers = _mapping_layers(out_dim, out_dim, num_layers)

    def forward(self, c: Tensor) -> Tensor:
        out: Tensor = self.layers(normalize_2nd_moment(self.embed(c)))
        return out
