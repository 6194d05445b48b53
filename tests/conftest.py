"""Shared fixtures: a small data set of scenes, and a tiny configuration that trains on it in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import dataset_tool
from dnnlib.config import override
from training.config import PRESETS, Circumstances, TrainConfig, resolve
from training.dataset import ImageDataset


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _float32_on_gpus() -> Iterator[None]:
    """Compare in float32, which convolutions on a GPU are not by default; what a test sets ends with it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def shapes_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 labelled scenes of 32x32 pixels."""
    path = tmp_path_factory.mktemp("data") / "shapes.zip"
    arguments = ["--source=shapes", f"--dest={path}", "--max-images=256", "--workers=1"]
    result = CliRunner().invoke(dataset_tool.main, arguments)
    assert result.exit_code == 0, result.output
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none, saying so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


# Options for train.py that make the preset `tiny` smaller still.
SMALL = ["--cfg=tiny", "--g_dict=32,16,16", "--num_layers=1,1,1", "--cbase=256", "--cmax=16", "--workers=0"]
SMALL += ["--batch=16", "--linformer=0", "--gamma=0.5"]


def small_config(data: Path, **changes: object) -> TrainConfig:
    """The configuration of SMALL for a data set, resolved; `changes` are config paths with __ for the dots."""
    values = {
        "generator.widths": (32, 16, 16),
        "generator.layers": (1, 1, 1),
        "discriminator.channel_base": 256,
        "discriminator.channel_max": 16,
        "data.path": str(data),
        "run.workers": 0,
        "batch_size": 16,
        "generator.linformer": False,
        "loss.r1_gamma": 0.5,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    config = override(PRESETS["tiny"], values)
    dataset = ImageDataset(config.data)
    on_gpu = torch.cuda.is_available()
    return resolve(config, Circumstances(img_shape=dataset.img_shape, c_dim=dataset.c_dim, on_gpu=on_gpu))
