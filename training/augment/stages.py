"""The transforms of adaptive discriminator augmentation, and the five stages that apply them.

Karras et al. 2020b, "Training generative adversarial networks with limited data", appendix B.

A stage splits its work in two: `draw` turns random numbers into one neutral or active value per image, `transform` is
a deterministic function of images and values. So any transform can be forced, in a test or for a picture:

    ColorStage("color", (3, 32, 32)).transform(images, contrast(u, n, (32, 32)))

To add a geometric or a colour transform, write its matrix as a function and give it a row in GEOMETRY or COLOR, with a
group of its own, and add a pipe that names the group to PIPES: pipes that do not name it stay what they are, to the
last draw. To add another kind, write a AugmentStage and give it a place in STAGES.

Randomness comes from torch's global generators, in the same number of draws whatever fires; nothing here waits for the
device.
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

# What `--augpipe` may say, and the groups of transforms that it switches on.
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
    """A transform that is a matrix per image.

    `matrix(u, n, size)` makes the matrices [B, k, k] from uniform draws u [2, B] in [0, 1) and standard normal draws
    n [2, B]; `chance(p)` is the probability that it fires; without RGB channels the `rgb_only` ones are left out.
    """

    name: str
    group: str
    matrix: MatrixFunction
    chance: Callable[[Tensor], Tensor] = lambda p: p
    rgb_only: bool = False


def groups_of(transforms: Sequence[MatrixTransform]) -> tuple[str, ...]:
    """Return the groups of transforms, each once."""
    return tuple(dict.fromkeys(transform.group for transform in transforms))


def draw_matrices(
    transforms: Sequence[MatrixTransform], B: int, p: Tensor, size: Size, like: Tensor
) -> tuple[Tensor, ...]:
    """Draw the matrices [B, k, k] of each transform for B images, of the type and on the device of `like`."""
    T = len(transforms)
    u = torch.rand([T, 3, B], dtype=like.dtype, device=like.device)
    n = torch.randn([T, 2, B], dtype=like.dtype, device=like.device)
    return gate_matrices(transforms, u, n, p, size)


def gate_matrices(
    transforms: Sequence[MatrixTransform], u: Tensor, n: Tensor, p: Tensor, size: Size
) -> tuple[Tensor, ...]:
    """Return the transforms' matrices [B, k, k] for draws u [T, 3, B], n [T, 2, B]; the identity where u[:, 2] >= p."""
    matrices = torch.stack([t.matrix(u[i, :2], n[i], size) for i, t in enumerate(transforms)])  # (T, B, k, k)
    chances = torch.stack([t.chance(p) for t in transforms])  # (T,)
    fires = u[:, 2] < chances[:, None]  # (T, B)
    neutral = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(fires[..., None, None], matrices, neutral).unbind(0)


def stack_matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Assemble square matrices [B, k, k] from rows of entries: tensors [B] or numbers."""
    numbers = {entry for row in rows for entry in row if not isinstance(entry, Tensor)}
    constants = {number: torch.full_like(like, number) for number in numbers}
    entries = [entry if isinstance(entry, Tensor) else constants[entry] for row in rows for entry in row]
    return torch.stack(entries, dim=-1).reshape(-1, len(rows), len(rows))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices [B, k, k] in full precision: matmul could be set to TF32, too coarse for pixel coordinates."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# Geometry: the inverse of each transform, 3x3 on (x, y, 1), in pixels from the image centre, x right and y down.


def diagonal(x: Tensor, y: Tensor) -> Tensor:
    return stack_matrix([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], like=x)


def translation(x: Tensor, y: Tensor) -> Tensor:
    return stack_matrix([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], like=x)


def rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return stack_matrix([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], like=angle)


def xflip(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Mirror left and right in half of the cases."""
    sign = 1 - 2 * (2 * u[0]).floor()
    return diagonal(sign, torch.ones_like(sign))


def rotate90(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Rotate by 0, 90, 180 or 270 degrees."""
    return rotation((4 * u[0]).floor() * (pi / 2))


def xint(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Shift by whole pixels, up to an eighth of the image along each axis."""
    H, W = size
    t = (2 * u - 1) * 0.125  # (2, B)
    return translation(-(t[0] * W).round(), -(t[1] * H).round())


def scale(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Enlarge by 2^(0.2 N)."""
    shrink = (-0.2 * n[0]).exp2()
    return diagonal(shrink, shrink)


def rotate(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Rotate by any angle."""
    return rotation((2 * u[0] - 1) * pi)


def aniso(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Stretch x by 2^(0.2 N) and shrink y by as much."""
    stretch = (0.2 * n[0]).exp2()
    return diagonal(1 / stretch, stretch)


def xfrac(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Shift by 0.125 N of the image along each axis."""
    H, W = size
    t = 0.125 * n  # (2, B)
    return translation(-t[0] * W, -t[1] * H)


def rotation_chance(p: Tensor) -> Tensor:
    """The probability at which one or both of two rotations fire with probability p."""
    return 1 - (1 - p).clamp(0, 1).sqrt()


# In order of application: the image is flipped first and shifted by fractions last. Rotations before and after the
# anisotropic scaling let it act along any direction.
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
# Colour: 4x4 on (r, g, b, 1). v is the luma axis (1, 1, 1) / sqrt(3); what commutes with rotations about it by a third
# of a turn has circulant matrices.


def circulant(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return stack_matrix([[a, b, c, 0.0], [c, a, b, 0.0], [b, c, a, 0.0], [0.0, 0.0, 0.0, 1.0]], like=a)


def brightness(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Add 0.2 N to all channels."""
    t = 0.2 * n[0]
    return stack_matrix([[1.0, 0.0, 0.0, t], [0.0, 1.0, 0.0, t], [0.0, 0.0, 1.0, t], [0.0, 0.0, 0.0, 1.0]], like=t)


def contrast(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Multiply all channels by 2^(0.5 N)."""
    s = (0.5 * n[0]).exp2()
    return circulant(s, torch.zeros_like(s), torch.zeros_like(s))


def lumaflip(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Mirror the luma and keep the chroma, I - 2 v v^T, in half of the cases."""
    part = (2 * u[0]).floor() * (-2 / 3)
    return circulant(1 + part, part, part)


def hue(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Rotate about the luma axis by any angle."""
    angle = (2 * u[0] - 1) * pi
    even, odd = (1 - angle.cos()) / 3, angle.sin() / sqrt(3)
    return circulant(1 - 2 * even, even - odd, even + odd)


def saturation(u: Tensor, n: Tensor, size: Size) -> Tensor:
    """Multiply the chroma by 2^N: v v^T + 2^N (I - v v^T)."""
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
    """Something that happens to images of the shape (C, H, W), in two parts: draws, and what follows from them."""

    is_deterministic: ClassVar[bool] = True  # on CUDA, with its derivatives

    def __init__(self, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.channels, *size = img_shape
        self.size: Size = (size[0], size[1])

    @abstractmethod
    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Draw a value for each of the images [B, C, H, W], the neutral one with probability 1 - p."""

    @abstractmethod
    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        """Apply the values [B, ...], one for each of the images [B, C, H, W]."""

    def forward(self, images: Tensor, p: Tensor) -> Tensor:
        return self.transform(images, self.draw(images, p))


class AugmentStage(Transform):
    """A part of the pipeline, used when one of its `groups` is on.

    Built from the pipe's name and the shape (C, H, W) of the images; raises ConfigError when it cannot treat them.
    """

    groups: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(img_shape)
        self.active = [group for group in self.groups if group in PIPES[pipe]]


# Low-pass filter of the sym6 wavelet; divided by its sum below.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)  # fmt: skip

# Up to this side, products with dense matrices resample faster than filters do; their cost grows with its cube. On a
# GPU benchmarks/micro.py measures it: an H200 takes 2.1 ms instead of 2.7 for 64 images at 128 px, and as long at 256.
DENSE_SIDE = 256
DENSE_SIDE_ON_GPU = 128


def mirror_and_upsample(x: Tensor, taps: Tensor) -> Tensor:
    """Mirror x [..., W] at its last pixel, which makes a period of the mirrored image, and upsample it: [..., 4W]."""
    W = x.shape[-1]
    x = F.pad(x, [0, W - 1, 0, 0], mode="reflect")
    x = F.pad(x, [3, 4, 0, 0], mode="reflect")  # [..., 2W + 6], what the filter reaches
    return upfirdn2d(x, taps[None, :], up=(2, 1), padding=(0, -1, 0, 0), gain=2)


def downsample(x: Tensor, taps: Tensor) -> Tensor:
    """Downsample a canvas x [..., 2W + 12] to [..., W]."""
    return upfirdn2d(x, taps[None, :], down=(2, 1), padding=(-1, -1, 0, 0), flip_filter=True)


class GeometryStage(AugmentStage):
    """Pixel blitting and general geometric transforms, all as one affine map per image.

    The image continues beyond its border by reflection, without end. It is resampled at twice its resolution between
    an upsampling and a downsampling by the sym6 low-pass filter, with bilinear interpolation, so that the warp neither
    blurs nor aliases; where the map is the identity, so is the warp. The filter is not symmetric: flips and quarter
    turns are close to, not exactly, those of the pixels.
    """

    groups = groups_of(GEOMETRY)
    is_deterministic = False  # grid_sample adds up gradients in no fixed order
    taps: Tensor
    up_x: Tensor
    up_y: Tensor
    down_x: Tensor
    down_y: Tensor

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        H, W = self.size
        if min(H, W) < 3:
            raise ConfigError("pipe", pipe, f"images of {H}x{W} are too small to warp: 3x3 is the least; use 'color'")
        self.transforms = [t for t in GEOMETRY if t.group in self.active]
        taps = torch.tensor(SYM6, dtype=torch.float64)
        taps = taps / taps.sum()
        self.register_buffer("taps", taps, persistent=False)
        if max(H, W) <= DENSE_SIDE:  # the rows of an operator's matrix are what it makes of the rows of the identity
            for axis, size in (("x", W), ("y", H)):
                unit, canvas = (torch.eye(n, dtype=torch.float64)[None, None] for n in (size, 2 * size + 12))
                self.register_buffer(f"up_{axis}", mirror_and_upsample(unit, taps)[0, 0], persistent=False)
                self.register_buffer(f"down_{axis}", downsample(canvas, taps)[0, 0], persistent=False)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return A [B, 3, 3], the map from output to input coordinates: each transform's inverse joins on the right."""
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
        """Return where in the upsampled period each pixel of the canvas looks, [B, 2H+12, 2W+12, 2] in [-1, 1].

        The canvas is the output at twice its resolution with 6 more pixels on each side for the last filter. The
        halves are the delay of the sym6 filter.
        """
        H, W = self.size
        x = (torch.arange(2 * W + 12, dtype=A.dtype, device=A.device) - W - 5) / 2
        y = (torch.arange(2 * H + 12, dtype=A.dtype, device=A.device)[:, None] - H - 5) / 2
        a, b, c, d, e, f = A[:, :2].reshape(-1, 6, 1, 1).unbind(1)  # (B, 1, 1) each
        column = 2 * (a * x + b * y + c) + (W - 1)  # (B, 2H+12, 2W+12), an index in the upsampled image
        row = 2 * (d * x + e * y + f) + (H - 1)
        column = column.remainder(4 * (W - 1))  # the mirrored image repeats
        row = row.remainder(4 * (H - 1))
        return torch.stack([(column + 0.5) / (2 * W) - 1, (row + 0.5) / (2 * H) - 1], dim=-1)


class ColorStage(AugmentStage):
    """Colour transforms, all as one affine map of the colours per image; alpha stays as it is."""

    groups = groups_of(COLOR)

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        if self.channels not in (1, 3, 4):
            problem = f"colour transforms need 1, 3 or 4 channels, the images have {self.channels}; use 'bg'"
            raise ConfigError("pipe", pipe, problem)
        self.transforms = [t for t in COLOR if t.group in self.active and (self.channels >= 3 or not t.rgb_only)]

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return K [B, 4, 4], the map of (r, g, b, 1): each transform joins on the left."""
        matrices = draw_matrices(self.transforms, len(images), p, self.size, like=images)
        return reduce(lambda K, matrix: product(matrix, K), matrices)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        linear, offset = values[:, :3, :3], values[:, :3, 3:]
        if self.channels == 1:  # the mean over what would become of r = g = b
            linear, offset = linear.sum(dim=2).mean(dim=1)[:, None, None], offset.mean(dim=1, keepdim=True)
        colors = images[:, :3].flatten(2)  # (B, 3 or 1, HW)
        colors = torch.baddbmm(offset, linear, colors).unflatten(2, self.size)
        return torch.cat([colors, images[:, 3:]], dim=1)  # (B, C, H, W)


def filter_bank() -> Tensor:
    """Return four band-pass filters [4, 43] that add up to a delta, the lowest band first, from the sym2 wavelet.

    With low-pass h, high-pass g[k] = (-1)^k h[k] and their autocorrelations L and M (halved, so that L + M is a delta):
    each of three steps stretches all bands to half their frequencies, passes them through L, and starts the next band
    with M.
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
    """Amplify or weaken four frequency bands, while the expected power of a natural image stays the same."""

    groups = ("filter",)
    is_deterministic = False  # nor does padding by reflection
    bank: Tensor
    power: Tensor

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        self.register_buffer("bank", filter_bank(), persistent=False)
        # The bands' share of the power of a 1/f spectrum.
        self.register_buffer("power", torch.tensor([10, 1, 1, 1], dtype=torch.float64) / 13, persistent=False)
        self.radius = self.bank.shape[1] // 2
        if min(self.size) <= self.radius:
            H, W = self.size
            problem = f"image filters need at least {self.radius + 1} pixels a side, the images have {H}x{W}; use 'bgc'"
            raise ConfigError("pipe", pipe, problem)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the bands' gains [B, 4]."""
        B = len(images)
        u = torch.rand([B, 4], dtype=images.dtype, device=images.device)
        n = torch.randn([B, 4], dtype=images.dtype, device=images.device)
        return self.gains(torch.where(u < p, n, 0).exp2())

    def gains(self, t: Tensor) -> Tensor:
        """Normalise the bands' amplifications t [B, 4]: each t_i by the power that it alone would lend the image."""
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
    """Add white noise; its standard deviation is 0.1 |N| for each image."""

    groups = ("noise",)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the noise [B, C, H, W]."""
        u = torch.rand([len(images), 1, 1, 1], dtype=images.dtype, device=images.device)
        sigma = 0.1 * torch.randn_like(u).abs()
        return torch.where(u < p, sigma, 0) * torch.randn_like(images)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        return images + values


class CutoutStage(AugmentStage):
    """Set a rectangle of half the image's height and width to zero; a part of it may lie outside."""

    groups = ("cutout",)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the rectangles [B, 3]: centre x, centre y, and half the side, 0.25 or 0, in units of the image."""
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
