"""Small snapshots of every family for the commands of generate.py, and readers of their output."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from conftest import small_config
from PIL import Image, ImageSequence

import generate
from exploration.directions import Directions
from exploration.model import Model
from training.networks.generator import GeneratorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer_a import StyleformerAConfig
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan3 import StyleGAN3Config
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
ALIAS_FREE: dict[str, Any] = {"num_layers": 4, "channel_base": 256, "channel_max": 16, "margin": 4}
MOVING: dict[str, GeneratorConfig] = {  # networks with Fourier features at their input
    "stylegan3-t": StyleGAN3Config(**SIZES, **ALIAS_FREE, side=32),
    "stylegan3-r": StyleGAN3Config(**SIZES, **ALIAS_FREE, side=32, rotation=True),
    "styleformer-a": StyleformerAConfig(**SIZES, **ALIAS_FREE, side=32, depth=8),
    "styleformer-f": StyleformerConfig(**SIZES, widths=(16, 8, 8), layers=(1, 1, 1), depth=4, fourier_input=True),
}
TRANSGAN = TransGANConfig(  # the latent is the only style
    z_dim=16, w_dim=16, widths=(32, 8, 8), layers=(1, 1, 1), num_heads=2, full_upto=16, window=8
)


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(generate.main, [command, *map(str, arguments)])


def run_ok(command: str, *arguments: object) -> str:
    result = run(command, *arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def build(config: GeneratorConfig) -> Any:
    """Build an untrained generator with nonzero noise strengths and w_avg, as after training."""
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
    """Build an untrained unconditional generator on the CPU."""
    return Model(G=build(config), device=torch.device("cpu"), c=torch.zeros(1, 0), **options)


def pixels(path: Path) -> np.ndarray:
    """Read the pixels of an image file, (H, W) or (H, W, C)."""
    with Image.open(path) as image:
        return np.asarray(image)


def example_directions(**changes: Any) -> Directions:
    """Make the first three coordinate axes of w as directions for styles 1 and 2."""
    made = Directions(
        directions=torch.eye(12)[:3], values=torch.ones(3), sigmas=torch.tensor([2.0, 1.0, 0.5]), styles=(1, 2)
    )
    return dataclasses.replace(made, **changes)


def decode_video(path: Path) -> tuple[np.ndarray, float]:
    """Return the frames (T, H, W, 3) and the frames per second of an MP4 or GIF file."""
    if path.suffix == ".gif":
        with Image.open(path) as gif:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
            return np.stack(frames), 1000 / gif.info["duration"]
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    match = re.search(r"Video: h264.*? (\d+)x(\d+)[ ,].*?([\d.]+) fps", done.stderr.decode())
    assert match, done.stderr.decode()
    width, height, fps = match.groups()
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, int(height), int(width), 3), float(fps)
