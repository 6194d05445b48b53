"""Nearest training images of generated images, in pixels at a low resolution or in the features of a network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.util import counted
from exploration.model import atomic_write, check_seeds, gather_styles
from exploration.opening import build_model, choose_label, is_mapping, open_network
from exploration.output import make_outdir
from metrics.detectors import FILES, REPLACEABLE, DetectorSetup, Role, read_detectors
from metrics.sampling import cut, explain_shape_mismatch
from metrics.sliced_wasserstein import downsample
from torch_utils.images import save_pixels
from torch_utils.sheets import FRAME_GAP, TEXT_SIZE, caption_of, captioned_rows, sheet, tiles_of, titled
from training.dataset import DatasetConfig, ImageDataset, check_given
from training.snapshots.reading import open_images
from training.snapshots.snapshot import Snapshot

Embedding = Callable[[Tensor], Tensor]  # uint8 images (B, C, H, W) -> features (B, F)

SIDE = 32  # pixels: upper bound for the shorter side of the images that are compared
BATCH = 64  # training images read at a time
KEPT_BYTES = 2**30  # features are kept in memory up to this size, and computed twice beyond it
MAX_ROWS = 256  # of a sheet


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A training image with its distances to a generated image and to the training image nearest to it.

    `index` is its index in the dataset. `flipped`: the distances are those of its flip.
    """

    index: int
    flipped: bool
    distance: float
    own_distance: float


def reduced(images: Tensor) -> Tensor:
    """Low-pass filter and halve images, as in a Gaussian pyramid, until their shorter side is at most SIDE pixels."""
    x = images.float()
    while min(x.shape[2:]) > SIDE:
        x = downsample(x)
    return x


def small_pixels(images: Tensor) -> Tensor:
    """Return the `reduced` pixels as features (B, F): distances are root mean square differences in grey levels."""
    x = reduced(images)
    return x.flatten(1) / math.sqrt(x[0].numel())


def choose_embedding(
    detector: str | None, img_shape: tuple[int, int, int], device: torch.device
) -> tuple[Embedding, str]:
    """Return the features of --detector, or pixels, of images (C, H, W), and their name."""
    if detector is None:
        H, W = reduced(torch.zeros(1, *img_shape)).shape[2:]
        return small_pixels, f"pixels at {W}x{H}"
    setup = read_detectors((detector,))
    role = role_of(setup, detector)
    setup.prepare(role)
    network = setup.load(role, device)

    def embed(images: Tensor) -> Tensor:
        features = network(images)[0]
        if not features.isfinite().all():
            raise UserError(f"--detector={detector}: returns non-finite features")
        return features

    return embed, f"features of {network.name}"


def role_of(setup: DetectorSetup, detector: str) -> Role:
    """Return the role of the only network in a setup. Raises UserError for LPIPS, which compares two images."""
    if setup.dinov2:
        return "dinov2"
    for role in REPLACEABLE:
        if setup.program_of(role) or FILES[role][0].name in setup.weights:
            return role
    raise UserError(f"--detector={detector}: LPIPS compares pairs of images; specify Inception, VGG16 or a program")


class TrainingFeatures:
    """Features of all training images by batch, (positions, (B, F)), computed once or, beyond KEPT_BYTES, each time."""

    def __init__(self, dataset: ImageDataset, embed: Embedding, device: torch.device) -> None:
        self.dataset, self.embed, self.device = dataset, embed, device
        self.kept: list[tuple[range, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        if self.kept:
            yield from self.kept
            return
        computed: list[tuple[range, Tensor]] = []
        number, size = self.dataset.num_originals, 0
        with tqdm(total=number, desc="Training images", unit="img") as progress:
            for positions in cut(range(number), BATCH):
                features = self.embed(self.dataset.images(positions).to(self.device))
                size += features.nbytes
                computed.append((positions, features))
                if size > KEPT_BYTES:
                    computed.clear()
                yield positions, features
                progress.update(len(positions))
        self.kept = computed


def find_nearest(
    queries: Tensor, features: Iterable[tuple[range, Tensor]], count: int, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances, indices and views of the `count` nearest of the features, each (Q, count), nearest first.

    `queries` (V, Q, F) are V views of each query, e.g. the image and its flip; the distance to a feature is that of the
    nearest view. Distances are Euclidean, without the cancellation of a matrix product: a copy has distance 0. `skip`
    (Q,) are indices to ignore.
    """
    V, Q, _ = queries.shape
    best = queries.new_full((Q, 0), math.inf)
    found = torch.empty(Q, 0, dtype=torch.int64, device=queries.device)  # index * V + view
    for positions, x in features:
        index = torch.arange(positions.start, positions.stop, device=x.device)
        distance, view = torch.cdist(queries, x, compute_mode="donot_use_mm_for_euclid_dist").min(dim=0)  # (Q, B)
        if skip is not None:
            distance = distance.masked_fill(index == skip[:, None], math.inf)
        best, found = torch.cat([best, distance], dim=1), torch.cat([found, index * V + view], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1, largest=False)
        found = found.gather(1, order)
    return best, found // V, found % V


def search(
    images: Tensor, dataset: ImageDataset, embed: Embedding, count: int, device: torch.device
) -> list[list[Neighbour]]:
    """Return the `count` nearest training images of each uint8 image (n, C, H, W), nearest first.

    If the dataset is mirrored, flips of the training images are candidates too.
    """

    def views(batch: Tensor) -> Tensor:
        """Return the features of images and, for a mirrored dataset, of their flips, (V, n, F)."""
        both = [batch, batch.flip(3)] if dataset.config.mirror else [batch]
        return torch.stack([torch.cat([embed(x.to(device)) for x in side.split(BATCH)]) for side in both])

    features = TrainingFeatures(dataset, embed, device)
    distances, indices, flips = find_nearest(views(images), features, count)
    unique, place = indices.unique(return_inverse=True)
    own, _, _ = find_nearest(views(dataset.images(unique.cpu())), features, 1, skip=unique)
    columns = zip(*(x.flatten().tolist() for x in (indices, flips, distances, own[:, 0][place])), strict=True)
    found = [
        Neighbour(index=index, flipped=bool(flip), distance=distance, own_distance=own_distance)
        for index, flip, distance, own_distance in columns
    ]
    return [found[start : start + count] for start in range(0, len(found), count)]


def is_authentic(row: Sequence[Neighbour]) -> bool:
    """Return whether an image is further from its nearest training image than that one from its own (AuthPct)."""
    return row[0].distance > row[0].own_distance


def draw(
    images: Tensor, names: Sequence[str], found: Sequence[Sequence[Neighbour]], dataset: ImageDataset
) -> np.ndarray:
    """Return a sheet: a row per generated image, uint8 (n, C, H, W), with its neighbours and their distances."""
    columns = 1 + len(found[0])
    training = [torch.stack([_image_of(each, dataset) for each in row]) for row in found]
    distances = [[f"{each.distance:.3g} / {each.own_distance:.3g}" for each in row] for row in found]
    verdicts = [["" if is_authentic(row) else "not authentic"] for row in found]
    made = captioned_rows([[tile] for tile in tiles_of(images, columns)], verdicts)
    near = captioned_rows([tiles_of(row, columns) for row in training], distances)
    left = sheet(made, ["generated"], [caption_of(name) for name in names])
    right = sheet(near, ["nearest", *map(str, range(2, columns))])
    return np.concatenate([left, np.full_like(left[:, :FRAME_GAP], 255), right], axis=1)


def _image_of(neighbour: Neighbour, dataset: ImageDataset) -> Tensor:
    """Return the training image (C, H, W) as it was compared, possibly flipped."""
    image = dataset.images([neighbour.index])[0]
    return image.flip(2) if neighbour.flipped else image


def to_lines(names: Sequence[str], found: Sequence[Sequence[Neighbour]], dataset: ImageDataset, features: str) -> str:
    """Return a line of JSON per generated image; `index` and `file` are the place and name in the folder or zip."""
    records = [
        {
            "image": name,
            "authentic": is_authentic(row),
            "neighbours": [
                {**asdict(each), "index": dataset.original(each.index), "file": dataset.file_name(each.index)}
                for each in row
            ],
            "features": features,
            "data": str(dataset.path),
        }
        for name, row in zip(names, found, strict=True)
    ]
    return "".join(f"{json.dumps(record)}\n" for record in records)


def open_training_images(snapshot: Snapshot, data: str | None, count: int) -> ImageDataset:
    """Open the training images: those of the run, or --data, with the run's --mirror.

    Raises UserError if there are none, if they are not images of the network's size, or fewer than `count`.
    """
    trained = snapshot.config.data
    config = replace(trained, use_labels=False) if data is None else DatasetConfig(path=data, mirror=trained.mirror)
    dataset = open_images(config, snapshot.path, is_given=data is not None)
    shapes = tuple(snapshot.G_ema.img_shape), tuple(dataset.img_shape)
    if shapes[0] != shapes[1]:
        raise UserError(f"--data={config.path}: {explain_shape_mismatch(*shapes, of_network=True)}")
    number = dataset.num_originals
    if number < 2:
        raise UserError(f"--data={config.path}: has {counted(number, 'image')}; specify at least 2 training images")
    if number < count:
        raise UserError(f"--count={count}: {config.path} has {counted(number, 'image')}; specify at most {number}")
    return dataset


def show_neighbours(
    *,
    network: Path | str,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    data: str | None,
    detector: str | None,
    count: int,
    outdir: Path,
    class_index: int | None,
    label: tuple[float, ...] | None,
    device: str | None,
    ema: float | None = None,
    **options: Any,
) -> None:
    """Run `generate.py neighbours`."""
    check_given("--data", data)
    snapshot, torch_device = open_network(network, device, ema)
    c = choose_label(snapshot, class_index, label, is_needed=is_mapping(seeds, projected_w))
    model = build_model(snapshot, torch_device, c, **options)
    check_seeds("--seeds", seeds)
    names, ws = gather_styles(model, seeds, projected_w)
    if len(names) > MAX_ROWS:
        raise UserError(f"--seeds: {len(names)} images; a sheet shows at most {MAX_ROWS}")
    dataset = open_training_images(snapshot, data, count)
    embed, features = choose_embedding(detector, dataset.img_shape, torch_device)
    make_outdir(outdir)
    images = model.images(ws)
    found = search(images, dataset, embed, count, torch_device)
    title = f"Distance ({features}) / distance from that training image to its nearest training image"
    save_pixels(titled(draw(images, names, found, dataset), title, indent=TEXT_SIZE / 2), outdir / "neighbours.png")
    with atomic_write(outdir / "neighbours.jsonl") as temporary:
        temporary.write_text(to_lines(names, found, dataset, features), encoding="utf-8")
    authentic, path = sum(map(is_authentic, found)), outdir / "neighbours.png"
    total = counted(dataset.num_originals, "training image")
    click.echo(f"{authentic} of {counted(len(names), 'image')} authentic among {total}; {path} shows the nearest")
