"""Phases of a training step. A phase combines a loss, the parameters it trains, their optimizer and an interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, check_bounds, setting
from dnnlib.schedule import Schedule, value_at
from torch_utils import distributed
from torch_utils.gradients import FlatGradients
from training.loss import GAN, OBJECTIVES, Loss, LossConfig, LossTerms, path_length, r1_penalty
from training.networks.weights import WeightCache


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam (Kingma & Ba 2015)."""

    lr: float | Schedule | None = setting(
        None, "Learning rate; None: 0.0025, or 0.002 at 1024 pixels or more.", auto=True, above=0
    )
    beta1: float = setting(0.0, "Decay rate of the running mean of gradients.", at_least=0, below=1)
    beta2: float | Schedule = setting(0.99, "Decay rate of the running mean of squared gradients.", at_least=0, below=1)
    eps: float = setting(1e-8, "Term added to the denominator to avoid division by zero.", at_least=0)
    clip_norm: float | None = setting(
        None,
        "Maximum norm of the gradient of all parameters of the network; None: no clipping.",
        above=0,
        note="omit it for no clipping",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


class Updater:
    """Trainable parameters of one network, with their gradients and optimizer.

    `clip_norm` is the maximum norm of the gradient of all parameters together; None turns clipping off. `settings`
    returns the optimizer's settings after a number of images.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None = None,
        settings: Callable[[int], dict[str, Any]] = lambda nimg: {},
    ) -> None:
        self.parameters = parameters
        self.optimizer: Any = optimizer
        self.clip_norm = clip_norm
        self.settings = settings
        self.gradients = FlatGradients(parameters)

    def follow_schedules(self, nimg: int) -> None:
        """Set the optimizer's settings to their values after `nimg` images."""
        for group in self.optimizer.param_groups:
            group.update(self.settings(nimg))

    @contextmanager
    def requiring_grad(self) -> Iterator[None]:
        """Make these parameters require gradients inside the block only."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients, which have norm `norm`, down to `clip_norm` if `norm` is larger."""
        if self.clip_norm is not None:
            self.gradients.buffer *= (self.clip_norm / (norm + 1e-6)).clamp(max=1)

    def step(self, skip: Tensor) -> None:
        """Take one optimizer step unless `skip`, a boolean scalar on the device, is true."""
        self.optimizer.found_inf = skip.float()  # a fused optimizer skips the step if this is 1
        self.optimizer.step()


class BatchMeans:
    """Batch means of LossTerms.means and of the loss, accumulated over micro-batches in one vector on the device.

    The first micro-batch allocates the vector; it is never reallocated, because a captured CUDA graph accumulates into
    it.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self.vector = torch.zeros(0)  # the flattened means in order, then the loss

    def zero(self) -> None:
        """Reset all means to zero."""
        self.vector.zero_()

    def add(self, terms: LossTerms, share: float) -> None:
        """Add the means of a micro-batch, weighted by its share of the process's batch."""
        means = torch.cat([x.detach().reshape(-1) for x in (*terms.means.values(), terms.loss)]) * share
        if not len(self.vector):
            self.shapes = {name: x.shape for name, x in terms.means.items()}
            self.vector = torch.zeros_like(means)
        self.vector += means

    def reduce(self) -> dict[str, Tensor]:
        """Average the means over all processes in place and return them by name. A collective call."""
        *means, _ = distributed.average(self.vector).split([*(shape.numel() for shape in self.shapes.values()), 1])
        return {name: mean.view(shape) for mean, (name, shape) in zip(means, self.shapes.items(), strict=True)}


@dataclass
class Phase:
    """One optimizer step on the gradient of `weight * loss`, every `interval` training steps.

    The weight of a lazy regulariser is the number of main phases of its network per phase of the regulariser.
    `batch` is the number of the step's batch of real images that the loss uses; batch 1 exists with loss.fresh_reals.
    `means` are the batch means of the current step, `weights` the effective weights of both networks.
    """

    name: str
    updater: Updater
    loss: Loss
    interval: int = 1
    weight: int = 1
    batch: int = 0
    means: BatchMeans = field(default_factory=BatchMeans)
    weights: WeightCache = field(default_factory=WeightCache)

    def is_due(self, step: int) -> bool:
        """Return whether the phase runs in this step, counted from 0."""
        return step % self.interval == 0


def build_updater(parameters: list[nn.Parameter], config: AdamConfig, regularisation_interval: int | None) -> Updater:
    """Return an updater with Adam; `regularisation_interval` is the interval of the lazy regulariser, if any."""
    settings = partial(adam_settings, config, regularisation_interval)
    # Fused: one kernel for all parameters, and the step can be skipped without synchronizing with the host.
    adam = torch.optim.Adam(parameters, **settings(0), fused=True)
    return Updater(parameters, adam, config.clip_norm, settings)


def adam_settings(config: AdamConfig, regularisation_interval: int | None, nimg: int) -> dict[str, Any]:
    """Return Adam's settings after `nimg` images. Adam corrects the bias of its means with the current betas.

    The regulariser adds one optimizer step every k steps. To compensate, Adam uses r lr, beta1^r and beta2^r with
    r = k/(k+1) (Karras et al. 2020a, appendix B, "lazy regularization").
    """
    if config.lr is None:
        raise ConfigError("lr", None, "not resolved")
    k = regularisation_interval
    r = 1.0 if k is None else k / (k + 1)
    betas = (config.beta1**r, value_at(config.beta2, nimg) ** r)
    return {"lr": value_at(config.lr, nimg) * r, "betas": betas, "eps": config.eps}


def build_phases(gan: GAN, config: LossConfig, g: Updater, d: Updater, *, use_compiled: bool = False) -> list[Phase]:
    """Return the phases of a step in order.

    `use_compiled` applies torch.compile to the networks, except for the path length and exact penalties of D.
    """
    main = gan.compiled() if use_compiled else gan
    g_loss, d_loss = OBJECTIVES[config.objective].losses(main, config)
    of_g = [Phase("G_main", g, g_loss, interval=config.n_critic, batch=int(config.fresh_reals))]
    if config.pl_weight and config.pl_interval:
        loss = partial(path_length, gan, weight=config.pl_weight, decay=config.pl_decay)
        of_g.append(Phase("G_reg", g, loss, interval=config.n_critic * config.pl_interval, weight=config.pl_interval))
    of_d = [Phase("D_main", d, d_loss)]
    if config.r1_gamma and config.r1_interval:
        penalty = partial(r1_penalty, main, gamma=gan.weight(config.r1_gamma), estimate=config.estimate)
        of_d.append(Phase("D_reg", d, penalty, interval=config.r1_interval, weight=config.r1_interval))
    return of_d + of_g if config.d_first else of_g + of_d
