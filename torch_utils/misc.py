"""Seeds that depend on the position in a run, the machine, and a table of a module's parts."""

import getpass
import hashlib
import json
import os
import sys
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
    """Mix `parts` into a seed in [0, 2^63): different parts, or parts in another order, give unrelated seeds.

    All bits are well mixed, which matters because PyTorch's CPU generator keeps only the low 32 bits of its seed.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, phase: str, position: int) -> None:
    """Seed PyTorch's generators, on all devices, for the micro-batch of `phase` that starts at image `position`.

    What is drawn afterwards is a function of the arguments only, so that a run can stop and go on anywhere.
    """
    torch.manual_seed(derive_seed(seed, phase, position))


def compiled(network: Any) -> Any:
    """Return what calls a network through torch.compile, for one shape at a time, with its usual noise."""
    return torch.compile(network, dynamic=False, options={"fallback_random": True})


def name_user() -> None:
    """Name a user whom the password file does not know: PyTorch 2.11 names the compiler's cache after its user."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid_{os.getuid()}"


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or `cpu (model of the processor)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({models[0]})" if models else device.type


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has had; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OnMeta(TorchFunctionMode):
    """Makes modules whose tensors have shapes and types, and no numbers: they take no memory and no time.

    As `torch.device("meta")` alone does, but there PyTorch's compiler is loaded, which takes a second or more, for
    drawing numbers, dividing by one, identity matrices and resampling. What stands in for these has the same shape.
    """

    INSTEAD: ClassVar[dict[Any, Any]] = {
        torch.randn: torch.empty,
        torch.eye: lambda n, **_: torch.empty(n, n),
        F.interpolate: lambda x, size, **_: torch.empty(*x.shape[:2], *size),
    } | dict.fromkeys(
        (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.div), lambda x, *_, **__: x
    )

    def __enter__(self) -> Self:
        self.device = torch.device("meta").__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.INSTEAD.get(function, function)(*args, **(kwargs or {}))


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers the module learns or has learned; tensors that sub-modules share count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def copy_params_and_buffers(src: nn.Module, dst: nn.Module, require_all: bool = False) -> None:
    """Copy parameters and buffers of `src` to those of the same name in `dst`; gradient flags of `dst` stay.

    Tensors of `dst` that `src` lacks are left as they are. Raises ValueError for them under `require_all`, and for
    tensors of different shapes; nothing is copied then.
    """
    found, wanted = _params_and_buffers(src), _params_and_buffers(dst)
    if require_all and (missing := sorted(wanted.keys() - found.keys())):
        raise ValueError(f"{', '.join(missing[:8])}: missing in the source; require_all=False leaves them as they are")
    common = wanted.keys() & found.keys()
    for name in sorted(common):
        if found[name].shape != wanted[name].shape:
            shapes = f"{tuple(found[name].shape)} in the source, {tuple(wanted[name].shape)} in the destination"
            raise ValueError(f"{name}: has shape {shapes}")
    with torch.no_grad():
        for name in common:
            wanted[name].copy_(found[name])


def _params_and_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; shared ones under each of their names."""
    return dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))


def print_module_summary(module: nn.Module, inputs: Sequence[Any]) -> Any:
    """Print `module_summary(module, inputs)` and return the outputs of the module, computed without gradients."""
    outputs, shapes = _run_with_shapes(module, inputs)
    print(f"\n{_summary(module, shapes)}\n")
    return outputs


def module_summary(module: nn.Module, inputs: Sequence[Any]) -> str:
    """Run `module(*inputs)` once without gradients and return a table of its parts, one line for each that counts.

    Columns: name and class, parameters and buffers held directly by the part, shape of its output. Parts that hold
    nothing are left out. A tensor shared by parts counts where it first occurs, so the columns add up to the totals
    in the last line. Training mode and buffers of the module are those of the call: hand in a copy of a module whose
    forward changes its state.
    """
    return _summary(module, _run_with_shapes(module, inputs)[1])


def _run_with_shapes(module: nn.Module, inputs: Sequence[Any]) -> tuple[Any, dict[str, str]]:
    """Outputs of module(*inputs) without gradients, and the shape of every part's output by the part's name."""
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
    """Table of the module's parts, given the shapes of their outputs."""
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
    """Align the columns of `rows`, a head first and a total last: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {parameters:>{widths[1]}}  {buffers:>{widths[2]}}  {output}"
        for name, parameters, buffers, output in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
