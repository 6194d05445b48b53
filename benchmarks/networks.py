"""Speed of the networks alone: images per second, parameters and GFLOP, as one JSON object per line.

python benchmarks/networks.py --batch=8 --device=cpu --threads=2
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.networks.discriminator import StyleGAN2Discriminator, StyleGAN2DiscriminatorConfig
from training.networks.styleformer import StyleformerConfig, StyleformerGenerator

CONFIGS: dict[str, StyleformerConfig | StyleGAN2DiscriminatorConfig] = {
    "styleformer 32 px, layers 1,2,2": StyleformerConfig(layers=(1, 2, 2)),
    "styleformer 32 px, layers 1,3,3": StyleformerConfig(),
    "styleformer 64 px, linformer": StyleformerConfig(widths=(512, 256, 128, 64), layers=(1, 2, 1, 1), linformer=True),
    "styleformer 128 px, linformer": StyleformerConfig(
        widths=(512, 256, 128, 64, 32), layers=(1, 2, 1, 1, 1), linformer=True
    ),
    "stylegan2 discriminator 32 px, orig": StyleGAN2DiscriminatorConfig(architecture="orig", mbstd_group_size=32),
}


def random_pass(
    config: StyleformerConfig | StyleGAN2DiscriminatorConfig, batch: int, device: str
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network of a config on a device, and its forward pass on `batch` random inputs."""
    with torch.device(device):
        network: StyleformerGenerator | StyleGAN2Discriminator = config.build()
        if isinstance(network, StyleGAN2Discriminator):
            D, img = network, torch.randn(batch, *network.img_shape)
            return D, lambda: D(img, None)
        G, z = network, torch.randn(batch, network.z_dim)
        return G, lambda: G(z, None, noise_mode="random")


def gflop_per_image(config: StyleformerConfig | StyleGAN2DiscriminatorConfig) -> float:
    """Multiplications and additions of the matrix products and convolutions in one forward pass."""
    _, forward = random_pass(config, 1, "meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return float(counter.get_total_flops()) / 1e9


def images_per_second(run: Callable[[], object], batch: int, device: torch.device, seconds: float) -> float:
    """Repeat `run`, which handles `batch` images, for about `seconds` after a warm-up."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    run()
    synchronize()
    start, count, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        run()
        synchronize()
        count += 1
        elapsed = time.perf_counter() - start
    return batch * count / elapsed


@click.command(help=__doc__)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images per pass")
@click.option("--device", default="cpu", show_default=True, help="Where to run: cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads  [default: PyTorch's choice]")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Time per measurement")
def main(batch: int, device: str, threads: int | None, seconds: float) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device)
    torch.manual_seed(0)

    for name, config in CONFIGS.items():
        network, forward = random_pass(config, batch, device)

        def backward(network: nn.Module = network, forward: Callable[[], Tensor] = forward) -> None:
            network.zero_grad(set_to_none=True)
            forward().sum().backward()

        result = {
            "network": name,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "gflop_per_image": round(gflop_per_image(config), 3),
            "forward_img_per_s": round(images_per_second(torch.no_grad()(forward), batch, where, seconds), 1),
            "forward_backward_img_per_s": round(images_per_second(backward, batch, where, seconds), 1),
            "batch": batch,
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else str(where),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
