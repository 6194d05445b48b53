"""Kinds of labels: classes and vectors are distinguished, and networks record the kind of their training labels."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import small_config
from exploration_helpers import FAMILIES, build, pixels
from foreign_files import module, styleformer, write
from PIL import Image
from play_helpers import answer, as_pixels, decoded, page_of

import generate
import legacy
import train
from dnnlib.config import UserError
from exploration.model import seed_latents
from torch_utils.images import to_uint8
from training.dataset import DatasetConfig, ImageDataset, LabelKind, kind_of_labels
from training.snapshots.snapshot import load_network, save_network


@pytest.fixture(scope="module")
def vectors_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight 16x16 images, each labelled with an age and a temperature."""
    path = tmp_path_factory.mktemp("data") / "vectors.zip"
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(8):
            buffer = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(buffer, "png")
            archive.writestr(f"img{i}.png", buffer.getvalue())
            labels.append([f"img{i}.png", [0.5 * i, 20.0 - i]])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def snapshot_of(path: Path, data: Path, labels: LabelKind | None, c_dim: int = 2) -> Path:
    """Write the snapshot of an untrained conditional network."""
    generator = dataclasses.replace(FAMILIES["styleformer"], c_dim=c_dim)
    config = dataclasses.replace(small_config(data), generator=generator)
    save_network(path, config=config, G_ema=build(generator), labels=labels)
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(generate.main, [*arguments, "--device=cpu"])


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.output


def test_datasets_know_their_kind_of_labels(vectors_zip: Path, shapes_zip: Path, tmp_path: Path) -> None:
    assert ImageDataset(DatasetConfig(path=str(vectors_zip), use_labels=True)).label_kind == "vectors"
    assert ImageDataset(DatasetConfig(path=str(shapes_zip), use_labels=True)).label_kind == "classes"
    assert ImageDataset(DatasetConfig(path=str(shapes_zip))).label_kind is None
    assert [kind_of_labels(str(path)) for path in (vectors_zip, shapes_zip, tmp_path)] == ["vectors", "classes", None]


@pytest.mark.parametrize(("kind", "shown"), [("vectors", "labels of 2 numbers"), ("classes", "5 classes")])
def test_training_records_the_kind_and_conversions_keep_it(
    kind: str, shown: str, vectors_zip: Path, shapes_zip: Path, tmp_path: Path
) -> None:
    data = vectors_zip if kind == "vectors" else shapes_zip
    model = ["--cfg=tiny", "--base=8", "--g_dict=16,16", "--num_layers=1,1", "--cond=1", "--metrics=none"]
    length = ["--batch=4", "--kimg=0.004", "--tick=1", "--snap=1", "--device=cpu", "--aug=noaug"]
    result = CliRunner().invoke(train.main, [f"--outdir={tmp_path}", f"--data={data}", *model, *length])
    assert result.exit_code == 0, result.output
    snapshot = next(tmp_path.glob("*/network-snapshot-*.pkl"))
    assert load_network(snapshot).labels == kind
    for dest in (tmp_path / "folder", tmp_path / "again.pkl"):
        source = snapshot if dest.suffix == "" else tmp_path / "folder"
        CliRunner().invoke(legacy.main, ["convert", f"--source={source}", f"--dest={dest}"], catch_exceptions=False)
        assert legacy.load_network(dest).labels == kind
    info = CliRunner().invoke(legacy.main, ["info", str(snapshot)]).output
    assert f"16x16, 3 channels, {shown}\n" in info


def test_a_label_conditions_the_images(vectors_zip: Path, tmp_path: Path) -> None:
    path = snapshot_of(tmp_path / "n.pkl", vectors_zip, "vectors")
    result = run(f"--network={path}", "--seeds=3", "--label=3.0,20.0", f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    G = load_network(path).G_ema
    expected = to_uint8(G(seed_latents([3], G.z_dim), torch.tensor([[3.0, 20.0]]), noise_mode="const"))[0]
    difference = pixels(tmp_path / "seed0003.png").astype(int) - expected.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1
    other = to_uint8(G(seed_latents([3], G.z_dim), torch.tensor([[0.0, 0.0]]), noise_mode="const"))[0]
    assert (other != expected).any()


def test_every_command_accepts_a_label(vectors_zip: Path, tmp_path: Path) -> None:
    path, label = snapshot_of(tmp_path / "n.pkl", vectors_zip, "vectors"), "--label=3.0,20.0"
    target = tmp_path / "target.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(target)
    commands = [
        ["mix", "--rows=0", "--cols=1", f"--outdir={tmp_path / 'mix'}"],
        ["video", "--seeds=0-1", "--frames=2", f"--output={tmp_path / 'film.gif'}"],
        ["project", f"--target={target}", "--loss=pixels", "--num-steps=2", f"--outdir={tmp_path / 'project'}"],
        ["attention", "--seeds=0", f"--outdir={tmp_path / 'attention'}"],
    ]
    for command in commands:
        result = run(*command, f"--network={path}", label)
        assert result.exit_code == 0, result.output
        assert "--label: labels of this network are vectors; specify 2" in refused(*command, f"--network={path}")
    assert "--classes=0: labels of this network are vectors" in refused(
        *commands[1], f"--network={path}", "--classes=0-1"
    )


REFUSALS = {
    ("--class=0",): "--class=0: labels of this network are vectors; specify 2 numbers with --label",
    (): "--label: labels of this network are vectors; specify 2 numbers, e.g. --label=0.5,...",
    ("--label=1",): "--label=1: has 1 numbers, but labels of this network have 2",
    ("--label=1,2", "--class=0"): "--class and --label: cannot be combined; specify only one",
    ("--label=1,nan",): "is not a finite number",
    ("--label=1,x",): "'x' is not a valid float",
    ("--label=",): "'' is not a valid float",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_invalid_label_vectors_are_refused(flags: tuple[str, ...], vectors_zip: Path, tmp_path: Path) -> None:
    path = snapshot_of(tmp_path / "n.pkl", vectors_zip, "vectors")
    assert REFUSALS[flags] in refused(f"--network={path}", "--seeds=0", f"--outdir={tmp_path / 'out'}", *flags)
    assert not (tmp_path / "out").exists()


def test_label_vectors_are_refused_by_other_networks(shapes_zip: Path, tmp_path: Path) -> None:
    """Networks trained on classes accept vectors as class mixtures; unconditional networks accept no labels."""
    path, out = snapshot_of(tmp_path / "n.pkl", shapes_zip, "classes"), f"--outdir={tmp_path}"
    result = run(f"--network={path}", "--seeds=0", "--class=1", out)
    assert result.exit_code == 0, result.output
    first = pixels(tmp_path / "seed0000.png")
    assert run(f"--network={path}", "--seeds=0", "--label=0,1", out).exit_code == 0
    assert np.array_equal(first, pixels(tmp_path / "seed0000.png"))
    plain = snapshot_of(tmp_path / "plain.pkl", shapes_zip, None, c_dim=0)
    assert "was trained without labels" in refused(f"--network={plain}", "--seeds=0", "--label=1", out)


def test_snapshots_without_a_label_kind_are_read(vectors_zip: Path, shapes_zip: Path, tmp_path: Path) -> None:
    """The dataset determines the kind; if the dataset is missing, a warning states the assumed kind."""
    by_data = snapshot_of(tmp_path / "data.pkl", vectors_zip, None)
    out = f"--outdir={tmp_path}"
    assert load_network(by_data).labels is None
    assert "labels of this network are vectors" in refused(f"--network={by_data}", "--seeds=0", "--class=0", out)
    data = shutil.copy(shapes_zip, tmp_path / "data.zip")
    without_data = snapshot_of(tmp_path / "without_data.pkl", Path(data), None)
    Path(data).unlink()
    result = run(f"--network={without_data}", "--seeds=0", "--class=0", out)
    assert result.exit_code == 0, result.output
    assert f"Warning: {without_data}: does not state whether labels are classes; assuming 2 classes" in result.output
    assert "Warning" not in run(f"--network={without_data}", "--seeds=0", "--label=0,1", out).output
    tensors, arguments = styleformer(3)
    theirs = write(tmp_path / "theirs.pkl", {"G_ema": module("Generator", tensors, **arguments)})
    assert legacy.load_network(theirs).label_kind() is None  # the dataset is missing


def test_play_uses_the_label_vector_of_the_request(vectors_zip: Path, tmp_path: Path) -> None:
    path = snapshot_of(tmp_path / "n.pkl", vectors_zip, "vectors")
    assert "--label: labels of this network are vectors" in refused("play", f"--network={path}", "--port=0")
    player = page_of(path, label=(3.0, 20.0))
    G = load_network(path).G_ema
    for query, label in (("", [3.0, 20.0]), ("&label=-1,2.5", [-1.0, 2.5])):
        (uri,) = answer(player, f"images?of=5{query}")["images"]
        expected = to_uint8(G(seed_latents([5], G.z_dim), torch.tensor([label]), noise_mode="const"))[0]
        assert np.abs(decoded(uri).astype(int) - as_pixels(expected)).max() <= 1
    with pytest.raises(UserError, match="label=1: has 1 numbers, but labels of this network have 2"):
        answer(player, "images?of=5&label=1")
