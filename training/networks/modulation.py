"""Styles and demodulation coefficients of all layers of a synthesis network, computed together in few kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.networks import execution
from training.networks.layers import FullyConnected

Reader = tuple[FullyConnected, int]  # affine layer of a modulated layer, and the index of the style that it reads


def read_styles(readers: Sequence[Reader], ws: Tensor) -> dict[FullyConnected, Tensor]:
    """Return the output (B, out) of each affine layer for its style of ws (B, num_ws, w_dim).

    If `ws` is one w that is expanded to all styles, as from a mapping network without style mixing and truncation, one
    matrix product computes all outputs, unless a gradient is needed and `execution.current.shared_styles` is not set.
    """
    layers = [affine for affine, _ in readers]
    if not (_is_one_w(ws) and _can_share_a_product(layers)):
        return {affine: affine(ws[:, index]) for affine, index in readers}
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    styles = F.linear(ws[:, 0] * layers[0].weight_gain, weight, bias * layers[0].bias_gain)
    return dict(zip(layers, styles.split([len(layer.bias) for layer in layers], dim=1), strict=True))


def _is_one_w(ws: Tensor) -> bool:
    """Return whether all styles are one w, and no gradient with respect to each style is needed."""
    is_expanded = ws.shape[1] == 1 or ws.stride(1) == 0
    return is_expanded and (execution.current.shared_styles or not (ws.requires_grad and torch.is_grad_enabled()))


def _can_share_a_product(layers: Sequence[FullyConnected]) -> bool:
    """Return whether the layers are linear with equal gains, and no forward hook waits for a call of one of them."""
    is_alike = {(layer.activation, layer.bias_gain, layer.weight_gain) for layer in layers}
    has_hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    return is_alike == {("linear", layers[0].bias_gain, layers[0].weight_gain)} and not has_hooks


def demodulations(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Demodulation coefficients d (B, out) of linear maps W (out, in) that are modulated by styles s (B, in).

        d_bj = (sum_i (W_ji s_bi)^2 + 1e-8)^(-1/2)        StyleGAN2, equation 3

    Multiplying the outputs by d is equivalent to demodulating the weights per image. d is at most 1e4. `pairs` are the
    weights and styles of several maps; maps of the same shape share a batched product.
    """
    groups: dict[torch.Size, list[int]] = {}
    for i, (weight, _) in enumerate(pairs):
        groups.setdefault(weight.shape, []).append(i)
    order = [i for members in groups.values() for i in members]

    weights = torch.cat([pairs[i][0].reshape(-1) for i in order]).square()
    weights_of = weights.split([len(members) * shape.numel() for shape, members in groups.items()])
    styles = torch.cat([pairs[i][1] for i in order], dim=1).square()
    styles_of = styles.split([len(members) * shape[1] for shape, members in groups.items()], dim=1)
    sums = [
        s.unflatten(1, (-1, shape[1])).transpose(0, 1) @ w.view(-1, *shape).mT  # (maps, B, out)
        for shape, w, s in zip(groups, weights_of, styles_of, strict=True)
    ]
    d = (torch.cat([x for part in sums for x in part.unbind()], dim=1) + 1e-8).rsqrt()
    found = dict(zip(order, d.split([len(pairs[i][0]) for i in order], dim=1), strict=True))
    return [found[i] for i in range(len(pairs))]
