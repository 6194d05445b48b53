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

from torch_utils import custom_ops
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
    "crop-all-samples": {"padding": (-12, 20, 1, 2)},
    "crop-all-samples-between": {"up": 2, "down": (1, 2), "padding": (1, 3, 15, -20)},
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
    """Definition in float64, step by step: insert zeros, pad or crop, convolve, keep every `down`-th sample."""
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
    """scipy.signal.upfirdn along each axis corresponds to full padding."""
    x, f = image(1, 2, 11, 8), torch.tensor(SEPARABLE[6])
    full = (5, 5 - (up - 1))  # SciPy inserts no zeros after the last sample
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
    """The operator is linear: its gradient is the transpose of its matrix, and the second derivative is the matrix."""
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


def test_up_and_down_keep_the_mean() -> None:
    flat = torch.ones(1, 1, 16, 16)
    for f in (setup_filter([1, 3, 3, 1]), setup_filter([[1, 2, 1, 0], [0, 1, 2, 1], [1, 2, 1, 0], [0, 1, 2, 1]])):
        torch.testing.assert_close(upsample2d(flat, f)[:, :, 4:-4, 4:-4], torch.ones(1, 1, 24, 24))
        torch.testing.assert_close(downsample2d(flat, f)[:, :, 2:-2, 2:-2], torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(upsample2d(flat, setup_filter([1, 1]), gain=3)[0, 0, 9], torch.full((32,), 3.0))


def test_flip_filter_reverses_the_taps_in_up_and_down() -> None:
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
def test_upfirdn2d_refuses_invalid_arguments(kwargs: dict[str, object], message: str) -> None:
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
def test_bias_act_refuses_invalid_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_act(image(2, 3, 4), **kwargs)  # type: ignore[arg-type]


# Operators registered with torch.library. On a CPU they run the reference, so registration, shapes and
# derivatives are tested here; test_kernels.py tests the kernels that replace the reference on a GPU.


def samples_of_bias_act(act: str, device: str = "cpu") -> list[tuple[Any, ...]]:
    alpha = ACTIVATIONS[act].alpha or 0.0
    x, b = image(2, 3, 4, 2).to(device).requires_grad_(), image(3, seed=1).to(device).requires_grad_()
    channels_last = image(2, 3, 4, 2).to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    return [
        (x, b, 1, act, alpha, 1.3, -1.0),
        (channels_last, b, 1, act, alpha, 1.3, 0.4),
        (x, None, 3, act, alpha, -0.8, 0.4),
        (image(5, 3).to(device), b, 1, act, alpha, 1.0, -1.0),
    ]


def samples_of_upfirdn2d(device: str = "cpu") -> list[tuple[Any, ...]]:
    x = image(1, 2, 4, 3).to(device).requires_grad_()
    channels_last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    f, matrix = torch.tensor(SEPARABLE[4], device=device), image(2, 3).to(device)
    return [
        (x, f, (2, 1), (1, 2), (2, 3, -1, 3), False, 1.5),
        (channels_last, f, (2, 2), (1, 1), (2, 1, 2, 1), True, 1.0),
        (x, matrix, (1, 1), (2, 3), (3, 3, 3, 3), False, -2.0),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by opcheck itself
@pytest.mark.parametrize("act", ["lrelu", "swish"])  # piecewise linear, and smooth
def test_bias_act_is_registered(act: str) -> None:
    for sample in samples_of_bias_act(act):
        torch.library.opcheck(torch.ops.styleformer.bias_act.default, sample)
        x, b, *options = sample
        grad = image(*x.shape, seed=2).contiguous(
            memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format
        )
        torch.library.opcheck(torch.ops.styleformer.bias_act_grad.default, (grad, x.detach(), b, *options))
        torch.library.opcheck(
            torch.ops.styleformer.bias_act_grad2.default,
            (grad, grad * 2, x.detach(), None if b is None else b.detach(), *options),
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by opcheck itself
def test_upfirdn2d_is_registered() -> None:
    for sample in samples_of_upfirdn2d():
        torch.library.opcheck(torch.ops.styleformer.upfirdn2d.default, sample)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_of_the_operator_bias_act(act: str) -> None:
    for x, b, *options in samples_of_bias_act(act):
        inputs = tuple(tensor for tensor in (x.detach().requires_grad_(), b) if tensor is not None)

        def function(x: Tensor, b: Tensor | None = None, options: list[Any] = options) -> Tensor:
            return torch.ops.styleformer.bias_act(x, b, *options)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_derivatives_of_the_operator_upfirdn2d() -> None:
    for x, *options in samples_of_upfirdn2d():

        def function(x: Tensor, options: list[Any] = options) -> Tensor:
            return torch.ops.styleformer.upfirdn2d(x, *options)

        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_the_operator_has_no_third_derivative() -> None:
    x = image(4, 3).requires_grad_()
    y = torch.ops.styleformer.bias_act(x, None, 1, "swish", 0.0, 1.0, -1.0)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        torch.autograd.grad(second.sum(), x)


def test_bias_gradient_sums_in_float32() -> None:
    """4099 is not representable in bfloat16."""
    x, b = torch.zeros(4099, 2, dtype=torch.bfloat16), torch.zeros(2, requires_grad=True)
    y = torch.ops.styleformer.bias_act(x, b, 1, "linear", 0.0, 1.0, 2.0)
    y.backward(torch.ones_like(y))
    assert b.grad is not None
    assert b.grad.tolist() == [4099, 4099]


def test_piecewise_linear_activations_keep_only_their_output() -> None:
    """The input can be freed: the next layer keeps the output anyway."""
    x, b = image(2, 3), image(3).requires_grad_()
    for act, alpha, gain, kept in (
        ("lrelu", 0.2, 1.0, 1),
        ("relu", 0.0, 2.0, 1),
        ("lrelu", 0.2, -1.0, 2),
        ("elu", 1.0, 1.0, 2),
    ):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):  # type: ignore[misc]
            y = torch.ops.styleformer.bias_act(x, b, 1, act, alpha, gain, 1.0)
        assert len(saved) == kept
        assert (saved[0].data_ptr() == y.data_ptr()) == (kept == 1)


def operators_in(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture
def operators_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the public functions call the registered operators as on a GPU; here, the operators run the reference."""
    monkeypatch.setattr(custom_ops, "use_kernels", lambda impl, x: True)


@pytest.mark.usefixtures("operators_on_cpu")
def test_public_functions_through_the_operators() -> None:
    x, b = image(2, 3, 9, 11), image(3, seed=1)
    for act in ACTIVATIONS:
        y = bias_act(x, b, act=act, clamp=0.7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(custom_ops, "use_kernels", lambda impl, x: False)
            expected = bias_act(x, b, act=act, clamp=0.7)
        torch.testing.assert_close(y, expected)
    for case in CASES.values():
        for f in (torch.tensor(SEPARABLE[4]), torch.tensor(SEPARABLE[6]), image(2, 3).float()):
            definition = scipy_upfirdn2d(x.numpy(), f.numpy(), **case)
            np.testing.assert_allclose(upfirdn2d(x, f, **case), definition, atol=1e-12)


@pytest.mark.usefixtures("operators_on_cpu")
def test_compile_and_export_see_one_operator() -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(operators_in(graph))
        return graph

    def network(x: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return upsample2d(bias_act(x, b, act="lrelu", clamp=0.7), f)

    x, b, f = image(2, 3, 8, 6), image(3, seed=1), setup_filter([1, 3, 3, 1])
    expected = network(x, b, f)
    torch.testing.assert_close(torch.compile(network, backend=backend, fullgraph=True)(x, b, f), expected)
    assert graphs == [["styleformer.bias_act.default", "styleformer.upfirdn2d.default"]]

    class Network(torch.nn.Module):
        def forward(self, x: Tensor, b: Tensor, f: Tensor) -> Tensor:
            return network(x, b, f)

    exported = torch.export.export(Network(), (x, b, f))
    assert [name for name in operators_in(exported.graph_module) if "styleformer" in name] == graphs[0]
    torch.testing.assert_close(exported.module()(x, b, f), expected)

    x.requires_grad_()
    (grad,) = torch.autograd.grad(network(x, b, f).square().sum(), x)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    (compiled_grad,) = torch.autograd.grad(compiled(x, b, f).square().sum(), x)
    torch.testing.assert_close(compiled_grad, grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # a warning of torch 2.11 itself
def test_compile_on_the_cpu_traces_the_reference() -> None:
    x, f = image(2, 3, 8, 6), setup_filter([1, 3, 3, 1])

    def network(x: Tensor) -> Tensor:
        return upsample2d(bias_act(x, act="lrelu"), f)

    torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))


def test_impl_on_a_cpu() -> None:
    x, f = image(1, 1, 4, 4), setup_filter([1, 3, 3, 1])
    assert torch.equal(bias_act(x, impl="reference"), bias_act(x))
    assert torch.equal(upsample2d(x, f, impl="reference"), upsample2d(x, f))
    with pytest.raises(ValueError, match=r"impl='cuda' on torch.float64 on cpu.*impl='auto'"):
        bias_act(x, impl="cuda")
    with pytest.raises(ValueError, match=r"impl='cuda' on torch\.float64 on cpu"):
        downsample2d(x, f, impl="cuda")
    with pytest.raises(ValueError, match="impl='gpu': choose one of auto, reference, cuda"):
        bias_act(x, impl="gpu")  # type: ignore[arg-type]


gpu = pytest.mark.gpu
GPU_DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)]


def assert_close_to_float64(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with float64; `tolerance` is relative to the largest value, because sums lose smaller terms."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=tolerance, atol=tolerance * scale)


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), GPU_DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_on_gpu(act: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the kernels and the gradients of x and b with the float64 reference."""
    for shape, dim in (((4, 64, 33, 33), 1), ((2, 64, 32), 2), ((8, 512), 1), ((0, 3, 2, 2), 1), ((5, 7, 9, 1), 1)):
        for memory_format in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
            x = image(*shape).to("cuda", dtype).contiguous(memory_format=memory_format).requires_grad_()
            b = image(shape[dim], seed=1).to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
            b.requires_grad_()
            grad = image(*shape, seed=2).to("cuda", dtype)
            x64, b64 = (tensor.detach().double().cpu().requires_grad_() for tensor in (x, b))
            # no value is close enough to the clamp for rounding to matter
            y = bias_act(x, b, dim=dim, act=act, clamp=50.0, impl="cuda")
            y64 = bias_act(x64, b64, dim=dim, act=act, clamp=50.0)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=memory_format) or not y.numel()
            assert_close_to_float64(y.detach(), y64.detach(), tolerance)
            grads = torch.autograd.grad(y, (x, b), grad)
            for ours, expected in zip(grads, torch.autograd.grad(y64, (x64, b64), grad.double().cpu()), strict=True):
                assert_close_to_float64(ours, expected, tolerance)


@gpu
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_of_bias_act_on_gpu(act: str) -> None:
    for x, b, *options in samples_of_bias_act(act, "cuda"):
        inputs = tuple(tensor for tensor in (x.detach().requires_grad_(), b) if tensor is not None)

        def function(x: Tensor, b: Tensor | None = None, options: list[Any] = options) -> Tensor:
            return torch.ops.styleformer.bias_act(x, b, *options)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), GPU_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_upfirdn2d_on_gpu(
    channels: int, memory_format: torch.memory_format, dtype: torch.dtype, tolerance: float
) -> None:
    """Compare the kernels and their gradients with the float64 reference, for the networks' filters and others."""
    filters = [torch.tensor(taps) for taps in SEPARABLE.values()]
    filters += [setup_filter([1, 2, 3, 5, 8, 9, 9, 8, 5, 3, 2, 1]), image(4, 4).float()]
    cases: list[dict[str, Any]] = [
        {"padding": 6},
        {"up": 2, "padding": 7},
        {"down": 2, "padding": 6},
        {"up": (3, 2), "down": 2, "padding": 9},
    ]
    for size in ((33, 33), (16, 20)):
        x = image(2, channels, *size).to("cuda", dtype).contiguous(memory_format=memory_format).requires_grad_()
        x64 = x.detach().double().cpu().requires_grad_()
        for f in filters:
            f = f / f.abs().sum()
            for case in cases:
                y, y64 = upfirdn2d(x, f.cuda(), impl="cuda", **case), upfirdn2d(x64, f.double(), **case)
                assert y.dtype == dtype
                assert y.is_contiguous(memory_format=memory_format)
                assert_close_to_float64(y.detach(), y64.detach(), tolerance)
                grad = image(*y.shape, seed=3).to("cuda", dtype)
                (ours,) = torch.autograd.grad(y, x, grad)
                (expected,) = torch.autograd.grad(y64, x64, grad.double().cpu())
                assert_close_to_float64(ours, expected, tolerance)


@gpu
def test_derivatives_of_upfirdn2d_on_gpu() -> None:
    for x, *options in samples_of_upfirdn2d("cuda"):

        def function(x: Tensor, options: list[Any] = options) -> Tensor:
            return torch.ops.styleformer.upfirdn2d(x, *options)

        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def gpu_network(x: Tensor, b: Tensor, f: Tensor) -> Tensor:
    y = bias_act(x, b, act="lrelu", clamp=256.0)
    return downsample2d(upsample2d(y, f), f)


@gpu
def test_cuda_graph_replays_the_kernels() -> None:
    x, b, f = torch.randn(4, 8, 32, 32).cuda(), torch.randn(8).cuda(), setup_filter([1, 3, 3, 1]).cuda()
    x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = gpu_network(x, b, f)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, step())


@gpu
@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile about its own internals
def test_compiled_network_runs_the_kernels() -> None:
    x, b, f = torch.randn(4, 8, 32, 32).cuda(), torch.randn(8).cuda(), setup_filter([1, 3, 3, 1]).cuda()
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append([name for name in operators_in(graph) if "styleformer" in name])
        return graph

    torch.compile(gpu_network, backend=backend, fullgraph=True)(x, b, f)
    assert [len(names) for names in graphs] == [3]
    x.requires_grad_()
    y, expected = torch.compile(gpu_network, fullgraph=True)(x, b, f), gpu_network(x, b, f)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(output.square().sum(), x)[0] for output in (y, expected)]
    torch.testing.assert_close(*grads)


@gpu
def test_filter_and_bias_on_another_device_are_refused() -> None:
    x = torch.zeros(1, 2, 8, 8, device="cuda")
    with pytest.raises(ValueError, match="bias is on cpu, x on cuda:0"):
        bias_act(x, torch.zeros(2), impl="cuda")
    with pytest.raises(ValueError, match="filter is on cpu, x on cuda:0"):
        upsample2d(x, setup_filter([1, 3, 3, 1]), impl="cuda")


@gpu
def test_more_than_2_to_the_32_elements_on_gpu() -> None:
    x = torch.zeros(2**17 + 3, 33, 32, 32, dtype=torch.float16, device="cuda")
    b = torch.arange(33, dtype=torch.float32, device="cuda")
    y = bias_act(x, b, impl="cuda")
    assert (y[-1] == b[:, None, None]).all()
    assert (y[:, :, 0, 0] == b).all()
    f = setup_filter([1, 1, 1, 1]).cuda()
    z = upfirdn2d(y, f, down=2, padding=1, impl="cuda")
    torch.testing.assert_close(z[-1, :, 8, 8], b.half())
