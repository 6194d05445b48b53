"""Losses and regularisers against closed forms, on linear networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_gan import H, W, batch, make_gan
from torch import nn

from training.config import PRESETS
from training.ema import EMA, EMAConfig
from training.loss import discriminator_logistic, generator_logistic, path_length, r1_penalty
from training.phases import Phase, Updater, build_phases, build_updater


def test_logistic_losses_are_means_of_softplus() -> None:
    gan = make_gan()
    img, c = batch()
    torch.manual_seed(5)
    terms = discriminator_logistic(gan, img, c)
    torch.manual_seed(5)
    fake, _, means = gan.generate(len(img))
    real_logits, fake_logits = gan.D(img, c), gan.D(fake, c)
    expected = (1 + fake_logits.exp()).log().mean() + (1 + (-real_logits).exp()).log().mean()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert terms.means["real_sign"].item() == pytest.approx(real_logits.sign().mean().item())
    torch.testing.assert_close(terms.means["w_avg"], means["w_avg"])

    torch.manual_seed(5)
    terms = generator_logistic(gan, img, c)
    assert terms.loss.item() == pytest.approx((1 + (-fake_logits).exp()).log().mean().item(), rel=1e-10)


def test_r1_of_a_linear_discriminator_has_its_closed_form() -> None:
    gan = make_gan()
    terms = r1_penalty(gan, *batch(), gamma=3.0)
    assert terms.loss.item() == pytest.approx(1.5 * gan.D.a.square().sum().item(), rel=1e-10)
    terms.loss.backward()
    torch.testing.assert_close(gan.D.a.grad, 3.0 * gan.D.a.detach())
    assert gan.D.b.grad is None


def test_r1_differentiates_by_the_image_before_augmentation() -> None:
    gan = make_gan(augment=lambda x: 5 * x)
    terms = r1_penalty(gan, *batch(), gamma=2.0)
    assert terms.loss.item() == pytest.approx(25 * gan.D.a.square().sum().item(), rel=1e-10)


def test_path_length_of_a_linear_generator_has_its_closed_form() -> None:
    """Each of the num_ws styles has the gradient A^T y, so a path length is |A^T y| for the sampled y."""
    gan = make_gan()
    img, c = batch(6)
    torch.manual_seed(9)
    terms = path_length(gan, img, c, weight=2.0, decay=0.25)

    torch.manual_seed(9)
    torch.randn(3, 3)  # z for half of the batch
    torch.randint(10, [3])  # labels for that half
    y = torch.randn(3, 2, H, W, dtype=torch.float64) / math.sqrt(H * W)
    A = gan.G.A.detach().requires_grad_(True)
    lengths = (y.reshape(3, -1) @ A).norm(dim=1)
    mean = 0.7 + 0.25 * (lengths.mean() - 0.7)
    expected = 2 * (lengths - mean).square().mean()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert terms.means["pl_mean"].item() == pytest.approx(lengths.mean().item(), rel=1e-9)
    terms.loss.backward()
    expected.backward()  # gradients also flow through this batch's share of the running mean
    torch.testing.assert_close(gan.G.A.grad, A.grad)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_style_mixing_cutoffs_are_uniform(probability: float) -> None:
    gan = make_gan(style_mixing=probability)
    z, c = torch.ones(1, 3), torch.zeros(1, 0)
    cutoffs = []
    torch.manual_seed(0)
    for _ in range(400):
        ws, mean_w = gan.sample_styles(z, c)
        assert torch.equal(mean_w, torch.full([3], 2.0, dtype=torch.float64))  # the mean of the first z only
        kept = (ws[0] == 2).all(dim=1)
        cutoff = int(kept.sum())
        assert kept[:cutoff].all()
        cutoffs.append(cutoff)
    mixed = [cutoff for cutoff in cutoffs if cutoff < 5]
    assert abs(len(mixed) / 400 - probability) < 0.08
    if probability:
        counts = torch.bincount(torch.tensor(mixed), minlength=5)[1:5]
        assert counts.min() > len(mixed) / 4 * 0.6  # cutoffs 1 to 4 occur about equally often
        assert counts.sum() == len(mixed)


def test_lazy_regularisation_scales_the_settings_of_adam() -> None:
    """The CIFAR configuration has k = 4 for G, 16 for D, lr 0.0025 and betas (0, 0.99)."""
    parameters = [nn.Parameter(torch.zeros(1))]
    config = PRESETS["cifar"].g_optimizer
    g = build_updater(parameters, config, 4).optimizer.param_groups[0]
    d = build_updater(parameters, config, 16).optimizer.param_groups[0]
    assert (g["lr"], g["betas"][1]) == (pytest.approx(0.002), pytest.approx(0.991992, abs=1e-6))
    assert (d["lr"], d["betas"][1]) == (pytest.approx(0.00235294, abs=1e-8), pytest.approx(0.990585, abs=1e-6))
    assert (g["betas"][0], g["eps"]) == (0.0, 1e-8)
    assert build_updater(parameters, config, None).optimizer.param_groups[0]["lr"] == 0.0025


def test_presets_have_the_published_phases() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    updater = Updater(parameters, torch.optim.SGD(parameters, lr=1))

    def phases(preset: str, gamma: float) -> list[tuple[str, int]]:
        from dataclasses import replace

        loss = replace(PRESETS[preset].loss, r1_gamma=gamma)
        built: list[Phase] = build_phases(make_gan(), loss, updater, updater)
        return [(phase.name, phase.interval) for phase in built]

    assert phases("stylegan2", 10) == [("G_main", 1), ("G_reg", 4), ("D_main", 1), ("D_reg", 16)]
    assert phases("cifar", 0.01) == [("G_main", 1), ("D_main", 1), ("D_reg", 16)]
    assert phases("cifar", 0) == [("G_main", 1), ("D_main", 1)]
    phase = Phase("x", updater, lambda img, c: generator_logistic(make_gan(), img, c), interval=4)
    assert [step for step in range(10) if phase.is_due(step)] == [0, 4, 8]


def test_ema_follows_its_closed_form() -> None:
    source: Any = nn.BatchNorm1d(2)
    ema = EMA(source, EMAConfig(kimg=1.0, rampup=0.5))
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(7.0)  # buffers are copied
    ema.update(nimg=400, batch_size=32)  # n = min(1000, 400 / 2)
    beta = 0.5 ** (32 / 200)
    torch.testing.assert_close(ema.module.weight, torch.full([2], 3 + beta * (1 - 3)))
    assert torch.equal(ema.module.running_mean, source.running_mean)

    first = EMA(source, EMAConfig(kimg=1.0, rampup=0.5))
    with torch.no_grad():
        source.weight.fill_(5.0)
    first.update(nimg=0, batch_size=32)  # n = 0 discards the old weights
    assert torch.equal(first.module.weight, source.weight)
