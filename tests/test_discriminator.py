"""StyleGAN2 discriminator: every layer and the whole network against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference_layers import build, close, randomize, state_of
from reference_stylegan2 import (
    ref_conv,
    ref_filter,
    ref_label_mapping,
    ref_lrelu,
    ref_mbstd,
    ref_stylegan2_discriminator,
)
from torch import Tensor

from dnnlib.config import ConfigError
from training.networks import execution
from training.networks.layers import Conv2d, MinibatchStd
from training.networks.mapping import LabelMapping
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig

ARCHITECTURES: list[Any] = ["orig", "skip", "resnet"]


def images(config: StyleGAN2DiscriminatorConfig, batch: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, config.img_channels, *config.img_size, dtype=torch.float64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {"conv_clamp": 1.0, "mbstd_group_size": 2},
        {"c_dim": 3, "mapping_layers": 3, "conv_clamp": None},
        {"img_size": (12, 20), "img_channels": 1, "mbstd_group_size": 0, "channel_base": 80},
    ],
    ids=["clamp", "labels", "rectangle"],
)
def test_discriminator_equals_the_reference(architecture: Any, changes: dict[str, Any]) -> None:
    defaults: dict[str, Any] = {"img_size": (16, 16), "img_channels": 2, "channel_base": 48, "channel_max": 8}
    config = StyleGAN2DiscriminatorConfig(architecture=architecture, **(defaults | changes))
    D, img = build(config), images(config)
    c = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]] if config.c_dim else None
    expected = ref_stylegan2_discriminator(img.numpy(), None if c is None else c.numpy(), state_of(D), config)
    close(D(img, c), expected)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (StyleGAN2DiscriminatorConfig(architecture="orig", mbstd_group_size=32), 20_720_641),
        (StyleGAN2DiscriminatorConfig(img_size=(64, 64)), 26_488_833),
        (StyleGAN2DiscriminatorConfig(img_size=(128, 128)), 28_389_121),
    ],
)
def test_published_models_have_their_parameter_counts(config: StyleGAN2DiscriminatorConfig, count: int) -> None:
    with torch.device("meta"):
        D = config.build()
    assert sum(parameter.numel() for parameter in D.parameters()) == count


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((32, 32), ((32, 32), (16, 16), (8, 8), (4, 4))),
        ((48, 48), ((48, 48), (24, 24), (12, 12), (6, 6), (3, 3))),
        ((16, 24), ((16, 24), (8, 12), (4, 6))),
        ((18, 16), ((18, 16), (9, 8))),
    ],
)
def test_grids_are_halved_down_to_four_pixels(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> None:
    assert StyleGAN2DiscriminatorConfig(img_size=size).grids == grids


@pytest.mark.parametrize(("batch", "group"), [(4, 4), (6, 2), (6, 3), (3, 4), (1, 4)])
def test_minibatch_std_equals_the_reference(batch: int, group: int) -> None:
    x = torch.randn(batch, 3, 2, 5, dtype=torch.float64)
    close(MinibatchStd(group)(x), ref_mbstd(x.numpy(), group))


@pytest.mark.parametrize(("batch", "group"), [(4, 4), (6, 2), (3, 4)])
def test_minibatch_std_is_computed_within_minibatches(batch: int, group: int) -> None:
    x = torch.randn(3 * batch, 3, 2, 5, dtype=torch.float64)
    with execution.using(minibatches=3):
        close(MinibatchStd(group)(x), np.concatenate([ref_mbstd(part.numpy(), group) for part in x.split(batch)]))


def test_minibatch_std_refuses_incomplete_groups() -> None:
    with pytest.raises(ValueError, match="minibatch of 6 images cannot be cut into minibatch-std groups of 4"):
        MinibatchStd(4)(torch.zeros(6, 1, 4, 4))


@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("activation", ["linear", "lrelu"])
def test_convolution_equals_the_reference(down: Any, kernel: int, activation: Any) -> None:
    conv = Conv2d(3, 4, kernel, down=down, activation=activation, gain=0.6, clamp=1.5).double()
    randomize(conv)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64) * 3
    if down == 2:
        y = ref_conv(ref_filter(x.numpy(), kernel // 2 + 1), state_of(conv), 0)[:, :, ::2, ::2]
    else:
        y = ref_conv(x.numpy(), state_of(conv), kernel // 2)
    y = ref_lrelu(y) if activation == "lrelu" else y
    assert np.abs(y).max() > 1.5
    close(conv(x), np.clip(y, -1.5, 1.5) * 0.6)


def test_label_mapping_equals_the_reference() -> None:
    mapping = LabelMapping(c_dim=3, out_dim=5, num_layers=4).double()
    randomize(mapping)
    c = torch.eye(3, dtype=torch.float64)
    close(mapping(c), ref_label_mapping(c.numpy(), state_of(mapping), 4))


def test_second_derivatives_of_minibatch_std_are_correct() -> None:
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(MinibatchStd(2), (x,))


def test_freeze_d_layers_follow_the_architecture() -> None:
    def names(architecture: Any) -> list[str]:
        with torch.device("meta"):
            D = StyleGAN2DiscriminatorConfig(architecture=architecture, img_size=(16, 16)).build()
        known = {module: name for name, module in D.named_modules()}
        return [known[layer] for layer in D.layers_from_image()]

    convs = [f"blocks.{level}.conv{i}" for level in (0, 1) for i in (0, 1)]
    assert names("orig") == ["fromrgb.0", *convs]
    assert names("skip") == ["fromrgb.0", *convs[:2], "fromrgb.1", *convs[2:]]
    assert names("resnet") == ["fromrgb.0", *convs[:2], "blocks.0.skip", *convs[2:], "blocks.1.skip"]


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"architecture": "vgg"}, "architecture", "one of orig, skip, resnet"),
        ({"img_size": (33, 32)}, "img_size", "cannot be halved"),
        ({"img_size": (4, 4)}, "img_size", "cannot be halved"),
        ({"img_size": (32,)}, "img_size", "height and width"),
        ({"channel_base": 16}, "channel_base", "at least 32"),
        ({"channel_max": 0}, "channel_max", "at least 1"),
        ({"mbstd_group_size": -1}, "mbstd_group_size", "at least 0"),
        ({"conv_clamp": -1.0}, "conv_clamp", "positive"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        StyleGAN2DiscriminatorConfig(**changes)
    assert caught.value.field == field
