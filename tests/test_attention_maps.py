"""generate.py attention: maps and rollout against explicit float64 matrices."""

from __future__ import annotations

import dataclasses
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exploration_helpers import TRANSGAN, make_model, make_snapshot, pixels, run, run_ok, save_untrained
from exploration_helpers import model_of as untrained
from reference_layers import Array, below, build, ref_fc, state_of
from reference_styleformer import ref_demodulated, ref_encoder_block, ref_upsample_tokens
from reference_stylegan3 import resample
from reference_transgan import build_transgan, ref_attention_kind, ref_bicubic, ref_low_pass, ref_shuffle

from dnnlib.config import UserError
from exploration import attention_maps as attention
from exploration.attention_maps import attention_maps, choose_pixels, most_attended, record, tokens_of
from exploration.model import Model
from training.networks.alias_free import FilteredActivation
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer_a import RelativeAttention, StyleformerAConfig
from training.networks.transgan import TransGANConfig

TINY = StyleformerConfig(z_dim=5, w_dim=6, mapping_layers=2, base=(2, 3), widths=(12, 8, 4), layers=(1, 2, 1), depth=4)
VARIANTS = {
    "plain": TINY,
    "linformer": dataclasses.replace(TINY, linformer=True, linformer_k=5, linformer_min_tokens=24),
}


def model_of(config: StyleformerConfig) -> Model:
    return Model(G=build(config), device=torch.device("cpu"), c=torch.zeros(1, 0))


def reference(config: StyleformerConfig, model: Model, ws: Array) -> list[tuple[tuple[int, int], Array, Array | None]]:
    """Return grid, softmax weights (B, H, N, N or k) and, with Linformer, E (k, N) of each block."""
    state = state_of(model.G.synthesis)
    x = np.stack([state["const"]] * len(ws))
    found, i = [], 0
    for r, (C, num_blocks) in enumerate(zip(config.widths, config.layers, strict=True)):
        grid, stage = config.grids[r], below(state, f"stages.{r}.")
        x = x + stage["pos_embedding"]
        heads = config.num_heads(C)
        for j in range(num_blocks):
            block = below(stage, f"blocks.{j}.")
            style = ref_fc(ws[:, i], below(block, "affine."))[:, :C]
            y = x * style[:, None]
            y = (y - y.mean(axis=2, keepdims=True)) / np.sqrt(y.var(axis=2, keepdims=True) + 1e-5)
            q, k = (ref_demodulated(y, W, style) for W in np.split(block["qkv_weight"], 3)[:2])
            E = block.get("attention.token_projection")
            k = k if E is None else np.einsum("kn,bnc->bkc", E, k)
            q, k = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k))
            scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(C / heads))
            found.append((grid, scores / scores.sum(axis=3, keepdims=True), E))
            x = ref_encoder_block(x, ws[:, i], block, heads, config.conv_clamp, block["noise_const"])
            i += 1
        if r + 1 < len(config.widths):
            x = ref_upsample_tokens(x.reshape(len(ws), *grid, -1)).reshape(len(ws), 4 * math.prod(grid), -1)
    return found


def up_matrix(grid: tuple[int, int]) -> Array:
    """Return 2x upsampling of the grid as a matrix (4N, N)."""
    N = math.prod(grid)
    return ref_upsample_tokens(np.eye(N).reshape(N, *grid, 1)).reshape(N, 4 * N).T


def normalized(weights: Array) -> Array:
    return np.abs(weights) / np.abs(weights).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_maps_equal_the_explicit_softmax(name: str) -> None:
    config = VARIANTS[name]
    model = model_of(config)
    ws = torch.randn(3, config.num_ws, config.w_dim, dtype=torch.float64)
    records, img = record(model, ws)
    torch.testing.assert_close(img, model.G.synthesis(ws))
    expected = reference(config, model, ws.numpy())
    assert [block.grid for block in records] == [grid for grid, *_ in expected]
    assert [block.name for block in records] == ["2x3_0", "4x6_0", "4x6_1", "8x12_0"]

    size = config.img_size
    chosen = torch.tensor([[0, 0], [11, 7], [4, 3], [5, 6], [10, 0]])  # more queries than channels per head
    found = attention_maps(records, 1, chosen, size)
    assert set(found.projected) == ({"4x6_0", "4x6_1", "8x12_0"} if name == "linformer" else set())
    for block, (grid, weights, E) in zip(records, expected, strict=True):
        tokens = [(y * grid[0] // size[0]) * grid[1] + x * grid[1] // size[1] for x, y in chosen.tolist()]
        assert tokens_of(chosen, grid, size).tolist() == tokens
        maps = weights if E is None else np.einsum("bhnk,km->bhnm", weights, E)
        np.testing.assert_allclose(
            found.maps[block.name].reshape(maps[1][:, tokens].shape), maps[1][:, tokens], atol=1e-5
        )
        if E is not None:
            np.testing.assert_allclose(found.projected[block.name], weights[1][:, tokens], atol=1e-5)
        np.testing.assert_allclose(block.received(1), maps[1].mean(axis=(0, 1)), atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_rollout_equals_the_product_of_explicit_matrices(name: str) -> None:
    config = VARIANTS[name]
    model = model_of(config)
    ws = torch.randn(2, config.num_ws, config.w_dim, dtype=torch.float64)
    chosen = torch.tensor([[3, 5], [11, 0]])
    found = attention_maps(record(model, ws)[0], 1, chosen, config.img_size)
    total = np.eye(math.prod(config.img_size))[tokens_of(chosen, config.img_size, config.img_size)]
    before = config.img_size
    for block, (grid, weights, E) in zip(
        reversed(found.rolled), reversed(reference(config, model, ws.numpy())), strict=True
    ):
        if grid != before:
            total, before = normalized(total @ up_matrix(grid)), grid
        A = (weights[1] if E is None else weights[1] @ E).mean(axis=0)
        total = (normalized(total @ A) + total) / 2
        np.testing.assert_allclose(found.rolled[block].reshape(total.shape), total, atol=1e-5)
        np.testing.assert_allclose(total.sum(axis=1), 1)


TINY_TRANSGAN = TransGANConfig(
    z_dim=5, w_dim=5, base=(1, 2), widths=(8, 8, 8, 2), layers=(0, 1, 2, 1), num_heads=2, full_upto=4, window=4,
    landmarks=8, antialias=2, latent_tokens=3,
)  # fmt: skip
TRANSGAN_VARIANTS = {
    "full": dataclasses.replace(TINY_TRANSGAN, attention="full", position="absolute"),
    "grid": TINY_TRANSGAN,
    "axis": dataclasses.replace(TINY_TRANSGAN, attention="axis", position="relative"),
    "nystrom": dataclasses.replace(TINY_TRANSGAN, attention="nystrom"),
}


def attention_matrix(block: attention.BlockRecord, config: TransGANConfig) -> Array:
    """Return A (H, N, N) of the first image; each column is the output for a one-hot value."""
    q, k = (x[:1].double().numpy() for x in (block.q, block.k))
    kind = "full" if max(block.grid) <= config.full_upto else config.attention
    state, D, columns = state_of(block.module), q.shape[2] // config.num_heads, []
    for first in range(0, q.shape[1], D):  # one token per channel of a head
        v = np.zeros((1, q.shape[1], config.num_heads, D))
        v[0, first : first + D] = np.eye(D)[:, None]
        out = ref_attention_kind(q, k, v.reshape(q.shape), state, config, block.grid, kind)
        columns.append(out.reshape(-1, config.num_heads, D).transpose(1, 0, 2))
    return np.concatenate(columns, axis=2)


def propagate_back(relevance: Array, config: TransGANConfig, stage: int) -> Array:
    """Propagate the relevance of a stage's tokens back to the tokens of the previous stage."""
    below = config.grids[stage - 1]
    N = math.prod(below)
    impulses = np.eye(N).reshape(N, *below, 1)
    if config.widths[stage] == config.widths[stage - 1]:
        maps = ref_bicubic(ref_bicubic(impulses).transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    else:
        maps = ref_shuffle(impulses.repeat(4, axis=3))
    if stage >= len(config.widths) - config.antialias:
        M = 4 * N
        filtered = ref_low_pass(np.eye(M).reshape(M, *config.grids[stage], 1)).reshape(M, M).T
        relevance = normalized(relevance @ filtered)
    return normalized(relevance @ maps.reshape(N, -1).T)


@pytest.mark.parametrize("name", TRANSGAN_VARIANTS)
def test_maps_and_rollout_of_transgan_equal_explicit_matrices(name: str) -> None:
    config = TRANSGAN_VARIANTS[name]
    G: Any = build_transgan(config).requires_grad_(False)
    model = Model(G=G, device=torch.device("cpu"), c=torch.zeros(1, 0))
    records, _ = record(model, torch.randn(1, 1, config.w_dim, dtype=torch.float64))
    G.float()  # the records are in float32
    assert [block.name for block in records] == ["2x4_0", "4x8_0", "4x8_1", "8x16_0"]
    chosen = torch.tensor([[0, 0], [15, 7], [4, 5]])
    found = attention_maps(records, 0, chosen, (8, 16))
    total = np.eye(8 * 16)[tokens_of(chosen, (8, 16), (8, 16))]
    for index, block in reversed(list(enumerate(records))):
        A = attention_matrix(block, config)
        expected = A[:, tokens_of(chosen, block.grid, (8, 16))].reshape(found.maps[block.name].shape)
        np.testing.assert_allclose(found.maps[block.name], expected, atol=1e-4)
        np.testing.assert_allclose(block.received(0), A.mean(axis=(0, 1)), atol=1e-4)
        total = (normalized(total @ A.mean(axis=0)) + total) / 2
        np.testing.assert_allclose(found.rolled[block.name].reshape(total.shape), total, atol=1e-4)
        if index == 0 or records[index - 1].grid != block.grid:
            total = propagate_back(total, config, config.grids.index(block.grid))
    assert not found.projected


MARGINS = StyleformerAConfig(
    z_dim=5, w_dim=6, side=32, num_layers=5, channel_base=512, channel_max=8, margin=2, attention_rate=32, depth=4
)


def relative_matrix(block: attention.BlockRecord) -> Array:
    """Return A (H, N, N) of the first image of a block of MARGINS, from pairs of tokens."""
    layer, rate, side = block.module, block.grid[0], block.grid[0] + 2 * MARGINS.margin
    assert isinstance(layer, RelativeAttention)
    q, k = (x[0].double().numpy().reshape(side**2, 2, 2, 2) for x in (block.q, block.k))  # pairs of channels per head
    q, k = (x[..., 0] + 1j * x[..., 1] for x in (q, k))  # (N, H, x and y)
    axis = (np.arange(side) - (side - 1) / 2) / rate
    points = np.stack([np.tile(axis, side), np.repeat(axis, side)], axis=1)
    differences = points[:, None] - points  # (N, N, 2)
    turned = q[:, None] * k.conj() * np.exp(2j * math.pi * differences / 2)[:, :, None]  # the longest wavelength is 2
    start, edge = 0.5 + MARGINS.margin / rate / 2, 0.5 + MARGINS.margin / rate
    fade = 0.5 + 0.5 * np.cos(math.pi * np.clip((np.abs(points) - start) / (edge - start), 0, 1))
    widths = np.exp(2 * layer.log_width.detach().double().numpy())
    logits = turned.real.sum(axis=3) / 2 - (differences**2).sum(axis=2)[:, :, None] / (2 * widths)
    weights = np.exp(logits) * fade.prod(axis=1)[:, None]
    return (weights / weights.sum(axis=1, keepdims=True)).transpose(2, 0, 1)


def test_maps_of_tokens_with_margins_show_the_image() -> None:
    """Maps, rollout and received attention of Styleformer-A, computed with all tokens, of those inside the image."""
    model, margin, size = untrained(MARGINS), MARGINS.margin, (32, 32)
    records, _ = record(model, model.styles_of([0]))
    assert [block.name for block in records] == ["16x16_0", "16x16_1", "16x16_2", "32x32_0", "32x32_1"]
    chosen = torch.tensor([[0, 0], [31, 9], [12, 31]])
    found = attention_maps(records, 0, chosen, size)
    matrices = [relative_matrix(block) for block in records]
    total = np.eye(36 * 36)[(chosen[:, 1] + margin) * 36 + chosen[:, 0] + margin]
    for index, (block, A) in reversed(list(enumerate(zip(records, matrices, strict=True)))):
        side, inside = block.grid[0], slice(margin, -margin)
        y, x = (chosen[:, i] * side // 32 + margin for i in (1, 0))
        maps = A.reshape(2, *(side + 2 * margin,) * 4)[:, y, x][:, :, inside, inside]
        np.testing.assert_allclose(found.maps[block.name], maps, atol=1e-5)
        assert maps.sum(axis=(2, 3)).max() < 0.999  # the rest is on the margin
        np.testing.assert_allclose(block.received(0), A.mean(axis=(0, 1)), atol=1e-5)
        total = (normalized(total @ A.mean(axis=0)) + total) / 2
        relevance = total.reshape(3, *block.tokens)[:, inside, inside]
        np.testing.assert_allclose(found.rolled[block.name], relevance, atol=1e-5)
        if index == 3:
            total = normalized(total @ filters_between(model.G.synthesis.layers[2].activation))


def filters_between(activation: FilteredActivation) -> Array:
    """Return the filters of an activation as a matrix (36 * 36, 20 * 20)."""
    up_filter, down_filter = (
        f.double().numpy() for f in (activation.up_filter, activation.down_filter) if f is not None
    )
    columns = []
    for impulse in np.eye(20 * 20).reshape(-1, 20, 20):
        y = resample(impulse, up_filter, activation.up, 1, activation.padding[:2]) * activation.up**2
        columns.append(resample(y, down_filter, 1, activation.down, (0, 0)).flatten())
    return np.stack(columns, axis=1)


def test_the_most_attended_pixel_is_inside_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at the left edge of the image receives all attention."""
    model, margin = untrained(MARGINS), MARGINS.margin
    records, _ = record(model, model.styles_of([0]))

    def received(block: attention.BlockRecord, image: int) -> torch.Tensor:
        found = torch.zeros(block.tokens)
        found[block.grid[0] // 2 + margin, margin] = 1
        return found.flatten()

    monkeypatch.setattr(attention.BlockRecord, "received", received)
    ((x, y),) = most_attended(records, 0, (32, 32), 1)
    assert (x, y // 2) == (0, 8)


def test_recording_leaves_no_hooks() -> None:
    model = make_model()
    ws = model.styles_of((0,))
    record(model, ws)
    assert not any(module._forward_hooks for module in model.G.modules())
    with pytest.raises(RuntimeError), attention.recording(model.G.synthesis, (32, 32)):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.G.modules())


def test_records_hold_only_their_images_and_are_freed(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    for block in record(model, model.styles_of((0, 1)))[0]:
        for x in (block.q, block.k):
            assert (len(x), x.untyped_storage().nbytes()) == (2, x.nbytes)

    made: list[weakref.ref[attention.BlockRecord]] = []

    def tracked_record(model: Model, ws: torch.Tensor) -> tuple[list[attention.BlockRecord], torch.Tensor]:
        assert not any(block() for block in made)
        records, img = record(model, ws)
        made.extend(map(weakref.ref, records))
        return records, img

    monkeypatch.setattr(attention, "record", tracked_record)
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    run_ok("attention", f"--network={network}", "--query=0,0", "--seeds=0-1", "--batch=1", f"--outdir={tmp_path}")
    assert len(made) == 3 * 4  # the first image is also recorded before anything is written


def test_the_most_attended_pixel_is_found() -> None:
    """All queries of every block attend to one token; the pixel of this token must be found."""
    model = make_model()
    records, _ = record(model, model.styles_of((0,)))
    made = []
    for block in records:
        height, width = block.grid
        q, k = torch.ones_like(block.q), torch.zeros_like(block.k)
        k[:, (height // 4) * width + 3 * width // 4] = 100
        made.append(dataclasses.replace(block, q=q, k=k))
    ((x, y),) = most_attended(made, 0, (32, 32), 1)
    assert 24 <= x < 28
    assert 8 <= y < 12
    points = most_attended(records, 0, (32, 32), 5)
    gaps = [max(abs(a - c), abs(b - d)) for i, (a, b) in enumerate(points) for c, d in points[:i]]
    assert min(gaps) > 4
    with pytest.raises(UserError, match="choose fewer"):
        most_attended(records, 0, (32, 32), 100)


def test_queries_are_pixels_or_grids() -> None:
    model = make_model()
    records, _ = record(model, model.styles_of((0,)))
    assert choose_pixels(["31,0", "grid:2"], records, 0, (32, 32)).tolist() == [
        [31, 0],
        [8, 8],
        [24, 8],
        [8, 24],
        [24, 24],
    ]
    for query in ("32,0", "0,32", "grid:0", "5", "most", "-1,2"):
        with pytest.raises(UserError, match=f"--query={query}"):
            choose_pixels([query], records, 0, (32, 32))
    with pytest.raises(UserError, match=r"--query=grid:33: .* 32x32; specify at most grid:32"):
        choose_pixels(["grid:33"], records, 0, (32, 32))
    with pytest.raises(UserError, match="--query: 65 pixels; a sheet shows at most 64"):
        choose_pixels(["grid:8", "0,0"], records, 0, (32, 32))


def test_sheets_name_blocks_queries_and_peaks(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[tuple[Any, ...]] = []

    def draw(rows: list[list[np.ndarray]], *captions: list[str], title: str, peaks: list[float | None]) -> np.ndarray:
        sheets.append((*captions, title, peaks))
        return rows[0][0]

    monkeypatch.setattr(attention, "sheet", draw)
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    queries = ["--query=3,5", "--query=30,8"]
    run_ok("attention", f"--network={network}", "--seeds=7", *queries, "--heads", f"--outdir={tmp_path}")
    blocks = ["block 0, 8x8", "block 1, 16x16", "block 2, 16x16", "block 3, 32x32"]
    with np.load(tmp_path / "seed0007-attention.npz") as arrays:
        maps = [arrays[f"map_{name}"] for name in ("8x8_0", "16x16_0", "16x16_1", "32x32_0")]
        rolled = [arrays[f"rollout_{name}"] for name in ("8x8_0", "16x16_0", "16x16_1", "32x32_0")]
    columns, first = ["(3, 5)", "(30, 8)"], "seed 7, query (x, y)"
    of_blocks, of_rollout, *of_heads = sheets
    assert of_blocks[:2] == (columns, [first, *(f"{block}, all heads" for block in blocks)])
    assert of_blocks[3] == [None, *(pytest.approx(heads.mean(axis=0).max()) for heads in maps)]
    assert of_rollout[:3] == (columns, [first, *(f"input of {block}" for block in blocks)], "Rollout")
    assert of_rollout[3] == [None, *(pytest.approx(relevance.max()) for relevance in rolled)]
    assert [found[1][-1] for found in of_heads] == [
        f"{block}, head {len(heads) - 1}" for block, heads in zip(blocks, maps, strict=True)
    ]
    assert of_heads[0][3] == [None, *(pytest.approx(head.max()) for head in maps[0])]


def test_the_command_draws_the_attention_of_transgan(shapes_zip: Path, tmp_path: Path) -> None:
    network = save_untrained(tmp_path / "n.pkl", shapes_zip, TRANSGAN)
    run_ok("attention", f"--network={network}", "--query=20,20", "--seeds=4", f"--outdir={tmp_path / 'out'}")
    with np.load(tmp_path / "out" / "seed0004-attention.npz") as arrays:
        inside = arrays["map_32x32_0"][:, 0]
        assert arrays["rollout_8x8_0"].shape == (1, 8, 8)
    assert inside[:, 16:24, 16:24].sum(axis=(1, 2)) == pytest.approx(1, rel=1e-5)
    assert inside.sum(axis=(1, 2)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("family", ["styleformer", "styleformer-c"])
def test_the_command_writes_sheets_and_arrays(family: str, shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(
        tmp_path / "n.pkl", shapes_zip, family, linformer=True, linformer_k=7, linformer_min_tokens=256
    )
    arguments = [f"--network={network}", "--query=3,30", "--query=grid:2", "--heads"]
    run_ok("attention", *arguments, "--seeds=4,5", "--batch=1", f"--outdir={tmp_path / 'one'}")
    run_ok("attention", *arguments, "--seeds=5", f"--outdir={tmp_path / 'two'}")
    with (
        np.load(tmp_path / "one" / "seed0005-attention.npz") as one,
        np.load(tmp_path / "two" / "seed0005-attention.npz") as two,
    ):
        assert one["queries"].tolist() == [[3, 30], [8, 8], [24, 8], [8, 24], [24, 24]]
        assert one["map_8x8_0"].shape == (4, 5, 8, 8)
        np.testing.assert_allclose(one["map_8x8_0"].sum(axis=(2, 3)), 1, rtol=1e-5)
        assert one["projected_16x16_1"].shape == (2, 5, 7)
        assert set(one) == set(two)
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert pixels(tmp_path / "one" / "seed0004-attention.png").ndim == 3
    assert (tmp_path / "one" / "seed0004-16x16_1.png").exists()


def test_invalid_arguments_are_refused(shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip, "stylegan2"), tmp_path / "out"
    result = run("attention", f"--network={network}", "--seeds=0", f"--outdir={out}")
    assert (result.exit_code, "StyleGAN2Generator has no self-attention" in result.output) == (2, True)
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    result = run("attention", f"--network={network}", "--seeds=0", "--query=99,0", f"--outdir={out}")
    assert (result.exit_code, "--query=99,0: the images are 32x32" in result.output) == (2, True)
    assert not out.exists()
