"""Sources that dataset_tool.py can read, as iterables of named and labelled images."""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dnnlib.config import FLOAT32_MAX, UserError
from dnnlib.image_files import BrokenImageError
from dnnlib.util import counted, describe_error
from training.data_sources.bounds import (
    PACKED_ERRORS,
    Member,
    Unpacked,
    load_npz,
    open_packed,
    read_tar,
)
from training.data_sources.cifar import read_cifar
from training.data_sources.classes import classes_from_folders, note_on_folders
from training.data_sources.dataset_json import MAX_CLASS, Label
from training.data_sources.files import FileStore, FolderStore, labels_of, open_store, read_dataset_json
from training.data_sources.items import SHAPES, Item, Source, SourceBase, oversize
from training.data_sources.listing import list_files
from training.data_sources.lmdb_file import LmdbFile
from training.data_sources.parts import Parts, find_parts, note_on_parts, snapshot_folder
from training.data_sources.shapes import KINDS, draw_scenes, scene_labels
from training.data_sources.shards import ShardSource
from training.data_sources.tables import TableSource

SUPPORTED = (
    "a folder or .zip of images, cifar-10-python.tar.gz, cifar-100-python.tar.gz, stl10_binary.tar.gz, "
    "*-images-idx3-ubyte.gz, an LSUN lmdb folder, .npy, .npz, Parquet or Arrow files, WebDataset tar files, a "
    "folder of such files, such as a Hugging Face dataset, or the word shapes"
)


FolderLevel = int | Literal["auto"]


def open_source(
    path: str,
    *,
    labels_from_folders: FolderLevel | None,
    drawing: Drawing,
    split: str | None = None,
    skip_missing: bool = False,
) -> Source:
    """Open a source of any supported kind. Raises UserError if `path` is missing, corrupt or not a supported source.

    `labels_from_folders`: level of the class folders, 1 for the top. `split`: split to read, None for the default.
    `skip_missing`: accept missing files in a numbered series.
    """
    if path != SHAPES:
        read_labels = labels_from_folders is None
        source = _open_path(path, read_labels=read_labels, split=split, skip_missing=skip_missing)
    else:
        _refuse_split(path, split)
        source = ShapesSource(drawing)
    if isinstance(source, FileSource | ShardSource):
        _apply_folder_labels(source, labels_from_folders, path)
    elif labels_from_folders is not None:
        if isinstance(source, TableSource):
            raise UserError(f"{path} holds tables, whose labels come from a column: leave out --labels-from-folders")
        raise UserError(f"--labels-from-folders needs a folder, .zip or tar file of images; {path} is of another kind")
    return source


def _open_path(path: str, *, read_labels: bool, split: str | None, skip_missing: bool) -> Source:
    if not Path(path).exists():
        raise UserError(f"--source={path} does not exist: give {SUPPORTED}")
    if not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"--source={path} is neither a regular file nor a folder: give {SUPPORTED}")
    location = snapshot_folder(Path(path))
    if location.is_dir() and (location / "data.mdb").exists():
        _refuse_split(path, split)
        return LmdbSource(location)
    listing = list_files(location) if location.is_dir() else None
    if parts := find_parts(location, listing):
        name = Path(path).resolve().name
        if parts.kind != "tar":
            return TableSource(parts, name, split, skip_missing=skip_missing)
        return _open_shards(parts, name, read_labels=read_labels, split=split, skip_missing=skip_missing)
    _refuse_split(path, split)
    if listing is not None or location.suffix.lower() == ".zip":
        return FileSource(open_store(location, listing), read_labels=read_labels)
    return _open_file(location, read_labels=read_labels)


def _refuse_split(path: str, split: str | None) -> None:
    if split is not None:
        raise UserError(f"--split={split}: {path} has no splits: leave the option out, or give the folder of a split")


def _apply_folder_labels(source: FileSource | ShardSource, level: FolderLevel | None, path: str) -> None:
    """Set labels from folders at `level`; if `level` is None, add a note on folders that could be classes."""
    if level is not None:
        known = None if level == "auto" else level
        source.labels, source.class_names, notes = classes_from_folders(source.names, known, path)
        source.notes += notes
    elif source.may_have_classes and (note := note_on_folders(source.names)):
        source.notes.append(note)


def _open_shards(parts: Parts, name: str, *, read_labels: bool, split: str | None, skip_missing: bool) -> ShardSource:
    paths, notes = parts.choose(split, lambda paths: counted(len(paths), "shard"), skip_missing=skip_missing)
    source = ShardSource(name, paths, read_json=read_labels)
    source.notes[:0] = [*parts.notes, *notes]
    source.add_left_out(parts.left_out)
    return source


def _open_file(path: Path, *, read_labels: bool) -> Source:
    if path.suffix.lower() in (".npy", ".npz"):
        return _open_arrays(path)
    if re.search(r"idx3-ubyte(\.gz)?$", path.name):
        return _open_idx(path)
    return _open_tar(path, read_labels=read_labels)


class FileSource(SourceBase):
    """Images in a folder or zip file, with labels from dataset.json."""

    def __init__(self, store: FileStore, *, read_labels: bool) -> None:
        self.name = store.path.resolve().name
        self.names = store.names
        self.left_out = store.left_out
        self.notes = [*store.notes, *note_on_parts(store.left_out)]
        self.may_have_classes = store.json_name is None  # a dataset.json without labels means no classes
        self._store = store
        if read_labels:
            content = read_dataset_json(store)
            self.class_names, self.labels = content.class_names, labels_of(store, content)
            self.notes += content.notes

    def __len__(self) -> int:
        return len(self._store.names)

    def __iter__(self) -> Iterator[Item]:
        return items_of(self._store)


def items_of(store: FileStore) -> Iterator[Item]:
    """Yield the images of a folder or zip file in the order of their names."""
    for position, name in enumerate(store.names):
        yield Item(name, _content(store, position))


def _content(store: FileStore, position: int) -> bytes | Path | BrokenImageError:
    if isinstance(store, FolderStore):  # read in the workers, because reading many small files sequentially is slow
        return store.path / store.names[position]
    try:
        return store.read(position)
    except BrokenImageError as error:
        return error


class ArraySource(SourceBase):
    """Images in an array, uint8 [N, H, W, C], in memory or memory-mapped."""

    _BATCH = 64  # images per copy to contiguous memory

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: list[Label] | None = None,
        class_names: list[str] | None = None,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.name = name
        self.labels = labels
        self.class_names = class_names
        self.pad = pad
        self.channels = 1 if images.shape[3] == 1 else 3
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self._images), self._BATCH):
            for k, pixels in enumerate(np.ascontiguousarray(self._images[start : start + self._BATCH]), start):
                yield Item(f"image {k}", pixels)


def _open_arrays(path: Path) -> ArraySource:
    """Open an .npy file with images, or an .npz file with `images` (or a single array) and optional `labels`."""
    try:
        arrays = _load_arrays(path)
    except Exception as error:  # numpy raises ValueError, BadZipFile, zlib.error, SyntaxError, ... for corrupt files
        raise UserError(f"{path} cannot be read as numpy arrays ({error}): write it again with numpy.save") from error
    labels = arrays.pop("labels", None)
    images = arrays.get("images", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if images is None:
        raise UserError(f"{path} holds the arrays {', '.join(arrays)}: rename the array of images to `images`")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3, 4) or 0 in images.shape:
        raise UserError(
            f"{path}: images are {images.dtype} of shape {list(images.shape)}, but must be uint8 [N, H, W] or "
            "[N, H, W, C] with 1, 3 or 4 channels"
        )
    if labels is not None and not _are_labels(labels, len(images)):
        raise UserError(
            f"{path}: labels are {labels.dtype} of shape {list(labels.shape)}, but must be class numbers from 0 [N] "
            f"or float vectors [N, c_dim] for the {len(images)} images"
        )
    return ArraySource(path.name, images, None if labels is None else labels.tolist())


def _are_labels(labels: np.ndarray, count: int) -> bool:
    if labels.dtype.kind in "iu":
        return labels.shape == (count,) and labels.min() >= 0 and labels.max() <= MAX_CLASS
    if labels.dtype.kind != "f" or labels.ndim != 2 or len(labels) != count:
        return False
    return bool((np.abs(labels) <= FLOAT32_MAX).all())


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() == ".npy":
        return {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
    return load_npz(path)


def _open_idx(path: Path) -> ArraySource:
    """Open images in MNIST's idx format, with labels if the corresponding label file is in the same folder.

    28x28 images are padded to 32x32, as in StyleGAN2-ADA.
    """
    images = _read_idx(path, num_axes=3)
    labels_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels = None
    if labels_path != path and labels_path.exists():
        labels = _read_idx(labels_path, num_axes=1).tolist()
        if len(labels) != len(images):
            raise UserError(
                f"{labels_path} has {len(labels)} labels for {len(images)} images: download both files again"
            )
    return ArraySource(path.name, images[..., None], labels, pad=2 if images.shape[1:] == (28, 28) else 0)


def _read_idx(path: Path, *, num_axes: int) -> np.ndarray:
    try:
        with open_packed(path) as file:
            header = file.read(4 + 4 * num_axes)
            shape = [int.from_bytes(header[k : k + 4], "big") for k in range(4, 4 + 4 * num_axes, 4)]
            size = math.prod(shape)
            if header[:4] != bytes([0, 0, 8, num_axes]) or not size:
                raise UserError(f"{path} is not an idx file of bytes with {num_axes} axes: download it again")
            data = file.read(size)
    except PACKED_ERRORS as error:
        raise UserError(f"{path} cannot be read ({describe_error(error)}): download it again") from error
    if len(data) != size:
        raise UserError(f"{path} ends after {len(data)} of {size} bytes: download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _open_tar(path: Path, *, read_labels: bool) -> Source:
    """Open CIFAR or STL-10, identified by the folder in the archive, or a WebDataset shard."""
    try:
        with open_packed(path) as stream:
            members = read_tar(stream)
            first = _first_member(members, path)
            folder = first.name.split("/", 1)[0]
            if folder in ("cifar-10-batches-py", "cifar-100-python"):
                images, labels, class_names = read_cifar(stream, chain([first], members), path, folder)
                return ArraySource(path.name, images, labels, class_names)
            if folder == "stl10_binary":
                return StlSource(path, chain([first], members))
    except PACKED_ERRORS as error:
        raise UserError(f"{path} is damaged ({describe_error(error)}): download it again") from error
    return ShardSource(path.name, [path], read_json=read_labels)


def _first_member(members: Iterator[Member], path: Path) -> Member:
    """Return the first member of an archive. Raises UserError if the file is not an archive."""
    try:
        return next(members)
    except (StopIteration, tarfile.HeaderError):
        raise UserError(f"{path} is of an unknown kind: give {SUPPORTED}") from None


class StlSource(SourceBase):
    """Training and unlabeled images of STL-10 (Coates et al. 2011): 105,000 images, read without labels.

    The archive, 2.9 GB when unpacked, is read as a stream.
    """

    channels: int | None = 3
    _PARTS = ("stl10_binary/train_X.bin", "stl10_binary/unlabeled_X.bin")
    _IMAGE_BYTES = 3 * 96 * 96

    def __init__(self, path: Path, members: Iterable[Member]) -> None:
        super().__init__()
        self.name = path.name
        self._path = path
        found: dict[str, int] = {}
        for member in members:
            if member.name in self._PARTS and member.is_plain:
                found[member.name] = member.size
            if len(found) == len(self._PARTS):
                break
        for part in self._PARTS:
            if not found.get(part) or found[part] % self._IMAGE_BYTES:
                raise UserError(f"{path} has no {part} with whole 96x96 images: download the archive again")
        self._count = sum(found.values()) // self._IMAGE_BYTES

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        try:
            with open_packed(self._path) as stream:
                for member in read_tar(stream):
                    if member.name in self._PARTS:
                        yield from self._read(stream, member)
        except (*PACKED_ERRORS, ValueError) as error:
            raise UserError(f"{self._path} is damaged ({describe_error(error)}): download it again") from error

    def _read(self, stream: Unpacked, member: Member) -> Iterator[Item]:
        for k in range(member.size // self._IMAGE_BYTES):
            planes = np.frombuffer(stream.read(self._IMAGE_BYTES), np.uint8).reshape(3, 96, 96)
            yield Item(f"{member.name} image {k}", planes.transpose(2, 1, 0).copy())  # from [C, W, H]


class LmdbSource(SourceBase):
    """LSUN category: an lmdb database whose values are encoded images, in the order of the keys."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = path.name
        self._path = path
        try:
            self._file = LmdbFile(path)
        except OSError as error:
            raise UserError(f"{path}/data.mdb cannot be read ({error.strerror}): download it again") from error
        except ValueError as error:
            raise UserError(f"{path} cannot be read as lmdb ({error}): download it again") from error
        if not self._file.num_entries:
            raise UserError(f"{path} holds no images: download it again")

    def __len__(self) -> int:
        return self._file.num_entries

    def __iter__(self) -> Iterator[Item]:
        try:
            for key, value in self._file:
                yield Item(repr(key), oversize(len(value)) or value)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} is damaged ({describe_error(error)}): download it again") from error


class Drawing(NamedTuple):
    """Settings of the drawn scenes of --source=shapes."""

    seed: int
    num_images: int
    width: int
    height: int


class ShapesSource(SourceBase):
    """Drawn scenes, see `training.data_sources.shapes`; the label is the kind of the front shape."""

    name = SHAPES
    channels: int | None = 3
    _BATCH = 256
    _BATCH_PIXELS = 1 << 22
    _LABEL_BATCH = 1 << 16
    _MAX_SCENES = 10_000_000

    def __init__(self, drawing: Drawing) -> None:
        super().__init__()
        if drawing.num_images > self._MAX_SCENES:
            raise UserError(f"--max-images={drawing.num_images}: shapes has at most {self._MAX_SCENES} images")
        self.class_names = list(KINDS)
        self.labels = []
        for indices in self._batches(drawing.num_images, self._LABEL_BATCH):
            self.labels += scene_labels(indices, seed=drawing.seed).tolist()
        self._drawing = drawing

    def __len__(self) -> int:
        return self._drawing.num_images

    def __iter__(self) -> Iterator[Item]:
        seed, num_images, width, height = self._drawing
        for indices in self._batches(num_images, min(self._BATCH, self._BATCH_PIXELS // (width * height) or 1)):
            images = draw_scenes(indices, seed=seed, width=width, height=height)
            for k, pixels in zip(indices, images, strict=True):
                yield Item(f"scene {k}", pixels)

    @staticmethod
    def _batches(num_images: int, size: int) -> Iterator[np.ndarray]:
        for start in range(0, num_images, size):
            yield np.arange(start, min(start + size, num_images))
