"""Latent interpolation for videos: paths through styles or latents, and sweeps of truncation or edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib.config import UserError
from exploration.directions import Directions, find_direction
from exploration.model import Model, check_seeds, gather_styles, label_of, seed_latents
from exploration.opening import is_mapping, open_model
from exploration.output import make_outdir
from exploration.pose import MAX_DEGREES, Pose
from exploration.video import MIN_FRAME, check_encoder, describe_video, open_video
from torch_utils.interpolation import linear_weights, slerp, spline_weights
from torch_utils.sheets import to_rgb, upscale_factor

INTERVAL_SECONDS, MIN_SECONDS = 2, 4  # default durations of a keyframe interval, and at least of the whole video

Interpolation = Literal["w", "z", "spline"]
StylesAt = Callable[[Tensor], Tensor]  # times (T,) -> (T, cells, num_ws, w_dim)
TransformsAt = Callable[[Tensor], Tensor]  # times (T,) -> (T, 3, 3), of the positions at the input


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Frame times: `steps` frames per interval between `num_keys` keyframes, with a closing interval in a loop.

    A single keyframe is held for `steps` frames. Without a loop, the video ends with a frame at the last keyframe.
    """

    num_keys: int
    steps: int
    loop: bool

    @classmethod
    def paced(cls, num_keys: int, *, frames: int | None, fps: float, loop: bool) -> Timing:
        """Return a timing of `frames` per interval, or of INTERVAL_SECONDS and at least MIN_SECONDS in total.

        Raises UserError for a single frame.
        """
        duration = cls(num_keys=num_keys, steps=1, loop=loop).duration
        default = math.ceil(fps * max(INTERVAL_SECONDS, MIN_SECONDS / duration))
        timing = cls(num_keys=num_keys, steps=frames or default, loop=loop)
        if timing.num_frames == 1:
            raise UserError(f"--frames={frames}: one frame is not a video; specify more frames or more keyframes")
        return timing

    @property
    def duration(self) -> int:
        """Total time, in keyframe intervals."""
        return max(self.num_keys - (not self.loop), 1)

    @property
    def num_frames(self) -> int:
        """Total number of frames. In a loop, the first frame follows the last."""
        return self.duration * self.steps + (not self.loop)

    def times(self) -> Tensor:
        """Return the time of each frame, in keyframe intervals, (T,)."""
        return torch.arange(self.num_frames) / self.steps

    def progress(self, times: Tensor) -> Tensor:
        """Return the progress (T,) of a sweep: from 0 to 1 at constant speed or, in a loop, smoothly to 1 and back."""
        u = times / self.duration
        return (1 - (2 * math.pi * u).cos()) / 2 if self.loop else u


def keys_per_cell(num_given: int, cells: int, classes: tuple[int, ...] | None) -> int:
    """Return the number of keyframes per cell of a video. Raises UserError if the counts do not divide evenly."""
    if num_given % cells:
        raise UserError(f"--grid: {num_given} keyframes cannot be divided evenly among {cells} cells")
    if not classes or num_given == cells * len(classes):
        return num_given // cells
    if num_given != cells:
        raise UserError(
            f"--classes: {len(classes)} classes and {num_given // cells} seeds per cell; use equal numbers, or one "
            "seed per cell"
        )
    return len(classes)


def through_styles(keys: Tensor, interpolation: Interpolation, timing: Timing) -> StylesAt:
    """Return the path through styles (cells, keys, num_ws, w_dim), linear or along a cubic spline."""
    weigh = spline_weights if interpolation == "spline" else linear_weights

    def styles_at(times: Tensor) -> Tensor:
        weights = weigh(times, timing.num_keys, closed=timing.loop).to(keys)
        return torch.einsum("tk,cknw->tcnw", weights, keys)

    return styles_at


def through_seeds(
    model: Model, seeds: Sequence[int], c: Tensor, interpolation: Interpolation, timing: Timing, cells: int, psi: float
) -> StylesAt:
    """Return the path through seeds, divided among the cells: one seed per keyframe or per cell; c (keys, c_dim)."""
    z = seed_latents(seeds, model.G.z_dim).unflatten(0, (cells, -1)).expand(-1, timing.num_keys, -1)
    if interpolation == "z":
        return through_latents(model, z, c, timing, psi)
    ws = model.map(z.flatten(0, 1), c.repeat(cells, 1), psi)
    return through_styles(ws.unflatten(0, (cells, -1)), interpolation, timing)


def through_latents(model: Model, z: Tensor, c: Tensor, timing: Timing, psi: float) -> StylesAt:
    """Return the path through latents z (cells, keys, z_dim), spherical, and labels c (keys, c_dim), linear."""

    def styles_at(times: Tensor) -> Tensor:
        before = times.floor().long().clamp(max=timing.num_keys - 1)
        after = (before + 1) % timing.num_keys
        t = (times - before).unsqueeze(1).repeat_interleave(len(z), dim=0)  # (T cells, 1)
        a, b = (z[:, index].transpose(0, 1).flatten(0, 1) for index in (before, after))  # (T cells, z_dim)
        labels = linear_weights(times, timing.num_keys, closed=timing.loop) @ c.cpu()
        ws = model.map(slerp(a, b, t), labels.repeat_interleave(len(z), dim=0).to(c), psi)
        return ws.unflatten(0, (len(times), len(z)))

    return styles_at


def sweep_truncation(path: StylesAt, w_avg: Tensor, first: float, last: float, timing: Timing) -> StylesAt:
    """Sweep the truncation psi from `first` to `last` and, in a loop, back."""

    def styles_at(times: Tensor) -> Tensor:
        psi = (first + (last - first) * timing.progress(times)).reshape(-1, 1, 1, 1).to(w_avg)
        return w_avg + psi * (path(times) - w_avg)

    return styles_at


def sweep_direction(path: StylesAt, found: Directions, index: int, strength: float, timing: Timing) -> StylesAt:
    """Sweep an edit along a direction from -strength to +strength; in a loop: 0, +strength, -strength, 0."""

    def styles_at(times: Tensor) -> Tensor:
        ws = path(times)  # (T, cells, num_ws, w_dim)
        u = times / timing.duration
        strengths = strength * ((2 * math.pi * u).sin() if timing.loop else 2 * u - 1)
        edited = found.edit(ws.flatten(0, 1), index, strengths.repeat_interleave(ws.shape[1]))
        return edited.unflatten(0, ws.shape[:2])

    return styles_at


def sweep_pose(pose: Pose, timing: Timing) -> TransformsAt:
    """Sweep the pose of the image from none and, in a loop, back; a whole turn has a constant speed."""

    def transforms_at(times: Tensor) -> Tensor:
        progress = timing.progress(times)
        is_turn = abs(pose.degrees) == MAX_DEGREES
        return pose.transforms(progress, times / timing.duration if is_turn else progress)

    return transforms_at


def render_frames(
    model: Model, path: StylesAt, timing: Timing, grid: tuple[int, int], scale: int
) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) of a path: a grid of (columns, rows) cells, with pixels repeated `scale` times.

    Images move to the pose of the model as in `sweep_pose`.
    """
    columns, rows = grid
    transforms_at = sweep_pose(model.pose, timing)
    for times in timing.times().split(max(model.batch // (columns * rows), 1)):
        transforms = transforms_at(times).repeat_interleave(columns * rows, dim=0)
        images = model.images(path(times).flatten(0, 1), transforms).unflatten(0, (len(times), rows, columns))
        tiled = images.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).numpy()  # (T, rows H, columns W, C)
        yield from to_rgb(tiled).repeat(scale, axis=1).repeat(scale, axis=2)


def make_video(
    *,
    seeds: tuple[int, ...] | None,
    projected_w: Path | None,
    output: Path,
    interpolation: Interpolation,
    grid: tuple[int, int],
    frames: int | None,
    fps: float,
    loop: bool,
    classes: tuple[int, ...] | None,
    trunc_to: float | None,
    direction: str | None,
    strength: float | None,
    scale: int | None,
    **options: Any,
) -> None:
    """Run `generate.py video`."""
    check_encoder(output, fps)
    if strength is not None and direction is None:
        raise UserError(f"--strength={strength:g}: needs a direction; specify one with --direction")
    if projected_w is not None:
        check_saved_keyframes(projected_w, interpolation, trunc_to, classes)
    if classes and (options["class_index"], options["label"]) != (None, None):
        raise UserError("--classes: cannot be combined with --class or --label")
    if classes:
        options |= {"class_index": classes[0], "class_flag": "--classes"}
    model = open_model(**options, needs_class=is_mapping(seeds, projected_w))
    check_seeds("--seeds", seeds)
    psi = model.truncation_psi if trunc_to is None else 1.0
    cells = grid[0] * grid[1]
    paced = partial(Timing.paced, frames=frames, fps=fps, loop=loop)
    if projected_w is None and seeds is not None:
        timing = paced(keys_per_cell(len(seeds), cells, classes))
        path = _between_seeds(model, seeds, classes, interpolation, timing, cells, psi)
    else:
        names, ws = gather_styles(model, seeds, projected_w)
        timing = paced(keys_per_cell(len(names), cells, None))
        path = through_styles(ws.unflatten(0, (cells, -1)), interpolation, timing)
    if trunc_to is not None:
        path = sweep_truncation(path, model.G.mapping.w_avg, model.truncation_psi, trunc_to, timing)
    if direction is not None:
        found, index = find_direction(direction, model)
        path = sweep_direction(path, found, index, 3.0 if strength is None else strength, timing)
    scale = scale or upscale_factor(model.G.img_shape[1:], MIN_FRAME)
    make_outdir(output.parent, flag=f"--output={output}")
    click.echo(describe_video(output, timing.num_frames, fps))
    with open_video(output, fps) as add, tqdm(total=timing.num_frames, unit="frame") as progress:
        for frame in render_frames(model, path, timing, grid, scale):
            add(frame)
            progress.update()
    click.echo(f"{output}: {output.stat().st_size / 1000:,.0f} kB")


def _between_seeds(
    model: Model,
    seeds: tuple[int, ...],
    classes: tuple[int, ...] | None,
    interpolation: Interpolation,
    timing: Timing,
    cells: int,
    psi: float,
) -> StylesAt:
    """Return the path through seeds. Keyframes have the label of the model, or `classes`."""
    labels = [label_of(model.G.c_dim, index, "--classes") for index in classes or ()]
    c = torch.cat(labels or [model.c] * timing.num_keys).to(model.device)  # (keys, c_dim)
    return through_seeds(model, seeds, c, interpolation, timing, cells, psi)


def check_saved_keyframes(
    projected_w: Path, interpolation: Interpolation, trunc_to: float | None, classes: tuple[int, ...] | None
) -> None:
    """Raise UserError for options of `video` that only apply to seeds."""
    if interpolation == "z" or trunc_to is not None or classes:
        raise UserError(
            f"--projected-w={projected_w}: cannot be combined with --interpolation=z, --trunc-to or --classes"
        )
