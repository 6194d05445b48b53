"""Reference implementation of StyleGAN2's networks: float64 NumPy with loops and SciPy's correlation."""

from __future__ import annotations

import numpy as np
from reference_layers import Array, State, below, ref_fc
from scipy.signal import correlate2d

from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig

FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def ref_upsample(x: Array) -> Array:
    """Upsample x (H, W) by 2: insert zeros, then filter with a gain of 4."""
    zeros = np.zeros((2 * x.shape[0], 2 * x.shape[1]))
    zeros[::2, ::2] = x
    return correlate2d(np.pad(zeros, ((2, 1), (2, 1))), 4 * FILTER, "valid")


def ref_clamp(x: Array, clamp: float | None) -> Array:
    return x if clamp is None else np.clip(x, -clamp, clamp)


def ref_modulated_conv(x: Array, weight: Array, style: Array, up: int) -> Array:
    """Modulated convolution of one image x (I, H, W) by weight (O, I, k, k) and style (I,), by definition."""
    W = weight * style[None, :, None, None]
    W = W / np.sqrt((W**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-8)
    num_outputs, num_inputs, _, _ = W.shape
    _, height, width = x.shape
    if up == 1:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        return np.stack(
            [sum(correlate2d(padded[i], W[o, i], "valid") for i in range(num_inputs)) for o in range(num_outputs)]
        )
    y = np.zeros((num_outputs, 2 * height + 1, 2 * width + 1))
    for i in range(height):
        for j in range(width):
            y[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += np.einsum("oikl,i->okl", W, x[:, i, j])
    return np.stack([correlate2d(np.pad(plane, 1), 4 * FILTER, "valid") for plane in y])


def ref_modulated_layer(
    x: Array, w: Array, state: State, up: int, clamp: float | None, noise: Array, gain: float = 1.0
) -> Array:
    styles = ref_fc(w, below(state, "affine."))
    y = np.stack(
        [ref_modulated_conv(image, state["weight"], style, up) for image, style in zip(x, styles, strict=True)]
    )
    y = y + state["noise_strength"] * noise + state["bias"][:, None, None]
    y = np.where(y > 0, y, 0.2 * y) * np.sqrt(2) * gain
    return ref_clamp(y, None if clamp is None else clamp * gain)


def ref_torgb(x: Array, w: Array, state: State, clamp: float | None) -> Array:
    style = ref_fc(w, below(state, "affine.")) / np.sqrt(x.shape[1])
    y = np.einsum("oi,bi,bihw->bohw", state["weight"], style, x) + state["bias"][:, None, None]
    return ref_clamp(y, clamp)


def ref_stylegan2(ws: Array, state: State, config: StyleGAN2Config, noise: bool) -> Array:
    """Synthesis network; the indices of the styles are counted by hand from the paper's figure."""
    x = np.stack([state["const"]] * len(ws))
    rgb: Array | None = None
    assert config.resolutions is not None
    for level in range(config.resolutions):
        stage = below(state, f"stages.{level}.")
        last = below(stage, "convs.0." if level == 0 else "convs.1.")
        shortcut = None
        if level > 0:
            first = below(stage, "convs.0.")
            if config.architecture == "resnet":
                y = np.einsum("oi,bihw->bohw", stage["shortcut.weight"][:, :, 0, 0] / np.sqrt(x.shape[1]), x)
                shortcut = np.stack([[ref_upsample(plane) for plane in image] for image in y]) * np.sqrt(0.5)
            x = ref_modulated_layer(x, ws[:, 2 * level - 1], first, 2, config.conv_clamp, first["noise_const"] * noise)
        gain = 1 if shortcut is None else np.sqrt(0.5)
        x = ref_modulated_layer(x, ws[:, 2 * level], last, 1, config.conv_clamp, last["noise_const"] * noise, gain)
        if shortcut is not None:
            x = x + shortcut
        if config.architecture == "skip" or level == config.resolutions - 1:
            y = ref_torgb(x, ws[:, 2 * level + 1], below(stage, "torgb."), config.conv_clamp)
            rgb = y if rgb is None else np.stack([[ref_upsample(plane) for plane in image] for image in rgb]) + y
    assert rgb is not None
    return rgb


def ref_lrelu(x: Array) -> Array:
    return np.where(x > 0, x, 0.2 * x) * np.sqrt(2)


def ref_filter(x: Array, padding: int) -> Array:
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    return np.stack([np.stack([correlate2d(plane, FILTER, "valid") for plane in image]) for image in x])


def ref_conv(x: Array, state: State, padding: int) -> Array:
    """Equalised convolution with stride 1 and bias, before the activation."""
    W = state["weight"] / np.sqrt(state["weight"][0].size)
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    y = np.stack([[sum(correlate2d(image[i], row[i], "valid") for i in range(W.shape[1])) for row in W] for image in x])
    return y + state["bias"][None, :, None, None] if "bias" in state else y


def ref_mbstd(x: Array, group: int) -> Array:
    B, _, H, W = x.shape
    G = min(group, B)
    n = B // G
    extra = np.zeros((B, 1, H, W))
    for g in range(n):
        members = [b for b in range(B) if b % n == g]
        deviation = np.sqrt(np.mean((x[members] - x[members].mean(axis=0)) ** 2, axis=0) + 1e-8)
        extra[members] = deviation.mean()
    return np.concatenate([x, extra], axis=1)


def ref_label_mapping(c: Array, state: State, num_layers: int) -> Array:
    x = ref_fc(c, below(state, "embed."))
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-8)
    for i in range(num_layers):
        x = ref_lrelu(ref_fc(x, below(state, f"layers.{i}."), multiplier=0.01))
    return x


def ref_stylegan2_discriminator(
    img: Array, c: Array | None, state: State, config: StyleGAN2DiscriminatorConfig
) -> Array:
    clamp = config.conv_clamp
    x = ref_clamp(ref_lrelu(ref_conv(img, below(state, "fromrgb.0."), 0)), clamp)
    levels = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for level in range(levels):
        block = below(state, f"blocks.{level}.")
        y = ref_clamp(ref_lrelu(ref_conv(x, below(block, "conv0."), 1)), clamp)
        y = ref_lrelu(ref_conv(ref_filter(y, 2), below(block, "conv1."), 0)[:, :, ::2, ::2])
        if config.architecture == "resnet":
            shortcut = ref_conv(ref_filter(x, 1)[:, :, ::2, ::2], below(block, "skip."), 0)
            y = (ref_clamp(y, clamp) + shortcut) * np.sqrt(0.5)
        else:
            y = ref_clamp(y, clamp)
        if config.architecture == "skip":
            img = ref_filter(img, 1)[:, :, ::2, ::2]
            rgb = ref_lrelu(ref_conv(img, below(state, f"fromrgb.{level + 1}."), 0))
            y = y + (rgb if level == levels - 1 else ref_clamp(rgb, clamp))
        x = y
    if config.mbstd_group_size:
        x = ref_mbstd(x, config.mbstd_group_size)
    x = ref_clamp(ref_lrelu(ref_conv(x, below(state, "epilogue.conv."), 1)), clamp)
    x = ref_lrelu(ref_fc(x.reshape(len(x), -1), below(state, "epilogue.fc.")))
    out = ref_fc(x, below(state, "epilogue.out."))
    if c is None:
        return out
    cmap = ref_label_mapping(c, below(state, "mapping."), config.mapping_layers)
    return (out * cmap).sum(axis=1, keepdims=True) / np.sqrt(cmap.shape[1])
