"""Input of a discriminator that contains the images of several RGB heads, with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from training.augment.pipe import AugmentConfig, AugmentPipe


def build_pipe(config: AugmentConfig, img_shape: tuple[int, int, int], num_rgb_heads: int) -> AugmentPipe:
    """Build the pipe of D's input for a generator with this number of RGB heads."""
    return AugmentPipe(config, img_shape) if num_rgb_heads == 1 else RGBHeadsPipe(config, img_shape, num_rgb_heads)


class RGBHeadsPipe(AugmentPipe):
    """Augmentation and noise for the images x_K, ..., x_1 of K RGB heads, concatenated in this order to (B, K C, H, W).

        y_k = (1 - t_k) T(x_k) + n_k,   t_k = 1 - 8^(k/K - 1) + 0.01,   n_k ~ N(0, t_k^2)

    All images of a latent, and all copies of a real image, share the augmentation T. The noises are nested: n_k is
    n_(k+1) plus independent noise. Images of low resolution thus contribute no detail (Hyun et al. 2025, "Scalable GANs
    with transformers", multi-level noise-perturbed guidance). The noise is part of the drawn parameters: the images of
    a pair share it with augment.paired, and the perturbation of an estimated penalty does not change it.
    """

    noise_std: Tensor

    def __init__(self, config: AugmentConfig, img_shape: tuple[int, int, int], num_rgb_heads: int) -> None:
        super().__init__(config, img_shape)
        K = self.num_rgb_heads = num_rgb_heads
        noise_std = torch.tensor([1.01 - 8 ** (k / K - 1) for k in range(K, 0, -1)])
        self.register_buffer("noise_std", noise_std.view(-1, 1, 1, 1), persistent=False)  # t (K, 1, 1, 1)

    def draw(self, images: Tensor) -> list[Tensor]:
        """Draw the parameters of every transform, and the noise (B, K, C, H, W)."""
        images = images.unflatten(1, (self.num_rgb_heads, -1))
        return [*super().draw(images[:, 0]), self._draw_noise(images)]

    def forward(self, images: Tensor, values: list[Tensor] | None = None) -> Tensor:
        *values, noise = self.draw(images) if values is None else values
        K = self.num_rgb_heads
        each = [parameters.repeat_interleave(K, dim=0) for parameters in values]
        images = super().forward(images.unflatten(1, (K, -1)).flatten(0, 1), each).unflatten(0, (-1, K))
        return self._add_noise(images, noise)

    def without_transforms(self, images: Tensor) -> Tensor:
        images = images.unflatten(1, (self.num_rgb_heads, -1))
        return self._add_noise(images, self._draw_noise(images))

    def _draw_noise(self, images: Tensor) -> Tensor:
        variances = self.noise_std.square()
        steps = torch.cat([variances[:1], variances[1:] - variances[:-1]])
        return (torch.randn_like(images) * steps.sqrt()).cumsum(dim=1)

    def _add_noise(self, images: Tensor, noise: Tensor) -> Tensor:
        return torch.addcmul(noise, images, 1 - self.noise_std).flatten(1, 2)
