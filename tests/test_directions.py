"""generate.py directions against singular vectors and planted directions; effects of edits on images."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is an optional package")
import torch
from exploration_helpers import (
    FAMILIES,
    TRANSGAN,
    example_directions,
    make_model,
    make_snapshot,
    model_of,
    pixels,
    run,
    run_ok,
)
from safetensors.torch import save_file

from dnnlib.config import UserError
from exploration.directions import (
    direction_between,
    factorise,
    find_direction,
    principal_components,
    read_direction,
    sampled_w,
    save_directions,
    style_layers,
)
from exploration.model import Model
from training.snapshots.snapshot import load_network

# Names of the affine layers that read each style, derived by hand from the docstrings of the networks.
READERS = {
    "styleformer": {0: ["blocks.0"], 1: ["torgb", "blocks.0"], 2: ["blocks.1"], 3: ["torgb", "blocks.0"], 4: ["torgb"]},
    "styleformer-c": {
        **{0: ["blocks.0"], 1: ["torgb", "blocks.0"], 2: ["blocks.1"]},
        **{3: ["torgb", "convs.0"], 4: ["convs.1"], 5: ["torgb"]},
    },
    "stylegan2": {
        **{0: ["convs.0"], 1: ["torgb", "convs.0"], 2: ["convs.1"], 3: ["torgb", "convs.0"], 4: ["convs.1"]},
        **{5: ["torgb", "convs.0"], 6: ["convs.1"], 7: ["torgb"]},
    },
}


def record_mapped_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that records the latents per call to Model.map; 0 marks a call to Model.synthesise."""
    counts: list[int] = []
    original, synthesise = Model.map, Model.synthesise

    def counted(model: Model, z: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        counts.append(len(z))
        return original(model, z, *arguments, **options)

    def recorded(model: Model, ws: torch.Tensor, transforms: torch.Tensor | None = None) -> torch.Tensor:
        counts.append(0)
        return synthesise(model, ws, transforms)

    monkeypatch.setattr(Model, "map", counted)
    monkeypatch.setattr(Model, "synthesise", recorded)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_style_layers_finds_the_layers_of_each_style(family: str) -> None:
    model = make_model(family)
    names = {module: name for name, module in model.G.synthesis.named_modules()}
    found = style_layers(model.G.synthesis, model.G.num_ws, model.G.w_dim)
    parts = {
        style: [names[layer].split(".", 2)[2].removesuffix(".affine") for layer in layers]
        for style, layers in enumerate(found)
    }
    assert parts == READERS[family]
    assert not any(module._forward_pre_hooks for module in model.G.modules())


def test_sefa_equals_the_singular_vectors_of_the_weights() -> None:
    model = make_model()
    G = model.G.synthesis
    layers = [G.stages[1].blocks[1].affine, G.stages[1].torgb.affine, G.stages[2].blocks[0].affine]
    A = np.concatenate([layer.weight.double().numpy() / np.sqrt(12) for layer in layers])
    _, singular, vectors = np.linalg.svd(A)
    samples = sampled_w(model, 500)
    found = factorise(model, (2, 3), 4, samples)
    np.testing.assert_allclose(found.values, singular[:4] ** 2, rtol=1e-5)
    np.testing.assert_allclose((found.directions.numpy() * vectors[:4]).sum(axis=1) ** 2, 1, rtol=1e-5)
    np.testing.assert_allclose(
        found.sigmas, (samples @ found.directions.double().t()).numpy().std(axis=0, ddof=1), rtol=1e-5
    )
    assert (found.directions.abs().amax(dim=1) == found.directions.amax(dim=1)).all()


def test_sefa_of_transgan_uses_the_stems() -> None:
    model = model_of(dataclasses.replace(TRANSGAN, latent_tokens=2))
    A = np.concatenate([stem.weight.numpy() for stem in (model.G.synthesis.stem, model.G.synthesis.latent_stem)])
    _, singular, vectors = np.linalg.svd(A.astype(np.float64))
    found = factorise(model, (0,), 3, sampled_w(model, 10))
    np.testing.assert_allclose(found.values, singular[:3] ** 2, rtol=1e-5)
    np.testing.assert_allclose((found.directions.numpy() * vectors[:3]).sum(axis=1) ** 2, 1, rtol=1e-5)


def test_pca_equals_the_svd_of_centred_samples() -> None:
    samples = torch.randn(300, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    found = principal_components(samples, (0,), 6)
    centred = samples.numpy() - samples.numpy().mean(axis=0)
    _, singular, vectors = np.linalg.svd(centred)
    np.testing.assert_allclose(found.sigmas, singular / np.sqrt(299), rtol=1e-5)
    np.testing.assert_allclose(found.values, singular**2 / 299, rtol=1e-5)
    np.testing.assert_allclose((found.directions.numpy() * vectors).sum(axis=1) ** 2, 1, rtol=1e-5)


def test_samples_are_float32_and_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = record_mapped_counts(monkeypatch)
    model = make_model(truncation_psi=0.5)
    samples = sampled_w(model, 1500)
    z = torch.from_numpy(np.random.RandomState(0).randn(1500, 16)).float()
    torch.testing.assert_close(samples.float(), model.G.mapping(z, None)[:, 0])
    assert torch.equal(samples, sampled_w(model, 1500))
    assert max(counts) == 1024  # mapped in batches, keeping one style per latent


def test_linear_directions_find_a_planted_direction() -> None:
    """Larger noise in other dimensions misleads the means but not the linear classifier; both match NumPy."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.tensor([0.3]), torch.full((7,), 3.0)]).double()
    samples = torch.randn(2000, 8, generator=generator, dtype=torch.float64) * spread
    planted = torch.eye(8).double()[0]
    positive, negative = samples[:60] + planted, samples[60:140] - planted
    means = direction_between(positive, negative, samples, (0, 1), linear=False)
    linear = direction_between(positive, negative, samples, (0, 1), linear=True)
    assert means.directions[0, 0] > 0.5
    assert linear.directions[0, 0] > 0.95 > means.directions[0, 0]
    gap = (positive.mean(dim=0) - negative.mean(dim=0)).numpy()
    np.testing.assert_allclose(means.directions[0], gap / np.linalg.norm(gap), rtol=1e-5)

    X = torch.cat([positive, negative]).numpy()
    y = np.array([1.0] * 60 + [-1.0] * 80)
    X, y = X - X.mean(axis=0), y - y.mean()
    penalty = 0.01 * 140 * samples.numpy().var(axis=0, ddof=1).mean()
    d = np.linalg.solve(X.T @ X + penalty * np.eye(8), X.T @ y)
    np.testing.assert_allclose(linear.directions[0], d / np.linalg.norm(d), rtol=1e-5)
    for is_linear in (False, True):
        with pytest.raises(UserError, match="the same mean"):  # up to rounding
            direction_between(
                positive, positive[torch.randperm(60, generator=generator)], samples, (0,), linear=is_linear
            )


def test_edits_move_selected_styles_by_standard_deviations() -> None:
    ws = torch.randn(2, 5, 12)
    moved = example_directions().edit(ws, 0, torch.tensor([1.0, -3.0]))
    difference = torch.zeros(2, 5, 12)
    difference[0, 1:3, 0], difference[1, 1:3, 0] = 2, -6
    torch.testing.assert_close(moved - ws, difference)
    torch.testing.assert_close(example_directions().edit(ws, 2, 2.0)[:, 2, 2], ws[:, 2, 2] + 1)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_saved_directions_are_read_unchanged(tmp_path: Path, ending: str) -> None:
    G, path = make_model().G, tmp_path / f"d{ending}"
    save_directions(path, example_directions())
    found, index = read_direction(f"{path}:2", G)
    assert (index, found.styles) == (2, (1, 2))
    for name in ("directions", "values", "sigmas"):
        assert torch.equal(getattr(found, name), getattr(example_directions(), name))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bfloat16_directions_are_read(tmp_path: Path) -> None:
    arrays = {name: getattr(example_directions(), name).bfloat16() for name in ("directions", "values", "sigmas")}
    save_file(arrays | {"styles": torch.tensor([1, 2])}, tmp_path / "d.safetensors")
    found, _ = read_direction(f"{tmp_path}/d.safetensors:1", make_model().G)
    torch.testing.assert_close(found.directions, example_directions().directions, rtol=0.01, atol=0)
    assert found.styles == (1, 2)


def test_direction_files_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    G = make_model().G
    save_directions(tmp_path / "d.npz", example_directions())
    save_directions(tmp_path / "wide.npz", example_directions(directions=torch.eye(13)[:3]))
    save_directions(tmp_path / "long.npz", example_directions(styles=(4, 5)))
    save_directions(tmp_path / "few.npz", example_directions(values=torch.ones(2), sigmas=torch.ones(2)))
    save_directions(tmp_path / "nan.npz", example_directions(sigmas=torch.full((3,), torch.nan)))
    arrays: dict[str, Any] = {
        "directions": np.eye(12),
        "values": np.ones(12),
        "sigmas": np.ones(12),
        "styles": np.zeros((2, 2), int),
    }
    np.savez(tmp_path / "styles.npz", **arrays)
    np.savez(tmp_path / "words.npz", **arrays | {"values": np.array(["a"] * 12), "styles": np.zeros(1, int)})
    np.savez(tmp_path / "inf.npz", **arrays | {"styles": np.full(1, np.inf)})
    np.savez(tmp_path / "w.npz", w=np.zeros(3))
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for given, message in {
        "d.npz": "specify the index of a direction in the file",
        "d.npz:" + "1" * 5000: "specify the index of a direction in the file",
        "d.npz:3": "the file has directions 0 to 2",
        "wide.npz:0": "has 5 styles of 12 numbers",
        "long.npz:0": "styles up to 5; this network has 5 styles",
        "few.npz:0": "needs one value and one sigma for each of its 3 directions",
        "nan.npz:0": "values that are not finite",
        "styles.npz:0": "not the numbers that `generate.py directions` writes",
        "words.npz:0": "not the numbers that `generate.py directions` writes",
        "inf.npz:0": "not the numbers that `generate.py directions` writes",
        "w.npz:0": "has no array 'directions'",
        "none.npz:0": "cannot be read",
        "none.safetensors:0": "cannot be read",
        "x.safetensors:0": "not a safetensors file",
        "d.txt:0": "are stored in .npz or .safetensors files",
    }.items():
        with pytest.raises(UserError, match=message):
            read_direction(f"{tmp_path}/{given}", G)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"pip install '.\[safetensors\]'"):
        read_direction(f"{tmp_path}/x.safetensors:0", G)


@pytest.mark.parametrize("family", FAMILIES)
def test_commands_find_draw_and_apply_directions(family: str, shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip, family), tmp_path / "out"
    common = [f"--network={network}", "--samples=200"]
    run_ok("directions", *common, "--components=2", "--styles=coarse", "--seeds=1,2", "--steps=7", f"--outdir={out}")
    assert sorted(path.name for path in out.iterdir()) == ["direction00.png", "direction01.png", "directions.npz"]
    strip = pixels(out / "direction01.png")
    strip = strip[-(2 * 96 + 2) :, -(7 * 96 + 6 * 2) :]  # without captions

    edit = [f"--network={network}", "--seeds=2", f"--direction={out / 'directions.npz'}:1"]
    for strength in (-3, 0, 3):
        run_ok("images", *edit, f"--strength={strength}", f"--outdir={tmp_path / str(strength)}")
    run_ok("images", f"--network={network}", "--seeds=2", f"--outdir={tmp_path / 'plain'}")
    images = {name: pixels(tmp_path / name / "seed0002.png") for name in ("-3", "0", "3", "plain")}
    assert np.array_equal(images["0"], images["plain"])
    assert not np.array_equal(images["3"], images["-3"])
    for column, name in ((0, "-3"), (3, "0"), (6, "3")):
        tile = strip[98:, 98 * column :][:96:3, :96:3]
        assert np.array_equal(tile, images[name])

    G = load_network(network).G_ema
    with np.load(out / "directions.npz") as file:
        assert tuple(file["styles"]) == G.style_groups["coarse"]
    groups = ["--method=linear", "--positive=0-3", "--negative=4-9", "--seeds=1", f"--save={out / 'd.safetensors'}"]
    assert "1 direction for all styles" in run_ok("directions", *common, *groups, f"--outdir={out}")
    assert read_direction(f"{out / 'd.safetensors'}:0", G)[0].styles == tuple(range(G.num_ws))


def test_images_are_mapped_and_edited_in_batches(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    save_directions(tmp_path / "d.npz", example_directions())
    common = [f"--network={network}", "--seeds=0-4", f"--direction={tmp_path}/d.npz:0"]
    counts = record_mapped_counts(monkeypatch)
    for batch in (2, 8):
        run_ok("images", *common, f"--batch={batch}", f"--outdir={tmp_path / str(batch)}")
    assert counts == [2, 0, 2, 0, 1, 0, 5, 0]
    for seed in range(5):
        one, other = (pixels(tmp_path / batch / f"seed{seed:04d}.png") for batch in ("2", "8"))
        assert np.array_equal(one, other)


def test_invalid_directions_arguments_get_one_message(shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    for arguments, message in [
        (["--method=mean"], "--method=mean: needs two lists of seeds"),
        (["--positive=1"], "are for the methods mean and linear"),
        (["--method=linear", "--positive=0", "--negative=1", "--components=2"], "finds one direction"),
        (["--components=13"], "--components=13: --method=sefa finds at most 12 directions here"),
        (["--components=3", "--method=pca", "--samples=3"], "--method=pca finds at most 2 directions here"),
        (["--save=x.txt"], "x.txt: directions are stored in"),
        (["--styles=9"], "--styles=9"),
    ]:
        result = run("directions", f"--network={network}", "--seeds=0", f"--outdir={out}", *arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = run("images", f"--network={network}", "--seeds=0", f"--outdir={out}", "--strength=2")
    assert (result.exit_code, "specify one with --direction" in result.output) == (2, True)
    assert not out.exists()


def test_edits_add_up_over_repeated_directions(shapes_zip: Path, tmp_path: Path) -> None:
    """Images and mixtures move by the sum of the edits; --direction=sefa:... equals the file of `directions`."""
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    run_ok("directions", f"--network={network}", "--styles=coarse", "--seeds=1", f"--outdir={out}")
    model = make_model()
    (w,) = model.styles_of([2])
    moved = w[None].clone()
    with np.load(out / "directions.npz") as file:
        for index, strength in ((0, 1.5), (2, -2.0)):
            step = torch.from_numpy(strength * file["sigmas"][index] * file["directions"][index])
            moved[:, file["styles"]] += step
    (expected,) = model.images(moved).permute(0, 2, 3, 1).squeeze(-1).numpy()
    strengths = ["--strength=1.5", "--strength=-2"]
    for name in (f"{out}/directions.npz", "sefa:coarse"):
        edits = [f"--direction={name}:0", f"--direction={name}:2", *strengths]
        run_ok("images", f"--network={network}", "--seeds=2", f"--outdir={out}", *edits)
        assert np.abs(pixels(out / "seed0002.png").astype(int) - expected).max() <= 1, name
        run_ok("mix", f"--network={network}", "--rows=2", "--cols=2", "--styles=all", f"--outdir={out}", *edits)
        assert np.abs(pixels(out / "2-2.png").astype(int) - expected).max() <= 1, name
    pca = principal_components(sampled_w(model, 10_000), range(model.G.num_ws), 4)
    found, index = find_direction("pca:3", model)
    torch.testing.assert_close(found.directions[index], pca.directions[3])
    assert found.styles == tuple(range(model.G.num_ws))


def test_invalid_edits_get_one_message(shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    for arguments, message in [
        (["--direction=sefa:12"], "--direction=sefa:12: sefa finds directions 0 to 11 here"),
        (["--direction=sefa:conv:0"], "--direction=sefa:conv:0: 'conv' is not a style"),
        (["--direction=fast:0"], "fast: directions are stored in"),
        (["--direction=sefa"], "--direction=sefa: specify the index"),
        (["--direction=sefa:0", "--direction=sefa:1", "--strength=2"], "--strength: given 1 times for 2 directions"),
        (["--direction=sefa:0", "--strength=2", "--strength=1"], "--strength=1: needs a direction"),
    ]:
        for command, seeds in (("images", ["--seeds=0"]), ("mix", ["--rows=0", "--cols=1"])):
            result = run(command, f"--network={network}", *seeds, f"--outdir={out}", *arguments)
            assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not out.exists()
