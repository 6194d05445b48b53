"""Every kind of foreign snapshot in every command: images, conversion, metrics, transfer."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_shapes
from foreign_files import (
    Call,
    Name,
    Tensors,
    augmentation,
    data_parallel,
    discriminator,
    easy_dict,
    module,
    styleformer,
    stylegan2,
    write,
)
from foreign_references import assert_same_images, refused, styleformer_state, stylegan2_state
from reference_styleformer import ref_styleformer
from reference_stylegan2 import ref_stylegan2

import calc_metrics
import generate
import legacy
import train
from training.networks.styleformer import StyleformerConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.snapshots.snapshot import Snapshot

Content = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Kind of snapshot: the unwrapped network, the content of the file, the skipped entries."""

    network: Callable[[], tuple[Tensors, dict[str, Any]]]
    content: Callable[[Call], Content]
    skipped: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32


def whole(G: Call, **more: Any) -> Content:
    return {"G": G, "D": discriminator(), "G_ema": G, **more}


def fork(G: Call) -> Content:
    """Return content with additional entries and an additional argument of D, as in forks of stylegan3."""
    D = discriminator(their_own_argument=1)
    ada = Call(Name("numpy._core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b"), (1, (2,)))
    return {"G": G, "D": D, "G_ema": G, "progress": {"cur_nimg": 5}, "cur_nimg": np.int64(3000), "ada_stats": ada}


KINDS: dict[str, Kind] = {
    "styleformer": Kind(styleformer, lambda G: whole(G, augment_pipe=augmentation(aug_linformer=None))),
    "styleformer, classes": Kind(
        partial(styleformer, 5), lambda G: {"G": G, "D": discriminator(5), "G_ema": G, "augment_pipe": augmentation()}
    ),
    "linformer": Kind(
        partial(styleformer, linformer=True), lambda G: {"G_ema": G, "augment_pipe": augmentation(aug_linformer=True)}
    ),
    "stylegan2-ada": Kind(stylegan2, lambda G: whole(G, augment_pipe=augmentation())),
    "stylegan2 of stylegan3": Kind(partial(stylegan2, flat=True), whole),
    "fork of stylegan3": Kind(partial(stylegan2, flat=True), fork, skipped=("D", "progress", "ada_stats")),
    "unknown augmentation": Kind(
        stylegan2,
        lambda G: whole(G, augment_pipe=augmentation(sharpen=1), training_set_kwargs=[1]),
        skipped=("augment_pipe", "training_set_kwargs"),
    ),
    "augmentation of another project": Kind(
        stylegan2,
        lambda G: whole(G, augment_pipe=Call(Name("their.package", "Pipe"), (), {"p": 1})),
        skipped=("augment_pipe",),
    ),
    "DataParallel": Kind(stylegan2, lambda G: whole(data_parallel(G))),
    "DistributedDataParallel": Kind(
        styleformer, lambda G: whole(data_parallel(G, "distributed.DistributedDataParallel"))
    ),
    "float16": Kind(stylegan2, whole, dtype=torch.float16),
    "float64": Kind(styleformer, whole, dtype=torch.float64),
    "protocol 2": Kind(stylegan2, whole, options=(("protocol", 2), ("numpy_core", "numpy.core"))),
    "protocol 5": Kind(styleformer, whole, options=(("protocol", 5),)),
}


def make(kind: Kind, path: Path) -> tuple[Path, Tensors]:
    """Write a file of a kind; return the path and the tensors of the generator."""
    tensors, arguments = kind.network()
    stored = {name: x.to(kind.dtype) for name, x in tensors.items()}
    return write(path, kind.content(module("Generator", stored, **arguments)), **dict(kind.options)), stored


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {name: make(kind, folder / f"{i}.pkl")[0] for i, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {side: make_shapes(folder / f"{side}.zip", side, 64) for side in (16, 32)}


def run(command: Any, *arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def largest_difference(snapshot: Snapshot, tensors: Tensors) -> float:
    config = snapshot.config.generator
    if isinstance(config, StyleformerConfig):
        state = styleformer_state(tensors, config)
        return assert_same_images(snapshot, lambda ws, noise: ref_styleformer(ws, state, config, noise), tensors)
    assert isinstance(config, StyleGAN2Config)
    state = stylegan2_state(tensors)
    return assert_same_images(snapshot, lambda ws, noise: ref_stylegan2(ws, state, config, noise), tensors)


@pytest.mark.parametrize("name", KINDS)
def test_images_equal_the_reference(name: str, tmp_path: Path) -> None:
    path, tensors = make(KINDS[name], tmp_path / "theirs.pkl")
    snapshot = legacy.load_network(path)
    assert largest_difference(snapshot, tensors) <= 1e-4
    assert tuple(snapshot.left_out) == KINDS[name].skipped
    assert (snapshot.D is None) == ("D" in snapshot.left_out or name == "linformer")


@pytest.mark.parametrize("name", KINDS)
def test_every_command_reads_every_kind(
    name: str, files: dict[str, Path], data: dict[int, Path], tmp_path: Path
) -> None:
    """Run info, generate, convert, generate from the conversion, and a metric."""
    path, kind = files[name], KINDS[name]
    info = json.loads(run(legacy.main, "info", str(path), "--json"))
    assert tuple(info["left_out"]) == kind.skipped
    side, c_dim = info["config"]["discriminator"]["img_size"][0], info["config"]["generator"]["c_dim"]
    options = [f"--network={path}", "--seeds=0-1", "--device=cpu", *(["--class=1"] if c_dim else [])]
    printed = run(generate.main, *options, f"--outdir={tmp_path / 'images'}")
    assert ("skipped: " in printed) == bool(kind.skipped)
    assert all(f" {entry} (" in printed for entry in kind.skipped)
    run(legacy.main, "convert", f"--source={path}", f"--dest={tmp_path / 'folder'}")
    options[0] = f"--network={tmp_path / 'folder'}"
    run(generate.main, *options, f"--outdir={tmp_path / 'again'}")
    first, second = ((tmp_path / folder / "seed0001.png").read_bytes() for folder in ("images", "again"))
    assert first == second
    printed = run(
        calc_metrics.main, f"--network={path}", "--metrics=swd32", f"--data={data[side]}", "--device=cpu", "--gpus=1"
    )
    record = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert 0 < next(iter(record["results"].values())) < 1e4


MODELS = {
    "stylegan2": ["--gen=stylegan2", "--set=generator.channel_base=48", "--set=generator.channel_max=5"],
    "styleformer": ["--base=8", "--g_dict=8,6", "--num_layers=1,2", "--depth=4"],
    "linformer": ["--base=16", "--g_dict=8,6", "--num_layers=1,2", "--depth=4", "--linformer=1"],
}


def resume(path: Path, data: Path, outdir: Path, *more: str, model: str = "stylegan2") -> Any:
    """Train a step from a snapshot."""
    shared = [
        "--cfg=auto",
        "--z-dim=5",
        "--set=generator.w_dim=6",
        "--map-depth=2",
        "--cbase=48",
        "--set=discriminator.channel_max=8",
        "--d-arch=resnet",
    ]
    run = ["--metrics=none", "--device=cpu", "--batch=4", "--kimg=0.004", "--tick=1", f"--resume={path}"]
    arguments = [f"--outdir={outdir}", f"--data={data}", *shared, *MODELS[model], *run, *more]
    return CliRunner().invoke(train.main, arguments)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_copied_or_refused_with_a_reason(
    name: str, files: dict[str, Path], data: dict[int, Path], tmp_path: Path
) -> None:
    family = legacy.describe(files[name])["networks"]["G_ema"]["family"]
    model = "linformer" if name == "linformer" else family
    flags = ["--cond=1"] if "classes" in name else []
    result = resume(files[name], data[32 if name == "linformer" else 16], tmp_path, "-n", *flags, model=model)
    problem = {"fork of stylegan3": "D cannot be used: unknown argument", "linformer": "G cannot be used"}
    if name in problem:
        assert (result.exit_code, problem[name] in result.output) == (2, True), result.output
        return
    assert result.exit_code == 0, result.output
    origin = json.loads(result.stdout)["options"]["origin"]
    assert (origin["copied_g"], origin["copied_d"], origin["copied_g_ema"]) == (1, 1, 1)


def test_the_maximum_p_survives_conversion_and_an_unknown_pipe(data: dict[int, Path], tmp_path: Path) -> None:
    tensors, arguments = stylegan2()
    pipe = augmentation(0.9, aug_linformer=True, sharpen=1)
    path = write(tmp_path / "theirs.pkl", whole(module("Generator", tensors, **arguments), augment_pipe=pipe))
    run(legacy.main, "convert", f"--source={path}", f"--dest={tmp_path / 'ours.pkl'}")
    run(legacy.main, "convert", f"--source={path}", f"--dest={tmp_path / 'folder'}")
    for source in (path, tmp_path / "ours.pkl", tmp_path / "folder"):
        result = resume(source, data[16], tmp_path / "runs", "-n")
        assert json.loads(result.stdout)["options"]["augment"]["max_p"] == 0.7
    assert "skipped: augment_pipe (unknown argument sharpen)" in resume(path, data[16], tmp_path / "runs", "-n").stderr


def test_many_unknown_entries_are_abbreviated(tmp_path: Path) -> None:
    path, _ = make(KINDS["stylegan2-ada"], tmp_path / "theirs.pkl")
    tensors, arguments = stylegan2()
    content = {"G_ema": module("Generator", tensors, **arguments), **{f"entry{i}": i for i in range(1000)}}
    (note,) = legacy.load_network(write(path, content)).notes()
    assert "entry9 (unknown), 990 more (unknown)" in note
    assert len(note) < 600


def test_training_starts_despite_an_unknown_augmentation(
    files: dict[str, Path], data: dict[int, Path], tmp_path: Path
) -> None:
    result = resume(files["unknown augmentation"], data[16], tmp_path)
    assert result.exit_code == 0, result.output
    assert "skipped: augment_pipe (unknown argument sharpen)" in result.output


@pytest.mark.parametrize(
    ("bound", "flags", "expected"),
    [(True, (), 0.7), (False, (), 1.0), (None, (), 1.0), (True, ("--set=augment.max_p=0.5",), 0.5)],
)
def test_the_maximum_p_is_copied_with_the_weights(
    bound: bool | None, flags: tuple[str, ...], expected: float, data: dict[int, Path], tmp_path: Path
) -> None:
    tensors, arguments = stylegan2()
    pipe = augmentation(0.9, aug_linformer=bound)
    path = write(tmp_path / "theirs.pkl", whole(module("Generator", tensors, **arguments), augment_pipe=pipe))
    snapshot = legacy.load_network(path)
    assert (snapshot.config.augment.max_p, snapshot.ada_p) == ((0.7, 0.7) if bound else (1, pytest.approx(0.9)))
    result = resume(path, data[16], tmp_path / "runs", "-n", *flags)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"]["augment"]["max_p"] == expected


def test_snapshots_of_the_stylegan3_repository_have_its_defaults(tmp_path: Path) -> None:
    path, _ = make(KINDS["stylegan2 of stylegan3"], tmp_path / "theirs.pkl")
    config = legacy.load_network(path).config
    assert isinstance(config.discriminator, StyleGAN2DiscriminatorConfig)
    assert (config.generator.conv_clamp, config.discriminator.conv_clamp) == (256, 256)
    assert (config.precision, config.reduced_from, config.w_avg_rate) == ("fp16", 8, 0.002)
    path, _ = make(KINDS["fork of stylegan3"], tmp_path / "fork.pkl")
    assert legacy.load_network(path).nimg == 3000


def test_prefixes_of_wrappers_are_removed(tmp_path: Path) -> None:
    for prefix in ("module.", "_orig_mod."):
        tensors, arguments = stylegan2()
        G = module("Generator", {prefix + name: x for name, x in tensors.items()}, **arguments)
        snapshot = legacy.load_network(write(tmp_path / "theirs.pkl", {"G_ema": G}))
        assert largest_difference(snapshot, tensors) <= 1e-4


STYLEGAN3 = {"synthesis.input.weight": torch.zeros(2, 2), "synthesis.L0_36_512.weight": torch.zeros(2, 2, 1, 1)}


def test_stylegan3_is_refused_by_its_config(tmp_path: Path) -> None:
    for letter, radial in (("t", {}), ("r", {"use_radial_filters": True, "conv_kernel": 1})):
        for arguments in (radial, {"synthesis_kwargs": easy_dict(**radial)}):
            G = module("Generator", STYLEGAN3, z_dim=512, **arguments)
            refused(write(tmp_path / "n.pkl", {"G_ema": G}), f"a StyleGAN3 generator, config {letter}", "own code")


def other_files(folder: Path) -> dict[Path, str]:
    """Write files of torch.save from other code bases; return the expected description of each."""
    layers = {"style.1.weight": torch.zeros(4, 4), "conv1.conv.weight": torch.zeros(1, 4, 4, 3, 3)}
    checkpoint = {"g": layers, "d": {}, "g_ema": layers, "latent_avg": torch.zeros(4), "g_optim": {}}
    files: dict[str, tuple[Any, str]] = {
        "with_code.pt": ({**checkpoint, "args": torch.nn.Linear(1, 1)}, "another StyleGAN2 code base"),
        "checkpoint.pt": (checkpoint, "another StyleGAN2 code base"),
        "weights.pth": (layers, "a bare state_dict"),
        "nested.pth": ({"state_dict": layers, "epoch": 3}, "a bare state_dict"),
        "object.pt": (torch.nn.Linear(1, 1), "a pickled object ("),
        "values.pt": ({"epoch": 3, "loss": 0.5}, "a torch.save file that holds epoch, loss"),
    }
    for name, (content, _) in files.items():
        torch.save(content, folder / name)
        torch.save(content, folder / f"old_{name}", _use_new_zipfile_serialization=False)
    described = {folder / f"{prefix}{name}": text for name, (_, text) in files.items() for prefix in ("", "old_")}
    with zipfile.ZipFile(folder / "program.pt2", "w") as archive:  # layout of torch.export.save
        archive.writestr("program/models/model.json", "{}")
    return described | {folder / "program.pt2": "a program of torch.export"}


def test_files_of_other_code_bases_are_identified(tmp_path: Path) -> None:
    for path, text in other_files(tmp_path).items():
        refused(path, text, "which is not supported")
    path = next(iter(tmp_path.glob("checkpoint.pt")))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:-100])
    refused(cut, "damaged or incomplete")


@pytest.mark.parametrize("name", ["styleformer", "stylegan2 of stylegan3"])
def test_truncated_files_are_refused(name: str, tmp_path: Path) -> None:
    path, _ = make(KINDS[name], tmp_path / "whole.pkl")
    data, cut = path.read_bytes(), tmp_path / "cut.pkl"
    for share in (0.01, 0.3, 0.7, 0.99):
        cut.write_bytes(data[: int(share * len(data))])
        refused(cut, "truncated")
