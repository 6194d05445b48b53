"""Every mode of faster training against plain float32: 10 steps from the same weights.

Exact modes must agree bit for bit. Other modes round differently, and Adam magnifies rounding because it divides by
the size of the gradient; the tolerance is a share of the change that another seed (latents, noise, data order,
augmentation) causes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import all_captured, small_config
from torch import Tensor
from training_helpers import OBJECTIVE_SETTINGS, OBJECTIVES

from torch_utils import custom_ops
from torch_utils.misc import seed_step
from training import worker
from training.dataset import ImageDataset
from training.networks import execution
from training.phases import AdamConfig, build_updater
from training.training_loop import Trainer

STEPS = 10
# All phases, several micro-batches, and layers as wide as those trained in reduced precision.
CONFIG: dict[str, Any] = {
    "batch_size": 8,
    "run__batch_gpu": 4,
    "loss__pl_weight": 2.0,
    "loss__pl_interval": 4,
    "loss__r1_interval": 4,
    "loss__style_mixing": 0.9,
    "augment__mode": "fixed",
    "augment__p": 0.3,
    "augment__pipe": "bgc",
    "precision": "fp32",
    "run__data_on_gpu": False,
    # With the default epsilon, Adam's first steps are gradient signs, and rounding may flip those of small gradients.
    "g_optimizer__eps": 1e-2,
    "d_optimizer__eps": 1e-2,
}
on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)


def build(data: Path, device: str, **changes: Any) -> Trainer:
    """Return a trainer with initial weights that do not depend on the training seed."""
    config = small_config(data, **CONFIG | changes)
    trainer = Trainer(config, ImageDataset(config.data), torch.device(device))
    seed_step(0, "weights", 0)
    for network in (trainer.G, trainer.D):
        network.load_state_dict(type(network)(network_config(trainer, network)).state_dict())
    trainer.ema.module.load_state_dict(trainer.G.state_dict())
    return trainer


def network_config(trainer: Trainer, network: Any) -> Any:
    return trainer.config.generator if network is trainer.G else trainer.config.discriminator


def weights(trainer: Trainer) -> Tensor:
    parameters = [*trainer.G.parameters(), *trainer.D.parameters()]
    return torch.cat([p.detach().reshape(-1).double().cpu() for p in parameters])


@cache
def trained(data: Path, device: str, **changes: Any) -> Tensor:
    """Return all weights after STEPS steps."""
    trainer = build(data, device, **changes)
    trainer.total_nimg = STEPS * trainer.batch_size
    trainer.train()
    assert all_captured(trainer) == bool(changes.get("run__graphs"))
    return weights(trainer)


@pytest.mark.parametrize("mode", ["run__data_on_gpu", "run__recompute"])
def test_exact_modes_change_no_weight(shapes_zip: Path, mode: str) -> None:
    assert torch.equal(trained(shapes_zip, "cpu", **{mode: True}), trained(shapes_zip, "cpu"))


# Tolerance of the weights as a share of the spread between two seeds. Reduced precision adds less than a tenth to the
# variance; rounding float32 in another order adds less than 1/400.
REDUCED, ROUNDING = 10**-0.5, 1 / 20


QUIET_COMPILER = pytest.mark.filterwarnings("ignore")  # warnings of torch.compile


@pytest.mark.parametrize(
    ("device", "change", "share"),
    [
        ("cpu", ("precision", "bf16"), REDUCED),
        ("cpu", ("channels_last", True), ROUNDING),
        pytest.param("cuda", ("precision", "bf16"), REDUCED, marks=pytest.mark.gpu),
        pytest.param("cuda", ("precision", "fp16"), REDUCED, marks=pytest.mark.gpu),
        pytest.param("cuda", ("channels_last", True), ROUNDING, marks=pytest.mark.gpu),
        pytest.param("cuda", ("run__graphs", True), ROUNDING, marks=pytest.mark.gpu),
        pytest.param("cuda", ("run__recompute", True), ROUNDING, marks=pytest.mark.gpu),
        pytest.param(
            "cuda", ("run__compile", True), ROUNDING, marks=[pytest.mark.gpu, pytest.mark.slow, QUIET_COMPILER]
        ),
        pytest.param("cpu", ("run__compile", True), ROUNDING, marks=[pytest.mark.slow, QUIET_COMPILER]),
    ],
)
def test_inexact_modes_stay_within_the_spread_of_two_seeds(
    shapes_zip: Path, device: str, change: tuple[str, Any], share: float
) -> None:
    plain = trained(shapes_zip, device)
    spread = (trained(shapes_zip, device, seed=1) - plain).norm()
    changed = (trained(shapes_zip, device, **dict([change])) - plain).norm()
    assert changed < share * spread


@pytest.mark.gpu
def test_kernels_train_like_the_reference_implementations(shapes_zip: Path) -> None:
    plain = trained(shapes_zip, "cuda")
    spread = (trained(shapes_zip, "cuda", seed=1) - plain).norm()
    with custom_ops.implementation("reference"):
        reference = trained.__wrapped__(shapes_zip, "cuda")
    assert (reference - plain).norm() < ROUNDING * spread


@pytest.mark.slow
@QUIET_COMPILER
@pytest.mark.parametrize(
    ("objective", "penalty"), [("wgangp-eps", "exact"), ("relativistic", "exact"), ("relativistic", "estimate")]
)
def test_compiled_penalties_have_the_same_gradients(shapes_zip: Path, objective: str, penalty: str) -> None:
    settings: dict[str, Any] = {
        "loss__objective": objective,
        "loss__penalty": penalty,
        "loss__pl_weight": 0.0,
        **OBJECTIVE_SETTINGS.get(objective, {}),
    }
    source = build(shapes_zip, "cpu", **settings)
    plain, compiled = (gradients(build(shapes_zip, "cpu", **settings, run__compile=on), source) for on in (False, True))
    for phase, gradient in plain.items():
        assert gradient.norm() > 0
        assert (compiled[phase] - gradient).norm() < 1e-3 * gradient.norm(), phase


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("objective", "penalty"), [*((name, "exact") for name in OBJECTIVES), ("relativistic", "estimate")]
)
def test_graphs_compute_the_gradients_and_means_of_each_batch(shapes_zip: Path, objective: str, penalty: str) -> None:
    """Two batches with two seeds: the second replay does not depend on the first batch."""
    settings = {"augment__pipe": "color", "loss__objective": objective, **OBJECTIVE_SETTINGS.get(objective, {})}
    settings["loss__penalty"] = penalty
    eager, graphs = (build(shapes_zip, "cuda", **settings, run__graphs=on) for on in (False, True))
    data = eager._batches()
    for position in (0, 1000):
        img, c = next(data)
        x, y = img[: eager.batch_gpu], c[: eager.batch_gpu]
        for phases in zip(eager.phases, graphs.phases, strict=True):
            buffers = []
            for trainer, phase in zip((eager, graphs), phases, strict=True):
                with phase.updater.requiring_grad(), execution.using(trainer.execution):
                    accumulate = trainer._accumulator(phase, x, y)
                    phase.updater.gradients.zero()
                    phase.means.zero()
                    seed_step(0, phase.name, position)
                    accumulate(x, y)
                buffers.append(torch.cat([phase.updater.gradients.buffer, phase.means.vector]))
            difference = (buffers[1] - buffers[0]).norm()
            assert difference < 1e-4 * buffers[0].norm(), phases[0].name
    assert all_captured(graphs)


def gradients(trainer: Trainer, source: Trainer) -> dict[str, Tensor]:
    """Return the gradient of each phase at the weights of `source`, for the trainer's first batch."""
    trainer.G.load_state_dict(source.G.state_dict())
    trainer.D.load_state_dict(source.D.state_dict())
    trainer.pl_mean.load_state_dict(source.pl_mean.state_dict())
    img, c = next(trainer._batches())
    found = {}
    for phase in trainer.phases:
        updater = phase.updater
        with updater.requiring_grad(), execution.using(trainer.execution):
            updater.gradients.zero()
            seed_step(trainer.config.seed, phase.name, 0)
            trainer._accumulate(phase, img[: trainer.batch_gpu], c[: trainer.batch_gpu])
        # In logical order; the memory order differs with channels_last.
        found[phase.name] = torch.cat([p.grad.double().reshape(-1) for p in updater.parameters if p.grad is not None])
    return found


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize(
    ("precision", "objective"),
    [("bf16", "logistic"), ("fp16", "logistic"), ("bf16", "wgangp-eps"), ("bf16", "relativistic")],
)
def test_reduced_precision_adds_little_to_gradient_noise(
    shapes_zip: Path, device: str, precision: str, objective: str
) -> None:
    """Compare the gradients of every phase, including the second derivatives, after a few steps of training.

    The error of a gradient adds less than a tenth to its variance over images, latents and augmentations. A penalty on
    the norm of D's gradient adds less than half, because rounding rotates this gradient where D is almost flat.
    """
    limit = 1 / 2 if objective == "wgangp-eps" else 1 / 10
    settings = {"loss__objective": objective, **OBJECTIVE_SETTINGS.get(objective, {})}
    source = build(shapes_zip, device, **settings)
    source.total_nimg = 5 * source.batch_size
    source.train()
    exact, reduced, other = (
        gradients(build(shapes_zip, device, **settings | changes), source)
        for changes in ({}, {"precision": precision, "channels_last": True}, {"seed": 1})
    )
    for phase, gradient in exact.items():
        error, noise = (reduced[phase] - gradient).norm(), (other[phase] - gradient).norm()
        assert 0 < error**2 < noise**2 * limit, phase


def test_a_skip_discriminator_casts_each_input_to_its_grid(shapes_zip: Path) -> None:
    trainer = build(shapes_zip, "cpu", discriminator__architecture="skip")
    types: list[torch.dtype] = []
    for layer in trainer.D.fromrgb:
        layer.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with execution.using(reduced=torch.bfloat16, min_grid=8):
        logits = trainer.D(torch.zeros(4, *trainer.D.img_shape), None)
    assert types == [torch.bfloat16, torch.bfloat16, torch.float32]  # grids of 16, 8 and 4 pixels
    assert logits.dtype == torch.float32


def test_only_the_selected_grids_have_reduced_precision(shapes_zip: Path) -> None:
    trainer = build(shapes_zip, "cpu", precision="bf16", reduced_from=16)
    types: dict[str, torch.dtype] = {}
    watched = {
        "stage 8": trainer.G.synthesis.stages[0].blocks[0],
        "stage 16": trainer.G.synthesis.stages[1].blocks[0],
        "rgb 16": trainer.G.synthesis.stages[1].torgb,
        "D 16": trainer.D.blocks[0],
        "D 8": trainer.D.blocks[1],
        "epilogue": trainer.D.epilogue,
    }
    for name, module in watched.items():

        def note(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            types[name] = output.dtype

        module.register_forward_hook(note)
    trainer.run_phase(trainer.phases[0], *next(trainer._batches()))
    full, half = torch.float32, torch.bfloat16
    assert types == {
        "stage 8": full,
        "stage 16": half,
        "rgb 16": full,
        "D 16": half,
        "D 8": full,
        "epilogue": full,
    }
    trainer.G(torch.zeros(1, trainer.G.z_dim), None)
    assert set(types[name] for name in watched if name.startswith("stage")) == {full}  # outside training


@pytest.mark.parametrize(("weights", "styles"), [(1e3, 1e3), (1.0, 3e-3)])
def test_half_precision_survives_extreme_styles_and_weights(shapes_zip: Path, weights: float, styles: float) -> None:
    """Products of 1e4 and gains of 1e5 would overflow float16.

    Small styles turn attention into a choice of one token, and rounding may change some of these choices.
    """
    trainer = build(shapes_zip, "cpu")
    with torch.no_grad():
        for stage in trainer.G.synthesis.stages:
            for block in stage.blocks:
                block.affine.weight.mul_(styles)
                block.affine.bias.mul_(styles)
                for weight in (block.out_weight, block.residual_weight, block.qkv_weight):
                    weight.mul_(weights)
    z = torch.randn(4, trainer.G.z_dim)
    exact = trainer.G(z, None)
    with execution.using(reduced=torch.float16):
        reduced = trainer.G(z, None)
    assert (reduced - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_a_slow_precision_is_noted(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 160e9, torch.bfloat16: 82e9}
    monkeypatch.setattr(worker, "product_rate", rates.__getitem__)

    def notes(precision: str, device: str = "cpu") -> list[str]:
        return worker._note_on_precision(small_config(shapes_zip, precision=precision), torch.device(device))

    assert notes("bf16") == [
        "SLOW: matrix products take 2.0 times as long in bf16 as in fp32 on this processor (82 against 160 GFLOP/s): "
        "--precision=fp32 is faster"
    ]
    assert notes("bf16", "cuda") == notes("fp32") == []
    rates[torch.bfloat16] = 240e9
    assert notes("bf16") == []


def test_the_fused_optimizer_follows_the_formula_of_adam() -> None:
    """Compare with algorithm 1 of Kingma & Ba 2015 in float64; a skipped step changes nothing."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    updater = build_updater([p], AdamConfig(lr=0.01, beta1=0.5, beta2=0.9, eps=1e-3), None)
    w, m, v = p.detach().double(), torch.zeros(7).double(), torch.zeros(7).double()
    skip = torch.tensor([False, True, False, False])
    taken = 0
    for step in range(4):
        g = torch.randn(7, generator=torch.Generator().manual_seed(step))
        updater.gradients.zero()
        updater.gradients.buffer[:7] += float("inf") if skip[step] else g
        updater.step(skip=skip[step])
        if not skip[step]:
            taken += 1
            m, v = 0.5 * m + 0.5 * g.double(), 0.9 * v + 0.1 * g.double() ** 2
            w = w - 0.01 * (m / (1 - 0.5**taken)) / ((v / (1 - 0.9**taken)).sqrt() + 1e-3)
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_replays_of_a_graph_draw_from_the_current_seed() -> None:
    from torch_utils.graphs import Captured

    x = torch.zeros(1000, device="cuda")
    noise = Captured(lambda x: x + torch.randn_like(x), x)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(noise(x).clone())
    torch.manual_seed(1)
    assert torch.equal(drawn[0], torch.randn_like(x))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
