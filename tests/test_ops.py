"""upfirdn2d and bias_act against SciPy, closed forms and numerical derivatives."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.special
import torch
from torch import Tensor

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upfirdn2d, upsample2d

CASES: dict[str, dict[str, Any]] = {
    "identity": {},
    "up": {"up": 2, "padding": (2, 1, 2, 1)},
    "up-by-axis": {"up": (3, 2), "padding": 3},
    "down": {"down": 2, "padding": 1},
    "down-by-axis": {"down": (1, 3), "padding": (2, 3)},
    "up-and-down": {"up": (2, 3), "down": (3, 2), "padding": (1, 4, 2, 5)},
    "crop": {"padding": (-1, -2, 0, -1)},
    "crop-and-pad": {"up": 2, "down": 2, "padding": (-3, 4, 5, -2)},
    "crop-more-than-a-sample": {"up": 3, "padding": (-4, 2, 3, -5)},
    "gain": {"up": 2, "padding": 2, "gain": -2.5},
    "flip": {"up": (1, 2), "down": (2, 1), "padding": 2, "flip_filter": True},
}
SEPARABLE = {1: [0.7], 3: [1.0, -2.0, 0.5], 4: [1.0, 3.0, 3.5, 0.25], 6: [0.1, -1.0, 2.0, 0.5, 0.25, 3.0]}


def scipy_upfirdn2d(
    x: np.ndarray,
    f: np.ndarray,
    *,
    up: int | tuple[int, int] = 1,
    down: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> np.ndarray:
    """The definition, step by step in float64: place the samples, pad or crop, convolve, keep every down-th."""
    up_x, up_y = (up, up) if isinstance(up, int) else up
    down_x, down_y = (down, down) if isinstance(down, int) else down
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    x0, x1, y0, y1 = sides if len(sides) == 4 else (sides[0], sides[0], sides[1], sides[1])
    f = f.astype(np.float64)
    f = np.outer(f, f) if f.ndim == 1 else f
    f = f[::-1, ::-1] if flip_filter else f

    B, C, H, W = x.shape
    out = []
    for image in x.reshape(B * C, H, W):
        stuffed = np.zeros((H * up_y, W * up_x))
        stuffed[::up_y, ::up_x] = image
        canvas = np.pad(stuffed, ((max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))))
        canvas = canvas[max(-y0, 0) : canvas.shape[0] - max(-y1, 0), max(-x0, 0) : canvas.shape[1] - max(-x1, 0)]
        out.append(gain * scipy.signal.convolve2d(canvas, f, mode="valid")[::down_y, ::down_x])
    return np.stack(out).reshape(B, C, *out[0].shape)


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("taps", SEPARABLE)
@pytest.mark.parametrize("case", CASES)
def test_upfirdn2d_separable_equals_scipy(case: str, taps: int) -> None:
    x, f = image(2, 3, 9, 11), torch.tensor(SEPARABLE[taps])
    expected = scipy_upfirdn2d(x.numpy(), f.numpy(), **CASES[case])
    np.testing.assert_allclose(upfirdn2d(x, f, **CASES[case]), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (4, 4)])
@pytest.mark.parametrize("case", CASES)
def test_upfirdn2d_matrix_equals_scipy(case: str, shape: tuple[int, int]) -> None:
    x, f = image(2, 3, 9, 11), image(*shape, dtype=torch.float32, seed=1)
    expected = scipy_upfirdn2d(x.numpy(), f.numpy(), **CASES[case])
    np.testing.assert_allclose(upfirdn2d(x, f, **CASES[case]), expected, atol=1e-12)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 5)])
def test_upfirdn2d_agrees_with_scipy_upfirdn(up: int, down: int) -> None:
    """SciPy's own upfirdn, along each axis, is the case of full padding."""
    x, f = image(1, 2, 11, 8), torch.tensor(SEPARABLE[6])
    full = (5, 5 - (up - 1))  # SciPy stuffs no zeros after the last sample
    expected = scipy.signal.upfirdn(f.numpy(), x.numpy(), up, down, axis=-1)
    expected = scipy.signal.upfirdn(f.numpy(), expected, up, down, axis=-2)
    np.testing.assert_allclose(upfirdn2d(x, f, up=up, down=down, padding=full * 2), expected, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=str
)
def test_upfirdn2d_keeps_type_and_memory_format(
    channels: int, memory_format: torch.memory_format, dtype: torch.dtype, tolerance: float
) -> None:
    x = image(2, channels, 8, 8).to(dtype).contiguous(memory_format=memory_format)
    for taps in SEPARABLE.values():
        f = setup_filter([abs(tap) for tap in taps])
        y = upfirdn2d(x, f, up=2, down=(1, 2), padding=6)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        expected = scipy_upfirdn2d(x.double().numpy(), f.double().numpy(), up=2, down=(1, 2), padding=6)
        np.testing.assert_allclose(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("f", [torch.tensor(SEPARABLE[3]), torch.tensor(SEPARABLE[6]), image(2, 3).float()])
@pytest.mark.parametrize("case", CASES)
def test_upfirdn2d_is_its_own_transpose(case: str, f: Tensor) -> None:
    """The operator is linear: its derivative is the transpose of its matrix, and the derivative of that the matrix."""
    x = image(1, 1, 9, 11).requires_grad_()
    y = upfirdn2d(x, f, **CASES[case])
    basis = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    matrix = upfirdn2d(basis.squeeze(1), f, **CASES[case]).flatten(1).t()  # (outputs, inputs)

    v = image(*y.shape, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, v, create_graph=True)
    np.testing.assert_allclose(grad.detach().flatten(), matrix.t() @ v.detach().flatten(), atol=1e-12)
    u = image(*x.shape, seed=2)
    (double,) = torch.autograd.grad(grad, v, u)
    np.testing.assert_allclose(double.flatten(), matrix @ u.flatten(), atol=1e-12)


@pytest.mark.parametrize("f", [torch.tensor(SEPARABLE[4]), torch.tensor(SEPARABLE[6]), image(2, 3).float()])
def test_upfirdn2d_derivatives(f: Tensor) -> None:
    x = image(1, 2, 4, 3).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return upfirdn2d(x, f, up=2, down=(1, 2), padding=(2, 3, -1, 3))

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_upsample2d_formula() -> None:
    """out[2i] = x[i-1]/4 + 3x[i]/4 and out[2i+1] = 3x[i]/4 + x[i+1]/4 along each axis, zeros outside."""
    x = image(2, 3, 5, 4)
    expected = x
    for axis in (2, 3):
        size = expected.shape[axis]
        edge = torch.zeros_like(expected.narrow(axis, 0, 1))
        padded = torch.cat([edge, expected, edge], dim=axis)
        before, after = padded.narrow(axis, 0, size), padded.narrow(axis, 2, size)
        pairs = [before / 4 + expected * 3 / 4, expected * 3 / 4 + after / 4]
        expected = torch.stack(pairs, dim=axis + 1).flatten(axis, axis + 1)
    torch.testing.assert_close(upsample2d(x, setup_filter([1, 3, 3, 1])), expected)


def test_upsample2d_is_bilinear_inside() -> None:
    x = image(1, 2, 6, 8)
    bilinear = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    y = upsample2d(x, setup_filter([1, 3, 3, 1]))
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], bilinear[:, :, 1:-1, 1:-1])


def test_downsample2d_formula() -> None:
    x = image(1, 1, 6, 8)
    padded = torch.nn.functional.pad(x, [1, 1, 1, 1])
    rows = (padded[:, :, :-3:2] + 3 * padded[:, :, 1:-2:2] + 3 * padded[:, :, 2:-1:2] + padded[:, :, 3::2]) / 8
    both = (rows[..., :-3:2] + 3 * rows[..., 1:-2:2] + 3 * rows[..., 2:-1:2] + rows[..., 3::2]) / 8
    torch.testing.assert_close(downsample2d(x, setup_filter([1, 3, 3, 1])), both)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("factor", [1, 2, (2, 1), (1, 3), 3])
def test_up_and_down_sizes(factor: int | tuple[int, int], taps: int) -> None:
    f = setup_filter([1.0] * taps)
    x = image(1, 2, 6, 8, dtype=torch.float32)
    factor_x, factor_y = (factor, factor) if isinstance(factor, int) else factor
    up = upsample2d(x, f, factor)
    assert up.shape == (1, 2, 6 * factor_y, 8 * factor_x)
    assert downsample2d(up, f, factor).shape == x.shape
    assert upsample2d(x, f, factor, padding=(1, 2)).shape == (1, 2, 6 * factor_y + 4, 8 * factor_x + 2)


def test_up_and_down_keep_the_brightness() -> None:
    flat = torch.ones(1, 1, 16, 16)
    for f in (setup_filter([1, 3, 3, 1]), setup_filter([[1, 2, 1, 0], [0, 1, 2, 1], [1, 2, 1, 0], [0, 1, 2, 1]])):
        torch.testing.assert_close(upsample2d(flat, f)[:, :, 4:-4, 4:-4], torch.ones(1, 1, 24, 24))
        torch.testing.assert_close(downsample2d(flat, f)[:, :, 2:-2, 2:-2], torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(upsample2d(flat, setup_filter([1, 1]), gain=3)[0, 0, 9], torch.full((32,), 3.0))


def test_flip_filter_in_up_and_down() -> None:
    x, f = image(1, 1, 8, 8), torch.tensor(SEPARABLE[4])
    torch.testing.assert_close(upsample2d(x, f, flip_filter=True), upsample2d(x, f.flip(0)))
    torch.testing.assert_close(downsample2d(x, f, flip_filter=True), downsample2d(x, f.flip(0)))


def test_setup_filter() -> None:
    assert setup_filter([1, 3, 3, 1]).tolist() == [0.125, 0.375, 0.375, 0.125]
    assert setup_filter([[1, 3], [3, 1]]).tolist() == [[0.125, 0.375], [0.375, 0.125]]
    assert setup_filter([1, 3], normalize=False).tolist() == [1, 3]
    assert setup_filter([[1, 3]], normalize=False, gain=2).tolist() == [[2, 6]]
    assert setup_filter([1, 1], gain=4).tolist() == [1, 1]  # twice along each axis: 4 for an image
    assert setup_filter(torch.ones(2, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("f", [1.0, [], [[[1.0]]]])
def test_setup_filter_refuses_shapes(f: object) -> None:
    with pytest.raises(ValueError, match="vector"):
        setup_filter(f)  # type: ignore[arg-type]


def test_setup_filter_refuses_to_normalise_zero() -> None:
    with pytest.raises(ValueError, match="normalize=False"):
        setup_filter([1, -1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"up": 0}, "up=0"),
        ({"down": (1, -2)}, "down="),
        ({"padding": (1, 2, 3)}, "padding="),
        ({"padding": -2}, "smaller than the filter"),
    ],
)
def test_upfirdn2d_refuses(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upfirdn2d(image(1, 1, 6, 6), setup_filter([1, 3, 3, 1]), **kwargs)  # type: ignore[arg-type]


def test_upfirdn2d_refuses_other_ranks_and_learned_filters() -> None:
    f = setup_filter([1, 3, 3, 1])
    with pytest.raises(ValueError, match="B, C, H, W"):
        upfirdn2d(image(1, 6, 6), f)
    with pytest.raises(ValueError, match="constant"):
        upfirdn2d(image(1, 1, 6, 6), f.requires_grad_())


# Each activation's formula in NumPy, with its default gain.
FORMULAS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "linear": (lambda x: x, 1),
    "relu": (lambda x: np.maximum(x, 0), math.sqrt(2)),
    "lrelu": (lambda x: np.where(x < 0, 0.2 * x, x), math.sqrt(2)),
    "tanh": (np.tanh, 1),
    "sigmoid": (scipy.special.expit, 1),
    "elu": (lambda x: np.where(x < 0, np.expm1(x), x), 1),
    "selu": (lambda x: 1.0507009873554805 * np.where(x < 0, 1.6732632423543772 * np.expm1(x), x), 1),
    "softplus": (lambda x: np.logaddexp(0, x), 1),
    "swish": (lambda x: x * scipy.special.expit(x), math.sqrt(2)),
}


def test_every_activation_has_a_formula() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("act", FORMULAS)
def test_bias_act_formulas(act: str) -> None:
    x, b = image(2, 3, 4, 5), image(3, seed=1)
    function, gain = FORMULAS[act]
    y = function(x.numpy() + b.numpy()[:, None, None])
    np.testing.assert_allclose(bias_act(x, b, act=act), y * gain, atol=1e-12)
    np.testing.assert_allclose(bias_act(x, b, act=act, gain=3.0), y * 3, atol=1e-12)
    np.testing.assert_allclose(bias_act(x, b, act=act, clamp=0.5), np.clip(y * gain, -0.5, 0.5), atol=1e-12)
    np.testing.assert_allclose(bias_act(x, act=act), function(x.numpy()) * gain, atol=1e-12)


@pytest.mark.parametrize("act", FORMULAS)
@pytest.mark.parametrize("clamp", [None, 0.4])
def test_bias_act_derivatives(act: str, clamp: float | None) -> None:
    x, b = image(2, 3, 2).requires_grad_(), image(3, seed=1).requires_grad_()

    def function(x: Tensor, b: Tensor) -> Tensor:
        return bias_act(x, b, act=act, gain=1.3, clamp=clamp)

    assert torch.autograd.gradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(function, (x, b))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_bias_act_adds_along_dim(dim: int) -> None:
    x = image(2, 3, 4)
    b = image(x.shape[dim], seed=1)
    expected = torch.movedim(torch.movedim(x, dim, -1) + b, -1, dim)
    torch.testing.assert_close(bias_act(x, b, dim=dim), expected)


def test_bias_act_alpha() -> None:
    x = torch.tensor([[-2.0, 3.0]])
    torch.testing.assert_close(bias_act(x, act="lrelu", alpha=0.5, gain=1.0), torch.tensor([[-1.0, 3.0]]))
    torch.testing.assert_close(bias_act(x, act="elu", alpha=2.0), torch.tensor([[2 * math.expm1(-2), 3.0]]))
    with pytest.raises(ValueError, match=r"alpha=0\.5"):
        bias_act(x, act="relu", alpha=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias_act_keeps_type_format_and_input(dtype: torch.dtype) -> None:
    x = image(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    y = bias_act(x, torch.ones(3), act="lrelu", clamp=2.0)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"act": "gelu"}, r"act='gelu'.*linear, relu, lrelu"),
        ({"clamp": -1.0}, r"clamp=-1\.0"),
        ({"b": torch.zeros(4)}, r"bias has shape \[4\]"),
        ({"b": torch.zeros(3, 1)}, r"bias has shape \[3, 1\]"),
    ],
)
def test_bias_act_refuses(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_act(image(2, 3, 4), **kwargs)  # type: ignore[arg-type]
