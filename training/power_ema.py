"""Power-function moving averages of the generator's weights, from which other lengths are rebuilt after training.

Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", section 3): the average after t
images weights the weights after tau images by a profile proportional to tau^gamma, with the mean (gamma + 1) /
(gamma + 2) t and the standard deviation sigma t. Users specify the relative width sigma. training/snapshots/post_hoc.py
rebuilds averages of other widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MIN_SIGMA, MAX_SIGMA = 0.001, 0.28  # the uniform average, gamma = 0, has sigma = 1 / sqrt(12) = 0.2887


def gamma_of(sigma: float) -> float:
    """Return the exponent of the profile of relative width `sigma`, 0 < sigma < 1 / sqrt(12).

    It is the largest root of gamma^3 + 7 gamma^2 + (16 - sigma^-2) gamma + 12 - sigma^-2.
    """
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    return float(roots[np.isreal(roots)].real.max())


def sigma_of(gamma: float) -> float:
    """Return the relative width of the profile with exponent `gamma`: sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


class PowerEMA:
    """Averages of a module's parameters, one per relative width sigma; part of the training state.

    After a batch, with t images seen after it: beta = (1 - batch / t)^(gamma + 1); average <- w + beta (average - w).
    The first batch of a run therefore copies the weights. For weights that change only at batches, the result equals
    the integral over the profile exactly, for any sequence of batch sizes.

    `run` identifies the run in the files of its averages, so that files of different runs are not mixed.
    """

    def __init__(self, source: nn.Module, sigmas: Sequence[float], run: str = "") -> None:
        parameters = dict(source.named_parameters())
        self.names: list[str] = list(parameters)
        self.weights: list[Tensor] = list(parameters.values())
        self.gammas = {sigma: gamma_of(sigma) for sigma in sigmas}
        self.averages = {sigma: [x.detach().clone() for x in self.weights] for sigma in sigmas}
        self.run = run

    @torch.no_grad()
    def start(self, run: str) -> None:
        """Begin a run with the current weights, e.g. after they were copied from a snapshot."""
        self.run = run
        for averages in self.averages.values():
            torch._foreach_copy_(averages, self.weights)

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Update the averages after a batch; `nimg` counts the images before this batch."""
        for sigma, averages in self.averages.items():
            beta = (nimg / (nimg + batch_size)) ** (self.gammas[sigma] + 1)
            torch._foreach_lerp_(averages, self.weights, 1 - beta)

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all averages."""
        return [x for averages in self.averages.values() for x in averages]

    def state_dict(self) -> dict[str, Any]:
        averages = {f"{sigma:.3f}": dict(zip(self.names, x, strict=True)) for sigma, x in self.averages.items()}
        return {"run": self.run, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averages of the tracked widths; further widths in the state are dropped.

        Raises ValueError if a width, a parameter or a shape is missing.
        """
        for sigma, averages in self.averages.items():
            saved = state["averages"].get(f"{sigma:.3f}")
            if saved is None:
                raise ValueError(f"it has no average of the length {sigma:g}")
            if saved.keys() != set(self.names):
                raise ValueError(f"the average of the length {sigma:g} has other parameters")
            for name, x in zip(self.names, averages, strict=True):
                if saved[name].shape != x.shape:
                    raise ValueError(f"{name} of the length {sigma:g} has shape {tuple(saved[name].shape)}")
                x.copy_(saved[name])
        self.run = str(state["run"])
