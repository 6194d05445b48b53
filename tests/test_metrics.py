"""Metrics: the sliced Wasserstein distance against closed forms and a reimplementation, sharding, the registry."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from metric_helpers import ArrayImages, Stripes, metric_context, natural_images
from torch import Tensor

import metrics
from dnnlib.config import UserError
from metrics import registry
from metrics import sliced_wasserstein as sw
from metrics.sampling import (
    MetricContext,
    choose_reals,
    fake_batches,
    latents,
    random_labels,
    random_rows,
    real_batches,
    shard,
    to_uint8,
)

# Sliced Wasserstein distance.


def test_wasserstein_1d_equals_scipy() -> None:
    stream = np.random.RandomState(0)
    x, y = stream.standard_normal((3, 500)), 2 * stream.standard_normal((3, 500)) + 1
    measured = sw.wasserstein_1d(torch.tensor(x), torch.tensor(y))
    expected = [scipy.stats.wasserstein_distance(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(measured, expected, rtol=1e-12)

    permuted = torch.tensor(x)[:, torch.randperm(500)]
    np.testing.assert_allclose(sw.wasserstein_1d(permuted + 0.75, torch.tensor(x)), 0.75, rtol=1e-12)


def test_histograms_equal_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal, heavy-tailed, shifted, equal and constant values, and values of which 70 % are equal."""
    stream = np.random.RandomState(0)
    first, second = stream.standard_normal((2, 6, 5000)).astype(np.float32)
    second *= np.array([[1.1], [1], [1], [1], [0], [1.1]], dtype=np.float32)
    first[1], second[1] = first[1] ** 3, 1.2 * second[1] ** 3
    second[2] = stream.permutation(first[2]) + 0.75
    second[3] = first[3, ::-1]
    first[4] = second[4] = 2.5
    first[5, :3500], second[5, :3500] = 0.1, 0.1002
    expected = [scipy.stats.wasserstein_distance(a, b) for a, b in zip(first, second, strict=True)]
    monkeypatch.setattr(sw, "MAX_SORTED", 4999)
    measured = sw.wasserstein_1d(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-5)  # a bin is 3e-5 wide
    assert measured[3:5].tolist() == [0, 0]


def test_swd_from_histograms_equals_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = natural_images(20, seed=1), natural_images(20, seed=2)
    fake[:, :, :16] = 200  # equal patches
    expected = sw.sliced_wasserstein(real, fake)
    monkeypatch.setattr(sw, "MAX_SORTED", 2000)
    assert list(sw.sliced_wasserstein(real, fake).values()) == pytest.approx(list(expected.values()), rel=1e-6)


def test_identical_sets_have_distance_zero() -> None:
    images = natural_images(10)
    assert all(abs(value) < 1e-6 for value in sw.sliced_wasserstein(images, images.clone()).values())


def test_uniform_images_match_the_closed_form() -> None:
    """A patch of colour x projects to x * sum(u); the distance is W1 of the colours times the mean of |sum(u)|."""
    real = torch.tensor([40, 200] * 30, dtype=torch.uint8)
    fake = torch.tensor([10, 120, 230] * 20, dtype=torch.uint8)
    measured = sw.sliced_wasserstein(
        *(colours.reshape(60, 1, 1, 1).expand(60, 1, 20, 24).contiguous() for colours in (real, fake))
    )
    normalised = [(c.numpy() - c.numpy().mean()) / c.numpy().std() for c in (real, fake)]
    distance = scipy.stats.wasserstein_distance(*normalised)
    assert list(measured) == ["mean", "20x24"]

    # E|sum(u)| for u uniform on the unit sphere in D dimensions. The mean over 512 directions is within 3 standard
    # errors.
    D = 49
    expected_sum = math.sqrt(D / math.pi) * math.exp(math.lgamma(D / 2) - math.lgamma((D + 1) / 2))
    standard_error = math.sqrt((1 - expected_sum**2) / 512)
    assert measured["mean"] / 1000 / distance == pytest.approx(expected_sum, abs=3 * standard_error)


def numpy_distance(real: np.ndarray, fake: np.ndarray, seed: int) -> dict[str, float]:
    """Sliced Wasserstein distance in float64, image by image; shares only the random numbers with the tested code."""

    def blur(image: np.ndarray) -> np.ndarray:
        taps = np.array([1, 4, 6, 4, 1]) / 16
        for axis in (1, 2):
            image = scipy.ndimage.correlate1d(image, taps, axis=axis, mode="mirror")
        return image

    def pyramid(image: np.ndarray) -> list[np.ndarray]:
        if min(image.shape[1:]) // 2 + image.shape[1] % 2 < 16:
            return [image]
        small = blur(image)[:, ::2, ::2]
        large = np.zeros_like(image)
        large[:, ::2, ::2] = small
        return [image - 4 * blur(large), *pyramid(small)]

    def patches(level: int, images: np.ndarray) -> np.ndarray:
        rows = []
        for position, image in enumerate(images):
            pixels = pyramid(image.astype(np.float64))[level]
            corners = sw.random_corners(seed, level, pixels.shape[1:], range(position, position + 1))[0]
            rows += [pixels[:, y : y + 7, x : x + 7] for y, x in corners.tolist()]
        stacked = np.stack(rows)
        stacked -= stacked.mean(axis=(0, 2, 3), keepdims=True)
        return (stacked / stacked.std(axis=(0, 2, 3), keepdims=True)).reshape(len(rows), -1)

    result = {}
    for level, first in enumerate(pyramid(real[0].astype(np.float64))):
        directions = sw.random_directions(seed, level, real.shape[1]).numpy().reshape(-1, sw.DIRECTIONS)
        x, y = (np.sort(patches(level, images) @ directions, axis=0) for images in (real, fake))
        result[f"{first.shape[1]}x{first.shape[2]}"] = 1000 * float(np.abs(x - y).mean())
    return {"mean": sum(result.values()) / len(result), **result}


@pytest.mark.parametrize("img_shape", [(2, 33, 48), (1, 96, 80)])  # the finest level of the second shape stores patches
def test_swd_equals_a_float64_reimplementation(img_shape: tuple[int, int, int]) -> None:
    real, fake = natural_images(9, img_shape, seed=1), natural_images(9, img_shape, seed=2)
    measured = sw.sliced_wasserstein(real, fake, seed=5)
    expected = numpy_distance(real.numpy(), fake.numpy(), seed=5)
    assert list(measured) == list(expected)
    assert list(measured.values()) == pytest.approx(list(expected.values()), rel=1e-3)


@pytest.mark.parametrize(("max_sorted", "tolerance"), [(sw.MAX_SORTED, 1e-5), (1000, 2e-4)])  # sorted; histograms
def test_swd_of_single_faint_pixels_equals_float64(
    max_sorted: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels of 254, and 255 in 3 pixels of 40 images: the mean is 15,000 times the standard deviation."""
    monkeypatch.setattr(sw, "MAX_SORTED", max_sorted)
    real, fake = np.full((2, 40, 3, 16, 16), 254, dtype=np.uint8)
    for stream, images in ((np.random.RandomState(1), real), (np.random.RandomState(2), fake)):
        for channel in range(3):
            images[stream.choice(40, 3, replace=False), channel, *stream.randint(5, 11, size=(2, 3))] = 255
    expected = numpy_distance(real, fake, seed=0)["mean"]
    measured = sw.sliced_wasserstein(torch.from_numpy(real), torch.from_numpy(fake))["mean"]
    assert measured == pytest.approx(expected, rel=tolerance)


def test_swd_grows_with_noise_and_ignores_contrast() -> None:
    images = natural_images(16)
    fresh = torch.from_numpy(np.random.RandomState(3).standard_normal(images.shape))
    noisy = [(images + sigma * fresh).clamp(0, 255).to(torch.uint8) for sigma in (4, 12, 36)]
    distances = [sw.sliced_wasserstein(images, other)["mean"] for other in noisy]
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0] > 0

    faint = images // 2
    invariant = sw.sliced_wasserstein(2 * faint, faint + 20)[
        "mean"
    ]  # each set is normalised by the statistics of the set
    assert invariant < 0.5 < distances[0]  # not 0: rounding to integers differs between the contrasts


def test_patches_are_normalised_per_channel() -> None:
    real, fake = natural_images(20, (3, 16, 16), seed=1), natural_images(20, (3, 16, 16), seed=2)
    opaque = torch.full((20, 1, 16, 16), 255, dtype=torch.uint8)
    level = sw.PatchSet(range(20), (4, 16, 16), seed=0, device=torch.device("cpu"))
    level.add(range(20), torch.cat([real, opaque], dim=1))
    mean, scale = level.levels[0].mean_and_scale()
    assert (mean[3], scale[3]) == (255 * sw.STEPS, 0)

    with_alpha = sw.sliced_wasserstein(torch.cat([real, opaque], dim=1), torch.cat([fake, opaque], dim=1))
    assert math.isfinite(with_alpha["mean"])
    assert with_alpha["mean"] > 0


def test_pyramid_levels_sum_to_the_image() -> None:
    img = natural_images(2, (3, 70, 67)).double()
    levels = sw.laplacian_pyramid(img)
    assert [tuple(level.shape[2:]) for level in levels] == [(70, 67), (35, 34), (18, 17)]
    total = levels[-1]
    for level in reversed(levels[:-1]):
        total = level + sw.upsample(total, *level.shape[2:])
    torch.testing.assert_close(total, img)

    *fine, coarse = sw.laplacian_pyramid(torch.full((1, 1, 64, 48), 200.0))
    assert all(level.abs().max() == 0 for level in fine)
    assert (coarse == 200).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((7, 9), [(7, 9)]),
        ((31, 64), [(31, 64), (16, 32)]),
        ((64, 64), [(64, 64), (32, 32), (16, 16)]),
        ((40, 56), [(40, 56), (20, 28)]),
    ],
)
def test_pyramid_levels_stop_at_16_pixels(size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert sw.pyramid_shapes(*size) == expected


@pytest.mark.gpu
def test_swd_on_cuda_equals_cpu() -> None:
    real, fake = natural_images(20, seed=1), natural_images(20, seed=2)
    on_cpu, on_cuda = (sw.sliced_wasserstein(real.to(device), fake.to(device)) for device in ("cpu", "cuda"))
    assert list(on_cuda.values()) == pytest.approx(list(on_cpu.values()), rel=1e-5)


def test_swd_refuses_mismatched_sets() -> None:
    images = natural_images(4)
    with pytest.raises(UserError, match="equal in number and shape"):
        sw.sliced_wasserstein(images, images[:3])
    with pytest.raises(UserError, match="must be uint8"):
        sw.sliced_wasserstein(images, images.float())
    with pytest.raises(UserError, match="needs at least 7 pixels per side"):
        sw.sliced_wasserstein(images[:, :, :6], images[:, :, :6])


# Independence from batches and processes.


def test_swd_does_not_depend_on_the_batch_size() -> None:
    images = natural_images(80, (1, 32, 32))
    one, other = (metrics.compute("swd70", metric_context(images, batch_size=size)) for size in (70, 9))
    assert one.results == other.results
    assert list(one.results) == ["swd70", "swd70_32", "swd70_16"]
    assert (one.num_real, one.num_fake) == (70, 70)


@pytest.mark.parametrize("size", [32, 96])
def test_swd_does_not_depend_on_the_number_of_processes(size: int) -> None:
    """Merge three shards of images as `gathered` does, and use three shards of directions."""
    sets = [natural_images(10, (1, size, size), seed=seed) for seed in (1, 2)]
    merged = []
    for images in sets:
        shares = []
        for rank in range(3):
            positions = shard(10, rank, 3)
            share = sw.PatchSet(positions, (1, size, size), seed=0, device=images.device)
            share.add(positions, images[positions.start : positions.stop])
            shares.append(share.levels[0])
        merged.append(
            sw.PatchLevel(
                whole=shares[0].whole,
                values=torch.cat([share.values for share in shares]),
                corners=torch.cat([share.corners for share in shares]),
                moments=sum((share.moments for share in shares), start=torch.zeros(2, 1, dtype=torch.int64)),
            )
        )
    directions = sw.random_directions(0, 0, 1)
    parts = [shard(sw.DIRECTIONS, rank, 3) for rank in range(3)]
    distances = torch.cat(
        [sw.level_distances(merged[0], merged[1], directions[:, :, part.start : part.stop]) for part in parts]
    )
    whole = sw.sliced_wasserstein(*sets)[str(size)]
    assert 1000 * float(distances.mean()) == pytest.approx(whole, rel=1e-9)


def test_shards_cover_all_positions_in_order() -> None:
    for count in (0, 1, 10, 11):
        assert [i for rank in range(4) for i in shard(count, rank, 4)] == list(range(count))


def test_random_rows_are_a_function_of_the_position() -> None:
    def rows(positions: range) -> Tensor:
        return random_rows(lambda stream, block: stream.standard_normal((block, 2)), 0, "test", positions)

    whole = rows(range(200))
    assert torch.equal(rows(range(60, 131)), whole[60:131])
    assert len(whole.unique()) == 400


# Real and generated images.


def test_fakes_are_generated_from_standard_normal_latents() -> None:
    context = metric_context(natural_images(4), batch_size=300)
    G = context.G
    batches = list(fake_batches(context, 1000))
    assert [len(images) for _, images in batches] == [300, 300, 300, 100]
    assert isinstance(G, Stripes)
    z = torch.cat(G.latents)
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    first = G(z[:300], torch.zeros(300, 0))
    assert torch.equal(batches[0][1], to_uint8(first))
    assert torch.equal(to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])), torch.tensor([0, 0, 128, 255, 255]).byte())


def test_random_noise_is_reproducible_and_restores_the_rng() -> None:
    context = metric_context(natural_images(4), noise_mode="random")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, other = (next(fake_batches(context, 3))[1] for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.rand(1), expected)


def test_labels_of_fakes_have_the_frequencies_of_the_data() -> None:
    images = natural_images(10, (1, 16, 16))
    classes = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2, 2, 2])
    data = ArrayImages(images, classes, c_dim=3)
    context = MetricContext(G=Stripes((1, 16, 16), c_dim=3), images=data, device=torch.device("cpu"))
    c = random_labels(context, range(2000))
    assert c.dtype == torch.float32
    assert torch.equal(c.sum(dim=1), torch.ones(2000))
    np.testing.assert_allclose(c.mean(dim=0), [0.7, 0, 0.3], atol=0.04)

    vectors = torch.arange(20.0).reshape(10, 2)
    context = MetricContext(
        G=Stripes((1, 16, 16), c_dim=2), images=ArrayImages(images, vectors, c_dim=2), device=torch.device("cpu")
    )
    drawn = random_labels(context, range(50))
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in vectors.tolist()}


def test_the_seed_determines_latents_labels_and_reals() -> None:
    data = ArrayImages(natural_images(30, (1, 16, 16)), torch.arange(30) % 3, c_dim=3)

    def drawn(seed: int) -> tuple[Tensor, Tensor, list[int]]:
        context = MetricContext(G=Stripes((1, 16, 16), c_dim=3), images=data, device=torch.device("cpu"), seed=seed)
        return latents(context, range(20)), random_labels(context, range(20)), choose_reals(context, 11)

    (z, c, reals), again, other = drawn(1), drawn(1), drawn(2)
    assert (torch.equal(z, again[0]), torch.equal(c, again[1]), reals == again[2]) == (True, True, True)
    assert (torch.equal(z, other[0]), torch.equal(c, other[1]), reals == other[2]) == (False, False, False)


def test_reals_are_a_random_subset_or_all_images() -> None:
    images = natural_images(30, (1, 16, 16))
    context = metric_context(images, batch_size=4)
    assert choose_reals(context, 30) == choose_reals(context, 1000) == list(range(30))
    chosen = choose_reals(context, 11)
    assert len(set(chosen)) == 11
    assert chosen == sorted(chosen) != list(range(11))
    got = torch.cat([batch for _, batch in real_batches(context, chosen)])
    assert torch.equal(got, images[chosen])


def test_fewer_reals_than_requested_are_all_used() -> None:
    result = metrics.compute("swd1k", metric_context(natural_images(12, (1, 16, 16))))
    assert (result.num_real, result.num_fake) == (12, 12)


def test_swd_floor_compares_disjoint_halves() -> None:
    context = metric_context(natural_images(30, (1, 16, 16)))
    first, second = sw.disjoint_halves(context, 10)
    assert len(first) == len(second) == 10
    assert not set(first) & set(second)
    first, second = sw.disjoint_halves(context, 100)
    assert sorted(first + second) == list(range(30))

    floor = metrics.compute("swd_floor", context)
    against_fakes = metrics.compute("swd15", context)
    assert 0 < floor.results["swd_floor"] < against_fakes.results["swd15"] / 1.5
    assert (floor.num_real, floor.num_fake) == (30, 0)
    with pytest.raises(UserError, match="two disjoint sets"):
        metrics.compute("swd_floor", metric_context(natural_images(1, (1, 16, 16))))


def test_a_diverged_network_is_refused() -> None:
    context = metric_context(natural_images(4), truncation_psi=math.nan)
    with pytest.raises(UserError, match="non-finite"):
        metrics.compute("swd4", context)


def test_a_network_that_does_not_match_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"network generates images of 3x32x32 .* dataset has 1x16x16"):
        metric_context(natural_images(4, (1, 16, 16)), G=Stripes())
    with pytest.raises(UserError, match="conditional on labels of 10"):
        metric_context(natural_images(4), G=Stripes(c_dim=10))


# The registry.


def test_metric_names_contain_the_number_of_images() -> None:
    assert registry.find("swd")[1] is None
    assert registry.find("swd5k")[1] == 5000
    assert registry.find("swd500_floor")[1] == 500
    assert metrics.resolve(" swd,swd1k,swd") == ["swd", "swd1k"]
    assert metrics.resolve(("swd500",)) == ["swd500"]


@pytest.mark.parametrize("name", ["swd0", "swd5K", "fidd", "swd_", ""])
def test_unknown_metrics_are_refused_with_the_registered_names(name: str) -> None:
    with pytest.raises(UserError, match=r"registered metrics are .*swd<N>, swd<N>_floor"):
        registry.find(name)


def test_unknown_metrics_get_the_closest_match() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'sdw': did you mean swd\?"):
        metrics.resolve("sdw")


def test_fid_is_the_default_only_if_its_detector_is_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    names, why = metrics.default_metrics()
    assert names == ("swd",)
    assert "computing swd instead of fid50k_full, because weights-inception-2015-12-05-6726825d.pth" in why
    assert str(tmp_path / "detectors") in why
    (tmp_path / "detectors").mkdir()
    (tmp_path / "detectors" / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert metrics.default_metrics()[0] == ("fid50k_full",)


def test_a_metric_with_missing_requirements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    missing: str | None = "table.txt is not there; download it"

    @metrics.register_metric("new<N>", help="h", protocol="p", paper="q", needs=lambda: missing)
    def new(context: MetricContext, name: str, count: int | None) -> metrics.Measurement:
        return metrics.Measurement(values={name: 1.5}, num_real=3, num_fake=4)

    with pytest.raises(UserError, match=r"metric new: table\.txt is not there"):
        metrics.compute("new", metric_context(natural_images(2)))
    missing = None
    assert metrics.compute("new", metric_context(natural_images(2))).results == {"new": 1.5}


def test_the_documented_example_metric_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    guide = (Path(metrics.__file__).parents[1] / "docs" / "metrics.md").read_text()
    _, example = guide.split("## Adding a metric")
    code = "\n".join(line[4:] for line in example.splitlines() if line.startswith("    ") or not line)
    exec(compile(code, "docs/metrics.md", "exec"), {})

    images = natural_images(12)
    result = metrics.compute("brightness10", metric_context(images, batch_size=4))
    assert (result.num_real, result.num_fake) == (10, 10)
    context = metric_context(images)
    reals = images[choose_reals(context, 10)].double().mean()
    [(_, fakes)] = fake_batches(context, 10)
    assert result.results["brightness10"] == pytest.approx(abs(float(reals - fakes.double().mean())), rel=1e-4)


def test_the_documentation_lists_which_metrics_count_flips() -> None:
    """The table has a row per pattern: `name` ... | flips | reals | ..."""
    guide = (Path(metrics.__file__).parents[1] / "docs" / "metrics.md").read_text()
    table = guide.split("## Protocols: flips, reals, noise\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    documented = {name: row[1] == "as `--mirror`" for row in rows for name in re.findall(r"`([^`]*<N>[^`]*)`", row[0])}
    assert documented == {spec.pattern: spec.counts_flips for spec in metrics.registered_metrics()}
    assert {row[1] for row in rows} == {"as `--mirror`", "never", "no reals"}


def test_swd_counts_flips_only_with_mirror() -> None:
    """The result with --mirror equals the result on a dataset that contains all flips."""
    images, flips = natural_images(20), natural_images(20).flip(3)
    both = torch.cat([images, flips])
    doubled = metrics.compute("swd", metric_context(both))
    mirrored = metric_context(images, mirrored=ArrayImages(both))
    for name in ("swd", "swd_floor"):
        result = metrics.compute(name, mirrored)
        assert result.results == metrics.compute(name, metric_context(both)).results
        assert (result.mirror, result.num_real) == (True, 40)
    plain = metrics.compute("swd", metric_context(images))
    assert (plain.mirror, plain.num_real) == (False, 20)
    assert plain.results != doubled.results


def test_every_metric_has_one_line_descriptions() -> None:
    for spec in metrics.registered_metrics():
        assert all(text and "\n" not in text for text in (spec.help, spec.protocol, spec.paper))


def test_the_json_record_holds_all_inputs_of_the_value(tmp_path: Path) -> None:
    snapshot = tmp_path / "network-snapshot-000200.pkl"
    snapshot.write_bytes(b"abc")
    context = metric_context(natural_images(8, (1, 16, 16)), seed=3)
    result = metrics.compute("swd8", context)
    record = metrics.result_to_json(result, context, snapshot=snapshot, kimg=200.5, data="data.zip")
    metrics.append_result(tmp_path, record)
    metrics.append_result(tmp_path, record)
    lines = (tmp_path / "metric-swd8.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record, record]

    assert record["metric"] == "swd8"
    assert set(record["results"]) == {"swd8", "swd8_16"}
    assert (record["num_real"], record["num_fake"], record["kimg"], record["seed"]) == (8, 8, 200.5, 3)
    assert record["snapshot"] == "network-snapshot-000200.pkl"
    assert record["snapshot_sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (record["data"], record["data_hash"], record["mirror"]) == ("data.zip", "0123abcd", False)
    assert record["resize_filter"] == "box"
    assert record["versions"]["torch"] == torch.__version__
    assert {"seconds", "protocol", "timestamp", "truncation_psi", "noise_mode"} <= set(record)


def test_a_result_that_cannot_be_appended_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric-swd.jsonl: cannot be written"):
        metrics.append_result(tmp_path / "missing", {"metric": "swd"})
