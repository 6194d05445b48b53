"""Time the passes of FID over generated and real images, and the computation of metrics from features.

    python benchmarks/feature_metrics.py --images=256 --device=cpu
    python benchmarks/feature_metrics.py --parts=covariance,frechet,kid,precision_recall,density_coverage --device=cpu

`passes` prints one line of JSON for each pass over images. The default detector is torch-fidelity's Inception with
random weights, which is as fast as with the published weights. The share is the time of the detector for the same
batches, already on the device, divided by the time of the pass; on a CPU it is measured in processor time, which
depends less on other programs.

Every other part prints one line for a computation on random non-negative features: the busy time (processor time on a
CPU), that of the plain computation in PyTorch, and the deviation between their values.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import click
import torch
from common import README_EXAMPLE, Clock, against_plain, emit, peak_mib, timed
from torch import Tensor, nn

from dnnlib.allocator import tune_allocator
from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError
from metrics.detectors import Detector, load_inception, load_program
from metrics.feature_stats import Moments, StatRequest, statistics_of
from metrics.frechet import frechet_distance
from metrics.kernel import SUBSET_SIZE, kernel_distance
from metrics.precision_recall import DC_NEIGHBOURS, PR_NEIGHBOURS, density_coverage, precision_recall
from metrics.sampling import MetricContext
from torch_utils import distributed
from torch_utils.images import save_image
from training.dataset import DatasetConfig, ImageDataset

PASSES = "passes"
BATCH = 64  # features of a batch of the detector


@click.command(cls=Script, help=__doc__)
@option("--parts", type=NameList(), help="Parts to measure. [all]")
@option("--images", type=click.IntRange(min=2), default=1024, show_default=True, help="Images in each pass.")
@option("--detector", type=click.Path(path_type=Path), help="A custom program. [Inception, random weights]")
@option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Generator batch size.")
@option("--detector-batch", type=click.IntRange(min=1), default=64, show_default=True, help="Detector batch size.")
@option("--features", type=click.IntRange(min=4), default=4096, show_default=True, help="Features of each set.")
@option("--dimensions", type=click.IntRange(min=1), default=2048, show_default=True, help="Dimensions of a feature.")
@option("--subsets", type=click.IntRange(min=1), default=10, show_default=True, help="Subsets of the kernel distance.")
@option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs; the fastest is reported.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
def main(
    parts: tuple[str, ...] | None,
    images: int,
    detector: Path | None,
    batch: int,
    detector_batch: int,
    features: int,
    dimensions: int,
    subsets: int,
    repeats: int,
    device: str | None,
) -> None:
    computations = computations_on_features(subsets)
    names = (PASSES, *computations)
    for part in parts or ():
        if part not in names:
            raise UserError(f"--parts: {part!r} is not one of {', '.join(names)}")
    tune_allocator()
    where = distributed.use_device(device)
    torch.manual_seed(0)
    if parts is None or PASSES in parts:
        network = load_program(detector, where) if detector else random_inception(where)
        time_passes(network, images, batch, detector_batch, where)
    for name, computation in computations.items():
        if parts is None or name in parts:
            sets = (random_features(features, dimensions, seed, shift) for seed, shift in ((1, 0), (2, 0.02)))
            own, plain = computation(*(rows.to(where) for rows in sets))
            settings = {"benchmark": "feature_metrics", "part": name, "features": features, "dimensions": dimensions}
            if name == "kid":
                settings["subsets"] = subsets
            emit(settings | against_plain(own, plain, repeats, where), where)


def time_passes(network: Detector, images: int, batch: int, detector_batch: int, device: torch.device) -> None:
    """Print a line for the pass over generated images, and one for the pass over real images."""
    with tempfile.TemporaryDirectory() as folder:
        for number, img in enumerate(torch.randint(0, 256, [images, 3, 32, 32], dtype=torch.uint8)):
            save_image(img, Path(folder) / f"{number:06d}.png")
        context = MetricContext(
            G=README_EXAMPLE.generator.build().to(device).eval(),
            images=ImageDataset(DatasetConfig(path=folder)),
            device=device,
            batch_size=batch,
            detector_batch=detector_batch,
        )
        statistics = statistics_of(context)
        statistics.detectors["inception"] = network
        alone = time_alone(network, images, detector_batch, device)
        requests = {
            "generated": StatRequest(of="fake", role="inception", count=images, recipe=Moments()),
            "real": StatRequest(of="real", role="inception", count=images, recipe=Moments()),
        }
        for kind, request in requests.items():
            with timed(device) as clock:
                result = statistics[request]
            emit(
                {
                    "benchmark": "feature_metrics",
                    "part": PASSES,
                    "pass": kind,
                    "detector": network.name,
                    "features": len(result["mean"]),
                    "images": images,
                    "img_per_s": round(images / clock.seconds, 1),
                    "detector_share": round(alone.busy / clock.busy, 3),
                    "peak_mib": peak_mib(device),
                },
                device,
            )


def random_inception(device: torch.device) -> Detector:
    """Return Inception with PyTorch's initial weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with (
        mock.patch.object(library, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict"),
    ):
        state = library.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    return load_inception(state, device, clean=False)


def time_alone(network: Detector, images: int, batch: int, device: torch.device) -> Clock:
    """Return the time of the detector for `images` images that are already on the device, after a warm-up."""
    ready = torch.randint(0, 256, [min(batch, images), 3, 32, 32], dtype=torch.uint8, device=device)
    network(ready)
    with timed(device) as clock:
        for start in range(0, images, len(ready)):
            network(ready[: images - start])
    return clock


# Computations on features: pairs of functions, of this project and plain.

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def computations_on_features(subsets: int) -> dict[str, Callable[[Tensor, Tensor], Pair]]:
    """Return the computations on real and generated features (N, F), by part."""
    return {
        "covariance": covariance,
        "frechet": frechet,
        "kid": partial(kid, subsets=subsets),
        "precision_recall": manifolds,
        "density_coverage": balls,
    }


def random_features(count: int, dimensions: int, seed: int, shift: float) -> Tensor:
    """Draw correlated non-negative features (N, F) of mean 0.4, as those of Inception."""
    factors = max(1, dimensions // 16)
    mix = torch.randn(factors, dimensions, generator=torch.Generator().manual_seed(0)) / math.sqrt(factors)
    stream = torch.Generator().manual_seed(seed)
    rows = 0.5 * torch.randn(count, factors, generator=stream) @ mix
    return (rows + 0.2 * torch.randn(count, dimensions, generator=stream) + 0.3 + shift).clamp(min=0)


def covariance(real: Tensor, _: Tensor) -> Pair:
    """Pair of functions for the covariance of the reals, given in batches."""

    def own() -> Tensor:
        sums = Moments().start(len(real))
        for start in range(0, len(real), BATCH):
            sums.add(range(start, min(start + BATCH, len(real))), real[start : start + BATCH], None)
        return sums.finish()["cov"]

    def plain() -> Tensor:
        total, outer = (real.new_zeros([], dtype=torch.float64) for _ in range(2))
        for batch in real.split(BATCH):
            x = batch.double()
            total, outer = total + x.sum(dim=0), outer + x.T @ x
        mean = total / len(real)
        return outer / len(real) - mean.outer(mean)

    return own, plain


def frechet(real: Tensor, fake: Tensor) -> Pair:
    """Pair of functions for the Frechet distance between two Gaussians."""
    moments = [part for x in (real, fake) for part in (x.double().mean(dim=0), x.double().T.cov(correction=0))]

    def plain() -> Tensor:
        mean1, cov1, mean2, cov2 = moments
        roots = [v * e.clamp(min=0).sqrt() for e, v in map(torch.linalg.eigh, (cov1, cov2))]
        cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
        return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross

    return lambda: torch.tensor(frechet_distance(*moments), dtype=torch.float64), plain


def kid(real: Tensor, fake: Tensor, subsets: int) -> Pair:
    """Pair of functions for the mean and standard deviation of the kernel distance over random subsets."""
    size = min(SUBSET_SIZE, len(real))
    stream = torch.Generator().manual_seed(0)
    index = [
        torch.stack([torch.randperm(len(x), generator=stream)[:size] for _ in range(subsets)]) for x in (real, fake)
    ]

    def plain() -> Tensor:
        values = []
        for i, j in zip(*index, strict=True):
            x, y = real[i].double(), fake[j].double()
            kxx, kyy, kxy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
            within = kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()
            values.append(within / (size * (size - 1)) - 2 * kxy.mean())
        return torch.stack([torch.stack(values).mean(), torch.stack(values).std(correction=0)])

    sides = [{"rows": x, "index": rows} for x, rows in zip((real, fake), index, strict=True)]
    return lambda: torch.tensor(kernel_distance(*sides), dtype=torch.float64), plain


def manifolds(real: Tensor, fake: Tensor) -> Pair:
    """Pair of functions for precision and recall in float16."""
    real, fake = real.half(), fake.half()

    def plain() -> Tensor:
        precision = plain_distances(fake, real) <= plain_radii(real, PR_NEIGHBOURS)
        recall = plain_distances(real, fake) <= plain_radii(fake, PR_NEIGHBOURS)
        return torch.stack([inside.any(dim=1).double().mean() for inside in (precision, recall)])

    return lambda: torch.tensor(precision_recall(real, fake), dtype=torch.float64), plain


def balls(real: Tensor, fake: Tensor) -> Pair:
    """Pair of functions for density and coverage in float32."""

    def plain() -> Tensor:
        radii = plain_radii(real, DC_NEIGHBOURS)
        density = (plain_distances(fake, real) <= radii).sum(dim=1).double().mean() / DC_NEIGHBOURS
        coverage = (plain_distances(real, fake).min(dim=1).values <= radii).double().mean()
        return torch.stack([density, coverage])

    return lambda: torch.tensor(density_coverage(real, fake), dtype=torch.float64), plain


def plain_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances between all rows as one table, (len(x), len(y)), in the dtype of x."""
    dtype, centre = x.dtype, y.float().mean(dim=0)
    x, y = x.float() - centre, y.float() - centre
    squares = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * x @ y.T
    return squares.clamp(min=0).sqrt().to(dtype)


def plain_radii(x: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (N,), in the dtype of x."""
    distances = plain_distances(x, x).float().fill_diagonal_(math.inf)
    return distances.kthvalue(neighbours, dim=1).values.to(x.dtype)


if __name__ == "__main__":
    main()
