"""Film in which details stick to the pixels of a plain network but move with the image of an alias-free one.

python docs/make_film.py --plain=SNAPSHOT --alias-free=SNAPSHOT --output=out/sticking.gif

Both networks need Fourier features at their input, such as styleformer-f and styleformer-a. The image of a seed moves
to the right and back. Each network has a row with three parts: the moving image, with a marked row of pixels; a part of
the image that follows the motion, in which details that stick to pixels crawl; and the marked row over time, from top
to bottom, in which such details are vertical lines, while details that move with the image follow its curve.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.cli import Script, option  # noqa: E402
from dnnlib.config import UserError, family_of  # noqa: E402
from exploration.model import Model  # noqa: E402
from exploration.morphing import Timing, render_frames, through_styles  # noqa: E402
from exploration.opening import build_model, choose_label, open_network  # noqa: E402
from exploration.output import make_outdir  # noqa: E402
from exploration.pose import read_pose  # noqa: E402
from exploration.video import check_encoder, describe_video, open_video  # noqa: E402
from torch_utils.sheets import sheet, tile_of  # noqa: E402
from training.config import GENERATORS  # noqa: E402

SIDE = 128  # pixels of the longer side of a part
CROP = 0.5  # side of the part that follows, relative to the image
COLUMNS = ("image", "part that follows it", "marked row over time")
CYAN = (0, 255, 255)


@click.command(cls=Script)
@option("--plain", required=True, type=click.Path(path_type=Path), help="Snapshot of a network on plain grids.")
@option("--alias-free", required=True, type=click.Path(path_type=Path), help="Snapshot of an alias-free network.")
@option("--output", required=True, type=click.Path(path_type=Path), help="Output video, .gif or .mp4.")
@option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the images.")
@option("--class", "class_index", type=int, help="Class label of conditional networks.")
@option("--trunc", type=float, default=1.0, show_default=True, help="Truncation psi.")
@option("--translate", type=float, default=0.25, show_default=True, help="Shift to the right, relative to the image.")
@option("--row", type=click.IntRange(min=0), help="Row of pixels that is shown over time.  [default: the middle]")
@option("--frames", type=click.IntRange(min=2), default=64, show_default=True, help="Number of frames.")
@option("--fps", type=float, default=16, show_default=True, help="Frames per second.")
def main(
    plain: Path,
    alias_free: Path,
    output: Path,
    seed: int,
    class_index: int | None,
    trunc: float,
    translate: float,
    row: int | None,
    frames: int,
    fps: float,
) -> None:
    """Write a film of a plain and an alias-free network under the same translation."""
    check_encoder(output, fps)
    if not 0 < translate <= CROP:
        raise UserError(f"--translate={translate:g}: must be more than 0 and at most {CROP:g} of the image")
    timing = Timing(num_keys=1, steps=frames, loop=True)
    networks = {"plain": plain, "alias-free": alias_free}
    opened = [open_moving(kind, network, class_index, trunc, translate) for kind, network in networks.items()]
    (height, width), other = (model.G.img_shape[1:] for _, model in opened)
    if other != (height, width):
        raise UserError(f"--alias-free={alias_free}: its images do not have the size {width}x{height} of --plain")
    row = height // 2 if row is None else row
    if row >= height:
        raise UserError(f"--row={row}: the images have the rows 0 to {height - 1}")
    make_outdir(output.parent, flag=f"--output={output}")
    click.echo(describe_video(output, timing.num_frames, fps))
    captions = [caption for caption, _ in opened]
    moving = [frames_of(model, seed, timing) for _, model in opened]
    shifts = timing.progress(timing.times()) * translate
    title = f"Seed {seed}, moved to the right by {translate:g} of the width, and back"
    with open_video(output, fps) as add:
        for index, shift in enumerate(shifts.tolist()):
            rows = [parts(images, index, shift, translate, row) for images in moving]
            add(sheet(rows, COLUMNS, captions, title=title))


def open_moving(kind: str, network: Path, class_index: int | None, trunc: float, translate: float) -> tuple[str, Model]:
    """Return a caption and the model of a snapshot, whose pose is a shift to the right. Raises UserError."""
    snapshot, device = open_network(network, None)
    model = build_model(
        snapshot,
        device,
        choose_label(snapshot, class_index, None),
        noise_mode="const",
        batch=16,
        precision="fp32",
        trunc=trunc,
        pose=read_pose((translate, 0.0), None),
    )
    return f"{kind}: {family_of(snapshot.config.generator, GENERATORS)}, {snapshot.kimg:g} kimg", model


@torch.no_grad()
def frames_of(model: Model, seed: int, timing: Timing) -> np.ndarray:
    """Return the moving image of a seed, uint8 (T, H, W, 3)."""
    path = through_styles(model.styles_of([seed])[None], "w", timing)
    return np.stack([*render_frames(model, path, timing, (1, 1), 1)])


def parts(images: np.ndarray, index: int, shift: float, largest: float, row: int) -> list[np.ndarray]:
    """Draw the parts of a network at a frame: its image, the part that follows `shift`, and a row of (T, H, W, 3)."""
    image, (frames, height, width) = images[index], images.shape[:3]
    tile = tile_of(image, min_side=SIDE, max_side=SIDE)
    size = tile.shape[1], tile.shape[0]
    left, top = ((1 - CROP - largest) / 2 + shift) * width, (1 - CROP) / 2 * height
    box = (left, top, left + CROP * width, top + CROP * height)
    follower = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box=box)
    over_time = Image.fromarray(images[:, row]).resize(size, Image.Resampling.BICUBIC)
    return [
        with_line(tile, (2 * row + 1) * size[1] // (2 * height)),
        np.array(follower),
        with_line(np.array(over_time), (2 * index + 1) * size[1] // (2 * frames)),
    ]


def with_line(tile: np.ndarray, y: int) -> np.ndarray:
    """Return a tile (H, W, 3) with marks at both ends of the line y."""
    marked, length = tile.copy(), tile.shape[1] // 16
    for ends in (slice(None, length), slice(-length, None)):
        marked[max(y - 2, 0) : y + 3, ends] = 0
        marked[max(y - 1, 0) : y + 2, ends] = CYAN
    return marked


if __name__ == "__main__":
    main()
