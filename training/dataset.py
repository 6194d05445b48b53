"""Images and labels for training and metrics, from a zip file or folder, sampled by position in the run."""

from __future__ import annotations

import copy
import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dnnlib import EasyDict
from dnnlib.config import ConfigError, UserError, check_bounds, setting
from dnnlib.image_files import BrokenImageError
from dnnlib.util import counted
from torch_utils.images import square_resolution
from torch_utils.signals import Signals
from training.data_sources.classes import note_on_gaps
from training.data_sources.codec import PNG_START, decode_as, decode_image, read_shape, starts_as_plain_png
from training.data_sources.files import ZipStore, check_exists, json_bytes
from training.data_sources.labelled import LabelledImages, open_labelled
from training.data_sources.sizes import Shape, Size, Sizes, Survey, build_command, describe_shape, suggest_size

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

OPEN_FILES = 256  # upper bound for one training process on a GPU, without data workers
OPEN_FILES_PER_WORKER = 16  # 4 prefetched batches of images and labels, and pipes

# Largest decoded dataset that is kept on the GPU by default. Each process decodes its own copy.
RESIDENT_BYTES = 2 * 2**30
RESIDENT_PART = 1024  # images decoded at a time
HASHED_PART = 1024  # records hashed at a time
START_BYTES = 1 << 16  # header of a file other than PNG; enough for most JPEGs (size after the EXIF data)
JPEG_START = b"\xff\xd8\xff"
MAX_COMPARED = 1000  # fingerprints whose images are read to find out whether two datasets overlap
MAX_SHARED = 0.01  # of the smaller of two datasets: more equal images are no coincidence


LabelKind = Literal["classes", "vectors"]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Training images; `ImageDataset(config, held_out=True)` returns the held-out images instead."""

    path: str = setting("", "Folder or zip file of images of one size, as written by dataset_tool.py.")
    use_labels: bool = setting(False, "Condition on the labels in dataset.json.")
    max_images: int | None = setting(
        None, "Size of a random subset, chosen by `seed`; None: all images.", at_least=1, note="omit it to use all"
    )
    holdout: int = setting(
        0,
        "Number of random images, selected by `seed`, to hold out of training.",
        at_least=0,
        note="0 holds out nothing",
    )
    mirror: bool = setting(False, "Extend the dataset with horizontally flipped images, which doubles its size.")
    seed: int = setting(0, "Random seed for choosing the subset and the held-out images.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


class ImageDataset:
    """Images of a folder or zip file, with indices 0 ... len - 1.

    With `mirror`, index i < len/2 is an image and i + len/2 is the same image flipped. Flips are part of the index and
    not random, so an epoch contains each image exactly once in each orientation.

    num_originals   number of images before `mirror` doubles it
    name            file or folder name without suffix
    img_shape       (C, H, W) of the first image, or of the first decodable image of a raw dataset; other images are
                    checked when they are decoded
    c_dim           number of classes or length of the label vectors; 0 without labels or without `use_labels`
    has_labels      whether the dataset has labels, used or not
    labels          int64 class indices [len], float32 vectors [len, c_dim], or [len, 0] when c_dim is 0
    label_kind      "classes" or "vectors", None when c_dim is 0
    class_names     list of str, or None
    meta            the keys of dataset.json other than "labels", which record how the dataset was made
    notes           messages for the user about files or labels in an unusual place or format
    content_hash    hex digest that identifies the images and their order, see `_content_hash`

    Objects can be pickled and used in forked or spawned workers. Invalid files raise UserError naming the file.
    """

    def __init__(self, config: DatasetConfig, *, held_out: bool = False) -> None:
        if not config.path:
            raise UserError("no dataset given: give a folder or .zip file of images")
        self.config = config
        self.path = Path(config.path)
        self.name = self.path.stem if self.path.suffix.lower() == ".zip" else self.path.resolve().name
        images = open_labelled(self.path)
        self._store = images.store
        if isinstance(self._store, ZipStore):
            self._store.convert_arrays(torch.from_numpy)  # data workers share tensors
        self.meta = images.meta
        self.notes = images.notes
        self.class_names = images.content.class_names
        self.has_labels = images.has_labels

        # Positions in the store, int64 [num_originals]. As a tensor, data workers share it.
        self._subset = torch.from_numpy(_choose_subset(len(self._store.names), config, held_out))
        self._undecoded: dict[int, str] = {}  # positions of broken images before the first decodable image -> error
        H, W, C = self._first_shape()
        self.img_shape = (C, H, W)
        self.labels, self.c_dim = self._read_labels(images)
        self.content_hash = self._content_hash()

    def __len__(self) -> int:
        return self.num_originals * (2 if self.config.mirror else 1)

    @property
    def label_kind(self) -> LabelKind | None:
        return None if self.c_dim == 0 else "classes" if self.labels.ndim == 1 else "vectors"

    @property
    def num_originals(self) -> int:
        return len(self._subset)

    def original(self, index: int) -> int:
        """Return the position of image `index` among all images of the file."""
        return int(self._subset[index % self.num_originals])

    def file_name(self, index: int) -> str:
        """Return the name of the file of image `index` in the folder or zip file."""
        return self._store.names[self.original(index)]

    def with_mirror(self, mirror: bool) -> ImageDataset:
        """Return this dataset with or without flips, sharing open files."""
        if mirror == self.config.mirror:
            return self
        other = copy.copy(self)
        other.config = replace(self.config, mirror=mirror)
        labels = self.labels[: self.num_originals]
        other.labels = torch.cat([labels, labels]) if mirror else labels
        other.content_hash = other._content_hash()
        return other

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Decode a batch: uint8 [B, C, H, W]. Raises UserError naming an image that is corrupt or has another shape."""
        C, H, W = self.img_shape
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"image index out of range: {index.min()} ... {index.max()} of {len(self)} images")

        n = len(self._subset)
        batch = np.empty((len(index), H, W, C), dtype=np.uint8)
        for k, position in enumerate(self._subset.numpy()[index % n].tolist()):
            batch[k] = self._decode(position, (H, W, C))
        mirrored = index >= n
        batch[mirrored] = batch[mirrored][:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))

    def overlaps(self, other: ImageDataset) -> bool:
        """Return whether two datasets are one file, a folder and a folder in it, or share more than MAX_SHARED.

        Only images of zip files are compared: those of equal fingerprint, up to MAX_COMPARED fingerprints, by pixel.
        """
        path, other_path = self.path.resolve(), other.path.resolve()
        if path == other_path:
            return True
        if not (isinstance(self._store, ZipStore) and isinstance(other._store, ZipStore)):
            are_folders = path.is_dir() and other_path.is_dir()
            return are_folders and (path.is_relative_to(other_path) or other_path.is_relative_to(path))
        mine = self._store.fingerprints(self._subset.numpy())
        theirs = other._store.fingerprints(other._subset.numpy())
        alike = np.intersect1d(mine, theirs)
        compared = alike[:MAX_COMPARED]
        groups = zip(_groups(mine, compared), _groups(theirs, compared), strict=True)
        equal = sum(not self._contents(here).isdisjoint(other._contents(there)) for here, there in groups)
        num_shared = equal * len(alike) / max(len(compared), 1)
        return num_shared > MAX_SHARED * min(self.num_originals, other.num_originals)

    def _contents(self, indices: np.ndarray) -> set[bytes]:
        return {image.numpy().tobytes() for image in self.images(indices)}

    @property
    def is_raw(self) -> bool:
        """Return whether the images are arbitrary files, not a dataset made by dataset_tool.py."""
        return "format_version" not in self.meta

    def _advise_on_labels(self) -> str:
        """Return advice on how to build a dataset with labels from the images."""
        if not self.is_raw:
            return "rebuild the dataset from its source with dataset_tool.py --labels-from-folders"
        command = build_command(self.config.path, *self._survey().options(suggest_size), "--labels-from-folders")
        return f"if its folders are classes, build a dataset with labels: {command}"

    def check_shapes(self, choose_size: Callable[[Sizes], Size | None] = suggest_size) -> None:
        """Raise ConfigError, with counts and a remedy, if image headers are corrupt or differ in size or channels.

        The remedy is a command that builds a dataset at the size chosen by `choose_size` from the counts of (width,
        height). Datasets made by dataset_tool.py are skipped, because dataset_tool.py has checked them.
        """
        if not self.is_raw:
            return
        if problem := self._survey().describe_mixture(str(self.path), choose_size):
            raise ConfigError("data.path", str(self.path), problem)

    def _survey(self) -> Survey:
        """Read the headers of all images."""
        survey = Survey()
        positions = tqdm(self._subset.tolist(), "Sizes", unit="images", disable=None, leave=False)
        for position, name in zip(positions, self._store.names_at(self._subset.numpy()), strict=True):
            try:
                survey.note(name, self._read_shape(position, name))
            except BrokenImageError as error:
                survey.broken.append(f"{name!r} ({error})")
        return survey

    def _first_shape(self) -> Shape:
        """Return the shape of the first image, or of the first decodable image of a raw dataset.

        Preceding broken images are recorded for `check_shapes`, which reports the total.
        """
        for position in self._subset.tolist():
            try:
                H, W, C = decode_image(self._store.read(position)).shape
                return H, W, C
            except BrokenImageError as error:
                if not self.is_raw:
                    raise self._broken(position, error) from error
                self._undecoded[position] = str(error)
        position, reason = next(iter(self._undecoded.items()))
        raise UserError(
            f"{self.path}: none of its {counted(len(self._undecoded), 'image')} can be decoded, the first is "
            f"{self._store.names[position]!r} ({reason}): copy or download them again"
        )

    def _read_shape(self, position: int, name: str) -> Shape:
        """Return (H, W, C) from the start of a file, or from the whole file if its header is longer."""
        if position in self._undecoded:
            raise BrokenImageError(self._undecoded[position])
        C, H, W = self.img_shape
        start = self._store.read_start(position, PNG_START if name.lower().endswith(".png") else START_BYTES)
        if starts_as_plain_png(start, (H, W, C)):
            return H, W, C
        if start.startswith(JPEG_START):
            with suppress(BrokenImageError):  # long header: the size is beyond `start`
                return read_shape(start)
        return read_shape(self._store.read(position))

    def _decode(self, position: int, shape: Shape) -> np.ndarray:
        """Decode the image [H, W, C] at a position of the store. Raises UserError if its shape is not `shape`."""
        try:
            pixels = decode_as(self._store.read(position), shape)
        except BrokenImageError as error:
            raise self._broken(position, error) from error
        if pixels.shape != shape:
            raise UserError(
                f"{self.path}: image {self._store.names[position]!r} is {describe_shape(pixels.shape)}, but the first "
                f"image is {describe_shape(shape)}: build the dataset with dataset_tool.py --width, --height and "
                "--channels"
            )
        return pixels

    def _broken(self, position: int, error: BrokenImageError) -> UserError:
        return UserError(
            f"{self.path}: image {self._store.names[position]!r} cannot be decoded ({error}): `dataset_tool.py check` "
            "lists all such images, and rebuilding the dataset with --skip-bad skips them"
        )

    def _read_labels(self, images: LabelledImages) -> tuple[Tensor, int]:
        """Return the labels of the images with flips, and c_dim, from all images of the store."""
        if not self.config.use_labels:
            return torch.zeros((len(self), 0)), 0
        labels = images.labels()
        if labels is None:
            raise UserError(
                f'{self.path} has no labels (dataset.json is missing or has "labels": null): train without labels '
                f"(--cond=false), or {self._advise_on_labels()}"
            )
        if labels.ndim == 1:
            self.notes += note_on_gaps(np.unique(labels).tolist(), self.class_names)
            c_dim = max(int(labels.max()) + 1, len(self.class_names or []))
        else:
            c_dim = labels.shape[1]
        chosen = torch.from_numpy(labels[self._subset.numpy()])
        return (torch.cat([chosen, chosen]) if self.config.mirror else chosen), c_dim

    def _content_hash(self) -> str:
        """Return the SHA-256 of dataset.json, `mirror`, and the names and fingerprints of the subset's images in order.

        The fingerprint is size and CRC-32 in a zip file, size and modification time in a folder. No image is read, so
        this takes seconds for a million images. A folder copied without its modification times has a different hash.
        """
        digest = hashlib.sha256(json_bytes(self._store))
        digest.update(f"mirror={self.config.mirror}".encode())
        records = self._store.records(self._subset.numpy())
        while part := "".join(islice(records, HASHED_PART)):
            digest.update(part.encode())
        return digest.hexdigest()


@contextmanager
def naming(option: str, path: str) -> Iterator[None]:
    """Begin the message of a UserError raised inside with the option that gave the path of a dataset."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(f"{option}={text}" if text.startswith(path) else f"{option}={path}: {text}") from None


def check_given(option: str, path: str | Path | None) -> None:
    """Raise UserError, which names the option, if the path of a dataset is given and does not exist."""
    if path is not None:
        with naming(option, str(path)):
            check_exists(Path(path))


class ImageFolderDataset(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Images of a folder or zip file, one per item, with the interface of StyleGAN2-ADA's class of the same name.

    Item i is an image uint8 [C, H, W] and its label float32 [label_dim]: one-hot or the vector in dataset.json, empty
    without `use_labels`. `max_size` keeps a random subset chosen by `random_seed`. `xflip` appends the flipped images.
    Raises UserError for unusable files, or if `resolution` is given and differs from the image size.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int | None = None,
        *,
        max_size: int | None = None,
        use_labels: bool = False,
        xflip: bool = False,
        random_seed: int = 0,
    ) -> None:
        try:
            config = DatasetConfig(
                path=str(path), use_labels=use_labels, max_images=max_size, mirror=xflip, seed=random_seed
            )
        except ConfigError as error:
            names = {"max_images": "max_size", "seed": "random_seed"}
            raise ConfigError(names.get(error.field, error.field), error.value, error.problem) from None
        self.images = ImageDataset(config)
        self.name = self.images.name
        self.image_shape = list(self.images.img_shape)  # [C, H, W]
        self.num_channels = self.images.img_shape[0]
        self.label_dim = self.images.c_dim
        self.label_shape = [self.label_dim]
        self.has_labels = self.label_dim > 0
        self.has_onehot_labels = self.has_labels and self.images.labels.ndim == 1
        if resolution is not None and self.image_shape[1:] != [resolution, resolution]:
            found = describe_shape((*self.images.img_shape[1:], self.num_channels))
            raise UserError(
                f"resolution={resolution}: the images in {path} are {found}; omit it, or build the dataset with "
                f"dataset_tool.py --width={resolution} --height={resolution}"
            )

    @property
    def resolution(self) -> int:
        """Side length of the images. Raises ValueError if the images are not square."""
        return square_resolution(self.image_shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images.images([self._position(index)])[0].numpy(), self.get_label(index)

    def get_label(self, index: int) -> np.ndarray:
        """Return the label of an item: float32 [label_dim]."""
        label = self.images.labels[self._position(index)]
        return encode_labels(label[None], self.label_dim)[0].numpy().copy()

    def get_details(self, index: int) -> EasyDict:
        """Return the origin of an item: `raw_idx` among all images, `xflip`, and `raw_label` as in dataset.json."""
        position = self._position(index)
        return EasyDict(
            raw_idx=self.images.original(position),
            xflip=position >= self.images.num_originals,
            raw_label=self.images.labels.numpy()[position].copy(),
        )

    def _position(self, index: int) -> int:
        """Return a nonnegative index. Raises IndexError, which also ends iteration."""
        return range(len(self))[index]


def _groups(values: np.ndarray, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the indices of each wanted value."""
    order = np.argsort(values, kind="stable")
    bounds = (np.searchsorted(values, wanted, side, sorter=order) for side in ("left", "right"))
    for first, end in zip(*bounds, strict=True):
        yield order[first:end]


def _choose_subset(num_images: int, config: DatasetConfig, held_out: bool) -> np.ndarray:
    """Return sorted image indices: the head of a random permutation, or its last `holdout` entries if `held_out`."""
    rest = num_images - config.holdout
    if rest < 1:
        raise ConfigError("holdout", config.holdout, f"the dataset has {num_images} images: leave some for training")
    count = rest if config.max_images is None else min(config.max_images, rest)
    if count == num_images:
        chosen = np.arange(num_images)[num_images if held_out else 0 :]
    else:
        order = _permutation(num_images, config.seed, 0)
        chosen = np.sort(order[rest:] if held_out else order[:count])
    if held_out and len(chosen) == 0:
        raise ValueError("no images are held out")
    return chosen


def kind_of_labels(path: str) -> LabelKind | None:
    """Return the label kind of a dataset, or None if the dataset is not available or has no labels."""
    try:
        return ImageDataset(DatasetConfig(path=path, use_labels=True)).label_kind
    except UserError:
        return None


def encode_labels(labels: Tensor, c_dim: int) -> Tensor:
    """Convert labels to network inputs, float32 [B, c_dim]: class indices [B] become one-hot, vectors are unchanged."""
    if labels.ndim == 1:
        return F.one_hot(labels, c_dim).float()
    if labels.shape[1] != c_dim:
        raise ValueError(f"label vectors have {labels.shape[1]} entries, but c_dim is {c_dim}")
    return labels.float()


def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0 ... num_images - 1 that depends on (seed, epoch) only.

    NumPy guarantees that RandomState and SeedSequence return the same numbers in every version.
    """
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(num_images)


class EpochSampler:
    """Mapping from positions in the run to image indices, a pure function of (seed, position).

    Position p belongs to epoch e = p // n and maps to image permutation_e[p % n]. Every epoch contains all n images
    once, and a run resumed at any position continues as if uninterrupted.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}  # cache: the epochs of the last call

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the image indices at positions start ... start + count - 1: int64 [count]."""
        n = self.num_images
        epochs = range(start // n, (start + max(count, 1) - 1) // n + 1)
        known = self._permutations
        self._permutations = {e: known[e] if e in known else _permutation(n, self.seed, e) for e in epochs}
        parts = [self._permutations[e][max(start - e * n, 0) : start + count - e * n] for e in epochs]
        return np.concatenate(parts)


def batches(
    dataset: ImageDataset,
    *,
    seed: int,
    position: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images uint8 [b, C, H, W], labels [b, ...]) on `device` endlessly, starting at `position` of the run.

    Each global batch covers `batch_size` positions; this rank yields a contiguous share, b = batch_size / world_size.
    Labels are as in `ImageDataset.labels`. With `workers`, other processes decode batches in advance; the order
    of the images does not depend on `workers`. Raises ValueError if the batch cannot be divided equally, UserError if
    the limit on open files is too low.
    """
    if workers:
        allow_open_files(workers)
    loader: DataLoader[tuple[Tensor, Tensor] | UserError] = DataLoader(
        _BatchReader(dataset),
        sampler=_RankSampler(len(dataset), seed, position, batch_size, rank, world_size),
        batch_size=None,  # the sampler yields whole batches
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_stop_signals if workers else None,
        generator=torch.Generator(),  # otherwise the loader would use the global generator
    )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = batch
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # the worker was killed during communication
        raise RuntimeError(f"DataLoader worker died ({error})") from error


def resident_batches(
    dataset: ImageDataset,
    *,
    seed: int,
    position: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same batches as `batches`, from a copy of all decoded images on `device`."""
    n = dataset.num_originals
    images = torch.empty((n, *dataset.img_shape), dtype=torch.uint8, device=device)
    for first in range(0, n, RESIDENT_PART):
        part = range(first, min(first + RESIDENT_PART, n))
        images[part.start : part.stop].copy_(dataset.images(part))
    labels = dataset.labels.to(device)
    for indices in _RankSampler(len(dataset), seed, position, batch_size, rank, world_size):
        index = torch.from_numpy(indices)
        if images.is_cuda:
            index = index.pin_memory().to(device, non_blocking=True)
        batch = images[index % n]
        if dataset.config.mirror:
            batch = torch.where((index >= n)[:, None, None, None], batch.flip(3), batch)
        yield batch, labels[index]


def fits_on_gpu(dataset: ImageDataset, device: torch.device) -> bool:
    """Return whether the decoded images are small enough to use `resident_batches` by default."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return dataset.num_originals * prod(dataset.img_shape) <= min(RESIDENT_BYTES, free / 4)


def allow_open_files(workers: int) -> None:
    """Raise this process's limit on open files to the number required by training with this many data workers.

    Each batch from a worker arrives as two open files. If the limit is exceeded, the receiving thread dies and the
    loader hangs. Raises UserError if the limit cannot be raised.
    """
    needed = OPEN_FILES + workers * OPEN_FILES_PER_WORKER
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if resource else (needed, needed)
    if soft >= needed or soft == -1:
        return
    if -1 < hard < needed:
        raise UserError(
            f"the limit on open files is {hard}, but training with --workers={workers} needs {needed}: raise the "
            f"limit with `ulimit -n {needed}`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals, which are sent to every process: the last steps still need this worker's batches."""
    signal.set_wakeup_fd(-1)  # the inherited descriptor belongs to the main process
    for number in Signals.HANDLED:
        signal.signal(number, signal.SIG_IGN)


class _BatchReader(Dataset[tuple[Tensor, Tensor] | UserError]):
    """Dataset of batches by index array; an item may be a UserError, because DataLoader would wrap a raised error."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Any) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.dataset.images(indices), self.dataset.labels[indices]
        except UserError as error:
            return error


class _RankSampler:
    """Endless iterator over one rank's indices of each global batch, starting at `position`."""

    def __init__(self, num_images: int, seed: int, position: int, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch of {batch_size} images cannot be divided equally among {world_size} processes")
        self.sampler = EpochSampler(num_images, seed)
        self.batch_size = batch_size
        self.share = batch_size // world_size
        self.start = position + rank * self.share

    def __iter__(self) -> Iterator[np.ndarray]:
        start = self.start
        while True:
            yield self.sampler.indices(start, self.share)
            start += self.batch_size
