"""StyleGAN3 and Styleformer-A against published tables, SciPy and float64 references; equivariance of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_stylegan3 as reference
import torch
from small_families import small_train_config
from torch import Tensor

from dnnlib.config import ConfigError
from torch_utils.filters import bessel_j1, lowpass, radial_taps, separable_taps
from torch_utils.misc import count_parameters
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from training.dataset import ImageDataset
from training.networks import execution
from training.networks.alias_free import Band, FilteredActivation, FourierInput
from training.networks.styleformer_a import RelativeAttention, StyleformerAConfig
from training.networks.stylegan3 import AliasFreeConfig, StyleGAN3Config, StyleGAN3Layer
from training.training_loop import MAGNITUDE_HALF_LIFE, Trainer

# Sizes and channels of the published networks, from FFHQ's configurations T at 1024 and 256 pixels.
TABLES = {
    1024: "36/512 36/512 52/512 52/512 84/512 148/512 148/512 276/323 276/203 532/128 1044/81 1044/51 1044/32 1024/32 "
    "1024/3",
    256: "36/512 36/512 36/512 52/512 52/512 84/512 84/512 148/362 148/256 148/181 276/128 276/91 276/64 256/64 256/3",
}
PARAMETERS = {  # of the published networks, by image size and configuration
    (1024, "T"): 22_313_167,
    (1024, "R"): 15_093_151,
    (256, "T"): 23_320_443,
    (256, "R"): 15_779_565,
}
FILTERS = [(12, 2.0, 12.0, 64), (24, 10.3, 7.0, 128), (48, 100.0, 300.0, 1024), (12, 45.25, 60.0, 256)]


def auto(**options: Any) -> StyleGAN3Config:
    """Return a configuration whose size, layers and channels `fit` chooses."""
    return StyleGAN3Config(**{**StyleGAN3Config.AUTO, **options})


@pytest.mark.parametrize("side", TABLES)
def test_the_layer_table_equals_the_published_one(side: int) -> None:
    config = auto().fit(side, side)
    bands = config.bands()
    found = [f"{band.size}/{count}" for band, count in zip(bands, config.channels(), strict=True)]
    assert " ".join(found) == TABLES[side]
    assert (bands[0].cutoff, bands[-1].cutoff, bands[-1].rate) == (2, side / 2, side)
    stopbands = [2**2.1 * (side / 2 * 2**0.3 / 2**2.1) ** min(i / 12, 1) for i in range(15)]
    for band, stopband in zip(bands, stopbands, strict=True):
        assert band.cutoff + band.half_width == pytest.approx(max(stopband, band.rate / 2))
        assert band.rate >= min(2 * stopband, side) > band.rate / 2


@pytest.mark.parametrize(("side", "kind"), PARAMETERS)
def test_parameter_counts_equal_the_published_ones(side: int, kind: str) -> None:
    options: dict[str, Any] = {"rotation": True, "channel_max": 1024} if kind == "R" else {}
    config = auto(**options).fit(side, side)
    if kind == "R":
        assert config.channel_base == 2 * auto().fit(side, side).channel_base
    with torch.device("meta"):
        assert count_parameters(config.build()) == PARAMETERS[side, kind]


@pytest.mark.parametrize(("taps", "cutoff", "width", "rate"), FILTERS)
def test_filters_equal_those_of_scipy(taps: int, cutoff: float, width: float, rate: float) -> None:
    expected = reference.firwin(taps, cutoff, width, rate)
    np.testing.assert_allclose(separable_taps(taps, cutoff, width, rate), expected, atol=1e-10)
    radial = reference.radial_filter(taps, cutoff, width, rate)
    np.testing.assert_allclose(radial_taps(taps, cutoff, width, rate), radial, atol=1e-10)
    assert lowpass(1, cutoff, width, rate) is None


def test_bessel_j1_equals_that_of_scipy() -> None:
    from scipy.special import j1

    x = np.linspace(-80, 80, 999)
    np.testing.assert_allclose(bessel_j1(x), j1(x), atol=1e-13)


OPERATORS = [
    {"up": 2, "down": 2, "padding": (5, 4)},
    {"up": 4, "down": 2, "padding": (-3, 7)},
    {"up": 2, "down": 4, "padding": (10, 19)},
    {"up": 1, "down": 1, "padding": (6, 6)},
]


@pytest.mark.parametrize("options", OPERATORS)
@pytest.mark.parametrize("is_radial", [False, True])
def test_filtered_lrelu_equals_its_definition(options: dict[str, Any], is_radial: bool) -> None:
    rng = np.random.RandomState(0)
    x, b = rng.randn(3, 9, 9), rng.randn(3)
    fu, fd = rng.randn(6 * options["up"]), rng.randn(6 * options["down"])
    fd = np.outer(fd, rng.randn(len(fd))) if is_radial else fd
    rest: dict[str, Any] = {"gain": 1.7, "slope": 0.3, "clamp": 2.5}
    expected = reference.filtered_lrelu(x, fu, fd, b, **options, **rest)
    before, after = options["padding"]
    tensors = [torch.from_numpy(part) for part in (x[None], fu, fd, b)]
    rest |= {**options, "padding": (before, after, before, after)}
    found = filtered_lrelu(tensors[0], tensors[1], tensors[2], tensors[3], **rest)
    np.testing.assert_allclose(found[0], expected, atol=1e-10)


def test_filtered_lrelu_is_twice_differentiable() -> None:
    torch.manual_seed(0)
    fu, fd = torch.randn(6).double(), torch.randn(4, 4).double()

    def run(x: Tensor, b: Tensor) -> Tensor:
        return filtered_lrelu(x, fu, fd, b, up=2, down=2, padding=3, clamp=4.0)

    inputs = tuple(torch.randn(*shape).double().requires_grad_() for shape in ((2, 2, 4, 4), (2,)))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_filtered_lrelu_without_filters_is_bias_and_lrelu() -> None:
    x, b = torch.randn(2, 3, 5, 5), torch.randn(3)
    expected = torch.nn.functional.leaky_relu(x + b[:, None, None], 0.2) * math.sqrt(2)
    torch.testing.assert_close(filtered_lrelu(x, b=b), expected)


def small(**changes: Any) -> AliasFreeConfig:
    settings = {"z_dim": 16, "w_dim": 16, "num_layers": 5, "channel_base": 512, "channel_max": 16, **changes}
    return auto(**settings).fit(64, 64)


@pytest.mark.parametrize("rotation", [False, True])
def test_each_layer_equals_its_reference(rotation: bool) -> None:
    torch.manual_seed(0)
    config = small(rotation=rotation)
    bands, channels = config.bands(), config.channels()
    for index in range(config.num_layers + 1):
        layer = StyleGAN3Layer(config, index).double()
        before, target = bands[max(index - 1, 0)], bands[index]
        with torch.no_grad():
            layer.activation.bias.normal_()
        x = torch.randn(1, channels[max(index - 1, 0)], before.size, before.size).double()
        style = torch.randn(1, x.shape[1]).double()
        with torch.no_grad():
            found = layer(x, style, torch.tensor(2.5).double())[0].numpy()
        expected = reference_layer(layer, x[0].numpy(), style[0].numpy(), before, target)
        # The filters of the layer are stored in float32.
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=f"layer {index}")


def reference_layer(layer: StyleGAN3Layer, x: np.ndarray, style: np.ndarray, before: Band, target: Band) -> np.ndarray:
    weight, bias = layer.weight.detach().numpy(), layer.activation.bias.detach().numpy()
    if layer.is_torgb:
        scaled = weight[:, :, 0, 0] * style / math.sqrt(x.shape[0] * 2.5)
        return np.clip(np.einsum("oi,ihw->ohw", scaled, x) + bias[:, None, None], -256, 256)
    rate = 2 * max(before.rate, target.rate)
    up, down = rate // before.rate, rate // target.rate
    y = reference.modulated_conv(x, weight, style, 2.5)
    fu = reference.firwin(6 * up, before.cutoff, 2 * before.half_width, rate)
    is_critical = target.cutoff == target.rate / 2
    design = reference.radial_filter if weight.shape[2] == 1 and not is_critical else reference.firwin
    fd = design(6 * down, target.cutoff, 2 * target.half_width, rate)
    total = (target.size - 1) * down + 1 - y.shape[1] * up + len(fu) + len(fd) - 2
    first = (total + up) // 2
    rest = {"gain": math.sqrt(2), "slope": 0.2, "clamp": 256.0}
    return reference.filtered_lrelu(y, fu, fd, bias, up=up, down=down, padding=(first, total - first), **rest)


def test_the_input_equals_its_closed_form() -> None:
    torch.manual_seed(1)
    layer = FourierInput(8, 6, (22, 22), rate=16, cutoff=2.0).double()
    with torch.no_grad():
        layer.frequencies[0] *= 7 / layer.frequencies[0].norm()  # beyond the cutoff, where amplitudes fade
    t = torch.tensor([[1.2, -0.9, 0.3, -0.2]]).double()
    expected = reference.fourier_features(
        t[0].numpy(),
        layer.frequencies.numpy(),
        layer.phases.numpy(),
        layer.weight.detach().numpy(),
        size=22,
        rate=16,
        cutoff=2.0,
    )
    np.testing.assert_allclose(layer(t)[0].detach(), expected, atol=1e-10)
    assert (FourierInput(8, 500, (4, 4), rate=16, cutoff=2.0).frequencies.norm(dim=1) < 2.0).all()
    torch.testing.assert_close(layer.affine(torch.randn(3, 8).double()), torch.tensor([[1.0, 0, 0, 0]] * 3).double())


def psnr(made: Tensor, expected: Tensor) -> float:
    """Return the signal-to-noise ratio in dB, relative to the range of 2."""
    return float(20 * math.log10(2) - 10 * (made - expected).square().mean().log10())


def shift(x: float, y: float) -> Tensor:
    """Return the transform of positions that moves an image by (x, y) of its size."""
    matrix = torch.eye(3)
    matrix[:2, 2] = -torch.tensor([x, y])
    return matrix[None]


def made(G: Any, ws: Tensor, transform: Tensor | None = None) -> Tensor:
    with torch.no_grad(), execution.using(input_transform=transform):
        images: Tensor = G.synthesis(ws)
    return images


def built(config: AliasFreeConfig) -> tuple[Any, Tensor]:
    """Build a generator, with the magnitudes that training would track; return styles too."""
    torch.manual_seed(0)
    G: Any = config.build()
    ws = G.mapping(torch.randn(4, config.z_dim), None)
    for _ in range(config.num_layers):
        magnitudes: list[Tensor] = []
        with torch.no_grad(), execution.using(magnitudes=magnitudes):
            G.synthesis(ws)
        G.synthesis.input_magnitudes.copy_(magnitudes[0])
    return G, ws


def test_translated_inputs_give_translated_images() -> None:
    G, ws = built(small())
    plain = made(G, ws)
    for x, y in ((1, 0), (0, 3), (7, -5)):
        moved = made(G, ws, shift(x / 64, y / 64))
        inside = slice(8, 56)
        assert psnr(moved[:, :, inside, inside], plain.roll((y, x), (2, 3))[:, :, inside, inside]) > 60, (x, y)
    assert plain.std() > 0.1


def test_rotated_inputs_give_rotated_images_in_configuration_r() -> None:
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    found = {}
    for rotation in (False, True):
        G, ws = built(small(rotation=rotation))
        plain = made(G, ws)
        found[rotation] = max(psnr(made(G, ws, quarter), torch.rot90(plain, k, (2, 3))) for k in (1, 3))
    assert found[True] > 60
    assert found[False] < 40


def test_relative_attention_equals_its_definition() -> None:
    torch.manual_seed(0)
    band = Band(rate=8, size=12, cutoff=2.0, half_width=2.0)
    layer = RelativeAttention(2, 16, band).double()
    inner = layer.log_mask == 0
    assert inner.sum() == 64 + 36  # the image, and half the margin
    q, k, v = torch.randn(3, 1, 144, 16).double()
    layer.log_mask = torch.zeros_like(layer.log_mask)
    found = layer(q, k, v)[0].detach().numpy()
    wavelengths = np.logspace(math.log10(2), math.log10(1 / band.cutoff), 2)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        width = float(layer.log_width[head].detach())
        parts = [x[0, :, part].numpy() for x in (q, k, v)]
        expected = reference.relative_attention(parts[0], parts[1], parts[2], layer.points.numpy(), width, wavelengths)
        np.testing.assert_allclose(found[:, part], expected, atol=1e-6)  # points are stored in float32


def test_a_styleformer_a_is_equivariant_to_translation() -> None:
    settings: dict[str, Any] = {"z_dim": 16, "w_dim": 16, "num_layers": 6, "channel_base": 1024, "channel_max": 32}
    G, ws = built(StyleformerAConfig(**settings))
    plain = made(G, ws)
    moved = made(G, ws, shift(5 / 64, -2 / 64))
    assert psnr(moved[:, :, 8:56, 8:56], plain.roll((-2, 5), (2, 3))[:, :, 8:56, 8:56]) > 35
    assert plain.std() > 0.1


@pytest.mark.parametrize("family", ["stylegan3", "styleformer-a"])
def test_magnitudes_follow_the_inputs_of_the_layers(family: str, shapes_zip: Path) -> None:
    config = small_train_config(shapes_zip, family, "stylegan2", loss__pl_weight=0, run__total_kimg=0.008)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    seen: list[Tensor] = []
    update = trainer.trackers["input_magnitudes"]

    def observed(mean: Tensor, skip: Tensor) -> None:
        seen.append(mean.clone())
        update(mean, skip)

    trainer.trackers["input_magnitudes"] = observed
    trainer.train()
    beta = 0.5 ** (trainer.batch_size / MAGNITUDE_HALF_LIFE)
    expected = torch.ones(5)
    for mean in seen:
        expected = mean + beta * (expected - mean)
    assert len(seen) >= 2
    torch.testing.assert_close(trainer.G.synthesis.input_magnitudes, expected)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: auto().fit(64, 48), "does not support 48x64: alias-free generators need square images of 2^n"),
    (lambda: auto().fit(96, 96), "does not support 96x96"),
    (lambda: auto().fit(32, 32), "14 layers 19 times as expensive as StyleGAN2; use --gen=stylegan2"),
    (lambda: StyleGAN3Config(num_layers=2), "must be more than 2"),
    (lambda: StyleGAN3Config(side=64, channel_base=32), "leaves no channel: must be at least 64"),
    (lambda: StyleformerAConfig(num_layers=5, channel_base=512, channel_max=18).fit(64, 64), "not a multiple of 4"),
    (lambda: StyleGAN3Config(channel_base=0).build(), "not chosen yet"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_unsupported_sizes_get_one_message(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("^", r"\^")):
        make()


def test_a_linear_activation_has_no_filters() -> None:
    band = Band(rate=16, size=16, cutoff=8.0, half_width=8.0)
    layer = FilteredActivation(3, band, band, extra=0, clamp=None, is_linear=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(layer(x), x)
