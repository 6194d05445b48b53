"""Projection: the styles whose image is closest to a given one (Karras et al. 2020, StyleGAN2, appendix D)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.image_files import BrokenImageError
from dnnlib.images import IMAGE_SUFFIXES
from exploration.directions import sampled_w
from exploration.model import Model, save_styles
from exploration.opening import open_model
from exploration.output import counted, make_outdir
from exploration.sheets import enlargement, to_rgb
from exploration.video import MIN_FRAME, check_encoder, open_video
from metrics.detectors import DetectorSetup, read_detectors
from metrics.perceptual import feature_distance, lpips_distance
from torch_utils.images import DistanceTo, save_image, to_uint8
from torch_utils.misc import derive_seed
from training.data_sources.codec import decode_image
from training.data_sources.convert import Conversion
from training.data_sources.files import open_store, read_image_file
from training.networks import execution

FILM_FPS = 30
MIN_SIDE = 8  # the grid of the last scale of pixels, and of noise


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Settings of the search: 'w' is one style for all layers, 'w+' one for each.

    The learning rate rises linearly over the first `ramp_up` of the steps and falls along a cosine over the last
    `ramp_down`. Noise of `exploration` standard deviations of w is added to the styles and fades until `explore_until`.
    The noise maps of the network are looked for too, unless `fix_noise`; `noise_weight` keeps signal out of them.
    """

    num_steps: int = 1000
    space: Literal["w", "w+"] = "w"
    learning_rate: float = 0.1
    ramp_up: float = 0.05
    ramp_down: float = 0.25
    exploration: float = 0.05
    explore_until: float = 0.75
    noise_weight: float = 1e5
    fix_noise: bool = False
    num_samples: int = 10_000  # w drawn for their mean and spread
    seed: int = 0

    def rate_at(self, t: float) -> float:
        """The learning rate when t of the steps are done, 0 to 1."""
        falling = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / self.ramp_down))
        return self.learning_rate * falling * min(1.0, t / self.ramp_up)

    def exploration_at(self, t: float) -> float:
        """The noise on w, in standard deviations, when t of the steps are done."""
        return self.exploration * max(0.0, 1 - t / self.explore_until) ** 2


@dataclass(frozen=True, kw_only=True)
class ProjectionJob:
    """A projection to run: uint8 images (n, C, H, W) with their names, a distance, and how to look."""

    model: Model
    names: list[str]
    targets: Tensor
    distance_to: DistanceTo
    config: ProjectionConfig


@dataclass(frozen=True, kw_only=True)
class Step:
    """State of a projection: the images (B, C, H, W) in [-1, 1] of a step, their distances (B,), and its styles."""

    images: Tensor
    distances: Tensor
    ws: Tensor


def project(
    model: Model, targets: Tensor, distance_to: DistanceTo, config: ProjectionConfig, first: int = 0
) -> Iterator[Step]:
    """Look for the styles of targets (B, C, H, W) in [-1, 1], all at once, step by step; the last one is the result.

    What is drawn for a target depends on the seed and on its number, `first` and up.
    """
    w_avg, spread = mean_and_spread(model, config.num_samples)
    width = 1 if config.space == "w" else model.G.num_ws
    w = w_avg.expand(len(targets), width, -1).clone().requires_grad_()  # (B, 1 or num_ws, w_dim)
    noises = {} if config.fix_noise or model.noise_mode == "none" else noise_maps(model, len(targets))
    optimizer = torch.optim.Adam([w, *noises.values()], lr=config.learning_rate, betas=(0.9, 0.999))
    generators = [
        torch.Generator().manual_seed(derive_seed(config.seed, "project", first + index))
        for index in range(len(targets))
    ]
    distance = distance_to(targets)
    for step in range(config.num_steps):
        t = step / config.num_steps
        optimizer.param_groups[0]["lr"] = config.rate_at(t)
        drawn = torch.stack([torch.randn(w.shape[1:], generator=generator) for generator in generators])
        with torch.enable_grad(), execution.using(model.execution):
            ws = w + drawn.to(w) * (spread * config.exploration_at(t))
            ws = ws.expand(-1, model.G.num_ws, -1)
            images = functional_call(model.G.synthesis, noises, (ws,), {"noise_mode": model.noise_mode})
            distances = distance(images)
            loss = distances.sum() + config.noise_weight * sum(
                noise_correlation(as_map(noise, model.G.img_shape[1:])) for noise in noises.values()
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        normalise(noises)
        yield Step(
            images=images.detach(), distances=distances.detach(), ws=w.detach().clone().expand(-1, model.G.num_ws, -1)
        )


def project_batch(
    model: Model,
    targets: Tensor,
    distance_to: DistanceTo,
    config: ProjectionConfig,
    first: int,
    films: Sequence[Path],
) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """Project uint8 images (B, C, H, W), the `first` and following ones, with progress; `films` are videos to write.

    Return styles (B, num_ws, w_dim), their uint8 images, which have the network's own noise, and the distances of the
    first step and of these images. Raises UserError when the latter are not finite.
    """
    goals = ((targets.float() - 128) / 127.5).to(model.device)
    scale = enlargement(model.G.img_shape[1:], MIN_FRAME)
    before: list[float] = []
    with ExitStack() as stack:
        videos = [stack.enter_context(open_video(path, fps=FILM_FPS)) for path in films]
        progress = stack.enter_context(tqdm(total=config.num_steps, unit="step"))
        for number, step in enumerate(project(model, goals, distance_to, config, first)):
            before = before or step.distances.tolist()
            if videos:
                pairs = torch.cat([targets, to_uint8(step.images).cpu()], dim=3).permute(0, 2, 3, 1).numpy()
                for add, pair in zip(videos, pairs, strict=True):
                    add(to_rgb(pair).repeat(scale, axis=0).repeat(scale, axis=1))
            if number % 50 == 0 or number + 1 == config.num_steps:
                progress.set_postfix(distance=f"{step.distances.mean().item():.4f}")
            progress.update()
    img = model.synthesise(step.ws)
    with torch.no_grad():
        after = distance_to(goals)(img)
    if not after.isfinite().all():
        raise UserError(f"--lr={config.learning_rate:g}: the search left all finite numbers; choose a smaller one")
    return step.ws, to_uint8(img).cpu(), before, after.tolist()


def mean_and_spread(model: Model, num_samples: int) -> tuple[Tensor, Tensor]:
    """The mean of w (w_dim,) over random latents of the model's class, and sqrt(E |w - mean|^2)."""
    samples = sampled_w(model, num_samples)
    mean = samples.mean(dim=0)
    spread = (samples - mean).square().sum(dim=1).mean().sqrt()
    return mean.float().to(model.device), spread.float().to(model.device)


def noise_maps(model: Model, batch: int) -> dict[str, Tensor]:
    """Copies of the synthesis network's noise buffers for each image, (batch, ...), by their names."""
    found = {name: x for name, x in model.G.synthesis.named_buffers() if name.endswith("noise_const")}
    return {name: x.expand(batch, *x.shape).clone().requires_grad_() for name, x in found.items()}


def as_map(noise: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Noise (B, H, W), or (B, N, 1) in the proportions of the image, as (B, 1, H, W)."""
    if noise.shape[2] == 1:
        rows = round(img_size[0] * math.sqrt(noise.shape[1] / math.prod(img_size)))
        return noise.reshape(len(noise), 1, rows, -1)
    return noise.unsqueeze(1)


def noise_correlation(noise: Tensor) -> Tensor:
    """Sum over images and scales of the squared correlation of noise (B, 1, H, W) with itself one row and column on.

    Each scale halves the sides while they have more than MIN_SIDE positions: means of 2x2 values times 2, which keeps
    the variance of white noise.
    """
    total = noise.new_zeros(())
    while True:
        for axis in (2, 3):
            total = total + (noise * noise.roll(1, dims=axis)).mean(dim=(1, 2, 3)).square().sum()
        if min(noise.shape[2:]) <= MIN_SIDE:
            return total
        noise = 2 * F.avg_pool2d(noise, 2)


@torch.no_grad()
def normalise(noises: dict[str, Tensor]) -> None:
    """Bring each image's noise maps back to mean 0 and mean square 1."""
    for noise in noises.values():
        axes = tuple(range(1, noise.ndim))
        noise -= noise.mean(dim=axes, keepdim=True)
        noise *= noise.square().mean(dim=axes, keepdim=True).rsqrt()


def pixel_distance(targets: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean squared difference of images, averaged over scales: each halves the sides, down to MIN_SIDE."""
    scales = [targets]
    while min(scales[-1].shape[2:]) >= 2 * MIN_SIDE:
        scales.append(F.avg_pool2d(scales[-1], 2))

    def distance(img: Tensor) -> Tensor:
        total = img.new_zeros(len(img))
        for number, goal in enumerate(scales):
            img = F.avg_pool2d(img, 2) if number else img
            total = total + (img - goal).square().mean(dim=(1, 2, 3))
        return total / len(scales)

    return distance


def read_targets(path: Path) -> dict[str, np.ndarray]:
    """Read an image, or those of a folder or zip file: pixels uint8 [H, W, C] by their names.

    Raises UserError naming a file that cannot be read.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
        names, read = [path.name], lambda name: read_image_file(path)
    else:
        store = open_store(path)
        names, read = list(store.names), store.read
    targets = {}
    for name in names:
        try:
            targets[name] = decode_image(read(name))
        except BrokenImageError as error:
            raise UserError(f"--target={path}: {name} cannot be read ({error})") from None
    return targets


def fit_targets(targets: Iterable[np.ndarray], img_shape: tuple[int, int, int]) -> Tensor:
    """Crop and resize images uint8 [H, W, C] to fit a network: uint8 (n, C, H, W)."""
    C, H, W = img_shape
    conversion = Conversion(width=W, height=H, transform="center-crop", channels=C)
    return torch.stack([torch.from_numpy(conversion(pixels).copy()).permute(2, 0, 1) for pixels in targets])


def project_images(save_video: bool | None, outdir: Path, **options: Any) -> None:
    """Run `generate.py project`."""
    job = prepare_projection(**options)
    run_projection(job, outdir, [f"proj{index:02d}" for index in range(len(job.names))], save_video=bool(save_video))
    click.echo(
        f"{counted(len(job.names), 'projection')} in {outdir}; the styles are in projected_w.npz, for --projected-w"
    )


def project_image(*, target: Path, save_video: bool, outdir: Path, **options: Any) -> None:
    """Run `projector.py`."""
    job = prepare_projection(target=target, batch=1, **options)
    if len(job.names) > 1:
        raise UserError(f"--target={target}: {len(job.names)} images; name one, or use generate.py project")
    run_projection(job, outdir, ["proj"], save_video=save_video)
    save_image(job.targets[0], outdir / "target.png")
    click.echo(f"1 projection in {outdir}; its styles are in projected_w.npz, for generate.py --projected-w")


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
    distance_to = choose_distance(loss or ("features" if setup.program else "lpips"), setup, model.device)
    images = fit_targets(targets.values(), model.G.img_shape)
    config = ProjectionConfig(num_steps=num_steps, space=space, learning_rate=lr, fix_noise=fix_noise, seed=seed)
    return ProjectionJob(model=model, names=[*targets], targets=images, distance_to=distance_to, config=config)


def choose_distance(loss: str, setup: DetectorSetup, device: torch.device) -> DistanceTo:
    """Return the distance that --loss and --detector name. Raises UserError for one that cannot be had."""
    if loss == "features":
        if setup.program is None:
            raise UserError("--loss=features: of which network? name its program with --detector=FILE")
        return feature_distance(setup.program, device)
    if setup.program is not None:
        raise UserError(f"--detector={setup.program}: --loss={loss} has no use for a program; use --loss=features")
    if loss == "pixels":
        return pixel_distance
    try:
        setup.prepare("lpips")
    except UserError as error:
        raise UserError(f"--loss=lpips: {error}; or use --loss=pixels, or features of your own --detector") from None
    return lpips_distance(setup, device)


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
            job.model, job.targets[part], job.distance_to, job.config, start, films[part]
        )
        for index, (name, stem) in enumerate(zip(job.names[part], stems[part], strict=True)):
            change = f"distance {before[index]:.4g} at the start, {after[index]:.4g} at the end"
            click.echo(f"{stem}: {name}, {change}")
        found.append(ws)
        save_styles(outdir / "projected_w.npz", torch.cat(found))  # a later batch may fail or be stopped
        for stem, image in zip(stems[part], made, strict=True):
            save_image(image, outdir / f"{stem}.png")
