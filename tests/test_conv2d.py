"""Convolutions with fast second derivatives, against PyTorch's convolutions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from derivative_helpers import Convolve, derivatives, third_derivatives
from torch import Tensor

from torch_utils.ops import conv2d as ours
from training.networks import convolution, execution

CASES: dict[str, tuple[Convolve, Convolve, tuple[int, ...]]] = {
    "3x3": (partial(ours.conv2d, padding=1), partial(F.conv2d, padding=1), (4, 3, 3, 3)),
    "pointwise": (ours.conv2d, F.conv2d, (4, 3, 1, 1)),
    "strided": (partial(ours.conv2d, stride=2), partial(F.conv2d, stride=2), (4, 3, 3, 3)),
    "patches": (partial(ours.conv2d, stride=2, padding=1), partial(F.conv2d, stride=2, padding=1), (4, 3, 4, 4)),
    "grouped": (partial(ours.conv2d, padding=1, groups=3), partial(F.conv2d, padding=1, groups=3), (6, 1, 3, 3)),
    "grouped patches": (
        partial(ours.conv2d, stride=2, padding=1, groups=3),
        partial(F.conv2d, stride=2, padding=1, groups=3),
        (3, 1, 4, 4),
    ),
    "transposed": (partial(ours.conv_transpose2d, stride=2), partial(F.conv_transpose2d, stride=2), (3, 4, 3, 3)),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*sizes, dtype=dtype, generator=generator) for sizes in ((2, 3, 7, 6), shape))
    return x.requires_grad_(), w.requires_grad_()


@pytest.mark.parametrize("case", CASES)
def test_derivatives_equal_those_of_pytorch(case: str) -> None:
    convolve, reference, shape = CASES[case]
    x, w = inputs(shape)
    for actual, expected in zip(derivatives(convolve, x, w), derivatives(reference, x, w), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_derivatives_equal_finite_differences(case: str) -> None:
    convolve, _, shape = CASES[case]
    assert torch.autograd.gradcheck(convolve, inputs(shape))
    assert torch.autograd.gradgradcheck(convolve, inputs(shape))


def test_third_derivatives() -> None:
    convolve, reference, shape = CASES["strided"]
    found, expected = (third_derivatives(form, *inputs(shape)) for form in (convolve, reference))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_unneeded_gradients_are_not_computed() -> None:
    x, w = inputs((4, 3, 3, 3))
    x.requires_grad_(False)
    (grad,) = torch.autograd.grad(ours.conv2d(x, w, padding=1).sum(), w)
    assert grad.shape == w.shape
    assert torch.isfinite(grad).all()


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_on_a_gpu(case: str, channels_last: bool) -> None:
    """Networks use these convolutions on a GPU, in both memory layouts, only where second derivatives are requested."""
    _, reference, shape = CASES[case]
    x, w = inputs(shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    on_gpu = [tensor.detach().float().cuda().contiguous(memory_format=layout).requires_grad_() for tensor in (x, w)]
    network = convolution.conv_transpose2d if case == "transposed" else convolution.conv2d
    options = reference.keywords if isinstance(reference, partial) else {}
    with execution.using(twice_differentiable=True):
        actual = derivatives(partial(network, **options), *on_gpu)
    assert str(actual[0].grad_fn).startswith(("<_ConvolutionBackward", "<_InputGradientBackward"))
    for found, expected in zip(actual, derivatives(reference, x, w), strict=True):
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
