"""Perceptual path length: LPIPS distance between images a small step apart in latent space (Karras et al. 2019, 2020a).

    E[d(G(x(t)), G(x(t + eps))) / eps^2],    eps = 1e-4, d = LPIPS, x(t) between two random points in w or in z

t is 0 (`end`) or uniform in 0..1 (`full`). Images are average-pooled to at most about 256 pixels; distances outside the
1st to 99th percentile are discarded. The four older metrics crop the face region of FFHQ, as published: rows 3/8 to
7/8, columns 2/8 to 6/8 of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import TVGG16, full_float32
from metrics.registry import Measurement, register_metric
from metrics.sampling import NUM_IMAGES, MetricContext, cut, gather_rows, own_shard, random_labels, random_rows
from torch_utils.interpolation import slerp

EPSILON = 1e-4
MAX_SIDE = 256
MIN_SIDE = 16  # VGG16 halves an image four times before the last layer that LPIPS uses


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Variant of the metric: latent space, t = 0 only or uniform, and face crop or full image."""

    space: Literal["w", "z"]
    at_end: bool
    crop: bool


def trimmed_mean(distances: np.ndarray) -> float:
    """Return the mean of the distances from the 1st to the 99th percentile, both inclusive."""
    low = np.percentile(distances, 1, method="lower")
    high = np.percentile(distances, 99, method="higher")
    return float(distances[(low <= distances) & (distances <= high)].mean())


def lpips_input(img: Tensor, crop: bool) -> Tensor:
    """Convert images (B, C, H, W) in [-1, 1] to LPIPS input: RGB in 0..255, average-pooled to about 256 pixels."""
    if crop:
        H, W = img.shape[2:]
        img = img[:, :, 3 * H // 8 : 7 * H // 8, 2 * W // 8 : 6 * W // 8]
    if min(img.shape[2:]) < MIN_SIDE:
        part = "the face crop has" if crop else "the images have"
        raise UserError(f"LPIPS needs at least {MIN_SIDE} pixels per side, but {part} {min(img.shape[2:])}")
    factor = min(img.shape[2:]) // MAX_SIDE
    if factor > 1:
        img = F.avg_pool2d(img, factor)
    if img.shape[1] not in (1, 3):
        raise UserError(f"LPIPS needs RGB or gray images, but the images have {img.shape[1]} channels")
    return ((img + 1) * 127.5).expand(-1, 3, -1, -1)


@torch.no_grad()
def steps(context: MetricContext, walk: Walk, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's shard of the image pairs, one image per end of a step, in [-1, 1]."""
    G: Any = context.network
    share = own_shard(count)
    context.progress("steps", 0, len(share))
    for positions in cut(share, max(context.batch_size // 2, 1)):
        z0, z1 = (_rows(context, "normal", G.z_dim, f"path {end}", positions) for end in ("from", "to"))
        t = 0 * z0[:, :1] if walk.at_end else _rows(context, "uniform", 1, "path t", positions)
        c = random_labels(context, positions)
        psi, mode = context.truncation_psi, context.noise_mode
        with full_float32():  # a step is below the precision of TF32
            if walk.space == "w":
                w0, w1 = (G.mapping(z, c, truncation_psi=psi) for z in (z0, z1))  # (B, num_ws, w_dim)
                ws = [torch.lerp(w0, w1, at.unsqueeze(2)) for at in (t, t + EPSILON)]
                img = G.synthesis(torch.cat(ws), noise_mode=mode)
            else:
                z = torch.cat([slerp(z0, z1, at) for at in (t, t + EPSILON)])
                img = G(z, torch.cat([c, c]), truncation_psi=psi, noise_mode=mode)
        one, other = img.float().chunk(2)
        yield one, other
        context.progress("steps", positions.stop - share.start, len(share))


def _rows(context: MetricContext, kind: str, width: int, purpose: str, positions: range) -> Tensor:
    def draw(stream: np.random.RandomState, count: int) -> np.ndarray:
        return stream.standard_normal((count, width)) if kind == "normal" else stream.uniform(size=(count, width))

    return random_rows(draw, context.seed, purpose, positions).to(context.device, torch.float32)


def check_walk(context: MetricContext, walk: Walk) -> None:
    """Raise UserError if the network or the noise mode does not support this walk."""
    G = context.network
    if walk.space == "w" and not (hasattr(G, "mapping") and hasattr(G, "synthesis")):
        raise UserError(f"{type(G).__name__} has no style space w to walk through: use ppl_zend or ppl_zfull")
    if context.noise_mode == "random":
        raise UserError("both ends of a step need the same noise: use --noise-mode=const or none")


def path_length(context: MetricContext, name: str, count: int, walk: Walk) -> Measurement:
    """Return the trimmed mean over `count` steps."""
    check_walk(context, walk)
    distance = context.setup.load_similarity(context.device)
    context.progress.plan(name, [("steps", count)])
    parts = [torch.zeros(0, device=context.device)]
    for one, other in steps(context, walk, count):
        parts.append(distance(lpips_input(one, walk.crop), lpips_input(other, walk.crop)) / EPSILON**2)
    distances = gather_rows(torch.cat(parts)[:, None])[:, 0].cpu().double().numpy()
    if not np.isfinite(distances).all():
        raise UserError("the network returns non-finite values, so its training diverged: metrics are undefined")
    return Measurement(values={name: trimmed_mean(distances)}, num_real=0, num_fake=2 * count)


def _register(pattern: str, walk: Walk, help: str) -> None:
    start, part = "t = 0" if walk.at_end else "t in 0..1", "FFHQ's face crop" if walk.crop else "no crop"

    def plan(context: MetricContext, count: int | None) -> tuple[()]:
        check_walk(context, walk)
        return ()

    @register_metric(
        f"{pattern}<N>",
        help=help,
        note=TVGG16,
        protocol=f"{start}, eps 1e-4, no TF32, {part}, at most 256 px, 1st to 99th percentile; 50,000 steps or <N>",
        paper="Karras et al. 2020a" if pattern == "ppl2_wend" else "Karras et al. 2019",
        roles=("lpips",),
        plan=plan,
        library_suffix="_tvgg16",
    )
    def measure(context: MetricContext, name: str, count: int | None) -> Measurement:
        return path_length(context, name, count or NUM_IMAGES, walk)


_register("ppl2_wend", Walk(space="w", at_end=True, crop=False), "perceptual path length in w at t = 0, of StyleGAN2")
_register(
    "ppl_wend", Walk(space="w", at_end=True, crop=True), "perceptual path length in w at t = 0, face crop, of StyleGAN"
)
_register("ppl_wfull", Walk(space="w", at_end=False, crop=True), "perceptual path length in w, uniform t, face crop")
_register("ppl_zend", Walk(space="z", at_end=True, crop=True), "perceptual path length in z at t = 0, face crop")
_register("ppl_zfull", Walk(space="z", at_end=False, crop=True), "perceptual path length in z, uniform t, face crop")
