"""CUDA kernels, compiled for the CPU and run thread by thread; tests marked `gpu` also run the kernels on a GPU.

g++ compiles the .cu files with cuda_on_cpu.h in place of CUDA; indexing and arithmetic match the GPU. NaN guards
surround inputs and outputs: an out-of-bounds read shows up in the result, an out-of-bounds write destroys a guard.
The undefined-behaviour sanitizer reports overflows and misaligned vector accesses.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from torch import Tensor

from torch_utils import custom_ops
from torch_utils.ops import bias_act as bias_act_module
from torch_utils.ops import upfirdn2d as upfirdn2d_module
from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.upfirdn2d import upfirdn2d

HOST_FLAGS = (
    *("-std=c++17", "-O1", "-fno-strict-aliasing", "-fsanitize=undefined"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)
GUARD = 64  # guard elements around every tensor; a multiple of 16 bytes
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCES)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Device and library that run the kernels."""

    kernels: custom_ops.Kernels
    device: str


def compile_for_host(library: Path, *flags: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("compiling the kernels for the CPU requires g++")
    sources = [str(source) for source in custom_ops.SOURCES]
    command = [
        "g++",
        *flags,
        "-shared",
        "-fPIC",
        f"-I{Path(__file__).parent}",
        "-x",
        "c++",
        *sources,
        "-o",
        str(library),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return library


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_host(tmp_path_factory.mktemp("kernels") / "host.so", *HOST_FLAGS)


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Iterator[Target]:
    if request.param == "host":
        yield Target(kernels=custom_ops.Kernels(request.getfixturevalue("host_library")), device="cpu")
    else:
        kernels = custom_ops.load()
        assert kernels is not None, custom_ops.why_not()
        yield Target(kernels=kernels, device="cuda")
    assert "runtime error" not in capfd.readouterr().err, "see the sanitizer report above"


def guarded(x: Tensor, offset: int = 0) -> Tensor:
    """Return a copy of x with equal strides inside a buffer of NaN, `offset` elements off 16-byte alignment."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, x.stride(), GUARD + offset)
    return view.copy_(x)


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch, offset: int = 0) -> Iterator[None]:
    """Make torch.empty and empty_like return guarded NaN, and check the guards afterwards."""
    buffers: list[tuple[Tensor, int]] = []

    def guard(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 2 * GUARD,), math.nan, dtype=x.dtype, device=x.device)
        buffers.append((buffer, x.numel()))
        return buffer.as_strided(x.shape, x.stride(), GUARD + offset)

    plain, plain_like = torch.empty, torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: guard(plain(*args, **kwargs)))
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: guard(plain_like(*args, **kwargs)))
        yield
    assert buffers
    for buffer, size in buffers:
        assert buffer[: GUARD + offset].isnan().all()
        assert buffer[GUARD + offset + size :].isnan().all()


def image(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance)


# shape, dimension of the bias, channels last
BIAS_CASES: list[tuple[tuple[int, ...], int, bool]] = [
    ((2, 3, 5, 7), 1, False),  # rows of odd length: vectors span channels
    ((3, 5, 1, 2), 1, False),  # several channels per vector
    ((2, 4, 4, 8), 1, False),  # several vectors per channel
    ((2, 3, 5, 7), 1, True),
    ((2, 16, 3, 3), 1, True),  # bias read as vectors
    ((2, 3, 5, 7), 0, False),
    ((2, 3, 5, 7), 3, True),
    ((2, 3, 5, 7), 2, True),
    ((3, 7, 16), 2, False),
    ((5, 6), 1, False),
    ((9,), 0, False),
    ((1, 1, 1, 1), 1, False),
    ((1031, 3), 1, False),  # several blocks
    ((0, 3, 2, 2), 1, False),
]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act(act: str, dtype: torch.dtype, offset: int, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, first and second derivative, against autograd through the reference in float64."""
    alpha = ACTIVATIONS[act].alpha
    for number, (shape, dim, channels_last) in enumerate(BIAS_CASES):
        clamp = (None, 0.7)[number % 2]
        gain = (1.3, -0.6, 1.0)[number % 3]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x, grad, double = (
            guarded(image(*shape, dtype=dtype, seed=seed).contiguous(memory_format=layout).to(target.device), place)
            for seed, place in enumerate(
                (offset * (number % 2), offset * (number // 2 % 2), offset * (number // 3 % 2))
            )
        )
        b = image(shape[dim], dtype=dtype if number % 4 else torch.float32, seed=3).to(target.device)
        if dtype == torch.float64:
            b = b.double()
        b = guarded(b, offset)
        bias = None if number % 5 == 4 else b

        x64 = x.double().cpu().requires_grad_()
        b64 = None if bias is None else bias.double().cpu()
        y64 = bias_act(x64, b64, dim=dim, act=act, gain=gain, clamp=clamp, impl="reference")
        (dx64,) = torch.autograd.grad(y64, x64, grad.double().cpu(), create_graph=True)
        ddx64 = torch.zeros_like(x64)
        if dx64.requires_grad:
            (ddx64,) = torch.autograd.grad(dx64, x64, double.double().cpu())
        # Where y is the clamp up to rounding, a derivative may fall on either side.
        clear = torch.ones_like(y64, dtype=torch.bool)
        if clamp is not None:
            unclamped = bias_act(x64, b64, dim=dim, act=act, gain=gain, impl="reference")
            clear = (unclamped.abs() - clamp).abs() > 2 * TOLERANCES[dtype]

        options = (dim, act, alpha or 0.0, gain, -1.0 if clamp is None else clamp)
        from_output = bias_act_module.slope_from_output(act, alpha or 0.0, gain)
        with guarded_outputs(monkeypatch, offset * (number % 3 % 2)):
            y = bias_act_module.launch(target.kernels, 0, x, bias, None, None, *options)
            saved, saved_b = (y, None) if from_output else (x, bias)
            dx = bias_act_module.launch(target.kernels, 1, grad, saved_b, saved, None, *options)
            ddx = bias_act_module.launch(target.kernels, 2, double, bias, x, grad, *options)
        assert y.stride() == x.stride() or not y.numel()
        assert_equal(y, y64.detach(), dtype)
        zero = torch.zeros((), dtype=torch.float64)
        assert_equal(torch.where(clear.to(dx.device), dx, 0), torch.where(clear, dx64, zero).detach(), dtype)
        assert_equal(torch.where(clear.to(dx.device), ddx, 0), torch.where(clear, ddx64, zero).detach(), dtype)


def test_bias_act_with_other_alphas(target: Target) -> None:
    for act, alpha in (("lrelu", 0.05), ("lrelu", -0.5), ("elu", 1.7)):
        x = image(4, 6, dtype=torch.float64).to(target.device)
        x64 = x.cpu().requires_grad_()
        y64 = bias_act(x64, act=act, alpha=alpha, gain=1.0)
        (dx64,) = torch.autograd.grad(y64.sum(), x64)
        y = bias_act_module.launch(target.kernels, 0, x, None, None, None, 1, act, alpha, 1.0, -1.0)
        saved = y if bias_act_module.slope_from_output(act, alpha, 1.0) else x
        ones = torch.ones_like(x)
        dx = bias_act_module.launch(target.kernels, 1, ones, None, saved, None, 1, act, alpha, 1.0, -1.0)
        assert_equal(y, y64.detach(), torch.float64)
        assert_equal(dx, dx64, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_act_detects_clamping_after_rounding(dtype: torch.dtype, target: Target) -> None:
    """0.4 is not representable in bfloat16: a clamped y is 0.40039 or just below 0.4, and the gradient must be zero."""
    x = torch.tensor([[-30.0, -0.1, 0.1, 30.0]], dtype=dtype, device=target.device)
    for clamp in (0.4, 0.7, 1.1, 3.3, 256.0 / 3):
        y = bias_act_module.launch(target.kernels, 0, x * 10, None, None, None, 1, "lrelu", 0.9, 1.0, clamp)
        ones = torch.ones_like(x)
        dx = bias_act_module.launch(target.kernels, 1, ones, None, y, None, 1, "lrelu", 0.9, 1.0, clamp)
        inside = (x.double() * 10).abs() < clamp
        assert torch.equal(dx.bool(), inside), clamp


def test_bias_act_keeps_nan_and_infinity(target: Target) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]], device=target.device)
    for act in ("linear", "relu", "lrelu", "sigmoid", "tanh", "softplus", "elu", "selu"):
        for clamp in (-1.0, 2.0):
            y = bias_act_module.launch(target.kernels, 0, x, None, None, None, 1, act, 0.2, 1.0, clamp)
            alpha = None if ACTIVATIONS[act].alpha is None else 0.2
            expected = bias_act(x, act=act, alpha=alpha, gain=1.0, clamp=None if clamp < 0 else clamp, impl="reference")
            torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_as_in_torch(dtype: torch.dtype, target: Target) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1)
    x = every.to(target.device)
    for gain in (1.0, 0.3, 1 / 3000):
        y = bias_act_module.launch(target.kernels, 0, x, None, None, None, 0, "linear", 0.0, gain, -1.0)
        torch.testing.assert_close(y, (x.float() * gain).to(dtype), rtol=0, atol=0, equal_nan=True)


# Filter shape (one number: a vector along both axes), up, down, padding (x0, x1, y0, y1)
Resampling = tuple[tuple[int, ...], tuple[int, int], tuple[int, int], tuple[int, int, int, int]]
RESAMPLINGS: list[Resampling] = [
    *[
        (taps, up, down, padding)
        for taps in ((4,), (4, 4))
        for up, down in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)))
        for padding in ((2, 2, 2, 2), (2, 1, 2, 1), (1, 3, 4, 0), (5, -1, -1, 6), (3, 3, 3, 3), (3, 2, 1, 4))
    ],
    *[
        (taps, up, down, padding)
        for taps, up, down in (
            ((1, 12), (2, 1), (1, 1)),
            ((1, 12), (1, 1), (2, 1)),
            ((12, 1), (1, 2), (1, 1)),
            ((12, 1), (1, 1), (1, 2)),
        )
        for padding in ((11, 11, 11, 11), (12, 9, 9, 12), (15, 13, -1, 18), (11, 12, 13, 12))
    ],
    ((1,), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((3,), (3, 2), (1, 1), (2, 2, 1, 1)),
    ((2,), (2, 3), (3, 2), (1, 4, 2, 5)),
    ((4,), (2, 2), (2, 2), (3, 4, 5, 2)),
    ((4,), (2, 1), (1, 1), (3, 4, 5, 2)),
    ((2, 3), (1, 1), (5, 7), (9, 8, 7, 6)),
    ((5, 2), (4, 1), (1, 3), (-3, 9, 7, 1)),
    ((7, 9), (1, 1), (1, 1), (9, 9, 9, 9)),
    ((1, 3), (5, 4), (1, 1), (-2, 6, -3, 4)),
]
# B, C, H, W, channels last
IMAGES = [
    (2, 3, 7, 5, False),
    (1, 2, 16, 18, False),
    (1, 1, 1, 1, False),
    (2, 5, 3, 4, True),
    (2, 8, 6, 9, True),
    (1, 4, 9, 2, True),
]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_upfirdn2d(
    shape: tuple[int, int, int, int, bool],
    dtype: torch.dtype,
    offset: int,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare with the float64 reference, which test_ops.py compares with SciPy."""
    *size, channels_last = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = image(*size, dtype=dtype).contiguous(memory_format=layout).to(target.device)
    compared = 0
    for number, (taps, up, down, padding) in enumerate(RESAMPLINGS):
        x = guarded(x, offset * (number % 2))
        f = image(*taps, dtype=torch.float32, seed=number)
        f = guarded(
            (f / f.abs().sum()).to(torch.float64 if dtype == torch.float64 else torch.float32).to(target.device)
        )
        arguments: tuple[Any, ...] = (up, down, padding, bool(number % 2), 1.5)
        if min(upfirdn2d_module.out_size(x, f, *arguments[:3])[2:]) < 1:
            continue
        with guarded_outputs(monkeypatch, offset * (number % 3 % 2)):
            y = upfirdn2d_module.launch(target.kernels, x, f, *arguments)
        assert y.is_contiguous(memory_format=layout)
        expected = torch.ops.styleformer.upfirdn2d(x.double().cpu(), f.double().cpu(), *arguments)
        assert_equal(y, expected, dtype)
        compared += 1
    assert compared > len(RESAMPLINGS) // 2


def test_upfirdn2d_with_several_blocks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    f = torch.tensor([0.125, 0.375, 0.375, 0.125])
    for size, up, down in (((5, 7, 33, 32), 1, 1), ((5, 7, 16, 16), 2, 1), ((5, 7, 34, 34), 1, 2)):
        x = image(*size, dtype=torch.float32).to(target.device)
        with guarded_outputs(monkeypatch):
            y = upfirdn2d_module.launch(
                target.kernels, x, f.to(target.device), (up, up), (down, down), (2, 1, 2, 1), False, 1.0
            )
        expected = upfirdn2d(x.double().cpu(), f.double(), up=up, down=down, padding=(2, 1, 2, 1), impl="reference")
        assert_equal(y, expected, torch.float32)


def test_kernels_use_64_bit_indices_where_needed(tmp_path: Path) -> None:
    """Small tensors run the code path of tensors beyond 2^31 elements."""
    kernels = custom_ops.Kernels(compile_for_host(tmp_path / "wide.so", "-std=c++17", "-O0", "-DINDEX_LIMIT=0"))
    for channels_last in (False, True):
        x = image(2, 3, 5, 7, dtype=torch.float32)
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        b, f = image(3, dtype=torch.float32, seed=1), image(4, dtype=torch.float32, seed=2)
        y = bias_act_module.launch(kernels, 0, x, b, None, None, 1, "relu", 0.0, 2.0, -1.0)
        torch.testing.assert_close(y, bias_act(x, b, act="relu", gain=2.0))
        for up in (1, 2, 3):
            y = upfirdn2d_module.launch(kernels, x, f, (up, up), (1, 1), (2, 3, 1, 4), False, 1.0)
            torch.testing.assert_close(y, upfirdn2d(x, f, up=up, padding=(2, 3, 1, 4)), rtol=1e-4, atol=1e-5)


def test_non_dense_inputs_are_made_dense(target: Target) -> None:
    x = image(2, 3, 8, 12, dtype=torch.float32).to(target.device)
    b = image(6, dtype=torch.float32).to(target.device)
    f = image(8, dtype=torch.float32).to(target.device)
    for view in (x[..., ::2], x.transpose(2, 3), x[:, :1].expand(2, 3, 8, 12), x[:, 1:]):
        y = bias_act_module.launch(
            target.kernels, 0, view, b[::2][: view.shape[1]], None, None, 1, "relu", 0.0, 2.0, -1.0
        )
        expected = bias_act(view, b[::2][: view.shape[1]], act="relu", gain=2.0, impl="reference")
        torch.testing.assert_close(y, expected)
        y = upfirdn2d_module.launch(target.kernels, view, f[::2], (2, 2), (1, 1), (2, 2, 2, 2), False, 1.0)
        torch.testing.assert_close(y, upfirdn2d(view, f[::2], up=2, padding=2, impl="reference"), rtol=1e-4, atol=1e-5)


def test_images_beyond_the_index_range_are_refused(target: Target) -> None:
    x = torch.zeros(1, 1, 2, 2, device=target.device)
    f = torch.ones(1, 1, device=target.device)
    with pytest.raises(RuntimeError, match=r"upfirdn2d on \[1, 1, 2, 2\].*CUDA error 1"):
        upfirdn2d_module.launch(target.kernels, x, f, (2**30, 1), (2**30, 1), (0, 0, 0, 0), False, 1.0)


def test_the_kernel_and_python_agree_on_activation_indices() -> None:
    source = (custom_ops.FOLDER / "bias_act.cu").read_text()
    names = source.partition("enum Act : int {")[2].partition("}")[0].split(",")
    assert [name.strip().lower() for name in names[:-1]] == list(ACTIVATIONS)


@pytest.mark.skipif(custom_ops.find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, marks=[pytest.mark.slow] * (source.name == "bias_act.cu"), id=source.name)
        for source in custom_ops.SOURCES
    ],
)
def test_nvcc_compiles_for_compute_capability_9(source: Path, tmp_path: Path) -> None:
    nvcc = custom_ops.find_nvcc()
    assert nvcc is not None
    flags = ["-std=c++17", *custom_ops.NVCC_FLAGS, "-gencode=arch=compute_90,code=sm_90", "-Xptxas=-v"]
    command = [nvcc, *flags, "-c", str(source), "-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    assert "bytes spill stores" in result.stderr
    assert result.stderr.count("0 bytes spill stores") == result.stderr.count("bytes spill stores")  # all in registers
    assert "torch/" not in source.read_text()
    symbols = subprocess.run(["nm", tmp_path / "out.o"], capture_output=True, text=True, check=True).stdout
    assert " T " in symbols
    assert not re.search(r"\bexit\b", symbols), "host code calls device code; nvcc compiles the call to exit()"
