"""Transformer discriminator against a float64 reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from reference_layers import Array, State, below, build, close, ref_fc, state_of
from reference_styleformer import ref_attention
from reference_stylegan2 import ref_clamp, ref_conv, ref_filter, ref_label_mapping, ref_lrelu, ref_mbstd
from torch import Tensor

import train
from dnnlib.config import ConfigError
from training.networks import execution
from training.networks.styleformer_discriminator import (
    DiscriminatorEncoderBlock,
    StyleformerDiscriminatorConfig,
)

TINY = StyleformerDiscriminatorConfig(
    img_size=(16, 24), img_channels=2, patch=2, layers=(2, 1), channel_base=144, channel_max=20, depth=4,
    mbstd_group_size=2,
)  # fmt: skip
VARIANTS: dict[str, StyleformerDiscriminatorConfig] = {
    "plain": TINY,
    "linformer": replace(TINY, linformer_k=5, linformer_min_tokens=96),
    "labels": replace(TINY, c_dim=3, mapping_layers=2),
    "tight clamp, patches of 4": replace(TINY, conv_clamp=0.3, patch=4, layers=(2,), channel_base=40),
    "no clamp, no groups": replace(TINY, conv_clamp=None, mbstd_group_size=0),
}


def inputs(config: StyleformerDiscriminatorConfig) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    img = torch.randn(4, config.img_channels, *config.img_size, dtype=torch.float64)
    return img, torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]] if config.c_dim else None


def ref_block(x: Array, state: State, depth: int, clamp: float | None) -> Array:
    _, N, C = x.shape
    x = x + state.get("pos_embedding", np.zeros([1, N, C]))
    x = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5)
    q, k, v = (np.einsum("bni,oi->bno", x, W / np.sqrt(C)) for W in np.split(state["qkv_weight"], 3))
    attended = ref_attention(q, k, v, state, heads=max(1, C // depth))
    y = np.einsum("bni,oi->bno", attended, state["out_weight"] / np.sqrt(C))
    y = y + np.einsum("bni,oi->bno", v, state["residual_weight"] / np.sqrt(C)) + state["bias"]
    return ref_clamp(ref_lrelu(y), clamp)


def ref_discriminator(img: Array, c: Array | None, state: State, config: StyleformerDiscriminatorConfig) -> Array:
    B, C_img, H, W = img.shape
    P = config.patch
    h, w = H // P, W // P
    weight = state["embedding.conv.weight"].reshape(-1, C_img, P, P) / np.sqrt(C_img * P**2)
    cut = img.reshape(B, C_img, h, P, w, P)
    x = np.einsum("bcyixj,ocij->byxo", cut, weight).reshape(B, h * w, -1) + state["embedding.conv.bias"]
    for level, count in enumerate(config.layers):
        for i in range(count):
            x = ref_block(x, below(state, f"stages.{level}.{i}."), config.depth, config.conv_clamp)
        x = x.reshape(B, h, w, -1).transpose(0, 3, 1, 2)
        if level + 1 < len(config.layers):
            x = ref_filter(x, 1)[:, :, ::2, ::2]
            h, w = h // 2, w // 2
            x = x.transpose(0, 2, 3, 1).reshape(B, h * w, -1)
    if config.mbstd_group_size:
        x = ref_mbstd(x, config.mbstd_group_size)
    x = ref_clamp(ref_lrelu(ref_conv(x, below(state, "epilogue.conv."), 1)), config.conv_clamp)
    x = ref_lrelu(ref_fc(x.reshape(B, -1), below(state, "epilogue.fc.")))
    out = ref_fc(x, below(state, "epilogue.out."))
    if c is None:
        return out
    cmap = ref_label_mapping(c, below(state, "mapping."), config.mapping_layers)
    return (out * cmap).sum(axis=1, keepdims=True) / np.sqrt(cmap.shape[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_discriminator_equals_the_reference(name: str) -> None:
    config = VARIANTS[name]
    D, (img, c) = build(config), inputs(config)
    expected = ref_discriminator(img.numpy(), None if c is None else c.numpy(), state_of(D), config)
    close(D(img, c), expected)
    with execution.using(twice_differentiable=True):
        close(D(img, c), expected)
    with execution.using(recompute=True):
        close(D(img, c), expected)


def test_the_default_has_the_expected_parameter_count() -> None:
    """Images of 32x32 in patches of 2: grids of 16, 8 and 4 with 256, 512 and 512 channels, two blocks each."""
    with torch.device("meta"):
        D = StyleformerDiscriminatorConfig().build()
    blocks = [(256, 256, 256), (256, 512, 0), (512, 512, 64), (512, 512, 0), (512, 512, 16), (512, 512, 0)]
    expected = 12 * 256 + 256
    expected += sum(3 * C**2 + 2 * C * C2 + C2 + C * tokens for C, C2, tokens in blocks)
    expected += 512 * 513 * 9 + 512 + 512 * 512 * 16 + 512 + 512 + 1
    assert sum(parameter.numel() for parameter in D.parameters()) == expected
    heads = [module.attention.num_heads for module in D.modules() if isinstance(module, DiscriminatorEncoderBlock)]
    assert heads == [8, 8, 16, 16, 16, 16]


def test_second_derivatives_of_a_block_are_correct() -> None:
    block = DiscriminatorEncoderBlock(VARIANTS["linformer"], (2, 3), 8, 6, is_first=True).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    with execution.using(twice_differentiable=True):
        assert torch.autograd.gradgradcheck(block, (x,))


def test_blank_images_have_bounded_gradients() -> None:
    """Blank patches occur after a cutout; without position embeddings, gradients would be about 1 / sqrt(1e-5)."""
    torch.manual_seed(0)
    D = replace(TINY, channel_base=512, channel_max=32).build()
    norms = []
    for img in (torch.zeros(4, *D.img_shape), torch.randn(4, *D.img_shape)):
        img.requires_grad_()
        (gradient,) = torch.autograd.grad(D(img, None).sum(), img)
        norms.append(gradient.norm().item())
    assert 0 < norms[0] < 5 * norms[1]


def test_freeze_d_layers_are_listed_from_the_image_side() -> None:
    D = build(TINY)
    known = {module: name for name, module in D.named_modules()}
    names = [known[layer] for layer in D.layers_from_image()]
    assert names == ["embedding", "stages.0.0", "stages.0.1", "stages.1.0"]


@pytest.mark.parametrize(
    ("size", "patch", "grids"),
    [
        ((32, 32), 2, [16, 8, 4]),
        ((8, 8), 2, [4]),
        ((48, 48), 2, [24, 12, 6, 3]),
        ((128, 128), 2, [64, 32, 16, 8, 4]),
        ((256, 256), 4, [64, 32, 16, 8, 4]),
        ((15, 15), 1, [15]),
    ],
)
def test_fit_chooses_patch_size_and_layers(size: tuple[int, int], patch: int, grids: list[int]) -> None:
    config = StyleformerDiscriminatorConfig(**StyleformerDiscriminatorConfig.AUTO).fit(*size)
    assert (config.patch, [grid[0] for grid in config.grids]) == (patch, grids)
    assert config.layers == (2,) * len(grids)
    for grid in config.grids:
        heads = max(1, config.num_channels(grid) // config.depth)
        assert config.num_channels(grid) % heads == 0
    with torch.device("meta"):
        assert config.build().img_shape == (3, *size)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"patch": 3}, "patch", "does not divide images of 32x32"),
        ({"layers": (1, 1)}, "layers", "one entry per grid, 3 for images of 32x32 in patches of 2"),
        ({"channel_base": 8}, "channel_base", "leaves no channel at 16x16"),
        ({"layers": ()}, "layers", "not chosen yet"),
        ({"layers": (1, 0, 1)}, "layers", "each must be at least 1"),
        ({"depth": 0}, "depth", "at least 1"),
        ({"conv_clamp": -1.0}, "conv_clamp", "positive"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        StyleformerDiscriminatorConfig(**changes).build()
    assert caught.value.field == field


def test_options_of_the_command_line_reach_the_network(shapes32_zip: Path) -> None:
    def run(*arguments: str) -> Any:
        command = ["--outdir=x", f"--data={shapes32_zip}", "--device=cpu", "-n", "--disc=styleformer", *arguments]
        return CliRunner().invoke(train.main, command)

    result = run(
        "--cfg=cifar",
        "--set=discriminator.patch=4",
        "--set=discriminator.layers=3,1",
        "--set=discriminator.channel_max=256",
        "--set=discriminator.depth=64",
        "--mbstd=8",
    )
    assert result.exit_code == 0, result.output
    chosen = json.loads(result.stdout)["options"]["discriminator"]
    expected = {"patch": 4, "layers": [3, 1], "channel_max": 256, "depth": 64, "mbstd_group_size": 8}
    assert chosen | expected == chosen
    refused = run("--set=discriminator.layers=2,2")
    assert refused.exit_code == 2
    assert "--set discriminator.layers=2,2: must have one entry per grid, 3 for images of 32x32" in refused.stderr
    assert (
        "--d-arch=skip: is not a setting of the family styleformer; supported by stylegan2"
        in run("--d-arch=skip").stderr
    )
