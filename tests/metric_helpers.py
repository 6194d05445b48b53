"""Small detectors, datasets, generators and random Inception weights for the tests of metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor, nn

from metrics.sampling import MetricContext


class SmallDetector(nn.Module):
    """uint8 images -> 6 features and 4 logits: colour means at two scales, multiplied by fixed random weights."""

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
    """Export a module as .pt2 for any batch size of images of this shape."""
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    torch.export.save(torch.export.export(module.eval(), (images,), dynamic_shapes=dynamic), path)
    return path


def bound(program: Path) -> str:
    """Return the option that uses a program as Inception and VGG16; metric names then have no suffix."""
    return f"--detector=inception:{program},vgg16:{program}"


def script_program(path: Path, module: nn.Module) -> Path:
    """Save a module as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module.eval()), path)
    return path


def random_inception() -> dict[str, Tensor]:
    """Make a state dict for torch-fidelity's Inception: random weights that preserve the scale of activations."""
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


class ArrayImages:
    """Dataset in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, c_dim: int = 0) -> None:
        self.data = images
        self.img_shape = (images.shape[1], images.shape[2], images.shape[3])
        self.labels = torch.zeros(len(images), 0) if labels is None else labels
        self.c_dim = c_dim
        self.content_hash = "0123abcd"
        self.meta: dict[str, object] = {"resize_filter": "box"}

    def __len__(self) -> int:
        return len(self.data)

    def images(self, indices: Sequence[int]) -> Tensor:
        return self.data[list(indices)]


class Stripes:
    """Generator of a few waves with amplitudes z that records the latents and labels of each call."""

    def __init__(self, img_shape: tuple[int, int, int] = (3, 32, 32), c_dim: int = 0, z_dim: int = 4) -> None:
        self.img_shape, self.c_dim, self.z_dim = img_shape, c_dim, z_dim
        self.latents: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> Tensor:
        self.latents.append(z)
        self.labels.append(c)
        C, H, W = self.img_shape
        y, x = torch.arange(H).unsqueeze(1) / H, torch.arange(W) / W
        waves = [torch.sin(2 * math.pi * ((k + 1) * y + (k % 3) * x)) for k in range(self.z_dim)]
        img = sum(z[:, k, None, None, None] * wave for k, wave in enumerate(waves)) * truncation_psi / 4
        assert isinstance(img, Tensor)
        img = img + 0.2 * torch.arange(C).reshape(C, 1, 1) / C
        if noise_mode == "random":
            img = img + 0.1 * torch.randn_like(img)
        return img.expand(-1, C, -1, -1)


def natural_images(count: int, img_shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Tensor:
    """Draw uint8 images of smooth blobs with a little noise."""
    stream = np.random.RandomState(seed)
    C, H, W = img_shape
    blobs = scipy.ndimage.gaussian_filter(stream.standard_normal((count, C, H, W)), (0, 0, 3, 3), mode="wrap")
    pixels = 128 + 60 * blobs / blobs.std() + 4 * stream.standard_normal(blobs.shape)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def metric_context(images: Tensor, **changes: object) -> MetricContext:
    """Make a context with Stripes as the generator, on the CPU."""
    settings: dict[str, object] = {"G": Stripes(tuple(images.shape[1:])), "device": torch.device("cpu")}  # type: ignore[arg-type]
    return MetricContext(images=ArrayImages(images), **(settings | changes))  # type: ignore[arg-type]
