"""Search for the largest micro-batch that fits into memory: --batch-gpu=auto."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from dnnlib.config import UserError, override
from dnnlib.util import is_out_of_memory
from torch_utils import distributed
from training.config import TrainConfig, micro_batches
from training.dataset import ImageDataset
from training.training_loop import Trainer

# Maximum fraction of GPU memory that the trial may use. NCCL, metrics and image grids need the rest.
MAX_FRACTION = 0.9


def choose_batch_gpu(
    config: TrainConfig, dataset: ImageDataset, device: torch.device, fits: Callable[..., bool] | None = None
) -> TrainConfig:
    """Return a resolved configuration with the largest micro-batch for which `fits` is true on all processes.

    `fits(config, dataset, device)` defaults to `fits_in_memory`. The search is collective and leaves weights, random
    state and memory unchanged. Raises UserError if even the smallest micro-batch does not fit.
    """
    fits = fits or fits_in_memory
    sizes = micro_batches(config)
    for size in sizes:
        candidate = override(config, {"run.batch_gpu": size})
        if distributed.maximum([not fits(candidate, dataset, device)]) == [0]:
            return candidate
    graphs = "--graphs=0, " if config.run.graphs else ""
    raise UserError(
        f"--batch-gpu=auto: out of memory even with {sizes[-1]} images at a time (tried {', '.join(map(str, sizes))}): "
        f"choose {graphs}--grad-checkpoint, a lower --precision, or a smaller --mbstd (a micro-batch contains at "
        "least one minibatch-std group)"
    )


def describe_choice(config: TrainConfig, sizes: Sequence[int]) -> str:
    """Return a log line with the chosen size and the `sizes` that did not fit."""
    chosen = config.run.batch_gpu
    assert isinstance(chosen, int)
    too_large = ", ".join(str(size) for size in sizes if size > chosen)
    return f"--batch-gpu=auto: {chosen} images at a time" + (f" ({too_large} did not fit)" if too_large else "")


def fits_in_memory(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> bool:
    """Return whether all phases of a step fit into memory with the micro-batches of a configuration."""
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.init()  # required before the statistics can be reset
            torch.cuda.reset_peak_memory_stats(device)
        Trainer(config, dataset, device).trial_step()
        return not on_gpu or _peak_fraction(device) <= MAX_FRACTION
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # networks and hooks form reference cycles
        if on_gpu:
            torch.cuda.empty_cache()


def _peak_fraction(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
