"""WebDataset tar archives, in which consecutive members with the same name up to the first dot form a sample."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.image_files import BrokenImageError
from dnnlib.images import IMAGE_SUFFIXES
from dnnlib.util import describe_error, parse_json
from training.data_sources.bounds import PACKED_ERRORS, Member, Unpacked, open_packed, read_tar
from training.data_sources.dataset_json import is_dataset_json
from training.data_sources.files import MAX_JSON_BYTES, find_json, labels_of, read_dataset_json
from training.data_sources.items import Item, SourceBase, oversize
from training.data_sources.labels import to_labels
from training.data_sources.listing import LINKS, SPECIAL_FILES, LeftOut, describe_left_out, hidden_kind, split_images

_MAX_LABEL_BYTES = 1 << 20
_TEXTS = ("cls", "class", "label")  # extensions of members with a class number or name
_KEYS = ("cls", "label", "labels", "class", "class_id", "label_id", "class_name", "label_name", "category")  # in .json
_SEVERAL = re.compile(r"-?\d{1,9}([\s,]+-?\d{1,9})+", re.ASCII)  # several class numbers in a string
_BLOCK = 512  # minimum number of bytes of a member


class _Location(NamedTuple):
    """Member of a shard: index of the shard, offset in the unpacked shard, size in bytes, name."""

    shard: int
    start: int
    size: int
    name: str


@dataclass
class _Sample:
    """Members of a sample: images, label candidates (or errors) keyed by extension, and names of other members."""

    shard: int
    key: str
    images: list[_Location] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)

    @property
    def label(self) -> Any:
        return next((self.labels[kind] for kind in (*_TEXTS, "json") if self.labels.get(kind) is not None), None)


@dataclass
class _OtherMembers:
    """Members outside of samples: hidden files, links and special files by kind, and all dataset.json files."""

    left_out: LeftOut = field(default_factory=dict)
    jsons: list[_Location] = field(default_factory=list)


@dataclass(kw_only=True)
class _Archive:
    """LabelledStore of a single tar archive."""

    path: Path
    names: list[str]
    json_name: str | None
    json_location: _Location

    def read_json(self) -> bytes:
        if self.json_location.size > MAX_JSON_BYTES:
            raise BrokenImageError(f"{self.json_location.size} bytes, more than the limit of {MAX_JSON_BYTES}")
        with _open(self.path) as stream:
            stream.skip(self.json_location.start)
            return stream.read(self.json_location.size)


class ShardSource(SourceBase):
    """Images of tar archives, read sequentially; `names` are the names of the members.

    A first pass reads names and labels. With labels, each sample contributes one image; without labels, all its
    images. With `read_json`, the labels of a single archive may also be in a dataset.json.
    """

    channels: int | None = 3

    def __init__(self, name: str, paths: list[Path], *, read_json: bool) -> None:
        super().__init__()
        self.name = name
        self._paths = paths
        others = _OtherMembers()
        samples = list(
            tqdm(_read_samples(paths, others), desc="names and labels", unit=" samples", disable=None, leave=False)
        )
        with_images = [sample for sample in samples if sample.images]
        self.add_left_out(others.left_out)
        self.add_left_out(split_images(name for sample in with_images for name in sample.others)[1])
        self.add_left_out({"samples without an image": [sample.key for sample in samples if not sample.images]})
        if error := next((sample.label for sample in with_images if isinstance(sample.label, UserError)), None):
            raise error
        _refuse_labels_apart(paths, samples)
        if any(sample.label is not None for sample in with_images):
            further = [image.name for sample in with_images for image in _fewest_dots_first(sample)[1:]]
            self.add_left_out({"further images of a sample": further})
            self.labels, self.class_names = to_labels(
                [sample.label for sample in with_images],
                lambda k: f"{paths[with_images[k].shard]}: sample {with_images[k].key!r}",
            )
            self._images = [_fewest_dots_first(sample)[0] for sample in with_images]
        else:
            self._images = [image for sample in with_images for image in sample.images]
        if not self._images:
            kinds = [line.strip() for line in describe_left_out(others.left_out, verbose=False)]
            held = f"{samples[0].key!r:.80}: check the path" if samples else ", ".join(kinds) or "nothing"
            raise UserError(f"{name} holds no images ({', '.join(IMAGE_SUFFIXES)}); it holds {held}")
        self.names = [image.name for image in self._images]
        self.may_have_classes = self.labels is None
        if others.jsons and read_json:
            self._read_json_labels({location.name: location for location in others.jsons})

    def _read_json_labels(self, locations: dict[str, _Location]) -> None:
        """Read labels from a dataset.json that applies to all images; otherwise add a note with the reason."""
        found, notes = find_json(list(locations), self.names)
        if self.labels is not None:
            notes = [f"{next(iter(locations))} is not read: the samples have labels"]
        elif found is not None and len(self._paths) > 1:
            notes = [
                f"{found} is not read: to use it, unpack all {len(self._paths)} shards into a folder, and give the "
                "folder"
            ]
        elif found is not None:
            store = _Archive(path=self._paths[0], names=self.names, json_name=found, json_location=locations[found])
            content = read_dataset_json(store)
            self.labels, self.class_names = labels_of(store, content), content.class_names
            self.may_have_classes = False  # a dataset.json without labels states that there are no classes
            notes += content.notes
        self.notes += notes

    def add_left_out(self, left_out: LeftOut) -> None:
        for kind, names in left_out.items():
            if names:
                self.left_out[kind] = [*self.left_out.get(kind, ()), *names]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Item]:
        for shard, images in groupby(self._images, key=lambda image: image.shard):
            path = self._paths[shard]
            with _open(path) as stream:
                for image in images:
                    stream.skip(image.start - stream.position)
                    yield Item(f"{path.name}: {image.name}", _content(stream, image))


def _content(stream: Unpacked, image: _Location) -> bytes | BrokenImageError:
    return oversize(image.size) or stream.read(image.size)


def _fewest_dots_first(sample: _Sample) -> list[_Location]:
    """Sort the images of a sample by the number of dots in the extension."""
    return sorted(sample.images, key=lambda image: split_name(image.name)[1].count("."))


def _refuse_labels_apart(paths: list[Path], samples: list[_Sample]) -> None:
    """Raise UserError if an image and its label are not consecutive members of a shard."""
    unlabelled = {(sample.shard, sample.key) for sample in samples if sample.images and sample.label is None}
    for sample in samples if unlabelled else ():
        if not sample.images and (sample.shard, sample.key) in unlabelled and sample.label is not None:
            raise UserError(
                f"{paths[sample.shard]}: the image and the label of sample {sample.key!r:.80} are not consecutive: "
                "write the members of each sample one after the other, as `tar --sort=name` does"
            )


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into the key of its sample and its extension, the part after the first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


@contextmanager
def _open(path: Path) -> Iterator[Unpacked]:
    """Open an archive. Raises UserError if the archive cannot be opened, or read within the context."""
    try:
        with open_packed(path) as stream:
            yield stream
    except PACKED_ERRORS as error:
        raise UserError(f"{path} is damaged ({describe_error(error)}): download it again") from error


def _read_samples(paths: list[Path], others: _OtherMembers) -> Iterator[_Sample]:
    for shard, path in enumerate(paths):
        with _open(path) as stream:
            members = read_tar(stream, stream.limit // _BLOCK + 1)
            yield from _group(stream, _members_of_samples(stream, members, shard, others), shard, path)


def _members_of_samples(
    stream: Unpacked, members: Iterable[Member], shard: int, others: _OtherMembers
) -> Iterator[Member]:
    """Yield the members that can belong to samples, and add the other members to `others`."""
    for member in members:
        if member.is_folder:
            continue
        kind = hidden_kind(member.name) or (LINKS if member.is_link else None if member.is_plain else SPECIAL_FILES)
        if kind is not None:
            others.left_out.setdefault(kind, []).append(member.name)
        elif is_dataset_json(member.name):
            others.jsons.append(_Location(shard, stream.position, member.size, member.name))
        else:
            yield member


def _group(stream: Unpacked, members: Iterable[Member], shard: int, path: Path) -> Iterator[_Sample]:
    """Group consecutive members of a shard into samples; a repeated extension starts a new sample."""
    sample = None
    for member in members:
        key, extension = split_name(member.name)
        if sample is None or sample.key != key or extension in sample.extensions:
            if sample is not None:
                yield sample
            sample = _Sample(shard, key)
        sample.extensions.add(extension)
        kind = extension.rpartition(".")[2]
        if extension in (*_TEXTS, "json"):
            sample.labels[extension] = _read_label(member, extension, stream, path)
        elif kind in _TEXTS:
            sample.labels.setdefault(kind, _dotted_name_error(member, path))
        elif split_images([member.name])[0]:
            sample.images.append(_Location(shard, stream.position, member.size, member.name))
            continue
        if sample.labels.get(extension) is None:
            sample.others.append(member.name)
    if sample is not None:
        yield sample


def _read_label(member: Member, extension: str, stream: Unpacked, path: Path) -> Any:
    """Return the label in a member: a number, string or list; None if empty; a UserError if unreadable."""
    where = f"{path}: {member.name!r:.200}"
    if member.size > _MAX_LABEL_BYTES:
        problem = f"more than the limit of {_MAX_LABEL_BYTES} for a label"
        return UserError(f"{where} has {member.size} bytes, {problem}: check it")
    try:
        text = stream.read(member.size).decode().strip()
        content = parse_json(text) if extension == "json" else text
    except ValueError as error:
        return UserError(f"{where} cannot be read ({describe_error(error)}): write it again")
    if extension == "json":
        found = content if isinstance(content, dict) else {}
        content = next((found[key] for key in _KEYS if found.get(key) is not None), None)
    return _number(content) if isinstance(content, str) else content


def _dotted_name_error(member: Member, path: Path) -> UserError:
    return UserError(
        f"{path}: {member.name!r:.200}: the name of a sample ends at the first dot, but this name has further dots: "
        "write the archive again without dots in the names of samples"
    )


def _number(text: str) -> int | str | list[int] | None:
    if _SEVERAL.fullmatch(text):
        return [int(number) for number in re.split(r"[\s,]+", text)]
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 10 else text or None
