"""Behaviour shared by all commands of generate.py: any model, input files, equal results on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from exploration_helpers import FAMILIES, make_model, make_snapshot, pixels, run, run_ok
from torch import Tensor, nn

from dnnlib.config import UserError, WriteError
from exploration.attention_maps import record
from exploration.directions import factorise, sampled_w
from exploration.model import Model, read_styles, save_styles, seed_latents
from training.networks.mapping import MappingNetwork


class Other(nn.Module):
    """A generator of an unknown family: one style, read by no linear layer."""

    z_dim, w_dim, c_dim, num_ws, img_shape = 16, 12, 0, 1, (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.mapping = MappingNetwork(z_dim=16, c_dim=0, w_dim=12, num_ws=1, num_layers=1)
        self.synthesis = Plain()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Parameter(torch.randn(12, 3))

    def forward(self, ws: Tensor, noise_mode: str = "const") -> Tensor:
        return (ws[:, 0].tanh() @ self.colours)[:, :, None, None].expand(-1, -1, 8, 8)


def model_of(G: Any, **options: Any) -> Model:
    return Model(G=G, device=torch.device("cpu"), c=torch.zeros(1, 0), **options)


def test_unsupported_operations_are_refused_by_name() -> None:
    model = model_of(Other())
    assert model.images(model.styles_of((0, 1))).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="Other: no linear layer reads these styles, so --method=sefa"):
        factorise(model, (0,), 2, sampled_w(model, 10))
    with pytest.raises(UserError, match="Other has no self-attention"):
        record(model, model.styles_of((0,)))
    with pytest.raises(UserError, match="Linear has no styles: it can only generate images"):
        model_of(nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_depend_only_on_their_styles(family: str) -> None:
    """Images equal the output of G bit for bit at any batch size."""
    several, single = make_model(family, batch=16), make_model(family, batch=1)
    ws = several.styles_of(range(11))
    assert torch.equal(ws[7:9], several.styles_of((7, 8)))
    images = several.images(ws)
    assert torch.equal(images, single.images(ws))
    with torch.no_grad():
        img = several.G(seed_latents((7,), several.G.z_dim), None)
    assert (images[7] - (img[0] * 127.5 + 128).clamp(0, 255).to(torch.uint8).int()).abs().max() <= 1


def test_saved_styles_of_a_conditional_network_need_no_class(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, c_dim=3)
    np.savez(tmp_path / "w.npz", w=np.ones((1, 1, 12)))
    common = [f"--network={network}", f"--projected-w={tmp_path}/w.npz"]
    out = f"--outdir={tmp_path}"
    commands = {"images": [out], "attention": [out], "video": ["--frames=2", f"--output={tmp_path}/v.gif"]}
    for command, arguments in commands.items():
        run_ok(command, *common, *arguments)
        result = run(command, *common, *arguments, "--seeds=0")
        assert (result.exit_code, "specify a class, 0..2" in result.output) == (2, True)


def test_a_single_style_per_image_is_used_for_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    G = make_model().G
    np.savez(tmp_path / "w.npz", w=np.random.RandomState(0).randn(2, 1, 12))
    ws = read_styles(tmp_path / "w.npz", G)
    assert ws.shape == (2, 5, 12)
    assert torch.equal(ws[:, 4], ws[:, 0])
    np.savez(tmp_path / "nan.npz", w=np.full((2, 1, 12), np.nan))
    with pytest.raises(UserError, match="not finite"):
        read_styles(tmp_path / "nan.npz", G)
    with pytest.raises(WriteError, match=r"none/w.npz: cannot be written"):
        save_styles(tmp_path / "none" / "w.npz", ws)
    monkeypatch.setattr(np, "load", Mock(side_effect=EOFError))
    with pytest.raises(UserError, match=r"not an .npz file of arrays \(EOFError\)"):
        read_styles(tmp_path / "nan.npz", G)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_commands_give_the_same_results_on_a_gpu(family: str, shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, family)
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        common = [f"--network={network}", f"--device={device}"]
        run_ok("mix", *common, "--rows=0-1", "--cols=2-4", f"--outdir={out}")
        run_ok("directions", *common, "--components=1", "--seeds=0", "--steps=3", f"--outdir={out}")
        edit = [f"--direction={out}/directions.npz:0", "--trunc-to=0.3", "--interpolation=z"]
        run_ok("video", *common, "--seeds=0-1", "--frames=3", *edit, f"--output={out}/v.gif")
        if family != "stylegan2":
            run_ok("attention", *common, "--seeds=0", "--query=grid:2", f"--outdir={out}")
        run_ok("project", *common, f"--target={out}/0-2.png", "--loss=pixels", "--num-steps=5", f"--outdir={out}")
    for name in ("grid.png", "direction00.png", "proj00.png"):
        ours, theirs = (pixels(tmp_path / device / name).astype(int) for device in ("cpu", "cuda"))
        assert np.abs(ours - theirs).mean() < 2, name
