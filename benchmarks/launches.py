"""Count what each phase of a training step launches on a GPU, without one, and find where the host waits for it.

    python benchmarks/launches.py --cases=readme,cifar-large

A real `Trainer` runs every phase on fake CUDA tensors, which have shapes, types and devices but no values. Prints one
line of JSON for each phase: the number of ATen operators that launch at least one kernel (views and allocations do
not), and the most frequent ones; or the `problem` that ended it, and where. A phase must not read a value from the GPU,
copy anything from or to it, or mix devices. Needs a CUDA build of PyTorch and a C++ compiler.
"""

from __future__ import annotations

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
from training.config import PRESETS, Environment, TrainConfig, resolve
from training.training_loop import Trainer

STUB = Path(__file__).with_name("cuda_stub.cpp")
DEVICE = torch.device("cuda:0")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training configuration, the side of its images, the number of its classes, and the operators it uses."""

    config: TrainConfig
    side: int = 32
    classes: int = 0
    impl: custom_ops.Impl = "auto"


PATH_LENGTH = {"precision": "fp32", "loss.pl_weight": 2.0, "loss.style_mixing": 0.9}
CASES = {
    "readme": Case(config=README_EXAMPLE),
    "cifar-large": Case(config=override(PRESETS["cifar-large"], {"batch_size": 64})),
    "cifar-stylegan2": Case(config=PRESETS["cifar-stylegan2"]),
    "auto-64": Case(config=PRESETS["auto"], side=64),
    "styleformer-c256": Case(config=PRESETS["styleformer-c256"], side=256),
    "church128-l": Case(config=PRESETS["church128-l"], side=128),
    "transgan-cifar": Case(config=PRESETS["transgan-cifar"]),
    "fp16-bgcfnc": Case(config=override(README_EXAMPLE, {"precision": "fp16", "augment.pipe": "bgcfnc"})),
    "fp32-path-length-labels": Case(config=override(README_EXAMPLE, PATH_LENGTH), classes=10),
    "reference-operators": Case(config=README_EXAMPLE, impl="reference"),
}


@click.command(cls=Script, help=__doc__)
@option("--cases", type=NameList(), default=",".join(CASES), show_default=True, help="What to train.")
def main(cases: tuple[str, ...]) -> None:
    for case in cases:
        if case not in CASES:
            raise UserError(f"--cases: {case!r} is none of {', '.join(CASES)}")
    with processes() as pool:
        for case in cases:
            for row in pool.submit(count_launches, case).result():
                emit(row, torch.device("cpu"))


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """One process in which PyTorch sees the stub of a GPU. Raises UserError where that cannot be built."""
    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} was built without CUDA; install a build with it (no GPU is needed)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"  # found under this name when PyTorch looks for the driver
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-DCUDA_MAJOR={torch.version.cuda.split('.')[0]}"]
        command = [custom_ops.host_compiler(), *flags, str(STUB), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or error
            raise UserError(f"{STUB.name} cannot be compiled: {why}; install g++ or set CXX") from None
        with (
            patch.dict(os.environ, {"LD_PRELOAD": str(library)}),
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            yield pool


def count_launches(case: str) -> list[dict[str, Any]]:
    """Run each phase of a case once; call it in one of `processes`."""
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
    """Do what follows the phases of a step."""
    trainer.ema.update(trainer.batch_size, trainer.batch_size)
    trainer.ada.update(trainer.config.augment.ada_interval, trainer.batch_size)


def watch(function: Callable[..., object], *args: Any) -> dict[str, Any]:
    """Call a function on the fake GPU; return how many operators it launches, or what ended it."""
    with Watch() as watched:
        try:
            function(*args)
        except Exception as error:
            return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}", "where": place(error)}
    most = dict(watched.count.most_common(8))
    return {"launches": watched.count.total(), "most": most, "largest_filter": watched.largest_filter}


def place(error: Exception) -> str | None:
    """Return the line of the networks or the training that an error came from; None where it came from a derivative."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [f"{file.relative_to(ROOT)}:{line}" for file, line in places if file.is_relative_to(ROOT)]
    return next((x for x in reversed(ours) if x.startswith(("training/", "torch_utils/"))), None)


class HostError(Exception):
    """The host waits for the GPU, or sends something that it has to wait for."""


class Watch(TorchDispatchMode):
    """Counts operators that launch kernels. Raises HostError where one moves data between the host and the GPU.

    Where a value is read (`item`, `nonzero`) or devices are mixed, fake tensors raise by themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest_filter = 0  # side of it, in pixels

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim":  # asks for a property
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
            if function.overloadpacket is torch.ops.aten.convolution:
                self.largest_filter = max(self.largest_filter, *args[1].shape[2:])
        return result


def kind(x: Tensor) -> str:
    """Return the kind of device that a tensor is on."""
    return x.fake_device.type if isinstance(x, FakeTensor) else x.device.type  # to ask a fake one takes an operator


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, and those in lists of them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors(x)


@cache
def launches(function: Any) -> bool:
    """Whether an operator runs a kernel: it is no view of its argument, and does not only allocate."""
    aten = torch.ops.aten
    if function.overloadpacket in (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view):
        return False
    aliases = [output.alias_info for output in function._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and function.overloadpacket is not aten.detach


if __name__ == "__main__":
    main()
