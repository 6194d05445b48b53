"""Time upfirdn2d and bias_act on the shapes that the networks use, beside a plain copy of the same bytes.

Prints one line of JSON for each case. The operators should be limited by memory: `gb_per_s` counts what a fused kernel
would have to move (input and output once), so that 1.0 in `of_copy` means as fast as a copy.

    python benchmarks/operators.py --device cuda
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

from torch_utils.misc import tune_allocator
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upfirdn2d, upsample2d

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BINOMIAL = [1, 3, 3, 1]
TWELVE_TAPS = [1, 2, 3, 5, 8, 9, 9, 8, 5, 3, 2, 1]  # as long as the low-pass filter of the augmentation


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator on one shape [B, C, H, W]; `prepare` puts its constants on the device and returns the function."""

    name: str
    shape: tuple[int, int, int, int]
    prepare: Callable[[torch.device], Callable[[Tensor], Tensor]]


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


def activate(channels: int) -> Callable[[torch.device], Callable[[Tensor], Tensor]]:
    def prepare(device: torch.device) -> Callable[[Tensor], Tensor]:
        b = torch.randn(channels, device=device)
        return lambda x: bias_act(x, b, act="lrelu", clamp=256.0)

    return prepare


CASES = (
    Case(name="discriminator blur, 32 px", shape=(32, 512, 32, 32), prepare=blur),
    Case(name="discriminator blur, 16 px", shape=(32, 512, 16, 16), prepare=blur),
    Case(name="discriminator blur, 256 px", shape=(8, 64, 256, 256), prepare=blur),
    Case(name="discriminator shortcut, 64 px", shape=(32, 512, 64, 64), prepare=reduce(BINOMIAL)),
    Case(name="RGB pyramid up, 16 px", shape=(32, 3, 16, 16), prepare=enlarge(BINOMIAL)),
    Case(name="RGB pyramid up, 128 px", shape=(32, 3, 128, 128), prepare=enlarge(BINOMIAL)),
    Case(name="augmentation up, 32 px", shape=(32, 3, 94, 94), prepare=enlarge(TWELVE_TAPS)),
    Case(name="augmentation down, 32 px", shape=(32, 3, 76, 76), prepare=reduce(TWELVE_TAPS)),
    Case(name="bias_act lrelu, 32 px", shape=(32, 512, 32, 32), prepare=activate(512)),
    Case(name="bias_act lrelu, 256 px", shape=(8, 64, 256, 256), prepare=activate(64)),
)


def seconds_per_call(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median over `repeats` calls, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(
    case: Case, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Time the operator, its gradient, and a copy of a tensor of the input's size."""
    x = torch.randn(case.shape, device=device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    function = case.prepare(device)
    y = function(x)
    grad = torch.randn_like(y)
    target = torch.empty_like(x)

    forward = seconds_per_call(lambda: function(x.detach()), device, repeats)
    backward = seconds_per_call(lambda: torch.autograd.grad(y, x, grad, retain_graph=True), device, repeats)
    copy = seconds_per_call(lambda: target.copy_(x.detach()), device, repeats)
    moved = (x.numel() + y.numel()) * x.element_size()
    copied = 2 * x.numel() * x.element_size()

    def row(seconds: float) -> dict[str, float]:
        rate = moved / seconds / 1e9
        return {
            "ms": round(seconds * 1e3, 4),
            "gb_per_s": round(rate, 2),
            "of_copy": round(rate / (copied / copy / 1e9), 3),
        }

    return {
        "case": case.name,
        "shape": list(case.shape),
        "forward": row(forward),
        "backward": row(backward),
        "copy": {"ms": round(copy * 1e3, 4), "gb_per_s": round(copied / copy / 1e9, 2)},
    }


@click.command()
@click.option("--device", default="cpu", show_default=True, help="where to run: cpu, cuda, cuda:1")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--channels-last", is_flag=True, help="lay images out channels last")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: PyTorch's choice]")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="timed calls, of which the median counts",
)
@click.option("--only", default="", help="run only the cases with this text in their name")
def main(device: str, dtype: str, channels_last: bool, threads: int | None, repeats: int, only: str) -> None:
    """Time upfirdn2d and bias_act; print JSON lines."""
    cases = [case for case in CASES if only in case.name]
    if not cases:
        raise click.UsageError(f"--only={only} names no case: {', '.join(case.name for case in CASES)}")
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device={device} cannot be used: {error}") from error
    tune_allocator()
    if threads is not None:
        torch.set_num_threads(threads)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    for case in cases:
        result = measure(case, place, memory_format, DTYPES[dtype], repeats)
        emit({"benchmark": "operators", **result, "dtype": dtype, "channels_last": channels_last}, place)


if __name__ == "__main__":
    main()
