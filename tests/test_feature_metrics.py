"""FID, KID, MIND, IS, precision/recall, density/coverage: closed forms, other libraries, caching, independence."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from metric_helpers import ArrayImages, SmallDetector, Stripes, natural_images, script_program
from torch import Tensor

import metrics
from dnnlib.config import UserError
from metrics import feature_stats
from metrics.authenticity import authentic_percent
from metrics.detectors import DetectorSetup, Role, read_detectors
from metrics.feature_metrics import register_feature_metric
from metrics.feature_stats import ClassSums, Moments, Result, Rows, StatRequest, SubsetRows, rebatched
from metrics.frechet import distance_of, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance, squared_mmd
from metrics.mind import mind_numbers, random_directions, sliced_distance
from metrics.precision_recall import BLOCKS, density_coverage, precision_recall, radii
from metrics.registry import compute_all, find
from metrics.sampling import MetricContext, Progress, choose_fakes, choose_reals, shard
from reporting.charts import higher_is_better
from training.dataset import DatasetConfig, ImageDataset

torch_fidelity = pytest.importorskip("torch_fidelity")


def features(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    """Draw correlated, skewed features in float32."""
    stream = np.random.RandomState(seed)
    mix = np.random.RandomState(99).standard_normal((dimensions, dimensions)) / math.sqrt(dimensions)
    rows = np.maximum(stream.standard_normal((count, dimensions)) @ mix + shift, 0)
    return torch.from_numpy(rows.astype(np.float32))


def moments_of(role: Role, num_real: int | None, num_fake: int) -> list[StatRequest]:
    """Make the statistics requests of a Frechet distance."""
    sides: list[tuple[Literal["real", "fake"], int | None]] = [("real", num_real), ("fake", num_fake)]
    return [StatRequest(of=of, role=role, count=count, recipe=Moments()) for of, count in sides]


def bound_to(detector_program: Path, protocol: str = "stylegan") -> DetectorSetup:
    """Use a program as Inception and as VGG16, so metric names have no suffix."""
    return read_detectors((f"inception:{detector_program}", f"vgg16:{detector_program}"), protocol)


def stream_through(recipe: Any, rows: Tensor, logits: Tensor | None = None, batch: int = 37) -> Result:
    accumulator = recipe.start(len(rows))
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        positions = range(start, min(start + batch, len(rows)))
        accumulator.add(positions, rows[part], None if logits is None else logits[part])
    result: Result = accumulator.finish()
    return result


# Distances.


def test_frechet_distance_equals_the_closed_form() -> None:
    stream = np.random.RandomState(0)
    mean1, mean2 = stream.standard_normal((2, 8))
    a, b = stream.standard_normal((2, 8, 8))
    cov1, cov2 = a @ a.T, b @ b.T
    tensors = [torch.from_numpy(x) for x in (mean1, cov1, mean2, cov2)]
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root.real)
    assert frechet_distance(*tensors) == pytest.approx(expected, rel=1e-10)

    variances = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.0])
    diagonal = frechet_distance(torch.zeros(3), variances[0].diag(), torch.tensor([3.0, 0, 4.0]), variances[1].diag())
    assert diagonal == pytest.approx(25 + 1 + 0 + 9, rel=1e-12)


def of_singular_values(one: Result, other: Result) -> float:
    """Compute the Frechet distance in NumPy from the singular values of the product of two roots."""
    roots = []
    for cov in (one["cov"].numpy(), other["cov"].numpy()):
        values, vectors = np.linalg.eigh(cov)
        roots.append(vectors * np.sqrt(np.maximum(values, 0)))
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    squares = ((one["mean"] - other["mean"]) ** 2).sum()
    return float(squares + one["cov"].trace() + other["cov"].trace() - 2 * cross)


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [
        ("regular", "regular", 1e-13),
        ("regular", "few images", 1e-8),  # of rounding errors in the null space, in either form
        ("few images", "few images", 1e-13),
        ("as many images as features", "regular", 1e-13),
        ("one more image than features", "regular", 1e-13),
        ("constant features", "regular", 1e-8),
        ("constant features", "constant features", 1e-13),
        ("equal images", "regular", 1e-13),
        ("graded", "graded", 1e-13),
        ("graded", "few images", 1e-8),
    ],
)
def test_frechet_distance_equals_the_singular_value_form(first: str, second: str, tolerance: float) -> None:
    scales = torch.logspace(-3, 0, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    sets = []
    for number, kind in enumerate((first, second)):
        count = {"few images": 20, "as many images as features": 48, "one more image than features": 49}.get(kind, 400)
        rows = features(count, 48, number, shift=0.3)
        if kind == "constant features":
            rows[:, 5:9] = 0.4
        sets.append({"equal images": rows[:1].expand(400, -1), "graded": rows * scales}.get(kind, rows))
    one, other = (stream_through(Moments(), rows) for rows in sets)
    expected = of_singular_values(one, other)
    assert distance_of(one, other) == pytest.approx(expected, rel=tolerance)
    assert distance_of(other, one) == pytest.approx(expected, rel=tolerance)
    for each in (one, other):
        assert distance_of(each, each) == pytest.approx(0, abs=1e-12 * max(1, float(each["cov"].trace())))


def test_frechet_distance_of_regular_sets_needs_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (stream_through(Moments(), features(400, 48, seed)) for seed in (1, 2))
    expected = of_singular_values(one, other)
    monkeypatch.delattr("torch.linalg.svdvals")
    assert distance_of(one, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [20, 400])  # singular and regular covariances
def test_frechet_distance_is_symmetric_and_zero_on_equal_sets(count: int) -> None:
    one, other = (stream_through(Moments(), features(count, 48, seed)) for seed in (1, 2))
    assert distance_of(one, one) == pytest.approx(0, abs=1e-9)
    assert distance_of(one, other) == pytest.approx(distance_of(other, one), rel=1e-9)
    assert distance_of(one, other) > 0.1


def test_fid_equals_torch_fidelity_with_unbiased_covariances() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sets = features(500, 24, 1), features(300, 24, 2, shift=0.3)
    ours = [stream_through(Moments(), x) for x in sets]
    theirs = [fid_features_to_statistics(x.double()) for x in sets]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert distance_of(*ours, unbiased=True) == pytest.approx(expected, rel=1e-8)

    for statistics, x in zip(theirs, sets, strict=True):
        statistics["sigma"] *= (len(x) - 1) / len(x)
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert distance_of(*ours) == pytest.approx(expected, rel=1e-8)
    assert distance_of(*ours) != pytest.approx(distance_of(*ours, unbiased=True), rel=1e-5)


def test_kid_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = features(120, 32, 1), features(90, 32, 2, shift=0.2)
    expected = kid_features_to_metric(fake, real, kid_subsets=7, kid_subset_size=50, rng_seed=3, verbose=False)
    stream, index = np.random.RandomState(3), []
    for _ in range(7):  # same order of draws as in torch-fidelity
        index.append([stream.choice(len(x), 50, replace=False) for x in (fake, real)])
    fakes, reals = (torch.from_numpy(np.stack(one)) for one in zip(*index, strict=True))
    mean, std = kernel_distance({"rows": real, "index": reals}, {"rows": fake, "index": fakes})
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)


def test_kid_equals_its_definition() -> None:
    x, y = (features(9, 5, seed).double() for seed in (1, 2))

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = [kernel(s[i], s[j]) for s in (x, y) for i, j in pairs if i != j]
    between = [kernel(x[i], y[j]) for i, j in pairs]
    assert float(squared_mmd(x, y)) == pytest.approx(sum(within) / 72 - 2 * sum(between) / 81, rel=1e-12)


def test_kid_in_float32_is_close_to_float64() -> None:
    """Pairs are computed in halves of halves; the rounding errors are far below the values."""
    x, y = features(300, 64, 1, shift=0.3), features(300, 64, 2, shift=0.3)
    a, b = x.double().numpy(), y.double().numpy()
    within = [((s @ s.T / 64 + 1) ** 3)[~np.eye(300, dtype=bool)].mean() for s in (a, b)]
    expected = sum(within) - 2 * ((a @ b.T / 64 + 1) ** 3).mean()
    assert float(squared_mmd(x, y)) == pytest.approx(expected, abs=1e-8)
    assert float(squared_mmd(x.double(), y.double())) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize(("scale", "offset"), [(0.1, 0), (1, 0), (1, 1), (4, 0), (30, 0), (1, 10), (1, 100), (1, 1000)])
def test_kid_is_accurate_for_features_of_any_scale(scale: float, offset: float) -> None:
    """The products of large features, and the differences between them, are too large for float32."""
    x, y = (scale * features(300, 64, seed, shift=shift) + offset for seed, shift in ((1, 0.0), (2, 0.1)))
    a, b = x.double().numpy(), y.double().numpy()
    within = [((s @ s.T / 64 + 1) ** 3)[~np.eye(300, dtype=bool)].mean() for s in (a, b)]
    expected = sum(within) - 2 * ((a @ b.T / 64 + 1) ** 3).mean()
    assert float(squared_mmd(x, y)) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def numpy_mind(x: Tensor, y: Tensor, directions: np.ndarray) -> float:
    """Compute 3 F mean_u mean_j (sort(x u)_j - sort(y u)_j)^2 for directions u (M, F), one at a time, in NumPy."""
    real, fake = x.double().numpy(), y.double().numpy()
    gaps = [((np.sort(real @ u) - np.sort(fake @ u)) ** 2).mean() for u in directions]
    return float(3 * real.shape[1] * np.mean(gaps))


def unit_vectors(count: int, dimensions: int) -> np.ndarray:
    vectors = np.random.RandomState(5).standard_normal((count, dimensions))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def mind(x: Tensor, y: Tensor) -> float:
    """Return MIND of these features, with the directions of the metric."""
    [(suffix, value)] = mind_numbers({"rows": x}, {"rows": y}).items()
    assert suffix == ""
    return value


@pytest.mark.parametrize("count", [60, 250])  # numbers of directions below and above that of a chunk
def test_mind_equals_its_definition(count: int) -> None:
    real, fake, directions = features(90, 7, 1), features(90, 7, 2, shift=0.3), unit_vectors(count, 7)
    expected = numpy_mind(real, fake, directions)
    assert sliced_distance(real, fake, torch.from_numpy(directions.T)) == pytest.approx(expected, rel=1e-12)
    assert sliced_distance(fake, real, torch.from_numpy(directions.T)) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.1


def test_mind_has_1000_fixed_directions_of_length_1() -> None:
    directions = random_directions(3)
    assert (directions.shape, directions.dtype) == ((3, 1000), torch.float64)
    assert directions[:, 0].tolist() == pytest.approx([-0.6629641936926857, 0.49318160763626967, 0.5632498377902223])
    assert directions[:, 999].tolist() == pytest.approx([0.08785556481049411, 0.7943669422447586, 0.6010512131262538])
    torch.testing.assert_close(directions.square().sum(dim=0), torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(directions.mean(dim=1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=0.07)
    real, fake = features(50, 3, 1), features(50, 3, 2)
    assert mind(real, fake) == pytest.approx(numpy_mind(real, fake, directions.T.numpy()), rel=1e-12)


def test_mind_of_equal_sets_in_another_order_is_zero() -> None:
    rows = features(80, 6, 1)
    assert mind(rows, rows.flip(0)) == pytest.approx(0, abs=1e-24)


def test_mind_of_a_shift_by_v_is_3_v_v() -> None:
    """A shift by v has 3 F mean_u (u v)^2, with the mean 3 |v|^2 over directions."""
    rows, v, directions = features(80, 6, 1).double(), torch.linspace(-1, 2, 6).double(), unit_vectors(40, 6)
    expected = 3 * 6 * np.mean((directions @ v.numpy()) ** 2)
    assert sliced_distance(rows, rows + v, torch.from_numpy(directions.T)) == pytest.approx(expected, rel=1e-12)
    assert mind(rows, rows + v) == pytest.approx(3 * float(v.square().sum()), rel=0.1)


def test_mind_of_numbers_is_3_times_the_transport_cost() -> None:
    real, fake = features(40, 1, 1), 3 * features(40, 1, 2) - 1
    costs = (real - fake.T).square().double().numpy()
    pairs = scipy.optimize.linear_sum_assignment(costs)
    assert mind(real, fake) == pytest.approx(3 * costs[pairs].mean(), rel=1e-6)


def test_mind_of_gaussians_has_its_closed_form() -> None:
    """N(0, s^2 I) and N(0, I) have 3 F (s - 1)^2."""
    x, y = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 2000, 8)))
    assert mind(x, 3 * y) == pytest.approx(3 * 8 * 2**2, rel=0.05)


def test_mind_is_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes sum shares, each over a third of the directions."""
    real, fake = features(30, 5, 1), features(30, 5, 2)
    whole, shares = mind(real, fake), []
    for rank in range(3):
        monkeypatch.setattr("metrics.mind.own_shard", lambda count, rank=rank: shard(count, rank, 3))
        shares.append(mind(real, fake))
    assert sum(shares) == pytest.approx(whole, rel=1e-12)
    assert max(shares) < 0.5 * whole


def test_subset_rows_hold_the_indexed_features() -> None:
    rows = torch.arange(100.0)[:, None]
    result = stream_through(SubsetRows(number=3, size=10, stream="test", seed=0), rows)
    drawn = result["rows"][result["index"]][:, :, 0]  # (3, 10)
    assert len(result["rows"]) <= 30
    assert all(len(subset.unique()) == 10 for subset in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    again = stream_through(SubsetRows(number=3, size=10, stream="test", seed=0), rows, batch=7)
    assert torch.equal(again["rows"], result["rows"])
    assert len(result["rows"]) < 100


def test_inception_score_is_exact_for_known_predictions() -> None:
    rows = torch.zeros(100, 1)
    uniform = stream_through(ClassSums(10), rows, torch.zeros(100, 5))
    assert inception_score(uniform) == pytest.approx((1, 0))
    one_hot = 1000 * torch.nn.functional.one_hot(torch.arange(100) % 5, 5).float()
    assert inception_score(stream_through(ClassSums(10), rows, one_hot)) == pytest.approx((5, 0))
    constant = 1000 * torch.nn.functional.one_hot(torch.zeros(100, dtype=torch.int64), 5).float()
    assert inception_score(stream_through(ClassSums(10), rows, constant)) == pytest.approx((1, 0))


@pytest.mark.parametrize("count", [200, 207])  # splits of equal and of unequal size
def test_inception_score_equals_torch_fidelity(count: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * features(count, 7, 1)
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)
    mean, std = inception_score(stream_through(ClassSums(10), torch.zeros(count, 1), logits))
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-8)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, fake = features(300, 8, 1), features(200, 8, 2, shift=0.3)
    expected = calculate_precision_recall_full(fake, real, neighborhood=3)  # torch-fidelity expects the fakes first
    assert precision_recall(real, fake) == pytest.approx(expected, rel=1e-5)
    assert 0.1 < expected[0] < 0.95
    assert expected[0] != pytest.approx(expected[1], abs=0.05)


def test_precision_and_recall_are_not_swapped() -> None:
    real = torch.cat([features(100, 4, 1), features(100, 4, 2) + 100])
    half = features(100, 4, 3)  # fakes cover one of the two modes
    precision, recall = precision_recall(real, half)
    assert precision > 0.9
    assert 0.3 < recall < 0.6
    swapped = precision_recall(half, real)[0]
    assert swapped == pytest.approx(recall, abs=0.01)  # equal but for rounding: distances are centred by the other set


def test_precision_and_recall_in_float16_are_close_to_float32() -> None:
    real, fake = features(300, 64, 1), features(300, 64, 2)
    half = precision_recall(real.half(), fake.half())
    assert half == pytest.approx(precision_recall(real, fake), abs=0.03)


def test_density_and_coverage_equal_their_definition() -> None:
    real, fake = features(80, 5, 1).double().numpy(), features(60, 5, 2, shift=0.1).double().numpy()
    radius = [np.sort(np.linalg.norm(real - centre, axis=1))[5] for centre in real]
    counts = [[np.linalg.norm(y - x) <= r for y in fake] for x, r in zip(real, radius, strict=True)]
    expected = np.sum(counts) / (5 * 60), np.mean([any(row) for row in counts])
    measured = density_coverage(torch.from_numpy(real).float(), torch.from_numpy(fake).float())
    assert measured == pytest.approx(expected, rel=1e-6)


def test_distances_are_accurate_under_a_common_offset() -> None:
    """Precision and recall depend only on distances, which |x|^2 + |y|^2 - 2 x y would compute inaccurately."""
    real, fake = features(200, 8, 1), features(200, 8, 2)
    assert precision_recall(real + 1000, fake + 1000) == pytest.approx(precision_recall(real, fake), abs=0.02)


def test_the_block_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(50, 5, 1, shift=5), features(40, 5, 2, shift=5)
    whole = precision_recall(real, fake), density_coverage(real, fake)
    monkeypatch.setitem(BLOCKS, "cpu", 7)
    assert (precision_recall(real, fake), density_coverage(real, fake)) == whole
    monkeypatch.setattr("metrics.precision_recall.GROUP", 2)
    assert (precision_recall(real, fake), density_coverage(real, fake)) == whole


class ThreadGroup:
    """Processes of a collective computation, as threads."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.own = size, threading.local()
        self.barrier, self.parts = threading.Barrier(size, timeout=20), [torch.empty(0)] * size
        monkeypatch.setattr("metrics.precision_recall.rank", lambda: self.own.rank)
        monkeypatch.setattr("metrics.precision_recall.world_size", lambda: size)
        monkeypatch.setattr("metrics.precision_recall.gather_rows", lambda x: torch.cat(self.exchange(x)))
        monkeypatch.setattr("metrics.precision_recall.all_reduce", lambda x: torch.stack(self.exchange(x)).sum(dim=0))

    def exchange(self, x: Tensor) -> list[Tensor]:
        self.parts[self.own.rank] = x
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def run(self, compute: Callable[[], Any]) -> list[Any]:
        """Return the results of all processes."""

        def process(rank: int) -> Any:
            self.own.rank = rank
            return compute()

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(process, range(self.size)))


@pytest.mark.parametrize("size", [2, 3, 9])  # the last processes of 9 have no rows
def test_neighbours_are_divided_among_processes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, "cpu", 7)
    monkeypatch.setattr("metrics.precision_recall.GROUP", 3)
    real, fake = features(50, 5, 1), features(40, 5, 2)

    def measure() -> tuple[Any, ...]:
        return precision_recall(real, fake), density_coverage(real, fake), authentic_percent(real, fake)

    whole = measure()
    assert ThreadGroup(size, monkeypatch).run(measure) == [whole] * size


@pytest.mark.parametrize("half", [False, True])
def test_neighbours_equal_sorted_whole_tables(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Radii and counts of balls from whole tables of distances, with the same rounding, in another order."""
    monkeypatch.setitem(BLOCKS, "cpu", 16)
    monkeypatch.setattr("metrics.precision_recall.GROUP", 2)
    real, fake = (x.half() if half else x for x in (features(90, 48, 1), features(70, 48, 2, shift=0.05)))

    def table(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x.double(), y.double()).to(x.dtype).double()

    of_real, of_fake = (table(x, x).sort(dim=1).values[:, 3] for x in (real, fake))
    torch.testing.assert_close(radii(real, 3).double(), of_real, rtol=1e-3 if half else 1e-6, atol=0)
    precision = (table(fake, real) <= of_real).any(dim=1).double().mean()
    recall = (table(real, fake) <= of_fake).any(dim=1).double().mean()
    assert 0 < float(recall) < float(precision) < 1
    assert precision_recall(real, fake) == (float(precision), float(recall))


def test_fewer_images_than_neighbours_are_refused() -> None:
    with pytest.raises(UserError, match="3 images are too few for 3 neighbours each"):
        precision_recall(features(3, 4, 1), features(9, 4, 2))


# Statistics.


def test_moments_equal_numpy() -> None:
    rows = features(203, 6, 1, shift=5)
    result = stream_through(Moments(), rows)
    np.testing.assert_allclose(result["mean"], rows.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result["cov"], np.cov(rows.double().numpy(), rowvar=False, bias=True), rtol=1e-9)


def test_moments_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 rows in strips of 4 columns: full and partial blocks and strips."""
    rows = features(203, 6, 1, shift=5)
    whole = stream_through(Moments(), rows)
    monkeypatch.setattr(feature_stats, "MOMENT_ROWS", 16)
    monkeypatch.setattr(feature_stats, "MOMENT_COLUMNS", 4)
    one, *others = (stream_through(Moments(), rows, batch=batch) for batch in (1, 7, 16, 50, 203))
    assert all(torch.equal(one[key], other[key]) for other in others for key in one)
    assert torch.equal(one["cov"], one["cov"].T)
    torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-12)


def test_rebatched_keeps_order_and_positions() -> None:
    parts = [(range(a, b), torch.arange(a, b)) for a, b in ((5, 6), (6, 16), (16, 18), (18, 31))]
    out = list(rebatched(iter(parts), 4))
    assert [len(images) for _, images in out] == [4] * 6 + [2]
    assert torch.cat([images for _, images in out]).tolist() == list(range(5, 31))
    assert all(images.tolist() == list(positions) for positions, images in out)


class CountedImages(ArrayImages):
    """Dataset that counts the images read."""

    read = 0

    def images(self, indices: Sequence[int]) -> Tensor:
        self.read += len(indices)
        return super().images(indices)


@pytest.fixture(scope="module")
def detector_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script_program(tmp_path_factory.mktemp("detector") / "small.pt", SmallDetector())


@pytest.fixture(scope="module")
def detector_setup(detector_program: Path) -> DetectorSetup:
    return bound_to(detector_program)


NAMES = "fid60_full,fid40,kid50_full,mind40,is60,pr603_full,dc30"


def build(detector_setup: DetectorSetup, **changes: Any) -> MetricContext:
    settings: dict[str, Any] = {"G": Stripes(), "images": CountedImages(natural_images(90)), "setup": detector_setup}
    return MetricContext(**(settings | {"device": torch.device("cpu")} | changes))


def results(context: MetricContext, names: str = NAMES) -> dict[str, float]:
    return {key: value for result in compute_all(names.split(","), context) for key, value in result.results.items()}


def test_metrics_share_passes_over_fakes_and_reals(detector_setup: DetectorSetup) -> None:
    context = build(detector_setup)
    results(context)
    G, images = context.network, context.images
    assert isinstance(G, Stripes)
    assert isinstance(images, CountedImages)
    assert sum(map(len, G.latents)) == 60
    assert images.read == 90 + 40 + 30  # all reals for the _full metrics, subsets of 40 (for two metrics) and 30


class Recorder(Progress):
    """Receiver that records the planned passes and the passes that are run."""

    def __init__(self) -> None:
        self.planned: list[tuple[str, str, int]] = []
        self.run: list[tuple[str, int]] = []

    def plan(self, metrics: str, passes: Sequence[tuple[str, int]]) -> None:
        self.planned += [(metrics, *each) for each in passes]

    def __call__(self, name: str, done: int, total: int) -> None:
        self.run += [(name, total)] if done == 0 else []


def test_all_passes_are_planned_before_they_run(detector_setup: DetectorSetup) -> None:
    recorder = Recorder()
    results(build(detector_setup, progress=recorder), "swd20,fid60_full,fid40,swd30_floor")
    shared = "fid60_full, fid40"
    assert recorder.planned == [
        (shared, "generated images", 60), (shared, "real images", 90), (shared, "real images", 40),
        ("swd20", "real images", 20), ("swd20", "generated images", 20),
        ("swd30_floor", "real images, first set", 30), ("swd30_floor", "real images, second set", 30),
    ]  # fmt: skip
    assert recorder.run == [(name, total) for _, name, total in recorder.planned]


def test_values_do_not_depend_on_batches_and_other_metrics(detector_setup: DetectorSetup) -> None:
    whole = results(build(detector_setup))
    assert results(build(detector_setup, batch_size=7, detector_batch=16)) == pytest.approx(whole, rel=1e-4)
    assert len(whole) == 1 + 1 + 2 + 1 + 2 + 2 + 2
    for name in NAMES.split(","):
        alone = results(build(detector_setup), name)
        assert alone == pytest.approx({key: whole[key] for key in alone}, rel=1e-9)


def test_fid_full_uses_all_reals_and_the_first_fakes(detector_setup: DetectorSetup) -> None:
    """The expected value is computed in NumPy: images -> features -> means and covariances -> distance."""
    context = build(detector_setup)
    detector = SmallDetector()
    real = detector(natural_images(90))[0].double().numpy()
    [(_, images)] = metrics.sampling.fake_batches(build(detector_setup), 60)
    fake = detector(images)[0].double().numpy()
    covs = [np.cov(x, rowvar=False, bias=True) for x in (real, fake)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert results(context, "fid60_full")["fid60_full"] == pytest.approx(expected, rel=1e-6)


def mirrored(images: CountedImages) -> CountedImages:
    """Make a dataset of all images and their flips, as with --mirror."""
    both = CountedImages(torch.cat([images.data, images.data.flip(3)]))
    both.content_hash = f"{images.content_hash} mirrored"
    return both


def numpy_distance(real: Tensor, fake: Tensor) -> float:
    """Compute the Frechet distance of the features of SmallDetector in NumPy and SciPy."""
    x, y = (SmallDetector()(images)[0].double().numpy() for images in (real, fake))
    covs = [np.cov(rows, rowvar=False, bias=True) for rows in (x, y)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * root))


def test_only_metrics_without_full_count_flips_of_reals(detector_setup: DetectorSetup) -> None:
    images = CountedImages(natural_images(90))
    both = mirrored(images)
    context = build(detector_setup, images=images, mirrored=both)
    found = {result.metric: result for result in compute_all(["fid200_full", "fid200"], context)}
    [(_, fakes)] = metrics.sampling.fake_batches(build(detector_setup, batch_size=200), 200)
    for name, reals in (("fid200_full", images.data), ("fid200", both.data)):
        assert found[name].results[name] == pytest.approx(numpy_distance(reals, fakes), rel=1e-6)
        assert found[name].num_real == len(reals)
    G = context.network
    assert isinstance(G, Stripes)
    assert sum(map(len, G.latents)) == 200  # one pass for both
    assert numpy_distance(images.data, fakes) != pytest.approx(numpy_distance(both.data, fakes), rel=1e-4)
    assert images.read == 90
    assert both.read == 180


@pytest.mark.parametrize("name", [*NAMES.split(","), "kid40", "pr503", "dc30_full"])
def test_values_equal_the_metric_on_the_counted_reals(detector_setup: DetectorSetup, name: str) -> None:
    """With --mirror, a metric that counts flips equals its value on the doubled dataset; others are unchanged."""
    images = CountedImages(natural_images(90))
    context = build(detector_setup, images=images, mirrored=mirrored(images))
    [result] = compute_all([name], context)
    counted = result.mirror
    assert counted == ("full" not in name and "is" not in name)
    expected = build(detector_setup, images=mirrored(images) if counted else images)
    assert result.results == results(expected, name)
    assert results(build(detector_setup, images=images, mirrored=mirrored(images)), NAMES + f",{name}").items() >= (
        result.results.items()
    )


@pytest.mark.parametrize(("name", "flips", "count"), [("mind60", 0, 60), ("mind200", 0, 90), ("mind", 1, 180)])
def test_mind_compares_at_most_as_many_fakes_as_reals(
    detector_setup: DetectorSetup, name: str, flips: int, count: int
) -> None:
    """With 90 images, or 180 with their flips; the directions do not depend on the seed."""
    images = CountedImages(natural_images(90))
    context = build(detector_setup, images=images, mirrored=mirrored(images) if flips else None, seed=3)
    result = metrics.compute(name, context)
    assert (result.num_real, result.num_fake, result.mirror) == (count, count, bool(flips))
    own = replace(context, counts_flips=True)
    reals = own.reals.images(choose_reals(own, count))
    [(_, fakes)] = metrics.sampling.fake_batches(build(detector_setup, batch_size=count, seed=3), count)
    real, fake = (SmallDetector()(part)[0] for part in (reals, fakes))
    expected = numpy_mind(real, fake, random_directions(6).T.numpy())
    assert result.results == {name: pytest.approx(expected, rel=1e-4)}
    G = context.network
    assert isinstance(G, Stripes)
    assert sum(map(len, G.latents)) == count


def test_mind_of_images_that_are_the_reals_is_zero(detector_setup: DetectorSetup) -> None:
    context = build(detector_setup, G=None, fakes=ArrayImages(natural_images(90)))
    assert results(context, "mind5k") == {"mind5k": pytest.approx(0, abs=1e-9)}


def test_labels_of_fakes_do_not_depend_on_flips() -> None:
    labels = torch.arange(90) % 7
    images = ArrayImages(natural_images(90), labels, c_dim=7)
    both = ArrayImages(natural_images(180), torch.cat([labels, labels]), c_dim=7)
    settings: dict[str, Any] = {"G": Stripes(c_dim=7), "images": images, "device": torch.device("cpu")}
    plain, flipped = MetricContext(**settings), MetricContext(**settings, mirrored=both, counts_flips=True)
    drawn = [metrics.sampling.random_labels(context, range(200)) for context in (plain, flipped)]
    assert torch.equal(drawn[0], drawn[1])


def test_cached_statistics_with_flips_are_not_used_without_flips(
    detector_setup: DetectorSetup, shapes_zip: Path, tmp_path: Path
) -> None:
    """Earlier releases cached statistics with flips for fid<N>_full of a mirrored dataset."""
    plain = ImageDataset(DatasetConfig(path=str(shapes_zip)))
    both = ImageDataset(DatasetConfig(path=str(shapes_zip), mirror=True))
    settings: dict[str, Any] = {"G": Stripes((3, 16, 16)), "device": torch.device("cpu"), "setup": detector_setup}
    old = MetricContext(images=both, cache=tmp_path, **settings)
    results(old, "fid60_full,kid50_full,pr603_full")
    kept = set(tmp_path.iterdir())
    new = MetricContext(images=plain, mirrored=both, cache=tmp_path, **settings)
    names = "fid60_full,kid50_full,pr603_full"
    assert results(new, names) == results(MetricContext(images=plain, **settings), names)
    assert len(set(tmp_path.iterdir()) - kept) == 3
    kept = set(tmp_path.iterdir())
    again = MetricContext(images=plain, mirrored=both, cache=tmp_path, **settings)
    assert results(again, "fid600")["fid600"] == results(MetricContext(images=both, **settings), "fid600")["fid600"]
    assert set(tmp_path.iterdir()) == kept  # statistics of all reals with flips: the cache of the old release is used


def test_statistics_of_reals_are_cached_on_disk(detector_setup: DetectorSetup, tmp_path: Path) -> None:
    first = build(detector_setup, cache=tmp_path)
    expected = results(first)
    second = build(detector_setup, cache=tmp_path)
    assert results(second) == expected
    assert isinstance(second.images, CountedImages)
    assert second.images.read == 0

    other = CountedImages(natural_images(90, seed=5))
    other.content_hash = "other"
    changed = build(detector_setup, cache=tmp_path, images=other)
    assert results(changed)["fid60_full"] != expected["fid60_full"]
    assert other.read > 0


def test_a_truncated_cache_file_is_named_and_recomputed(
    detector_setup: DetectorSetup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = results(build(detector_setup, cache=tmp_path), "fid60_full")
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert results(build(detector_setup, cache=tmp_path), "fid60_full") == expected
    assert f"Warning: {file}: damaged" in capsys.readouterr().err
    assert results(build(detector_setup, cache=tmp_path), "fid60_full") == expected
    assert capsys.readouterr().err == ""


def test_the_cache_key_includes_detector_protocol_and_seed(detector_setup: DetectorSetup, tmp_path: Path) -> None:
    results(build(detector_setup, cache=tmp_path), "fid60_full")
    results(build(detector_setup, cache=tmp_path), "fid40")
    results(build(detector_setup, cache=tmp_path, seed=1), "fid40")  # another subset of 40 reals
    other = script_program(tmp_path / "other.pt", torch.nn.Sequential(SmallDetector()))
    results(build(bound_to(other), cache=tmp_path), "fid60_full")
    clean = bound_to(
        detector_setup.bound["inception"], protocol="clean"
    )  # with Inception, this protocol resizes differently
    results(build(clean, cache=tmp_path), "fid60_full")
    assert len(list(tmp_path.glob("????????????????????????????????????????.pt"))) == 5
    recipes: list[Any] = [Moments(), Rows(), Rows(half=True)]
    recipes += [SubsetRows(number=2, size=9, stream="kid-real", seed=seed) for seed in (0, 1)]
    statistics = feature_stats.statistics_of(build(detector_setup, cache=tmp_path))
    requests = [StatRequest(of="real", role="inception", count=None, recipe=recipe) for recipe in recipes]
    assert len({statistics._path(request) for request in requests}) == len(requests)


def test_the_cache_key_includes_the_library_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetectorSetup, "identity", lambda *_: {"detector_sha256": "0"})
    statistics = feature_stats.statistics_of(build(DetectorSetup(), cache=tmp_path))
    request = moments_of("inception", None, 60)[0]
    paths = [statistics._path(request)]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    paths.append(statistics._path(request))
    assert paths[0] != paths[1]


def test_fewer_images_than_dimensions_cause_a_warning(detector_setup: DetectorSetup) -> None:
    [result] = compute_all(["fid6_full"], build(detector_setup))
    assert "6 images for 6 feature dimensions" in result.warnings[0]
    [result] = compute_all(["fid60_full"], build(detector_setup))
    assert result.warnings == ()
    assert (result.detector, len(result.detector_sha256 or "")) == ("small.pt", 64)


def test_metrics_accept_images_instead_of_a_network(detector_setup: DetectorSetup) -> None:
    fakes = ArrayImages(natural_images(70, seed=3))
    context = build(detector_setup, G=None, fakes=fakes)
    chosen = choose_fakes(context, fakes, 70)
    assert sorted(chosen) == list(range(70))
    assert chosen != sorted(chosen)
    measured = results(context, "fid60_full,swd30")
    assert measured["fid60_full"] > 0
    same = build(detector_setup, G=None, fakes=ArrayImages(natural_images(90)))
    assert results(same, "fid90_full")["fid90_full"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="100 generated images are requested, but the set holds 70"):
        results(context, "fid100_full")
    with pytest.raises(UserError, match="the generated set holds images of 3x16x16"):
        build(detector_setup, G=None, fakes=ArrayImages(natural_images(4, (3, 16, 16))))


def test_inception_score_requires_class_logits(tmp_path: Path) -> None:
    class FeaturesOnly(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(2, 3))

    path = script_program(tmp_path / "plain.pt", FeaturesOnly())
    with pytest.raises(UserError, match="returns no class logits"):
        results(build(bound_to(path)), "is50")
    assert results(build(bound_to(path)), "fid50")["fid50"] > 0


@pytest.mark.parametrize(
    ("name", "pattern", "value", "direction"),
    [
        ("fid5k_full", "fid<N>_full", "", False),
        ("fid5k_full_det", "fid<N>_full", "", False),
        ("fid5k_full_holdout", "fid<N>_full", "_holdout", False),
        ("fid5k_full_my-det_train", "fid<N>_full", "_train", False),
        ("fid5k_full_det_train_ema0.05", "fid<N>_full", "_train", False),
        ("fid5k_class_det_17", "fid<N>_class", "_<class>", False),
        ("kid5k_full_std", "kid<N>_full", "_std", None),
        ("kid5k_full_det_std", "kid<N>_full", "_std", None),
        ("is50k", "is<N>", "", True),
        ("is50k_det_mean", "is<N>", "_mean", True),
        ("is50k_std", "is<N>", "_std", None),
        ("pr50k3_full_tvgg16_recall", "pr<N>3_full", "_recall", True),
        ("authpct5k_dinov2", "authpct<N>_dinov2", "", True),
        ("fld5k_generalisation_gap", "fld<N>", "_generalisation_gap", None),
        ("fld5k_dinov2_generalisation_gap", "fld<N>_dinov2", "_generalisation_gap", None),
        ("fld5k_det_generalisation_gap_ema0.1", "fld<N>", "_generalisation_gap", None),
        ("swd5k_16", "swd<N>", "_<side>", False),
        ("swd5k_floor_16", "swd<N>_floor", "_<side>", None),
    ],
)
def test_recorded_names_of_values_are_read(name: str, pattern: str, value: str, direction: bool | None) -> None:
    found = metrics.registry.find_recorded(name)
    assert found is not None
    assert (found[0].pattern, found[1]) == (pattern, value)
    assert higher_is_better(name) is direction


@pytest.mark.parametrize("name", ["fidelity", "swd5k_my-det_16", "loss", "ema0.05"])
def test_names_of_no_metric_are_not_read(name: str) -> None:
    assert metrics.registry.find_recorded(name) is None
    assert higher_is_better(name) is None


@pytest.mark.parametrize(
    ("file", "name"),
    [("dinov2", "fld5k"), ("dinov2", "authpct5k_dinov2"), ("full", "fid5k"), ("std", "kid5k"), ("train", "fid5k_full")],
)
def test_detectors_may_not_have_the_names_of_metrics(file: str, name: str, tmp_path: Path) -> None:
    setup = DetectorSetup(program=tmp_path / f"{file}.pt2")
    recorded = name.removesuffix("_dinov2") + f"_{file}"
    with pytest.raises(UserError, match=f"{file}.pt2: results of .* would be saved as {recorded}, .*; rename the file"):
        metrics.resolve(name, setup)
    assert metrics.resolve("fd5k_dinov2", setup) == ["fd5k_dinov2"]


def test_metric_names_have_a_suffix_for_other_detectors(detector_setup: DetectorSetup) -> None:
    assert metrics.resolve("pr50k3_full,dc50k,fid50k_full") == ["pr50k3_full_tvgg16", "dc50k_tvgg16", "fid50k_full"]
    assert metrics.resolve("pr50k3_full_tvgg16") == ["pr50k3_full_tvgg16"]
    assert metrics.resolve("pr50k3_full", detector_setup) == ["pr50k3_full"]
    with pytest.raises(UserError, match="omit the suffix"):
        metrics.resolve("pr50k3_full_tvgg16", detector_setup)
    own = read_detectors((str(detector_setup.bound["inception"]),))
    recorded = ["fid50k_full_small", "pr50k3_full_small", "ppl2_wend_tvgg16", "swd"]
    assert metrics.resolve("fid50k_full,pr50k3_full,ppl2_wend,swd", own) == recorded
    assert metrics.resolve(recorded, own) == recorded
    half = read_detectors((f"vgg16:{detector_setup.bound['vgg16']}",))
    assert metrics.resolve("fid50k_full,pr50k3_full", half) == ["fid50k_full", "pr50k3_full"]
    assert half.program_of("inception") is None
    [result] = compute_all(["fid50_full"], build(own))
    assert list(result.results) == [result.metric] == ["fid50_full_small"]
    with pytest.raises(UserError, match=r"--protocol=clean: metric is50k does not support this protocol, only fid<N>,"):
        metrics.resolve("is50k", DetectorSetup(protocol="clean"))
    assert metrics.registry.find("pr50k3_full")[1] == 50_000
    assert metrics.registry.find("pr5003")[1] == 500


def test_subsets_of_reals_and_fakes_are_drawn_independently(detector_setup: DetectorSetup) -> None:
    """With equal indices, images given in the order of the reals would be compared with themselves."""
    context = build(detector_setup)
    results(context, "kid50_full")
    real, fake = feature_stats.statistics_of(context).results.values()
    assert real["index"].shape == fake["index"].shape == (100, 50)
    assert not torch.equal(real["index"], fake["index"])


def test_a_rank_without_images_has_the_feature_shape(
    detector_setup: DetectorSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank contributes zeros of the feature shape, so the all-reduce works."""
    monkeypatch.setattr(feature_stats, "own_shard", lambda count: range(0, 0))
    context = build(detector_setup)
    statistics = feature_stats.statistics_of(context)
    statistics.collect([feature_stats.StatRequest(of="fake", role="inception", count=20, recipe=Rows())])
    [result] = statistics.results.values()
    assert result["rows"].shape == (0, 6)


def test_non_finite_features_are_refused(tmp_path: Path) -> None:
    class Overflow(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            x = images.float().mean(dim=(2, 3))
            return x / (x - x)

    path = script_program(tmp_path / "overflow.pt", Overflow())
    with pytest.raises(UserError, match=r"the detector overflow\.pt returns non-finite features"):
        results(build(bound_to(path)), "fid50")


def test_non_finite_logits_and_values_are_refused(
    detector_setup: DetectorSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflow(torch.nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            x = images.float().mean(dim=(2, 3))
            return x, x / 0

    path = script_program(tmp_path / "overflow.pt", Overflow())
    with pytest.raises(UserError, match=r"overflow\.pt returns non-finite class logits"):
        results(build(bound_to(path)), "is50")
    monkeypatch.setattr("metrics.frechet.distance_of", lambda *_, **__: math.nan)
    with pytest.raises(UserError, match="metric fid50: fid50 is nan"):
        results(build(detector_setup), "fid50")


def test_kid_of_whole_sets_has_one_subset(detector_setup: DetectorSetup) -> None:
    assert set(results(build(detector_setup), "kid60")) == {"kid60"}
    assert set(results(build(detector_setup), "kid60_full")) == {"kid60_full", "kid60_full_std"}


class ManyImages(ArrayImages):
    """Dataset with more images than any request for a fixed number."""

    def __len__(self) -> int:
        return 300_000


SUBSETS = [SubsetRows(100, 1000, f"kid-{of}", 0) for of in ("real", "fake")]
# Metric -> numbers of reals (None: all) and fakes, and the statistics of each.
PLANS: dict[str, tuple[list[int | None], list[Any]]] = {
    "fid_full": ([None, 50_000], [Moments()] * 2),
    "fid": ([50_000, 50_000], [Moments()] * 2),
    "fid20_full": ([None, 20], [Moments()] * 2),
    "fid20": ([20, 20], [Moments()] * 2),
    "fd_dinov2": ([None, 50_000], [Moments()] * 2),
    "kid_full": ([None, 50_000], SUBSETS),
    "kid": ([50_000, 50_000], SUBSETS),
    "mind": ([50_000, 50_000], [Rows()] * 2),
    "mind20": ([20, 20], [Rows()] * 2),
    "is": ([50_000], [ClassSums(10)]),
    "pr3_full": ([200_000, 50_000], [Rows(half=True)] * 2),
    "pr3": ([50_000, 50_000], [Rows(half=True)] * 2),
    "dc_full": ([200_000, 50_000], [Rows(half=False)] * 2),
    "dc": ([50_000, 50_000], [Rows(half=False)] * 2),
}


@pytest.mark.parametrize("name", PLANS)
def test_requested_statistics_follow_the_protocol(detector_setup: DetectorSetup, name: str) -> None:
    spec, count = find(name)
    requests = spec.plan(build(detector_setup, images=ManyImages(natural_images(2))), count)
    assert ([request.count for request in requests], [request.recipe for request in requests]) == PLANS[name]
    assert [request.of for request in requests] == ["real", "fake"][-len(requests) :]


def test_the_documented_feature_metric_works(detector_setup: DetectorSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example equals NumPy for all reals and for equal numbers, and shares passes with other metrics."""
    monkeypatch.setattr(metrics.registry, "_METRICS", dict(metrics.registry._METRICS))
    guide = (Path(metrics.__file__).parents[1] / "docs" / "metrics.md").read_text()
    _, example = guide.split("features of reals and fakes, as FID, KID and precision do")
    code = "\n".join(line[4:] for line in example.splitlines() if line.startswith("    ") or not line)
    defined: dict[str, Any] = {}
    exec(compile(code, "docs/metrics.md", "exec"), defined)
    register_feature_metric(replace(defined["MEANS"], pattern="means<N>", reals="equal"))
    with pytest.raises(AssertionError, match="registered twice"):
        register_feature_metric(defined["MEANS"])

    context = build(detector_setup)
    found = {result.metric: result for result in compute_all(["means60", "means60_full", "fid60"], context)}
    [(_, images)] = metrics.sampling.fake_batches(build(detector_setup), 60)
    chosen = metrics.sampling.choose_reals(context, 60)
    for name, reals in (("means60", natural_images(90)[chosen]), ("means60_full", natural_images(90))):
        means = [SmallDetector()(x)[0].double().numpy().mean(axis=0) for x in (reals, images)]
        expected = {name: np.linalg.norm(means[0] - means[1]), f"{name}_largest": np.abs(means[0] - means[1]).max()}
        assert found[name].results == pytest.approx(expected, rel=1e-6)
        assert (found[name].num_real, found[name].num_fake) == (len(reals), 60)
    assert found["means60_full"].protocol == "features of small.pt; Euclidean; 50,000 fakes or <N>, all reals"
    G, read = context.network, context.images
    assert isinstance(G, Stripes)
    assert isinstance(read, CountedImages)
    assert (sum(map(len, G.latents)), read.read) == (60, 60 + 90)


def test_inception_score_refuses_fewer_images_than_splits(detector_setup: DetectorSetup) -> None:
    context = build(detector_setup)
    with pytest.raises(UserError, match="metric is9: 10 splits need at least 10 images"):
        results(context, "fid60,is9")
    assert isinstance(context.network, Stripes)
    assert context.network.latents == []


def test_the_dinov2_distance_uses_unbiased_covariances(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=56
    )
    torch.manual_seed(6)  # for most weights both distances differ by more than 1e-3, but not for all
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    context = build(read_detectors((str(tmp_path / "dino"),)))
    measured = results(context, "fd10_dinov2")["fd10_dinov2"]
    statistics = feature_stats.statistics_of(context)
    moments = [statistics[request] for request in moments_of("dinov2", None, 10)]
    assert measured == pytest.approx(distance_of(*moments, unbiased=True), rel=1e-9)
    assert measured != pytest.approx(distance_of(*moments), rel=1e-4)


def test_the_clean_protocol_uses_unbiased_covariances(detector_program: Path) -> None:
    context = build(bound_to(detector_program, protocol="clean"))
    usual = build(bound_to(detector_program))
    statistics = feature_stats.statistics_of(usual)
    for name, num_real, num_fake in (("fid60_full", None, 60), ("fid40", 40, 40)):
        moments = [statistics[request] for request in moments_of("inception", num_real, num_fake)]
        expected = [distance_of(*moments, unbiased=unbiased) for unbiased in (False, True)]
        assert results(usual, name)[name] == pytest.approx(expected[0], rel=1e-9)
        assert results(context, name)[name] == pytest.approx(expected[1], rel=1e-9)
        assert expected[1] > expected[0]
    [result] = compute_all(["fid60_full"], context)
    assert result.protocol == "clean: features of small.pt; covariance over N-1 (Parmar et al. 2022)"


def test_features_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    class Large(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 1000 * images.float().mean(dim=(2, 3))

    context = build(bound_to(script_program(tmp_path / "large.pt", Large())))
    with pytest.raises(UserError, match="metric pr503_full: the detector's features are too large"):
        results(context, "pr503_full")
    assert results(context, "dc50_full")["dc50_full_density"] >= 0
