"""Measure the convolutions of StyleGAN2's discriminator on a CPU against PyTorch's.

    python benchmarks/convolutions.py --batch=32

Prints one line of JSON per layer and order of derivatives: processor seconds, the same for PyTorch, and the deviation
between the results. `same` is a 3x3 convolution, `halving` a blur followed by a 3x3 convolution with stride 2. Order 0
is the forward pass, 1 adds both gradients, and 2 is the gradient of the squared input gradient, as in R1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch
import torch.nn.functional as F
from common import against_plain, emit
from torch import Tensor

from dnnlib.allocator import tune_allocator
from dnnlib.cli import Script, option
from torch_utils.ops import winograd
from torch_utils.ops.upfirdn2d import upfirdn2d
from training.networks.layers import resample_filter

Convolve = Callable[[Tensor, Tensor], Tensor]

# Channels and side of the grid of the layers with the most operations at 32x32 pixels, and of a narrower network.
LAYERS = {"same": ((512, 32), (512, 16), (512, 8), (128, 32)), "halving": ((512, 32), (512, 16))}


@click.command(cls=Script, help=__doc__)
@option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images.")
@option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Runs; the fastest is reported.")
@option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")
@option("--scale", type=click.IntRange(min=1), default=1, show_default=True, help="Divisor of the channels.")
def main(batch: int, repeats: int, threads: int, scale: int) -> None:
    tune_allocator()
    torch.set_num_threads(threads)
    for kind, layers in LAYERS.items():
        for channels, side in layers:
            measure(kind, channels // scale, side, batch, repeats)


def measure(kind: str, channels: int, side: int, batch: int, repeats: int) -> None:
    """Print a line of JSON for each order of derivatives of a layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    algorithm = winograd.same(side, x.dtype) if kind == "same" else winograd.halving(tuple(resample_filter().tolist()))

    def own(x: Tensor, weight: Tensor) -> Tensor:
        return winograd.convolve(x, winograd.transform(weight, algorithm), algorithm)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        if kind == "same":
            return F.conv2d(x, weight, padding=1)
        return F.conv2d(upfirdn2d(x, resample_filter(), padding=2), weight, stride=2)

    for order in range(3):
        own_form, plain_form = (partial(derivative, form, x, weight, order) for form in (own, plain))
        layer = {"layer": kind, "channels": channels, "side": side, "batch": batch, "order": order}
        times = against_plain(own_form, plain_form, repeats, x.device)
        emit({"benchmark": "convolutions", **layer, **times}, x.device)


def derivative(convolve: Convolve, x: Tensor, weight: Tensor, order: int) -> Tensor:
    """Return the output (order 0), both gradients (1), or the weight gradient of the squared input gradient (2)."""
    if order == 0:
        with torch.no_grad():
            return convolve(x, weight)
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    y = convolve(x, weight)
    if order == 1:
        return torch.cat([g.flatten() for g in torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    return torch.autograd.grad(dx.square().sum(), weight)[0]


if __name__ == "__main__":
    main()
