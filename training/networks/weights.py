"""Effective weights: parameters multiplied by the gain of their layer and cast to the dtype of its activations.

A layer gets its weights from `effective`. During training, a `WeightCache` computes the effective weights of all layers
together, in a few kernels for the forward and a few for the backward pass, instead of two per layer and call. A
`TransformCache` keeps their transforms for `torch_utils.ops.winograd` from one pass to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.ops import winograd
from training.networks import execution

Request = tuple[nn.Parameter, torch.dtype, float]
Key = tuple[int, torch.dtype, float]  # id of the parameter, dtype, gain


def effective(parameter: Tensor, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    """Return (gain * parameter).to(dtype), from the cache of `execution.current` if there is one."""
    if gain == 1 and parameter.dtype == dtype:
        return parameter
    cache = None if torch.compiler.is_compiling() else execution.current.weights
    if cache is not None and isinstance(parameter, nn.Parameter):
        return cache.get(parameter, dtype, gain)
    return (parameter if gain == 1 else parameter * gain).to(dtype)


def transformed(weight: Tensor, algorithm: winograd.Algorithm) -> Tensor:
    """Return the transform of an effective weight; `execution.current` may have a cache with its values."""
    weights, transforms = execution.current.weights, execution.current.transforms
    request = None if weights is None or transforms is None else weights.request(weight)
    if request is None or transforms is None:
        return winograd.transform(weight, algorithm)
    U = winograd.transform(weight, algorithm, transforms.get(request, algorithm))
    transforms.put(request, algorithm, U.detach())
    return U


class TransformCache:
    """Values of the transforms of effective weights, from one pass to the next.

    A transform takes 4 to 9 times the memory of its weight. It is valid until the parameter changes: PyTorch counts
    changes, except those of fused optimizers, which must call `forget`.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Key, winograd.Algorithm], tuple[nn.Parameter, int, Tensor]] = {}

    def get(self, request: Request, algorithm: winograd.Algorithm) -> Tensor | None:
        """Return the transform of a weight, or None."""
        entry = self.entries.get((_key(*request), algorithm))
        if entry is None:
            return None
        parameter, version, U = entry
        return U if version == parameter._version else None

    def put(self, request: Request, algorithm: winograd.Algorithm, U: Tensor) -> None:
        """Keep the transform of a weight."""
        parameter = request[0]
        self.entries[_key(*request), algorithm] = parameter, parameter._version, U

    def forget(self, parameters: Collection[nn.Parameter]) -> None:
        """Drop the transforms of these parameters."""
        changed = {id(parameter) for parameter in parameters}
        self.entries = {key: entry for key, entry in self.entries.items() if id(entry[0]) not in changed}


def _key(parameter: nn.Parameter, dtype: torch.dtype, gain: float) -> Key:
    return id(parameter), dtype, gain


class WeightCache:
    """Effective weights of one phase. The requests of the first pass are computed one by one and remembered.

    Gradients of a weight that is used several times are added in its reduced dtype. Use as
    `execution.using(weights=cache)` inside `with cache.filled():`, which computes all remembered requests
    together from the current parameters.
    """

    def __init__(self) -> None:
        self.requests: dict[Key, Request] = {}
        self.ready: dict[Key, Tensor] = {}

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Compute the remembered requests for the duration of the block, which includes the backward pass."""
        try:
            for needs_grad in (True, False):
                keys = [
                    key for key, (parameter, _, _) in self.requests.items() if parameter.requires_grad == needs_grad
                ]
                if keys:
                    parameters, dtypes, gains = zip(*(self.requests[key] for key in keys), strict=True)
                    self.ready |= zip(keys, _Effective.apply(gains, dtypes, *parameters), strict=True)
            yield
        finally:
            self.ready = {}

    def get(self, parameter: nn.Parameter, dtype: torch.dtype, gain: float) -> Tensor:
        """Return an effective weight; remember the request."""
        key = _key(parameter, dtype, gain)
        if key in self.ready:
            return self.ready[key]
        (weight,) = _Effective.apply((gain,), (dtype,), parameter)
        if weight.requires_grad == parameter.requires_grad:  # not inside no_grad
            self.requests[key], self.ready[key] = (parameter, dtype, gain), weight
        return weight

    def request(self, weight: Tensor) -> Request | None:
        """Return the request of an effective weight; None for other tensors."""
        if isinstance(weight, nn.Parameter):
            return weight, weight.dtype, 1.0
        return next((self.requests[key] for key, ready in self.ready.items() if ready is weight), None)


class _Effective(torch.autograd.Function):
    """(gain * x).to(dtype) for each tensor; the derivative has the same form, with the dtypes of the inputs."""

    @staticmethod
    def forward(
        ctx: Any, gains: Sequence[float], dtypes: Sequence[torch.dtype], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gains, ctx.dtypes = gains, [x.dtype for x in tensors]
        ctx.set_materialize_grads(False)  # a weight that the loss does not reach costs nothing
        return tuple(_scale_and_cast(tensors, gains, dtypes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found: list[Tensor | None] = [None] * len(grads)
        reached = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        if reached:
            indices, tensors = zip(*reached, strict=True)
            gains, dtypes = [ctx.gains[i] for i in indices], [ctx.dtypes[i] for i in indices]
            for i, x in zip(indices, _Effective.apply(gains, dtypes, *tensors), strict=True):
                found[i] = x
        return None, None, *found


def _scale_and_cast(
    tensors: Sequence[Tensor], gains: Sequence[float], dtypes: Sequence[torch.dtype]
) -> Sequence[Tensor]:
    """Return (gain * x).to(dtype) for each tensor, multiplied in the wider of the two dtypes."""
    wide = [torch.promote_types(x.dtype, dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    x = _cast(tensors, wide)
    scaled = [i for i, gain in enumerate(gains) if gain != 1]
    if scaled:
        for i, product in zip(
            scaled, torch._foreach_mul([x[i] for i in scaled], [gains[i] for i in scaled]), strict=True
        ):
            x[i] = product
    return _cast(x, dtypes)


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Cast each tensor to its dtype, with one foreach operator for all that change."""
    # A foreach operator takes few kernels only if all tensors are dense; an expanded gradient is not.
    out = [x.contiguous() if 0 in x.stride() else x for x in tensors]
    changed = [i for i, dtype in enumerate(dtypes) if out[i].dtype != dtype]
    if changed:
        cast = [torch.empty_like(out[i], dtype=dtypes[i]) for i in changed]
        torch._foreach_copy_(cast, [out[i] for i in changed])
        for i, x in zip(changed, cast, strict=True):
            out[i] = x
    return out
