"""Measure speed and memory of the networks alone, and count parameters and GFLOP; print one line of JSON per network.

python benchmarks/networks.py --batch=8 --device=cpu --threads=2
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import click
import torch
from common import emit, images_per_second
from self_attention import peak, reset_peak
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.allocator import tune_allocator
from training.networks import execution
from training.networks.discriminator import Discriminator, DiscriminatorConfig
from training.networks.generator import Generator, GeneratorConfig
from training.networks.r3gan import R3GANConfig
from training.networks.r3gan_discriminator import R3GANDiscriminatorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer2 import Styleformer2Config
from training.networks.styleformer_a import StyleformerAConfig
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.styleformer_discriminator import StyleformerDiscriminatorConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.networks.stylegan3 import StyleGAN3Config
from training.networks.transgan import TransGANConfig
from training.networks.transgan_discriminator import TransGANDiscriminatorConfig

CONFIGS: dict[str, GeneratorConfig | DiscriminatorConfig] = {
    "styleformer 32 px, layers 1,2,2": StyleformerConfig(layers=(1, 2, 2)),
    "styleformer 32 px, layers 1,3,3": StyleformerConfig(),
    "styleformer 64 px, linformer": StyleformerConfig(widths=(512, 256, 128, 64), layers=(1, 2, 1, 1), linformer=True),
    "styleformer 128 px, linformer": StyleformerConfig(
        widths=(512, 256, 128, 64, 32), layers=(1, 2, 1, 1, 1), linformer=True
    ),
    "styleformer2 32 px": Styleformer2Config(),
    "styleformer-c 128 px": StyleformerCConfig(),
    "stylegan2 32 px": StyleGAN2Config(),
    "stylegan3-t 32 px": StyleGAN3Config(side=32),
    "stylegan2 64 px": StyleGAN2Config(resolutions=5, channel_base=16384),
    "stylegan3-t 64 px": StyleGAN3Config(),
    "stylegan3-r 64 px": StyleGAN3Config(rotation=True, channel_base=32768, channel_max=1024),
    "styleformer-a 64 px": StyleformerAConfig(),
    "transgan 32 px": TransGANConfig(z_dim=256, w_dim=256),
    "transgan discriminator 32 px": TransGANDiscriminatorConfig(norm="token"),
    "styleformer discriminator 32 px": StyleformerDiscriminatorConfig(),
    "r3gan 32 px": R3GANConfig(w_dim=64),
    "r3gan discriminator 32 px": R3GANDiscriminatorConfig(),
    "stylegan2 discriminator 32 px, orig": StyleGAN2DiscriminatorConfig(architecture="orig", mbstd_group_size=32),
}


def random_pass(
    config: GeneratorConfig | DiscriminatorConfig, batch: int, device: str
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the network of a config on a device, and its forward pass on `batch` random inputs."""
    with torch.device(device):
        network: Generator | Discriminator = config.build()
        if isinstance(network, Discriminator):
            D, img = network, torch.randn(batch, *network.img_shape)
            return D, lambda: D(img, None)
        G, z = network, torch.randn(batch, network.z_dim)
        return G, lambda: G(z, None, noise_mode="random")


def gflop_per_image(config: GeneratorConfig | DiscriminatorConfig) -> float:
    """Count multiplications and additions of the matrix products and convolutions in one forward pass."""
    _, forward = random_pass(config, 1, "meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return float(counter.get_total_flops()) / 1e9


@click.command(help=__doc__)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images per pass")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads  [default: PyTorch's choice]")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Time per measurement")
@click.option("--only", default="", help="Measure only the networks with this text in their names")
def main(batch: int, device: str, threads: int | None, seconds: float, only: str) -> None:
    where = torch.device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = {name: config for name, config in CONFIGS.items() if only in name}
    if not chosen:
        raise click.UsageError(f"--only={only} matches no network: {'; '.join(CONFIGS)}")
    for name, config in chosen.items():
        run = measure if where.type == "cuda" else in_own_process
        result = run(config, batch, device, torch.get_num_threads(), seconds)
        result |= {"gflop_per_image": round(gflop_per_image(config), 3), "batch": batch}
        emit({"benchmark": "networks", "network": name, **result}, where)


def in_own_process(*args: Any) -> dict[str, Any]:
    """Measure in a fresh process, whose peak memory is not affected by other networks."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def measure(
    config: GeneratorConfig | DiscriminatorConfig, batch: int, device: str, threads: int, seconds: float
) -> dict[str, Any]:
    """Return number of parameters, speed, and additional peak memory (None: unknown) of one network."""
    tune_allocator()
    execution.set_gpu_arithmetic()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = torch.device(device)
    has_peak = where.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)
    before = reset_peak(where) if has_peak else 0.0
    network, forward = random_pass(config, batch, device)

    def backward() -> None:
        network.zero_grad(set_to_none=True)
        forward().sum().backward()

    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "forward_img_per_s": round(images_per_second(torch.no_grad()(forward), batch, where, seconds), 1),
        "forward_backward_img_per_s": round(images_per_second(backward, batch, where, seconds), 1),
        "peak_mib": round(peak(where) - before) if has_peak else None,
    }


if __name__ == "__main__":
    main()
