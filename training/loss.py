"""Losses and regularisers: functions of (gan, real images, labels) that return LossTerms.

A new objective is two functions here and a row of OBJECTIVES; a new regulariser a function here and a line in
`phases.build_phases`. Losses are means over the micro-batch and change nothing: what has to move with training (w_avg,
the path-length mean, ADA's statistic) leaves as a batch mean in `LossTerms.means`, and the trainer applies it once per
phase, averaged over all micro-batches and processes.
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
from torch_utils.misc import compiled
from training.dataset import encode_labels
from training.networks import execution


@dataclass
class LossTerms:
    """What a loss returns: the scalar to minimise, values to report, and batch means that drive running state."""

    loss: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Tensor, Tensor], LossTerms]  # (real images, labels) -> terms
Losses = tuple[Loss, Loss]  # of the main phases of G and D


@dataclass
class GAN:
    """What the losses act on. `labels` are those of all training images; generated images get random ones of them."""

    G: Any  # a generator: mapping, synthesis, z_dim, c_dim, num_ws
    D: Any  # a discriminator: D(img, c) -> logits (B, 1)
    augment: Callable[[Tensor], Tensor]
    labels: Tensor  # (items,) class indices or (items, c_dim)
    style_mixing: float
    pl_mean: Tensor  # scalar: running mean of the path length
    wrapper: Callable[[Any], Callable[..., Tensor]] = lambda network: (
        network
    )  # applied to G.synthesis and D, e.g. torch.compile

    def __post_init__(self) -> None:
        self.synthesize, self.discriminate = self.wrapper(self.G.synthesis), self.wrapper(self.D)

    def compiled(self) -> GAN:
        """Return the same gan, called through torch.compile, which cannot differentiate twice."""
        return replace(self, wrapper=compiled)

    def sample_latents(self, count: int) -> tuple[Tensor, Tensor]:
        """Return fresh z (count, z_dim) and labels c (count, c_dim) of randomly drawn training images."""
        z = torch.randn([count, self.G.z_dim], device=self.labels.device)
        drawn = torch.randint(len(self.labels), [count], device=self.labels.device)
        return z, encode_labels(self.labels[drawn], self.G.c_dim)

    def sample_styles(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return ws (B, num_ws, w_dim) under style mixing (Karras et al. 2019, section 3.1), and the mean w (w_dim,).

        One draw per micro-batch: with the configured probability, the styles from a uniform cut in 1..num_ws-1 on are
        those of a second z.
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

    def generate(self, count: int, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return generated images, their labels (c, or else drawn ones) and the mean w."""
        z, drawn = self.sample_latents(count)
        c = drawn if c is None else c
        ws, mean_w = self.sample_styles(z, c)
        return self.synthesize(ws, noise_mode="random"), c, mean_w

    def logits(self, img: Tensor, c: Tensor) -> Tensor:
        """Return D's logits of freshly augmented images."""
        return self.discriminate(self.augment(img), c)


def generator_logistic(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """softplus(-D(T(G(z)))): the non-saturating logistic loss (Goodfellow et al. 2014) under augmentation T."""
    fake, fake_c, mean_w = gan.generate(batch_scale * len(img))
    logits = gan.logits(fake, fake_c)
    return _generator_terms(F.softplus(-logits).mean(), logits, mean_w)


def discriminator_logistic(gan: GAN, img: Tensor, c: Tensor) -> LossTerms:
    """softplus(D(T(G(z)))) + softplus(-D(T(x)))."""
    fake_logits, real_logits, mean_w = _logits_of_both(gan, img, c)
    loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    return _discriminator_terms(loss, real_logits, real_logits, mean_w)


def generator_linear(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """-D(T(G(z))): the generator's side of the hinge loss and of the Wasserstein distance."""
    fake, fake_c, mean_w = gan.generate(batch_scale * len(img))
    logits = gan.logits(fake, fake_c)
    return _generator_terms(-logits.mean(), logits, mean_w)


def generator_wgan(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """-D(T(G(z))), of which the Wasserstein distance knows no zero."""
    return _omit_signs(generator_linear(gan, img, c, batch_scale))


def discriminator_hinge(gan: GAN, img: Tensor, c: Tensor) -> LossTerms:
    """max(0, 1 + D(T(G(z)))) + max(0, 1 - D(T(x))) (Lim & Ye 2017)."""
    fake_logits, real_logits, mean_w = _logits_of_both(gan, img, c)
    loss = F.relu(1 + fake_logits).mean() + F.relu(1 - real_logits).mean()
    return _discriminator_terms(loss, real_logits, real_logits, mean_w)


def discriminator_wgan(gan: GAN, img: Tensor, c: Tensor, gp_weight: float, drift_weight: float) -> LossTerms:
    """E[D(T(G(z)))] - E[D(T(x))] + gp_weight E[(|grad D(u)| - 1)^2] + drift_weight E[D(T(x))]^2.

    u is a uniform interpolate of an augmented real and an augmented generated image (Gulrajani et al. 2017): what D
    sees, so not augmented again. Both have the same labels, which are the interpolate's too. The drift keeps logits
    near zero (Karras et al. 2018, who square them one by one; here, as in TransGAN, their mean over the micro-batch).
    """
    with torch.no_grad():
        fake, _, mean_w = gan.generate(len(img), c)
        fake, real = gan.augment(fake), gan.augment(img)
    fake_logits, real_logits = gan.discriminate(fake, c), gan.discriminate(real, c)
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


def discriminator_relativistic(gan: GAN, img: Tensor, c: Tensor, gamma: float) -> LossTerms:
    """softplus(D(T(G(z))) - D(T(x))) + gamma/2 (E[|grad_x D(T(x))|^2] + E[|grad D(T(G(z)))|^2]), on the same pairs.

    Huang et al. 2024, "The GAN is dead; long live the GAN!": R1 and R2 in every step. Both are taken, as R1 elsewhere,
    by the images before augmentation.
    """
    with torch.no_grad():
        fake, _, mean_w = gan.generate(len(img), c)
    images = img.detach().requires_grad_(True), fake.requires_grad_(True)
    with execution.using(twice_differentiable=True):
        real_logits, fake_logits = (gan.D(gan.augment(x), c) for x in images)
        gradients = torch.autograd.grad(real_logits.sum() + fake_logits.sum(), images, create_graph=True)
    real_penalty, fake_penalty = (g.square().sum(dim=(1, 2, 3)) for g in gradients)  # each (B,)
    loss = F.softplus(fake_logits - real_logits).mean() + gamma / 2 * (real_penalty + fake_penalty).mean()
    terms = _discriminator_terms(loss, real_logits, real_logits - fake_logits, mean_w)
    terms.stats |= {"Loss/r1_penalty": real_penalty, "Loss/r2_penalty": fake_penalty}
    return terms


def _logits_of_both(gan: GAN, img: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return D's logits of as many generated images as there are real ones, those of the real ones, and the mean w."""
    with torch.no_grad():
        fake, fake_c, mean_w = gan.generate(len(img))
    return gan.logits(fake, fake_c), gan.logits(img, c), mean_w


def _generator_terms(loss: Tensor, logits: Tensor, mean_w: Tensor) -> LossTerms:
    stats = {"Loss/G/loss": loss, "Loss/scores/fake": logits, "Loss/signs/fake": logits.sign()}
    return LossTerms(loss, stats, {"w_avg": mean_w})


def _omit_signs(terms: LossTerms) -> LossTerms:
    """The terms of a generator whose D only compares: no logit is right or wrong by itself."""
    stats = {name: value for name, value in terms.stats.items() if name != "Loss/signs/fake"}
    return replace(terms, stats=stats)


def _discriminator_terms(loss: Tensor, real_logits: Tensor, margins: Tensor, mean_w: Tensor) -> LossTerms:
    """`margins` are positive where D is right about a real image: its logit, or where D only compares, the difference
    to a generated one's. ADA steers by their signs."""
    signs = margins.detach().sign()
    stats = {"Loss/D/loss": loss, "Loss/scores/real": real_logits, "Loss/signs/real": signs}
    return LossTerms(loss, stats, {"w_avg": mean_w, "real_sign": signs.mean()})


def r1_penalty(gan: GAN, img: Tensor, c: Tensor, gamma: float) -> LossTerms:
    """gamma/2 E[|grad_x D(T(x))|^2] on real images x, by the images before augmentation (Mescheder et al. 2018)."""
    img = img.detach().requires_grad_(True)
    with execution.using(twice_differentiable=True):
        logits = gan.logits(img, c)
        (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    squared_norm = gradient.square().sum(dim=(1, 2, 3))  # (B,)
    loss = (gamma / 2) * squared_norm.mean()
    return LossTerms(loss, {"Loss/r1_penalty": squared_norm, "Loss/D/reg": loss})


def path_length(gan: GAN, img: Tensor, c: Tensor, weight: float, decay: float) -> LossTerms:
    """weight E[(|J_w^T y| - a)^2], y ~ N(0, I) / sqrt(HW), a the running mean length (Karras et al. 2020a, eq. 4).

    On half of the micro-batch. The length of one image: root of the mean over its num_ws styles of |gradient|^2.
    The gradient also flows through this batch's share in a.
    """
    z, c = gan.sample_latents(len(img) // 2)
    ws, mean_w = gan.sample_styles(z, c)
    with execution.using(twice_differentiable=True):
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
    gp_weight, drift_weight = _chosen(config, "gp_weight"), _chosen(config, "drift_weight")
    return g_loss, partial(discriminator_wgan, gan, gp_weight=gp_weight, drift_weight=drift_weight)


def _relativistic(gan: GAN, config: LossConfig) -> Losses:
    d_loss = partial(discriminator_relativistic, gan, gamma=_chosen(config, "r1_gamma"))
    return partial(generator_relativistic, gan), d_loss


def _chosen(config: LossConfig, name: str) -> float:
    value: float | None = getattr(config, name)
    if value is None:
        raise ConfigError(name, None, "not resolved")
    return value


@dataclass(frozen=True)
class Objective:
    """An objective: its losses, and which regularisers and settings go with it.

    `losses` returns those of the main phases of G and D. With `lazy_r1`, R1 is a phase of its own, every `r1_interval`
    steps; relativistic has R1 and R2 in every step, wgangp-eps neither. `weights` are those that only this objective
    has, with their defaults.
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
    """The objective, its regularisers, and how often the generator moves.

    An interval of None drops a regulariser's correction of the optimizer; a weight of 0 drops the regulariser alone. G
    moves every `n_critic` steps, in its main phase by `g_batch_scale` times as many images as D has reals.
    """

    objective: str = setting("logistic", "Training objective.", choices=tuple(OBJECTIVES))
    n_critic: int = setting(1, "Discriminator steps per generator step.", at_least=1)
    g_batch_scale: int = setting(1, "Batch of the generator, as a multiple of the discriminator's.", at_least=1)
    gp_weight: float | None = setting(
        None, "Weight of the gradient penalty of wgangp-eps; None: 10 with it.", auto=True, at_least=0, note=OFF
    )
    drift_weight: float | None = setting(
        None,
        "Weight of the squared mean logit of reals, of wgangp-eps; None: 0.001 with it.",
        auto=True,
        at_least=0,
        note=OFF,
    )
    r1_gamma: float | None = setting(
        None,
        "Weight of R1, with relativistic of R1 and R2; None: by resolution and batch size.",
        auto=True,
        at_least=0,
        note=OFF,
    )
    r1_interval: int | None = setting(
        16, "Lazy regularisation: steps between R1's phases; None: no such phase.", at_least=1
    )
    pl_weight: float = setting(2.0, "Weight of path length regularisation.", at_least=0, note=OFF)
    pl_interval: int | None = setting(
        4, "Lazy regularisation: steps between path length's phases; None: no such phase.", at_least=1
    )
    pl_decay: float = setting(0.01, "Rate of the moving average of path lengths.", at_least=0, at_most=1)
    style_mixing: float = setting(0.9, "Probability of style mixing.", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_bounds(self)
        self._check_objective()

    def _check_objective(self) -> None:
        """Refuse what the objective has no use for."""
        for owner, objective in OBJECTIVES.items():
            for name in objective.weights:
                if getattr(self, name) is not None and self.objective != owner:
                    raise ConfigError(name, getattr(self, name), f"only --loss={owner} has it; leave it out")
        if self.objective == "wgangp-eps" and self.r1_gamma:
            problem = (
                "wgangp-eps has a penalty of its own (loss.gp_weight): R1 needs --loss=logistic, hinge or relativistic"
            )
            raise ConfigError("r1_gamma", self.r1_gamma, problem)
        if self.objective not in LAZY_R1 and self.r1_interval is not None:
            problem = f"only --loss={' and '.join(LAZY_R1)} have R1 as a lazy regulariser; leave it out"
            raise ConfigError("r1_interval", self.r1_interval, problem)
        if self.objective == "relativistic" and self.g_batch_scale > 1:
            problem = "relativistic compares each generated image with a real one of the batch: leave it at 1"
            raise ConfigError("g_batch_scale", self.g_batch_scale, problem)

    def with_objective(self, objective: str) -> Self:
        """Return this configuration with another objective, without what only the old one had."""
        values: dict[str, Any] = {"objective": objective, "gp_weight": None, "drift_weight": None}
        if (objective in LAZY_R1) != (self.objective in LAZY_R1):
            values["r1_interval"] = 16 if objective in LAZY_R1 else None
        if "wgangp-eps" in (objective, self.objective):
            values["r1_gamma"] = None
        if objective == "relativistic":
            values["g_batch_scale"] = 1
        return self if objective == self.objective else replace(self, **values)

    def fit(self, resolution: int, batch_size: int) -> Self:
        """Choose the weights that are open for images of this longer side and batches of this size."""
        gamma = 0.0 if self.objective == "wgangp-eps" else 0.0002 * resolution**2 / batch_size
        weights: dict[str, Any] = {"r1_gamma": gamma, **OBJECTIVES[self.objective].weights}
        return replace(self, **{name: value for name, value in weights.items() if getattr(self, name) is None})
