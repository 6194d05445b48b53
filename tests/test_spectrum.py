"""Average power spectra against closed forms and NumPy, and their charts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from metric_helpers import ArrayImages, metric_context, natural_images
from PIL import Image
from torch import Tensor

import calc_metrics
import metrics
from dnnlib.config import UserError
from metrics.registry import MetricResult


def measure(real: Tensor, fake: Tensor, count: int, **changes: object) -> MetricResult:
    context = metric_context(real, G=None, fakes=ArrayImages(fake), **changes)
    return metrics.compute(f"spectrum{count}", context)


def test_white_noise_is_flat() -> None:
    """With the windowed mean removed, the first rings have less power than the variance."""
    images = torch.from_numpy(np.random.RandomState(0).randint(64, 192, (60, 3, 32, 32)).astype(np.uint8))
    curves = measure(images, images, 60).curves
    variance = (128**2 - 1) / 12 / 127.5**2
    assert curves["frequency"] == list(range(1, 17))
    assert curves["real"][2:] == pytest.approx([10 * math.log10(variance)] * 14, abs=0.2)


@pytest.mark.parametrize("cycles", [(3, 4), (0, 9), (-8, 6)])
def test_a_wave_peaks_at_its_frequency(cycles: tuple[int, int]) -> None:
    y, x = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    wave = 127.5 + 100 * np.cos(2 * np.pi * (cycles[0] * y + cycles[1] * x) / 32)
    images = torch.from_numpy(wave.round().astype(np.uint8)).expand(2, 1, -1, -1)
    power = np.array(measure(images, images, 2).curves["real"])
    peak = round(math.hypot(*cycles))
    assert power.argmax() == peak - 1
    away = np.abs(np.arange(1, 17) - peak) > 2  # outside the main lobe of the window
    assert power[away].max() < power.max() - 40


def test_spectra_equal_a_float64_computation() -> None:
    images = natural_images(7, (2, 20, 30))
    total = np.zeros((20, 30))
    hann = [0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size) for size in (20, 30)]
    window = np.outer(*hann)
    for channel in images.numpy().reshape(-1, 20, 30):
        pixels = channel / 127.5 - 1
        pixels = (pixels - np.average(pixels, weights=window)) * window
        total += np.abs(np.fft.fft2(pixels)) ** 2 / (window**2).sum() / 14
    rings: dict[int, list[float]] = {}
    for i in range(20):
        for j in range(30):
            fy, fx = (i + 10) % 20 - 10, ((j + 15) % 30 - 15) * 20 / 30  # in cycles per 20 pixels
            rings.setdefault(round(math.hypot(fy, fx)), []).append(total[i, j])
    expected = [10 * math.log10(np.mean(rings[ring])) for ring in range(1, 11)]
    assert measure(images, images, 7).curves["fake"] == pytest.approx(expected, abs=1e-4)


def test_a_third_of_the_contrast_is_a_constant_difference() -> None:
    """127.5 + e and 127.5 + 3 e for odd multiples e of 1/2: 20 log10(3) dB at every frequency."""
    e = np.random.RandomState(0).randint(-30, 30, (20, 1, 16, 16)) + 0.5
    real, fake = (torch.from_numpy((127.5 + gain * e).astype(np.uint8)) for gain in (3, 1))
    result = measure(real, fake, 20)
    assert result.results == {"spectrum20": pytest.approx(20 * math.log10(3), rel=1e-9)}
    differences = np.subtract(result.curves["real"], result.curves["fake"])
    assert differences == pytest.approx([20 * math.log10(3)] * 8, abs=1e-3)
    assert (result.num_real, result.num_fake) == (20, 20)


def test_images_of_one_colour_have_the_lowest_power() -> None:
    black = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    result = measure(black, black, 3)
    assert result.results["spectrum3"] == 0
    assert result.curves["real"] == [-100] * 4


def test_spectra_do_not_depend_on_the_batch_size() -> None:
    images, fakes = natural_images(30), natural_images(30, seed=1)
    one, other = (measure(images, fakes, 30, batch_size=size) for size in (30, 7))
    assert one.results == pytest.approx(other.results, rel=1e-12)
    assert one.curves == other.curves


def test_too_small_images_are_refused() -> None:
    images = torch.zeros(3, 1, 3, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"metric spectrum3: images of 1x3x8 .*: needs 4 pixels per side"):
        measure(images, images, 3)


# Charts.


def write_images(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


def calculate(folder: Path, *arguments: str) -> Result:
    """Compare two sets of images in a folder."""
    fakes, reals = (write_images(folder / name, natural_images(6, seed=seed)) for seed, name in enumerate("ab"))
    options = [f"--network={fakes}", f"--data={reals}", f"--outdir={folder / 'out'}", "--device=cpu", *arguments]
    return CliRunner().invoke(calc_metrics.main, options)


def test_plot_draws_the_spectra_of_a_set_of_images(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = calculate(tmp_path, "--metrics=spectrum6,swd6", "--plot")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metric-spectrum6-curves.png", "metric-spectrum6.jsonl", "metric-swd6.jsonl",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "metric-spectrum6-curves.png") as chart:
        assert chart.width > 1000
    spectra, distance = map(json.loads, result.stdout.splitlines())
    assert list(spectra["curves"]) == ["frequency", "real", "fake"]
    assert "curves" not in distance


def test_the_chart_shows_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    records = [
        {
            "metric": "spectrum6_ema0.1",
            "results": {"spectrum6_ema0.1": kimg + 0.5},
            "curves": {"frequency": [1.0, 2.0], "real": [3.0, 1.0], "fake": [3.0 - kimg, 1.0]},
            "kimg": kimg,
            "snapshot": "network.pkl",
        }
        for kimg in (1, 2)
    ]
    calc_metrics.plot_curves(tmp_path, [*records, {"metric": "swd6"}])
    both, difference = drawn[0].axes
    assert [list(line.get_ydata()) for line in both.lines] == [[3, 1], [2, 1], [1, 1]]
    assert [list(line.get_ydata()) for line in difference.lines[1:]] == [[-1, 0], [-2, 0]]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["real images", "generated, 1 kimg: 1.5", "generated, 2 kimg: 2.5"]
