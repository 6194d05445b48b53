"""Folders for the Hugging Face Hub: contents, privacy, loading. No test accesses the network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is an optional package")
import huggingface_hub.hub_mixin
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from PIL import Image
from snapshot_helpers import make_snapshot

import legacy
import training.snapshots.hub
from dnnlib.config import UserError, override
from training.config import PRESETS, Environment, apply_options, resolve
from training.snapshots.hub import HubModel, save_hub_folder
from training.snapshots.model_card import changes
from training.snapshots.snapshot import Snapshot, load_network


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(legacy.main, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(
        tmp_path_factory.mktemp("run") / "network-snapshot-000012.pkl", data="/home/me/secret/cars.zip"
    )


@pytest.fixture
def folder(snapshot: Snapshot, tmp_path: Path) -> Path:
    save_hub_folder(tmp_path / "cars", snapshot, "cc-by-4.0")
    return tmp_path / "cars"


@pytest.fixture(autouse=True)
def _without_metrics(snapshot: Snapshot) -> Iterator[None]:
    yield
    for path in snapshot.path.parent.glob("metric-*"):
        path.unlink()


def record(snapshot: Snapshot, name: str, value: float, **changes: Any) -> None:
    """Append a record to metric-<name>.jsonl as calc_metrics.py does."""
    entry = {
        "metric": name,
        "results": {name: value},
        "detector": "inception",
        "protocol": "<N> images",
        "num_real": 1000,
        "num_fake": 5000,
        "mirror": False,
        "data": "/home/me/secret/cars.zip",
        "snapshot": snapshot.path.name,
        "snapshot_sha256": hashlib.sha256(snapshot.path.read_bytes()).hexdigest(),
    }
    with (snapshot.path.parent / f"metric-{name}.jsonl").open("a") as file:
        file.write(json.dumps(entry | changes) + "\n")


def test_a_hub_folder_is_written_by_one_command_and_loads(snapshot: Snapshot, tmp_path: Path) -> None:
    result = convert(f"--source={snapshot.path}", f"--dest={tmp_path / 'cars'}", "--format=hub")
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"Upload it with: hf upload NAME/MODEL {tmp_path / 'cars'}\n")
    names = sorted(path.name for path in (tmp_path / "cars").iterdir())
    assert names == ["G_ema.safetensors", "README.md", "config.json", "samples.png"]
    model = HubModel.from_pretrained(tmp_path / "cars")
    assert model.snapshot.nimg == snapshot.nimg
    state = snapshot.G_ema.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.G_ema.state_dict().items())
    assert convert(f"--source={tmp_path / 'cars'}", f"--dest={tmp_path / 'again.pkl'}").exit_code == 0
    assert load_network(tmp_path / "again.pkl").D is None


@pytest.mark.parametrize("source", ["/home/me/secret/n.pkl", "https://me:secret@site.org/secret/n.pkl?token=secret"])
def test_nothing_about_the_machine_is_published(snapshot: Snapshot, tmp_path: Path, source: str) -> None:
    programs = ("/home/me/secret/i.pt2", "vgg16:/home/me/secret/v.pt2", "inception:x.pt2", "/home/secret/dino/")
    config = override(snapshot.config, {"origin.source": source, "run.detectors": programs})
    save_hub_folder(tmp_path / "cars", replace(snapshot, config=config))
    for path in (tmp_path / "cars").iterdir():
        assert b"secret" not in path.read_bytes(), path
    published = HubModel.from_pretrained(tmp_path / "cars").snapshot.config
    assert (published.data.path, published.origin.source) == ("cars.zip", "n.pkl")
    assert published.run.detectors == ("i.pt2", "vgg16:v.pt2", "inception:x.pt2", "dino")


def test_the_sample_image_shows_the_seeds(folder: Path, snapshot: Snapshot) -> None:
    with Image.open(folder / "samples.png") as image:
        height = (image.height + 2) // 4  # of 4 x 4 images of 8x8, enlarged to 96x96 and above their seeds
        assert image.width == 4 * 98 - 2
        found = np.asarray(image)[height:, 98:][:96:12, :96:12].astype(int)  # the sixth image
    z = torch.from_numpy(np.random.RandomState(5).randn(1, 16)).float()
    expected = snapshot.G_ema(z, None)[0].permute(1, 2, 0).numpy() * 127.5 + 128
    assert np.abs(found - np.floor(expected.clip(0, 255))).max() <= 1


def test_the_card_states_the_known_facts(snapshot: Snapshot, tmp_path: Path) -> None:
    record(snapshot, "fid50k_full", 30.0, snapshot_sha256="of another network")
    record(snapshot, "fid50k_full", 20.0)
    record(snapshot, "fid50k_full", 12.345)
    record(snapshot, "fid50k_full", 10.0, num_real=None)
    record(snapshot, "swd5k", 1.5, detector=None, mirror=True)
    record(snapshot, "swd5k_floor", 1.0, num_real=2000, num_fake=0)
    record(snapshot, "is50k", 9.0, snapshot_sha256=None)
    save_hub_folder(tmp_path / "cars", snapshot, "cc-by-4.0")
    card = ModelCard.load(tmp_path / "cars" / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "styleformer")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    results = {result.metric_type: (result.metric_value, result.dataset_name) for result in card.data.eval_results}
    assert results == {"fid50k_full": (12.345, "cars.zip"), "swd5k": (1.5, "cars.zip")}
    rows = [line for line in card.text.splitlines() if line.startswith(("| fid", "| swd", "| is"))]
    assert rows == [
        "| fid50k_full | 12.345 | 5,000 generated, 1,000 real (cars.zip) |",
        "| swd5k | 1.5 | 5,000 generated, 1,000 real (cars.zip, with flips) |",
    ]
    for words in ("`cars.zip`", "12.345 kimg", "| preset | tiny |", "(samples.png)", "`cc-by-4.0`"):
        assert words in card.text


def test_the_card_states_each_protocol_once(snapshot: Snapshot, tmp_path: Path) -> None:
    results = {name: 1.0 for name in ("swd5k", "swd5k_32", "swd5k_16")}
    settings = {"detector": None, "protocol": "patches of <N>", "truncation_psi": 0.7, "noise_mode": "const"}
    record(snapshot, "swd5k", 1.0, results=results, **settings)
    record(snapshot, "fid5k_full_mine", 2.0, detector="mine.pt2")
    save_hub_folder(tmp_path / "cars", snapshot)
    text = (tmp_path / "cars" / "README.md").read_text()
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("- **")] == [
        "- **fid5k_full_mine**", "- **swd5k**",
    ]  # fmt: skip
    assert "usual FID; lower is better. Protocol: mine.pt2; &lt;N> images." in text
    assert text.count("; lower is better. Protocol: patches of &lt;N>; truncation psi 0.7; const noise.\n") == 1


def test_the_card_states_the_images_of_each_value(snapshot: Snapshot, tmp_path: Path) -> None:
    names = ["fid50_full_det", "fid50_full_det_train", "fid50_full_det_holdout"]
    split = {"num_real": 100, "num_fake": 50, "num_holdout": 20}
    record(snapshot, "fid50_full_det", 1.0, results=dict.fromkeys(names, 1.0), **split)
    record(snapshot, "fld50", 2.0, results={"fld50": 2.0, "fld50_generalisation_gap": -3.0}, **split)
    record(snapshot, "authpct50", 61.0, num_real=100, num_fake=50, num_holdout=0)
    record(snapshot, "swd50_floor", 1.0, num_fake=50)
    record(snapshot, "mymetric", 1.0, num_fake=0)  # unknown: without generated images it is a floor
    config = override(snapshot.config, {"data.max_images": 100, "data.holdout": 20})
    save_hub_folder(tmp_path / "cars", replace(snapshot, config=config))
    card = ModelCard.load(tmp_path / "cars" / "README.md")
    rows = dict(re.findall(r"^\| (\w+) \| [-\d.]+ \| (.+) \|$", card.text, re.MULTILINE))
    assert rows == {
        "authpct50": "50 generated, 100 real (cars.zip)",
        "fid50_full_det": "50 generated, 100 real (cars.zip)",
        "fid50_full_det_train": "50 generated, 20 training (cars.zip)",
        "fid50_full_det_holdout": "50 generated, 20 held-out",
        "fld50": "50 generated, 100 real (cars.zip), 20 held-out",
        "fld50_generalisation_gap": "50 generated, 100 real (cars.zip), 20 held-out",
    }
    published = {result.metric_type for result in card.data.eval_results}
    assert published == {"authpct50", "fid50_full_det", "fld50", "fld50_generalisation_gap"}
    assert "| dataset | cars.zip, a random subset of 100 images, 20 images held out |" in card.text
    assert "no copies of training images; a fake is authentic if its nearest training image is nearer to" in card.text


@pytest.mark.parametrize("name", ["cifar", "styleformer2", "stylegan2", "transgan-cifar", "r3gan-cifar", "tiny"])
def test_only_changes_to_the_preset_are_published(name: str) -> None:
    env = Environment(img_shape=(3, 32, 32), c_dim=3, on_gpu=True, has_bf16=True)
    data = {"data.use_labels": True, "data.path": "a.zip"}
    own = resolve(override(PRESETS[name], data), env)
    assert changes(own, env.img_shape) == []
    given = {"g_optimizer.eps": 0.5, "run.desc": "test", "run.total_kimg": 1.0}
    changed = resolve(override(PRESETS[name], data | given), env)
    assert changes(changed, env.img_shape) == [f"g_optimizer.eps: {own.g_optimizer.eps!r} -> 0.5"]
    diffaug = {"discriminator.family": "styleformer", "augment.mode": "diffaug"}
    chosen = resolve(override(apply_options(PRESETS["cifar"], diffaug), data), env)
    assert changes(chosen, env.img_shape) == [
        "discriminator.family: 'stylegan2' -> 'styleformer'", "augment.mode: 'ada' -> 'diffaug'",
    ]  # fmt: skip


@pytest.mark.parametrize("c_dim", [0, 2, 5])
def test_the_code_in_the_card_runs(tmp_path: Path, c_dim: int) -> None:
    save_hub_folder(tmp_path / "model", make_snapshot(tmp_path / "n.pkl", c_dim=c_dim))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    assert len(code.split("\n\n")[1].splitlines()) + 2 <= 5
    scope: dict[str, Any] = {}
    exec(code.replace("NAME/MODEL", str(tmp_path / "model")), scope)
    assert scope["img"].shape == (4, 3, 8, 8)


def test_the_card_states_a_missing_licence_and_metrics(snapshot: Snapshot, tmp_path: Path) -> None:
    save_hub_folder(tmp_path / "cars", snapshot)
    card = ModelCard.load(tmp_path / "cars" / "README.md")
    assert card.data.license is None
    assert "The author has not chosen a licence yet." in card.text
    assert "No metrics are recorded." in card.text


def test_a_truncated_metric_record_is_skipped(snapshot: Snapshot, tmp_path: Path) -> None:
    (snapshot.path.parent / "metric-fid5k.jsonl").write_text('{"metric": "fid5k", "res\n')
    record(snapshot, "fid5k", 20.0)
    save_hub_folder(tmp_path / "cars", snapshot)
    assert "| fid5k | 20 |" in (tmp_path / "cars" / "README.md").read_text()


def test_upload_and_download_go_through_the_library(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder replaces the Hub."""

    class Hub:
        def __init__(self, token: str | None) -> None:
            self.repo_id = ""

        def create_repo(self, repo_id: str, **options: Any) -> Hub:
            self.repo_id = repo_id
            return self

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return "url"

    def download(repo_id: str, **options: Any) -> str:
        assert options["revision"] == "main"
        return str(tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub.hub_mixin, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / repo_id / filename)
    )
    monkeypatch.setattr(training.snapshots.hub, "snapshot_download", download)
    assert HubModel(snapshot).push_to_hub("me/cars") == "url"
    names = sorted(path.name for path in (tmp_path / "me" / "cars").iterdir())
    assert names == ["G_ema.safetensors", "README.md", "config.json", "samples.png"]
    loaded = HubModel.from_pretrained("me/cars", revision="main")
    assert torch.equal(loaded.G_ema(torch.ones(1, 16), None), snapshot.G_ema(torch.ones(1, 16), None))


def test_corrupt_folders_are_refused(folder: Path) -> None:
    path = folder / "G_ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"G_ema\.safetensors: corrupt or modified"):
        HubModel.from_pretrained(folder)


def test_a_missing_package_is_reported_with_its_extra(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "training.snapshots.hub")
    monkeypatch.delattr(training.snapshots, "hub")
    result = convert(f"--source={snapshot.path}", f"--dest={tmp_path / 'cars'}", "--format=hub")
    assert (result.exit_code, "pip install '.[hub]'" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())
