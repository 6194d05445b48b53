"""CUDA kernels without a GPU: build, lookup, and agreement between processes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from torch._subclasses.fake_tensor import FakeTensorMode

from dnnlib.config import UserError
from torch_utils import custom_ops, distributed, kernels
from torch_utils.ops import encoder

ROOT = Path(__file__).parent.parent
needs_nvcc = pytest.mark.skipif(custom_ops.find_nvcc() is None, reason="needs nvcc")

# Minimal source of a library that is accepted as the kernels.
TINY = """
__global__ void kernel() {}
extern "C" int bias_act() { return 7; }
extern "C" int upfirdn2d() { kernel<<<1, 1>>>(); return cudaGetLastError(); }
extern "C" int probe() { return 0; }
extern "C" const char* error_text(int) { return "seven"; }
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reset the loaded kernels and use an empty extensions folder."""
    monkeypatch.setattr(custom_ops, "_state", custom_ops._State())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.cu"
    path.write_text(TINY)
    monkeypatch.setattr(custom_ops, "SOURCES", (path,))
    return path


@needs_nvcc
def test_kernels_are_built_once_and_leave_one_file(source: Path) -> None:
    folder = custom_ops.extensions_folder()
    folder.mkdir(parents=True)
    (folder / "lock").touch()  # left by a killed torch build
    (folder / f"{custom_ops.library_path('9.0').stem}-killed").mkdir()

    first = custom_ops.build("9.0")
    assert first.seconds > 0
    assert first.path == custom_ops.library_path("9.0")
    assert {path.name for path in folder.glob("*.so")} == {first.path.name}
    assert len(list(folder.iterdir())) == 3  # no temporary build folder remains
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ

    kernels = custom_ops.Kernels(first.path)
    with pytest.raises(RuntimeError, match=r"bias_act on \[2\] torch.float32: CUDA error 7, seven"):
        kernels.call("bias_act", torch.zeros(2), *[0] * 2, *[None] * 4, 0, None, *[0] * 5, *[0.0] * 3)

    written = first.path.stat().st_mtime_ns
    assert custom_ops.build("9.0").seconds == 0
    assert first.path.stat().st_mtime_ns == written


def test_the_build_name_depends_on_every_input(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [custom_ops.library_path("9.0"), custom_ops.library_path("8.0;9.0")]
    source.write_text(TINY + "// changed\n")
    paths.append(custom_ops.library_path("9.0"))
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    paths.append(custom_ops.library_path("9.0"))
    monkeypatch.setattr(custom_ops, "NVCC_FLAGS", ("-O1",))
    paths.append(custom_ops.library_path("9.0"))
    assert len(set(paths)) == len(paths)


@needs_nvcc
def test_a_compiler_error_becomes_one_line(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source.write_text('extern "C" int bias_act() { return nonsense; }\n')
    with pytest.raises(
        UserError, match=r"compiling failed: .*tiny\.cu\(1\): error: .*nonsense.*custom_ops prints"
    ) as caught:
        custom_ops.build("9.0")
    assert "\n" not in str(caught.value)
    assert "nvcc" in str(caught.value.__cause__)
    assert not list(custom_ops.extensions_folder().iterdir())


def test_reasons_name_the_remedy(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        with pytest.raises(UserError) as caught:
            custom_ops.build("9.0")
        return str(caught.value)

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(custom_ops, "find_nvcc", lambda: None)
    assert reason() == "nvcc was not found; install a CUDA 13 toolkit, or set CUDA_HOME to its folder"
    monkeypatch.setattr(custom_ops, "find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    monkeypatch.setattr(custom_ops, "toolkit_version", lambda nvcc: "12.8")
    assert "/opt/cuda/bin/nvcc has CUDA 12.8" in reason()
    assert "set CUDA_HOME to a CUDA 13 toolkit" in reason()
    monkeypatch.setattr(custom_ops, "toolkit_version", lambda nvcc: "13.0")
    monkeypatch.setattr(custom_ops.shutil, "which", lambda name: None if name == "ninja" else f"/bin/{name}")
    assert reason() == "ninja was not found; pip install ninja"
    monkeypatch.setattr(custom_ops.shutil, "which", lambda name: "/bin/ninja" if name == "ninja" else None)
    assert "install g++ or set CXX" in reason()
    monkeypatch.setattr(custom_ops.shutil, "which", lambda name: f"/bin/{name}")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert "set TORCH_EXTENSIONS_DIR to a writable folder" in reason()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == "this torch was built without CUDA; install a CUDA build"


def test_the_toolkit_version_is_parsed(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    for text, expected in (("Cuda compilation tools, release 12.8, V12.8.93", "12.8"), ("broken", None)):
        nvcc.write_text(f"#!/bin/sh\necho '{text}'\n")
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
        if expected is None:
            with pytest.raises(UserError, match="does not print its release"):
                custom_ops.toolkit_version(str(nvcc))
        else:
            assert custom_ops.toolkit_version(str(nvcc)) == expected


def test_architectures_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"TORCH_CUDA_ARCH_LIST=9\.0 or --arch=9\.0"):
        custom_ops.architectures()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6), (9, 0)][i])
    assert custom_ops.architectures() == "8.6;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert custom_ops.architectures() == "8.0;9.0+PTX"


def test_auto_reports_the_reason_for_a_fallback_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def build() -> None:
        calls.append(1)
        raise OSError("the disk\nis full")

    monkeypatch.setattr(custom_ops, "build", build)
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    assert not custom_ops.use_kernels("auto", x)
    assert not custom_ops.use_kernels("auto", x)
    assert custom_ops.load() is None
    assert capsys.readouterr().err == "CUDA operators: using the PyTorch reference: the disk is full\n"
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="impl='cuda': the disk is full"):
        custom_ops.use_kernels("cuda", x)


def test_compiled_functions_look_for_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_quietly() -> None:
        calls.append(os.getpid())  # no untraceable call remains
        custom_ops._state.reason = "none"

    monkeypatch.setattr(custom_ops, "_load_quietly", load_quietly)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if custom_ops.why_not() is None else x - 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [-1, -1]
    assert compiled(torch.zeros(2)).tolist() == [-1, -1]
    assert len(calls) == 1


def test_auto_does_not_look_for_kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_ops, "why_not", lambda: pytest.fail("looked for kernels"))
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
        integers = torch.empty(2, dtype=torch.int32, device="cuda")
    assert not custom_ops.use_kernels("auto", torch.zeros(2))
    assert not custom_ops.use_kernels("auto", integers)
    assert not custom_ops.use_kernels("reference", x)
    with custom_ops.implementation("reference"):
        assert not custom_ops.use_kernels("auto", x)


def test_implementation_overrides_auto() -> None:
    x = torch.zeros(2)
    with custom_ops.implementation("cuda"):
        with pytest.raises(ValueError, match="impl='cuda'"):
            custom_ops.use_kernels("auto", x)
        with custom_ops.implementation("reference"):
            assert not custom_ops.use_kernels("auto", x)
        with pytest.raises(ValueError, match="impl='cuda'"):
            custom_ops.use_kernels("auto", x)
    assert not custom_ops.use_kernels("auto", x)
    with pytest.raises(ValueError, match="choose one of"), custom_ops.implementation("fast"):  # type: ignore[arg-type]
        pass


def test_prepare_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise UserError("no compiler; get one")

    monkeypatch.setattr(custom_ops, "build", fail)
    line = custom_ops.prepare(torch.device("cpu"))
    assert line == "CUDA operators: using the PyTorch reference: no compiler; get one"


def test_kernels_are_chosen_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = SimpleNamespace(type="cuda")
    monkeypatch.setattr(custom_ops, "prepare", lambda device: "CUDA operators: ...")
    monkeypatch.setattr(encoder, "prepare", lambda device: "Encoder kernels: ...")
    monkeypatch.setattr(custom_ops, "_auto", "auto")
    monkeypatch.setattr(encoder, "is_enabled", True)
    monkeypatch.setattr(custom_ops, "why_not", lambda: None)
    monkeypatch.setattr(encoder, "why_not", lambda: None)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        expected = {"all": (True, True), "operators": (True, False), "none": (False, False)}
        assert [*expected] == [*kernels.KERNELS]
        for name, used in expected.items():
            kernels.choose(name)
            assert (custom_ops.use_kernels("auto", x), encoder.use_kernels("auto", x)) == used
            lines = kernels.prepare(device).splitlines()
            assert ["off" in line for line in lines] == ([True] if name == "none" else [not on for on in used])
    assert kernels.prepare(torch.device("cpu")) == "Kernels: not used on the CPU"


def in_two_processes(folder: Path, data: Path) -> None:
    """Prepare the kernels with a build that fails on one process or on none; save the outcome."""
    rank = distributed.rank()
    results = []
    for fails in (None, 0, 1):
        custom_ops._state = custom_ops._State()
        marker = folder / f"built-{fails}"

        def build(fails: int | None = fails, marker: Path = marker) -> Any:
            early = not marker.exists()
            if rank == 0:
                marker.touch()
            if fails == rank:
                raise MemoryError("out of it")
            return custom_ops.Build(path=Path(str(early)), architectures="9.0", seconds=0.0)

        custom_ops.build = build  # type: ignore[assignment]
        custom_ops.Kernels = Loaded  # type: ignore[misc, assignment]
        line = custom_ops.prepare(torch.device("cpu"))
        kernels = custom_ops.load()
        results.append({"line": line, "came_first": kernels.path if isinstance(kernels, Loaded) else None})
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))


class Loaded:
    """Fake library that records its path."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = self

    def probe(self) -> int:
        return 0


def test_processes_agree_and_rank_0_builds_first(together: Path) -> None:
    written = (together / "test_custom_ops" / f"rank-{rank}.json" for rank in range(2))
    first, second = (json.loads(path.read_text()) for path in written)
    loaded = "CUDA operators: kernels loaded"
    fallback = "CUDA operators: using the PyTorch reference: "
    assert first[0] == {"line": loaded, "came_first": "True"}
    assert second[0] == {"line": loaded, "came_first": "False"}
    for fails, results in ((0, (first[1], second[1])), (1, (first[2], second[2]))):
        assert results[fails] == {"line": fallback + "out of it", "came_first": None}
        other = "1 of 2 processes could not load the kernels"
        assert results[1 - fails] == {"line": fallback + other, "came_first": None}


# Calls the built kernels as on a GPU, in a separate process. Without a GPU, every call must return an error.
LAUNCH_ALL = """
import pathlib, sys, torch
from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d
kernels = custom_ops.Kernels(pathlib.Path(sys.argv[1]))
for dtype in custom_ops.DTYPES:
    x = torch.zeros(1, 2, 4, 4, dtype=dtype)
    calls = [lambda: upfirdn2d.launch(kernels, x, torch.ones(2, 2), (1, 1), (1, 1), (0, 0, 0, 0), False, 1.0)]
    for order in range(3):
        given = (None if order == 0 else x, x if order == 2 else None)
        calls.append(lambda: bias_act.launch(kernels, order, x, None, *given, 1, "lrelu", 0.2, 1.0, 8.0))
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            assert "CUDA error" in str(error), error
        else:
            raise AssertionError("a kernel succeeded without a GPU")
"""


def run_module(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch_utils.custom_ops", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command_reports_missing_tools() -> None:
    result = run_module()
    assert result.returncode == 1
    assert f"torch:         {torch.__version__}" in result.stdout
    assert "result:        failed: torch sees no CUDA device" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@needs_nvcc
@pytest.mark.slow
def test_the_command_builds_the_kernels() -> None:
    result = run_module("--arch=9.0")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert list(lines) == [
        "torch",
        "toolkit",
        "host compiler",
        "folder",
        "architectures",
        "library",
        "seconds",
        "result",
    ]
    assert lines["result"].strip().startswith("built")
    assert float(lines["seconds"]) > 0
    library = custom_ops.extensions_folder() / lines["library"].strip()
    if not torch.cuda.is_available():  # the kernels would receive host addresses otherwise
        done = subprocess.run([sys.executable, "-c", LAUNCH_ALL, library], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
