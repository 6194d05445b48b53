"""Reference implementation of TransGAN's networks: float64 NumPy, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from reference_layers import Array, State, below
from scipy.special import erf

from training.networks.transgan import TransGANConfig
from training.networks.transgan_discriminator import TransGANDiscriminatorConfig
from training.networks.vit import BlockConfig


@torch.no_grad()
def build_transgan(config: Any) -> Any:
    """Return a float64 network in which no parameter is trivial or small; D starts from N(0, 0.02^2)."""
    torch.manual_seed(0)
    network = config.build().double()
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    network.requires_grad_(True)
    if isinstance(config, TransGANConfig):
        network.mapping.w_avg.normal_()
    return network


def ref_linear(x: Array, state: State, name: str) -> Array:
    y = np.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return y + state.get(f"{name}.bias", np.zeros(y.shape[-1]))


def ref_norm(x: Array, state: State, name: str) -> Array:
    """LayerNorm if it has a weight, else token-wise normalisation."""
    if f"{name}.weight" not in state:
        return x / np.sqrt((x**2).mean(axis=2, keepdims=True) + 1e-8)
    centred = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5)
    return centred * state[f"{name}.weight"] + state[f"{name}.bias"]


def ref_softmax(x: Array) -> Array:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def ref_attention(q: Array, k: Array, v: Array, heads: int, bias: Array | None = None) -> Array:
    """Softmax attention, head by head; bias (heads, N, M), -inf at masked keys."""
    out = np.zeros_like(q)
    D = q.shape[2] // heads
    for b in range(len(q)):
        for h in range(heads):
            part = slice(h * D, (h + 1) * D)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(D)
            out[b, :, part] = ref_softmax(scores if bias is None else scores + bias[h]) @ v[b, :, part]
    return out


def ref_attention_bias(table: Array | None, grid: tuple[int, int], cell: tuple[int, int], heads: int) -> Array:
    """Bias (heads, N, N) of a grid: -inf between cells, the table entry for the offset within a cell."""
    y, x = np.divmod(np.arange(math.prod(grid)), grid[1])
    dy, dx = np.subtract.outer(y, y), np.subtract.outer(x, x)  # query minus key
    together = np.equal.outer(y // cell[0], y // cell[0]) & np.equal.outer(x // cell[1], x // cell[1])
    values = np.zeros((heads, len(y), len(y)))
    if table is not None:
        values[:, together] = table[dy[together] + cell[0] - 1, dx[together] + cell[1] - 1].T
    return np.where(together, values, -np.inf)


def ref_nystrom(q: Array, k: Array, v: Array, heads: int, landmarks: int) -> Array:
    out = np.zeros_like(q)
    D, N = q.shape[2] // heads, q.shape[1]
    segments = np.kron(np.eye(landmarks), np.ones((1, N // landmarks))) / (N // landmarks)
    for b in range(len(q)):
        for h in range(heads):
            Q, K, V = (x[b, :, h * D : (h + 1) * D] for x in (q, k, v))
            left, right = (segments @ Q), (segments @ K)
            F, A, B = (ref_softmax(x @ y.T / math.sqrt(D)) for x, y in ((Q, right), (left, right), (left, K)))
            Z = A.T / (np.linalg.norm(A, 1) * np.linalg.norm(A, np.inf))
            one = np.eye(landmarks)
            for _ in range(6):
                AZ = A @ Z
                Z = Z @ (13 * one - AZ @ (15 * one - AZ @ (7 * one - AZ))) / 4
            out[b, :, h * D : (h + 1) * D] = F @ Z @ (B @ V)
    return out


def ref_attention_kind(
    q: Array, k: Array, v: Array, state: State, config: BlockConfig, grid: tuple[int, int], kind: str
) -> Array:
    """Attention of one kind: full, grid, axis or nystrom. Windows are attention among all tokens under a mask."""
    heads, (height, width) = config.num_heads, grid
    if kind == "nystrom":
        return ref_nystrom(q, k, v, heads, config.landmarks)
    if kind == "axis":
        rows, columns = (
            ref_attention_bias(state.get(f"{name}.relative.table"), grid, cell, heads)
            for name, cell in (("rows", (1, width)), ("columns", (height, 1)))
        )
        return ref_attention(q, k, ref_attention(q, k, v, heads, rows), heads, columns)
    cell = grid if kind == "full" else (config.window, config.window)
    return ref_attention(q, k, v, heads, ref_attention_bias(state.get("relative.table"), grid, cell, heads))


def ref_transgan_block(
    x: Array,
    state: State,
    config: BlockConfig,
    grid: tuple[int, int],
    kind: str,
    latents: Array | None = None,
    clamp: float | None = None,
) -> Array:
    C = x.shape[2]
    seen = ref_norm(x, state, "norm1")
    if "noise.strength" in state:
        seen = seen + state["noise.strength"] * state["noise.noise_const"]
    qkv = ref_linear(seen, state, "qkv")
    q, k, v = qkv[:, :, :C], qkv[:, :, C : 2 * C], qkv[:, :, 2 * C :]
    attended = ref_attention_kind(q, k, v, below(state, "attention."), config, grid, kind)
    x = x + ref_linear(attended, state, "out")
    if latents is not None:
        kv = ref_linear(latents, state, "cross.kv")
        q = ref_linear(ref_norm(x, state, "cross_norm"), state, "cross.q")
        x = x + ref_linear(ref_attention(q, kv[:, :, :C], kv[:, :, C:], config.num_heads), state, "cross.out")
    hidden = ref_linear(ref_norm(x, state, "norm2"), state, "fc1")
    x = x + ref_linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, state, "fc2")
    return x if clamp is None else np.clip(x, -clamp, clamp)


def ref_bicubic(x: Array) -> Array:
    """Upsampling by 2 along axis 1 with Keys' kernel, a = -3/4; centres aligned, borders repeated."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    n = x.shape[1]
    out = np.zeros((x.shape[0], 2 * n, *x.shape[2:]))
    for i in range(2 * n):
        place = (i + 0.5) / 2 - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            out[:, i] += kernel(place - j) * x[:, min(max(j, 0), n - 1)]
    return out


def ref_shuffle(x: Array) -> Array:
    """Pixel shuffle (B, h, w, C) -> (B, 2h, 2w, C/4): out[2y + i, 2x + j, c] = x[y, x, 4c + 2i + j]."""
    B, h, w, C = x.shape
    out = np.zeros((B, 2 * h, 2 * w, C // 4))
    for i in range(2):
        for j in range(2):
            out[:, i::2, j::2] = x[:, :, :, 2 * i + j :: 4]
    return out


def ref_low_pass(x: Array) -> Array:
    for axis in (1, 2):
        padded = np.pad(x, [(int(a == axis),) * 2 for a in range(4)])
        before, here, after = (np.take(padded, range(s, s + x.shape[axis]), axis) for s in range(3))
        x = before / 4 + here / 2 + after / 4
    return x


def ref_transgan(w: Array, state: State, config: TransGANConfig) -> Array:
    B = len(w)
    x = ref_linear(w, state, "stem").reshape(B, *config.base, config.widths[0])
    latents = None
    if config.latent_tokens:
        latents = ref_linear(w, state, "latent_stem").reshape(B, config.latent_tokens, config.widths[0])
        latents = latents + state["latent_position"]
    for index, (grid, width) in enumerate(zip(config.grids, config.widths, strict=True)):
        stage = below(state, f"stages.{index}.")
        if index and width == config.widths[index - 1]:
            x = ref_bicubic(ref_bicubic(x).transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        elif index:
            x = ref_shuffle(x)
        if index and index >= len(config.widths) - config.antialias:
            x = ref_low_pass(x)
        tokens = x.reshape(B, -1, width) + stage.get("position", 0)
        kind = "full" if max(grid) <= config.full_upto else config.attention
        for number in range(config.layers[index]):
            block = below(stage, f"blocks.{number}.")
            tokens = ref_transgan_block(tokens, block, config, grid, kind, latents, config.conv_clamp)
        x = tokens.reshape(B, *grid, width)
    return ref_linear(x, state, "torgb").transpose(0, 3, 1, 2)


def ref_patches(img: Array, state: State, patch: int, size: int) -> Array:
    """Embed patches of `size` pixels at a stride of `patch`, with zero padding -> (B, h, w, C)."""
    margin = (size - patch) // 2
    img = np.pad(img, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    height, width = (img.shape[2] - size) // patch + 1, (img.shape[3] - size) // patch + 1
    out = np.zeros((len(img), height, width, len(state["weight"])))
    for y in range(height):
        for x in range(width):
            part = img[:, :, y * patch : y * patch + size, x * patch : x * patch + size]
            out[:, y, x] = np.einsum("bchw,ochw->bo", part, state["weight"]) + state["bias"]
    return out


def ref_transgan_discriminator(img: Array, c: Array | None, state: State, config: TransGANDiscriminatorConfig) -> Array:
    B, x = len(img), np.zeros((len(img), 0, 0, 0))
    for index, grid in enumerate(config.grids):
        embedding, blocks = below(state, f"embeddings.{index}."), below(state, f"scales.{index}.")
        patch = config.patch * 2**index
        if index:
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
        if "conv.weight" in embedding:
            size = 2 * patch if config.overlap and index == 0 else patch
            seen = ref_patches(img, below(embedding, "conv."), patch, size)
            x = seen if index == 0 else np.concatenate([x, seen], axis=3)
        tokens = x.reshape(B, -1, x.shape[3]) + embedding.get("position", 0)
        for number in range(config.layers[index]):
            kind = config.attention if number < config.local_layers[index] else "full"
            tokens = ref_transgan_block(tokens, below(blocks, f"{number}."), config, grid, kind)
        x = tokens.reshape(B, *grid, -1)
    tokens = np.concatenate([np.broadcast_to(state["cls"], (B, 1, x.shape[3])), tokens], axis=1)
    tokens = ref_transgan_block(tokens, below(state, "last_block."), config, (1, tokens.shape[1]), "full")
    features = ref_norm(tokens, state, "norm")[:, 0]
    logits = ref_linear(features, state, "head")
    if c is not None:
        logits = logits + (features * (c @ state["embed"])).sum(axis=1, keepdims=True) / math.sqrt(features.shape[1])
    return logits
