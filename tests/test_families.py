"""Network families by name: options, presets, refused options, and learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import make_shapes
from small_families import D_SETTINGS, G_SETTINGS
from training_helpers import SMALL_STYLEGAN2_D, SMALL_STYLEGAN2_G, distances_to_scenes, flat_parameters

import generate
import train
from dnnlib.config import ConfigError, override
from training.config import PRESETS, Environment, resolve
from training.networks import DISCRIMINATORS, GENERATORS
from training.networks.styleformer import StyleformerConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.snapshots.snapshot import load_network

COMMON = ["--cfg=tiny", "--workers=0", "--batch=8", "--metrics=none", "--device=cpu"]
COMMON += ["--kimg=0.032", "--tick=0.016", "--snap=1"]
COMMON += ["--mixing=0.9", "--pl-weight=2", "--set=loss.pl_interval=2", "--set=loss.r1_interval=2"]


def env(resolution: int) -> Environment:
    return Environment(img_shape=(3, resolution, resolution), c_dim=0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(argument) for argument in arguments])


def run_ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def plan(data: Path, *arguments: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(run_ok("--outdir=x", f"--data={data}", "--device=cpu", "-n", *arguments))
    return loaded


def test_stylegan2_for_cifar_has_the_published_parameter_count(shapes32_zip: Path) -> None:
    for arguments in (["--cfg=cifar-stylegan2"], ["--cfg=cifar", "--gen=stylegan2"]):
        assert plan(shapes32_zip, *arguments)["parameters"] == {"G": 19_947_539, "D": 20_720_641}


@pytest.mark.parametrize(
    ("preset", "resolution", "parameters"),
    [
        ("stylegan2", 128, 29_328_669),
        ("paper256", 256, 24_767_458),
        ("paper1024", 1024, 30_370_060),
    ],
)
def test_stylegan2_presets_have_the_published_parameter_counts(preset: str, resolution: int, parameters: int) -> None:
    config = resolve(PRESETS[preset], env(resolution))
    with torch.device("meta"):
        G = config.generator.build()
    assert sum(p.numel() for p in G.parameters()) == parameters


@pytest.mark.parametrize("preset", ["stylegan2", "paper256", "paper512", "paper1024"])
def test_a_stylegan2_preset_accepts_a_styleformer_generator(preset: str) -> None:
    config = override(PRESETS[preset], {"generator.family": "styleformer"})
    assert config.generator == StyleformerConfig(widths=(), layers=(), linformer=None, mapping_layers=8)
    assert config.preset == preset
    resolved = resolve(config, env(64)).generator
    assert isinstance(resolved, StyleformerConfig)
    assert (resolved.widths, resolved.layers, resolved.linformer) == ((512, 256, 128, 64), (1, 2, 1, 1), True)


@pytest.mark.parametrize("preset", ["auto", "cifar", "tiny"])
def test_other_presets_use_a_styleformer(preset: str) -> None:
    assert type(PRESETS[preset].generator) is StyleformerConfig


def test_changing_the_family_keeps_the_shared_fields() -> None:
    config = override(PRESETS["tiny"], {"generator.family": "stylegan2", "generator.w_dim": 32})
    assert config.generator == StyleGAN2Config(z_dim=64, w_dim=32, resolutions=None, channel_base=0)
    assert override(PRESETS["tiny"], {"generator.family": "styleformer"}) == PRESETS["tiny"]


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"generator\.family='biggan'.*styleformer, stylegan2"):
        override(PRESETS["auto"], {"generator.family": "biggan"})
    with pytest.raises(ConfigError, match=r"generator\.wdth=3: .*did you mean widths"):
        override(PRESETS["auto"], {"generator.wdth": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gen=stylegan2", "--g_dict=32,16"], "--g_dict=32,16: is not a setting of the family stylegan2"),
        (["--cfg=paper256", "--linformer"], "--linformer=true: is not a setting of the family stylegan2"),
        (
            ["--cfg=cifar", "--set=generator.architecture=skip"],
            "--set generator.architecture=skip: is not a setting of the family styleformer; supported by stylegan2",
        ),
        (["--gen=biggan"], "--gen=biggan: unknown family; choose one of styleformer, stylegan2"),
        (
            ["--gen=stylegan2", "--set=generator.handover=16"],
            "--set generator.handover=16: is not a setting of the family stylegan2; supported by styleformer-c",
        ),
        (
            ["--gen=styleformer-c"],
            "--gen=styleformer-c does not support: rebuild the dataset with --width=64 --height=64, or give --s",
        ),
        (
            ["--gen=styleformer-c", "--set=generator.handover=24"],
            "--set generator.handover=24: is not a resolution below 32x32 with base=(8, 8); p",
        ),
        (
            ["--gen=styleformer-c", "--set=generator.handover=16", "--g_dict=64"],
            "--num_layers=: must have one entry per resolution",
        ),
        (
            ["--gen=styleformer-c", "--set=generator.handover=16", "--g_dict=64", "--num_layers=1"],
            "with 1 widths ends at 8: set 8",
        ),
        (
            ["--gen=styleformer-c", "--set=generator.handover=8", "--num_layers=1,1"],
            "one entry per resolution, 1 up to handover=8",
        ),
        (
            ["--gen=styleformer-c", "--set=generator.handover=16", "--set=generator.channel_base=9"],
            "--set generator.channel_base=9: leaves no channel at 32x32",
        ),
        (["--gen=stylegan2", "--base=12"], "--base=12,12: cannot be doubled to 32x32"),
        (
            ["--gen=stylegan2", "--set=generator.channel_base=16"],
            "--set generator.channel_base=16: leaves no channel at 32x32",
        ),
        (["--gen=stylegan2", "--cbase=16"], "--cbase=16: leaves no channel at 32x32"),
    ],
)
def test_flags_of_another_family_are_refused(shapes32_zip: Path, arguments: list[str], message: str) -> None:
    result = run("--outdir=x", f"--data={shapes32_zip}", "--device=cpu", "-n", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


# All generators except styleformer with D of stylegan2; the generator of styleformer with every other D.
PAIRS = [
    *((family, "stylegan2") for family in GENERATORS if family != "styleformer"),
    *(("styleformer", other) for other in DISCRIMINATORS if other != "stylegan2"),
]


def pair_options(pair: tuple[str, str]) -> list[str]:
    """Return options of train.py for small networks of a pair of families."""
    options = [f"--gen={pair[0]}", f"--disc={pair[1]}", *COMMON]
    options += ["--mixing=0", "--pl-weight=0"] if pair[0] in ("transgan", "r3gan") else []  # no styles per layer
    for part, settings in (("generator", G_SETTINGS[pair[0]]), ("discriminator", D_SETTINGS[pair[1]])):
        for name, value in settings.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            options.append(f"--set={part}.{name}={text}")
    return options


def test_train_and_generate_work_with_other_families(shapes_zip: Path, tmp_path: Path) -> None:
    """The commands do not depend on the family, so one pair suffices; test_conformance.py trains every family."""
    common = [f"--data={shapes_zip}", *pair_options(("stylegan2", "transgan"))]
    run_ok(f"--outdir={tmp_path / 'whole'}", *common)
    run_ok(f"--outdir={tmp_path / 'parts'}", *common, "--kimg=0.016")
    run_ok(f"--outdir={tmp_path / 'parts'}", *common, "--resume=latest")
    (whole,), (parts,) = ([*(tmp_path / name).iterdir()] for name in ("whole", "parts"))
    assert whole.name == "00000-shapes-tiny-stylegan2-d-transgan-gpus1-batch8"
    trained, resumed = (load_network(path / "network-snapshot-000000.pkl") for path in (whole, parts))
    assert type(trained.config.generator) is GENERATORS["stylegan2"]
    assert type(trained.config.discriminator) is DISCRIMINATORS["transgan"]
    assert trained.kimg == resumed.kimg == 0.032
    for net in ("G_ema", "D"):
        assert torch.equal(*(flat_parameters(getattr(snapshot, net)) for snapshot in (trained, resumed)))
    lines = [json.loads(line) for line in (whole / "stats.jsonl").read_text().splitlines()]
    for name in ("Loss/G/loss", "Loss/D/loss", "Loss/D/reg", "Loss/G/reg"):
        assert lines[-1][name]["mean"] is not None

    arguments = [f"--network={whole / 'network-snapshot-000000.pkl'}", "--seeds=0-2", f"--outdir={tmp_path / 'out'}"]
    result = CliRunner().invoke(generate.main, [*arguments, "--device=cpu", "--trunc=0.5"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "seed0002.png").exists()


@pytest.mark.slow
def test_styleformer_c_trains_on_images_of_128_pixels(tmp_path: Path) -> None:
    data = tmp_path / "scenes.zip"
    make_shapes(data, 128, 16)
    options = [
        "--cfg=styleformer-c256",
        "--g_dict=16,16,16",
        "--num_layers=1,1,1",
        "--set=generator.channel_max=8",
        "--set=discriminator.channel_max=8",
    ]
    options += ["--z-dim=32", "--set=generator.w_dim=32", "--batch=4", "--mbstd=4", "--kimg=0.008", "--metrics=none"]
    options += ["--workers=0", "--device=cpu"]
    run_ok(f"--outdir={tmp_path / 'runs'}", f"--data={data}", *options)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == "00000-scenes-styleformer-c256-gpus1-batch4"
    G = load_network(run_dir / "network-snapshot-000000.pkl").G_ema
    assert G.img_shape == (3, 128, 128)
    assert torch.isfinite(G(torch.randn(2, 32), None)).all()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_processes_train_the_same_weights_as_one(shapes_zip: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    trained = []
    for gpus in (1, 2):
        outdir = tmp_path / str(gpus)
        options = [*pair_options(pair), "--batch-gpu=4", f"--gpus={gpus}"]
        run_ok(f"--outdir={outdir}", f"--data={shapes_zip}", *options)
        (snapshot,) = outdir.glob("*/network-snapshot-000000.pkl")
        trained.append(load_network(snapshot).G)
    for a, b in zip(*(G.parameters() for G in trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # weights of the mapping are around 100


LEARNING = {
    ("stylegan2", "stylegan2"): [*SMALL_STYLEGAN2_G, *SMALL_STYLEGAN2_D],
    ("styleformer-c", "stylegan2"): [
        "--set=generator.handover=8",
        "--g_dict=128",
        "--num_layers=1",
        *SMALL_STYLEGAN2_G,
        *SMALL_STYLEGAN2_D,
    ],
    ("transgan", "stylegan2"): ["--g_dict=128,32", "--num_layers=1,1", *SMALL_STYLEGAN2_D],
    ("stylegan2", "r3gan"): [
        *SMALL_STYLEGAN2_G,
        "--set=discriminator.widths=64,64,32",
        "--set=discriminator.layers=1,1,1",
        "--dlr=0.001",
    ],
    ("stylegan2", "styleformer"): [*SMALL_STYLEGAN2_G, *SMALL_STYLEGAN2_D],
    ("stylegan2", "transgan"): [
        *SMALL_STYLEGAN2_G,
        "--set=discriminator.widths=48,16",
        "--set=discriminator.layers=1,1",
        "--set=discriminator.local_layers=0,0",
        "--dlr=0.001",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", LEARNING, ids="-".join)
def test_every_family_halves_the_distance_to_real_images(tmp_path: Path, pair: tuple[str, str]) -> None:
    options = [f"--gen={pair[0]}", f"--disc={pair[1]}", *LEARNING[pair], "--kimg=3", "--tick=3"]
    untrained, trained = distances_to_scenes(tmp_path, 16, *options)
    assert trained <= untrained / 2
