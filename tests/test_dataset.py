"""training/dataset.py: reading datasets, sampling by position, dividing batches between ranks."""

from __future__ import annotations

import io
import json
import pickle
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import dataset_tool
from dnnlib.config import ConfigError, UserError
from training.data_sources.codec import decode_image, read_shape
from training.dataset import DatasetConfig, EpochSampler, ImageDataset, batches, encode_labels, resident_batches


def random_images(count: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, height, width, channels)).astype(np.uint8)


def as_png(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "png", **options)
    return buffer.getvalue()


def image_name(index: int) -> str:
    return f"00000/img{index:08d}.png"


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def dataset_files(images: np.ndarray, labels: list[Any] | None = None, **more: Any) -> dict[str, bytes]:
    files = {image_name(k): as_png(pixels) for k, pixels in enumerate(images)}
    pairs = None if labels is None else [[image_name(k), label] for k, label in enumerate(labels)]
    return {**files, "dataset.json": json.dumps({"labels": pairs, **more}).encode()}


def open_dataset(path: Path, **options: Any) -> ImageDataset:
    return ImageDataset(DatasetConfig(path=str(path), **options))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["stored", "deflated", "folder"])
def test_images_are_read_unchanged(tmp_path: Path, kind: str, channels: int) -> None:
    images = random_images(7, channels=channels)
    if kind == "folder":
        path = write_folder(tmp_path / "set", dataset_files(images))
    else:
        compression = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        path = write_zip(tmp_path / "set.zip", dataset_files(images), compression)
    dataset = open_dataset(path)
    assert dataset.img_shape == (channels, 6, 5)
    assert (dataset.name, len(dataset), dataset.c_dim, dataset.has_labels) == ("set", 7, 0, False)
    assert dataset.labels.shape == (7, 0)
    batch = dataset.images([6, 0, 3])
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous()
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), images[[6, 0, 3]])


def test_other_formats_without_dataset_json_are_read(tmp_path: Path) -> None:
    images = random_images(2)
    files = {"b.webp": b"", "a.bmp": b"", "c.jpg": b"", "notes.txt": b"x", "._a.bmp": b"resource fork"}
    for name, format in [("a.bmp", "bmp"), ("b.webp", "webp"), ("c.jpg", "jpeg")]:
        buffer = io.BytesIO()
        Image.fromarray(images[0]).save(buffer, format, lossless=True)
        files[name] = buffer.getvalue()
    dataset = open_dataset(write_zip(tmp_path / "x.zip", files))
    batch = dataset.images(torch.arange(3)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(batch[:2], images[[0, 0]])
    np.testing.assert_array_equal(batch[2], np.asarray(Image.open(io.BytesIO(files["c.jpg"]))))


def test_palette_pngs_are_read_as_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(random_images(1)[0])
    palette = image.quantize(16)
    buffers = [io.BytesIO(), io.BytesIO()]
    image.save(buffers[0], "png")
    palette.save(buffers[1], "png")
    files = {f"{k}.png": buffer.getvalue() for k, buffer in enumerate(buffers)}
    batch = open_dataset(write_zip(tmp_path / "x.zip", files)).images([1]).permute(0, 2, 3, 1)[0]
    np.testing.assert_array_equal(batch.numpy(), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("labels", [None, [2, 0, 1, 1], [[0.5, 1.0]] * 4])
@pytest.mark.parametrize("mirror", [False, True])
def test_with_mirror_equals_opening_with_the_option(tmp_path: Path, labels: list[Any] | None, mirror: bool) -> None:
    path = write_zip(tmp_path / "set.zip", dataset_files(random_images(4), labels))
    options: dict[str, Any] = {"use_labels": labels is not None, "max_images": 3}
    opened = open_dataset(path, mirror=mirror, **options)
    for origin in (opened, open_dataset(path, mirror=not mirror, **options)):
        made = origin.with_mirror(mirror)
        assert (made.config, made.content_hash, len(made)) == (opened.config, opened.content_hash, len(opened))
        assert torch.equal(made.labels, opened.labels)
        assert torch.equal(made.images(range(len(made))), opened.images(range(len(opened))))
    assert opened.with_mirror(mirror) is opened


def test_mirror_doubles_the_dataset(tmp_path: Path) -> None:
    images = random_images(4)
    path = write_zip(tmp_path / "x.zip", dataset_files(images, [0, 1, 2, 1]))
    dataset = open_dataset(path, mirror=True, use_labels=True)
    assert len(dataset) == 8
    assert dataset.labels.tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    batch = dataset.images([1, 5, 4]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(batch, np.stack([images[1], images[1][:, ::-1], images[0][:, ::-1]]))
    with pytest.raises(IndexError):
        dataset.images([8])
    with pytest.raises(IndexError):
        dataset.images([-1])


def test_a_subset_is_random_seeded_and_keeps_labels(tmp_path: Path) -> None:
    images = random_images(20)
    path = write_zip(tmp_path / "x.zip", dataset_files(images, list(range(20))))
    subsets = [open_dataset(path, max_images=6, seed=seed, use_labels=True) for seed in (0, 0, 1)]
    chosen = [subset.labels.tolist() for subset in subsets]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 6
    assert chosen[0] != list(range(6))
    batch = subsets[0].images(range(6)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(batch, images[chosen[0]])
    assert subsets[0].c_dim == 20  # the number of classes of the whole dataset
    assert len(open_dataset(path, max_images=100)) == 20


def test_labels_are_class_numbers_or_vectors(tmp_path: Path) -> None:
    images = random_images(3)
    path = write_zip(
        tmp_path / "a.zip", dataset_files(images, [2, 0, 1], class_names=list("abcde"), resize_filter="box")
    )
    dataset = open_dataset(path, use_labels=True)
    assert (dataset.c_dim, dataset.labels.dtype, dataset.class_names) == (5, torch.int64, list("abcde"))
    assert dataset.meta["resize_filter"] == "box"
    assert encode_labels(dataset.labels, 5).tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert open_dataset(path).has_labels
    assert open_dataset(path).c_dim == 0
    assert encode_labels(open_dataset(path).labels, 0).shape == (3, 0)

    vectors = [[0.5, -1], [1, 2.25], [0, 0]]
    dataset = open_dataset(write_zip(tmp_path / "b.zip", dataset_files(images, vectors)), use_labels=True)
    assert (dataset.c_dim, dataset.labels.dtype, dataset.labels.tolist()) == (2, torch.float32, vectors)
    assert encode_labels(dataset.labels, 2).tolist() == vectors
    with pytest.raises(ValueError, match="c_dim is 3"):
        encode_labels(dataset.labels, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"[1]", "must be an object"),
        (b'{"labels": 3}', "must be null or a list"),
        (b'{"labels": [["00000/img00000000.png"]]}', "pairs"),
        (b'{"labels": [["00000/img00000000.png", -1]]}', "class numbers from 0"),
        (b'{"labels": [["00000/img00000000.png", true]]}', "class numbers from 0"),
        (b'{"labels": [["00000/img00000000.png", 1], ["00000/img00000001.png", [1]]]}', "class numbers from 0"),
        (b'{"labels": [["00000/img00000000.png", [1, NaN]]]}', "lists of 2 numbers"),
        (b'{"labels": [["00000/img00000000.png", 1]]}', "no label for '00000/img00000001.png'"),
        (b'{"labels": null}', r"has no labels .*: train without labels \(--cond=false\), or"),
        (b'{"labels": null, "class_names": [1]}', "list of strings"),
    ],
)
def test_malformed_dataset_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_zip(tmp_path / "x.zip", {**dataset_files(random_images(2)), "dataset.json": content})
    with pytest.raises(UserError, match=message) as info:
        open_dataset(path, use_labels=True)
    assert str(path) in str(info.value)


def test_unusable_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset given"):
        ImageDataset(DatasetConfig())
    with pytest.raises(UserError, match=r"missing\.zip does not exist"):
        open_dataset(tmp_path / "missing.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no images"):
        open_dataset(write_zip(tmp_path / "x.zip", {"readme.txt": b"nothing"}))
    with pytest.raises(UserError, match="neither a folder nor a"):
        open_dataset(write_folder(tmp_path, {"x.tar": b""}) / "x.tar")
    whole = write_zip(tmp_path / "whole.zip", dataset_files(random_images(9))).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.zip is not a complete zip file"):
        open_dataset(tmp_path / "cut.zip")
    with pytest.raises(ConfigError, match="max_images"):
        DatasetConfig(max_images=0)
    with pytest.raises(ConfigError, match="seed"):
        DatasetConfig(seed=-1)


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    files = dataset_files(random_images(1))
    files |= {"1.png": as_png(random_images(1, height=7)[0]), "2.png": as_png(random_images(1, channels=4)[0])}
    files |= {"3.png": b"not an image", "4.png": files[image_name(0)][:-30]}
    dataset = open_dataset(write_zip(tmp_path / "x.zip", files))
    for index, message in [
        (1, r"'1.png' is 5x7 RGB, but the first image is 5x6 RGB: .*--width"),
        (2, r"'2.png' is 5x6 RGBA"),
        (3, r"'3.png' cannot be decoded \(not an image"),
        (4, r"'4.png' cannot be decoded"),
    ]:
        with pytest.raises(UserError, match=message):
            dataset.images([0, index])


def test_a_corrupt_zip_member_is_detected(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", dataset_files(random_images(3)))
    data = bytearray(path.read_bytes())
    at = data.index(as_png(random_images(3)[1])) + 50
    data[at] ^= 1
    path.write_bytes(bytes(data))
    dataset = open_dataset(path)
    dataset.images([0, 2])
    with pytest.raises(UserError, match=r"img00000001.png' cannot be decoded \(checksum"):
        dataset.images([1])


def test_the_content_hash_depends_on_all_content(tmp_path: Path) -> None:
    images = random_images(5)
    path = write_zip(tmp_path / "x.zip", dataset_files(images))
    other = images.copy()
    other[3, 0, 0, 0] ^= 1
    hashes = [
        open_dataset(path).content_hash,
        open_dataset(path, mirror=True).content_hash,
        open_dataset(path, max_images=3).content_hash,
        open_dataset(path, max_images=3, seed=1).content_hash,
        open_dataset(write_zip(tmp_path / "labels.zip", dataset_files(images, [0] * 5))).content_hash,
        open_dataset(write_zip(tmp_path / "pixel.zip", dataset_files(other))).content_hash,
        open_dataset(write_folder(tmp_path / "folder", dataset_files(images))).content_hash,
    ]
    assert len(set(hashes)) == len(hashes)
    assert open_dataset(write_zip(tmp_path / "copy.zip", dataset_files(images))).content_hash == hashes[0]


def test_a_pickled_dataset_can_be_read(tmp_path: Path) -> None:
    images = random_images(4)
    dataset = open_dataset(write_zip(tmp_path / "x.zip", dataset_files(images)))
    dataset.images([0])
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.images(range(4)), dataset.images(range(4)))


def test_the_sampler_visits_every_image_once_per_epoch() -> None:
    sampler = EpochSampler(10, seed=3)
    epochs = sampler.indices(0, 50).reshape(5, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert not np.array_equal(EpochSampler(10, seed=4).indices(0, 50), epochs.ravel())


def test_the_sampler_is_a_function_of_the_position() -> None:
    whole = EpochSampler(7, seed=0).indices(0, 100)
    walking = EpochSampler(7, seed=0)
    for start, count in [(0, 3), (3, 11), (14, 0), (21, 7), (90, 10), (5, 60), (6, 1)]:
        np.testing.assert_array_equal(walking.indices(start, count), whole[start : start + count])
    far = 7 * 10**9 + 5
    np.testing.assert_array_equal(walking.indices(far, 4)[2:], EpochSampler(7, seed=0).indices(far + 2, 2))


def take(count: int, dataset: ImageDataset, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stream = batches(dataset, seed=5, **options)
    return [next(stream) for _ in range(count)]


@pytest.fixture
def labelled_dataset(tmp_path: Path) -> ImageDataset:
    path = write_zip(tmp_path / "x.zip", dataset_files(random_images(10), list(range(10))))
    return open_dataset(path, use_labels=True)


def test_batches_follow_the_sampler(labelled_dataset: ImageDataset) -> None:
    expected = EpochSampler(10, seed=5).indices(4, 18)
    stream = take(3, labelled_dataset, position=4, batch_size=6)
    assert torch.cat([labels for _, labels in stream]).tolist() == expected.tolist()
    assert torch.equal(torch.cat([images for images, _ in stream]), labelled_dataset.images(expected))


def test_batches_resume_at_a_position(labelled_dataset: ImageDataset) -> None:
    whole, rest = (
        take(4, labelled_dataset, position=0, batch_size=8),
        take(2, labelled_dataset, position=16, batch_size=8),
    )
    for (images, labels), (images_again, labels_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_ranks_divide_the_global_batch(labelled_dataset: ImageDataset) -> None:
    whole = take(3, labelled_dataset, position=2, batch_size=6)
    shares = [take(3, labelled_dataset, position=2, batch_size=6, rank=rank, world_size=3) for rank in range(3)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)
    with pytest.raises(ValueError, match="6 images cannot be divided equally among 4"):
        take(1, labelled_dataset, position=0, batch_size=6, world_size=4)


@pytest.mark.parametrize("mirror", [False, True])
def test_resident_batches_equal_streamed_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: bool) -> None:
    monkeypatch.setattr("training.dataset.RESIDENT_PART", 4)
    path = write_zip(tmp_path / "x.zip", dataset_files(random_images(10), list(range(10))))
    dataset = open_dataset(path, use_labels=True, mirror=mirror)
    share: dict[str, Any] = {"position": 3, "batch_size": 6, "rank": 1, "world_size": 2}
    stream = resident_batches(dataset, seed=5, **share)
    for expected in take(8, dataset, **share):
        assert all(torch.equal(*pair) for pair in zip(next(stream), expected, strict=True))


def test_batches_do_not_change_the_global_random_state(labelled_dataset: ImageDataset) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(2, labelled_dataset, position=0, batch_size=4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_do_not_change_the_batches(labelled_dataset: ImageDataset) -> None:
    labelled_dataset.images([0])  # the file is open before the workers are forked
    here, elsewhere = (take(6, labelled_dataset, position=3, batch_size=4, workers=workers) for workers in (0, 2))
    for (images, labels), (images_there, labels_there) in zip(here, elsewhere, strict=True):
        assert torch.equal(images, images_there)
        assert torch.equal(labels, labels_there)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_errors_in_workers_become_one_line(tmp_path: Path) -> None:
    files = {**dataset_files(random_images(2)), "1.png": b"not an image"}
    stream = batches(open_dataset(write_zip(tmp_path / "x.zip", files)), seed=0, position=0, batch_size=3, workers=1)
    with pytest.raises(UserError, match=r"^[^\n]*'1\.png' cannot be decoded[^\n]*$"):
        next(stream)


def test_the_shape_in_the_header_equals_the_decoded_shape() -> None:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (6, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    variants = [
        _encoded(rgb, "PNG"),
        _encoded(rgb, "JPEG"),
        _encoded(rgb, "JPEG", exif=exif),
        _encoded(rgb.convert("L"), "WEBP"),
        _encoded(rgb.convert("P"), "PNG"),
        _encoded(rgb.convert("RGBA"), "PNG"),
        _encoded(rgb.convert("LA"), "PNG"),
    ]
    for data in variants:
        assert read_shape(data) == decode_image(data).shape
    assert read_shape(variants[2]) == (10, 6, 3)


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_only_headers_of_plain_pngs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    """Only the first 64 KiB of JPEGs are read. PNGs with other chunks are read whole: a later chunk may rotate them."""
    images = random_images(3)
    rgb, exif = Image.fromarray(images[0]), Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    files = {"other/text.png": as_png(images[0], pnginfo=_text_chunk()), "other/x.jpg": _encoded(rgb, "JPEG")}
    dataset = open_dataset(write(tmp_path / "set.zip", dataset_files(images) | files))
    read, whole = dataset._store.read, []

    names = dataset._store.names

    def record(position: int) -> bytes:
        whole.append(names[position])
        return read(position)

    read_start, sizes = dataset._store.read_start, {}

    def record_start(position: int, size: int) -> bytes:
        sizes[names[position]] = size
        return read_start(position, size)

    monkeypatch.setattr(dataset._store, "read", record)
    monkeypatch.setattr(dataset._store, "read_start", record_start)
    dataset.check_shapes()
    assert whole == ["other/text.png"]
    assert sizes.pop("other/x.jpg") == 1 << 16
    assert set(sizes.values()) == {41}
    wrong = {
        "4 images of 2 sizes, 5x6 to 5x7 pixels: build a dataset of one size": as_png(random_images(1, height=7)[0]),
        "4 images of 2 sizes, 5x6 to 6x5 pixels: build a dataset of one size": as_png(images[0], exif=exif),
        "4 images, 3 RGB, 1 RGBA: build a dataset of one kind": as_png(images[0], transparency=(1, 2, 3)),
        r"4 images, 1 cannot be read, the first is 'wrong\.png' ": as_png(images[0])[:20],
    }
    for number, (message, data) in enumerate(wrong.items()):
        dataset = open_dataset(write(tmp_path / f"{number}.zip", dataset_files(images) | {"wrong.png": data}))
        with pytest.raises(ConfigError, match=message):
            dataset.check_shapes()


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_a_broken_first_image_is_counted_like_others(
    tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    """Several broken first images, one with an intact header. If no image is readable, opening the dataset fails."""
    images = random_images(3)
    good = as_png(images[0])
    broken = {"0/a.png": good[:60], "0/b.png": b"", "0/c.png": b"%PDF"}
    assert read_shape(broken["0/a.png"]) == images[0].shape
    dataset = open_dataset(write(tmp_path / "a.zip", broken | dataset_files(images)))
    assert dataset.img_shape == (3, 6, 5)
    with pytest.raises(ConfigError, match=r"6 images, 3 cannot be read, the first is '0/a\.png' \(.*--skip-bad$"):
        dataset.check_shapes()
    with pytest.raises(UserError, match=r"image '0/a\.png' cannot be decoded"):
        dataset.images([0])
    wide = {"0/d.png": as_png(random_images(1, height=64, width=64)[0])}
    dataset = open_dataset(write(tmp_path / "b.zip", broken | wide | dataset_files(images)))
    with pytest.raises(ConfigError, match=r"7 images of 2 sizes, 5x6 to 64x64 .*--width=16 --height=16 --skip-bad"):
        dataset.check_shapes(lambda sizes: (16, 16))
    with pytest.raises(UserError, match=r"none of its 3 images can be decoded, the first is '0/a\.png' \("):
        open_dataset(write(tmp_path / "c.zip", broken))


@pytest.mark.parametrize("broken", [["a.png"], ["0.png", "z/b.jpg"], ["a.png", "b.png", "z/d.png"]])
def test_dangling_symlinks_are_counted_as_broken_images(tmp_path: Path, broken: list[str]) -> None:
    folder = write_folder(
        tmp_path / "set", dataset_files(random_images(3)) | {"z/whole.png": as_png(random_images(1)[0])}
    )
    for name in broken:
        (folder / name).symlink_to(tmp_path / "nowhere.png")
    dataset = open_dataset(folder)
    expected = rf"{4 + len(broken)} images, {len(broken)} cannot be read, the first is '{broken[0]}' \(No such .*--skip"
    with pytest.raises(ConfigError, match=expected):
        dataset.check_shapes()
    before = dataset.content_hash
    (tmp_path / "nowhere.png").write_bytes(as_png(random_images(1)[0]))
    assert open_dataset(folder).content_hash != before


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({}, []),
        ({"dog/2.png": as_png(random_images(1, height=9, width=9)[0])}, ["--transform=center-crop", "--width=8"]),
        ({"dog/2.png": b"broken"}, ["--skip-bad"]),
        ({"dog/2.png": b"", "dog/3.png": as_png(random_images(1, height=40)[0])}, ["--width=8", "--skip-bad"]),
    ],
)
def test_the_suggested_command_fixes_a_dataset_without_labels(
    tmp_path: Path, extra: dict[str, bytes], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in the message builds a dataset that training accepts."""
    files = {f"{kind}/{k}.png": as_png(random_images(1)[0]) for kind in ("cat", "dog") for k in range(2)}
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "my pets", files | extra)
    with pytest.raises(UserError) as error:
        open_dataset(Path("my pets"), use_labels=True)
    command = shlex.split(str(error.value).partition("build a dataset with labels: ")[2])
    assert command[:4] == ["python", "dataset_tool.py", "--source=my pets", "--dest=data/my pets.zip"]
    assert {*options, "--labels-from-folders"} <= {*command}
    built = CliRunner().invoke(dataset_tool.main, [*command[2:], "--workers=1"])
    assert built.exit_code == 0, built.output
    dataset = open_dataset(Path("data/my pets.zip"), use_labels=True)
    dataset.check_shapes()
    assert (dataset.c_dim, dataset.class_names) == (2, ["cat", "dog"])


def _text_chunk() -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", "before the pixels")
    return info


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
