"""Images of seeds, from any generator: each a function of its seed alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from exploration.model import BATCH_MULTIPLE, fill_up, seed_latents
from torch_utils.graphs import GraphPool
from torch_utils.images import to_uint8
from torch_utils.misc import compiled
from training.networks import execution


class FastGenerator:
    """A generator that is called through torch.compile, or as CUDA graphs, one for each batch size and setting.

    Of CUDA graphs the next call overwrites what a call returned.
    """

    def __init__(self, G: Any, *, use_compile: bool = False, use_graphs: bool = False) -> None:
        self.z_dim, self.c_dim, self.img_shape = G.z_dim, G.c_dim, G.img_shape
        self.network = compiled(G) if use_compile else G
        self.graphs: GraphPool[Tensor] | None = GraphPool() if use_graphs else None

    def __call__(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0, *, noise_mode: str = "const") -> Tensor:
        run = partial(self.network, truncation_psi=truncation_psi, noise_mode=noise_mode)
        if self.graphs is None:
            return run(z, c)
        key = (len(z), truncation_psi, noise_mode, execution.current)
        return self.graphs.record("the generator", key, run, z, c)(z, c)


def seed_images(
    G: Any,
    seeds: tuple[int, ...],
    c: Tensor,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    batch_multiple: int = BATCH_MULTIPLE,
) -> Tensor:
    """Return uint8 images (len(seeds), C, H, W) of one class c (1, c_dim). Each depends on its own seed only.

    G is called with batches that are multiples of `batch_multiple`. Noise 'random' is drawn per seed too, so those
    images are made one by one, in the smallest batches.
    """
    if noise_mode == "random":
        batch_multiple = BATCH_MULTIPLE
        if len(seeds) > 1:
            return torch.cat([seed_images(G, (seed,), c, truncation_psi, noise_mode) for seed in seeds])
    torch.manual_seed(seeds[0])
    z = fill_up(seed_latents(seeds, G.z_dim), batch_multiple).to(c.device)
    img = G(z, c.expand(len(z), -1), truncation_psi, noise_mode=noise_mode)
    return to_uint8(img[: len(seeds)])
