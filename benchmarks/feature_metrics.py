"""Time the passes of FID over generated and real images, and the detector's share of each pass.

    python benchmarks/feature_metrics.py --images=256 --device=cpu

The default detector is torch-fidelity's Inception with random weights, which is as fast as with the published weights.
The share is the time of the detector for the same batches, already on the device, divided by the time of the pass; on a
CPU it is measured in processor time, which depends less on other programs. Prints one line of JSON for each pass, and
one for computing the distance from the statistics.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import torch
from common import README_EXAMPLE, emit, peak_mib, synchronize
from torch import nn

from dnnlib.allocator import tune_allocator
from dnnlib.cli import Script, option
from metrics.detectors import Detector, load_inception, load_program
from metrics.feature_stats import Moments, StatRequest, statistics_of
from metrics.frechet import distance_of
from metrics.sampling import MetricContext
from torch_utils import distributed
from torch_utils.images import save_image
from training.dataset import DatasetConfig, ImageDataset


@click.command(cls=Script, help=__doc__)
@option("--images", type=click.IntRange(min=2), default=1024, show_default=True, help="Images in each pass.")
@option("--detector", type=click.Path(path_type=Path), help="A custom program. [Inception, random weights]")
@option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Generator batch size.")
@option("--detector-batch", type=click.IntRange(min=1), default=64, show_default=True, help="Detector batch size.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
def main(images: int, detector: Path | None, batch: int, detector_batch: int, device: str | None) -> None:
    tune_allocator()
    where = distributed.use_device(device)
    torch.manual_seed(0)
    network = load_program(detector, where) if detector else random_inception(where)
    with tempfile.TemporaryDirectory() as folder:
        for number, img in enumerate(torch.randint(0, 256, [images, 3, 32, 32], dtype=torch.uint8)):
            save_image(img, Path(folder) / f"{number:06d}.png")
        context = MetricContext(
            G=README_EXAMPLE.generator.build().to(where).eval(),
            images=ImageDataset(DatasetConfig(path=folder)),
            device=where,
            batch_size=batch,
            detector_batch=detector_batch,
        )
        statistics = statistics_of(context)
        statistics.detectors["inception"] = network
        alone = time_alone(network, images, detector_batch, where)
        requests = {
            "generated": StatRequest(of="fake", role="inception", count=images, recipe=Moments()),
            "real": StatRequest(of="real", role="inception", count=images, recipe=Moments()),
        }
        for kind, request in requests.items():
            with timed(where) as clock:
                result = statistics[request]
            emit(
                {
                    "benchmark": "feature_metrics",
                    "pass": kind,
                    "detector": network.name,
                    "features": len(result["mean"]),
                    "images": images,
                    "img_per_s": round(images / clock.seconds, 1),
                    "detector_share": round(alone.busy / clock.busy, 3),
                    "peak_mib": peak_mib(where),
                },
                where,
            )
        with timed(where) as clock:
            distance_of(statistics[requests["real"]], statistics[requests["generated"]])
        emit({"benchmark": "feature_metrics", "pass": "distance", "seconds": round(clock.seconds, 2)}, where)


def random_inception(device: torch.device) -> Detector:
    """Return Inception with PyTorch's initial weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with (
        mock.patch.object(library, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict"),
    ):
        state = library.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    return load_inception(state, device, clean=False)


@dataclass
class Clock:
    """Duration of a block, and busy time of the device: processor time on a CPU."""

    seconds: float = 0.0
    busy: float = 0.0


def time_alone(network: Detector, images: int, batch: int, device: torch.device) -> Clock:
    """Return the time of the detector for `images` images that are already on the device, after a warm-up."""
    ready = torch.randint(0, 256, [min(batch, images), 3, 32, 32], dtype=torch.uint8, device=device)
    network(ready)
    with timed(device) as clock:
        for start in range(0, images, len(ready)):
            network(ready[: images - start])
    return clock


@contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    """Yield a clock that is set at the end of the block."""
    clock = Clock()
    synchronize(device)
    start, processor = time.perf_counter(), time.process_time()
    yield clock
    synchronize(device)
    clock.seconds = time.perf_counter() - start
    clock.busy = time.process_time() - processor if device.type == "cpu" else clock.seconds


if __name__ == "__main__":
    main()
