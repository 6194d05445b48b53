"""AuthPct, FLD and --holdout: float64 references, closed forms, generators that copy, the parts of a run's images."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from click.testing import CliRunner, Result
from conftest import SMALL, make_shapes
from exploration_helpers import build
from metric_helpers import ArrayImages, SmallDetector, bound, natural_images, script_program
from PIL import Image
from torch import Tensor

import calc_metrics
import train
from dnnlib.config import UserError, override
from metrics import registry
from metrics.authenticity import authentic_percent
from metrics.detectors import read_detectors
from metrics.likelihood import Mixture, likelihood_divergence
from metrics.precision_recall import nearest
from metrics.sampling import MetricContext, Pass, Progress
from training.config import PRESETS
from training.data_sources.files import ZipStore, read_zip
from training.dataset import DatasetConfig, ImageDataset
from training.snapshots.snapshot import load_network, save_network


def features(count: int, dimensions: int, seed: int) -> Tensor:
    """Draw correlated features with a heavy tail in float32."""
    stream = np.random.RandomState(seed)
    mix = np.random.RandomState(9).standard_normal((dimensions, dimensions)) / dimensions**0.5
    return torch.from_numpy((stream.standard_t(5, (count, dimensions)) @ mix).astype(np.float32))


class OtherImages(ArrayImages):
    """Dataset in memory with a hash of its own."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.content_hash = str(hash(images.numpy().tobytes()))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script_program(tmp_path_factory.mktemp("detector") / "small.pt", SmallDetector())


def context_of(detector: Path, fakes: Tensor, **changes: Any) -> MetricContext:
    """Make a context of 400 training images, of 200 held-out ones, and of images in place of a generator."""
    images = natural_images(600)
    settings: dict[str, Any] = {"images": OtherImages(images[:400]), "held_out": OtherImages(images[400:])}
    settings |= {"fakes": OtherImages(fakes), "device": torch.device("cpu")}
    return MetricContext(**settings | changes, setup=read_detectors((f"inception:{detector}",)))


def results(context: MetricContext, names: str) -> dict[str, float]:
    return {k: v for result in registry.compute_all(names.split(","), context) for k, v in result.results.items()}


# AuthPct.


def numpy_authentic_percent(train: np.ndarray, fake: np.ndarray) -> float:
    """Return AuthPct in float64, image by image."""
    authentic = 0
    for x in fake:
        distances = np.sqrt(((train - x) ** 2).sum(axis=1))
        nearest = distances.argmin()
        others = np.delete(train, nearest, axis=0)
        authentic += distances[nearest] > np.sqrt(((others - train[nearest]) ** 2).sum(axis=1)).min()
    return 100 * authentic / len(fake)


@pytest.mark.parametrize("dimensions", [2, 40])
def test_authpct_equals_a_float64_reference(dimensions: int) -> None:
    real, fake = features(150, dimensions, 1), features(70, dimensions, 2)
    expected = numpy_authentic_percent(real.double().numpy(), fake.double().numpy())
    assert 0 < expected < 100
    assert authentic_percent(real, fake) == pytest.approx(expected)


def test_authpct_of_uniform_samples_on_a_line_is_a_third() -> None:
    """The distance d is Exp(2n), the gap behind the nearest point Exp(n), in a third of the cases smaller than d."""
    stream = np.random.RandomState(0)
    sets = [[torch.from_numpy(stream.rand(count, 1)) for count in (300, 600)] for _ in range(20)]
    assert np.mean([authentic_percent(*each) for each in sets]) == pytest.approx(100 / 3, abs=2)


def test_a_copy_of_a_duplicated_training_image_is_not_authentic() -> None:
    real = features(80, 64, 1) + 1000
    assert authentic_percent(torch.cat([real, real]), real) == 0


def test_copies_of_nearly_equal_images_are_not_authentic() -> None:
    """The distances between the pairs are lost in the rounding of |x|^2 + |y|^2 - 2 x y."""
    real = features(80, 64, 1)
    twins = real + 3e-4 * features(80, 64, 2)
    assert numpy_authentic_percent(torch.cat([real, twins]).double().numpy(), real.double().numpy()) == 0
    assert authentic_percent(torch.cat([real, twins]), real) == 0
    _, other = nearest(torch.cat([real, twins]), torch.cat([real, twins]), skip=torch.arange(160))
    assert torch.equal(other, torch.arange(160).roll(80))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])  # the squares of 1e30 overflow
def test_authpct_of_infinite_distances_is_refused(value: float) -> None:
    real, fake = features(9, 4, 1), features(8, 4, 2)
    fake[3] = value
    with pytest.raises(UserError, match="distances between features are not finite: correct the detector, or scale"):
        authentic_percent(real, fake)


def test_authpct_separates_copies_from_held_out_images(detector: Path) -> None:
    images = natural_images(600)
    assert results(context_of(detector, images[:400]), "authpct300")["authpct300"] < 10
    assert 40 <= results(context_of(detector, images[400:]), "authpct200")["authpct200"] <= 60


@pytest.mark.parametrize(
    ("name", "reals", "message"),
    [
        ("authpct5", 1, "metric authpct5: needs at least 2 training images, got 1"),
        ("pr53_full", 3, "metric pr53_full: needs at least 4 real images, got 3"),
        ("pr33_full", 8, "metric pr33_full: needs at least 4 generated images, got 3"),
        ("dc5_full", 5, "metric dc5_full: needs at least 6 real images, got 5"),
    ],
)
def test_too_few_images_are_refused_before_any_pass(detector: Path, name: str, reals: int, message: str) -> None:
    setup = read_detectors((f"inception:{detector}", f"vgg16:{detector}"))
    context = replace(context_of(detector, natural_images(5), images=OtherImages(natural_images(reals))), setup=setup)
    with pytest.raises(UserError, match=f"^{message}$"):
        registry.prepare([name], context)


# Feature likelihood divergence.


class NumpyMixture:
    """The mixture in float64, with Adam's update (Kingma & Ba 2015, algorithm 1) and responsibilities by definition."""

    def __init__(self, centres: np.ndarray, points: np.ndarray) -> None:
        self.F = points.shape[1]
        self.centres = np.vstack([centres, centres.mean(axis=0)])
        squares = self.squares(points)
        self.s = np.log((squares.min(axis=0) + 1e-3) / self.F)
        self.s[-1] = np.log((squares[:, -1].mean() + 1e-3) / self.F)
        first, second = np.zeros_like(self.s), np.zeros_like(self.s)
        for step in range(1, 51):
            parts = self.parts(squares)
            r = np.exp(parts - scipy.special.logsumexp(parts, axis=1, keepdims=True))
            gradient = (r * (self.F - squares / np.exp(self.s)) / 2).mean(axis=0) / self.F
            gradient[-1] = 0
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self.s -= 0.5 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            self.s = np.maximum(self.s, np.log(1e-3 / self.F))

    def squares(self, points: np.ndarray) -> np.ndarray:
        return ((points[:, None] - self.centres[None]) ** 2).sum(axis=2)

    def parts(self, squares: np.ndarray) -> np.ndarray:
        return -squares / np.exp(self.s) / 2 - self.F / 2 * np.log(2 * np.pi * np.exp(self.s)) - np.log(len(self.s))

    def nll(self, points: np.ndarray) -> float:
        return float(-scipy.special.logsumexp(self.parts(self.squares(points)), axis=1).mean() / self.F)


def numpy_divergence(sets: tuple[Tensor, Tensor, Tensor], order: np.ndarray) -> tuple[float, float]:
    """Return FLD and the generalisation gap of training, held-out and generated features in float64."""
    x, y, z = (rows.double().numpy() for rows in sets)
    mean, std = y.mean(axis=0), y.std(axis=0, ddof=1)
    x, y, z = ((rows - mean) / np.where(std > 0, std, 1) for rows in (x, y, z))
    half = len(x) // 2
    mixture, reference = NumpyMixture(z, x), NumpyMixture(x[order[:half][: len(z)]], x[order[half:]])
    return 100 * (mixture.nll(y) - reference.nll(y)), 100 * (mixture.nll(x) - mixture.nll(y))


@pytest.mark.parametrize("copies", [0, 20])
def test_fld_equals_a_float64_reference(copies: int) -> None:
    real, holdout, fake = features(90, 6, 1), features(50, 6, 2), features(40, 6, 3)
    fake[:copies] = real[:copies]
    order = np.random.RandomState(4).permutation(90)
    measured = likelihood_divergence(real, holdout, fake, order, list[int]().append)
    assert measured == pytest.approx(numpy_divergence((real, holdout, fake), order), rel=2e-3, abs=0.05)


def test_fld_accepts_constant_features() -> None:
    real, holdout, fake = features(60, 4, 1), features(40, 4, 2), features(50, 4, 3)
    for rows in (real, holdout, fake):
        rows[:, 2] = 7
    measured = likelihood_divergence(real, holdout, fake, np.arange(60), list[int]().append)
    assert measured == pytest.approx(numpy_divergence((real, holdout, fake), np.arange(60)), rel=2e-3, abs=0.05)


def test_a_mixture_of_one_centre_has_the_likelihood_of_its_parts() -> None:
    """With all centres at one place the best variance of Gaussian points is their mean square."""
    points = torch.from_numpy(np.random.RandomState(0).standard_normal((2000, 3))).float()
    points -= points.mean(dim=0)
    mixture = Mixture(torch.zeros(2, 3), points, list[int]().append)
    variance = float(points.double().square().mean())
    assert mixture.log_variance.exp().tolist() == pytest.approx([variance] * 3, rel=0.05)
    assert mixture.nll(points) == pytest.approx(np.log(2 * np.pi * variance) / 2 + 0.5, abs=0.01)


class Reports(Progress):
    """Progress that keeps its reports."""

    def __init__(self) -> None:
        self.plans: list[tuple[str, list[Pass]]] = []
        self.reports: list[tuple[str, int, int]] = []

    def plan(self, metrics: str, passes: Sequence[Pass]) -> None:
        self.plans.append((metrics, [*passes]))
        self.reports = []

    def __call__(self, name: str, done: int, total: int) -> None:
        self.reports.append((name, done, total))


def test_fld_reports_the_steps_of_its_fits(detector: Path) -> None:
    progress = Reports()
    results(context_of(detector, natural_images(9, seed=2), progress=progress), "fld9")
    assert progress.plans[-1] == ("fld9", [("fitting steps", 100)])
    steps = [*range(51), *range(50, 101)]  # of the fakes' mixture, then of the reference
    assert progress.reports == [("fitting steps", step, 100) for step in steps]


def test_fld_and_its_gap_detect_a_generator_that_copies(detector: Path) -> None:
    images = natural_images(600)
    more = natural_images(900)[600:]
    copied = results(context_of(detector, images[:400]), "fld200")
    fresh = results(context_of(detector, more), "fld200")
    bad = results(context_of(detector, more // 2), "fld200")
    assert copied["fld200_generalisation_gap"] < -100
    assert -20 < fresh["fld200_generalisation_gap"] < 20
    assert copied["fld200"] > fresh["fld200"] + 5
    assert bad["fld200"] > fresh["fld200"] + 5


def test_fld_needs_enough_held_out_images(detector: Path) -> None:
    with pytest.raises(UserError, match=r"metric fld5: needs images that the network was not trained on.*--holdout=N$"):
        results(context_of(detector, natural_images(5), held_out=None), "fld5")
    few = OtherImages(natural_images(3, seed=4))
    with pytest.raises(UserError, match="metric fld5: needs at least 4 images of each, got 400 training, 3 held-out"):
        results(context_of(detector, natural_images(5), held_out=few), "fld5")


def test_held_out_images_must_differ_from_the_training_images(detector: Path) -> None:
    with pytest.raises(UserError, match="--holdout: these are the training images"):
        context_of(detector, natural_images(5), held_out=OtherImages(natural_images(600)[:400]))
    with pytest.raises(UserError, match=r"--holdout: the images are 3x16x16 .*, but those of the dataset 3x32x32"):
        context_of(detector, natural_images(5), held_out=OtherImages(natural_images(5, (3, 16, 16))))


def test_datasets_with_common_images_overlap(tmp_path: Path) -> None:
    def opened(path: Path, **changes: Any) -> ImageDataset:
        return ImageDataset(DatasetConfig(path=str(path), **changes))

    def scenes(name: str, count: int, seed: int = 0) -> Path:
        return make_shapes(tmp_path / f"{name}.zip", 16, count, seed)

    train, other = scenes("train", 120), scenes("other", 120, seed=1)
    assert opened(train).overlaps(opened(scenes("more", 150)))
    assert not opened(train).overlaps(opened(other))
    assert opened(train, max_images=1).overlaps(opened(train, max_images=1, seed=1))
    with zipfile.ZipFile(train) as source, zipfile.ZipFile(other, "a") as archive:
        name = next(name for name in source.namelist() if name.endswith(".png"))
        archive.writestr("copy.png", source.read(name))
    assert not opened(train).overlaps(opened(other))  # a single duplicate
    assert opened(train, max_images=60).overlaps(opened(train, holdout=60))

    # 1,500 uncompressed images of one size have 2^16 CRCs: about 34 in common with other images.
    many, others = opened(scenes("many", 1500)), opened(scenes("others", 1500, seed=1))
    mine, theirs = (ZipStore(each.path, read_zip(each.path)).fingerprints(np.arange(1500)) for each in (many, others))
    assert len(np.intersect1d(mine, theirs)) > 15
    assert not many.overlaps(others)

    for folder in (tmp_path / "all" / "val", tmp_path / "beside"):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "image.png")
    assert opened(tmp_path / "all").overlaps(opened(tmp_path / "all" / "val"))
    assert not opened(tmp_path / "all").overlaps(opened(tmp_path / "beside"))


# calc_metrics.py --holdout and training.


@pytest.fixture(scope="module")
def snapshots(shapes_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Snapshots of untrained networks whose runs held out 0 and 56 of 256 images."""
    folder, paths = tmp_path_factory.mktemp("runs"), {}
    for holdout in (0, 56):
        changes = {"data.path": str(shapes_zip), "data.holdout": holdout, "data.mirror": True}
        config = override(PRESETS["tiny"], changes | {"generator.widths": (16, 8), "generator.layers": (1, 1)})
        paths[holdout] = folder / f"holdout{holdout}" / "network-snapshot-000000.pkl"
        paths[holdout].parent.mkdir()
        save_network(paths[holdout], config=config, G_ema=build(config.generator))
    return paths


def calc(network: Path, detector: Path, *arguments: str) -> Result:
    options = [f"--network={network}", "--device=cpu", "--no-cache", "--verbose=0", bound(detector), *arguments]
    return CliRunner().invoke(calc_metrics.main, options)


def records(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return {record["metric"]: record for record in map(json.loads, result.stdout.splitlines())}


def test_the_holdout_of_a_run_is_compared_with_training_images(
    snapshots: dict[int, Path], detector: Path, shapes_zip: Path, tmp_path: Path
) -> None:
    names = "--metrics=fid40_full,fid30,fld40,authpct40"
    found = records(calc(snapshots[56], detector, "--holdout=run", names))
    data = DatasetConfig(path=str(shapes_zip), holdout=56)
    parts = {"train": ImageDataset(data), "holdout": ImageDataset(data, held_out=True)}
    for record in found.values():
        has_flips = record["metric"] == "fid30"
        assert record["num_real"] == (30 if has_flips else 200)
        assert record["data_hash"] == parts["train"].with_mirror(has_flips).content_hash
        expected = {"fid40_full": 56, "fid30": 30, "fld40": 56, "authpct40": 0}[record["metric"]]
        assert record["num_holdout"] == expected
        assert record["holdout_hash"] == (parts["holdout"].content_hash if expected else None)
    assert list(found["fid40_full"]["results"]) == ["fid40_full", "fid40_full_train", "fid40_full_holdout"]
    assert list(found["fld40"]["results"]) == ["fld40", "fld40_generalisation_gap"]

    own = records(calc(snapshots[56], detector, names))  # without --holdout
    assert own["fld40"]["results"] == found["fld40"]["results"]
    assert own["authpct40"]["results"] == found["authpct40"]["results"]
    assert own["authpct40"]["data_hash"] == parts["train"].content_hash
    assert list(own["fid40_full"]["results"]) == ["fid40_full"]
    assert own["fid40_full"]["num_real"] == 256


def test_snapshots_in_a_folder_use_their_own_split(snapshots: dict[int, Path], detector: Path, tmp_path: Path) -> None:
    for kimg, holdout in enumerate((20, 56)):
        config = override(load_network(snapshots[0]).config, {"data.holdout": holdout})
        name = f"network-snapshot-{kimg:06d}.pkl"
        save_network(tmp_path / name, config=config, G_ema=build(config.generator), nimg=1000 * kimg)
    result = calc(tmp_path, detector, "--metrics=fld20")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(record["num_real"], record["num_holdout"]) for record in found] == [(236, 20), (200, 56)]


def test_both_frechet_distances_equal_separate_measurements(
    snapshots: dict[int, Path], detector: Path, tmp_path: Path
) -> None:
    """Against a dataset of held-out images, each distance is that to this dataset alone."""
    other = make_shapes(tmp_path / "other.zip", 16, 300, seed=1)
    found = records(calc(snapshots[0], detector, f"--holdout={other}", "--metrics=fid40_full"))["fid40_full"]
    assert (found["num_real"], found["num_holdout"]) == (256, 256)
    alone = records(calc(snapshots[0], detector, "--metrics=fid40_full"))["fid40_full"]["results"]["fid40_full"]
    swapped = records(calc(snapshots[0], detector, f"--data={other}", "--metrics=fid40_full"))["fid40_full"]
    assert found["results"]["fid40_full"] == found["results"]["fid40_full_train"] == pytest.approx(alone)
    assert found["results"]["fid40_full_holdout"] == pytest.approx(swapped["results"]["fid40_full"], rel=0.2)
    assert found["results"]["fid40_full_holdout"] != alone


@pytest.mark.parametrize(
    ("holdout", "arguments", "message"),
    [
        (0, ["--holdout=run"], "--holdout=run: the run held out no images"),
        (0, ["--holdout=no-such.zip"], "Error: --holdout=no-such.zip does not exist: give a folder or .zip file"),
        (0, ["--data=no-such.zip"], "Error: --data=no-such.zip does not exist: give a folder or .zip file"),
        (0, ["--holdout={text}"], "Error: --holdout={text} is neither a folder nor a .zip file"),
        (0, ["--holdout={few}"], "few.zip: contains images of "),
        (56, ["--holdout={shapes}"], "shapes.zip: contains images of "),
        (0, ["--metrics=fld5"], "metric fld5: needs images that the network was not trained on"),
        (56, ["--holdout=run", "--data={few}"], "few.zip: holdout=56: the dataset has 9 images: leave some"),
    ],
)
def test_unusable_holdouts_are_one_clear_message(
    snapshots: dict[int, Path], detector: Path, shapes_zip: Path, tmp_path: Path, holdout: int, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    few = make_shapes(tmp_path / "few.zip", 16, 9)
    text = tmp_path / "notes.txt"
    text.write_text("none")
    given = [argument.format(shapes=shapes_zip, few=few, text=text) for argument in arguments]
    result = calc(snapshots[holdout], detector, "--metrics=fid20_full", *given)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert message.format(text=text) in line


def test_a_set_of_images_can_be_compared_with_held_out_images(detector: Path, shapes_zip: Path, tmp_path: Path) -> None:
    other, fakes = make_shapes(tmp_path / "other.zip", 16, 40, seed=1), make_shapes(tmp_path / "fakes.zip", 16, 60)
    result = calc(fakes, detector, f"--data={shapes_zip}", f"--holdout={other}", "--metrics=fld50,authpct50")
    found = records(result)
    assert found["authpct50"]["results"]["authpct50"] < 10  # copies: the first scenes of the dataset
    assert found["fld50"]["results"]["fld50_generalisation_gap"] != 0
    refused = calc(fakes, detector, f"--data={shapes_zip}", "--holdout=run", "--metrics=fld50")
    assert refused.exit_code == 2
    assert "--holdout=run: a set of images belongs to no run" in refused.stderr


def test_training_computes_metrics_of_memorisation(
    detector: Path, shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    arguments = [f"--outdir={tmp_path}", f"--data={shapes_zip}", "--subset=100", "--device=cpu", bound(detector)]
    arguments += [*SMALL, "--kimg=0.016", "--tick=0.016", "--snap=1", "--metrics=authpct20,fld20"]
    refused = CliRunner().invoke(train.main, [*arguments, "--desc=refused"])
    assert refused.exit_code == 2
    assert "metric fld20: needs images that the network was not trained on" in refused.stderr

    result = CliRunner().invoke(train.main, [*arguments, "--holdout=40"])
    assert result.exit_code == 0, result.output
    (folder,) = [path.parent for path in tmp_path.glob("*/metric-fld20.jsonl")]
    counts = {}
    for name in ("authpct20", "fld20"):
        record = json.loads((folder / f"metric-{name}.jsonl").read_text().splitlines()[-1])
        counts[name] = record["num_real"], record["num_fake"], record["num_holdout"]
    assert counts == {"authpct20": (100, 20, 0), "fld20": (100, 20, 40)}
