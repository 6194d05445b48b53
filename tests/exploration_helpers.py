"""Small snapshots of every family for the commands of generate.py that look into a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from conftest import small_config
from PIL import Image

import generate
from exploration.model import Model
from training.networks.generator import GeneratorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.transgan import TransGANConfig
from training.snapshots.snapshot import save_network

SIZES: dict[str, Any] = {"z_dim": 16, "w_dim": 12}
FAMILIES: dict[str, GeneratorConfig] = {
    "styleformer": StyleformerConfig(**SIZES, widths=(16, 8, 8), layers=(1, 2, 1), depth=4),
    "stylegan2": StyleGAN2Config(**SIZES, resolutions=4, channel_base=64),
    "styleformer-c": StyleformerCConfig(
        **SIZES, widths=(16, 8), layers=(1, 2), depth=4, handover=16, resolutions=3, channel_base=128
    ),
}
TRANSGAN = TransGANConfig(  # whose latent is its only style
    z_dim=16, w_dim=16, widths=(32, 8, 8), layers=(1, 1, 1), num_heads=2, full_upto=16, window=8
)


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(generate.main, [command, *map(str, arguments)])


def run_ok(command: str, *arguments: object) -> str:
    result = run(command, *arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def build(config: GeneratorConfig) -> Any:
    """An untrained generator in which noise and w_avg are not zero, as they would be after training."""
    torch.manual_seed(3)
    G = config.build()
    with torch.no_grad():
        G.mapping.w_avg.normal_()
        for name, x in G.named_parameters():
            if name.endswith("noise_strength"):
                x.fill_(0.5)
    return G.eval().requires_grad_(False)


def make_snapshot(path: Path, data: Path, family: str = "styleformer", **changes: Any) -> Path:
    return save_untrained(path, data, dataclasses.replace(FAMILIES[family], **changes))


def save_untrained(path: Path, data: Path, generator: GeneratorConfig) -> Path:
    save_network(path, config=dataclasses.replace(small_config(data), generator=generator), G_ema=build(generator))
    return path


def make_model(family: str = "styleformer", **options: Any) -> Model:
    return model_of(FAMILIES[family], **options)


def model_of(config: GeneratorConfig, **options: Any) -> Model:
    """An untrained generator without classes, on the CPU."""
    return Model(G=build(config), device=torch.device("cpu"), c=torch.zeros(1, 0), **options)


def pixels(path: Path) -> np.ndarray:
    """Pixels of a picture, (H, W) or (H, W, C)."""
    with Image.open(path) as image:
        return np.asarray(image)
