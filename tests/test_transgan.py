"""TransGAN: every layer and both networks against the float64 reference, and the published presets."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from reference_layers import Array, close, ref_mapping, state_of
from reference_transgan import (
    build_transgan,
    ref_attention,
    ref_attention_bias,
    ref_bicubic,
    ref_low_pass,
    ref_shuffle,
    ref_transgan,
    ref_transgan_discriminator,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_helpers import new_trainer, saved_state, train_steps, train_with_a_break

import dataset_tool
import train
from dnnlib.config import ConfigError
from torch_utils.checkpoint import digest
from training.augment.diffaugment import DEFAULT_POLICY
from training.config import PRESETS, Environment, TrainConfig, apply_options, resolve
from training.ema import EMA
from training.networks import execution
from training.networks.attention import attend, split_heads
from training.networks.grid_attention import (
    AxisAttention,
    CellAttention,
    NystromAttention,
    RelativePosition,
    from_cells,
    pseudo_inverse,
    to_cells,
)
from training.networks.styleformer import StyleformerConfig
from training.networks.transgan import (
    Antialias,
    BicubicUpsampling,
    PixelShuffle,
    TransGANConfig,
    published_stages,
)
from training.networks.transgan_discriminator import TransGANDiscriminatorConfig
from training.networks.vit import Block, BlockConfig, TokenNoise

TINY = TransGANConfig(
    z_dim=5, w_dim=5, img_channels=2, base=(2, 4), widths=(16, 16, 4), layers=(1, 2, 1), num_heads=2, full_upto=4,
    window=4,
)  # fmt: skip
VARIANTS = {
    "grid above 4": TINY,
    "full": dataclasses.replace(TINY, attention="full"),
    "axis": dataclasses.replace(TINY, attention="axis"),
    "nystrom": dataclasses.replace(TINY, attention="nystrom", landmarks=8),
    "layer norm": dataclasses.replace(TINY, norm="layer"),
    "absolute positions": dataclasses.replace(TINY, position="absolute"),
    "relative positions": dataclasses.replace(TINY, position="relative"),
    "latent tokens, antialias, no blocks at first": dataclasses.replace(
        TINY, latent_tokens=3, antialias=1, layers=(0, 1, 1)
    ),
    "conditional": dataclasses.replace(TINY, c_dim=3),
    "mapping network, conditional": dataclasses.replace(TINY, mapping_layers=2, w_dim=6, c_dim=3),
    "tight clamp": dataclasses.replace(TINY, conv_clamp=0.3),
    "bicubic after pixel shuffle, without blocks": dataclasses.replace(TINY, widths=(16, 4, 4), layers=(1, 0, 0)),
    "two pixel shuffles": dataclasses.replace(TINY, widths=(32, 8, 2), antialias=2),
    "noise, latent tokens": dataclasses.replace(TINY, attention_noise=True, latent_tokens=3),
}
TINY_D = TransGANDiscriminatorConfig(
    img_channels=2, img_size=(16, 32), patch=2, widths=(6, 2, 4), layers=(2, 1, 1), local_layers=(1, 0, 0),
    num_heads=2, window=4,
)  # fmt: skip
D_VARIANTS = {
    "grid": TINY_D,
    "full": dataclasses.replace(TINY_D, attention="full"),
    "axis": dataclasses.replace(TINY_D, attention="axis"),
    "nystrom": dataclasses.replace(TINY_D, attention="nystrom", landmarks=16),
    "token norm": dataclasses.replace(TINY_D, norm="token"),
    "absolute positions": dataclasses.replace(TINY_D, position="absolute"),
    "relative positions": dataclasses.replace(TINY_D, position="relative"),
    "one scale": dataclasses.replace(TINY_D, multi_scale=False),
    "overlapping patches": dataclasses.replace(TINY_D, overlap=True),
    "conditional": dataclasses.replace(TINY_D, c_dim=3),
    "noise": dataclasses.replace(TINY_D, attention_noise=True),
}


def ref_two_heads(tokens: list[Tensor], bias: Array | None = None) -> Array:
    q, k, v = (x.detach().numpy() for x in tokens)
    return ref_attention(q, k, v, 2, bias)


@pytest.mark.parametrize("name", VARIANTS)
def test_generator_equals_the_reference(name: str) -> None:
    config = VARIANTS[name]
    G = build_transgan(config)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, config.z_dim))
    c = np.eye(3)[[2, 0, 1]] if config.c_dim else None
    if config.mapping_layers:
        w = ref_mapping(z, c, state_of(G.mapping), 1, config.mapping_layers)[:, 0]
    else:
        w = z if c is None else z + c @ state_of(G.mapping)["embed"]
    expected = ref_transgan(w, state_of(G.synthesis), config)
    labels = None if c is None else torch.from_numpy(c)
    close(G(torch.from_numpy(z), labels), expected)
    assert expected.shape[1:] == G.img_shape == (2, 8, 16)
    w_avg = state_of(G.mapping)["w_avg"]
    truncated = ref_transgan(w_avg + 0.6 * (w - w_avg), state_of(G.synthesis), config)
    close(G(torch.from_numpy(z), labels, truncation_psi=0.6), truncated)


@pytest.mark.parametrize("name", D_VARIANTS)
def test_discriminator_equals_the_reference(name: str) -> None:
    config = D_VARIANTS[name]
    D = build_transgan(config)
    img = np.random.default_rng(0).normal(size=(3, 2, *config.img_size))
    c = np.eye(3)[[2, 0, 1]] if config.c_dim else None
    expected = ref_transgan_discriminator(img, c, state_of(D), config)
    close(D(torch.from_numpy(img), None if c is None else torch.from_numpy(c)), expected)
    assert expected.shape == (3, 1)
    assert expected.std() > 1e-3


def test_relative_positions_look_up_the_offset_in_the_table() -> None:
    relative = RelativePosition(3, (3, 4)).double()
    assert relative.table.shape == (5, 7, 3)
    assert 0 < relative.table.std() < 0.04
    close(relative(), ref_attention_bias(relative.table.detach().numpy(), (3, 4), (3, 4), 3))


def test_cells_are_windows_in_row_order() -> None:
    x = torch.arange(4 * 6).view(1, 24, 1)
    cells = to_cells(x, (4, 6), (2, 3))
    assert cells.squeeze(2).tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]
    assert torch.equal(from_cells(cells, (4, 6), (2, 3)), x)


def qkv(N: int, C: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(N)
    return [torch.randn(2, N, C, generator=generator, dtype=torch.float64) * size for _ in range(3)]


def small_heads(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Array]:
    """Return tokens of two heads of 4 channels, a bias, and the expected output of attention."""
    tokens, bias = [x.to(dtype) for x in qkv(6, 8)], torch.randn(2, 6, 6).to(dtype)
    return tokens, bias, ref_two_heads([x.double() for x in tokens], bias.double().numpy())


@pytest.mark.parametrize(("dtype", "D"), [(torch.float16, 8), (torch.bfloat16, 8), (torch.float32, 4)])
def test_small_16_bit_heads_are_padded_with_zeros(dtype: torch.dtype, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory-efficient kernels need heads of 8 channels in 16 bits; padding does not change the result."""
    fused = F.scaled_dot_product_attention
    sizes: set[int] = set()

    def record_sizes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options: Any) -> Tensor:
        sizes.update(x.shape[3] for x in (q, k, v))
        return fused(q, k, v, bias, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_sizes)
    tokens, bias, expected = small_heads(dtype)
    q, k, v = (split_heads(x, 2) for x in tokens)
    y = attend(q, k, v, bias).transpose(1, 2).flatten(2)
    assert sizes == {D}
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_16_bit_heads_use_memory_efficient_attention(dtype: torch.dtype) -> None:
    tokens, bias, expected = small_heads(dtype)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # raises an error if this kernel cannot run
        q, k, v = (split_heads(x.cuda(), 2) for x in tokens)
        y = attend(q, k, v, bias.cuda()).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(y.cpu().double().numpy(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("use_relative", [False, True])
def test_a_window_as_large_as_the_grid_is_full_attention(use_relative: bool) -> None:
    attention = CellAttention(2, (4, 6), (4, 6), use_relative=use_relative).double()
    table = None if attention.relative is None else attention.relative.table.detach().numpy()
    q, k, v = qkv(24, 8)
    close(attention(q, k, v), ref_two_heads([q, k, v], ref_attention_bias(table, (4, 6), (4, 6), 2)))


def test_axis_attention_reaches_every_token_in_two_steps() -> None:
    """The first step spreads the value of a token over the row, the second step over all columns."""
    attention = AxisAttention(2, (3, 5), use_relative=True).double()
    q, k, v = qkv(15, 4)
    v.requires_grad_()
    row = attention.rows(q, k, v)[0].sum(dim=1).view(3, 5)
    (reached,) = torch.autograd.grad(row[1, 2], v, retain_graph=True)
    assert torch.equal(reached[0].abs().sum(dim=1).view(3, 5) > 0, torch.arange(3)[:, None].expand(3, 5) == 1)
    (reached,) = torch.autograd.grad(attention(q, k, v)[0, 7].sum(), v)
    assert (reached[0].abs().sum(dim=1) > 0).all()


def test_nystrom_is_exact_with_all_tokens_as_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pseudo-inverse needs enough iterations. With fewer landmarks, the error is below that of the mean value."""
    q, k, v = qkv(16, 8)
    exact = ref_two_heads([q, k, v])
    monkeypatch.setattr(NystromAttention, "ITERATIONS", 20)
    close(NystromAttention(2, 16)(q, k, v), exact)
    smooth = [F.interpolate(x.mT, 64, mode="linear").mT / 4 for x in (q, k, v)]
    expected = torch.from_numpy(ref_two_heads(smooth))
    error = (NystromAttention(2, 16)(*smooth) - expected).norm()
    assert error < 0.1 * (smooth[2].mean(dim=1, keepdim=True) - expected).norm()


def test_pseudo_inverse_equals_that_of_numpy() -> None:
    A = torch.rand(2, 3, 6, 6, dtype=torch.float64) + 2 * torch.eye(6)
    close(pseudo_inverse(A, 20), np.linalg.pinv(A.numpy()))


def test_upsampling_equals_the_reference() -> None:
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    maps = x.view(2, 3, 4, 8).numpy()
    close(PixelShuffle((3, 4))(x), ref_shuffle(maps).reshape(2, 48, 2))
    rows = ref_bicubic(maps)
    expected = ref_bicubic(rows.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    close(BicubicUpsampling((3, 4)).double()(x), expected.reshape(2, 48, 8))
    close(Antialias((3, 4))(x), ref_low_pass(maps).reshape(2, 12, 8))


# Noise.


def test_token_noise_is_one_scaled_value_per_token() -> None:
    torch.manual_seed(0)
    noise = TokenNoise(50)
    assert (noise.strength.item(), noise.noise_const.shape) == (0, (50, 1))
    with torch.no_grad():
        noise.strength.fill_(0.5)
        x = torch.randn(2000, 50, 3)
        drawn = noise(x, "random") - x
        torch.testing.assert_close(drawn, drawn[:, :, :1].expand(-1, -1, 3), rtol=0, atol=1e-6)
        drawn = drawn[:, :, 0]
        assert drawn.std().item() == pytest.approx(0.5, rel=0.01)  # 100,000 draws
        assert drawn.mean().item() == pytest.approx(0, abs=0.01)
        assert (torch.corrcoef(drawn.t()) - torch.eye(50)).abs().max() < 0.12  # more than five standard deviations
        torch.testing.assert_close(noise(x, "const"), x + 0.5 * noise.noise_const)
        assert torch.equal(noise(x, "none"), x)
        assert noise(x.bfloat16(), "random").dtype == torch.bfloat16


def test_generator_noise_follows_the_noise_mode() -> None:
    G = build_transgan(VARIANTS["noise, latent tokens"]).requires_grad_(False)
    z = torch.randn(2, 5, dtype=torch.float64)
    const, none, first, second = (G(z, None, noise_mode=mode) for mode in ("const", "none", "random", "random"))
    images = [const, none, first, second]
    for a, b in combinations(images, 2):
        assert (a - b).abs().max() > 1e-3
    assert torch.equal(G(z, None), const)
    torch.manual_seed(3)
    first = G(z, None, noise_mode="random")
    torch.manual_seed(3)
    assert torch.equal(G(z, None, noise_mode="random"), first)
    maps = {name: x for name, x in G.synthesis.named_buffers() if name.endswith("noise_const")}
    assert len(maps) == sum(TINY.layers)
    for_each = {
        name: torch.stack([x, torch.randn_like(x)]) for name, x in maps.items()
    }  # as projector.py optimises them
    projected = torch.func.functional_call(G.synthesis, for_each, (G.mapping(z, None),))
    torch.testing.assert_close(projected[0], const[0])
    assert not torch.allclose(projected[1], const[1])
    state = {name: x for name, x in G.state_dict().items() if not name.endswith("strength")}
    G.load_state_dict(state | {f"synthesis.{name[:-11]}strength": torch.zeros(()) for name in maps})
    torch.testing.assert_close(G(z, None, noise_mode="random"), none)


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_noise_is_drawn_in_every_phase_of_training(shapes_zip: Path, part: str) -> None:
    trainer = new_trainer(noisy_config(shapes_zip))
    counts: list[int] = []

    def count(module: TokenNoise, args: tuple[Tensor, str]) -> None:
        assert args[1] == "random"
        counts.append(1)

    network = {"generator": trainer.G, "discriminator": trainer.D}[part]
    noises = [module for module in network.modules() if isinstance(module, TokenNoise)]
    for noise in noises:
        noise.register_forward_pre_hook(count)
    img, c = next(trainer._batches())
    for phase in trainer.phases:
        counts.clear()
        trainer.run_phase(phase, img, c)
        calls = {"G_main": 1, "D_main": 2 if part == "discriminator" else 1}[phase.name]  # images, interpolates
        assert len(counts) == 2 * calls * len(noises) > 0  # two micro-batches
    assert all(noise.strength.item() != 0 for noise in noises)


def noisy_config(data: Path) -> TrainConfig:
    """TransGAN with every source of randomness except the filter, which needs images larger than 16x16."""
    options = {
        "generator.family": "transgan",
        "generator.widths": (16, 4),
        "generator.layers": (1, 1),
        "generator.attention_noise": True,
        "discriminator.family": "transgan",
        "discriminator.widths": (8, 8),
        "discriminator.layers": (1, 1),
        "discriminator.local_layers": (0, 0),
        "discriminator.attention_noise": True,
        "augment.mode": "diffaug",
        "augment.policy": ("translation", "erase", "color", "hue"),
        "augment.cutout_p": 0.5,
        "augment.hue_p": 0.5,
        "loss.objective": "wgangp-eps",
        "data.path": str(data),
        "run.workers": 0,
        "run.batch_gpu": 4,
        "batch_size": 8,
    }
    return resolve(apply_options(PRESETS["tiny"], options), Environment(img_shape=(3, 16, 16), c_dim=0))


def test_resuming_is_exact_with_noise_and_random_augmentation(shapes_zip: Path, tmp_path: Path) -> None:
    config = noisy_config(shapes_zip)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, recompute=True))
    straight = new_trainer(config)
    train_steps(straight, 4)
    resumed = train_with_a_break(config, 2, 2, tmp_path)
    assert digest(saved_state(resumed)) == digest(saved_state(straight))


# Derivatives, precision, memory.


def test_twice_differentiable_attention_keeps_relative_positions() -> None:
    torch.manual_seed(0)
    attention = CellAttention(2, (2, 4), (2, 2), use_relative=True).double()
    q, k, v = torch.randn(3, 2, 8, 6, dtype=torch.float64)
    assert attention.relative is not None
    with torch.no_grad():
        attention.relative.table.normal_()
        with execution.using(twice_differentiable=True):
            twice = attention(q, k, v)
        torch.testing.assert_close(twice, attention(q, k, v))
        attention.relative = None
        assert not torch.allclose(twice, attention(q, k, v), atol=0.1)


@pytest.mark.parametrize(
    ("kind", "norm"), [("full", "layer"), ("grid", "token"), ("axis", "token"), ("nystrom", "token")]
)
def test_second_derivatives_of_a_block_are_correct(kind: Any, norm: Any) -> None:
    """Derivatives with respect to the input and all parameters, as needed by R1 and path length."""
    config = BlockConfig(num_heads=2, norm=norm, attention=kind, window=2, landmarks=2)
    torch.manual_seed(0)
    attention = config.build_attention((2, 4), is_full=False)
    block = Block(config, 4, attention, context_width=3).double()
    x, others = (torch.randn(1, n, C, dtype=torch.float64, requires_grad=True) for n, C in ((8, 4), (2, 3)))
    names = [name for name, _ in block.named_parameters()]

    def run(x: Tensor, others: Tensor, *parameters: Tensor) -> Tensor:
        with execution.using(twice_differentiable=True):
            out: Tensor = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, others))
        return out

    parameters = [parameter.detach().requires_grad_() for parameter in block.parameters()]
    assert torch.autograd.gradcheck(run, (x, others, *parameters), fast_mode=True)
    chosen = [i for i, name in enumerate(names) if "table" in name or name in ("qkv.weight", "cross.kv.weight")]

    def run_chosen(x: Tensor, *chosen_parameters: Tensor) -> Tensor:
        mixed = list(parameters)
        for i, parameter in zip(chosen, chosen_parameters, strict=True):
            mixed[i] = parameter
        return run(x, others.detach(), *mixed)

    with torch.no_grad():
        for parameter in parameters:
            parameter.requires_grad_(False)
    chosen_parameters = [parameters[i].clone().requires_grad_() for i in chosen]
    assert torch.autograd.gradgradcheck(run_chosen, (x, *chosen_parameters), fast_mode=True)


def penalty(network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the squared input gradient, as in R1, path length and WGAN-GP."""
    with execution.using(twice_differentiable=True):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x, None).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), list(network.parameters()), allow_unused=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "grid", "axis", "nystrom"])
def test_networks_on_a_gpu_compute_the_same_as_on_a_cpu(kind: Any) -> None:
    torch.manual_seed(0)
    G = TransGANConfig(z_dim=32, w_dim=32, widths=(64, 64, 16), layers=(1, 1, 1), full_upto=8, attention=kind).build()
    D = TransGANDiscriminatorConfig(widths=(32, 32), layers=(2, 1), local_layers=(1, 0), attention=kind).build()
    z, img = torch.randn(4, 32), torch.randn(4, 3, 32, 32)
    expected = [G(z, None), D(img, None), *penalty(D, img)]
    found = [G.cuda()(z.cuda(), None), D.cuda()(img.cuda(), None), *penalty(D, img.cuda())]
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            assert (a.cpu() - b).norm() <= 1e-3 * b.norm() + 1e-7


# Configurations.


@cache
def count(config: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


# Published parameter counts in millions; not published for the CelebA presets, see docs/transgan.md.
@pytest.mark.parametrize(
    ("preset", "size", "published", "g_count", "d_count"),
    [
        ("transgan-cifar", 32, ("83.3", "10.2"), 83_312_495, 10_210_400),
        ("transgan-stl10", 48, ("168.5", "10.3"), 168_466_623, 10_341_536),
        ("transgan-celeba64", 64, None, 202_953_927, 16_396_617),
        ("transgan-celeba128", 128, None, 204_215_447, 17_709_641),
        ("transgan-church256", 256, ("205.3", "17.8"), 205_291_952, 17_754_569),
        ("transgan-celebahq256", 256, ("212.9", "13.3"), 212_903_255, 13_334_593),
    ],
)
def test_presets_have_the_published_parameter_counts(
    preset: str, size: int, published: tuple[str, str] | None, g_count: int, d_count: int
) -> None:
    config = resolve(PRESETS[preset], Environment(img_shape=(3, size, size), c_dim=0))
    counts = count(config.generator), count(config.discriminator)
    assert counts == (g_count, d_count)
    assert published is None or tuple(f"{n / 1e6:.1f}" for n in counts) == published


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("transgan")])
def test_presets_have_the_published_schedule(preset: str) -> None:
    config = PRESETS[preset]
    is_stl10 = preset == "transgan-stl10"
    loss = config.loss
    assert (loss.objective, loss.n_critic, loss.g_batch_scale) == ("wgangp-eps", 5 if is_stl10 else 4, 2)
    assert config.batch_size == (32 if is_stl10 else 64)
    for adam in (config.g_optimizer, config.d_optimizer):
        assert (adam.lr, adam.beta1, adam.beta2, adam.clip_norm) == (1e-4, 0.0, 0.99, 5.0)
    assert (loss.r1_interval, loss.pl_interval) == (None, None)  # lazy regularisation would change the learning rate
    assert config.data.mirror
    fitted = resolve(config, Environment(img_shape=(3, *config.generator.img_size), c_dim=0)).loss
    assert (fitted.gp_weight, fitted.drift_weight, fitted.r1_gamma) == (10.0, 1e-3, 0.0)


# Settings of the released scripts (CelebA: of the slides): DiffAugment policy; maximum translation, probabilities of
# cutout or erase, filter and hue; half-life and ramp-up of the EMA; norms of G and D; noise in G and D.
RECIPES: dict[str, tuple[str, tuple[float, ...], tuple[float, float | None], tuple[str, str], tuple[bool, bool]]] = {
    "cifar": ("translation,cutout,color", (0.2, 0.3, 1, 1), (500, 0.1), ("layer", "layer"), (False, True)),
    "stl10": ("translation,erase,color", (0.2, 0.3, 1, 1), (500, 0.05), ("token", "token"), (False, True)),
    "celeba64": ("translation,cutout,color", (0.125, 1, 1, 1), (500, None), ("token", "layer"), (False, False)),
    "celeba128": ("translation,cutout,color", (0.125, 1, 1, 1), (500, None), ("token", "layer"), (False, False)),
    "church256": ("translation,erase,color", (0.2, 0.3, 1, 1), (35.4, None), ("token", "layer"), (True, False)),
    "celebahq256": (
        "filter,translation,erase,color,hue",
        (0.2, 0.3, 0.25, 0.5),
        (35.4, None),
        ("token", "layer"),
        (True, False),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_have_the_released_recipe(name: str) -> None:
    config = PRESETS[f"transgan-{name}"]
    G, D, augment = config.generator, config.discriminator, config.augment
    assert isinstance(G, TransGANConfig)
    assert isinstance(D, TransGANDiscriminatorConfig)
    policy, numbers, ema, norms, noise = RECIPES[name]
    assert (augment.mode, ",".join(augment.policy or DEFAULT_POLICY)) == ("diffaug", policy)
    assert (augment.translation, augment.cutout_p, augment.filter_p, augment.hue_p) == numbers
    assert (config.ema.kimg, config.ema.rampup) == ema
    assert (G.norm, D.norm) == norms
    assert (G.attention_noise, D.attention_noise) == noise


@pytest.mark.parametrize("name", ["transgan-church256", "transgan-celebahq256"])
def test_the_ema_of_large_models_decays_by_0995_per_step_of_g(name: str) -> None:
    """G is updated every fourth step of 64 images; after four steps the EMA keeps 0.995 of the old weights."""
    config = PRESETS[name]
    G = nn.Linear(1, 1)
    G.register_buffer("w_avg", torch.zeros(1))
    with torch.no_grad():
        G.weight.fill_(1)
        ema = EMA(G, config.ema)
        G.weight.fill_(0)
    assert (config.batch_size, config.loss.n_critic) == (64, 4)
    for step in range(4):
        ema.update(64 * step, 64)
    assert ema.module.weight.item() == pytest.approx(0.995, abs=1e-6)


PAGE = (Path(__file__).parent.parent / "docs" / "transgan.md").read_text()


def test_the_docs_list_every_preset_with_parameter_counts() -> None:
    rows = re.findall(r"--cfg=(transgan-\w+)` \| ([\d.]+)M / ([\d.]+)M", PAGE)
    assert [name for name, *_ in rows] == [name for name in PRESETS if name.startswith("transgan")]
    for name, g_count, d_count in rows:
        config = PRESETS[name]
        config = resolve(config, Environment(img_shape=(3, *config.generator.img_size), c_dim=0))
        counts = count(config.generator), count(config.discriminator)
        assert tuple(f"{n / 1e6:.1f}" for n in counts) == (g_count, d_count)


@pytest.mark.slow
def test_options_reproduce_the_rows_of_table_3(tmp_path: Path) -> None:
    """Compose the rows as on the page: rows 1-4 deviate from the preset in all options, each later row in one fewer."""
    (cells,) = re.findall(r"\| standard attention \| (.*) \|", PAGE)
    baseline = " ".join(f"--set={field}" for field in re.findall(r"`([^`]*)`", cells))
    data = tmp_path / "scenes.zip"
    make = ["--source=shapes", f"--dest={data}", "--max-images=2", "--width=64", "--height=64", "--workers=1"]
    assert CliRunner().invoke(dataset_tool.main, make).exit_code == 0

    def plan(options: list[str]) -> Any:
        common = ["--outdir=x", f"--data={data}", "--cfg=transgan-celeba64", "--device=cpu", "-n"]
        result = CliRunner().invoke(train.main, [*common, *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["options"]

    rows = [baseline.replace("=full", f"={kind}").split() for kind in ("full", "nystrom", "axis", "grid")]
    for removed in ("discriminator.multi_scale=", "generator.norm=", "position="):
        rows.append([option for option in rows[-1] if removed not in option])
    plans = [plan(row) for row in rows]
    kinds = [(p["generator"]["attention"], p["discriminator"]["attention"]) for p in plans]
    assert kinds == [(kind, kind) for kind in ("full", "nystrom", "axis", "grid", "grid", "grid", "grid")]
    assert [p["discriminator"]["multi_scale"] for p in plans] == [False] * 4 + [True] * 3
    assert [p["generator"]["norm"] for p in plans] == ["layer"] * 5 + ["token"] * 2
    assert [p["generator"]["position"] for p in plans] == ["absolute"] * 6 + ["both"]
    assert plans[-1] == plan([])


def test_initial_weights_follow_the_released_code() -> None:
    """Linear layers: PyTorch's default in G, N(0, 0.02^2) in D; convolutions of D and the last layer of G: Xavier."""
    torch.manual_seed(0)
    G: Any = TransGANConfig(z_dim=32, w_dim=32, widths=(256,), layers=(1,)).build()
    weight = G.synthesis.stages[0].blocks[0].fc1.weight
    assert weight.abs().max() <= 1 / 16
    assert weight.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
    generators: list[Any] = [TransGANConfig(z_dim=1, w_dim=1, widths=(64,), layers=(0,)).build() for _ in range(30)]
    weights = torch.stack([G.synthesis.torgb.weight for G in generators])  # (30, 3, 64), as for CIFAR-10
    assert 0.98 * math.sqrt(6 / 67) < weights.abs().max() <= math.sqrt(6 / 67)
    assert weights.std().item() == pytest.approx(0.1728, rel=0.02)
    D: Any = TransGANDiscriminatorConfig(widths=(256,), layers=(1,), local_layers=(0,), img_size=(16, 16)).build()
    for linear in (D.scales[0][0].fc1, D.last_block.qkv):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not D.head.bias.any()
    bound = math.sqrt(6 / (12 + 256 * 4))  # U(-bound, bound) from fan-in and fan-out
    assert 0.95 * bound < D.embeddings[0].conv.weight.abs().max() <= bound


def test_freeze_d_counts_patches_and_blocks_from_the_image() -> None:
    D: Any = TINY_D.build()
    layers = D.layers_from_image()
    assert len(layers) == 3 + 2 + 1 + 1
    assert layers[0] is D.embeddings[0]
    assert layers[1] is D.scales[0][0]
    assert layers[3] is D.embeddings[1]
    frozen = {id(p) for layer in layers for p in layer.parameters()}
    left = {name.split(".")[0] for name, p in D.named_parameters() if id(p) not in frozen}
    assert left == {"cls", "last_block", "norm", "head"}


@pytest.mark.parametrize(
    ("size", "widths", "layers"),
    [
        (8, (1024,), (5,)),
        (32, (1024, 256, 64), (5, 4, 2)),
        (64, (1024, 1024, 1024, 256), (5, 4, 4, 4)),
        (256, (1024, 1024, 1024, 256, 64, 16), (5, 4, 4, 4, 4, 4)),
        (512, (1024, 1024, 1024, 1024, 256, 64, 16), (5, 4, 4, 4, 4, 4, 4)),
    ],
)
def test_fit_chooses_the_published_stages(size: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> None:
    config = TransGANConfig(**TransGANConfig.AUTO).fit(size, size)
    assert (config.widths, config.layers, config.img_size) == (widths, layers, (size, size))
    assert published_stages(len(widths)) == (widths, layers)


@pytest.mark.parametrize(
    ("size", "patch", "grids"),
    [
        ((8, 8), 2, ((4, 4), (2, 2))),
        ((48, 48), 2, ((24, 24), (12, 12))),
        ((64, 128), 2, ((32, 64), (16, 32), (8, 16))),
        ((256, 256), 4, ((64, 64), (32, 32), (16, 16))),
    ],
)
def test_fit_chooses_the_patch_size(size: tuple[int, int], patch: int, grids: Any) -> None:
    config = TransGANDiscriminatorConfig(**TransGANDiscriminatorConfig.AUTO).fit(*size)
    assert (config.patch, config.grids, config.img_size) == (patch, grids, size)


def test_changing_the_family_keeps_the_shared_fields() -> None:
    mapped = StyleformerConfig(z_dim=7, w_dim=9, mapping_layers=4, c_dim=2)
    config = TransGANConfig.convert_from(mapped)
    assert (config.z_dim, config.w_dim, config.mapping_layers, config.c_dim) == (7, 7, 0, 2)
    assert (config.widths, config.layers) == ((), ())
    back = StyleformerConfig.convert_from(config)
    assert (back.z_dim, back.w_dim, back.mapping_layers) == (7, 7, 2)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"widths": (16, 8, 4)}, "widths", r"after 16 must be 16 \(bicubic upsampling\) or 4 \(pixel shuffle\), not 8"),
        ({"widths": (16, 16, 3)}, "widths", "multiple of num_heads=2, but 3 is not"),
        ({"layers": (1, 1)}, "layers", "one entry per resolution"),
        ({"layers": (1, 1, -1)}, "layers", "each must be at least 0"),
        (
            {"w_dim": 6},
            "w_dim",
            "without a mapping network w is z, so it must equal z_dim=5: set --z-dim and generator.w_dim",
        ),
        ({"window": 3}, "window", "does not divide the grid 4x8; possible: 4, 2"),
        ({"attention": "nystrom"}, "landmarks", "does not divide the 32 tokens of the grid 4x8"),
        ({"attention": "dense"}, "attention", "one of full, grid, axis, nystrom"),
        ({"norm": "batch"}, "norm", "one of token, layer"),
        ({"position": "none"}, "position", "one of absolute, relative, both"),
        ({"antialias": 3}, "antialias", "only 2 upsamplings"),
        ({"num_heads": 0}, "num_heads", "at least 1"),
    ],
)
def test_invalid_generator_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        dataclasses.replace(TINY, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"widths": (5, 2, 4)}, "widths", "multiple of num_heads=2, but 5 is not"),
        ({"layers": (1, 1)}, "layers", "one entry per scale"),
        ({"local_layers": (3, 0, 0)}, "local_layers", "between 0 and the number of blocks"),
        ({"img_size": (12, 16)}, "img_size", "3 scales from patches of 2 need sides divisible by 8"),
        ({"window": 3}, "window", "does not divide the grid 8x16; possible: 8, 4, 2"),
        ({"patch": 1, "overlap": True}, "overlap", "needs an even patch size"),
    ],
)
def test_invalid_discriminator_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        dataclasses.replace(TINY_D, **changes)
    assert caught.value.field == field


def test_a_configuration_with_open_fields_cannot_be_built() -> None:
    for config in (
        TransGANConfig(**TransGANConfig.AUTO),
        TransGANDiscriminatorConfig(**TransGANDiscriminatorConfig.AUTO),
    ):
        with pytest.raises(ConfigError, match="chosen"):
            config.build()
    with pytest.raises(ConfigError, match=r"widths=\(16, 16, 4\).*32x64.*base=\(4, 8\) with 4 widths"):
        TINY.fit(32, 64)
    with pytest.raises(ConfigError, match=r"base=\(2, 4\)"):
        TINY.fit(32, 32)
