"""Effective weights: the cache of a phase computes the same values and gradients as single layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from training.networks import execution
from training.networks.weights import WeightCache, _Effective, effective

BF16 = torch.bfloat16


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 3, 3, 3))]


def requested(weights: list[nn.Parameter]) -> list[Tensor]:
    """Return effective weights with all combinations of gain and cast."""
    a, b, c = weights
    return [effective(a, BF16, 0.3), effective(b, torch.float32, 1.7), effective(c, BF16), effective(c, torch.float32)]


def total(weights: list[Tensor], factors: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum().float() for x, y in zip(weights, factors, strict=True)]).sum()


def test_effective_weights_are_scaled_and_cast() -> None:
    a, b, c = parameters()
    assert torch.equal(effective(a, BF16, 0.3), (a * 0.3).to(BF16))
    assert torch.equal(effective(b, torch.float32, 1.7), b * 1.7)
    assert effective(c, torch.float32) is c
    assert effective(a.double(), BF16, 0.3).dtype == BF16


@pytest.mark.parametrize("is_first", [True, False])
def test_the_cache_changes_neither_weights_nor_gradients(is_first: bool) -> None:
    weights, cache = parameters(), WeightCache()
    if not is_first:
        with execution.using(weights=cache), cache.filled():
            requested(weights)
        with torch.no_grad():
            weights[0].add_(1)  # an optimizer step
    expected = requested(weights)
    factors = [torch.randn_like(x) for x in expected]
    expected_gradients = torch.autograd.grad(total(expected, factors), weights)
    with execution.using(weights=cache), cache.filled():
        found = requested(weights)
        assert requested(weights)[0] is found[0]
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
        gradients = torch.autograd.grad(total(found, factors), weights)
    for x, y in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x, y)
    assert cache.ready == {}


class Count(TorchDispatchMode):
    """Counter of multiplications and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_filled_cache_uses_one_kernel_for_all_weights() -> None:
    weights, cache = [nn.Parameter(torch.randn(4, 4)) for _ in range(9)], WeightCache()
    for names in (["mul"] * 9, ["_foreach_mul", "_foreach_copy_"]):
        with execution.using(weights=cache), Count() as count, cache.filled():
            total = torch.stack([effective(p, BF16, 0.5) for p in weights]).sum()
            torch.autograd.grad(total, weights)
        found = [name for name in count.names if "mul" in name or "foreach" in name]
        if len(names) == 2:
            assert found == [*names, "_foreach_copy_", "_foreach_mul"]  # the backward pass casts first


def test_weights_that_are_not_trained_have_no_graph() -> None:
    (a, b, _), cache = parameters(), WeightCache()
    b.requires_grad_(False)
    for _ in range(2):
        with execution.using(weights=cache), cache.filled():
            x, y = effective(a, BF16, 2.0), effective(b, BF16, 2.0)
            assert (x.requires_grad, y.requires_grad) == (True, False)
            (gradient,) = torch.autograd.grad(x.sum(), a)
    assert torch.equal(gradient, torch.full_like(a, 2.0))


def test_a_request_without_gradients_is_not_cached() -> None:
    (a, *_), cache = parameters(), WeightCache()
    with execution.using(weights=cache), cache.filled():
        with torch.no_grad():
            effective(a, BF16, 2.0)
        assert effective(a, BF16, 2.0).requires_grad


def test_second_derivatives_are_correct() -> None:
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(*tensors: Tensor) -> Tensor:
        a, b = _Effective.apply((0.5, 1.0), (torch.float64, torch.float64), *tensors)
        return a.pow(3) * b.sin()

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
