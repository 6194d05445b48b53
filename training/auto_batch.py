"""How many images fit into memory at a time: --batch-gpu=auto."""

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

# Of a GPU's memory; the rest is for what a rehearsal leaves out: NCCL, metrics, pictures.
SHARE = 0.9


def choose_batch_gpu(
    config: TrainConfig, dataset: ImageDataset, device: torch.device, fits: Callable[..., bool] | None = None
) -> TrainConfig:
    """Return a resolved configuration with the largest micro-batch for which `fits` holds on all processes.

    `fits` (config, dataset, device) is `fits_in_memory` unless given. A collective call, from which nothing remains: no
    weights, no random numbers, no memory. Raises UserError when not even the smallest one fits.
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
        f"choose {graphs}--grad-checkpoint, a lower --precision, or, where minibatch-std asks for such groups, a "
        "smaller --mbstd"
    )


def describe_choice(config: TrainConfig, sizes: Sequence[int]) -> str:
    """What was chosen among `sizes`, for the log."""
    chosen = config.run.batch_gpu
    assert isinstance(chosen, int)
    too_large = ", ".join(str(size) for size in sizes if size > chosen)
    return f"--batch-gpu=auto: {chosen} images at a time" + (f" ({too_large} did not fit)" if too_large else "")


def fits_in_memory(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> bool:
    """Whether this process can compute all phases of a step with the micro-batches of a configuration."""
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.init()  # without it nothing can be reset
            torch.cuda.reset_peak_memory_stats(device)
        Trainer(config, dataset, device).trial_step()
        return not on_gpu or _peak_share(device) <= SHARE
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # networks and hooks refer to each other
        if on_gpu:
            torch.cuda.empty_cache()


def _peak_share(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
