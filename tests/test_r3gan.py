"""R3GAN: every layer and both networks against the float64 reference, initialization, sizes and parameter counts."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_layers import close, state_of
from reference_r3gan import (
    build_r3gan,
    ref_block,
    ref_discriminator,
    ref_downsample,
    ref_generator,
    ref_pointwise,
    ref_upsample,
)
from torch import Tensor
from training_helpers import distances_to_scenes

from dnnlib.config import ConfigError
from dnnlib.schedule import value_at
from torch_utils.misc import OnMeta
from torch_utils.ops.upfirdn2d import downsample2d, upsample2d
from training.config import PRESETS, Environment, resolve
from training.networks import convolution, execution
from training.networks.layers import resample_filter
from training.networks.mapping import ConcatenatingMapping
from training.networks.r3gan import Pointwise, R3GANConfig, ResidualBlock, published_width
from training.networks.r3gan_discriminator import R3GANDiscriminatorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.stylegan2 import StyleGAN2Config

TINY = R3GANConfig(
    z_dim=5, img_channels=2, base=(2, 4), widths=(12, 12, 8), layers=(1, 2, 1), group_width=4
)  # fmt: skip
VARIANTS = {
    "unconditional": TINY,
    "conditional": dataclasses.replace(TINY, c_dim=3, w_dim=9),
    "tight clamp": dataclasses.replace(TINY, conv_clamp=0.3),
    "other widths, a stage without blocks": dataclasses.replace(TINY, widths=(8, 12, 4), layers=(0, 1, 2)),
}
TINY_D = R3GANDiscriminatorConfig(
    img_channels=2, img_size=(8, 16), widths=(12, 8), layers=(1, 2), group_width=4
)  # fmt: skip
D_VARIANTS = {
    "unconditional": TINY_D,
    "conditional": dataclasses.replace(TINY_D, c_dim=3),
    "equal widths, odd grid": dataclasses.replace(TINY_D, img_size=(20, 12), widths=(8, 8, 8), layers=(2, 1, 1)),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_generator_equals_the_reference(name: str) -> None:
    config = VARIANTS[name]
    G = build_r3gan(config)
    z, c = normal(3, 5), torch.eye(3, dtype=torch.float64)[[2, 0, 1]] if config.c_dim else None
    w = z.numpy()
    if c is not None:
        w = np.concatenate([w, c.numpy() @ state_of(G.mapping)["embed"]], axis=1)
    close(G(z, c), ref_generator(w, state_of(G.synthesis), config))
    assert G.img_shape == (2, 8, 16)
    assert (G.num_ws, G.w_dim) == (1, w.shape[1])


@pytest.mark.parametrize("name", D_VARIANTS)
def test_discriminator_equals_the_reference(name: str) -> None:
    config = D_VARIANTS[name]
    D = build_r3gan(config)
    img, c = normal(3, 2, *config.img_size), torch.eye(3, dtype=torch.float64)[[2, 0, 1]] if config.c_dim else None
    expected = ref_discriminator(img.numpy(), None if c is None else c.numpy(), state_of(D), config)
    close(D(img, c), expected)
    assert expected.std() > 1e-3


def test_each_layer_equals_the_reference() -> None:
    x = normal(2, 6, 4, 7)
    f = resample_filter()
    close(upsample2d(x, f), ref_upsample(x.numpy()))
    close(downsample2d(x[..., :6], f), ref_downsample(x[..., :6].numpy()))
    pointwise = Pointwise(6, 3).double()
    close(pointwise(x), ref_pointwise(x.numpy(), state_of(pointwise)["weight"]))
    block: Any = ResidualBlock(6, group_width=3, num_blocks=2).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    close(block(x), ref_block(x.numpy(), state_of(block)))


# Derivatives.


@pytest.mark.parametrize("c_dim", [0, 3])
def test_second_derivatives_of_the_discriminator_are_correct(c_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the implementation for GPUs as well, R1's derivative equals that of PyTorch's convolutions."""
    config = dataclasses.replace(TINY_D, img_channels=1, img_size=(6, 6), widths=(4, 2), layers=(1, 1), c_dim=c_dim)
    D = build_r3gan(config)
    img = normal(2, 1, 6, 6).requires_grad_()
    c = torch.eye(3, dtype=torch.float64)[:2] if c_dim else None
    results = []
    for is_slow in (False, True):
        monkeypatch.setattr(convolution, "_has_slow_derivatives", lambda x, is_slow=is_slow: is_slow)
        (gradient,) = torch.autograd.grad(D(img, c).sum(), img, create_graph=True)
        penalty = gradient.square().sum()
        results.append([penalty, *torch.autograd.grad(penalty, [*D.parameters()], allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    small = normal(1, 1, 6, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: D(x, None if c is None else c[:1]), small)


def test_second_derivatives_of_a_block_are_correct() -> None:
    block = ResidualBlock(2, group_width=2, num_blocks=1).double()
    with torch.no_grad():
        block.reduce.normal_()
    weights = [block.expand, block.spatial, block.reduce]

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        names = ("expand", "spatial", "reduce")
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradgradcheck(apply, (normal(1, 2, 3, 3).requires_grad_(), *weights))


# Initialization.


def test_every_block_starts_as_the_identity() -> None:
    for config in (TINY, TINY_D):
        torch.manual_seed(0)
        blocks = [module for module in config.build().modules() if isinstance(module, ResidualBlock)]
        assert len(blocks) == sum(config.layers)
        for block in blocks:
            x = torch.randn(2, block.reduce.shape[0], 4, 4)
            assert torch.equal(block(x), x)


@pytest.mark.parametrize("part", ["G", "D"])
def test_initial_weights_have_the_published_gains(part: str) -> None:
    """N(0, gain^2 / fan_in), with He's gain times L^(-1/4) in the blocks of a network of L blocks."""
    torch.manual_seed(0)
    widths, c_dim = (128, 128, 64), 10
    expected: list[tuple[Any, float]]
    if part == "G":
        config: Any = R3GANConfig(c_dim=c_dim, widths=widths, layers=(2, 2, 2))
    else:
        config = R3GANDiscriminatorConfig(img_size=(16, 16), c_dim=c_dim, widths=widths, layers=(2, 2, 2))
    network = config.fit(16, 16).build()
    in_block = math.sqrt(2 / 1.04) * 6**-0.25
    stds = {"expand": in_block / math.sqrt(128), "spatial": in_block / math.sqrt(16 * 9), "reduce": 0.0}
    for module in [block for block in network.modules() if isinstance(block, ResidualBlock)][:3]:
        wide = math.sqrt(128 / module.reduce.shape[0])
        assert module.expand.std().item() == pytest.approx(stds["expand"] * wide, rel=0.03)
        assert module.spatial.std().item() == pytest.approx(stds["spatial"], rel=0.03)
        assert not any(weight.any() for weight in (module.reduce, module.expand_bias, module.spatial_bias))
    if part == "G":
        S = network.synthesis
        expected = [(S.basis, 1), (S.scale.weight, 1 / math.sqrt(128))]
        expected += [(network.mapping.embed, 1 / math.sqrt(c_dim))]
        expected += [(S.stages[2].transition.weight, 1 / math.sqrt(128)), (S.torgb.weight, 1 / 8)]
    else:
        expected = [(network.fromrgb.weight, 1 / math.sqrt(3)), (network.stages[0].transition.weight, 1 / 8)]
        expected += [(network.kernel, 1 / 4), (network.head.weight, 1 / math.sqrt(128))]
        expected += [(network.embed, 1 / math.sqrt(128 * c_dim))]
    for weight, std in expected:
        assert abs(weight.std().item() / std - 1) < 4 / math.sqrt(2 * weight.numel())
        assert abs(weight.mean().item() / std) < 4 / math.sqrt(weight.numel())


def test_labels_are_concatenated_to_the_latent() -> None:
    torch.manual_seed(0)
    mapping = ConcatenatingMapping(z_dim=3, c_dim=2, label_dim=4, num_ws=1)
    z, c = torch.randn(2, 3), torch.eye(2)
    assert mapping.embed is not None
    assert torch.equal(mapping(z, c)[:, 0], torch.cat([z, mapping.embed], dim=1))
    plain = ConcatenatingMapping(z_dim=3, c_dim=0, label_dim=0, num_ws=1)
    assert torch.equal(plain(z, None)[:, 0], z)
    assert list(plain.parameters()) == []


# Precision.


def test_precision_is_reduced_per_grid() -> None:
    """Grids below the limit, the stem of G, ToRGB and the head of D compute in float32."""
    dtypes: dict[str, torch.dtype] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            dtypes[name] = out.dtype

        return hook

    G: Any = TINY.build()
    D: Any = TINY_D.build()
    stages = {f"G{stage.place}": stage for stage in G.synthesis.stages} | {f"D{s.place}": s for s in D.stages}
    for name, stage in stages.items():
        stage.register_forward_hook(remember(name))
    with execution.using(reduced=torch.bfloat16, min_grid=8):
        img = G(torch.randn(2, 5), None)
        logits = D(torch.randn(2, 2, 8, 16), None)
    low, full = torch.bfloat16, torch.float32
    assert dtypes == {"G2x4": full, "G4x8": low, "G8x16": low, "D8x16": low, "D4x8": low}
    assert img.dtype == logits.dtype == full


@pytest.mark.slow
def test_both_networks_halve_the_distance_to_real_images(tmp_path: Path) -> None:
    options = ["--gen=r3gan", "--g_dict=64,64", "--num_layers=1,1", "--z-dim=32", "--disc=r3gan", "--loss=relativistic"]
    options += ["--set=discriminator.widths=64,64", "--set=discriminator.layers=1,1", "--batch=16", "--glr=0.0005"]
    untrained, trained = distances_to_scenes(tmp_path, 8, *options, "--dlr=0.001", "--kimg=6", "--tick=6")
    assert trained <= untrained / 2


# Sizes and parameter counts.

PUBLISHED: dict[str, tuple[tuple[int, ...], int, int, int, tuple[int, int]]] = {
    "StackedMNIST": ((768,) * 4, 16, 32, 0, (20_732_160, 20_683_776)),
    "CIFAR-10": ((768,) * 4, 16, 32, 10, (20_781_952, 21_280_512)),
    "FFHQ-64": ((*[768] * 4, 384), 16, 64, 0, (22_429_824, 22_381_440)),
    "FFHQ-256": ((*[768] * 4, 384, 192, 96), 16, 256, 0, (23_057_952, 23_009_568)),
    "ImageNet-32": ((1536,) * 4, 32, 32, 1000, (82_914_304, 86_548_992)),
    "ImageNet-64": ((1536,) * 5, 32, 64, 1000, (103_570_432, 107_205_120)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_parameter_counts(name: str) -> None:
    widths, group_width, side, c_dim, counts = PUBLISHED[name]
    shape = {"widths": widths, "layers": (2,) * len(widths), "group_width": group_width, "c_dim": c_dim}
    configs: Any = (R3GANConfig(**shape), R3GANDiscriminatorConfig(**shape))  # type: ignore[arg-type]
    with OnMeta():
        networks = [config.fit(side, side).build() for config in configs]
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == counts


# Table 9: dataset; batch; total length and burn-in in Mimg; final lr; gamma; half-life of the EMA in Mimg; p.
RECIPES: dict[str, tuple[str, int, tuple[int, int], float, tuple[float, float], float, float | None]] = {
    "cifar": ("CIFAR-10", 512, (250, 20), 5e-5, (0.05, 0.005), 5, 0.55),
    "stackedmnist": ("StackedMNIST", 512, (10, 2), 2e-4, (1, 0.1), 0.5, None),
    "ffhq64": ("FFHQ-64", 256, (100, 20), 5e-5, (2, 0.2), 0.5, 0.3),
    "ffhq256": ("FFHQ-256", 256, (200, 20), 5e-5, (150, 15), 0.5, 0.3),
    "imagenet32": ("ImageNet-32", 4096, (1000, 200), 5e-5, (0.5, 0.05), 50, 0.5),
    "imagenet64": ("ImageNet-64", 4096, (1000, 200), 5e-5, (1, 0.1), 50, 0.4),
}


def cosine(start: float, end: float, n: float, length: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(n / length, 1))) / 2


@pytest.mark.parametrize("name", RECIPES)
def test_presets_have_the_published_recipe(name: str) -> None:
    config = PRESETS[f"r3gan-{name}"]
    _, batch, (total, burn_in), lr, gamma, half_life, p = RECIPES[name]
    assert (config.batch_size, config.run.total_kimg) == (batch, 1000 * total)
    assert (config.loss.objective, config.loss.n_critic, config.loss.r1_interval) == ("relativistic", 1, None)
    assert (config.loss.pl_weight, config.loss.style_mixing, config.ema.rampup) == (0, 0, None)
    assert (config.loss.d_first, config.loss.fresh_reals, config.loss.penalty) == (True, True, "exact")
    assert config.g_optimizer == config.d_optimizer
    assert (config.g_optimizer.beta1, config.g_optimizer.clip_norm) == (0, None)
    augment = config.augment
    if p is None:
        assert augment.mode == "noaug"
    else:
        assert (augment.mode, augment.pipe, augment.color_strength) == ("fixed", "bgcc", 0.5)
    values = [(config.g_optimizer.lr, 2e-4, lr), (config.g_optimizer.beta2, 0.9, 0.99)]
    values += [(config.loss.r1_gamma, *gamma), (config.ema.kimg, 0, 1000 * half_life)]
    values += [(augment.p, 0, p)] if p is not None else []
    for value, start, end in values:
        assert value is not None
        for n in (0, burn_in / 4, burn_in / 2, burn_in, total):
            assert value_at(value, int(n * 10**6)) == pytest.approx(cosine(start, end, n, burn_in))
    assert config.data.mirror == (name != "stackedmnist")  # mirrored digits are not digits
    assert config.data.use_labels == (name in ("cifar", "imagenet32", "imagenet64"))


@pytest.mark.parametrize("name", RECIPES)
def test_presets_have_the_published_networks(name: str) -> None:
    """Bfloat16 on the highest three grids of 32x32 networks, four of larger ones."""
    config = PRESETS[f"r3gan-{name}"]
    widths, group_width, side, c_dim, counts = PUBLISHED[RECIPES[name][0]]
    config = resolve(config, Environment(img_shape=(3, side, side), c_dim=c_dim, on_gpu=True, has_bf16=True))
    G: Any = config.generator
    D: Any = config.discriminator
    assert (G.z_dim, G.w_dim, G.c_dim) == (64, 128 if c_dim else 64, c_dim)
    assert (G.widths, D.widths, G.group_width, D.group_width) == (widths, widths, group_width, group_width)
    with OnMeta():
        assert tuple(sum(p.numel() for p in part.build().parameters()) for part in (G, D)) == counts
    assert D.group_size == 0
    assert config.precision == "bf16"
    assert sum(max(grid) >= config.reduced_from for grid in G.grids) == (3 if side == 32 else 4)


PAGE = (Path(__file__).parent.parent / "docs" / "r3gan.md").read_text()


def test_the_docs_list_every_preset_with_parameter_counts() -> None:
    rows = re.findall(r"--cfg=r3gan-(\w+)` \| ([\d.]+)M / ([\d.]+)M", PAGE)
    assert [name for name, *_ in rows] == [*RECIPES]
    assert [f"r3gan-{name}" for name in RECIPES] == [name for name in PRESETS if name.startswith("r3gan")]
    for name, *found in rows:
        assert found == [f"{n / 1e6:.2f}" for n in PUBLISHED[RECIPES[name][0]][4]]


@pytest.mark.parametrize("side", [64, 256])
def test_fit_chooses_the_widths_of_the_ffhq_models(side: int) -> None:
    widths = PUBLISHED[f"FFHQ-{side}"][0]
    for config in (R3GANConfig(**R3GANConfig.AUTO), R3GANDiscriminatorConfig(**R3GANDiscriminatorConfig.AUTO)):
        fitted: Any = config.fit(side, side)
        assert (fitted.widths, fitted.layers) == (widths, (2,) * len(widths))
        assert fitted.img_size == (side, side)


def test_fit_supports_other_sizes() -> None:
    open_g, open_d = R3GANConfig(**R3GANConfig.AUTO), R3GANDiscriminatorConfig(**R3GANDiscriminatorConfig.AUTO)
    G = dataclasses.replace(open_g, base=(7, 5)).fit(28, 20)
    assert (G.grids, G.widths) == (((7, 5), (14, 10), (28, 20)), (768, 768, 768))
    D = open_d.fit(28, 20)
    assert D.grids == ((7, 5), (14, 10), (28, 20))
    assert D.widths == (768, 768, 768)
    assert [published_width((side, 1)) for side in (4, 32, 33, 48, 64, 128, 512, 1024, 4096)] == [
        *(768, 768, 384, 384, 384, 192, 48, 24, 24)
    ]
    assert dataclasses.replace(open_g, c_dim=10).fit(32, 32).w_dim == 128
    assert dataclasses.replace(open_g, c_dim=10, w_dim=70).fit(32, 32).w_dim == 70


def test_changing_the_family_keeps_the_shared_fields() -> None:
    other = StyleformerConfig(z_dim=48, w_dim=32, mapping_layers=4, c_dim=3, conv_clamp=None)
    ours = R3GANConfig.convert_from(other)
    assert (ours.z_dim, ours.w_dim, ours.mapping_layers, ours.c_dim, ours.widths) == (48, 0, 0, 3, ())
    back = StyleGAN2Config.convert_from(ours)
    assert (back.z_dim, back.w_dim, back.mapping_layers, back.c_dim) == (48, 512, 2, 3)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"mapping_layers": 2}, "mapping_layers", "must be 0; R3GAN has no mapping network"),
        ({"w_dim": 32}, "w_dim", "without labels w is the latent, so it must equal z_dim=64; 0 chooses that"),
        ({"w_dim": 64, "c_dim": 3}, "w_dim", "must exceed z_dim=64"),
        ({"group_width": 10}, "group_width", "does not divide the 1536 hidden channels of the stage of width 768"),
        ({"layers": (2, 2)}, "layers", "one entry per resolution, 4"),
    ],
)
def test_invalid_generator_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        R3GANConfig(**changes)
    assert error.value.field == field
    assert text in error.value.problem


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"img_size": (9, 9)}, "img_size", "cannot be halved"),
        ({"img_size": (64, 64)}, "widths", "one entry per grid, 5 for images of 64x64"),
        ({"layers": (2, 2)}, "layers", "one entry per grid, 4 for images of 32x32"),
        ({"layers": ()}, "layers", "not chosen yet"),
        ({"group_width": 10}, "group_width", "does not divide"),
    ],
)
def test_invalid_discriminator_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        R3GANDiscriminatorConfig(**changes).build()
    assert error.value.field == field
    assert text in error.value.problem


def test_a_generator_for_an_unknown_size_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match=r"widths=.*not chosen yet"):
        R3GANConfig(widths=(), layers=()).build()


def test_freeze_d_counts_blocks_from_the_image() -> None:
    D: Any = TINY_D.build()
    assert D.layers_from_image() == [D.fromrgb, *D.stages[0].blocks, D.stages[0].transition]
