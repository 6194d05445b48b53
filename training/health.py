"""Warnings about failing training, based on the values of each tick; docs/troubleshooting.md explains each warning.

`Diversity` adds a value to each tick, and `HealthCheck` tests CONDITIONS on the values of each tick.
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
    """Values of a tick and means of its statistics by name. A missing value is nan, so comparisons with it are false.

    Objectives report different values; a condition with missing values is never met.
    """

    def __missing__(self, name: str) -> float:
        return math.nan


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Symptom of failing training: a test, and the warning to print once it is true for `patience` consecutive ticks.

    `name` is the title of a section in docs/troubleshooting.md.
    """

    name: str
    holds: Callable[[TickValues], bool]
    message: str
    patience: int = 1


def _gap(x: TickValues) -> float:
    """Return D's mean logit for real images minus its mean logit for generated images."""
    return x["Loss/scores/real"] - x["Loss/scores/fake"]


def _separates_perfectly(x: TickValues) -> bool:
    """Return whether D classifies all images correctly, or its loss is almost 0 because its logits are far apart.

    Signs are tested only if D is a classifier: wgangp-eps and relativistic report no sign for generated images, because
    their D compares images. A Wasserstein critic is expected to rank all real images above all generated ones.
    """
    is_correct = x["Loss/signs/real"] > 0.99 and x["Loss/signs/fake"] < -0.99
    return is_correct or (_gap(x) > 4 and abs(x["Loss/D/loss"]) < 0.02)


CONDITIONS = (
    Condition(
        name="D separates perfectly",
        holds=_separates_perfectly,
        patience=3,
        message="D separates real from generated images perfectly, so G receives little gradient: raise --gamma, "
        "lower --dlr, augment (--aug=ada), or return to an earlier training state",
    ),
    Condition(
        name="D does not separate",
        holds=lambda x: _gap(x) < 0.01,
        patience=3,
        message="D's logits for real images are no higher than for generated ones, so G receives no useful gradient: "
        "lower --dlr, or --gamma (or loss.gp_weight)",
    ),
    Condition(
        name="G has collapsed",
        holds=lambda x: x["Images/diversity"] < 0.05,
        patience=2,
        message="generated images are nearly identical (G has collapsed, or its output is saturated): lower --glr, "
        "raise --gamma (or loss.gp_weight), or return to an earlier training state",
    ),
    Condition(
        name="p is at its upper bound",
        holds=lambda x: x["ADA/is_saturated"] == 1,
        message="p of ADA or APA is at its upper bound; the dataset may be too small for this run",
    ),
)


class HealthCheck(Hook):
    """Hook that warns when a condition is newly met, without repetition while the condition holds."""

    def __init__(self, conditions: Sequence[Condition] = CONDITIONS) -> None:
        self.conditions = conditions
        self.ticks = dict.fromkeys((condition.name for condition in conditions), 0)  # consecutive ticks

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if tick.is_first or not distributed.is_main():
            return
        for condition in self.newly_met(_tick_values(trainer, tick)):
            print(f'Warning: {condition.message} (docs/troubleshooting.md, "{condition.name}")', flush=True)

    def newly_met(self, values: TickValues) -> list[Condition]:
        """Update with the values of a tick; return the conditions that reach their `patience` at this tick."""
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
    """Images/diversity: standard deviation across generated images, relative to real images.

        mean_chw sqrt(Var_b G(z_b, c)) / mean_chw sqrt(Var_b x_b)

    Computed on rank 0 over NUM_IMAGES fixed z with one label; images are clamped to [-1, 1]. A value of 1 means that
    the generated images of this label are as diverse as real images of all labels, 0 that they are identical.
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
    """Return the standard deviation across images (B, C, H, W), averaged over pixels."""
    return float(images.double().std(dim=0, correction=0).mean())
