"""Reference implementation of the Styleformer generator: float64 NumPy, from the paper's equations."""

from __future__ import annotations

import numpy as np
import scipy.special
from reference_layers import Array, State, below, ref_fc

from training.networks.styleformer import StyleformerConfig


def ref_demodulated(x: Array, weight: Array, style: Array) -> Array:
    """Multiply x (B, N, C) by the weight, demodulated per output channel after scaling its inputs by the style."""
    modulated = np.einsum("ji,bi->bji", weight, style)
    return np.einsum("bni,ji->bnj", x, weight) / np.sqrt((modulated**2).sum(axis=2) + 1e-8)[:, None, :]


def ref_layer_norm(x: Array) -> Array:
    return (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5)


def ref_attention(q: Array, k: Array, v: Array, state: State, heads: int) -> Array:
    """Multi-head attention of (B, N, C); of Linformer if the state has a token projection."""
    B, N, C = q.shape
    keys, values = k, v
    if "attention.token_projection" in state:
        E = state["attention.token_projection"]
        keys, values = np.einsum("kn,bnc->bkc", E, k), np.einsum("kn,bnc->bkc", E, v)
    D = C // heads
    attended = np.zeros((B, N, C))
    for b in range(B):
        for h in range(heads):
            part = slice(h * D, (h + 1) * D)
            scores = np.exp(q[b, :, part] @ keys[b, :, part].T / np.sqrt(D))
            attended[b, :, part] = scores / scores.sum(axis=1, keepdims=True) @ values[b, :, part]
    return attended


def ref_encoder_block(
    x: Array, w: Array, state: State, heads: int, clamp: float | None, noise: Array, norm_after: bool = False
) -> Array:
    B, _, C = x.shape
    styles = ref_fc(w, below(state, "affine."))
    s1, s2 = (styles[:, :C], styles[:, C:]) if styles.shape[1] == 2 * C else (np.ones([B, C]), styles)
    Wq, Wk, Wv = state["qkv_weight"][:C], state["qkv_weight"][C : 2 * C], state["qkv_weight"][2 * C :]
    x = x * s1[:, None, :]
    x = x if norm_after else ref_layer_norm(x)
    q, k, v = (ref_demodulated(x, W, s1) for W in (Wq, Wk, Wv))
    v = v * s2[:, None, :]
    attended = ref_attention(q, k, v, state, heads)
    y = ref_demodulated(attended, state["out_weight"], s2)
    if "residual_weight" in state:
        y = y + ref_demodulated(v, state["residual_weight"], s2)
    y = ref_layer_norm(y) if norm_after else y
    if "ffn.weight1" in state:
        y = y + ref_feed_forward(ref_layer_norm(y), below(state, "ffn."))
    y = y + state["noise_strength"] * noise + state["bias"]
    y = np.where(y > 0, y, 0.2 * y)
    return y if clamp is None else np.clip(y, -clamp, clamp)


def ref_feed_forward(x: Array, state: State) -> Array:
    hidden = np.einsum("bni,oi->bno", x, state["weight1"]) + state["bias1"]
    hidden = hidden * (1 + scipy.special.erf(hidden / np.sqrt(2))) / 2
    return np.einsum("bni,oi->bno", hidden, state["weight2"]) + state["bias2"]


def ref_torgb_tokens(x: Array, w: Array, state: State, multiplier: float = 1.0) -> Array:
    W = np.einsum("oi,bi->boi", state["weight"], ref_fc(w, below(state, "affine."), multiplier))
    W = W / np.sqrt((W**2).sum(axis=2, keepdims=True) + 1e-8)
    return np.einsum("bni,boi->bno", x, W) + state["bias"]


def ref_upsample_tokens(x: Array) -> Array:
    """Bilinear upsampling with zeros outside: x (B, H, W, C) -> (B, 2H, 2W, C)."""
    for axis in (1, 2):
        x = np.moveaxis(x, axis, 0)
        zero = np.zeros_like(x[:1])
        before, after = np.concatenate([zero, x[:-1]]), np.concatenate([x[1:], zero])
        x = np.stack([before / 4 + 3 * x / 4, 3 * x / 4 + after / 4], axis=1).reshape(-1, *x.shape[1:])
        x = np.moveaxis(x, 0, axis)
    return x


def ref_styleformer_tokens(ws: Array, state: State, config: StyleformerConfig, noise: bool) -> tuple[Array, Array]:
    """Return tokens (B, N, C) and image (B, C, H, W) after the last encoder block."""
    B = len(ws)
    x = np.stack([state["const"]] * B)
    rgb: Array | None = None
    i = 0
    for r, (C, num_blocks) in enumerate(zip(config.widths, config.layers, strict=True)):
        height, width = config.base[0] * 2**r, config.base[1] * 2**r
        stage = below(state, f"stages.{r}.")
        x = x + stage["pos_embedding"]
        for j in range(num_blocks):
            block = below(stage, f"blocks.{j}.")
            heads = max(config.minimum_head, C // config.depth)
            after = config.layernorm == "after"
            x = ref_encoder_block(x, ws[:, i], block, heads, config.conv_clamp, block["noise_const"] * noise, after)
            i += 1
        y = ref_torgb_tokens(x, ws[:, i], below(stage, "torgb.")).reshape(B, height, width, -1)
        rgb = y if rgb is None else ref_upsample_tokens(rgb) + y
        if r + 1 < len(config.widths):
            x = ref_upsample_tokens(x.reshape(B, height, width, -1)).reshape(B, 4 * height * width, -1)
    assert rgb is not None
    return x, rgb.transpose(0, 3, 1, 2)


def ref_styleformer(ws: Array, state: State, config: StyleformerConfig, noise: bool) -> Array:
    return ref_styleformer_tokens(ws, state, config, noise)[1]
