"""Bias, activation, gain and clamp in one call, in pure PyTorch: the reference for compiled kernels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A function of x, or of (x, alpha) if it has an `alpha`; `alpha` and `gain` are what bias_act takes by default."""

    function: Callable[..., Tensor]
    alpha: float | None = None
    gain: float = 1.0


# A gain of sqrt(2) keeps the scale of a signal that loses its negative half (He et al. 2015).
ACTIVATIONS = {
    "linear": Activation(function=lambda x: x),
    "relu": Activation(function=F.relu, gain=math.sqrt(2)),
    "lrelu": Activation(function=F.leaky_relu, alpha=0.2, gain=math.sqrt(2)),
    "tanh": Activation(function=torch.tanh),
    "sigmoid": Activation(function=torch.sigmoid),
    "elu": Activation(function=F.elu, alpha=1.0),
    "selu": Activation(function=F.selu),
    "softplus": Activation(function=F.softplus),
    "swish": Activation(function=F.silu, gain=math.sqrt(2)),
}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Return clamp(gain * act(x + b), -clamp, clamp), of x's shape and type; twice differentiable.

    `b` [x.shape[dim]] is added along `dim`. `alpha` and `gain` None are the activation's own; `clamp` None is none.
    Raises ValueError for an unknown `act`, an `alpha` that it does not have, a bias that does not fit, and a negative
    clamp.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not an activation: choose one of {', '.join(ACTIVATIONS)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp={clamp} is negative: give the largest absolute value, or None")
    activation = ACTIVATIONS[act]
    if alpha is not None and activation.alpha is None:
        raise ValueError(f"alpha={alpha} has no meaning for act={act!r}: leave it out")
    alpha = activation.alpha if alpha is None else alpha
    gain = activation.gain if gain is None else gain

    if b is not None:
        if b.ndim != 1 or b.shape[0] != x.shape[dim]:
            raise ValueError(f"bias has shape {list(b.shape)}: dimension {dim} of x {list(x.shape)} wants a vector")
        shape = [1] * x.ndim
        shape[dim] = -1
        x = x + b.to(x.dtype).reshape(shape)
    x = activation.function(x) if alpha is None else activation.function(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x
