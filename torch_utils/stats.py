"""Mean and standard deviation of training statistics, accumulated on the device without host synchronization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils import distributed


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation of the values that all ranks added since the last `collect`; nan without values."""

    mean: float
    std: float
    count: int


class Stats:
    """Running count, sum and sum of squares per name. Every rank must add the same names."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Accumulate all elements of each tensor, on the device."""
        self.add_moments({name: moments(value) for name, value in values.items()})

    def add_moments(self, table: Mapping[str, Tensor]) -> None:
        """Accumulate values given as `moments`."""
        for name, row in table.items():
            if name in self.moments:
                self.moments[name] += row
            else:
                self.moments[name] = row.clone()

    def collect(self) -> dict[str, Stat]:
        """Return the statistics over all ranks and reset. A collective call, and the only host synchronization."""
        names, table = self._sum_over_ranks()
        self.moments = {}
        return {name: _to_stat(*row) for name, row in zip(names, table.tolist(), strict=True)}

    def gather(self) -> None:
        """Move the sums of all ranks to rank 0, so that its `state_dict` covers all ranks. A collective call."""
        names, table = self._sum_over_ranks()
        self.load_state_dict(dict(zip(names, table, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of this rank since the last `collect`."""
        return {name: self.moments[name] for name in sorted(self.moments)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that rank 0 saved, on rank 0 only; the other ranks start from zero."""
        if any(row.shape != (3,) or row.dtype != torch.float64 for row in state.values()):
            raise ValueError("moments are three numbers in float64")
        share = 1 if distributed.is_main() else 0
        self.moments = {name: row.to(self.device) * share for name, row in state.items()}

    def _sum_over_ranks(self) -> tuple[list[str], Tensor]:
        """Return the names and their moments summed over all ranks, (names, 3)."""
        names = sorted(self.moments)
        if not names:
            return [], torch.zeros(0, 3)
        return names, distributed.all_reduce(torch.stack([self.moments[name] for name in names]))


def moments(values: Tensor) -> Tensor:
    """Return count, sum and sum of squares, (3,)."""
    x = values.detach().to(torch.float64)
    return torch.stack([torch.full_like(x.sum(), x.numel()), x.sum(), x.square().sum()])


def _to_stat(count: float, total: float, squares: float) -> Stat:
    if not count:
        return Stat(mean=math.nan, std=math.nan, count=0)
    mean = total / count
    variance = squares / count - mean**2
    return Stat(mean=mean, std=math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan, count=int(count))
