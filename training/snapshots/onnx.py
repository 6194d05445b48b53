"""Export of G_ema as two ONNX graphs, for programs without PyTorch and without this project.

    NAME-mapping.onnx     z (batch, z_dim), truncation_psi (num_ws), c (batch, c_dim) of a conditional network -> ws
    NAME-synthesis.onnx   ws (batch, num_ws, w_dim) -> img (batch, channels, height, width) in about [-1, 1]

Both graphs accept any batch size, compute in float32 and consist of standard operators. truncation_psi has one value
per style, which also covers the truncation cutoff: for example 0.7 for the first styles and 1 for the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dnnlib
from dnnlib.config import WriteError
from dnnlib.util import import_extra, replaced
from torch_utils import custom_ops
from training.snapshots.exchange import make_parent, refuse_existing
from training.snapshots.snapshot import Snapshot

FixedNoise = Literal["const", "none"]  # ONNX runtimes have no common random generator


class _Mapping(nn.Module):
    """Mapping network of a generator with truncation psi as an input."""

    def __init__(self, G: Any) -> None:
        super().__init__()
        self.mapping = G.mapping

    def forward(self, z: Tensor, truncation_psi: Tensor, c: Tensor | None = None) -> Tensor:
        w_avg = self.mapping.w_avg
        ws = self.mapping(z, c)  # (B, num_ws, w_dim)
        return w_avg + truncation_psi[:, None] * (ws - w_avg)


class _Synthesis(nn.Module):
    """Synthesis network of a generator with a fixed noise mode."""

    def __init__(self, G: Any, noise_mode: FixedNoise) -> None:
        super().__init__()
        self.synthesis, self.noise_mode = G.synthesis, noise_mode

    def forward(self, ws: Tensor) -> Tensor:
        img: Tensor = self.synthesis(ws, self.noise_mode)
        return img


def onnx_paths(path: Path) -> tuple[Path, Path]:
    """Return the paths of the mapping and synthesis graphs for NAME or NAME.onnx."""
    name = path.stem if path.suffix.lower() == ".onnx" else path.name
    return path.with_name(f"{name}-mapping.onnx"), path.with_name(f"{name}-synthesis.onnx")


def export_onnx(path: Path, snapshot: Snapshot, noise_mode: FixedNoise = "const") -> tuple[Path, Path]:
    """Write both graphs of `snapshot.G_ema`, which must be on the CPU; return `onnx_paths(path)`.

    Raises UserError if a file exists or a package is missing, WriteError if a file cannot be written.
    """
    import_extra("onnxscript", "onnx")
    paths = onnx_paths(path)
    for part in paths:
        refuse_existing(part)
    snapshot.require_generator("is the network to export")
    G = snapshot.G_ema
    inputs = {"z": torch.randn(2, G.z_dim), "truncation_psi": torch.ones(G.num_ws), "c": torch.zeros(2, G.c_dim)}
    if not G.c_dim:
        del inputs["c"]
    mapping = _trace(_Mapping(G), inputs, "ws")
    synthesis = _trace(_Synthesis(G, noise_mode), {"ws": torch.randn(2, G.num_ws, G.w_dim)}, "img")
    metadata = {
        "written_by": f"styleformer {dnnlib.__version__}",
        "kimg": f"{snapshot.kimg:g}",
        "noise_mode": noise_mode,
    }
    for part, program in zip(paths, (mapping, synthesis), strict=True):
        _strip(program)
        program.model.metadata_props.update(metadata)
        _save(program, part)
    return paths


def _trace(network: nn.Module, inputs: Mapping[str, Tensor], output: str) -> Any:
    """Return the ONNX program of a network; the first axis of inputs with several dimensions is the batch."""
    batch = torch.export.Dim("batch")
    first = next(iter(inputs))
    shapes = {name: {0: batch} if x.ndim > 1 else None for name, x in inputs.items()}
    with torch.no_grad(), custom_ops.implementation("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of the exporter
        # Strict mode, because len(x) would otherwise specialise the batch size.
        program = torch.export.export(network, (), dict(inputs), dynamic_shapes=shapes, strict=True)
        return torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=dict.fromkeys(inputs) | {first: shapes[first]},  # one input names the batch axis for all
        )


def _strip(program: Any) -> None:
    """Remove the exporter's metadata: each operator's stack trace, with paths of this machine."""
    passes = import_extra("onnx_ir.passes.common", "onnx")
    passes.ClearMetadataAndDocStringPass()(program.model)
    graph = program.model.graph
    for value in [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]:
        value.metadata_props.clear()


def _save(program: Any, path: Path) -> None:
    """Write a program atomically. Raises WriteError."""
    make_parent(path)
    try:
        with replaced(path) as temporary:
            program.save(temporary)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error
