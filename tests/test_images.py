"""Image formats: decoded pixels, orientation, and error messages for unsupported formats."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from image_helpers import bitmap_of_icon, encoded, exif, icon, jpeg_with, packed, png, png_chunk, psd, tiff
from PIL import Image, ImageOps, PsdImagePlugin

import dataset_tool
from dnnlib import images
from dnnlib.image_files import BrokenImageError, recognise
from dnnlib.images import FORMATS, IMAGE_SUFFIXES, open_image, remedy
from training.data_sources.codec import decode_as, decode_image, is_gray, read_shape
from training.dataset import DatasetConfig, ImageDataset

H, W = 6, 8
RNG = np.random.RandomState(0)
GRAY = RNG.randint(0, 256, (H, W), np.uint8)
ALPHA = RNG.randint(0, 256, (H, W), np.uint8)
RGB = RNG.randint(0, 256, (H, W, 3), np.uint8)
RGBA = np.dstack([RGB, ALPHA])
LA = np.dstack([GRAY, GRAY, GRAY, ALPHA])
DEEP = RNG.randint(0, 65536, (H, W), np.uint16)
DEEP_RGBA = RNG.randint(0, 65536, (H, W, 4), np.uint16)
INDEX = {bits: RNG.randint(0, 2**bits, (H, W), np.uint8) for bits in (1, 2, 4, 8)}
COLORS = RNG.randint(0, 256, (256, 4), np.uint8)
CMYK = RNG.randint(0, 256, (H, W, 4), np.uint8)
CMYK_AS_RGB = ((255 - CMYK[:, :, :3].astype(int)) * (255 - CMYK[:, :, 3:].astype(int)) / 255).round().astype(np.uint8)
requires_avif = pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow does not read AVIF")
requires_heif = pytest.mark.skipif("HEIF" not in FORMATS, reason="pillow-heif is an optional package")

Case = tuple[bytes, np.ndarray]


def png_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for bits, index in INDEX.items():
        scaled = index * (255 // (2**bits - 1))
        hidden = int(index[0, 0])
        transparent = png_chunk(b"tRNS", struct.pack(">H", hidden))
        opaque = np.where(index == hidden, 0, 255).astype(np.uint8)
        cases[f"gray {bits}"] = png(packed(index, bits), W, bits, 0), scaled
        cases[f"gray {bits}, a transparent value"] = (
            png(packed(index, bits), W, bits, 0, transparent),
            np.dstack([scaled] * 3 + [opaque]),
        )
        colors = png_chunk(b"PLTE", COLORS[: 2**bits, :3].tobytes())
        cases[f"palette {bits}"] = png(packed(index, bits), W, bits, 3, colors), COLORS[index][:, :, :3]
        colors += png_chunk(b"tRNS", COLORS[: 2**bits, 3].tobytes())
        cases[f"palette {bits}, transparent"] = png(packed(index, bits), W, bits, 3, colors), COLORS[index]
    deep_rgb = DEEP_RGBA[:, :, :3].copy()
    deep_rgb[2] = deep_rgb[1] ^ 1  # differs only in the low byte
    deep = DEEP.copy()
    deep[2] = deep[1] ^ 1

    def rows(values: np.ndarray) -> list[bytes]:
        return packed(values.reshape(H, -1), 8 * values.itemsize)

    cases["gray 16"] = png(rows(DEEP), W, 16, 0), DEEP >> 8
    cases["gray and alpha 16"] = (
        png(rows(DEEP_RGBA[:, :, :2]), W, 16, 4),
        (DEEP_RGBA >> 8)[:, :, [0, 0, 0, 1]],
    )
    cases["RGB 16"], cases["RGBA 16"] = (
        (png(rows(DEEP_RGBA[:, :, :C]), W, 16, 2 if C == 3 else 6), DEEP_RGBA[:, :, :C] >> 8) for C in (3, 4)
    )
    cases["gray 16, a transparent value"] = (
        png(rows(deep), W, 16, 0, png_chunk(b"tRNS", struct.pack(">H", int(deep[1, 1])))),
        np.dstack([deep >> 8] * 3 + [np.where(deep == deep[1, 1], 0, 255)]),
    )
    is_hidden = (deep_rgb == deep_rgb[1, 1]).all(axis=2)
    cases["RGB 16, a transparent colour"] = (
        png(rows(deep_rgb), W, 16, 2, png_chunk(b"tRNS", deep_rgb[1, 1].astype(">u2").tobytes())),
        np.dstack([deep_rgb >> 8, np.where(is_hidden, 0, 255)]),
    )
    is_hidden = (RGB[1, 1] == RGB).all(axis=2)
    cases["RGB, a transparent colour"] = (
        png(rows(RGB), W, 8, 2, png_chunk(b"tRNS", RGB[1, 1].astype(">u2").tobytes())),
        np.dstack([RGB, np.where(is_hidden, 0, 255)]),
    )
    cases["animated"] = (
        encoded(Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        RGB,
    )
    return cases


def tiff_cases(order: str) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for bits, index in INDEX.items():
        scaled = index * (255 // (2**bits - 1))
        for photometric, expected in ((0, 255 - scaled), (1, scaled)):
            tags = {258: (3, [bits]), 262: (3, [photometric]), 277: (3, [1])}
            cases[f"gray {bits}, {photometric}"] = tiff(packed(index, bits), W, tags, order), expected
        tags = {258: (3, [bits]), 262: (3, [3]), 320: (3, (COLORS[: 2**bits, :3].T.astype(int) * 257).ravel().tolist())}
        cases[f"palette {bits}"] = tiff(packed(index, bits), W, tags, order), COLORS[index][:, :, :3]
    for photometric, expected in ((0, 255 - (DEEP >> 8)), (1, DEEP >> 8)):
        tags = {258: (3, [16]), 262: (3, [photometric]), 277: (3, [1])}
        cases[f"gray 16, {photometric}"] = tiff(packed(DEEP, 16, order), W, tags, order), expected
    if order == "<":  # the decoder supports no other byte order
        cases["gray 12"] = tiff(packed(DEEP >> 4, 12), W, {258: (3, [12]), 262: (3, [1])}, order), DEEP >> 8

    def pixels(values: np.ndarray, photometric: int, extra: list[int]) -> bytes:
        C, bits = values.shape[2], 8 * values.itemsize
        tags = {258: (3, [bits] * C), 262: (3, [photometric]), 277: (3, [C])} | ({338: (3, extra)} if extra else {})
        return tiff(packed(values.reshape(H, -1), bits, order), W, tags, order)

    cases["RGB"] = pixels(RGB, 2, []), RGB
    cases["RGBA"] = pixels(RGBA, 2, [2]), RGBA
    cases["RGBX"] = pixels(RGBA, 2, [0]), RGB
    cases["gray and alpha"] = pixels(LA[:, :, 2:], 1, [2]), LA
    cases["CMYK"] = pixels(CMYK, 5, []), CMYK_AS_RGB
    for name, C, extra in (("RGB", 3, []), ("RGBA", 4, [2])):
        cases[f"{name} 16"] = pixels(DEEP_RGBA[:, :, :C], 2, extra), DEEP_RGBA[:, :, :C] >> 8
    premultiplied = RGBA.copy()
    premultiplied[:, :, :3] = 40  # at alpha 80 this is 127.5 of 255
    premultiplied[:, :, 3] = 80
    cases["RGBA, premultiplied"] = pixels(premultiplied, 2, [1]), np.full((H, W, 4), (127, 127, 127, 80), np.uint8)
    pages = encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    return cases | {"pages": (pages, RGB)}


def compressed_tiff_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for method in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "group3", "group4"):
        bits = np.where(GRAY > 127, 255, 0).astype(np.uint8)
        cases[f"{method}, 1"] = encoded(Image.fromarray(bits > 0), "TIFF", compression=method), bits
        if not method.startswith("group"):
            cases[f"{method}, RGBA"] = encoded(Image.fromarray(RGBA), "TIFF", compression=method), RGBA
            cases[f"{method}, 16"] = encoded(Image.fromarray(DEEP), "TIFF", compression=method), DEEP >> 8
    return cases


def psd_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for runs in (False, True):
        for name, mode, values, expected in (
            ("gray", 1, GRAY[:, :, None], GRAY),
            ("RGB", 3, RGB, RGB),
            ("RGBA", 3, RGBA, RGBA),
            ("CMYK", 4, 255 - CMYK, CMYK_AS_RGB),
        ):
            cases[f"{name}, {runs}"] = psd(values.transpose(2, 0, 1), mode, runs=runs), expected
    bits = np.packbits(INDEX[1], axis=1)[None]
    cases["1"] = psd(bits, 0, bits=1, size=(H, W)), 255 - 255 * INDEX[1]  # 1 is black
    layers = psd(RGB.transpose(2, 0, 1), 3)
    cases["layers"] = layers[:30] + struct.pack(">I5sI5s", 5, b"notes", 5, b"layer") + layers[38:], RGB
    return cases


def ppm_cases() -> dict[str, Case]:
    def text(values: np.ndarray) -> bytes:
        return b" # a comment\n".join(b" ".join(b"%d" % value for value in row.ravel()) for row in values)

    low, high = RGB // 16, DEEP % 1001
    digits = b"\n".join(b"".join(b"%d" % bit for bit in row) for row in INDEX[1])
    to_8 = ((high / 1000 * 65535).round()).astype(int) >> 8
    raw = high.astype(">u2").tobytes()
    bits = b"".join(packed(INDEX[1], 1))
    return {
        "P1": (b"P1\n8 6\n" + digits, 255 - 255 * INDEX[1]),
        "P2": (b"P2 # a\n8 # b\n6 255 " + text(GRAY), GRAY),
        "P3": (b"P3 8 6 15\n" + text(low), low * 17),
        "P4": (b"P4 8 6\n" + bits, 255 - 255 * INDEX[1]),
        "P5": (b"P5 8 6 255\n" + GRAY.tobytes(), GRAY),
        "P5 of 16": (b"P5 8 6 65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8),
        "P5 to 1000": (b"P5 8 6 1000\n" + raw, to_8),
        "P2 to 1000": (b"P2 8 6 1000\n" + text(high), to_8),
        "P6": (b"P6 8 6 255\n" + RGB.tobytes(), RGB),
        "P6 to 15": (b"P6 8 6 15\n" + low.tobytes(), low * 17),
        "P6 of 16": (
            b"P6 8 6 65535\n" + DEEP_RGBA[:, :, :3].astype(">u2").tobytes(),
            DEEP_RGBA[:, :, :3] >> 8,
        ),
    }


def icon_cases() -> dict[str, Case]:
    hidden = GRAY > 127
    masked = np.dstack([RGB, np.where(hidden, 0, 255).astype(np.uint8)])
    small = (4, 4, 32, bitmap_of_icon(RGBA[:4, :4]))
    return {
        "bitmap with alpha": (icon((W, H, 32, bitmap_of_icon(RGBA))), RGBA),
        "bitmap with a mask": (icon((W, H, 24, bitmap_of_icon(RGB, hidden))), masked),
        "the largest": (icon(small, (W, H, 32, bitmap_of_icon(RGBA)), small), RGBA),
        "PNG": (icon(small, (W, H, 32, encoded(Image.fromarray(RGBA), "PNG"))), RGBA),
        "PNG of 16 bits": (icon((W, H, 32, png(packed(DEEP, 16), W, 16, 0))), DEEP >> 8),
    }


def other_cases() -> dict[str, Case]:
    rgb, rgba, gray = Image.fromarray(RGB), Image.fromarray(RGBA), Image.fromarray(GRAY)
    two = Image.merge("LA", [gray, Image.fromarray(ALPHA)])
    bits = np.where(GRAY > 127, 255, 0).astype(np.uint8)
    colors = Image.fromarray(INDEX[4], "P")
    colors.putpalette(COLORS[:16, :3].ravel().tolist())
    of_colors = COLORS[INDEX[4]][:, :, :3]
    hidden = np.dstack([of_colors, np.where(INDEX[4] == 3, 0, 255)])
    cases = {
        "BMP": (encoded(rgb, "BMP"), RGB),
        "BMP, gray": (encoded(gray, "BMP"), GRAY),
        "BMP, 1": (encoded(Image.fromarray(bits > 0), "BMP"), bits),
        "BMP, palette": (encoded(colors, "BMP"), of_colors),
        "GIF": (encoded(colors, "GIF"), of_colors),
        "GIF, transparent": (encoded(colors, "GIF", transparency=3), hidden),
        "GIF, animated": (encoded(colors, "GIF", save_all=True, append_images=[gray]), of_colors),
        "TGA, palette": (encoded(colors, "TGA"), of_colors),
        "JP2, gray 16": (encoded(Image.fromarray(DEEP), "JPEG2000"), DEEP >> 8),
        "J2K": (encoded(rgb, "JPEG2000", no_jp2=True), RGB),
        "JP2": (encoded(rgba, "JPEG2000"), RGBA),
        "JP2, gray and alpha": (encoded(two, "JPEG2000"), LA),
        "JP2, tiles": (encoded(rgb, "JPEG2000", tile_size=(4, 4)), RGB),
        "WebP": (encoded(rgba, "WEBP", lossless=True, exact=True), RGBA),
        "WebP, animated": (
            encoded(rgb, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]),
            RGB,
        ),
    }
    for name, image, pixels in (("RGB", rgb, RGB), ("RGBA", rgba, RGBA), ("gray", gray, GRAY), ("LA", two, LA)):
        for rle in (False, True):
            cases[f"TGA, {name}, {rle}"] = encoded(image, "TGA", rle=rle), pixels
    return cases


CASES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "PNG": png_cases(),
        "TIFF <": tiff_cases("<"),
        "TIFF >": tiff_cases(">"),
        "TIFF": compressed_tiff_cases(),
        "PSD": psd_cases(),
        "PPM": ppm_cases(),
        "ICO": icon_cases(),
        "other": other_cases(),
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_decoded_pixels_equal_the_stored_pixels(name: str) -> None:
    data, expected = CASES[name]
    expected = expected.reshape(H, W, -1)
    found = decode_image(data)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(decode_as(data, found.shape), found)
    assert read_shape(data) == expected.shape
    assert is_gray(data) == ("gray" in name or "LA" in name or "16, 0" in name or expected.shape[2] == 1)


@pytest.mark.parametrize("name", ["JPEG", "MPO", pytest.param("AVIF", marks=requires_avif)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossy_formats_are_decoded_approximately(name: str, mode: str) -> None:
    smooth = np.add.outer(np.arange(H) * 20, np.arange(W) * 10).astype(np.uint8)
    image = Image.fromarray(smooth if mode == "L" else np.dstack([smooth, smooth[::-1], smooth // 2]))
    others = {"save_all": True, "append_images": [Image.new(mode, (W, H))]} if name != "JPEG" else {}
    data = encoded(image, name, quality=100, **({"subsampling": 0} if name != "AVIF" else {}), **others)
    expected = np.asarray(image).reshape(H, W, -1)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 20
    assert read_shape(data) == expected.shape
    assert is_gray(data) == (mode == "L")


def test_cmyk_jpegs_are_converted_to_rgb() -> None:
    """Adobe's programs and Pillow both store inverted values."""
    flat = np.broadcast_to(np.array([200, 30, 60, 20], np.uint8), (8, 8, 4))
    data = encoded(Image.fromarray(flat.copy(), "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    expected = (255 - flat[0, 0, :3].astype(int)) * (255 - 20) / 255
    assert np.abs(decode_image(data) - expected).max() <= 3
    assert read_shape(data) == (8, 8, 3)


@requires_heif
def test_heic_images_are_decoded() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
    smooth = np.add.outer(np.arange(16) * 10, np.arange(24) * 3).astype(np.uint8)
    rgb, rgba = np.dstack([smooth] * 3), np.dstack([smooth] * 3 + [np.full_like(smooth, 200)])
    deep = smooth.astype(np.uint16) * 257
    for pixels, expected in ((smooth, smooth), (rgb, rgb), (rgba, rgba), (deep, smooth)):
        data = encoded(Image.fromarray(pixels), "HEIF", quality=-1)
        found = decode_image(data)
        assert np.abs(found.astype(int) - expected.reshape(16, 24, -1)).max() <= 8
        assert read_shape(data) == found.shape
        assert is_gray(data) == (found.shape[2] == 1)


# --- orientation

ROTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def exif_text_chunk(orientation: int, order: str, name: bytes = b"zTXt") -> bytes:
    """Make a PNG text chunk of EXIF data as lines of hexadecimal digits, in ImageMagick's format."""
    data = b"Exif\0\0" + exif(orientation, order)
    digits = "\n".join(re.findall(".{1,72}", data.hex()))
    text = f"\nexif\n{len(data):8d}\n{digits}\n".encode()
    return png_chunk(name, b"Raw profile type exif\0" + (b"\0" + zlib.compress(text) if name == b"zTXt" else text))


def rotated_tiff(orientation: int, order: str) -> bytes:
    others = {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3]), 0x112: (3, [orientation])}
    return tiff([row.tobytes() for row in RGB], W, others, order)


def lzw_tiff(orientation: int, order: str) -> bytes:
    metadata = Image.Exif()
    metadata[0x112] = orientation
    image = Image.fromarray(DEEP) if order == "<" else Image.fromarray(RGB)
    return encoded(image, "TIFF", compression="tiff_lzw", exif=metadata)


def iso_image(kind: str) -> Callable[[int, str], bytes]:
    def make(orientation: int, order: str) -> bytes:
        metadata = Image.Exif()
        metadata.endian = order
        metadata[0x112] = orientation
        image = Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8)))
        return encoded(image, kind, exif=metadata.tobytes(), quality=90)

    return make


MAKERS: dict[str, Callable[[int, str], bytes]] = {
    "PNG": lambda n, order: png(packed(RGB.reshape(H, -1), 8), W, 8, 2, png_chunk(b"eXIf", exif(n, order))),
    "PNG, behind the pixels": lambda n, order: png(
        packed(RGB.reshape(H, -1), 8), W, 8, 2, after=png_chunk(b"eXIf", exif(n, order))
    ),
    "PNG of 16 bits": lambda n, order: png(packed(DEEP, 16), W, 16, 0, after=png_chunk(b"eXIf", exif(n, order))),
    "PNG, packed text": lambda n, order: png(packed(RGB.reshape(H, -1), 8), W, 8, 2, exif_text_chunk(n, order)),
    "PNG, plain text": lambda n, order: png(packed(RGB.reshape(H, -1), 8), W, 8, 2, exif_text_chunk(n, order, b"tEXt")),
    "PNG, text behind the pixels": lambda n, order: png(
        packed(RGB.reshape(H, -1), 8), W, 8, 2, after=exif_text_chunk(n, order)
    ),
    "PNG in an icon": lambda n, order: icon((W, H, 32, MAKERS["PNG"](n, order))),
    "JPEG": lambda n, order: jpeg_with(encoded(Image.fromarray(RGB), "JPEG"), (0xE1, b"Exif\0\0" + exif(n, order))),
    "MPO": lambda n, order: jpeg_with(
        encoded(Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.fromarray(GRAY)]),
        (0xE1, b"Exif\0\0" + exif(n, order)),
    ),
    "TIFF": rotated_tiff,
    "TIFF, LZW": lzw_tiff,
    "WebP": lambda n, order: encoded(Image.fromarray(RGB), "WEBP", lossless=True, exif=exif(n, order)),
    "AVIF": iso_image("AVIF"),
    "HEIF": iso_image("HEIF"),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in MAKERS if name not in ("AVIF", "HEIF")),
        pytest.param("AVIF", marks=requires_avif),
        pytest.param("HEIF", marks=requires_heif),
    ],
)
def test_exif_orientation_is_applied_in_every_format(name: str, order: str) -> None:
    if name == "HEIF":
        decoder = pytest.importorskip("pillow_heif")
        decoder.register_heif_opener(thumbnails=False)
    upright = decode_image(MAKERS[name](1, order)).astype(int)
    for orientation, turn in ROTATIONS.items():
        data = MAKERS[name](orientation, order)
        expected = turn(upright)
        for found in (decode_image(data), decode_as(data, upright.shape), decode_as(data, expected.shape)):
            assert found.shape == expected.shape
            assert np.abs(found - expected).mean() <= (8 if name in ("AVIF", "HEIF") else 0)
        assert read_shape(data) == expected.shape


def test_build_check_and_training_apply_the_orientation(tmp_path: Path) -> None:
    """All orientations of an image produce the same dataset image."""
    square = RGB[:, :H]
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(1, 9):
        turn_back = {6: 8, 8: 6}.get(n, n)
        rows = packed(np.ascontiguousarray(ROTATIONS[turn_back](square)).reshape(H, -1), 8)
        (folder / f"before{n}.png").write_bytes(png(rows, H, 8, 2, png_chunk(b"eXIf", exif(n))))
        (folder / f"text{n}.png").write_bytes(png(rows, H, 8, 2, exif_text_chunk(n, "<")))
        (folder / f"after{n}.png").write_bytes(png(rows, H, 8, 2, after=png_chunk(b"eXIf", exif(n, ">"))))
        tags = {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3]), 0x112: (3, [n])}
        (folder / f"{n}.tif").write_bytes(tiff(rows, H, tags))
    made = tmp_path / "made.zip"
    for arguments in ([f"--source={folder}", f"--dest={made}", "--workers=1"], ["check", folder], ["check", made]):
        result = CliRunner().invoke(dataset_tool.main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    expected = np.broadcast_to(square.transpose(2, 0, 1), (32, 3, H, H))
    for path in (folder, made):
        dataset = ImageDataset(DatasetConfig(path=str(path)))
        dataset.check_shapes()
        np.testing.assert_array_equal(dataset.images(range(32)).numpy(), expected)


@pytest.mark.parametrize(
    "chunks",
    [
        exif_text_chunk(6, "<") + png_chunk(b"eXIf", exif(3)),
        png_chunk(b"eXIf", exif(3)) + exif_text_chunk(6, "<"),
        png_chunk(b"eXIf", exif(1)) + exif_text_chunk(6, "<", b"tEXt"),
        exif_text_chunk(6, "<") + exif_text_chunk(8, ">"),
        exif_text_chunk(6, "<", b"tEXt") + exif_text_chunk(8, ">") + exif_text_chunk(5, "<", b"tEXt"),
    ],
)
def test_conflicting_orientations_in_a_png_resolve_as_in_pillow(chunks: bytes) -> None:
    data = png(packed(RGB.reshape(H, -1), 8), W, 8, 2, chunks)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_as(data, RGB.shape), expected)
    assert read_shape(data) == expected.shape


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\nexif\n",
        b"\nexif\n      10\n4578zz",
        b"\nexif\n      10\n457",
        b"\nexif\n      10\n\xff\xff",
        b"\nexif\n" + b"4" * (3 << 20),
        b"\n\n\n" + b"4" * (3 << 20),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_corrupt_exif_text_is_ignored(content: bytes, is_packed: bool) -> None:
    name, content = (b"zTXt", b"\0" + zlib.compress(content)) if is_packed else (b"tEXt", content)
    chunk = png_chunk(name, b"Raw profile type exif\0" + content)
    data = png(packed(RGB.reshape(H, -1), 8), W, 8, 2, after=chunk)
    assert read_shape(data) == RGB.shape
    cut = png(packed(RGB.reshape(H, -1), 8), W, 8, 2, after=png_chunk(b"zTXt", b"Raw profile type exif\0\0x\x9cdamage"))
    assert read_shape(cut) == RGB.shape


@pytest.mark.parametrize("head", [12, 64, 108, 124])
def test_icon_bitmaps_with_other_headers_are_refused(head: int) -> None:
    bitmap = bitmap_of_icon(RGB)
    with pytest.raises(BrokenImageError, match=f"an icon with a bitmap header of {head} bytes, expected 40"):
        decode_image(icon((W, H, 24, struct.pack("<I", head) + bitmap[4:])))


# --- unsupported formats

UNSUPPORTED = {
    b"": "an empty file",
    b"%!PS-Adobe-3.0 EPSF": "an EPS document, which is not supported: export as PNG",
    b"%PDF-1.7": "a PDF document",
    b"<?xml version='1.0'?>\n<svg xmlns=''>": "an SVG drawing",
    b"<!DOCTYPE html><html>": "a web page, which is not supported: download the image itself",
    b"\xd7\xcd\xc6\x9a" + bytes(40): "a Windows metafile",
    b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(40): "a Windows metafile",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"II*\0\x10\0\0\0CR\2\0": "a camera raw file, which is not supported: develop",
    b"FUJIFILMCCD-RAW 0201": "a camera raw file",
    b"\0\0\0\x18ftypcrx \0\0\0\1crx isom": "a camera raw file",
    b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom": "a video, which is not supported: extract the frames",
    b"\x1aE\xdf\xa3\x01\0\0\0": "a video",
    b"RIFF\0\0\0\0AVI LIST": "a video",
    b"\xff\x0a\xfa\x7f": "JPEG XL, which is not supported: convert to PNG",
    b"v/1\1\2\0\0\0": "a floating-point image",
    b"Pf\n8 6\n-1.0\n": "a floating-point image",
    b"gimp xcf v011": "a GIMP project",
    b"8BPS\0\2" + bytes(30): "a PSB file, which is not supported: save it as TIFF or PSD",
    psd(RGB.transpose(2, 0, 1), 3, bits=16): "a PSD file with 16 bits per channel: save it as TIFF",
    psd(RGB.transpose(2, 0, 1), 9): "a PSD file with Lab colours",
    b"II+\0\x08\0\0\0": "BigTIFF: save it as an ordinary TIFF",
    encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"): "32-bit, signed or float samples: convert it",
    encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"): "32-bit, signed or float samples",
    tiff(packed(DEEP, 16, "<"), W, {258: (3, [16]), 262: (3, [1]), 339: (3, [2])}): "32-bit, signed or float samples",
    tiff(packed(GRAY, 8), W, {258: (3, [8]), 262: (3, [1]), 259: (3, [34925])}): "a TIFF with compression 34925",
    tiff(packed(GRAY, 8), W, {258: (3, [8]), 262: (3, [1]), 254: (4, [1])}): "camera raw data or a preview",
    tiff(packed(RGB.reshape(H, -1), 8), W, {258: (3, [8] * 3), 262: (3, [8]), 277: (3, [3])}): "with Lab colours",
    b"P5 8 6 70000\n" + bytes(96): "the maximum value is not from 1 to 65535",
    b"P2 8 6 10\n" + b"11 " * 48: "values outside of 0..10",
    b"P3 8 6 255\n" + b"x " * 200: "text other than numbers",
    b"P5 8 6 254\n" + bytes(40): "40 values, expected 48",
    b"this is not an image at all, but text of some length": "not an image of a supported format",
}


@pytest.mark.parametrize("data", UNSUPPORTED, ids=range(len(UNSUPPORTED)))
def test_unsupported_formats_are_named(data: bytes) -> None:
    for function in (decode_image, read_shape, is_gray):
        with pytest.raises(BrokenImageError) as caught:
            function(data)
        assert UNSUPPORTED[data] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_random_data_is_not_recognised_as_targa() -> None:
    """Targa files have no signature, so truncated files of other formats, text and numbers may look similar."""
    rng = np.random.RandomState(1)
    others = [data for name, (data, _) in CASES.items() if "TGA" not in name]
    tries = [data[start:] for data in others for start in range(1, 60)]
    tries += [bytes(rng.randint(0, 256, 200, np.uint8)) for _ in range(2000)]
    tries += [bytes(rng.choice([0, 0, 0, 1, 2, 8, 24], 200).astype(np.uint8)) for _ in range(2000)]
    tries += [struct.pack("<9I", *rng.randint(0, 2000, 9)) for _ in range(500)] + [bytes(k) for k in range(100)]
    taken = 0
    for data in tries:
        try:
            taken += recognise(data) == "TGA"
        except BrokenImageError:
            continue
    assert taken <= 2


def test_unsupported_suffixes_have_a_remedy() -> None:
    assert remedy(".heic") == ("" if "HEIF" in FORMATS else "pip install pillow-heif")
    assert remedy(".NEF").startswith("develop")
    assert remedy(".svg") == "export as PNG"
    assert "ffmpeg" in remedy(".mp4")
    assert remedy(".jxl") == "convert to PNG"
    assert remedy(".txt") == remedy("") == ""
    assert not any(map(remedy, IMAGE_SUFFIXES))


def test_without_pillow_heif_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BrokenImageError, match="HEIC, which needs another package: pip install pillow-heif"):
        decode_image(heic)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    specification = importlib.util.spec_from_file_location("images_without_heif", images.__file__)
    assert specification is not None
    assert specification.loader is not None
    without = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(without)
    assert not {".heic", ".heif", ".hif"} & set(without.IMAGE_SUFFIXES)
    assert set(images.IMAGE_SUFFIXES) - set(without.IMAGE_SUFFIXES) <= {".heic", ".heif", ".hif"}
    assert without.remedy(".heic") == "pip install pillow-heif"


def test_opening_an_image_does_not_search_for_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats stay readable even if modules can no longer be imported."""

    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(Image, "init", fail)
    kinds = set()
    for data, _ in CASES.values():
        kinds.add(recognise(data))
        with open_image(data) as image:
            image.load()
    assert kinds == set(FORMATS) - {"JPEG", "AVIF", "HEIF"}


def test_only_the_first_page_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    frames = [Image.fromarray(np.full((H, W), k, np.uint8)) for k in range(50)]
    for kind in ("GIF", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode_image(data).max() == 0
    monkeypatch.setattr(PsdImagePlugin, "_layerinfo", fail)
    assert decode_image(CASES["PSD: layers"][0]).shape == (H, W, 3)


def test_image_suffixes_are_known_to_pillow() -> None:
    assert {suffix.lower() for suffix in IMAGE_SUFFIXES} == set(IMAGE_SUFFIXES)
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)
    extensions = Image.registered_extensions()
    known = {suffix for suffix, kind in extensions.items() if kind in FORMATS or kind in ("MPO", "DIB")}
    assert set(IMAGE_SUFFIXES) - known <= {".heic", ".heif", ".hif"}
