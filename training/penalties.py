"""Squared gradients of D with respect to images: exact, with second derivatives, or estimated by finite differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.networks import execution

if TYPE_CHECKING:
    from training.loss import GAN


def gradient_penalty(gan: GAN, real: Tensor, fake: Tensor, c: Tensor) -> Tensor:
    """(|grad_u D(u)| - 1)^2 at u = real + t (fake - real), t ~ U(0, 1) per image: (B,)."""
    t = torch.rand([len(real), 1, 1, 1], dtype=real.dtype, device=real.device)
    between = real.lerp(fake, t).requires_grad_(True)
    with execution.using(twice_differentiable=True):
        (gradient,) = torch.autograd.grad(gan.D(between, c).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square()


def squared_gradients(
    gan: GAN, images: Tensor, c: Tensor, values: list[Tensor], minibatches: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Return D's logits (B, 1) and |grad_x D(T(x))|^2 (B,) at images x before the augmentation T, by minibatch.

    `images` (M B, C, H, W) are M = `minibatches` minibatches, `c` their labels and `values` the parameters of T.
    """
    images = images.detach().requires_grad_(True)
    with execution.using(twice_differentiable=True, minibatches=minibatches):
        logits = gan.D(gan.augment(images, values), c)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return [*logits.chunk(minibatches)], [*gradient.square().sum(dim=(1, 2, 3)).chunk(minibatches)]


@dataclass(frozen=True)
class Estimate:
    """Settings of `squared_differences`.

    `share` is the fraction of the images that get a perturbed copy, and `sigma` the standard deviation of the
    perturbation of a pixel, for images in [-1, 1].
    """

    share: float
    sigma: float

    def count(self, groups: int) -> int:
        """Return the number of groups of images with perturbed copies: the share of all groups, rounded down."""
        return int(self.share * groups + 1e-9)


def groups(x: Tensor, group_size: int) -> Tensor:
    """Reshape a minibatch (B, ...) to (B/G, G, ...): groups of G images with common statistics, see MinibatchStd.

    G = min(`group_size`, B); a group size of 0 denotes a D without such statistics, and G is 1.
    """
    return x.unflatten(0, (max(min(group_size, len(x)), 1), -1)).transpose(0, 1)


def squared_differences(
    gan: GAN, images: Tensor, c: Tensor, values: list[Tensor], minibatches: int = 1, *, estimate: Estimate
) -> tuple[list[Tensor], list[Tensor]]:
    """Return D's logits (B, 1) and ((D(T(x + s n)) - D(T(x))) / s)^2 (share B,) with n ~ N(0, I), by minibatch.

    The arguments are those of `squared_gradients`. The expectation over n is |grad_x D(T(x))|^2 up to terms of order
    s^2, without second derivatives (Lin et al. 2025, "Diffusion adversarial post-training"). T is the same in both
    logits, and so are the images that share statistics: all images of a group are perturbed, or none. Images and
    perturbed copies pass through D as one batch, sorted by group. The logits are returned in this order, which is the
    same in all minibatches, so pairs correspond.
    """
    M, B = minibatches, len(images) // minibatches
    index = torch.stack([groups(part, gan.group_size) for part in torch.arange(M * B, device=images.device).chunk(M)])
    _, num_groups, G = index.shape
    k = estimate.count(num_groups)
    order = torch.cat([index.flatten(), index[:, :k].flatten()])
    images, c, values = images[order], c[order], [parameters[order] for parameters in values]
    copies = images[M * B :]
    copies += estimate.sigma * torch.randn_like(copies)
    with execution.using(minibatches=len(order) // G):  # each group is a minibatch of its own
        logits = gan.logits(images, c, values)
    of_images, of_copies = logits[: M * B], logits[M * B :].view(M, k * G)
    differences = (of_copies - of_images.view(M, B)[:, : k * G]) / estimate.sigma
    return [*of_images.chunk(M)], [*differences.square()]
