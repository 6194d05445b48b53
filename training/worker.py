"""Processes of a run: each builds, loads and trains; the first one prints and writes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import metrics.registry
from dnnlib import streams
from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError
from dnnlib.download import cache_dir
from dnnlib.util import FolderLock, TeeLog, describe_error, is_out_of_memory, warn_on_write_error
from metrics.detectors import DetectorSetup, read_detectors
from metrics.feature_stats import with_network
from metrics.registry import MetricResult, is_best
from metrics.report import Progress
from metrics.sampling import MetricContext
from torch_utils import custom_ops, distributed
from torch_utils.misc import module_summary, name_user
from torch_utils.signals import EXIT_STOPPED, Signals
from training import hooks, rehearsal, restore, runs, trouble
from training.config import RunConfig, TrainConfig, micro_batches
from training.data_sources.codec import SLOW_DECODER
from training.dataset import ImageDataset
from training.loggers import Loggers, choose_loggers
from training.resume import Start
from training.saving import Saver
from training.training_loop import Trainer, set_arithmetic


def train(start: Start) -> None:
    """Train in this process, one of those of the run. Raises SystemExit if a signal stopped it."""
    streams.protect(needs_stdout=False)  # the run's folder has all that is printed
    name_user()
    tune_allocator()
    with Signals() as signals, FolderLock() as lock:
        is_stopped = _train(start, signals, lock)
        distributed.barrier()  # or the launcher would end the others when the first has gone
    if is_stopped:
        raise SystemExit(EXIT_STOPPED)


def _train(start: Start, signals: Signals, lock: FolderLock) -> bool:
    """Train; return whether a signal stopped it before the end."""
    if start.run_dir:
        distributed.from_main(partial(lock.acquire, start.run_dir))
    device = distributed.use_device(start.config.run.device)
    operators = custom_ops.prepare(device)
    set_arithmetic(start.config)
    dataset = ImageDataset(start.config.data)
    if start.is_to_fit:
        sizes = micro_batches(start.config)
        start = replace(start, config=rehearsal.choose_batch_gpu(start.config, dataset, device))
        operators += f"\n{rehearsal.describe_choice(start.config, sizes)}"
    config = start.config
    with _memory_errors(config):
        trainer = Trainer(config, dataset, device)
        origin = restore.load(trainer, start)
        config = trainer.config
        trainer.synchronise()
        context = build_context(trainer)
        metrics.registry.prepare([*metric_names(config.run, context.setup), *config.run.tick_metrics], context)
        run_dir = distributed.from_main(lambda: runs.create(start.run_dir, start.outdir, config, dataset, lock))
        log = TeeLog(run_dir / "log.txt") if distributed.is_main() else None
        with log or nullcontext(), open_loggers(run_dir, config, trainer.state.nimg) as loggers:
            if distributed.is_main():
                print(_describe(trainer))
                with warn_on_write_error():
                    print(runs.note_start(run_dir, trainer))
            _say("\n".join([operators, origin, *_notes(config)]))
            graphs = ", CUDA graphs" if config.run.graphs else ""
            _say(f"Training on {device} in {run_dir}, {config.precision}{graphs}")
            saver = Saver(runs.RunFolder(run_dir, config, lock, log), trainer.last_snapshot)
            if start.state:  # what --resume=latest then goes on from
                saver.save(trainer, snapshot=False)
                distributed.from_main(saver.finish)
            trainer.hooks = [*build_hooks(trainer, run_dir, saver, context, loggers), hooks.Requests(saver, signals)]
            if start.run_dir:
                _catch_up(trainer)
            trainer.train()
            _finish_profile(trainer)
            distributed.from_main(saver.finish)
            _say(f"Stopped; --resume=latest goes on: {run_dir}" if trainer.is_stopped else f"Done: {run_dir}")
    return trainer.is_stopped


@contextmanager
def _memory_errors(config: TrainConfig) -> Iterator[None]:
    """Raise UserError, which says what to do, where memory is not enough inside, or a worker is killed for that."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if "DataLoader worker" in str(error):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the loader's handler would raise in what follows
            raise UserError(
                f"a process that decodes images has ended ({describe_error(error)}): by hand, or the machine ran out "
                "of memory. --resume=latest goes on; if it happens again, choose fewer --workers"
            ) from None
        if not is_out_of_memory(error):
            raise
        raise UserError(_too_large(config, error)) from None


def _too_large(config: TrainConfig, error: BaseException) -> str:
    """What to do when memory is not enough."""
    batch_gpu = config.run.batch_gpu
    assert isinstance(batch_gpu, int)
    sizes = [size for size in micro_batches(config) if size < batch_gpu]
    half = next((size for size in sizes if size <= batch_gpu / 2), sizes[-1] if sizes else None)
    smaller = [] if half is None else [f"--batch-gpu={half}"]
    smaller += [] if config.run.recompute else ["--grad-checkpoint"]
    smaller += [] if getattr(config.generator, "linformer", True) else ["--linformer (another network)"]
    smaller = smaller or ["a smaller network"]
    if isinstance(error, torch.OutOfMemoryError) or "CU" in str(error):
        smaller = ["--graphs=0"] * bool(config.run.graphs) + smaller
        return f"out of GPU memory with --batch-gpu={batch_gpu}: choose {', '.join(smaller)}"
    return (
        f"out of memory, that of the machine, with --batch-gpu={batch_gpu} ({describe_error(error)}): choose "
        f"{', '.join(smaller)}, or fewer --workers"
    )


def build_hooks(trainer: Trainer, run_dir: Path, saver: Saver, context: MetricContext, loggers: Loggers) -> list[Any]:
    """Return what happens beside training, in the order in which it happens."""
    run, data = trainer.config.run, trainer.config.data
    chain: list[Any] = [hooks.Folder(saver)]
    chain += [hooks.Overfitting(ImageDataset(data, held_out=True))] if data.holdout else []
    chain += [trouble.Diversity(), hooks.Progress(), trouble.Trouble(), hooks.JsonLog(run_dir)]
    chain += [hooks.Log(loggers), hooks.ImageGrids(run_dir, run.snapshot_ticks, loggers)]
    chain.append(hooks.Snapshots(saver, run.snapshot_ticks))
    if run.profile_steps and distributed.is_main():
        chain.append(hooks.Profile(run_dir, run.profile_steps))
    names = metric_names(run, context.setup)
    schedule = [(run.metrics_every or run.snapshot_ticks, names), (1, run.tick_metrics)]
    if names or run.tick_metrics:
        main_metric = (*names, *run.tick_metrics)[0]
        evaluate = _evaluator(trainer, saver, context, main_metric)
        chain.append(hooks.Metrics(saver, schedule, run.snapshot_ticks, evaluate, loggers))
    return chain


def _catch_up(trainer: Trainer) -> None:
    """Compute the metrics that a run which was killed still owes of the step where it goes on."""
    for hook in trainer.hooks:
        if isinstance(hook, hooks.Metrics):
            hook.catch_up(trainer)


def _finish_profile(trainer: Trainer) -> None:
    """Write the trace of a run that was stopped while it was recorded."""
    for hook in trainer.hooks:
        if isinstance(hook, hooks.Profile):
            hook.finish()


def open_loggers(run_dir: Path, config: TrainConfig, nimg: int) -> Loggers:
    """Return what shows figures and pictures beside the run's folder: on the first process, nothing on others."""
    if not distributed.is_main():
        return Loggers((), run_dir, config)
    names = choose_loggers(config.run.log)
    if not names and config.run.log is None:
        _say("TensorBoard events are not written: the package tensorboard is not installed")
    return Loggers(names, run_dir, config, nimg)


def metric_names(run: RunConfig, setup: DetectorSetup) -> tuple[str, ...]:
    """Return the metrics of --metrics, or those that are computed without it."""
    return metrics.registry.default_metrics(setup)[0] if run.metrics is None else run.metrics


def build_context(trainer: Trainer) -> MetricContext:
    """Return what metrics see of a run: all reals, as published, even if it trains on fewer."""
    data = trainer.config.data
    whole = replace(data, max_images=None, holdout=0)
    dataset = trainer.dataset if whole == data else ImageDataset(whole)
    return MetricContext(
        G=trainer.ema.module,
        images=dataset.with_mirror(False),
        mirrored=dataset if data.mirror else None,
        device=trainer.device,
        batch_size=trainer.batch_gpu,
        setup=read_detectors(trainer.config.run.detectors),
        cache=cache_dir() / "statistics",
        progress=Progress(),
    )


def _evaluator(trainer: Trainer, saver: Saver, context: MetricContext, main_metric: str) -> hooks.Evaluate:
    """Return the callable that computes metrics of a generator, prints them and appends them to the run."""
    higher_is_better = metrics.registry.find(main_metric, context.setup)[0].higher_is_better

    def evaluate(
        names: Sequence[str], G_ema: Any, snapshot: Path | None, kimg: float, keep: hooks.Keep
    ) -> dict[str, float]:
        nonlocal context  # whose detectors and statistics of the reals serve all ticks
        context = with_network(context, G_ema)
        values: dict[str, float] = {}
        for result in metrics.registry.compute_all(names, context):
            values |= result.results
            if distributed.is_main():
                written = saver.settled(snapshot)
                record = metrics.registry.result_to_json(
                    result, context, snapshot=written, kimg=kimg, data=trainer.config.data.path
                )
                with warn_on_write_error():
                    if result.metric == main_metric and is_best(
                        record, saver.run_dir, higher_is_better=higher_is_better
                    ):
                        keep(main_metric)
                    metrics.registry.append_result(saver.run_dir, record)
                _say(_describe_result(result, kimg))
        return values

    return evaluate


def _describe_result(result: MetricResult, kimg: float) -> str:
    values = "  ".join(f"{key} {value:.3f}" for key, value in result.results.items())
    counts = f"{result.num_real} real, {result.num_fake} fake"
    warnings = "".join(f"\nWarning: {result.metric}: {warning}" for warning in result.warnings)
    return f"kimg {kimg:g}: {values}  ({result.seconds:.0f}s, {counts}){warnings}"


def _describe(trainer: Trainer) -> str:
    """The data and the networks, for the log."""
    data, G = trainer.dataset, trainer.G
    C, H, W = data.img_shape
    lines = [f"Data: {len(data)} images of {W}x{H}, {C} channels, from {trainer.config.data.path}"]
    lines += [f"Note: {note}" for note in data.notes]
    if data.has_labels and not trainer.config.data.use_labels:
        lines.append("NOTE: THE DATA SET HAS LABELS, AND THEY ARE NOT USED. For a conditional model give --cond.")
    z, c, img = (torch.zeros([1, *shape], device=trainer.device) for shape in ([G.z_dim], [G.c_dim], G.img_shape))
    lines += ["", module_summary(G, [z, c]), "", module_summary(trainer.D, [img, c]), ""]
    return "\n".join(lines)


def _notes(config: TrainConfig) -> list[str]:
    """Lines for the log: a slow decoder, and where a run departs from a paper's protocol."""
    group, batch_gpu = config.discriminator.group_size, config.run.batch_gpu
    notes = [SLOW_DECODER] if SLOW_DECODER else []
    if isinstance(batch_gpu, int) and batch_gpu < group:
        notes.append(f"Minibatch-std: groups of {batch_gpu} instead of {group}, as a GPU has no more at a time")
    if config.run.metrics is None:
        notes.append(f"No --metrics given; {metrics.registry.default_metrics(read_detectors(config.run.detectors))[1]}")
    return notes


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
