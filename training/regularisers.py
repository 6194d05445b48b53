"""Regularisers of D for small datasets: LeCam and balanced consistency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.networks import execution

if TYPE_CHECKING:
    from training.loss import GAN

DECAY = 0.99  # of the moving averages
FIRST_STEP = 1000  # of the regulariser; until then only the averages are updated


class LogitMeans(nn.Module):
    """Moving averages (2,) of the mean logits of real and generated images, and the number of updates."""

    values: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(2))
        self.register_buffer("steps", torch.zeros([], dtype=torch.int64))

    def update(self, means: Tensor, skip: Tensor) -> None:
        """Update with means (2,) over a global batch unless `skip`, a boolean scalar on the device, is true."""
        self.values.copy_(torch.where(skip, self.values, self.values.lerp(means.to(self.values.dtype), 1 - DECAY)))
        self.steps += ~skip


def lecam(real_logits: Tensor, fake_logits: Tensor, means: LogitMeans) -> Tensor:
    """E[relu(D(x) - a_F)^2] + E[relu(a_R - D(G(z)))^2] (Tseng et al. 2021).

    a_R and a_F are moving averages of the mean logits. The term pulls logits of real images towards the average of
    generated images and vice versa. It is 0 until the averages have been updated FIRST_STEP times.
    """
    mean_real, mean_fake = means.values.unbind()
    distance = F.relu(real_logits - mean_fake).square().mean() + F.relu(mean_real - fake_logits).square().mean()
    return distance * (means.steps >= FIRST_STEP)


def consistency(gan: GAN, img: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return (D(x) - D(T(x)))^2 and (D(G(z)) - D(T(G(z))))^2, each (B, 1) (Zhao et al. 2021, "bCR").

    The generated images are drawn for this term only. All images pass through D as one batch.
    """
    with torch.no_grad():
        fake, fake_c, _ = gan.generate(len(img))
        images = torch.cat([fake, img])
        with execution.using(minibatches=2):
            images = torch.cat([gan.augment.without_transforms(images), gan.augment(images)])
    with execution.using(minibatches=4):
        plain, augmented = gan.discriminate(images, torch.cat([fake_c, c]).repeat(2, 1)).chunk(2)
    of_fake, of_real = (plain - augmented).square().chunk(2)
    return of_real, of_fake
