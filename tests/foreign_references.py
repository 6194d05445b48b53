"""Expected images of foreign snapshots: their tensors under the names of the reference implementations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import Tensors
from reference_layers import Array, State, below, ref_mapping

import legacy
from dnnlib.config import UserError
from training.networks.styleformer import StyleformerConfig
from training.snapshots.snapshot import Snapshot


def arrays(tensors: Tensors, names: dict[str, str]) -> State:
    """Return the tensors in float64 under the names of the reference; `names` maps patterns to replacements."""
    state = {}
    for name, x in tensors.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[name] = x.double().numpy()
    return state


def styleformer_state(tensors: Tensors, config: StyleformerConfig) -> State:
    """Return the state for the reference: resolutions by index, Q, K and V matrices concatenated."""
    sides = {str(grid[0]): level for level, grid in enumerate(config.grids)}
    names = {
        r"^synthesis\.b\d+_0\.const": "const",
        r"^synthesis\.b(\d+)_0\.pos_embedding": r"stages.\1.pos_embedding",
        r"^synthesis\.b(\d+)_\d+\.torgb": r"stages.\1.torgb",
        r"^synthesis\.b(\d+)_(\d+)\.enc": r"stages.\1.blocks.\2",
        r"affine1": "affine",
        r"w_weight$": "out_weight",
        r"u_weight$": "residual_weight",
        r"proj_weight$": "attention.token_projection",
    }
    found = arrays(tensors, names)
    state = {}
    for name, x in found.items():
        state[re.sub(r"^stages\.(\d+)", lambda match: f"stages.{sides[match[1]]}", name)] = x
    for name in [name for name in state if name.endswith(".q_weight")]:
        stem = name.removesuffix("q_weight")
        state[f"{stem}qkv_weight"] = np.concatenate([state[f"{stem}{letter}_weight"] for letter in "qkv"])
    return state


def stylegan2_state(tensors: Tensors) -> State:
    """Return the state for the reference: resolutions by index, the layers of each in a list."""

    def place(match: re.Match[str]) -> str:
        level = int(match[1]).bit_length() - 3
        return f"stages.{level}." + re.sub(r"^conv(\d)", lambda c: f"convs.{int(c[1]) - (level == 0)}", match[2])

    state = {}
    for name, x in tensors.items():
        name = name.replace("synthesis.b4.const", "const").replace(".skip.", ".shortcut.")
        state[re.sub(r"^synthesis\.b(\d+)\.(.*)", place, name)] = x.double().numpy()
    return {name: x[:, :, 0, 0] if name.endswith("torgb.weight") else x for name, x in state.items()}


def mapping_state(tensors: Tensors) -> State:
    return below(arrays(tensors, {r"mapping\.fc": "mapping.layers."}), "mapping.")


def assert_same_images(snapshot: Snapshot, expected: Any, tensors: Tensors) -> float:
    """Compare with the reference `expected` (ws, noise) -> images, for both noise modes and truncation.

    Return the largest difference, relative to the largest value.
    """
    largest = 0.0
    G, config = snapshot.G_ema, snapshot.config.generator
    z = torch.randn(2, config.z_dim, generator=torch.Generator().manual_seed(3))
    c = torch.eye(config.c_dim)[:2] if config.c_dim else None
    labels = None if c is None else c.double().numpy()
    for psi, noise_mode in ((1.0, "const"), (0.7, "none"), (0.7, "const")):
        layers = config.mapping_layers
        ws = ref_mapping(z.double().numpy(), labels, mapping_state(tensors), config.num_ws, layers, psi)
        expected_images: Array = expected(ws, noise_mode == "const")
        scale = np.abs(expected_images).max()
        img = G(z, c, truncation_psi=psi, noise_mode=noise_mode).double().numpy()
        assert img.shape == expected_images.shape == (2, *G.img_shape)
        assert np.abs(img - expected_images).max() <= 1e-4 * max(scale, 1)
        assert scale > 0.3
        largest = max(largest, np.abs(img - expected_images).max() / max(scale, 1))
    return largest


def refused(path: Path, *texts: str) -> None:
    with pytest.raises(UserError) as caught:
        legacy.load_network(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 600
    for text in texts:
        assert text in message
