"""Styleformer-C: both parts against the float64 reference, and the styles that each part reads."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from reference_layers import below, build, close, inputs, ref_mapping, state_of
from reference_styleformer import ref_styleformer_tokens
from reference_stylegan2 import ref_modulated_layer, ref_torgb, ref_upsample
from torch import Tensor

from dnnlib.config import ConfigError
from training.networks.modulation import read_styles
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer_block import EncoderBlock
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.stylegan2 import ModulatedConv, StyleGAN2Config

TINY = StyleformerCConfig(
    z_dim=5,
    w_dim=6,
    img_channels=2,
    base=(2, 3),
    widths=(8, 4),
    layers=(1, 2),
    depth=4,
    handover=6,
    resolutions=4,
    channel_base=72,
    channel_max=5,
)
VARIANTS = {
    "plain": TINY,
    "conditional": dataclasses.replace(TINY, c_dim=3),
    "linformer, tight clamp": dataclasses.replace(
        TINY, linformer=True, linformer_k=5, linformer_min_tokens=24, conv_clamp=0.3
    ),
    "one resolution each": dataclasses.replace(TINY, widths=(8,), layers=(2,), handover=3, resolutions=2),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_generator_equals_the_reference(name: str, noise_mode: str) -> None:
    """Style indices are counted by hand: blocks read 0 to 2, the last ToRGB and conv0 3, conv1 4, ToRGB and conv0 5."""
    config, noise = VARIANTS[name], noise_mode == "const"
    G, (z, c) = build(config), inputs(config)
    labels = None if c is None else c.numpy()
    ws = ref_mapping(z.numpy(), labels, state_of(G.mapping), config.num_ws, config.mapping_layers)
    ws = ws + np.random.default_rng(0).normal(size=ws.shape)  # every style differs
    state = state_of(G.synthesis)
    x, rgb = ref_styleformer_tokens(ws, state, config, noise)
    height, width = config.grids[-1]
    x = x.reshape(len(x), height, width, -1).transpose(0, 3, 1, 2)
    index = sum(config.layers)
    for level in range(len(config.conv_grids)):
        stage = below(state, f"conv_stages.{level}.")
        for number, up in ((0, 2), (1, 1)):
            conv = below(stage, f"convs.{number}.")
            x = ref_modulated_layer(x, ws[:, index], conv, up, config.conv_clamp, conv["noise_const"] * noise)
            index += 1
        y = ref_torgb(x, ws[:, index], below(stage, "torgb."), config.conv_clamp)
        rgb = np.stack([[ref_upsample(plane) for plane in image] for image in rgb]) + y
    assert index + 1 == config.num_ws
    close(G.synthesis(torch.from_numpy(ws), noise_mode), rgb)
    assert rgb.shape[1:] == G.img_shape == (config.img_channels, *config.img_size)
    assert tuple(G(z, c).shape) == rgb.shape


def test_encoder_blocks_and_convolutions_read_separate_styles() -> None:
    """The first num_layout_ws styles reach encoder blocks only, the other styles convolutions only."""
    G, T = build(TINY), TINY.num_layout_ws
    layout, paint = torch.randn(2, 1, 1, TINY.w_dim, dtype=torch.float64)
    ws = torch.cat([layout.expand(1, T, -1), paint.expand(1, TINY.num_ws - T, -1)], dim=1)
    read: dict[type, list[Tensor]] = {EncoderBlock: [], ModulatedConv: []}
    for module in G.modules():
        if type(module) in read:
            module.affine.register_forward_hook(
                partial(lambda found, _, args, out: found.append(args[0]), read[type(module)])
            )
    G.synthesis(ws)
    assert [len(found) for found in read.values()] == [3, 4]
    assert all(torch.equal(w, layout[0]) for w in read[EncoderBlock])
    assert all(torch.equal(w, paint[0]) for w in read[ModulatedConv])


def test_convolution_styles_do_not_change_the_encoder_tokens() -> None:
    G, T = build(TINY), TINY.num_layout_ws
    ws = torch.randn(2, TINY.num_ws, TINY.w_dim, dtype=torch.float64, requires_grad=True)
    tokens, _ = G.synthesis.encode(read_styles(G.synthesis.style_readers(), ws), "const")
    (gradient,) = torch.autograd.grad(tokens.square().sum(), ws)
    assert not gradient[:, T:].any()
    assert gradient[:, :T].abs().sum(dim=2).all()

    (gradient,) = torch.autograd.grad(G.synthesis(ws).square().sum(), ws)
    assert gradient.abs().sum(dim=2).all()


def test_the_parameter_count_is_the_sum_of_both_parts() -> None:
    """Styleformer up to 32 px plus StyleGAN2 above, minus inputs of the first convolution; one mapping network."""

    def count(config: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in config.build().parameters())

    def mapping(layers: int) -> int:
        return layers * 512 * 513

    both = StyleformerCConfig(widths=(512, 256, 256), layers=(1, 2, 2), resolutions=6, channel_base=16384)
    styleformer = count(StyleformerConfig(widths=both.widths, layers=both.layers))
    large, small = (count(StyleGAN2Config(resolutions=n, channel_base=16384)) for n in (7, 4))  # 256 and 32 px
    inputs_of_first_conv = (512 - 256) * (256 * 9 + 513)  # StyleGAN2 has 512 channels at 32 px, this network 256
    assert count(both) == styleformer + large - small - inputs_of_first_conv
    assert count(dataclasses.replace(both, mapping_layers=8)) - count(both) == mapping(6)


def test_fit_chooses_widths_resolutions_and_linformer() -> None:
    open_config = StyleformerCConfig(**StyleformerCConfig.AUTO)
    config = open_config.fit(256, 256)
    assert (config.widths, config.layers, config.linformer) == ((512, 256, 256), (1, 2, 2), False)
    assert (config.img_size, config.conv_grids) == ((256, 256), ((64, 64), (128, 128), (256, 256)))
    assert dataclasses.replace(open_config, handover=64).fit(256, 256).linformer is True
    assert dataclasses.replace(open_config, base=(4, 8)).fit(32, 64).grids == ((4, 8), (8, 16), (16, 32))
    with pytest.raises(ConfigError, match=r"base=\(8, 8\).*48x48") as caught:
        open_config.fit(48, 48)
    assert caught.value.field == "base"
    for changes in ({"resolutions": None}, {"channel_base": 0}, {"widths": ()}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            dataclasses.replace(config, **changes).build()


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"handover": 16}, "handover", r"base=\(8, 8\) with 3 widths ends at 32"),
        ({"resolutions": 3}, "handover", "leaves none of the 3 resolutions"),
        ({"channel_base": 100}, "channel_base", "no channel at 128x128: must be at least 128"),
        ({"channel_max": 0}, "channel_max", "at least 1"),
        ({"depth": 0}, "depth", "at least 1"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        StyleformerCConfig(**changes)
    assert caught.value.field == field
