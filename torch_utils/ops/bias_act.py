"""Fused bias, activation, gain and clamp.

The PyTorch reference is the specification. On CUDA, a fused kernel (bias_act.cu) makes one pass over memory;
PyTorch makes one pass per step. The backward pass mostly reads the output, which the next layer saves anyway.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils import custom_ops
from torch_utils.custom_ops import Impl, Kernels
from torch_utils.ops import library


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Activation function of x, or of (x, alpha) if `alpha` is set, with the default `alpha` and `gain` of bias_act."""

    function: Callable[..., Tensor]
    alpha: float | None = None
    gain: float = 1.0


# A gain of sqrt(2) preserves the signal magnitude if the negative half is zeroed (He et al. 2015).
# The order matches enum Act in bias_act.cu.
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
NUMBERS = {act: number for number, act in enumerate(ACTIVATIONS)}
SELU = (1.0507009873554805, 1.6732632423543772)  # scale and alpha, Klambauer et al. 2017
PART = 2**19  # elements that stay in the cache of a CPU
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return clamp(gain * act(x + b), -clamp, clamp) with the shape and dtype of x; twice differentiable.

    `b` [x.shape[dim]] is added along `dim`. `alpha` and `gain` default to the activation's values; `clamp` None
    disables clamping. `impl` "auto" uses the CUDA kernels for CUDA tensors if they can be built, else PyTorch. On a
    CPU, leaky ReLU works in place and saves only its output.

    Raises ValueError for an unknown `act`, an `alpha` for an activation without one, a bias of the wrong shape, and a
    negative clamp. With `impl` "cuda", raises ValueError for an unsupported tensor and RuntimeError without kernels.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not an activation: choose one of {', '.join(ACTIVATIONS)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp={clamp} is negative: specify the largest absolute value, or None")
    activation = ACTIVATIONS[act]
    if alpha is not None and activation.alpha is None:
        raise ValueError(f"alpha={alpha} has no meaning for act={act!r}: omit it")
    alpha = activation.alpha if alpha is None else alpha
    gain = activation.gain if gain is None else gain
    if b is not None and (b.ndim != 1 or b.shape[0] != x.shape[dim]):
        raise ValueError(f"bias has shape {list(b.shape)}: expected a vector for dimension {dim} of x {list(x.shape)}")

    if custom_ops.use_kernels(impl, x) or (impl == "auto" and _is_faster_on_a_cpu(x, act, alpha, gain)):
        if b is not None and b.device != x.device:
            raise ValueError(f"bias is on {b.device}, x on {x.device}: move them to one device")
        return _bias_act(x, b, dim % x.ndim, act, alpha or 0.0, gain, -1.0 if clamp is None else clamp)
    return _reference(x, b, dim, activation, alpha, gain, clamp)


def _reference(
    x: Tensor,
    b: Tensor | None,
    dim: int,
    activation: Activation,
    alpha: float | None,
    gain: float,
    clamp: float | None,
) -> Tensor:
    if b is not None:
        x = x + _along(dim, b, x)
    x = activation.function(x) if alpha is None else activation.function(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x


def _along(dim: int, b: Tensor, x: Tensor) -> Tensor:
    """Return the bias b in the dtype of x, shaped to be added along `dim`."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return b.to(x.dtype).reshape(shape)


# The operator below is registered with PyTorch's dispatcher: alpha is a number (0 if unused), clamp < 0 disables it.


def slope_from_output(act: str, alpha: float, gain: float) -> bool:
    """Return whether the derivative can be computed from y alone, because y has the sign of x + b."""
    return act in PIECEWISE_LINEAR and gain > 0 and (alpha > 0 or act != "lrelu")


def _is_faster_on_a_cpu(x: Tensor, act: str, alpha: float | None, gain: float) -> bool:
    """Return whether the operator is faster than the reference on a CPU: it needs fewer tensors."""
    if x.device.type != "cpu" or act != "lrelu" or custom_ops.default() != "auto":
        return False
    return slope_from_output(act, alpha or 0.0, gain) and library.is_plain_eager()


def launch(
    kernels: Kernels,
    order: int,
    x: Tensor,
    b: Tensor | None,
    saved: Tensor | None,
    grad: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Launch the kernel. `x` is the input (order 0), the gradient of y (1), or of the output of order 1 (2)."""
    layout = library.layout(x if saved is None else saved)
    x = x.contiguous(memory_format=layout)
    saved = None if saved is None else saved.contiguous(memory_format=layout)
    grad = None if grad is None else grad.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    if not x.numel():
        return y
    if b is not None:
        b = b.contiguous() if b.dtype == x.dtype else b.to(library.computed_in(x.dtype)).contiguous()
    slow_to_fast = list(range(x.ndim)) if layout == torch.contiguous_format else [0, 2, 3, 1]
    faster = slow_to_fast[slow_to_fast.index(dim) + 1 :]
    kernels.call(
        "bias_act",
        x,
        custom_ops.DTYPES[x.dtype],
        order,
        x.data_ptr(),
        None if grad is None else grad.data_ptr(),
        None if saved is None else saved.data_ptr(),
        None if b is None else b.data_ptr(),
        custom_ops.DTYPES[x.dtype if b is None else b.dtype],
        y.data_ptr(),
        x.numel(),
        math.prod(x.shape[i] for i in faster),
        x.shape[dim],
        NUMBERS[act],
        slope_from_output(act, alpha, gain),
        alpha,
        gain,
        clamp,
    )
    return y


def _forward_cuda(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float) -> Tensor:
    return launch(library.kernels(), 0, x, b, None, None, dim, act, alpha, gain, clamp)


def _grad_cuda(
    grad: Tensor, saved: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    return launch(library.kernels(), 1, grad, b, saved, None, dim, act, alpha, gain, clamp)


def _grad2_cuda(
    double: Tensor,
    grad: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    return launch(library.kernels(), 2, double, b, x, grad, dim, act, alpha, gain, clamp)


def _forward_cpu(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float) -> Tensor:
    if act == "lrelu":
        return _lrelu_cpu(x, None if b is None else _along(dim, b, x), alpha, gain, clamp)
    activation = ACTIVATIONS[act]
    y = _reference(
        x, b, dim, activation, None if activation.alpha is None else alpha, gain, None if clamp < 0 else clamp
    )
    return y.clone(memory_format=library.layout(x))


def _lrelu_cpu(x: Tensor, b: Tensor | None, alpha: float, gain: float, clamp: float) -> Tensor:
    """Return clamp(gain * leaky_relu(x + b)) in place of x + b, in parts that stay in the cache between the steps."""
    y = torch.empty_like(x, memory_format=library.layout(x))
    for source, out in zip(_parts(x), _parts(y), strict=True):
        out.copy_(source) if b is None else torch.add(source, b, out=out)
        F.leaky_relu_(out, alpha)
        if gain != 1:
            out.mul_(gain)
        if clamp >= 0:
            out.clamp_(-clamp, clamp)
    return y


def _lrelu_grad_cpu(grad: Tensor, y: Tensor, alpha: float, gain: float, edge: float) -> Tensor:
    """Return the gradient of clamp(gain * leaky_relu(x)) from y alone, which has the sign of x."""
    dx = torch.empty_like(y, memory_format=library.layout(y))
    for source, output, out in zip(_parts(grad), _parts(y), _parts(dx), strict=True):
        torch.ops.aten.hardtanh_backward.grad_input(source, output, -edge, edge, grad_input=out)
        if gain != 1:
            out.mul_(gain)
        torch.ops.aten.leaky_relu_backward.grad_input(out, output, alpha, True, grad_input=out)
    return dx


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Split x along its first dimension into parts of about PART elements."""
    return x.split(max(PART * len(x) // max(x.numel(), 1), 1)) if x.ndim else [x]


def _first_derivative(act: str, x: Tensor, alpha: float) -> Tensor:
    """Return the first derivative of an activation."""
    s, t = torch.sigmoid(x), torch.tanh(x)
    scale, selu_alpha = SELU
    return {
        "linear": lambda: torch.ones_like(x),
        "relu": lambda: (x > 0).to(x.dtype),
        "lrelu": lambda: torch.where(x > 0, 1.0, alpha).to(x.dtype),
        "tanh": lambda: 1 - t * t,
        "sigmoid": lambda: s * (1 - s),
        "elu": lambda: torch.where(x > 0, 1, alpha * x.exp()),
        "selu": lambda: scale * torch.where(x > 0, 1, selu_alpha * x.exp()),
        "softplus": lambda: s,
        "swish": lambda: s * (1 + x * (1 - s)),
    }[act]()


def _second_derivative(act: str, x: Tensor, alpha: float) -> Tensor:
    """Return the second derivative of an activation."""
    s, t = torch.sigmoid(x), torch.tanh(x)
    scale, selu_alpha = SELU
    if act in PIECEWISE_LINEAR:
        return torch.zeros_like(x)
    return {
        "tanh": lambda: -2 * t * (1 - t * t),
        "sigmoid": lambda: s * (1 - s) * (1 - 2 * s),
        "elu": lambda: torch.where(x > 0, 0, alpha * x.exp()),
        "selu": lambda: torch.where(x > 0, 0, scale * selu_alpha * x.exp()),
        "softplus": lambda: s * (1 - s),
        "swish": lambda: s * (1 - s) * (2 + x * (1 - 2 * s)),
    }[act]()


def _with_bias(x: Tensor, b: Tensor | None, dim: int) -> Tensor:
    return _reference(x, b, dim, ACTIVATIONS["linear"], None, 1.0, None)


def _unclamped(x: Tensor, act: str, alpha: float, gain: float, clamp: float) -> Tensor:
    return _forward_cpu(x, None, 0, act, alpha, gain, -1.0).abs() <= (math.inf if clamp < 0 else clamp)


def _grad_cpu(
    grad: Tensor, saved: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    if slope_from_output(act, alpha, gain):
        edge = float(torch.tensor(math.inf if clamp < 0 else clamp, dtype=saved.dtype))  # rounded like the output
        if act == "lrelu":
            return _lrelu_grad_cpu(grad, saved, alpha, gain, edge)
        x, passes = saved, saved.abs() < edge
    else:
        x = _with_bias(saved, b, dim)
        passes = _unclamped(x, act, alpha, gain, clamp)
    dx = torch.where(passes, grad * gain * _first_derivative(act, x, alpha), 0)
    return dx.clone(memory_format=library.layout(saved))


def _grad2_cpu(
    double: Tensor,
    grad: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    v = _with_bias(x, b, dim)
    passes = _unclamped(v, act, alpha, gain, clamp)
    ddx = torch.where(passes, double * grad * gain * _second_derivative(act, v, alpha), 0)
    return ddx.clone(memory_format=library.layout(x))


def _bias_gradient(dx: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sum dx over all dimensions except `dim`, accumulating in at least float32."""
    dims = [i for i in range(dx.ndim) if i != dim]
    return (dx.sum(dims, dtype=library.computed_in(dx.dtype)) if dims else dx).to(dtype)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, *options: Any) -> Tensor:
        with library.below_autograd():
            y = _bias_act(x, b, *options)
        _, act, alpha, gain, clamp = options
        ctx.options, ctx.b_dtype = options, None if b is None else b.dtype
        if act == "linear" and clamp < 0:
            ctx.save_for_backward(None, None)
        elif slope_from_output(act, alpha, gain):
            ctx.save_for_backward(y, None)
        else:
            ctx.save_for_backward(x, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        saved, b = ctx.saved_tensors
        dim, _, _, gain, _ = ctx.options
        if saved is not None:
            dx = _bias_act_grad(grad, saved, b, *ctx.options)
        elif gain != 1:
            dx = grad * gain
        else:
            dx = grad
        db = _bias_gradient(dx, dim, ctx.b_dtype) if ctx.needs_input_grad[1] else None
        return dx if ctx.needs_input_grad[0] else None, db, *[None] * 5


class _Gradient(torch.autograd.Function):
    """Derivative of _Forward, linear in `grad`; its derivative w.r.t. x is zero for piecewise linear activations."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, saved: Tensor, b: Tensor | None, *options: Any) -> Tensor:
        with library.below_autograd():
            dx = _bias_act_grad(grad, saved, b, *options)
        ctx.options = options
        ctx.is_curved = options[1] not in PIECEWISE_LINEAR
        ctx.save_for_backward(grad if ctx.is_curved else None, saved, b)
        return dx

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (double,) = grads
        grad, saved, b = ctx.saved_tensors
        d_grad = _bias_act_grad(double, saved, b, *ctx.options) if ctx.needs_input_grad[0] else None
        d_x = d_b = None
        if ctx.is_curved and any(ctx.needs_input_grad[1:3]):
            d_x = _bias_act_grad2(double, grad, saved, b, *ctx.options)
            d_b = _bias_gradient(d_x, ctx.options[0], b.dtype) if ctx.needs_input_grad[2] else None
        return d_grad, d_x if ctx.needs_input_grad[1] else None, d_b, *[None] * 5


class _SecondGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with library.below_autograd():
            return _bias_act_grad2(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the CUDA kernels of bias_act support two derivatives: use impl='reference' for a third")


_OPTIONS = "int dim, str act, float alpha, float gain, float clamp"
_bias_act = library.register(
    f"bias_act(Tensor x, Tensor? b, {_OPTIONS}) -> Tensor",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=lambda x, *_: torch.empty_like(x, memory_format=library.layout(x)),
    function=_Forward,
)
_bias_act_grad = library.register(
    f"bias_act_grad(Tensor grad, Tensor saved, Tensor? b, {_OPTIONS}) -> Tensor",
    cpu=_grad_cpu,
    cuda=_grad_cuda,
    fake=lambda grad, saved, *_: torch.empty_like(grad, memory_format=library.layout(saved)),
    function=_Gradient,
)
_bias_act_grad2 = library.register(
    f"bias_act_grad2(Tensor double, Tensor grad, Tensor x, Tensor? b, {_OPTIONS}) -> Tensor",
    cpu=_grad2_cpu,
    cuda=_grad2_cuda,
    fake=lambda double, grad, x, *_: torch.empty_like(double, memory_format=library.layout(x)),
    function=_SecondGradient,
)
