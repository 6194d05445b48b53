"""Image generation from seeds, for any generator. Each image depends only on its own seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from dnnlib.config import UserError
from dnnlib.util import counted
from exploration.directions import edited, read_edits
from exploration.model import BATCH_MULTIPLE, check_seeds, pad_batch, seed_latents, style_batches
from exploration.opening import build_model, choose_label, execution_of, is_mapping, open_network
from exploration.output import make_outdir, save_batches
from exploration.pose import read_pose
from torch_utils.graphs import GraphPool
from torch_utils.images import save_pixels, to_uint8
from torch_utils.misc import compiled
from torch_utils.sheets import caption_of, labelled_grid
from training.networks import execution


class FastGenerator:
    """A generator wrapped by torch.compile or CUDA graphs, with one graph per batch size and setting.

    With CUDA graphs, the next call overwrites the returned images.
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
        return self.graphs.capture("the generator", key, run, z, c)(z, c)


def seed_images(
    G: Any,
    seeds: tuple[int, ...],
    c: Tensor,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    batch_multiple: int = BATCH_MULTIPLE,
) -> Tensor:
    """Generate uint8 images (len(seeds), C, H, W) with label c (1, c_dim). Each depends only on its own seed.

    G is called with batch sizes that are multiples of `batch_multiple`. In noise mode 'random', the noise also
    depends on the seed, so images are generated one by one, in the smallest batches.
    """
    if noise_mode == "random":
        batch_multiple = BATCH_MULTIPLE
        if len(seeds) > 1:
            return torch.cat([seed_images(G, (seed,), c, truncation_psi, noise_mode) for seed in seeds])
    torch.manual_seed(seeds[0])
    z = pad_batch(seed_latents(seeds, G.z_dim), batch_multiple).to(c.device)
    img = G(z, c.expand(len(z), -1), truncation_psi, noise_mode=noise_mode)
    return to_uint8(img[: len(seeds)])


def make_images(
    *,
    network: Path | str,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    outdir: Path,
    trunc: float,
    class_index: int | None,
    label: tuple[float, ...] | None,
    noise_mode: str,
    direction: Sequence[str],
    strength: Sequence[float],
    grid: bool,
    batch: int,
    precision: str,
    use_compile: bool | None,
    use_graphs: bool | None,
    device: str | None,
    translate: Sequence[float] | None = None,
    rotate: float | None = None,
    ema: float | None = None,
) -> None:
    """Run `generate.py images`."""
    edits, pose = read_edits(direction, strength), read_pose(translate, rotate)
    needs_model = projected_w is not None or bool(edits or pose.flags)
    is_fast = bool(use_compile or use_graphs)
    if needs_model and (is_fast or noise_mode == "random"):
        raise UserError(
            "--projected-w, --direction, --translate, --rotate: cannot be combined with --compile, --graphs or "
            "--noise-mode=random"
        )
    snapshot, torch_device = open_network(network, device, ema)
    if use_graphs and torch_device.type != "cuda":
        raise UserError(f"--graphs: CUDA graphs need a GPU, but the device is {torch_device}")
    c = choose_label(snapshot, class_index, label, is_needed=is_mapping(seeds, projected_w)).to(torch_device)
    check_seeds("--seeds", seeds)
    if needs_model:
        options: dict[str, Any] = {"noise_mode": noise_mode, "batch": batch, "precision": precision, "trunc": trunc}
        model = build_model(snapshot, torch_device, c, **options, pose=pose)
        names, styles = style_batches(model, seeds, projected_w)
        moved = edited(styles, edits, model)
        batches: Iterable[Tensor] = (images for ws in moved for images in model.render(ws))
    elif seeds is None:
        raise UserError("--seeds: specify images, e.g. --seeds=0-35, or saved styles with --projected-w")
    else:
        names = [f"seed{seed:04d}" for seed in seeds]
        G: Any = snapshot.G_ema
        multiple = BATCH_MULTIPLE
        if is_fast:
            G = FastGenerator(G, use_compile=bool(use_compile), use_graphs=bool(use_graphs))
            multiple = -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE  # one size for all batches
        parts = (seeds[start : start + batch] for start in range(0, len(seeds), batch))
        batches = (seed_images(G, part, c, trunc, noise_mode, multiple).cpu() for part in parts)
    make_outdir(outdir)
    with torch.no_grad(), execution.using(execution_of(snapshot, precision)):
        made = save_batches(batches, names, outdir, keep=grid)
    if grid:
        save_pixels(labelled_grid(torch.cat(made), list(map(caption_of, names))), outdir / "grid.png")
    click.echo(f"{counted(len(names), 'image')} in {outdir}")
