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
from training.augment.stages import COLOR, AffineStage, FilterStage, RandomMatrices, Transform

ImgShape = tuple[int, int, int]  # channels, height, width


class DiffColor(Transform):
    """Random brightness, saturation and contrast, in this order.

        x <- x + b                  b ~ U(-0.5, 0.5)
        x <- m_c + s (x - m_c)      s ~ U(0, 2),       m_c: mean over the channels
        x <- m + t (x - m)          t ~ U(0.5, 1.5),   m: mean over the image

    Saturation leaves one-channel images unchanged. A fourth (alpha) channel is not transformed.
    """

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return b, s and t [B, 3]."""
        u = torch.rand([len(images), 3], dtype=images.dtype, device=images.device)
        return torch.stack([u[:, 0] - 0.5, 2 * u[:, 1], u[:, 2] + 0.5], dim=1)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        num_colors = 3 if self.channels == 4 else self.channels
        brightness, saturation, contrast = values[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
        x = images[:, :num_colors] + brightness
        x = x.mean(dim=1, keepdim=True).lerp(x, saturation)
        x = x.mean(dim=(1, 2, 3), keepdim=True).lerp(x, contrast)
        return torch.cat([x, images[:, num_colors:]], dim=1)  # (B, C, H, W)


class DiffTranslation(Transform):
    """Translation by whole pixels, up to `ratio` times the image size along each axis, with zero padding."""

    def __init__(self, img_shape: ImgShape, ratio: float = 0.125) -> None:
        super().__init__(img_shape)
        self.ratio = ratio

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the shifts down and to the right [B, 2]."""
        limits = [_rounded(self.ratio * size) for size in self.size]
        steps = [torch.randint(-limit, limit + 1, [len(images)], device=images.device) for limit in limits]
        return torch.stack(steps, dim=1)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        for axis, shift in ((2, values[:, 0]), (3, values[:, 1])):
            size = images.shape[axis]
            source = torch.arange(size, device=images.device) - shift[:, None]  # (B, size)
            shape = [len(images), 1, size, 1] if axis == 2 else [len(images), 1, 1, size]
            is_inside = ((source >= 0) & (source < size)).view(shape)
            index = source.clamp(0, size - 1).view(shape).expand_as(images)
            images = images.gather(axis, index) * is_inside
        return images


def _rounded(x: float) -> int:
    """Round x >= 0 to the nearest integer, with halves rounded up."""
    return int(x + 0.5)


class DiffCutout(Transform):
    """Cutout of a rectangle of half the image height and width, at a random position; its pixels are set to zero.

    The centre of the rectangle is inside the image, but part of the rectangle may be outside. The transform is applied
    with `probability` to all images of a batch or to none; each image has its own rectangle.
    """

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        super().__init__(img_shape)
        self.probability = probability

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the rectangles [B, 4]: row start, row end, column start, column end; empty if not applied."""
        is_applied = torch.rand([], dtype=images.dtype, device=images.device) < self.probability * p
        u = torch.rand([2, 2, len(images)], dtype=images.dtype, device=images.device)
        bounds = []
        for size, (u_side, u_centre) in zip(self.size, u, strict=True):
            side = self.side(size, u_side)  # (B,)
            centre = (u_centre * (size + 1 - side % 2)).floor()
            first = centre - (side / 2).floor()
            bounds += [first, torch.where(is_applied, first + side, first)]
        return torch.stack(bounds, dim=1)

    def side(self, size: int, u: Tensor) -> Tensor:
        """Return the sides (B,) of the rectangles along an axis of `size` pixels for uniform draws u (B,) in [0, 1)."""
        return torch.full_like(u, _rounded(size / 2))

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        inside = []
        for size, (first, end) in zip(self.size, values.t().unflatten(0, (2, 2)), strict=True):
            position = torch.arange(size, device=images.device)
            inside.append((position >= first[:, None]) & (position < end[:, None]))  # (B, size)
        rows, columns = inside
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class DiffErase(DiffCutout):
    """Cutout of random size: each side of the rectangle is uniform between 0 and the corresponding image side.

    The expected side is half the image side and the expected area a quarter of the image, as with `DiffCutout`.
    """

    def side(self, size: int, u: Tensor) -> Tensor:
        return (u * (size + 1)).floor()


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
        super().__init__("color", img_shape)
        self.random_matrices = RandomMatrices([[], [t for t in COLOR if t.name == "hue"]], self.size)
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
