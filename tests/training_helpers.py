"""Short training runs: configurations, saved state, and the distance to real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from conftest import make_shapes, small_config
from torch import Tensor, nn

import train
from torch_utils import distributed
from torch_utils.stats import Stats
from training import loss
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.training_loop import Trainer

OBJECTIVES = tuple(loss.OBJECTIVES)
# Changes to a configuration for the logistic objective, by new objective.
OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {
    "logistic": {"loss__r1_interval": 3},
    "hinge": {"loss__r1_interval": 3},
    "wgangp-eps": {"loss__r1_gamma": 0.0, "loss__r1_interval": None},
    "relativistic": {"loss__r1_interval": None},
}

# Options of train.py for networks that learn scenes within a few thousand images.
SMALL_STYLEGAN2_G = ["--set=generator.channel_base=512", "--set=generator.channel_max=64"]
SMALL_STYLEGAN2_D = ["--cbase=512", "--set=discriminator.channel_max=64"]


def every_phase_config(data: Path, **changes: object) -> TrainConfig:
    """Return a configuration with everything that could depend on how a batch is split.

    The configuration has every phase, several micro-batches, style mixing, and a changing ADA p.
    """
    values: dict[str, Any] = {"batch_size": 8, "run__batch_gpu": 4, "augment__pipe": "bgc", "augment__ada_kimg": 0.2}
    values |= {"loss__pl_weight": 2.0, "loss__pl_interval": 2, "loss__r1_interval": 3, "loss__style_mixing": 0.9}
    return small_config(data, **values | changes)


def new_trainer(config: TrainConfig) -> Trainer:
    return Trainer(config, ImageDataset(config.data), torch.device("cpu"))


def train_steps(trainer: Trainer, steps: int) -> None:
    trainer.total_nimg = trainer.state.nimg + steps * trainer.batch_size
    trainer.train()


def saved_state(trainer: Trainer) -> dict[str, Any]:
    """Return the contents of a training state except the times."""
    return without_times({name: part.state_dict() for name, part in trainer.checkpoint.parts.items()})


def without_times(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a training state without the times, which differ between equal runs."""
    times = ("elapsed", "step_seconds", "cpu_seconds")
    return parts | {"state": {key: value for key, value in parts["state"].items() if key not in times}}


def train_with_a_break(config: TrainConfig, before: int, after: int, folder: Path) -> Trainer:
    """Train for `before` steps, save the state, resume it with a new trainer, and train that for `after` steps."""
    first, second = new_trainer(config), new_trainer(config)
    train_steps(first, before)
    first.save(folder / "training-state-000000.pt")
    second.resume(folder / "training-state-000000.pt")
    train_steps(second, after)
    return second


def train_and_save(trainer: Trainer, steps: int, path: Path) -> None:
    """Train, and save the state with statistics of the rank, which each process reports twice."""
    train_steps(trainer, steps)
    statistics = Stats(torch.device("cpu"))
    statistics.add({"rank": torch.full([2], float(distributed.rank()))})
    statistics.gather()
    saved = {name: x.clone() for name, x in statistics.state_dict().items()}
    assert saved["rank"].tolist() == ([4, 2, 2] if distributed.is_main() else [0, 0, 0])
    collected = statistics.collect()["rank"]
    if distributed.is_main():
        trainer.checkpoint.save(path, rank_mean=collected.mean, rank_std=collected.std, count=collected.count)


def flat_parameters(module: nn.Module) -> Tensor:
    """Return a copy of all parameters in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def distances_to_scenes(tmp_path: Path, side: int, *options: str) -> tuple[float, float]:
    """Return the sliced Wasserstein distance to scenes of side x side pixels, before and after training."""
    data = make_shapes(tmp_path / "scenes.zip", side, 2048)
    command = [f"--outdir={tmp_path / 'runs'}", f"--data={data}", "--cfg=tiny", "--aug=none", "--snap=1"]
    command += ["--metrics=swd200", "--device=cpu", "--workers=0"]
    result = CliRunner().invoke(train.main, [*command, *options])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    (log,) = (tmp_path / "runs").glob("*/metric-swd200.jsonl")
    untrained, *_, trained = (json.loads(line)["results"]["swd200"] for line in log.read_text().splitlines())
    return untrained, trained
