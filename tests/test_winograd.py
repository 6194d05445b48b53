"""Convolutions by minimal filtering (torch_utils/ops/winograd.py), against PyTorch's convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derivative_helpers import Convolve, derivatives, third_derivatives
from torch import Tensor
from training_helpers import (
    every_phase_config,
    flat_parameters,
    new_trainer,
    saved_state,
    train_steps,
    train_with_a_break,
)

from torch_utils.ops import conv2d as own_conv2d
from torch_utils.ops import winograd
from torch_utils.ops.upfirdn2d import upfirdn2d
from training.networks import convolution, execution, weights
from training.networks.layers import Conv2d, resample_filter
from training.networks.stylegan2 import modulated_conv2d
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig


def same(x: Tensor, weight: Tensor) -> Tensor:
    algorithm = winograd.same(x.shape[3], x.dtype)
    return winograd.convolve(x, winograd.transform(weight, algorithm), algorithm)


def halving(x: Tensor, weight: Tensor) -> Tensor:
    algorithm = winograd.halving((0.125, 0.375, 0.375, 0.125))
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
    tensors = inputs((8, 16))
    for convolve, reference in ((same, direct), (halving, direct_halving)):
        expected = third_derivatives(reference, *tensors)
        for found, wanted in zip(third_derivatives(convolve, *tensors), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


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
    ("channels", "side", "stride", "alone", "cached"),
    [
        (64, 32, 1, True, True),
        (64, 16, 1, False, False),
        (256, 8, 1, False, True),
        (512, 4, 1, False, False),
        (32, 128, 1, False, False),
        (512, 18, 1, False, False),
        (512, 16, 2, True, True),
        (256, 16, 2, False, False),
        (512, 20, 2, False, False),
    ],
)
def test_wide_layers_use_winograd(channels: int, side: int, stride: int, alone: bool, cached: bool) -> None:
    x, weight = torch.empty(1, channels, side, side), torch.empty(channels, channels, 3, 3)
    assert winograd.is_profitable(x, weight, stride, is_cached=False) is alone
    assert winograd.is_profitable(x, weight, stride, is_cached=True) is cached
    for other_x, other_weight in ((x, weight[..., :1]), (x.to("meta"), weight), (x.half(), weight.half())):
        assert not winograd.is_profitable(other_x, other_weight, stride, is_cached=True)
    is_faster = winograd.is_profitable(x.bfloat16(), weight.bfloat16(), stride, is_cached=True)
    assert is_faster is (cached and stride == 1)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[winograd.Algorithm]:
    """Use Winograd's algorithm in layers of any width; return the algorithms of the layers that did."""
    used: list[winograd.Algorithm] = []
    convolve = winograd.convolve

    def spy(x: Tensor, U: Tensor, algorithm: winograd.Algorithm) -> Tensor:
        used.append(algorithm)
        return convolve(x, U, algorithm)

    def fits(x: Tensor, weight: Tensor, stride: int, *, is_cached: bool) -> bool:
        return winograd.fits(x, weight, stride)

    monkeypatch.setattr(winograd, "is_profitable", fits)
    monkeypatch.setattr(winograd, "convolve", spy)
    return used


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that turns Winograd's algorithm off."""
    return lambda: monkeypatch.setattr(winograd, "is_profitable", lambda *args, **options: False)


@pytest.mark.parametrize("down", [1, 2])
def test_layers_use_winograd(down: Any, everywhere: list[winograd.Algorithm], never: Callable[[], None]) -> None:
    torch.manual_seed(0)
    conv = Conv2d(3, 4, 3, down=down, activation="lrelu", gain=0.6, clamp=1.5).double()
    x = torch.randn(2, 3, 8, 16, dtype=torch.float64) * 3
    y = conv(x)
    assert len(everywhere) == 1
    never()
    torch.testing.assert_close(y, conv(x))


def test_modulated_convolutions_use_winograd(everywhere: list[winograd.Algorithm], never: Callable[[], None]) -> None:
    (x, weight), style = inputs((8, 8)), torch.rand(3, 2, dtype=torch.float64)
    y = modulated_conv2d(x, weight, style, torch.zeros(1, dtype=torch.float64))
    assert len(everywhere) == 1
    never()
    torch.testing.assert_close(y, modulated_conv2d(x, weight, style, torch.zeros(1, dtype=torch.float64)))


def test_the_discriminator_equals_itself_without_winograd(
    everywhere: list[winograd.Algorithm], never: Callable[[], None]
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
    never()
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


@pytest.mark.usefixtures("everywhere")
def test_resuming_is_bit_exact(shapes_zip: Path, tmp_path: Path) -> None:
    """A resumed run starts without transforms."""
    straight = new_trainer(wide_config(shapes_zip))
    train_steps(straight, 6)
    resumed = train_with_a_break(wide_config(shapes_zip), 3, 3, tmp_path)
    for name in ("G", "D"):
        assert torch.equal(*(flat_parameters(getattr(trainer, name)) for trainer in (straight, resumed)))


def test_transforms_are_dropped_when_their_parameters_change() -> None:
    """Fused optimizers do not count as changes; `forget` is for them. G requests its weights without a gain."""
    parameters = [torch.nn.Parameter(torch.randn(2, 2, 3, 3)) for _ in range(3)]
    gains = [2.0, 2.0, 1.0]
    cache, transforms = weights.WeightCache(), weights.TransformCache()
    algorithm = winograd.same(8, torch.float32)

    def transformed() -> list[torch.Tensor]:
        """Return the transforms in a new pass."""
        with execution.using(weights=cache, transforms=transforms), cache.filled():
            effective = [weights.effective(p, p.dtype, gain) for p, gain in zip(parameters, gains, strict=True)]
            found = [weights.transformed(weight, algorithm) for weight in effective]
            for U, p, gain in zip(found, parameters, gains, strict=True):
                torch.testing.assert_close(U, winograd.transform(p * gain, algorithm))
            return found

    def are_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> list[bool]:
        """Compare addresses; both lists are alive, so that no memory is used twice."""
        return [one.data_ptr() == other.data_ptr() for one, other in zip(some, others, strict=True)]

    first = transformed()
    assert are_same(first, transformed()) == [True, True, True]
    with torch.no_grad():
        parameters[0].mul_(10)
        parameters[2].data.mul_(10)  # not counted
    transforms.forget([parameters[2]])
    assert are_same(first, transformed()) == [False, True, False]


def test_fused_optimizers_do_not_count_as_changes() -> None:
    """The trainer therefore calls `TransformCache.forget` after every step; if this fails, it need not."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    torch.optim.Adam([p], fused=True).step()
    assert p._version == 0


def test_only_requested_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 requests the gradient of the images only, with a graph; its backward pass needs that of the weights."""
    x, weight = inputs((8, 8))
    calls: list[tuple[bool, bool]] = []
    apply = winograd._Gradients.apply

    def spy(g: Tensor, x: Tensor | None, U: Tensor | None, *args: Any) -> Any:
        calls.append((U is not None, x is not None))
        return apply(g, x, U, *args)

    monkeypatch.setattr(winograd._Gradients, "apply", spy)
    (gradient,) = torch.autograd.grad(same(x, weight).sin().sum(), x, create_graph=True)
    assert calls == [(True, False)]
    gradient.square().sum().backward()
    assert (True, True) in calls[1:]
    expected = inputs((8, 8))
    (reference,) = torch.autograd.grad(direct(*expected).sin().sum(), expected[0], create_graph=True)
    reference.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected[1].grad)


def test_weights_may_depend_on_the_images() -> None:
    x, weight = inputs((8, 16))
    for convolve, reference in ((same, direct), (halving, direct_halving), (own_conv2d.conv2d, F.conv2d)):
        found, expected = (
            torch.autograd.grad(form(x, weight * (1 + x.mean())).square().sum(), x)[0] for form in (convolve, reference)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of torch 2.11 itself
def test_compiled_networks_use_one_graph() -> None:
    """Dynamo must not trace the choice of an algorithm."""
    layers = torch.nn.Sequential(Conv2d(64, 64, 3, activation="lrelu"), Conv2d(64, 64, 3, down=2, activation="lrelu"))
    x = torch.randn(1, 64, 32, 32)
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layers(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func itself
@pytest.mark.usefixtures("everywhere")
def test_forward_mode_and_autocast_use_plain_convolutions() -> None:
    conv = Conv2d(2, 3, 3, activation="lrelu").double()
    x, _ = inputs((8, 8))
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    tangent: Any = torch.func.jvp(conv, (x.detach(),), (direction,))[1]
    jacobian_t_y = torch.autograd.grad((y := conv(x)), x, torch.ones_like(y))[0]
    torch.testing.assert_close(tangent.sum(), (jacobian_t_y * direction).sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv.float()(x.float()).isfinite().all()


def test_matrices_are_exact_for_other_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The construction does not depend on the points; these are the ones of Lavin & Gray."""
    monkeypatch.setattr(winograd, "POINTS", {5: (0, 1, -1, 2), 6: (0, 1, -1, 2, -2), 10: winograd.POINTS[10]})
    algorithm = winograd.same.__wrapped__(4, torch.float64)
    x, weight = inputs((8, 8))
    y = winograd.convolve(x, winograd.transform(weight, algorithm), replace(algorithm))
    torch.testing.assert_close(y, direct(x, weight))
