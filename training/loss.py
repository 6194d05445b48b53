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
from training.augment.pipe import AugmentPipe
from training.dataset import encode_labels
from training.networks import execution
from training.penalties import Estimate, gradient_penalty, groups, squared_differences, squared_gradients
from training.regularisers import LogitMeans, consistency, lecam


@dataclass
class LossTerms:
    """Return value of a loss: the scalar to minimise, values to report, and batch means that drive running state."""

    loss: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Tensor, Tensor], LossTerms]  # (real images, repeated for all RGB heads; labels) -> terms
Losses = tuple[Loss, Loss]  # losses of G_main and D_main


@dataclass
class GAN:
    """Networks and state that the losses use. Generated images use the labels of randomly drawn training images."""

    G: Any  # a generator: mapping, synthesis, z_dim, c_dim, num_ws
    D: Any  # a discriminator: D(img, c) -> logits (B, 1)
    augment: AugmentPipe
    labels: Tensor  # labels of all training images: class indices (items,) or vectors (items, c_dim)
    style_mixing: float
    pl_mean: Tensor  # scalar: running mean of the path length
    num_rgb_heads: int = 1  # of G: number of images per latent in D's input
    group_size: int = 0  # of D, see DiscriminatorConfig.group_size
    paired_augment: bool = False  # the same augmentation for the two images of a pair
    pseudo_augment: bool = False  # see `reals`
    logit_means: LogitMeans = field(default_factory=LogitMeans)  # for LeCam regularisation
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
        return self.scheduled.setdefault(value, torch.full([], value.at(0), device=self.labels.device))

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

    def generate(self, count: int, c: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return generated images of all RGB heads, their labels (c; random if c is None) and means of running state.

        The means are the mean w (`w_avg`) and, of a generator that normalises the inputs of its layers by running
        means, the mean squares of these inputs (`input_magnitudes`).
        """
        z, drawn = self.sample_latents(count)
        c = drawn if c is None else c
        ws, mean_w = self.sample_styles(z, c)
        magnitudes: list[Tensor] | None = [] if hasattr(self.G.synthesis, "input_magnitudes") else None
        with execution.using(all_rgb_heads=True, magnitudes=magnitudes):
            images = self.synthesize(ws, noise_mode="random")
        means = {"w_avg": mean_w} | ({"input_magnitudes": magnitudes[0]} if magnitudes else {})
        return images, c, means

    def repeat_for_rgb_heads(self, img: Tensor) -> Tensor:
        """Repeat real images (B, C, H, W) for every RGB head of G, as in D's input: (B, num_rgb_heads C, H, W)."""
        return img if self.num_rgb_heads == 1 else torch.cat([img] * self.num_rgb_heads, dim=1)

    def reals(self, img: Tensor, c: Tensor) -> Tensor:
        """Return the images that D learns to call real: `img` (B, num_rgb_heads C, H, W), with labels c (B, c_dim).

        With `pseudo_augment`, each image is replaced with probability augment.p by a generated image with the same
        label, from its own latent and without gradients to G (APA: Jiang et al. 2021, "Deceive D"). As many images are
        generated as there are in `img` whatever p, so p stays on the device.
        """
        if not self.pseudo_augment:
            return img
        with torch.no_grad():
            fake, _, _ = self.generate(len(img), c)
        is_replaced = torch.rand([len(img), 1, 1, 1], device=img.device) < self.augment.p
        return torch.where(is_replaced, fake, img)

    def logits(self, img: Tensor, c: Tensor, values: list[Tensor] | None = None) -> Tensor:
        """Return D's logits for images with the augmentation parameters `values`; None: random parameters."""
        return self.discriminate(self.augment(img, values), c)

    def augmentation_of_pairs(self, images: Tensor) -> list[Tensor]:
        """Return random augmentation parameters for pairs: B images, then the other images of the B pairs."""
        if self.paired_augment:
            return [values.repeat(2, *[1] * (values.dim() - 1)) for values in self.augment.draw(images.chunk(2)[0])]
        with execution.using(minibatches=2):
            return self.augment.draw(images)

    def fake_and_real_logits(self, fake: Tensor, fake_c: Tensor, real: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return `logits` for equal numbers of generated and real images, which pass through D as one batch."""
        with execution.using(minibatches=2):
            fake_logits, real_logits = self.logits(torch.cat([fake, real]), torch.cat([fake_c, c])).chunk(2)
        return fake_logits, real_logits


def generator_logistic(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """softplus(-D(T(G(z)))): the non-saturating logistic loss (Goodfellow et al. 2014) under augmentation T."""
    fake, fake_c, means = gan.generate(batch_scale * len(img))
    logits = gan.logits(fake, fake_c)
    return _generator_terms(F.softplus(-logits).mean(), logits, means)


def discriminator_logistic(gan: GAN, img: Tensor, c: Tensor, lecam_weight: float = 0.0) -> LossTerms:
    """softplus(D(T(G(z)))) + softplus(-D(T(x)))."""
    fake_logits, real_logits, direction, means = _fake_and_real_logits(gan, img, c)
    loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    terms = _discriminator_terms(loss, real_logits, real_logits, means, direction)
    return _add_lecam(terms, gan, fake_logits, real_logits, lecam_weight) if lecam_weight else terms


def generator_linear(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """-D(T(G(z))): the generator loss of the hinge and Wasserstein objectives."""
    fake, fake_c, means = gan.generate(batch_scale * len(img))
    logits = gan.logits(fake, fake_c)
    return _generator_terms(-logits.mean(), logits, means)


def generator_wgan(gan: GAN, img: Tensor, c: Tensor, batch_scale: int = 1) -> LossTerms:
    """-D(T(G(z))). A critic has no decision threshold, so signs are not reported."""
    return _omit_signs(generator_linear(gan, img, c, batch_scale))


def discriminator_hinge(gan: GAN, img: Tensor, c: Tensor, lecam_weight: float = 0.0) -> LossTerms:
    """max(0, 1 + D(T(G(z)))) + max(0, 1 - D(T(x))) (Lim & Ye 2017)."""
    fake_logits, real_logits, direction, means = _fake_and_real_logits(gan, img, c)
    loss = F.relu(1 + fake_logits).mean() + F.relu(1 - real_logits).mean()
    terms = _discriminator_terms(loss, real_logits, real_logits, means, direction)
    return _add_lecam(terms, gan, fake_logits, real_logits, lecam_weight) if lecam_weight else terms


def discriminator_wgan(gan: GAN, img: Tensor, c: Tensor, gp_weight: float, drift_weight: float) -> LossTerms:
    """E[D(T(G(z)))] - E[D(T(x))] + gp_weight E[(|grad D(u)| - 1)^2] + drift_weight E[D(T(x))]^2.

    u is a uniform interpolate of an augmented real image and an augmented generated image with the same label
    (Gulrajani et al. 2017). D is evaluated on u without further augmentation. The drift term keeps logits near zero:
    Karras et al. 2018 square each logit; here, as in TransGAN, the mean logit of the micro-batch is squared.
    """
    with torch.no_grad():
        fake, _, means = gan.generate(len(img), c)
    with execution.using(minibatches=2):
        with torch.no_grad():
            images = gan.augment(torch.cat([fake, img]))
        fake_logits, real_logits = gan.discriminate(images, c.repeat(2, 1)).chunk(2)
    fake, real = images.chunk(2)
    penalty = gradient_penalty(gan, real, fake, c)
    mean_real = real_logits.mean()
    loss = fake_logits.mean() - mean_real + gp_weight * penalty.mean() + drift_weight * mean_real.square()
    terms = _discriminator_terms(loss, real_logits, real_logits - fake_logits, means)
    terms.stats["Loss/gradient_penalty"] = penalty
    return terms


def generator_relativistic(gan: GAN, img: Tensor, c: Tensor) -> LossTerms:
    """softplus(D(T(x)) - D(T(G(z)))) on pairs with the same labels (Jolicoeur-Martineau 2019; Huang et al. 2024)."""
    fake, _, means = gan.generate(len(img), c)
    values = gan.augment.draw(img) if gan.paired_augment else None
    with torch.no_grad():
        real_logits = gan.logits(img, c, values)
    logits = gan.logits(fake, c, values)
    return _omit_signs(_generator_terms(F.softplus(real_logits - logits).mean(), logits, means))


def discriminator_relativistic(
    gan: GAN, img: Tensor, c: Tensor, gamma: float | Tensor, estimate: Estimate | None = None, centring: float = 0.0
) -> LossTerms:
    """softplus(f - r) + gamma/2 (R1 + R2) + centring E[(r + f)^2], with f = D(T(G(z))) and r = D(T(x)) of a pair.

    R1 and R2 in every step: Huang et al. 2024, "The GAN is dead; long live the GAN!". With an `estimate`, R1 and R2 are
    estimated by finite differences; they are omitted if gamma is the number 0. The centring term keeps the logits of
    pairs, whose common shift has no effect on the loss, near zero (Lin et al. 2025, "Adversarial flow models").
    """
    with torch.no_grad():
        fake, _, means = gan.generate(len(img), c)
        images, labels = torch.cat([fake, gan.reals(img, c)]), c.repeat(2, 1)
        values = gan.augmentation_of_pairs(images)
    if not isinstance(gamma, Tensor) and gamma == 0:
        with execution.using(minibatches=2):
            (fake_logits, real_logits), penalties = gan.logits(images, labels, values).chunk(2), None
    else:
        penalise = squared_gradients if estimate is None else partial(squared_differences, estimate=estimate)
        (fake_logits, real_logits), penalties = penalise(gan, images, labels, values, minibatches=2)

    loss = F.softplus(fake_logits - real_logits).mean()
    stats: dict[str, Tensor] = {}
    if penalties is not None:
        fake_penalty, real_penalty = penalties
        loss = loss + gamma / 2 * (real_penalty + fake_penalty).mean()
        stats |= {"Loss/r1_penalty": real_penalty, "Loss/r2_penalty": fake_penalty}
    if centring:
        stats["Loss/centring"] = (real_logits + fake_logits).square()
        loss = loss + centring * stats["Loss/centring"].mean()
    terms = _discriminator_terms(loss, real_logits, real_logits - fake_logits, means)
    return replace(terms, stats=terms.stats | stats)


def _fake_and_real_logits(gan: GAN, img: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """Return D's logits for as many generated as real images, the loss of a SlicingHead's direction, and G's means.

    The loss of the direction is E[D(T(G(z)))] - E[D(T(x))], with gradients to the direction only (Takida et al. 2024);
    it is None if D has no SlicingHead.
    """
    with torch.no_grad():
        fake, fake_c, means = gan.generate(len(img))
    real = gan.reals(img, c)
    with execution.using(slicing=True):
        fake_logits, real_logits = gan.fake_and_real_logits(fake, fake_c, real, c)
    if fake_logits.shape[1] == 1:
        return fake_logits, real_logits, None, means
    direction = fake_logits[:, 1].mean() - real_logits[:, 1].mean()
    return fake_logits[:, :1], real_logits[:, :1], direction, means


def _generator_terms(loss: Tensor, logits: Tensor, means: dict[str, Tensor]) -> LossTerms:
    stats = {"Loss/G/loss": loss, "Loss/scores/fake": logits, "Loss/signs/fake": logits.sign()}
    return LossTerms(loss, stats, means)


def _omit_signs(terms: LossTerms) -> LossTerms:
    """Drop the sign statistic: where D only compares images, the sign of a single logit is meaningless."""
    stats = {name: value for name, value in terms.stats.items() if name != "Loss/signs/fake"}
    return replace(terms, stats=stats)


def _discriminator_terms(
    loss: Tensor, real_logits: Tensor, margins: Tensor, means: dict[str, Tensor], direction: Tensor | None = None
) -> LossTerms:
    """Return the terms of a discriminator loss; `margins` are positive where D is correct about a real image.

    The margin is the logit of the real image. Where D only compares images, the margin is the logit of the real image
    minus the logit of a generated image. ADA is controlled by the mean sign of the margins. `direction` is minimised
    too but not reported as part of the loss, because its value is a difference of logits.
    """
    signs = margins.detach().sign()
    stats = {"Loss/D/loss": loss, "Loss/scores/real": real_logits, "Loss/signs/real": signs}
    total = loss if direction is None else loss + direction
    return LossTerms(total, stats, means | {"real_sign": signs.mean()})


def _add_lecam(terms: LossTerms, gan: GAN, fake_logits: Tensor, real_logits: Tensor, weight: float) -> LossTerms:
    """Return D's terms plus weighted LeCam regularisation, with the batch means that update its averages."""
    distance = lecam(real_logits, fake_logits, gan.logit_means)
    means = torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()])
    loss = terms.loss + weight * distance
    return LossTerms(loss, terms.stats | {"Loss/lecam": distance}, terms.means | {"logits": means})


def add_consistency(loss: Loss, gan: GAN, real_weight: float, fake_weight: float, img: Tensor, c: Tensor) -> LossTerms:
    """Return the terms of D's `loss` plus weighted consistency of its logits under augmentation."""
    terms = loss(img, c)
    of_real, of_fake = consistency(gan, img, c)
    stats = terms.stats | {"Loss/consistency_real": of_real, "Loss/consistency_fake": of_fake}
    total = terms.loss + real_weight * of_real.mean() + fake_weight * of_fake.mean()
    return replace(terms, loss=total, stats=stats)


def r1_penalty(gan: GAN, img: Tensor, c: Tensor, gamma: float | Tensor, estimate: Estimate | None = None) -> LossTerms:
    """gamma/2 E[|grad_x D(T(x))|^2] on real images x before the augmentation T (Mescheder et al. 2018).

    With an `estimate`, the squared norm is estimated by finite differences. With APA, x includes generated images, as
    in D_main (`GAN.reals`), because R1 makes D flat on the distribution that D learns to call real.
    """
    if estimate is None:
        img = gan.reals(img, c)
        _, (squared_norm,) = squared_gradients(gan, img, c, gan.augment.draw(img))
    else:
        chosen = groups(torch.arange(len(img), device=img.device), gan.group_size)
        chosen = chosen[: estimate.count(len(chosen))].t().flatten()  # a minibatch of some of the groups
        c, estimate = c[chosen], replace(estimate, share=1.0)
        img = gan.reals(img[chosen], c)
        _, (squared_norm,) = squared_differences(gan, img, c, gan.augment.draw(img), estimate=estimate)
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
    return g_loss, partial(discriminator_logistic, gan, lecam_weight=config.lecam)


def _hinge(gan: GAN, config: LossConfig) -> Losses:
    g_loss = partial(generator_linear, gan, batch_scale=config.g_batch_scale)
    return g_loss, partial(discriminator_hinge, gan, lecam_weight=config.lecam)


def _wgangp_eps(gan: GAN, config: LossConfig) -> Losses:
    g_loss = partial(generator_wgan, gan, batch_scale=config.g_batch_scale)
    gp_weight, drift_weight = _resolved(config, "gp_weight"), _resolved(config, "drift_weight")
    return g_loss, partial(discriminator_wgan, gan, gp_weight=gp_weight, drift_weight=drift_weight)


def _relativistic(gan: GAN, config: LossConfig) -> Losses:
    d_loss = partial(
        discriminator_relativistic,
        gan,
        gamma=gan.weight(_resolved(config, "r1_gamma")),
        estimate=config.estimate,
        centring=config.centring,
    )
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
SLICING = ("logistic", "hinge")  # objectives for which SAN defines the loss of the direction
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
    penalty: str = setting(
        "exact",
        "R1 and R2 from second derivatives, or estimated by finite differences of logits.",
        choices=("exact", "estimate"),
    )
    penalty_share: float | None = setting(
        None, "Share of the images used by the estimate of R1 and R2; None: 1.", auto=True, above=0, at_most=1
    )
    penalty_sigma: float | None = setting(
        None,
        "Std of the perturbation in the estimate of R1 and R2; None: 0.01, or 0.02 with bf16.",
        auto=True,
        at_least=1e-5,
        at_most=1,
        note="images lie in [-1, 1], and float32 rounds smaller perturbations away",
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
    centring: float = setting(
        0.0, "Weight of the squared sum of a pair's logits (relativistic).", at_least=0, note="0 turns the term off"
    )
    bcr_real: float = setting(
        0.0, "Weight of the consistency of D(x) and D(T(x)) (bCR) for real images.", at_least=0, note=OFF
    )
    bcr_fake: float = setting(
        0.0, "Weight of the consistency of D(x) and D(T(x)) (bCR) for generated images.", at_least=0, note=OFF
    )
    lecam: float = setting(0.0, "Weight of LeCam regularisation (logistic, hinge).", at_least=0, note=OFF)
    fresh_reals: bool = setting(False, "Compare generated images with real images that D's step did not use.")
    d_first: bool = setting(False, "Update the discriminator before the generator in every step.")

    def __post_init__(self) -> None:
        check_bounds(self)
        self._check_objective()
        self._check_penalty()

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
        if self.lecam and self.objective not in LAZY_R1:
            problem = f"only the logits of --loss={' and '.join(LAZY_R1)} have a level to regularise; omit it"
            raise ConfigError("lecam", self.lecam, problem)
        for name in ("centring", "fresh_reals"):
            if getattr(self, name) and self.objective != "relativistic":
                raise ConfigError(name, getattr(self, name), "applies to --loss=relativistic only; omit it")

    def _check_penalty(self) -> None:
        """Raise ConfigError for settings of the estimate that have no effect."""
        if self.penalty == "exact":
            for name in ("penalty_share", "penalty_sigma"):
                if getattr(self, name) is not None:
                    problem = "has no effect on the exact penalty: omit it, or give loss.penalty=estimate"
                    raise ConfigError(name, getattr(self, name), problem)
        elif self.objective == "wgangp-eps":
            problem = "wgangp-eps has its own penalty: the estimate needs --loss=logistic, hinge or relativistic"
            raise ConfigError("penalty", self.penalty, problem)
        elif self.r1_gamma == 0 or (self.objective in LAZY_R1 and self.r1_interval is None):
            without_r1 = "r1_gamma=0" if self.r1_gamma == 0 else "r1_interval=none"
            problem = f"has no effect with loss.{without_r1}, which turns R1 off; omit it"
            raise ConfigError("penalty", self.penalty, problem)

    @property
    def estimate(self) -> Estimate | None:
        """Settings of the estimate of R1 and R2; None with exact penalties."""
        if self.penalty == "exact":
            return None
        return Estimate(share=_resolved(self, "penalty_share"), sigma=_resolved(self, "penalty_sigma"))

    def with_objective(self, objective: str) -> Self:
        """Return this configuration with another objective, without the settings that only the old objective uses."""
        values: dict[str, Any] = {"objective": objective, "gp_weight": None, "drift_weight": None}
        if (objective in LAZY_R1) != (self.objective in LAZY_R1):
            values["r1_interval"] = 16 if objective in LAZY_R1 else None
        if "wgangp-eps" in (objective, self.objective):
            values["r1_gamma"] = None
        if objective not in LAZY_R1:
            values["lecam"] = 0.0
        if objective == "wgangp-eps":
            values |= {"penalty": "exact", "penalty_share": None, "penalty_sigma": None}
        if objective == "relativistic":
            values["g_batch_scale"] = 1
        else:
            values |= {"centring": 0.0, "fresh_reals": False}
        return self if objective == self.objective else replace(self, **values)

    def fit(self, resolution: int, batch_size: int, precision: str = "fp32") -> Self:
        """Fill in weights that are None; `resolution` is the longer side of the images.

        bfloat16 is too coarse for differences over a perturbation of 0.01; see the bias in docs/objectives.md.
        """
        gamma = 0.0 if self.objective == "wgangp-eps" else 0.0002 * resolution**2 / batch_size
        weights: dict[str, Any] = {"r1_gamma": gamma, **OBJECTIVES[self.objective].weights}
        if self.penalty == "estimate":
            weights |= {"penalty_share": 1.0, "penalty_sigma": 0.02 if precision == "bf16" else 0.01}
        return replace(self, **{name: value for name, value in weights.items() if getattr(self, name) is None})
