"""Execution settings of the networks: precision, second derivatives, activation checkpointing, noise.

The training loop applies the settings to a forward pass with `using`, and the networks read `current`. The settings are
therefore not part of a network or its snapshots. Outside `using`, everything runs in full precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from training.networks.weights import TransformCache, WeightCache

# Values of --precision and the dtype of reduced-precision activations; None: no reduction.
REDUCED: dict[str | None, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Settings of a forward pass.

    `reduced`: dtype of activations on grids whose longer side is at least `min_grid`; None: no reduced precision.
    `twice_differentiable`: use implementations of attention and convolution with an efficient double backward.
    `recompute`: gradient checkpointing; discard the activations inside a block and recompute them in the backward
    pass, which saves memory at the cost of one more forward pass. `random_noise`: draw fresh noise in discriminators
    with noise, as in training. `minibatches`: number of equal minibatches that are concatenated in the batch of D,
    such as generated and real images; statistics and random choices that images share stay within a minibatch.
    `weights`: cache of effective weights; None: layers compute them at every call. `transforms`: cache of their
    transforms. `attention`: backend of PyTorch's attention, "auto" or a key of attention.BACKENDS. `shared_styles`:
    compute the styles of all layers together if one w is expanded to them, even with gradients; these reach w, but
    not each style separately. `slicing`: a SlicingHead of D returns its logits twice, with gradients for its two
    losses. `all_rgb_heads`: a generator with several RGB heads returns the images of all of them, concatenated along
    the channels, the last one first. `input_transform`: matrices (1 or B, 3, 3) that FourierInput applies to positions
    in the image; None: the identity. `magnitudes`: a list to which a StyleGAN3 generator appends the mean squares of
    its layers' inputs.
    """

    reduced: torch.dtype | None = None
    min_grid: int = 0
    twice_differentiable: bool = False
    recompute: bool = False
    random_noise: bool = False
    minibatches: int = 1
    weights: WeightCache | None = None
    transforms: TransformCache | None = None
    attention: str = "auto"
    shared_styles: bool = False
    slicing: bool = False
    all_rgb_heads: bool = False
    input_transform: Tensor | None = None
    magnitudes: list[Tensor] | None = None


current = Execution()


def set_gpu_arithmetic(*, allow_tf32: bool = False) -> None:
    """Select float32 or TF32 arithmetic for all matrix products and convolutions of the process on GPUs.

    PyTorch's defaults are TF32 in convolutions only, and reduced-precision accumulation in 16-bit matrix products. This
    function disables the reduced-precision accumulation.
    """
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # the compiler's hint to enable TF32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def using(execution: Execution | None = None, **changes: Any) -> Iterator[None]:
    """Context manager that applies `execution` (default: the current settings) with `changes`."""
    global current
    before = current
    current = replace(execution or before, **changes)
    try:
        yield
    finally:
        current = before


def dtype_on(grid: tuple[int, int], exact: torch.dtype) -> torch.dtype:
    """Return the dtype of activations on a grid (height, width); `exact` is the dtype in full precision."""
    return current.reduced if current.reduced is not None and max(grid) >= current.min_grid else exact


def cast(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cast activations x to the dtype of the current settings for a grid (height, width)."""
    return x.to(dtype_on(grid, full_precision_of(x.dtype)))


def full_precision_of(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for float16 and bfloat16, else `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def full_precision(x: Tensor) -> Tensor:
    """Cast x to float32 if it is float16 or bfloat16."""
    return x.to(full_precision_of(x.dtype))


def run_block(block: Callable[..., Any], *args: Any) -> Any:
    """Return block(*args), with gradient checkpointing if `current.recompute` is set."""
    if not (current.recompute and torch.is_grad_enabled()):
        return block(*args)
    settings = current  # the backward pass runs after the `using` context has ended

    def run(*args: Any) -> Any:
        with using(settings, recompute=False):
            return block(*args)

    return checkpoint(run, *args, use_reentrant=False)
