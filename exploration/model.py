"""Generator wrapper for the commands of generate.py: maps seeds and files to styles, and styles to images."""

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
from exploration.pose import Pose
from torch_utils.images import to_uint8
from training.data_sources.bounds import load_npz
from training.networks import execution

# In CPU matrix libraries, the rounding of a row depends on the batch size, except for multiples of this size. Batches
# are padded to a multiple, so the image of a seed is bit-identical for any --batch.
BATCH_MULTIPLE = 8
MAPPING_BATCH = 1024


def seed_latents(seeds: Sequence[int], z_dim: int) -> Tensor:
    """Return z (len(seeds), z_dim); each row is numpy.random.RandomState(seed).randn(1, z_dim)."""
    z = np.concatenate([np.random.RandomState(seed).randn(1, z_dim) for seed in seeds])
    return torch.from_numpy(z).to(torch.float32)


def pad_batch(x: Tensor, multiple: int = BATCH_MULTIPLE) -> Tensor:
    """Pad x (n, ...) to a multiple of `multiple` rows by repeating the last row."""
    return torch.cat([x, x[-1:].expand(-len(x) % multiple, *x.shape[1:])])


@dataclass(frozen=True, kw_only=True)
class Model:
    """A generator on its device, with the label c (1, c_dim), truncation, noise mode and batch size for every call.

    `pose` moves the images of a generator with Fourier features at its input.

    Each result depends only on its own seed or styles, not on the other items of the batch.
    """

    G: Any
    device: torch.device
    c: Tensor
    truncation_psi: float = 1.0
    noise_mode: str = "const"
    batch: int = 16
    pose: Pose = field(default_factory=Pose)
    execution: execution.Execution = field(default_factory=execution.Execution)

    def __post_init__(self) -> None:
        if not (hasattr(self.G, "mapping") and hasattr(self.G, "synthesis") and hasattr(self.G, "num_ws")):
            raise UserError(f"{type(self.G).__name__} has no styles: it can only generate images from seeds")

    @torch.no_grad()
    def map(self, z: Tensor, c: Tensor | None = None, psi: float | None = None) -> Tensor:
        """Map latents z (n, z_dim) to styles (n, num_ws, w_dim). `c` (n, c_dim) overrides the label of the model."""
        c = self.c.expand(len(z), -1) if c is None else c
        psi = self.truncation_psi if psi is None else psi
        parts = [
            self.G.mapping(pad_batch(part_z).to(self.device), pad_batch(part_c).to(self.device), psi)[: len(part_z)]
            for part_z, part_c in zip(z.split(MAPPING_BATCH), c.split(MAPPING_BATCH), strict=True)
        ]
        return torch.cat(parts)

    def styles_of(self, seeds: Sequence[int]) -> Tensor:
        """Return the styles (n, num_ws, w_dim) of seeds."""
        return self.map(seed_latents(seeds, self.G.z_dim))

    @torch.no_grad()
    def synthesise(self, ws: Tensor, transforms: Tensor | None = None) -> Tensor:
        """Generate images (n, C, H, W) in [-1, 1] of styles (n, num_ws, w_dim) in one batch.

        `transforms` (n, 3, 3) of the positions at the input replace that of the pose.
        """
        transforms = self.pose.transform if transforms is None else pad_batch(transforms)
        with execution.using(self.execution, input_transform=transforms):
            img: Tensor = self.G.synthesis(pad_batch(ws).to(self.device), noise_mode=self.noise_mode)
        return img[: len(ws)]

    def render(self, ws: Tensor, transforms: Tensor | None = None) -> Iterator[Tensor]:
        """Yield batches of uint8 images (at most `batch`, C, H, W) of styles (n, num_ws, w_dim), on the CPU.

        `transforms` are those of `synthesise`.
        """
        parts = ws.split(self.batch)
        moved = [None] * len(parts) if transforms is None else transforms.split(self.batch)
        return (to_uint8(self.synthesise(*pair)).cpu() for pair in zip(parts, moved, strict=True))

    def images(self, ws: Tensor, transforms: Tensor | None = None) -> Tensor:
        """Return all uint8 images (n, C, H, W) of styles, on the CPU; `transforms` are those of `synthesise`."""
        return torch.cat(list(self.render(ws, transforms)))


def read_styles(path: Path, G: Any) -> Tensor:
    """Read `w` (n, num_ws, w_dim) from a file of `save_styles`. Shape (n, 1, w_dim) is broadcast to all layers.

    Raises UserError for any other file, and for styles that do not fit the network.
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
    """Return names and styles (n, num_ws, w_dim): the saved styles, then the styles of the seeds."""
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
    """Return names and an iterator over batches of styles (at most `batch`, num_ws, w_dim), mapped lazily."""
    if projected_w is None and seeds is None:
        raise UserError(f"{flag}: specify images, e.g. {flag}=0-3, or saved styles with --projected-w")
    saved = () if projected_w is None else read_styles(projected_w, model.G).to(model.device).split(model.batch)
    seeds = seeds or ()
    mapped = (model.styles_of(seeds[start : start + model.batch]) for start in range(0, len(seeds), model.batch))
    names = [f"proj{index:02d}" for index in range(sum(map(len, saved)))]
    return names + [name.format(seed) for seed in seeds], chain(saved, mapped)


def check_seeds(flag: str, seeds: tuple[int, ...] | None) -> None:
    """Raise UserError for a seed that numpy does not accept."""
    if seeds and max(seeds) >= 2**32:
        raise UserError(f"{flag}: {max(seeds)} is too large; the largest seed is {2**32 - 1}")


def label_of(c_dim: int, class_index: int | None, flag: str = "--class", *, is_needed: bool = True) -> Tensor:
    """Return the one-hot label (1, c_dim), or zeros if no class is given or needed.

    Raises UserError, with the flag, if the class is missing, unknown, or given for an unconditional network.
    """
    if c_dim == 0:
        if class_index is not None:
            raise UserError(f"{flag}={class_index}: this network was trained without labels; omit {flag}")
        return torch.zeros(1, 0)
    if class_index is None and not is_needed:
        return torch.zeros(1, c_dim)
    if class_index is None:
        raise UserError(f"{flag}: this network is conditional; specify a class, 0..{c_dim - 1}")
    if not 0 <= class_index < c_dim:
        raise UserError(f"{flag}={class_index}: this network has the classes 0..{c_dim - 1}")
    return torch.nn.functional.one_hot(torch.tensor([class_index]), c_dim).float()


def vector_label(c_dim: int, vector: Sequence[float]) -> Tensor:
    """Return a vector as a label (1, c_dim). Raises UserError if the network expects another length."""
    shown = f"--label={','.join(f'{x:g}' for x in vector)}"
    if c_dim == 0:
        raise UserError(f"{shown}: this network was trained without labels; omit --label")
    if len(vector) != c_dim:
        raise UserError(f"{shown}: has {len(vector)} numbers, but labels of this network have {c_dim}")
    return torch.tensor([vector])


def save_styles(path: Path, ws: Tensor, **others: np.ndarray) -> None:
    """Write styles (n, num_ws, w_dim) as the array `w` of an .npz file, with optional further arrays."""
    save_arrays(path, {"w": ws.cpu().numpy(), **others})


def read_arrays(path: Path, where: str) -> dict[str, np.ndarray]:
    """Read an .npz file without running code. Raises UserError, prefixed with `where`, for any other file."""
    try:
        return load_npz(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{where}: not an .npz file; convert a single array of styles with "
            "numpy.savez('styles.npz', w=numpy.load(FILE))"
        ) from None
    except Exception as error:  # raised by zipfile, zlib or numpy
        raise UserError(f"{where}: not an .npz file of arrays ({describe_error(error)})") from None


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix. On success, the file is renamed to `path`.

    Raises WriteError if writing fails; an existing file at `path` is then unchanged.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with replaced(path, path.suffix) as temporary:
            temporary.touch()  # fail early if the folder is not writable
            yield temporary
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error
