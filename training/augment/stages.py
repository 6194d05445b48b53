"""Transforms of adaptive discriminator augmentation, and the five stages that apply them.

Karras et al. 2020b, "Training generative adversarial networks with limited data", appendix B.

A stage has two parts: `draw` samples the parameters of each image, the identity with probability 1 - p, and `transform`
is a deterministic function of images and parameters. A test or figure can therefore choose the parameters:

    ColorStage("color", (3, 32, 32)).transform(images, contrast(u, n, (32, 32)))

To add a geometric or colour transform, write a function that returns its matrix, add a row with a new group to GEOMETRY
or COLOR, and add a pipe with that group to PIPES. Existing pipes are unaffected, including their random draws. To add
another kind of transform, write an AugmentStage and insert it into STAGES.

Random numbers come from torch's global RNGs. The number of draws does not depend on their values, and no operation
synchronizes with the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import pi, sqrt
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.config import ConfigError
from torch_utils.ops.grid_sample import grid_sample
from torch_utils.ops.upfirdn2d import upfirdn2d

# Values of `--augpipe` and the groups of transforms that each value enables.
PIPES: dict[str, tuple[str, ...]] = {
    "blit": ("blit",),
    "geom": ("geom",),
    "color": ("color",),
    "filter": ("filter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
    "bg": ("blit", "geom"),
    "bgc": ("blit", "geom", "color"),
    "bgcf": ("blit", "geom", "color", "filter"),
    "bgcfn": ("blit", "geom", "color", "filter", "noise"),
    "bgcfnc": ("blit", "geom", "color", "filter", "noise", "cutout"),
}

Size = tuple[int, int]  # height and width of the images in pixels
MatrixFunction = Callable[[Tensor, Tensor, Size], Tensor]


@dataclass(frozen=True)
class MatrixTransform:
    """Transform defined by one matrix per image.

    `matrix(u, n, size)` returns the matrices [B, k, k] for uniform draws u [2, B] in [0, 1) and standard normal draws
    n [2, B]. `chance(p)` is the probability of applying the transform. Transforms with `rgb_only` are skipped for
    images without RGB channels.
    """

    name: str
    group: str
    matrix: MatrixFunction
    chance: Callable[[Tensor], Tensor] = lambda p: p
    rgb_only: bool = False


def groups_of(transforms: Sequence[MatrixTransform]) -> tuple[str, ...]:
    """Return the distinct groups of the transforms, in order."""
    return tuple(dict.fromkeys(transform.group for transform in transforms))


def draw_matrices(
    transforms: Sequence[MatrixTransform], B: int, p: Tensor, size: Size, like: Tensor
) -> tuple[Tensor, ...]:
    """Draw the matrices [B, k, k] of each transform for B images, with the dtype and device of `like`."""
    T = len(transforms)
    u = torch.rand([T, 3, B], dtype=like.dtype, device=like.device)
    n = torch.randn([T, 2, B], dtype=like.dtype, device=like.device)
    return gate_matrices(transforms, u, n, p, size)


def gate_matrices(
    transforms: Sequence[MatrixTransform], u: Tensor, n: Tensor, p: Tensor, size: Size
) -> tuple[Tensor, ...]:
    """Return the matrices [B, k, k] of T transforms for draws u [T, 3, B] and n [T, 2, B].

    A matrix is the identity where u[:, 2] >= chance(p).
    """
    matrices = torch.stack([t.matrix(u[i, :2], n[i], size) for i, t in enumerate(transforms)])  # (T, B, k, k)
    chances = torch.stack([t.chance(p) for t in transforms])  # (T,)
    is_applied = u[:, 2] < chances[:, None]  # (T, B)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(is_applied[..., None, None], matrices, identity).unbind(0)


def stack_matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Assemble square matrices [B, k, k] from rows of entries: tensors [B] or numbers."""
    numbers = {entry for row in rows for entry in row if not isinstance(entry, Tensor)}
    constants = {number: torch.full_like(like, number) for number in numbers}
    entries = [entry if isinstance(entry, Tensor) else constants[entry] for row in rows for entry in row]
    return torch.stack(entries, dim=-1).reshape(-1, len(rows), len(rows))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices [B, k, k] in full precision; matmul may use TF32, which is too coarse for pixel coordinates."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# Geometry: inverse transforms as 3x3 matrices on (x, y, 1), in pixels from the image centre, x to the right and y down.


def diagonal(x: Tensor, y: Tensor) -> Tensor:
    return stack_matrix([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], like=x)


def translation(x: Tensor, y: Tensor) -> Tensor:
    return stack_matrix([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], like=x)


def rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return stack_matrix([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], like=angle)


def xflip(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Horizontal flip with probability 1/2."""
    sign = 1 - 2 * (2 * u[0]).floor()
    return diagonal(sign, torch.ones_like(sign))


def rotate90(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Rotation by 0, 90, 180 or 270 degrees."""
    return rotation((4 * u[0]).floor() * (pi / 2))


def xint(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Translation by whole pixels, up to 1/8 of the image size along each axis."""
    H, W = size
    t = (2 * u - 1) * 0.125  # (2, B)
    return translation(-(t[0] * W).round(), -(t[1] * H).round())


def scale(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Isotropic scaling by 2^(0.2 N)."""
    inverse = (-0.2 * n[0]).exp2()
    return diagonal(inverse, inverse)


def rotate(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Rotation by U(-pi, pi)."""
    return rotation((2 * u[0] - 1) * pi)


def aniso(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Anisotropic scaling: x by 2^(0.2 N), y by the reciprocal."""
    stretch = (0.2 * n[0]).exp2()
    return diagonal(1 / stretch, stretch)


def xfrac(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Translation by 0.125 N times the image size along each axis."""
    H, W = size
    t = 0.125 * n  # (2, B)
    return translation(-t[0] * W, -t[1] * H)


def rotation_chance(p: Tensor) -> Tensor:
    """Return the probability per rotation such that at least one of two rotations is applied with probability p."""
    return 1 - (1 - p).clamp(0, 1).sqrt()


# In order of application, from the flip to the fractional translation. The rotations before and after the anisotropic
# scaling make its direction random.
GEOMETRY = (
    MatrixTransform("xflip", "blit", xflip),
    MatrixTransform("rotate90", "blit", rotate90),
    MatrixTransform("xint", "blit", xint),
    MatrixTransform("scale", "geom", scale),
    MatrixTransform("rotate_pre", "geom", rotate, chance=rotation_chance),
    MatrixTransform("aniso", "geom", aniso),
    MatrixTransform("rotate_post", "geom", rotate, chance=rotation_chance),
    MatrixTransform("xfrac", "geom", xfrac),
)


# ----------------------------------------------------------------------------------------------------------------------
# Colour: 4x4 matrices on (r, g, b, 1). v = (1, 1, 1) / sqrt(3) is the luma axis. Transforms that commute with rotations
# by 120 degrees about v have circulant matrices.


def circulant(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return stack_matrix([[a, b, c, 0.0], [c, a, b, 0.0], [b, c, a, 0.0], [0.0, 0.0, 0.0, 1.0]], like=a)


def brightness(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Brightness: add 0.2 N to all channels."""
    t = 0.2 * n[0]
    return stack_matrix([[1.0, 0.0, 0.0, t], [0.0, 1.0, 0.0, t], [0.0, 0.0, 1.0, t], [0.0, 0.0, 0.0, 1.0]], like=t)


def contrast(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Contrast: multiply all channels by 2^(0.5 N)."""
    s = (0.5 * n[0]).exp2()
    return circulant(s, torch.zeros_like(s), torch.zeros_like(s))


def lumaflip(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Luma flip I - 2 v v^T, which preserves the chroma, with probability 1/2."""
    part = (2 * u[0]).floor() * (-2 / 3)
    return circulant(1 + part, part, part)


def hue(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Hue rotation about the luma axis by U(-pi, pi)."""
    angle = (2 * u[0] - 1) * pi
    even, odd = (1 - angle.cos()) / 3, angle.sin() / sqrt(3)
    return circulant(1 - 2 * even, even - odd, even + odd)


def saturation(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Saturation: multiply the chroma by 2^N, v v^T + 2^N (I - v v^T)."""
    s = n[0].exp2()
    return circulant((1 + 2 * s) / 3, (1 - s) / 3, (1 - s) / 3)


# In order of application.
COLOR = (
    MatrixTransform("brightness", "color", brightness),
    MatrixTransform("contrast", "color", contrast),
    MatrixTransform("lumaflip", "color", lumaflip),
    MatrixTransform("hue", "color", hue, rgb_only=True),
    MatrixTransform("saturation", "color", saturation, rgb_only=True),
)


# ----------------------------------------------------------------------------------------------------------------------
# Stages


class Transform(nn.Module, ABC):
    """Base class of random transforms of images (C, H, W), split into random draws and a deterministic function."""

    is_deterministic: ClassVar[bool] = True  # forward and derivatives on CUDA

    def __init__(self, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.channels, *size = img_shape
        self.size: Size = (size[0], size[1])

    @abstractmethod
    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Draw the parameters of each image of [B, C, H, W], the identity with probability 1 - p."""

    @abstractmethod
    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        """Transform images [B, C, H, W] with parameters [B, ...]."""

    def forward(self, images: Tensor, p: Tensor) -> Tensor:
        return self.transform(images, self.draw(images, p))


class AugmentStage(Transform):
    """Base class of pipeline stages, which are used if the pipe enables one of their `groups`.

    Constructed with the name of the pipe and the image shape (C, H, W). Raises ConfigError for unsupported shapes.
    """

    groups: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(img_shape)
        self.active = [group for group in self.groups if group in PIPES[pipe]]


# Low-pass filter of the sym6 wavelet, normalised below to a sum of 1.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)  # fmt: skip

# Largest image side for which resampling with dense matrix products is faster than with filters. The cost of the
# products is cubic in the side. On an H200, 64 images of 128 px take 2.1 ms instead of 2.7 ms; at 256 px, the times are
# equal (benchmarks/micro.py).
DENSE_SIDE = 256
DENSE_SIDE_ON_GPU = 128


def mirror_and_upsample(x: Tensor, taps: Tensor) -> Tensor:
    """Extend x [..., W] by reflection to one period of the mirrored signal and upsample it by 2, [..., 4W]."""
    W = x.shape[-1]
    x = F.pad(x, [0, W - 1, 0, 0], mode="reflect")
    x = F.pad(x, [3, 4, 0, 0], mode="reflect")  # [..., 2W + 6], with the margin of the filter
    return upfirdn2d(x, taps[None, :], up=(2, 1), padding=(0, -1, 0, 0), gain=2)


def downsample(x: Tensor, taps: Tensor) -> Tensor:
    """Downsample a canvas x [..., 2W + 12] by 2 to [..., W]."""
    return upfirdn2d(x, taps[None, :], down=(2, 1), padding=(-1, -1, 0, 0), flip_filter=True)


class GeometryStage(AugmentStage):
    """Pixel blitting and general geometric transforms, combined into one affine map per image.

    The image is extended by infinite reflection, upsampled by 2 with the sym6 low-pass filter, warped with bilinear
    interpolation and downsampled with the same filter, which avoids blur and aliasing. The identity map leaves the
    image unchanged. Because the filter is not symmetric, flips and rotations by 90 degrees are close to, but not
    exactly, permutations of the pixels.
    """

    groups = groups_of(GEOMETRY)
    is_deterministic = False  # the backward pass of grid_sample accumulates gradients in arbitrary order
    taps: Tensor
    up_x: Tensor
    up_y: Tensor
    down_x: Tensor
    down_y: Tensor

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        H, W = self.size
        if min(H, W) < 3:
            raise ConfigError("pipe", pipe, f"images of {H}x{W} are too small to warp: the minimum is 3x3; use 'color'")
        self.transforms = [t for t in GEOMETRY if t.group in self.active]
        taps = torch.tensor(SYM6, dtype=torch.float64)
        taps = taps / taps.sum()
        self.register_buffer("taps", taps, persistent=False)
        if max(H, W) <= DENSE_SIDE:  # apply the operators to the identity to get their matrices
            for axis, size in (("x", W), ("y", H)):
                unit, canvas = (torch.eye(n, dtype=torch.float64)[None, None] for n in (size, 2 * size + 12))
                self.register_buffer(f"up_{axis}", mirror_and_upsample(unit, taps)[0, 0], persistent=False)
                self.register_buffer(f"down_{axis}", downsample(canvas, taps)[0, 0], persistent=False)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return A [B, 3, 3], the map from output to input coordinates: the product of the inverses, in order."""
        return reduce(product, draw_matrices(self.transforms, len(images), p, self.size, like=images))

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        points = self.sample_points(values)
        if max(self.size) <= (DENSE_SIDE_ON_GPU if images.is_cuda else DENSE_SIDE):
            up_x, up_y, down_x, down_y = (
                matrix.to(images.dtype) for matrix in (self.up_x, self.up_y, self.down_x, self.down_y)
            )
            x = up_y.mT @ (images @ up_x)  # (B, C, 4H, 4W)
            x = grid_sample(x, points)  # (B, C, 2H+12, 2W+12)
            return down_y.mT @ (x @ down_x)  # (B, C, H, W)
        taps = self.taps.to(images.dtype)
        x = mirror_and_upsample(mirror_and_upsample(images, taps).mT, taps).mT  # (B, C, 4H, 4W)
        x = grid_sample(x, points)  # (B, C, 2H+12, 2W+12)
        return downsample(downsample(x, taps).mT, taps).mT  # (B, C, H, W)

    def sample_points(self, A: Tensor) -> Tensor:
        """Return the sampling position of each canvas pixel in the upsampled period, [B, 2H+12, 2W+12, 2] in [-1, 1].

        The canvas is the output at twice its resolution, with a margin of 6 pixels on each side for the downsampling
        filter. The offsets by one half compensate for the delay of the sym6 filter.
        """
        H, W = self.size
        x = (torch.arange(2 * W + 12, dtype=A.dtype, device=A.device) - W - 5) / 2
        y = (torch.arange(2 * H + 12, dtype=A.dtype, device=A.device)[:, None] - H - 5) / 2
        a, b, c, d, e, f = A[:, :2].reshape(-1, 6, 1, 1).unbind(1)  # (B, 1, 1) each
        column = 2 * (a * x + b * y + c) + (W - 1)  # (B, 2H+12, 2W+12), an index in the upsampled image
        row = 2 * (d * x + e * y + f) + (H - 1)
        column = column.remainder(4 * (W - 1))  # the mirrored image is periodic
        row = row.remainder(4 * (H - 1))
        return torch.stack([(column + 0.5) / (2 * W) - 1, (row + 0.5) / (2 * H) - 1], dim=-1)


class ColorStage(AugmentStage):
    """Colour transforms, combined into one affine map per image; an alpha channel is not transformed."""

    groups = groups_of(COLOR)

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        if self.channels not in (1, 3, 4):
            problem = f"colour transforms need 1, 3 or 4 channels, but the images have {self.channels}; use 'bg'"
            raise ConfigError("pipe", pipe, problem)
        self.transforms = [t for t in COLOR if t.group in self.active and (self.channels >= 3 or not t.rgb_only)]

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the colour map K [B, 4, 4] on (r, g, b, 1); later transforms are multiplied on the left."""
        matrices = draw_matrices(self.transforms, len(images), p, self.size, like=images)
        return reduce(lambda K, matrix: product(matrix, K), matrices)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        linear, offset = values[:, :3, :3], values[:, :3, 3:]
        if self.channels == 1:  # average over the output channels for input r = g = b
            linear, offset = linear.sum(dim=2).mean(dim=1)[:, None, None], offset.mean(dim=1, keepdim=True)
        colors = images[:, :3].flatten(2)  # (B, 3 or 1, HW)
        colors = torch.baddbmm(offset, linear, colors).unflatten(2, self.size)
        return torch.cat([colors, images[:, 3:]], dim=1)  # (B, C, H, W)


def filter_bank() -> Tensor:
    """Return four band-pass filters [4, 43] of the sym2 wavelet, lowest band first, whose sum is a delta.

    Let L and M be half the autocorrelations of the low-pass filter h and the high-pass filter g[k] = (-1)^k h[k], so
    that L + M is a delta. Each of three steps dilates all bands by 2, convolves them with L, and adds M as the next
    band.
    """
    h = np.array([-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025])
    g = h * [1, -1, 1, -1]
    low, high = np.convolve(h, h[::-1]) / 2, np.convolve(g, g[::-1]) / 2  # (7,) each
    bank = np.eye(4, 1)
    for band in (1, 2, 3):
        taps = 2 * bank.shape[1] - 1
        stretched = np.zeros([4, taps])
        stretched[:, ::2] = bank
        bank = np.stack([np.convolve(row, low) for row in stretched])  # (4, taps + 6)
        margin = (taps - 1) // 2
        bank[band, margin : margin + len(high)] += high
    return torch.from_numpy(bank)


class FilterStage(AugmentStage):
    """Image-space filtering with random gains of four frequency bands, preserving the expected power of images."""

    groups = ("filter",)
    is_deterministic = False  # the backward pass of reflection padding is nondeterministic
    bank: Tensor
    power: Tensor

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        self.register_buffer("bank", filter_bank(), persistent=False)
        # Expected power of each band, assuming a 1/f spectrum.
        self.register_buffer("power", torch.tensor([10, 1, 1, 1], dtype=torch.float64) / 13, persistent=False)
        self.radius = self.bank.shape[1] // 2
        if min(self.size) <= self.radius:
            H, W = self.size
            problem = f"filters need at least {self.radius + 1} pixels per side, but the images are {H}x{W}; use 'bgc'"
            raise ConfigError("pipe", pipe, problem)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the gains of the bands [B, 4]."""
        B = len(images)
        u = torch.rand([B, 4], dtype=images.dtype, device=images.device)
        n = torch.randn([B, 4], dtype=images.dtype, device=images.device)
        return self.gains(torch.where(u < p, n, 0).exp2())

    def gains(self, t: Tensor) -> Tensor:
        """Return t / prod_i sqrt(1 + power_i (t_i^2 - 1)) for the amplifications t [B, 4] of the bands.

        The factors are the root mean square of a natural image after amplification of band i alone.
        """
        power = self.power.to(t.dtype)
        return t / (1 + power * (t.square() - 1)).sqrt().prod(dim=1, keepdim=True)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        B, C, H, W = images.shape
        taps = (values @ self.bank.to(values.dtype)).repeat_interleave(C, dim=0)  # (BC, 43)
        x = F.pad(images, [self.radius] * 4, mode="reflect").reshape(1, B * C, H + 2 * self.radius, -1)
        x = F.conv2d(x, taps[:, None, None, :], groups=B * C)  # (1, BC, H+42, W)
        x = F.conv2d(x, taps[:, None, :, None], groups=B * C)  # (1, BC, H, W)
        return x.reshape(B, C, H, W)


class NoiseStage(AugmentStage):
    """Additive white Gaussian noise with a standard deviation of 0.1 |N| per image."""

    groups = ("noise",)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the noise [B, C, H, W]."""
        u = torch.rand([len(images), 1, 1, 1], dtype=images.dtype, device=images.device)
        sigma = 0.1 * torch.randn_like(u).abs()
        return torch.where(u < p, sigma, 0) * torch.randn_like(images)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        return images + values


class CutoutStage(AugmentStage):
    """Cutout of a rectangle of half the image height and width, which may be partly outside the image."""

    groups = ("cutout",)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the rectangles [B, 3]: centre x, centre y, half the side (0.25 or 0), relative to the image size."""
        u = torch.rand([len(images), 3], dtype=images.dtype, device=images.device)
        radius = torch.where(u[:, 2:] < p, 0.25, 0.0).to(images.dtype)
        return torch.cat([u[:, :2], radius], dim=1)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        H, W = self.size
        center_x, center_y, radius = values[:, :, None].unbind(1)  # (B, 1) each
        x = (torch.arange(W, dtype=values.dtype, device=values.device) + 0.5) / W
        y = (torch.arange(H, dtype=values.dtype, device=values.device) + 0.5) / H
        columns = (x - center_x).abs() < radius  # (B, W)
        rows = (y - center_y).abs() < radius  # (B, H)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


# In order of execution.
STAGES: tuple[type[AugmentStage], ...] = (GeometryStage, ColorStage, FilterStage, NoiseStage, CutoutStage)
