"""Blockwise attention: against explicit attention and finite differences, and the size of its tensors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.networks import blockwise
from training.networks.blockwise import blockwise_attention

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(B: int, H: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Return queries, keys and values; large queries keep the softmax from being flat."""
    generator = torch.Generator().manual_seed(N)
    q, k, v = (torch.randn(B, H, tokens, D, generator=generator, dtype=torch.float64) for tokens in (N, M, M))
    return tuple((x * size).to(dtype).requires_grad_() for x, size in ((q, 3), (k, 1), (v, 1)))  # type: ignore[return-value]


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def penalty(out: Tensor, args: Inputs) -> Tensor:
    """Return the squared gradient of a projection of the output, as in path length regularisation."""
    y = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).to(out.dtype).view_as(out)
    gradients = torch.autograd.grad((out * y).sum(), args, create_graph=True)
    return torch.stack([g.double().square().sum() for g in gradients]).sum()


# Several blocks with a short last block; the numbers of keys and queries differ.
SHAPES = [((2, 2, 7, 5, 3), 3), ((1, 2, 4, 9, 2), 2), ((1, 1, 5, 5, 4), 1), ((2, 1, 3, 4, 2), None)]


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_derivatives_equal_finite_differences(shape: tuple[int, int, int, int, int], block: int | None) -> None:
    arguments = inputs(*shape)
    assert torch.autograd.gradcheck(partial(blockwise_attention, block=block), arguments)
    assert torch.autograd.gradgradcheck(partial(blockwise_attention, block=block), arguments)


@pytest.mark.parametrize(("shape", "block"), SHAPES[:2])
def test_a_bias_has_first_and_second_derivatives(shape: tuple[int, int, int, int, int], block: int | None) -> None:
    """The bias is shared by all images; its derivatives are tested alone and with queries, keys and values."""
    arguments = inputs(*shape)
    _, H, N, M, _ = shape
    bias = torch.randn(H, N, M, dtype=torch.float64, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return blockwise_attention(q, k, v, block, bias=bias)

    q, k, v = arguments
    out = attention(q, k, v, bias)
    torch.testing.assert_close(out, ((q @ k.mT) / math.sqrt(q.shape[3]) + bias).softmax(dim=3) @ v)
    assert torch.autograd.gradcheck(attention, (*arguments, bias))
    assert torch.autograd.gradgradcheck(attention, (*arguments, bias))
    assert torch.autograd.gradgradcheck(partial(attention, q.detach(), k.detach(), v.detach()), (bias,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_may_have_another_dtype(dtype: torch.dtype) -> None:
    """A bias stays a float32 parameter with 16-bit activations; only the rounding of inputs remains."""
    arguments = inputs(2, 2, 40, 24, 8, dtype)
    exact: Inputs = tuple(x.detach().double().requires_grad_() for x in arguments)  # type: ignore[assignment]
    bias = torch.randn(2, 40, 24, requires_grad=True)
    slopes = []
    for given in (arguments, exact):
        out = blockwise_attention(*given, 16, bias=bias.to(torch.promote_types(given[0].dtype, torch.float32)))
        (slope,) = torch.autograd.grad(out.double().sin().sum(), bias)
        slopes.append(slope.double())
    found, wanted = slopes
    assert (found - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("block", [None, 1, 16, 50, 1000])
def test_blockwise_attention_equals_explicit_attention(block: int | None) -> None:
    arguments = inputs(2, 3, 50, 37, 8)
    out, expected = blockwise_attention(*arguments, block), explicit(*arguments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)

    y = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, arguments, y), torch.autograd.grad(expected, arguments, y), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    found_penalty = penalty(blockwise_attention(*arguments, block), arguments)
    wanted_penalty = penalty(explicit(*arguments), arguments)
    torch.testing.assert_close(found_penalty, wanted_penalty, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(
        torch.autograd.grad(found_penalty, arguments), torch.autograd.grad(wanted_penalty, arguments), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_views_and_inputs_without_gradient_are_accepted() -> None:
    """Networks pass (B, N, H, D) with two axes swapped and may need the gradient of one input only."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 3, 10, 6, 4))
    k.requires_grad_()

    def second_derivative(attention: Any) -> Tensor:
        (dk,) = torch.autograd.grad(attention(q, k, v).square().sum(), k, create_graph=True)
        return torch.autograd.grad(dk.square().sum(), k)[0]

    found = second_derivative(partial(blockwise_attention, block=4))
    torch.testing.assert_close(found, second_derivative(explicit), rtol=1e-10, atol=1e-10)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_inputs_are_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Errors come from rounding inputs and results; computing in 16 bits would make them many times larger."""
    arguments = inputs(2, 2, 40, 24, 8, dtype)
    exact: Inputs = tuple(x.detach().double().requires_grad_() for x in arguments)  # type: ignore[assignment]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = blockwise_attention(*arguments, 16)
        assert out.dtype == dtype
        gradients = torch.autograd.grad(out.sum(), arguments, create_graph=True)
        slopes = torch.autograd.grad(penalty(out, arguments), arguments)
    expected = explicit(*exact)
    wanted = (
        *torch.autograd.grad(expected.sum(), exact, retain_graph=True),
        *torch.autograd.grad(penalty(expected, exact), exact),
    )
    for found, right in zip((*gradients, *slopes), wanted, strict=True):
        assert found.dtype == dtype
        assert (found.double() - right).norm() <= torch.finfo(dtype).eps * right.norm()


class Sizes(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize(("attention", "rows"), [(explicit, 96), (partial(blockwise_attention, block=16), 16)])
def test_the_largest_tensor_is_one_block(attention: Any, rows: int) -> None:
    """Explicit attention, as in the MATH backend, materializes the whole matrix."""
    B, H, N, M, D = 2, 2, 96, 80, 4
    arguments = inputs(B, H, N, M, D, torch.float32)
    with Sizes() as sizes, sdpa_kernel(SDPBackend.MATH):
        penalty(attention(*arguments), arguments).backward()
    assert arguments[0].grad is not None
    assert sizes.largest == B * H * rows * M
    assert sizes.largest > B * H * N * D  # a block is larger than any input


def test_the_default_block_has_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    B, H, N, M, D = 2, 2, 96, 80, 4
    for block_bytes, rows in ((4 * B * H * M * 30, 30), (1, blockwise.MIN_BLOCK)):
        monkeypatch.setattr(blockwise, "BLOCK_BYTES", {"cpu": block_bytes})
        arguments = inputs(B, H, N, M, D, torch.float32)
        with Sizes() as sizes:
            blockwise_attention(*arguments).sum().backward()
        assert sizes.largest == B * H * rows * M


def test_a_third_derivative_raises_an_error() -> None:
    arguments = inputs(1, 1, 4, 4, 2)
    slopes = torch.autograd.grad(penalty(blockwise_attention(*arguments), arguments), arguments, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slopes[0].sum().backward()


def test_a_block_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="block=0: the number of rows"):
        blockwise_attention(*inputs(1, 1, 4, 4, 2), 0)


@pytest.mark.gpu
def test_blockwise_attention_can_be_replayed_in_a_cuda_graph() -> None:
    """A replay uses the values that its inputs have after the capture."""
    arguments: Inputs = tuple(x.detach().cuda().requires_grad_() for x in inputs(2, 2, 50, 37, 8, torch.float32))  # type: ignore[assignment]

    def slopes() -> tuple[Tensor, ...]:
        return torch.autograd.grad(penalty(blockwise_attention(*arguments, 16), arguments), arguments)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slopes()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = slopes()
    with torch.no_grad():
        for x in arguments:
            x.mul_(0.5)
    graph.replay()
    exact: Inputs = tuple(x.detach().cpu().double().requires_grad_() for x in arguments)  # type: ignore[assignment]
    wanted = torch.autograd.grad(penalty(explicit(*exact), exact), exact)
    for found, right in zip(captured, wanted, strict=True):
        assert (found.cpu().double() - right).norm() <= 1e-4 * right.norm()
