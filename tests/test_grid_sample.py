"""grid_sample against PyTorch's function and a closed form, with derivatives of any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.grid_sample import grid_sample


def images_and_grid(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return images and sampling points, some of them outside the image."""
    torch.manual_seed(0)
    return torch.randn(2, 3, 5, 7, dtype=dtype), torch.rand(2, 4, 6, 2, dtype=dtype) * 2.4 - 1.2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_those_of_pytorch(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images, grid = images_and_grid(dtype)
    images = images.contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for resampled in (grid_sample(images, grid), F.grid_sample(images, grid, align_corners=False)):
        results.append([resampled, *torch.autograd.grad(resampled.sin().sum(), images)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_interpolation_is_linear_in_the_distance() -> None:
    """Points outside the image give zero. Pixel centres of a row of four are at -3/4, -1/4, 1/4 and 3/4."""
    row = torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 1, 1, 4)
    x = torch.tensor([-0.75, -0.625, 0.0, 0.625, 1.0, 1.3])
    grid = torch.stack([x, torch.zeros_like(x)], dim=1)[None, None]
    expected = torch.tensor([1, 0.75 * 1 + 0.25 * 10, 55, 0.25 * 100 + 0.75 * 1000, 500, 0])
    torch.testing.assert_close(grid_sample(row, grid).flatten(), expected)


def test_derivatives_equal_finite_differences() -> None:
    images, grid = images_and_grid()
    images.requires_grad_()

    def gradient(images: Tensor) -> Tensor:
        return torch.autograd.grad(grid_sample(images, grid).pow(4).sum(), images, create_graph=True)[0]

    assert torch.autograd.gradcheck(lambda x: grid_sample(x, grid).sin(), images)
    assert torch.autograd.gradcheck(gradient, images)
    assert torch.autograd.gradgradcheck(gradient, images)


def test_a_grid_that_requires_grad_is_refused() -> None:
    images, grid = images_and_grid()
    with pytest.raises(ValueError, match="detach the grid"):
        grid_sample(images, grid.requires_grad_())


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu() -> None:
    images, grid = images_and_grid(torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        x = images.to(device).requires_grad_()
        (first,) = torch.autograd.grad(grid_sample(x, grid.to(device)).pow(4).sum(), x, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), x)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours)
