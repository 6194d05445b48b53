"""The phases of a training step: which loss trains which parameters, with which optimizer, how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError
from training.loss import (
    LossConfig,
    LossTerms,
    Players,
    discriminator_logistic,
    generator_logistic,
    path_length,
    r1_penalty,
)

Loss = Callable[[Tensor, Tensor], LossTerms]  # (real images, labels) -> terms


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam (Kingma & Ba 2015). lr None: chosen from the resolution."""

    lr: float | None = None
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ConfigError("lr", self.lr, "a learning rate must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must lie in 0..1, 1 excluded")


@dataclass
class Phase:
    """Every `interval` steps: the gradient of `interval * loss` to `parameters`, then one optimizer step."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss: Loss
    interval: int = 1

    def is_due(self, step: int) -> bool:
        """Whether the phase runs in this step, counted from 0."""
        return step % self.interval == 0


def build_optimizer(
    parameters: list[nn.Parameter], config: AdamConfig, regularisation_interval: int | None
) -> torch.optim.Adam:
    """Return Adam, slowed down by r = k/(k+1) where it also steps for a regulariser every k steps.

    lr r, beta1^r, beta2^r: Karras et al. 2020a, appendix B, "lazy regularization".
    """
    if config.lr is None:
        raise ConfigError("lr", None, "not resolved")
    r = 1.0 if regularisation_interval is None else regularisation_interval / (regularisation_interval + 1)
    return torch.optim.Adam(parameters, lr=config.lr * r, betas=(config.beta1**r, config.beta2**r), eps=config.eps)


def build_phases(
    players: Players,
    config: LossConfig,
    g_parameters: list[nn.Parameter],
    d_parameters: list[nn.Parameter],
    g_optimizer: torch.optim.Optimizer,
    d_optimizer: torch.optim.Optimizer,
) -> list[Phase]:
    """Return the phases of a step in their order."""
    phases = [Phase("G_main", g_parameters, g_optimizer, partial(generator_logistic, players))]
    if config.pl_weight and config.pl_interval:
        loss = partial(path_length, players, weight=config.pl_weight, decay=config.pl_decay)
        phases.append(Phase("G_reg", g_parameters, g_optimizer, loss, config.pl_interval))
    phases.append(Phase("D_main", d_parameters, d_optimizer, partial(discriminator_logistic, players)))
    if config.r1_gamma and config.r1_interval:
        penalty = partial(r1_penalty, players, gamma=config.r1_gamma)
        phases.append(Phase("D_reg", d_parameters, d_optimizer, penalty, config.r1_interval))
    return phases
