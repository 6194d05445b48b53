"""Where transformer blocks look: attention maps of chosen positions, per resolution, block and head, and rollout.

Whatever its form, the output of attention is linear in the values: A V for each head. So a row of A is the gradient of
V for a unit cotangent, at the cost of running the block once; no matrix of N x N numbers is ever made. With Linformer A
is softmax(Q (E K)^T) E, the map over projected keys *pulled back* to positions, with Nystroem's landmarks F A+ B, and
along axes the product of columns and rows. Weights of the first two can be negative and need not sum to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
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
from exploration.model import Model, check_seeds, gather_styles, save_arrays
from exploration.opening import is_mapping, open_model
from exploration.output import counted, make_outdir, save_pixels
from exploration.sheets import enlarged, marked, overlay, sheet, to_rgb
from torch_utils.images import to_uint8
from training.networks.attention import Attention, SelfAttention
from training.networks.generator import Grid
from training.networks.layers import Resampling


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """Queries and keys (B, N, C) of a block, the `index`-th on its grid, in float32.

    `resamplings` led from the block before to this one's grid.
    """

    module: Attention
    resamplings: tuple[Resampling, ...]
    grid: Grid
    index: int
    q: Tensor
    k: Tensor

    @property
    def name(self) -> str:
        """E.g. 16x16_0, as height x width."""
        return f"{self.grid[0]}x{self.grid[1]}_{self.index}"

    def maps(self, image: int, rows: Tensor) -> Tensor:
        """The weights (H, Q, N) with which the values of all positions enter those of some query positions (Q,)."""
        return self.pulled_back(image, F.one_hot(rows, self.q.shape[1]).float())

    def received(self, image: int) -> Tensor:
        """The weight of each position (N,), averaged over all queries and heads."""
        N = self.q.shape[1]
        return self.pulled_back(image, self.q.new_full((1, N), 1 / N)).mean(dim=0)[0]

    def pulled_back(self, image: int, outputs: Tensor) -> Tensor:
        """r A for weights r (Q, N) of the outputs of an image, the same for every head: (H, Q, N)."""
        q, k = self.q[image : image + 1], self.k[image : image + 1]  # (1, N, C)
        heads = self.module.num_heads
        room = q.shape[2] // heads  # a head's channels do not mix, so each of them carries another r
        parts = []
        for some in outputs.split(room):
            cotangent = F.pad(some, (0, 0, 0, room - len(some))).repeat(heads, 1).t()[None]  # (1, N, C)
            with torch.enable_grad():
                v = torch.zeros_like(q, requires_grad=True)
                (gradient,) = torch.autograd.grad(self.module(q, k, v), v, cotangent)
            parts.append(gradient[0].t().unflatten(0, (heads, room))[:, : len(some)])
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def projected(self, image: int, rows: Tensor) -> Tensor | None:
        """Linformer: the weights (H, Q, k) of the projected keys, else None."""
        if not isinstance(self.module, SelfAttention) or self.module.token_projection is None:
            return None
        return self.module.weights(self.q[image : image + 1, rows], self.k[image : image + 1])[0]


@contextmanager
def recording(network: nn.Module, img_size: Grid, count: int | None = None) -> Iterator[list[BlockRecord]]:
    """While active, add a record to the list for each self-attention of `network` that runs. Leaves nothing behind.

    Records are of the first `count` images, else of all.
    """
    records: list[BlockRecord] = []
    resamplings: list[Resampling] = []  # since the last block

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Resampling):
            return resamplings.append(module)
        assert isinstance(module, Attention)
        q, k = (x.detach()[:count].to(torch.float32, copy=True) for x in args[:2])  # views would keep v and padding
        scale = math.sqrt(q.shape[1] / math.prod(img_size))  # grids have the proportions of the image
        grid = (round(img_size[0] * scale), round(img_size[1] * scale))
        index = sum(record.grid == grid for record in records)
        record = BlockRecord(module=module, resamplings=tuple(resamplings), grid=grid, index=index, q=q, k=k)
        records.append(record)
        resamplings.clear()

    handles = [module.register_forward_hook(note) for module in recorded_modules(network)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def recorded_modules(network: nn.Module) -> list[nn.Module]:
    """All attention and resampling of tokens in a network, but no attention that others are made of."""
    found = [module for module in network.modules() if isinstance(module, Attention | Resampling)]
    parts = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in parts]


def has_attention(network: nn.Module) -> bool:
    """Whether there is anything to draw."""
    return any(isinstance(module, Attention) for module in network.modules())


def record(model: Model, ws: Tensor) -> tuple[list[BlockRecord], Tensor]:
    """Run the synthesis once: the records of all blocks, and the images (n, C, H, W) in [-1, 1].

    Raises UserError for a network without self-attention.
    """
    synthesis = model.G.synthesis
    if not has_attention(synthesis):
        raise UserError(f"{type(model.G).__name__} has no self-attention, so there are no maps of it")
    with recording(synthesis, model.G.img_shape[1:], count=len(ws)) as records:
        img = model.synthesise(ws)
    return records, img


def rollout(records: Sequence[BlockRecord], image: int, pixels: Tensor, img_size: Grid) -> list[Tensor]:
    """For each block, how much of the chosen pixels (Q, 2) comes from each position of its input: (Q, N) of sum 1.

    Attention rollout (Abnar & Zuidema 2020): relevance starts at the token of the last grid that holds the pixel and
    goes back block by block, r <- (n(r A) + r) / 2, A averaged over heads; the second r stands for the residual branch,
    which starts at the token's own value. Where resolutions join, r <- n(r U), U being the upsampling between them.
    n takes absolute values and brings their sum to 1. Attention among all, in windows and along axes has that already.
    """
    relevance = F.one_hot(tokens_of(pixels, records[-1].grid, img_size), math.prod(records[-1].grid)).float()
    steps = []
    for block in reversed(records):
        relevance = (_normalized(block.pulled_back(image, relevance).mean(dim=0)) + relevance) / 2
        steps.append(relevance)
        for resampling in reversed(block.resamplings):
            relevance = _normalized(_resampled_back(resampling, relevance))
    return steps[::-1]


def _normalized(weights: Tensor) -> Tensor:
    """|weights| (Q, N) with rows of sum 1."""
    return F.normalize(weights.abs(), p=1, dim=1)


def _resampled_back(resampling: Resampling, outputs: Tensor) -> Tensor:
    """r U for weights r (Q, M) of the outputs of a resampling: (Q, N)."""
    with torch.enable_grad():
        x = outputs.new_zeros(1, math.prod(resampling.grid), len(outputs) * resampling.GROUP, requires_grad=True)
        (gradient,) = torch.autograd.grad(resampling(x), x, outputs.t()[None])
    return gradient[0].t().unflatten(0, (-1, resampling.GROUP)).sum(dim=1)


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

    maps        block name -> (H, Q, h, w)
    projected   block name -> (H, Q, k), of the blocks whose keys are projected
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


def attention_maps(records: Sequence[BlockRecord], image: int, pixels: Tensor, img_size: Grid) -> AttentionMaps:
    """Compute the maps of all blocks, and their rollout, for some pixels of an image."""
    maps, projected, rolled = {}, {}, {}
    for block, relevance in zip(records, rollout(records, image, pixels, img_size), strict=True):
        rows = tokens_of(pixels, block.grid, img_size)
        maps[block.name] = block.maps(image, rows).unflatten(2, block.grid).cpu().numpy()
        weights = block.projected(image, rows)
        if weights is not None:
            projected[block.name] = weights.cpu().numpy()
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
    choose_pixels(queries, record(model, ws[:1])[0], 0, model.G.img_shape[1:])  # refuses before anything is written
    make_outdir(outdir)
    found_maps = (found for part in ws.split(model.batch) for found in maps_of(model, part, queries))
    for name, (picture, found) in zip(tqdm(names, unit="img"), found_maps, strict=True):
        save_arrays(outdir / f"{name}-attention.npz", found.arrays())
        save_pixels(draw_blocks(picture, found), outdir / f"{name}-attention.png")
        for block in found.maps if heads else ():
            save_pixels(draw_heads(picture, found, block), outdir / f"{name}-{block}.png")
    click.echo(
        f"{counted(len(names), 'sheet')} in {outdir}, blocks {', '.join(found.maps)}; the numbers are in the .npz files"
    )


def maps_of(model: Model, ws: Tensor, queries: tuple[str, ...]) -> Iterator[tuple[np.ndarray, AttentionMaps]]:
    """Yield the image (H, W, 3) of each of some styles, made together, and its maps. Raises UserError."""
    records, img = record(model, ws)
    for image, picture in enumerate(to_uint8(img).permute(0, 2, 3, 1).cpu().numpy()):
        pixels = choose_pixels(queries, records, image, model.G.img_shape[1:])
        yield to_rgb(picture), attention_maps(records, image, pixels, model.G.img_shape[1:])
