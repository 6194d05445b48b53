"""One, two and three processes give equal weights, ADA p, statistics and metrics."""

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
# All phases and a changing ADA p. Adam's epsilon is large: with the usual value, the first steps are the signs of the
# gradients, and rounding flips the signs of small gradients.
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
    """Train, and write the state, the values of both ticks, and the metrics of G_ema."""
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    trainer.augment.p.fill_(0.5)
    trainer.total_nimg = STEPS * trainer.batch_size
    trainer.tick_nimg = trainer.total_nimg // 2
    statistics: dict[str, list[float]] = {}

    def record(trainer: Trainer, tick: Tick) -> None:
        for name, stat in tick.stats.items():
            statistics[f"{tick.number} {name}"] = [stat.mean, stat.std, stat.count]
        if distributed.is_main():
            values = ("Progress/augment", "Images/diversity")
            statistics[f"{tick.number} values"] = [tick.values[name] for name in values]

    trainer.hooks = [Diversity(), OnTick(record)]
    trainer.train()
    context = build_context(trainer)
    results: dict[str, float] = {}
    for result in metrics.registry.compute_all(["swd100"], context):
        results |= result.results
    if distributed.is_main():
        state = trainer.capture()["parts"] | {"state": trainer.state.nimg}
        write_file(path, "result", 1, {"state": state, "statistics": statistics, "metrics": results})


def result(config: TrainConfig, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / f"{config.run.num_gpus}-{config.batch_size}"
    distributed.launch(_train, config.run.num_gpus, config, path)
    return read_file(path, "result", 1, {})


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch"), [(3, 12), (2, 16)])
def test_results_do_not_depend_on_the_number_of_processes(
    shapes_zip: Path, tmp_path: Path, processes: int, batch: int
) -> None:
    """Micro-batches of 4: three on one process or one on each of three; four on one process or two on each of two.

    Weights differ by 2e-7 after four steps. After six steps, rounding can flip the sign of a unit of D at many pixels
    of a uniform background and thereby change a bias by 1e-5.
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
    assert float(one["state"]["ada"]["p"]) not in (0, 0.5, 1)  # p has changed
    assert more["state"]["state"] == one["state"]["state"] == STEPS * batch
    assert more["statistics"].keys() == one["statistics"].keys()
    for name, statistics in one["statistics"].items():
        compared = 2 if "Gradients/" in name else 3  # each process logs the norm of the averaged gradient
        assert more["statistics"][name][:compared] == pytest.approx(statistics[:compared], rel=1e-3, abs=1e-4), name
    assert (
        one["statistics"]["1 Loss/signs/real"][2] == 3 * batch
    )  # real images since the previous tick, over all processes
    assert more["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
