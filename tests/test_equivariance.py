"""EQ-T and EQ-R: kernels against closed forms and quadrature, networks of known equivariance, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from metric_helpers import ArrayImages, metric_context, natural_images
from small_families import small_generator
from torch import Tensor

import calc_metrics
import metrics
from dnnlib.config import UserError
from metrics import equivariance
from metrics.sampling import MetricContext, latents, shard
from training.config import PRESETS
from training.dataset import DatasetConfig
from training.input_transform import transform_input
from training.networks.stylegan3 import StyleGAN3Config
from training.snapshots.snapshot import load_network, save_network

NAMES = ("eqt6_int", "eqt6_frac", "eqr6")


class Waves:
    """Generator of plane waves below 0.3 cycles per pixel with amplitudes z, at transformed positions."""

    z_dim, c_dim = 8, 0

    def __init__(self, img_shape: tuple[int, int, int] = (2, 40, 40), *, is_equivariant: bool = True) -> None:
        self.img_shape, self.is_equivariant = img_shape, is_equivariant
        self.matrices = torch.eye(3, dtype=torch.float64).unsqueeze(0)
        stream = np.random.RandomState(0)
        radii, angles = 0.3 * stream.uniform(size=8), 2 * math.pi * stream.uniform(size=8)
        self.frequencies = torch.from_numpy(radii * np.stack([np.cos(angles), np.sin(angles)]))  # cycles per pixel

    def __call__(self, z: Tensor, c: Tensor, **_: Any) -> Tensor:
        C, H, W = self.img_shape
        side = max(H, W)
        rows, columns = ((torch.arange(size) - (size - 1) / 2) / side for size in (H, W))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points = torch.stack([x, y, torch.ones_like(x)], dim=2).double().flatten(0, 1)
        points = (points @ self.matrices.double().mT)[:, :, :2] * side  # (1 or B, H W, 2) in pixels
        waves = torch.sin(2 * math.pi * points @ self.frequencies) @ (z.double().unsqueeze(2) / 4)
        img = waves.mT.unflatten(2, (H, W)) + torch.arange(C)[:, None, None] / 8
        return img.float().contiguous(memory_format=torch.channels_last)


@contextmanager
def move_waves(G: Any, matrices: Tensor) -> Iterator[None]:
    before = G.matrices
    G.matrices = matrices if G.is_equivariant else before
    yield
    G.matrices = before


def waves_context(G: Waves, **changes: object) -> MetricContext:
    return metric_context(torch.zeros(4, *G.img_shape, dtype=torch.uint8), G=G, transform_input=move_waves, **changes)


def value(name: str, context: MetricContext) -> float:
    return metrics.compute(name, context).results[name]


# Interpolation and filters.


def test_shifts_by_whole_pixels_are_exact() -> None:
    img = torch.randn(1, 3, 9, 12)
    shifts = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    shifted, _, mask = equivariance.align_shift(img, img, shifts, radius=1)
    assert torch.equal(shifted[:, :, :7, 3:], img[:, :, 2:, :9])
    expected = torch.zeros(9, 12, dtype=torch.bool)
    expected[:7, 3:] = True
    assert torch.equal(mask[0, 0], expected)


def test_lanczos_weights_equal_their_closed_form() -> None:
    """sinc(1/2) sinc(1/6) = 6 / pi^2, sinc(3/2) sinc(1/2) = -4 / (3 pi^2), sinc(5/2) sinc(5/6) = 6 / (25 pi^2)."""
    weights, is_defined = equivariance.interpolation(9, torch.tensor([0.5], dtype=torch.float64), 3)
    half = np.array([6 / 25, -4 / 3, 6])
    expected = np.concatenate([half, half[::-1]]) / (2 * half.sum())
    assert weights[0, 4, 1:7].numpy() == pytest.approx(expected, rel=1e-12)
    assert torch.count_nonzero(weights[0, 4]) == 6
    assert is_defined[0].tolist() == [False] * 3 + [True] * 4 + [False] * 2


def quadrature_kernel(v: np.ndarray, angle: float, count: int = 1000) -> np.ndarray:
    """Integrate the octagon's cos(2 pi f v) at v (N, 2), in slices of constant f_x, and apply the window."""
    cos, sin = math.cos(angle), math.sin(angle)
    fx = (np.arange(count) + 0.5) / count - 0.5
    low, high = np.full(count, -0.5), np.full(count, 0.5)
    for a, b in ((cos, sin), (-sin, cos)):  # |a f_x + b f_y| <= 1 / 2
        ends = np.stack([(-0.5 - a * fx) / (b or 1e-12), (0.5 - a * fx) / (b or 1e-12)])
        low, high = np.maximum(low, ends.min(axis=0)), np.minimum(high, ends.max(axis=0))
    fx, low, high = (values[low < high] for values in (fx, low, high))
    x, y = v[:, :1], v[:, 1:]
    slices = np.cos(2 * np.pi * (fx * x + (low + high) / 2 * y)) * (high - low) * np.sinc((high - low) * y)
    radius = np.hypot(x, y)[:, 0]
    window = np.where(radius < 6, np.i0(5.65 * np.sqrt(np.clip(1 - (radius / 6) ** 2, 0, None))) / np.i0(5.65), 0)
    return slices.sum(axis=1) / count * window


@pytest.mark.parametrize("degrees", [0, 20, 45, 89, 130, -70])
def test_the_kernel_is_the_transform_of_the_octagon(degrees: float) -> None:
    angle = math.radians(degrees)
    v = np.random.RandomState(0).uniform(-6.5, 6.5, (200, 2))
    v[:2] = 0, 1
    found = equivariance.octagon_kernel(torch.from_numpy(v)[None], torch.tensor([[angle]], dtype=torch.float64))
    assert found[0].numpy() == pytest.approx(quadrature_kernel(v, angle), abs=2e-5)


def test_rotation_by_0_degrees_keeps_and_by_90_turns() -> None:
    img = torch.rand(1, 3, 20, 20)
    for degrees, turns in ((0, 0), (90, -1), (180, 2), (-90, 1)):
        angles = torch.tensor([[math.radians(degrees)]], dtype=torch.float64)
        expected, filtered, mask = equivariance.align_rotation(img, img.rot90(turns, (2, 3)), angles)
        assert (mask * (expected - img.rot90(turns, (2, 3)))).abs().max() < 1e-5
        assert (mask * (expected - filtered)).abs().max() < 1e-5
        assert 8 * 8 <= mask.sum() <= 10 * 10  # without 5 pixels on each side, up to rounding


# Networks of known equivariance.


@pytest.mark.parametrize("img_shape", [(2, 40, 40), (1, 32, 48)])
def test_band_limited_waves_have_a_high_value(img_shape: tuple[int, int, int]) -> None:
    context = waves_context(Waves(img_shape))
    assert value("eqt6_int", context) > 120
    assert value("eqt6_frac", context) > 30  # the Lanczos kernel attenuates high frequencies
    assert value("eqr6", context) > 60


def images_of(context: MetricContext, count: int) -> np.ndarray:
    return context.network(latents(context, range(count)), torch.zeros(count, 0)).double().numpy()


def shifted_pixel(img: np.ndarray, row: float, column: float, radius: int) -> np.ndarray | None:
    """Interpolate an image (C, H, W) by the Lanczos kernel; None if a pixel of it is outside."""
    total, weight = np.zeros(len(img)), 0.0
    for i in range(math.floor(row) - 3, math.floor(row) + 5):
        for j in range(math.floor(column) - 3, math.floor(column) + 5):
            u = np.array([row - i, column - j])
            if (abs(u) < radius).all():
                if not (0 <= i < img.shape[1] and 0 <= j < img.shape[2]):
                    return None
                kernel = np.prod(np.sinc(u) * np.sinc(u / radius))
                total, weight = total + kernel * img[:, i, j], weight + kernel
    return total / weight


@pytest.mark.parametrize("name", ["eqt3_int", "eqt3_frac"])
def test_ignored_translation_has_the_value_of_the_definition(name: str) -> None:
    context = waves_context(Waves((2, 18, 24), is_equivariant=False))
    is_rounded, errors = name.endswith("int"), []
    shifts = equivariance.draw_shifts(context, range(3), (18, 24), is_rounded=is_rounded).tolist()
    for img, (x, y) in zip(images_of(context, 3), shifts, strict=True):
        for i in range(18):
            for j in range(24):
                expected = shifted_pixel(img, i - y, j - x, 1 if is_rounded else 3)
                errors += [] if expected is None else list((expected - img[:, i, j]) ** 2)
    expected_value = 20 * math.log10(2) - 10 * math.log10(np.mean(errors))
    assert value(name, context) == pytest.approx(expected_value, abs=1e-4)


def test_ignored_rotation_has_the_value_of_the_definition() -> None:
    context = waves_context(Waves((2, 18, 18), is_equivariant=False))
    angles, errors = equivariance.draw_angles(context, range(2), (18, 18))[:, 0].tolist(), []
    pixels = np.stack(np.meshgrid(np.arange(18), np.arange(18), indexing="xy"), axis=2).reshape(-1, 2) - 8.5
    for img, angle in zip(images_of(context, 2), angles, strict=True):
        R = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        for p in pixels:
            if (abs(p) > 3.5).any() or (abs(R.T @ p) > 3.5).any():  # 6 pixels of the window on each side
                continue
            weights = quadrature_kernel(p - pixels @ R.T, angle), quadrature_kernel(p - pixels, angle)
            expected, found = (img.reshape(2, -1) @ weight for weight in weights)
            errors += list((expected - found) ** 2)
    expected_value = 20 * math.log10(2) - 10 * math.log10(np.mean(errors))
    assert value("eqr2", context) == pytest.approx(expected_value, abs=1e-3)


def test_a_constant_image_has_the_largest_value() -> None:
    """Images without rounding errors reach the limit of float32; interpolation keeps constants."""
    G = Waves()
    G.frequencies = torch.zeros(2, 8, dtype=torch.float64)
    assert value("eqt6_int", waves_context(G)) == equivariance.MAX_PSNR == 150
    assert value("eqt6_frac", waves_context(G)) > 120
    assert value("eqr6", waves_context(G)) > 80


def test_motions_are_uniform() -> None:
    context = waves_context(Waves())
    shifts = equivariance.draw_shifts(context, range(4000), (40, 80), is_rounded=False).numpy()
    angles = equivariance.draw_angles(context, range(4000), (40, 80)).numpy()
    for drawn, limit in ((shifts[:, 0], 10), (shifts[:, 1], 5), (angles[:, 0], math.pi)):
        assert scipy.stats.kstest(drawn, "uniform", (-limit, 2 * limit)).pvalue > 0.01


# Independence from batches and processes.


@pytest.mark.parametrize("name", NAMES)
def test_the_value_does_not_depend_on_the_batch_size(name: str) -> None:
    one, other = (value(name, waves_context(Waves((1, 20, 20)), batch_size=size)) for size in (6, 4))
    assert one == pytest.approx(other, abs=1e-3)
    assert value(name, waves_context(Waves((1, 20, 20)), seed=1)) != pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_shards_of_processes_sum_to_the_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = waves_context(Waves((1, 20, 20), is_equivariant=False))
    sums: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        sums.append(x)
        return x

    monkeypatch.setattr(equivariance, "all_reduce", record)
    whole = value(name, context)
    for rank in range(3):
        monkeypatch.setattr(equivariance, "own_shard", lambda count, rank=rank: shard(count, rank, 3))
        value(name, context)
    error, number = sum(sums[1:], start=torch.zeros(2, dtype=torch.float64)).tolist()
    assert number == sums[0][1]
    assert equivariance.psnr(error / number) == pytest.approx(whole, abs=1e-5)


# Families.


@pytest.fixture(scope="module")
def stylegan3() -> dict[bool, Any]:
    """Untrained networks of 64x64 pixels by `rotation`."""
    torch.manual_seed(0)
    networks = {}
    for rotation in (False, True):
        config = StyleGAN3Config(z_dim=16, w_dim=16, channel_base=1024, channel_max=16, rotation=rotation)
        networks[rotation] = config.fit(64, 64).build().eval()
    return networks


def stylegan3_context(G: Any) -> MetricContext:
    return metric_context(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), G=G, transform_input=transform_input)


def test_stylegan3_is_equivariant_to_translation(stylegan3: dict[bool, Any]) -> None:
    for G in stylegan3.values():
        assert value("eqt4_int", stylegan3_context(G)) > 60
        assert value("eqt4_frac", stylegan3_context(G)) > 55


def test_only_configuration_r_is_equivariant_to_rotation(stylegan3: dict[bool, Any]) -> None:
    t, r = (value("eqr4", stylegan3_context(stylegan3[rotation])) for rotation in (False, True))
    assert r > 60
    assert t < r - 20


def test_calc_metrics_transforms_the_input(shapes_zip: Path, tmp_path: Path) -> None:
    generator = StyleGAN3Config(z_dim=8, w_dim=8, side=16, num_layers=4, channel_base=64, channel_max=8)
    config = replace(PRESETS["tiny"], generator=generator, data=DatasetConfig(path=str(shapes_zip)))
    torch.manual_seed(0)
    path = tmp_path / "network.pkl"
    save_network(path, config=config, G_ema=generator.build(), nimg=0)
    options = [f"--network={path}", "--device=cpu", "--batch=4", "--metrics=eqt6_int,eqt6_frac,eqr6"]
    result = CliRunner().invoke(calc_metrics.main, options)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    context = metric_context(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), transform_input=transform_input)
    context = replace(context, G=load_network(path).G_ema)
    for record in records:
        assert record["results"] == {record["metric"]: pytest.approx(value(record["metric"], context), abs=0.01)}
        assert (record["num_real"], record["num_fake"]) == (0, 12)


# Errors.


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_without_fourier_features_is_refused(name: str) -> None:
    G = small_generator("stylegan2").build().eval()
    context = metric_context(natural_images(2, (3, 16, 16)), G=G, transform_input=transform_input)
    message = f"metric {name}: the input of StyleGAN2Generator cannot be moved: .* --cfg=stylegan3-t or styleformer-a"
    with pytest.raises(UserError, match=message):
        metrics.registry.prepare([name], context)  # before any image is generated


def test_unsuitable_inputs_are_refused() -> None:
    images = ArrayImages(natural_images(4))
    cases = [
        ("eqr6", waves_context(Waves((1, 12, 40))), "1x12x40 .* needs more than 12 pixels per side"),
        ("eqt6_int", waves_context(Waves(), noise_mode="random"), "need the same noise: use --noise-mode=const"),
        ("eqt6_int", metric_context(images.data, G=None, fakes=images), "needs a network"),
        ("eqt6_int", metric_context(images.data), "needs a generator whose input can be transformed"),
    ]
    for name, context, message in cases:
        with pytest.raises(UserError, match=f"metric {name}: .*{message}"):
            metrics.compute(name, context)


def test_a_diverged_network_is_refused() -> None:
    G = Waves()
    G.frequencies = G.frequencies * math.nan
    with pytest.raises(UserError, match="metric eqt6_int: the network returns non-finite values"):
        metrics.compute("eqt6_int", waves_context(G))


def test_transforms_of_rectangular_images_use_the_longer_side() -> None:
    """A shift by 8 pixels of an image of 32x64 pixels is an eighth of its longer side, along both axes."""
    matrices = torch.eye(3).double()[None].clone()
    matrices[0, :2, 2] = torch.tensor([8.0, 8.0])
    expected = torch.eye(3)[None].clone()
    expected[0, :2, 2] = 0.125
    torch.testing.assert_close(equivariance.in_image_units(matrices, (32, 64)), expected)
