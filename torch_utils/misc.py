"""Position-dependent seeds, facts about the machine, and module utilities."""

import getpass
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to a seed in [0, 2^63); different parts, or parts in another order, give unrelated seeds.

    All bits are well mixed, because PyTorch's CPU generator keeps only the low 32 bits of its seed.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, phase: str, position: int) -> None:
    """Seed PyTorch's generators on all devices for the micro-batch of `phase` that starts at image `position`.

    The random numbers that follow depend on the arguments only, so a run can be stopped and resumed anywhere.
    """
    torch.manual_seed(derive_seed(seed, phase, position))


def compiled(network: Any) -> Any:
    """Return the network wrapped in torch.compile, with static shapes and eager PyTorch's random numbers."""
    return torch.compile(network, dynamic=False, options={"fallback_random": True})


def name_user() -> None:
    """Set LOGNAME for a user without a password entry: PyTorch 2.11 puts the user name in its compiler cache path."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid_{os.getuid()}"


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or `cpu (MODEL)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({models[0]})" if models else device.type


def product_rate(dtype: torch.dtype, size: int = 512) -> float:
    """Measure matrix products of `dtype` with the CPU threads of this process; return operations per second."""
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one prepares the library
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes; None on Windows, which does not report it."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class EmptyRandn(TorchFunctionMode):
    """Context in which torch.randn returns uninitialised memory, to build modules whose weights a file replaces.

    Functions of torch.nn.init are not replaced, because some draw numbers again until all are within bounds.
    """

    REPLACEMENTS: ClassVar[dict[Any, Any]] = {torch.randn: torch.empty}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.REPLACEMENTS.get(function, function)(*args, **(kwargs or {}))


class OnMeta(EmptyRandn):
    """Context in which modules are built on the meta device: tensors with shape and dtype but without storage.

    With `torch.device("meta")` alone, random initialisation, division, identity matrices and resampling load PyTorch's
    compiler, which takes a second or more. This context replaces them with functions whose outputs have the same shape.
    """

    REPLACEMENTS: ClassVar[dict[Any, Any]] = (
        EmptyRandn.REPLACEMENTS
        | {
            torch.eye: lambda n, **_: torch.empty(n, n),
            F.interpolate: lambda x, size, **_: torch.empty(*x.shape[:2], *size),
        }
        | dict.fromkeys(
            (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.div), lambda x, *_, **__: x
        )
    )

    def __enter__(self) -> Self:
        self.device = torch.device("meta").__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)


def is_finite(x: Tensor) -> bool:
    """Return whether no value is infinite or NaN. Only the bounds are tested: aminmax propagates NaN."""
    return x.numel() == 0 or all(bool(bound.isfinite()) for bound in x.aminmax())


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module; shared tensors count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def copy_params_and_buffers(src: nn.Module, dst: nn.Module, require_all: bool = False) -> None:
    """Copy the parameters and buffers of `src` to `dst` by name; `requires_grad` in `dst` is unchanged.

    Tensors of `dst` that are missing in `src` keep their values, or raise ValueError with `require_all`. Raises
    ValueError for tensors of different shapes. Nothing is copied on an error.
    """
    source, target = _params_and_buffers(src), _params_and_buffers(dst)
    if require_all and (missing := sorted(target.keys() - source.keys())):
        raise ValueError(f"{', '.join(missing[:8])}: missing in the source; pass require_all=False to skip them")
    common = target.keys() & source.keys()
    for name in sorted(common):
        if source[name].shape != target[name].shape:
            shapes = f"{tuple(source[name].shape)} in the source, {tuple(target[name].shape)} in the destination"
            raise ValueError(f"{name}: has shape {shapes}")
    with torch.no_grad():
        for name in common:
            target[name].copy_(source[name])


def _params_and_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; a shared tensor appears under each of its names."""
    return dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))


def print_module_summary(module: nn.Module, inputs: Sequence[Any]) -> Any:
    """Print `module_summary(module, inputs)` and return the outputs of the module, without gradients."""
    outputs, shapes = _run_with_shapes(module, inputs)
    print(f"\n{_summary(module, shapes)}\n")
    return outputs


def module_summary(module: nn.Module, inputs: Sequence[Any]) -> str:
    """Run `module(*inputs)` once without gradients and return a table of its submodules.

    Columns: name and class, own parameters and buffers (without those of submodules), output shape. Submodules without
    parameters and buffers are omitted. A shared tensor counts where it first occurs, so the columns sum to the totals
    in the last line. The training mode is not changed; pass a copy if the forward pass modifies buffers.
    """
    return _summary(module, _run_with_shapes(module, inputs)[1])


def _run_with_shapes(module: nn.Module, inputs: Sequence[Any]) -> tuple[Any, dict[str, str]]:
    """Return the outputs of module(*inputs) without gradients, and the output shapes of all submodules by name."""
    shapes: dict[str, str] = {}
    handles: list[RemovableHandle] = []
    for name, part in module.named_modules():

        def note_shape(part: nn.Module, args: Any, output: Any, name: str = name) -> None:
            shapes[name] = _describe(output)

        handles.append(part.register_forward_hook(note_shape))
    try:
        with torch.no_grad():
            outputs = module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, shapes


def _summary(module: nn.Module, shapes: dict[str, str]) -> str:
    """Return the table of a module's submodules, given their output shapes by name."""
    seen: set[int] = set()
    rows: list[tuple[str, str, str, str]] = []
    totals = [0, 0]
    for name, part in module.named_modules():
        sizes = []
        for tensors in (part.parameters(recurse=False), part.buffers(recurse=False)):
            fresh = [tensor for tensor in tensors if id(tensor) not in seen]
            seen.update(map(id, fresh))
            sizes.append(sum(tensor.numel() for tensor in fresh))
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        if any(sizes):
            label = f"{name or '<top>'} ({type(part).__name__})"
            rows.append((label, f"{sizes[0]:,}", f"{sizes[1]:,}", shapes.get(name, "-")))
    head = (type(module).__name__, "parameters", "buffers", "output")
    return _table([head, *rows, ("total", f"{totals[0]:,}", f"{totals[1]:,}", shapes.get("", "-"))])


def _describe(output: Any) -> str:
    """Return the shape of a tensor, or of the first tensor in a tuple or list."""
    if isinstance(output, Tensor):
        return f"[{', '.join(map(str, output.shape))}]"
    if isinstance(output, list | tuple) and output:
        return _describe(output[0])
    return "-"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Align the columns of `rows`, text left and numbers right; the first row is the header, the last the total."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {parameters:>{widths[1]}}  {buffers:>{widths[2]}}  {output}"
        for name, parameters, buffers, output in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
