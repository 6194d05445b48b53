"""generate.py: the image of a seed does not depend on the other seeds of a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import small_config
from PIL import Image

import generate
from dnnlib.config import override
from exploration import seed_images
from exploration.commands.options import PRECISIONS
from torch_utils.sheets import captioned, to_rgb
from training.networks import execution
from training.snapshots.snapshot import load_network, save_network


def run(*arguments: object) -> Result:
    return CliRunner().invoke(generate.main, [str(argument) for argument in arguments])


def make_snapshot(path: Path, data: Path, **changes: Any) -> Path:
    """Write an untrained snapshot with non-zero noise strengths."""
    config = override(small_config(data), {f"generator.{name}": value for name, value in changes.items()})
    torch.manual_seed(3)
    G = config.generator.build()
    with torch.no_grad():
        for name, x in G.named_parameters():
            if name.endswith("noise_strength"):
                x.fill_(0.5)
    save_network(path, config=config, G_ema=G)
    return path


@pytest.fixture(scope="module")
def snapshot(shapes_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_snapshot(tmp_path_factory.mktemp("net") / "network-snapshot-000000.pkl", shapes_zip)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_a_seed_gives_the_same_image_in_batches_of_any_size(snapshot: Path, tmp_path: Path, noise_mode: str) -> None:
    arguments = [f"--network={snapshot}", f"--noise-mode={noise_mode}", "--trunc=0.7"]
    for batch in (1, 3, 7, 16):
        result = run(*arguments, "--seeds=0-9,23", f"--outdir={tmp_path / str(batch)}", f"--batch={batch}")
        assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == [f"seed{seed:04d}.png" for seed in (*range(10), 23)]
    for name in names:
        images = [pixels(tmp_path / str(batch) / name) for batch in (1, 3, 7, 16)]
        assert all(np.array_equal(images[0], image) for image in images)
    assert not np.array_equal(pixels(tmp_path / "1" / "seed0000.png"), pixels(tmp_path / "1" / "seed0001.png"))


def test_images_are_generated_in_float32_without_tf32(snapshot: Path, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert run(f"--network={snapshot}", "--seed=5", f"--outdir={tmp_path}").exit_code == 0
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_noise_modes_give_different_images(snapshot: Path, tmp_path: Path) -> None:
    for mode in ("const", "random", "none"):
        run(f"--network={snapshot}", "--seed=5", f"--noise-mode={mode}", f"--outdir={tmp_path / mode}")
    const, random, none = (pixels(tmp_path / mode / "seed0005.png") for mode in ("const", "random", "none"))
    assert not np.array_equal(const, random)
    assert not np.array_equal(const, none)


def test_latents_come_from_numpy_and_pixels_are_rounded(snapshot: Path, tmp_path: Path) -> None:
    assert run(f"--network={snapshot}", "--seeds=11", f"--outdir={tmp_path}").exit_code == 0
    G = load_network(snapshot).G_ema.double()
    z = torch.from_numpy(np.random.RandomState(11).randn(1, G.z_dim))
    with torch.no_grad():
        img = G(z, None)[0].permute(1, 2, 0).numpy()
    expected = np.floor(np.clip(img * 127.5 + 128, 0, 255))
    difference = np.abs(pixels(tmp_path / "seed0011.png") - expected)
    assert difference.max() <= 1  # float32 rounds a few values to the neighbouring integer
    assert (difference != 0).mean() < 0.01


def test_truncation_psi_0_gives_the_average_image(snapshot: Path, tmp_path: Path) -> None:
    assert run(f"--network={snapshot}", "--seeds=0-2", "--trunc=0", f"--outdir={tmp_path}").exit_code == 0
    images = [pixels(tmp_path / f"seed{seed:04d}.png") for seed in range(3)]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_of_any_channels_and_grids_are_written(
    shapes_zip: Path, tmp_path: Path, channels: int, mode: str
) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, img_channels=channels)
    result = run(f"--network={network}", "--seeds=0-4", f"--outdir={tmp_path / 'out'}", "--grid")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "grid.png") as grid, Image.open(tmp_path / "out" / "seed0004.png") as image:
        assert (grid.mode, image.mode) == ("RGB", mode)
        assert image.size == (16, 16)
        tile = to_rgb(np.asarray(image).reshape(16, 16, channels)).repeat(6, axis=0).repeat(6, axis=1)
        below = grid.height // 2 + 1  # 5 images as 3 x 2, each above its seed
        assert np.array_equal(np.asarray(grid)[below : below + 96, 98:194], tile)
        named = captioned(tile, "seed 4", 13)
        assert np.array_equal(np.asarray(grid)[below:, 98:194], named)
        assert not np.array_equal(named, captioned(tile, "seed 3", 13))
        assert (np.asarray(grid)[below:, 196:] == 255).all()


def test_unsupported_numbers_of_channels_are_refused(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, img_channels=2)
    result = run(f"--network={network}", "--seeds=0", f"--outdir={tmp_path / 'out'}")
    assert (result.exit_code, "its images have 2 channels" in result.output) == (2, True)


def test_a_class_is_required_for_conditional_networks(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, c_dim=3)
    for index in (0, 2):
        arguments = [f"--network={network}", "--seeds=0", f"--class={index}", f"--outdir={tmp_path / str(index)}"]
        assert run(*arguments).exit_code == 0
    assert not np.array_equal(pixels(tmp_path / "0" / "seed0000.png"), pixels(tmp_path / "2" / "seed0000.png"))
    refused = run(f"--network={network}", "--seeds=0", "--class=3", f"--outdir={tmp_path / 'x'}")
    assert (refused.exit_code, "--class=3: this network has the classes 0..2" in refused.output) == (2, True)
    refused = run(f"--network={network}", "--seeds=0", f"--outdir={tmp_path / 'x'}")
    assert (refused.exit_code, "conditional; specify a class, 0..2" in refused.output) == (2, True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class=1"], "trained without labels"),
        (["--seeds=3-1"], "runs backwards"),
        (["--seeds=a"], "neither a number nor a range"),
        (["--outdir=/proc/x"], "--outdir=/proc/x: cannot be written"),
        (["--network=/nowhere.pkl"], "/nowhere.pkl: no such file"),
        (["--device=cuda:99"], "--device=cuda:99"),
    ],
)
def test_invalid_options_are_refused_with_a_message(
    snapshot: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(f"--network={snapshot}", "--seeds=0", f"--outdir={tmp_path / 'out'}", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_in_a_snapshot_is_refused(snapshot: Path, tmp_path: Path) -> None:
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.pkl").write_bytes(data)
    result = run(f"--network={tmp_path / 'bad.pkl'}", "--seeds=0", f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 2
    assert "bad.pkl: damaged" in result.output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_gives_similar_images(snapshot: Path, tmp_path: Path, precision: str) -> None:
    for folder, options in (("exact", []), ("reduced", [f"--precision={precision}"])):
        result = run(f"--network={snapshot}", "--seeds=0-3", f"--outdir={tmp_path / folder}", *options)
        assert result.exit_code == 0, result.output
    exact, reduced = (
        np.stack([pixels(tmp_path / folder / f"seed{seed:04d}.png").astype(int) for seed in range(4)])
        for folder in ("exact", "reduced")
    )
    assert 0 < np.abs(exact - reduced).max() < 8
    assert np.abs(exact - reduced).mean() < 1


@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile about its own internals
def test_compiled_images_are_equal_up_to_rounding(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the compiler's front end runs; it must see one batch size for any number of seeds."""
    sizes: list[int] = []
    compile_for_real = torch.compile

    def spy(network: Any, **options: Any) -> Any:
        network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        return compile_for_real(network, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", spy)
    for folder, options in (("plain", []), ("compiled", ["--compile"])):
        result = run(f"--network={snapshot}", "--seeds=0-4", "--batch=3", f"--outdir={tmp_path / folder}", *options)
        assert result.exit_code == 0, result.output
    for seed in range(5):
        images = (pixels(tmp_path / folder / f"seed{seed:04d}.png").astype(int) for folder in ("plain", "compiled"))
        plain, compiled = images
        assert np.abs(plain - compiled).max() <= 1
    assert set(sizes) == {8}


def test_graphs_need_a_gpu(snapshot: Path, tmp_path: Path) -> None:
    result = run(f"--network={snapshot}", "--seeds=0", f"--outdir={tmp_path}", "--graphs", "--device=cpu")
    assert result.exit_code == 2
    assert "--graphs: CUDA graphs need a GPU" in result.output


@pytest.mark.gpu
@pytest.mark.parametrize("noise_mode", ["const", "random"])
def test_graphs_do_not_change_the_images(snapshot: Path, noise_mode: str) -> None:
    G = load_network(snapshot, "cuda").G_ema
    c = torch.zeros(1, 0, device="cuda")
    fast = seed_images.FastGenerator(G, use_graphs=True)
    with torch.no_grad():
        for seeds in ((0, 1, 2), (7, 8, 9)):
            plain = seed_images.seed_images(G, seeds, c, 0.7, noise_mode)
            assert torch.equal(seed_images.seed_images(fast, seeds, c, 0.7, noise_mode), plain)
    assert fast.graphs is not None
    assert len(fast.graphs.captured) == 1


def test_random_noise_depends_only_on_the_seed(snapshot: Path) -> None:
    G, c = load_network(snapshot).G_ema, torch.zeros(1, 0)
    with torch.no_grad():
        alone = seed_images.seed_images(G, (5,), c, 1.0, "random", batch_multiple=16)
        among = seed_images.seed_images(G, (5, 6), c, 1.0, "random", batch_multiple=16)
    assert torch.equal(alone[0], among[0])


def test_the_precision_option_lists_all_precisions() -> None:
    assert [*execution.REDUCED] == [*PRECISIONS]
