"""Losses and regularisers: functions of (players, real images, labels) that return LossTerms.

A new one is a function here and a line in `phases.build_phases`. Losses are means over the micro-batch and change
nothing: what has to move with training (w_avg, the path-length mean, ADA's statistic) leaves as a batch mean in
`LossTerms.means`, and the trainer applies it once per phase, averaged over all micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import ConfigError
from training.dataset import encode_labels
from training.networks import execution


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The StyleGAN2 objective. r1_gamma None: chosen from resolution and batch size. An interval of None drops the
    regulariser's correction of the optimizer; a weight of 0 drops the regulariser alone."""

    r1_gamma: float | None = None
    r1_interval: int | None = 16
    pl_weight: float = 2.0
    pl_interval: int | None = 4
    pl_decay: float = 0.01
    style_mixing: float = 0.9

    def __post_init__(self) -> None:
        for name in ("r1_gamma", "pl_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(name, value, "a weight cannot be negative; 0 turns the regulariser off")
        for name in ("r1_interval", "pl_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "a phase cannot be due more often than every step; use 1 or more")
        if not 0 <= self.style_mixing <= 1:
            raise ConfigError("style_mixing", self.style_mixing, "a probability lies in 0..1")


@dataclass
class LossTerms:
    """What a loss returns: the scalar to minimise, values to report, and batch means that drive running state."""

    loss: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Players:
    """What the losses act on. `labels` are those of all training images; generated images get random ones of them."""

    G: Any  # a generator: mapping, synthesis, z_dim, c_dim, num_ws
    D: Any  # a discriminator: D(img, c) -> logits (B, 1)
    augment: Callable[[Tensor], Tensor]
    labels: Tensor  # (items,) class indices or (items, c_dim)
    style_mixing: float
    pl_mean: Tensor  # scalar: running mean of the path length
    wrap: Callable[[Any], Callable[..., Tensor]] = lambda network: network  # makes of a network what is called

    def __post_init__(self) -> None:
        self.synthesize, self.discriminate = self.wrap(self.G.synthesis), self.wrap(self.D)

    def compiled(self) -> Players:
        """Return the same players, called through torch.compile, which cannot differentiate twice."""
        # The default would draw other noise than PyTorch does without it.
        return replace(self, wrap=partial(torch.compile, dynamic=False, options={"fallback_random": True}))

    def sample_latents(self, count: int) -> tuple[Tensor, Tensor]:
        """Return fresh z (count, z_dim) and labels c (count, c_dim) of randomly drawn training images."""
        z = torch.randn([count, self.G.z_dim], device=self.labels.device)
        drawn = torch.randint(len(self.labels), [count], device=self.labels.device)
        return z, encode_labels(self.labels[drawn], self.G.c_dim)

    def sample_styles(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return ws (B, num_ws, w_dim), mixed from two latents with the configured probability, and the mean w.

        One draw per micro-batch: from a uniform cut in 1..num_ws-1 on, the styles come from a second z.
        """
        ws = self.G.mapping(z, c)
        mean_w = ws[:, 0].detach().mean(dim=0)
        num_ws = ws.shape[1]
        if self.style_mixing == 0 or num_ws == 1:
            return ws, mean_w

        cut = torch.randint(1, num_ws, [], device=z.device)
        mixed = torch.rand([], device=z.device) < self.style_mixing
        other = self.G.mapping(torch.randn_like(z), c)
        from_other = mixed & (torch.arange(num_ws, device=z.device) >= cut)  # (num_ws,)
        return torch.where(from_other[:, None], other, ws), mean_w

    def generate(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return generated images, their labels and the mean w."""
        z, c = self.sample_latents(count)
        ws, mean_w = self.sample_styles(z, c)
        return self.synthesize(ws, noise_mode="random"), c, mean_w

    def judge(self, img: Tensor, c: Tensor) -> Tensor:
        """Return D's logits of freshly augmented images."""
        return self.discriminate(self.augment(img), c)


def generator_logistic(players: Players, img: Tensor, c: Tensor) -> LossTerms:
    """softplus(-D(T(G(z)))): the non-saturating logistic loss (Goodfellow et al. 2014) under augmentation T."""
    fake, fake_c, mean_w = players.generate(len(img))
    logits = players.judge(fake, fake_c)
    loss = F.softplus(-logits).mean()
    stats = {"Loss/G/loss": loss, "Loss/scores/fake": logits, "Loss/signs/fake": logits.sign()}
    return LossTerms(loss, stats, {"w_avg": mean_w})


def discriminator_logistic(players: Players, img: Tensor, c: Tensor) -> LossTerms:
    """softplus(D(T(G(z)))) + softplus(-D(T(x)))."""
    with torch.no_grad():
        fake, fake_c, mean_w = players.generate(len(img))
    fake_logits = players.judge(fake, fake_c)
    real_logits = players.judge(img, c)
    loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    signs = real_logits.detach().sign()
    stats = {"Loss/D/loss": loss, "Loss/scores/real": real_logits, "Loss/signs/real": signs}
    return LossTerms(loss, stats, {"w_avg": mean_w, "real_sign": signs.mean()})


def r1_penalty(players: Players, img: Tensor, c: Tensor, gamma: float) -> LossTerms:
    """gamma/2 E[|grad_x D(T(x))|^2] on real images x, by the images before augmentation (Mescheder et al. 2018)."""
    img = img.detach().requires_grad_(True)
    with execution.using(twice_differentiable=True):
        logits = players.judge(img, c)
        (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    squared_norm = gradient.square().sum(dim=(1, 2, 3))  # (B,)
    loss = (gamma / 2) * squared_norm.mean()
    return LossTerms(loss, {"Loss/r1_penalty": squared_norm, "Loss/D/reg": loss})


def path_length(players: Players, img: Tensor, c: Tensor, weight: float, decay: float) -> LossTerms:
    """weight E[(|J_w^T y| - a)^2], y ~ N(0, I) / sqrt(HW), a the running mean length (Karras et al. 2020a, eq. 4).

    On half of the micro-batch. The length of one image: root of the mean over its num_ws styles of |gradient|^2.
    The gradient also flows through this batch's share in a.
    """
    z, c = players.sample_latents(len(img) // 2)
    ws, mean_w = players.sample_styles(z, c)
    with execution.using(twice_differentiable=True):
        fake = players.synthesize(ws, noise_mode="random")
        y = torch.randn_like(fake) / math.sqrt(fake.shape[2] * fake.shape[3])
        (gradient,) = torch.autograd.grad((fake * y).sum(), ws, create_graph=True)  # (B/2, num_ws, w_dim)
    lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()  # (B/2,)
    mean_length = players.pl_mean.lerp(lengths.mean(), decay)
    penalty = (lengths - mean_length).square()
    loss = weight * penalty.mean()
    stats = {"Loss/pl_penalty": penalty, "Loss/path_length": lengths, "Loss/G/reg": loss}
    return LossTerms(loss, stats, {"w_avg": mean_w, "pl_mean": lengths.detach().mean()})
