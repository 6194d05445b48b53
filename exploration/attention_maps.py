"""Attention maps of chosen positions, per resolution, block and head, and attention rollout.

For every attention variant, the output is linear in the values: A V for each head. A row of A is therefore the gradient
with respect to V for a unit cotangent. One backward pass computes as many rows as a head has channels, and the N x N
matrix is never stored. For Linformer, A is softmax(Q (E K)^T) E, the map over projected keys *pulled back* to
positions; for Nystrom landmarks, F A+ B; for axial attention, the product of column and row maps. Weights of Linformer
and Nystrom can be negative and need not sum to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.util import counted
from exploration.model import Model, check_seeds, gather_styles, save_arrays
from exploration.opening import is_mapping, open_model
from exploration.output import make_outdir
from torch_utils.images import save_pixels, to_uint8
from torch_utils.sheets import arranged, caption_of, largest_side, marked, overlay, sheet, tile_of, to_rgb
from training.networks.alias_free import FilteredActivation
from training.networks.attention import Attention, SelfAttention
from training.networks.generator import Grid
from training.networks.layers import Resampling

Resample = Resampling | FilteredActivation

MAX_BESIDE = 8  # queries up to which the two parts of a sheet are side by side
MAX_QUERIES = 64  # columns of a sheet
MAX_SIDE = 128  # longer side in pixels of the images in a sheet, which has a row for each block


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """Queries and keys (B, N, C) in float32 of one attention block, the `index`-th on its grid.

    `grid` is that of the tokens inside the image; the tokens of a network with margins extend beyond it.
    `resamplings` connect the previous block to this one.
    """

    module: Attention
    resamplings: tuple[Resample, ...]
    grid: Grid
    index: int
    q: Tensor
    k: Tensor

    @property
    def name(self) -> str:
        """Name of the block, e.g. 16x16_0 (height x width, index)."""
        return f"{self.grid[0]}x{self.grid[1]}_{self.index}"

    @property
    def tokens(self) -> Grid:
        """Grid of all tokens, with the margin."""
        return self.grid[0] + 2 * self.module.margin, self.grid[1] + 2 * self.module.margin

    def rows_of(self, pixels: Tensor, img_size: Grid) -> Tensor:
        """Return the indices (Q,) of the tokens that contain the pixels (Q, 2), given as (x, y)."""
        inside = tokens_of(pixels, self.grid, img_size)
        y, x = (part + self.module.margin for part in (inside // self.grid[1], inside % self.grid[1]))
        return y * self.tokens[1] + x

    def inside(self, weights: Tensor) -> Tensor:
        """Return the part (..., h, w) of weights (..., N) of all tokens that is inside the image."""
        margin = self.module.margin
        return weights.unflatten(-1, self.tokens)[..., margin:, margin:][..., : self.grid[0], : self.grid[1]]

    def maps(self, image: int, rows: Tensor) -> Tensor:
        """Return the attention weights (H, Q, N) of query positions (Q,) over all positions."""
        return self.pulled_back(image, F.one_hot(rows, self.q.shape[1]).float())

    def received(self, image: int) -> Tensor:
        """Return the attention that each position receives, (N,), averaged over all queries and heads."""
        N = self.q.shape[1]
        return self.pulled_back(image, self.q.new_full((1, N), 1 / N)).mean(dim=0)[0]

    def pulled_back(self, image: int, outputs: Tensor) -> Tensor:
        """Return r A (H, Q, N) for output weights r (Q, N) of an image, shared by all heads."""
        q, k = self.q[image : image + 1], self.k[image : image + 1]  # (1, N, C)
        heads = self.module.num_heads
        head_dim = q.shape[2] // heads  # channels of a head are independent, so each channel carries a different r
        parts = []
        for part in outputs.split(head_dim):
            cotangent = F.pad(part, (0, 0, 0, head_dim - len(part))).repeat(heads, 1).t()[None]  # (1, N, C)
            with torch.enable_grad():
                v = torch.zeros_like(q, requires_grad=True)
                (gradient,) = torch.autograd.grad(self.module(q, k, v), v, cotangent)
            parts.append(gradient[0].t().unflatten(0, (heads, head_dim))[:, : len(part)])
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def projected(self, image: int, rows: Tensor) -> Tensor | None:
        """Return the weights (H, Q, k) over projected keys (Linformer), or None without a projection."""
        if not isinstance(self.module, SelfAttention) or self.module.token_projection is None:
            return None
        return self.module.weights(self.q[image : image + 1, rows], self.k[image : image + 1])[0]


@contextmanager
def recording(network: nn.Module, img_size: Grid, count: int | None = None) -> Iterator[list[BlockRecord]]:
    """Yield a list that collects a record of each attention call in `network`. Hooks are removed on exit.

    Records hold the first `count` images of the batch, or all images if `count` is None.
    """
    records: list[BlockRecord] = []
    resamplings: list[Resample] = []  # since the last block

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Resample):
            return resamplings.append(module)
        assert isinstance(module, Attention)
        q, k = (x.detach()[:count].to(torch.float32, copy=True) for x in args[:2])  # a view would retain v and padding
        scale = math.sqrt(q.shape[1] / math.prod(img_size))  # grids have the aspect ratio of the image
        height, width = (round(side * scale) - 2 * module.margin for side in img_size)
        grid = (height, width)
        index = sum(record.grid == grid for record in records)
        record = BlockRecord(module=module, resamplings=tuple(resamplings), grid=grid, index=index, q=q, k=k)
        records.append(record)
        resamplings.clear()

    handles = [module.register_forward_hook(hook) for module in recorded_modules(network)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def recorded_modules(network: nn.Module) -> list[nn.Module]:
    """Return the outermost attention and resampling modules of a network."""
    found = [module for module in network.modules() if isinstance(module, Attention) or is_resampling(module)]
    parts = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in parts]


def is_resampling(module: nn.Module) -> bool:
    """Return whether a module resamples tokens, or an activation leads to another grid."""
    if isinstance(module, FilteredActivation):
        return module.source.grid != module.target.grid
    return isinstance(module, Resampling)


def has_attention(network: nn.Module) -> bool:
    """Return whether a network has attention modules."""
    return any(isinstance(module, Attention) for module in network.modules())


def record(model: Model, ws: Tensor) -> tuple[list[BlockRecord], Tensor]:
    """Run the synthesis once. Returns the records of all blocks, and the images (n, C, H, W) in [-1, 1].

    Raises UserError for a network without self-attention.
    """
    synthesis = model.G.synthesis
    if not has_attention(synthesis):
        raise UserError(f"{type(model.G).__name__} has no self-attention, so it has no attention maps")
    with recording(synthesis, model.G.img_shape[1:], count=len(ws)) as records:
        img = model.synthesise(ws)
    return records, img


def rollout(records: Sequence[BlockRecord], image: int, pixels: Tensor, img_size: Grid) -> list[Tensor]:
    """Return the relevance of each block's input positions for the chosen pixels (Q, 2): (Q, N) with sum 1.

    Attention rollout (Abnar & Zuidema 2020): relevance starts at the token of the last grid that contains the pixel
    and propagates backwards through the blocks, r <- (n(r A) + r) / 2, with A averaged over heads; the second r is the
    residual branch. At a change of resolution, r <- n(r U), with U the upsampling. n takes absolute values and
    normalizes their sum to 1; full, window and axial attention satisfy this already. Positions include margins.
    """
    relevance = F.one_hot(records[-1].rows_of(pixels, img_size), math.prod(records[-1].tokens)).float()
    steps = []
    for block in reversed(records):
        relevance = (_normalized(block.pulled_back(image, relevance).mean(dim=0)) + relevance) / 2
        steps.append(relevance)
        for resampling in reversed(block.resamplings):
            relevance = _normalized(_resampled_back(resampling, relevance))
    return steps[::-1]


def _normalized(weights: Tensor) -> Tensor:
    """Return |weights| (Q, N), with each row normalized to sum 1."""
    return F.normalize(weights.abs(), p=1, dim=1)


def _resampled_back(resampling: Resample, outputs: Tensor) -> Tensor:
    """Return r U (Q, N) for weights r (Q, M) of the outputs of a resampling U."""
    if isinstance(resampling, FilteredActivation):
        return _filtered_back(resampling, outputs)
    with torch.enable_grad():
        x = outputs.new_zeros(1, math.prod(resampling.grid), len(outputs) * resampling.GROUP, requires_grad=True)
        (gradient,) = torch.autograd.grad(resampling(x), x, outputs.t()[None])
    return gradient[0].t().unflatten(0, (-1, resampling.GROUP)).sum(dim=1)


def _filtered_back(activation: FilteredActivation, outputs: Tensor) -> Tensor:
    """Return r U (Q, N) for weights r (Q, M) of the outputs of the filters U between two bands."""
    with torch.enable_grad():
        x = outputs.new_zeros(len(outputs), 1, *activation.source.grid, requires_grad=True)
        y = outputs.view(-1, 1, *activation.target.grid)
        (gradient,) = torch.autograd.grad(activation.resample(x), x, y)
    return gradient.flatten(1)


def tokens_of(pixels: Tensor, grid: Grid, img_size: Grid) -> Tensor:
    """Return the indices (Q,) of the tokens that contain the pixels (Q, 2), given as (x, y)."""
    x = pixels[:, 0] * grid[1] // img_size[1]
    y = pixels[:, 1] * grid[0] // img_size[0]
    return y * grid[1] + x


def choose_pixels(queries: Sequence[str], records: Sequence[BlockRecord], image: int, img_size: Grid) -> Tensor:
    """Parse queries such as '5,12', 'grid:2' (the centres of 2 x 2 cells) or 'most:3' into pixels (Q, 2), as (x, y).

    Raises UserError for any other form, for pixels outside the image, and for more than MAX_QUERIES.
    """
    height, width = img_size
    pixels: list[tuple[int, int]] = []
    for query in queries:
        match = re.fullmatch(r"(\d{1,9}),(\d{1,9})|(grid|most):([1-9]\d{0,2})", query)
        if not match:
            raise UserError(
                f"--query={query}: specify a pixel X,Y, or grid:N, or most:N for the most attended pixels, "
                "with N below 1000"
            )
        x, y, kind, count = match.groups()
        if kind == "most":
            pixels += most_attended(records, image, img_size, int(count))
        elif kind == "grid":
            n = int(count)
            if n > min(img_size):
                raise UserError(
                    f"--query={query}: the images are {width}x{height}; specify at most grid:{min(img_size)}"
                )
            pixels += [
                ((2 * i + 1) * width // (2 * n), (2 * j + 1) * height // (2 * n)) for j in range(n) for i in range(n)
            ]
        elif int(x) < width and int(y) < height:
            pixels.append((int(x), int(y)))
        else:
            raise UserError(
                f"--query={query}: the images are {width}x{height}, so X is at most {width - 1} and Y {height - 1}"
            )
    if len(pixels) > MAX_QUERIES:
        raise UserError(f"--query: {len(pixels)} pixels; a sheet shows at most {MAX_QUERIES}")
    return torch.tensor(pixels, device=records[0].q.device)


def most_attended(records: Sequence[BlockRecord], image: int, img_size: Grid, count: int) -> list[tuple[int, int]]:
    """Return the pixels (x, y) that receive the most attention over all blocks, at least an eighth of the image apart.

    Raises UserError if fewer than `count` such pixels fit into the image.
    """
    total = torch.zeros(img_size, device=records[0].q.device)
    for block in records:
        received = block.received(image)
        inside = block.inside(received)[None, None]
        total += F.interpolate(inside, img_size, mode="bilinear")[0, 0] * received.numel()
    scores = total.cpu().numpy()
    radius = max(img_size) // 8
    peaks: list[tuple[int, int]] = []
    for _ in range(count):
        y, x = np.unravel_index(np.argmax(scores), scores.shape)
        if not np.isfinite(scores[y, x]):
            raise UserError(f"--query=most:{count}: the image has room for {len(peaks)} positions; choose fewer")
        peaks.append((int(x), int(y)))
        scores[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = -np.inf
    return peaks


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """Attention maps and rollout of chosen pixels (Q, 2) of one image.

    maps        block name -> (H, Q, h, w)
    projected   block name -> (H, Q, k), for blocks with projected keys
    rolled      block name -> (Q, h, w), over the input positions of the block
    """

    pixels: np.ndarray
    maps: dict[str, np.ndarray]
    projected: dict[str, np.ndarray]
    rolled: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays, keyed by .npz name: queries, map_8x8_0, projected_32x32_0, rollout_8x8_0."""
        named = {"map": self.maps, "projected": self.projected, "rollout": self.rolled}
        found = {f"{kind}_{block}": array for kind, arrays in named.items() for block, array in arrays.items()}
        return {"queries": self.pixels, **found}

    def titles(self) -> dict[str, str]:
        """Return block name -> title, e.g. 16x16_0 -> "block 3, 16x16"."""
        return {name: block_title(number, maps.shape[2:]) for number, (name, maps) in enumerate(self.maps.items())}


def attention_maps(records: Sequence[BlockRecord], image: int, pixels: Tensor, img_size: Grid) -> AttentionMaps:
    """Compute the maps of all blocks, and their rollout, for pixels (Q, 2) of an image."""
    maps, projected, rolled = {}, {}, {}
    for block, relevance in zip(records, rollout(records, image, pixels, img_size), strict=True):
        rows = block.rows_of(pixels, img_size)
        maps[block.name] = block.inside(block.maps(image, rows)).cpu().numpy()
        weights = block.projected(image, rows)
        if weights is not None:
            projected[block.name] = weights.cpu().numpy()
        rolled[block.name] = block.inside(relevance).cpu().numpy()
    return AttentionMaps(pixels=pixels.cpu().numpy(), maps=maps, projected=projected, rolled=rolled)


def block_title(number: int, grid: Sequence[int]) -> str:
    """Return a readable name of the `number`-th block of the network, e.g. "block 3, 16x16" (height x width)."""
    return f"block {number}, {grid[0]}x{grid[1]}"


def draw_blocks(pixels: np.ndarray, found: AttentionMaps, name: str) -> np.ndarray:
    """Draw one row per block over an image (H, W, 3): its maps, averaged over heads, and the rollout."""
    titles = found.titles().values()
    maps = {f"{title}, all heads": maps.mean(axis=0) for title, maps in zip(titles, found.maps.values(), strict=True)}
    rolled = {f"input of {title}": maps for title, maps in zip(titles, found.rolled.values(), strict=True)}
    panels = {"Attention, mean of all heads": maps, "Rollout": rolled}
    sheets = [heat_sheet(pixels, found.pixels, name, rows, title) for title, rows in panels.items()]
    return arranged([sheets] if len(found.pixels) <= MAX_BESIDE else [[each] for each in sheets])


def draw_heads(pixels: np.ndarray, found: AttentionMaps, name: str, block: str) -> np.ndarray:
    """Draw one row per head of a block over an image (H, W, 3)."""
    title = found.titles()[block]
    rows = {f"{title}, head {head}": maps for head, maps in enumerate(found.maps[block])}
    return arranged([[heat_sheet(pixels, found.pixels, name, rows, "Attention of single heads")]])


def heat_sheet(
    pixels: np.ndarray, queries: np.ndarray, name: str, rows: Mapping[str, np.ndarray], title: str
) -> np.ndarray:
    """Draw a column per query (Q, 2): the query in an image (H, W, 3), and in each row a map of (Q, h, w) over it.

    The maps of a row share a colour scale.
    """
    tile, size = tile_of(pixels, max_side=min(largest_side(len(queries)), MAX_SIDE)), pixels.shape[:2]
    peaks = [max(float(maps.max()), 0.0) for maps in rows.values()]
    tiles = [[marked(tile, x, y, size) for x, y in queries]]
    tiles += [
        [overlay(tile, weights, peak) for weights in maps] for maps, peak in zip(rows.values(), peaks, strict=True)
    ]
    captions = [f"({x}, {y})" for x, y in queries]
    return sheet(tiles, captions, [f"{name}, query (x, y)", *rows], title=title, peaks=[None, *peaks])


def draw_attention(
    *,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    queries: tuple[str, ...],
    heads: bool,
    outdir: Path,
    **options: Any,
) -> None:
    """Run `generate.py attention`."""
    model = open_model(**options, needs_class=is_mapping(seeds, projected_w))
    check_seeds("--seeds", seeds)
    names, ws = gather_styles(model, seeds, projected_w)
    choose_pixels(queries, record(model, ws[:1])[0], 0, model.G.img_shape[1:])  # raises before anything is written
    make_outdir(outdir)
    found_maps = (found for part in ws.split(model.batch) for found in maps_of(model, part, queries))
    for name, (pixels, found) in zip(tqdm(names, unit="img"), found_maps, strict=True):
        save_arrays(outdir / f"{name}-attention.npz", found.arrays())
        save_pixels(draw_blocks(pixels, found, caption_of(name)), outdir / f"{name}-attention.png")
        for block in found.maps if heads else ():
            save_pixels(draw_heads(pixels, found, caption_of(name), block), outdir / f"{name}-{block}.png")
    blocks = "; ".join(f"{title} = {block}" for block, title in found.titles().items())
    click.echo(f"{counted(len(names), 'sheet')} in {outdir}; names of the blocks in the .npz files: {blocks}")


def maps_of(model: Model, ws: Tensor, queries: tuple[str, ...]) -> Iterator[tuple[np.ndarray, AttentionMaps]]:
    """Yield the image (H, W, 3) and the attention maps of each style in a batch. Raises UserError."""
    records, img = record(model, ws)
    for index, image in enumerate(to_uint8(img).permute(0, 2, 3, 1).cpu().numpy()):
        pixels = choose_pixels(queries, records, index, model.G.img_shape[1:])
        yield to_rgb(image), attention_maps(records, index, pixels, model.G.img_shape[1:])
