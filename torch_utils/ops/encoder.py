"""Fused elementwise work of Styleformer's encoder block: modulated LayerNorm, residual with leaky ReLU, scaled Q, K, V.

The PyTorch reference is the specification. It makes one pass per step and rounds to the dtype of the tokens after each.
On CUDA, Triton kernels (encoder_kernels.py) read and write each token once per operator, compute in float32 and round
once. Tokens are (B, N, C): B images, N tokens, C channels. The kernels accept any strides of images and rows, such as
the chunks of a (B, N, 3C) tensor, and are tuned for at most 2048 channels. Only the reference supports float64.

The first derivatives are fused as well. Second derivatives (create_graph=True) differentiate the reference.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.config import UserError
from torch_utils import custom_ops, distributed
from torch_utils.custom_ops import Impl
from torch_utils.ops import library
from torch_utils.ops.bias_act import bias_act

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels
EPS = 1e-5  # of LayerNorm
SLOPE = 0.2  # of the leaky ReLU

# Elements in a tile and warps of a program: 8 elements per thread, one 16-byte access in a half type.
TILE, WARPS = 2048, 8
# A program adds up the gradients of 8 to 32 rows. Fewer rows increase the traffic of partial sums, more rows reduce the
# number of programs; below about 256 programs a GPU is not busy.
MIN_ROWS, MAX_ROWS, MIN_PROGRAMS = 8, 32, 256


def modulated_layer_norm(x: Tensor, s: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return LayerNorm(s x) over the channels, without affine parameters; twice differentiable.

    x (B, N, C) float, s (B, C), one style per image -> (B, N, C) in the dtype of x. `impl` "auto" uses the kernels for
    CUDA tensors of DTYPES if Triton can compile them, else PyTorch.

    Raises ValueError for a style of the wrong shape. With `impl` "cuda", raises ValueError for an unsupported tensor
    and RuntimeError without kernels.
    """
    B, _, C = x.shape
    _check_shapes(s=(s, (B, C)))
    if use_kernels(impl, x):
        return _layer_norm(x, s)[0]
    return _layer_norm_reference(x, s)


def residual_lrelu(
    a: Tensor,
    r: Tensor,
    da: Tensor,
    dr: Tensor,
    noise: Tensor,
    strength: Tensor,
    bias: Tensor,
    *,
    clamp: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return clamp(lrelu(da a + dr r + strength noise + bias), -clamp, clamp); twice differentiable.

    a, r (B, N, C) of one dtype; da, dr (B, C), demodulation coefficients per image; noise (B or 1, N), shared by all
    channels; strength (); bias (C,) -> (B, N, C) in the dtype of a. The leaky ReLU has slope 0.2 and no gain.
    `clamp` None disables clamping. The gradient of the kernels is zero if |y| is the rounded `clamp`, as in `bias_act`.
    The reference computes the gradient of `noise`, which only a projection needs. `impl`: see `modulated_layer_norm`.

    Raises ValueError for a tensor of the wrong shape, for an r of another dtype than a, and for a negative clamp.
    """
    B, N, C = a.shape
    maps = (B if len(noise) == B else 1, N)
    _check_shapes(
        r=(r, (B, N, C)),
        da=(da, (B, C)),
        dr=(dr, (B, C)),
        noise=(noise, maps),
        strength=(strength, ()),
        bias=(bias, (C,)),
    )
    if r.dtype != a.dtype:
        raise ValueError(f"a is {a.dtype}, r is {r.dtype}: convert them to one dtype")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp={clamp} is negative: specify the largest absolute value, or None")
    if use_kernels(impl, a):
        return _residual_lrelu(a, r, da, dr, noise, strength, bias, -1.0 if clamp is None else clamp)
    return _residual_lrelu_reference(a, r, da, dr, noise, strength, bias, clamp)


def scale_and_split(qkv: Tensor, scale: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Multiply the channels by `scale` and split them into queries, keys and values; twice differentiable.

    qkv (B, N, 3C) float, scale (B, 3C), one vector per image -> q, k, v, each (B, N, C) in the dtype of qkv.
    `impl`: see `modulated_layer_norm`.

    Raises ValueError if the number of channels is not a multiple of 3, and for a scale of the wrong shape.
    """
    B, _, channels = qkv.shape
    if channels % 3:
        raise ValueError(f"qkv has {channels} channels: expected a multiple of 3 for queries, keys and values")
    _check_shapes(scale=(scale, (B, channels)))
    if use_kernels(impl, qkv):
        return _scale_and_split(qkv, scale)
    return _scale_and_split_reference(qkv, scale)


def _check_shapes(**tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {list(shape)}")


# Selection of the implementation


@dataclass(kw_only=True)
class _State:
    """Load state of this process: whether the kernels were tried, and the reason if that failed."""

    is_tried: bool = False
    reason: str | None = None


_state = _State()
is_enabled = True  # use the kernels for impl="auto"


def use_kernels(impl: Impl, x: Tensor) -> bool:
    """Return whether an operator on `x` uses the Triton kernels; see custom_ops.use_kernels."""
    return (is_enabled or impl != "auto") and custom_ops.use_kernels(impl, x, DTYPES, why_not)


def why_not() -> str | None:
    """Return None if the kernels are available, else the reason. The first call tries them and prints the reason."""
    if not _state.is_tried:
        _try_quietly()
        if _state.reason is not None:
            print(f"Encoder kernels: using the PyTorch reference: {_state.reason}", file=sys.stderr)
    return _state.reason


why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see custom_ops.why_not


def prepare(device: torch.device) -> str:
    """Try the kernels in every process at the start of a run; return a line for the log.

    If any process fails, all use the reference, so that all ranks compute the same results. A collective call on
    `device`; it never raises, so that no rank can deadlock.
    """

    def attempt() -> str | None:
        if not _state.is_tried:
            _try_quietly()
        return _state.reason

    failures = distributed.count_failures(attempt, device)
    if not failures:
        return "Encoder kernels: compiled"
    if _state.reason is None:
        _state.reason = f"{failures} of {distributed.world_size()} processes could not compile the kernels"
    return f"Encoder kernels: using the PyTorch reference: {_state.reason}"


def _try_quietly() -> None:
    """Compile and check each kernel; store the reason for a failure. Never raises or prints."""
    try:
        _kernels()
        _check_all(torch.device("cuda"))
        _state.reason = None
    except subprocess.CalledProcessError as error:  # the compiler has printed the cause
        _state.reason = f"{error.cmd[0]} failed; Triton needs a C compiler and the headers of Python (python3-dev)"
    except Exception as error:  # on any failure, fall back to the reference
        _state.reason = _one_line(error)
    _state.is_tried = True


def _one_line(error: Exception) -> str:
    message = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _check_all(device: torch.device) -> None:
    """Run each kernel on small tensors and compare with the CPU. Raises RuntimeError if one computes wrong values."""
    generator, (B, N, C) = torch.Generator().manual_seed(0), (2, 5, 24)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, r, grad, qkv, d_qkv = (random(B, N, width, dtype=torch.bfloat16) for width in (C, C, C, 3 * C, 3 * C))
    s, da, dr, scale, noise = (random(*shape) for shape in ((B, C), (B, C), (B, C), (B, 3 * C), (1, N)))
    strength, bias = random(), random(C)
    _, mean, rstd = _layer_norm_cpu(x, s)
    residual = x, r, da, dr, noise, strength, bias, 1.0
    y = _residual_lrelu_cpu(*residual)
    checks: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
        (launch_layer_norm, _layer_norm_cpu, (x, s)),
        (launch_layer_norm_grad, _layer_norm_grad_cpu, (grad, x, s, mean, rstd)),
        (launch_residual_lrelu, _residual_lrelu_cpu, residual),
        (launch_residual_lrelu_grad, _residual_lrelu_grad_cpu, (grad, y, *residual[:5], 1.0)),
        (launch_scale_and_split, _scale_and_split_cpu, (qkv, scale)),
        (launch_scale_and_split_grad, _scale_and_split_grad_cpu, (*d_qkv.chunk(3, dim=2), qkv, scale)),
    ]
    for launch, on_cpu, args in checks:
        found = launch(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
        expected = on_cpu(*args)
        for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (found, expected)), strict=True):
            if not (a.cpu().float() - b.float()).norm() <= 0.02 * b.float().norm():
                raise RuntimeError(f"{launch.__name__} computes wrong values on this GPU")


# References


def _layer_norm_reference(x: Tensor, s: Tensor) -> Tensor:
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # s x may exceed float16's maximum, 65,504
    return F.layer_norm(x * s.to(dtype).unsqueeze(1), x.shape[2:], eps=EPS).to(x.dtype)


def _residual_lrelu_reference(
    a: Tensor, r: Tensor, da: Tensor, dr: Tensor, noise: Tensor, strength: Tensor, bias: Tensor, clamp: float | None
) -> Tensor:
    dtype = a.dtype
    y = torch.addcmul((noise * strength).to(dtype).unsqueeze(2), a, da.to(dtype).unsqueeze(1))
    y = torch.addcmul(y, r, dr.to(dtype).unsqueeze(1))
    return bias_act(y, bias, dim=2, act="lrelu", alpha=SLOPE, gain=1.0, clamp=clamp)


def _scale_and_split_reference(qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (qkv * scale.to(qkv.dtype).unsqueeze(1)).chunk(3, dim=2)
    return q, k, v


def _differentiate_reference(
    reference: Callable[..., Any], inputs: Sequence[Tensor], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of the needed inputs, themselves differentiable if gradients are enabled.

    The inputs are aliased because one may have been computed from another: autograd stops at the aliases.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [x.view_as(x) for x in inputs]
        outputs = reference(*aliases)
        wanted = [alias for alias, is_needed in zip(aliases, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [next(found) if is_needed else None for is_needed in needed]


# Operators on the CPU, in float32 or float64. They read the tensors that the kernels read.


def _layer_norm_cpu(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = library.computed_in(x.dtype)
    v = x.to(dtype) * s.to(dtype).unsqueeze(1)
    y, mean, rstd = torch.native_layer_norm(v, x.shape[2:], None, None, EPS)
    return y.to(x.dtype), mean.squeeze(2), rstd.squeeze(2)


def _layer_norm_grad_cpu(grad: Tensor, x: Tensor, s: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dtype = library.computed_in(x.dtype)
    g, value, style = grad.to(dtype), x.to(dtype), s.to(dtype).unsqueeze(1)
    normalized = (value * style - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    along = (g * normalized).mean(2, keepdim=True)
    dv = (g - g.mean(2, keepdim=True) - normalized * along) * rstd.unsqueeze(2)
    return (dv * style).to(x.dtype), (dv * value).sum(1)


def _residual_lrelu_cpu(
    a: Tensor, r: Tensor, da: Tensor, dr: Tensor, noise: Tensor, strength: Tensor, bias: Tensor, clamp: float
) -> Tensor:
    return _residual_lrelu_reference(a, r, da, dr, noise, strength, bias, None if clamp < 0 else clamp)


def _residual_lrelu_grad_cpu(
    grad: Tensor, y: Tensor, a: Tensor, r: Tensor, da: Tensor, dr: Tensor, noise: Tensor, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = library.computed_in(a.dtype)
    g = grad.to(dtype)
    g = torch.where(y > 0, g, g * SLOPE)
    if clamp >= 0:
        g = torch.where(y.abs() < torch.tensor(clamp, dtype=y.dtype), g, 0)
    d_strength = (g * noise.to(dtype).unsqueeze(2)).sum((1, 2)).unsqueeze(1)
    sums = torch.cat([(g * a.to(dtype)).sum(1), (g * r.to(dtype)).sum(1), g.sum(1), d_strength], dim=1)
    return (g * da.to(dtype).unsqueeze(1)).to(a.dtype), (g * dr.to(dtype).unsqueeze(1)).to(r.dtype), sums


def _scale_and_split_cpu(qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in _scale_and_split_reference(qkv, scale))
    return q, k, v


def _scale_and_split_grad_cpu(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dtype = library.computed_in(qkv.dtype)
    grad = torch.cat([dq, dk, dv], dim=2).to(dtype)
    return (grad * scale.to(dtype).unsqueeze(1)).to(qkv.dtype), (grad * qkv.to(dtype)).sum(1)


# Launchers of the kernels


@dataclass(frozen=True, kw_only=True)
class _Tiling:
    """Division of (B, N, C) tokens among programs: each processes `tiles` tiles of `rows` rows, padded to `width`."""

    N: int
    C: int
    rows: int
    width: int
    tiles: int
    blocks: int  # programs per image


def _tiling(N: int, C: int, rows_per_program: int = 1) -> _Tiling:
    width, length = _power_of_2(C), _power_of_2(N)
    rows = max(1, min(TILE // width, length))
    tiles = max(1, min(rows_per_program, length) // rows)
    return _Tiling(N=N, C=C, rows=rows, width=width, tiles=tiles, blocks=-(-N // (rows * tiles)))


def _tiling_of_sums(B: int, N: int, C: int) -> _Tiling:
    """Return the tiling of a kernel that stores partial sums."""
    return _tiling(N, C, min(max(_power_of_2(B * N // MIN_PROGRAMS), MIN_ROWS), MAX_ROWS))


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _kernels() -> ModuleType:
    from torch_utils.ops import encoder_kernels

    return encoder_kernels


def _launch(name: str, B: int, tiling: _Tiling, *args: Any, **constants: Any) -> None:
    """Launch a kernel on `args` for a batch of B images; the first argument is a tensor.

    Raises UserError if the kernel cannot be compiled for these arguments.
    """
    programs = B * tiling.blocks
    if not programs:
        return
    x, kernel = args[0], getattr(_kernels(), name)
    constants |= {"C": tiling.C, "ROWS": tiling.rows, "WIDTH": tiling.width, "num_warps": WARPS}
    try:
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](*args, tiling.N, tiling.blocks, **constants)
    except Exception as error:
        raise UserError(
            f"the encoder kernel {name} failed for {tiling.C} channels in {x.dtype}: {_one_line(error)}; "
            "--set run.kernels=operators trains without these kernels"
        ) from error


def _with_rows(x: Tensor) -> Tensor:
    """Return x, copied unless its channels are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _vectors(*tensors: Tensor) -> list[Tensor]:
    """Return vectors or scalars in float32, copied unless their elements, or those of each image, are contiguous."""
    return [x.to(torch.float32) if not x.ndim else _with_rows(x.to(torch.float32)) for x in tensors]


def _tokens(x: Tensor, C: int) -> Tensor:
    """Return an uninitialized contiguous tensor (B, N, C) for the B images and N tokens of x."""
    return torch.empty((*x.shape[:2], C), dtype=x.dtype, device=x.device)


def _floats(x: Tensor, *shape: int) -> Tensor:
    """Return an uninitialized float32 tensor on the device of x."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of images and rows of each tensor."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _image_strides(B: int, *vectors: Tensor) -> list[int]:
    """Return the distance of the vectors of successive images; 0 for one vector that B images share."""
    return [x.stride(0) if len(x) == B else 0 for x in vectors]


def _total(sums: Tensor) -> Tensor:
    """Add up the partial sums (B, blocks, columns) of each image."""
    return sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)


def launch_layer_norm(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, N, C), and the mean and reciprocal standard deviation of each modulated token (B, N)."""
    (B, N, C), x, (s,) = x.shape, _with_rows(x), _vectors(s)
    y, mean, rstd = _tokens(x, C), _floats(x, B, N), _floats(x, B, N)
    _launch("modulated_layer_norm", B, _tiling(N, C), x, s, y, mean, rstd, *_strides(x), s.stride(0))
    return y, mean, rstd


def launch_layer_norm_grad(grad: Tensor, x: Tensor, s: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (B, N, C) and s (B, C)."""
    (B, N, C), grad, x, (s,) = x.shape, _with_rows(grad), _with_rows(x), _vectors(s)
    tiling = _tiling_of_sums(B, N, C)
    dx, sums = _tokens(x, C), _floats(x, B, tiling.blocks, C)
    tensors = (grad, x, s, mean.contiguous(), rstd.contiguous(), dx, sums)
    strides = (*_strides(grad, x), s.stride(0))
    _launch("modulated_layer_norm_grad", B, tiling, *tensors, *strides, TILES=tiling.tiles)
    return dx, _total(sums)


def launch_residual_lrelu(
    a: Tensor, r: Tensor, da: Tensor, dr: Tensor, noise: Tensor, strength: Tensor, bias: Tensor, clamp: float
) -> Tensor:
    """Return y (B, N, C)."""
    (B, N, C), a, r = a.shape, _with_rows(a), _with_rows(r)
    da, dr, noise, strength, bias = _vectors(da, dr, noise, strength, bias)
    y = _tokens(a, C)
    strides = (*_strides(a, r), *_image_strides(B, da, dr, noise))
    tensors = (a, r, da, dr, noise, strength, bias, y)
    _launch("residual_lrelu", B, _tiling(N, C), *tensors, *strides, clamp, CLAMPED=clamp >= 0)
    return y


def launch_residual_lrelu_grad(
    grad: Tensor, y: Tensor, a: Tensor, r: Tensor, da: Tensor, dr: Tensor, noise: Tensor, clamp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a and r (B, N, C), and those of da, dr, bias and strength per image (B, 3C + 1)."""
    (B, N, C), grad, a, r = a.shape, _with_rows(grad), _with_rows(a), _with_rows(r)
    da, dr, noise = _vectors(da, dr, noise)
    tiling = _tiling_of_sums(B, N, C)
    d_a, d_r, sums = _tokens(a, C), _tokens(r, C), _floats(a, B, tiling.blocks, 3 * C + 1)
    tensors = (grad, y.contiguous(), a, r, da, dr, noise, d_a, d_r, sums)
    strides = (*_strides(grad, a, r), *_image_strides(B, da, dr, noise))
    edge = torch.tensor(clamp, dtype=y.dtype).item()  # rounded like y
    constants = {"TILES": tiling.tiles, "CLAMPED": clamp >= 0}
    _launch("residual_lrelu_grad", B, tiling, *tensors, *strides, edge, **constants)
    return d_a, d_r, _total(sums)


def launch_scale_and_split(qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, each (B, N, C)."""
    (B, N, channels), qkv, (scale,) = qkv.shape, _with_rows(qkv), _vectors(scale)
    C = channels // 3
    q, k, v = _tokens(qkv, C), _tokens(qkv, C), _tokens(qkv, C)
    _launch("scale_and_split", B, _tiling(N, C), qkv, scale, q, k, v, *_strides(qkv), scale.stride(0))
    return q, k, v


def launch_scale_and_split_grad(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv (B, N, 3C) and scale (B, 3C)."""
    (B, N, C), inputs, (scale,) = dq.shape, [*map(_with_rows, (dq, dk, dv, qkv))], _vectors(scale)
    tiling = _tiling_of_sums(B, N, C)
    d_qkv, sums = _tokens(qkv, 3 * C), _floats(qkv, B, tiling.blocks, 3 * C)
    tensors, strides = (*inputs, scale, d_qkv, sums), (*_strides(*inputs), scale.stride(0))
    _launch("scale_and_split_grad", B, tiling, *tensors, *strides, TILES=tiling.tiles)
    return d_qkv, _total(sums)


# Derivatives


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with library.below_autograd():
            y, mean, rstd = _layer_norm(x, s)
        ctx.save_for_backward(x, s, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # no zeros for mean and rstd
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, s, mean, rstd = ctx.saved_tensors
        if grads[0] is None:
            return None, None
        if torch.is_grad_enabled():
            return tuple(_differentiate_reference(_layer_norm_reference, (x, s), ctx.needs_input_grad, grads[:1]))
        dx, ds = _layer_norm_grad(grads[0], x, s, mean, rstd)
        return dx, ds.to(s.dtype)


class _ResidualLrelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with library.below_autograd():
            y = _residual_lrelu(*args)
        *inputs, ctx.clamp = args
        ctx.save_for_backward(y, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, *inputs = ctx.saved_tensors
        a, r, da, dr, noise, strength, bias = inputs
        if torch.is_grad_enabled() or ctx.needs_input_grad[4]:  # [4]: noise
            clamp = None if ctx.clamp < 0 else ctx.clamp
            reference = partial(_residual_lrelu_reference, clamp=clamp)
            return *_differentiate_reference(reference, inputs, ctx.needs_input_grad[:-1], grads), None
        d_a, d_r, sums = _residual_lrelu_grad(grads[0], y, a, r, da, dr, noise, ctx.clamp)
        C = a.shape[2]
        shared = sums[:, 2 * C :].sum(0)  # of bias and strength, which all images share
        d_da, d_dr = sums[:, :C].to(da.dtype), sums[:, C : 2 * C].to(dr.dtype)
        return d_a, d_r, d_da, d_dr, None, shared[C].to(strength.dtype), shared[:C].to(bias.dtype), None


class _ScaleAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with library.below_autograd():
            q, k, v = _scale_and_split(qkv, scale)
        ctx.save_for_backward(qkv, scale)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad
            return tuple(_differentiate_reference(_scale_and_split_reference, (qkv, scale), needed, grads))
        d_qkv, d_scale = _scale_and_split_grad(*grads, qkv, scale)
        return d_qkv, d_scale.to(scale.dtype)


# Registration: `clamp` < 0 disables clamping. The gradients of vectors are in float32, or float64.


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _vector(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=library.computed_in(x.dtype))


_layer_norm = library.register(
    "modulated_layer_norm(Tensor x, Tensor s) -> (Tensor, Tensor, Tensor)",
    cpu=_layer_norm_cpu,
    cuda=launch_layer_norm,
    fake=lambda x, s: (_like(x), _vector(x, *x.shape[:2]), _vector(x, *x.shape[:2])),
    function=_LayerNorm,
)
_layer_norm_grad = library.register(
    "modulated_layer_norm_grad(Tensor grad, Tensor x, Tensor s, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    cpu=_layer_norm_grad_cpu,
    cuda=launch_layer_norm_grad,
    fake=lambda grad, x, s, mean, rstd: (_like(x), _vector(x, *s.shape)),
    function=None,
)
_residual_lrelu = library.register(
    "residual_lrelu(Tensor a, Tensor r, Tensor da, Tensor dr, Tensor noise, Tensor strength, Tensor bias, float clamp)"
    " -> Tensor",
    cpu=_residual_lrelu_cpu,
    cuda=launch_residual_lrelu,
    fake=lambda a, *_: _like(a),
    function=_ResidualLrelu,
)
_residual_lrelu_grad = library.register(
    "residual_lrelu_grad(Tensor grad, Tensor y, Tensor a, Tensor r, Tensor da, Tensor dr, Tensor noise, float clamp)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_residual_lrelu_grad_cpu,
    cuda=launch_residual_lrelu_grad,
    fake=lambda grad, y, a, r, *_: (_like(a), _like(r), _vector(a, len(a), 3 * a.shape[2] + 1)),
    function=None,
)
_scale_and_split = library.register(
    "scale_and_split(Tensor qkv, Tensor scale) -> (Tensor, Tensor, Tensor)",
    cpu=_scale_and_split_cpu,
    cuda=launch_scale_and_split,
    fake=lambda qkv, scale: tuple(qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3) for _ in range(3)),
    function=_ScaleAndSplit,
)
_scale_and_split_grad = library.register(
    "scale_and_split_grad(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor scale) -> (Tensor, Tensor)",
    cpu=_scale_and_split_grad_cpu,
    cuda=launch_scale_and_split_grad,
    fake=lambda dq, dk, dv, qkv, scale: (_like(qkv), _vector(qkv, *scale.shape)),
    function=None,
)
