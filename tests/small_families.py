"""Small networks of every family, for tests of all entries in the tables of training/networks.

Families without an entry use their default sizes.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dnnlib.config import override
from training.config import PRESETS, Environment, TrainConfig, apply_options, resolve
from training.dataset import ImageDataset
from training.networks import DISCRIMINATORS, GENERATORS
from training.networks.discriminator import DiscriminatorConfig
from training.networks.generator import GeneratorConfig

Settings = dict[str, Any]

# Fields that make each family small, for images of 16x16.
G_SETTINGS: dict[str, Settings] = {
    "styleformer": {"widths": (16, 8), "layers": (1, 1)},
    "styleformer2": {"widths": (16, 8), "layers": (1, 1), "lr_width": 8},
    "stylegan2": {"channel_base": 128, "channel_max": 8},
    "styleformer-c": {"handover": 8, "widths": (16,), "layers": (1,), "channel_base": 128, "channel_max": 8},
    "transgan": {"widths": (16, 4), "layers": (1, 1), "num_heads": 2, "full_upto": 8, "window": 8},
    "r3gan": {"w_dim": 0, "widths": (16, 16, 8), "layers": (1, 1, 1), "group_width": 8},
    "stylegan3": {"num_layers": 4, "channel_base": 128, "channel_max": 8, "margin": 4},
    "styleformer-a": {"num_layers": 4, "channel_base": 128, "channel_max": 8, "margin": 4},
}
D_SETTINGS: dict[str, Settings] = {
    "stylegan2": {"channel_base": 128, "channel_max": 8},
    "styleformer": {"layers": (1, 1), "channel_base": 128, "channel_max": 8, "depth": 4},
    "transgan": {"widths": (8, 8), "layers": (1, 1), "local_layers": (0, 0), "num_heads": 2},
    "r3gan": {"widths": (16, 16, 8), "layers": (1, 1, 1), "group_width": 8},
}

# Changes for images of 32x32, for families in which `fit` does not choose the number of resolutions.
G_DOUBLED: dict[str, Settings] = {
    "styleformer": {"widths": (16, 8, 8), "layers": (1, 1, 1)},
    "styleformer2": {"widths": (16, 8, 8), "layers": (1, 1, 1)},
    "transgan": {"widths": (16, 4, 4), "layers": (1, 1, 1)},
    "r3gan": {"widths": (16, 16, 8, 8), "layers": (1, 1, 1, 1)},
}
D_DOUBLED: dict[str, Settings] = {
    "styleformer": {"layers": (1, 1, 1)},
    "r3gan": {"widths": (16, 16, 8, 8), "layers": (1, 1, 1, 1)},
}

# Options of a family that change what its networks compute.
G_VARIANTS: dict[str, dict[str, Settings]] = {
    "styleformer": {
        "linformer": {"linformer": True, "linformer_k": 5, "linformer_min_tokens": 64},
        "ablations": {"ffn": True, "layernorm": "after", "style_attention": False, "residual": False},
        "fourier": {"fourier_input": True},
    },
    "styleformer2": {
        "linformer": {"linformer": True, "linformer_k": 5, "linformer_min_tokens": 64},
        "parts": {"sine_input": False, "mlp_ratio": 0, "qk_norm": False},
        "heads": {"multi_level": True, "mlp_kernel": 1},
    },
    "stylegan2": {"resnet": {"architecture": "resnet"}, "orig": {"architecture": "orig"}},
    "styleformer-c": {"linformer": {"linformer": True, "linformer_k": 5, "linformer_min_tokens": 64}},
    "transgan": {
        "full": {"attention": "full", "norm": "layer", "position": "absolute"},
        "axis": {"attention": "axis", "position": "relative", "mapping_layers": 2},
        "nystrom": {"attention": "nystrom", "landmarks": 16, "widths": (16, 16)},
        "noise": {"attention_noise": True, "latent_tokens": 3, "antialias": 1, "layers": (0, 1)},
    },
    "r3gan": {"clamp": {"conv_clamp": 1.0, "layers": (2, 0, 1)}},
    "stylegan3": {"rotation": {"rotation": True, "num_layers": 3}},
    "styleformer-a": {"heads": {"depth": 4, "attention_rate": 64}},
}
D_VARIANTS: dict[str, dict[str, Settings]] = {
    "stylegan2": {"skip": {"architecture": "skip"}, "orig": {"architecture": "orig"}},
    "styleformer": {"linformer": {"linformer_k": 5, "linformer_min_tokens": 64}},
    "transgan": {
        "grid": {"local_layers": (1, 0), "window": 4, "norm": "token", "position": "absolute"},
        "axis": {"local_layers": (1, 0), "attention": "axis", "position": "relative", "overlap": True},
        "nystrom": {"local_layers": (1, 0), "attention": "nystrom", "landmarks": 16, "multi_scale": False},
        "noise": {"attention_noise": True},
    },
}

# Number of parameters of each family with its default configuration.
G_PARAMETERS = {
    "styleformer": 1_438_064,
    "styleformer2": 2_416_410,
    "stylegan2": 19_947_539,
    "styleformer-c": 7_531_928,
}
G_PARAMETERS |= {"transgan": 100_064_623, "r3gan": 20_732_160, "film": 936_899}
D_PARAMETERS = {"stylegan2": 21_507_073, "styleformer": 12_701_697, "transgan": 10_210_393, "r3gan": 20_683_776}


def small_generator(family: str, side: int = 16, **changes: Any) -> GeneratorConfig:
    """Return the configuration of a small generator of square images."""
    return _small(GENERATORS[family], side, {"z_dim": 8, "w_dim": 8, **G_SETTINGS.get(family, {}), **changes})


def small_discriminator(family: str, side: int = 16, **changes: Any) -> DiscriminatorConfig:
    """Return the configuration of a small discriminator of square images."""
    return _small(DISCRIMINATORS[family], side, {**D_SETTINGS.get(family, {}), **changes})


def _small(config: Any, side: int, settings: Settings) -> Any:
    return config(**{**config.AUTO, **settings}).fit(side, side)


def small_train_config(data: Path, generator: str, discriminator: str, **changes: Any) -> TrainConfig:
    """Return a configuration with all phases of the objective, resolved for a dataset.

    `changes` are config paths with __ in place of dots.
    """
    always = {"batch_size": 4, "generator.z_dim": 8, "generator.w_dim": 8, "run.batch_gpu": 2, "run.tick_kimg": 0.004}
    always |= {"loss.pl_weight": 1.0, "loss.pl_interval": 1, "loss.r1_interval": 1, "loss.style_mixing": 0.9}
    values: Settings = {"generator.family": generator, "discriminator.family": discriminator}
    values |= {f"generator.{name}": value for name, value in G_SETTINGS.get(generator, {}).items()}
    values |= {f"discriminator.{name}": value for name, value in D_SETTINGS.get(discriminator, {}).items()}
    values |= {"data.path": str(data), "run.workers": 0}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    config = apply_options(override(PRESETS["tiny"], {**always, "augment.ada_interval": 2}), values)
    dataset = ImageDataset(config.data)
    return resolve(config, Environment(img_shape=dataset.img_shape, c_dim=dataset.c_dim))


# The family of docs/adding_a_model.md: a Python block and a line of the table.

PAGE = (Path(__file__).parent.parent / "docs" / "adding_a_model.md").read_text()
DOCUMENTED_FAMILY, _CONFIG = re.findall(r'^    "(\w+)": (\w+),$', PAGE, re.MULTILINE)[0]


@cache
def documented_module() -> ModuleType:
    """Run the page's Python block and return the module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = sys.modules[f"training.networks.{DOCUMENTED_FAMILY}"] = ModuleType(
        f"training.networks.{DOCUMENTED_FAMILY}"
    )
    exec(compile(code, f"{DOCUMENTED_FAMILY}.py", "exec"), module.__dict__)
    return module


def add_documented_family(patch: pytest.MonkeyPatch) -> ModuleType:
    """Add the page's line to GENERATORS until the patch is undone, and return the module."""
    patch.setitem(GENERATORS, DOCUMENTED_FAMILY, getattr(documented_module(), _CONFIG))
    return documented_module()
