"""Measure memory and time of attention for increasing numbers of tokens, with one and two derivatives.

\b
plain      the explicit softmax(Q K^T / sqrt(D)) V, with its (B, H, N, N) matrix (PyTorch's MATH)
fused      PyTorch's fused kernels, which have no second derivative
linformer  keys and values projected to --projected-tokens; fused for one derivative, plain for two, as in training
blockwise  fused forward, derivatives in blocks of the matrix (training/networks/blockwise.py)

One derivative corresponds to a training step: forward and backward. Two correspond to path length regularisation:
forward, backward of a random projection, and the backward of the squared gradients.

\b
    python benchmarks/self_attention.py --device=cuda --batch=8 --heads=4
    python benchmarks/self_attention.py --tokens=1024,4096 --forms=plain,blockwise

Prints one line of JSON for each type, number of derivatives and N. `peak_mib` is the peak memory without the inputs: of
tensors on a GPU; on a CPU the growth of resident memory, measured in a separate process per line (Linux only). Times
are measured with the allocator settings of training. If there is no result, `problem` states the reason.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from common import emit, synchronize
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dnnlib.allocator import tune_allocator
from dnnlib.cli import IntList, Script, option, with_options
from dnnlib.config import UserError
from torch_utils import distributed
from training.networks.blockwise import BLOCK_BYTES, blockwise_attention

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMS = ("plain", "fused", "linformer", "blockwise")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

# Environment of the process whose memory is measured: glibc maps each tensor and unmaps it when it is freed.
UNMAP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}

# Upper bounds on the number of float32 matrices in memory for plain attention with 1 and 2 derivatives (measured: 3.1
# and 11.2), and on the number of blocks for blockwise attention.
MATRICES = {1: 4, 2: 12}
BLOCKS = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A measurement: type of attention, number of derivatives, and sizes."""

    form: str
    derivatives: int
    tokens: int
    batch: int
    heads: int
    head_dim: int
    projected_tokens: int
    dtype: str

    def matrix_gib(self) -> float:
        """Return the predicted memory of the attention matrices in GiB; all other tensors are small."""
        if self.form == "fused":
            return 0
        if self.form == "blockwise":
            return BLOCKS * BLOCK_BYTES["cpu"] / 2**30
        keys = self.projected_tokens if self.form == "linformer" else self.tokens
        return MATRICES[self.derivatives] * self.batch * self.heads * self.tokens * keys * 4 / 2**30

    def small(self) -> Case:
        """Return a tiny case of the same type for the warm-up."""
        return replace(self, tokens=16)

    def prepare(self, device: torch.device) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Return random inputs and a function that computes the output (B, H, N, D) from them."""
        inputs = make_inputs(self, device, self.tokens)
        return inputs, partial(attend, self, inputs)


SHARED = (  # options of all attention benchmarks
    option(
        "--derivatives", type=IntList(), default="1,2", show_default=True, help="Numbers of derivatives: 1, 2 or both."
    ),
    option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size B."),
    option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Input type."),
    option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]"),
    option("--threads", type=click.IntRange(min=1), help="CPU threads. [PyTorch's choice]"),
    option(
        "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs; reports the median."
    ),
    option(
        "--max-gib",
        type=click.FloatRange(min=0, min_open=True),
        help="Skip cases with larger matrices. [half of the CPU's memory; on a GPU no limit]",
    ),
)


@click.command(cls=Script, help=__doc__)
@option(
    "--tokens",
    type=IntList(),
    default="256,512,1024,2048,4096,8192,16384",
    show_default=True,
    help="Numbers of tokens N; R x R pixels are R^2 tokens.",
)
@option("--forms", default=",".join(FORMS), show_default=True, help="Types of attention.")
@option("--heads", type=click.IntRange(min=1), default=1, show_default=True, help="Heads H.")
@option("--head-dim", type=click.IntRange(min=1), default=32, show_default=True, help="Channels per head D.")
@option("--projected-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Linformer's k.")
@with_options(SHARED)
def main(
    tokens: tuple[int, ...],
    forms: str,
    heads: int,
    head_dim: int,
    projected_tokens: int,
    derivatives: tuple[int, ...],
    batch: int,
    dtype: str,
    **machine: Any,
) -> None:
    sizes = partial(Case, batch=batch, heads=heads, head_dim=head_dim, projected_tokens=projected_tokens, dtype=dtype)
    cases = [
        sizes(form=form, derivatives=order, tokens=N)
        for form in check_choices(forms, FORMS, derivatives)
        for order in derivatives
        for N in tokens
    ]
    run_cases("self_attention", cases, **machine)


def check_choices(forms: str, known: Sequence[str], derivatives: Sequence[int]) -> list[str]:
    """Return the items of --forms. Raises UserError for unknown types and for derivatives other than 1 and 2."""
    chosen = forms.split(",")
    if unknown := sorted(set(chosen) - set(known)):
        raise UserError(f"--forms={forms}: unknown type {unknown[0]!r}; choose from {','.join(known)}")
    if set(derivatives) - {1, 2}:
        raise UserError(f"--derivatives={','.join(map(str, derivatives))}: choose from 1,2")
    return chosen


def run_cases(
    benchmark: str, cases: Sequence[Any], device: str | None, threads: int | None, repeats: int, max_gib: float | None
) -> None:
    """Measure cases (`Case`, or a class with its methods) and print one line of JSON for each."""
    where = distributed.use_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    limit = memory_limit(where, max_gib)
    for case in cases:
        emit({"benchmark": benchmark, **asdict(case), **result(case, where, repeats, limit)}, where)


def memory_limit(device: torch.device, max_gib: float | None) -> float:
    """Return the limit in GiB above which a case is skipped. Raises UserError if peak memory cannot be read."""
    if device.type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        raise UserError(f"--device={device}: peak memory is read from Linux's /proc, which is not available here")
    if max_gib is not None:
        return max_gib
    return host_gib() / 2 if device.type == "cpu" else math.inf


def host_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def result(case: Any, device: torch.device, repeats: int, max_gib: float) -> dict[str, Any]:
    """Return time and peak memory of a case, or its problem."""
    if case.matrix_gib() > max_gib:
        return {"problem": f"not started: needs matrices of about {case.matrix_gib():.3g} GiB, limit {max_gib:.3g}"}
    if device.type != "cpu":
        return measure(case, device, repeats, torch.get_num_threads())
    own_process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, UNMAP_FREED_MEMORY), own_process as pool:
        try:
            return pool.submit(measure, case, device, repeats, torch.get_num_threads()).result()
        except BrokenProcessPool:  # killed by the kernel's OOM killer
            return {"problem": "out of memory"}


def measure(case: Any, device: torch.device, repeats: int, threads: int) -> dict[str, Any]:
    """Run a case in this process: once for the peak memory, then timed."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        differentiate(case, *case.small().prepare(device))  # loads libraries and kernels, not the case's memory
        inputs, run = case.prepare(device)
        before = reset_peak(device)
        differentiate(case, inputs, run)
        needed = peak(device) - before
        tune_allocator()
        differentiate(case, inputs, run)
        times = [seconds(case, inputs, run, device) for _ in range(repeats)]
    except RuntimeError as error:
        return {"problem": explain(error)}
    return {"ms": round(statistics.median(times) * 1e3, 2), "peak_mib": round(needed, 1)}


def seconds(case: Any, inputs: list[Tensor], run: Callable[[], Tensor], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    differentiate(case, inputs, run)
    synchronize(device)
    return time.perf_counter() - start


def explain(error: RuntimeError) -> str:
    """Describe the errors that count as results; re-raise all others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if "derivative for aten::_scaled_dot_product" in text:
        return "has no second derivative"
    raise error


def make_inputs(case: Case, device: torch.device, tokens: int) -> list[Tensor]:
    """Return queries, keys, values (B, H, N, D), and for Linformer the projection (k, N), all requiring gradients."""
    shape = (case.batch, case.heads, tokens, case.head_dim)
    inputs = [torch.randn(shape, device=device) for _ in range(3)]
    if case.form == "linformer":
        inputs.append(torch.randn(case.projected_tokens, tokens, device=device) / math.sqrt(tokens))
    return [x.to(DTYPES[case.dtype]).requires_grad_() for x in inputs]


def differentiate(case: Any, inputs: list[Tensor], run: Callable[[], Tensor]) -> None:
    """Run the forward pass and one or two derivatives with respect to all inputs."""
    out = run()
    y = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, y, create_graph=case.derivatives == 2)
    if case.derivatives == 2:
        torch.autograd.grad(torch.stack([g.float().square().sum() for g in gradients]).sum(), inputs)


def attend(case: Case, inputs: list[Tensor]) -> Tensor:
    """Compute the case's attention on the inputs: (B, H, N, D)."""
    q, k, v, *projection = inputs
    if case.form == "blockwise":
        return blockwise_attention(q, k, v)
    for E in projection:
        k, v = E @ k, E @ v  # (B, H, k, D)
    explicit = case.form == "plain" or (case.form == "linformer" and case.derivatives == 2)
    with sdpa_kernel([SDPBackend.MATH] if explicit else FUSED):
        return F.scaled_dot_product_attention(q, k, v)


def reset_peak(device: torch.device) -> float:
    """Reset the peak and return the current memory in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


def peak(device: torch.device) -> float:
    """Return the peak memory since `reset_peak` in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_mib("VmHWM")


def resident_mib(name: str) -> float:
    """Return a value of /proc/self/status; unlike getrusage's, it does not include the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10


if __name__ == "__main__":
    main()
