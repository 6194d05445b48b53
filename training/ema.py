"""Exponential moving average of the generator's weights; the averaged network generates the images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, check_bounds, setting
from dnnlib.schedule import Schedule, value_at


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the generator's weights."""

    kimg: float | Schedule | None = setting(
        None,
        "Half-life, in thousands of images; None: 10/32 of the batch size.",
        auto=True,
        at_least=0,
        note="0 turns averaging off",
    )
    rampup: float | None = setting(
        0.05, "Upper bound on the half-life, as a fraction of the images seen so far; None: no ramp-up.", above=0
    )

    def __post_init__(self) -> None:
        check_bounds(self)


class EMA:
    """Copy of a module with averaged weights; the half-life is measured in images (Karras et al. 2018).

    After a batch: n = 1000 kimg, with ramp-up n = min(n, rampup * nimg); beta = 0.5^(batch / n);
    w_ema <- w + beta (w_ema - w). If kimg has a schedule, its value before the batch counts. Buffers are copied.
    """

    def __init__(self, source: nn.Module, config: EMAConfig) -> None:
        if config.kimg is None:
            raise ConfigError("kimg", None, "not resolved")
        self.source = source
        self.module: Any = copy.deepcopy(source).eval().requires_grad_(False)
        self.kimg = config.kimg
        self.rampup = config.rampup

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Update the averages after a batch; `nimg` counts the images before this batch."""
        half_life = 1000 * value_at(self.kimg, nimg)
        n = half_life if self.rampup is None else min(half_life, nimg * self.rampup)
        beta = 0.5 ** (batch_size / max(n, 1e-8))
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(self.source.parameters())
        torch._foreach_lerp_(averages, weights, 1 - beta)
        torch._foreach_copy_(list(self.module.buffers()), list(self.source.buffers()))
