"""DiffAugment: differentiable transforms of real and generated images, with values drawn for each image.

Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", where each fires on every image; a
transform's own probability, if it has one, comes from TransGAN's training (Jiang et al. 2021). As in stages.py,
a transform is a `draw` of values and a deterministic `transform` of images; number and shape of the draws do not depend
on the values, and there are two derivatives. The pipe's p is always 1 here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dnnlib.config import ConfigError
from training.augment.stages import COLOR, ColorStage, FilterStage, Transform

ImgShape = tuple[int, int, int]  # channels, height, width


class DiffColor(Transform):
    """Brightness, saturation, contrast, in this order.

        x + b,   m + s (x - m) about the mean m over the channels,   m + t (x - m) about the mean m of the image

    b ~ U(-0.5, 0.5), s ~ U(0, 2), t ~ U(0.5, 1.5). A single channel is its own mean; a fourth, alpha,
    stays as it is.
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
    """Shift by whole pixels, up to `ratio` times the image's size along each axis; what comes in is zero."""

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
    """The nearest integer to x >= 0, halves up."""
    return int(x + 0.5)


class DiffCutout(Transform):
    """Set a rectangle of half the image's height and width to zero; its centre lies anywhere in the image.

    It fires with `probability` for all images of a batch together, each with a rectangle of its own. A part of the
    rectangle may lie outside.
    """

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        super().__init__(img_shape)
        self.probability = probability

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the rectangles [B, 4]: first row, end of the rows, first column, end of the columns.

        Where it does not fire they are empty.
        """
        fires = torch.rand([], dtype=images.dtype, device=images.device) < self.probability * p
        u = torch.rand([2, 2, len(images)], dtype=images.dtype, device=images.device)
        bounds = []
        for size, (u_side, u_centre) in zip(self.size, u, strict=True):
            side = self.side(size, u_side)  # (B,)
            centre = (u_centre * (size + 1 - side % 2)).floor()
            first = centre - (side / 2).floor()
            bounds += [first, torch.where(fires, first + side, first)]
        return torch.stack(bounds, dim=1)

    def side(self, size: int, u: Tensor) -> Tensor:
        """Return the rectangles' sides along an axis of `size` pixels (B,) for uniform draws u (B,) in [0, 1)."""
        return torch.full_like(u, _rounded(size / 2))

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        inside = []
        for size, (first, end) in zip(self.size, values.t().unflatten(0, (2, 2)), strict=True):
            place = torch.arange(size, device=images.device)
            inside.append((place >= first[:, None]) & (place < end[:, None]))  # (B, size)
        rows, columns = inside
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class DiffErase(DiffCutout):
    """Cutout of random size: height and width of each rectangle are uniform between nothing and the image's.

    On average a side is half and the area a quarter of the image's, as with cutout.
    """

    def side(self, size: int, u: Tensor) -> Tensor:
        return (u * (size + 1)).floor()


class DiffFilter(FilterStage):
    """The image filter of ADA: each of its four bands gets, with `probability` per image, a gain of 2^N."""

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        least = 22
        if min(img_shape[1:]) < least:
            found = f"{img_shape[1]}x{img_shape[2]}"
            problem = f"image filters need at least {least} pixels a side, the images have {found}; leave filter out"
            raise ConfigError("policy", ("filter",), problem)
        super().__init__("filter", img_shape)
        self.probability = probability

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the bands' gains [B, 4]."""
        return super().draw(images, self.probability * p)


class DiffHue(ColorStage):
    """The hue of ADA: with `probability` per image, colours turn about the grey axis by U(-pi, pi)."""

    def __init__(self, img_shape: ImgShape, probability: float = 1.0) -> None:
        if img_shape[0] not in (3, 4):
            problem = f"a hue needs red, green and blue, the images have {img_shape[0]} channels; leave hue out"
            raise ConfigError("policy", ("hue",), problem)
        super().__init__("color", img_shape)
        self.transforms = [t for t in COLOR if t.name == "hue"]
        self.probability = probability

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the maps of (r, g, b, 1) [B, 4, 4]."""
        return super().draw(images, self.probability * p)


# Transforms by their name in the policy. TransGAN's paper names filter and hue, for CelebA-HQ, without equations: both
# are taken from ADA here.
DIFFAUG: dict[str, Callable[..., Transform]] = {
    "color": DiffColor,
    "translation": DiffTranslation,
    "cutout": DiffCutout,
    "erase": DiffErase,
    "filter": DiffFilter,
    "hue": DiffHue,
}
# The field of AugmentConfig that a transform is built with, if any.
PARAMETERS: dict[str, str] = {
    "translation": "translation",
    "cutout": "cutout_p",
    "erase": "cutout_p",
    "filter": "filter_p",
    "hue": "hue_p",
}
DEFAULT_POLICY = ("translation", "cutout", "color")
