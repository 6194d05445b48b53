"""Exported graphs equal the networks, for every family and any batch size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is an optional package")
pytest.importorskip("onnxruntime", reason="onnxruntime is an optional package")
import onnx
import onnxruntime
import torch
from snapshot_helpers import make_snapshot

from dnnlib.config import UserError
from training.networks import GENERATORS
from training.snapshots.onnx import export_onnx, onnx_paths


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


CASES = [(family, *options) for options in (("const", 0), ("none", 3)) for family in GENERATORS]


@pytest.mark.slow  # the exporter is slow; test_docs.py runs the commands of docs/exchange.md
@pytest.mark.parametrize(("family", "noise_mode", "c_dim"), CASES)
def test_exported_graphs_equal_the_networks(tmp_path: Path, family: str, noise_mode: Any, c_dim: int) -> None:
    snapshot = make_snapshot(tmp_path / "n.pkl", family, c_dim=c_dim)
    G = snapshot.G_ema
    paths = export_onnx(tmp_path / "g.onnx", snapshot, noise_mode)
    assert [path.name for path in paths] == ["g-mapping.onnx", "g-synthesis.onnx"]
    for path in paths:
        model = onnx.load(path)
        assert {node.domain for node in model.graph.node} == {""}  # standard operators only
        sizes = [value.type.tensor_type.shape.dim[0].dim_param for value in [*model.graph.input, *model.graph.output]]
        assert {*sizes} <= {"batch", ""}
        assert b".py" not in path.read_bytes()  # no stack traces of the exporting machine
        assert {p.key: p.value for p in model.metadata_props}["noise_mode"] == noise_mode
    mapping, synthesis = map(session, paths)
    cutoff = 1
    psi = np.ones(G.num_ws, np.float32)
    psi[:cutoff] = 0.6
    for batch in (1, 2, 5):
        z = torch.randn(batch, G.z_dim)
        c = torch.eye(3)[torch.arange(batch) % 3] if c_dim else None
        inputs = {"z": z.numpy(), "truncation_psi": psi} | ({"c": c.numpy()} if c is not None else {})
        (ws,) = mapping.run(["ws"], inputs)
        np.testing.assert_allclose(ws, G.mapping(z, c, 0.6, cutoff), rtol=0, atol=1e-5)
        (img,) = synthesis.run(["img"], {"ws": ws})
        expected = G(z, c, 0.6, cutoff, noise_mode=noise_mode)
        assert expected.std() > 0.1
        np.testing.assert_allclose(img, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("given", ["model-1.5", "model-1.5.onnx", "model-1.5.ONNX"])
def test_file_names_keep_their_dots(given: str) -> None:
    assert [str(path) for path in onnx_paths(Path("out", given))] == [
        "out/model-1.5-mapping.onnx",
        "out/model-1.5-synthesis.onnx",
    ]


def test_a_snapshot_without_g_ema_is_refused(tmp_path: Path) -> None:
    snapshot = replace(make_snapshot(tmp_path / "n.pkl"), G_ema=None)
    with pytest.raises(UserError, match=r"n\.pkl: contains no averaged generator \(G_ema\), which is the network to e"):
        export_onnx(tmp_path / "g.onnx", snapshot)
    assert [path.name for path in tmp_path.iterdir()] == ["n.pkl"]
