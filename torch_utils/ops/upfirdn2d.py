"""Upsample, FIR filter, downsample: the resampling operator of style-based networks.

The PyTorch reference is the specification. On CUDA, a fused kernel (upfirdn2d.cu) replaces it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils import custom_ops
from torch_utils.custom_ops import Impl, Kernels
from torch_utils.ops import library

Pair = int | Sequence[int]

# Separable filters of at most this many taps are faster as one 2-D pass than as two 1-D passes.
SHORT_FILTER = 4


def setup_filter(
    f: Tensor | Sequence[float] | Sequence[Sequence[float]], *, normalize: bool = True, gain: float = 1.0
) -> Tensor:
    """Return the filter taps `f` as a float32 tensor, [taps] (separable) or [rows, columns].

    With `normalize`, the taps are scaled to sum to 1. `gain` is the gain of the filter on an image: a 1-D filter is
    applied along both axes, so its taps are multiplied by sqrt(gain).

    Raises ValueError if `f` is not a non-empty vector or matrix, and with `normalize` if the taps sum to 0.
    """
    taps = torch.as_tensor(f, dtype=torch.float32)
    if taps.ndim not in (1, 2) or taps.numel() == 0:
        raise ValueError(f"filter has shape {list(taps.shape)}: expected a vector (separable) or a matrix of taps")
    if normalize:
        if taps.sum() == 0:
            raise ValueError("filter taps sum to 0 and cannot be normalised: pass normalize=False")
        taps = taps / taps.sum()
    return taps * gain ** (taps.ndim / 2)


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Upsample, pad, filter and downsample each channel of x [B, C, H, W].

    1. Insert up-1 zeros after each sample: H * up rows.
    2. Pad with zeros, or crop if `padding` is negative.
    3. Convolve with f, keeping the valid region only; a 1-D f is applied along both axes. `flip_filter` selects
       correlation instead of convolution.
    4. Multiply by `gain` and keep every down-th sample, starting with the first:
       (H * up + y0 + y1 - rows of f) // down + 1 rows.

    `up` and `down` are a number or (x, y), `padding` is a number, (x, y) or (x0, x1, y0, y1). The output has the dtype
    and memory format of x. Differentiable in x any number of times, not in f. `impl` "auto" uses the CUDA kernels for
    CUDA tensors if they can be built, else PyTorch.

    Raises ValueError for malformed arguments, and if the padded image is smaller than f. With `impl` "cuda", raises
    ValueError for an unsupported tensor and RuntimeError without kernels.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}: upfirdn2d requires [B, C, H, W]")
    if f.requires_grad:
        raise ValueError("the filter requires a gradient, but upfirdn2d treats it as constant: detach it")
    up_x, up_y = _factors("up", up)
    down_x, down_y = _factors("down", down)
    x0, x1, y0, y1 = _padding(padding)
    width, height = x.shape[3] * up_x + x0 + x1, x.shape[2] * up_y + y0 + y1
    if width < f.shape[-1] or height < f.shape[0]:
        raise ValueError(
            f"padding={padding!r} leaves an upsampled image of {width}x{height}, smaller than the filter's "
            f"{f.shape[-1]}x{f.shape[0]}: pad more"
        )

    if custom_ops.use_kernels(impl, x):
        if f.device != x.device:
            raise ValueError(f"the filter is on {f.device}, x on {x.device}: move them to one device")
        f = f.to(library.computed_in(x.dtype))
        if f.ndim == 2 or len(f) <= SHORT_FILTER:
            return _upfirdn2d(x, f, (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1), flip_filter, gain)
        x = _upfirdn2d(x, f[None, :], (up_x, 1), (down_x, 1), (x0, x1, 0, 0), flip_filter, gain)
        return _upfirdn2d(x, f[:, None], (1, up_y), (1, down_y), (0, 0, y0, y1), flip_filter, 1.0)

    kernel = _correlation(f, x.dtype, flip_filter)
    if kernel.ndim == 2:
        return _Resample.apply(x, kernel * gain, (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1))
    x = _Resample.apply(x, kernel[None, :] * gain, (up_x, 1), (down_x, 1), (x0, x1, 0, 0))
    return _Resample.apply(x, kernel[:, None], (1, up_y), (1, down_y), (0, 0, y0, y1))


def upsample2d(
    x: Tensor,
    f: Tensor,
    up: Pair = 2,
    padding: Pair = 0,
    *,
    flip_filter: bool = False,
    gain: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Upsample x [B, C, H, W] to [B, C, H * up, W * up] (plus `padding`), preserving brightness; zero-padded borders.

    With f = [1, 3, 3, 1] and up = 2, along each axis: out[2i] = x[i-1]/4 + 3x[i]/4, out[2i+1] = 3x[i]/4 + x[i+1]/4.
    """
    up_x, up_y = _factors("up", up)
    x0, x1, y0, y1 = _padding(padding)
    rows, columns = f.shape[0], f.shape[-1]
    return upfirdn2d(
        x,
        f,
        up=up,
        padding=(
            x0 + (columns + up_x - 1) // 2,
            x1 + (columns - up_x) // 2,
            y0 + (rows + up_y - 1) // 2,
            y1 + (rows - up_y) // 2,
        ),
        flip_filter=flip_filter,
        gain=gain * up_x * up_y,
        impl=impl,
    )


def downsample2d(
    x: Tensor,
    f: Tensor,
    down: Pair = 2,
    padding: Pair = 0,
    *,
    flip_filter: bool = False,
    gain: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Downsample x [B, C, H, W], padded by `padding`, to [B, C, H / down, W / down]; zero-padded borders.

    With f = [1, 3, 3, 1] and down = 2, along each axis: out[i] = (x[2i-1] + 3x[2i] + 3x[2i+1] + x[2i+2]) / 8.
    """
    down_x, down_y = _factors("down", down)
    x0, x1, y0, y1 = _padding(padding)
    rows, columns = f.shape[0], f.shape[-1]
    return upfirdn2d(
        x,
        f,
        down=down,
        padding=(
            x0 + (columns - down_x + 1) // 2,
            x1 + (columns - down_x) // 2,
            y0 + (rows - down_y + 1) // 2,
            y1 + (rows - down_y) // 2,
        ),
        flip_filter=flip_filter,
        gain=gain,
        impl=impl,
    )


def _correlation(f: Tensor, dtype: torch.dtype, flip_filter: bool) -> Tensor:
    """Return f as a correlation kernel for images of `dtype`; short vectors become a matrix."""
    kernel = f.to(torch.promote_types(f.dtype, dtype))
    kernel = kernel if flip_filter else kernel.flip(tuple(range(f.ndim)))
    return torch.outer(kernel, kernel) if kernel.ndim == 1 and len(kernel) <= SHORT_FILTER else kernel


class _Resample(torch.autograd.Function):
    """Resampling by a 2-D correlation kernel. Its derivative is again a resampling.

    The derivative swaps `up` and `down` and flips the kernel. Every derivative is therefore as fast as the operator:
    PyTorch's double backward of a depthwise convolution takes 40 times as long as the forward pass on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        up: tuple[int, int],
        down: tuple[int, int],
        padding: tuple[int, int, int, int],
    ) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.up, ctx.down, ctx.padding, ctx.in_size = up, down, padding, x.shape[2:]
        return _resample(x, kernel, up, down, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # [B, C, H of the output, W of the output]
        (kernel,) = ctx.saved_tensors
        padding = _transposed_padding(kernel.shape, ctx.in_size, grad.shape[2:], ctx.up, ctx.down, ctx.padding)
        return _Resample.apply(grad, kernel.flip((0, 1)), ctx.down, ctx.up, padding), None, None, None, None


def _transposed_padding(
    taps: Sequence[int],
    in_size: Sequence[int],
    out_size: Sequence[int],
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
) -> tuple[int, int, int, int]:
    """Return the padding (x0, x1, y0, y1) of the adjoint, which maps `out_size` back to `in_size`.

    `taps` and the sizes are (rows, columns); `up`, `down` and `padding` are the arguments of the forward operator.
    """
    sides: list[int] = []
    for i, axis in enumerate((1, 0)):
        before = padding[2 * i]
        sides += [taps[axis] - 1 - before, (in_size[axis] - 1) * up[i] + 1 - out_size[axis] * down[i] + before]
    x0, x1, y0, y1 = sides
    return x0, x1, y0, y1


def _resample(
    x: Tensor, kernel: Tensor, up: tuple[int, int], down: tuple[int, int], padding: tuple[int, int, int, int]
) -> Tensor:
    """Resample x [B, C, H, W] by a correlation with `kernel` [rows, columns]: a depthwise (transposed) convolution."""
    B, C = x.shape[:2]
    memory_format = torch.channels_last
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        memory_format = torch.contiguous_format
        # One group per map is faster for few channels and never slower, but an exported graph needs a dynamic batch.
        x = x.reshape(B * C, 1, *x.shape[2:]) if torch.compiler.is_exporting() else x.reshape(1, B * C, *x.shape[2:])
    channels = x.shape[1]
    rows, columns = kernel.shape
    kernel = kernel.to(x.dtype).expand(channels, 1, rows, columns)
    x0, x1, y0, y1 = padding
    if up == (1, 1):
        if x0 != x1 or y0 != y1 or x0 < 0 or y0 < 0:
            x, x0, y0 = _pad(x, padding), 0, 0
        x = F.conv2d(x, kernel, stride=down[::-1], padding=(y0, x0), groups=channels)
    else:
        # A transposed convolution returns the full output: compared to the unpadded upsampled image, columns-1 more
        # samples before it and columns-1 more after it, minus the up-1 zeros after the last sample.
        x = F.conv_transpose2d(x, kernel.flip((2, 3)), stride=up[::-1], groups=channels)
        x0, x1 = x0 - (columns - 1), x1 - (columns - 1) + up[0] - 1
        y0, y1 = y0 - (rows - 1), y1 - (rows - 1) + up[1] - 1
        x = _pad(x, (x0, x1, y0, y1))[:, :, :: down[1], :: down[0]]
    x = x.reshape(B, C, *x.shape[2:])
    # Call contiguous() only if needed: in torch 2.11 a compiled function whose last call returns its argument has no
    # gradient.
    return x if x.is_contiguous(memory_format=memory_format) else x.contiguous(memory_format=memory_format)


def _pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Pad or crop x; a crop of the whole image leaves only the zero padding of the opposite side."""
    x0, x1, y0, y1 = padding
    height, width = x.shape[2:]
    if width + min(x0, 0) + min(x1, 0) <= 0 or height + min(y0, 0) + min(y1, 0) <= 0:
        return x.new_zeros(*x.shape[:2], height + y0 + y1, width + x0 + x1)
    return F.pad(x, padding)


def _factors(name: str, value: Pair) -> tuple[int, int]:
    """Return a resampling factor, given as a number or (x, y), as (x, y). Raises ValueError for values below 1."""
    x, y = (value, value) if isinstance(value, int) else value
    if x < 1 or y < 1:
        raise ValueError(f"{name}={value!r}: resampling factors are at least 1")
    return x, y


def _padding(value: Pair) -> tuple[int, int, int, int]:
    """Return a padding, given as a number, (x, y) or (x0, x1, y0, y1), as (x0, x1, y0, y1). Raises ValueError."""
    sides = [value] * 4 if isinstance(value, int) else list(value)
    if len(sides) == 2:
        sides = [sides[0], sides[0], sides[1], sides[1]]
    if len(sides) != 4:
        raise ValueError(f"padding={value!r}: expected a number, (x, y) or (x0, x1, y0, y1)")
    x0, x1, y0, y1 = sides
    return x0, x1, y0, y1


# The operator below is registered with PyTorch's dispatcher. f is a matrix, or a vector applied along both axes in one
# pass; up and down are (x, y), padding is (x0, x1, y0, y1).


def out_size(
    x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return the output shape (B, C, H, W)."""
    B, C, H, W = x.shape
    x0, x1, y0, y1 = padding
    return (
        B,
        C,
        (H * up[1] + y0 + y1 - f.shape[0]) // down[1] + 1,
        (W * up[0] + x0 + x1 - f.shape[-1]) // down[0] + 1,
    )


def launch(
    kernels: Kernels,
    x: Tensor,
    f: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip: bool,
    gain: float,
) -> Tensor:
    """Launch the kernel."""
    layout = library.layout(x)
    x = x.contiguous(memory_format=layout)
    f = f.to(library.computed_in(x.dtype)).contiguous()
    B, C, H, W = x.shape
    y = torch.empty(out_size(x, f, up, down, padding), dtype=x.dtype, device=x.device, memory_format=layout)
    if not y.numel():
        return y
    maps, inner = (B * C, 1) if layout == torch.contiguous_format else (B, C)
    kernels.call(
        "upfirdn2d",
        x,
        custom_ops.DTYPES[x.dtype],
        x.data_ptr(),
        f.data_ptr(),
        y.data_ptr(),
        maps,
        H,
        W,
        *y.shape[2:],
        inner,
        f.shape[0],
        f.shape[-1],
        *up,
        *down,
        padding[0],
        padding[2],
        f.ndim == 1,
        flip,
        gain,
    )
    return y


def _cuda(
    x: Tensor,
    f: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip: bool,
    gain: float,
) -> Tensor:
    return launch(library.kernels(), x, f, up, down, padding, flip, gain)


def _cpu(
    x: Tensor,
    f: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip: bool,
    gain: float,
) -> Tensor:
    kernel = _correlation(f, x.dtype, flip) * gain
    y = _resample(x, kernel, (up[0], up[1]), (down[0], down[1]), (padding[0], padding[1], padding[2], padding[3]))
    return y.contiguous(memory_format=library.layout(x))


def _fake(x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int], *_: Any) -> Tensor:
    size, layout = out_size(x, f, up, down, padding), library.layout(x)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


class _Upfirdn2d(torch.autograd.Function):
    """Autograd of the operator. Its derivative is the operator itself with `up` and `down` swapped and f flipped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        up: Sequence[int],
        down: Sequence[int],
        padding: Sequence[int],
        flip: bool,
        gain: float,
    ) -> Tensor:
        ctx.save_for_backward(f)
        ctx.up, ctx.down, ctx.padding, ctx.flip, ctx.gain, ctx.in_size = up, down, padding, flip, gain, x.shape[2:]
        with library.below_autograd():
            return _upfirdn2d(x, f, up, down, padding, flip, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (f,) = ctx.saved_tensors
        taps = (f.shape[0], f.shape[-1])
        padding = _transposed_padding(taps, ctx.in_size, grad.shape[2:], ctx.up, ctx.down, ctx.padding)
        return _upfirdn2d(grad, f, ctx.down, ctx.up, padding, not ctx.flip, ctx.gain), *[None] * 6


_upfirdn2d = library.register(
    "upfirdn2d(Tensor x, Tensor f, SymInt[] up, SymInt[] down, SymInt[] padding, bool flip, float gain) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    function=_Upfirdn2d,
)
