"""Adaptive pseudo augmentation (APA): D's real batch against its equation, its statistic, refused combinations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_gan import H, LinearG, W, batch, make_gan
from torch import Tensor, nn
from training_helpers import every_phase_config

from dnnlib.config import ConfigError
from training.loss import (
    GAN,
    discriminator_hinge,
    discriminator_logistic,
    discriminator_relativistic,
    generator_relativistic,
    r1_penalty,
)
from training.penalties import Estimate


def pseudo_gan(p: float, **changes: Any) -> GAN:
    gan = replace(make_gan(), pseudo_augment=True, **changes)
    gan.augment.p.fill_(p)
    return gan


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("loss", "of_pair"),
    [
        (discriminator_logistic, lambda f, r: (1 + f.exp()).log() + (1 + (-r).exp()).log()),
        (discriminator_hinge, lambda f, r: (1 + f).clamp(min=0) + (1 - r).clamp(min=0)),
        (partial(discriminator_relativistic, gamma=0.0), lambda f, r: (1 + (f - r).exp()).log()),
    ],
    ids=["logistic", "hinge", "relativistic"],
)
def test_d_calls_some_generated_images_real(loss: Callable[..., Any], of_pair: Callable[..., Tensor], p: float) -> None:
    gan, (img, c) = pseudo_gan(p), batch()
    torch.manual_seed(5)
    with torch.no_grad():
        fake, pseudo = gan.generate(6)[0], gan.generate(6)[0]
    replaced = [draw < p for draw in torch.rand(6).tolist()]
    assert sum(replaced) in {0.0: [0], 0.5: range(1, 6), 1.0: [6]}[p]
    real = torch.stack([y if other else x for x, y, other in zip(img, pseudo, replaced, strict=True)])
    expected = of_pair(gan.D(fake, c), gan.D(real, c)).mean()

    torch.manual_seed(5)
    terms = loss(gan, img, c)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.stats["Loss/scores/real"], gan.D(real, c))
    (gradient,) = torch.autograd.grad(expected, gan.D.a)
    terms.loss.backward()
    torch.testing.assert_close(gan.D.a.grad, gradient)
    assert gan.G.A.grad is None  # the generated images are constants


class Square(nn.Module):
    """Discriminator D(x) = |x|^2 / 2, with gradient x, that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        self.seen.append((img.detach(), c))
        return img.square().sum(dim=(1, 2, 3))[:, None] / 2


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_r1_penalises_the_images_that_d_calls_real(p: float) -> None:
    gan, (img, c) = pseudo_gan(p, D=Square()), batch()
    torch.manual_seed(5)
    real = gan.generate(6)[0].detach() if p else img
    torch.manual_seed(5)
    squared_norms = r1_penalty(gan, img, c, gamma=1.0).stats["Loss/r1_penalty"]
    torch.testing.assert_close(squared_norms, real.square().sum(dim=(1, 2, 3)))

    torch.manual_seed(5)
    real = gan.generate(3)[0].detach() if p else img[:3]
    torch.manual_seed(5)
    r1_penalty(gan, img, c, gamma=1.0, estimate=Estimate(share=0.5, sigma=0.01))
    torch.testing.assert_close(gan.D.seen[-1][0][:3], real)  # then the perturbed copies


class LabelledG(LinearG):
    """Generator of images that depend only on the label."""

    c_dim = 1

    def mapping(self, z: Tensor, c: Tensor) -> Tensor:
        return c.double()[:, None].expand(-1, self.num_ws, 3)


def test_replaced_images_keep_their_labels() -> None:
    G, c = LabelledG(), torch.arange(6.0)[:, None]
    gan = pseudo_gan(1.0, G=G, D=Square(), labels=torch.full([10, 1], 99.0))
    discriminator_logistic(gan, torch.zeros(6, 2, H, W), c)
    ((images, labels),) = gan.D.seen
    assert torch.equal(labels, torch.cat([torch.full([6, 1], 99.0), c]))
    torch.testing.assert_close(images, G.synthesis(G.mapping(c, labels), "random").detach())


@pytest.mark.parametrize("p", [0.1, 0.4, 0.7])
@pytest.mark.parametrize(
    ("loss", "change"), [(discriminator_logistic, 2), (partial(discriminator_relativistic, gamma=0.0), 1)]
)
def test_replaced_images_lower_the_sign_of_a_perfect_d(loss: Callable[..., Any], change: int, p: float) -> None:
    """The mean sign is 1 - 2 p; on pairs 1 - p, because both images of a replaced pair are generated.

    The number of replaced images is binomial; it stays within four standard deviations of its mean.
    """
    gan, count = pseudo_gan(p), 4000
    zeros = torch.zeros(count, 2, H, W, dtype=torch.float64)
    gan = replace(gan, D=lambda x, c: 1 - 2 * (x != 0).any(dim=(1, 2, 3)).double()[:, None])
    sign = loss(gan, zeros, torch.zeros(count, 0)).means["real_sign"].item()
    assert abs((1 - sign) / change - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_g_is_compared_with_real_images_only() -> None:
    (img, c), losses = batch(), []
    for gan in (make_gan(), pseudo_gan(1.0)):
        torch.manual_seed(5)
        losses.append(generator_relativistic(gan, img, c).loss.item())
    assert losses[0] == losses[1]


def test_the_number_of_draws_does_not_depend_on_p() -> None:
    states = []
    for p in (0.0, 1.0):
        gan, (img, c) = pseudo_gan(p), batch()
        discriminator_logistic(gan, img, c)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"loss__bcr_real": 10.0}, "loss.bcr_real", "--aug=apa has none"),
        ({"loss__bcr_fake": 10.0}, "loss.bcr_fake", "--aug=apa has none"),
        (
            {"loss__objective": "relativistic", "loss__r1_interval": None, "augment__paired": True},
            "augment.paired",
            "--aug=apa does not transform images",
        ),
        (
            {"loss__objective": "wgangp-eps", "loss__r1_gamma": None, "loss__r1_interval": None},
            "augment.mode",
            "only scales the loss of wgangp-eps by 1 - p",
        ),
    ],
)
def test_meaningless_combinations_are_refused(shapes_zip: Path, changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        every_phase_config(shapes_zip, augment__mode="apa", **changes)
    assert caught.value.field == field
