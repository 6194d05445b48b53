"""Registration of the operators with torch.library, and helpers shared by their launchers.

Operators are defined with `torch.library.Library`; an autograd.Function on the Autograd key provides the derivatives.
A call with gradients then costs half the host time of `torch.library.custom_op` or `register_autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_utils import custom_ops
from torch_utils.custom_ops import Kernels

_library = torch.library.Library("styleformer", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None,
) -> Callable[..., Any]:
    """Define and return styleformer::`schema`, with one output or a tuple of outputs.

    `function` calls the operator below autograd and implements its derivative; None defines no derivative.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"styleformer::{name}", fake, lib=_library)
    operator = getattr(torch.ops.styleformer, name).default

    def autograd(*args: Any) -> Any:
        if function and torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with below_autograd():
            return operator(*args)

    _library.impl(name, autograd, "Autograd")
    return operator


def below_autograd() -> AbstractContextManager[Any]:
    """Return a context manager in which operators dispatch below autograd, directly to their kernels."""
    return torch._C._AutoDispatchBelowAutograd()


def is_plain_eager() -> bool:
    """Return whether operators run eagerly, without forward-mode AD, torch.func transforms and autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cpu")
    )


def is_needed(ctx: Any, i: int) -> bool:
    """Return whether the current backward pass uses the gradient of the i-th tensor argument of a Function.

    `ctx.needs_input_grad` is also true if only other gradients are requested from `torch.autograd.grad`.
    """
    node = ctx.next_functions[i][0] if ctx.needs_input_grad[i] else None
    # The engine does not answer for leaves.
    return node is not None and ("AccumulateGrad" in node.name() or torch._C._will_engine_execute_node(node))


def kernels() -> Kernels:
    """Return the loaded CUDA kernels. Raises RuntimeError if they are unavailable."""
    loaded = custom_ops.load()
    if loaded is None:
        raise RuntimeError(f"the CUDA kernels are unavailable: {custom_ops.why_not()}")
    return loaded


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format for x: channels_last if x has that layout and is not contiguous, else contiguous."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the compute dtype of the kernels: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
