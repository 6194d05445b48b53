"""Command-line tools on foreign snapshots, from a file and from a URL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SMALL
from foreign_files import (
    STYLEFORMER_LAYERS,
    STYLEFORMER_WIDTHS,
    discriminator_shapes,
    draw,
    dumps,
    module,
    styleformer_module,
    write,
)
from PIL import Image
from web import Site

import calc_metrics
import generate
import legacy
import train
from torch_utils.checkpoint import Checkpoint
from training.networks import GENERATORS
from training.networks.styleformer import StyleformerConfig


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = discriminator_shapes(32, 256, 16, 3, "resnet", True)
    kwargs: dict[str, Any] = {"c_dim": 0, "img_resolution": 32, "img_channels": 3, "conv_clamp": 256}
    D = module("Discriminator", draw(shapes, seed=1), **kwargs, channel_base=256, channel_max=16)
    folder = tmp_path_factory.mktemp("theirs")
    content = {"G": styleformer_module(), "D": D, "G_ema": styleformer_module()}
    return write(folder / "network-snapshot-002000.pkl", content)


@pytest.fixture
def site(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    with Site() as site:
        site.files[f"/{theirs.name}"] = theirs.read_bytes()
        yield site


def run(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def run_ok(command: Any, *arguments: object) -> str:
    result = run(command, *arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def test_generate_reads_a_file_or_a_url(theirs: Path, site: Site, tmp_path: Path) -> None:
    url = f"{site.url}/{theirs.name}"
    for network, folder in ((theirs, "file"), (url, "web"), (url, "again")):
        run_ok(generate.main, f"--network={network}", "--seeds=0-2", f"--outdir={tmp_path / folder}", "--device=cpu")
    images = [(tmp_path / folder / "seed0001.png").read_bytes() for folder in ("file", "web", "again")]
    assert images[0] == images[1] == images[2]
    with Image.open(tmp_path / "web" / "seed0001.png") as image:
        assert image.size == (32, 32)
    assert len(site.requests) == 1
    site.pages["/page.pkl"] = (200, {"Content-Type": "text/html"}, b"<html><title>Log in</title></html>")
    refused = run(generate.main, f"--network={site.url}/page.pkl", "--seeds=0", f"--outdir={tmp_path / 'no'}")
    assert (refused.exit_code, "an HTML page ('Log in')" in refused.stderr) == (2, True)


def test_metrics_of_a_foreign_network_are_computed(
    theirs: Path, site: Site, shapes32_zip: Path, tmp_path: Path
) -> None:
    outdir = theirs.parent
    common = ["--metrics=swd32", f"--data={shapes32_zip}", "--device=cpu", "--no-cache", f"--outdir={outdir}"]
    records = []
    for network in (theirs, f"{site.url}/{theirs.name}"):
        record = json.loads(run_ok(calc_metrics.main, f"--network={network}", *common).splitlines()[0])
        records.append(record)
    assert records[0]["results"] == records[1]["results"]
    assert (records[1]["snapshot"], records[1]["kimg"]) == ("network-snapshot-002000.pkl", 2000)
    assert (outdir / "metric-swd32.jsonl").read_text().count("\n") == 2
    assert not list((tmp_path / "cache").rglob("metric-*.jsonl"))
    assert "results" in run_ok(legacy.main, "info", theirs, "--json")
    refused = run(calc_metrics.main, f"--network={theirs}", "--metrics=swd32", "--device=cpu")
    assert (refused.exit_code, "specify the dataset with --data" in refused.stderr) == (2, True)


SHORT = [*SMALL, "--kimg=0.016", "--tick=0.016", "--snap=1", "--metrics=none", "--device=cpu"]
SHORT += ["--g_dict=32,16,16", "--num_layers=1,1,1"]


def test_training_starts_from_a_foreign_snapshot(theirs: Path, site: Site, shapes32_zip: Path, tmp_path: Path) -> None:
    """The user and the query of the URL must not appear in any file of the run."""
    url = f"{site.url}/{theirs.name}"
    secret = f"{url.replace('//', '//user:s3cret@')}?signature=s3cret"
    common = [f"--data={shapes32_zip}", *SHORT]
    common += [f"--outdir={tmp_path / 'runs'}", "--freezed=3", "--aug=noaug"]
    printed = run_ok(train.main, *common, f"--resume={secret}")
    assert "D: 23 of 23 tensors copied (100.0% of the parameters)" in printed
    assert f"Starting from {url} (kimg 2000):\n  The URL is recorded without user, password and query" in printed
    (run_dir,) = (tmp_path / "runs").iterdir()
    kept = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(kept) > 10
    assert [name for name, content in kept.items() if b"s3cret" in content] == []
    options = json.loads((run_dir / "training_options.json").read_text())
    expected = {"source": url, "kimg": 2000, "copied_g": 1, "copied_d": 1, "copied_g_ema": 1, "partial": [], "new": []}
    assert options["origin"] == expected

    source, trained = legacy.load_network(theirs), legacy.load_network(run_dir / "network-snapshot-000000.pkl")
    assert trained.config.origin.source == url
    before, after = source.D.state_dict(), trained.D.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(("fromrgb.0", "blocks.0.conv")) for key in moved)
    assert "epilogue.out.weight" in moved
    assert (after["epilogue.out.weight"] - before["epilogue.out.weight"]).abs().max() < 0.05

    run_ok(train.main, *common, "--kimg=0.032", "--resume=latest")
    assert list((tmp_path / "runs").iterdir()) == [run_dir]
    assert json.loads((run_dir / "training_options.json").read_text())["origin"] == expected
    state = Checkpoint.read(max(run_dir.glob("training-state-*.pt")))
    assert (state["parts"]["state"]["nimg"], state["config"]["origin"]) == (32, expected)


def test_training_can_start_at_another_resolution(theirs: Path, shapes_zip: Path, tmp_path: Path) -> None:
    common = [f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, "--g_dict=32,16", "--num_layers=1,1"]
    common += ["--aug=noaug", f"--resume={theirs}"]
    refused = run(train.main, *common, "--freezed=2")
    assert refused.exit_code == 2
    assert "--freezed=2: would freeze fromrgb.16x16.weight, fromrgb.16x16.bias at random" in refused.stderr
    assert not (tmp_path / "runs").exists()
    assert "D: new: fromrgb.16x16.weight" in run_ok(train.main, *common)
    (run_dir,) = (tmp_path / "runs").iterdir()
    origin = json.loads((run_dir / "training_options.json").read_text())["origin"]
    assert (origin["source"], origin["kimg"], origin["copied_g"]) == (str(theirs), 2000, 1)
    assert 0.9 < origin["copied_d"] < 1
    assert origin["new"] == ["D: fromrgb.16x16.weight", "D: fromrgb.16x16.bias"]
    assert f"started from   {theirs}" in run_ok(legacy.main, "info", run_dir / "network-snapshot-000000.pkl")


def test_a_dry_run_checks_the_snapshot_to_resume_from(theirs: Path, shapes32_zip: Path, tmp_path: Path) -> None:
    common = [f"--data={shapes32_zip}", *SHORT, f"--outdir={tmp_path / 'runs'}", "--aug=noaug", "-n"]
    (tmp_path / "text.pkl").write_text("text")
    wrong = {"nonsense": "not `latest`, a run", str(tmp_path / "text.pkl"): "not a file of this project"}
    for name, message in wrong.items():
        result = run(train.main, *common, f"--resume={name}")
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    unfit = run(train.main, *common, f"--resume={theirs}", "--set=generator.w_dim=32")
    assert (unfit.exit_code, "the snapshot has styles of 64 numbers" in unfit.stderr) == (2, True), unfit.output

    origin = json.loads(run_ok(train.main, *common, f"--resume={theirs}"))["options"]["origin"]
    assert (origin["source"], origin["kimg"], origin["copied_d"], origin["new"]) == (str(theirs), 2000, 1, [])
    folder = tmp_path / "folder"
    run_ok(legacy.main, "convert", f"--source={theirs}", f"--dest={folder}")
    origin = json.loads(run_ok(train.main, *common, f"--resume={folder}"))["options"]["origin"]
    assert (origin["source"], origin["copied_g"]) == (str(folder), 1)
    assert json.loads(run_ok(train.main, *common, "--resume=latest"))["options"]["origin"]["source"] is None
    assert not (tmp_path / "runs").exists()


def test_an_unusable_file_is_refused_before_anything_is_written(shapes32_zip: Path, tmp_path: Path) -> None:
    path = tmp_path / "generation.pkl"
    write(path, {"G_ema": styleformer_module()})
    (tmp_path / "list.pkl").write_bytes(dumps([1]))
    expected = {
        "generation.pkl": "G cannot be used: it is missing",
        "list.pkl": "not a snapshot of Styleformer",
    }
    for name, message in expected.items():
        arguments = [f"--outdir={tmp_path / 'runs'}", f"--data={shapes32_zip}", *SHORT, f"--resume={tmp_path / name}"]
        refused = run(train.main, *arguments)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.output
    assert not (tmp_path / "runs").exists()


def test_info_describes_a_foreign_snapshot(theirs: Path) -> None:
    text = run_ok(legacy.main, "info", theirs)
    for words in ("Styleformer, public release", "32x32, 3 channels", "kimg 2000", "their.zip", "widths 32,16,16"):
        assert words in text
    info = json.loads(run_ok(legacy.main, "info", theirs, "--json"))
    with torch.device("meta"):
        G = StyleformerConfig(z_dim=64, w_dim=64, widths=STYLEFORMER_WIDTHS, layers=STYLEFORMER_LAYERS).build()
    assert info["networks"]["G_ema"] == {"family": "styleformer", "parameters": sum(x.numel() for x in G.parameters())}
    assert info["config"]["generator"]["family"] in GENERATORS
    assert info["bytes"] == theirs.stat().st_size


def test_info_about_our_own_snapshot_builds_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Path(__file__).parent / "data" / "network-snapshot-v1.pkl"
    with monkeypatch.context() as patch:
        patch.setattr("training.snapshots.snapshot.build_networks", lambda *_: pytest.fail("a network was built"))
        info = json.loads(run_ok(legacy.main, "info", ours, "--json"))
    assert (info["kimg"], info["format_version"], info["written_by"]) == (0.104, 1, "0.1.0")
    assert info["networks"]["D"]["parameters"] == sum(x.numel() for x in legacy.load_network(ours).D.parameters())
    missing = run(legacy.main, "info", "missing.pkl")
    assert (missing.exit_code, missing.stderr) == (2, "Error: missing.pkl: no such file\n")
