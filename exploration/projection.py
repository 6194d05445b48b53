"""Projection of images into the latent space of a generator (Karras et al. 2020, StyleGAN2, appendix D)."""

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
from dnnlib.util import counted
from exploration.directions import sampled_w
from exploration.model import Model, save_styles
from exploration.opening import open_model
from exploration.output import make_outdir
from exploration.video import MIN_FRAME, check_encoder, open_video
from metrics.detectors import DetectorSetup, read_detectors
from metrics.perceptual import feature_distance, lpips_distance
from torch_utils.images import DistanceTo, save_image, to_uint8
from torch_utils.misc import derive_seed
from torch_utils.sheets import to_rgb, upscale_factor
from training.data_sources.codec import decode_image
from training.data_sources.convert import Conversion
from training.data_sources.files import open_store, read_image_file
from training.networks import execution

VIDEO_FPS = 30
MIN_SIDE = 8  # side of the coarsest scale of the pixel distance and the noise regularization


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Settings of the optimization. Space 'w' is one style for all layers, 'w+' one style per layer.

    The learning rate rises linearly over the first fraction `ramp_up` of the steps and falls along a cosine over the
    last fraction `ramp_down`. Noise of `exploration` standard deviations of w is added to the styles and fades out by
    `explore_until`. The noise maps of the network are optimized too, unless `fix_noise`; `noise_weight` is the weight
    of the regularization that keeps signal out of the noise.
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
    num_samples: int = 10_000  # number of w samples for mean and spread
    seed: int = 0

    def rate_at(self, t: float) -> float:
        """Return the learning rate after a fraction t of the steps."""
        falling = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / self.ramp_down))
        return self.learning_rate * falling * min(1.0, t / self.ramp_up)

    def exploration_at(self, t: float) -> float:
        """Return the noise on w, in standard deviations, after a fraction t of the steps."""
        return self.exploration * max(0.0, 1 - t / self.explore_until) ** 2


@dataclass(frozen=True, kw_only=True)
class ProjectionJob:
    """A projection to run: target images uint8 (n, C, H, W) with names, distance, and settings."""

    model: Model
    names: list[str]
    targets: Tensor
    distance_to: DistanceTo
    config: ProjectionConfig


@dataclass(frozen=True, kw_only=True)
class Step:
    """Images (B, C, H, W) in [-1, 1] and distances (B,) before an optimization step, and styles after the step."""

    images: Tensor
    distances: Tensor
    ws: Tensor


def project(
    model: Model, targets: Tensor, distance_to: DistanceTo, config: ProjectionConfig, first: int = 0
) -> Iterator[Step]:
    """Project targets (B, C, H, W) in [-1, 1] in one batch. Yields every step; the last step is the result.

    The random stream of a target depends on the seed and the index of the target, which starts at `first`.
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
        w_noise = torch.stack([torch.randn(w.shape[1:], generator=generator) for generator in generators])
        with torch.enable_grad(), execution.using(model.execution):
            ws = w + w_noise.to(w) * (spread * config.exploration_at(t))
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
    video_paths: Sequence[Path],
) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """Project uint8 images (B, C, H, W), numbered from `first`, with a progress bar; write the videos `video_paths`.

    Returns styles (B, num_ws, w_dim), their uint8 images with the network's own noise, the distances at the first step,
    and the final distances. Raises UserError if the final distances are not finite.
    """
    goals = ((targets.float() - 128) / 127.5).to(model.device)
    scale = upscale_factor(model.G.img_shape[1:], MIN_FRAME)
    before: list[float] = []
    with ExitStack() as stack:
        videos = [stack.enter_context(open_video(path, fps=VIDEO_FPS)) for path in video_paths]
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
        raise UserError(f"--lr={config.learning_rate:g}: the optimization diverged; choose a smaller learning rate")
    return step.ws, to_uint8(img).cpu(), before, after.tolist()


def mean_and_spread(model: Model, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return the mean of w (w_dim,) over random latents with the model's label, and sqrt(E |w - mean|^2)."""
    samples = sampled_w(model, num_samples)
    mean = samples.mean(dim=0)
    spread = (samples - mean).square().sum(dim=1).mean().sqrt()
    return mean.float().to(model.device), spread.float().to(model.device)


def noise_maps(model: Model, batch: int) -> dict[str, Tensor]:
    """Return trainable copies of the noise buffers of the synthesis network, (batch, ...), by name."""
    found = {name: x for name, x in model.G.synthesis.named_buffers() if name.endswith("noise_const")}
    return {name: x.expand(batch, *x.shape).clone().requires_grad_() for name, x in found.items()}


def as_map(noise: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Reshape noise (B, H, W), or (B, N, 1) with the aspect ratio of the image, to (B, 1, H, W)."""
    if noise.shape[2] == 1:
        rows = round(img_size[0] * math.sqrt(noise.shape[1] / math.prod(img_size)))
        return noise.reshape(len(noise), 1, rows, -1)
    return noise.unsqueeze(1)


def noise_correlation(noise: Tensor) -> Tensor:
    """Sum over images and scales of the squared autocorrelation of noise (B, 1, H, W) at shifts of one row and column.

    Each scale halves the sides until the shorter side is at most MIN_SIDE. Averages of 2x2 values are multiplied by 2,
    which preserves the variance of white noise.
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
    """Normalize the noise maps of each image to mean 0 and mean square 1, in place."""
    for noise in noises.values():
        axes = tuple(range(1, noise.ndim))
        noise -= noise.mean(dim=axes, keepdim=True)
        noise *= noise.square().mean(dim=axes, keepdim=True).rsqrt()


def pixel_distance(targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the distance function: mean squared error, averaged over scales; each scale halves the sides."""
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
    """Read an image, or all images of a folder or zip file: uint8 [H, W, C] by name.

    Raises UserError for an unreadable file.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
        names, read = [path.name], lambda _: read_image_file(path)
    else:
        store = open_store(path)
        names, read = list(store.names), store.read
    targets = {}
    for position, name in enumerate(names):
        try:
            targets[name] = decode_image(read(position))
        except BrokenImageError as error:
            raise UserError(f"--target={path}: {name} cannot be read ({error})") from None
    return targets


def fit_targets(targets: Iterable[np.ndarray], img_shape: tuple[int, int, int]) -> Tensor:
    """Crop and resize images uint8 [H, W, C] to the shape of a network: uint8 (n, C, H, W)."""
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
        raise UserError(f"--target={target}: holds {len(job.names)} images; specify one, or use generate.py project")
    run_projection(job, outdir, ["proj"], save_video=save_video)
    save_image(job.targets[0], outdir / "target.png")
    click.echo(f"1 projection in {outdir}; the styles are in projected_w.npz, for generate.py --projected-w")


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
    """Load the targets, the network and the distance from --target and PROJECTION_OPTIONS. Raises UserError."""
    if lr <= 0:
        raise UserError(f"--lr={lr:g}: must be positive")
    targets = read_targets(target)  # first, since an unreadable target should fail fast
    setup = read_detectors(detectors or ())
    model = open_model(**options)
    distance_to = choose_distance(loss or ("features" if setup.program else "lpips"), setup, model.device)
    images = fit_targets(targets.values(), model.G.img_shape)
    config = ProjectionConfig(num_steps=num_steps, space=space, learning_rate=lr, fix_noise=fix_noise, seed=seed)
    return ProjectionJob(model=model, names=[*targets], targets=images, distance_to=distance_to, config=config)


def choose_distance(loss: str, setup: DetectorSetup, device: torch.device) -> DistanceTo:
    """Return the distance for --loss and --detector. Raises UserError if it is not available."""
    if loss == "features":
        if setup.program is None:
            raise UserError("--loss=features: needs a feature network; specify a program with --detector=FILE")
        return feature_distance(setup.program, device)
    if setup.program is not None:
        raise UserError(f"--detector={setup.program}: --loss={loss} does not use a program; use --loss=features")
    if loss == "pixels":
        return pixel_distance
    try:
        setup.prepare("lpips")
    except UserError as error:
        raise UserError(f"--loss=lpips: {error}; or use --loss=pixels, or features of a custom --detector") from None
    return lpips_distance(setup, device)


def run_projection(job: ProjectionJob, outdir: Path, stems: Sequence[str], *, save_video: bool) -> None:
    """Project the targets in batches. Each batch writes projected_w.npz, STEM.png, and STEM.mp4 if `save_video`."""
    video_paths = [outdir / f"{stem}.mp4" for stem in stems] if save_video else []
    if video_paths:
        check_encoder(video_paths[0], VIDEO_FPS, instead="use --save-video=0")
    make_outdir(outdir)
    found = []
    for start in range(0, len(stems), job.model.batch):
        part = slice(start, start + job.model.batch)
        ws, made, before, after = project_batch(
            job.model, job.targets[part], job.distance_to, job.config, start, video_paths[part]
        )
        for index, (name, stem) in enumerate(zip(job.names[part], stems[part], strict=True)):
            change = f"distance {before[index]:.4g} at the start, {after[index]:.4g} at the end"
            click.echo(f"{stem}: {name}, {change}")
        found.append(ws)
        save_styles(outdir / "projected_w.npz", torch.cat(found))  # a later batch may fail or be interrupted
        for stem, image in zip(stems[part], made, strict=True):
            save_image(image, outdir / f"{stem}.png")
