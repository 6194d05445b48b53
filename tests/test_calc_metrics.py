"""calc_metrics.py on a small snapshot: lines of JSON, options, errors, two processes as one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import calc_metrics
import metrics
from training.config import PRESETS
from training.dataset import DatasetConfig, ImageDataset
from training.networks.styleformer import StyleformerConfig
from training.snapshot import save_network

ROOT = Path(calc_metrics.__file__).parent
NUM_IMAGES = 21

CalcMetrics = Callable[..., Result]


def write_images(folder: Path, size: int, labels: bool) -> Path:
    """Write NUM_IMAGES random images of size x size and three classes."""
    folder.mkdir()
    stream = np.random.RandomState(0)
    names = [f"img{number:08d}.png" for number in range(NUM_IMAGES)]
    for name in names:
        pixels = stream.randint(0, 256, (size // 4, size // 4, 3)).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(folder / name)
    table = [[name, number % 3] for number, name in enumerate(names)] if labels else None
    (folder / "dataset.json").write_text(json.dumps({"labels": table}))
    return folder


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional network of 16x16 images, trained on mirrored images of three classes."""
    folder = tmp_path_factory.mktemp("run")
    data = write_images(tmp_path_factory.mktemp("data") / "set", 16, labels=True)
    generator = StyleformerConfig(z_dim=8, w_dim=8, c_dim=3, widths=(32, 32), layers=(1, 1), mapping_layers=1)
    config = replace(
        PRESETS["tiny"], generator=generator, data=DatasetConfig(path=str(data), use_labels=True, mirror=True)
    )
    torch.manual_seed(0)
    path = folder / "network-snapshot-000003.pkl"
    save_network(path, config=config, G_ema=generator.build(), nimg=3210)
    return path


@pytest.fixture
def calc(snapshot: Path) -> CalcMetrics:
    """Run the script in this process, on the CPU, and on the snapshot unless another is named."""

    def run(*arguments: str, network: Path = snapshot) -> Result:
        return CliRunner().invoke(calc_metrics.main, [f"--network={network}", "--device=cpu", *arguments])

    return run


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_prints_and_appends_a_line_for_each_metric(calc: CalcMetrics, snapshot: Path) -> None:
    records = lines(calc("--metrics=swd12,swd_floor"))
    assert [record["metric"] for record in records] == ["swd12", "swd_floor"]
    for record in records:
        assert json.loads((snapshot.parent / f"metric-{record['metric']}.jsonl").read_text().splitlines()[-1]) == record
    swd, floor = records
    assert swd["results"]["swd12"] > floor["results"]["swd_floor"] > 0
    assert (swd["num_real"], swd["num_fake"]) == (12, 12)
    assert (floor["num_real"], floor["num_fake"]) == (2 * NUM_IMAGES, 0)
    assert swd["snapshot"] == "network-snapshot-000003.pkl"
    assert swd["snapshot_sha256"] == hashlib.sha256(snapshot.read_bytes()).hexdigest()
    assert swd["kimg"] == 3.21
    assert swd["mirror"] is True


def test_default_metric_says_why_and_uses_the_snapshots_data(calc: CalcMetrics) -> None:
    result = calc()
    [record] = lines(result)
    assert record["metric"] == "swd"
    assert "No --metrics given; computing swd" in result.stderr
    assert f"generated images: {2 * NUM_IMAGES} of {2 * NUM_IMAGES}" in result.stderr
    data = ImageDataset(DatasetConfig(path=record["data"], use_labels=True, mirror=True))
    assert record["data_hash"] == data.content_hash


def test_is_repeatable_and_every_option_counts(calc: CalcMetrics) -> None:
    base = ("--metrics=swd12", "--batch=5")
    [first] = lines(calc(*base))
    [again] = lines(calc("--metrics=swd12"))
    assert first["results"] == again["results"]
    for option, field, value in (
        ("--seed=1", "seed", 1),
        ("--trunc=0.5", "truncation_psi", 0.5),
        ("--noise-mode=none", "noise_mode", "none"),
        ("--noise_mode=random", "noise_mode", "random"),
        ("--mirror=0", "mirror", False),
    ):
        [changed] = lines(calc(*base, option))
        assert changed[field] == value
        # The noise of a fresh network has strength 0.
        assert (changed["results"] != first["results"]) or "noise" in option, option


def test_other_data_must_fit_the_network(calc: CalcMetrics, tmp_path: Path) -> None:
    other = calc("--metrics=swd", f"--data={write_images(tmp_path / 'large', 32, labels=True)}")
    assert other.exit_code == 2
    assert "network makes images of 3x16x16" in other.stderr
    unlabelled = calc("--metrics=swd", f"--data={write_images(tmp_path / 'plain', 16, labels=False)}")
    assert unlabelled.exit_code == 2
    assert "no labels" in unlabelled.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=swdd"], "unknown metric 'swdd': did you mean swd?"),
        (["--metrics=none"], "names nothing to compute"),
        (["--metrics=swd", "--data=no/such/folder"], "no/such/folder"),
        (["--metrics=swd", "--batch=0"], "--batch"),
        (["--metrics=swd", "--device=tpu9"], "--device=tpu9"),
    ],
)
def test_errors_are_one_clear_message(calc: CalcMetrics, arguments: list[str], message: str) -> None:
    result = calc(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_what_is_no_snapshot_is_refused_by_name(calc: CalcMetrics, tmp_path: Path) -> None:
    missing = calc("--metrics=swd", network=tmp_path / "missing.pkl")
    assert missing.exit_code == 2
    assert "missing.pkl" in missing.stderr
    broken = tmp_path / "broken.pkl"
    broken.write_bytes(b"not a snapshot")
    refused = calc("--metrics=swd", network=broken)
    assert refused.exit_code == 2
    assert "broken.pkl" in refused.stderr


def test_help_explains_every_metric() -> None:
    text = CliRunner().invoke(calc_metrics.main, ["--help"]).output
    flat = " ".join(text.split())
    for spec in metrics.registered_metrics():
        for words in (spec.pattern, spec.help, spec.protocol, spec.paper):
            assert words in flat


def test_two_processes_give_the_result_of_one(calc: CalcMetrics, snapshot: Path) -> None:
    """With 41 images the shares differ by one; 13 images at a time cut both sets elsewhere than one process does."""
    [alone] = lines(calc("--metrics=swd41"))
    command = [sys.executable, "calc_metrics.py", f"--network={snapshot}", "--device=cpu", "--metrics=swd41"]
    together = subprocess.run(
        [*command, "--gpus=2", "--batch=13"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert together.returncode == 0, together.stderr
    [record] = [json.loads(line) for line in together.stdout.splitlines()]
    assert record["num_real"] == record["num_fake"] == 41
    assert record["results"] == pytest.approx(alone["results"], rel=1e-3)  # a grey level rounded the other way
