"""Main function of a training process: build networks, load weights, train."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

import metrics.registry
from dnnlib import streams
from dnnlib.allocator import tune_allocator
from dnnlib.config import UserError
from dnnlib.util import FolderLock, TeeLog, describe_error, is_out_of_memory, warn_on_write_error
from metrics.detectors import read_detectors
from metrics.sampling import MetricContext
from torch_utils import distributed, kernels
from torch_utils.misc import module_summary, name_user, product_rate
from torch_utils.signals import EXIT_STOPPED, Signals
from training import auto_batch, restore, run_folder
from training.config import TrainConfig, micro_batches
from training.data_sources.codec import SLOW_DECODER
from training.dataset import ImageDataset
from training.evaluation import Evaluation, build_context, metric_names
from training.forecast import ForecastLine, measure
from training.health import Diversity, HealthCheck
from training.hooks import (
    Folder,
    Hook,
    ImageGrids,
    JsonLog,
    Log,
    Overfitting,
    Profile,
    Requests,
    Snapshots,
    TickLine,
)
from training.loggers import Loggers, choose_loggers
from training.networks.execution import REDUCED
from training.resume import Start
from training.saving import Saver
from training.training_loop import Trainer, set_arithmetic


def train(start: Start, dataset: ImageDataset | None = None) -> None:
    """Train in this process as one of the run's processes, on the images of `start` or on these, if already open.

    Raises SystemExit if a signal stopped training.
    """
    streams.protect(needs_stdout=False)  # log.txt contains all output
    name_user()
    tune_allocator()
    with Signals() as signals, FolderLock() as lock:
        is_stopped = _train(start, dataset, signals, lock)
        distributed.barrier()  # otherwise the launcher would terminate the other processes when the first exits
    if is_stopped:
        raise SystemExit(EXIT_STOPPED)


def _train(start: Start, dataset: ImageDataset | None, signals: Signals, lock: FolderLock) -> bool:
    """Train; return whether a signal stopped training before the end."""
    if start.run_dir:
        distributed.from_main(partial(lock.acquire, start.run_dir))
    config, dataset, device, operators = _set_up(start, dataset)
    with _memory_errors(config):
        trainer = Trainer(config, dataset, device)
        origin = restore.load(trainer, start)
        if start.run_dir:
            restore.discard_later(start.run_dir, trainer.state.nimg)
        config = trainer.config  # includes the origin of the weights
        trainer.synchronise()
        context = build_context(trainer)
        metrics.registry.prepare([*metric_names(config.run, context.setup), *config.run.tick_metrics], context)
        run_dir = distributed.from_main(lambda: run_folder.create(start.run_dir, start.outdir, config, dataset, lock))
        log = TeeLog(run_dir / "log.txt") if distributed.is_main() else None
        with log or nullcontext(), open_loggers(run_dir, config, trainer.state.nimg) as loggers:
            if distributed.is_main():
                print(_describe(trainer))
                with warn_on_write_error():
                    print(run_folder.log_start(run_dir, trainer))
            _print_on_main("\n".join([operators, origin, *_notes(config), *_note_on_precision(config, device)]))
            graphs = ", CUDA graphs" if config.run.graphs else ""
            _print_on_main(f"Training on {device} in {run_dir}, {config.precision}{graphs}")
            saver = Saver(run_folder.RunFolder(run_dir, config, lock, log), trainer.last_snapshot)
            if start.state:  # allows --resume=latest from the start
                saver.save(trainer, snapshot=False)
                distributed.from_main(saver.finish)
            is_resumed = start.run_dir is not None
            trainer.hooks = build_hooks(trainer, saver, context, loggers, signals, is_resumed=is_resumed)
            trainer.train()
            outcome = "Stopped; --resume=latest resumes this run" if trainer.is_stopped else "Done"
            _print_on_main(f"{outcome}: {run_dir}")
    return trainer.is_stopped


def _set_up(start: Start, dataset: ImageDataset | None) -> tuple[TrainConfig, ImageDataset, torch.device, str]:
    """Prepare the device; return the configuration with its micro-batch, dataset, device, and lines for the log."""
    config = start.config
    device = distributed.use_device(config.run.device)
    set_arithmetic(config)
    operators = kernels.prepare(device)
    dataset = ImageDataset(config.data) if dataset is None else dataset
    if start.needs_batch_gpu:
        sizes = micro_batches(config)
        config = auto_batch.choose_batch_gpu(config, dataset, device)
        operators += f"\n{auto_batch.describe_choice(config, sizes)}"
    return config, dataset, device, operators


def forecast(start: Start, dataset: ImageDataset, report: Callable[[dict[str, float]], None]) -> None:
    """Measure what a run will take, as one of its processes, and report it on rank 0; nothing is kept."""
    tune_allocator()
    config, dataset, device, _ = _set_up(start, dataset)
    with _memory_errors(config):
        trainer = Trainer(config, dataset, device)
        if start.run_dir or start.state:
            restore.load(trainer, start)
        values = measure(trainer)
    if distributed.is_main():
        report(values)


@contextmanager
def _memory_errors(config: TrainConfig) -> Iterator[None]:
    """Convert out-of-memory errors, and the death of a data worker, to UserError with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if "DataLoader worker" in str(error):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would raise during cleanup
            raise UserError(
                f"a data worker was killed ({describe_error(error)}), possibly because "
                "the host ran out of memory. Resume with --resume=latest; if it happens again, choose fewer --workers"
            ) from None
        if not is_out_of_memory(error):
            raise
        raise UserError(_advise_on_memory(config, error)) from None


def _advise_on_memory(config: TrainConfig, error: BaseException) -> str:
    """Return the message for an out-of-memory error, with the options that reduce memory use."""
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
        f"out of host memory with --batch-gpu={batch_gpu} ({describe_error(error)}): choose "
        f"{', '.join(smaller)}, or fewer --workers"
    )


def build_hooks(
    trainer: Trainer, saver: Saver, context: MetricContext, loggers: Loggers, signals: Signals, *, is_resumed: bool
) -> list[Hook]:
    """Return the hooks in the order in which they are called."""
    run, data, run_dir = trainer.config.run, trainer.config.data, saver.run_dir
    chain: list[Hook] = [Folder(saver)]
    if data.holdout:
        chain.append(Overfitting(ImageDataset(data, held_out=True)))
    chain += [ForecastLine(), Diversity(), TickLine(), HealthCheck(), JsonLog(run_dir), Log(loggers)]
    chain += [ImageGrids(run_dir, run.snapshot_ticks, loggers), Snapshots(saver, run.snapshot_ticks)]
    if run.profile_steps and distributed.is_main():
        chain.append(Profile(run_dir, run.profile_steps))
    if metric_names(run, context.setup) or run.tick_metrics:
        chain.append(Evaluation(saver, context, loggers, is_resumed=is_resumed))
    chain.append(Requests(saver, signals))
    return chain


def open_loggers(run_dir: Path, config: TrainConfig, nimg: int) -> Loggers:
    """Return the loggers of values and images; none on processes other than rank 0."""
    if not distributed.is_main():
        return Loggers((), run_dir, config)
    names = choose_loggers(config.run.log)
    if not names and config.run.log is None:
        _print_on_main("TensorBoard events are not written: the package tensorboard is not installed")
    return Loggers(names, run_dir, config, nimg)


def _describe(trainer: Trainer) -> str:
    """Return a summary of the dataset and the networks for the log."""
    data, G = trainer.dataset, trainer.G
    C, H, W = data.img_shape
    lines = [f"Data: {len(data)} images of {W}x{H}, {C} channels, from {trainer.config.data.path}"]
    lines += [f"Note: {note}" for note in data.notes]
    if data.has_labels and not trainer.config.data.use_labels:
        lines.append("NOTE: THE DATASET HAS LABELS, AND THEY ARE NOT USED. For a conditional model give --cond.")
    shapes = ([G.z_dim], [G.c_dim], trainer.D.img_shape)
    z, c, img = (torch.zeros([1, *shape], device=trainer.device) for shape in shapes)
    lines += ["", module_summary(G, [z, c]), "", module_summary(trainer.D, [img, c]), ""]
    return "\n".join(lines)


def _notes(config: TrainConfig) -> list[str]:
    """Return notes for the log: a slow image decoder, and deviations from published protocols and exact penalties."""
    group, batch_gpu = config.discriminator.group_size, config.run.batch_gpu
    notes = [SLOW_DECODER] if SLOW_DECODER else []
    if isinstance(batch_gpu, int) and batch_gpu < group:
        notes.append(f"Minibatch-std: groups of {batch_gpu} instead of {group}, because the micro-batch is smaller")
    if config.loss.estimate and config.precision != "fp32":
        notes.append(
            f"loss.penalty=estimate in {config.precision}: rounding makes R1 and R2 several times too large, so gamma "
            "is not comparable with exact penalties (docs/objectives.md)"
        )
    if config.run.metrics is None:
        notes.append(f"No --metrics given; {metrics.registry.default_metrics(read_detectors(config.run.detectors))[1]}")
    return notes


def _note_on_precision(config: TrainConfig, device: torch.device) -> list[str]:
    """Return a note for the log if the processor computes products faster in float32 than in reduced precision."""
    reduced = REDUCED[config.precision]
    if reduced is None or device.type != "cpu":
        return []
    rate, exact = (product_rate(dtype) / 1e9 for dtype in (reduced, torch.float32))
    if rate >= exact:
        return []
    return [
        f"SLOW: matrix products take {exact / rate:.1f} times as long in {config.precision} as in fp32 on this "
        f"processor ({rate:.3g} against {exact:.3g} GFLOP/s): --precision=fp32 is faster"
    ]


def _print_on_main(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
