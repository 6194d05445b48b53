"""A generator as the commands of generate.py use it: seeds and files become styles, styles become images."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.config import UserError, WriteError
from dnnlib.util import describe_error, replaced
from torch_utils.images import to_uint8
from training.data_sources.bounds import load_npz
from training.networks import execution

# On a CPU, matrix libraries round a row differently in batches of different sizes, but not in multiples of this one:
# all batches are filled up to it, so that a seed gives the same image, to the last bit, whatever --batch says.
BATCH_MULTIPLE = 8
MAPPED_AT_ONCE = 1024


def seed_latents(seeds: Sequence[int], z_dim: int) -> Tensor:
    """Return z (len(seeds), z_dim): for each seed what numpy's RandomState(seed).randn(1, z_dim) draws."""
    z = np.concatenate([np.random.RandomState(seed).randn(1, z_dim) for seed in seeds])
    return torch.from_numpy(z).to(torch.float32)


def fill_up(x: Tensor, multiple: int = BATCH_MULTIPLE) -> Tensor:
    """Repeat the last row of x (n, ...) until there is a multiple of so many."""
    return torch.cat([x, x[-1:].expand(-len(x) % multiple, *x.shape[1:])])


@dataclass(frozen=True, kw_only=True)
class Model:
    """A generator on its device, and how it is to be called: labels c (1, c_dim), truncation, noise, images at a time.

    Every result depends on the seed or the styles that it is made from alone, not on those beside it.
    """

    G: Any
    device: torch.device
    c: Tensor
    truncation_psi: float = 1.0
    noise_mode: str = "const"
    batch: int = 16
    execution: execution.Execution = field(default_factory=execution.Execution)

    def __post_init__(self) -> None:
        if not (hasattr(self.G, "mapping") and hasattr(self.G, "synthesis") and hasattr(self.G, "num_ws")):
            raise UserError(f"{type(self.G).__name__} has no styles to look into: only whole images can be generated")

    @torch.no_grad()
    def map(self, z: Tensor, c: Tensor | None = None, psi: float | None = None) -> Tensor:
        """Styles (n, num_ws, w_dim) of latents z (n, z_dim) and labels c (n, c_dim), else of the model's class."""
        c = self.c.expand(len(z), -1) if c is None else c
        psi = self.truncation_psi if psi is None else psi
        parts = [
            self.G.mapping(fill_up(some_z).to(self.device), fill_up(some_c).to(self.device), psi)[: len(some_z)]
            for some_z, some_c in zip(z.split(MAPPED_AT_ONCE), c.split(MAPPED_AT_ONCE), strict=True)
        ]
        return torch.cat(parts)

    def styles_of(self, seeds: Sequence[int]) -> Tensor:
        """Styles (n, num_ws, w_dim) of seeds."""
        return self.map(seed_latents(seeds, self.G.z_dim))

    @torch.no_grad()
    def synthesise(self, ws: Tensor) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] of styles (n, num_ws, w_dim), made together."""
        with execution.using(self.execution):
            img: Tensor = self.G.synthesis(fill_up(ws).to(self.device), noise_mode=self.noise_mode)
        return img[: len(ws)]

    def render(self, ws: Tensor) -> Iterator[Tensor]:
        """Yield uint8 images (at most `batch`, C, H, W) of styles (n, num_ws, w_dim), on the CPU."""
        return (to_uint8(self.synthesise(part)).cpu() for part in ws.split(self.batch))

    def images(self, ws: Tensor) -> Tensor:
        """All images of styles at once."""
        return torch.cat(list(self.render(ws)))


def read_styles(path: Path, G: Any) -> Tensor:
    """Read `w` (n, num_ws, w_dim) from a file of `save_styles`. One style per image, (n, 1, w_dim), goes to all layers.

    Raises UserError naming the file when it holds something else, or styles of another network.
    """
    arrays = read_arrays(path, f"--projected-w={path}")
    if "w" not in arrays:
        raise UserError(f"--projected-w={path}: has no array w; `generate.py project` writes such files")
    w = arrays["w"]
    if w.dtype.kind not in "fiu":
        raise UserError(f"--projected-w={path}: w holds {w.dtype}, not numbers")
    if w.ndim != 3 or len(w) == 0 or w.shape[2] != G.w_dim or w.shape[1] not in (1, G.num_ws):
        raise UserError(f"--projected-w={path}: w has shape {w.shape}, this network needs (n, {G.num_ws}, {G.w_dim})")
    ws = torch.from_numpy(w.astype(np.float32))
    if not ws.isfinite().all():
        raise UserError(f"--projected-w={path}: w holds values that are not finite")
    return ws.expand(-1, G.num_ws, -1)


def gather_styles(
    model: Model,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    *,
    flag: str = "--seeds",
    name: str = "seed{:04d}",
) -> tuple[list[str], Tensor]:
    """Return names and styles (n, num_ws, w_dim) of a file's images and of seeds, in this order."""
    names, batches = style_batches(model, seeds, projected_w, flag=flag, name=name)
    return names, torch.cat(list(batches))


def style_batches(
    model: Model,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    *,
    flag: str = "--seeds",
    name: str = "seed{:04d}",
) -> tuple[list[str], Iterator[Tensor]]:
    """As `gather_styles`, but styles in batches (at most `batch`, num_ws, w_dim), which are mapped in their turn."""
    if projected_w is None and seeds is None:
        raise UserError(f"{flag}: say which images, e.g. {flag}=0-3, or name saved styles with --projected-w")
    saved = () if projected_w is None else read_styles(projected_w, model.G).to(model.device).split(model.batch)
    seeds = seeds or ()
    mapped = (model.styles_of(seeds[start : start + model.batch]) for start in range(0, len(seeds), model.batch))
    names = [f"proj{index:02d}" for index in range(sum(map(len, saved)))]
    return names + [name.format(seed) for seed in seeds], chain(saved, mapped)


def check_seeds(flag: str, seeds: tuple[int, ...] | None) -> None:
    """Raise UserError for a seed that numpy cannot take."""
    if seeds and max(seeds) >= 2**32:
        raise UserError(f"{flag}: {max(seeds)} is too large, seeds end at {2**32 - 1}")


def label_of(c_dim: int, class_index: int | None, flag: str = "--class", *, is_needed: bool = True) -> Tensor:
    """Return the label (1, c_dim), of zeros where none is given and none is needed, because nothing is mapped.

    Raises UserError, with the flag, for a class that is missing, unknown or useless.
    """
    if c_dim == 0:
        if class_index is not None:
            raise UserError(f"{flag}={class_index}: this network was trained without labels; leave it out")
        return torch.zeros(1, 0)
    if class_index is None and not is_needed:
        return torch.zeros(1, c_dim)
    if class_index is None:
        raise UserError(f"{flag}: this network is conditional; give one of its classes 0..{c_dim - 1}")
    if not 0 <= class_index < c_dim:
        raise UserError(f"{flag}={class_index}: this network has the classes 0..{c_dim - 1}")
    return torch.nn.functional.one_hot(torch.tensor([class_index]), c_dim).float()


def vector_label(c_dim: int, vector: Sequence[float]) -> Tensor:
    """Return the label (1, c_dim) of these numbers. Raises UserError where the network takes another number of them."""
    shown = f"--label={','.join(f'{x:g}' for x in vector)}"
    if c_dim == 0:
        raise UserError(f"{shown}: this network was trained without labels; leave it out")
    if len(vector) != c_dim:
        raise UserError(f"{shown}: {len(vector)} numbers, and labels of this network have {c_dim}")
    return torch.tensor([vector])


def save_styles(path: Path, ws: Tensor, **others: np.ndarray) -> None:
    """Write styles (n, num_ws, w_dim) as the array `w` of an .npz file, and further arrays beside it."""
    save_arrays(path, {"w": ws.cpu().numpy(), **others})


def read_arrays(path: Path, where: str) -> dict[str, np.ndarray]:
    """Read an .npz file. Raises UserError, beginning with `where`, when it is not one; runs no code from it."""
    try:
        return load_npz(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{where}: not an .npz file, which is what holds styles; a single array becomes one by "
            "numpy.savez('styles.npz', w=numpy.load(FILE))"
        ) from None
    except Exception as error:  # of zipfile, zlib, numpy
        raise UserError(f"{where}: not an .npz file of arrays ({describe_error(error)})") from None


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, of the same ending; the file appears under its own name when it is complete.

    Raises WriteError when it cannot be written; what was there before is intact then.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with replaced(path, path.suffix) as temporary:
            temporary.touch()  # what cannot be written is known before the work
            yield temporary
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error
