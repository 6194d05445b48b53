"""Styleformer2: network and layers against the float64 reference, and the input of its discriminator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference_layers import build, close, inputs, randomize, ref_mapping, state_of
from reference_styleformer2 import ref_positions, ref_styleformer2
from small_families import small_discriminator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_helpers import (
    OBJECTIVE_SETTINGS,
    OBJECTIVES,
    every_phase_config,
    new_trainer,
    saved_state,
    train_steps,
    train_with_a_break,
)

from dnnlib.config import ConfigError, UserError, override
from torch_utils.checkpoint import digest
from training.augment.pipe import AugmentConfig, AugmentPipe
from training.augment.rgb_heads import RGBHeadsPipe, build_pipe
from training.config import PRESETS, Environment, resolve
from training.dataset import ImageDataset
from training.hooks import Overfitting
from training.loss import GAN
from training.networks import execution
from training.networks.attention import NormalizedSelfAttention
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer2 import (
    PlaneWaves,
    ScaledLinear,
    Styleformer2Block,
    Styleformer2Config,
    style_affine,
    wave_numbers,
)
from training.networks.styleformer_block import modulate_blocks
from training.penalties import Estimate, squared_differences, squared_gradients
from training.snapshots.snapshot import outline
from training.snapshots.transfer import copy_weights

TINY = Styleformer2Config(
    z_dim=5,
    w_dim=6,
    img_channels=2,
    base=(2, 3),
    widths=(12, 8, 8),
    layers=(1, 2, 1),
    depth=4,
    lr_width=3,
    multi_level=True,
)
VARIANTS = {
    "plain": TINY,
    "linformer": dataclasses.replace(TINY, linformer=True, linformer_k=5, linformer_min_tokens=24),
    "conditional": dataclasses.replace(TINY, c_dim=3),
    "one resolution": dataclasses.replace(TINY, widths=(8,), layers=(2,), minimum_head=4, multi_level=False),
    "tight clamp": dataclasses.replace(TINY, conv_clamp=0.3),
    "no clamp": dataclasses.replace(TINY, conv_clamp=None),
    "constant input": dataclasses.replace(TINY, sine_input=False),
    "no mlp": dataclasses.replace(TINY, mlp_ratio=0),
    "wide mlp": dataclasses.replace(TINY, mlp_ratio=3),
    "no convolution": dataclasses.replace(TINY, mlp_kernel=1),
    "large kernel": dataclasses.replace(TINY, mlp_kernel=5),
    "no qk norm": dataclasses.replace(TINY, qk_norm=False),
    "no noise": dataclasses.replace(TINY, noise=False),
    "fast mapping": dataclasses.replace(TINY, mapping_lr=0.5),
    "one head": dataclasses.replace(TINY, multi_level=False),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_generator_equals_the_reference(name: str, noise_mode: Any) -> None:
    config = VARIANTS[name]
    G, (z, c) = build(config), inputs(config)
    labels = None if c is None else c.numpy()
    count, multiplier = config.mapping_layers, config.mapping_lr
    ws = ref_mapping(z.numpy(), labels, state_of(G.mapping), config.num_ws, count, multiplier=multiplier)
    images = ref_styleformer2(ws, state_of(G.synthesis), config, noise=noise_mode == "const")
    close(G(z, c, noise_mode=noise_mode), images[0])
    with execution.using(all_rgb_heads=True):
        stack = G(z, c, noise_mode=noise_mode)
    close(stack, np.concatenate(images, axis=1) if config.multi_level else images[0])
    assert stack.shape[1] == config.num_rgb_heads * config.img_channels


def test_without_noise_all_noise_modes_are_equal() -> None:
    config = VARIANTS["no noise"]
    G, (z, c) = config.build(), inputs(config)
    assert torch.equal(G(z, c, noise_mode="random"), G(z, c, noise_mode="none"))
    assert not any(name.endswith("noise_strength") for name, _ in G.named_parameters())


@pytest.mark.parametrize(("grid", "channels"), [((2, 3), 8), ((5, 4), 13), ((1, 2), 1)])
def test_positions_equal_the_reference(grid: tuple[int, int], channels: int) -> None:
    np.testing.assert_allclose(PlaneWaves(grid, channels)(), ref_positions(*grid, channels), rtol=1e-5, atol=1e-5)


def test_a_generator_is_built_on_the_device_of_the_context() -> None:
    with torch.device("meta"):
        G = Styleformer2Config(widths=(8, 8), layers=(1, 1), base=(4, 4)).build()
    assert {tensor.device.type for tensor in (*G.parameters(), *G.buffers())} == {"meta"}


def test_the_first_waves_have_the_longest_wavelengths() -> None:
    """Wave numbers written out, and orthogonality over the period of two sides."""
    assert wave_numbers(6).tolist() == [[0, 1], [1, 0], [1, -1], [1, 1], [0, 2], [2, 0]]
    waves = PlaneWaves((16, 16), 20)
    period = PlaneWaves((32, 32), 20)
    period.rows, period.columns = (  # continue the waves of the small grid
        torch.cat([x, x * (-1) ** torch.tensor(numbers).view(1, 1, -1, 1)], dim=dim)
        for dim, x, numbers in ((0, waves.rows, wave_numbers(10)[:, 0]), (1, waves.columns, wave_numbers(10)[:, 1]))
    )
    x = period().double()
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-5)


def run_block(block: Styleformer2Block, x: Tensor, w: Tensor) -> Tensor:
    """Map tokens x (B, N, C) and w (B, w_dim) to the output of one block."""
    (modulation,) = modulate_blocks([block], {block.affine: block.affine(w)}, "const")
    out: Tensor = block(x, modulation)
    return out


@pytest.mark.parametrize("name", ["linformer", "no mlp", "no convolution", "no qk norm"])
def test_second_derivatives_of_a_block_are_correct(name: str) -> None:
    config = dataclasses.replace(VARIANTS[name], linformer=True, linformer_k=2, linformer_min_tokens=6)
    block = Styleformer2Block(config, (2, 3), 4).double()
    randomize(block)
    x, w = (torch.randn(1, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (6,)))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x, w: run_block(block, x, w), (x, w))


def test_fused_attention_equals_the_twice_differentiable_one() -> None:
    G, (z, _) = build(TINY), inputs(TINY)
    with execution.using(twice_differentiable=True):
        expected = G(z, None)
    torch.testing.assert_close(G(z, None), expected, rtol=1e-10, atol=1e-10)


def test_closed_gates_make_a_block_the_identity() -> None:
    block = Styleformer2Block(TINY, (2, 3), 8)
    with torch.no_grad():
        for gate in (block.attention_gate, block.mlp_gate):
            assert torch.equal(gate, torch.ones(8))
            gate.zero_()
    x = torch.randn(2, 6, 8)
    assert torch.equal(run_block(block, x, torch.randn(2, 6)), x)


def test_attention_does_not_depend_on_the_scale_of_queries() -> None:
    torch.manual_seed(0)
    attention = NormalizedSelfAttention(2, 5)
    q, k, v = torch.randn(3, 1, 5, 16)
    torch.testing.assert_close(attention(100 * q, 0.1 * k, v), attention(q, k, v), rtol=1e-3, atol=1e-4)
    weights = attention.weights(1000 * q, 1000 * k)
    bound = math.exp(2 * math.sqrt(8))  # of the ratio of two weights, because logits lie within +-sqrt(D)
    assert (weights.amax(dim=3) / weights.amin(dim=3)).max() <= 1.001 * bound


def change_of_products(build: Callable[[int], Callable[[Tensor], Tensor]], width: int) -> float:
    """Return the root mean square change of a layer's outputs after a step of Adam, for inputs of ones."""
    torch.manual_seed(0)
    layer: Any = build(width)
    x = torch.ones(1, width)
    before = layer(x).detach()
    layer(x).sum().backward()  # all gradients are equal, so each weight moves by lr times its learning rate multiplier
    torch.optim.Adam([p for name, p in layer.named_parameters() if name != "bias"], lr=0.01, betas=(0.0, 0.0)).step()
    return (layer(x).detach() - before).square().mean().sqrt().item()


LAYERS: dict[str, tuple[Callable[[int], Any], float]] = {
    "matrix": (lambda width: ScaledLinear(width, 5, 8), 0.01 * 8),
    "style": (lambda width: style_affine(dataclasses.replace(TINY, w_dim=width, lr_width=8), 5), 0.01 * math.sqrt(8)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("width", [8, 32, 200])
def test_a_step_changes_outputs_alike_at_all_widths(name: str, width: int) -> None:
    build, change = LAYERS[name]
    assert change_of_products(build, width) == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("width", [8, 32])
def test_a_step_changes_demodulated_weights_by_width(width: int) -> None:
    """Demodulation leaves the direction of each row, which a step of Adam turns by lr lr_width / sqrt(in)."""
    torch.manual_seed(0)
    block = Styleformer2Block(dataclasses.replace(TINY, lr_width=4), (2, 3), width)
    for weight in (block.qkv_weight, block.out_weight, block.mlp_weight):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        torch.optim.Adam([weight], lr=0.01, betas=(0.0, 0.0)).step()
        angle = (weight.detach() - before).norm() / before.norm()
        assert angle.item() == pytest.approx(0.01 * 4 / math.sqrt(width), rel=0.2)


def test_initial_matrices_preserve_the_mean_square() -> None:
    torch.manual_seed(0)
    layer = ScaledLinear(200, 300, 8)
    x = torch.randn(50, 200)
    assert layer(x).square().mean().item() == pytest.approx(1, rel=0.05)
    affine = style_affine(dataclasses.replace(TINY, w_dim=200), 300)
    style = affine(torch.randn(50, 200)) - 1
    assert style.square().mean().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_float16_blocks_are_finite_for_styles_of_any_scale(scale: float) -> None:
    """Demodulation makes hidden values proportional to the inverse of s3; their product is clamped."""
    torch.manual_seed(0)
    block = Styleformer2Block(TINY, (2, 3), 8)
    with torch.no_grad():
        block.affine.bias.mul_(scale)
        block.affine.weight.mul_(scale)
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6)
    with execution.using(reduced=torch.float16):
        assert run_block(block, x.half(), w).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"mlp_ratio": -1}, "mlp_ratio", "at least 0"),
        ({"lr_width": 0}, "lr_width", "at least 1"),
        ({"mlp_kernel": 2}, "mlp_kernel", "must be odd"),
        ({"gate_init": math.nan}, "gate_init", "must lie in -10..10"),
        ({"widths": (8,), "layers": (1,)}, "multi_level", "has no effect on a generator of a single resolution"),
        ({"widths": (9,), "layers": (1,)}, "widths", "not a multiple of its 2 heads"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as refused:
        dataclasses.replace(TINY, **changes)
    assert refused.value.field == field


# The input of the discriminator

FIXED = AugmentConfig(mode="fixed", p=1.0)


def heads_pipe(config: AugmentConfig = FIXED, heads: int = 3) -> RGBHeadsPipe:
    pipe = build_pipe(config, (3, 16, 16), heads)
    assert isinstance(pipe, RGBHeadsPipe)
    return pipe


def test_one_head_has_the_plain_pipe() -> None:
    assert type(build_pipe(FIXED, (3, 16, 16), 1)) is AugmentPipe


@pytest.mark.parametrize(("heads", "levels"), [(3, (0.01, 0.51, 0.76)), (2, (0.01, 1.01 - 8**-0.5))])
def test_noise_levels_are_nested(heads: int, levels: tuple[float, ...]) -> None:
    """Standard deviations t_k, the last image first; noises share the variance of the smaller one."""
    torch.manual_seed(0)
    pipe = heads_pipe(AugmentConfig(mode="noaug"), heads)
    (noise,) = pipe.draw(torch.zeros(400, 3 * heads, 16, 16))
    x = noise.transpose(0, 1).flatten(1).double()  # (K, samples)
    covariance = (x @ x.T / x.shape[1]).numpy()
    expected = np.array([[min(a, b) ** 2 for b in levels] for a in levels])
    np.testing.assert_allclose(covariance, expected, atol=0.004, rtol=0.02)


def test_all_heads_of_an_image_share_the_augmentation() -> None:
    """Equal images stay equal but for level and noise; different images of a batch get different augmentations."""
    torch.manual_seed(0)
    pipe, plain = heads_pipe(), AugmentPipe(FIXED, (3, 16, 16))
    img = torch.rand(2, 3, 16, 16)
    *values, noise = pipe.draw(img.repeat(1, 3, 1, 1))
    out = pipe(img.repeat(1, 3, 1, 1), [*values, noise])
    heads = (out - noise.flatten(1, 2)).unflatten(1, (3, 3)) / (1 - pipe.noise_std)
    expected = plain(img, values)
    for k in range(3):
        torch.testing.assert_close(heads[:, k], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(img[:1].repeat(2, 1, 1, 1), values)[0], expected[1], atol=0.01)


def test_each_head_has_its_own_colours() -> None:
    """Colour transforms act on the three channels of a head: the heads of an image do not mix."""
    torch.manual_seed(0)
    pipe = heads_pipe(AugmentConfig(mode="fixed", p=1.0, pipe="color"))
    img = torch.rand(2, 9, 16, 16)
    values = pipe.draw(img)
    changed = img.clone()
    changed[:, 3:6] += 0.5
    difference = (pipe(changed, values) - pipe(img, values)).abs().amax(dim=(0, 2, 3))
    assert difference[:3].max() == difference[6:].max() == 0
    assert difference[3:6].min() > 0.01


def linear_gan(config: AugmentConfig, heads: int = 3) -> GAN:
    """Return a GAN whose D is linear in the stack of images, with random weights a (K C, H, W)."""

    class LinearD(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3 * heads, 16, 16, dtype=torch.float64))

        def forward(self, img: Tensor, c: Tensor) -> Tensor:
            return (img * self.a).sum(dim=(1, 2, 3))[:, None]

    return GAN(
        G=SimpleNamespace(synthesis=None),
        D=LinearD(),
        augment=heads_pipe(config, heads).double(),
        labels=torch.zeros(4, 0),
        style_mixing=0,
        pl_mean=torch.zeros([]),
        num_rgb_heads=heads,
    )


def test_penalties_are_gradients_of_the_stack_before_noise() -> None:
    """For a linear D without augmentation, the gradient with respect to x_k is (1 - t_k) a_k, whatever the noise."""
    torch.manual_seed(0)
    gan = linear_gan(AugmentConfig(mode="noaug"))
    img = gan.repeat_for_rgb_heads(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    values, c = gan.augment.draw(img), torch.zeros(4, 0)
    gradient = (1 - torch.tensor([0.01, 0.51, 0.76]).double().view(3, 1, 1, 1)) * gan.D.a.unflatten(0, (3, 3))
    expected = gradient.square().sum().expand(4)
    _, (exact,) = squared_gradients(gan, img, c, values)
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=0)
    torch.manual_seed(1)
    estimate = Estimate(share=1.0, sigma=0.01)
    found = [squared_differences(gan, img, c, values, estimate=estimate)[1][0] for _ in range(500)]
    assert torch.cat(found).mean().item() == pytest.approx(expected[0].item(), rel=0.1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_with_several_heads_resumes_bit_for_bit(objective: str, shapes32_zip: Path, tmp_path: Path) -> None:
    """D has three input channels per head, the heads of low resolutions get gradients, and a break changes nothing."""
    settings = {"generator__family": "styleformer2", "generator__multi_level": True, **OBJECTIVE_SETTINGS[objective]}
    sizes = {"generator__widths": (16, 8, 8), "generator__layers": (1, 1, 1)}
    config = every_phase_config(shapes32_zip, loss__objective=objective, **settings, **sizes)
    assert config.discriminator.img_channels == 9
    trainer = new_trainer(config)
    before = trainer.G.synthesis.stages[0].torgb.weight.clone()
    train_steps(trainer, 4)
    assert not torch.equal(trainer.G.synthesis.stages[0].torgb.weight, before)
    assert trainer.G(torch.zeros(1, trainer.G.z_dim), None).shape == (1, 3, 32, 32)
    resumed = train_with_a_break(config, 2, 2, tmp_path)
    assert digest(saved_state(resumed)) == digest(saved_state(trainer))


def test_the_preset_is_cifar_with_this_generator_and_recipe() -> None:
    config, cifar = (
        resolve(PRESETS[name], Environment(img_shape=(3, 32, 32), c_dim=0)) for name in ("styleformer2", "cifar")
    )
    assert config.generator == Styleformer2Config(z_dim=64, w_dim=128)
    batch = {"batch_size": 8, "run.batch_gpu": 8, "discriminator.mbstd_group_size": 8}
    expected = {"preset": "styleformer2", "loss.n_critic": 2, **batch}
    assert dataclasses.replace(config, generator=cifar.generator) == override(cifar, expected)


def test_the_overfitting_hook_gives_d_the_images_of_all_heads(shapes32_zip: Path) -> None:
    """The images of a real stack are equal; those of a generated one are not."""
    config = every_phase_config(
        shapes32_zip,
        generator__family="styleformer2",
        generator__multi_level=True,
        generator__widths=(16, 8, 8),
        generator__layers=(1, 1, 1),
        augment__mode="noaug",
        data__holdout=8,
    )
    trainer: Any = new_trainer(config)
    trainer.augment.noise_std.zero_()
    trainer.D = lambda img, c: (img[:, :3] - img[:, 6:]).abs().mean(dim=(1, 2, 3))[:, None]
    hook = Overfitting(ImageDataset(config.data, held_out=True))
    assert hook._mean_logits(trainer, "held out", hook.holdout)[0] == 0
    assert hook._mean_logits(trainer, "generated", None)[0] > 0.01


# Transfer learning


def test_transfer_to_another_lr_width_changes_no_image() -> None:
    source, target = build(TINY), build(dataclasses.replace(TINY, lr_width=12))
    assert copy_weights(source, target, "G").share == 1
    target.load_state_dict({k: v for k, v in source.state_dict().items() if "noise_const" in k or "w_avg" in k}, False)
    z, _ = inputs(TINY)
    torch.testing.assert_close(target(z, None), source(z, None), rtol=1e-9, atol=1e-9)


def test_weights_of_a_styleformer_are_refused() -> None:
    shared = {name: getattr(TINY, name) for name in ("z_dim", "w_dim", "base", "widths", "layers", "depth")}
    source = StyleformerConfig(img_channels=2, **shared).build()
    with pytest.raises(UserError, match=r"only .* of the parameters are in the snapshot"):
        copy_weights(source, TINY.build(), "G")


@pytest.mark.parametrize(("before", "after"), [(3, 9), (9, 3)])
def test_the_last_image_keeps_the_first_layer_of_d(before: int, after: int) -> None:
    source, target = (small_discriminator("stylegan2", img_channels=count).build() for count in (before, after))
    copied = copy_weights(source, target, "D")
    layers: list[Any] = [D.fromrgb[0] for D in (source, target)]  # type: ignore[index]
    old, new = (layer.weight[:, :3] * layer.weight_gain for layer in layers)
    torch.testing.assert_close(new, old)
    assert copied.partial == ("fromrgb.16x16.weight",)


def test_networks_for_large_images_can_be_read_from_snapshots() -> None:
    """A file may derive a limited number of values from its configuration."""
    config = Styleformer2Config(**Styleformer2Config.AUTO).fit(1024, 1024)
    assert outline(config, "G").img_shape == (3, 1024, 1024)
