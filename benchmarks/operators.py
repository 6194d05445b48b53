"""Time the operators on the shapes used by the networks, relative to a plain copy of the same bytes.

Prints one line of JSON for each case and implementation: the kernels, the PyTorch reference, and the reference under
torch.compile. The operators should be limited by memory bandwidth: `gb_per_s` counts the traffic of a fused kernel
(forward: inputs and outputs once; backward also the saved tensors), and `of_copy` is the speed relative to copying a
tensor of the input's size. The backward pass of the encoder's operators computes the gradients of all inputs; inputs of
another shape than the first do not count as traffic.

    python benchmarks/operators.py --device=cuda --dtype=float32,bfloat16
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from common import emit, synchronize
from torch import Tensor

from dnnlib.allocator import tune_allocator
from torch_utils import custom_ops
from torch_utils.filters import lowpass
from torch_utils.ops import encoder
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.encoder import modulated_layer_norm, residual_lrelu, scale_and_split
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upfirdn2d, upsample2d

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = ("cuda", "reference", "compiled")
BINOMIAL = [1, 3, 3, 1]
TWELVE_TAPS = [1, 2, 3, 5, 8, 9, 9, 8, 5, 3, 2, 1]  # the length of the augmentation's low-pass filter


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator on one shape; `prepare` moves constants to the device and returns the function of all inputs.

    `others`: shapes of further inputs; those of another shape than the input are vectors in float32.
    `saved`: number of tensors of the output's size that the backward pass reads in addition to the gradient.
    """

    name: str
    shape: tuple[int, ...]
    prepare: Callable[[torch.device], Callable[..., Tensor | tuple[Tensor, ...]]]
    others: tuple[tuple[int, ...], ...] = ()
    saved: int = 0


def blur(device: torch.device) -> Callable[[Tensor], Tensor]:
    f = setup_filter(BINOMIAL).to(device)
    return lambda x: upfirdn2d(x, f, padding=2)


def enlarge(taps: Sequence[float]) -> Callable[[torch.device], Callable[[Tensor], Tensor]]:
    def prepare(device: torch.device) -> Callable[[Tensor], Tensor]:
        f = setup_filter(taps).to(device)
        return lambda x: upsample2d(x, f)

    return prepare


def reduce(taps: Sequence[float]) -> Callable[[torch.device], Callable[[Tensor], Tensor]]:
    def prepare(device: torch.device) -> Callable[[Tensor], Tensor]:
        f = setup_filter(taps).to(device)
        return lambda x: downsample2d(x, f)

    return prepare


def activate(channels: int, dim: int = 1) -> Callable[[torch.device], Callable[[Tensor], Tensor]]:
    def prepare(device: torch.device) -> Callable[[Tensor], Tensor]:
        b = torch.randn(channels, device=device)
        return lambda x: bias_act(x, b, dim=dim, act="lrelu", clamp=256.0)

    return prepare


def filtered(*, is_radial: bool) -> Callable[[torch.device], Callable[[Tensor], Tensor]]:
    """Return the activation of a StyleGAN3 layer: x2 up, leaky ReLU, x2 down, separable (T) or radial (R)."""

    def prepare(device: torch.device) -> Callable[[Tensor], Tensor]:
        fu, fd = lowpass(12, 16.0, 32.0, 128), lowpass(12, 16.0, 32.0, 128, is_radial=is_radial)
        fu, fd = (f if f is None else f.to(device) for f in (fu, fd))
        return lambda x: filtered_lrelu(x, fu, fd, up=2, down=2, padding=10, clamp=256.0)

    return prepare


def normalize(device: torch.device) -> Callable[..., Tensor]:
    return modulated_layer_norm


def add_residual(B: int, N: int) -> Callable[[torch.device], Callable[..., Tensor]]:
    def prepare(device: torch.device) -> Callable[..., Tensor]:
        noise = torch.randn(B, N, device=device)

        def function(a: Tensor, r: Tensor, da: Tensor, dr: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
            return residual_lrelu(a, r, da, dr, noise, strength, bias, clamp=256.0)

        return function

    return prepare


def split(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    return scale_and_split


def encoder_cases(label: str, B: int, N: int, C: int) -> tuple[Case, ...]:
    """Return the elementwise operators of Styleformer's encoder block for B images of N tokens with C channels."""
    tokens, vector = (B, N, C), (B, C)
    others = (tokens, vector, vector, (), (C,))
    return (
        Case(name=f"encoder LayerNorm, {label}", shape=tokens, prepare=normalize, others=(vector,), saved=1),
        Case(name=f"encoder residual, {label}", shape=tokens, prepare=add_residual(B, N), others=others, saved=3),
        Case(name=f"encoder QKV, {label}", shape=(B, N, 3 * C), prepare=split, others=((B, 3 * C),), saved=1),
    )


CASES = (
    Case(name="discriminator blur, 32 px", shape=(32, 512, 32, 32), prepare=blur),
    Case(name="discriminator blur, 16 px", shape=(32, 512, 16, 16), prepare=blur),
    Case(name="discriminator blur, 256 px", shape=(8, 64, 256, 256), prepare=blur),
    Case(name="discriminator shortcut, 64 px", shape=(32, 512, 64, 64), prepare=reduce(BINOMIAL)),
    Case(name="token map up, 32 px", shape=(32, 256, 32, 32), prepare=enlarge(BINOMIAL)),
    Case(name="RGB pyramid up, 16 px", shape=(32, 3, 16, 16), prepare=enlarge(BINOMIAL)),
    Case(name="RGB pyramid up, 128 px", shape=(32, 3, 128, 128), prepare=enlarge(BINOMIAL)),
    Case(name="augmentation up, 32 px", shape=(32, 3, 94, 94), prepare=enlarge(TWELVE_TAPS)),
    Case(name="augmentation down, 32 px", shape=(32, 3, 76, 76), prepare=reduce(TWELVE_TAPS)),
    Case(name="bias_act lrelu, 32 px", shape=(32, 512, 32, 32), prepare=activate(512), saved=1),
    Case(name="bias_act lrelu, 256 px", shape=(8, 64, 256, 256), prepare=activate(64), saved=1),
    Case(name="bias_act lrelu, 1024 tokens", shape=(32, 1024, 512), prepare=activate(512, dim=2), saved=1),
    Case(name="filtered_lrelu, 84 px", shape=(8, 128, 84, 84), prepare=filtered(is_radial=False), saved=1),
    Case(name="filtered_lrelu, 84 px, radial", shape=(8, 128, 84, 84), prepare=filtered(is_radial=True), saved=1),
    *encoder_cases("1024 tokens", 32, 1024, 256),
    *encoder_cases("64 tokens", 32, 64, 1024),
)


def seconds_per_call(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of `repeats` calls, after two warm-up calls.

    On a GPU a call is timed by CUDA events, queued after work that keeps the GPU busy during the launch, so that launch
    time on the host is not included.
    """
    if device.type == "cuda":
        return _seconds_on_gpu(function, device, repeats)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _seconds_on_gpu(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    # Larger than any L2 cache, because calls in a network find a cold cache, too.
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    function()
    synchronize(device)
    began = time.perf_counter()
    function()
    cycles = max(1_000_000, round((time.perf_counter() - began) * 4e9))  # twice the host time, at 2 GHz
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats + 2)]
    for start, end in pairs:
        flush.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        function()
        end.record()
    synchronize(device)
    return statistics.median([start.elapsed_time(end) / 1e3 for start, end in pairs][2:])


def measure(
    case: Case, impl: str, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Time the operator, its gradients, and a copy of a tensor of the input's size."""
    x = torch.randn(case.shape, device=device, dtype=dtype)
    x = x.contiguous(memory_format=memory_format) if x.ndim == 4 else x
    types = [dtype if shape == case.shape else torch.float32 for shape in case.others]
    others = [torch.randn(shape, device=device, dtype=kind) for shape, kind in zip(case.others, types, strict=True)]
    inputs = [tensor.requires_grad_() for tensor in (x, *others)]
    constants = [tensor.detach() for tensor in inputs]
    function = case.prepare(device)
    if impl == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False)
    with custom_ops.implementation("cuda" if impl == "cuda" else "reference"):
        y = function(*inputs)
        outputs = [y] if isinstance(y, Tensor) else list(y)
        grads = [torch.randn_like(output) for output in outputs]
        target = torch.empty_like(x)
        forward = seconds_per_call(lambda: function(*constants), device, repeats)
        backward = seconds_per_call(
            lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True), device, repeats
        )
    copy = seconds_per_call(lambda: target.copy_(x.detach()), device, repeats)
    copied = 2 * x.numel() * x.element_size()

    def row(seconds: float, elements: int) -> dict[str, float]:
        rate = elements * x.element_size() / seconds / 1e9
        return {
            "ms": round(seconds * 1e3, 4),
            "gb_per_s": round(rate, 4),
            "of_copy": round(rate / (copied / copy / 1e9), 3),
        }

    written = sum(output.numel() for output in outputs)
    moved = written + sum(tensor.numel() for tensor in inputs if tensor.shape == x.shape)
    return {
        "case": case.name,
        "shape": list(case.shape),
        "impl": impl,
        "forward": row(forward, moved),
        "backward": row(backward, moved + case.saved * written),
        "copy": {"ms": round(copy * 1e3, 4), "gb_per_s": round(copied / copy / 1e9, 2)},
    }


def choose_implementations(requested: str | None, device: torch.device) -> list[str]:
    """Parse --impl. Default: all implementations that work on a GPU; only the reference on a CPU."""
    if requested is None:
        if device.type != "cuda":
            return ["reference"]
        return [impl for impl in IMPLEMENTATIONS if impl != "cuda" or missing_kernels() is None]
    chosen = requested.split(",")
    for impl in chosen:
        if impl not in IMPLEMENTATIONS:
            raise click.UsageError(f"--impl={requested}: {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if "cuda" in chosen and device.type != "cuda":
        raise click.UsageError(f"--impl={requested}: the kernels need --device=cuda")
    reason = missing_kernels() if "cuda" in chosen else None
    if reason is not None:
        raise click.UsageError(f"--impl={requested}: {reason}")
    return chosen


def missing_kernels() -> str | None:
    """Return the reason why CUDA or Triton kernels are unavailable; None if all are available."""
    return custom_ops.why_not() or encoder.why_not()


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N")
@click.option("--dtype", default="float32", show_default=True, help=f"one or several of {','.join(DTYPES)}")
@click.option("--impl", help=f"one or several of {','.join(IMPLEMENTATIONS)} [default: all on a GPU, else reference]")
@click.option("--channels-last", is_flag=True, help="use the channels-last memory layout")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: PyTorch's choice]")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="timed calls; the median is reported",
)
@click.option("--only", default="", help="run only the cases with this text in their name")
def main(
    device: str, dtype: str, impl: str | None, channels_last: bool, threads: int | None, repeats: int, only: str
) -> None:
    """Time the operators; print JSON lines."""
    cases = [case for case in CASES if only in case.name]
    if not cases:
        raise click.UsageError(f"--only={only} matches no case: {', '.join(case.name for case in CASES)}")
    for name in dtype.split(","):
        if name not in DTYPES:
            raise click.UsageError(f"--dtype={dtype}: {name!r} is not one of {', '.join(DTYPES)}")
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device={device} cannot be used: {error}") from error
    implementations = choose_implementations(impl, place)
    tune_allocator()
    if threads is not None:
        torch.set_num_threads(threads)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    for name in dtype.split(","):
        for case in cases:
            for chosen in implementations:
                result = measure(case, chosen, place, memory_format, DTYPES[name], repeats)
                emit({"benchmark": "operators", **result, "dtype": name, "channels_last": channels_last}, place)


if __name__ == "__main__":
    main()
