"""Reference implementation of the layers shared by the families: float64 NumPy, from the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.networks.generator import GeneratorConfig

Array = np.ndarray[Any, np.dtype[np.float64]]
State = dict[str, Array]


def build(config: Any) -> Any:
    """Return a float64 network in which no parameter or buffer is trivial."""
    torch.manual_seed(0)
    network = config.build().double()
    randomize(network)
    return network


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Replace zero tensors by noise and add noise to constant tensors."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if not tensor.any():
            tensor.normal_()
        elif tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)


def state_of(module: torch.nn.Module) -> State:
    """Return the tensors of a module as arrays."""
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


def below(state: State, prefix: str) -> State:
    """Return the entries under `prefix`, with the prefix removed from the names."""
    return {name[len(prefix) :]: array for name, array in state.items() if name.startswith(prefix)}


def inputs(config: GeneratorConfig, batch: int = 3) -> tuple[Tensor, Tensor | None]:
    """Return latents and one-hot labels (None without classes)."""
    torch.manual_seed(1)
    z = torch.randn(batch, config.z_dim, dtype=torch.float64)
    c = torch.eye(config.c_dim, dtype=torch.float64)[torch.arange(batch) % config.c_dim] if config.c_dim else None
    return z, c


def close(actual: Tensor, expected: Array) -> None:
    """Assert that a float64 tensor has the expected shape and, up to rounding, values."""
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def ref_fc(x: Array, state: State, multiplier: float = 1.0, lrelu: bool = False) -> Array:
    W, b = state["weight"], state["bias"]
    y = np.einsum("bi,oi->bo", x, W * multiplier / np.sqrt(W.shape[1])) + b * multiplier
    return np.where(y > 0, y, 0.2 * y) * np.sqrt(2) if lrelu else y


def ref_normalize(x: Array) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-8)


def ref_mapping(
    z: Array,
    c: Array | None,
    state: State,
    num_ws: int,
    num_layers: int,
    psi: float = 1.0,
    cutoff: int | None = None,
    multiplier: float = 0.01,
) -> Array:
    x = ref_normalize(z)
    if c is not None:
        x = np.concatenate([x, ref_normalize(ref_fc(c, below(state, "embed.")))], axis=1)
    for i in range(num_layers):
        x = ref_fc(x, below(state, f"layers.{i}."), multiplier=multiplier, lrelu=True)
    ws = np.stack([x] * num_ws, axis=1)
    ws[:, :cutoff] = state["w_avg"] + psi * (ws[:, :cutoff] - state["w_avg"])
    return ws
