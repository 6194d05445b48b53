"""Generate images from a snapshot, and look into the model that makes them.

python generate.py --network=docs/shapes.pkl --seeds=0-35 --outdir=out --grid
python generate.py mix --network=docs/shapes.pkl --rows=0-3 --cols=4-9 --styles=coarse --outdir=out
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib.allocator import tune_allocator
from dnnlib.cli import (
    Decorator,
    DefaultGroup,
    FileOrURL,
    FloatList,
    IntRanges,
    NameList,
    Script,
    option,
    switch,
    with_options,
)
from dnnlib.config import UserError
from exploration.attention import (
    AttentionMaps,
    attention_maps,
    choose_pixels,
    draw_blocks,
    draw_heads,
    record,
)
from exploration.directions import (
    Directions,
    between,
    check_ending,
    factorise,
    principal,
    read_direction,
    sampled_w,
    save_directions,
)
from exploration.mixing import choose_styles, mix, mixing_sheet, spell
from exploration.model import (
    BATCH_MULTIPLE,
    Model,
    check_seeds,
    gather_styles,
    label_of,
    save_arrays,
    save_styles,
    style_batches,
    vector_label,
)
from exploration.morphing import (
    Interpolation,
    Timing,
    film,
    keys_per_cell,
    sweep_direction,
    sweep_truncation,
    through_seeds,
    through_styles,
)
from exploration.play import HOST, Player, open_server
from exploration.projection import (
    FILM_FPS,
    ProjectionConfig,
    ProjectionJob,
    fit_targets,
    pixels_towards,
    project_batch,
    read_targets,
)
from exploration.sampling import FastGenerator, seed_images
from exploration.sheets import enlargement, sheet, tiles_of, to_rgb
from exploration.video import MIN_FRAME, check_encoder, open_video
from metrics.detectors import DetectorSetup, read_detectors
from metrics.perceptual import features_towards, lpips_towards
from torch_utils import custom_ops, distributed
from torch_utils.images import Towards, save_grid, save_image, to_uint8
from torch_utils.misc import name_user
from training.networks import execution
from training.snapshots.reading import load_network
from training.snapshots.snapshot import Snapshot


class GridSize(click.ParamType):
    """Columns and rows, e.g. 3x2."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", str(value))
        if not match:
            self.fail(f"{value!r} is not a number of columns and rows such as 3x2", param, ctx)
        return int(match[1]), int(match[2])


NETWORK = option("--network", required=True, type=FileOrURL(), help="Snapshot: network-snapshot-*.pkl, or its address.")
OUTDIR = option("--outdir", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
TRUNC = option("--trunc", type=float, default=1.0, show_default=True, help="Truncation psi: 1 = none, 0 = the average.")
CLASS = option("--class", "class_index", type=int, help="Class of a conditional network.")
LABEL = option("--label", type=FloatList(), help="Label of a network whose labels are vectors, e.g. 3.0,20.0.")
BATCH = option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images at a time.")
DEVICE = option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
PROJECTED = option("--projected-w", type=click.Path(path_type=Path), help="Styles in a file that `project` wrote.")
PRECISION = option(
    "--precision",
    type=click.Choice(list(execution.REDUCED)),
    default="fp32",
    show_default=True,
    help="Of activations: bf16 and fp16 are faster on a GPU and change images slightly.",
)
# Of the commands that look into a model: an image is a function of its styles, so noise is never random.
FIXED_NOISE = option("--noise-mode", type=click.Choice(["const", "none"]), default="const", show_default=True)
MODEL_OPTIONS = (NETWORK, TRUNC, CLASS, LABEL, FIXED_NOISE, BATCH, PRECISION, DEVICE)


@click.group(cls=DefaultGroup, default="images")
def main() -> None:
    """Generate images from a snapshot, and look into the model."""


@main.command(cls=Script)
@NETWORK
@option("--seeds", "--seed", type=IntRanges(), help="Seeds, e.g. 0-35,40; the same one, the same image.")
@PROJECTED
@option("--outdir", required=True, type=click.Path(path_type=Path), help="Folder for seed0000.png and so on.")
@TRUNC
@CLASS
@LABEL
@option("--noise-mode", type=click.Choice(["const", "random", "none"]), default="const", show_default=True)
@option("--direction", metavar="FILE:INDEX", help="Edit along a direction that `directions` found.")
@option("--strength", type=float, help="How far, in standard deviations of w.  [default: 1]")
@option("--grid", is_flag=True, help="Also write all images as one picture, grid.png.")
@BATCH
@PRECISION
@switch("--compile", "use_compile", help="Compile the generator first: pays for thousands of images.")
@switch("--graphs", "use_graphs", help="CUDA graphs: pays for small batches on a GPU.")
@DEVICE
def images(
    network: Path | str,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    outdir: Path,
    trunc: float,
    class_index: int | None,
    label: tuple[float, ...] | None,
    noise_mode: str,
    direction: str | None,
    strength: float | None,
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
    check_strength(strength, direction)
    has_styles, is_fast = projected_w is not None or direction is not None, bool(use_compile or use_graphs)
    if has_styles and (is_fast or noise_mode == "random"):
        raise UserError("--projected-w, --direction: go with none of --compile, --graphs, --noise-mode=random")
    snapshot, where = open_network(network, device)
    if use_graphs and where.type != "cuda":
        raise UserError(f"--graphs: CUDA graphs need a GPU, this is {where}")
    c = choose_label(snapshot, class_index, label, is_needed=is_mapping(seeds, projected_w)).to(where)
    check_seeds("--seeds", seeds)
    if has_styles:
        model = build_model(snapshot, where, c, noise_mode=noise_mode, batch=batch, precision=precision, trunc=trunc)
        names, styles = style_batches(model, seeds, projected_w)
        edits = edited(styles, direction, strength, model)
        batches: Iterable[Tensor] = (images for ws in edits for images in model.render(ws))
    elif seeds is None:
        raise UserError("--seeds: say which images, e.g. --seeds=0-35, or name saved styles with --projected-w")
    else:
        G: Any = snapshot.G_ema
        if is_fast:
            G = FastGenerator(G, use_compile=bool(use_compile), use_graphs=bool(use_graphs))
        multiple = -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE if is_fast else BATCH_MULTIPLE
        names = [f"seed{seed:04d}" for seed in seeds]
        parts = (seeds[start : start + batch] for start in range(0, len(seeds), batch))
        batches = (seed_images(G, part, c, trunc, noise_mode, multiple).cpu() for part in parts)
    make_outdir(outdir)
    with torch.no_grad(), execution.using(execution_of(snapshot, precision)):
        made = save_batches(batches, names, outdir, keep=grid)
    if grid:
        save_grid(torch.cat(made), outdir / "grid.png")
    click.echo(f"{counted(len(names), 'image')} in {outdir}")


MIX_OPTIONS = (
    *MODEL_OPTIONS,
    option("--rows", type=IntRanges(), help="Seeds of the rows' images."),
    option("--projected-w", type=click.Path(path_type=Path), help="Saved styles, for rows before those of --rows."),
    option("--cols", required=True, type=IntRanges(), help="Seeds of the columns' images."),
    OUTDIR,
)


def mixed_styles(default: str) -> Decorator:
    """--styles of a command that mixes."""
    return option(
        "--styles",
        "--col-styles",
        default=default,
        show_default=True,
        help="Which styles come from the column's image: 0-3,5, or names that the network has for them; all others are "
        "the row's.",
    )


@main.command("mix", cls=Script)
@with_options(MIX_OPTIONS)
@mixed_styles("coarse")
def mix_command(
    rows: tuple[int, ...] | None,
    projected_w: Path | None,
    cols: tuple[int, ...],
    styles: str,
    outdir: Path,
    **options: Any,
) -> None:
    """Mix the styles of two images: a grid of rows and columns.

    Coarse, middle and fine are the styles of the lower, middle and upper third of the resolutions; a Styleformer-C also
    has transformer (layout) and conv (colour).

    \b
    python generate.py mix --network=docs/shapes.pkl --rows=0-3 --cols=4-9 --styles=coarse --outdir=out
    """
    model = open_model(**options)
    chosen = choose_styles(styles, model.G.num_ws, getattr(model.G, "style_groups", {}))
    check_seeds("--rows", rows)
    check_seeds("--cols", cols)
    row_names, row_ws = gather_styles(model, rows, projected_w, flag="--rows", name="{}")
    col_ws = model.styles_of(cols)
    make_outdir(outdir)
    mixed = mix(row_ws, col_ws, chosen)  # (R, C, num_ws, w_dim)
    names = [f"{row}-{col}" for row in row_names for col in cols]
    made = torch.cat(save_batches(model.render(mixed.flatten(0, 1)), names, outdir, keep=True))
    left, top = model.images(torch.cat([row_ws, col_ws])).split([len(row_ws), len(col_ws)])
    save_pixels(mixing_sheet(left, top, made.unflatten(0, (len(row_ws), len(col_ws)))), outdir / "grid.png")
    click.echo(
        f"{counted(len(names), 'mixture')} in {outdir}, with styles {spell(chosen)} of the columns; "
        "all of them in grid.png"
    )


@main.command("video", cls=Script)
@with_options(MODEL_OPTIONS)
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the keyframes.")
@option("--projected-w", type=click.Path(path_type=Path), help="Saved styles, as keyframes before those of --seeds.")
@option("--output", required=True, type=click.Path(path_type=Path), help="Video to write: .mp4 or .gif.")
@option(
    "--interpolation",
    type=click.Choice(["w", "z", "spline"]),
    default="w",
    show_default=True,
    help="Between keyframes: straight in w, on great circles in z, or a cubic spline in w.",
)
@option(
    "--grid", type=GridSize(), default="1x1", show_default=True, help="Cells; the keyframes are shared out in order."
)
@option("--frames", type=click.IntRange(min=1), default=60, show_default=True, help="From a keyframe to the next.")
@option("--fps", type=float, default=30, show_default=True, help="Frames per second.")
@switch("--loop", default=True, show_default=True, help="Return to the first keyframe at the end.")
@option("--classes", type=IntRanges(), help="Class of each keyframe of a cell, e.g. 0-9.")
@option("--trunc-to", type=float, help="Sweep the truncation from --trunc to this, in a loop and back.")
@option("--direction", metavar="FILE:INDEX", help="Sweep an edit along a direction that `directions` found.")
@option("--strength", type=float, help="How far to both sides, in standard deviations of w.  [default: 3]")
@option("--scale", type=click.IntRange(min=1), help="Enlarge pixels.  [default: images to 128 pixels or more a side]")
def video_command(
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    output: Path,
    interpolation: Interpolation,
    grid: tuple[int, int],
    frames: int,
    fps: float,
    loop: bool,
    classes: tuple[int, ...] | None,
    trunc_to: float | None,
    direction: str | None,
    strength: float | None,
    scale: int | None,
    **options: Any,
) -> None:
    """Film the way from image to image.

    \b
    python generate.py video --network=docs/shapes.pkl --seeds=0-5 --grid=3x2 --trunc-to=0.2 --output=out/sweep.gif
    python generate.py video --network=SNAPSHOT --seeds=7 --classes=0-9 --interpolation=spline --output=out/classes.mp4
    """
    check_encoder(output, fps)
    check_strength(strength, direction)
    if projected_w is not None:
        check_saved_keyframes(projected_w, interpolation, trunc_to, classes)
    if classes and (options["class_index"], options["label"]) != (None, None):
        raise UserError("--classes: goes with neither --class nor --label")
    if classes:
        options |= {"class_index": classes[0], "class_flag": "--classes"}
    model = open_model(**options, needs_class=is_mapping(seeds, projected_w))
    check_seeds("--seeds", seeds)
    psi = model.truncation_psi if trunc_to is None else 1.0
    cells = grid[0] * grid[1]
    if projected_w is None and seeds is not None:
        timing = Timing(num_keys=keys_per_cell(len(seeds), cells, classes), steps=frames, loop=loop)
        labels = [label_of(model.G.c_dim, index, "--classes") for index in classes or ()]
        c = torch.cat(labels or [model.c] * timing.num_keys).to(model.device)  # (keys, c_dim)
        way = through_seeds(model, seeds, c, interpolation, timing, cells, psi)
    else:
        names, ws = gather_styles(model, seeds, projected_w)
        timing = Timing(num_keys=keys_per_cell(len(names), cells, None), steps=frames, loop=loop)
        way = through_styles(ws.unflatten(0, (cells, -1)), interpolation, timing)
    if trunc_to is not None:
        way = sweep_truncation(way, model.G.mapping.w_avg, model.truncation_psi, trunc_to, timing)
    if direction is not None:
        found, index = read_direction(direction, model.G)
        way = sweep_direction(way, found, index, 3.0 if strength is None else strength, timing)
    scale = scale or enlargement(model.G.img_shape[1:], MIN_FRAME)
    make_outdir(output.parent, flag=f"--output={output}")
    with open_video(output, fps) as add, tqdm(total=timing.num_frames, unit="frame") as progress:
        for frame in film(model, way, timing, grid, scale):
            add(frame)
            progress.update()
    click.echo(f"{counted(timing.num_frames, 'frame')} in {output}, {timing.num_frames / fps:.1f} s")


@main.command("directions", cls=Script)
@with_options(MODEL_OPTIONS)
@option(
    "--method",
    type=click.Choice(["sefa", "pca", "mean", "linear"]),
    default="sefa",
    show_default=True,
    help="sefa: eigenvectors of the layers' weights; pca: principal components of w; mean, linear: from --negative to "
    "--positive, by the means or by a linear classifier.",
)
@option("--styles", default="all", show_default=True, help="Which styles to look at and to move, as for mix.")
@option("--components", type=click.IntRange(min=1), help="How many, of sefa and pca.  [default: 5]")
@option("--samples", type=click.IntRange(min=2), default=10_000, show_default=True, help="w drawn for their spread.")
@option("--positive", type=IntRanges(), help="Seeds of images that have an attribute.")
@option("--negative", type=IntRanges(), help="Seeds of images that do not have it.")
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the images to edit.")
@PROJECTED
@option("--strength", type=float, default=3.0, show_default=True, help="Largest edit, in standard deviations of w.")
@option("--steps", type=click.IntRange(min=2), default=7, show_default=True, help="Edits of each image.")
@option("--save", type=click.Path(path_type=Path), help=".npz or .safetensors.  [default: directions.npz in --outdir]")
@OUTDIR
def directions_command(
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
    """Find directions of w that change images in one way, and draw strips of edits.

    \b
    python generate.py directions --network=docs/shapes.pkl --method=sefa --styles=coarse --seeds=0-3 --outdir=out
    python generate.py --network=docs/shapes.pkl --seeds=7 --direction=out/directions.npz:0 --strength=2 --outdir=out
    """
    save = save or outdir / "directions.npz"
    check_ending(save)
    check_groups(method, components, positive, negative)
    model = open_model(**options)
    for flag, given in (("--seeds", seeds), ("--positive", positive), ("--negative", negative)):
        check_seeds(flag, given)
    names, ws = gather_styles(model, seeds, projected_w)
    chosen = choose_styles(styles, model.G.num_ws, getattr(model.G, "style_groups", {}))
    if positive and negative:
        has, lacks = (model.styles_of(group)[:, 0] for group in (positive, negative))
        found = between(has, lacks, sampled_w(model, samples), chosen, linear=method == "linear")
    else:
        found = find_directions(model, method, chosen, components, samples)
    make_outdir(outdir)
    save_directions(save, found)
    strengths = torch.arange(1 - steps, steps, 2) * (strength / (steps - 1))
    for index in tqdm(range(len(found.directions)), unit="direction"):
        edited = found.edit(ws.repeat_interleave(steps, dim=0), index, strengths.repeat(len(ws)))
        rows = [tiles_of(images) for images in model.images(edited).split(steps)]
        save_pixels(sheet(rows, [signed(value) for value in strengths.tolist()]), outdir / f"direction{index:02d}.png")
    click.echo(
        f"{counted(len(found.directions), 'direction')} for styles {spell(chosen)} in {save}; edits of "
        f"{counted(len(names), 'image')} along each in {outdir}"
    )


@main.command("attention", cls=Script)
@with_options(MODEL_OPTIONS)
@option("--seeds", "--seed", type=IntRanges(), help="Seeds of the images.")
@PROJECTED
@option(
    "--query",
    "queries",
    multiple=True,
    default=("most:3",),
    show_default=True,
    help="Whose attention: a pixel X,Y; grid:N, the centres of N x N cells; most:N, those that are attended to most. "
    "Can be repeated.",
)
@option("--heads", is_flag=True, help="Also draw every head of every block.")
@OUTDIR
def attention_command(
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    queries: tuple[str, ...],
    heads: bool,
    outdir: Path,
    **options: Any,
) -> None:
    """Draw what positions of an image attend to, in every transformer block.

    \b
    python generate.py attention --network=docs/shapes.pkl --seeds=0-3 --query=16,16 --query=most:2 --outdir=out
    """
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


PROJECTION_OPTIONS = (
    option(
        "--loss",
        type=click.Choice(["lpips", "features", "pixels"]),
        help="Distance: LPIPS, of features of --detector's program, or of pixels at several scales.  [default: "
        "features if there is a program, else lpips]",
    ),
    option(
        "--detector",
        "detectors",
        type=NameList(),
        metavar="FILE,...",
        help="A program (.pt2, TorchScript) for features, or the two files of weights of LPIPS.",
    ),
    option(
        "--num-steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps of the optimisation."
    ),
    option(
        "--space",
        type=click.Choice(["w", "w+"]),
        default="w",
        show_default=True,
        help="One style for all layers, or each.",
    ),
    option("--lr", type=float, default=0.1, show_default=True, help="Largest learning rate."),
    option("--fix-noise", is_flag=True, help="Leave the network's noise as it is, instead of looking for it too."),
)


@main.command("project", cls=Script)
@with_options((NETWORK, CLASS, LABEL, FIXED_NOISE, BATCH, PRECISION, DEVICE))
@option("--target", required=True, type=click.Path(path_type=Path), help="An image, or a folder or zip of images.")
@with_options(PROJECTION_OPTIONS)
@option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
@switch("--save-video", help="Also film the optimisation beside its target: proj00.mp4.")
@OUTDIR
def project_command(save_video: bool | None, outdir: Path, **options: Any) -> None:
    """Look for the styles of given images.

    They are written to projected_w.npz, which other commands take as --projected-w, and their images to proj00.png and
    so on. Those are made with the noise of the network, like all others.

    \b
    python generate.py project --network=SNAPSHOT --target=photos --outdir=out
    python generate.py --network=SNAPSHOT --projected-w=out/projected_w.npz --outdir=out
    """
    job = prepare_projection(**options)
    run_projection(job, outdir, [f"proj{index:02d}" for index in range(len(job.names))], save_video=bool(save_video))
    click.echo(
        f"{counted(len(job.names), 'projection')} in {outdir}; the styles are in projected_w.npz, for --projected-w"
    )


def prepare_projection(
    *,
    target: Path,
    loss: str | None,
    detectors: tuple[str, ...] | None,
    num_steps: int,
    space: Literal["w", "w+"],
    lr: float,
    fix_noise: bool,
    seed: int,
    **options: Any,
) -> ProjectionJob:
    """Read the targets, the network and the distance that --target and PROJECTION_OPTIONS name. Raises UserError."""
    if lr <= 0:
        raise UserError(f"--lr={lr:g}: must be positive")
    targets = read_targets(target)  # before anything else takes time
    setup = read_detectors(detectors or ())
    model = open_model(**options)
    towards = choose_distance(loss or ("features" if setup.program else "lpips"), setup, model.device)
    images = fit_targets(targets.values(), model.G.img_shape)
    config = ProjectionConfig(num_steps=num_steps, space=space, learning_rate=lr, fix_noise=fix_noise, seed=seed)
    return ProjectionJob(model=model, names=[*targets], targets=images, towards=towards, config=config)


def run_projection(job: ProjectionJob, outdir: Path, stems: Sequence[str], *, save_video: bool) -> None:
    """Project the targets in batches. Write STEM.png, with `save_video` STEM.mp4, and projected_w.npz after each."""
    films = [outdir / f"{stem}.mp4" for stem in stems] if save_video else []
    if films:
        check_encoder(films[0], FILM_FPS, instead="give --save-video=0")
    make_outdir(outdir)
    found = []
    for start in range(0, len(stems), job.model.batch):
        part = slice(start, start + job.model.batch)
        ws, made, before, after = project_batch(
            job.model, job.targets[part], job.towards, job.config, start, films[part]
        )
        for index, (name, stem) in enumerate(zip(job.names[part], stems[part], strict=True)):
            change = f"distance {before[index]:.4g} at the start, {after[index]:.4g} at the end"
            click.echo(f"{stem}: {name}, {change}")
        found.append(ws)
        save_styles(outdir / "projected_w.npz", torch.cat(found))  # a later batch may fail or be stopped
        for stem, image in zip(stems[part], made, strict=True):
            save_image(image, outdir / f"{stem}.png")


@main.command("play", cls=Script)
@with_options((NETWORK, LABEL, BATCH, PRECISION, DEVICE))
@option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
def play_command(
    network: Path | str, label: tuple[float, ...] | None, batch: int, precision: str, device: str | None, port: int
) -> None:
    """Play with seeds, truncation, mixing and attention in a browser on this machine.

    \b
    python generate.py play --network=docs/shapes.pkl
    """
    snapshot, where = open_network(network, device)
    has_classes = label is None and snapshot.label_kind() != "vectors"  # and questions name theirs
    c = choose_label(snapshot, None, label, is_needed=not has_classes)
    model = build_model(snapshot, where, c, noise_mode="const", batch=batch, precision=precision, trunc=1.0)
    with open_server(Player(model, has_classes=has_classes), port) as server, suppress(KeyboardInterrupt):
        click.echo(f"http://{HOST}:{server.server_port}/ until Ctrl-C")
        server.serve_forever()


def choose_distance(loss: str, setup: DetectorSetup, device: torch.device) -> Towards:
    """Return the distance that --loss and --detector name. Raises UserError for one that cannot be had."""
    if loss == "features":
        if setup.program is None:
            raise UserError("--loss=features: of which network? name its program with --detector=FILE")
        return features_towards(setup.program, device)
    if setup.program is not None:
        raise UserError(f"--detector={setup.program}: --loss={loss} has no use for a program; use --loss=features")
    if loss == "pixels":
        return pixels_towards
    try:
        setup.prepare("lpips")
    except UserError as error:
        raise UserError(f"--loss=lpips: {error}; or use --loss=pixels, or features of your own --detector") from None
    return lpips_towards(setup, device)


def is_mapping(seeds: tuple[int, ...] | None, projected_w: Path | None) -> bool:
    """Whether a command that takes both maps latents to styles, for which a conditional network needs a class."""
    return seeds is not None or projected_w is None


def check_strength(strength: float | None, direction: str | None) -> None:
    """Raise UserError for a --strength without a --direction."""
    if strength is not None and direction is None:
        raise UserError(f"--strength={strength:g}: of which edit? name one with --direction=FILE:INDEX")


def check_saved_keyframes(
    projected_w: Path, interpolation: Interpolation, trunc_to: float | None, classes: tuple[int, ...] | None
) -> None:
    """Raise UserError for options of `video` that are for seeds alone."""
    if interpolation == "z" or trunc_to is not None or classes:
        raise UserError(
            f"--projected-w={projected_w}: saved styles go with none of --interpolation=z, --trunc-to, --classes"
        )


def edited(styles: Iterator[Tensor], direction: str | None, strength: float | None, model: Model) -> Iterator[Tensor]:
    """Move styles (n, num_ws, w_dim) as --direction and --strength say. Raises UserError at once."""
    if direction is None:
        return styles
    found, index = read_direction(direction, model.G)
    return (found.edit(ws, index, 1.0 if strength is None else strength) for ws in styles)


def check_groups(
    method: str, components: int | None, positive: tuple[int, ...] | None, negative: tuple[int, ...] | None
) -> None:
    """Raise UserError for options of `directions` that the method does not have, or lacks."""
    by_groups = method in ("mean", "linear")
    if by_groups and not (positive and negative):
        raise UserError(f"--method={method}: needs two lists of seeds, --positive and --negative")
    if not by_groups and (positive or negative):
        raise UserError(f"--method={method}: --positive and --negative are for the methods mean and linear")
    if by_groups and components is not None:
        raise UserError(f"--components={components}: --method={method} finds one direction; leave it out")


def find_directions(
    model: Model, method: str, styles: tuple[int, ...], components: int | None, samples: int
) -> Directions:
    """Find directions without examples, by the method sefa or pca. Raises UserError for more than there are."""
    most = min(model.G.w_dim, samples - 1) if method == "pca" else model.G.w_dim
    if components is not None and components > most:
        raise UserError(f"--components={components}: --method={method} finds {most} here")
    count, drawn = components or min(5, most), sampled_w(model, samples)
    return factorise(model, styles, count, drawn) if method == "sefa" else principal(drawn, styles, count)


def maps_of(model: Model, ws: Tensor, queries: tuple[str, ...]) -> Iterator[tuple[np.ndarray, AttentionMaps]]:
    """Yield the image (H, W, 3) of each of some styles, made together, and its maps. Raises UserError."""
    records, img = record(model, ws)
    for image, picture in enumerate(to_uint8(img).permute(0, 2, 3, 1).cpu().numpy()):
        pixels = choose_pixels(queries, records, image, model.G.img_shape[1:])
        yield to_rgb(picture), attention_maps(records, image, pixels, model.G.img_shape[1:])


def counted(number: int, thing: str) -> str:
    """E.g. 1 image, 2 images."""
    return f"{number} {thing}{'s' * (number != 1)}"


def signed(number: float) -> str:
    """A caption: +1.5, -3, 0."""
    return f"{number:+.4g}" if number else "0"


def save_pixels(pixels: np.ndarray, path: Path) -> None:
    """Write a picture (H, W, 3)."""
    save_image(torch.from_numpy(pixels).permute(2, 0, 1), path)


def open_network(network: Path | str, device: str | None) -> tuple[Snapshot, torch.device]:
    """Read a snapshot onto the device that is asked for, or the best one, and get that ready."""
    name_user()
    tune_allocator()
    where = distributed.use_device(device)
    snapshot = load_network(network, where)
    for note in snapshot.notes():
        click.echo(note, err=True)
    snapshot.require_generator("images are made by")
    channels = snapshot.G_ema.img_shape[0]
    if channels not in (1, 3, 4):
        raise UserError(f"--network={network}: its images have {channels} channels, and picture files 1, 3 or 4")
    if where.type == "cuda":
        click.echo(custom_ops.prepare(where))
    execution.set_gpu_arithmetic()
    return snapshot, where


def open_model(
    *,
    network: Path | str,
    class_index: int | None,
    label: tuple[float, ...] | None,
    noise_mode: str,
    batch: int,
    precision: str,
    device: str | None,
    trunc: float = 1.0,
    class_flag: str = "--class",
    needs_class: bool = True,
) -> Model:
    """Return the averaged generator of a snapshot as MODEL_OPTIONS say."""
    snapshot, where = open_network(network, device)
    c = choose_label(snapshot, class_index, label, class_flag, is_needed=needs_class)
    return build_model(snapshot, where, c, noise_mode=noise_mode, batch=batch, precision=precision, trunc=trunc)


def choose_label(
    snapshot: Snapshot,
    class_index: int | None,
    label: tuple[float, ...] | None,
    class_flag: str = "--class",
    *,
    is_needed: bool = True,
) -> Tensor:
    """Return the label (1, c_dim) that --class or --label asks for, of zeros where none is needed.

    Raises UserError for one that the network does not have, and for a class of a network whose labels are vectors.
    """
    c_dim, kind = snapshot.config.generator.c_dim, snapshot.label_kind()
    if label is not None:
        if class_index is not None:
            raise UserError("--class and --label: give one of them")
        return vector_label(c_dim, label)
    if kind == "vectors" and class_index is not None:
        raise UserError(
            f"{class_flag}={class_index}: labels of this network are vectors; give its {c_dim} numbers with --label"
        )
    if kind == "vectors" and is_needed:
        raise UserError(f"--label: labels of this network are vectors; give its {c_dim} numbers, e.g. --label=0.5,...")
    if c_dim and kind is None and class_index is not None:
        click.echo(
            f"Warning: {snapshot.path}: does not say whether its labels are classes; taken for {c_dim} classes",
            err=True,
        )
    return label_of(c_dim, class_index, class_flag, is_needed=is_needed)


def build_model(
    snapshot: Snapshot,
    where: torch.device,
    c: Tensor,
    *,
    noise_mode: str,
    batch: int,
    precision: str,
    trunc: float,
) -> Model:
    """Return the averaged generator of a snapshot for labels c (1, c_dim)."""
    return Model(
        G=snapshot.G_ema,
        device=where,
        c=c.to(where),
        truncation_psi=trunc,
        noise_mode=noise_mode,
        batch=batch,
        execution=execution_of(snapshot, precision),
    )


def execution_of(snapshot: Snapshot, precision: str) -> execution.Execution:
    """Return the execution that --precision asks for."""
    return execution.Execution(reduced=execution.REDUCED[precision], min_grid=snapshot.config.reduced_from)


def make_outdir(outdir: Path, flag: str | None = None) -> None:
    """Make the folder for results. Raises UserError when it cannot be."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag or f'--outdir={outdir}'}: cannot be written ({error.strerror})") from None


def save_batches(batches: Iterable[Tensor], names: list[str], outdir: Path, *, keep: bool) -> list[Tensor]:
    """Write uint8 images, in batches, as NAME.png, while the next batch is made. Return the batches if `keep`."""
    kept: list[Tensor] = []
    writing: list[Future[None]] = []
    paths = (outdir / f"{name}.png" for name in names)
    with ThreadPoolExecutor() as pool, tqdm(total=len(names), unit="img") as progress:
        for images in batches:
            finish(writing)
            files = {path: image for image, path in zip(images, paths, strict=False)}  # a seed given twice is one file
            writing = [pool.submit(save_image, image, path) for path, image in files.items()]
            kept += [images] if keep else []
            progress.update(len(images))
        finish(writing)
    return kept


def finish(jobs: Iterable[Future[None]]) -> None:
    """Wait for all jobs. Raises what one of them raised."""
    for job in jobs:
        job.result()


if __name__ == "__main__":
    main()
