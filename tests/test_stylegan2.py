"""StyleGAN2 generator: every layer and the whole network against the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from reference_layers import build, close, inputs, randomize, ref_mapping, state_of
from reference_stylegan2 import ref_modulated_conv, ref_modulated_layer, ref_stylegan2, ref_torgb
from torch import Tensor

from dnnlib.config import ConfigError
from training.networks import execution
from training.networks.layers import resample_filter
from training.networks.stylegan2 import (
    ModulatedConv,
    StyleGAN2Config,
    StyleGAN2ToRGB,
    modulated_conv2d,
)

TINY = StyleGAN2Config(
    z_dim=5, w_dim=6, img_channels=2, base=(2, 3), resolutions=3, channel_base=24, channel_max=5, conv_clamp=None
)
VARIANTS = {
    "skip": TINY,
    "resnet": dataclasses.replace(TINY, architecture="resnet"),
    "orig": dataclasses.replace(TINY, architecture="orig"),
    "conditional, one channel": dataclasses.replace(TINY, c_dim=3, img_channels=1),
    "one resolution": dataclasses.replace(TINY, resolutions=1),
    "tight clamp": dataclasses.replace(TINY, conv_clamp=0.3),
    "resnet, tight clamp": dataclasses.replace(TINY, architecture="resnet", conv_clamp=0.3),
}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (StyleGAN2Config(), 19_947_539),
        (StyleGAN2Config(resolutions=5, mapping_layers=8), 27_032_600),
        (StyleGAN2Config(resolutions=6, mapping_layers=8), 29_328_669),
        (StyleGAN2Config(resolutions=7, mapping_layers=8, channel_base=16384), 24_767_458),
        (StyleGAN2Config(resolutions=9, mapping_layers=8), 30_370_060),
    ],
)
def test_published_models_have_their_parameter_counts(config: StyleGAN2Config, count: int) -> None:
    with torch.device("meta"):
        G = config.build()
    assert sum(parameter.numel() for parameter in G.parameters()) == count


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_generator_equals_the_reference(name: str, noise_mode: Any) -> None:
    config = VARIANTS[name]
    G, (z, c) = build(config), inputs(config)
    labels = None if c is None else c.numpy()
    ws = ref_mapping(z.numpy(), labels, state_of(G.mapping), config.num_ws, config.mapping_layers, psi=0.7, cutoff=1)
    expected = ref_stylegan2(ws, state_of(G.synthesis), config, noise=noise_mode == "const")
    actual = G(z, c, truncation_psi=0.7, truncation_cutoff=1, noise_mode=noise_mode)
    close(actual, expected)
    assert tuple(actual.shape[1:]) == G.img_shape == (config.img_channels, *config.img_size)


@pytest.mark.parametrize("name", ["skip", "resnet", "one resolution"])
def test_each_layer_reads_its_own_style(name: str) -> None:
    config = VARIANTS[name]
    G = build(config)
    ws = torch.randn(2, G.num_ws, G.w_dim, dtype=torch.float64)
    assert G.num_ws == {1: 2, 3: 6}[config.resolutions or 0]
    close(G.synthesis(ws), ref_stylegan2(ws.numpy(), state_of(G.synthesis), config, noise=True))


@pytest.mark.parametrize("up", [1, 2])
def test_random_noise_has_one_value_per_image_and_pixel(up: Any) -> None:
    layer = ModulatedConv(TINY, 4, 3, (4 * up, 6 * up), up=up).double()
    randomize(layer)
    x, w = torch.randn(2, 4, 4, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    torch.manual_seed(5)
    actual = layer(x, layer.affine(w), "random")
    torch.manual_seed(5)
    noise = torch.randn(2, 1, 4 * up, 6 * up, dtype=torch.float64).numpy()
    close(actual, ref_modulated_layer(x.numpy(), w.numpy(), state_of(layer), up, None, noise))


@pytest.mark.parametrize("up_filter", [None, resample_filter()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_modulated_convolution_equals_the_reference(dtype: torch.dtype, up_filter: Tensor | None) -> None:
    torch.manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, style = torch.randn(3, 4, 6, 5), torch.randn(7, 4, 3, 3), torch.randn(3, 4)
    x, weight, style = x.to(dtype), weight.to(exact), style.to(exact)
    noise = torch.randn(12 if up_filter is not None else 6, 10 if up_filter is not None else 5).to(dtype)
    actual = modulated_conv2d(x, weight, style, noise, up_filter=up_filter)
    assert actual.dtype == dtype
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    expected = np.stack(
        [
            ref_modulated_conv(image, weight.double().numpy(), s, 1 if up_filter is None else 2)
            for image, s in zip(x.double().numpy(), style.double().numpy(), strict=True)
        ]
    )
    np.testing.assert_allclose(actual.double().numpy(), expected + noise.double().numpy(), rtol=0, atol=error)


def test_large_weights_and_styles_do_not_overflow_float16() -> None:
    """Demodulation cancels the scaling of weights and styles; otherwise 200 * 100 * 100 would overflow."""
    torch.manual_seed(0)
    x, weight, style = torch.full((1, 8, 4, 4), 200.0), 100 * torch.rand(3, 8, 3, 3), torch.full((1, 8), 100.0)
    noise = torch.zeros(1)
    expected = modulated_conv2d(x, weight, style, noise)
    actual = modulated_conv2d(x.half(), weight, style, noise.half()).float()
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.5)


def test_torgb_equals_the_reference() -> None:
    config = dataclasses.replace(TINY, conv_clamp=0.5)
    torgb = StyleGAN2ToRGB(config, 8).double()
    randomize(torgb)
    x, w = torch.randn(2, 8, 3, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    close(torgb(x, torgb.affine(w)), ref_torgb(x.numpy(), w.numpy(), state_of(torgb), 0.5))


def test_initial_weights_have_the_specified_scale() -> None:
    torch.manual_seed(0)
    G = StyleGAN2Config(resolutions=2, channel_max=64).build()
    layer: Any = G.synthesis.stages[1].convs[0]  # type: ignore[union-attr, index]
    assert layer.weight.std().item() == pytest.approx(1, rel=0.02)
    assert torch.equal(layer.affine.bias, torch.ones(64))
    assert (layer.noise_strength.item(), layer.bias.abs().max().item()) == (0, 0)
    assert layer.noise_const.std().item() == pytest.approx(1, rel=0.3)
    img = G(torch.randn(16, 512), None)
    assert 0.1 < img.std().item() < 10


@pytest.mark.parametrize("up", [1, 2])
def test_second_derivatives_of_a_layer_are_correct(up: Any) -> None:
    layer = ModulatedConv(dataclasses.replace(TINY, w_dim=2), 2, 2, (3 * up, 2 * up), up=up).double()
    randomize(layer)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: layer(x, w, "const"), (x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_starts_at_the_minimum_grid(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = StyleGAN2Config(z_dim=16, w_dim=16, channel_max=16, resolutions=3)
    G = config.build()
    types: list[torch.dtype] = []
    for stage in G.synthesis.stages:  # type: ignore[union-attr]
        stage.convs[0].register_forward_hook(lambda module, args, out: types.append(out.dtype))
    z = torch.randn(4, 16)
    exact = G(z, None)
    with execution.using(reduced=dtype, min_grid=8):
        img = G(z, None)
    assert types[3:] == [torch.float32, dtype, dtype]
    assert img.dtype == torch.float32
    assert 0 < (img - exact).std().item() / exact.std().item() < 0.02


def test_fit_chooses_resolutions_and_channel_base() -> None:
    config = StyleGAN2Config(**StyleGAN2Config.AUTO)
    assert config.fit(64, 64).img_size == (64, 64)
    assert config.fit(512, 512).channel_base == 2 * config.fit(256, 256).channel_base == 32768
    assert dataclasses.replace(config, base=(3, 4)).fit(48, 64).grids == ((3, 4), (6, 8), (12, 16), (24, 32), (48, 64))
    assert dataclasses.replace(config, channel_base=999).fit(64, 64).channel_base == 999
    with pytest.raises(ConfigError, match=r"base=\(4, 4\).*48x48.*possible: 48x48, 24x24, 12x12, 6x6, 3x3") as caught:
        config.fit(48, 48)
    assert caught.value.field == "base"
    with pytest.raises(ConfigError, match=r"channel_base=32.*at least 64"):
        dataclasses.replace(config, channel_base=32).fit(64, 64)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"resolutions": 0}, "resolutions", "at least 1"),
        ({"architecture": "dense"}, "architecture", "orig, skip, resnet"),
        ({"channel_max": 0}, "channel_max", "at least 1"),
        ({"channel_base": 31}, "channel_base", "no channel at 32x32: must be at least 32"),
        ({"base": (0, 4)}, "base", "height and width"),
        ({"mapping_layers": 0}, "mapping_layers", "at least 1"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        StyleGAN2Config(**changes)
    assert caught.value.field == field


def test_a_configuration_with_open_fields_cannot_be_built() -> None:
    for changes, field in (({"resolutions": None}, "resolutions"), ({"channel_base": 0}, "channel_base")):
        with pytest.raises(ConfigError, match="not chosen yet") as caught:
            StyleGAN2Config(**changes).build()
        assert caught.value.field == field
