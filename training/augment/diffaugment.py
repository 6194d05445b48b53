"""DiffAugment: differentiable transforms of real and generated images, with parameters drawn per image.

Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training". The paper applies every transform to
every image; the probabilities of individual transforms follow the training setup of TransGAN (Jiang et al. 2021). As in
stages.py, a transform consists of `draw` (random parameters) and `transform` (a deterministic, twice differentiable
function of images and parameters). The number and shape of the random draws do not depend on their values. In this
mode, the p of the pipe is always 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dnnlib.config import ConfigError
from training.augment.stages import COLOR, AffineStage, Constants, FilterStage, Transform
from training.networks import execution

ImgShape = tuple[int, int, int]  # channels, height, width


class DiffColor(Transform):
    """Random brightness, saturation and contrast, in this order.

        x <- x + b                  b ~ U(-0.5, 0.5)
        x <- m_c + s (x - m_c)      s ~ U(0, 2),       m_c: mean over the channels
        x <- m + t (x - m)          t ~ U(0.5, 1.5),   m: mean over the image

    Saturation leaves one-channel images unchanged. A fourth (alpha) channel is not transformed.
    """

    def __init__(self, img_shape: ImgShape) -> None:
        super().__init__(img_shape)
        self.ranges = Constants(torch.tensor([-0.5, 0, 0.5]), torch.tensor([1, 2, 1]))  # low, high - low

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return b, s and t [B, 3]."""
        u = torch.rand([len(images), 3], dtype=images.dtype, device=images.device)
        low, width = self.ranges(images.dtype)
        return torch.addcmul(low, width, u)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        if images.shape[1] == 4:
            return torch.cat([self.transform(images[:, :3], values), images[:, 3:]], dim=1)
        brightness, saturation, contrast = values[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
        x = images + brightness
        x = x.mean(dim=1, keepdim=True).lerp(x, saturation)
        return x.mean(dim=(1, 2, 3), keepdim=True).lerp(x, contrast)  # (B, C, H, W)


class DiffTranslation(Transform):
    """Translation by whole pixels, up to `ratio` times the image size along each axis, with zero padding."""

    y: Tensor
    x: Tensor

    def __init__(self, img_shape: ImgShape, ratio: float = 0.125) -> None:
        super().__init__(img_shape)
        self.ratio = ratio
        for name, size in zip("yx", self.size, strict=True):
            self.register_buffer(name, torch.arange(size), persistent=False)

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the shifts down and to the right [B, 2]."""
        limits = [_rounded(self.ratio * size) for size in self.size]
        steps = [torch.randint(-limit, limit + 1, [len(images)], device=images.device) for limit in limits]
        return torch.stack(steps, dim=1)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        H, W = self.size
        down, right = values[:, :, None].unbind(1)  # (B, 1) each
        y, x = self.y - down, self.x - right  # source of each pixel, (B, H) and (B, W)
        row, column = y.clamp(0, H - 1), x.clamp(0, W - 1)
        is_inside = (y == row)[:, :, None] & (x == column)[:, None, :]  # (B, H, W)
        source = torch.add(column[:, None, :], row[:, :, None], alpha=W).view(-1, 1, H * W)
        moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1))  # (B, C, HW)
        return moved.view_as(images) * is_inside[:, None]


def _rounded(x: float) -> int:
    """Round x >= 0 to the nearest integer, with halves rounded up."""
    return int(x + 0.5)


class DiffCutout(Transform):
    """Cutout of a rectangle of half the image height and width, at a random position; its pixels are set to zero.

    The centre of the rectangle is inside the image, but part of the rectangle may be outside. The transform is applied
    with `probability` to all images of a minibatch or to none; each image has its own rectangle.
    """

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        super().__init__(img_shape)
        self.probability = probability
        sizes = torch.tensor(self.size)[:, None]
        self.sizes = Constants(sizes, (sizes + 1) // 2)  # halves are rounded up
        self.positions = Constants(*map(torch.arange, self.size))

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the rectangles [B, 4]: row start, row end, column start, column end; empty if not applied."""
        B, M = len(images), execution.current.minibatches
        is_applied = torch.rand([M, 1], dtype=images.dtype, device=images.device) < self.probability * p
        is_applied = is_applied.expand(-1, B // M).reshape(B)
        u_side, u_centre = torch.rand([2, 2, B], dtype=images.dtype, device=images.device).unbind(1)
        sizes, halves = self.sizes(images.dtype)  # of rows and columns, (2, 1) each
        side = self.side(sizes, halves, u_side)
        centre = (u_centre * (sizes + 1 - side % 2)).floor()  # (2, B)
        first = centre - (side / 2).floor()
        return torch.stack([first, first + side * is_applied], dim=1).flatten(0, 1).t()

    def side(self, sizes: Tensor, halves: Tensor, u: Tensor) -> Tensor:
        """Return the height and width of the rectangles [2, B], or [2, 1] if equal, for uniform draws u [2, B]."""
        return halves

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        y, x = self.positions(values.dtype)
        top, bottom, left, right = values[:, :, None].unbind(1)  # (B, 1) each
        rows = (y >= top) & (y < bottom)  # (B, H)
        columns = (x >= left) & (x < right)  # (B, W)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class DiffErase(DiffCutout):
    """Cutout of random size: each side of the rectangle is uniform between 0 and the corresponding image side.

    The expected side is half the image side and the expected area a quarter of the image, as with `DiffCutout`.
    """

    def side(self, sizes: Tensor, halves: Tensor, u: Tensor) -> Tensor:
        return (u * (sizes + 1)).floor()


class DiffFilter(FilterStage):
    """ADA's image-space filtering: each of four frequency bands is amplified by 2^N with `probability` per image."""

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        min_side = 22
        if min(img_shape[1:]) < min_side:
            found = f"{img_shape[1]}x{img_shape[2]}"
            problem = f"filters need at least {min_side} pixels per side, but the images are {found}; remove filter"
            raise ConfigError("policy", ("filter",), problem)
        super().__init__("filter", img_shape)
        self.probability = probability

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the gains of the bands [B, 4]."""
        return super().draw(images, self.probability * p)


class DiffHue(AffineStage):
    """ADA's hue rotation: colours rotate about the grey axis by U(-pi, pi), with `probability` per image."""

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        if img_shape[0] not in (3, 4):
            problem = f"hue rotation needs RGB channels, but the images have {img_shape[0]} channels; remove hue"
            raise ConfigError("policy", ("hue",), problem)
        super().__init__("color", img_shape, [t for t in COLOR if t.name == "hue"])
        self.probability = probability

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the identity and the affine colour map of each image [B, 2, 4, 4]; see AffineStage."""
        return super().draw(images, self.probability * p)


# Transforms by policy name. The TransGAN paper lists filter and hue for CelebA-HQ without equations; the definitions
# here are those of ADA.
DIFFAUG: dict[str, Callable[..., Transform]] = {
    "color": DiffColor,
    "translation": DiffTranslation,
    "cutout": DiffCutout,
    "erase": DiffErase,
    "filter": DiffFilter,
    "hue": DiffHue,
}
# Field of AugmentConfig that parameterizes each transform; transforms not listed have no parameter.
PARAMETERS: dict[str, str] = {
    "translation": "translation",
    "cutout": "cutout_p",
    "erase": "cutout_p",
    "filter": "filter_p",
    "hue": "hue_p",
}
DEFAULT_POLICY = ("translation", "cutout", "color")
