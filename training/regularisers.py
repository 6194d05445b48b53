"""LeCam regularisation of D for small datasets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
