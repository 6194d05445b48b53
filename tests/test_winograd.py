"""Convolutions by minimal filtering (torch_utils/ops/winograd.py), against PyTorch's convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_helpers import every_phase_config, flat_parameters, new_trainer, saved_state, train_steps

from torch_utils.ops import winograd
from torch_utils.ops.upfirdn2d import upfirdn2d
from training.networks import convolution, execution, weights
from training.networks.layers import Conv2d, resample_filter
from training.networks.stylegan2 import modulated_conv2d
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig

Convolve = Callable[[Tensor, Tensor], Tensor]


def same(x: Tensor, weight: Tensor) -> Tensor:
    algorithm = winograd.same(x.shape[3], x.dtype)
    return winograd.convolve(x, winograd.transform(weight, algorithm), algorithm)


def halving(x: Tensor, weight: Tensor) -> Tensor:
    algorithm = winograd.halving(convolution.BINOMIAL)
    return winograd.convolve(x, winograd.transform(weight, algorithm), algorithm)


def direct(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def direct_halving(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(upfirdn2d(x, resample_filter(), padding=2), weight, stride=2)


CASES: dict[str, tuple[Convolve, Convolve, tuple[int, int]]] = {
    "tiles of 4": (same, direct, (8, 12)),
    "one tile": (same, direct, (4, 4)),
    "tiles of 8": (same, direct, (4, 16)),
    "halving": (halving, direct_halving, (16, 24)),
    "halving one tile": (halving, direct_halving, (8, 8)),
}


def inputs(size: tuple[int, int], batch: int = 3, channels: tuple[int, int] = (2, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels[0], *size, dtype=torch.float64, generator=generator)
    weight = torch.randn(channels[1], channels[0], 3, 3, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


def derivatives(convolve: Convolve, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the output, its gradients, and the gradients of the gradient norms."""
    y = convolve(x, weight)
    first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
    second = [torch.autograd.grad(g.square().sum(), (x, weight), retain_graph=True) for g in first]
    return [y, *first, *(g for pair in second for g in pair)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", ["whole", "rows of tiles"])
def test_derivatives_equal_those_of_pytorch(case: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are as large as the batch, or single images with single rows of tiles."""
    if blocks == "rows of tiles":
        monkeypatch.setattr(winograd, "TRANSFORM_BLOCK", 1)
        monkeypatch.setattr(winograd, "PRODUCT_BLOCK", 1)
    convolve, reference, size = CASES[case]
    x, weight = inputs(size)
    for actual, expected in zip(derivatives(convolve, x, weight), derivatives(reference, x, weight), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize(("convolve", "size"), [(same, (8, 4)), (same, (4, 8)), (halving, (8, 8))])
def test_derivatives_equal_finite_differences(convolve: Convolve, size: tuple[int, int]) -> None:
    x, weight = inputs(size, batch=1, channels=(1, 2))
    assert torch.autograd.gradcheck(convolve, (x, weight))
    assert torch.autograd.gradgradcheck(convolve, (x, weight))


def test_third_derivatives_equal_those_of_pytorch() -> None:
    x, weight = inputs((8, 16))

    def third(convolve: Convolve) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(convolve(x, weight).pow(3).sum(), x, create_graph=True)
        (dw,) = torch.autograd.grad(dx.pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(dw.pow(3).sum(), (x, weight))

    for convolve, reference in ((same, direct), (halving, direct_halving)):
        for actual, expected in zip(third(convolve), third(reference), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("needed", [0, 1])
def test_only_needed_gradients_are_computed(needed: int) -> None:
    tensors = inputs((8, 16))
    tensors[1 - needed].requires_grad_(False)
    for convolve, reference in ((same, direct), (halving, direct_halving)):
        (actual,) = torch.autograd.grad(convolve(*tensors).sin().sum(), tensors[needed])
        (expected,) = torch.autograd.grad(reference(*tensors).sin().sum(), tensors[needed])
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_channels_last(layout: torch.memory_format) -> None:
    x, weight = inputs((8, 8))
    y = same(x.contiguous(memory_format=layout), weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, direct(x, weight))


@pytest.mark.parametrize(
    ("width", "dtype", "smallest", "largest"),
    [
        (12, torch.float32, 3e-7, 3e-6),  # tiles of 4
        (16, torch.float32, 2e-6, 1.5e-5),  # tiles of 8
        (16, torch.bfloat16, 3e-3, 2e-2),  # tiles of 4
    ],
)
def test_rounding_errors(width: int, dtype: torch.dtype, smallest: float, largest: float) -> None:
    """A direct convolution has relative errors of about 3e-7 and 2e-3; PyTorch's TF32 has 3e-4."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 128, 8, width), torch.randn(128, 128, 3, 3)
    expected = direct(x.double(), weight.double())
    error = (same(x.to(dtype), weight.to(dtype)).double() - expected).norm() / expected.norm()
    assert smallest < error < largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_reduced_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3) / 24
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for convolve, reference in ((same, direct), (halving, direct_halving)):
        expected = derivatives(reference, *exact)
        for found, wanted in zip(derivatives(convolve, *tensors), expected, strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize(
    ("channels", "side", "is_used"),
    [(64, 32, True), (64, 16, False), (256, 8, True), (32, 128, False), (512, 6, False)],
)
def test_wide_layers_use_winograd(channels: int, side: int, is_used: bool) -> None:
    x, weight = torch.empty(1, channels, side, side), torch.empty(channels, channels, 3, 3)
    assert winograd.is_profitable(x, weight, winograd.same(side, x.dtype)) is is_used
    assert not winograd.is_profitable(x, weight[..., :1], winograd.same(side, x.dtype))
    assert not winograd.is_profitable(x.to("meta"), weight, winograd.same(side, x.dtype))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[winograd.Algorithm]:
    """Use Winograd's algorithm in layers of any width; return the algorithms of the layers that did."""
    used: list[winograd.Algorithm] = []
    convolve = winograd.convolve

    def spy(x: Tensor, U: Tensor, algorithm: winograd.Algorithm) -> Tensor:
        used.append(algorithm)
        return convolve(x, U, algorithm)

    monkeypatch.setattr(winograd, "is_profitable", winograd.fits)
    monkeypatch.setattr(winograd, "convolve", spy)
    return used


@pytest.mark.parametrize("down", [1, 2])
def test_layers_use_winograd(down: Any, everywhere: list[winograd.Algorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv = Conv2d(3, 4, 3, down=down, activation="lrelu", gain=0.6, clamp=1.5).double()
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64) * 3
    y = conv(x)
    assert len(everywhere) == 1
    monkeypatch.setattr(winograd, "is_profitable", lambda *_: False)
    torch.testing.assert_close(y, conv(x))


def test_modulated_convolutions_use_winograd(
    everywhere: list[winograd.Algorithm], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, weight), style = inputs((8, 8)), torch.rand(3, 2, dtype=torch.float64)
    y = modulated_conv2d(x, weight, style, torch.zeros(1, dtype=torch.float64))
    assert len(everywhere) == 1
    monkeypatch.setattr(winograd, "is_profitable", lambda *_: False)
    torch.testing.assert_close(y, modulated_conv2d(x, weight, style, torch.zeros(1, dtype=torch.float64)))


def test_the_discriminator_equals_itself_without_winograd(
    everywhere: list[winograd.Algorithm], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = StyleGAN2DiscriminatorConfig(img_size=(32, 32), channel_base=128, architecture="resnet")
    D = config.build().double()
    img = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def penalty() -> list[Tensor]:
        logits = D(img, None)
        (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
        return [logits, gradient, *torch.autograd.grad(gradient.square().sum(), [*D.parameters()], allow_unused=True)]

    found = penalty()
    assert len(everywhere) == 7  # two in each of three blocks, one in the epilogue
    monkeypatch.setattr(winograd, "is_profitable", lambda *_: False)
    for actual, expected in zip(found, penalty(), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def wide_config(data: Path, **changes: object) -> Any:
    return every_phase_config(data, batch_size=8, run__batch_gpu=4, **changes)


@pytest.mark.usefixtures("everywhere")
def test_kept_transforms_do_not_change_training(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase changes weights; a transform that outlived its weights would change the run."""
    kept = new_trainer(wide_config(shapes_zip))
    computed: list[bool] = []
    transform = winograd.transform

    def spy(weight: Tensor, algorithm: winograd.Algorithm, known: Tensor | None = None) -> Tensor:
        computed.append(known is None)
        return transform(weight, algorithm, known)

    monkeypatch.setattr(winograd, "transform", spy)
    train_steps(kept, 4)
    assert 0 < sum(computed) < len(computed) / 2  # micro-batches and phases share them
    monkeypatch.setattr(weights, "transformed", transform)
    monkeypatch.setattr(convolution, "transformed", transform)
    anew = new_trainer(wide_config(shapes_zip))
    train_steps(anew, 4)
    assert torch.equal(flat_parameters(kept.D), flat_parameters(anew.D))
    assert torch.equal(flat_parameters(kept.G), flat_parameters(anew.G))
    assert saved_state(kept)["state"] == saved_state(anew)["state"]


def test_transforms_are_forgotten_with_their_parameters() -> None:
    conv, other = Conv2d(2, 2, 3), Conv2d(2, 2, 3)
    cache, transforms = weights.WeightCache(), weights.TransformCache()
    algorithm = winograd.same(8, torch.float32)
    with execution.using(weights=cache, transforms=transforms), cache.filled():
        pair = [weights.effective(layer.weight, torch.float32, 2.0) for layer in (conv, other)]
        first = [weights.transformed(weight, algorithm) for weight in pair]
        assert [U.data_ptr() for U in first] == [weights.transformed(w, algorithm).data_ptr() for w in pair]
        transforms.forget([conv.weight])
        with torch.no_grad():
            pair[0].zero_()
        assert not weights.transformed(pair[0], algorithm).any()
        assert weights.transformed(pair[1], algorithm).data_ptr() == first[1].data_ptr()


def test_matrices_are_exact_for_other_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The construction does not depend on the points; these are the ones of Lavin & Gray."""
    monkeypatch.setattr(winograd, "POINTS", {5: (0, 1, -1, 2), 6: (0, 1, -1, 2, -2), 10: winograd.POINTS[10]})
    algorithm = winograd.same.__wrapped__(4, torch.float64)
    x, weight = inputs((8, 8))
    y = winograd.convolve(x, winograd.transform(weight, algorithm), replace(algorithm))
    torch.testing.assert_close(y, direct(x, weight))
