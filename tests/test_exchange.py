"""Snapshots as folders of safetensors: lossless in both directions, and refused if anything does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="safetensors is an optional package")
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from foreign_files import stylegan2_module, write
from snapshot_helpers import make_snapshot

import calc_metrics
import dataset_tool
import dnnlib.util
import legacy
from dnnlib.config import UserError, to_json
from torch_utils.checkpoint import digest
from training.networks import GENERATORS
from training.snapshots.exchange import load_folder, save_folder
from training.snapshots.snapshot import Snapshot, load_network


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(legacy.main, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("net") / "n.pkl")


@pytest.fixture
def folder(snapshot: Snapshot, tmp_path: Path) -> Path:
    save_folder(tmp_path / "folder", snapshot)
    return tmp_path / "folder"


@pytest.mark.parametrize("family", GENERATORS)
def test_converting_to_a_folder_and_back_is_lossless(tmp_path: Path, family: str) -> None:
    """The checksum covers weights, configuration, number of images and ADA's p."""
    make_snapshot(tmp_path / "a.pkl", family)
    for source, dest in (("a.pkl", "folder"), ("folder", "b.pkl")):
        result = convert(f"--source={tmp_path / source}", f"--dest={tmp_path / dest}")
        assert (result.exit_code, result.output) == (0, f"Written: {tmp_path / dest}\n")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pkl", "b.pkl"))
    assert digest(before["payload"]) == before["sha256"] == after["sha256"] == digest(after["payload"])
    assert list(after["payload"]["networks"]) == ["G", "D", "G_ema"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl", "b.pkl", "folder"]


def test_other_programs_can_read_the_folder(folder: Path, snapshot: Snapshot) -> None:
    """Safetensors and JSON are sufficient; the checksums are those of `sha256sum`."""
    document = json.loads((folder / "config.json").read_text())
    assert document["config"] == to_json(snapshot.config)
    assert (document["nimg"], document["ada_p"]) == (12_345, 0.1 + 0.2)
    assert sorted(p.name for p in folder.iterdir()) == [
        "D.safetensors",
        "G.safetensors",
        "G_ema.safetensors",
        "config.json",
    ]
    for name, checksum in document["files"].items():
        path = folder / f"{name}.safetensors"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == checksum
        state = getattr(snapshot, name).state_dict()
        tensors = safetensors.torch.load_file(path)
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[key], x) and tensors[key].dtype == x.dtype for key, x in state.items())


def test_scripts_can_load_a_folder_as_a_snapshot(folder: Path, snapshot: Snapshot) -> None:
    loaded = legacy.load_network(folder)
    z = torch.randn(2, 16)
    assert torch.equal(loaded.G_ema(z, None), snapshot.G_ema(z, None))
    assert (loaded.config, loaded.nimg, loaded.ada_p) == (snapshot.config, snapshot.nimg, snapshot.ada_p)


def test_info_reports_the_same_for_folder_and_snapshot(folder: Path, snapshot: Snapshot) -> None:
    info, same = legacy.describe(folder), legacy.describe(snapshot.path)
    for key in ("source", "kimg", "ada_p", "networks", "config"):
        assert info[key] == same[key]
    assert info["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    (folder / "D.safetensors").unlink()
    result = CliRunner().invoke(legacy.main, ["info", str(folder)])
    assert (result.exit_code, "D.safetensors: no such file" in result.stderr) == (2, True)


def test_metrics_of_a_folder_are_recorded_beside_it(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes.zip"
    make = ["--source=shapes", f"--dest={data}", "--max-images=40", "--width=8", "--height=8", "--workers=1"]
    assert CliRunner().invoke(dataset_tool.main, make).exit_code == 0
    arguments = [f"--network={folder}", f"--data={data}", "--metrics=swd32", "--device=cpu", "--no-cache"]
    result = CliRunner().invoke(calc_metrics.main, [*arguments, f"--outdir={folder.parent}"])
    assert result.exit_code == 0, result.output
    assert (folder.parent / "metric-swd32.jsonl").exists()
    (record,) = legacy.describe(folder)["metrics"]
    written = json.loads(result.stdout.splitlines()[0])
    assert record == {key: written[key] for key in ("metric", "results", "mirror")}
    mirrored = json.dumps(written | {"mirror": True})
    (folder.parent / "metric-swd32.jsonl").write_text(f"{json.dumps(written)}\n{mirrored}\n")
    lines = CliRunner().invoke(legacy.main, ["info", str(folder)]).output.splitlines()
    shown = [line.partition(" swd32_8 ")[2] for line in lines if line.startswith("metric ")]
    value = f"{written['results']['swd32_8']:.4g}"
    assert shown == [value, f"{value} (flips counted)"]


def test_a_foreign_snapshot_can_be_converted(tmp_path: Path) -> None:
    path = write(tmp_path / "network-snapshot-000120.pkl", {"G_ema": stylegan2_module()})
    theirs = legacy.load_network(path)
    for source, dest in ((path, "ours.pkl"), (path, "folder"), (tmp_path / "ours.pkl", "again")):
        assert convert(f"--source={source}", f"--dest={tmp_path / dest}").exit_code == 0
    z = torch.randn(2, theirs.G_ema.z_dim)
    ours = load_network(tmp_path / "ours.pkl")
    for snapshot in (ours, load_folder(tmp_path / "folder"), load_folder(tmp_path / "again")):
        assert (snapshot.G, snapshot.D, snapshot.nimg, snapshot.config) == (None, None, 120_000, theirs.config)
        assert torch.equal(snapshot.G_ema(z, None), theirs.G_ema(z, None))


Tensors = dict[str, torch.Tensor]


def remove(tensors: Tensors) -> None:
    del tensors["mapping.w_avg"]


def add(tensors: Tensors) -> None:
    tensors["extra.weight"] = torch.zeros(2)


def reshape(tensors: Tensors) -> None:
    tensors["mapping.w_avg"] = torch.zeros(15)


def retype(tensors: Tensors) -> None:
    tensors["mapping.w_avg"] = torch.zeros(16, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "the tensor mapping.w_avg is missing"),
        (add, "the tensor extra.weight does not exist in the network"),
        (reshape, r"mapping.w_avg is \(15,\) of float32, the configuration needs \(16,\) of float32"),
        (retype, r"mapping.w_avg is \(16,\) of float16, the configuration needs \(16,\) of float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, change: Callable[[Tensors], None], message: str
) -> None:
    """The checksums of the folder are correct."""
    path = folder / "G.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    document = json.loads((folder / "config.json").read_text())
    document["files"]["G"] = hashlib.sha256(path.read_bytes()).hexdigest()
    document["sha256"] = digest([{key: document[key] for key in ("config", "nimg", "ada_p")}, document["files"]])
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"G\.safetensors: {message}"):
        load_folder(folder)


def edit(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        document[key] = value
        (folder / "config.json").write_text(json.dumps(document))

    return change


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "D.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "D.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "D.safetensors: corrupt or modified"),
        (lambda folder: (folder / "D.safetensors").write_bytes(b"short"), "D.safetensors: corrupt or truncated"),
        (lambda folder: (folder / "D.safetensors").unlink(), "D.safetensors: no such file, but config.json lists it"),
        (edit("nimg", 5), "config.json: corrupt or modified"),
        (edit("config", {"preset": "cifar"}), "config.json: its configuration cannot be read"),
        (edit("version", 99), "format version 99 was written by release"),
        (edit("format", "other"), "config.json: not a file of this project"),
        (edit("files", {"../G": "0"}), r"lists an unknown file ../G.safetensors; known networks are G, D"),
        (edit("files", 3), "config.json: not a file of this project"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: corrupt, not JSON"),
    ],
)
def test_a_corrupt_folder_is_refused_with_the_name_of_the_file(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_folder(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dest={}/n.zip"], "unknown suffix: use .pkl for a snapshot, .onnx for ONNX"),
        (["--dest={}/there"], "there exists and will not be overwritten: remove it or choose another name"),
        (["--dest={}/n.pkl"], "n.pkl exists and will not be overwritten"),
        (["--dest={}/g.onnx"], "g-synthesis.onnx exists and will not be overwritten"),
        (["--dest={}/there", "--format=hub"], "there exists and will not be overwritten"),
        (["--dest={}/new", "--license=mit"], "--license=mit: applies to --format=hub only, not to safetensors"),
        (["--dest={}/new.pkl", "--noise-mode=none"], "--noise-mode=none: applies to --format=onnx only"),
        (["--dest=/proc/new"], "/proc/new: cannot be written"),
        (["--dest=/proc/new/n.pkl"], "/proc/new/n.pkl: cannot be written"),
        (["--dest=/proc/new", "--format=hub"], "/proc/new: cannot be written"),
        (["--dest={}/new", "--source={}/none.pkl"], "none.pkl: no such file"),
    ],
)
def test_refused_conversions_overwrite_nothing(
    snapshot: Snapshot, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there/file", "n.pkl", "g-synthesis.onnx"):
        (tmp_path / name).write_text("precious")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    result = convert(f"--source={snapshot.path}", *(argument.format(tmp_path) for argument in arguments))
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_missing_package_is_reported_with_its_extra(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'")

    monkeypatch.setattr(dnnlib.util.importlib, "import_module", fail)
    for dest, extra in (("folder", "safetensors"), ("g.onnx", "onnx")):
        result = convert(f"--source={snapshot.path}", f"--dest={tmp_path / dest}")
        assert (result.exit_code, f"pip install '.[{extra}]'" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())
