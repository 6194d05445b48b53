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
from torch_utils.sheets import arranged, caption_of, labelled_grid, sheet, titled
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
    commands = {"images": [out], "attention": [out], "video": ["--frames=1", f"--output={tmp_path}/v.gif"]}
    for command, arguments in commands.items():
        run_ok(command, *common, *arguments)
        result = run(command, *common, *arguments, "--seeds=0")
        assert (result.exit_code, "specify a class, 0..2" in result.output) == (2, True)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (96, 48), (40, 256)])
def test_captions_are_centred_above_their_columns(height: int, width: int) -> None:
    captions = ["x", "attention, rollout", "+0.5"]
    tile = np.full((height, width, 3), 255, np.uint8)
    drawn = sheet([[tile] * 3] * 2, captions)
    top = drawn.shape[0] - 2 * height - 2
    assert drawn.shape[1] == 3 * width + 2 * 2
    assert (drawn[top:] == 255).all()
    for column in range(3):
        band = drawn[:top, column * (width + 2) :][:, :width].min(axis=(0, 2))
        (dark,) = np.nonzero(band < 200)
        assert abs((dark.min() + dark.max() + 1) / 2 - width / 2) <= 2
    gaps = [drawn[:top, (column + 1) * (width + 2) - 2 :][:, :2] for column in range(2)]
    assert min(gap.min() for gap in gaps) > 200


def test_row_captions_are_left_of_their_rows() -> None:
    tile = np.full((96, 96, 3), 200, np.uint8)
    drawn = sheet([[tile] * 2, [tile]], ["one", "two"], ["seed 0", "a longer caption"])
    height, width, _ = drawn.shape
    left, top = width - 2 * 96 - 2, height - 2 * 96 - 2
    assert (drawn[top + 98 :, left + 98 :] == 255).all()  # the missing tile
    for row, y in enumerate((top, top + 98)):
        assert (drawn[y : y + 96, left : left + 96] == 200).all()
        dark = np.argwhere(drawn[y : y + 96, :left].max(axis=2) < 128)
        assert abs((dark[:, 0].min() + dark[:, 0].max()) / 2 - 48) < 6, row
        assert left - dark[:, 1].max() > 5


def test_captions_and_tiles_that_do_not_fit_are_refused() -> None:
    tile = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="a row has more tiles than the first"):
        sheet([[tile], [tile] * 2])
    for captions, row_captions in ((["a", "b"], []), ([], ["a", "b"])):
        with pytest.raises(ValueError, match="zip"):
            sheet([[tile]], captions, row_captions)


def test_tiles_have_one_size_for_captions_of_any_length() -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    short, long = (labelled_grid(images, captions, 2) for captions in (["0"] * 3, ["0", "1", "seed 4294967295"]))
    assert [image.shape[1] for image in (short, long)] == [194, 194]
    assert (long[:96, :96] == 0).all()
    below = long.shape[0] // 2 + 1
    assert (long[below : below + 96, :96] == 0).all()
    assert (long[below:, 96:] == 255).all()


def test_a_grid_of_very_many_images_is_not_enlarged() -> None:
    images = torch.zeros(1089, 3, 4, 4, dtype=torch.uint8)
    assert labelled_grid(images, [""] * 1089).shape[1] == 33 * (4 + 2) - 2


def test_captions_name_seeds() -> None:
    names = ["seed0004", "12", "proj00", "0-4", "seedling", "seed"]
    assert [caption_of(name) for name in names] == ["seed 4", "seed 12", "proj00", "0-4", "seedling", "seed"]


def test_images_are_arranged_at_their_own_size() -> None:
    small, wide = np.zeros((10, 20, 3), np.uint8), np.full((5, 90, 3), 100, np.uint8)
    drawn = arranged([[small, small], [wide]])
    assert drawn.shape == (16 + 10 + 16 + 5 + 16, 16 + 90 + 16, 3)
    assert (drawn[16:26, 16:36] == 0).all()
    assert (drawn[16:26, 52:72] == 0).all()
    assert (drawn[42:47, 16:106] == 100).all()
    assert (drawn == 255).sum() == drawn.size - 2 * small.size - wide.size
    assert (titled(wide, "a title")[-5:] == wide).all()


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
