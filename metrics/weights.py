"""Weight files of detectors: location, download on first use, checksums, and errors if a file is not available.

Checksums are pinned where the publisher states them: file names of torch hub end in the first eight digits of the
sha256. Every metric record contains the full sha256 of the files used.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dnnlib.config import UserError
from dnnlib.download import cache_dir, download, sha256_of_file


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published state dict. `sha256` is the checksum or its first digits, or empty if no checksum is published."""

    name: str
    url: str
    sha256: str
    content: str

    @property
    def path(self) -> Path:
        """Path of the cached file."""
        return detector_dir() / self.name

    def describe(self) -> str:
        """Return 'name (content, sha256 6726825d...)'."""
        return f"{self.name} ({self.content}, {f'sha256 {self.sha256}...' if self.sha256 else 'no published sha256'})"


INCEPTION = WeightFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    content="the TensorFlow Inception network of 2015-12-05, converted by torch-fidelity",
)
VGG16 = WeightFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    content="torchvision's VGG16",
)
LPIPS = WeightFile(
    name="weights-vgg16-lpips.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    sha256="",
    content="the linear layers of LPIPS on VGG16",
)
KNOWN = (INCEPTION, VGG16, LPIPS)


def detector_dir() -> Path:
    """Return the folder of the weight files."""
    return cache_dir() / "detectors"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, or of the names and contents of a folder's files. Raises UserError if unreadable."""
    try:
        if path.is_dir():
            parts = [f"{file.name} {sha256_of(file)}\n" for file in sorted(path.iterdir()) if file.is_file()]
            return hashlib.sha256("".join(parts).encode()).hexdigest()
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _sha256_of_file(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _sha256_of_file(path: Path, mtime_ns: int, size: int) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def check(file: WeightFile, path: Path) -> Path:
    """Return `path` if its checksum matches `file`. Raises UserError otherwise."""
    found = sha256_of(path)
    again = "; delete it to fetch it again" if path == file.path else ""
    if not found.startswith(file.sha256):
        raise UserError(
            f"{path}: its sha256 is {found[:16]}..., but that of {file.name} begins with {file.sha256}: the file is "
            f"corrupt, truncated or a different file{again}"
        )
    return path


def fetch(file: WeightFile) -> Path:
    """Return the path of the checked file, fetched on first use. Raises UserError with the remedy if fetching fails."""
    if file.path.is_file():
        return check(file, file.path)
    try:
        download(file.url, file.path, check=partial(check, file))
    except UserError as error:
        raise UserError(
            f"{file.describe()} is not in {file.path.parent} and could not be fetched: {error}. Put the file there by "
            "hand (DNNLIB_CACHE_DIR moves that folder), or specify it with --detector=FILE"
        ) from None
    return file.path
