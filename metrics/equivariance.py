"""Equivariance to translation and rotation: EQ-T and EQ-R of Karras et al. 2021, appendix E.

A transform t moves positions at the input of the generator g. An equivariant network moves its image in the same way:

    PSNR = 20 log10(2) - 10 log10 E[(g(t z) - t g(z))^2]

The mean is over images, channels, and the pixels at which t g(z) depends on pixels inside the image only.

t g(z) at a fraction of a pixel is an interpolation. Translations use the Lanczos kernel, sinc(u) sinc(u / 3). The
rotation R of an image A has no frequencies outside the intersection of two squares, the band of its grid and the
rotated band of A. With the inverse Fourier transform K of this octagon, windowed, the two sides of a rotation are

    t g(z)(p) = sum_q K(p - R q) A(q)      and      g(t z)(p) -> sum_q K(p - q) g(t z)(q), the pseudo-rotation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import full_float32
from metrics.registry import Measurement, register_metric
from metrics.sampling import (
    NUM_IMAGES,
    MetricContext,
    cut,
    latents,
    own_shard,
    random_labels,
    random_rows,
    shape_name,
)
from torch_utils.distributed import all_reduce

MAX_SHIFT = 0.125  # of the side of an image, along each axis
LANCZOS = 3  # radius of the interpolation of translations, in pixels
RADIUS = 6  # of the window of rotations, in pixels
BETA = 5.65  # of this Kaiser window, for a stopband of -60 dB
MAX_PSNR = 150.0  # dB; rounding in float32 is the limit of larger values
PAIRS = "pairs of images"  # name of a pass

Aligned = tuple[Tensor, Tensor, Tensor]  # t g(z) and g(t z) (B, C, H, W), and the mask (B, 1, H, W) of their pixels


@dataclass(frozen=True, kw_only=True)
class Motion:
    """Random motion of images.

    `draw` returns parameters (B, n) for positions in the set and an image size (H, W). `matrices` maps parameters to
    the motion (B, 3, 3) of points (x, y, 1) in pixels, relative to the centre. `align` maps g(z), g(t z) and parameters
    to the images to compare. `radius` is that of the interpolation in pixels.
    """

    draw: Callable[[MetricContext, range, tuple[int, int]], Tensor]
    matrices: Callable[[Tensor], Tensor]
    align: Callable[[Tensor, Tensor, Tensor], Aligned]
    radius: int


def equivariance(context: MetricContext, name: str, count: int, motion: Motion) -> Measurement:
    """Return the PSNR over `count` pairs of images."""
    check(context, motion)
    context.progress.plan(name, [(PAIRS, count)])
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)  # of squared errors, and of their number
    for img, moved, parameters in pairs(context, count, motion):
        with full_float32():
            expected, found, mask = motion.align(img, moved, parameters)
        errors = (found - expected).double().square() * mask
        sums += torch.stack([errors.sum(), mask.expand_as(errors).sum(dtype=torch.float64)])
    error, number = all_reduce(sums).tolist()
    if not math.isfinite(error):
        raise UserError("the network returns non-finite values, so its training diverged: metrics are undefined")
    return Measurement(values={name: psnr(error / number)}, num_real=0, num_fake=2 * count)


def check(context: MetricContext, motion: Motion) -> None:
    """Raise UserError if the network, its images or the noise mode do not support this motion."""
    G = context.network
    if context.transform_input is None:
        raise UserError("needs a generator whose input can be transformed")
    with context.transform_input(G, torch.eye(3, device=context.device).unsqueeze(0)):
        pass
    if min(G.img_shape[1:]) <= 2 * motion.radius:
        raise UserError(f"images of {shape_name(G.img_shape)}: needs more than {2 * motion.radius} pixels per side")
    if context.noise_mode == "random":
        raise UserError("both images of a pair need the same noise: use --noise-mode=const or none")


@torch.no_grad()
def pairs(context: MetricContext, count: int, motion: Motion) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this process's shard of g(z), g(t z) and the parameters of t."""
    G, share = context.network, own_shard(count)
    assert context.transform_input is not None
    context.progress(PAIRS, 0, len(share))
    for positions in cut(share, context.batch_size):
        z, c = latents(context, positions), random_labels(context, positions)
        generate = partial(G, z, c, truncation_psi=context.truncation_psi, noise_mode=context.noise_mode)
        parameters = motion.draw(context, positions, G.img_shape[1:]).to(context.device)
        matrices = in_image_units(motion.matrices(parameters).inverse(), G.img_shape[1:])
        with full_float32():  # TF32 would limit the PSNR
            img = generate()
            with context.transform_input(G, matrices):
                moved = generate()
        yield img, moved, parameters
        context.progress(PAIRS, positions.stop - share.start, len(share))


def in_image_units(matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert transforms of points in pixels to float32 transforms in units of the longer side of (height, width)."""
    scale = matrices.new_tensor([max(size), max(size), 1])
    return (matrices * scale / scale.unsqueeze(1)).float()


def psnr(error: float) -> float:
    """Return the peak signal-to-noise ratio in dB for a mean squared error of images in [-1, 1]."""
    return 20 * math.log10(2) - 10 * math.log10(max(error, 4 * 10 ** (-MAX_PSNR / 10)))


def draw_shifts(context: MetricContext, positions: range, size: tuple[int, int], *, is_rounded: bool) -> Tensor:
    """Return shifts (B, 2) along x and y in pixels, uniform within MAX_SHIFT of the size."""
    shifts = _uniform(context, "translation", 2, positions) * torch.tensor([size[1], size[0]]) * MAX_SHIFT
    return shifts.round() if is_rounded else shifts


def draw_angles(context: MetricContext, positions: range, size: tuple[int, int]) -> Tensor:
    """Return angles (B, 1), uniform in -pi..pi."""
    return _uniform(context, "rotation", 1, positions) * math.pi


def _uniform(context: MetricContext, purpose: str, width: int, positions: range) -> Tensor:
    def draw(stream: np.random.RandomState, count: int) -> np.ndarray:
        return stream.uniform(-1, 1, (count, width))

    return random_rows(draw, context.seed, purpose, positions)


def shift_matrices(shifts: Tensor) -> Tensor:
    """Return the motion (B, 3, 3) of points by shifts (B, 2)."""
    matrices = torch.eye(3, dtype=shifts.dtype, device=shifts.device).repeat(len(shifts), 1, 1)
    matrices[:, :2, 2] = shifts
    return matrices


def rotation_matrices(angles: Tensor) -> Tensor:
    """Return the rotation (B, 3, 3) of points about the centre by angles (B, 1), from x towards y."""
    matrices = torch.eye(3, dtype=angles.dtype, device=angles.device).repeat(len(angles), 1, 1)
    matrices[:, :2, :2] = _rotations(angles)
    return matrices


def _rotations(angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def align_shift(img: Tensor, moved: Tensor, shifts: Tensor, *, radius: int) -> Aligned:
    """Shift images (B, C, H, W) by shifts (B, 2), with the interpolation of this radius."""
    columns, is_column = interpolation(img.shape[3], shifts[:, 0], radius)
    rows, is_row = interpolation(img.shape[2], shifts[:, 1], radius)
    shifted = rows.to(img).unsqueeze(1) @ img @ columns.to(img).mT.unsqueeze(1)
    return shifted, moved, (is_row.unsqueeze(2) & is_column.unsqueeze(1)).unsqueeze(1)


def interpolation(size: int, shifts: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return matrices (B, size, size) that shift a row of samples, and which samples (B, size) they define.

    The weights are those of the Lanczos kernel of this radius, normalised to sum 1 over all integers. A radius of 1 is
    for whole pixels.
    """
    index = torch.arange(size, dtype=shifts.dtype, device=shifts.device)
    at = index - shifts.unsqueeze(1)  # (B, size)
    taps = torch.arange(1 - radius, radius + 1, dtype=shifts.dtype, device=shifts.device)
    total = lanczos((at - at.floor()).unsqueeze(2) - taps, radius).sum(dim=2, keepdim=True)
    weights = lanczos(at.unsqueeze(2) - index, radius) / total
    return weights, _is_inside(at, size, radius)


def lanczos(u: Tensor, radius: int) -> Tensor:
    """Return sinc(u) sinc(u / radius) for |u| < radius, else 0."""
    return torch.where(u.abs() < radius, torch.sinc(u) * torch.sinc(u / radius), 0.0)


def _is_inside(at: Tensor, size: int, radius: int) -> Tensor:
    """Return whether all samples at a distance below `radius` from the index `at` are among the `size` samples."""
    return (at >= radius - 1) & (at <= size - radius)


def align_rotation(img: Tensor, moved: Tensor, angles: Tensor) -> Aligned:
    """Rotate images (B, C, H, W) by angles (B, 1), and pseudo-rotate the images of the rotated input."""
    rotated, is_defined = rotate(img, angles)
    filtered, is_inner = pseudo_rotate(moved, angles)
    return rotated, filtered, is_defined & is_inner


def rotate(img: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images rotated about their centre, and the mask (B, 1, H, W) of the defined pixels."""
    B, C, H, W = img.shape
    y, x = torch.meshgrid(torch.arange(H) - (H - 1) / 2, torch.arange(W) - (W - 1) / 2, indexing="ij")
    R = _rotations(angles)
    points = torch.stack([x.flatten(), y.flatten()], dim=1).to(R) @ R  # R^-1 p, (B, H W, 2)
    at = points + R.new_tensor([W - 1, H - 1]) / 2  # index of column and row
    first = at.floor()
    total = img.new_zeros(B, C, H * W)
    offsets = torch.arange(1 - RADIUS, RADIUS + 1).to(R)
    for offset in torch.cartesian_prod(offsets, offsets):
        tap = first + offset
        weights = octagon_kernel(((at - tap) @ R.mT).to(img.dtype), angles.to(img.dtype))  # (B, H W)
        column, row = tap[:, :, 0].clamp(0, W - 1).long(), tap[:, :, 1].clamp(0, H - 1).long()
        values = img.flatten(2).gather(2, (row * W + column).unsqueeze(1).expand(-1, C, -1))
        total += weights.unsqueeze(1) * values
    mask = _is_inside(at[:, :, 0], W, RADIUS) & _is_inside(at[:, :, 1], H, RADIUS)
    return total.view(B, C, H, W), mask.view(B, 1, H, W)


def pseudo_rotate(img: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images limited to the band of a rotation, and the mask (1, 1, H, W) of the defined pixels."""
    B, C, H, W = img.shape
    axis = torch.arange(1 - RADIUS, RADIUS).to(img)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    taps = torch.stack([x.flatten(), y.flatten()], dim=1).expand(B, -1, -1)
    kernels = octagon_kernel(taps, angles.to(img.dtype)).view(B, 1, len(axis), len(axis))  # equal to its reflection
    filtered = F.conv2d(img.reshape(1, B * C, H, W), kernels.repeat_interleave(C, 0), padding=RADIUS - 1, groups=B * C)
    rows, columns = (_is_inside(torch.arange(size, device=img.device), size, RADIUS) for size in (H, W))
    return filtered.view(B, C, H, W), (rows.unsqueeze(1) & columns).view(1, 1, H, W)


def octagon_kernel(v: Tensor, angles: Tensor) -> Tensor:
    """Return the windowed kernel K at v (B, N, 2): the low-pass filter of images rotated by angles (B, 1).

    The band is the intersection of the unit square and the unit square rotated by the angle a, in 0..pi/2. Its edges
    with the normals n and tangents t have the length l and the centres m. By the divergence theorem

        K(v) = sum_n (n v) l sinc(l t v) sin(2 pi m v) / (pi |v|^2),    l = (tan(a / 2) + tan(pi / 4 - a / 2)) / 2

    over n at 0, a, and 90 degrees further; the opposite edges are included.
    """
    a = angles % (math.pi / 2)
    near, far = (a / 2).tan() / 2, (math.pi / 4 - a / 2).tan() / 2  # from the foot of the normal to the corners
    length, radius = near + far, v.norm(dim=2)
    total = torch.zeros_like(radius)
    for angle, centre in ((0 * a, (near - far) / 2), (a, (far - near) / 2)):
        cos, sin = angle.cos(), angle.sin()
        x, y = cos * v[:, :, 0] + sin * v[:, :, 1], cos * v[:, :, 1] - sin * v[:, :, 0]
        for n, t in ((x, y), (y, -x)):
            integral = torch.where(t.abs() < 1e-4, length, torch.sin(math.pi * length * t) / (math.pi * t))
            total += n * integral * torch.sin(2 * math.pi * (n / 2 + centre * t))
    kernel = torch.where(radius < 1e-4, 2 * length, total / (math.pi * radius.square().clamp_min(1e-8)))
    inside = (1 - (radius / RADIUS).square()).clamp_min(0)
    window = torch.special.i0(BETA * inside.sqrt()) / float(np.i0(BETA))
    return kernel * window * (inside > 0)


def _register(pattern: str, motion: Motion, help: str, protocol: str) -> None:
    def plan(context: MetricContext, count: int | None) -> tuple[()]:
        check(context, motion)
        return ()

    @register_metric(
        pattern,
        help=help,
        note="needs a generator with Fourier features at its input, such as stylegan3",
        protocol=f"{protocol}; PSNR in dB of images in [-1, 1], no TF32; 50,000 pairs or <N>",
        paper="Karras et al. 2021, appendix E",
        plan=plan,
        higher_is_better=True,
    )
    def measure(context: MetricContext, name: str, count: int | None) -> Measurement:
        return equivariance(context, name, count or NUM_IMAGES, motion)


def _translation(*, is_rounded: bool, radius: int) -> Motion:
    return Motion(
        draw=partial(draw_shifts, is_rounded=is_rounded),
        matrices=shift_matrices,
        align=partial(align_shift, radius=radius),
        radius=radius,
    )


_register(
    "eqt<N>_int",
    _translation(is_rounded=True, radius=1),
    "EQ-T: equivariance of the generator to translation by whole pixels",
    "shift up to 1/8 of the image, rounded to pixels",
)
_register(
    "eqt<N>_frac",
    _translation(is_rounded=False, radius=LANCZOS),
    "EQ-T_frac: equivariance of the generator to translation by fractions of a pixel",
    "shift up to 1/8 of the image, Lanczos-3 interpolation",
)
_register(
    "eqr<N>",
    Motion(draw=draw_angles, matrices=rotation_matrices, align=align_rotation, radius=RADIUS),
    "EQ-R: equivariance of the generator to rotation",
    "any angle, band-limited rotation and pseudo-rotation, Kaiser window of 6 pixels",
)
