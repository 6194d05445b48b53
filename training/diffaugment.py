"""DiffAugment: transforms that every image gets, real or generated, with values drawn for each.

Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training". A transform is, as in
augment_stages.py, a `draw` of values and a deterministic `transform` of images; shapes do not depend on the values, and
there are two derivatives. Here p is always 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dnnlib.config import ConfigError
from training.augment_stages import COLOR, ColorStage, FilterStage, Transform

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
    """Shift by whole pixels, up to an eighth of the image along each axis; what comes in is zero."""

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the shifts down and to the right [B, 2]."""
        steps = [torch.randint(-s, s + 1, [len(images)], device=images.device) for s in map(_eighth, self.size)]
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


def _eighth(size: int) -> int:
    return int(size / 8 + 0.5)


class DiffCutout(Transform):
    """Set a rectangle of half the image's height and width to zero; a part of it may lie outside."""

    def draw(self, images: Tensor, p: Tensor) -> Tensor:
        """Return the first row and the first column [B, 2]; the centre lies anywhere in the image."""
        firsts = []
        for size in self.size:
            side = _half(size)
            centres = torch.randint(0, size + 1 - side % 2, [len(images)], device=images.device)
            firsts.append(centres - side // 2)
        return torch.stack(firsts, dim=1)

    def transform(self, images: Tensor, values: Tensor) -> Tensor:
        inside = []
        for size, first in zip(self.size, values.unbind(1), strict=True):
            place = torch.arange(size, device=images.device) - first[:, None]  # (B, size), in the rectangle
            inside.append((place >= 0) & (place < _half(size)))
        rows, columns = inside
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _half(size: int) -> int:
    return int(size / 2 + 0.5)


class DiffFilter(FilterStage):
    """The image filter of ADA on every image: its four bands get gains of 2^N."""

    def __init__(self, img_shape: ImgShape) -> None:
        least = 22
        if min(img_shape[1:]) < least:
            found = f"{img_shape[1]}x{img_shape[2]}"
            problem = f"image filters need at least {least} pixels a side, the images have {found}; leave filter out"
            raise ConfigError("policy", ("filter",), problem)
        super().__init__("filter", img_shape)


class DiffHue(ColorStage):
    """The hue of ADA on every image: colours turn about the grey axis by U(-pi, pi)."""

    def __init__(self, img_shape: ImgShape) -> None:
        if img_shape[0] not in (3, 4):
            problem = f"a hue needs red, green and blue, the images have {img_shape[0]} channels; leave hue out"
            raise ConfigError("policy", ("hue",), problem)
        super().__init__("color", img_shape)
        self.transforms = [t for t in COLOR if t.name == "hue"]


# By the name in the policy, and what it is where nothing else is said. The paper of TransGAN names filter and hue, for
# CelebA-HQ, without equations: both are taken from ADA here.
DIFFAUG: dict[str, Callable[[ImgShape], Transform]] = {
    "color": DiffColor,
    "translation": DiffTranslation,
    "cutout": DiffCutout,
    "filter": DiffFilter,
    "hue": DiffHue,
}
DEFAULT_POLICY = ("translation", "cutout", "color")
