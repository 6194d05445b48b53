"""Hostile files of datasets and runs: time and memory stay in proportion to the file, and no program is started."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import json
import lzma
import math
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

pytest.importorskip("hypothesis", reason="hypothesis is an optional package")
from conftest import small_config
from fuzzing import (
    CHANGES,
    CORRUPTION,
    corrupted,
    draws,
    for_all,
    read_all,
    run,
    time_limit,
    with_change,
    zip_bytes,
)
from hypothesis import strategies as st
from image_helpers import (
    claims,
    encoded,
    icon,
    iso_with_claims,
    jpeg2000,
    jpeg_with,
    overlapping_tiff,
    png_chunk,
    png_header,
    psd,
    tiff,
)

import dataset_tool
import generate
import report
from dnnlib.config import UserError
from dnnlib.image_files import MAX_EXIF_SEGMENTS, MAX_SCANS, BrokenImageError
from dnnlib.images import FORMATS, IMAGE_SUFFIXES, open_image, orientation_of
from exploration.projection import read_targets
from metrics.sampling import explain_shape_mismatch
from reporting.charts import find_charts
from reporting.drawing import draw
from reporting.page import build_page
from reporting.run_reader import read_run
from training import run_folder
from training.data_sources import bounds, cifar
from training.data_sources.codec import decode_image, read_shape
from training.data_sources.lmdb_file import LmdbFile
from training.dataset import DatasetConfig, ImageDataset

ROOT = Path(__file__).parent.parent
FOLDERS = ("dnnlib", "torch_utils", "training", "metrics", "exploration", "reporting", "benchmarks", "docs")
PIXELS = np.random.RandomState(0).randint(0, 256, (8, 8, 3), np.uint8)
GOOD, JPEG = (encoded(Image.fromarray(PIXELS), kind) for kind in ("PNG", "JPEG"))
MB = 1 << 20


@contextmanager
def in_bounds(most: int) -> Iterator[None]:
    """Fail if the body of the `with` statement hangs or has more than `most` bytes allocated at once."""
    tracemalloc.start()
    try:
        with time_limit():
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most, f"{peak / MB:.0f} MB"


def assert_refused(tmp_path: Path, path: Path, message: str, most: int = 200 * MB) -> None:
    """Assert that a source is refused within the limits and leaves no files."""
    with in_bounds(most):
        assert run(dataset_tool.main, f"--source={path}", f"--dest={tmp_path / 'made.zip'}", "--workers=1") == 2
    assert not (tmp_path / "made.zip").exists()
    with pytest.raises(UserError, match=message):
        list(dataset_tool.open_source(str(path), labels_from_folders=None, drawing=dataset_tool.Drawing(0, 1, 8, 8)))


# --- programs

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
DOCUMENTS = {
    "eps": EPS,
    "ps": b"%!PS\nshowpage\n",
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "dos-eps": b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS,
}


@pytest.fixture
def program_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a file that fake Ghostscript and JPEG programs, first on PATH, create when they start."""
    program_mark, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c", "djpeg", "cjpeg"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {program_mark}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return program_mark


def test_pillow_would_start_the_fake_program(program_mark: Path) -> None:
    with suppress(OSError), Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert program_mark.exists()


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_named_like_images_start_no_program(program_mark: Path, tmp_path: Path, kind: str) -> None:
    document = DOCUMENTS[kind]
    for suffix in IMAGE_SUFFIXES:
        name = f"1{suffix}"
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / name).write_bytes(document)
        archive = tmp_path / f"{suffix}.zip"
        archive.write_bytes(zip_bytes([("0.png", GOOD), (name, document)]))
        for path in (folder, archive):
            assert run(dataset_tool.main, "check", str(path)) == 1
            assert run(dataset_tool.main, f"--source={path}", f"--dest={tmp_path / 'made.zip'}", "--workers=1") == 2
            assert all("which is not supported: export as PNG" in (message or "") for message in read_all(path)[:1])
        for target in (folder, folder / name, archive):
            with pytest.raises(UserError, match="document, which is not supported: export as PNG"):
                read_targets(target)
    folder = make_run(tmp_path / "run", {"fakes000002.png": document, "reals.png": document})
    shown = read_run(folder, "run")
    build_page([shown], [], 2)
    assert sum("which is not supported: export as PNG" in problem for problem in shown.problems) == 2
    assert not program_mark.exists()


def test_every_image_open_call_restricts_the_formats() -> None:
    """`Image.open` without `formats` tries every Pillow plugin, including plugins that start programs."""
    paths = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
    assert {path.parent.name for path in paths} >= set(FOLDERS)
    for path in paths:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "Image.open" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in [keyword.arg for keyword in node.keywords], path
    known = {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PSD", "TGA", "ICO", "PPM", "JPEG2000", "AVIF", "HEIF"}
    assert set(FORMATS) <= known


# --- images


def jpeg(side: int, scans: int) -> bytes:
    """Make a small grayscale progressive JPEG with the given number of scans without coefficients."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content

    blocks = (-(-side // 8)) ** 2
    bits = ("0" + "1" * 14) * -(-blocks // 32767)  # runs of empty blocks
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    parts = [b"\xff\xd8", segment(0xDB, bytes([0] + [1] * 64))]
    parts += [segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))]
    parts += [segment(0xC4, bytes([0x00, 1, *[0] * 15, 0])), segment(0xC4, bytes([0x10, 1, 1, *[0] * 14, 0xE0, 0]))]
    parts += [segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-blocks // 8))]
    parts += [segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + coded] * (scans - 1)
    return b"".join([*parts, b"\xff\xd9"])


def exif(orientation: int, order: str = "<", others: int = 0) -> bytes:
    """Make EXIF data with an orientation after other tags that all refer to the same bytes."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, others + 1)
    place = len(head) + 12 * (others + 1) + 4
    tags = [struct.pack(f"{order}HHII", 1 + k % 0x111, 7, 1000, place) for k in range(others)]
    tags.append(struct.pack(f"{order}HHIHH", 0x112, 3, 1, orientation, 0))
    return head + b"".join(tags) + bytes(4) + bytes(1000)


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """Insert chunks before the pixels of GOOD."""
    return GOOD[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + GOOD[33:]


ZEROS = zlib.compress(bytes(100 * MB), 9)
BOMBS: dict[str, Callable[[], bytes]] = {
    "scans": lambda: jpeg(512, MAX_SCANS + 1),
    "many scans": lambda: jpeg(64, 5000),
    "text": lambda: png_with((b"zTXt", b"k\0\0" + ZEROS)),
    "international text": lambda: png_with((b"iTXt", b"k\0\1\0\0\0" + ZEROS)),
    "profile": lambda: png_with((b"iCCP", b"k\0\0" + ZEROS)),
    "EXIF data as text": lambda: png_with((b"zTXt", b"Raw profile type exif\0\0" + ZEROS)),
    "texts": lambda: png_with(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(MB), 9))] * 100),
    "false size in PNG": lambda: png_header(9000, 9000) + GOOD[33:],
    "false size in BMP": lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 9000, 9000, 1, 24, *[0] * 6),
    "BMP runs": lambda: (
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 1078, 0, 0, 1078, 40, 9000, 9000, 1, 8, 1, 0, 0, 0, 256, 0)
        + bytes(1024)
        + b"\0\2\0\xff" * 400
    ),
    "false size in WebP": lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\2\0\0\0" + b"\xfe\x3f\0" * 2,
    "EXIF in parts": lambda: encoded(Image.fromarray(PIXELS), "JPEG").replace(
        b"\xff\xdb",
        b"".join(b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + bytes(60_000) for _ in range(3)) + b"\xff\xdb",
        1,
    ),
    "EXIF after a false scan marker": lambda: jpeg_with(
        JPEG, (0xFE, b"\xff\xda"), *[(0xE1, b"Exif\0\0" + bytes(60_000))] * (MAX_EXIF_SEGMENTS + 1)
    ),
    "EXIF after segments that Pillow skips": lambda: jpeg_with(
        JPEG, *[(0xE1, b"Exif\0\0" + bytes(60_000))] * (MAX_EXIF_SEGMENTS + 1)
    ).replace(b"\xff\xd8", b"\xff\xd8\xff\xf0\xff\xe2\0\6\xff\xda\0\2", 1),
}


ROWS = [bytes(8)] * 8
TAGS = {258: (3, [8]), 262: (3, [1])}
GOOD_PSD = psd(PIXELS[None, :, :, 0], 1)
GIF = encoded(Image.new("L", (8, 8)), "GIF")
FRAME = 13 + 3 * 2 ** ((GIF[10] & 7) + 1)  # offset after the header and the palette
BOMBS |= {
    "TIFF with overlapping values": overlapping_tiff,
    "TIFF with overlapping strips": lambda: tiff(
        [bytes(50_000)],
        1,
        TAGS | {257: (4, [9000]), 259: (3, [8]), 278: (4, [1]), 273: (4, [8] * 9000), 279: (4, [50_000] * 9000)},
    ),
    "false size in TIFF": lambda: tiff(ROWS, 9000, TAGS | {257: (4, [9000]), 278: (4, [9000])}),
    "TIFF with too many strips": lambda: tiff(ROWS, 8, TAGS | {273: (4, [8] * 60_000), 279: (4, [64] * 60_000)}),
    "LZMA in TIFF": lambda: tiff(ROWS, 8, TAGS | {259: (3, [34925])}),
    "TIFF channels": lambda: tiff(ROWS, 8, TAGS | {277: (4, [1 << 30])}),
    "GIF comments": lambda: GIF[:FRAME] + (b"!\xfe" + (b"\xff" + bytes(255)) * 5000 + b"\0") + GIF[FRAME:],
    "false size in GIF": lambda: GIF[:6] + b"\xff\x40\xff\x40" + GIF[10:],
    "PNG in an icon": lambda: icon((16, 16, 32, png_header(9000, 9000) + GOOD[33:])),
    "bitmap in an icon": lambda: icon((16, 16, 32, struct.pack("<Iii", 40, 9000, 18000) + bytes(5000))),
    "icons": lambda: icon(*[(16, 16, 32, b"")] * 60_000),
    "false size in PSD": lambda: psd(PIXELS[None, :, :, 0], 1, size=(9000, 9000)),
    "false size in run-length PSD": lambda: psd(PIXELS[None, :, :, 0], 1, size=(4000, 4000), runs=True),
    "PSD resources": lambda: GOOD_PSD[:30] + struct.pack(">I", 1 << 30) + bytes(1 << 20),
    "false size in JPEG 2000": lambda: jpeg2000(30_000, 30_000),
    "JPEG 2000 precincts": lambda: jpeg2000(4096, 4096, precincts=bytes(6)),
    "JPEG 2000 blocks": lambda: jpeg2000(4096, 4096, blocks=0),
    "JPEG 2000 tiles": lambda: jpeg2000(4096, 4096, 17),
    "JPEG 2000 layers": lambda: jpeg2000(4096, 4096, layers=65535),
    "false size in PPM": lambda: b"P6 9000 9000 255\n" + bytes(100),
    "PPM comments": lambda: b"P3 1000 1000 255\n" + b"#\n" * 1_000_000,
    "PPM header": lambda: b"P6" + b" #\n" * 300_000,
    "Targa runs": lambda: struct.pack("<BBBHHBHHHHBB", 0, 0, 11, 0, 0, 0, 0, 0, 4000, 4000, 8, 0) + b"\xff\0" * 125_001,
}
if "AVIF" in FORMATS:
    BOMBS["EXIF data of AVIF"] = lambda: iso_with_claims("AVIF")


@pytest.mark.parametrize("bomb", BOMBS)
def test_images_with_disproportionate_cost_are_refused(bomb: str) -> None:
    data = BOMBS[bomb]()
    with in_bounds(30 * MB), pytest.raises(BrokenImageError):
        decode_image(data)


def test_images_at_the_limits_are_decoded() -> None:
    assert decode_image(jpeg(512, MAX_SCANS)).shape == (512, 512, 1)
    blank = encoded(Image.new("L", (4096, 4096)))
    assert len(blank) < 20_000
    assert read_shape(blank) == (4096, 4096, 1)


def test_only_the_first_image_of_a_file_is_decoded() -> None:
    """GIF frames, TIFF pages, and an MPO whose index of images claims more than the file has."""
    image = Image.fromarray(PIXELS[:, :, 0])
    gif = encoded(image, "GIF")
    mpo = jpeg_with(JPEG, (0xE2, b"MPF\0" + claims(400)[:65_000]))
    pages = bytearray(tiff([row.tobytes() for row in PIXELS[:, :, 0]], 8, TAGS))
    (first,) = struct.unpack_from("<I", pages, 4)
    (count,) = struct.unpack_from("<H", pages, first)
    struct.pack_into("<I", pages, first + 2 + 12 * count, len(pages))
    pages += b"".join(struct.pack("<HI", 0, len(pages) + 6 * (k + 1)) for k in range(100_000))
    with in_bounds(30 * MB):
        assert decode_image(gif[:-1] + GIF[FRAME:-1] * 100_000 + b";").shape[:2] == (8, 8)
        np.testing.assert_array_equal(decode_image(mpo), decode_image(encoded(Image.fromarray(PIXELS), "JPEG")))
        np.testing.assert_array_equal(decode_image(bytes(pages)), PIXELS[:, :, :1])


def test_other_data_in_a_jpeg_is_ignored() -> None:
    """Arbitrary bytes, such as a video appended by a phone, a preview or camera notes."""
    plain = encoded(Image.fromarray(PIXELS), "JPEG")
    scans = b"\xff\xda" * 1000
    for data in (
        plain + np.random.RandomState(0).bytes(8 * MB),
        plain + scans,
        jpeg_with(JPEG, (0xFE, scans), (0xE1, b"Exif\0\0" + exif(1) + scans), (0xE2, plain * 20)),
    ):
        np.testing.assert_array_equal(decode_image(data), decode_image(plain))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_pillow(orientation: int, kind: str, order: str) -> None:
    image = Image.fromarray(PIXELS[:5])
    data = encoded(
        image, kind, exif=b"Exif\0\0" + exif(orientation, order), **({} if kind == "PNG" else {"quality": 90})
    )
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(decode_image(data), expected)
    assert read_shape(data) == expected.shape


@draws(40, 3000)
def test_corrupt_exif_data_gives_a_valid_orientation(examples: int) -> None:
    @for_all(examples, st.integers(0, 2**16 - 1), st.sampled_from("<>"), st.integers(0, 300), CORRUPTION)
    def check(orientation: int, order: str, others: int, corruption: Any) -> None:
        with open_image(png_with((b"eXIf", corrupted(exif(orientation, order, others), corruption)))) as image:
            image.load()
            assert 1 <= orientation_of(image) <= 8


# --- archives


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def tar_of(files: dict[str, bytes]) -> bytes:
    return b"".join(header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in files.items()) + bytes(
        1024
    )


def pickled(content: Any) -> bytes:
    return pickle.dumps(content, 2)


def small_cifar(**others: bytes) -> dict[str, bytes]:
    """Make the files of a small CIFAR-10, with some files replaced."""
    batch = pickled({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]})
    files = {f"data_batch_{k}": batch for k in range(1, 6)} | {"batches.meta": pickled({b"label_names": [b"a", b"b"]})}
    return {f"cifar-10-batches-py/{name}": data for name, data in (files | others).items()}


def shared(levels: int) -> list[Any]:
    """Nest lists that refer to the same list twice: 2^levels leaves when written out."""
    names: list[Any] = ["x"]
    for _ in range(levels):
        names = [names, names]
    return names


def shared_tuples() -> bytes:
    """Make a pickle of a dictionary whose key is a tuple of 2^40 shared parts."""
    steps = b"".join(b"h%ch%c\x86q%c0" % (k, k, k + 1) for k in range(40))
    return b"\x80\x02}U\1x\x85q\0000" + steps + b"h\x28K\1s."


def repeated_text() -> bytes:
    """Make a pickle that encodes a text of 1 MB 20,000 times."""
    text = b"X" + struct.pack("<I", MB) + b"a" * MB
    return b"\x80\x02" + text + b"q\0c_codecs\nencode\nq\1(" + b"h\1h\0X\6\0\0\0latin1\x86R" * 20_000 + b"t."


PICKLES: dict[str, tuple[dict[str, bytes], str]] = {
    "names": ({"batches.meta": pickled({b"label_names": shared(60)})}, "no list of strings"),
    "names in tuples": ({"batches.meta": pickled({b"label_names": [(1, b"a")]})}, "no list of strings"),
    "labels": (
        {"data_batch_1": pickled({b"data": np.zeros((1, 3072), np.uint8), b"labels": shared(60)})},
        "class numbers",
    ),
    "large label": (
        {"data_batch_2": pickled({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**5000]})},
        "class numbers",
    ),
    "keys": ({"batches.meta": shared_tuples()}, "batches.meta cannot be read"),
    "repeated": ({"batches.meta": repeated_text()}, "encode to more bytes"),
    "objects": ({"batches.meta": b"\x80\x02(" + b"}" * 200_000 + b"t."}, "more parts than the limit of 100000"),
    "false size": (
        {"batches.meta": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"."},
        "batches.meta cannot be read",
    ),
    "set": ({"batches.meta": b"\x80\x04\x8f(K\1\x90."}, "batches.meta cannot be read"),
    "persistent": ({"batches.meta": b"P1\n."}, "batches.meta cannot be read"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_cifar_pickles_of_disproportionate_cost_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "_MAX_READS", 100_000)
    files, message = PICKLES[name]
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(gzip.compress(tar_of(small_cifar(**files)), 1))
    assert_refused(tmp_path, path, message, 50 * MB)


def test_a_large_memo_index_allocates_no_memory(tmp_path: Path) -> None:
    """The pickle is valid, but pickle.Unpickler would allocate an array of 2^31 pointers."""
    path = tmp_path / "cifar.tar"
    path.write_bytes(tar_of(small_cifar(**{"batches.meta": b"\x80\x02}r\xff\xff\xff\x3f."})))
    with in_bounds(50 * MB):
        assert run(dataset_tool.main, f"--source={path}", f"--dest={tmp_path / 'made.zip'}", "--workers=1") == 0


FIRST = header("cifar-10-batches-py/x", 0)
TARS: dict[str, tuple[bytes, str]] = {
    "false size": (header("cifar-10-batches-py/data_batch_1", 1 << 27), "data_batch_1 cannot be read"),
    "too large": (header("cifar-10-batches-py/data_batch_1", 7 << 30), "not a regular file within the size limit"),
    "PAX": (FIRST + header("pax", 7 << 30, tarfile.XHDTYPE), "is damaged"),
    "digits": (FIRST + header("pax", 400_000, tarfile.XHDTYPE) + b"1" * 400_384 + bytes(1024), "holds no uint8 array"),
    "long name": (FIRST + header("name", 7 << 30, tarfile.GNUTYPE_LONGNAME), "is damaged"),
    "long names": (
        FIRST + (header("name", 1, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 2000 + bytes(1024),
        "holds no uint8",
    ),
    "sparse member": (
        header("stl10_binary/train_X.bin", 0, tarfile.GNUTYPE_SPARSE) + bytes(1024),
        "whole 96x96 images",
    ),
    "many": (FIRST * 101, "more than 100 members"),
    "link": (header("cifar-10-batches-py/data_batch_1", 0, tarfile.LNKTYPE), "not a regular file"),
    "duplicate member": (tar_of(small_cifar())[:-1024] * 2, "not a regular file"),
    "STL": (header("stl10_binary/train_X.bin", 27648 * 10**5) + bytes(512), "is damaged"),
}


@pytest.mark.parametrize("name", TARS)
def test_false_sizes_in_tar_headers_allocate_no_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "_MAX_MEMBERS", 100 if name == "many" else 10_000)
    content, message = TARS[name]
    path = tmp_path / "set.tar"
    path.write_bytes(content)
    assert_refused(tmp_path, path, message, 50 * MB)


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_archives_exceeding_the_ratio_are_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "UNPACKED_AT_LEAST", 4 * MB)
    pack = PACKERS[suffix]
    path = tmp_path / f"set.tar.{suffix}"
    path.write_bytes(pack(FIRST + header("other", 1 << 30)) + pack(bytes(MB)) * 64)
    assert_refused(tmp_path, path, "unpacks to more than", 50 * MB)
    path = tmp_path / f"t10k-images-idx3-ubyte.{suffix}"
    path.write_bytes(pack(struct.pack(">IIII", 0x803, 1 << 20, 64, 64)) + pack(bytes(MB)) * 64)
    assert_refused(tmp_path, path.rename(tmp_path / "t10k-images-idx3-ubyte.gz"), "unpacks to more than", 50 * MB)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_arrays_exceeding_the_ratio_are_refused(
    tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "UNPACKED_AT_LEAST", MB)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((32, 256, 256, 1), np.uint8))
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("images.npy", buffer.getvalue())
    assert_refused(tmp_path, path, "unpacks to", 50 * MB)
    with in_bounds(10 * MB), pytest.raises(ValueError, match="save it uncompressed, with numpy"):
        bounds.load_npz(path)


def test_uncompressed_arrays_have_no_ratio_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binary masks compress beyond the ratio limit; the error message advises to save them uncompressed."""
    monkeypatch.setattr(bounds, "UNPACKED_AT_LEAST", MB)
    masks = np.zeros((100, 128, 128), bool)
    np.savez_compressed(tmp_path / "masks.npz", images=masks)
    with pytest.raises(ValueError, match="save it uncompressed, with numpy"):
        bounds.load_npz(tmp_path / "masks.npz")
    np.savez(tmp_path / "masks.npz", images=masks)
    assert np.array_equal(bounds.load_npz(tmp_path / "masks.npz")["images"], masks)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_with_a_false_header_are_refused(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8)})
    path = tmp_path / f"lie.{suffix}"
    path.write_bytes(buffer.getvalue() if suffix == "npy" else zip_bytes([("images.npy", buffer.getvalue())]))
    assert_refused(
        tmp_path, path, "cannot be read as numpy arrays", 1 << 60
    )  # NumPy reserves the array, but never touches the memory


@pytest.mark.parametrize(
    "labels", [[2**63, 1], [2**31, 1], [-1, 0], [[1e300], [1.0]], [[math.nan], [1.0]], [["a"], ["b"]]]
)
def test_invalid_label_arrays_are_refused(tmp_path: Path, labels: list[Any]) -> None:
    path = tmp_path / "set.npz"
    kind = np.uint64 if labels == [2**63, 1] else None
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8), labels=np.array(labels, kind))
    assert_refused(tmp_path, path, "but must be class numbers from 0")


def test_overlapping_zip_members_are_refused(tmp_path: Path) -> None:
    """A thousand names share the bytes of one image of 1 MB."""
    data = encoded(Image.fromarray(np.random.RandomState(0).randint(0, 256, (600, 600, 3), np.uint8)))
    raw = zip_bytes([("0000.png", data)])
    start, end = raw.rindex(b"PK\1\2"), raw.rindex(b"PK\5\6")
    names = b"".join(raw[start:end].replace(b"0000.png", b"%04d.png" % k) for k in range(1000))
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1000, 1000, len(names), start, 0)
    (tmp_path / "set.zip").write_bytes(raw[:start] + names + tail)
    assert_refused(tmp_path, tmp_path / "set.zip", "overlaps another member", 20 * MB)


@draws(60, 3000)
def test_corrupt_archives_get_one_error_message(tmp_path: Path, examples: int) -> None:
    files = [
        tar_of(small_cifar()),
        tar_of({"stl10_binary/train_X.bin": bytes(27648), "stl10_binary/unlabeled_X.bin": bytes(27648)}),
    ]
    packed = [pack(data) for data in files for pack in (bytes, *PACKERS.values())]
    kinds = [("set.tar", data) for data in packed]
    kinds.append(("x-images-idx3-ubyte.gz", gzip.compress(struct.pack(">IIII", 0x803, 5, 8, 8) + bytes(320))))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 1]))
    kinds.append(("set.npz", buffer.getvalue()))

    @for_all(examples, st.sampled_from(kinds), CORRUPTION)
    def check(kind: tuple[str, bytes], corruption: Any) -> None:
        path = tmp_path / kind[0]
        path.write_bytes(corrupted(kind[1], corruption))
        (tmp_path / "made.zip").unlink(missing_ok=True)
        run(dataset_tool.main, f"--source={path}", f"--dest={tmp_path / 'made.zip'}", "--workers=1")


@draws(60, 3000)
def test_malformed_cifar_pickles_get_one_error_message(tmp_path: Path, examples: int) -> None:
    """All pickle opcodes in any order, after a prefix that fills the stack."""
    codes = st.sampled_from(
        [bytes([code]) for code in range(256)] + [b"h\0", b"q\0", b"\x85", b"(", b"U\1x", b"K\1", b"R", b"b"]
    )

    @for_all(examples, st.lists(codes | st.binary(max_size=4), max_size=30), CORRUPTION)
    def check(program: list[bytes], corruption: Any) -> None:
        good = small_cifar()["cifar-10-batches-py/data_batch_1"]
        strange = b"\x80\x02}q\0" + b"".join(program) + b"." if program else corrupted(good, corruption)
        (tmp_path / "cifar.tar").write_bytes(tar_of(small_cifar(data_batch_1=strange)))
        (tmp_path / "made.zip").unlink(missing_ok=True)
        run(dataset_tool.main, f"--source={tmp_path / 'cifar.tar'}", f"--dest={tmp_path / 'made.zip'}", "--workers=1")


@pytest.fixture(scope="module")
def sample_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an LMDB database written in several transactions: branch, leaf, overflow and free pages."""
    lmdb = pytest.importorskip("lmdb", reason="lmdb is an optional package")
    folder = tmp_path_factory.mktemp("lmdb")
    stream = np.random.RandomState(0)
    items = {stream.bytes(stream.randint(1, 200)): stream.bytes(stream.randint(0, 6000)) for _ in range(150)}
    with lmdb.open(str(folder), map_size=1 << 24) as env:
        for part in range(3):
            with env.begin(write=True) as transaction:
                for key in list(items)[part::3]:
                    transaction.put(key, items[key])
        with env.begin(write=True) as transaction:
            for key in list(items)[::7]:
                transaction.delete(key)
    return folder


def test_lmdb_files_have_the_same_entries_as_in_the_library(sample_database: Path) -> None:
    lmdb = pytest.importorskip("lmdb", reason="lmdb is an optional package")
    with lmdb.open(str(sample_database), readonly=True, lock=False) as env, env.begin() as transaction:
        expected = list(transaction.cursor())
    found = LmdbFile(sample_database)
    assert list(found) == expected == list(found)
    assert found.num_entries == len(expected) > 100


@draws(60, 3000)
def test_corrupt_lmdb_files_raise_only_value_errors(sample_database: Path, tmp_path: Path, examples: int) -> None:
    """The library itself aborts the process on some of these files."""
    whole = (sample_database / "data.mdb").read_bytes()

    @for_all(
        examples,
        CORRUPTION,
        st.lists(st.tuples(st.integers(0, len(whole) // 4096 - 1), st.integers(0, 63)), max_size=4),
    )
    def check(corruption: Any, heads: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for page, byte in heads:
            data[4096 * page + byte] ^= 255
        (tmp_path / "data.mdb").write_bytes(corrupted(bytes(data), corruption))
        with suppress(ValueError):
            assert sum(len(value) for _, value in LmdbFile(tmp_path)) <= len(whole)


# --- pipes and devices


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.npy", "set.npz", "set.zip", "x-images-idx3-ubyte"])
def test_pipes_as_sources_do_not_block(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert_refused(tmp_path, tmp_path / name, "neither a regular file nor a folder")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert_refused(tmp_path, tmp_path / name, "neither a regular file nor a folder")


def test_pipes_inside_a_dataset_do_not_block(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.png").write_bytes(GOOD)
    os.mkfifo(folder / "dataset.json")
    assert all("dataset.json cannot be read (not a regular file)" in (message or "") for message in read_all(folder))
    os.mkfifo(tmp_path / "set.zip")
    assert all("set.zip is not a complete zip file" in (message or "") for message in read_all(tmp_path / "set.zip"))
    (tmp_path / "lmdb").mkdir()
    os.mkfifo(tmp_path / "lmdb" / "data.mdb")
    assert_refused(tmp_path, tmp_path / "lmdb", "data.mdb cannot be read .not a regular file")
    os.mkfifo(tmp_path / "x-labels-idx1-ubyte")
    (tmp_path / "x-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 1, 8, 8) + bytes(64))
    assert_refused(tmp_path, tmp_path / "x-images-idx3-ubyte", "not a regular file")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_projection_targets_are_checked_first_without_blocking(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"bad{suffix}").write_bytes(b"x")
    for name in ("pipe", "bad", "missing"):
        target = tmp_path / f"{name}{suffix}"
        with time_limit(), pytest.raises(UserError, match=f"{name}{suffix} cannot be read"):
            read_targets(target)
        options = [f"--target={target}", f"--network={tmp_path / 'nowhere.pkl'}", f"--outdir={tmp_path / 'out'}"]
        assert run(generate.main, "project", *options) == 2
        result = CliRunner().invoke(generate.main, ["project", *options])
        assert (
            f"--target={target}: {name}{suffix} cannot be read" in result.output
        )  # reported before the missing network


# --- runs


def make_run(folder: Path, files: dict[str, bytes | None]) -> Path:
    """Write a run with two ticks, a metric and an image; `files` adds or replaces files, None makes a pipe."""
    ticks = [{"Progress/kimg": k, "Timing/total_sec": 9.0 * k, "Loss/G/loss": {"mean": 1.0 + k}} for k in range(2)]
    own: dict[str, bytes | None] = {
        "training_options.json": b'{"run": {"total_kimg": 100}}',
        "stats.jsonl": b"".join(json.dumps(tick).encode() + b"\n" for tick in ticks),
        "fakes000000.png": GOOD,
        "metric-swd5k.jsonl": b'{"kimg": 1, "results": {"swd5k": 3.0}}\n',
    }
    folder.mkdir(parents=True)
    for name, content in (own | files).items():
        if content is None:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder


TICK = {"Progress/kimg": 2, "Timing/total_sec": 18.0, "Loss/G/loss": 1.0, "timestamp": 1.7e9}
NUMERIC_FIELDS = (
    "Progress/kimg",
    "Timing/total_sec",
    "Timing/sec_per_kimg",
    "Loss/G/loss",
    "timestamp",
    "Progress/augment",
)
STATS = [
    json.dumps(TICK | {name: value})
    for name in NUMERIC_FIELDS
    for value in (1e308, -1e308, math.inf, math.nan, 10**400, "x", True)
]
STATS += [
    "[" * 100_000,
    '{"Progress/kimg":' + "9" * 5000 + "}",
    '{"Progress/kimg": 3, "x": ' + "[" * 900 + "]" * 900 + "}",
]
STATS += [
    json.dumps(dict.fromkeys(NUMERIC_FIELDS, 1.7e308)),
    json.dumps(dict.fromkeys(NUMERIC_FIELDS, -1.7e308)),
    "[]",
    "null",
    "{}",
    "x",
]
RECORDS = [
    json.dumps({"kimg": 2, "results": {"swd5k": value}})
    for value in ("x", [1], {"a": 1}, True, None, 1e308, math.nan, 10**400)
]
RECORDS += [
    json.dumps({"kimg": kimg, "results": {"swd5k": 1.0}}) for kimg in ("x", [1], True, 1e308, -1e308, math.inf, 10**400)
]
RECORDS += [
    json.dumps(record)
    for record in ({"kimg": 2}, {"kimg": 2, "results": []}, {"kimg": 2, "results": {}}, {"metric": 7})
]
RECORDS += ['{"kimg": 2, "seed": ' + "[" * 900 + "]" * 900 + ', "results": {"swd5k": 2.0}}'] * 2
DEEP = b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"
OPTIONS = [
    b"[" * 100_000,
    DEEP,
    b'{"a":' * 400 + b"1" + b"}" * 400,
    b'{"run": {"total_kimg": 1e400}}',
    b"[]",
    b"",
    b"\xff",
]
OPTIONS += [
    b'{"run": {"total_kimg": ' + value + b"}}" for value in (b"9" * 5000, b"true", b'"x"', b"NaN", b"-1e308", b"[[]]")
]


def test_unplottable_numbers_are_skipped_and_reported(tmp_path: Path) -> None:
    """Invalid numbers in the statistics and metric files; deep nesting in the environment file."""
    files: dict[str, bytes | None] = {
        "stats.jsonl": "".join(f"{line}\n" for line in STATS).encode(),
        "metric-swd5k.jsonl": "".join(f"{line}\n" for line in RECORDS).encode()
        + b'{"kimg": 1, "results": {"swd5k": 3}}\n',
        "environment.jsonl": b'{"kimg": 0, "torch": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    }
    read = read_run(make_run(tmp_path / "all", files), "all")
    build_page([read], [draw(next(find_charts([read])))], 2)
    problems = " ".join(read.problems)
    assert all(f"{name}: skipped" in problems for name in files)
    assert read.metrics["swd5k"].values.tolist() == [3.0]
    assert np.nanmax(np.abs([curve.values for curve in read.ticks.values()])) <= 1e100


@pytest.mark.parametrize("content", OPTIONS, ids=range(len(OPTIONS)))
def test_malformed_options_of_a_run_are_reported(tmp_path: Path, content: bytes) -> None:
    shown = read_run(make_run(tmp_path / "run", {"training_options.json": content}), "run")
    assert math.isnan(shown.total_kimg) or abs(shown.total_kimg) <= 1e15
    assert "run: 1 of" not in build_page([shown], [], 2)
    assert bool(shown.problems) == (
        content[:1] != b"{" or b"[[[" in content or b'":{"a":{' in content or b"999" in content
    )


def test_unreadable_runs_do_not_hide_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_charts", lambda shown: islice(find_charts(shown), 1))
    names = (
        "training_options.json",
        "stats.jsonl",
        "fakes000002.png",
        "reals.png",
        "log.txt",
        "metric-a.jsonl",
        "environment.jsonl",
    )
    for name in names:
        make_run(tmp_path / "runs" / name, {name: None})
    make_run(tmp_path / "runs" / "good", {})
    with time_limit():
        result = CliRunner().invoke(report.main, [str(tmp_path / "runs"), f"--outdir={tmp_path / 'report'}"])
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.output.splitlines()
    assert len([line for line in lines if "cannot be read (not a regular file)" in line]) == len(names) - 2
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(f"</span>{name}</h3>" in page for name in (*names, "good"))


def test_large_files_of_a_run_are_read_in_bounded_memory(tmp_path: Path) -> None:
    line = b'{"Progress/kimg": 1, "x": [' + b"[]," * MB + b"[]]}\n"
    names = {"Progress/kimg": 3} | {f"Loss/{k}": k for k in range(5000)}
    files: dict[str, bytes | None] = {
        "stats.jsonl": line + json.dumps(names).encode() + b"\n",
        "log.txt": b"Warning: " + b"x" * (3 * MB) + b"\nWarning: y\n" * 2,
        "training_options.json": b'{"x": [' + b"[]," * MB + b"[]]}",
    }
    folder = make_run(tmp_path / "run", files)
    with in_bounds(30 * MB):
        shown = read_run(folder, "run")
    assert shown.log is not None
    assert [len(warning.text) for warning in shown.log.warnings] == [1000 - len("Warning: "), len("y")]
    assert len(shown.ticks) == 300
    problems = " ".join(shown.problems)
    for part in ("skipped 1 corrupt lines of 2", "skipped 4701 of 5001 statistics", "training_options.json"):
        assert part in problems


@draws(10, 500)
def test_malformed_files_of_a_run_do_not_break_the_report(tmp_path: Path, examples: int) -> None:
    folder = make_run(tmp_path / "run", {})
    lines = st.lists(st.sampled_from(STATS + RECORDS) | st.just(json.dumps(TICK)) | st.text(max_size=9), max_size=6)

    @for_all(
        examples,
        lines,
        st.sampled_from([TICK, {"kimg": 1, "results": {"swd5k": 1.0}, "seed": 0}]),
        *CHANGES,
        CORRUPTION,
    )
    def check(log: list[str], base: Any, path: list[float], value: Any, remove: bool, corruption: Any) -> None:
        own = json.dumps(with_change(base, path, value, remove))
        for name in ("stats.jsonl", "metric-swd5k.jsonl", "environment.jsonl", "log.txt"):
            (folder / name).write_text("".join(f"{line}\n" for line in [*log, own]), errors="replace")
        (folder / "fakes000002.png").write_bytes(corrupted(GOOD, corruption))
        shown = read_run(folder, "run")
        build_page([shown], [], 2)


# --- labels


LABELS = [
    10**400,
    10**19,
    2**31,
    -1,
    1.5,
    True,
    "x",
    None,
    [],
    {},
    [10**400],
    [math.nan],
    [1e300],
    [True],
    ["x"],
    [[1.0]],
    [1.0, 2.0],
]


@pytest.mark.parametrize("label", LABELS, ids=range(len(LABELS)))
def test_invalid_labels_are_refused_with_a_short_message(tmp_path: Path, label: Any) -> None:
    for others in (0, [0.5]):
        content = json.dumps({"labels": [["0.png", others], ["1.png", label]]}).encode()
        path = tmp_path / "set.zip"
        path.write_bytes(zip_bytes([("0.png", GOOD), ("1.png", GOOD), ("dataset.json", content)]))
        assert all("dataset.json" in (message or "") and len(message or "") < 400 for message in read_all(path))


def test_a_highly_compressed_dataset_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "UNPACKED_AT_LEAST", MB)
    path = tmp_path / "set.zip"
    path.write_bytes(zip_bytes([("0.png", GOOD), ("dataset.json", b'{"x": [' + b"0," * (4 * MB) + b"0]}")]))
    with in_bounds(2 * MB), pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        ImageDataset(DatasetConfig(path=str(path)))


# --- mismatches


@pytest.mark.parametrize(
    ("ours", "theirs", "remedy"),
    [
        ((1, 16, 16), (3, 16, 16), "dataset_tool.py --channels=1"),
        ((3, 16, 16), (1, 16, 16), "dataset_tool.py --channels=3"),
        ((4, 16, 16), (3, 16, 16), "dataset_tool.py --channels=4"),
        ((3, 16, 32), (3, 16, 16), "dataset_tool.py --width=32 --height=16"),
        ((1, 16, 32), (3, 8, 8), "dataset_tool.py --channels=1 --width=32 --height=16"),
    ],
)
@pytest.mark.parametrize("of_network", [False, True])
def test_a_shape_mismatch_names_the_dataset_tool_options(
    ours: tuple[int, ...], theirs: tuple[int, ...], remedy: str, of_network: bool
) -> None:
    assert explain_shape_mismatch(ours, theirs, of_network).endswith(remedy)


def test_long_dataset_names_are_shortened(tmp_path: Path, shapes_zip: Path) -> None:
    """Names of run folders and of partial dataset files stay within the limit of file systems."""
    for name in ("x" * 240, "\U0001f600" * 60):
        path = tmp_path / f"{name}.zip"
        assert run(dataset_tool.main, f"--source={shapes_zip}", f"--dest={path}", "--max-images=16", "--workers=1") == 0
        config = small_config(path, **{"run.desc": "y" * 60})
        folder = run_folder._make_run_dir(tmp_path / "runs", config, ImageDataset(config.data))
        assert folder.is_dir()
        assert len(os.fsencode(folder.name)) < 200
