"""The phases of a training step: which loss trains which parameters, with which optimizer, how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError
from torch_utils.gradients import FlatGradients
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


class Learner:
    """The parameters that training changes in one network, with their gradients and the optimizer that moves them.

    `num_means` is how many numbers the batch means of a loss (LossTerms.means and the loss itself) may have in all.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, num_means: int = 8) -> None:
        self.parameters = parameters
        self.optimizer: Any = optimizer
        self.gradients = FlatGradients(parameters, num_means)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Let these parameters, and no others, collect gradients."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    def step(self, skip: Tensor) -> None:
        """Move the parameters by their gradients unless `skip`, a truth value on the device, says no."""
        self.optimizer.found_inf = skip.float()  # what gradient scalers tell a fused optimizer
        self.optimizer.step()


@dataclass
class Phase:
    """Every `interval` steps: the gradient of `interval * loss` to a learner, then one optimizer step."""

    name: str
    learner: Learner
    loss: Loss
    interval: int = 1

    def is_due(self, step: int) -> bool:
        """Whether the phase runs in this step, counted from 0."""
        return step % self.interval == 0


def build_learner(
    parameters: list[nn.Parameter], config: AdamConfig, regularisation_interval: int | None, num_means: int = 8
) -> Learner:
    """Return a learner with Adam, slowed down by r = k/(k+1) where it also steps for a regulariser every k steps.

    lr r, beta1^r, beta2^r: Karras et al. 2020a, appendix B, "lazy regularization".
    """
    if config.lr is None:
        raise ConfigError("lr", None, "not resolved")
    r = 1.0 if regularisation_interval is None else regularisation_interval / (regularisation_interval + 1)
    betas = (config.beta1**r, config.beta2**r)
    # Fused: one kernel for all parameters, and it can leave a step out without the host knowing.
    adam = torch.optim.Adam(parameters, lr=config.lr * r, betas=betas, eps=config.eps, fused=True)
    return Learner(parameters, adam, num_means)


def build_phases(
    players: Players, config: LossConfig, g: Learner, d: Learner, *, use_compiled: bool = False
) -> list[Phase]:
    """Return the phases of a step in their order; torch.compile serves those that are differentiated once."""
    main = players.compiled() if use_compiled else players
    phases = [Phase("G_main", g, partial(generator_logistic, main))]
    if config.pl_weight and config.pl_interval:
        loss = partial(path_length, players, weight=config.pl_weight, decay=config.pl_decay)
        phases.append(Phase("G_reg", g, loss, config.pl_interval))
    phases.append(Phase("D_main", d, partial(discriminator_logistic, main)))
    if config.r1_gamma and config.r1_interval:
        penalty = partial(r1_penalty, players, gamma=config.r1_gamma)
        phases.append(Phase("D_reg", d, penalty, config.r1_interval))
    return phases
