"""Small untrained snapshots of every generator family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dnnlib.config import override, to_json
from training.config import PRESETS, Environment, read_config, resolve
from training.snapshots.snapshot import Snapshot, load_network, save_network

# Fields that make each family small, for images of 8x8; other families use their defaults.
SMALL: dict[str, dict[str, Any]] = {
    "styleformer": {"base": (4, 4), "widths": (16, 8), "layers": (1, 2), "linformer_k": 4, "linformer_min_tokens": 64},
    "stylegan2": {"channel_max": 8},
    "styleformer-c": {"base": (4, 4), "handover": 4, "widths": (16,), "layers": (2,), "channel_max": 8},
    "transgan": {"base": (4, 4), "widths": (64, 16), "layers": (1, 1)},
    "r3gan": {"w_dim": 0, "widths": (16, 8), "layers": (1, 1), "group_width": 8},
    "stylegan3": {"num_layers": 3, "channel_base": 64, "channel_max": 8, "margin": 2},
    "styleformer-a": {"num_layers": 3, "channel_base": 64, "channel_max": 8, "margin": 2},
}


def make_snapshot(path: Path, family: str = "styleformer", *, c_dim: int = 0, data: str = "shapes.zip") -> Snapshot:
    """Write untrained G, D and G_ema for 8x8 images, with nonzero noise strengths and w_avg, as after training."""
    changes = {"family": family, "z_dim": 16, "w_dim": 16} | SMALL.get(family, {})
    config = override(PRESETS["tiny"], {f"generator.{name}": value for name, value in changes.items()})
    small_d = {"discriminator.channel_base": 64, "discriminator.mapping_layers": 2, "data.path": data}
    config = resolve(override(config, small_d), Environment(img_shape=(3, 8, 8), c_dim=c_dim))
    config = read_config(to_json(config))  # converts an int in a float field to float
    torch.manual_seed(5)
    G, D, G_ema = config.generator.build(), config.discriminator.build(), config.generator.build()
    with torch.no_grad():
        for name, x in G_ema.state_dict().items():
            if name.endswith(("noise_strength", "w_avg")):
                x.fill_(0.5)
    save_network(path, config=config, G=G, D=D, G_ema=G_ema, nimg=12_345, ada_p=0.1 + 0.2)
    return load_network(path)
