"""How networks compute, as opposed to what: precision, second derivatives, memory, noise.

Whoever trains says it around a forward pass, and the networks ask here; so a network has no mode that a snapshot could
carry along, and outside of `using` everything runs in full precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# What --precision says, and the type of activations that it means; None leaves them alone.
REDUCED: dict[str | None, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """`reduced` is the type of activations on grids whose longer side is at least `min_grid`, None for none.

    `twice_differentiable`: attention takes a form that can be differentiated twice, block by block. `recompute`:
    activations inside a block are not kept but computed again in the backward pass (gradient checkpointing), which
    saves memory and costs a forward pass. `random_noise`: a discriminator that has noise draws it afresh, as it does
    in training.
    """

    reduced: torch.dtype | None = None
    min_grid: int = 0
    twice_differentiable: bool = False
    recompute: bool = False
    random_noise: bool = False


current = Execution()


def set_gpu_arithmetic(*, allow_tf32: bool = False) -> None:
    """Say for the whole process how GPUs compute products and convolutions of float32: exactly, or in TF32.

    PyTorch's default is TF32 for convolutions alone. Products of 16-bit numbers add their partial sums in float32, not
    PyTorch's default either.
    """
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # the compiler's hint to allow it
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def using(execution: Execution | None = None, **changes: Any) -> Iterator[None]:
    """Compute in this way, or as now but for `changes`, until the context ends."""
    global current
    before = current
    current = replace(execution or before, **changes)
    try:
        yield
    finally:
        current = before


def cast(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return activations x in the type that they have on a grid (height, width)."""
    if current.reduced is not None and max(grid) >= current.min_grid:
        return x.to(current.reduced)
    return full_precision(x)


def full_precision(x: Tensor) -> Tensor:
    """Return x in float32 if it is in a type of less precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def run_block(block: Callable[..., Any], *args: Any) -> Any:
    """Return block(*args), keeping what its backward pass needs, or only what it was called with."""
    if not (current.recompute and torch.is_grad_enabled()):
        return block(*args)
    then = current  # the backward pass comes after the context has ended

    def again(*args: Any) -> Any:
        with using(then, recompute=False):
            return block(*args)

    return checkpoint(again, *args, use_reentrant=False)
