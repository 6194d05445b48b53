"""Losses and regularisers: functions of (gan, real images, labels) that return LossTerms.

A new objective needs two functions here and an entry in OBJECTIVES; a new regulariser needs a function here and a
line in `phases.build_phases`. A loss is a mean over the micro-batch and has no side effects. Batch means that drive
running state (w_avg, the mean path length, ADA's sign statistic) are returned in `LossTerms.means`. The trainer
averages them over all micro-batches and processes and updates the running state once per phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import ConfigError, check_bounds, setting
from dnnlib.schedule import Schedule
from torch_utils.misc import compiled
from training.dataset import encode_labels
from training.networks import execution


@dataclass
class LossTerms:
    """Return value of a loss: the scalar to minimise, values to report, and batch means that drive running state."""

    loss: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Tensor, Tensor], LossTerms]  # (real images, labels) -> terms
Losses = tuple[Loss, Loss]  # losses of G_main and D_main


@dataclass
class GAN:
    """Networks and state that the losses use. Generated images use the labels of randomly drawn training images."""

    G: Any  # a generator: mapping, synthesis, z_dim, c_dim, num_ws
    D: Any  # a discriminator: D(img, c) -> logits (B, 1)
    augment: Callable[[Tensor], Tensor]
    labels: Tensor  # labels of all training images: class indices (items,) or vectors (items, c_dim)
    style_mixing: float
    pl_mean: Tensor  # scalar: running mean of the path length
    # Applied to G.synthesis and D, e.g. torch.compile.
    wrapper: Callable[[Any], Callable[..., Tensor]] = lambda network: network
    scheduled: dict[Schedule, Tensor] = field(default_factory=dict)  # current values, scalars on the device

    def __post_init__(self) -> None:
        self.synthesize, self.discriminate = self.wrapper(self.G.synthesis), self.wrapper(self.D)

    def compiled(self) -> GAN:
        """Return a copy that calls the networks through torch.compile, which does not support second derivatives."""
        return replace(self, wrapper=compiled)

    def weight(self, value: float | Schedule) -> float | Tensor:
        """Return the weight of a loss term: a constant, or for a schedule a scalar tensor with its current value.

        `follow_schedules` updates the tensor in place, so that a captured CUDA graph reads the current value.
        """
        if not isinstance(value, Schedule):
            return value
        return self.scheduled.setdefault(value, torch.tensor(value.at(0), device=self.labels.device))

    def follow_schedules(self, nimg: int) -> None:
        """Set the weights that have a schedule to their values after `nimg` images, without synchronization."""
        for schedule, scalar in self.scheduled.items():
            scalar.fill_(schedule.at(nimg))

    def sample_latents(self, count: int) -> tuple[Tensor, Tensor]:
        """Return random z (count, z_dim) and the labels c (count, c_dim) of randomly drawn training images."""
        z = torch.randn([count, self.G.z_dim], device=self.labels.device)
        drawn = torch.randint(len(self.labels), [count], device=self.labels.device)
        return z, encode_labels(self.labels[drawn], self.G.c_dim)

    def sample_styles(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return ws (B, num_ws, w_dim) with style mixing (Karras et al. 2019, section 3.1), and the mean w (w_dim,).

        Mixing is decided once per micro-batch: with probability `style_mixing`, the styles from a cutoff onwards are
        replaced by styles of a second z. The cutoff is uniform in 1..num_ws-1.
        """
        ws = self.G.mapping(z, c)
        mean_w = ws[:, 0].detach().mean(dim=0)
        num_ws = ws.shape[1]
        if self.style_mixing == 0 or num_ws == 1:
            return ws, mean_w

        cutoff = torch.randint(1, num_ws, [], device=z.device)
        mixed = torch.rand([], device=z.device) < self.style_mixing
        other = self.G.mapping(torch.randn_like(z), c)
        from_other = mixed & (torch.arange(num_ws, device=z.device) >= cutoff)  # (num_ws,)
        return torch.where(from_other[:, None], other, ws), mean_w

    def generate(self, count: int, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return generated images, their labels (c, or random labels if c is None) and the mean w."""
        z, drawn = self.sample_latents(count)
        c = drawn if c is None else c
        ws, mean_w = self.sample_styles(z, c)
        return self.synthesize(ws, noise_mode="random"), c, mean_w

    def logits(self, img: Tensor, c: Tensor) -> Tensor:
        """Return D's logits for randomly augmented images."""
        return self.discriminate(self.augment(img), c)

    def fake_and_real_logits(self, fake: Tensor, fake_c: Tensor, real: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return `logits` for equal numbers of generated and real images, which pass through D as one batch."""
        with execution.using(minibatches=2):
            fake_logits, real_logits = self.logits(torch.cat([fake, real]), torch.cat([fake_c, c])).chunk(2)
        return fake_logits, real_logits


def generator_logistic(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """softplus(-D(T(G(z)))): the non-saturating logistic loss (Goodfellow et al. 2014) under augmentation T."""
    fake, fake_c, mean_w = gan.generate(batch_scale * len(img))
    logits = gan.logits(fake, fake_c)
    return _generator_terms(F.softplus(-logits).mean(), logits, mean_w)


def discriminator_logistic(gan: GAN, img: Tensor, c: Tensor) -> LossTerms:
    """softplus(D(T(G(z)))) + softplus(-D(T(x)))."""
    fake_logits, real_logits, mean_w = _fake_and_real_logits(gan, img, c)
    loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    return _discriminator_terms(loss, real_logits, real_logits, mean_w)


def generator_linear(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """-D(T(G(z))): the generator loss of the hinge and Wasserstein objectives."""
    fake, fake_c, mean_w = gan.generate(batch_scale * len(img))
    logits = gan.logits(fake, fake_c)
    return _generator_terms(-logits.mean(), logits, mean_w)


def generator_wgan(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """-D(T(G(z))). A critic has no decision threshold, so signs are not reported."""
    return _omit_signs(generator_linear(gan, img, c, batch_scale))


def discriminator_hinge(gan: GAN, img: Tensor, c: Tensor) -> LossTerms:
    """max(0, 1 + D(T(G(z)))) + max(0, 1 - D(T(x))) (Lim & Ye 2017)."""
    fake_logits, real_logits, mean_w = _fake_and_real_logits(gan, img, c)
    loss = F.relu(1 + fake_logits).mean() + F.relu(1 - real_logits).mean()
    return _discriminator_terms(loss, real_logits, real_logits, mean_w)


def discriminator_wgan(gan: GAN, img: Tensor, c: Tensor, gp_weight: float, drift_weight: float) -> LossTerms:
    """E[D(T(G(z)))] - E[D(T(x))] + gp_weight E[(|grad D(u)| - 1)^2] + drift_weight E[D(T(x))]^2.

    u is a uniform interpolate of an augmented real image and an augmented generated image with the same label
    (Gulrajani et al. 2017). D is evaluated on u without further augmentation. The drift term keeps logits near zero:
    Karras et al. 2018 square each logit; here, as in TransGAN, the mean logit of the micro-batch is squared.
    """
    with torch.no_grad():
        fake, _, mean_w = gan.generate(len(img), c)
    with execution.using(minibatches=2):
        with torch.no_grad():
            images = gan.augment(torch.cat([fake, img]))
        fake_logits, real_logits = gan.discriminate(images, c.repeat(2, 1)).chunk(2)
    fake, real = images.chunk(2)
    penalty = gradient_penalty(gan, real, fake, c)
    mean_real = real_logits.mean()
    loss = fake_logits.mean() - mean_real + gp_weight * penalty.mean() + drift_weight * mean_real.square()
    terms = _discriminator_terms(loss, real_logits, real_logits - fake_logits, mean_w)
    terms.stats["Loss/gradient_penalty"] = penalty
    return terms


def gradient_penalty(gan: GAN, real: Tensor, fake: Tensor, c: Tensor) -> Tensor:
    """(|grad_u D(u)| - 1)^2 at u = real + t (fake - real), t ~ U(0, 1) per image: (B,)."""
    t = torch.rand([len(real), 1, 1, 1], dtype=real.dtype, device=real.device)
    between = real.lerp(fake, t).requires_grad_(True)
    with execution.using(twice_differentiable=True):
        (gradient,) = torch.autograd.grad(gan.D(between, c).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square()


def generator_relativistic(gan: GAN, img: Tensor, c: Tensor) -> LossTerms:
    """softplus(D(T(x)) - D(T(G(z)))) on pairs with the same labels (Jolicoeur-Martineau 2019; Huang et al. 2024)."""
    fake, _, mean_w = gan.generate(len(img), c)
    with torch.no_grad():
        real_logits = gan.logits(img, c)
    logits = gan.logits(fake, c)
    return _omit_signs(_generator_terms(F.softplus(real_logits - logits).mean(), logits, mean_w))


def discriminator_relativistic(gan: GAN, img: Tensor, c: Tensor, gamma: float | Tensor) -> LossTerms:
    """softplus(D(T(G(z))) - D(T(x))) + gamma/2 (E[|grad_x D(T(x))|^2] + E[|grad D(T(G(z)))|^2]), on the same pairs.

    R1 and R2 in every step: Huang et al. 2024, "The GAN is dead; long live the GAN!". As in `r1_penalty`, gradients
    are with respect to the images before augmentation.
    """
    with torch.no_grad():
        fake, _, mean_w = gan.generate(len(img), c)
    images = torch.cat([fake, img]).requires_grad_(True)
    with execution.using(twice_differentiable=True, minibatches=2):
        logits = gan.D(gan.augment(images), c.repeat(2, 1))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    fake_logits, real_logits = logits.chunk(2)
    fake_penalty, real_penalty = gradient.square().sum(dim=(1, 2, 3)).chunk(2)  # each (B,)
    loss = F.softplus(fake_logits - real_logits).mean() + gamma / 2 * (real_penalty + fake_penalty).mean()
    terms = _discriminator_terms(loss, real_logits, real_logits - fake_logits, mean_w)
    terms.stats |= {"Loss/r1_penalty": real_penalty, "Loss/r2_penalty": fake_penalty}
    return terms


def _fake_and_real_logits(gan: GAN, img: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return D's logits for as many generated as real images, and the mean w."""
    with torch.no_grad():
        fake, fake_c, mean_w = gan.generate(len(img))
    return *gan.fake_and_real_logits(fake, fake_c, img, c), mean_w


def _generator_terms(loss: Tensor, logits: Tensor, mean_w: Tensor) -> LossTerms:
    stats = {"Loss/G/loss": loss, "Loss/scores/fake": logits, "Loss/signs/fake": logits.sign()}
    return LossTerms(loss, stats, {"w_avg": mean_w})


def _omit_signs(terms: LossTerms) -> LossTerms:
    """Drop the sign statistic: where D only compares images, the sign of a single logit is meaningless."""
    stats = {name: value for name, value in terms.stats.items() if name != "Loss/signs/fake"}
    return replace(terms, stats=stats)


def _discriminator_terms(loss: Tensor, real_logits: Tensor, margins: Tensor, mean_w: Tensor) -> LossTerms:
    """Return the terms of a discriminator loss; `margins` are positive where D is correct about a real image.

    The margin is the logit of the real image. Where D only compares images, the margin is the logit of the real image
    minus the logit of a generated image. ADA is controlled by the mean sign of the margins.
    """
    signs = margins.detach().sign()
    stats = {"Loss/D/loss": loss, "Loss/scores/real": real_logits, "Loss/signs/real": signs}
    return LossTerms(loss, stats, {"w_avg": mean_w, "real_sign": signs.mean()})


def r1_penalty(gan: GAN, img: Tensor, c: Tensor, gamma: float | Tensor) -> LossTerms:
    """gamma/2 E[|grad_x D(T(x))|^2] on real images x before the augmentation T (Mescheder et al. 2018)."""
    img = img.detach().requires_grad_(True)
    with execution.using(twice_differentiable=True):
        logits = gan.logits(img, c)
        (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    squared_norm = gradient.square().sum(dim=(1, 2, 3))  # (B,)
    loss = (gamma / 2) * squared_norm.mean()
    return LossTerms(loss, {"Loss/r1_penalty": squared_norm, "Loss/D/reg": loss})


def path_length(gan: GAN, img: Tensor, c: Tensor, weight: float, decay: float) -> LossTerms:
    """weight E[(|J_w^T y| - a)^2], y ~ N(0, I) / sqrt(HW), a: running mean length (Karras et al. 2020a, eq. 4).

    Computed on half of the micro-batch. The length of an image is the square root of |gradient|^2 averaged over its
    num_ws styles. The running mean a includes this micro-batch, and gradients flow through that contribution too.
    """
    z, c = gan.sample_latents(len(img) // 2)
    ws, mean_w = gan.sample_styles(z, c)
    with execution.using(twice_differentiable=True, shared_styles=False):
        fake = gan.synthesize(ws, noise_mode="random")
        y = torch.randn_like(fake) / math.sqrt(fake.shape[2] * fake.shape[3])
        (gradient,) = torch.autograd.grad((fake * y).sum(), ws, create_graph=True)  # (B/2, num_ws, w_dim)
    lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()  # (B/2,)
    mean_length = gan.pl_mean.lerp(lengths.mean(), decay)
    penalty = (lengths - mean_length).square()
    loss = weight * penalty.mean()
    stats = {"Loss/pl_penalty": penalty, "Loss/path_length": lengths, "Loss/G/reg": loss}
    return LossTerms(loss, stats, {"w_avg": mean_w, "pl_mean": lengths.detach().mean()})


def _logistic(gan: GAN, config: LossConfig) -> Losses:
    g_loss = partial(generator_logistic, gan, batch_scale=config.g_batch_scale)
    return g_loss, partial(discriminator_logistic, gan)


def _hinge(gan: GAN, config: LossConfig) -> Losses:
    g_loss = partial(generator_linear, gan, batch_scale=config.g_batch_scale)
    return g_loss, partial(discriminator_hinge, gan)


def _wgangp_eps(gan: GAN, config: LossConfig) -> Losses:
    g_loss = partial(generator_wgan, gan, batch_scale=config.g_batch_scale)
    gp_weight, drift_weight = _resolved(config, "gp_weight"), _resolved(config, "drift_weight")
    return g_loss, partial(discriminator_wgan, gan, gp_weight=gp_weight, drift_weight=drift_weight)


def _relativistic(gan: GAN, config: LossConfig) -> Losses:
    d_loss = partial(discriminator_relativistic, gan, gamma=gan.weight(_resolved(config, "r1_gamma")))
    return partial(generator_relativistic, gan), d_loss


def _resolved(config: LossConfig, name: str) -> Any:
    value = getattr(config, name)
    if value is None:
        raise ConfigError(name, None, "not resolved")
    return value


@dataclass(frozen=True)
class Objective:
    """Losses of an objective, with its regularisers and settings.

    `losses` returns the losses of G_main and D_main. With `lazy_r1`, R1 is a separate phase every `r1_interval` steps;
    relativistic includes R1 and R2 in every step, and wgangp-eps uses neither. `weights` maps weights
    specific to this objective to their defaults.
    """

    losses: Callable[[GAN, LossConfig], Losses]
    lazy_r1: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)


OBJECTIVES: Mapping[str, Objective] = {
    "logistic": Objective(_logistic),
    "hinge": Objective(_hinge),
    "wgangp-eps": Objective(_wgangp_eps, lazy_r1=False, weights={"gp_weight": 10.0, "drift_weight": 1e-3}),
    "relativistic": Objective(_relativistic, lazy_r1=False),
}
LAZY_R1 = tuple(name for name, objective in OBJECTIVES.items() if objective.lazy_r1)
OFF = "0 turns the regulariser off"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Objective, regularisers, and frequency of generator updates.

    With an interval of None, a regulariser has no phase of its own, and Adam's settings are not corrected for lazy
    regularisation. A weight of 0 drops the regulariser but keeps the correction. G is updated every `n_critic` steps;
    G_main generates `g_batch_scale` images per real image of D_main.
    """

    objective: str = setting("logistic", "Training objective.", choices=tuple(OBJECTIVES))
    n_critic: int = setting(1, "Discriminator steps per generator step.", at_least=1)
    g_batch_scale: int = setting(1, "Generator batch size, as a multiple of the discriminator batch size.", at_least=1)
    gp_weight: float | None = setting(
        None, "Weight of the gradient penalty of wgangp-eps; None: 10 for wgangp-eps.", auto=True, at_least=0, note=OFF
    )
    drift_weight: float | None = setting(
        None,
        "Weight of the squared mean logit of real images (wgangp-eps); None: 0.001 for wgangp-eps.",
        auto=True,
        at_least=0,
        note=OFF,
    )
    r1_gamma: float | Schedule | None = setting(
        None,
        "Weight of R1 (of R1 and R2 with relativistic); None: from resolution and batch size.",
        auto=True,
        at_least=0,
        note=OFF,
    )
    r1_interval: int | None = setting(
        16, "Lazy regularisation: steps between R1 phases; None: no R1 phase.", at_least=1
    )
    pl_weight: float = setting(2.0, "Weight of path length regularisation.", at_least=0, note=OFF)
    pl_interval: int | None = setting(
        4, "Lazy regularisation: steps between path length phases; None: no such phase.", at_least=1
    )
    pl_decay: float = setting(0.01, "Rate of the moving average of path lengths.", at_least=0, at_most=1)
    style_mixing: float = setting(0.9, "Probability of style mixing.", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_bounds(self)
        self._check_objective()

    def _check_objective(self) -> None:
        """Raise ConfigError for settings that the objective does not use."""
        for owner, objective in OBJECTIVES.items():
            for name in objective.weights:
                if getattr(self, name) is not None and self.objective != owner:
                    raise ConfigError(name, getattr(self, name), f"applies to --loss={owner} only; omit it")
        if self.objective == "wgangp-eps" and self.r1_gamma:
            problem = "wgangp-eps has its own penalty (loss.gp_weight): R1 needs --loss=logistic, hinge or relativistic"
            raise ConfigError("r1_gamma", self.r1_gamma, problem)
        if self.objective not in LAZY_R1 and self.r1_interval is not None:
            problem = f"only --loss={' and '.join(LAZY_R1)} have R1 as a lazy regulariser; omit it"
            raise ConfigError("r1_interval", self.r1_interval, problem)
        if self.objective == "relativistic" and self.g_batch_scale > 1:
            problem = "relativistic compares each generated image with a real image of the batch: leave it at 1"
            raise ConfigError("g_batch_scale", self.g_batch_scale, problem)

    def with_objective(self, objective: str) -> Self:
        """Return this configuration with another objective, without the settings that only the old objective uses."""
        values: dict[str, Any] = {"objective": objective, "gp_weight": None, "drift_weight": None}
        if (objective in LAZY_R1) != (self.objective in LAZY_R1):
            values["r1_interval"] = 16 if objective in LAZY_R1 else None
        if "wgangp-eps" in (objective, self.objective):
            values["r1_gamma"] = None
        if objective == "relativistic":
            values["g_batch_scale"] = 1
        return self if objective == self.objective else replace(self, **values)

    def fit(self, resolution: int, batch_size: int) -> Self:
        """Fill in weights that are None; `resolution` is the longer side of the images."""
        gamma = 0.0 if self.objective == "wgangp-eps" else 0.0002 * resolution**2 / batch_size
        weights: dict[str, Any] = {"r1_gamma": gamma, **OBJECTIVES[self.objective].weights}
        return replace(self, **{name: value for name, value in weights.items() if getattr(self, name) is None})
