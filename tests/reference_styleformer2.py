"""Reference implementation of the Styleformer2 generator: float64 NumPy, from the equations of its docstrings."""

from __future__ import annotations

import numpy as np
from reference_layers import Array, State, below, ref_fc
from reference_styleformer import (
    ref_attention,
    ref_demodulated,
    ref_layer_norm,
    ref_torgb_tokens,
    ref_upsample_tokens,
)

from training.networks.styleformer2 import Styleformer2Config


def ref_positions(height: int, width: int, channels: int) -> Array:
    """Fixed positions (N, C), one number at a time; the factors are rounded to float32, as in the network's buffers."""
    halves = [(a, b) for a in range(channels + 1) for b in range(-channels, channels + 1) if (a, b) > (0, 0)]
    waves = sorted(halves, key=lambda wave: (wave[0] ** 2 + wave[1] ** 2, wave))
    out = np.zeros((height * width, channels))
    for token in range(height * width):
        y, x = divmod(token, width)
        for c in range(channels):
            a, b = waves[c // 2]
            row, column = (np.complex64(np.exp(1j * np.pi * phase)) for phase in (a * y / height, b * x / width))
            wave = complex(row) * complex(column)
            out[token, c] = np.sqrt(2) * (wave.imag if c % 2 == 0 else wave.real)
    return out


def ref_normalized_heads(x: Array, heads: int) -> Array:
    """Scale each head of tokens (B, N, C) to the norm sqrt(D)."""
    parts = x.reshape(*x.shape[:2], heads, -1)
    return (parts / np.sqrt((parts**2).mean(axis=3, keepdims=True) + 1e-6)).reshape(x.shape)


def ref_qk_norm_attention(q: Array, k: Array, v: Array, state: State, heads: int) -> Array:
    """Attention with logits t q k^T / (|q| |k|) per head; t = temperature sqrt(D)."""
    if "attention.token_projection" in state:
        E = state["attention.token_projection"]
        k, v = np.einsum("kn,bnc->bkc", E, k), np.einsum("kn,bnc->bkc", E, v)
    D = q.shape[2] // heads
    temperature = np.repeat(state["attention.temperature"], D)
    q, k = ref_normalized_heads(q, heads) * temperature, ref_normalized_heads(k, heads)
    logits = [np.einsum("bnd,bmd->bnm", *(x[:, :, h * D : (h + 1) * D] for x in (q, k))) for h in range(heads)]
    scores = [np.exp(x / np.sqrt(D)) for x in logits]
    weights = [x / x.sum(axis=2, keepdims=True) for x in scores]
    return np.concatenate([A @ v[:, :, h * D : (h + 1) * D] for h, A in enumerate(weights)], axis=2)


def ref_depthwise(x: Array, kernel: Array, height: int) -> Array:
    """Correlate each channel of tokens (B, N, C) with its kernel (C, 1, k, k), with zeros outside."""
    grid = x.reshape(len(x), height, -1, x.shape[2])
    side = kernel.shape[2]
    padded = np.pad(grid, ((0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)))
    out = np.zeros_like(grid)
    for dy in range(side):
        for dx in range(side):
            part = padded[:, dy : dy + grid.shape[1], dx : dx + grid.shape[2]]
            out += kernel[:, 0, dy, dx] * part
    return out.reshape(x.shape)


def ref_style(w: Array, state: State, config: Styleformer2Config, name: str = "affine.") -> Array:
    return ref_fc(w, below(state, name), np.sqrt(config.lr_width / config.w_dim))


def ref_block(x: Array, w: Array, state: State, config: Styleformer2Config, noise: Array, height: int) -> Array:
    C = x.shape[2]
    heads = config.num_heads(C)

    def clamp(x: Array) -> Array:
        return x if config.conv_clamp is None else np.clip(x, -config.conv_clamp, config.conv_clamp)

    s1, s2, *rest = np.split(ref_style(w, state, config), 3 if config.mlp_ratio else 2, axis=1)
    normal = ref_layer_norm(x * s1[:, None])
    q, k, v = (ref_demodulated(normal, W, s1) for W in np.split(state["qkv_weight"], 3))
    attention = ref_qk_norm_attention if config.qk_norm else ref_attention
    attended = attention(q, k, v * s2[:, None], state, heads)
    y = ref_demodulated(attended, state["out_weight"], s2) + state["bias"]
    x = x + np.tanh(state["attention_gate"]) * y + state["noise_strength"] * noise
    if config.mlp_ratio:
        hidden = clamp(ref_demodulated(ref_layer_norm(x * rest[0][:, None]), state["mlp_weight"], rest[0]))
        hidden = ref_depthwise(hidden, state["kernel"], height) if config.mlp_kernel > 1 else hidden
        up, gate = np.split(hidden, 2, axis=2)
        down = state["down.weight"] * config.lr_width / (config.mlp_ratio * C)
        x = x + np.tanh(state["mlp_gate"]) * (clamp(gate / (1 + np.exp(-gate)) * up) @ down.T)
    return clamp(x)


def ref_styleformer2(ws: Array, state: State, config: Styleformer2Config, noise: bool) -> list[Array]:
    """Return the images (B, C, H, W) of all RGB heads at full size, the last one first."""
    B, i = len(ws), 0
    images: list[Array] = []
    if config.sine_input:
        amplitudes = ref_style(ws[:, 0], state, config, "input_affine.")
        x = amplitudes[:, None] * ref_positions(*config.base, config.widths[0]) + state["offset"]
    else:
        x = np.stack([state["const"]] * B)
    rgb: Array | None = None
    for r, (C, num_blocks) in enumerate(zip(config.widths, config.layers, strict=True)):
        height, width = config.base[0] * 2**r, config.base[1] * 2**r
        stage = below(state, f"stages.{r}.")
        if r:
            x = x + stage["position_gain"] * ref_positions(height, width, C)
        for j in range(num_blocks):
            block = below(stage, f"blocks.{j}.")
            x = ref_block(x, ws[:, i], block, config, block["noise_const"] * noise, height)
            i += 1
        torgb = below(stage, "torgb.")
        y = (ref_torgb_tokens(x, ws[:, i], torgb, np.sqrt(config.lr_width / config.w_dim)) - torgb["bias"]) * stage[
            "rgb_gain"
        ] + torgb["bias"]
        y = y.reshape(B, height, width, -1)
        rgb = y if rgb is None else ref_upsample_tokens(rgb) + y
        images = [rgb, *(ref_upsample_tokens(image) for image in images)]
        if r + 1 < len(config.widths):
            if "projection.weight" in stage:
                x = x @ (stage["projection.weight"] * config.lr_width / C).T
            x = ref_upsample_tokens(x.reshape(B, height, width, -1)).reshape(B, 4 * height * width, -1)
    return [image.transpose(0, 3, 1, 2) for image in images]
