"""Where transformer blocks look: attention maps of chosen positions, per resolution, block and head, and their rollout.

A record holds the queries and keys of a block; maps are computed from them for the rows that are asked for, in pieces
where all rows are needed, so that no matrix of N x N numbers exists.

With Linformer a query attends to k projected keys. As the output is A (E V) = (A E) V, the row of A E says with which
weight each position's value enters: the *pull-back* of the map. Its weights can be negative and need not sum to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import UserError
from exploration.model import Model, fill_up
from exploration.sheets import enlarged, marked, overlay, sheet
from torch_utils.ops.upfirdn2d import upsample2d
from training.networks import execution
from training.networks.attention import SelfAttention
from training.networks.generator import Grid
from training.networks.layers import resample_filter

PIECE_BYTES = 2**26  # of one piece of an attention matrix in float32


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """Queries and keys (B, N, C) of a block, the `index`-th on its grid, in float32."""

    module: SelfAttention
    grid: Grid
    index: int
    q: Tensor
    k: Tensor

    @property
    def name(self) -> str:
        """E.g. 16x16_0, as height x width."""
        return f"{self.grid[0]}x{self.grid[1]}_{self.index}"

    @property
    def is_projected(self) -> bool:
        """Whether attention goes to Linformer's projected keys."""
        return self.module.token_projection is not None

    def weights(self, image: int, rows: Tensor | slice) -> Tensor:
        """Attention weights (H, Q, N or k) of some query positions of an image."""
        return self.module.weights(self.q[image : image + 1, rows], self.k[image : image + 1])[0]

    def maps(self, image: int, rows: Tensor | slice) -> Tensor:
        """The weight (H, Q, N) with which each position's value enters: `weights`, pulled back if projected."""
        return self._pulled_back(self.weights(image, rows))

    def _pulled_back(self, weights: Tensor) -> Tensor:
        E = self.module.token_projection
        return weights if E is None else weights @ E.float()

    def received(self, image: int) -> Tensor:
        """The weight of each position (N,), averaged over all queries and heads."""
        parts = [self.weights(image, rows).mean(dim=0).sum(dim=0, keepdim=True) for rows in self._pieces(self.k)]
        total: Tensor = torch.stack(parts).sum(dim=0)  # (1, N or k)
        return self._pulled_back(total)[0] / self.q.shape[1]

    def step_back(self, image: int, relevance: Tensor) -> Tensor:
        """Return relevance (Q, N) of the block's outputs as that of its inputs: r (A + I) / 2, see `rollout`."""
        result = torch.zeros_like(relevance)
        for rows in self._pieces(self.q):
            maps = self.maps(image, rows)
            maps = F.normalize(maps.abs(), p=1, dim=2) if self.is_projected else maps
            result += relevance[:, rows] @ maps.mean(dim=0)
        return (result + relevance) / 2

    def _pieces(self, columns: Tensor) -> Iterator[slice]:
        """Slices of the queries whose maps over the tokens of `columns` take about PIECE_BYTES."""
        N = self.q.shape[1]
        size = max(PIECE_BYTES // (4 * self.module.num_heads * columns.shape[1]), 1)
        return (slice(start, start + size) for start in range(0, N, size))


@contextmanager
def recording(network: nn.Module, img_size: Grid) -> Iterator[list[BlockRecord]]:
    """While active, add a record to the list for each self-attention of `network` that runs. Leaves nothing behind."""
    records: list[BlockRecord] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, SelfAttention)
        q, k = (x.detach().float() for x in args[:2])
        scale = math.sqrt(q.shape[1] / math.prod(img_size))  # grids have the proportions of the image
        grid = (round(img_size[0] * scale), round(img_size[1] * scale))
        index = sum(record.grid == grid for record in records)
        records.append(BlockRecord(module=module, grid=grid, index=index, q=q, k=k))

    modules = [module for module in network.modules() if isinstance(module, SelfAttention)]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def record(model: Model, ws: Tensor) -> tuple[list[BlockRecord], Tensor]:
    """Run the synthesis once: the records of all blocks, and the images (n, C, H, W) in [-1, 1].

    Raises UserError for a network without `SelfAttention`.
    """
    synthesis = model.G.synthesis
    with torch.no_grad(), execution.using(model.execution), recording(synthesis, model.G.img_shape[1:]) as records:
        img = synthesis(fill_up(ws).to(model.device), noise_mode=model.noise_mode)[: len(ws)]
    if not records:
        raise UserError(
            f"{type(model.G).__name__} has no blocks with Styleformer's self-attention, the form whose maps are drawn"
        )
    return records, img


@torch.no_grad()
def rollout(records: Sequence[BlockRecord], image: int, pixels: Tensor, img_size: Grid) -> list[Tensor]:
    """For each block, how much of the chosen pixels (Q, 2) comes from each position of its input: (Q, N) of sum 1.

    Attention rollout (Abnar & Zuidema 2020): relevance starts at the token of the last grid that holds the pixel and
    goes back block by block, r <- r (A + I) / 2, A averaged over heads; I stands for the residual branch, which starts
    at the token's own value. Where resolutions join, r <- r U: U has the weights of the upsampling between them, its
    rows brought to the sum 1 at the border. With Linformer A is |A E|, its rows brought to the sum 1.
    """
    relevance = F.one_hot(tokens_of(pixels, records[-1].grid, img_size), math.prod(records[-1].grid)).float()
    grid = records[-1].grid
    steps = []
    for block in reversed(records):
        while grid != block.grid:
            relevance = _downsampled(relevance, grid)
            grid = (grid[0] // 2, grid[1] // 2)
        relevance = block.step_back(image, relevance)
        steps.append(relevance)
    return steps[::-1]


def _downsampled(relevance: Tensor, grid: Grid) -> Tensor:
    """Relevance (Q, N) on a grid as that (Q, N / 4) on the grid that was upsampled to it."""
    rows, columns = (_upsampling(side // 2).to(relevance) for side in grid)  # (2n, n)
    return torch.einsum("qyx,yi,xj->qij", relevance.unflatten(1, grid), rows, columns).flatten(1)


def _upsampling(n: int) -> Tensor:
    """The matrix (2n, n) of upsampling by [1, 3, 3, 1] along one axis, with rows that sum to 1."""
    unit_columns = torch.eye(n)[:, None, :, None]  # n images of n x 1 pixels
    matrix = upsample2d(unit_columns, resample_filter())[:, 0, :, 0].t()
    return matrix / matrix.sum(dim=1, keepdim=True)


def tokens_of(pixels: Tensor, grid: Grid, img_size: Grid) -> Tensor:
    """Indices (Q,) of the tokens that hold the pixels (Q, 2), as x and y."""
    x = pixels[:, 0] * grid[1] // img_size[1]
    y = pixels[:, 1] * grid[0] // img_size[0]
    return y * grid[1] + x


def choose_pixels(queries: Sequence[str], records: Sequence[BlockRecord], image: int, img_size: Grid) -> Tensor:
    """Return the pixels (Q, 2), as x and y, that e.g. '5,12', 'grid:2' (the centres of 2 x 2 cells) or 'most:3' means.

    Raises UserError for anything else and for what lies outside of the image.
    """
    height, width = img_size
    pixels: list[tuple[int, int]] = []
    for query in queries:
        match = re.fullmatch(r"(\d{1,9}),(\d{1,9})|(grid|most):([1-9]\d{0,2})", query)
        if not match:
            raise UserError(f"--query={query}: give a pixel as X,Y, or grid:N, or most:N for those attended to most")
        x, y, kind, count = match.groups()
        if kind == "most":
            pixels += most_attended(records, image, img_size, int(count))
        elif kind == "grid":
            n = int(count)
            pixels += [
                ((2 * i + 1) * width // (2 * n), (2 * j + 1) * height // (2 * n)) for j in range(n) for i in range(n)
            ]
        elif int(x) < width and int(y) < height:
            pixels.append((int(x), int(y)))
        else:
            raise UserError(
                f"--query={query}: the images are {width}x{height}, so X ends at {width - 1}, Y at {height - 1}"
            )
    return torch.tensor(pixels, device=records[0].q.device)


@torch.no_grad()
def most_attended(records: Sequence[BlockRecord], image: int, img_size: Grid, count: int) -> list[tuple[int, int]]:
    """Return the pixels (x, y) that receive most attention over all blocks, no two within an eighth of the image.

    Raises UserError when the image has no room for so many.
    """
    total = torch.zeros(img_size, device=records[0].q.device)
    for block in records:
        received = block.received(image).reshape(1, 1, *block.grid)
        total += F.interpolate(received, img_size, mode="bilinear")[0, 0] * received.numel()
    heights = total.cpu().numpy()
    radius = max(img_size) // 8
    peaks: list[tuple[int, int]] = []
    for _ in range(count):
        y, x = np.unravel_index(np.argmax(heights), heights.shape)
        if not np.isfinite(heights[y, x]):
            raise UserError(f"--query=most:{count}: the image has room for {len(peaks)} positions, choose fewer")
        peaks.append((int(x), int(y)))
        heights[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = -np.inf
    return peaks


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """What the chosen pixels (Q, 2) of one image attend to.

    maps        block name -> (H, Q, h, w), pulled back where keys are projected
    projected   block name -> (H, Q, k), of the blocks whose keys are
    rolled      block name -> (Q, h, w), of the block's input
    """

    pixels: np.ndarray
    maps: dict[str, np.ndarray]
    projected: dict[str, np.ndarray]
    rolled: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by the names of an .npz file: queries, map_8x8_0, projected_32x32_0, rollout_8x8_0."""
        named = {"map": self.maps, "projected": self.projected, "rollout": self.rolled}
        found = {f"{kind}_{block}": array for kind, arrays in named.items() for block, array in arrays.items()}
        return {"queries": self.pixels, **found}


@torch.no_grad()
def attention_maps(records: Sequence[BlockRecord], image: int, pixels: Tensor, img_size: Grid) -> AttentionMaps:
    """Compute the maps of all blocks, and their rollout, for some pixels of an image."""
    maps, projected, rolled = {}, {}, {}
    for block, relevance in zip(records, rollout(records, image, pixels, img_size), strict=True):
        rows = tokens_of(pixels, block.grid, img_size)
        maps[block.name] = block.maps(image, rows).unflatten(2, block.grid).cpu().numpy()
        if block.is_projected:
            projected[block.name] = block.weights(image, rows).cpu().numpy()
        rolled[block.name] = relevance.unflatten(1, block.grid).cpu().numpy()
    return AttentionMaps(pixels=pixels.cpu().numpy(), maps=maps, projected=projected, rolled=rolled)


def draw_blocks(picture: np.ndarray, found: AttentionMaps) -> np.ndarray:
    """Two rows for each pixel, over the picture (H, W, 3): maps of the blocks, averaged over heads, and the rollout."""
    image, size = enlarged(picture), picture.shape[:2]
    rows = []
    for query, (x, y) in enumerate(found.pixels):
        where = marked(image, x, y, size)
        rows.append([where, *(overlay(image, maps.mean(axis=0)[query]) for maps in found.maps.values())])
        rows.append([where, *(overlay(image, relevance[query]) for relevance in found.rolled.values())])
    return sheet(rows, ["attention, rollout", *found.maps])


def draw_heads(picture: np.ndarray, found: AttentionMaps, block: str) -> np.ndarray:
    """A row for each pixel, over the picture (H, W, 3): the maps of each head of a block."""
    image, size = enlarged(picture), picture.shape[:2]
    rows = [
        [marked(image, x, y, size), *(overlay(image, maps[query]) for maps in found.maps[block])]
        for query, (x, y) in enumerate(found.pixels)
    ]
    return sheet(rows, [block, *(f"head {head}" for head in range(len(found.maps[block])))])
