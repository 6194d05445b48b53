"""Choice and preparation of this project's GPU kernels, for the whole process."""

from __future__ import annotations

import torch

from torch_utils import custom_ops
from torch_utils.ops import encoder

# Values of run.kernels: all kernels, the CUDA operators (bias_act, upfirdn2d) without the fused encoder kernels, or the
# PyTorch reference for everything.
KERNELS = ("all", "operators", "none")


def choose(kernels: str) -> None:
    """Use these KERNELS for `impl="auto"` from now on, if they are available. Call before `prepare`."""
    custom_ops.set_default("reference" if kernels == "none" else "auto")
    encoder.is_enabled = kernels == "all"


def prepare(device: torch.device) -> str:
    """Build and load the kernels in every process; return a line per kind for the log. A collective call."""
    if device.type != "cuda":
        return "Kernels: not used on the CPU"
    if custom_ops.default() == "reference":
        return "Kernels: off, using the PyTorch reference"
    lines = [custom_ops.prepare(device)]
    lines.append(encoder.prepare(device) if encoder.is_enabled else "Encoder kernels: off, using the PyTorch reference")
    return "\n".join(lines)
