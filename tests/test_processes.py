"""One, two and three processes compute the same: weights, ADA's p, statistics, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OnTick, small_config

import metrics.registry
from torch_utils import distributed
from torch_utils.checkpoint import read_file, write_file
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.evaluation import build_context
from training.health import Diversity
from training.training_loop import Tick, Trainer

STEPS = 6
# Every phase, and an ADA that moves. A large epsilon in Adam: with the usual one its first steps are the signs of
# gradients, which rounding turns where they are small.
CONFIG = {
    "loss__pl_weight": 2.0,
    "loss__pl_interval": 2,
    "loss__r1_interval": 3,
    "loss__style_mixing": 0.9,
    "augment__pipe": "bgc",
    "augment__ada_kimg": 0.2,
    "data__use_labels": True,
    "run__batch_gpu": 4,
    "g_optimizer__eps": 1e-2,
    "d_optimizer__eps": 1e-2,
}


def _train(config: TrainConfig, path: Path) -> None:
    """Train, and write all that has come of it: the state, the figures of both ticks, metrics of the average."""
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    trainer.augment.p.fill_(0.5)
    trainer.total_nimg = STEPS * trainer.batch_size
    trainer.tick_nimg = trainer.total_nimg // 2
    figures: dict[str, list[float]] = {}

    def note(trainer: Trainer, tick: Tick) -> None:
        for name, stat in tick.stats.items():
            figures[f"{tick.number} {name}"] = [stat.mean, stat.std, stat.count]
        if distributed.is_main():
            values = ("Progress/augment", "Images/diversity")
            figures[f"{tick.number} values"] = [tick.values[name] for name in values]

    trainer.hooks = [Diversity(), OnTick(note)]
    trainer.train()
    context = build_context(trainer)
    results: dict[str, float] = {}
    for result in metrics.registry.compute_all(["swd100"], context):
        results |= result.results
    if distributed.is_main():
        state = trainer.capture()["parts"] | {"state": trainer.state.nimg}
        write_file(path, "result", 1, {"state": state, "figures": figures, "metrics": results})


def result(config: TrainConfig, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / f"{config.run.num_gpus}-{config.batch_size}"
    distributed.launch(_train, config.run.num_gpus, config, path)
    return read_file(path, "result", 1, {})


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch"), [(3, 12), (2, 16)])
def test_results_do_not_depend_on_the_number_of_processes(
    shapes_zip: Path, tmp_path: Path, processes: int, batch: int
) -> None:
    """Micro-batches of 4: three in one process or one in each of three; four in one or two in each of two.

    Weights differ by 2e-7 after four steps. After six a rounding that lets a unit of D change its sign, on a background
    of one colour at many pixels, can have moved a bias by 1e-5.
    """
    one, more = (
        result(small_config(shapes_zip, **CONFIG, batch_size=batch, run__num_gpus=count), tmp_path)
        for count in (1, processes)
    )
    for part in ("G", "D", "G_ema", "pl_mean"):
        for name, x in one["state"][part].items():
            torch.testing.assert_close(more["state"][part][name], x, rtol=1e-4, atol=5e-5, msg=f"{part} {name}")
    for name, x in one["state"]["ada"].items():
        assert torch.equal(more["state"]["ada"][name], x), name
    assert float(one["state"]["ada"]["p"]) not in (0, 0.5, 1)  # it has moved
    assert more["state"]["state"] == one["state"]["state"] == STEPS * batch
    assert more["figures"].keys() == one["figures"].keys()
    for name, figures in one["figures"].items():
        compared = 2 if "Gradients/" in name else 3  # each process reports the norm of the common gradient
        assert more["figures"][name][:compared] == pytest.approx(figures[:compared], rel=1e-3, abs=1e-4), name
    assert one["figures"]["1 Loss/signs/real"][2] == 3 * batch  # reals since the tick before, of all processes
    assert more["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
