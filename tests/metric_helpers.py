"""What the tests of metrics share: random Inception weights of the right shape, a small detector as a program."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn


class SmallDetector(nn.Module):
    """uint8 images -> 6 features and 4 logits: colour means at two scales, mixed by fixed random weights."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = nn.Parameter(torch.randn(5 * channels, 6, generator=generator), requires_grad=False)
        self.classes = nn.Parameter(3 * torch.randn(6, 4, generator=generator), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 128 - 1
        coarse = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        features = torch.cat([x.square().mean(dim=(2, 3)), coarse], dim=1) @ self.mix
        return features, features @ self.classes


def export_program(path: Path, module: nn.Module, images: Tensor) -> Path:
    """Write a module as .pt2, for any number of images of this shape."""
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    torch.export.save(torch.export.export(module.eval(), (images,), dynamic_shapes=dynamic), path)
    return path


def bound(program: Path) -> str:
    """The option that says that a program is Inception and VGG16, so that the names of metrics are plain."""
    return f"--detector=inception:{program},vgg16:{program}"


def script_program(path: Path, module: nn.Module) -> Path:
    """Write a module as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module.eval()), path)
    return path


def random_inception() -> dict[str, Tensor]:
    """The state dict of torch-fidelity's Inception with random weights that keep the size of activations."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with (
        mock.patch.object(library, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict"),
    ):
        network = library.FeatureExtractorInceptionV3("inception", ["2048"])
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, x in state.items():
        if x.ndim >= 2:
            gain = 2.0 if name.startswith("fc") else 1.0
            x.copy_(torch.randn(x.shape, generator=generator) * gain * math.sqrt(2 / x[0].numel()))
    return state
