"""generate.py mix: selection of styles, style groups, and the mixed images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exploration_helpers import FAMILIES, make_model, make_snapshot, pixels, run, run_ok

import style_mixing
from dnnlib.config import UserError
from exploration import mixing
from exploration.mixing import mix
from exploration.model import save_styles
from exploration.style_groups import choose_styles, describe_styles, format_ranges
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.snapshots.snapshot import load_network


def test_style_groups_are_thirds_of_the_resolutions() -> None:
    """StyleGAN2 at 256: 4 and 8 px are coarse, 16 and 32 middle; only the first convolution reads style 0."""
    groups = StyleGAN2Config(resolutions=7).style_groups()
    assert groups == {"coarse": (0, 1, 2), "middle": (3, 4, 5, 6), "fine": tuple(range(7, 14))}
    assert StyleGAN2Config(resolutions=2).style_groups() == {"coarse": (0,), "fine": (1, 2, 3)}
    assert StyleGAN2Config(resolutions=1).style_groups() == {"coarse": (0, 1)}
    assert FAMILIES["styleformer"].style_groups() == {"coarse": (0,), "middle": (1, 2), "fine": (3, 4)}
    parts = StyleformerCConfig(widths=(32, 32), layers=(1, 2), handover=16, resolutions=3).style_groups()
    assert (parts["transformer"], parts["conv"]) == ((0, 1, 2), (3, 4, 5))
    assert (parts["coarse"], parts["middle"], parts["fine"]) == ((0,), (1, 2), (3, 4, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_of_a_style_matches_its_first_layer(family: str) -> None:
    """The first layer that reads a style has a feature map of this grid or returns the image."""
    config, model = FAMILIES[family], make_model(family)
    assert len(config.style_grids) == config.num_ws
    sizes: dict[int, int] = {}  # style -> number of tokens or pixels in the first layer that reads the style
    ws = torch.arange(config.num_ws).float()[None, :, None].expand(1, -1, config.w_dim)

    outputs: dict[Any, torch.Tensor] = {}  # of the modulated layers
    read: dict[Any, int] = {}  # affine layer -> style
    for module in model.G.synthesis.modules():
        if type(module).__name__ in ("EncoderBlock", "ModulatedConv"):
            module.register_forward_hook(lambda module, args, out: outputs.update({module: out}))
            module.affine.register_forward_hook(lambda module, args, out: read.update({module: int(args[0][0, 0])}))
    model.G.synthesis(ws)
    for module, out in outputs.items():
        size = out.shape[1] if out.ndim == 3 else out.shape[2] * out.shape[3]
        sizes.setdefault(read[module.affine], size)
    assert sizes == {index: h * w for index, (h, w) in enumerate(config.style_grids[:-1])}
    assert config.style_grids[-1] == config.img_size


def test_styles_are_chosen_by_number_range_and_name() -> None:
    groups = {"coarse": (0, 1), "fine": (4, 5)}
    assert choose_styles("3,coarse,0-1", 6, groups) == (0, 1, 3)
    assert choose_styles("all", 3, {}) == (0, 1, 2)
    assert format_ranges((0, 1, 2, 4, 6, 7)) == "0-2,4,6-7"
    for text in ("6", "2-1", "middle", "", "-1", "1-"):
        with pytest.raises(UserError, match=r"choose from 0-5, all, coarse \(0-1\), fine \(4-5\)"):
            choose_styles(text, 6, groups)
    with pytest.raises(UserError, match="a single style, without layers to choose from"):
        choose_styles("coarse", 1, {})


def test_mix_copies_the_chosen_styles_from_the_columns() -> None:
    rows, cols = torch.randn(2, 5, 3), torch.randn(4, 5, 3)
    mixed = mix(rows, cols, (1, 3))
    for r in range(2):
        for c in range(4):
            for i in range(5):
                assert torch.equal(mixed[r, c, i], cols[c, i] if i in (1, 3) else rows[r, i])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_writes_mixtures_and_a_grid(family: str, shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip, family), tmp_path / "out"
    run_ok("images", f"--network={network}", "--seeds=1,2,7,8,9", f"--outdir={tmp_path / 'pure'}")
    output = run_ok("mix", f"--network={network}", "--rows=1,2", "--cols=7-9", "--styles=coarse", f"--outdir={out}")
    assert "6 mixtures" in output
    grid = pixels(out / "grid.png")
    top, left = grid.shape[0] - (3 * 96 + 10 + 2), grid.shape[1] - (4 * 96 + 10 + 2 * 2)  # captions
    assert max(grid[:top].min(), grid[:, :left].min()) < 100
    grid = grid[top:, left:]  # each pixel is enlarged to 3 x 3
    places = (0, 106, 204, 302)
    tiles = [[grid[y : y + 96 : 3, x : x + 96 : 3] for x in places] for y in places[:3]]
    assert (tiles[0][0] == 255).all()
    assert (grid[96:106] == 255).all()
    for r, row in enumerate((1, 2), start=1):
        assert np.array_equal(tiles[r][0], pixels(tmp_path / "pure" / f"seed{row:04d}.png"))
        for c, col in enumerate((7, 8, 9), start=1):
            assert np.array_equal(tiles[r][c], pixels(out / f"{row}-{col}.png"))
            assert np.array_equal(tiles[0][c], pixels(tmp_path / "pure" / f"seed{col:04d}.png"))
    G = load_network(network).G_ema
    ws = G.mapping(torch.from_numpy(np.random.RandomState(1).randn(1, G.z_dim)).float(), None).clone()
    coarse = list(G.style_groups["coarse"])
    ws[:, coarse] = G.mapping(torch.from_numpy(np.random.RandomState(8).randn(1, G.z_dim)).float(), None)[:, coarse]
    expected = (G.synthesis(ws)[0] * 127.5 + 128).clamp(0, 255).floor().permute(1, 2, 0).numpy()
    assert np.abs(pixels(out / "1-8.png") - expected).max() <= 1
    assert len(list(out.iterdir())) == 7


def test_the_table_names_its_seeds_and_styles(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def draw(rows: list[list[np.ndarray]], *captions: list[str], title: str, has_frame: bool) -> np.ndarray:
        found.extend((*captions, title))
        return rows[0][0]

    monkeypatch.setattr(mixing, "sheet", draw)
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    run_ok("mix", f"--network={network}", "--rows=1,2", "--cols=7-9", "--styles=middle", f"--outdir={tmp_path}")
    run_ok("mix", f"--network={network}", "--rows=1", "--cols=7", "--styles=all", f"--outdir={tmp_path}")
    assert found[:2] == [["", "seed 7", "seed 8", "seed 9"], ["", "seed 1", "seed 2"]]
    assert found[2::3] == [
        "Styles 1-2 (middle) from the column, all others from the row",
        "All styles from the column",
    ]


def test_descriptions_of_styles_contain_their_group() -> None:
    groups = {"coarse": (0,), "fine": (3, 4)}
    assert describe_styles((0,), 5, groups) == "style 0 (coarse)"
    assert describe_styles((3, 4), 5, groups) == "styles 3-4 (fine)"
    assert describe_styles((0, 2, 3), 5, groups) == "styles 0,2-3"
    assert describe_styles((0,), 1, groups) == "all styles"


def test_mixing_all_styles_reproduces_the_image_of_the_column(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    output = run_ok("mix", f"--network={network}", "--rows=1", "--cols=7", "--styles=0-4", f"--outdir={tmp_path}")
    assert "1 mixture in" in output
    run_ok("images", f"--network={network}", "--seeds=7", f"--outdir={tmp_path}")
    assert np.array_equal(pixels(tmp_path / "1-7.png"), pixels(tmp_path / "seed0007.png"))


def test_saved_styles_can_replace_seeds(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    model = make_model()
    save_styles(tmp_path / "w.npz", model.styles_of((4, 5)))
    arguments = [f"--network={network}", f"--projected-w={tmp_path / 'w.npz'}", f"--outdir={tmp_path}"]
    run_ok("images", *arguments, "--seeds=4")
    run_ok("mix", *arguments, "--rows=4", "--cols=9")
    assert np.array_equal(pixels(tmp_path / "proj00.png"), pixels(tmp_path / "seed0004.png"))
    assert np.array_equal(pixels(tmp_path / "proj00-9.png"), pixels(tmp_path / "4-9.png"))
    assert not np.array_equal(pixels(tmp_path / "proj01-9.png"), pixels(tmp_path / "4-9.png"))


def test_style_mixing_py_is_mix_with_styles_0_to_6(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, "stylegan2")  # 8 styles
    arguments = [f"--network={network}", "--rows=1,2", "--cols=7-9", "--trunc=0.7", "--noise-mode=none"]
    run_ok("mix", *arguments, "--styles=0-6", f"--outdir={tmp_path / 'mix'}")
    result = CliRunner().invoke(style_mixing.main, [*arguments, f"--outdir={tmp_path / 'old'}"])
    assert result.exit_code == 0, result.output
    names = {"grid.png", *(f"{row}-{col}.png" for row in (1, 2) for col in (7, 8, 9))}
    assert {path.name for path in (tmp_path / "old").iterdir()} == names
    for name in names:
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "mix" / name).read_bytes()

    small = make_snapshot(tmp_path / "small.pkl", shapes_zip)
    arguments = [f"--network={small}", "--rows=1", "--cols=7", f"--outdir={tmp_path / 'small'}"]
    result = CliRunner().invoke(style_mixing.main, arguments)
    assert (result.exit_code, "--styles=0-6: " in result.stderr, "choose from 0-4, all" in result.stderr) == (
        2,
        True,
        True,
    )
    assert CliRunner().invoke(style_mixing.main, [*arguments, "--styles=coarse"]).exit_code == 0


def test_invalid_arguments_are_refused(shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    np.savez(tmp_path / "shape.npz", w=np.zeros((1, 5, 7)))
    np.savez(tmp_path / "name.npz", x=np.zeros(3))
    np.savez(tmp_path / "word.npz", w=np.array([[["a"]]]))
    np.savez(tmp_path / "code.npz", w=np.array([{}]))
    (tmp_path / "text.npz").write_text("no")
    cases = {
        "--styles=9": "choose from 0-4, all, coarse (0), middle (1-2), fine (3-4)",
        f"--projected-w={tmp_path / 'shape.npz'}": "w has shape (1, 5, 7), this network needs (n, 5, 12)",
        f"--projected-w={tmp_path / 'name.npz'}": "has no array w",
        f"--projected-w={tmp_path / 'word.npz'}": "w holds <U1, not numbers",
        f"--projected-w={tmp_path / 'code.npz'}": "not an .npz file of arrays",
        f"--projected-w={tmp_path / 'text.npz'}": "not an .npz file; convert a single array",
        "--projected-w=/nowhere.npz": "--projected-w=/nowhere.npz: cannot be read",
        "--rows=4294967296": "--rows: 4294967296 is too large",
    }
    for argument, message in cases.items():
        result = run("mix", f"--network={network}", "--rows=0", "--cols=1", f"--outdir={out}", argument)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = run("mix", f"--network={network}", "--cols=1", f"--outdir={out}")
    assert (result.exit_code, "--rows: specify images" in result.output) == (2, True)
    assert not out.exists()


def test_an_unknown_command_is_refused() -> None:
    result = run("mixx", "--rows=1")
    assert (result.exit_code, "No such command 'mixx'" in result.output) == (2, True)


def test_the_help_lists_the_other_commands() -> None:
    assert "Mix the styles" in run_ok("--help")
    assert "Mix the styles" not in run_ok("mix", "--help").split("Options:")[1]
