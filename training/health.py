"""Warnings about a training that goes wrong, from the values of each tick; docs/troubleshooting.md says more of each.

`Diversity` adds one figure to a tick, `HealthCheck` tests the conditions of CONDITIONS in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils import distributed
from training.dataset import encode_labels
from training.hooks import Hook
from training.training_loop import Tick, Trainer


class TickValues(dict[str, float]):
    """A tick's values and the means of its statistics by name; what is not there is nan, which no comparison holds for.

    Losses report what they have, so a condition does not apply where its values are missing.
    """

    def __missing__(self, name: str) -> float:
        return math.nan


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What can go wrong: a test that must hold for `patience` ticks in a row, what is told then, and what to do.

    `name` is that of its section in docs/troubleshooting.md.
    """

    name: str
    holds: Callable[[TickValues], bool]
    message: str
    patience: int = 1


def _gap(x: TickValues) -> float:
    """By how much D's scores of real images are above those of generated ones."""
    return x["Loss/scores/real"] - x["Loss/scores/fake"]


def _tells_all(x: TickValues) -> bool:
    """D's signs are those of a classifier without mistakes, or its loss is almost 0 because scores lie far apart.

    A D that only compares is no classifier: its objectives report no signs of generated images. The critic of a
    Wasserstein distance is even meant to rank all reals above all generated ones.
    """
    is_sure = x["Loss/signs/real"] > 0.99 and x["Loss/signs/fake"] < -0.99
    return is_sure or (_gap(x) > 4 and abs(x["Loss/D/loss"]) < 0.02)


CONDITIONS = (
    Condition(
        name="D tells all",
        holds=_tells_all,
        patience=3,
        message="D tells every real image from every generated one, and G learns little from that: raise --gamma, "
        "lower --dlr, augment (--aug=ada), or go back to an earlier training state",
    ),
    Condition(
        name="D tells nothing",
        holds=lambda x: _gap(x) < 0.01,
        patience=3,
        message="D's scores of real images are no higher than those of generated ones, so it is of no use to G: lower "
        "--dlr, or --gamma (or loss.gp_weight)",
    ),
    Condition(
        name="Images are the same",
        holds=lambda x: x["Images/diversity"] < 0.05,
        patience=2,
        message="generated images hardly differ from each other (G has collapsed, or its output is saturated): lower "
        "--glr, raise --gamma (or loss.gp_weight), or go back to an earlier training state",
    ),
    Condition(
        name="p is at its bound",
        holds=lambda x: x["ADA/is_saturated"] == 1,
        message="ADA's p is at its upper bound; the data set may be too small for this run",
    ),
)


class HealthCheck(Hook):
    """Prints a condition's message when it has begun to hold; once, until it has not held in between."""

    def __init__(self, conditions: Sequence[Condition] = CONDITIONS) -> None:
        self.conditions = conditions
        self.ticks = dict.fromkeys((condition.name for condition in conditions), 0)  # in a row that each has held

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if tick.is_first or not distributed.is_main():
            return
        for condition in self.begun(_tick_values(trainer, tick)):
            print(f'Warning: {condition.message} (docs/troubleshooting.md, "{condition.name}")', flush=True)

    def begun(self, values: TickValues) -> list[Condition]:
        """Take in the values of a tick; return the conditions that have held for as long as it takes, just now."""
        for condition in self.conditions:
            self.ticks[condition.name] = self.ticks[condition.name] + 1 if condition.holds(values) else 0
        return [condition for condition in self.conditions if self.ticks[condition.name] == condition.patience]


def _tick_values(trainer: Trainer, tick: Tick) -> TickValues:
    values = TickValues(tick.values)
    for name, stat in tick.stats.items():
        values[name], values[f"{name} std"] = stat.mean, stat.std
    values["ADA/is_saturated"] = float(trainer.ada.is_saturated(values["Progress/augment"]))
    return values


class Diversity(Hook):
    """Images/diversity: how much generated images differ from each other, as a share of how much the reals do.

        mean_chw sqrt(Var_b G(z_b, c)) / mean_chw sqrt(Var_b x_b)

    over NUM_IMAGES fixed z of one label, in [-1, 1] as they are shown. 1 is as different as the reals of all labels; 0
    is one and the same image. On rank 0.
    """

    NUM_IMAGES = 32

    def __init__(self) -> None:
        self.spread_of_reals: float | None = None

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if not distributed.is_main():
            return
        if self.spread_of_reals is None:
            indices = torch.arange(self.NUM_IMAGES) * len(trainer.dataset) // self.NUM_IMAGES
            self.spread_of_reals = spread(trainer.dataset.images(indices).float() / 127.5 - 1)
        fakes = spread(self._generate(trainer))
        if self.spread_of_reals > 0 and math.isfinite(fakes):
            tick.values["Images/diversity"] = fakes / self.spread_of_reals

    @torch.no_grad()
    def _generate(self, trainer: Trainer) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn([self.NUM_IMAGES, trainer.G.z_dim], generator=generator).to(trainer.device)
        c = encode_labels(trainer.dataset.labels[:1].to(trainer.device), trainer.G.c_dim).expand(len(z), -1)
        parts = zip(z.split(trainer.batch_gpu), c.split(trainer.batch_gpu), strict=True)
        return torch.cat([trainer.G(zs, cs, noise_mode="const").clamp(-1, 1).cpu() for zs, cs in parts])


def spread(images: Tensor) -> float:
    """Return the standard deviation between images (B, C, H, W), averaged over their pixels."""
    return float(images.double().std(dim=0, correction=0).mean())
