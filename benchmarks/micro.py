"""Measure the peak rates of a GPU, and alternative implementations that this project chose without a GPU.

    python benchmarks/micro.py --device=cuda

machine       rates of bf16 matrix products, copies and launches: the upper bounds for everything else
attention     PyTorch's attention kernels, for the shapes of cifar-large
warp          ADA's warp with dense matrices and with filters; determines DENSE_SIDE_ON_GPU
convolution   layout, autotuning, and the weight gradient in two ways: by the weight-gradient kernel, and as a
              convolution with an image as the filter, as in PyTorch's double backward of R1

Prints one line of JSON for each measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import click
import torch
import torch.nn.functional as F
from common import emit, images_per_second
from operators import seconds_per_call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError
from dnnlib.util import describe_error
from torch_utils import distributed
from training.augment import stages
from training.augment.stages import AffineStage

Row = dict[str, Any]


@click.command(cls=Script, help=__doc__)
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--parts", type=NameList(), help="Parts to measure. [all]")
@option("--quick", is_flag=True, help="Use tiny sizes, to test the script.")
def main(device: str | None, parts: tuple[str, ...] | None, quick: bool) -> None:
    where = distributed.use_device(device)
    for part in parts or ():
        if part not in PARTS:
            raise UserError(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
    for part in parts or PARTS:
        for row in PARTS[part](where, quick):
            emit({"benchmark": "micro", "part": part, **row}, where)


def machine(device: torch.device, quick: bool) -> Iterator[Row]:
    side, launches = (256, 100) if quick else (8192, 1000)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.empty(4 * side**2, device=device)
    target, small = torch.empty_like(source), torch.zeros(8, device=device)
    product = milliseconds(lambda: x @ x, device, quick)
    copy = milliseconds(lambda: target.copy_(source), device, quick)
    launched = images_per_second(lambda: [small.add_(1) for _ in range(launches)], launches, device, seconds=0.1)
    yield {
        "bf16_tflop_per_s": round(2 * side**3 / product / 1e9, 1),
        "copy_tb_per_s": round(2 * source.numel() * 4 / copy / 1e9, 2),
        "us_per_launch": round(1e6 / launched, 2),  # on the host
    }


def attention(device: torch.device, quick: bool) -> Iterator[Row]:
    B, H, N, D = (1, 2, 64, 32) if quick else (64, 16, 1024, 32)
    q, k, v = (
        torch.randn(B, N, H, D, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    grad = torch.randn_like(q)
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(kernel):
            yield {"kernel": kernel.name, "shape": [B, H, N, D]} | timed(
                device,
                quick,
                forward_ms=lambda: F.scaled_dot_product_attention(q, k, v),
                forward_backward_ms=lambda: torch.autograd.grad(
                    F.scaled_dot_product_attention(q, k, v), (q, k, v), grad
                ),
            )


def convolution(device: torch.device, quick: bool) -> Iterator[Row]:
    B, C = (2, 8) if quick else (64, 512)
    for side in (8,) if quick else (32, 16, 8):
        for layout in (torch.channels_last, torch.contiguous_format):
            x, y = (
                torch.randn(B, C, side, side, device=device, dtype=torch.bfloat16).contiguous(memory_format=layout)
                for _ in range(2)
            )
            w = torch.randn(C, C, 3, 3, device=device, dtype=torch.bfloat16).contiguous(memory_format=layout)
            for autotune in (True, False):
                case = {"side": side, "channels_last": layout == torch.channels_last, "autotune": autotune}
                # In a new thread, because each thread caches the algorithms found by autotuning.
                with (
                    torch.backends.cudnn.flags(enabled=True, benchmark=autotune, allow_tf32=False),
                    ThreadPoolExecutor(1) as thread,
                ):
                    yield case | thread.submit(timed, device, quick, **convolution_calls(x, y, w)).result()


def convolution_calls(x: Tensor, y: Tensor, w: Tensor) -> dict[str, Callable[[], object]]:
    def derivative(*mask: bool) -> Any:
        return torch.ops.aten.convolution_backward(y, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

    return {
        "forward_ms": lambda: F.conv2d(x, w, padding=1),
        "input_gradient_ms": lambda: derivative(True, False, False),
        "weight_gradient_ms": lambda: derivative(False, True, False),
        "weight_gradient_as_convolution_ms": lambda: F.conv2d(x.transpose(0, 1), y.transpose(0, 1), padding=1),
    }


def warp(device: torch.device, quick: bool) -> Iterator[Row]:
    batch = 2 if quick else 64
    for side in (16,) if quick else (32, 64, 128, 256):
        stage = AffineStage("bg", (3, side, side)).to(device)
        images = torch.randn(batch, 3, side, side, device=device, requires_grad=True)
        maps = stage.draw(images.detach(), torch.ones([], device=device))
        for form, limit in (("matrices", side), ("filters", 0)):
            with (
                patch.object(stages, "DENSE_SIDE_ON_GPU", limit),
                patch.object(stages, "DENSE_SIDE", limit),
            ):
                calls = warp_calls(stage, images, maps)
                yield {"form": form, "side": side, "batch": batch} | timed(device, quick, **calls)


def warp_calls(stage: AffineStage, x: Tensor, maps: Tensor) -> dict[str, Callable[[], object]]:
    return {
        "forward_ms": lambda: stage.transform(x.detach(), maps),
        "forward_backward_ms": lambda: torch.autograd.grad(stage.transform(x, maps).sum(), x),
    }


PARTS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "machine": machine,
    "attention": attention,
    "warp": warp,
    "convolution": convolution,  # last: autotuning may take long
}


def timed(device: torch.device, quick: bool, **calls: Callable[[], object]) -> Row:
    """Time each call in milliseconds, or return the problem if a call fails."""
    try:
        return {name: round(milliseconds(call, device, quick), 4) for name, call in calls.items()}
    except RuntimeError as error:  # a kernel does not support these shapes
        return {"problem": describe_error(error)}


def milliseconds(call: Callable[[], object], device: torch.device, quick: bool) -> float:
    return 1e3 * seconds_per_call(call, device, 1 if quick else 10)


if __name__ == "__main__":
    main()
