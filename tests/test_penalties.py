"""Estimated penalties, centring, paired augmentation, fresh reals, and D before G."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from linear_gan import H, LinearD, W, batch, make_gan
from small_families import small_train_config
from torch import Tensor, nn
from training_helpers import every_phase_config, new_trainer, saved_state, train_steps, train_with_a_break

import train
from dnnlib.config import ConfigError
from torch_utils.checkpoint import digest
from training.augment.diffaugment import DIFFAUG
from training.augment.pipe import AugmentConfig, AugmentPipe
from training.config import PRESETS, apply_options
from training.dataset import EpochSampler
from training.loss import GAN, LossConfig, discriminator_relativistic, generator_relativistic, r1_penalty
from training.networks import attention, execution
from training.networks.layers import MinibatchStd
from training.penalties import Estimate, squared_differences, squared_gradients
from training.phases import Phase

ALL = Estimate(share=1.0, sigma=0.01)


def with_discriminator(D: nn.Module, augment: AugmentPipe | None = None, group_size: int = 0) -> GAN:
    gan = replace(make_gan(), D=D, group_size=group_size)
    return gan if augment is None else replace(gan, augment=augment)


def test_the_estimate_is_exact_for_a_linear_discriminator() -> None:
    """The squared difference of <a, x> is <a, n>^2, whose mean is |a|^2."""
    gan, (img, c) = make_gan(), batch(10_000)
    torch.manual_seed(3)
    noise = torch.randn_like(img)
    torch.manual_seed(3)
    (logits,), (found,) = squared_differences(gan, img, c, [], estimate=ALL)
    torch.testing.assert_close(logits, gan.D(img, c))
    torch.testing.assert_close(found, (gan.D.a * noise).sum(dim=(1, 2, 3)).square(), rtol=1e-8, atol=1e-10)
    assert found.mean().item() == pytest.approx(gan.D.a.square().sum().item(), rel=0.03)


class Curved(nn.Module):
    """Discriminator with curvature: <v, tanh(M x)>."""

    def __init__(self) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.randn(16, 2 * H * W, dtype=torch.float64) / 4)
        self.v = nn.Parameter(torch.randn(16, 1, dtype=torch.float64))

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        return (img.flatten(1) @ self.M.T).tanh() @ self.v


@pytest.mark.parametrize("sigma", [1e-3, 1e-2])
def test_the_estimate_is_unbiased_within_three_percent(sigma: float) -> None:
    """The penalty of four images and its gradient, as means over 4000 draws."""
    torch.manual_seed(0)
    gan, (img, c) = with_discriminator(Curved()), batch(4)
    _, (exact,) = squared_gradients(gan, img, c, [])
    repeated = img.repeat(4000, 1, 1, 1)
    estimate = Estimate(share=1.0, sigma=sigma)
    _, (found,) = squared_differences(gan, repeated, c.repeat(4000, 1), [], estimate=estimate)
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.03)
    expected, gradient = (torch.autograd.grad(x.mean(), gan.D.M)[0] for x in (exact, found))
    assert (gradient - expected).norm() < 0.1 * expected.norm()


def every_augmentation() -> list[AugmentConfig]:
    return [
        AugmentConfig(mode="fixed", p=0.8, pipe="bgcfnc"),
        AugmentConfig(mode="diffaug", policy=tuple(DIFFAUG), filter_p=0.7, hue_p=0.7, cutout_p=0.5),
    ]


class Linear(nn.Module):
    """Linear discriminator of images (3, 24, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 24, 24, dtype=torch.float64))

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        return (img * self.a).sum(dim=(1, 2, 3))[:, None]


@pytest.mark.parametrize("config", every_augmentation(), ids=lambda config: config.mode)
def test_both_terms_of_a_difference_have_the_same_augmentation(config: AugmentConfig) -> None:
    """Every transform is affine in the image, so the difference quotient does not depend on sigma."""
    gan = with_discriminator(Linear(), AugmentPipe(config, (3, 24, 24)))
    img, c = torch.randn(8, 3, 24, 24, dtype=torch.float64), torch.zeros(8, 0)
    found = []
    for sigma in (1e-3, 1.0):
        torch.manual_seed(2)
        with execution.using(minibatches=2):
            values = gan.augment.draw(img)
        _, parts = squared_differences(gan, img, c, values, 2, estimate=Estimate(share=0.5, sigma=sigma))
        assert [part.shape for part in parts] == [(2,), (2,)]
        found.append(torch.cat(parts))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert found[0].min() > 0


class Grouped(LinearD):
    """Discriminator whose logits depend on the standard deviation of their minibatch-std group."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.mbstd = MinibatchStd(group_size)

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        return super().forward(img, c) + 5 * self.mbstd(img)[:, -1, :1, 0] + c.double()


@pytest.mark.parametrize(("group_size", "share"), [(2, 0.4), (2, 1.0), (8, 1.0)])
def test_perturbed_images_keep_the_members_of_their_group(group_size: int, share: float) -> None:
    """The reference evaluates each group alone; image b of 6 belongs to group b mod 3, or to the only group."""
    gan = with_discriminator(Grouped(group_size), group_size=group_size)
    img = torch.randn(12, 2, H, W, dtype=torch.float64)
    c = torch.arange(12.0)[:, None]
    torch.manual_seed(4)
    logits, squares = squared_differences(gan, img, c, [], 2, estimate=Estimate(share=share, sigma=0.1))

    num_groups = 3 if group_size == 2 else 1
    groups = [[6 * m + b for b in range(g, 6, num_groups)] for m in range(2) for g in range(num_groups)]
    expected = torch.cat([gan.D(img[group], c[group]) for group in groups])
    torch.testing.assert_close(torch.cat(logits), expected)
    perturbed = [group for i, group in enumerate(groups) if i % num_groups < share * num_groups - 0.9]
    torch.manual_seed(4)
    noise = torch.randn(sum(map(len, perturbed)), 2, H, W, dtype=torch.float64).split(len(groups[0]))
    differences = [
        gan.D(img[group] + 0.1 * n, c[group]) - gan.D(img[group], c[group])
        for group, n in zip(perturbed, noise, strict=True)
    ]
    assert len(perturbed) == (2 if share < 1 else 2 * num_groups)
    torch.testing.assert_close(torch.cat(squares), torch.cat(differences)[:, 0].square() / 0.01)


def test_lazy_r1_perturbs_whole_groups() -> None:
    gan = with_discriminator(Grouped(2), group_size=2)
    img, c = torch.randn(6, 2, H, W, dtype=torch.float64), torch.arange(6.0)[:, None]
    torch.manual_seed(4)
    terms = r1_penalty(gan, img, c, gamma=3.0, estimate=Estimate(share=0.7, sigma=0.1))
    torch.manual_seed(4)
    noise = torch.randn(4, 2, H, W, dtype=torch.float64).split(2)
    expected = torch.cat(
        [
            (gan.D(img[group] + 0.1 * n, c[group]) - gan.D(img[group], c[group])).square() / 0.01
            for group, n in zip(([0, 3], [1, 4]), noise, strict=True)
        ]
    )
    torch.testing.assert_close(terms.stats["Loss/r1_penalty"], expected[:, 0])
    torch.testing.assert_close(terms.loss, 1.5 * expected.mean())


@pytest.mark.parametrize("gamma", [3.0, torch.tensor(3.0), 0.0], ids=["number", "tensor", "zero"])
def test_relativistic_loss_with_estimate_and_centring(gamma: Any) -> None:
    gan, (img, c) = make_gan(), batch()
    torch.manual_seed(5)
    fake = gan.generate(6, c)[0].detach()
    noise = torch.randn(12, 2, H, W, dtype=torch.float64)
    f, r = gan.D(fake, c), gan.D(img, c)
    slopes = (noise * gan.D.a).sum(dim=(1, 2, 3)).square()
    expected = (1 + (f - r).exp()).log().mean() + 0.7 * (r + f).square().mean()
    expected = expected + gamma / 2 * (slopes[:6].mean() + slopes[6:].mean())
    torch.manual_seed(5)
    terms = discriminator_relativistic(gan, img, c, gamma=gamma, estimate=ALL, centring=0.7)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.stats["Loss/centring"], (r + f).square())
    assert ("Loss/r1_penalty" in terms.stats) == bool(gamma)
    gradients = [torch.autograd.grad(x, (gan.D.a, gan.D.b)) for x in (terms.loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


class Seen(nn.Module):
    """Discriminator that records the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        self.images += img.detach().split(4)
        return img.square().sum(dim=(1, 2, 3))[:, None]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("config", every_augmentation(), ids=lambda config: config.mode)
def test_pairs_share_their_augmentation(config: AugmentConfig, paired: bool) -> None:
    """If the generated image equals the real one, the augmented images are equal as well."""
    img, c = torch.randn(4, 3, 24, 24), torch.zeros(4, 0)
    gan: Any = replace(with_discriminator(Seen(), AugmentPipe(config, (3, 24, 24))), paired_augment=paired)
    gan.generate = lambda count, labels: (img, labels, {"w_avg": torch.zeros(3)})
    generator_relativistic(gan, img, c)
    discriminator_relativistic(gan, img, c, gamma=1.0)
    discriminator_relativistic(gan, img, c, gamma=1.0, estimate=Estimate(share=1.0, sigma=1e-30))
    seen = gan.D.images
    assert len(seen) == 8
    assert not torch.equal(seen[0], img)
    assert not torch.equal(seen[0], seen[2])  # each step draws anew
    assert [torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True)] == [paired] * 4


@pytest.mark.parametrize("objective", ["logistic", "hinge", "relativistic"])
def test_no_phase_of_d_takes_second_derivatives(
    shapes_zip: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the estimate, attention uses the fused kernel, and no gradient has a graph of its own."""
    changes = {"loss__objective": objective, "loss__penalty": "estimate", "run__compile": True}
    config = small_train_config(shapes_zip, "styleformer", "styleformer", **changes)
    compiled: list[Any] = []

    def record(network: Any) -> Any:
        def call(*args: Any, **options: Any) -> Tensor:
            compiled.append(network)
            result: Tensor = network(*args, **options)
            return result

        return call

    monkeypatch.setattr("training.loss.compiled", record)
    trainer = new_trainer(config)
    monkeypatch.setattr(attention, "blockwise_attention", lambda *args, **kw: pytest.fail("twice differentiable"))
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: pytest.fail("a gradient inside the loss"))
    reals = next(trainer._batches())
    phases = [phase for phase in trainer.phases if phase.name.startswith("D_")]
    assert len(phases) == (1 if objective == "relativistic" else 2)
    for phase in phases:
        compiled.clear()
        with phase.updater.requiring_grad(), execution.using(trainer.execution):
            phase.loss(*reals).loss.backward()
        assert trainer.D in compiled, phase.name


R3GAN2: dict[str, Any] = {
    "loss__objective": "relativistic",
    "loss__r1_interval": None,
    "loss__penalty": "estimate",
    "loss__penalty_share": 0.5,
    "loss__centring": 0.01,
    "loss__fresh_reals": True,
    "loss__d_first": True,
    "augment__paired": True,
    "discriminator__mbstd_group_size": 2,
}


@pytest.mark.parametrize("resident", [False, True])
def test_g_uses_the_batch_after_the_batch_of_d(
    shapes_zip: Path, tmp_path: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D's phases come first; a resumed run continues the stream and equals a straight run to the last bit."""
    config = every_phase_config(shapes_zip, **R3GAN2, run__data_on_gpu=resident)
    straight = new_trainer(config)
    assert [phase.name for phase in straight.phases] == ["D_main", "G_main", "G_reg"]
    seen: dict[str, list[Tensor]] = {"D_main": [], "G_main": [], "G_reg": []}
    run_phase = straight.run_phase

    def record(phase: Phase, img: Tensor, c: Tensor) -> None:
        seen[phase.name].append(img)
        run_phase(phase, img, c)

    monkeypatch.setattr(straight, "run_phase", record)
    train_steps(straight, 3)
    order = EpochSampler(len(straight.dataset), config.seed).indices(0, 3 * 2 * 8)
    expected = straight.dataset.images(order).float() / 127.5 - 1
    pairs = zip(seen["D_main"], seen["G_main"], strict=True)
    assert torch.equal(torch.cat([images for pair in pairs for images in pair]), expected)

    resumed = train_with_a_break(config, 2, 1, tmp_path)
    assert digest(saved_state(resumed)) == digest(saved_state(straight))


def test_statistics_of_a_step_with_every_term(shapes_zip: Path) -> None:
    trainer = new_trainer(every_phase_config(shapes_zip, **R3GAN2))
    trainer.run_phase(trainer.phases[0], *next(trainer._batches()))
    stats = trainer.stats.collect()
    counts = {name: stats[f"Loss/{name}"].count for name in ("r1_penalty", "r2_penalty", "centring", "scores/real")}
    assert counts == {"r1_penalty": 4, "r2_penalty": 4, "centring": 8, "scores/real": 8}
    assert stats["Loss/r1_penalty"].mean > 0


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"penalty": "guess"}, "penalty", "exact, estimate"),
        ({"penalty_share": 0.5}, "penalty_share", "has no effect on the exact penalty"),
        ({"penalty_sigma": 0.01}, "penalty_sigma", "has no effect on the exact penalty"),
        ({"penalty": "estimate", "penalty_share": 0.0}, "penalty_share", "must lie in 0..1, 0 excluded"),
        ({"penalty": "estimate", "penalty_share": 1.5}, "penalty_share", "must lie in 0..1, 0 excluded"),
        ({"penalty": "estimate", "penalty_sigma": 1e-9}, "penalty_sigma", "must lie in 1e-05..1; images lie in"),
        ({"penalty": "estimate", "r1_gamma": 0.0}, "penalty", "r1_gamma=0, which turns R1 off"),
        ({"penalty": "estimate", "r1_interval": None}, "penalty", "r1_interval=none, which turns R1 off"),
        ({"penalty": "estimate", "objective": "wgangp-eps", "r1_interval": None}, "penalty", "its own penalty"),
        ({"centring": 0.1}, "centring", "applies to --loss=relativistic only"),
        ({"fresh_reals": True}, "fresh_reals", "applies to --loss=relativistic only"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        LossConfig(**changes)
    assert caught.value.field == field


ESTIMATE = "--set=loss.penalty=estimate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch=8", "--mbstd=0", ESTIMATE, "--set=loss.penalty_share=0.1"],
            "--set loss.penalty_share=0.1: leaves none of the 8 images of a micro-batch: give at least 0.125",
        ),
        (
            ["--batch=24", "--mbstd=8", ESTIMATE, "--set=loss.penalty_share=0.25"],
            "3 minibatch-std groups of 8 images of a micro-batch: give at least 0.334, or a smaller --mbstd",
        ),
        (
            ["--cfg=transgan-cifar", "--loss=hinge", "--gamma=1", "--set=loss.r1_interval=16", ESTIMATE],
            "loss.penalty=estimate: differences of logits would contain the noise of this discriminator's attention",
        ),
        (["--set=augment.paired=1"], "--set augment.paired=True: only --loss=relativistic compares pairs of images"),
        (["--loss=relativistic", "--aug=noaug", "--set=augment.paired=1"], "--aug=noaug does not use it"),
        (["--loss=relativistic", ESTIMATE, "--gamma=0"], "loss.penalty=estimate: has no effect with loss.r1_gamma=0"),
    ],
)
def test_refused_estimates_name_the_remedy(shapes32_zip: Path, arguments: list[str], message: str) -> None:
    command = ["--outdir=x", f"--data={shapes32_zip}", "--device=cpu", "-n", *arguments]
    result = CliRunner().invoke(train.main, command)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_preset_loses_settings_of_pairs_with_another_objective(shapes_zip: Path) -> None:
    values = {name.replace("__", "."): value for name, value in R3GAN2.items()}
    preset = apply_options(PRESETS["tiny"], values)
    other = apply_options(preset, {"loss.objective": "hinge"})
    assert other.loss == replace(
        PRESETS["tiny"].loss, objective="hinge", penalty="estimate", penalty_share=0.5, d_first=True
    )
    assert not other.augment.paired
    assert apply_options(preset, {"loss.objective": "wgangp-eps"}).loss.penalty == "exact"
    assert not apply_options(preset, {"augment.mode": "noaug"}).augment.paired
    assert apply_options(preset, {"augment.mode": "diffaug"}).augment.paired


@pytest.mark.parametrize(("precision", "sigma"), [("fp32", 0.01), ("bf16", 0.02)])
def test_the_default_sigma_depends_on_the_precision(shapes_zip: Path, precision: str, sigma: float) -> None:
    config = every_phase_config(shapes_zip, loss__penalty="estimate", precision=precision)
    assert config.loss.estimate == Estimate(share=1.0, sigma=sigma)
