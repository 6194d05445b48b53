"""Files of weights that detectors are made from: where they lie, how one is fetched once, what is said when it is not.

A checksum is pinned as far as its publisher states it: the file names of torch hub end in the first eight digits of the
sha256. Every result line records the whole sha256 of the files that its number came from.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import shutil
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dnnlib.config import UserError

TIMEOUT = 20  # seconds without an answer from the server


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published state dict. `sha256` is the checksum or its first digits, empty when none is published."""

    name: str
    url: str
    sha256: str
    holds: str

    @property
    def path(self) -> Path:
        """Where the file is kept."""
        return detector_dir() / self.name

    def describe(self) -> str:
        """Return 'name (what it holds, sha256 6726825d...)'."""
        return f"{self.name} ({self.holds}, {f'sha256 {self.sha256}...' if self.sha256 else 'no published sha256'})"


INCEPTION = WeightFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    holds="the TensorFlow Inception network of 2015-12-05, converted by torch-fidelity",
)
VGG16 = WeightFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    holds="torchvision's VGG16",
)
LPIPS = WeightFile(
    name="weights-vgg16-lpips.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    sha256="",
    holds="the linear layers of LPIPS on VGG16",
)
KNOWN = (INCEPTION, VGG16, LPIPS)


def cache_dir() -> Path:
    """Return the folder for files that are fetched or computed once: DNNLIB_CACHE_DIR or ~/.cache/dnnlib."""
    given = os.environ.get("DNNLIB_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "dnnlib"


def detector_dir() -> Path:
    """Return the folder of the weight files."""
    return cache_dir() / "detectors"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, or of the names and contents of a folder's files. Raises UserError."""
    try:
        if path.is_dir():
            parts = [f"{file.name} {sha256_of(file)}\n" for file in sorted(path.iterdir()) if file.is_file()]
            return hashlib.sha256("".join(parts).encode()).hexdigest()
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _sha256_of_file(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _sha256_of_file(path: Path, changed: int, size: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def check(file: WeightFile, path: Path) -> Path:
    """Return `path` when it holds `file`. Raises UserError for another checksum."""
    found = sha256_of(path)
    again = "; delete it, and it is fetched again" if path == file.path else ""
    if not found.startswith(file.sha256):
        raise UserError(
            f"{path}: its sha256 is {found[:16]}..., that of {file.name} begins with {file.sha256}: the file is "
            f"damaged, cut off or another one{again}"
        )
    return path


def fetch(file: WeightFile) -> Path:
    """Return the checked file, fetching it the first time. Raises UserError saying where to put it when that fails."""
    if file.path.is_file():
        return check(file, file.path)
    temporary = file.path.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {file.url} ...", file=sys.stderr, flush=True)
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as answer, temporary.open("wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
            wanted = answer.headers.get("Content-Length")
        found = temporary.stat().st_size
        if wanted is not None and found != int(wanted):
            raise ValueError(f"cut off after {found} of {wanted} bytes")
        check(file, temporary)
        os.replace(temporary, file.path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # UserError, of a wrong checksum, is a ValueError
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{file.describe()} is not in {file.path.parent} and could not be fetched from {file.url} ({reason}): "
            "put it there by hand (DNNLIB_CACHE_DIR moves that folder), or name it with --detector=FILE"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return file.path
