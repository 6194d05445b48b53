"""Count the kernel launches of each phase of a training step without a GPU, and detect host-device synchronisation.

    python benchmarks/launches.py --cases=readme,cifar-large

A real `Trainer` runs every phase twice on fake CUDA tensors, which have shapes, types and devices but no data. Prints
one line of JSON for the second call of each phase (the first one also allocates Adam's moments): the number of ATen
operators that launch at least one kernel (excluding views and allocations), the MiB that these operators read and
write, and the most frequent operators; or the `problem` that ended the phase, and its location. A phase must not read a
value from the GPU, copy between host and GPU, or mix devices. Needs a CUDA build of PyTorch and a C++ compiler.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from common import README_EXAMPLE, ROOT, emit
from fake import fake_tensors, new_batch, new_trainer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError, override
from torch_utils import custom_ops
from training.config import PRESETS, Environment, TrainConfig, apply_options, resolve
from training.training_loop import Trainer

STUB = Path(__file__).with_name("cuda_stub.cpp")
DEVICE = torch.device("cuda:0")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training configuration with image side, number of classes, and implementation of the operators."""

    config: TrainConfig
    side: int = 32
    classes: int = 0
    impl: custom_ops.Impl = "auto"


PATH_LENGTH = {"precision": "fp32", "loss.pl_weight": 2.0, "loss.style_mixing": 0.9}
ESTIMATE = {"loss.penalty": "estimate", "loss.penalty_share": 0.5, "discriminator.mbstd_group_size": 4}
CONSISTENCY = {"loss.bcr_real": 10.0, "loss.bcr_fake": 10.0}
PAIRS = {"loss.objective": "relativistic", "loss.centring": 0.01, "augment.paired": True, **ESTIMATE, **CONSISTENCY}
SLICING = {"discriminator.san": True, "loss.lecam": 0.3, **ESTIMATE}
CASES = {
    "readme": Case(config=README_EXAMPLE),
    "cifar-large": Case(config=override(PRESETS["cifar-large"], {"batch_size": 64})),
    "cifar-stylegan2": Case(config=PRESETS["cifar-stylegan2"]),
    "auto-64": Case(config=PRESETS["auto"], side=64),
    "styleformer-c256": Case(config=PRESETS["styleformer-c256"], side=256),
    "church128-l": Case(config=PRESETS["church128-l"], side=128),
    "transgan-cifar": Case(config=PRESETS["transgan-cifar"]),
    "r3gan-cifar": Case(config=override(PRESETS["r3gan-cifar"], {"batch_size": 64}), classes=10),
    "pairs": Case(config=apply_options(README_EXAMPLE, PAIRS)),
    "slicing": Case(config=apply_options(README_EXAMPLE, SLICING)),
    "fp16-bgcfnc": Case(config=override(README_EXAMPLE, {"precision": "fp16", "augment.pipe": "bgcfnc"})),
    "fp32-path-length-labels": Case(config=override(README_EXAMPLE, PATH_LENGTH), classes=10),
    "reference-operators": Case(config=README_EXAMPLE, impl="reference"),
}


@click.command(cls=Script, help=__doc__)
@option("--cases", type=NameList(), default=",".join(CASES), show_default=True, help="Cases to measure.")
def main(cases: tuple[str, ...]) -> None:
    for case in cases:
        if case not in CASES:
            raise UserError(f"--cases: {case!r} is not one of {', '.join(CASES)}")
    with processes() as pool:
        for case in cases:
            for row in pool.submit(count_launches, case).result():
                emit(row, torch.device("cpu"))


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of one process in which PyTorch finds the GPU stub. Raises UserError if the stub does not build."""
    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} was built without CUDA; install a CUDA build (no GPU is needed)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"  # the name of the driver library that PyTorch loads
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-DCUDA_MAJOR={torch.version.cuda.split('.')[0]}"]
        command = [custom_ops.host_compiler(), *flags, str(STUB), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            raise UserError(f"{STUB.name} cannot be compiled: {reason}; install g++ or set CXX") from None
        with (
            patch.dict(os.environ, {"LD_PRELOAD": str(library)}),
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            yield pool


def count_launches(case: str) -> list[dict[str, Any]]:
    """Run each phase of a case once. Must run in the pool of `processes`."""
    chosen = CASES[case]
    env = Environment(img_shape=(3, chosen.side, chosen.side), c_dim=chosen.classes, on_gpu=True, has_bf16=True)
    config = resolve(override(chosen.config, {"run.graphs": False}), env)
    with fake_tensors(), custom_ops.implementation(chosen.impl):
        trainer = new_trainer(config, env, DEVICE)
        batch = new_batch(trainer)
        steps: dict[str, tuple[Any, ...]] = {phase.name: (trainer.run_phase, phase, *batch) for phase in trainer.phases}
        steps["averages"] = (update_averages, trainer)
        return [{"benchmark": "launches", "case": case, "phase": name} | watch(*step) for name, step in steps.items()]


def update_averages(trainer: Trainer) -> None:
    """Update averages, schedules and ADA, as after the phases of a step."""
    trainer.ema.update(trainer.batch_size, trainer.batch_size)
    trainer.profiles.update(trainer.batch_size, trainer.batch_size)
    trainer.follow_schedules()
    trainer.ada.update(trainer.config.augment.ada_interval, trainer.batch_size)


def watch(function: Callable[..., object], *args: Any) -> dict[str, Any]:
    """Call a function twice on the fake GPU; return the launches of the second call, or the problem that ended one."""
    for _ in range(2):
        with Watch() as watched:
            try:
                function(*args)
            except Exception as error:
                return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}", "where": place(error)}
    return {
        "launches": watched.count.total(),
        "mib": round(watched.bytes / 2**20),
        "most": dict(watched.count.most_common(8)),
        "largest_filter": watched.largest_filter,
    }


def place(error: Exception) -> str | None:
    """Return the line of training/ or torch_utils/ that raised an error; None if it was raised in a derivative."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [f"{file.relative_to(ROOT)}:{line}" for file, line in places if file.is_relative_to(ROOT)]
    return next((x for x in reversed(ours) if x.startswith(("training/", "torch_utils/"))), None)


class HostError(Exception):
    """Synchronization of host and GPU: the host waits for the GPU, or the GPU for the host."""


class Watch(TorchDispatchMode):
    """Counter of operators that launch kernels. Raises HostError if an operator moves data between host and GPU.

    `bytes` is the size of the inputs and outputs of these operators, i.e. their memory traffic without caches. Fake
    tensors themselves raise if a value is read (`item`, `nonzero`) or devices are mixed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes = 0
        self.largest_filter = 0  # side in pixels

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim":  # reads a property of a tensor
            return result
        given = [*tensors(args), *tensors((kwargs or {}).values())]
        found = [*tensors([result])]
        devices = {kind(x) for x in (*given, *found)}
        is_copy = function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        # A CPU tensor without dimensions is passed by value.
        if len(devices) > 1 and (is_copy or any(kind(x) == "cpu" for x in found + [y for y in given if y.ndim])):
            raise HostError(f"{function} between {' and '.join(sorted(devices))}")
        if "cuda" in devices and launches(function):
            self.count[str(function.overloadpacket).removeprefix("aten.")] += 1
            self.bytes += sum(map(size_in_bytes, (*given, *found)))
            if function.overloadpacket is torch.ops.aten.convolution:
                self.largest_filter = max(self.largest_filter, *args[1].shape[2:])
        return result


def kind(x: Tensor) -> str:
    """Return the device type of a tensor."""
    return x.fake_device.type if isinstance(x, FakeTensor) else x.device.type  # FakeTensor.device runs an operator


def size_in_bytes(x: Tensor) -> int:
    """Return the size of the distinct elements of a tensor, i.e. without expanded dimensions."""
    return x.itemsize * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors in nested lists and tuples."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors(x)


@cache
def launches(function: Any) -> bool:
    """Return whether an operator runs a kernel, i.e. is neither a view of its argument nor an allocation."""
    aten = torch.ops.aten
    if function.overloadpacket in (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view):
        return False
    aliases = [output.alias_info for output in function._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and function.overloadpacket is not aten.detach


if __name__ == "__main__":
    main()
