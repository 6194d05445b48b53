"""Metrics during training: the hook that computes and logs metrics and keeps the best network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import metrics.registry
from dnnlib.download import cache_dir
from dnnlib.util import warn_on_write_error
from metrics.detectors import DetectorSetup, read_detectors
from metrics.display import ProgressLine
from metrics.feature_stats import with_network
from metrics.registry import MetricResult, is_best
from metrics.sampling import MetricContext
from torch_utils import distributed
from training.config import RunConfig
from training.dataset import ImageDataset
from training.hooks import Hook
from training.input_transform import transform_input
from training.loggers import Loggers
from training.run_folder import read_kimgs
from training.saving import Saver
from training.training_loop import Tick, Trainer


class Evaluation(Hook):
    """Hook that computes metrics and keeps the network with the best value of the first metric (Saver.keep_best).

    With `is_resumed`, metrics that are due at the tick of the training state but are missing from the logs are computed
    before training continues: the run was killed while computing them.
    """

    def __init__(self, saver: Saver, context: MetricContext, loggers: Loggers, *, is_resumed: bool = False) -> None:
        self.saver, self.context, self.loggers, self.is_resumed = saver, context, loggers, is_resumed
        names, tick_metrics = metric_names(saver.run, context.setup), saver.run.tick_metrics
        # (interval in ticks, metrics)
        self.schedule = [(saver.run.metrics_every or saver.run.snapshot_ticks, names), (1, tick_metrics)]
        self.main_metric = (*names, *tick_metrics)[0]
        self.higher_is_better = metrics.registry.find(self.main_metric, context.setup)[0].higher_is_better

    def on_start(self, trainer: Trainer) -> None:
        tick = trainer.current_tick() if self.is_resumed else None
        if tick:
            self._evaluate(trainer, tick, distributed.from_main(lambda: self._missing(trainer, tick)))

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        self._evaluate(trainer, tick, self._due(tick))

    def _due(self, tick: Tick) -> list[str]:
        if tick.is_first and not self.saver.run.metrics_first:
            return []
        return [name for every, names in self.schedule if tick.reached(every) for name in names]

    def _missing(self, trainer: Trainer, tick: Tick) -> list[str]:
        """Return the metrics that are due at this tick and have no record for it in the run's folder."""
        folder, kimg = self.saver.run_dir, trainer.state.nimg / 1000
        return [name for name in self._due(tick) if kimg not in read_kimgs(folder / f"metric-{name}.jsonl")]

    def _evaluate(self, trainer: Trainer, tick: Tick, names: Sequence[str]) -> None:
        if not names:
            return
        if self.saver.run.keep_best:
            trainer.check_replicas()
        snapshot = self.saver.run_dir / f"network-snapshot-{trainer.state.nimg // 1000:06d}.pkl"
        is_written = tick.reached(self.saver.run.snapshot_ticks)
        self.context = with_network(self.context, trainer.ema.module)  # keeps cached statistics of real images
        values: dict[str, float] = {}
        for result in metrics.registry.compute_all(names, self.context):
            values |= result.results
            if distributed.is_main():
                self._record(trainer, result, snapshot if is_written else None)
        self.loggers.add({f"Metrics/{name}": value for name, value in values.items()}, trainer.state.nimg)

    def _record(self, trainer: Trainer, result: MetricResult, snapshot: Path | None) -> None:
        """Print a result and log it. The best network is written before the log, so an interruption cannot lose it."""
        folder, kimg, data = self.saver.run_dir, trainer.state.nimg / 1000, trainer.config.data.path
        written = self.saver.wait_for(snapshot)
        record = metrics.registry.result_to_json(result, self.context, snapshot=written, kimg=kimg, data=data)
        with warn_on_write_error():
            if result.metric == self.main_metric and is_best(record, folder, higher_is_better=self.higher_is_better):
                self._keep(trainer)
            metrics.registry.append_result(folder, record)
        print(_describe(result, kimg), flush=True)

    def _keep(self, trainer: Trainer) -> None:
        with warn_on_write_error():
            self.saver.keep_best(trainer, self.main_metric)
            print(f"Best {self.main_metric} so far, saved as network-best-{self.main_metric}.pkl", flush=True)


def metric_names(run: RunConfig, setup: DetectorSetup) -> tuple[str, ...]:
    """Return the metrics given by --metrics, or the default metrics."""
    return metrics.registry.default_metrics(setup)[0] if run.metrics is None else run.metrics


def build_context(trainer: Trainer) -> MetricContext:
    """Return the inputs of metrics: G_ema and the whole dataset, even if training uses less (published protocols).

    Metrics of memorisation compare with the training images and the images of --holdout.
    """
    data = trainer.config.data
    full = replace(data, max_images=None, holdout=0)
    dataset = trainer.dataset if full == data else ImageDataset(full)
    return MetricContext(
        G=trainer.ema.module,
        transform_input=transform_input,
        images=dataset.with_mirror(False),
        mirrored=dataset if data.mirror else None,
        train=None if dataset is trainer.dataset else trainer.dataset.with_mirror(False),
        held_out=ImageDataset(replace(data, mirror=False), held_out=True) if data.holdout else None,
        device=trainer.device,
        batch_size=trainer.batch_gpu,
        setup=read_detectors(trainer.config.run.detectors),
        cache=cache_dir() / "statistics",
        progress=ProgressLine(),
    )


def _describe(result: MetricResult, kimg: float) -> str:
    values = "  ".join(f"{key} {value:.3f}" for key, value in result.results.items())
    counts = f"{result.num_real} real, {result.num_fake} fake"
    warnings = "".join(f"\nWarning: {result.metric}: {warning}" for warning in result.warnings)
    return f"kimg {kimg:g}: {values}  ({result.seconds:.0f}s, {counts}){warnings}"
