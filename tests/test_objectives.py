"""Objectives other than the logistic one, and schedules: closed forms, exact training, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import OnStep
from linear_gan import H, LinearG, W, batch, make_gan
from torch import Tensor, nn
from training_helpers import (
    OBJECTIVE_SETTINGS,
    OBJECTIVES,
    SMALL_STYLEGAN2_D,
    SMALL_STYLEGAN2_G,
    distances_to_scenes,
    every_phase_config,
    flat_parameters,
    new_trainer,
    saved_state,
    train_and_save,
    train_steps,
)

import train
from dnnlib.config import ConfigError, from_json
from torch_utils.checkpoint import Checkpoint, digest
from training import loss
from training.config import PRESETS, TrainConfig, apply_options
from training.loss import (
    GAN,
    LossConfig,
    LossTerms,
    discriminator_hinge,
    discriminator_relativistic,
    discriminator_wgan,
    generator_linear,
    generator_relativistic,
    path_length,
)
from training.networks import execution
from training.phases import AdamConfig, BatchMeans, Updater, build_phases, build_updater
from training.training_loop import Trainer

CLASSIFIERS, COMPARISONS = {"logistic", "hinge"}, {"wgangp-eps", "relativistic"}
WITH_R1 = f"only --loss={' and '.join(loss.LAZY_R1)} have R1"


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def drawn(gan: GAN, count: int, c: Tensor | None = None) -> Tensor:
    """Return the images that a loss generates next, and reset the seed."""
    torch.manual_seed(5)
    with torch.no_grad():
        fake: Tensor = gan.generate(count, c)[0]
    torch.manual_seed(5)
    return fake


def test_hinge_and_linear_losses_have_their_closed_forms() -> None:
    gan, (img, c) = make_gan(), batch()
    fake_logits, real_logits = gan.D(drawn(gan, 6), c)[:, 0], gan.D(img, c)[:, 0]
    terms = discriminator_hinge(gan, img, c)
    expected = sum(
        max(0.0, 1 + f) + max(0.0, 1 - r) for f, r in zip(fake_logits.tolist(), real_logits.tolist(), strict=True)
    )
    assert terms.loss.item() == pytest.approx(expected / 6, rel=1e-10)
    assert 0 < (real_logits < 1).sum() < 6  # both sides of the kink
    assert terms.means["real_sign"].item() == pytest.approx(real_logits.sign().mean().item())
    torch.manual_seed(5)
    assert generator_linear(gan, img, c).loss.item() == pytest.approx(-fake_logits.mean().item(), rel=1e-10)


def test_wasserstein_loss_of_a_linear_critic_has_its_closed_form() -> None:
    """The gradient of <a, x> is a everywhere; the penalty is computed after augmentation, so the factor 5 is absent."""
    gan, (img, c) = make_gan(augment=lambda x: 5 * x), batch()
    fake_logits, real_logits = gan.D(5 * drawn(gan, 6, c), c), gan.D(5 * img, c)
    terms = discriminator_wgan(gan, img, c, gp_weight=10.0, drift_weight=0.5)
    penalty = (gan.D.a.norm() - 1).square()
    expected = fake_logits.mean() - real_logits.mean() + 10 * penalty + 0.5 * real_logits.mean() ** 2
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert terms.stats["Loss/gradient_penalty"].tolist() == pytest.approx([penalty.item()] * 6)
    signs = (real_logits - fake_logits).sign().mean()
    assert terms.means["real_sign"].item() == pytest.approx(signs.item())
    expected.backward()
    gradient = gan.D.a.grad.clone()
    gan.D.a.grad = None
    terms.loss.backward()
    torch.testing.assert_close(gan.D.a.grad, gradient)


class Recorder(nn.Module):
    """Discriminator D(x) = |x|^2 / 2, with gradient x, that records the minibatches of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        count = execution.current.minibatches
        self.seen += zip(img.detach().chunk(count), c.chunk(count), strict=True)
        return img.square().sum(dim=(1, 2, 3))[:, None] / 2


def test_interpolates_are_taken_after_augmentation() -> None:
    calls: list[Tensor] = []

    def augment(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.randn_like(x) + x  # fresh draws at each call

    gan = make_gan(augment)
    gan = replace(gan, D=Recorder())
    img, _ = batch()
    c = torch.arange(6.0)[:, None]
    terms = discriminator_wgan(gan, img, c, gp_weight=1.0, drift_weight=0.0)
    assert len(calls) == 1
    (fake, _), (real, _), (between, labels) = gan.D.seen
    t = ((between - real) / (fake - real)).flatten(1)
    assert t.std(dim=1).max() < 1e-6  # one t per image
    assert ((t >= 0) & (t <= 1)).all()
    assert t[:, 0].std() > 0.1
    assert torch.equal(labels, c)
    expected = (between.flatten(1).norm(dim=1) - 1).square()
    torch.testing.assert_close(terms.stats["Loss/gradient_penalty"], expected)


def test_a_flat_critic_has_a_finite_penalty() -> None:
    gan, (img, c) = make_gan(), batch()
    with torch.no_grad():
        gan.D.a.zero_()
    terms = discriminator_wgan(gan, img, c, gp_weight=10.0, drift_weight=0.0)
    assert terms.stats["Loss/gradient_penalty"].tolist() == [1.0] * 6
    terms.loss.backward()
    assert gan.D.a.grad.isfinite().all()


def test_relativistic_losses_compare_pairs_of_images() -> None:
    """R1 and R2 of <a, x / 5>, differentiated before augmentation, are |a|^2 / 25 each."""
    gan, (img, c) = make_gan(augment=lambda x: x / 5), batch()
    fake_logits, real_logits = gan.D(drawn(gan, 6, c) / 5, c), gan.D(img / 5, c)
    terms = discriminator_relativistic(gan, img, c, gamma=3.0)
    norm = 1 / 25 * gan.D.a.square().sum()
    expected = softplus(fake_logits - real_logits).mean() + 3 / 2 * (norm + norm)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert terms.means["real_sign"].item() == pytest.approx((real_logits - fake_logits).sign().mean().item())
    assert terms.stats["Loss/r1_penalty"].tolist() == pytest.approx([norm.item()] * 6)
    assert terms.stats["Loss/r2_penalty"].tolist() == pytest.approx([norm.item()] * 6)
    expected.backward()
    gradient = gan.D.a.grad.clone()
    gan.D.a.grad = None
    terms.loss.backward()
    torch.testing.assert_close(gan.D.a.grad, gradient)

    torch.manual_seed(5)
    terms = generator_relativistic(gan, img, c)
    assert terms.loss.item() == pytest.approx(softplus(real_logits - fake_logits).mean().item(), rel=1e-10)
    gan.D.a.grad = None
    terms.loss.backward()
    assert gan.G.A.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_classifiers_report_signs_of_fake_logits(objective: str) -> None:
    """The logits of a relativistic D have no zero level, so their signs have no meaning."""
    parameters = [nn.Parameter(torch.zeros(1))]
    updater = Updater(parameters, torch.optim.SGD(parameters, lr=1))
    phases = build_phases(make_gan(), settings(objective).fit(32, 6), updater, updater)
    stats = next(phase for phase in phases if phase.name == "G_main").loss(*batch()).stats
    assert stats.keys() >= {"Loss/G/loss", "Loss/scores/fake"}
    if objective in CLASSIFIERS | COMPARISONS:
        assert ("Loss/signs/fake" in stats) == (objective in CLASSIFIERS)


class LabelledG(LinearG):
    """Generator of images that depend only on the label."""

    c_dim = 1

    def mapping(self, z: Tensor, c: Tensor) -> Tensor:
        return c.double()[:, None].expand(-1, self.num_ws, 3)


@pytest.mark.parametrize(
    "loss",
    [
        lambda gan, img, c: discriminator_wgan(gan, img, c, gp_weight=1.0, drift_weight=0.0),
        lambda gan, img, c: discriminator_relativistic(gan, img, c, gamma=1.0),
        generator_relativistic,
    ],
    ids=["wgan", "relativistic D", "relativistic G"],
)
def test_compared_images_have_the_same_labels(loss: Callable[..., Any]) -> None:
    gan = make_gan()
    c = torch.arange(6.0)[:, None]
    img = torch.randn(6, 2, H, W, dtype=torch.float64)
    G = LabelledG()
    gan = replace(gan, G=G, D=Recorder(), labels=torch.full([10, 1], 99.0))
    loss(gan, img, c)
    direction = G.synthesis(G.mapping(torch.zeros(1, 3), torch.ones(1, 1)), "random")[0]
    expected = c.double().reshape(-1, 1, 1, 1) * direction
    fakes = next(x for x, _ in gan.D.seen if not torch.equal(x, img))
    torch.testing.assert_close(fakes, expected.detach())
    assert all(torch.equal(labels, c) for _, labels in gan.D.seen)


@pytest.mark.parametrize("objective", ["logistic", "hinge", "wgangp-eps"])
def test_the_generator_batch_can_be_larger(objective: str) -> None:
    gan = replace(make_gan(), D=Recorder())
    parameters = [nn.Parameter(torch.zeros(1))]
    updater = Updater(parameters, torch.optim.SGD(parameters, lr=1))
    config = settings(objective, g_batch_scale=3).fit(32, 6)
    g_main, d_main = (phase for phase in build_phases(gan, config, updater, updater) if phase.name.endswith("main"))
    g_main.loss(*batch())
    assert [len(x) for x, _ in gan.D.seen] == [18]
    d_main.loss(*batch())
    assert {len(x) for x, _ in gan.D.seen[1:]} == {6}


def settings(objective: str, **changes: Any) -> LossConfig:
    values = {name.removeprefix("loss__"): value for name, value in OBJECTIVE_SETTINGS.get(objective, {}).items()}
    return LossConfig(objective=objective, **values | changes)


def test_phases_use_the_updaters_and_weights_of_the_config() -> None:
    """Penalties of linear networks follow from |a|."""
    gan, (img, c) = make_gan(), batch()
    norm, mean = gan.D.a.detach().norm().item(), gan.D(img, c).mean().item()
    g, d = (build_updater([nn.Parameter(torch.zeros(1))], AdamConfig(lr=0.1), None) for _ in range(2))

    def loss_of(name: str, config: LossConfig) -> float:
        phases = build_phases(gan, config, g, d)
        assert all(phase.updater is {"G": g, "D": d}[phase.name[0]] for phase in phases)
        torch.manual_seed(5)
        return next(phase for phase in phases if phase.name == name).loss(img, c).loss.item()

    for objective in ("logistic", "hinge"):
        config = settings(objective, r1_gamma=3.0, pl_weight=5.0, pl_decay=0.25)
        assert loss_of("D_reg", config) == pytest.approx(3 / 2 * norm**2)
        torch.manual_seed(5)
        expected = path_length(gan, img, c, weight=5.0, decay=0.25).loss.item()
        assert loss_of("G_reg", config) == pytest.approx(expected)

    plain, penalised, drifting = (
        loss_of("D_main", settings("wgangp-eps", gp_weight=gp_weight, drift_weight=drift_weight))
        for gp_weight, drift_weight in ((0.0, 0.0), (7.0, 0.0), (0.0, 3.0))
    )
    assert penalised - plain == pytest.approx(7 * (norm - 1) ** 2)
    assert drifting - plain == pytest.approx(3 * mean**2)
    plain, penalised = (loss_of("D_main", settings("relativistic", r1_gamma=gamma)) for gamma in (0.0, 3.0))
    assert penalised - plain == pytest.approx(3 * norm**2)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("logistic", [("G_main", 5, 1), ("G_reg", 20, 4), ("D_main", 1, 1), ("D_reg", 3, 3)]),
        ("hinge", [("G_main", 5, 1), ("G_reg", 20, 4), ("D_main", 1, 1), ("D_reg", 3, 3)]),
        ("wgangp-eps", [("G_main", 5, 1), ("G_reg", 20, 4), ("D_main", 1, 1)]),
        ("relativistic", [("G_main", 5, 1), ("G_reg", 20, 4), ("D_main", 1, 1)]),
    ],
)
def test_n_critic_sets_the_intervals_of_the_phases(objective: str, expected: list[tuple[str, int, int]]) -> None:
    """A larger n_critic does not change the weight of the generator's phases."""
    parameters = [nn.Parameter(torch.zeros(1))]
    updater = Updater(parameters, torch.optim.SGD(parameters, lr=1))
    phases = build_phases(make_gan(), settings(objective, n_critic=5).fit(32, 8), updater, updater)
    assert [(phase.name, phase.interval, phase.weight) for phase in phases] == expected


def test_g_is_updated_every_n_critic_steps_and_ema_counts_images(shapes_zip: Path) -> None:
    """The half-life of the EMA is measured in images and does not depend on n_critic."""
    trainer = new_trainer(
        every_phase_config(shapes_zip, loss__n_critic=3, ema__kimg=0.1, ema__rampup=None, augment__mode="noaug")
    )
    seen = [flat_parameters(trainer.G)]
    trainer.hooks = [OnStep(lambda trainer: seen.append(flat_parameters(trainer.G)))]
    train_steps(trainer, 7)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False, False, True, False, False, True]

    average = seen[0]
    for weights, images in ((seen[1], 24), (seen[4], 24), (seen[7], 8)):  # 8 images a step
        average = weights + 0.5 ** (images / 100) * (average - weights)
    torch.testing.assert_close(flat_parameters(trainer.ema.module), average, rtol=1e-5, atol=1e-7)


def test_there_is_no_weight_decay() -> None:
    p = nn.Parameter(torch.ones(3))
    updater = build_updater([p], AdamConfig(lr=0.1), None)
    updater.step(skip=torch.tensor(False))
    assert torch.equal(p.detach(), torch.ones(3))  # the gradient is zero
    assert not any("decay" in flag for parameter in train.main.params for flag in parameter.opts)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_gradient_clipping_matches_torch(max_norm: float) -> None:
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 70)] for _ in range(2))
    updater = build_updater(ours, AdamConfig(lr=0.1, clip_norm=max_norm), None)
    torch.manual_seed(0)
    for a, b in zip(ours, theirs, strict=True):
        b.grad = torch.randn_like(b)
        assert a.grad is not None
        a.grad.copy_(b.grad)
    norm = updater.gradients.reduce()
    updater.clip(norm)
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(theirs, max_norm), norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_does_not_hide_infinite_gradients() -> None:
    p = nn.Parameter(torch.ones(3))
    updater = build_updater([p], AdamConfig(lr=0.1, clip_norm=1.0), None)
    updater.gradients.buffer[0] = float("inf")
    norm = updater.gradients.reduce()
    updater.clip(norm)
    updater.step(skip=~norm.isfinite())
    assert norm == float("inf")
    assert torch.equal(p.detach(), torch.ones(3))
    assert not any(row["exp_avg_sq"].any() for row in updater.optimizer.state.values())


@pytest.mark.parametrize("name", ["w_avg", "real_sign", "loss"])
def test_steps_with_infinite_batch_means_are_skipped(shapes_zip: Path, name: str) -> None:
    """An infinite value, here in the first of two micro-batches, would stay in a running mean forever."""
    trainer = new_trainer(every_phase_config(shapes_zip, run__nan="skip"))
    phase = next(phase for phase in trainer.phases if phase.name == "D_main")
    factors = iter([float("inf"), 0.0, 1.0, 1.0])

    def loss(img: Tensor, c: Tensor) -> LossTerms:
        values = {"w_avg": torch.ones(trainer.G.w_dim), "real_sign": torch.ones([]), "loss": torch.ones([])}
        values[name] = values[name] * next(factors)
        nothing = sum(0 * p.sum() for p in phase.updater.parameters)
        return LossTerms(values.pop("loss") + nothing, means=values)

    phase.loss = loss
    img, c = next(trainer._batches())
    assert len(img) == 2 * trainer.batch_gpu
    before = [trainer.w_avg.value.clone(), trainer.ada.sign_sum.clone()]
    trainer.run_phase(phase, img, c)
    assert trainer.failures.peek() == {"D_main": (1, 0)}
    assert all(torch.equal(a, b) for a, b in zip(before, (trainer.w_avg.value, trainer.ada.sign_sum), strict=True))
    trainer.run_phase(phase, img, c)
    assert trainer.failures.peek() == {"D_main": (1, 0)}  # the first batch is discarded
    torch.testing.assert_close(trainer.w_avg.value, before[0].lerp(torch.ones(trainer.G.w_dim), trainer.w_avg.rate))
    assert trainer.ada.sign_sum == before[1] + 1


def test_batch_means_are_averaged_by_name() -> None:
    """Each batch replaces the values in the same tensor, as CUDA graphs require."""
    means, vectors = BatchMeans(), []
    for x in (1.0, 3.0):
        means.zero()
        for y in (x, x + 4):
            means.add(LossTerms(torch.tensor(y), means={"a": torch.full([2, 3], 2 * y), "b": torch.tensor(-y)}), 0.5)
        found = means.reduce()
        assert found.keys() == {"a", "b"}
        assert torch.equal(found["a"], torch.full([2, 3], 2 * x + 4))
        assert torch.equal(found["b"], torch.tensor(-x - 2))
        assert means.vector[-1] == x + 2
        vectors.append(means.vector)
    assert vectors[0] is vectors[1]


def test_gradients_of_both_networks_are_clipped(shapes_zip: Path) -> None:
    clip = {"g_optimizer__clip_norm": 1e-4, "d_optimizer__clip_norm": 2e-4}
    trainer = new_trainer(every_phase_config(shapes_zip, **clip))
    img, c = next(trainer._batches())
    for phase in trainer.phases:
        trainer.run_phase(phase, img, c)
        bound = 1e-4 if phase.name.startswith("G") else 2e-4
        assert phase.updater.gradients.buffer.norm().item() == pytest.approx(bound, rel=1e-2), phase.name


def objective_config(data: Path, objective: str, **changes: Any) -> TrainConfig:
    return every_phase_config(data, loss__objective=objective, **OBJECTIVE_SETTINGS.get(objective, {}) | changes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_g_leaves_no_gradients_in_d(shapes_zip: Path, objective: str) -> None:
    """A preceding step of G does not change the step of D."""

    def run_d_main(trainer: Trainer, *, after_g: bool) -> Tensor:
        img, c = next(trainer._batches())
        phases = {phase.name: phase for phase in trainer.phases}
        before = {name: x.clone() for name, x in trainer.G.state_dict().items()}
        if after_g:
            trainer.run_phase(phases["G_main"], img, c)
            assert all((p.grad == 0).all() for p in trainer.D.parameters())
            assert any((p.grad != 0).any() for p in trainer.G.parameters())
            trainer.G.load_state_dict(before)
        trainer.run_phase(phases["D_main"], img, c)
        return flat_parameters(trainer.D)

    config = objective_config(shapes_zip, objective)
    fresh = flat_parameters(new_trainer(config).D)
    alone, after = (run_d_main(new_trainer(config), after_g=after_g) for after_g in (False, True))
    assert torch.equal(alone, after)
    assert not torch.equal(alone, fresh)


@pytest.mark.parametrize("objective", ["hinge", "wgangp-eps", "relativistic"])
def test_resuming_is_exact_with_every_objective(shapes_zip: Path, tmp_path: Path, objective: str) -> None:
    changes: dict[str, Any] = {"loss__n_critic": 2, "g_optimizer__clip_norm": 5.0, "d_optimizer__clip_norm": 5.0}
    changes |= {"augment__mode": "apa"} if objective == "hinge" else {}
    config = objective_config(shapes_zip, objective, data__use_labels=True, **changes)
    straight, first, second = (new_trainer(config) for _ in range(3))
    for trainer in (straight, first):
        trainer.augment.p.fill_(0.5)
    train_steps(straight, 5)
    train_steps(first, 3)
    first.save(tmp_path / "training-state-000000.pt")
    second.resume(tmp_path / "training-state-000000.pt")
    train_steps(second, 2)
    assert digest(saved_state(second)) == digest(saved_state(straight))
    assert float(straight.augment.p) != 0.5  # the controller has adjusted p


ESTIMATED = "relativistic, estimated"
WITH_PENALTIES = ("wgangp-eps", "relativistic", ESTIMATED)


def config_to_share(data: Path, objective: str) -> TrainConfig:
    changes: dict[str, Any] = {"g_optimizer__eps": 1e-2, "d_optimizer__eps": 1e-2, "d_optimizer__clip_norm": 1.0}
    changes |= {"augment__mode": "fixed", "augment__p": 0.7, "loss__n_critic": 2, "data__use_labels": True}
    changes |= {"loss__g_batch_scale": 2} if objective == "wgangp-eps" else {}
    if objective == "relativistic":
        changes |= {"augment__mode": "apa", "augment__p": None}
    if objective == ESTIMATED:
        changes |= {"loss__penalty": "estimate", "loss__fresh_reals": True, "loss__d_first": True}
        changes |= {"augment__paired": True}
    return objective_config(data, objective.partition(",")[0], **changes)


def trainer_to_share(data: Path, objective: str) -> Trainer:
    trainer = new_trainer(config_to_share(data, objective))
    trainer.augment.p.fill_(0.7)
    return trainer


def in_two_processes(folder: Path, data: Path) -> None:
    for objective in WITH_PENALTIES:
        train_and_save(trainer_to_share(data, objective), 3, folder / f"{objective}.pt")


@pytest.mark.parametrize("objective", WITH_PENALTIES)
def test_two_processes_compute_the_same_penalties_as_one(shapes_zip: Path, together: Path, objective: str) -> None:
    alone = trainer_to_share(shapes_zip, objective)
    train_steps(alone, 3)
    saved = Checkpoint.read(together / "test_objectives" / f"{objective}.pt")
    one, two = saved_state(alone), saved["parts"]
    for part in ("G", "D", "G_ema", "ada"):
        for name, x in one[part].items():
            torch.testing.assert_close(two[part][name], x, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")


# Image size and options to learn scenes with each objective. wgangp-eps uses both networks and n_critic of TransGAN,
# with higher learning rates than in the paper because the training is short.
SMALL_TRANSGANS = [
    "--gen=transgan",
    "--base=4",
    "--z-dim=32",
    "--set=generator.w_dim=32",
    "--g_dict=64,16",
    "--num_layers=1,1",
]
SMALL_TRANSGANS += [
    "--disc=transgan",
    "--set=discriminator.widths=32,16",
    "--set=discriminator.layers=1,1",
    "--set=discriminator.local_layers=0,0",
    "--set=g_optimizer.clip_norm=5",
    "--set=d_optimizer.clip_norm=5",
]
SCENE_OPTIONS: dict[str, tuple[int, list[str]]] = {
    "wgangp-eps": (
        8,
        [*SMALL_TRANSGANS, "--set=loss.n_critic=4", "--batch=16", "--glr=0.001", "--dlr=0.002", "--kimg=28"],
    ),
    "relativistic": (16, ["--gen=stylegan2", *SMALL_STYLEGAN2_G, *SMALL_STYLEGAN2_D, "--kimg=1"]),
}
SCENE_OPTIONS[ESTIMATED] = 16, [*SCENE_OPTIONS["relativistic"][1], "--set=loss.penalty=estimate"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", SCENE_OPTIONS)
def test_objectives_with_penalties_halve_the_distance_to_data(tmp_path: Path, objective: str) -> None:
    side, options = SCENE_OPTIONS[objective]
    untrained, trained = distances_to_scenes(
        tmp_path, side, f"--loss={objective.partition(',')[0]}", *options, "--tick=28"
    )
    assert trained <= untrained / 2


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"objective": "gan"}, "objective", ", ".join(OBJECTIVES)),
        ({"n_critic": 0}, "n_critic", "at least 1"),
        ({"g_batch_scale": 0}, "g_batch_scale", "at least 1"),
        ({"gp_weight": 10.0}, "gp_weight", "applies to --loss=wgangp-eps only"),
        ({"drift_weight": 0.0}, "drift_weight", "applies to --loss=wgangp-eps only"),
        ({"objective": "wgangp-eps", "r1_interval": None, "r1_gamma": 1.0}, "r1_gamma", "its own penalty"),
        ({"objective": "wgangp-eps"}, "r1_interval", WITH_R1),
        ({"objective": "relativistic"}, "r1_interval", WITH_R1),
        ({"objective": "relativistic", "r1_interval": None, "g_batch_scale": 2}, "g_batch_scale", "leave it at 1"),
        ({"objective": "wgangp-eps", "r1_interval": None, "gp_weight": -1.0}, "gp_weight", "at least 0; 0 turns"),
    ],
)
def test_settings_of_another_objective_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        LossConfig(**changes)
    assert caught.value.field == field
    with pytest.raises(ConfigError, match="must be positive"):
        AdamConfig(clip_norm=0.0)


def plan(data: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={data}", "--device=cpu", "-n", *arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return from_json(TrainConfig, json.loads(result.stdout)["options"])


def test_an_objective_can_be_changed_in_a_preset(shapes32_zip: Path) -> None:
    base = plan(shapes32_zip, "--cfg=cifar").loss
    assert plan(shapes32_zip, "--cfg=cifar", "--loss=logistic").loss == base
    assert plan(shapes32_zip, "--cfg=cifar", "--loss=hinge").loss == replace(base, objective="hinge")
    wgan = plan(
        shapes32_zip,
        "--cfg=cifar",
        "--loss=wgangp-eps",
        "--set=loss.n_critic=4",
        "--set=loss.g_batch_scale=2",
        "--set=g_optimizer.clip_norm=5",
        "--set=d_optimizer.clip_norm=5",
    )
    without_r1: dict[str, Any] = {"r1_gamma": 0.0, "r1_interval": None}
    weights: dict[str, Any] = {"gp_weight": 10.0, "drift_weight": 0.001, "n_critic": 4, "g_batch_scale": 2}
    assert wgan.loss == replace(base, objective="wgangp-eps", **without_r1, **weights)
    assert (wgan.g_optimizer.clip_norm, wgan.d_optimizer.clip_norm) == (5.0, 5.0)
    relativistic = plan(shapes32_zip, "--cfg=cifar", "--loss=relativistic", "--gamma=0.05").loss
    assert relativistic == replace(base, objective="relativistic", r1_interval=None, r1_gamma=0.05)

    back = apply_options(replace(PRESETS["auto"], loss=settings("wgangp-eps")), {"loss.objective": "hinge"}).loss
    assert back == LossConfig(objective="hinge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss=wgangp-eps", "--gamma=1"], "--gamma=1.0: wgangp-eps has its own penalty"),
        (
            ["--loss=relativistic", "--set=loss.r1_interval=16"],
            f"--set loss.r1_interval=16: {WITH_R1}",
        ),
        (["--set=loss.gp_weight=5"], "--set loss.gp_weight=5.0: applies to --loss=wgangp-eps only; omit it"),
        (
            ["--set=g_optimizer.clip_norm=-1", "--set=d_optimizer.clip_norm=-1"],
            "--set g_optimizer.clip_norm=-1.0: must be positive; omit it for no clipping",
        ),
        (["--set=loss.n_critic=0"], "--set loss.n_critic=0: must be at least 1"),
        (
            ["--batch=8", "--mbstd=6", "--set=loss.g_batch_scale=3"],
            "--batch-gpu=8: cannot be cut into minibatch-std groups of 6",
        ),
        (
            ["--batch=4", "--mbstd=8", "--set=loss.g_batch_scale=3"],
            "with loss.g_batch_scale=3, 12 images cannot be cut into",
        ),
    ],
)
def test_refused_objective_settings_name_the_flag(shapes_zip: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={shapes_zip}", "--device=cpu", "-n", *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
