"""Build the CUDA kernels of `torch_utils/ops` once, load them, and say in one line why not when that fails.

    python -m torch_utils.custom_ops

The sources know nothing of torch: they become a plain shared library, called through ctypes with pointers. It is
compiled in a folder that belongs to one process alone and then moved into place, so that there is no lock that a killed
build could leave behind; its name holds a hash of all that it depends on.
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
from collections.abc import Iterator
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
    """The functions of a built library. They return a CUDA error, which `call` turns into an exception."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.error_text.restype = ctypes.c_char_p
        self.functions = {}
        for name, argtypes in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes = argtypes
            self.functions[name] = function

    def call(self, name: str, x: Tensor, *args: Any) -> None:
        """Call the function `name` with `args` and the present stream of x's device (none on a CPU)."""
        if x.is_cuda:
            with torch.cuda.device(x.device):
                error = self.functions[name](*args, torch.cuda.current_stream().cuda_stream)
        else:
            error = self.functions[name](*args, None)
        if error:
            raise RuntimeError(f"{name} on {list(x.shape)} {x.dtype}: CUDA error {error}, {self.error_text(error)}")

    def error_text(self, error: int) -> str:
        """Return CUDA's words for an error."""
        return self.library.error_text(error).decode()


@dataclass(frozen=True, kw_only=True)
class Build:
    """A finished library: where, for which architectures, and the seconds that compiling took (0: it was there)."""

    path: Path
    architectures: str
    seconds: float


@dataclass(kw_only=True)
class _State:
    """What this process knows: nothing yet, the kernels, or why there are none."""

    kernels: Kernels | None = None
    reason: str | None = None


_state = _State()
_auto: Impl = "auto"  # what impl="auto" stands for


@contextlib.contextmanager
def implementation(impl: Impl) -> Iterator[None]:
    """Within it, impl="auto" means `impl`: measurements and tests compare the implementations that way."""
    global _auto
    _check_name(impl)
    before, _auto = _auto, impl
    try:
        yield
    finally:
        _auto = before


def use_kernels(impl: Impl, x: Tensor) -> bool:
    """Whether an operator on x runs the CUDA kernels. Raises ValueError or RuntimeError if "cuda" cannot be had.

    "auto" takes them for CUDA tensors of a type that they know, where they can be built.
    """
    if impl == "auto":
        impl = _auto
    if impl == "auto":
        return x.is_cuda and x.dtype in DTYPES and why_not() is None
    _check_name(impl)
    if impl == "reference":
        return False
    if not x.is_cuda or x.dtype not in DTYPES:
        raise ValueError(
            f"impl='cuda' on {x.dtype} on {x.device}: the kernels take floating point on CUDA devices; use impl='auto'"
        )
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"impl='cuda': {reason}")
    return True


def _check_name(impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Impl))}")


def load() -> Kernels | None:
    """Return the kernels, built on the first call, or None; then it has said once on stderr why."""
    why_not()
    return _state.kernels


def why_not() -> str | None:
    """Return None if the kernels are loaded or can be loaded now, else why not. The first time, say so on stderr."""
    if _state.kernels is None and _state.reason is None:
        _load_quietly()
        if _state.reason is not None:
            print(f"CUDA operators: using the PyTorch reference: {_state.reason}", file=sys.stderr)
    return _state.reason


# What torch.compiler.assume_constant_result does: compiled functions call it once and keep the answer. The decorator
# itself would import the compiler, which takes longer than the rest of this project.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load_quietly() -> str | None:
    """Build and load the kernels; keep them or the reason, which is returned. Never raises, never prints."""
    try:
        kernels = Kernels(build().path)
        error = kernels.library.probe()
        if error:
            raise UserError(
                f"the kernels do not run on {torch.cuda.get_device_name()}: {kernels.error_text(error)}; "
                "unset TORCH_CUDA_ARCH_LIST, or add this device's architecture"
            )
        _state.kernels, _state.reason = kernels, None
    except Exception as error:  # whatever it is, the reference goes on
        _state.reason = " ".join(str(error).split()) or type(error).__name__
    return _state.reason


def prepare(device: torch.device) -> str:
    """Build and load the kernels in every process of a run that begins; return a line for the log.

    Local rank 0 of each machine builds while the others wait. If it failed anywhere all processes use the reference, so
    that they never compute differently. Every process must call it; none raises, so none waits for ever.
    """
    if device.type != "cuda":
        return "CUDA operators: not used on the CPU"
    return _prepare_together(device)


def _prepare_together(device: torch.device) -> str:
    failures = 0.0
    for turn in (True, False):
        is_mine = (int(os.environ.get("LOCAL_RANK", 0)) == 0) == turn
        if is_mine and not failures and _state.kernels is None:  # what failed once needs no further tries
            _load_quietly()
        failures = distributed.all_reduce(torch.tensor(float(_state.reason is not None), device=device)).item()
    if not failures:
        return "CUDA operators: kernels loaded"
    here = _state.reason or f"{failures:.0f} of {distributed.world_size()} processes could not load the kernels"
    _state.kernels, _state.reason = None, here
    return f"CUDA operators: using the PyTorch reference: {here}"


def extensions_folder() -> Path:
    """Return the folder that keeps the built libraries: TORCH_EXTENSIONS_DIR, or torch's default.

    Raises UserError where this user has no home.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        root = _builder().get_default_build_root()
        if "~" in Path(root).parts:  # torch's, without a home
            home_folder("TORCH_EXTENSIONS_DIR")
    return Path(root) / "styleformer"


def architectures() -> str:
    """Return TORCH_CUDA_ARCH_LIST, or the compute capabilities of the GPUs here. Raises UserError without both."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if chosen:
        return ";".join(chosen.replace(";", " ").split())
    if not torch.cuda.is_available():
        raise UserError(
            "torch sees no CUDA device here to build for; name one by TORCH_CUDA_ARCH_LIST=9.0 or --arch=9.0"
        )
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def library_path(archs: str) -> Path:
    """Return where the library for these sources, this torch and these architectures belongs."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (torch.__version__, str(torch.version.cuda), archs, *NVCC_FLAGS):
        digest.update(part.encode() + b"\0")
    for file in (*SOURCES, *HEADERS):
        digest.update(file.read_bytes())
    return extensions_folder() / f"kernels-{digest.hexdigest()}.so"


def build(archs: str | None = None, *, force: bool = False) -> Build:
    """Compile the kernels unless they are there (or `force`). Raises UserError, in one line, if it cannot be done."""
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
                f"cannot write {path.parent}: {error}; set TORCH_EXTENSIONS_DIR to a folder of yours"
            ) from error
    return Build(path=path, architectures=archs, seconds=time.perf_counter() - start)


def check_toolkit() -> str:
    """Return the toolkit's version if it can compile for this torch, else raise UserError."""
    wanted = torch.version.cuda
    if wanted is None:
        raise UserError("this torch was built without CUDA; install one that has it")
    major = wanted.split(".")[0]
    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError(f"nvcc was not found; install a CUDA {major} toolkit, or set CUDA_HOME to its folder")
    version = toolkit_version(nvcc)
    if version.split(".")[0] != major:
        raise UserError(
            f"{nvcc} is of CUDA {version}, torch {torch.__version__} of CUDA {wanted}: the major versions must agree; "
            f"set CUDA_HOME to a CUDA {major} toolkit"
        )
    if shutil.which("ninja") is None:
        raise UserError("ninja was not found; pip install ninja")
    if shutil.which(host_compiler()) is None:
        raise UserError(f"the C++ compiler {host_compiler()} was not found; install g++ or set CXX")
    return version


def find_nvcc() -> str | None:
    """Return the nvcc that torch's build would take."""
    cpp_extension = _builder()
    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    return str(nvcc) if nvcc.is_file() else None


def toolkit_version(nvcc: str) -> str:
    """Return the CUDA version of an nvcc, such as 13.0. Raises UserError if it does not say it."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    if match is None:
        raise UserError(f"{nvcc} --version does not say which release it is; set CUDA_HOME to a CUDA toolkit")
    return match[1]


def host_compiler() -> str:
    """Return the C++ compiler that torch's build would take."""
    return os.environ.get("CXX", "c++")


def _builder() -> Any:
    """Import torch's builder without its warning that there is no GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    return cpp_extension


@contextlib.contextmanager
def _on_path() -> Iterator[None]:
    """Let programs be found that pip installed beside this Python, such as ninja, in an environment not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _compile(folder: Path, name: str, archs: str) -> Path:
    """Run torch's builder in `folder` and return the library. Raises UserError with the compiler's first complaint."""
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
        first = _first_complaint(str(error))
        raise UserError(f"compiling failed: {first}; python -m torch_utils.custom_ops prints all of it") from error
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before
    return next(folder.glob("kernels*.so"))


def _loaded_runtime() -> str | None:
    """Return the libcudart that torch has loaded: linked with it, the kernels share torch's streams for certain."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux: the toolkit's own
        return None
    return next((line.split(maxsplit=5)[5] for line in lines if "/libcudart.so" in line), None)


def _first_complaint(output: str) -> str:
    """Return the line in which a compiler, or ninja, says what is wrong first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    complaints = [
        line for line in lines if re.search(r"\b(error|fatal|cannot find)\b", line) and "Error building" not in line
    ]
    return (complaints or lines or ["no output"])[0]


@click.command(cls=Program)
@click.option("--arch", help="compute capabilities to build for, such as 9.0 or 8.0;9.0 [default: the GPUs here]")
@click.option("--force", is_flag=True, help="compile even if the kernels are there")
def main(arch: str | None, force: bool) -> None:
    """Build the CUDA operators and report toolkit, compilers, architectures and result."""
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
    _report("seconds", f"{built.seconds:.1f}" if built.seconds else "0, it was there")
    if not torch.cuda.is_available():
        _report("result", "built, and loads here; there is no GPU to run it")
        return
    refusal = kernels.library.probe()
    if refusal:
        _report("result", f"failed: {torch.cuda.get_device_name()} does not run it: {kernels.error_text(refusal)}")
        sys.exit(1)
    _report("result", f"built, and has code for {torch.cuda.get_device_name()}")


def _report(name: str, text: str) -> None:
    click.echo(f"{name + ':':<15}{text}")


def _first_line(compiler: str) -> str:
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    return f"{compiler}, {output.splitlines()[0] if output else 'version unknown'}"


if __name__ == "__main__":
    main()
