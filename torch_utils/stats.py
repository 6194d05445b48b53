"""Mean and standard deviation of training statistics, accumulated on the device without host synchronization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """Running count, sum and sum of squares per name. Every rank must add the same names.

    Names that are added together share a table, so that adding takes one kernel.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tables: dict[tuple[str, ...], Tensor] = {}  # names -> (names, 3)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Accumulate all elements of each tensor, on the device."""
        self.add_moments(tuple(values), moments([*values.values()]))

    def add_moments(self, names: tuple[str, ...], rows: Tensor) -> None:
        """Accumulate values given as `moments`, (names, 3)."""
        if not names:
            return
        if names not in self.tables:
            self._join(names)
        self.tables[names] += rows

    def _join(self, names: tuple[str, ...]) -> None:
        """Move the rows of these names to a table of their own; names without a row start at zero."""
        rows, zero = self._rows(), torch.zeros(3, dtype=torch.float64, device=self.device)
        joined = torch.stack([rows.get(name, zero) for name in names])
        split = [table for table in self.tables if {*table} & {*names}]
        for table in split:
            del self.tables[table]
        self.tables |= {(name,): rows[name][None] for table in split for name in table if name not in names}
        self.tables[names] = joined

    def collect(self) -> dict[str, Stat]:
        """Return the statistics over all ranks and reset. A collective call, and the only host synchronization."""
        names, table = self._sum_over_ranks()
        self.tables = {}
        return {name: _to_stat(*row) for name, row in zip(names, table.tolist(), strict=True)}

    def gather(self) -> None:
        """Move the sums of all ranks to rank 0, so that its `state_dict` covers all ranks. A collective call."""
        names, table = self._sum_over_ranks()
        self.load_state_dict(dict(zip(names, table, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of this rank since the last `collect`."""
        return dict(sorted(self._rows().items()))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that rank 0 saved, on rank 0 only; the other ranks start from zero."""
        if any(row.shape != (3,) or row.dtype != torch.float64 for row in state.values()):
            raise ValueError("moments are three numbers in float64")
        share = 1 if distributed.is_main() else 0
        self.tables = {(name,): row[None].to(self.device) * share for name, row in state.items()}

    def _rows(self) -> dict[str, Tensor]:
        return {name: row for names, table in self.tables.items() for name, row in zip(names, table, strict=True)}

    def _sum_over_ranks(self) -> tuple[list[str], Tensor]:
        """Return the names and their moments summed over all ranks, (names, 3)."""
        rows = self.state_dict()
        if not rows:
            return [], torch.zeros(0, 3)
        return [*rows], distributed.all_reduce(torch.stack([*rows.values()]))


def moments(values: Sequence[Tensor]) -> Tensor:
    """Return count, sum and sum of squares of the elements of each tensor, (tensors, 3), in float64."""
    if not values:
        return torch.zeros(0, 3, dtype=torch.float64)
    x = torch.cat([value.detach().reshape(-1) for value in values]).to(torch.float64)
    powers = torch.stack([torch.ones_like(x), x, x.square()])  # (3, elements)
    return torch.stack([part.sum(dim=1) for part in powers.split([value.numel() for value in values], dim=1)])


def _to_stat(count: float, total: float, squares: float) -> Stat:
    if not count:
        return Stat(mean=math.nan, std=math.nan, count=0)
    mean = total / count
    variance = squares / count - mean**2
    return Stat(mean=mean, std=math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan, count=int(count))
