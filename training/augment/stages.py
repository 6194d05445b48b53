"""Transforms of adaptive discriminator augmentation, and the four stages that apply them.

Karras et al. 2020b, "Training generative adversarial networks with limited data", appendix B.

A stage has two parts: `draw` samples the parameters of each image, the identity with probability 1 - p, and `transform`
is a deterministic function of images and parameters. A test or figure can therefore choose the parameters:

    FilterStage("filter", (3, 32, 32)).transform(images, gains)

A geometric or colour transform is a random affine map of coordinates or colours, a 4x4 matrix. The matrices of all
transforms and images are built together, in a number of kernel launches that does not depend on the transforms.

To add a geometric or colour transform, write a function that returns its RandomMatrix, add a row with a new group to
GEOMETRY or COLOR, and add a pipe with that group to PIPES. Existing pipes are unaffected, including their random draws.
To add another kind of transform, write an AugmentStage and insert it into STAGES.

Random numbers come from torch's global RNGs. The number of draws does not depend on their values, and no operation
synchronizes with the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import pi, sqrt
from typing import Any, ClassVar

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
    "bgcc": ("blit", "geom", "color", "cutout"),  # R3GAN
}

Size = tuple[int, int]  # height and width of the images in pixels
Array = np.ndarray[Any, np.dtype[np.float64]]


# ----------------------------------------------------------------------------------------------------------------------
# Random matrices


@dataclass(frozen=True)
class Distribution:
    """Distribution of two independent parameters per image, start + scale * draw.

    The draws are standard normal if `is_normal`, else uniform in [0, 1). The parameters are rounded to multiples of
    `unit` (one per parameter), if given; halves are rounded to even multiples.
    """

    start: float
    scale: float
    unit: tuple[float, float] | None = None
    is_normal: bool = False


def uniform(low: float, high: float, unit: tuple[float, float] | None = None) -> Distribution:
    """Return uniform distributions in [low, high), rounded to multiples of `unit` if given."""
    return Distribution(low, high - low, unit)


def normal(std: float) -> Distribution:
    """Return normal distributions with mean 0."""
    return Distribution(0.0, std, is_normal=True)


FEATURES = ("x", "y", "2^x", "2^-x", "cos", "sin")  # of parameters x and y
AT_ZERO = np.array([0.0, 0, 1, 1, 1, 0])  # features of x = y = 0


@dataclass(frozen=True)
class RandomMatrix:
    """Random 4x4 matrix, a linear function of features of two parameters x and y.

        M = I + x T_x + y T_y + (2^x - 1) T_2^x + (2^-x - 1) T_2^-x + (cos x - 1) T_cos + sin x T_sin

    `terms` contains the matrices T by feature; missing ones are zero. M is the identity for x = y = 0.
    """

    parameters: Distribution
    terms: dict[str, Array]

    def by_feature(self) -> Array:
        """Return the matrices T [6, 16] of all features."""
        return np.stack([self.terms.get(name, np.zeros([4, 4])).flatten() for name in FEATURES])

    def constant(self) -> Array:
        """Return the part of M that does not depend on x and y [4, 4]."""
        return np.eye(4) - (AT_ZERO @ self.by_feature()).reshape(4, 4)


@dataclass(frozen=True)
class MatrixTransform:
    """Transform defined by one matrix per image, for images of a size.

    The transform is applied with probability strength (1 - (1 - p)^share). At strength 1, at least one of several
    transforms whose shares add up to 1 is therefore applied with probability p. Transforms with `rgb_only` are skipped
    for images without RGB channels.
    """

    name: str
    group: str
    matrix: Callable[[Size], RandomMatrix]
    share: float = 1.0
    strength: float = 1.0
    rgb_only: bool = False


def groups_of(transforms: Sequence[MatrixTransform]) -> tuple[str, ...]:
    """Return the distinct groups of the transforms, in order."""
    return tuple(dict.fromkeys(transform.group for transform in transforms))


IDENTITY = MatrixTransform("identity", "", lambda size: RandomMatrix(uniform(0, 0), {}))


class RandomMatrices(nn.Module):
    """Random matrices of sequences of transforms, and the product of each sequence, M_1 M_2 M_3 ...

    All sequences are extended by identities to the same length T, a power of two. The R = T * len(sequences) matrices
    are ordered by their position in the sequence, then by sequence. All computations are in float64, without matmul on
    float32, which may use TF32: too coarse for pixel coordinates.
    """

    start: Tensor
    scale: Tensor
    unit: Tensor
    is_rounded: Tensor
    is_normal: Tensor
    share: Tensor
    strength: Tensor
    terms: Tensor
    constant: Tensor

    def __init__(self, sequences: Sequence[Sequence[MatrixTransform]], size: Size) -> None:
        super().__init__()
        self.num_sequences = len(sequences)
        length = 1 << (max(map(len, sequences)) - 1).bit_length()
        padded = [[*sequence, *[IDENTITY] * (length - len(sequence))] for sequence in sequences]
        transforms = [*chain.from_iterable(zip(*padded, strict=True))]
        matrices = [transform.matrix(size) for transform in transforms]
        parameters = [matrix.parameters for matrix in matrices]
        units = np.array([p.unit or (1.0, 1.0) for p in parameters])[..., None]  # (R, 2, 1)
        constants = {
            "unit": units,
            "start": np.array([[[p.start]] for p in parameters]) / units,
            "scale": np.array([[[p.scale]] for p in parameters]) / units,
            "is_rounded": np.array([[[p.unit is not None]] for p in parameters]),
            "is_normal": np.array([[[p.is_normal]] for p in parameters]),
            "share": np.array([[transform.share] for transform in transforms]),
            "strength": np.array([[transform.strength] for transform in transforms]),
            "terms": np.stack([matrix.by_feature() for matrix in matrices]),  # (R, 6, 16)
            "constant": np.stack([matrix.constant().reshape(1, 16) for matrix in matrices]),
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(value), persistent=False)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return random products [B, len(sequences), 4, 4] for images [B, ...], with their dtype."""
        R, B = len(self.share), len(images)
        u = torch.rand([R, 3, B], dtype=images.dtype, device=images.device)
        n = torch.randn([R, 2, B], dtype=images.dtype, device=images.device)
        return self.products(self.matrices(u, n, p)).to(images.dtype)

    def matrices(self, u: Tensor, n: Tensor, p: Tensor) -> Tensor:
        """Return the matrices [R, B, 4, 4] for uniform draws u [R, 3, B] in [0, 1) and normal draws n [R, 2, B].

        A matrix is the identity where u[:, 2] >= strength (1 - (1 - p)^share).
        """
        chance = torch.addcmul(self.strength, self.strength, (1 - p) ** self.share, value=-1)  # (R, 1)
        is_applied = u[:, 2] < chance  # (R, B)
        parameters = torch.addcmul(self.start, self.scale, torch.where(self.is_normal, n, u[:, :2]))
        parameters = torch.where(self.is_rounded, parameters.round(), parameters)
        parameters = parameters * (self.unit * is_applied[:, None])  # (R, 2, B)
        x, y = parameters.unbind(1)
        power = x.exp2()
        features = torch.stack([x, y, power, 1 / power, x.cos(), x.sin()], dim=-1)  # (R, B, 6), as FEATURES
        return torch.baddbmm(self.constant, features, self.terms).unflatten(-1, (4, 4))

    def products(self, matrices: Tensor) -> Tensor:
        """Multiply matrices [R, B, 4, 4] to [B, len(sequences), 4, 4]."""
        x = matrices.unflatten(0, (-1, self.num_sequences))  # (T, sequences, B, 4, 4)
        while len(x) > 1:
            x = (x[0::2, ..., None] * x[1::2, ..., None, :, :]).sum(dim=-2)  # neighbours, all pairs at once
        return x[0].transpose(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Geometry: inverse transforms as maps of (x, y, 0, 1), in pixels from the image centre, x to the right and y down.


def entries(*positions: tuple[int, int]) -> Array:
    """Return the 4x4 matrix that is 1 at (row, column) `positions` and 0 elsewhere."""
    matrix = np.zeros([4, 4])
    matrix[tuple(np.transpose(positions))] = 1
    return matrix


PLANE = entries((0, 0), (1, 1))
QUARTER = entries((1, 0)) - entries((0, 1))  # rotation by 90 degrees
X_SHIFT, Y_SHIFT = entries((0, 3)), entries((1, 3))
ANY_ANGLE = uniform(-pi, pi)


def xflip(size: Size) -> RandomMatrix:
    """Horizontal flip with probability 1/2: x is multiplied by the cosine of 0 or pi."""
    return RandomMatrix(uniform(-pi / 2, 3 / 2 * pi, unit=(pi, pi)), {"cos": entries((0, 0))})


def rotate90(size: Size) -> RandomMatrix:
    """Rotation by 0, 90, 180 or 270 degrees."""
    return RandomMatrix(uniform(-pi / 4, 7 / 4 * pi, unit=(pi / 2, pi / 2)), {"cos": PLANE, "sin": QUARTER})


def xint(size: Size) -> RandomMatrix:
    """Translation by whole pixels, up to 1/8 of the image size along each axis."""
    H, W = size
    return RandomMatrix(uniform(-1 / 8, 1 / 8, unit=(1 / W, 1 / H)), {"x": -W * X_SHIFT, "y": -H * Y_SHIFT})


def scale(size: Size) -> RandomMatrix:
    """Isotropic scaling by 2^(0.2 N)."""
    return RandomMatrix(normal(0.2), {"2^-x": PLANE})


def rotate(size: Size) -> RandomMatrix:
    """Rotation by U(-pi, pi)."""
    return RandomMatrix(ANY_ANGLE, {"cos": PLANE, "sin": QUARTER})


def aniso(size: Size) -> RandomMatrix:
    """Anisotropic scaling: x by 2^(0.2 N), y by the reciprocal."""
    return RandomMatrix(normal(0.2), {"2^-x": entries((0, 0)), "2^x": entries((1, 1))})


def xfrac(size: Size) -> RandomMatrix:
    """Translation by 0.125 N times the image size along each axis."""
    H, W = size
    return RandomMatrix(normal(0.125), {"x": -W * X_SHIFT, "y": -H * Y_SHIFT})


# In order of application, from the flip to the fractional translation. The rotations before and after the anisotropic
# scaling make its direction random.
GEOMETRY = (
    MatrixTransform("xflip", "blit", xflip),
    MatrixTransform("rotate90", "blit", rotate90),
    MatrixTransform("xint", "blit", xint),
    MatrixTransform("scale", "geom", scale),
    MatrixTransform("rotate_pre", "geom", rotate, share=1 / 2),
    MatrixTransform("aniso", "geom", aniso),
    MatrixTransform("rotate_post", "geom", rotate, share=1 / 2),
    MatrixTransform("xfrac", "geom", xfrac),
)


# ----------------------------------------------------------------------------------------------------------------------
# Colour: maps of (r, g, b, 1). v = (1, 1, 1) / sqrt(3) is the luma axis.

RGB = entries((0, 0), (1, 1), (2, 2))
LUMA = np.outer([1, 1, 1, 0], [1, 1, 1, 0]) / 3  # v v^T
CHROMA = RGB - LUMA
HUE = (entries((1, 0), (2, 1), (0, 2)) - entries((0, 1), (1, 2), (2, 0))) / sqrt(3)  # cross product with v


def brightness(size: Size) -> RandomMatrix:
    """Brightness: add 0.2 N to all channels."""
    return RandomMatrix(normal(0.2), {"x": entries((0, 3), (1, 3), (2, 3))})


def contrast(size: Size) -> RandomMatrix:
    """Contrast: multiply all channels by 2^(0.5 N)."""
    return RandomMatrix(normal(0.5), {"2^x": RGB})


def lumaflip(size: Size) -> RandomMatrix:
    """Luma flip I - 2 v v^T, which preserves the chroma, with probability 1/2."""
    return RandomMatrix(uniform(-pi / 2, 3 / 2 * pi, unit=(pi, pi)), {"cos": LUMA})


def hue(size: Size) -> RandomMatrix:
    """Hue rotation about the luma axis by U(-pi, pi)."""
    return RandomMatrix(ANY_ANGLE, {"cos": CHROMA, "sin": HUE})


def saturation(size: Size) -> RandomMatrix:
    """Saturation: multiply the chroma by 2^N, v v^T + 2^N (I - v v^T)."""
    return RandomMatrix(normal(1.0), {"2^x": CHROMA})


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

    is_deterministic: bool = True  # forward and derivatives on CUDA

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

# Largest image side for which dense matrix products are faster than convolutions. The cost of the products is cubic in
# the side. On an H200, warping 64 images of 128 px takes 2.1 ms instead of 2.7 ms; at 256 px, the times are equal
# (benchmarks/micro.py).
DENSE_SIDE = 256
DENSE_SIDE_ON_GPU = 128  # of the warp


def mirror_and_upsample(x: Tensor, taps: Tensor) -> Tensor:
    """Extend x [..., W] by reflection to one period of the mirrored signal and upsample it by 2, [..., 4W]."""
    W = x.shape[-1]
    x = F.pad(x, [0, W - 1, 0, 0], mode="reflect")
    x = F.pad(x, [3, 4, 0, 0], mode="reflect")  # [..., 2W + 6], with the margin of the filter
    return upfirdn2d(x, taps[None, :], up=(2, 1), padding=(0, -1, 0, 0), gain=2)


def downsample(x: Tensor, taps: Tensor) -> Tensor:
    """Downsample a canvas x [..., 2W + 12] by 2 to [..., W]."""
    return upfirdn2d(x, taps[None, :], down=(2, 1), padding=(-1, -1, 0, 0), flip_filter=True)


class Constants(nn.Module):
    """Constant tensors, stored in float32 and in float64 because casting them costs one kernel launch per tensor."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.count = len(tensors)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"single{i}", tensor.float(), persistent=False)
            self.register_buffer(f"double{i}", tensor.double(), persistent=False)

    def forward(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors with a dtype, in order."""
        kind = "single" if dtype == torch.float32 else "double"
        return [getattr(self, f"{kind}{i}").to(dtype) for i in range(self.count)]


class Warp(nn.Module):
    """Warp of images [B, C, H, W] by one affine map per image.

    The image is extended by infinite reflection, upsampled by 2 with the sym6 low-pass filter, warped with bilinear
    interpolation and downsampled with the same filter, which avoids blur and aliasing. The identity map leaves the
    image unchanged. Because the filter is not symmetric, flips and rotations by 90 degrees are close to, but not
    exactly, permutations of the pixels.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        H, W = size
        taps = torch.tensor(SYM6, dtype=torch.float64)
        taps = taps / taps.sum()
        self.taps = Constants(taps)
        if max(H, W) <= DENSE_SIDE:  # apply the operators to the identity to get their matrices
            units = [torch.eye(n, dtype=torch.float64)[None, None] for n in (W, H)]
            canvases = [torch.eye(2 * n + 12, dtype=torch.float64)[None, None] for n in (W, H)]
            self.matrices = Constants(
                *(mirror_and_upsample(unit, taps)[0, 0] for unit in units),
                *(downsample(canvas, taps)[0, 0] for canvas in canvases),
            )
        sides = torch.tensor([W, H], dtype=torch.float64)[:, None, None]
        x, y = torch.arange(2 * W + 12) - W - 5, torch.arange(2 * H + 12) - H - 5
        self.grid = Constants(x, y[:, None], sides - 1, 4 * (sides - 1), 2 * sides - 0.5, 2 * sides)

    def forward(self, images: Tensor, A: Tensor) -> Tensor:
        """Warp images by A [B, 4, 4], the maps of (x, y, 0, 1) from output to input coordinates."""
        points = self.sample_points(A)
        if max(self.size) <= (DENSE_SIDE_ON_GPU if images.is_cuda else DENSE_SIDE):
            up_x, up_y, down_x, down_y = self.matrices(images.dtype)
            x = up_y.mT @ (images @ up_x)  # (B, C, 4H, 4W)
            x = grid_sample(x, points)  # (B, C, 2H+12, 2W+12)
            return down_y.mT @ (x @ down_x)  # (B, C, H, W)
        (taps,) = self.taps(images.dtype)
        x = mirror_and_upsample(mirror_and_upsample(images, taps).mT, taps).mT  # (B, C, 4H, 4W)
        x = grid_sample(x, points)  # (B, C, 2H+12, 2W+12)
        return downsample(downsample(x, taps).mT, taps).mT  # (B, C, H, W)

    def sample_points(self, A: Tensor) -> Tensor:
        """Return the sampling position of each canvas pixel in the upsampled period, [B, 2H+12, 2W+12, 2] in [-1, 1].

        The canvas is the output at twice its resolution, with a margin of 6 pixels on each side for the downsampling
        filter. In coordinates relative to the image centre, its pixels are at (x / 2, y / 2); x and y are offset by one
        half to compensate for the delay of the sym6 filter.
        """
        x, y, center, period, middle, radius = self.grid(A.dtype)  # the last four are for columns and rows, [2, 1, 1]
        by_x, by_y, _, shift = A[:, :2, :, None, None].unbind(2)  # (B, 2, 1, 1)
        index = torch.add(center, shift, alpha=2)
        index = index.addcmul(by_y, y).addcmul(by_x, x)  # (B, 2, 2H+12, 2W+12), in the upsampled image
        index = index.remainder(period)  # the mirrored image is periodic
        return ((index - middle) / radius).permute(0, 2, 3, 1)


def recolor(images: Tensor, K: Tensor) -> Tensor:
    """Map the colours of images [B, C, H, W] by K [B, 4, 4], which acts on (r, g, b, 1).

    C is 1, 3 or 4. An alpha channel is not changed. Grey images are mapped as r = g = b, averaged over the output.
    """
    if images.shape[1] == 4:
        return torch.cat([recolor(images[:, :3], K), images[:, 3:]], dim=1)
    linear, offset = K[:, :3, :3], K[:, :3, 3:]
    if images.shape[1] == 1:
        linear, offset = linear.sum(dim=2).mean(dim=1)[:, None, None], offset.mean(dim=1, keepdim=True)
    return torch.baddbmm(offset, linear, images.flatten(2)).view_as(images)


class AffineStage(AugmentStage):
    """Geometric and colour transforms, combined into one affine map of coordinates and one of colours per image.

    `colors` are the colour transforms to choose from, None: COLOR. Their probabilities are multiplied by
    `color_strength`.
    """

    groups = groups_of((*GEOMETRY, *COLOR))

    def __init__(
        self,
        pipe: str,
        img_shape: tuple[int, int, int],
        colors: Sequence[MatrixTransform] | None = None,
        *,
        color_strength: float = 1.0,
    ) -> None:
        super().__init__(pipe, img_shape)
        self.geometry = [t for t in GEOMETRY if t.group in self.active]
        colors = [t for t in colors or COLOR if t.group in self.active and (self.channels >= 3 or not t.rgb_only)]
        self.color = [replace(t, strength=color_strength * t.strength) for t in colors]
        H, W = self.size
        if self.geometry and min(H, W) < 3:
            raise ConfigError("pipe", pipe, f"images of {H}x{W} are too small to warp: the minimum is 3x3; use 'color'")
        if self.color and self.channels not in (1, 3, 4):
            problem = f"colour transforms need 1, 3 or 4 channels, but the images have {self.channels}; use 'bg'"
            raise ConfigError("pipe", pipe, problem)
        self.is_deterministic = not self.geometry  # grid_sample's derivative adds gradients in arbitrary order
        # The maps from output to input coordinates are inverses, so their order is reversed compared to the colours.
        self.random_matrices = RandomMatrices([self.geometry, self.color[::-1]], self.size)
        self.warp = Warp(self.size) if self.geometry else None

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return maps [B, 2, 4, 4]: from output to input coordinates (x, y, 0, 1), and of colours (r, g, b, 1)."""
        return self.random_matrices.draw(images, p)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        A, K = values.unbind(1)
        if self.warp is not None:
            images = self.warp(images, A)
        return recolor(images, K) if self.color else images


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
    is_deterministic = False  # for large images, the backward pass of reflection padding is nondeterministic

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        bank = filter_bank()
        power = torch.tensor([10, 1, 1, 1], dtype=torch.float64) / 13  # of each band, expected for a 1/f spectrum
        self.constants = Constants(bank, 1 - power, power)
        self.radius = bank.shape[1] // 2
        if min(self.size) <= self.radius:
            H, W = self.size
            problem = f"filters need at least {self.radius + 1} pixels per side, but the images are {H}x{W}; use 'bgc'"
            raise ConfigError("pipe", pipe, problem)
        if max(self.size) <= DENSE_SIDE:
            self.matrices = Constants(*(self.band_matrices(bank, side) for side in self.size))

    def band_matrices(self, bank: Tensor, side: int) -> Tensor:
        """Return the matrix of each band for rows of `side` pixels, flattened [4, side^2]."""
        rows = F.pad(torch.eye(side, dtype=bank.dtype)[:, None], [self.radius] * 2, mode="reflect")
        return F.conv1d(rows, bank[:, None]).transpose(0, 1).flatten(1)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the gains of the bands [B, 4]."""
        B = len(images)
        u = torch.rand([B, 4], dtype=images.dtype, device=images.device)
        n = torch.randn([B, 4], dtype=images.dtype, device=images.device)
        return self.gains((n * (u < p)).exp2())

    def gains(self, t: Tensor) -> Tensor:
        """Return t / prod_i sqrt(1 + power_i (t_i^2 - 1)) for the amplifications t [B, 4] of the bands.

        The factors are the root mean square of a natural image after amplification of band i alone.
        """
        _, rest, power = self.constants(t.dtype)
        return t / torch.addcmul(rest, power, t.square()).sqrt().prod(dim=1, keepdim=True)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        B, C, H, W = images.shape
        if max(self.size) <= DENSE_SIDE:
            by_column, by_row = self.matrices(values.dtype)
            x = (images.flatten(1, 2) @ (values @ by_row).view(B, W, W)).view_as(images)
            return (values @ by_column).view(B, 1, H, H).mT @ x
        bank, *_ = self.constants(values.dtype)
        taps = (values @ bank).repeat_interleave(C, dim=0)  # (BC, 43)
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
        sigma = 0.1 * torch.randn_like(u) * (u < p)  # the sign does not matter
        return sigma * torch.randn_like(images)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        return images + values


class CutoutStage(AugmentStage):
    """Cutout of a rectangle of half the image height and width, which may be partly outside the image."""

    groups = ("cutout",)

    def __init__(self, pipe: str, img_shape: tuple[int, int, int]) -> None:
        super().__init__(pipe, img_shape)
        self.centers = Constants(*((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in self.size))

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the rectangles [B, 3]: centre x, centre y, half the side (0.25 or 0), relative to the image size."""
        u = torch.rand([len(images), 3], dtype=images.dtype, device=images.device)
        return torch.cat([u[:, :2], 0.25 * (u[:, 2:] < p)], dim=1)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        center_x, center_y, radius = values[:, :, None].unbind(1)  # (B, 1) each
        y, x = self.centers(values.dtype)
        columns = (x - center_x).abs() < radius  # (B, W)
        rows = (y - center_y).abs() < radius  # (B, H)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


# In order of execution.
STAGES: tuple[type[AugmentStage], ...] = (AffineStage, FilterStage, NoiseStage, CutoutStage)
