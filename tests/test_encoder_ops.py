"""Operators of the encoder block: references, derivatives, selection, and the Triton kernels.

Without a GPU, Triton's interpreter runs the kernels in a child process, and Triton compiles them for GPUs. The
interpreter truncates bfloat16, which a GPU rounds.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_utils.ops
from dnnlib.config import UserError
from torch_utils import custom_ops, distributed
from torch_utils.ops import encoder
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.encoder import modulated_layer_norm, residual_lrelu, scale_and_split

HALF_TYPES = (torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GUARD = 64  # guard elements around every output
operators: Any = torch.ops.styleformer
module: Any = encoder  # without types, to pass lists of arguments


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape and options of a comparison; `strided` inputs are chunks of tensors with more channels."""

    B: int
    N: int
    C: int
    maps: int = 1
    clamp: float | None = None
    strided: bool = False

    def tokens(self, seed: int, dtype: torch.dtype, factor: int = 1) -> Tensor:
        """Return tokens (B, N, factor C)."""
        x = normal(self.B, self.N, factor * self.C * 3, seed=seed, dtype=dtype)
        x = x.chunk(3, dim=2)[1]
        return x if self.strided else x.contiguous()

    def vector(self, seed: int, dtype: torch.dtype, factor: int = 1) -> Tensor:
        """Return one vector per image (B, factor C)."""
        x = normal(self.B, factor * self.C * 2, seed=seed, dtype=dtype).chunk(2, dim=1)[1]
        return x if self.strided else x.contiguous()

    def residual(self, dtype: torch.dtype) -> list[Tensor]:
        """Return a, r, da, dr, noise, strength and bias; the vectors in float32 if `dtype` is a half type."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        noise, strength = normal(self.maps, self.N, seed=5, dtype=wide), torch.tensor(0.7, dtype=wide)
        return [
            *(self.tokens(1, dtype), self.tokens(2, dtype), self.vector(3, wide), self.vector(4, wide)),
            *(noise, strength, normal(self.C, seed=6, dtype=wide)),
        ]


# No size is a multiple of a tile; rows of 2100 channels exceed the tile.
CASES = [
    Case(B=2, N=13, C=24, clamp=0.9, strided=True),
    Case(B=3, N=70, C=40, maps=3),
    Case(B=1, N=300, C=8, clamp=0.4),
    Case(B=2, N=5, C=2, maps=2, strided=True),
    Case(B=2, N=37, C=600, maps=2, clamp=2.0),  # several tiles in each of several blocks
    Case(B=1, N=3, C=2100, strided=True),
    Case(B=3, N=1, C=1, clamp=1.1),
]
SMALL = [Case(B=2, N=3, C=4, maps=1, clamp=0.8), Case(B=2, N=2, C=3, maps=2, strided=True)]


# Equations in float64, for comparison


def layer_norm_equation(x: Tensor, s: Tensor) -> Tensor:
    v = x * s[:, None]
    deviation = v - v.mean(2, keepdim=True)
    return deviation / (deviation.square().mean(2, keepdim=True) + 1e-5).sqrt()


def residual_equation(*inputs: Tensor, clamp: float | None) -> Tensor:
    a, r, da, dr, noise, strength, bias = inputs
    v = a * da[:, None] + r * dr[:, None] + (strength * noise)[:, :, None] + bias
    v = torch.where(v > 0, v, v / 5)
    return v if clamp is None else v.clamp(-clamp, clamp)


def split_equation(qkv: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    C = scale.shape[1] // 3
    return tuple(qkv[:, :, i : i + C] * scale[:, None, i : i + C] for i in (0, C, 2 * C))


def stepwise_residual(*inputs: Tensor, clamp: float | None) -> Tensor:
    """Compute the residual as separate operators, each of which rounds to the dtype of the tokens."""
    a, r, da, dr, noise, strength, bias = inputs
    plus = (noise * strength).to(a.dtype).unsqueeze(2)
    y = torch.addcmul(torch.addcmul(plus, a, da.unsqueeze(1).to(a.dtype)), r, dr.unsqueeze(1).to(a.dtype))
    return bias_act(y, bias, dim=2, act="lrelu", gain=1.0, clamp=clamp)


def clear_of_clamp(case: Case, dtype: torch.dtype) -> Tensor:
    """Return a mask of the outputs that are not within rounding errors of the clamp."""
    v = residual_equation(*[x.double() for x in case.residual(dtype)], clamp=None)
    return (v.abs() - (case.clamp or math.inf)).abs() > 4 * TOLERANCES[dtype]


def assert_near(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with a float64 tensor, relative to the largest value."""
    assert not y.isnan().any()
    tolerance = TOLERANCES[dtype]
    size = expected.abs().max().item()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance * size)


def gradients(function: Callable[..., Any], inputs: list[Tensor], *grads: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of a function and the gradients of all inputs, in float64."""
    leaves = [x.double().cpu().detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    found = torch.autograd.grad(outputs, leaves, [grad.double().cpu() for grad in grads])
    return [y.detach() for y in outputs], list(found)


# References


@pytest.mark.parametrize("case", CASES, ids=str)
def test_references_equal_the_equations(case: Case) -> None:
    x, s = case.tokens(0, torch.float64), case.vector(1, torch.float64)
    assert_near(modulated_layer_norm(x, s), layer_norm_equation(x, s), x.dtype)
    inputs = case.residual(torch.float64)
    assert_near(residual_lrelu(*inputs, clamp=case.clamp), residual_equation(*inputs, clamp=case.clamp), x.dtype)
    qkv, scale = case.tokens(0, torch.float64, 3), case.vector(1, torch.float64, 3)
    for y, expected in zip(scale_and_split(qkv, scale), split_equation(qkv, scale), strict=True):
        assert_near(y, expected, x.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_references_equal_separate_operators(case: Case) -> None:
    x, s = case.tokens(0, torch.float64), case.vector(1, torch.float64)
    assert_near(modulated_layer_norm(x, s), F.layer_norm(x * s[:, None], (case.C,)), x.dtype)
    inputs = case.residual(torch.float64)
    assert_near(residual_lrelu(*inputs, clamp=case.clamp), stepwise_residual(*inputs, clamp=case.clamp), x.dtype)


@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32, torch.float64], ids=str)
def test_outputs_have_the_type_of_the_tokens(dtype: torch.dtype) -> None:
    case = Case(B=2, N=3, C=4)
    inputs = case.residual(dtype)
    outputs = [
        modulated_layer_norm(inputs[0], inputs[2]),
        residual_lrelu(*inputs),
        *scale_and_split(case.tokens(0, dtype, 3), case.vector(0, torch.float32, 3)),
    ]
    assert {y.dtype for y in outputs} == {dtype}


def test_layer_norm_does_not_overflow_in_float16() -> None:
    x = torch.tensor([[[60000.0, -30000.0, 0.0, 10000.0]]], dtype=torch.float16)
    s = torch.full((1, 4), 100.0)
    assert_near(modulated_layer_norm(x, s), layer_norm_equation(x.double(), s.double()), x.dtype)


# Derivatives of the operators on a CPU, which share the autograd functions with the kernels


def layer_norm(x: Tensor, s: Tensor) -> Tensor:
    return operators.modulated_layer_norm(x, s)[0]


def residual(case: Case) -> Callable[..., Tensor]:
    return lambda *inputs: operators.residual_lrelu(*inputs, -1.0 if case.clamp is None else case.clamp)


def check_twice(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Check first and second derivatives, of all inputs and of each alone."""
    assert torch.autograd.gradcheck(function, [x.detach().requires_grad_() for x in inputs])
    assert torch.autograd.gradgradcheck(function, [x.detach().requires_grad_() for x in inputs])
    for i in range(len(inputs)):
        assert torch.autograd.gradcheck(function, [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_derivatives_of_layer_norm(case: Case) -> None:
    check_twice(layer_norm, [case.tokens(0, torch.float64), case.vector(1, torch.float64)])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_derivatives_of_residual(case: Case) -> None:
    inputs = case.residual(torch.float64)
    noise = inputs.pop(4)
    function = residual(case)
    check_twice(lambda *others: function(*others[:4], noise, *others[4:]), inputs)  # noise without gradient: fused
    check_twice(function, case.residual(torch.float64))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_derivatives_of_scale_and_split(case: Case) -> None:
    inputs = [case.tokens(0, torch.float64, 3), case.vector(1, torch.float64, 3)]
    check_twice(operators.scale_and_split, inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_gradients_equal_those_of_the_equations(case: Case) -> None:
    x, s, grad = (case.tokens(0, torch.float64), case.vector(1, torch.float64), case.tokens(2, torch.float64))
    for fused, equation in ((layer_norm, layer_norm_equation), (operators.scale_and_split, split_equation)):
        wide = fused is not layer_norm
        inputs = [case.tokens(0, x.dtype, 3), case.vector(1, x.dtype, 3)] if wide else [x, s]
        grads = [case.tokens(seed, x.dtype) for seed in (2, 3, 4)] if wide else [grad]
        for found, expected in zip(*(gradients(f, inputs, *grads)[1] for f in (fused, equation)), strict=True):
            assert_near(found, expected, x.dtype)


def test_second_derivative_if_one_input_depends_on_another() -> None:
    """The gradient of s alone must not include its effect through x."""
    s = normal(2, 4, seed=0).requires_grad_()
    u = normal(2, 3, 4, seed=1)
    results = []
    for function in (layer_norm, layer_norm_equation):
        x = (s.unsqueeze(1) * u).sin()
        y = function(x, s)
        (ds,) = torch.autograd.grad((y * u).square().sum(), s, create_graph=True)
        (dds,) = torch.autograd.grad(ds.square().sum(), s)
        results.append((ds.detach(), dds))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by opcheck itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_registered_completely(dtype: torch.dtype) -> None:
    case = Case(B=2, N=3, C=4)
    x, s = case.tokens(0, dtype).requires_grad_(), case.vector(1, torch.float32).requires_grad_()
    y, mean, rstd = (y.detach() for y in operators.modulated_layer_norm(x, s))
    a, r, da, dr, noise, strength, bias = (x.requires_grad_() for x in case.residual(dtype))
    qkv, scale = case.tokens(0, dtype, 3).requires_grad_(), case.vector(1, torch.float32, 3)
    calls: dict[str, tuple[Any, ...]] = {
        "modulated_layer_norm": (x, s),
        "modulated_layer_norm_grad": (y, x.detach(), s.detach(), mean, rstd),
        "residual_lrelu": (a, r, da, dr, noise.detach(), strength, bias, 0.5),
        "residual_lrelu_grad": (*(z.detach() for z in (y, y, a, r, da, dr, noise)), 0.5),
        "scale_and_split": (qkv, scale),
        "scale_and_split_grad": (y, y, y, qkv.detach(), scale),
    }
    for name, args in calls.items():
        torch.library.opcheck(
            getattr(operators, name).default,
            args,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


# Kernels in Triton's interpreter


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Process that runs Triton kernels on the CPU: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpret) as pool:
        yield pool


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Make torch.empty return NaN with guards on both sides, and check the guards afterwards."""
    buffers: list[tuple[Tensor, int]] = []

    def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        buffers.append((torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device), size))
        return buffers[-1][0][GUARD : GUARD + size].view(shape)

    with patch.object(torch, "empty", guarded):
        yield
    assert buffers
    for buffer, size in buffers:
        assert buffer[:GUARD].isnan().all()
        assert buffer[GUARD + size :].isnan().all()


def compare_layer_norm(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    x, s, grad = (x.to(device) for x in (case.tokens(0, dtype), case.vector(1, torch.float32), case.tokens(2, dtype)))
    with guarded_outputs():
        y, mean, rstd = module.launch_layer_norm(x, s)
        found = module.launch_layer_norm_grad(grad, x, s, mean, rstd)
    (expected,), slopes = gradients(layer_norm_equation, [x, s], grad)
    assert_near(y, expected, dtype)
    assert found[1].dtype == torch.float32
    for ours, theirs, kind in zip(found, slopes, (dtype, torch.float32), strict=True):
        # The variance of few channels may be small, and its inverse multiplies rounding errors.
        assert_near(ours, theirs, kind if case.C > 2 else torch.float16 if kind == torch.float32 else kind)


def compare_residual(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = [x.to(device) for x in case.residual(dtype)]
    grad = torch.where(clear_of_clamp(case, dtype), case.tokens(7, dtype), 0).to(device)
    clamp = -1.0 if case.clamp is None else case.clamp
    (expected,), slopes = gradients(lambda *inputs: residual_equation(*inputs, clamp=case.clamp), inputs, grad)
    with guarded_outputs():
        y = module.launch_residual_lrelu(*inputs, clamp)
        saved = expected.to(dtype) if device == "cpu" else y  # the interpreter does not round bfloat16
        d_a, d_r, sums = module.launch_residual_lrelu_grad(grad, saved, *inputs[:5], clamp)
    assert_near(y, expected, dtype)
    assert_near(d_a, slopes[0], dtype)
    assert_near(d_r, slopes[1], dtype)
    d_da, d_dr, d_bias, d_strength = sums.split([case.C, case.C, case.C, 1], dim=1)
    found = torch.cat([x.flatten() for x in (d_da, d_dr, d_strength.sum(), d_bias.sum(0))])
    assert_near(found, torch.cat([x.flatten() for x in (*slopes[2:4], *slopes[5:])]), torch.float32)


def compare_split(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    qkv, scale = case.tokens(0, dtype, 3).to(device), case.vector(1, torch.float32, 3).to(device)
    dq, dk, dv = (case.tokens(seed, dtype).to(device) for seed in (2, 3, 4))
    grads = [dq, dk.contiguous(), dv.mT.contiguous().mT]  # three layouts
    with guarded_outputs():
        parts = module.launch_scale_and_split(qkv, scale)
        d_qkv, d_scale = module.launch_scale_and_split_grad(*grads, qkv, scale)
    expected, slopes = gradients(split_equation, [qkv, scale], *grads)
    for ours, theirs in zip((*parts, d_qkv), (*expected, slopes[0]), strict=True):
        assert_near(ours, theirs, dtype)
    assert_near(d_scale, slopes[1], torch.float32)


COMPARISONS = (compare_layer_norm, compare_residual, compare_split)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("compare", COMPARISONS)
def test_interpreted_kernels(
    compare: Callable[[Case, torch.dtype], None], dtype: torch.dtype, interpreter: ProcessPoolExecutor
) -> None:
    for case in CASES:
        interpreter.submit(compare, case, dtype).result()


def compare_special_values() -> None:
    """Check NaN, infinity, and gradients at the clamp and where the clamp is not representable."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    a = torch.tensor([[[math.nan], [math.inf], [-math.inf], [0.0], [-50.0], [3.0]]])
    r = torch.zeros_like(a)
    y = module.launch_residual_lrelu(a, r, one, one, zero.expand(1, 6), zero[0, 0], zero[0], 2.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([math.nan, 2, -2, 0, -2, 2]), equal_nan=True)
    for clamp in (0.4, 0.7, 1.1, 3.3, 256.0 / 3):
        for dtype in (torch.float16, torch.float32):
            a = torch.tensor([[[-2000.0], [-0.1], [0.0], [0.1], [2000.0]]], dtype=dtype)
            r = torch.zeros_like(a)
            y = module.launch_residual_lrelu(a, r, one, one, zero.expand(1, 5), zero[0, 0], zero[0], clamp)
            d_a = module.launch_residual_lrelu_grad(torch.ones_like(a), y, a, r, one, one, zero.expand(1, 5), clamp)[0]
            torch.testing.assert_close(d_a.flatten(), torch.tensor([0, 0.2, 0.2, 1, 0], dtype=dtype))


def compare_far_rows() -> None:
    """Read rows beyond 2^31 elements; the system allocates no memory for the gaps."""
    far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((1, 3, 8), (1, 2**30, 1))
    near = normal(1, 3, 8, seed=0, dtype=torch.float16)
    far.copy_(near)
    s = torch.ones(1, 8)
    for ours, theirs in zip(module.launch_layer_norm(far, s), module.launch_layer_norm(near, s), strict=True):
        assert torch.equal(ours, theirs)


def compare_empty() -> None:
    for B, N in ((0, 3), (2, 0)):
        x, s = torch.zeros(B, N, 4), torch.zeros(B, 4)
        y, mean, rstd = module.launch_layer_norm(x, s)
        dx, ds = module.launch_layer_norm_grad(y, x, s, mean, rstd)
        assert dx.shape == x.shape
        assert torch.equal(ds, s)


@pytest.mark.parametrize("compare", [compare_special_values, compare_far_rows, compare_empty])
def test_interpreted_kernels_at_the_limits(compare: Callable[[], None], interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(compare).result()


# Compilation for GPUs


@dataclass(frozen=True)
class Launch:
    """Substitute of a kernel that records its arguments."""

    kernel: Any
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.calls.append((self.kernel, args, constants))


def compile_for(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], capability: int) -> str:
    """Compile a launch as Triton would on a GPU, and return its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    names = [parameter.name for parameter in kernel.params]
    assert set(names[len(args) :]) == set(constants)
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for i, (name, arg) in enumerate(zip(names, args, strict=False)):
        if isinstance(arg, Tensor):
            signature[name] = "*" + {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[arg.dtype]
        else:
            signature[name] = "fp32" if isinstance(arg, float) else "i32"
        if isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0 and name not in ("N", "blocks")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {name: signature[name] for name in names}, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


KERNELS = tuple(
    name + suffix for name in ("modulated_layer_norm", "residual_lrelu", "scale_and_split") for suffix in ("", "_grad")
)


def launch_all(case: Case, dtype: torch.dtype) -> None:
    x, s = case.tokens(0, dtype), case.vector(1, torch.float32)
    y, mean, rstd = module.launch_layer_norm(x, s)
    module.launch_layer_norm_grad(y, x, s, mean, rstd)
    inputs = case.residual(dtype)
    module.launch_residual_lrelu(*inputs, 0.5)
    module.launch_residual_lrelu_grad(y, y, *inputs[:5], 0.5)
    qkv, scale = case.tokens(0, dtype, 3), case.vector(1, torch.float32, 3)
    module.launch_scale_and_split_grad(*module.launch_scale_and_split(qkv, scale), qkv, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_the_kernels(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from torch_utils.ops import encoder_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    calls: list[Any] = []
    for name in KERNELS:
        monkeypatch.setattr(encoder_kernels, name, Launch(getattr(encoder_kernels, name), calls))
    case = Case(B=2, N=64, C=256, maps=2, clamp=0.5)
    launch_all(case, dtype)
    assert len(calls) == len(KERNELS)
    for kernel, args, constants in calls:
        ptx = compile_for(kernel, args, constants, capability)
        assert f".target sm_{capability}" in ptx
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx), kernel  # 16 bytes at once
        if dtype == torch.bfloat16:
            assert "cvt.rn.bf16" in ptx  # rounds to nearest


# Selection of the implementation


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the result of an earlier try, and restore it afterwards."""
    monkeypatch.setattr(encoder, "_state", encoder._State())


def fake_inputs() -> list[Tensor]:
    """Return a token tensor and a style without data on a GPU. Must run in FakeTensorMode."""
    return [torch.empty(2, 3, 4, device="cuda", dtype=torch.bfloat16), torch.empty(2, 4, device="cuda")]


class Names(TorchDispatchMode):
    """Collect the names of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def names_of_layer_norm() -> list[str]:
    with FakeTensorMode():
        inputs = fake_inputs()
        with Names() as names:
            y = modulated_layer_norm(*inputs)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 4), torch.bfloat16, "cuda")
    return names.names


def test_auto_selects_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "why_not", lambda: None)
    assert names_of_layer_norm() == ["styleformer::modulated_layer_norm"]
    with custom_ops.implementation("reference"):
        assert "aten::native_layer_norm" in names_of_layer_norm()


def test_auto_does_not_try_the_kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "why_not", lambda: pytest.fail("tried the kernels"))
    x = torch.zeros(2, 3, 4)
    assert not encoder.use_kernels("auto", x)
    with FakeTensorMode():
        inputs = fake_inputs()
        assert not encoder.use_kernels("auto", inputs[0].double())
        assert not encoder.use_kernels("reference", inputs[0])
    with pytest.raises(ValueError, match=r"impl='cuda' on torch.float32 on cpu: .* torch.float32, torch.float16"):
        modulated_layer_norm(x, x[:, 0], impl="cuda")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'"), "ModuleNotFoundError: No module named 'triton'"),
        (
            subprocess.CalledProcessError(1, ["gcc"]),
            "gcc failed; Triton needs a C compiler and the headers of Python (python3-dev)",
        ),
        (RuntimeError("no\nC compiler"), "RuntimeError: no C compiler"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failure_is_reported_once(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(encoder, "_kernels", fail)
    for _ in range(2):
        assert "aten::native_layer_norm" in names_of_layer_norm()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Encoder kernels: using the PyTorch reference: {reason}")
    with FakeTensorMode(), pytest.raises(RuntimeError, match=re.escape(f"impl='cuda': {reason}")):
        modulated_layer_norm(*fake_inputs(), impl="cuda")


@pytest.mark.usefixtures("_fresh")
def test_a_torch_without_triton_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "torch_utils.ops.encoder_kernels", raising=False)
    monkeypatch.delattr(torch_utils.ops, "encoder_kernels", raising=False)
    assert "triton" in (encoder.why_not() or "")


def test_the_operators_do_not_import_triton() -> None:
    code = "import sys; import torch_utils.ops.encoder; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", ["launch_layer_norm", "launch_residual_lrelu_grad", "launch_scale_and_split"])
def test_kernels_that_compute_wrong_values_are_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of a run compares every kernel with the CPU; here, the CPU operators replace the kernels."""
    for launcher in (name for name in vars(encoder) if name.startswith("launch_")):
        monkeypatch.setattr(encoder, launcher, getattr(encoder, f"{launcher.removeprefix('launch')}_cpu"))
    encoder._check_all(torch.device("cpu"))
    right = getattr(encoder, name)

    def wrong(*args: Any) -> Any:
        *others, last = [x] if isinstance(x := right(*args), Tensor) else x
        return (*others, last * 1.05)

    wrong.__name__ = name
    monkeypatch.setattr(encoder, name, wrong)
    with pytest.raises(RuntimeError, match=f"{name} computes wrong values on this GPU"):
        encoder._check_all(torch.device("cpu"))


def test_the_check_of_the_kernels_passes_on_a_cpu(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(encoder._check_all, torch.device("cpu")).result()


def test_a_kernel_that_fails_during_training_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **constants: Any) -> None:
        raise RuntimeError("out of resource:\nshared memory")

    kernels = SimpleNamespace(modulated_layer_norm=defaultdict(lambda: fail))  # by number of programs
    monkeypatch.setattr(encoder, "_kernels", lambda: kernels)
    problem = "layer_norm failed for 600 channels in torch.float32: RuntimeError: out of resource: shared memory"
    with pytest.raises(UserError, match=re.escape(problem) + ".*--set run.kernels=operators"):
        encoder.launch_layer_norm(torch.ones(2, 6, 600), torch.ones(2, 600))


@pytest.mark.usefixtures("_fresh")
def test_all_processes_use_the_reference_if_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_check_all", lambda device: None)
    monkeypatch.setattr(encoder, "_kernels", lambda: None)
    assert encoder.prepare(torch.device("cpu")) == "Encoder kernels: compiled"
    assert encoder.why_not() is None

    monkeypatch.setattr(distributed, "all_reduce", lambda x: x + 1)  # another process failed
    reason = "1 of 1 processes could not compile the kernels"
    assert encoder.prepare(torch.device("cpu")) == f"Encoder kernels: using the PyTorch reference: {reason}"
    assert encoder.why_not() == reason


@pytest.mark.usefixtures("_fresh")
def test_compiled_functions_try_the_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def fail() -> None:
        calls.append(None)
        raise ImportError

    monkeypatch.setattr(encoder, "_kernels", fail)
    compiled = torch.compile(lambda x: x + 1 if encoder.why_not() is None else x - 1, backend="eager", fullgraph=True)
    for _ in range(2):
        assert compiled(torch.zeros(2)).tolist() == [-1, -1]
    assert len(calls) == 1


def test_malformed_arguments_are_refused() -> None:
    case = Case(B=2, N=3, C=4)
    x, s, qkv = case.tokens(0, torch.float32), case.vector(1, torch.float32), case.tokens(0, torch.float32, 3)
    inputs = case.residual(torch.float32)
    with pytest.raises(ValueError, match=r"s has shape \[2, 3\]: expected \[2, 4\]"):
        modulated_layer_norm(x, s[:, :3])
    with pytest.raises(ValueError, match=r"noise has shape \[1, 2\]: expected \[1, 3\]"):
        module.residual_lrelu(*inputs[:4], inputs[4][:, :2], *inputs[5:])
    with pytest.raises(ValueError, match=r"a is torch.float32, r is torch.float16"):
        module.residual_lrelu(inputs[0], inputs[1].half(), *inputs[2:])
    with pytest.raises(ValueError, match=r"clamp=-1 is negative"):
        residual_lrelu(*inputs, clamp=-1)
    with pytest.raises(ValueError, match=r"qkv has 4 channels: expected a multiple of 3"):
        scale_and_split(x, s)
    with pytest.raises(ValueError, match=r"scale has shape \[2, 4\]: expected \[2, 12\]"):
        scale_and_split(qkv, s)


# Kernels on a GPU

REAL_CASES = [
    Case(B=4, N=1024, C=256, maps=4, clamp=256.0),
    Case(B=2, N=64, C=1024, clamp=1.0),
    Case(B=2, N=1000, C=384, maps=2, strided=True),
    Case(B=1, N=17, C=2048, clamp=0.5),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("compare", COMPARISONS)
def test_kernels_on_a_gpu(compare: Callable[..., None], dtype: torch.dtype) -> None:
    assert encoder.why_not() is None
    for case in CASES + REAL_CASES:
        compare(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_kernels_are_at_least_as_accurate_as_separate_operators(dtype: torch.dtype) -> None:
    for case in REAL_CASES:
        inputs = [x.cuda() for x in case.residual(dtype)]
        exact = residual_equation(*[x.double() for x in inputs], clamp=case.clamp)
        fused = (residual_lrelu(*inputs, clamp=case.clamp, impl="cuda").double() - exact).abs()
        stepwise = (stepwise_residual(*inputs, clamp=case.clamp).double() - exact).abs()
        assert fused.mean() <= stepwise.mean()
        assert fused.max() <= stepwise.max()


def block(inputs: list[Tensor], qkv: Tensor, scale: Tensor, impl: custom_ops.Impl) -> Tensor:
    """Apply the three operators in a row."""
    q, k, v = scale_and_split(qkv, scale, impl=impl)
    a = modulated_layer_norm(q + k, inputs[2], impl=impl)
    return residual_lrelu(a, v, *inputs[2:], clamp=2.0, impl=impl)


@pytest.mark.gpu
def test_second_derivatives_on_a_gpu() -> None:
    case = Case(B=2, N=50, C=96, maps=2)
    results: list[list[Tensor]] = []
    for impl in ("cuda", "reference"):
        inputs = [x.cuda().requires_grad_() for x in case.residual(torch.float32)]
        qkv, scale = (x(0, torch.float32, 3).cuda().requires_grad_() for x in (case.tokens, case.vector))
        y = block(inputs, qkv, scale, impl)
        leaves = [qkv, scale, *inputs[2:]]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), leaves)
        results.append([y.detach(), *(x.detach() for x in first), *second])
    for found, expected in zip(*results, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.gpu
def test_kernels_in_a_cuda_graph() -> None:
    case = Case(B=2, N=70, C=96, maps=2)
    inputs = [x.cuda().requires_grad_() for x in case.residual(torch.bfloat16)]
    qkv = case.tokens(0, torch.bfloat16, 3).cuda().requires_grad_()
    scale = case.vector(1, torch.float32, 3).cuda().requires_grad_()
    leaves = [qkv, scale, *inputs[2:4], *inputs[5:]]
    inputs[4] = inputs[4].detach()

    def step() -> list[Tensor]:
        y = block(inputs, qkv, scale, "cuda")
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        qkv.copy_(case.tokens(9, torch.bfloat16, 3))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)  # the sums are deterministic
