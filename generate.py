"""Generate images from a snapshot: one PNG per seed, and a grid of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dnnlib.cli
from dnnlib.cli import FileOrURL, IntRanges, option, switch
from dnnlib.config import UserError
from legacy import load_network
from torch_utils import custom_ops, distributed
from torch_utils.graphs import Captured
from torch_utils.images import save_grid, save_image, to_uint8
from torch_utils.misc import tune_allocator
from training.networks import execution

# On a CPU, matrix libraries round a row differently in batches of different sizes, but not in multiples of this one:
# all batches are filled up to it, so that a seed gives the same image, to the last bit, whatever --batch says.
BATCH_MULTIPLE = 8


def seed_latents(seeds: tuple[int, ...], z_dim: int) -> Tensor:
    """Return z (len(seeds), z_dim): for each seed what numpy's RandomState(seed).randn(1, z_dim) draws."""
    z = np.concatenate([np.random.RandomState(seed).randn(1, z_dim) for seed in seeds])
    return torch.from_numpy(z).to(torch.float32)


class FastGenerator:
    """A generator that is called through torch.compile, or as CUDA graphs, one for each batch size and setting.

    Of CUDA graphs the next call overwrites what a call returned.
    """

    def __init__(self, G: Any, *, use_compile: bool = False, use_graphs: bool = False) -> None:
        self.z_dim, self.c_dim, self.img_shape = G.z_dim, G.c_dim, G.img_shape
        self.network = torch.compile(G, dynamic=False, options={"fallback_random": True}) if use_compile else G
        self.pool = torch.cuda.graph_pool_handle() if use_graphs else None
        self.graphs: dict[tuple[Any, ...], Captured[Tensor]] = {}

    def __call__(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0, *, noise_mode: str = "const") -> Tensor:
        run = partial(self.network, truncation_psi=truncation_psi, noise_mode=noise_mode)
        if self.pool is None:
            return run(z, c)
        key = (len(z), truncation_psi, noise_mode, execution.current)
        if key not in self.graphs:
            with torch.random.fork_rng([z.device]):  # recording draws noise
                self.graphs[key] = Captured(run, z, c, pool=self.pool)
        return self.graphs[key](z, c)


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
    padding = -len(seeds) % batch_multiple
    z = seed_latents(seeds + seeds[-1:] * padding, G.z_dim).to(c.device)
    img = G(z, c.expand(len(z), -1), truncation_psi, noise_mode=noise_mode)
    return to_uint8(img[: len(seeds)])


@click.command(cls=dnnlib.cli.Script)
@option("--network", required=True, type=FileOrURL(), help="Snapshot, network-snapshot-*.pkl; see docs/snapshots.md.")
@option("--seeds", "--seed", required=True, type=IntRanges(), help="Seeds, e.g. 0-35,40; the same one, the same image.")
@option("--outdir", required=True, type=click.Path(path_type=Path), help="Folder for seed0000.png and so on.")
@option("--trunc", type=float, default=1.0, show_default=True, help="Truncation psi: 1 = none, 0 = the average image.")
@option("--class", "class_index", type=int, help="Class of a conditional network.")
@option("--noise-mode", type=click.Choice(["const", "random", "none"]), default="const", show_default=True)
@option("--grid", is_flag=True, help="Also write all images as one picture, grid.png.")
@option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images at a time.")
@option(
    "--precision",
    type=click.Choice(list(execution.REDUCED)),
    default="fp32",
    show_default=True,
    help="Of activations: bf16 and fp16 are faster on a GPU and change images slightly.",
)
@switch("--compile", "use_compile", help="Compile the generator first: pays for thousands of images.")
@switch("--graphs", "use_graphs", help="CUDA graphs: pays for small batches on a GPU.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
def main(
    network: Path | str,
    seeds: tuple[int, ...],
    outdir: Path,
    trunc: float,
    class_index: int | None,
    noise_mode: str,
    grid: bool,
    batch: int,
    precision: str,
    use_compile: bool | None,
    use_graphs: bool | None,
    device: str | None,
) -> None:
    """Generate images from a snapshot with its averaged generator.

    \b
    python generate.py --network=docs/shapes.pkl --seeds=0-35 --outdir=out --grid
    """
    tune_allocator()
    where = distributed.choose_device(device)
    snapshot = load_network(network, where)
    G = snapshot.G_ema
    if use_graphs and where.type != "cuda":
        raise UserError(f"--graphs: CUDA graphs need a GPU, this is {where}")
    if use_compile or use_graphs:
        G = FastGenerator(G, use_compile=bool(use_compile), use_graphs=bool(use_graphs))
    c = _one_class(G.c_dim, class_index).to(where)
    if max(seeds) >= 2**32:
        raise UserError(f"--seeds: {max(seeds)} is too large, seeds end at {2**32 - 1}")
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir={outdir}: cannot be written ({error.strerror})") from None

    if where.type == "cuda":
        click.echo(custom_ops.prepare(where))
    execution.sum_in_float32()
    made: list[Tensor] = []
    reduced = execution.using(reduced=execution.REDUCED[precision], min_grid=snapshot.config.reduced_from)
    multiple = -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE if use_compile or use_graphs else BATCH_MULTIPLE
    with torch.no_grad(), reduced, tqdm(total=len(seeds), unit="img") as progress:
        for start in range(0, len(seeds), batch):
            part = seeds[start : start + batch]
            images = seed_images(G, part, c, trunc, noise_mode, multiple).cpu()
            for seed, image in zip(part, images, strict=True):
                save_image(image, outdir / f"seed{seed:04d}.png")
            made += [images] if grid else []
            progress.update(len(part))
    if grid:
        save_grid(torch.cat(made), outdir / "grid.png")
    click.echo(f"{len(seeds)} images in {outdir}")


def _one_class(c_dim: int, class_index: int | None) -> Tensor:
    """Return the label (1, c_dim). Raises UserError for a class that is missing, not there or not needed."""
    if c_dim == 0:
        if class_index is not None:
            raise UserError(f"--class={class_index}: this network was trained without labels; leave it out")
        return torch.zeros(1, 0)
    if class_index is None:
        raise UserError(f"--class: this network is conditional; give one of its classes 0..{c_dim - 1}")
    if not 0 <= class_index < c_dim:
        raise UserError(f"--class={class_index}: this network has the classes 0..{c_dim - 1}")
    return torch.nn.functional.one_hot(torch.tensor([class_index]), c_dim).float()


if __name__ == "__main__":
    main()
