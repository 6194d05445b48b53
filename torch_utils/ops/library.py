"""How the operators are registered with torch.library, and what their launchers share.

Operators are defined with `torch.library.Library` and get their derivatives from an autograd.Function on the Autograd
key: a call that records a graph costs half of what `torch.library.custom_op` or `register_autograd` cost on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from torch_utils import custom_ops
from torch_utils.custom_ops import Kernels

_library = torch.library.Library("styleformer", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable[..., Tensor],
    cuda: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    function: type[torch.autograd.Function],
) -> Callable[..., Tensor]:
    """Define styleformer::`schema` and return it; `function` calls it below autograd and has its derivative."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"styleformer::{name}", fake, lib=_library)
    operator = getattr(torch.ops.styleformer, name).default

    def autograd(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        with below_autograd():
            return operator(*args)

    _library.impl(name, autograd, "Autograd")
    return operator


def below_autograd() -> AbstractContextManager[Any]:
    """Within it, operators go past their derivatives to their kernels."""
    return torch._C._AutoDispatchBelowAutograd()


def kernels() -> Kernels:
    """Return the kernels. Raises RuntimeError where there are none."""
    loaded = custom_ops.load()
    if loaded is None:
        raise RuntimeError(f"this operator has no CUDA kernels here: {custom_ops.why_not()}")
    return loaded


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format that x has, or gets: channels_last if it is that and not contiguous too."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the type that the kernels compute in: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
