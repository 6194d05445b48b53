"""Semantic directions in w: from layer weights (SeFa), from samples (GANSpace), or between two groups of images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.util import counted, import_extra
from exploration.model import (
    MAPPING_BATCH,
    Model,
    atomic_write,
    check_seeds,
    gather_styles,
    read_arrays,
    save_arrays,
)
from exploration.opening import open_model
from exploration.output import make_outdir
from exploration.style_groups import choose_styles, describe_styles
from torch_utils.images import save_pixels
from torch_utils.sheets import caption_of, sheet, tiles_of
from training.networks.layers import FullyConnected
from training.snapshots.exchange import read_tensors

NUM_SAMPLES = 10_000  # w samples for means and standard deviations
METHODS = ("sefa", "pca")  # methods that need no labels
RIDGE = 0.01  # relative to the mean variance of w; regularizes a classifier with fewer images than dimensions


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Unit directions (n, w_dim) for a subset of the styles.

    values    (n,) importance of each direction in descending order; the meaning depends on the method
    sigmas    (n,) standard deviation of w along each direction, the unit of edit strength
    styles    indices of the edited styles
    """

    directions: Tensor
    values: Tensor
    sigmas: Tensor
    styles: tuple[int, ...]

    def edit(self, ws: Tensor, index: int, strength: Tensor | float) -> Tensor:
        """Move styles (n, num_ws, w_dim) by `strength` standard deviations, a number or (n,), along one direction."""
        step = self.directions[index] * self.sigmas[index]
        offsets = torch.as_tensor(strength, dtype=ws.dtype).reshape(-1, 1, 1) * step  # (n or 1, 1, w_dim)
        moved = ws.clone()
        moved[:, list(self.styles)] += offsets.to(ws)
        return moved


def sampled_w(model: Model, count: int) -> Tensor:
    """Return w (count, w_dim) of fixed random latents, without truncation."""
    z = torch.from_numpy(np.random.RandomState(0).randn(count, model.G.z_dim)).float()
    return torch.cat([model.map(part, psi=1)[:, 0].double().cpu() for part in z.split(MAPPING_BATCH)])


def style_layers(network: nn.Module, num_ws: int, w_dim: int) -> list[list[FullyConnected | nn.Linear]]:
    """Return the layers that read each style, found in one forward pass with each style filled with its index."""
    readers: list[list[FullyConnected | nn.Linear]] = [[] for _ in range(num_ws)]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FullyConnected | nn.Linear)
        x = args[0]
        if x.ndim == 2 and (x == x[0, 0]).all() and x[0, 0] in range(num_ws):
            readers[int(x[0, 0])].append(module)

    modules = [m for m in network.modules() if isinstance(m, FullyConnected | nn.Linear) and m.weight.shape[1] == w_dim]
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        reference = next(network.parameters())
        with torch.no_grad():
            network(torch.arange(num_ws).to(reference)[None, :, None].expand(1, -1, w_dim))
    finally:
        for handle in handles:
            handle.remove()
    return readers


def factorise(model: Model, styles: Sequence[int], count: int, samples: Tensor) -> Directions:
    """Return the first eigenvectors of A^T A, where A stacks the weights of all layers that read these styles.

    These directions change the outputs of the layers most (Shen & Zhou 2021, "Closed-form factorization of latent
    semantics in GANs"). Raises UserError if no linear layer reads the styles.
    """
    layers = style_layers(model.G.synthesis, model.G.num_ws, model.G.w_dim)
    weights = [effective_weight(layer) for style in styles for layer in layers[style]]
    if not weights:
        raise UserError(
            f"{type(model.G).__name__}: no linear layer reads these styles, so --method=sefa has nothing to factorise"
        )
    A = torch.cat(weights)
    return _top_eigenvectors(A.t() @ A, count, samples, styles)


def effective_weight(layer: FullyConnected | nn.Linear) -> Tensor:
    """Return the matrix (out, in) that a layer applies, including its weight gain."""
    gain = layer.weight_gain if isinstance(layer, FullyConnected) else 1.0
    return layer.weight.double().cpu() * gain


def principal_components(samples: Tensor, styles: Sequence[int], count: int) -> Directions:
    """Return the first principal components of w (Härkönen et al. 2020, "GANSpace"); values are variances."""
    return _top_eigenvectors(samples.t().cov(), count, samples, styles)


def _top_eigenvectors(matrix: Tensor, count: int, samples: Tensor, styles: Sequence[int]) -> Directions:
    values, vectors = torch.linalg.eigh(matrix)
    return _directions(vectors.t().flip(0)[:count], values.flip(0)[:count], samples, styles)


def direction_between(
    positive: Tensor, negative: Tensor, samples: Tensor, styles: Sequence[int], *, linear: bool
) -> Directions:
    """Return the direction from negative to positive w (n, w_dim): the difference of means, or a linear classifier.

    The classifier is a ridge regression of the signs: (X^T X + lambda I) d = X^T y with centred X and y. The value is
    the distance between the means along the direction, in standard deviations of w.
    """
    positive, negative = positive.double().cpu(), negative.double().cpu()
    d = positive.mean(dim=0) - negative.mean(dim=0)
    gap = d
    if linear:
        X = torch.cat([positive, negative])
        y = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).double()
        X, y = X - X.mean(dim=0), y - y.mean()
        ridge = RIDGE * len(X) * samples.var(dim=0).mean()
        # Dual form, since there are often fewer images than dimensions: d = X^T (X X^T + lambda I)^-1 y.
        d = X.t() @ torch.linalg.solve(X @ X.t() + ridge * torch.eye(len(X)).double(), y)
    if gap.norm() <= 1e-6 * samples.std(dim=0).norm():  # only rounding errors
        raise UserError("--positive and --negative have the same mean: there is no direction between them")
    d = d / d.norm()
    sigma = (samples @ d).std()
    return Directions(
        directions=d[None].float(),
        values=((gap @ d) / sigma)[None].float(),
        sigmas=sigma[None].float(),
        styles=tuple(styles),
    )


def _directions(vectors: Tensor, values: Tensor, samples: Tensor, styles: Sequence[int]) -> Directions:
    """Build Directions from eigenvectors (n, w_dim). The sign of a vector makes its largest entry positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign()
    sigmas = (samples @ vectors.t()).std(dim=0)
    return Directions(directions=vectors.float(), values=values.float(), sigmas=sigmas.float(), styles=tuple(styles))


def save_directions(path: Path, found: Directions) -> None:
    """Write an .npz or .safetensors file. Raises UserError for other suffixes, and WriteError."""
    arrays = {
        "directions": found.directions.numpy(),
        "values": found.values.numpy(),
        "sigmas": found.sigmas.numpy(),
        "styles": np.array(found.styles, dtype=np.int64),
    }
    if path.suffix == ".npz":
        save_arrays(path, arrays)
    else:
        safetensors = _safetensors(path)
        with atomic_write(path) as temporary:
            safetensors.save_file({name: torch.tensor(array) for name, array in arrays.items()}, temporary)


def check_suffix(path: Path) -> None:
    """Raise UserError for a suffix that `save_directions` does not support, or a missing package."""
    if path.suffix != ".npz":
        _safetensors(path)


def read_direction(given: str, G: Any) -> tuple[Directions, int]:
    """Read the FILE:INDEX of `--direction`. Raises UserError if the file does not fit the network."""
    where = f"--direction={given}"
    match = re.fullmatch(r"(.+):(\d{1,9})", given)
    if not match:
        raise UserError(f"{where}: specify the index of a direction in the file, e.g. {given}:0")
    found, index = read_directions(Path(match[1]), G, where), int(match[2])
    if index >= len(found.directions):
        raise UserError(f"{where}: the file has directions 0 to {len(found.directions) - 1}")
    return found, index


def read_directions(path: Path, G: Any, where: str) -> Directions:
    """Read a file of `save_directions`. Raises UserError, prefixed with `where`, if it does not fit the network."""
    arrays = _read(path, where)
    try:
        if any(arrays[name].dtype.kind not in "biuf" for name in ("directions", "values", "sigmas", "styles")):
            raise TypeError("not real numbers")
        directions, values, sigmas = (
            torch.from_numpy(arrays[name].astype(np.float32)) for name in ("directions", "values", "sigmas")
        )
        styles = tuple(int(style) for style in arrays["styles"])
    except KeyError as error:
        raise UserError(f"{where}: has no array {error}; `generate.py directions` writes such files") from None
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: its arrays are not the numbers that `generate.py directions` writes") from None
    if directions.ndim != 2 or directions.shape[1] != G.w_dim or not all(0 <= style < G.num_ws for style in styles):
        raise UserError(
            f"{where}: holds directions {tuple(directions.shape)} for styles up to {max(styles, default=0)}; this "
            f"network has {G.num_ws} styles of {G.w_dim} numbers"
        )
    if not sigmas.shape == values.shape == (len(directions),):
        raise UserError(f"{where}: needs one value and one sigma for each of its {len(directions)} directions")
    if not (directions.isfinite().all() and sigmas.isfinite().all()):
        raise UserError(f"{where}: holds values that are not finite")
    return Directions(directions=directions, values=values, sigmas=sigmas, styles=styles)


def _read(path: Path, where: str) -> Mapping[str, np.ndarray]:
    if path.suffix == ".npz":
        return read_arrays(path, where)
    _safetensors(path)  # raises for other suffixes
    try:
        tensors = read_tensors(path)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{where}: not a safetensors file ({error})") from None
    # NumPy does not support bfloat16.
    return {name: (x if x.is_complex() else x.double()).numpy() for name, x in tensors.items()}


def _safetensors(path: Path) -> Any:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: directions are stored in .npz or .safetensors files")
    return import_extra("safetensors.torch", "safetensors")


def read_edits(directions: Sequence[str], strengths: Sequence[float]) -> list[tuple[str, float]]:
    """Pair each --direction with its --strength, 1 by default. Raises UserError for a strength without a direction."""
    if len(strengths) > len(directions):
        raise UserError(f"--strength={strengths[len(directions)]:g}: needs a direction; specify one with --direction")
    if strengths and len(strengths) < len(directions):
        raise UserError(
            f"--strength: given {len(strengths)} times for {len(directions)} directions; specify one for each"
        )
    return list(zip(directions, strengths or [1.0] * len(directions), strict=True))


def find_direction(given: str, model: Model) -> tuple[Directions, int]:
    """Return a --direction: FILE:INDEX from a file, or METHOD[:STYLES]:INDEX, computed now. Raises UserError."""
    match = re.fullmatch(rf"({'|'.join(METHODS)})(?::([^:]+))?:(\d{{1,9}})", given)
    if not match:
        return read_direction(given, model.G)
    where, method, styles, index = f"--direction={given}", match[1], match[2] or "all", int(match[3])
    limit = max_components(model, method, NUM_SAMPLES)
    if index >= limit:
        raise UserError(f"{where}: {method} finds directions 0 to {limit - 1} here")
    chosen = choose_styles(styles, model.G.num_ws, getattr(model.G, "style_groups", {}), where)
    return find_directions(model, method, chosen, index + 1, NUM_SAMPLES), index


def edited(styles: Iterator[Tensor], edits: Sequence[tuple[str, float]], model: Model) -> Iterator[Tensor]:
    """Apply edits (direction, strength) to styles (n, num_ws, w_dim). Raises UserError before the first batch."""
    found = [(*find_direction(given, model), strength) for given, strength in edits]
    return (apply_edits(ws, found) for ws in styles)


def apply_edits(ws: Tensor, edits: Iterable[tuple[Directions, int, float]]) -> Tensor:
    """Move styles (n, num_ws, w_dim) along several directions, each with its strength."""
    for directions, index, strength in edits:
        ws = directions.edit(ws, index, strength)
    return ws


def draw_directions(
    *,
    method: str,
    styles: str,
    components: int | None,
    samples: int,
    positive: tuple[int, ...] | None,
    negative: tuple[int, ...] | None,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    strength: float,
    steps: int,
    save: Path | None,
    outdir: Path,
    **options: Any,
) -> None:
    """Run `generate.py directions`."""
    save = save or outdir / "directions.npz"
    check_suffix(save)
    check_groups(method, components, positive, negative)
    model = open_model(**options)
    for flag, given in (("--seeds", seeds), ("--positive", positive), ("--negative", negative)):
        check_seeds(flag, given)
    names, ws = gather_styles(model, seeds, projected_w)
    groups = getattr(model.G, "style_groups", {})
    chosen = choose_styles(styles, model.G.num_ws, groups)
    if positive and negative:
        has, lacks = (model.styles_of(group)[:, 0] for group in (positive, negative))
        found = direction_between(has, lacks, sampled_w(model, samples), chosen, linear=method == "linear")
    else:
        limit = max_components(model, method, samples)
        if components is not None and components > limit:
            raise UserError(f"--components={components}: --method={method} finds at most {limit} directions here")
        found = find_directions(model, method, chosen, components or min(5, limit), samples)
    make_outdir(outdir)
    save_directions(save, found)
    strengths = torch.arange(1 - steps, steps, 2) * (strength / (steps - 1))
    captions = [signed(value) for value in strengths.tolist()]
    described = describe_styles(chosen, model.G.num_ws, groups)
    for index in tqdm(range(len(found.directions)), unit="direction"):
        moved = found.edit(ws.repeat_interleave(steps, dim=0), index, strengths.repeat(len(ws)))
        rows = [tiles_of(images, steps) for images in model.images(moved).split(steps)]
        title = f"Direction {index} ({method}), {described}; strength in standard deviations of w"
        drawn = sheet(rows, captions, list(map(caption_of, names)), title=title)
        save_pixels(drawn, outdir / f"direction{index:02d}.png")
    click.echo(
        f"{counted(len(found.directions), 'direction')} for {described} in {save}; "
        f"{counted(len(names), 'image')} edited along each direction in {outdir}"
    )


def check_groups(
    method: str, components: int | None, positive: tuple[int, ...] | None, negative: tuple[int, ...] | None
) -> None:
    """Raise UserError for options of `directions` that the method requires or does not support."""
    by_groups = method in ("mean", "linear")
    if by_groups and not (positive and negative):
        raise UserError(f"--method={method}: needs two lists of seeds, --positive and --negative")
    if not by_groups and (positive or negative):
        raise UserError(f"--method={method}: --positive and --negative are for the methods mean and linear")
    if by_groups and components is not None:
        raise UserError(f"--components={components}: --method={method} finds one direction; omit --components")


def max_components(model: Model, method: str, samples: int) -> int:
    """Return the number of directions that sefa or pca can find."""
    return int(min(model.G.w_dim, samples - 1) if method == "pca" else model.G.w_dim)


def find_directions(model: Model, method: str, styles: tuple[int, ...], count: int, samples: int) -> Directions:
    """Find the first `count` directions with the unsupervised method sefa or pca."""
    w = sampled_w(model, samples)
    return factorise(model, styles, count, w) if method == "sefa" else principal_components(w, styles, count)


def signed(number: float) -> str:
    """Format a caption such as +1.5, -3 or 0."""
    return f"{number:+.4g}" if number else "0"
