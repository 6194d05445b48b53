"""Build and load the CUDA kernels of `torch_utils/ops`; report a failure in one line.

    python -m torch_utils.custom_ops

The sources do not depend on torch. They are compiled to a plain shared library that is called through ctypes with raw
pointers. Each process compiles in its own folder and moves the library into place, so a killed build cannot leave a
stale lock. The file name contains a hash of the sources, flags, architectures and torch version.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import click
import torch
from torch import Tensor

from dnnlib.cli import Program
from dnnlib.config import UserError
from dnnlib.util import home_folder
from torch_utils import distributed

Impl = Literal["auto", "reference", "cuda"]

FOLDER = Path(__file__).parent / "ops"
SOURCES = (FOLDER / "bias_act.cu", FOLDER / "upfirdn2d.cu")
HEADERS = (FOLDER / "kernels.h",)
NVCC_FLAGS = ("-O3",)

# enum Dtype of kernels.h
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
SIGNATURES: dict[str, list[Any]] = {
    "bias_act": [_I, _I, _P, _P, _P, _P, _I, _P, _L, _L, _L, _I, _I, _D, _D, _D, _P],
    "upfirdn2d": [_I, _P, _P, _P, *[_L] * 14, _I, _I, _D, _P],
}


class Kernels:
    """Functions of the compiled library. They return a CUDA error code, which `call` converts to an exception."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.error_text.restype = ctypes.c_char_p
        self.functions = {}
        for name, argtypes in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes = argtypes
            self.functions[name] = function

    def call(self, name: str, x: Tensor, *args: Any) -> None:
        """Call the function `name` with `args` and the current stream of x's device (null on a CPU)."""
        if x.is_cuda:
            with torch.cuda.device(x.device):
                error = self.functions[name](*args, torch.cuda.current_stream().cuda_stream)
        else:
            error = self.functions[name](*args, None)
        if error:
            raise RuntimeError(f"{name} on {list(x.shape)} {x.dtype}: CUDA error {error}, {self.error_text(error)}")

    def error_text(self, error: int) -> str:
        """Return CUDA's message for an error code."""
        return self.library.error_text(error).decode()


@dataclass(frozen=True, kw_only=True)
class Build:
    """A compiled library: path, architectures, and compile time in seconds (0 if it already existed)."""

    path: Path
    architectures: str
    seconds: float


@dataclass(kw_only=True)
class _State:
    """Load state of this process: both None before the first attempt, then the kernels or the reason for failure."""

    kernels: Kernels | None = None
    reason: str | None = None


_state = _State()
_auto: Impl = "auto"  # implementation used for impl="auto"


def default() -> Impl:
    """Return the implementation used for impl="auto"."""
    return _auto


def set_default(impl: Impl) -> None:
    """Let impl="auto" mean `impl` from now on."""
    global _auto
    _check_name(impl)
    _auto = impl


@contextlib.contextmanager
def implementation(impl: Impl) -> Iterator[None]:
    """Context manager in which impl="auto" means `impl`, to compare implementations in benchmarks and tests."""
    before = _auto
    set_default(impl)
    try:
        yield
    finally:
        set_default(before)


def use_kernels(
    impl: Impl,
    x: Tensor,
    dtypes: Collection[torch.dtype] = DTYPES,
    unavailable: Callable[[], str | None] | None = None,
) -> bool:
    """Return whether an operator on `x` uses its kernels for CUDA tensors of `dtypes`.

    "auto" selects the kernels for supported tensors if they can be built; `unavailable` (by default `why_not`) returns
    None or the reason against it. If `impl` is "cuda", raises ValueError for an unsupported tensor and RuntimeError if
    the kernels are unavailable.
    """
    unavailable = unavailable or why_not
    if impl == "auto":
        impl = _auto
    if impl == "auto":
        return x.is_cuda and x.dtype in dtypes and unavailable() is None
    _check_name(impl)
    if impl == "reference":
        return False
    if not x.is_cuda or x.dtype not in dtypes:
        raise ValueError(
            f"impl='cuda' on {x.dtype} on {x.device}: the kernels support CUDA tensors of type "
            f"{', '.join(map(str, dtypes))}; use impl='auto'"
        )
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"impl='cuda': {reason}")
    return True


def _check_name(impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Impl))}")


def load() -> Kernels | None:
    """Return the kernels, built on the first call; None if that fails, with the reason printed once to stderr."""
    why_not()
    return _state.kernels


def why_not() -> str | None:
    """Return None if the kernels are available, else the reason. The first call loads them and prints the reason."""
    if _state.kernels is None and _state.reason is None:
        _load_quietly()
        if _state.reason is not None:
            print(f"CUDA operators: using the PyTorch reference: {_state.reason}", file=sys.stderr)
    return _state.reason


# Equivalent to torch.compiler.assume_constant_result: compiled functions call it once and treat the result as constant.
# The decorator itself would import the compiler, which takes longer than importing the rest of this project.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load_quietly() -> str | None:
    """Build and load the kernels; store them, or store and return the reason for failure. Never raises or prints."""
    try:
        kernels = Kernels(build().path)
        error = kernels.library.probe()
        if error:
            raise UserError(
                f"the kernels do not run on {torch.cuda.get_device_name()}: {kernels.error_text(error)}; "
                "unset TORCH_CUDA_ARCH_LIST, or add this device's architecture"
            )
        _state.kernels, _state.reason = kernels, None
    except Exception as error:  # on any failure, fall back to the reference
        _state.reason = " ".join(str(error).split()) or type(error).__name__
    return _state.reason


def prepare(device: torch.device) -> str:
    """Build and load the kernels in every process at the start of a run; return a line for the log.

    Local rank 0 of each machine builds while the other ranks wait. If any process fails, all use the reference, so that
    all ranks compute the same results. A collective call on `device`; it never raises, so that no rank can deadlock.
    """
    failures = distributed.count_failures(lambda: None if _state.kernels else _load_quietly(), device)
    if not failures:
        return "CUDA operators: kernels loaded"
    here = _state.reason or f"{failures} of {distributed.world_size()} processes could not load the kernels"
    _state.kernels, _state.reason = None, here
    return f"CUDA operators: using the PyTorch reference: {here}"


def extensions_folder() -> Path:
    """Return the folder for the compiled libraries, in TORCH_EXTENSIONS_DIR or torch's default build root.

    Raises UserError if the user has no home folder.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        root = _builder().get_default_build_root()
        if "~" in Path(root).parts:  # torch could not expand it
            home_folder("TORCH_EXTENSIONS_DIR")
    return Path(root) / "styleformer"


def architectures() -> str:
    """Return TORCH_CUDA_ARCH_LIST, or the compute capabilities of the visible GPUs. Raises UserError without either."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if chosen:
        return ";".join(chosen.replace(";", " ").split())
    if not torch.cuda.is_available():
        raise UserError(
            "torch sees no CUDA device to build for; specify the architecture, e.g. TORCH_CUDA_ARCH_LIST=9.0 or "
            "--arch=9.0"
        )
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def library_path(archs: str) -> Path:
    """Return the path of the library for the current sources, torch version, flags and architectures."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (torch.__version__, str(torch.version.cuda), archs, *NVCC_FLAGS):
        digest.update(part.encode() + b"\0")
    for file in (*SOURCES, *HEADERS):
        digest.update(file.read_bytes())
    return extensions_folder() / f"kernels-{digest.hexdigest()}.so"


def build(archs: str | None = None, *, force: bool = False) -> Build:
    """Compile the kernels if they do not exist, or always with `force`. Raises UserError with a one-line message."""
    archs = archs or architectures()
    path = library_path(archs)
    if path.is_file() and not force:
        return Build(path=path, architectures=archs, seconds=0.0)
    start = time.perf_counter()
    with _on_path():
        check_toolkit()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=path.parent, prefix=f"{path.stem}-", ignore_cleanup_errors=True
            ) as folder:
                os.replace(_compile(Path(folder), path.stem, archs), path)
        except OSError as error:
            raise UserError(
                f"cannot write {path.parent}: {error}; set TORCH_EXTENSIONS_DIR to a writable folder"
            ) from error
    return Build(path=path, architectures=archs, seconds=time.perf_counter() - start)


def check_toolkit() -> str:
    """Return the version of the CUDA toolkit. Raises UserError if it cannot compile for this torch."""
    expected = torch.version.cuda
    if expected is None:
        raise UserError("this torch was built without CUDA; install a CUDA build")
    major = expected.split(".")[0]
    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError(f"nvcc was not found; install a CUDA {major} toolkit, or set CUDA_HOME to its folder")
    version = toolkit_version(nvcc)
    if version.split(".")[0] != major:
        raise UserError(
            f"{nvcc} has CUDA {version}, torch {torch.__version__} has CUDA {expected}: the major versions must agree; "
            f"set CUDA_HOME to a CUDA {major} toolkit"
        )
    if shutil.which("ninja") is None:
        raise UserError("ninja was not found; pip install ninja")
    if shutil.which(host_compiler()) is None:
        raise UserError(f"the C++ compiler {host_compiler()} was not found; install g++ or set CXX")
    return version


def find_nvcc() -> str | None:
    """Return the path of the nvcc that torch's extension builder uses; None if it is not found."""
    cpp_extension = _builder()
    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    return str(nvcc) if nvcc.is_file() else None


def toolkit_version(nvcc: str) -> str:
    """Return the CUDA version of an nvcc, such as 13.0. Raises UserError if its output has no version."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    if match is None:
        raise UserError(f"{nvcc} --version does not print its release; set CUDA_HOME to a CUDA toolkit")
    return match[1]


def host_compiler() -> str:
    """Return the C++ compiler that torch's extension builder uses."""
    return os.environ.get("CXX", "c++")


def _builder() -> Any:
    """Import torch's extension builder without its warning about a missing GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    return cpp_extension


@contextlib.contextmanager
def _on_path() -> Iterator[None]:
    """Append this Python's bin folder to PATH, where pip installs e.g. ninja; needed if the environment is inactive."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _compile(folder: Path, name: str, archs: str) -> Path:
    """Run torch's builder in `folder` and return the library. Raises UserError with the compiler's first error."""
    runtime = _loaded_runtime()
    if runtime is not None:
        (folder / "libcudart.so").symlink_to(runtime)
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _builder().load(
                name.replace("-", "_"),
                [str(source) for source in SOURCES],
                extra_cuda_cflags=list(NVCC_FLAGS),
                extra_ldflags=[f"-L{folder}"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except Exception as error:
        first = _first_error(str(error))
        raise UserError(f"compiling failed: {first}; python -m torch_utils.custom_ops prints the full log") from error
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before
    return next(folder.glob("kernels*.so"))


def _loaded_runtime() -> str | None:
    """Return the path of the libcudart loaded by torch. Kernels linked with that library share torch's streams."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux: link with the toolkit's libcudart
        return None
    return next((line.split(maxsplit=5)[5] for line in lines if "/libcudart.so" in line), None)


def _first_error(output: str) -> str:
    """Return the first error line of the output of a compiler or of ninja."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.search(r"\b(error|fatal|cannot find)\b", line) and "Error building" not in line
    ]
    return (errors or lines or ["no output"])[0]


@click.command(cls=Program)
@click.option("--arch", help="compute capabilities to build for, such as 9.0 or 8.0;9.0 [default: the visible GPUs]")
@click.option("--force", is_flag=True, help="recompile existing kernels")
def main(arch: str | None, force: bool) -> None:
    """Build the CUDA operators; report the toolkit, compilers, architectures and result."""
    _report("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    nvcc = find_nvcc()
    _report("toolkit", f"{nvcc}, CUDA {toolkit_version(nvcc)}" if nvcc else "nvcc not found")
    compiler = shutil.which(host_compiler())
    _report("host compiler", _first_line(compiler) if compiler else f"{host_compiler()} not found")
    try:
        _report("folder", str(extensions_folder()))
        archs = arch or architectures()
        _report("architectures", archs)
        built = build(archs, force=force)
        kernels = Kernels(built.path)
    except (UserError, OSError) as error:
        if error.__cause__ is not None:
            click.echo(str(error.__cause__), err=True)
        _report("result", f"failed: {error}")
        sys.exit(1)
    _report("library", built.path.name)
    _report("seconds", f"{built.seconds:.1f}" if built.seconds else "0, already built")
    if not torch.cuda.is_available():
        _report("result", "built and loaded; no GPU to run it on")
        return
    error_code = kernels.library.probe()
    if error_code:
        _report("result", f"failed: {torch.cuda.get_device_name()} cannot run it: {kernels.error_text(error_code)}")
        sys.exit(1)
    _report("result", f"built for {torch.cuda.get_device_name()}")


def _report(name: str, text: str) -> None:
    click.echo(f"{name + ':':<15}{text}")


def _first_line(compiler: str) -> str:
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    return f"{compiler}, {output.splitlines()[0] if output else 'version unknown'}"


if __name__ == "__main__":
    main()
