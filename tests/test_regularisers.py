"""LeCam and consistency regularisation: equations, averages, exact resuming, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from linear_gan import batch, make_gan
from training_helpers import every_phase_config, new_trainer, saved_state, train_steps, train_with_a_break

from dnnlib.config import ConfigError
from torch_utils.checkpoint import digest
from training import regularisers
from training.loss import LossConfig, discriminator_hinge, discriminator_logistic
from training.phases import Updater, build_phases


@pytest.mark.parametrize("loss", [discriminator_logistic, discriminator_hinge])
def test_lecam_adds_squared_distances_to_the_averages(loss: type) -> None:
    gan, (img, c) = make_gan(), batch()
    gan.logit_means.values.copy_(torch.tensor([0.5, -2.0]))
    torch.manual_seed(5)
    fake = gan.generate(6)[0].detach()
    real_logits, fake_logits = gan.D(img, c)[:, 0].tolist(), gan.D(fake, c)[:, 0].tolist()
    distance = (
        sum(max(0.0, r + 2.0) ** 2 for r in real_logits) / 6 + sum(max(0.0, 0.5 - f) ** 2 for f in fake_logits) / 6
    )
    found = []
    for steps in (regularisers.FIRST_STEP - 1, regularisers.FIRST_STEP):
        gan.logit_means.steps.fill_(steps)
        torch.manual_seed(5)
        found.append(loss(gan, img, c, lecam_weight=0.3))
    torch.manual_seed(5)
    plain = loss(gan, img, c).loss.item()
    assert [terms.loss.item() for terms in found] == pytest.approx([plain, plain + 0.3 * distance])
    assert found[1].stats["Loss/lecam"].item() == pytest.approx(distance)
    expected = [sum(real_logits) / 6, sum(fake_logits) / 6]
    assert found[1].means["logits"].tolist() == pytest.approx(expected)


def test_averages_of_logits_skip_steps_that_are_not_finite() -> None:
    means = regularisers.LogitMeans()
    means.update(torch.tensor([1.0, -1.0]), torch.tensor(False))
    means.update(torch.tensor([float("inf"), 0.0]), torch.tensor(True))
    means.update(torch.tensor([3.0, 0.0]), torch.tensor(False))
    assert means.values.tolist() == pytest.approx([0.01 * 0.99 + 0.03, -0.01 * 0.99])
    assert means.steps == 2


def test_resuming_with_lecam_is_exact(shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regularisers, "FIRST_STEP", 2)
    config = every_phase_config(shapes_zip, loss__lecam=0.1)
    straight = new_trainer(config)
    train_steps(straight, 3)
    resumed = train_with_a_break(config, 2, 1, tmp_path)
    assert straight.gan.logit_means.values.abs().min() > 0
    assert digest(saved_state(resumed)) == digest(saved_state(straight))


@pytest.mark.parametrize("objective", ["wgangp-eps", "relativistic"])
def test_lecam_needs_logits_with_a_fixed_level(objective: str) -> None:
    with pytest.raises(ConfigError, match="only the logits of --loss=logistic and hinge"):
        LossConfig(objective=objective, r1_interval=None, lecam=0.1)
    assert LossConfig(lecam=0.1).with_objective(objective).lecam == 0


def test_consistency_compares_images_with_their_augmentation() -> None:
    """For <a, x> + b and T(x) = 3 x, the difference of the logits is 2 <a, x>."""
    gan, (img, c) = make_gan(augment=lambda x: 3 * x), batch()
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    updater = Updater(parameters, torch.optim.SGD(parameters, lr=1))
    plain, total = (
        next(phase for phase in build_phases(gan, config.fit(32, 6), updater, updater) if phase.name == "D_main")
        for config in (LossConfig(), LossConfig(bcr_real=10.0, bcr_fake=7.0))
    )
    torch.manual_seed(5)
    expected = plain.loss(img, c).loss
    fake = gan.generate(6)[0].detach()
    of_real, of_fake = ((2 * (gan.D(x, c) - gan.D.b)).square() for x in (img, fake))
    torch.manual_seed(5)
    terms = total.loss(img, c)
    torch.testing.assert_close(terms.loss, expected + 10 * of_real.mean() + 7 * of_fake.mean())
    torch.testing.assert_close(terms.stats["Loss/consistency_real"], of_real)
    torch.testing.assert_close(terms.stats["Loss/consistency_fake"], of_fake)


@pytest.mark.parametrize(("mode", "p"), [("noaug", None), ("fixed", 0.0)])
def test_consistency_needs_an_augmentation(shapes_zip: Path, mode: str, p: float | None) -> None:
    option = "--aug=noaug" if mode == "noaug" else "--p=0"
    with pytest.raises(ConfigError, match=f"{option} has none") as caught:
        every_phase_config(shapes_zip, loss__bcr_fake=1.0, augment__mode=mode, augment__p=p)
    assert caught.value.field == "loss.bcr_fake"
