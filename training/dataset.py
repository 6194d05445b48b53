"""Images and labels for training and metrics: a zip file or folder, sampled by position in the run."""

from __future__ import annotations

import copy
import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from training.data_sources.dataset_json import DatasetJson
from training.data_sources.files import labels_of, open_store, read_dataset_json
from training.data_sources.sizes import Shape, Size, Sizes, Survey, build_command, describe_shape, suggest_size

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

OPEN_FILES = 256  # of a process of training on a GPU, generously
OPEN_FILES_PER_WORKER = 16  # 4 batches ahead, of images and labels each, and pipes

# The largest set that is kept on the GPU unasked; each process of a machine decodes one for itself.
RESIDENT_BYTES = 2 * 2**30
RESIDENT_PART = 1024  # images that are decoded at a time
START_BYTES = 1 << 16  # of a file that is no PNG; most JPEGs tell their size in these: EXIF data before it have less
JPEG_START = b"\xff\xd8\xff"


LabelKind = Literal["classes", "vectors"]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Images to train on; `ImageDataset(config, held_out=True)` has those that `holdout` leaves out."""

    path: str = setting("", "Folder or zip file of images of one size, as dataset_tool.py writes it.")
    use_labels: bool = setting(False, "Conditioning on the labels of dataset.json.")
    max_images: int | None = setting(
        None, "Size of a random subset, chosen by `seed`; None: all images.", at_least=1, note="leave it out to use all"
    )
    holdout: int = setting(
        0, "Images, chosen by `seed`, that are left out of the training.", at_least=0, note="0 holds out nothing"
    )
    mirror: bool = setting(False, "Horizontal flips: every image is also shown mirrored, which doubles the set.")
    seed: int = setting(0, "Seed of the subset and of the held-out images.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)


class ImageDataset:
    """All images of a folder or zip file under the indices 0 ... len - 1.

    With `mirror`, index i < len/2 is an image and i + len/2 the same image flipped: x-flip is an index, not a coin
    toss, so an epoch shows each image exactly once each way round.

    num_originals   images before `mirror` doubles them
    name            file or folder name without suffix
    img_shape       (C, H, W), from the first image, in a raw set the first that can be decoded; the others are
                    checked when they are decoded
    c_dim           number of classes or length of the label vectors; 0 without labels or without `use_labels`
    has_labels      whether the set has labels, used or not
    labels          int64 class numbers [len], float32 vectors [len, c_dim], or [len, 0] when c_dim is 0
    label_kind      "classes" or "vectors", None when c_dim is 0
    class_names     list of str, or None
    meta            the keys of dataset.json other than "labels": how the set was made
    notes           what was recognised although it is not where or as it usually is, one sentence each
    content_hash    hex digest that names the images behind the indices, see `_content_hash`

    Objects can be pickled and used in forked or spawned workers. Everything that is wrong with the files raises
    UserError naming the file.
    """

    def __init__(self, config: DatasetConfig, *, held_out: bool = False) -> None:
        if not config.path:
            raise UserError("no data set given: name a folder or .zip file of images")
        self.config = config
        self.path = Path(config.path)
        self.name = self.path.stem if self.path.suffix.lower() == ".zip" else self.path.resolve().name
        self._store = open_store(self.path)
        content = read_dataset_json(self._store)
        self.meta = content.meta
        self.notes = [*self._store.notes, *content.notes]
        self.class_names = content.class_names
        self.has_labels = content.labels is not None

        self._subset = _choose_subset(len(self._store.names), config, held_out)  # positions in the store's names
        self._undecoded: dict[str, str] = {}  # names of images before the one that tells the shape, and what is wrong
        H, W, C = self._first_shape()
        self.img_shape = (C, H, W)
        self.labels, self.c_dim = self._read_labels(content)
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
        """Return the position, among all images of the file, of the one that an index shows."""
        return int(self._subset[index % self.num_originals])

    def with_mirror(self, mirror: bool) -> ImageDataset:
        """Return the same images with or without their flips; the open files are shared."""
        if mirror == self.config.mirror:
            return self
        other = copy.copy(self)
        other.config = replace(self.config, mirror=mirror)
        labels = self.labels[: self.num_originals]
        other.labels = torch.cat([labels, labels]) if mirror else labels
        other.content_hash = other._content_hash()
        return other

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Decode a batch: uint8 [B, C, H, W]. Raises UserError naming an image that is broken or of another shape."""
        C, H, W = self.img_shape
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"image index out of range: {index.min()} ... {index.max()} of {len(self)} images")

        n = len(self._subset)
        batch = np.empty((len(index), H, W, C), dtype=np.uint8)
        for k, position in enumerate(self._subset[index % n]):
            batch[k] = self._decode(int(position), (H, W, C))
        mirrored = index >= n
        batch[mirrored] = batch[mirrored][:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))

    @property
    def is_raw(self) -> bool:
        """Whether the images are as somebody has put them there, of any kinds, not a set that dataset_tool.py made."""
        return "format_version" not in self.meta

    def _way_to_labels(self) -> str:
        """Say how to build a set that has labels, and that can be trained on, from the images."""
        if not self.is_raw:
            return "build the set again from its source, with dataset_tool.py --labels-from-folders"
        command = build_command(self.config.path, *self._survey().options(suggest_size), "--labels-from-folders")
        return f"if its folders are classes, build a set with labels: {command}"

    def check_shapes(self, choose_size: Callable[[Sizes], Size | None] = suggest_size) -> None:
        """Raise ConfigError where headers are broken or promise other sizes or channels: how many, and what to do.

        The command that it names builds a set of the size that `choose_size` chooses from counts of (width, height).
        Sets made by dataset_tool.py were checked when they were made and are passed over.
        """
        if not self.is_raw:
            return
        if problem := self._survey().describe_mixture(str(self.path), choose_size):
            raise ConfigError("data.path", str(self.path), problem)

    def _survey(self) -> Survey:
        """Read the headers of all images."""
        survey = Survey()
        for position in tqdm(self._subset, "Sizes", unit="images", disable=None, leave=False):
            name = self._store.names[position]
            try:
                survey.note(name, self._read_shape(name))
            except BrokenImageError as error:
                survey.broken.append(f"{name!r} ({error})")
        return survey

    def _first_shape(self) -> Shape:
        """Return the shape of the first image; of raw images that of the first that can be decoded.

        The broken ones before it are left to `check_shapes`, which tells how many there are in all.
        """
        for position in self._subset:
            name = self._store.names[position]
            try:
                H, W, C = decode_image(self._store.read(name)).shape
                return H, W, C
            except BrokenImageError as error:
                if not self.is_raw:
                    raise self._broken(name, error) from error
                self._undecoded[name] = str(error)
        name, reason = next(iter(self._undecoded.items()))
        raise UserError(
            f"{self.path}: none of its {counted(len(self._undecoded), 'image')} can be decoded, the first is {name!r} "
            f"({reason}): copy or download them again"
        )

    def _read_shape(self, name: str) -> Shape:
        """(H, W, C) that the start of a file promises, or all of it where that does not suffice."""
        if name in self._undecoded:
            raise BrokenImageError(self._undecoded[name])
        C, H, W = self.img_shape
        start = self._store.read_start(name, PNG_START if name.lower().endswith(".png") else START_BYTES)
        if starts_as_plain_png(start, (H, W, C)):
            return H, W, C
        if start.startswith(JPEG_START):
            with suppress(BrokenImageError):  # a long header: the size comes later
                return read_shape(start)
        return read_shape(self._store.read(name))

    def _decode(self, position: int, shape: Shape) -> np.ndarray:
        """Image [H, W, C] at a position of the store, required to have `shape`."""
        name = self._store.names[position]
        try:
            pixels = decode_as(self._store.read(name), shape)
        except BrokenImageError as error:
            raise self._broken(name, error) from error
        self._require_shape(name, pixels.shape, shape)
        return pixels

    def _broken(self, name: str, error: BrokenImageError) -> UserError:
        return UserError(
            f"{self.path}: image {name!r} cannot be decoded ({error}): `dataset_tool.py check` lists all such "
            "images, and building the set with --skip-bad leaves them out"
        )

    def _require_shape(self, name: str, found: tuple[int, ...], shape: Shape) -> None:
        if found != shape:
            raise UserError(
                f"{self.path}: image {name!r} is {describe_shape(found)}, but the first image is "
                f"{describe_shape(shape)}: build the set with dataset_tool.py --width, --height and --channels"
            )

    def _read_labels(self, content: DatasetJson) -> tuple[Tensor, int]:
        if not self.config.use_labels:
            return torch.zeros((len(self), 0)), 0
        labels = labels_of(self._store, content)
        if labels is None:
            raise UserError(
                f'{self.path} has no labels (dataset.json is missing or says "labels": null): train without labels, '
                f"or {self._way_to_labels()}"
            )
        if isinstance(labels[0], int):
            self.notes += note_on_gaps(labels, self.class_names)
            table = torch.tensor(labels, dtype=torch.int64)  # [num_images]
            c_dim = max(int(table.max()) + 1, len(self.class_names or []))
        else:
            table = torch.tensor(labels, dtype=torch.float32)  # [num_images, c_dim]
            c_dim = table.shape[1]
        chosen = table[torch.from_numpy(self._subset)]
        return (torch.cat([chosen, chosen]) if self.config.mirror else chosen), c_dim

    def _content_hash(self) -> str:
        """SHA-256 over dataset.json, `mirror`, and the name and fingerprint of each image of the subset in order.

        The fingerprint is size and CRC-32 in a zip file, size and time of change in a folder: no image is read, so
        this takes seconds for a million images. A folder that is copied without its times gets another hash.
        """
        digest = hashlib.sha256(self._store.read_json() if self._store.json_name else b"")
        digest.update(f"mirror={self.config.mirror}".encode())
        for position in self._subset:
            name = self._store.names[position]
            digest.update(f"\n{name!r} {self._store.fingerprint(name)}".encode())
        return digest.hexdigest()


class ImageFolderDataset(Dataset[tuple[np.ndarray, np.ndarray]]):
    """The images of a folder or zip file, one at a time, by the interface of StyleGAN2-ADA's class of this name.

    Item i is an image uint8 [C, H, W] and its label float32 [label_dim]: one-hot, or the vector in dataset.json; empty
    without `use_labels`. `max_size` keeps a random subset chosen by `random_seed`. `xflip` appends the flipped images.
    Raises UserError for files that cannot be used, and for images that are not of `resolution`, if it is given.
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
                f"resolution={resolution}: the images in {path} are {found}; leave it out, or build the set with "
                f"dataset_tool.py --width={resolution} --height={resolution}"
            )

    @property
    def resolution(self) -> int:
        """Side of the images. Raises ValueError if they are not square."""
        return square_resolution(self.image_shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images.images([self._position(index)])[0].numpy(), self.get_label(index)

    def get_label(self, index: int) -> np.ndarray:
        """Label float32 [label_dim] of an item."""
        label = self.images.labels[self._position(index)]
        return encode_labels(label[None], self.label_dim)[0].numpy().copy()

    def get_details(self, index: int) -> EasyDict:
        """Where an item comes from: `raw_idx` among all images of the file, `xflip`, `raw_label` as in dataset.json."""
        position = self._position(index)
        return EasyDict(
            raw_idx=self.images.original(position),
            xflip=position >= self.images.num_originals,
            raw_label=self.images.labels.numpy()[position].copy(),
        )

    def _position(self, index: int) -> int:
        """Index from 0 up. Raises IndexError, which also ends iteration."""
        return range(len(self))[index]


def _choose_subset(num_images: int, config: DatasetConfig, held_out: bool) -> np.ndarray:
    """The first images of a random order to train with, the last to hold out; both in their original order."""
    rest = num_images - config.holdout
    if rest < 1:
        raise ConfigError("holdout", config.holdout, f"the data set has {num_images} images: leave some to train with")
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
    """Return what the labels of a data set are, None where it is not here or has none."""
    try:
        return ImageDataset(DatasetConfig(path=path, use_labels=True)).label_kind
    except UserError:
        return None


def encode_labels(labels: Tensor, c_dim: int) -> Tensor:
    """Labels as networks take them: class numbers [B] become one-hot, vectors stay; float32 [B, c_dim]."""
    if labels.ndim == 1:
        return F.one_hot(labels, c_dim).float()
    if labels.shape[1] != c_dim:
        raise ValueError(f"label vectors have {labels.shape[1]} entries, but c_dim is {c_dim}")
    return labels.float()


def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of 0 ... num_images - 1 as a function of (seed, epoch).

    RandomState and SeedSequence promise the same numbers in every version of numpy.
    """
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(num_images)


class EpochSampler:
    """Which image is shown at which position of the run, a pure function of (seed, position).

    Position p belongs to epoch e = p // n and shows image permutation_e[p % n], so every epoch shows all n images
    once, and a run that resumes at any position goes on as if it had not stopped.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}  # of the epochs of the last call

    def indices(self, start: int, count: int) -> np.ndarray:
        """Image indices at the positions start ... start + count - 1: int64 [count]."""
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
    """Yield (images uint8 [b, C, H, W], labels [b, ...]) on `device` for ever, from `position` of the run on.

    Each global batch covers `batch_size` positions, of which this rank gets its contiguous share of
    b = batch_size / world_size. Labels are as in `ImageDataset.labels`. With `workers` the batches are decoded ahead
    in other processes; which images come does not depend on it. Raises ValueError if the shares are not equal,
    UserError if this shell allows too few open files.
    """
    if workers:
        allow_open_files(workers)
    loader: DataLoader[tuple[Tensor, Tensor] | UserError] = DataLoader(
        _BatchReader(dataset),
        sampler=_ShareOfBatches(len(dataset), seed, position, batch_size, rank, world_size),
        batch_size=None,  # the sampler yields whole batches
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_main_process if workers else None,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = batch
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # while the loader was talking to it
        raise RuntimeError(f"DataLoader worker has gone ({error})") from error


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
    """Yield what `batches` yields from a copy of all images on `device`: decoded once, picked and flipped there."""
    n = dataset.num_originals
    images = torch.empty((n, *dataset.img_shape), dtype=torch.uint8, device=device)
    for first in range(0, n, RESIDENT_PART):
        part = range(first, min(first + RESIDENT_PART, n))
        images[part.start : part.stop].copy_(dataset.images(part))
    labels = dataset.labels.to(device)
    for indices in _ShareOfBatches(len(dataset), seed, position, batch_size, rank, world_size):
        index = torch.from_numpy(indices)
        if images.is_cuda:
            index = index.pin_memory().to(device, non_blocking=True)
        batch = images[index % n]
        if dataset.config.mirror:
            batch = torch.where((index >= n)[:, None, None, None], batch.flip(3), batch)
        yield batch, labels[index]


def fits_on_gpu(dataset: ImageDataset, device: torch.device) -> bool:
    """Whether the images are few enough for `resident_batches` without being asked to."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return dataset.num_originals * prod(dataset.img_shape) <= min(RESIDENT_BYTES, free / 4)


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files to what training needs with so many workers for the images.

    Each batch of a worker is passed on as two open files. When they find no room the thread that takes them ends, and
    the loader waits for ever. Raises UserError where the limit cannot be raised so far.
    """
    needed = OPEN_FILES + workers * OPEN_FILES_PER_WORKER
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if resource else (needed, needed)
    if soft >= needed or soft == -1:
        return
    if -1 < hard < needed:
        raise UserError(
            f"this shell allows {hard} open files, and training with --workers={workers} needs {needed}: raise that "
            f"limit, `ulimit -n {needed}`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ignore what asks training to stop and reaches all its processes: the last steps need their batches."""
    signal.set_wakeup_fd(-1)  # inherited, it would answer there for this process
    for number in Signals.HANDLED:
        signal.signal(number, signal.SIG_IGN)


class _BatchReader(Dataset[tuple[Tensor, Tensor] | UserError]):
    """Item = one batch, by the array of its indices, or the error: raised here, the loader would bury it in a trace."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Any) -> tuple[Tensor, Tensor] | UserError:
        try:
            return self.dataset.images(indices), self.dataset.labels[indices]
        except UserError as error:
            return error


class _ShareOfBatches:
    """One rank's indices of each global batch from `position` on, without end."""

    def __init__(self, num_images: int, seed: int, position: int, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch of {batch_size} images cannot be shared by {world_size} processes equally")
        self.sampler = EpochSampler(num_images, seed)
        self.batch_size = batch_size
        self.share = batch_size // world_size
        self.start = position + rank * self.share

    def __iter__(self) -> Iterator[np.ndarray]:
        start = self.start
        while True:
            yield self.sampler.indices(start, self.share)
            start += self.batch_size
