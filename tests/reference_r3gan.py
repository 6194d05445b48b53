"""Reference implementation of R3GAN's networks: float64 NumPy, from the paper's equations, pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from reference_layers import Array, State, below

TAPS = np.convolve([1, 2, 1], [1, 1]) / 8  # sums to 1


@torch.no_grad()
def build_r3gan(config: Any) -> Any:
    """Return a float64 network in which no parameter is zero: the last weight of each block starts from zero."""
    torch.manual_seed(0)
    network = config.build().double()
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network


def ref_pointwise(x: Array, weight: Array) -> Array:
    return np.einsum("bihw,oi->bohw", x, weight[:, :, 0, 0])


def ref_grouped(x: Array, weight: Array) -> Array:
    """3x3 convolution with zero padding; output channel o reads the input channels of its own group."""
    B, _, H, W = x.shape
    size = weight.shape[1]
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    y = np.zeros((B, len(weight), H, W))
    for o in range(len(weight)):
        first = o // size * size  # as many outputs as inputs per group
        for dy in range(3):
            for dx in range(3):
                part = padded[:, first : first + size, dy : dy + H, dx : dx + W]
                y[:, o] += np.einsum("bihw,i->bhw", part, weight[o, :, dy, dx])
    return y


def ref_activation(x: Array, bias: Array, clamp: float | None = None) -> Array:
    u = x + bias[:, None, None]
    y = np.where(u > 0, u, 0.2 * u)
    return y if clamp is None else np.clip(y, -clamp, clamp)


def ref_block(x: Array, state: State, clamp: float | None = None) -> Array:
    y = ref_activation(ref_pointwise(x, state["expand"]), state["expand_bias"], clamp)
    y = ref_activation(ref_grouped(y, state["spatial"]), state["spatial_bias"], clamp)
    return x + ref_pointwise(y, state["reduce"])


def ref_upsample(x: Array) -> Array:
    """Insert zeros between samples and filter, with a gain of 2 per axis."""
    for axis in (2, 3):
        x = np.moveaxis(x, axis, -1)
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        padded = np.pad(wide, [(0, 0)] * 3 + [(2, 1)])
        x = sum(2 * TAPS[k] * padded[..., k : k + wide.shape[-1]] for k in range(4))
        x = np.moveaxis(x, -1, axis)
    return x


def ref_downsample(x: Array) -> Array:
    """Filter and keep every second sample."""
    for axis in (2, 3):
        x = np.moveaxis(x, axis, -1)
        padded = np.pad(x, [(0, 0)] * 3 + [(1, 1)])
        x = sum(TAPS[k] * padded[..., k : k + x.shape[-1] : 2] for k in range(4))
        x = np.moveaxis(x, -1, axis)
    return x


def ref_blocks(x: Array, state: State, count: int, clamp: float | None = None) -> Array:
    for i in range(count):
        x = ref_block(x, below(state, f"blocks.{i}."), clamp)
    return x


def ref_generator(w: Array, state: State, config: Any) -> Array:
    """Image of a style w (B, w_dim)."""
    x = state["basis"] * (w @ state["scale.weight"].T)[:, :, None, None]
    for i, count in enumerate(config.layers):
        stage = below(state, f"stages.{i}.")
        if i and config.widths[i] != config.widths[i - 1]:
            x = ref_pointwise(x, stage["transition.weight"])
        x = ref_upsample(x) if i else x
        x = ref_blocks(x, stage, count, config.conv_clamp)
    return ref_pointwise(x, state["torgb.weight"])


def ref_discriminator(img: Array, c: Array | None, state: State, config: Any) -> Array:
    x = ref_pointwise(img, state["fromrgb.weight"])
    last = len(config.layers) - 1
    for i, count in enumerate(config.layers[::-1]):  # from the image down
        stage = below(state, f"stages.{i}.")
        x = ref_blocks(x, stage, count)
        if i < last:
            x = ref_downsample(x)
            if config.widths[last - i] != config.widths[last - i - 1]:
                x = ref_pointwise(x, stage["transition.weight"])
    out = np.einsum("bchw,chw->bc", x, state["kernel"]) @ state["head.weight"].T
    return out if c is None else (out * (c @ state["embed"])).sum(axis=1, keepdims=True)
