"""dataset_tool.py on the command line, with sources of every kind and known pixels."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_helpers import (
    assert_refused,
    build,
    encode,
    label_values,
    random_images,
    run,
    write_files,
    write_tar,
    write_zip,
)
from image_helpers import png_chunk
from PIL import Image

import dataset_tool
from dnnlib.images import MAX_IMAGE_BYTES
from training.data_sources import codec
from training.data_sources.codec import encode_png
from training.data_sources.convert import (
    MAX_SIDE,
    RESIZE_FILTERS,
    Conversion,
    TooSmallError,
    center_crop,
    fit_channels,
    force_channels,
)
from training.data_sources.shapes import KINDS, draw_scenes, scene_labels

# Folders and zip files


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_are_read_from_folders_and_zips(tmp_path: Path, packed: bool) -> None:
    images = random_images(4, 6, 5, 3)
    files = {
        "cat/z.bmp": encode(images[1], "bmp"),
        "cat/deep/a.webp": encode(images[0], "webp", lossless=True),
        "dog/1.PNG": encode(images[2]),
        "eel/1.png": encode(images[3]),
        "eel/notes.txt": b"not an image",
    }
    source = write_zip(tmp_path / "in.zip", files) if packed else write_files(tmp_path / "in", files)
    found, content = build(source, tmp_path / "out.zip", "--labels-from-folders")
    np.testing.assert_array_equal(found, images)
    assert label_values(content) == [0, 0, 1, 2]
    assert content["class_names"] == ["cat", "dog", "eel"]
    assert content["resize_filter"] is None
    _, content = build(source, tmp_path / "plain.zip")
    assert content["labels"] is None


def test_labels_of_dataset_json_are_kept(tmp_path: Path) -> None:
    images = random_images(3, 4, 4, 3)
    files = {f"{k}.png": encode(pixels) for k, pixels in enumerate(images)}
    labels = [["0.png", [0.5, 1]], ["2.png", [3, 4]], ["1.png", [0, 0]]]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    _, content = build(write_zip(tmp_path / "in.zip", files), tmp_path / "out.zip", "--max-images=2")
    assert content["labels"] == [["00000/img00000000.png", [0.5, 1]], ["00000/img00000001.png", [0, 0]]]
    assert content["num_images"] == 2


LABEL_LISTS: dict[
    str, tuple[list[Any], str | None]
] = {  # labels of a.png and b.png; the label that the error message names, None for valid vectors
    "lists of classes": ([[1, 3], [0, 2]], "[1, 3]"),
    "lists of classes after a list of 0 and 1": ([[0, 1], [0, 2]], "[0, 2]"),
    "lists of several lengths": ([[1, 2], [0]], "[0]"),
    "a class, then a list": ([1, [0, 2]], "[0, 2]"),
    "negative": ([[0, -1], [0, 1]], "[0, -1]"),
    "zeros and ones": ([[0, 1], [1, 1]], None),
    "fractions": ([[0.5, 3], [2, 7]], None),
    "whole floats": ([[1.0, 3.0], [0.0, 2.0]], None),
    "lists of one class": ([[3], [7]], None),
}


@pytest.mark.parametrize("kind", LABEL_LISTS)
def test_lists_of_classes_are_refused_as_label_vectors(tmp_path: Path, kind: str) -> None:
    """Same rule as for tables: the network would read class numbers as magnitudes."""
    labels, named = LABEL_LISTS[kind]
    names = ["a.png", "b.png"]
    content = {"labels": list(map(list, zip(names, labels, strict=True)))}
    files = {name: encode(random_images(4, 4, 3)) for name in names}
    source = write_zip(tmp_path / "in.zip", {**files, "dataset.json": json.dumps(content).encode()})
    if named is None:
        assert label_values(build(source, tmp_path / "made.zip")[1]) == labels
    for result in (run("check", source), run(f"--source={source}", f"--dest={tmp_path / 'refused.zip'}")):
        assert (result.exit_code == 2) == (named is not None)
        assert named is None or f", {named}]: " in result.stderr
        assert named is None or '["img.png", [0, 1, 0, 1]]' in result.stderr


@pytest.mark.parametrize(
    ("labels", "class_names", "refused_label"),
    [
        ([7, 20190], ["a", "b"], 7),
        ([0, 2], ["a", "b"], 2),
        ([0, 1], ["a"], 1),
        ([0, 1], [], 0),
        ([0, 1], ["a", "b"], None),
        ([0, 1], ["a", "b", "c"], None),
        ([[0.5, 3], [1, 2]], ["a"], None),
        (None, ["a"], None),
    ],
)
def test_class_names_must_cover_all_class_numbers(
    tmp_path: Path, labels: list[Any] | None, class_names: list[str], refused_label: int | None
) -> None:
    """A gap in the class numbers would otherwise create up to 20,191 classes, most of them without images."""
    names = ["a.png", "b.png"]
    pairs = labels and list(map(list, zip(names, labels, strict=True)))
    content = json.dumps({"labels": pairs, "class_names": class_names}).encode()
    source = write_files(
        tmp_path / "in", {"dataset.json": content, **{name: encode(random_images(4, 4, 3)) for name in names}}
    )
    for result in (run("check", source), run(f"--source={source}", f"--dest={tmp_path / 'made.zip'}")):
        message = f": label {refused_label}, but there are only {len(class_names)} class name"
        assert (result.exit_code, message in result.stderr) == ((0, False) if refused_label is None else (2, True))


def test_a_folder_and_a_zip_hold_the_same_files(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "in",
        {"a.png": encode(random_images(4, 4, 3)), "b.png": encode(random_images(4, 4, 3))},
    )
    build(source, tmp_path / "out.zip")
    assert run("--source", source, "--dest", tmp_path / "new" / "out", "--workers=1").exit_code == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        for name in archive.namelist():
            assert (tmp_path / "new" / "out" / name).read_bytes() == archive.read(name)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert os.listdir(tmp_path / "new") == ["out"]


def test_the_number_of_workers_does_not_change_the_result(tmp_path: Path) -> None:
    files = {f"{k:03d}.png": encode(random_images(8, 8, 3)) for k in range(300)} | {"150x.png": b"broken"}
    source = write_zip(tmp_path / "in.zip", files)
    for workers in (1, 2):
        options = ("--width=4", "--height=4", "--skip-bad", f"--workers={workers}")
        result = run(f"--source={source}", f"--dest={tmp_path / str(workers)}.zip", *options)
        assert result.exit_code == 0, result.output
        assert "150x.png: not an image" in result.output
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


def test_an_error_in_a_worker_leaves_no_files(tmp_path: Path) -> None:
    files = {f"{k:03d}.png": encode(random_images(8, 8, 3)) for k in range(300)} | {
        "299.png": encode(random_images(8, 9, 3))
    }
    source = write_zip(tmp_path / "in.zip", files)
    result = run(f"--source={source}", f"--dest={tmp_path / 'out.zip'}", "--workers=2")
    assert result.exit_code == 2
    assert "1 image of another size than the first, 8x8:\n  299.png: 9x8\n" in result.output
    assert os.listdir(tmp_path) == ["in.zip"]


# Sizes and channels


def test_center_crop_equals_slices() -> None:
    pixels = random_images(10, 16, 3)
    np.testing.assert_array_equal(center_crop(pixels, 8, 8), pixels[:, 3:13])
    np.testing.assert_array_equal(center_crop(pixels, 4, 1), pixels[3:7])
    np.testing.assert_array_equal(center_crop(pixels, 16, 10), pixels)
    np.testing.assert_array_equal(center_crop(pixels, 1, 2), pixels[:, 5:10])
    assert center_crop(random_images(3, 1000, 1), 1, 1000).shape == (3, 1, 1)


def test_the_box_filter_averages_pixels() -> None:
    pixels = random_images(12, 8, 4)
    pixels[..., 3] = 255
    conversion = Conversion(width=4, height=3, resize_filter="box", channels=4)
    mean = pixels.reshape(3, 4, 4, 2, 4).mean(axis=(1, 3))
    assert np.abs(conversion(pixels) - mean).max() <= 1


@pytest.mark.parametrize("resize_filter", RESIZE_FILTERS)
def test_transforms_equal_pillow(tmp_path: Path, resize_filter: str) -> None:
    pixels = random_images(20, 30, 3)
    source = write_files(tmp_path / "in", {"a.png": encode(pixels)})
    sizes = ("--width=8", "--height=4", f"--resize_filter={resize_filter}")
    cropped, content = build(source, tmp_path / "crop.zip", "--transform=center-crop", *sizes)
    image = Image.fromarray(pixels).crop((0, 2, 30, 17))
    np.testing.assert_array_equal(cropped[0], np.asarray(image.resize((8, 4), RESIZE_FILTERS[resize_filter])))
    assert (content["width"], content["height"], content["resize_filter"]) == (8, 4, resize_filter)

    boxed, content = build(source, tmp_path / "boxed.zip", "--transform=center-crop-letterbox", *sizes)
    assert (content["transform"], content["width"], content["height"]) == ("center-crop-letterbox", 8, 8)
    np.testing.assert_array_equal(boxed[0], np.pad(cropped[0], ((2, 2), (0, 0), (0, 0))))

    wide, content = build(source, tmp_path / "wide.zip", "--transform=center-crop-wide", *sizes)
    assert (content["transform"], content["width"], content["height"]) == ("center-crop-wide", 8, 8)
    image = Image.fromarray(pixels).crop((0, 7, 30, 12))  # round(8 * 20 / 30) = 5 rows in the middle of 20
    expected = np.asarray(image.resize((8, 4), RESIZE_FILTERS[resize_filter]))
    np.testing.assert_array_equal(wide[0], np.pad(expected, ((2, 2), (0, 0), (0, 0))))

    plain, _ = build(source, tmp_path / "plain.zip", *sizes)
    np.testing.assert_array_equal(
        plain[0], np.asarray(Image.fromarray(pixels).resize((8, 4), RESIZE_FILTERS[resize_filter]))
    )


@pytest.mark.parametrize(
    ("size", "rows"),  # width x height; the source rows of the 8x4 result
    [
        ((8, 4), slice(0, 4)),
        ((8, 7), slice(0, 7)),  # an image of the target width is not cropped
        ((16, 8), slice(2, 6)),  # cropped despite the target aspect ratio
        ((16, 12), slice(3, 9)),
        ((16, 11), slice(2, 8)),  # 5.5 rows, half to even: 6
        ((16, 9), slice(2, 6)),  # 4.5 rows: 4
        ((7, 100), None),  # too narrow
        ((16, 7), slice(1, 5)),  # 3.5 rows: 4
        ((17, 7), None),  # 3.3 rows: 3
    ],
)
def test_center_crop_wide_crops_rows_to_the_target_aspect_ratio(size: tuple[int, int], rows: slice | None) -> None:
    width, height = size
    pixels = random_images(height, width, 3)
    conversion = Conversion(width=8, height=4, transform="center-crop-wide", resize_filter="box")
    if rows is None:
        with pytest.raises(TooSmallError, match=f"{width}x{height} pixels"):
            conversion(pixels)
        return
    expected = np.asarray(Image.fromarray(pixels[rows]).resize((8, 4), Image.Resampling.BOX))
    np.testing.assert_array_equal(conversion(pixels), np.pad(expected, ((2, 2), (0, 0), (0, 0))))


def test_center_crop_wide_drops_and_counts_smaller_images(tmp_path: Path) -> None:
    sizes = [(7, 9), (8, 4), (9, 3), *[(16, 12)] * 297]
    images = {f"{k:03d}.png": random_images(height, width, 3) for k, (width, height) in enumerate(sizes)}
    labels = [[name, k] for k, name in enumerate(images)]
    files = {name: encode(pixels) for name, pixels in images.items()}
    source = write_files(tmp_path / "in", files | {"dataset.json": json.dumps({"labels": labels}).encode()})
    options = ("--transform=center-crop-wide", "--resolution=8x4")
    for workers in (1, 2):  # 2: conversion in worker processes
        result = run(f"--source={source}", f"--dest={tmp_path / str(workers)}.zip", f"--workers={workers}", *options)
        assert result.exit_code == 0, result.output
        assert "298 images of 8x8 pixels" in result.output
        assert "2 images are smaller than 8x4 and were skipped (center-crop-wide)" in result.output
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    found, content = build(source, tmp_path / "all.zip", *options)
    np.testing.assert_array_equal(found[0, 2:6], images["001.png"])
    assert label_values(content) == [1, *range(3, 300)]
    assert content["short_sides"] == {"2": 1, "4": 2, "8": 297}
    message = assert_refused(tmp_path, source, "--transform=center-crop-wide", "--resolution=64x32")
    assert "--width=64 --height=32: --transform=center-crop-wide skips smaller images, and all" in message


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_padding_is_applied_before_cropping(tmp_path: Path, channels: int) -> None:
    pixels = random_images(6, 4, channels)
    source = write_files(tmp_path / "in", {"a.png": encode(pixels)})
    expected = np.zeros((10, 8, channels), np.uint8)
    expected[2:8, 2:6] = pixels
    options = (f"--channels={channels}", "--pad=2")
    found, content = build(source, tmp_path / "padded.zip", *options)
    np.testing.assert_array_equal(found[0], expected)
    assert content["pad"] == 2
    cropped, _ = build(source, tmp_path / "cropped.zip", *options, "--transform=center-crop", "--resolution=8x8")
    np.testing.assert_array_equal(cropped[0], expected[1:9])
    assert build(source, tmp_path / "plain.zip")[1]["pad"] == 0


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_channels_option_sets_the_number_of_channels(tmp_path: Path, channels: int) -> None:
    images = random_images(2, 5, 7, channels)
    source = write_files(tmp_path / "in", {f"{k}.png": encode(pixels) for k, pixels in enumerate(images)})
    found, content = build(source, tmp_path / "out.zip", f"--channels={channels}")
    np.testing.assert_array_equal(found, images)
    assert content["channels"] == channels
    resized, _ = build(source, tmp_path / "small.zip", f"--channels={channels}", "--width=3", "--height=2")
    assert resized.shape == (2, 2, 3, channels)


def test_mixed_images_become_rgb_over_white(tmp_path: Path) -> None:
    color, gray, alpha = random_images(4, 4, 3), random_images(4, 4, 1), random_images(4, 4, 1)
    palette = io.BytesIO()
    Image.fromarray(color).quantize(8).save(palette, "png")
    opaque = np.full((4, 4), 255, np.uint8)
    files = {
        "0.png": encode(gray),
        "1.png": encode(np.dstack([color, opaque])),
        "2.png": palette.getvalue(),
        "3.png": encode(np.dstack([color, alpha])),
        "4.png": encode(np.dstack([gray, alpha])),
    }
    source = write_files(tmp_path / "in", files)
    found, content = build(source, tmp_path / "out.zip")
    assert content["channels"] == 3
    np.testing.assert_array_equal(found[:2], np.stack([np.repeat(gray, 3, axis=2), color]))
    part = alpha / 255
    over_white = np.rint(color * part + 255 * (1 - part))
    np.testing.assert_allclose(found[3], over_white, atol=1)
    np.testing.assert_allclose(found[4], np.repeat(np.rint(gray * part + 255 * (1 - part)), 3, axis=2), atol=1)

    found, _ = build(source, tmp_path / "rgba.zip", "--channels=4")
    np.testing.assert_array_equal(found[3], np.dstack([color, alpha]))
    found, _ = build(source, tmp_path / "gray.zip", "--channels=1")
    np.testing.assert_allclose(found[1, ..., 0], color @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize("packed", [False, True])
def test_a_dataset_is_grayscale_if_all_images_are(tmp_path: Path, packed: bool) -> None:
    gray, alpha = random_images(4, 4, 1), random_images(4, 4, 1)
    bits = (random_images(4, 4, 1) > 127) * np.uint8(255)
    one_bit = io.BytesIO()
    Image.fromarray(bits.squeeze(-1)).convert("1").save(one_bit, "png")
    files = {
        "0.png": encode(np.dstack([gray, alpha])),
        "1.png": encode(gray),
        "2.png": one_bit.getvalue(),
        "3.png": b"broken",
    }
    source = write_zip(tmp_path / "in.zip", files) if packed else write_files(tmp_path / "in", files)
    found, content = build(source, tmp_path / "out.zip", "--skip-bad")
    assert content["channels"] == 1
    np.testing.assert_array_equal(found[1:], [gray, bits])
    np.testing.assert_allclose(found[0], gray * (alpha / 255) + 255 - alpha, atol=1)

    files["9.png"] = encode(np.repeat(gray, 3, axis=2))  # stored as RGB, although all pixels are gray
    source = write_zip(tmp_path / "rgb.zip", files) if packed else write_files(tmp_path / "rgb", files)
    _, content = build(source, tmp_path / "out3.zip", "--skip-bad")
    assert content["channels"] == 3


def test_channels_are_fitted_or_forced() -> None:
    gray = random_images(3, 3, 1)
    for more in (3, 4):
        fitted = fit_channels(gray, more)
        assert fitted is not None
        assert fitted.shape == (3, 3, more)
        np.testing.assert_array_equal(fit_channels(fitted, 1), gray)
    assert fit_channels(random_images(3, 3, 3), 1) is None
    assert (force_channels(np.zeros((2, 2, 4), np.uint8), 1) == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = random_images(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed after a clockwise rotation by 90 degrees
    source = write_files(tmp_path / "in", {"a.png": encode(pixels, exif=exif)})
    found, _ = build(source, tmp_path / "out.zip")
    np.testing.assert_array_equal(found[0], np.rot90(pixels, -1))


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "in",
        {"a.png": encode(random_images(4, 4, 3)), "b.png": encode(random_images(4, 5, 3))},
    )
    message = assert_refused(tmp_path, source)
    assert "1 image of another size than the first, 4x4:\n  b.png: 5x4\n" in message
    assert "--width and --height must be used together" in assert_refused(tmp_path, source, "--width=4")
    assert "give --width and --height" in assert_refused(tmp_path, source, "--transform=center-crop")
    for transform in ("center-crop-wide", "center-crop-letterbox"):
        tall = ("--width=4", "--height=8", f"--transform={transform}")
        assert f"--height=8 exceeds --width=4: --transform={transform}" in assert_refused(tmp_path, source, *tall)


def test_pillow_decodes_the_pngs_of_our_encoder() -> None:
    for shape in [(1, 1, 1), (5, 7, 3), (3, 2, 4), (200, 150, 3)]:  # the last image needs several deflate blocks
        pixels = random_images(*shape)
        data = codec.encode_png(pixels)
        image = Image.open(io.BytesIO(data))
        image.verify()
        np.testing.assert_array_equal(codec.decode_image(data), pixels)
        np.testing.assert_array_equal(codec.decode_as(data, shape), pixels)


def test_without_pyspng_pillow_decodes_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspng", None)  # as if the package were missing
    specification = importlib.util.spec_from_file_location("codec_without_pyspng", codec.__file__)
    assert specification is not None
    assert specification.loader is not None
    without = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(without)
    for shape in [(5, 7, 1), (4, 4, 3), (3, 2, 4)]:
        pixels = random_images(*shape)
        for data in (codec.encode_png(pixels), encode(pixels.squeeze())):
            np.testing.assert_array_equal(without.decode_as(data, shape), pixels)
    with pytest.raises(without.BrokenImageError):
        without.decode_as(codec.encode_png(pixels)[:50], pixels.shape)

    write_files(tmp_path, {"a.png": encode(pixels)})
    for note, times in ((None, 0), (without.SLOW_DECODER, 1)):
        monkeypatch.setattr(dataset_tool, "SLOW_DECODER", note)
        result = run("check", tmp_path)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("pyspng, which is faster, is not installed") == times


@pytest.mark.parametrize("C", [1, 3])
def test_a_transparent_colour_makes_a_png_rgba(C: int) -> None:
    pixels = random_images(4, 5, C)
    data = encode(pixels.squeeze(), transparency=7 if C == 1 else (7, 8, 9))
    assert codec.read_shape(data) == (4, 5, 4)
    np.testing.assert_array_equal(codec.decode_as(data, (4, 5, C)), codec.decode_image(data))


# Published datasets


def test_cifar10_batches_are_read(tmp_path: Path) -> None:
    images = random_images(10, 32, 32, 3)
    planes = images.transpose(0, 3, 1, 2).reshape(10, 3072)
    files: dict[str, Any] = {"cifar-10-batches-py/batches.meta": {b"label_names": [b"plane", b"car"]}}
    for k in range(5):
        labels = [k % 2, 1]
        files[f"cifar-10-batches-py/data_batch_{k + 1}"] = {b"data": planes[2 * k : 2 * k + 2], b"labels": labels}
    files["cifar-10-batches-py/test_batch"] = {b"data": planes[:1], b"labels": [0]}
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {name: pickle.dumps(x, 2) for name, x in files.items()})
    found, content = build(path, tmp_path / "out.zip")
    np.testing.assert_array_equal(found, images)
    assert label_values(content) == [0, 1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert content["class_names"] == ["plane", "car"]


def test_cifar100_pickled_by_python2_is_read(tmp_path: Path) -> None:
    images = random_images(3, 32, 32, 3)
    planes = np.asfortranarray(images.transpose(0, 3, 1, 2).reshape(3, 3072))
    train = pickle.dumps({"data": planes, "fine_labels": [2, 0, 1], "coarse_labels": [1, 1, 1]}, 2)
    train = train.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = write_tar(tmp_path / "cifar.tgz", {"cifar-100-python/train": train, "cifar-100-python/test": b""})
    found, content = build(path, tmp_path / "out.zip")
    np.testing.assert_array_equal(found, images)
    assert label_values(content) == [2, 0, 1]
    assert content["class_names"] is None


@pytest.mark.parametrize("compressed", [True, False])
def test_mnist_is_read_with_labels_and_padded(tmp_path: Path, compressed: bool) -> None:
    images = random_images(5, 28, 28)
    suffix = ".gz" if compressed else ""
    pack = gzip.compress if compressed else bytes
    files = {
        f"train-images-idx3-ubyte{suffix}": pack(struct.pack(">IIII", 0x803, 5, 28, 28) + images.tobytes()),
        f"train-labels-idx1-ubyte{suffix}": pack(struct.pack(">II", 0x801, 5) + bytes([7, 0, 1, 9, 3])),
    }
    write_files(tmp_path, files)
    found, content = build(tmp_path / f"train-images-idx3-ubyte{suffix}", tmp_path / "out.zip")
    padded = np.zeros((5, 32, 32), np.uint8)
    padded[:, 2:30, 2:30] = images
    np.testing.assert_array_equal(found[..., 0], padded)
    assert (label_values(content), content["pad"], content["width"]) == ([7, 0, 1, 9, 3], 2, 32)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    np.testing.assert_array_equal(build(path, tmp_path / "named.zip", "--width=32", "--height=32")[0], found)
    plain, content = build(path, tmp_path / "plain.zip", "--pad=0")
    np.testing.assert_array_equal(plain[..., 0], images)
    assert content["pad"] == 0
    other = random_images(5, 20, 24)
    path = write_files(
        tmp_path / "other", {"x-images-idx3-ubyte": struct.pack(">IIII", 0x803, 5, 20, 24) + other.tobytes()}
    )
    np.testing.assert_array_equal(build(path / "x-images-idx3-ubyte", tmp_path / "other.zip")[0][..., 0], other)

    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(struct.pack(">II", 0x801, 1) + b"\0"))
    assert "1 labels for 5 images" in assert_refused(tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}")


def test_stl10_training_and_unlabelled_images_are_read(tmp_path: Path) -> None:
    images = random_images(3, 96, 96, 3)
    planes = images.transpose(0, 3, 2, 1)  # column-major planes
    files = {
        "stl10_binary/test_X.bin": random_images(1, 3, 96, 96).tobytes(),
        "stl10_binary/train_X.bin": planes[:2].tobytes(),
        "stl10_binary/train_y.bin": bytes([1, 2]),
        "stl10_binary/unlabeled_X.bin": planes[2:].tobytes(),
    }
    found, content = build(write_tar(tmp_path / "stl10_binary.tar.gz", files), tmp_path / "out.zip")
    np.testing.assert_array_equal(found, images)
    assert content["labels"] is None

    cut = tmp_path / "half.tar.gz"
    cut.write_bytes((tmp_path / "stl10_binary.tar.gz").read_bytes()[:-5000])
    assert "is damaged" in assert_refused(tmp_path, cut)
    del files["stl10_binary/unlabeled_X.bin"]
    assert "has no stl10_binary/unlabeled_X.bin" in assert_refused(tmp_path, write_tar(tmp_path / "cut.tar.gz", files))


def test_lsun_databases_are_read(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    images = random_images(3, 10, 12, 3)
    path = tmp_path / "church_train_lmdb"
    with lmdb.open(str(path), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        for key, pixels in zip([b"c", b"a", b"b"], images, strict=True):
            transaction.put(key, encode(pixels, "webp", lossless=True))
    found, content = build(path, tmp_path / "out.zip")
    np.testing.assert_array_equal(found, images[[1, 2, 0]])
    assert content["labels"] is None
    assert content["source"] == "church_train_lmdb"
    whole = (path / "data.mdb").read_bytes()
    cut = write_files(tmp_path / "cut_lmdb", {"data.mdb": whole[:-1000]})
    assert f"data.mdb should have {len(whole)} bytes" in assert_refused(tmp_path, cut)
    head = whole[: len(whole) * 2 // 3]  # two of the three pages are metadata
    truncated = write_files(tmp_path / "damaged_lmdb", {"data.mdb": head + bytes(len(whole) - len(head))})
    assert "damaged_lmdb is damaged" in assert_refused(tmp_path, truncated)


def test_numpy_arrays_are_read(tmp_path: Path) -> None:
    images = random_images(4, 5, 6, 3)
    np.save(tmp_path / "a.npy", images)
    np.testing.assert_array_equal(build(tmp_path / "a.npy", tmp_path / "a.zip")[0], images)
    np.save(tmp_path / "gray.npy", images[..., 0])
    np.testing.assert_array_equal(build(tmp_path / "gray.npy", tmp_path / "gray.zip")[0], images[..., :1])
    np.savez(tmp_path / "b.npz", images=images, labels=np.array([3, 1, 0, 2]))
    found, content = build(tmp_path / "b.npz", tmp_path / "b.zip")
    np.testing.assert_array_equal(found, images)
    assert label_values(content) == [3, 1, 0, 2]
    np.savez_compressed(tmp_path / "c.npz", images)
    assert build(tmp_path / "c.npz", tmp_path / "c.zip")[1]["labels"] is None


# Generated scenes


def test_drawn_scenes_are_reproducible(tmp_path: Path) -> None:
    found, content = build("shapes", tmp_path / "a.zip", "--max-images=40", "--seed=7", "--width=24", "--height=16")
    assert found.shape == (40, 16, 24, 3)
    assert content["class_names"] == list(KINDS)
    np.testing.assert_array_equal(found, draw_scenes(np.arange(40), seed=7, width=24, height=16))
    assert label_values(content) == scene_labels(np.arange(40), seed=7).tolist()
    build("shapes", tmp_path / "b.zip", "--max-images=40", "--seed=7", "--width=24", "--height=16")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert build("shapes", tmp_path / "c.zip", "--max-images=2")[0].shape == (2, 32, 32, 3)
    found, _ = build("shapes", tmp_path / "d.zip", "--max-images=40", "--seed=7", "--resolution=24x16")
    np.testing.assert_array_equal(found, draw_scenes(np.arange(40), seed=7, width=24, height=16))


def test_a_scene_depends_on_seed_and_index_only() -> None:
    scenes = draw_scenes(np.arange(30), seed=1, width=20, height=20)
    np.testing.assert_array_equal(draw_scenes(np.array([29, 3]), seed=1, width=20, height=20), scenes[[29, 3]])
    assert (draw_scenes(np.arange(30), seed=2, width=20, height=20) != scenes).any(axis=(1, 2, 3)).all()
    assert len({scene.tobytes() for scene in scenes}) == 30
    assert set(scene_labels(np.arange(100), seed=1).tolist()) == set(range(len(KINDS)))


# Broken and hostile input


def test_broken_images_are_named_and_skipped_on_request(tmp_path: Path) -> None:
    images = random_images(3, 6, 6, 3)
    files = {f"{k}.png": encode(pixels) for k, pixels in enumerate(images)}
    files |= {
        "0.jpg": b"no image",
        "1x.png": files["1.png"][:-40],
        "2x.png": encode(np.zeros((5, 4), np.uint8)),
    }
    source = write_files(tmp_path / "in", files)
    message = assert_refused(tmp_path, source)
    assert "Error: in: nothing was written, because of\n2 images that cannot be read:\n  0.jpg: not " in message
    assert "\n1 image of another size than the first, 6x6:\n  2x.png: 4x5\n" in message
    again = message.splitlines()[-1].strip()
    assert again.startswith("python dataset_tool.py --source=")
    assert f"--dest={tmp_path / 'refused.zip'} --workers=1 --skip-bad --transform=center-crop --width=" in again
    (source / "2x.png").unlink()
    result = run(f"--source={source}", f"--dest={tmp_path / 'out.zip'}", "--skip-bad", "--workers=1")
    assert result.exit_code == 0
    assert "3 images of 6x6 pixels" in result.output
    assert "Skipped 2 images that cannot be read:" in result.output
    for name in ("0.jpg: not ", "1x.png: "):
        assert f"\n  {name}" in result.output
    assert run("check", tmp_path / "out.zip").exit_code == 0

    only_bad = write_files(tmp_path / "bad", {"a.png": b"", "b.png": b""})
    assert "None can be read: check the source" in assert_refused(tmp_path, only_bad, "--skip-bad")


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    source = write_files(tmp_path / "in", {"bomb.png": bomb})
    assert "bomb.png: DecompressionBombError" in assert_refused(tmp_path, source)
    files = {"a.png": encode(random_images(4, 4, 3)), "big.png": bytes(MAX_IMAGE_BYTES + 1)}
    assert "big.png: 268435457 bytes" in assert_refused(tmp_path, write_zip(tmp_path / "in.zip", files))


def test_names_in_archives_are_not_used_as_paths(tmp_path: Path) -> None:
    pixels = random_images(4, 4, 3)
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ("../escape.png", "/tmp/absolute-escape.png", "a/../../b.png")
    source = write_zip(inside / "in.zip", {name: encode(pixels) for name in names})
    found, _ = build(source, inside / "out.zip")
    assert len(found) == 3
    assert os.listdir(tmp_path) == ["inside"]
    assert sorted(os.listdir(inside)) == ["in.zip", "out.zip"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.png", "b.png", "a.png"), "'a.png' 2 times:"),
        (("x/a.png", "b.png", "x/a.png", "b.png", "x/a.png"), "'x/a.png' 3 times, and 1 other name more than once:"),
        (("a.png", "dataset.json", "dataset.json"), "'dataset.json' 2 times:"),
        (("a.png", "notes.txt", "notes.txt"), "'notes.txt' 2 times:"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_files_with_duplicate_names_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    """Reading by name would silently return one of the files and lose the others."""
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k, name in enumerate(names):
            archive.writestr(name, encode(random_images(4, 4, 3)) if name.endswith("png") else f"{{}} {k}")
    assert f"{path} holds {message}" in assert_refused(tmp_path, path)
    result = run("check", path)
    assert (result.exit_code, f"{path} holds {message}" in result.stderr) == (2, True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_files_may_contain_duplicate_folder_entries(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x/", "x/a.png", "y/", "y/a.png", "x/"):
            archive.writestr(name, b"" if name.endswith("/") else encode(random_images(4, 4, 3)))
    assert len(build(path, tmp_path / "out.zip")[0]) == 2


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_pickles_run_no_code(tmp_path: Path) -> None:
    trap = pickle.dumps({b"data": RunsCode(tmp_path / "trapped"), b"labels": [0]}, 2)
    path = write_tar(tmp_path / "cifar.tar.gz", {"cifar-10-batches-py/data_batch_1": trap})
    assert "data_batch_1: the pickle refers to posix.system" in assert_refused(tmp_path, path)
    code = pickle.dumps({b"data": types.SimpleNamespace()}, 2)
    path = write_tar(tmp_path / "cifar2.tar.gz", {"cifar-100-python/train": code})
    assert "types.SimpleNamespace" in assert_refused(tmp_path, path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"fine_labels": [0, 1]}, 2), "no uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"fine_labels": [0, 1]}, 2), "no uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]}, 2), "no list of class numbers"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": ["x"]}, 2), "no list of class numbers"),
        (pickle.dumps([1, 2], 2), "is not a dictionary"),
        (b"\x80\x02garbage", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_malformed_cifar_batches_are_refused(tmp_path: Path, batch: bytes, message: str) -> None:
    path = write_tar(tmp_path / "cifar.tar.gz", {"cifar-100-python/train": batch})
    assert message in assert_refused(tmp_path, path)


def test_links_in_archives_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0]}, 2))
    links = {"cifar-100-python/train": str(tmp_path / "secret")}
    assert "train is not a regular file" in assert_refused(tmp_path, write_tar(tmp_path / "cifar.tar.gz", {}, links))


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in assert_refused(tmp_path, tmp_path / "missing")
    cifar = write_tar(tmp_path / "cifar.tar.gz", {"cifar-100-python/train": bytes(random_images(100_000))})
    cifar.write_bytes(cifar.read_bytes()[:50_000])
    write_files(
        tmp_path,
        {
            "x.bin": b"what is this",
            "x-images-idx3-ubyte": struct.pack(">IIII", 0x803, 5, 28, 28) + bytes(100),
            "y-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x0d\3" + bytes(12)),
            "z-images-idx3-ubyte.gz": gzip.compress(
                struct.pack(">IIII", 0x803, 9, 28, 28) + bytes(random_images(7056))
            )[:500],
            "bad.npy": b"\x93NUMPY",
            "bad.zip": b"PK",
            "lmdb/data.mdb": b"broken",
        },
    )
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 3)))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "labels.npz", images=random_images(2, 4, 4), labels=np.array([0, 1, 2]))
    np.savez(tmp_path / "names.npz", a=random_images(2, 4, 4), b=random_images(2, 4, 4))
    other = write_tar(tmp_path / "other.tar", {"photos/a.txt": b""})
    for name, message in [
        ("cifar.tar.gz", "damaged"),
        ("x.bin", "is of an unknown kind: give a folder"),
        ("x-images-idx3-ubyte", "ends after 100 of 3920 bytes"),
        ("y-images-idx3-ubyte.gz", "is not an idx file"),
        ("z-images-idx3-ubyte.gz", "cannot be read"),
        ("bad.npy", "cannot be read as numpy arrays"),
        ("bad.zip", "not a complete zip file"),
        ("lmdb", "cannot be read as lmdb"),
        ("float.npy", "images are float64 of shape [2, 4, 4, 3]"),
        ("object.npy", "cannot be read as numpy arrays"),
        ("labels.npz", "labels are int64 of shape [3]"),
        ("names.npz", "holds the arrays a, b: rename the array of images"),
        (other.name, "; it holds 'photos/a'"),
    ]:
        output = assert_refused(tmp_path, tmp_path / name)
        assert message in output
        assert name in output
    assert "give width and height in pixels, such as 256x256" in assert_refused(tmp_path, "shapes", "--resolution=256")
    assert "or --width and --height" in assert_refused(tmp_path, "shapes", "--resolution=32x32", "--width=32")
    assert "--labels-from-folders needs a folder" in assert_refused(tmp_path, "shapes", "--labels-from-folders")
    source = write_files(tmp_path / "mixed", {"a/1.png": b"", "2.png": b""})
    assert "'2.png' is not: move such" in assert_refused(tmp_path, source, "--labels-from-folders")


def test_an_existing_destination_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"precious")
    write_files(tmp_path / "full", {"x": b"precious"})
    (tmp_path / "empty").mkdir()
    for dest, code in [("a.zip", 2), ("full", 2), ("empty", 0)]:
        result = run("--source=shapes", f"--dest={tmp_path / dest}", "--max-images=3", "--workers=1")
        assert result.exit_code == code, result.output
        assert code == 0 or "exists: remove it or choose another name" in result.output
    assert (tmp_path / "a.zip").read_bytes() == b"precious"
    assert (tmp_path / "empty" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("dest", "message"),
    [
        ("dangling.zip", "exists: remove it"),
        ("link-to-empty", "exists: remove it"),
        ("fifo", "exists: remove it"),
        ("empty.zip", "exists: remove it"),  # a folder
        ("/dev/null", "exists: remove it"),
        ("/dev/null/x.zip", "/dev/null is not a folder"),
        ("src/1.png/x.zip", "src/1.png is not a folder"),
        ("src/1.png/new/x", "src/1.png is not a folder"),
        ("dangling.zip/x", "dangling.zip is not a folder"),
        ("src/out", "is inside --source="),
        ("src/new/out", "is inside --source="),
        ("alias/out", "is inside --source="),
        ("src/../src/out.d", "is inside --source="),
        (".", "give the name of a .zip file or folder"),
    ],
)
def test_unusable_destinations_are_refused_before_reading(
    tmp_path: Path, dest: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_files(tmp_path / "src", {f"{k}.png": encode(random_images(8, 8, 3)) for k in range(3)})
    for link, target in [("dangling.zip", "/nowhere/x"), ("link-to-empty", "empty.zip"), ("alias", "src")]:
        (tmp_path / link).symlink_to(target)
    (tmp_path / "empty.zip").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = run(f"--source={source}", f"--dest={dest}", "--workers=1")
    assert (result.exit_code, result.stdout) == (2, "")  # refused before the source is read
    assert result.stderr.startswith(f"Error: --dest={dest}")
    assert message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "empty.zip").is_symlink()


def test_the_destination_zip_may_be_inside_the_source_folder(tmp_path: Path) -> None:
    source = write_files(tmp_path / "src", {"1.png": encode(random_images(8, 8, 3))})
    first, _ = build(source, source / "set.zip")
    again, _ = build(source, source / "new" / "again.zip")
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", ["set.zip", "set"])
def test_a_dataset_of_another_process_is_not_overwritten(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / name

    def write_other(*_: Any, **__: Any) -> dict[str, Any]:
        write_files(tmp_path, {name if dest.suffix else f"{name}/0.png": b"of the other"})
        return {}

    monkeypatch.setattr(dataset_tool, "describe", write_other)  # the last step before the rename to the destination
    result = run("--source=shapes", f"--dest={dest}", "--max-images=3", "--workers=1")
    assert (result.exit_code, result.stderr) == (2, f"Error: --dest={dest} exists: remove it or choose another name\n")
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"of the other"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGKILL,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_signals_end_all_workers_and_leave_no_files(tmp_path: Path, number: signal.Signals) -> None:
    source = write_files(tmp_path / "src", {f"{k}.png": encode(random_images(8, 8, 3)) for k in range(256)})
    for k in range(256, 8000):
        os.link(source / f"{k % 256}.png", source / f"{k}.png")
    start = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_path('{}', {})"
    code = start.format(dataset_tool.__file__, "run_name='__main__'")
    options = [f"--source={source}", f"--dest={tmp_path / 'set.zip'}", "--width=512", "--height=512", "--workers=2"]
    with subprocess.Popen([sys.executable, "-c", code, *options], stderr=subprocess.PIPE, text=True) as tool:
        wait_until(lambda: any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".set.zip.*.partial")))
        tool.send_signal(number)
        _, errors = tool.communicate(timeout=60)  # a surviving worker would keep the pipe open
    assert "Traceback" not in errors
    assert tool.returncode == {signal.SIGINT: 1, signal.SIGKILL: -number}.get(number, 128 + number)
    assert number == signal.SIGKILL or [path.name for path in tmp_path.iterdir()] == ["src"]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    "options",
    [
        ("--width=100000", "--height=100000"),
        ("--width=9500", "--height=9500"),
        ("--width=8001", "--height=1"),
        ("--width=1", "--height=99999999"),
        ("--resolution=8x8001",),
        ("--width=20000", "--height=8", "--transform=center-crop-letterbox"),
    ],
)
@pytest.mark.parametrize("kind", ["files", "shapes"])
def test_sizes_beyond_the_readable_limit_are_refused(tmp_path: Path, options: tuple[str, ...], kind: str) -> None:
    source = write_files(tmp_path / "src", {"1.png": encode(random_images(8, 8, 3))})
    message = assert_refused(tmp_path, source if kind == "files" else "shapes", *options)
    assert "images of a dataset have at most 8000 pixels per side: choose a smaller size" in message


def test_images_that_exceed_the_readable_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causes other than --resolution: more channels, padding, and the pixel limit of Pillow."""
    np.save(tmp_path / "large.npy", random_images(1, 100, 100, 3))
    monkeypatch.setattr("training.data_sources.build.MAX_IMAGE_BYTES", (1 << 17) + 30_100)
    build(tmp_path / "large.npy", tmp_path / "fits.zip")
    for options, size in [(("--channels=4",), "100x100 pixels and 4"), (("--pad=1",), "102x102 pixels and 3")]:
        message = assert_refused(tmp_path, tmp_path / "large.npy", *options)
        assert f"image 0: an image of {size} channels exceeds the size limit of a dataset: choose a" in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    assert "100x100 pixels" in assert_refused(tmp_path, tmp_path / "large.npy", "--channels=1")


def test_the_largest_allowed_images_can_be_read() -> None:
    part = len(encode_png(random_images(1000, 1000, 4)))
    assert part * (MAX_SIDE / 1000) ** 2 < MAX_IMAGE_BYTES
    assert len(encode_png(random_images(MAX_SIDE, 1, 4))) < MAX_IMAGE_BYTES
    assert Image.MAX_IMAGE_PIXELS
    assert Image.MAX_IMAGE_PIXELS > MAX_SIDE**2


def test_the_number_of_drawn_scenes_is_limited(tmp_path: Path) -> None:
    assert "shapes has at most 10000000 images" in assert_refused(tmp_path, "shapes", "--max-images=1000000000000")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        (b"a\nb", r"a\x0ab"),
        (b"red\x1b[31m", r"red\x1b[31m"),
        (b"back\rover", r"back\x0dover"),
        (b"tab\t", r"tab\x09"),
        (b"latin-\xe9", r"latin-\xe9"),
        ("left\u202etfel".encode(), r"left\u202etfel"),
        ("Zoë".encode(), "Zoë"),
    ],
)
def test_printed_names_have_no_control_characters(tmp_path: Path, name: bytes, printed: str) -> None:
    """Names of images, classes and skipped files, printed by build and by check."""
    text = os.fsdecode(name)
    source = write_files(tmp_path / "src", {f"{text}/broken.png": b"x", f"{text}/n.{text}": b"x"})
    write_files(
        source,
        {f"{text}/1.png": encode(random_images(8, 8, 3)), "z/2.png": encode(random_images(8, 8, 3))},
    )
    made = run(f"--source={source}", f"--dest={tmp_path / 'set.zip'}", "-v", "--labels-from-folders", "--workers=1")
    checked = run("check", source, "-v", "--workers=1")
    assert (made.exit_code, checked.exit_code) == (2, 1)
    assert f"2 classes: {printed} 2, z 1" in made.stdout
    assert f"\n  {printed}/broken.png: " in made.stderr
    assert f"images are in 2 folders: {printed} 2, z 1" in checked.stdout
    for output in (made.stdout, checked.stdout):
        assert f"\n    {printed}/n.{printed}\n" in output
    assert f"\n  {printed}/broken.png: " in checked.stdout
    both = made.output + checked.output
    assert all(letter == "\n" or letter.isprintable() for letter in both)


# check


def test_check_lists_every_problem(tmp_path: Path) -> None:
    assert run("--source=shapes", f"--dest={tmp_path / 'set'}", "--max-images=6", "--workers=1").exit_code == 0
    result = run("check", tmp_path / "set")
    assert result.exit_code == 0
    assert "6 images of 32x32 pixels and 3 channels, with labels" in result.output

    images = tmp_path / "set" / "00000"
    (images / "img00000001.png").write_bytes(b"broken")
    (images / "img00000002.png").write_bytes(encode(random_images(16, 32, 3)))
    (images / "img00000003.png").unlink()
    (images / "new.png").write_bytes((images / "img00000000.png").read_bytes())
    result = run("check", tmp_path / "set")
    assert result.exit_code == 1
    for words in [
        "1 image that cannot be read:\n  00000/img00000001.png: not an image",
        "1 image that differs in size from the most common, 32x32:\n  00000/img00000002.png: 32x16\n",
        "1 image without a label:\n  00000/new.png\n",
        "1 label without an image:\n  00000/img00000003.png\n",
        "2 images in 1 group of exact copies:\n  00000/img00000000.png = 00000/new.png\n",
    ]:
        assert words in result.stdout


def test_check_refuses_a_missing_path(tmp_path: Path) -> None:
    result = run("check", tmp_path / "missing.zip")
    assert result.exit_code == 2
    assert "missing.zip does not exist" in result.output


def test_help_shows_the_build_options() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "--resize-filter" in result.output
    assert "check PATH" in result.output
