"""Styleformer generator: every layer and the whole network against the float64 reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from reference_layers import build, close, inputs, randomize, ref_fc, ref_mapping, state_of
from reference_styleformer import ref_encoder_block, ref_styleformer, ref_torgb_tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dnnlib.config import ConfigError
from training.config import PRESETS
from training.networks import attention as attention_module
from training.networks import execution
from training.networks.attention import BACKENDS, SelfAttention, attend
from training.networks.generator import base_grids
from training.networks.layers import (
    Conv2d,
    FullyConnected,
    normalize_2nd_moment,
    scaled_noise,
    to_map,
    to_tokens,
)
from training.networks.mapping import MappingNetwork
from training.networks.modulation import demodulations, read_styles
from training.networks.styleformer import StyleformerConfig, StyleformerToRGB
from training.networks.styleformer_ablations import AblatedEncoderBlock
from training.networks.styleformer_block import EncoderBlock, modulate_blocks, noise_maps

TINY = StyleformerConfig(
    z_dim=5, w_dim=6, mapping_layers=2, img_channels=2, base=(2, 3), widths=(12, 8, 4), layers=(1, 2, 1), depth=4
)
VARIANTS = {
    "plain": TINY,
    "linformer": dataclasses.replace(TINY, linformer=True, linformer_k=5, linformer_min_tokens=24),
    "conditional": dataclasses.replace(TINY, c_dim=3),
    "one resolution": dataclasses.replace(TINY, widths=(8,), layers=(2,), minimum_head=4),
    "tight clamp": dataclasses.replace(TINY, conv_clamp=0.3),
    "no clamp": dataclasses.replace(TINY, conv_clamp=None),
    "ffn": dataclasses.replace(TINY, ffn=True),
    "norm after": dataclasses.replace(TINY, layernorm="after"),
    "no style in attention": dataclasses.replace(TINY, style_attention=False),
    "no residual": dataclasses.replace(TINY, residual=False),
    "all ablations": dataclasses.replace(
        TINY, ffn=True, layernorm="after", style_attention=False, residual=False, linformer=True, linformer_k=5
    ),
}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (StyleformerConfig(layers=(1, 2, 2)), 1_334_142),
        (StyleformerConfig(), 1_438_064),
        (StyleformerConfig(widths=(1024, 512, 512)), 18_369_040),
        (StyleformerConfig(base=(12, 12), widths=(1024, 256, 64)), 7_966_096),
        (StyleformerConfig(widths=(1024, 256, 64, 64), layers=(1, 2, 1, 1), linformer=True), 8_567_505),
        (StyleformerConfig(widths=(1024, 256, 64, 64, 64), layers=(1, 2, 1, 1, 1), linformer=True), 13_929_621),
        (StyleformerConfig(widths=(512, 256, 128, 64), layers=(1, 2, 1, 1), linformer=True), 5_597_329),
        (StyleformerConfig(widths=(512, 256, 128, 64, 32), layers=(1, 2, 1, 1, 1), linformer=True), 10_349_781),
    ],
)
def test_published_models_have_their_parameter_counts(config: StyleformerConfig, count: int) -> None:
    with torch.device("meta"):
        G = config.build()
    assert sum(parameter.numel() for parameter in G.parameters()) == count


@pytest.mark.parametrize("name", ["ffn", "norm-after", "no-style", "no-residual", "depth16", "depth64"])
def test_ablations_have_the_expected_parameter_counts(name: str) -> None:
    """Counts derived by hand from the preset; C and C' are the widths before and after a block."""
    config = PRESETS[f"ablation-{name}"].generator
    blocks = [(256, 64), (64, 64), (64, 64), (64, 16), (16, 16), (16, 16), (16, 16)]
    more = {
        "ffn": sum(8 * C2**2 + 5 * C2 for _, C2 in blocks),
        "no-style": -sum(C * 513 for C, _ in blocks),
        "no-residual": -sum(C * C2 for C, C2 in blocks),
    }
    with torch.device("meta"):
        G = config.build()
    assert sum(parameter.numel() for parameter in G.parameters()) == 1_438_064 + more.get(name, 0)
    heads = [module.num_heads for module in G.modules() if isinstance(module, SelfAttention)]
    assert heads == [max(1, C // {"depth16": 16, "depth64": 64}.get(name, 32)) for C, _ in blocks]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_generator_equals_the_reference(name: str, noise_mode: Any) -> None:
    config = VARIANTS[name]
    G, (z, c) = build(config), inputs(config)
    ws = ref_mapping(
        z.numpy(),
        None if c is None else c.numpy(),
        state_of(G.mapping),
        config.num_ws,
        config.mapping_layers,
        psi=0.7,
        cutoff=2,
    )
    expected = ref_styleformer(ws, state_of(G.synthesis), config, noise=noise_mode == "const")
    actual = G(z, c, truncation_psi=0.7, truncation_cutoff=2, noise_mode=noise_mode)
    close(actual, expected)
    assert tuple(actual.shape[1:]) == G.img_shape == (config.img_channels, *config.img_size)


def test_each_block_reads_its_own_style() -> None:
    G, (z, _) = build(TINY), inputs(TINY)
    state = state_of(G.synthesis)
    ws = torch.randn(len(z), G.num_ws, G.w_dim, dtype=torch.float64)
    close(G.synthesis(ws), ref_styleformer(ws.numpy(), state, TINY, noise=True))


def test_linformer_projects_grids_of_at_least_min_tokens() -> None:
    G = VARIANTS["linformer"].build()
    shapes = [tuple(p.shape) for name, p in G.named_parameters() if name.endswith("token_projection")]
    assert shapes == [(5, 24), (5, 24), (5, 96)]


@pytest.mark.parametrize("psi", [1.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("cutoff", [None, 0, 1, 3, 4, 9])
def test_mapping_and_truncation_equal_the_reference(psi: float, cutoff: int | None) -> None:
    mapping = MappingNetwork(z_dim=4, c_dim=3, w_dim=5, num_ws=4, num_layers=3).double()
    randomize(mapping)
    state = state_of(mapping)
    z, c = torch.randn(6, 4, dtype=torch.float64), torch.eye(3, dtype=torch.float64).repeat(2, 1)
    close(mapping(z, c, psi, cutoff), ref_mapping(z.numpy(), c.numpy(), state, 4, 3, psi, cutoff))
    np.testing.assert_array_equal(mapping.w_avg.numpy(), state["w_avg"])


@pytest.mark.parametrize("name", VARIANTS)
def test_only_ablations_use_the_ablated_block(name: str) -> None:
    with torch.device("meta"):
        G = VARIANTS[name].build()
    types = {type(module) for module in G.modules() if isinstance(module, EncoderBlock)}
    ablations = ("ffn", "norm after", "no style in attention", "no residual", "all ablations")
    assert types == {AblatedEncoderBlock if name in ablations else EncoderBlock}


def run_block(block: EncoderBlock, x: Tensor, w: Tensor, noise_mode: Any) -> Tensor:
    """Map tokens x (B, N, C) and w (B, w_dim) to the output of one block."""
    (modulation,) = modulate_blocks([block], {block.affine: block.affine(w)}, noise_mode)
    out: Tensor = block(x, modulation)
    return out


def test_demodulation_coefficients_equal_the_reference() -> None:
    """Maps of three shapes in mixed order; each has its own weight and style."""
    torch.manual_seed(0)
    shapes = [(7, 8), (5, 4), (7, 8), (7, 4), (5, 4)]
    pairs = [(torch.randn(shape).double(), torch.randn(3, shape[1]).double()) for shape in shapes]
    for (weight, style), d in zip(pairs, demodulations(pairs), strict=True):
        modulated = weight.numpy() * style.numpy()[:, None]  # (3, out, in)
        close(d, 1 / np.sqrt((modulated**2).sum(axis=2) + 1e-8))


def test_one_product_computes_all_styles_of_one_w(monkeypatch: pytest.MonkeyPatch) -> None:
    """Styles that are expanded from one w share a product; others, and layers with hooks, are computed one by one."""
    G = build(TINY).synthesis
    w = torch.randn(2, 1, TINY.w_dim, dtype=torch.float64, requires_grad=True)
    readers, calls = G.style_readers(), []
    layers = [affine for affine, _ in readers]
    forward = FullyConnected.forward

    def recorded(self: FullyConnected, x: Tensor) -> Tensor:
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(FullyConnected, "forward", recorded)
    with execution.using(shared_styles=True):
        together = read_styles(readers, w.expand(-1, TINY.num_ws, -1))
    read_styles(readers, w.detach().expand(-1, TINY.num_ws, -1))
    assert calls == []
    apart = read_styles(readers, w.repeat(1, TINY.num_ws, 1))
    assert calls == layers == [*together] == [*apart]
    parameters = [w, *(p for layer in layers for p in layer.parameters())]
    results = []
    for styles in (together, apart):
        total = torch.stack([style.sin().sum() for style in styles.values()]).sum()
        results.append([*styles.values(), *torch.autograd.grad(total, parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    calls.clear()
    read_styles(readers, w.expand(-1, TINY.num_ws, -1))  # a gradient with respect to each style may be needed
    assert calls == layers
    calls.clear()
    w = w.detach()
    handle = layers[2].register_forward_hook(lambda *args: None)
    read_styles(readers, w.expand(-1, TINY.num_ws, -1))
    handle.remove()
    assert calls == layers
    layers[1].activation = "lrelu"
    assert read_styles(readers, w.expand(-1, TINY.num_ws, -1))[layers[1]].min() > together[layers[1]].min()


def test_the_noise_of_several_blocks_is_one_draw() -> None:
    consts = [torch.randn(n, 1) for n in (2, 5)]
    torch.manual_seed(1)
    first, second = noise_maps(consts, "random", 3)
    torch.manual_seed(1)
    noise = torch.randn(21)
    assert torch.equal(first, noise[:6].view(3, 2))
    assert torch.equal(second, noise[6:].view(3, 5))
    assert all(torch.equal(x, c.t()) for x, c in zip(noise_maps(consts, "const", 3), consts, strict=True))
    assert all(torch.equal(x, 0 * c.t()) for x, c in zip(noise_maps(consts, "none", 3), consts, strict=True))


def test_float16_weights_of_any_scale_do_not_overflow() -> None:
    """Weights of 1e5 overflow float16 unless their scale is removed first; demodulation cancels it."""
    torch.manual_seed(0)
    block = EncoderBlock(TINY, (2, 3), 8, 12)
    x, w = torch.randn(3, 6, 8), torch.randn(3, 6)
    with torch.no_grad():
        for weight, _ in block.demodulated_maps():
            weight *= 1e5
        expected = run_block(block, x, w, "none")
        with execution.using(reduced=torch.float16):
            actual = run_block(block, x.half(), w, "none")
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)


def test_noise_maps_may_be_shared_or_per_image() -> None:
    const, strength = torch.randn(4, 6), torch.tensor(0.5)
    assert torch.equal(scaled_noise(const, strength, "const", 3), const[None] / 2)
    assert torch.equal(scaled_noise(const.expand(3, 4, 6), strength, "const", 3), const.expand(3, 4, 6) / 2)
    assert torch.equal(scaled_noise(const, strength, "none", 3), torch.zeros(1, 4, 6))
    for given in (const, const.expand(3, 4, 6)):
        torch.manual_seed(1)
        drawn = scaled_noise(given, strength, "random", 3)
        torch.manual_seed(1)
        assert torch.equal(drawn, torch.randn(3, 4, 6) / 2)


def test_random_noise_has_one_value_per_image_and_token() -> None:
    block = EncoderBlock(TINY, (2, 3), 8, 12).double()
    randomize(block)
    x, w = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    actual = run_block(block, x, w, "random")
    torch.manual_seed(5)
    noise = torch.randn(4, 6, 1, dtype=torch.float64).numpy()
    close(actual, ref_encoder_block(x.numpy(), w.numpy(), state_of(block), 2, TINY.conv_clamp, noise))


def test_without_noise_strength_random_noise_has_no_effect() -> None:
    G, (z, _) = build(TINY), inputs(TINY)
    assert torch.equal(G(z, None), G(z, None, noise_mode="const"))
    assert torch.equal(G(z, None, noise_mode="none"), G(z, None, noise_mode="none"))
    assert not torch.allclose(G(z, None), G(z, None, noise_mode="none"))
    assert not torch.allclose(G(z, None, noise_mode="random"), G(z, None, noise_mode="random"))
    for module in G.modules():
        if isinstance(module, EncoderBlock):
            module.noise_strength.data.zero_()
    torch.testing.assert_close(G(z, None, noise_mode="random"), G(z, None, noise_mode="none"), rtol=0, atol=0)


@pytest.mark.parametrize("projected", [None, 3])
def test_fused_attention_equals_explicit_weights(projected: int | None) -> None:
    attention = SelfAttention(2, 7, projected)
    q, k, v = torch.randn(3, 4, 7, 6)
    weights = attention.weights(q, k)
    assert tuple(weights.shape) == (4, 2, 7, projected or 7)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(4, 2, 7))
    values = v if attention.token_projection is None else torch.einsum("kn,bnc->bkc", attention.token_projection, v)
    heads = [weights[:, h] @ values[:, :, 3 * h : 3 * h + 3] for h in range(2)]
    torch.testing.assert_close(attention(q, k, v), torch.cat(heads, dim=2))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_attention_backend_that_does_not_apply_is_replaced(
    backend: str, has_bias: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of cuDNN and the memory-efficient ones need a GPU; the line is printed once."""
    monkeypatch.setattr(attention_module, "_reported", set())
    q, k, v, bias = torch.randn(2, 3, 7, 8), *torch.randn(2, 2, 3, 5, 8), torch.randn(3, 7, 5) if has_bias else None
    scores = q @ k.mT / 8**0.5 + (0 if bias is None else bias)
    for _ in range(2):
        with execution.using(attention=backend):
            torch.testing.assert_close(attend(q, k, v, bias), scores.softmax(dim=3) @ v)
    lines = capsys.readouterr().err.splitlines()
    refused = [
        f"Attention: {backend} does not support torch.float32 heads of 8 channels on cpu; using PyTorch's choice"
    ]
    assert lines == (refused if backend in ("cudnn", "efficient") else [])


def test_forward_hooks_can_read_the_attention_weights() -> None:
    G, (z, _) = build(VARIANTS["linformer"]), inputs(VARIANTS["linformer"])
    maps = []
    for module in G.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda module, args, out: maps.append(module.weights(*args[:2])))
    G(z, None)
    assert [tuple(m.shape) for m in maps] == [(3, 3, 6, 6), (3, 2, 24, 5), (3, 2, 24, 5), (3, 1, 96, 5)]


def test_torgb_equals_the_reference() -> None:
    torgb = StyleformerToRGB(8, 3, FullyConnected(6, 8, bias_init=1.0)).double()
    randomize(torgb)
    x, w = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    style = torgb.affine(w)
    actual = torgb(x, style, *demodulations([(torgb.weight, style)]))
    close(actual, ref_torgb_tokens(x.numpy(), w.numpy(), state_of(torgb)))


@pytest.mark.parametrize("activation", ["linear", "lrelu"])
@pytest.mark.parametrize("multiplier", [1.0, 0.01])
def test_fully_connected_layer_equals_the_reference(activation: Any, multiplier: float) -> None:
    layer = FullyConnected(5, 4, activation=activation, multiplier=multiplier, bias_init=1.0).double()
    randomize(layer)
    x = torch.randn(3, 5, dtype=torch.float64)
    close(layer(x), ref_fc(x.numpy(), state_of(layer), multiplier, activation == "lrelu"))


def test_normalized_latents_have_unit_second_moment() -> None:
    x = torch.randn(4, 50) * 7
    torch.testing.assert_close(normalize_2nd_moment(x).square().mean(dim=1), torch.ones(4))


def test_tokens_are_row_major() -> None:
    image = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tokens = to_tokens(image)
    assert torch.equal(tokens[1, 2 * 5 + 3], image[1, :, 2, 3])
    assert torch.equal(to_map(tokens, (4, 5)), image)


def test_initial_weights_have_the_specified_scale() -> None:
    torch.manual_seed(0)
    mapping = FullyConnected(200, 200, multiplier=0.01)
    assert mapping.weight.std().item() == pytest.approx(100, rel=0.02)
    assert Conv2d(40, 40, 3).weight.std().item() == pytest.approx(1, rel=0.02)

    block = EncoderBlock(StyleformerConfig(linformer=True), (32, 32), 64, 64)
    for weight, fan_in in [(block.qkv_weight, 64), (block.residual_weight, 64)]:
        assert weight.abs().max().item() <= 1 / math.sqrt(fan_in)
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)
    assert block.attention.token_projection is not None
    assert block.attention.token_projection.abs().max().item() <= 1 / 32
    assert torch.equal(block.affine.bias, torch.ones(128))


@pytest.mark.parametrize("name", ["plain", "all ablations"])
def test_second_derivatives_of_a_block_are_correct(name: str) -> None:
    config = dataclasses.replace(VARIANTS[name], linformer=True, linformer_k=2, linformer_min_tokens=6)
    block = EncoderBlock(config, (2, 3), 4, 4).double()
    randomize(block)
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x, w: run_block(block, x, w, "const"), (x, w))


@pytest.mark.parametrize("name", ["ffn", "norm after", "no style in attention", "no residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_ablation_is_close_in_reduced_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    G, z = VARIANTS[name].build(), torch.randn(4, TINY.z_dim)
    exact = G(z, None)
    with execution.using(reduced=dtype):
        reduced = G(z, None)
    assert 0 < (reduced - exact).std() < 0.05 * exact.std()
    with execution.using(recompute=True):
        assert torch.equal(G(z, None), exact)


def test_base_grids_lists_every_grid_that_fits() -> None:
    assert base_grids(48, 48) == [((48, 48), 1), ((24, 24), 2), ((12, 12), 3), ((6, 6), 4), ((3, 3), 5)]
    assert base_grids(16, 24) == [((16, 24), 1), ((8, 12), 2), ((4, 6), 3), ((2, 3), 4)]
    assert base_grids(7, 8) == [((7, 8), 1)]
    for height, width in [(12, 20), (32, 32)]:
        for base, count in base_grids(height, width):
            config = StyleformerConfig(base=base, widths=(32,) * count, layers=(1,) * count)
            config.check_img_size(height, width)


def test_an_image_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"64x64.*base=\(16, 16\) with 3 widths, base=\(8, 8\) with 4") as caught:
        StyleformerConfig().check_img_size(64, 64)
    assert caught.value.field == "widths"


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"layers": (1, 3)}, "layers", "one entry per resolution, 3 with widths"),
        ({"layers": (1, 0, 3)}, "layers", "each must be at least 1"),
        ({"widths": (256, 0, 16)}, "widths", "each must be at least 1"),
        ({"widths": (256, 100, 16)}, "widths", "100 is not a multiple of its 3 heads .* 99 or 102"),
        ({"widths": (3,), "layers": (1,), "minimum_head": 4}, "widths", "nearest valid widths: 4"),
        ({"base": (8,)}, "base", "height and width"),
        ({"base": (8, 0)}, "base", "height and width"),
        ({"z_dim": 0}, "z_dim", "at least 1"),
        ({"c_dim": -1}, "c_dim", "at least 0"),
        ({"linformer_k": 0}, "linformer_k", "at least 1"),
        ({"conv_clamp": 0.0}, "conv_clamp", "positive"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        StyleformerConfig(**changes)
    assert caught.value.field == field


def test_a_generator_without_widths_cannot_be_built() -> None:
    config = StyleformerConfig(widths=())
    for use in (config.build, lambda: config.img_size, lambda: config.check_img_size(32, 32)):
        with pytest.raises(ConfigError, match=r"widths=\(\)"):
            use()
