"""Open image files with limits on time and memory. Formats whose decoders run external programs are excluded."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import (  # import all plugins now; imports by Pillow may fail later
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    PsdImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from dnnlib import tiff
from dnnlib.config import UserError
from dnnlib.image_files import REMEDIES, BrokenImageError, File, check_pixels, prepared
from dnnlib.util import import_extra

HAS_AVIF, HAS_HEIF = features.check("avif"), importlib.util.find_spec("pillow_heif") is not None
_PLUGINS = (
    *(BmpImagePlugin, GifImagePlugin, IcoImagePlugin, Jpeg2KImagePlugin, JpegImagePlugin, MpoImagePlugin),
    *(PngImagePlugin, PpmImagePlugin, PsdImagePlugin, TgaImagePlugin, TiffImagePlugin, WebPImagePlugin),
)
# Excluded formats include EPS, for which Pillow runs Ghostscript, and WMF, which Windows renders.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PSD", "TGA", "ICO", "PPM", "JPEG2000"),
    *(("AVIF",) if HAS_AVIF else ()),
    *(("HEIF",) if HAS_HEIF else ()),
)
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".psd", ".tga", ".ico", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf"),
    *((".avif",) if HAS_AVIF else ()),
    *(_HEIF_SUFFIXES if HAS_HEIF else ()),
)
MAX_IMAGE_BYTES = 1 << 28  # size of one encoded image; a larger size in an archive's directory is corrupt or hostile

TURNS = {  # EXIF orientation -> transpose operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INSTALL_AVIF, _INSTALL_HEIF = "pip install -U pillow", "pip install pillow-heif"
_REMEDIES = {
    **REMEDIES,
    **({} if HAS_AVIF else {".avif": _INSTALL_AVIF}),
    **({} if HAS_HEIF else dict.fromkeys(_HEIF_SUFFIXES, _INSTALL_HEIF)),
}
_FILE = "file"  # key in Image.info that holds the File
_EXIF = b"Exif\0\0"


def remedy(suffix: str) -> str:
    """Return the remedy for unsupported image and video files, by suffix; '' for other suffixes."""
    return _REMEDIES.get(suffix.lower(), "")


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image of one of FORMATS lazily; the format is detected from the content.

    Raises BrokenImageError for any error in the block, for more than PIL.Image.MAX_IMAGE_PIXELS pixels, and for a file
    that would cost disproportionate time or memory. A file with several images yields the first one. The image is not
    rotated; `orientation_of` returns its orientation.
    """
    try:
        file = prepared(data)
        _require_decoder(file.kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file.data), formats=(file.kind,)) as image:
                check_pixels(image.width, image.height, data)
                image.info[_FILE] = file
                yield image
    except BrokenImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImageError(f"{file.kind} that cannot be read: corrupt, or an unsupported variant") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for corrupt data
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def file_of(image: Image.Image) -> File:
    """Return the prepared File of an image from `open_image`."""
    return image.info[_FILE]


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an image from `open_image`; 1 is upright."""
    exif = (image.info.get("exif") or b"").removeprefix(_EXIF)
    return file_of(image).orientation or tiff.orientation_of_exif(exif)


def _require_decoder(kind: str) -> None:
    """Raise BrokenImageError if no decoder of the format is installed."""
    if kind == "AVIF" and not HAS_AVIF:
        raise BrokenImageError(f"AVIF, which this version of Pillow does not read: {_INSTALL_AVIF}")
    if kind == "HEIF":
        try:
            import_extra("pillow_heif", "heic").register_heif_opener(thumbnails=False)
        except UserError:
            raise BrokenImageError(f"HEIC, which needs another package: {_INSTALL_HEIF}") from None
