"""Differentiable image distances for projection: LPIPS, and features of a custom detector.

Each distance is a function of the targets that returns a function of images. Target features are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.detectors import DetectorSetup, full_float32, load_module
from metrics.path_length import lpips_input
from torch_utils.images import DistanceTo


def lpips_distance(setup: DetectorSetup, device: torch.device) -> DistanceTo:
    """LPIPS of torch-fidelity on RGB or gray images, average-pooled to about 256 pixels.

    sum over five layers of mean_xy sum_c lin_c (f/|f| - g/|g|)^2        Zhang et al. 2018

    Raises UserError if the weights are missing.
    """
    network = setup.load_lpips_network(device)

    def unit_features(img: Tensor) -> list[Tensor]:
        activations = network.net(network.normalize(lpips_input(img, crop=False)))  # five of (B, C, H, W)
        return [x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for x in activations]

    def distance_to(targets: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad(), full_float32():
            goals = unit_features(targets)

        def distance(img: Tensor) -> Tensor:
            with full_float32():
                layers = zip(network.lins, unit_features(img), goals, strict=True)
                parts = [lin.model((x - goal).square()).mean(dim=(1, 2, 3)) for lin, x, goal in layers]
            return torch.stack(parts).sum(dim=0)

        return distance

    return distance_to


def feature_distance(path: Path, device: torch.device) -> DistanceTo:
    """Return |f(img) - f(target)|^2 / |f(target)|^2 for the features f of a program on float pixels in 0..255.

    If the program has an argument `return_lpips`, like the VGG16 of the StyleGAN family, f is its output with
    `return_lpips=True`. Squared distances between these outputs are LPIPS and are not normalised. Raises UserError for
    a program without gradients.
    """
    module, arguments = load_module(path, device)
    if path.suffix == ".pt2":
        _remove_input_checks(module)
    is_lpips = "return_lpips" in arguments
    options: dict[str, bool] = {"return_features": True} if "return_features" in arguments else {}
    if is_lpips:
        options = {"resize_images": False, "return_lpips": True}

    def features(img: Tensor) -> Tensor:
        pixels = lpips_input(img, crop=False) if is_lpips else (img * 127.5 + 128).clamp(0, 255)
        try:
            with full_float32():
                output: Any = module(pixels, **options)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
            raise UserError(
                f"--detector={path}: fails on float images of {tuple(img.shape)} ({reason}); use --loss=pixels"
            ) from None
        return (output[0] if isinstance(output, (tuple, list)) else output).flatten(1).float()

    def distance_to(targets: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():  # needed by the check below; TorchScript may build a graph even under no_grad
            goal = features(targets.clone().requires_grad_())
        if not goal.requires_grad:
            raise UserError(f"--detector={path}: its features have no gradient; use --loss=pixels")
        goal = goal.detach()
        scale = torch.ones_like(goal[:, 0]) if is_lpips else goal.square().sum(dim=1)
        return lambda img: (features(img) - goal).square().sum(dim=1) / scale

    return distance_to


def _remove_input_checks(module: Any) -> None:
    """Remove the input type checks of an exported program. The graph itself converts its inputs to float."""
    for node in list(module.graph.nodes):
        is_guard = node.op == "call_module" and "guards" in str(node.target)
        if is_guard or node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.recompile()
