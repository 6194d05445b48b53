"""calc_metrics.py on a small snapshot: lines of JSON, options, errors, equality of one and two processes."""

from __future__ import annotations

import hashlib
import json
import math
import re
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
from conftest import PATIENCE, make_shapes
from metric_helpers import SmallDetector, bound, natural_images, random_inception, script_program
from PIL import Image

import calc_metrics
import metrics
from dnnlib.config import OPTIONS_FILE, override
from metrics import detectors
from metrics.sampling import random_stream
from metrics.weights import WeightFile
from torch_utils.checkpoint import read_file, write_file
from training.config import PRESETS
from training.dataset import DatasetConfig, ImageDataset
from training.networks.styleformer import StyleformerConfig
from training.snapshots.snapshot import load_network, save_network

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
    """Snapshot of a conditional network of 16x16 images whose training data has three classes and flips."""
    folder = tmp_path_factory.mktemp("run")
    data = write_images(tmp_path_factory.mktemp("data") / "set", 16, labels=True)
    generator = StyleformerConfig(z_dim=8, w_dim=8, c_dim=3, widths=(32, 32), layers=(1, 1), mapping_layers=1)
    config = replace(
        PRESETS["tiny"], generator=generator, data=DatasetConfig(path=str(data), use_labels=True, mirror=True)
    )
    torch.manual_seed(0)
    path = folder / "network-snapshot-000003.pkl"
    save_network(path, config=config, G_ema=generator.build(), nimg=3210)
    (folder / OPTIONS_FILE).touch()
    return path


@pytest.fixture
def calc(snapshot: Path) -> CalcMetrics:
    """Runner of the script in this process on the CPU, by default on `snapshot`."""

    def run(*arguments: str, network: Path = snapshot) -> Result:
        return CliRunner().invoke(calc_metrics.main, [f"--network={network}", "--device=cpu", *arguments])

    return run


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_each_metric_prints_and_appends_a_line(calc: CalcMetrics, snapshot: Path) -> None:
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


NOT_SAVED = "Results are only printed, because --network is not part of a run; --outdir=DIR saves them\n"


def test_results_are_written_only_to_a_run_or_outdir(calc: CalcMetrics, snapshot: Path, tmp_path: Path) -> None:
    """Snapshots, a folder of snapshots, and images: nothing is written beside those that are not part of a run."""
    data = load_network(snapshot).config.data.path
    loose, fakes = tmp_path / "loose", write_images(tmp_path / "fakes", 16, labels=False)
    loose.mkdir()
    (loose / snapshot.name).write_bytes(snapshot.read_bytes())
    for number, network in enumerate((loose / snapshot.name, loose, fakes)):
        before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
        printed = calc("--metrics=swd12,swd13", f"--data={data}", network=network)
        assert [record["metric"] for record in lines(printed)] == ["swd12", "swd13"]
        assert printed.stderr.count(NOT_SAVED) == 1
        assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
        outdir = tmp_path / "new" / str(number)
        saved = calc("--metrics=swd12", f"--data={data}", f"--outdir={outdir}", network=network)
        assert NOT_SAVED not in saved.stderr
        assert [json.loads((outdir / "metric-swd12.jsonl").read_text())] == lines(saved)
    kept = snapshot.parent / "metric-swd14.jsonl"
    lines(calc("--metrics=swd14", f"--outdir={tmp_path}"))
    assert (tmp_path / kept.name).exists()
    assert not kept.exists()
    assert NOT_SAVED not in calc("--metrics=swd14").stderr
    assert kept.exists()


def test_plots_and_results_need_a_writable_folder(calc: CalcMetrics, snapshot: Path, tmp_path: Path) -> None:
    loose = tmp_path / snapshot.name
    loose.write_bytes(snapshot.read_bytes())
    plot = calc("--metrics=swd12", "--plot", network=loose)
    assert (plot.exit_code, plot.stdout) == (2, "")
    assert f"--plot: {loose} is not in the folder of a run; specify a folder with --outdir" in plot.stderr
    outdir = calc("--metrics=swd12", f"--outdir={loose}", network=loose)
    assert (outdir.exit_code, outdir.stdout) == (2, "")
    assert f"--outdir={loose}: cannot be written" in outdir.stderr
    pytest.importorskip("matplotlib")
    assert calc("--metrics=swd12", "--plot", f"--outdir={tmp_path / 'new'}", network=loose).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["metric-swd12.jsonl", "metric-swd12.png"]


def test_kernels_are_prepared_before_the_network_is_loaded(calc: CalcMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return recorded

    for owner, name in ((calc_metrics.kernels, "prepare"), (calc_metrics, "load_network")):
        monkeypatch.setattr(owner, name, recording(name, getattr(owner, name)))
    assert calc("--metrics=swd12").exit_code == 0
    assert events == ["prepare", "load_network"]


def test_the_default_metric_uses_the_training_data(calc: CalcMetrics) -> None:
    result = calc()
    [record] = lines(result)
    assert record["metric"] == "swd"
    assert "No --metrics given; computing swd" in result.stderr
    assert f"generated images: {2 * NUM_IMAGES} of {2 * NUM_IMAGES}" in result.stderr
    data = ImageDataset(DatasetConfig(path=record["data"], use_labels=True, mirror=True))
    assert record["data_hash"] == data.content_hash


def test_results_are_reproducible_and_depend_on_every_option(calc: CalcMetrics) -> None:
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
        # The noise strength of an untrained network is 0.
        assert (changed["results"] != first["results"]) or "noise" in option, option


def test_data_that_does_not_match_the_network_is_refused(calc: CalcMetrics, tmp_path: Path) -> None:
    other = calc("--metrics=swd", f"--data={write_images(tmp_path / 'large', 32, labels=True)}")
    assert other.exit_code == 2
    assert "network generates images of 3x16x16" in other.stderr
    unlabelled = calc("--metrics=swd", f"--data={write_images(tmp_path / 'plain', 16, labels=False)}")
    assert unlabelled.exit_code == 2
    assert "no labels" in unlabelled.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=swdd"], "unknown metric 'swdd': did you mean swd?"),
        (["--metrics=swd", "--data=no/such/folder"], "no/such/folder"),
        (["--metrics=swd", "--batch=0"], "--batch"),
        (["--metrics=swd", "--device=tpu9"], "--device=tpu9"),
        (["--metrics=eqr9"], "metric eqr9: the input of StyleformerGenerator cannot be moved"),
    ],
)
def test_errors_are_one_clear_message(calc: CalcMetrics, arguments: list[str], message: str) -> None:
    result = calc(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_missing_and_malformed_snapshots_are_named(calc: CalcMetrics, tmp_path: Path) -> None:
    missing = calc("--metrics=swd", network=tmp_path / "missing.pkl")
    assert missing.exit_code == 2
    assert "missing.pkl" in missing.stderr
    broken = tmp_path / "broken.pkl"
    broken.write_bytes(b"not a snapshot")
    refused = calc("--metrics=swd", network=broken)
    assert refused.exit_code == 2
    assert "broken.pkl" in refused.stderr


def test_help_lists_each_metric_in_a_line_of_110_columns() -> None:
    text = CliRunner().invoke(calc_metrics.main, ["--help"], terminal_width=110).output
    listed = [tuple(line.split(maxsplit=1)) for line in text.partition("Metrics (<N>")[2].splitlines()[1:]]
    assert listed == [(spec.pattern, spec.help) for spec in metrics.registered_metrics()]


def explain(names: str) -> Result:
    return CliRunner().invoke(calc_metrics.main, [f"--explain={names}"], terminal_width=400)


@pytest.mark.parametrize("spec", metrics.registered_metrics(), ids=lambda spec: spec.pattern)
def test_every_metric_can_be_explained(spec: metrics.MetricSpec) -> None:
    result = explain(spec.pattern.replace("<N>", "5k"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{spec.pattern}:\n")
    for words in (spec.help, spec.note, spec.protocol, spec.clean or "", spec.paper):
        assert words in result.stdout
    assert ("no result" in result.stdout) == spec.pattern.endswith("_floor")
    assert ("counted among the reals with --mirror" in result.stdout) == spec.counts_flips


def test_explanations_state_direction_values_and_requirements() -> None:
    text = " ".join(explain("is10k,kid50k_full").stdout.split())
    first, _, second = text.partition("kid<N>_full: ")
    assert "better higher values of is<N>_mean values is<N>_mean, is<N>_std protocol" in first
    assert "better lower values of kid<N>_full values kid<N>_full, kid<N>_full_std protocol" in second
    for part in (first, second):
        assert "needs weights-inception-2015-12-05-6726825d.pth, downloaded on first use; the package torch-f" in part
    unknown = explain("kid,swdd")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "Error: unknown metric 'swdd': did you mean swd?" in unknown.stderr


# Metrics with a detector.


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def detector_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script_program(tmp_path_factory.mktemp("detector") / "small.pt", SmallDetector())


def test_values_have_the_explained_names(calc: CalcMetrics, detector_program: Path) -> None:
    names = "fid60,fid60_full,fid60_class,kid60,mind60,is60,pr603_full,dc60,swd60,swd60_floor"
    for record in lines(calc(f"--metrics={names}", bound(detector_program), "--mirror=0")):
        spec, _ = metrics.registry.find(record["metric"])
        pattern = "|".join(re.sub(r"<\w+>", r"\\w+", suffix) for suffix in spec.values)
        suffixes = [name.removeprefix(record["metric"]) for name in record["results"]]
        assert suffixes[0] == spec.values[0]
        assert all(re.fullmatch(pattern, suffix) for suffix in suffixes), suffixes


def test_a_run_folder_gives_one_result_per_snapshot(
    calc: CalcMetrics, snapshot: Path, detector_program: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "00000-run"
    run.mkdir()
    (run / OPTIONS_FILE).touch()
    first = load_network(snapshot)
    for nimg, strength in ((0, 0.1), (4000, 10.0)):
        for parameter in first.G_ema.synthesis.parameters():
            parameter.data.mul_(strength)
        name = f"network-snapshot-{nimg // 1000:06d}.pkl"
        save_network(run / name, config=first.config, G_ema=first.G_ema, nimg=nimg)
    result = calc(
        "--metrics=fid30_full,kid30_full,swd12",
        bound(detector_program),
        "--plot",
        network=run,
    )
    records = lines(result)
    assert [(record["metric"], record["kimg"]) for record in records] == [
        (name, kimg) for kimg in (0.0, 4.0) for name in ("fid30_full", "kid30_full", "swd12")
    ]
    for name in ("fid30_full", "kid30_full", "swd12"):
        assert len((run / f"metric-{name}.jsonl").read_text().splitlines()) == 2
        with Image.open(run / f"metric-{name}.png") as plot:
            assert plot.size[0] == 1210
    table = result.stderr.splitlines()
    assert any(line.split() == ["network", "kimg", "metric", "value"] for line in table)
    value = f"{records[0]['results']['fid30_full']:.5g}"
    assert any(line.split() == ["network-snapshot-000000.pkl", "0", "fid30_full", value] for line in table)
    fid = records[0]
    assert fid["detector"] == "small.pt"
    assert fid["detector_sha256"] == hashlib.sha256(detector_program.read_bytes()).hexdigest()
    assert (fid["num_real"], fid["num_fake"]) == (NUM_IMAGES, 30)
    assert fid["protocol"] == "stylegan: features of small.pt; covariance over N; 50,000 fakes or <N>, all reals"
    assert result.stderr.count("real images:") == 3  # twice for swd12, once for the cached statistics of the detector
    for number, kimg in enumerate((0, 4)):  # the values equal those of separate calls
        alone = lines(
            calc(
                "--metrics=fid30_full,swd12", bound(detector_program), network=run / f"network-snapshot-{kimg:06d}.pkl"
            )
        )
        for record, expected in zip((records[3 * number], records[3 * number + 2]), alone, strict=True):
            assert record["results"] == expected["results"]
    assert records[0]["results"] != records[3]["results"]


def test_a_folder_of_images_can_replace_the_network(
    calc: CalcMetrics, snapshot: Path, detector_program: Path, tmp_path: Path
) -> None:
    data = load_network(snapshot).config.data.path
    fakes = write_images(tmp_path / "theirs", 16, labels=False)
    arguments = ["--metrics=fid21_full,swd12", bound(detector_program), f"--data={data}"]
    fid, swd = lines(calc(*arguments, f"--outdir={tmp_path / 'new' / 'results'}", network=fakes))
    assert fid["results"]["fid21_full"] == pytest.approx(0, abs=1e-9)  # the images are identical
    assert swd["results"]["swd12"] > 0  # different subsets of twelve
    assert (fid["snapshot"], fid["snapshot_sha256"], fid["kimg"]) == ("theirs", None, None)
    assert fid["fakes_hash"] == ImageDataset(DatasetConfig(path=str(fakes))).content_hash
    assert (tmp_path / "new" / "results" / "metric-fid21_full.jsonl").exists()
    names = f"--metrics=fid21_full,swd{NUM_IMAGES}"
    full, mirrored = lines(calc(names, bound(detector_program), f"--data={data}", "--mirror", network=fakes))
    assert (full["num_real"], full["num_fake"], full["mirror"]) == (NUM_IMAGES, NUM_IMAGES, False)
    assert full["results"] == fid["results"]
    assert mirrored["mirror"] is True
    assert mirrored["data_hash"] == ImageDataset(DatasetConfig(path=data, mirror=True)).content_hash

    few = calc("--metrics=fid5k_full", bound(detector_program), f"--data={data}", network=fakes)
    assert few.exit_code == 2
    assert "5000 generated images are requested, but the set holds 21" in few.stderr
    without = calc("--metrics=swd12", network=fakes)
    assert without.exit_code == 2
    assert "specify the real images with --data" in without.stderr


def test_a_training_subset_does_not_limit_the_reals(snapshot: Path, detector_program: Path, tmp_path: Path) -> None:
    trained = load_network(snapshot)
    config = override(trained.config, {"data.max_images": 5})
    path = tmp_path / "network-snapshot-000001.pkl"
    save_network(path, config=config, G_ema=trained.G_ema, nimg=1000)
    arguments = [
        f"--network={path}",
        "--device=cpu",
        "--metrics=fid30_full",
        bound(detector_program),
    ]
    [record] = lines(CliRunner().invoke(calc_metrics.main, arguments))
    assert record["num_real"] == NUM_IMAGES


def test_mirror_notes_metrics_that_do_not_count_flips(calc: CalcMetrics, detector_program: Path) -> None:
    """fid<N>_full ignores flips, even if the network was trained with them; fid<N> counts flips."""
    names = "--metrics=fid30_full,is30,fid50,pr503"
    given = {flag: calc(names, bound(detector_program), flag) for flag in ("--mirror=1", "--mirror=0", "--seed=0")}
    mirrored, plain, trained = (lines(result) for result in given.values())
    assert [record["mirror"] for record in mirrored] == [False, False, True, True]
    assert [record["mirror"] for record in plain] == [False] * 4
    assert [record["num_real"] for record in mirrored] == [NUM_IMAGES, 0, 2 * NUM_IMAGES, 2 * NUM_IMAGES]
    values = [[record["results"] for record in records] for records in (mirrored, plain, trained)]
    assert values[0] == values[2]  # the default is the --mirror of training
    assert values[0][:2] == values[1][:2]
    assert values[0][2] != values[1][2]
    data = plain[0]["data"]
    hashes = [ImageDataset(DatasetConfig(path=data, mirror=mirror)).content_hash for mirror in (False, True)]
    assert [record["data_hash"] for record in mirrored] == [hashes[0]] * 2 + [hashes[1]] * 2
    note = "--mirror: flips are not counted in fid30_full, is30, by protocol\n"
    assert [note in result.stderr for result in given.values()] == [True, False, False]
    assert "pr503: small.pt" in given["--mirror=1"].stderr
    table = given["--mirror=1"].stderr.splitlines()
    assert [line.endswith("; flips counted") for line in table[-4:]] == [False, False, True, True]
    assert "flips are not counted" not in calc("--metrics=swd12", "--mirror").stderr


def test_progress_can_be_hidden(calc: CalcMetrics) -> None:
    progress = "generated images: 12 of 12"
    assert progress in calc("--metrics=swd12").stderr
    for flag in ("--verbose", "--verbose=true", "--verbose=1"):
        assert progress in calc("--metrics=swd12", flag).stderr
    quiet = calc("--metrics=swd12", "--verbose=0")
    assert "images:" not in quiet.stderr
    assert "swd12: 7x7 patches" in quiet.stderr  # the table is still printed
    assert lines(quiet)[0]["results"] == lines(calc("--metrics=swd12"))[0]["results"]


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_metrics_none_computes_nothing(calc: CalcMetrics, word: str, tmp_path: Path) -> None:
    result = calc(f"--metrics={word}")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "--metrics=none: nothing to compute\n"
    assert calc(f"--metrics={word}", network=tmp_path / "missing.pkl").exit_code == 2


def test_statistics_of_reals_are_cached_unless_disabled(
    calc: CalcMetrics, detector_program: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "statistics"
    arguments = ["--metrics=fid30_full", bound(detector_program)]
    [first] = lines(calc(*arguments, "--no-cache"))
    assert not folder.exists()
    [second] = lines(calc(*arguments))
    assert len(list(folder.iterdir())) == 1
    third = calc(*arguments)
    assert "real images" not in third.stderr
    assert lines(third)[0]["results"] == second["results"] == first["results"]


def test_an_unwritable_result_does_not_stop_other_metrics(calc: CalcMetrics, snapshot: Path, tmp_path: Path) -> None:
    copy = tmp_path / snapshot.name
    copy.write_bytes(snapshot.read_bytes())
    (tmp_path / "metric-swd12.jsonl").mkdir()
    result = calc("--metrics=swd12,swd13", f"--outdir={tmp_path}", network=copy)
    assert result.exit_code == 1
    assert "Warning: " in result.stderr
    assert "metric-swd12.jsonl: cannot be written" in result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert (tmp_path / "metric-swd13.jsonl").exists()


def test_a_corrupt_snapshot_of_a_run_is_skipped(calc: CalcMetrics, snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "network-snapshot-000001.pkl").write_bytes(snapshot.read_bytes()[:1000])
    (tmp_path / "network-snapshot-000003.pkl").write_bytes(snapshot.read_bytes())
    result = calc("--metrics=swd12", network=tmp_path)
    assert result.exit_code == 1
    assert "network-snapshot-000001.pkl" in result.stderr
    assert [json.loads(line)["kimg"] for line in result.stdout.splitlines()] == [3.21]


def test_a_missing_training_dataset_is_requested_with_data(calc: CalcMetrics, snapshot: Path, tmp_path: Path) -> None:
    trained = load_network(snapshot)
    path = tmp_path / "network-snapshot-000001.pkl"
    config = override(trained.config, {"data.path": str(tmp_path / "gone")})
    save_network(path, config=config, G_ema=trained.G_ema, nimg=1000)
    result = calc("--metrics=swd12", network=path)
    assert result.exit_code == 2
    assert f"(the training dataset of {path}): specify the dataset with --data" in result.stderr


def test_plots_include_earlier_results_with_equal_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calc_metrics, "draw_png", lambda chart: str(chart.lines[0].curve.kimg.tolist()).encode())
    for name in ("swd12", "swd16"):
        records = [{"kimg": kimg, "seed": int(kimg == 1), "results": {name: 3.0}} for kimg in range(3)]
        (tmp_path / f"metric-{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    calc_metrics.plot(tmp_path, {"metric-swd12"})
    assert (tmp_path / "metric-swd12.png").read_text() == "[0.0, 2.0]"  # the result at kimg 1 has another seed
    assert not (tmp_path / "metric-swd16.png").exists()


def test_plots_of_image_folders_are_refused_immediately(
    calc: CalcMetrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calc_metrics, "run", lambda job: pytest.fail("the computation started"))
    fakes = write_images(tmp_path / "theirs", 16, labels=False)
    result = calc("--metrics=swd12", f"--data={fakes}", "--plot", network=fakes)
    assert result.exit_code == 2
    assert "--plot: a set of images has no kimg" in result.stderr


def test_metrics_without_weights_are_refused_immediately(calc: CalcMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("dnnlib.download.requests.Session.get", offline)
    monkeypatch.setattr(calc_metrics, "run", lambda job: pytest.fail("the computation started"))
    result = calc("--metrics=swd12,fid50k_full")
    assert result.exit_code == 2
    assert "weights-inception-2015-12-05-6726825d.pth" in result.stderr
    assert "--detector=FILE" in result.stderr


def test_a_snapshot_without_averaged_generator_is_refused(calc: CalcMetrics, snapshot: Path, tmp_path: Path) -> None:
    trained = load_network(snapshot)
    payload = read_file(snapshot, "network-snapshot", 1, {})
    payload["networks"] = {"G": payload["networks"]["G_ema"]}
    path = tmp_path / "network-snapshot-000002.pkl"
    write_file(path, "network-snapshot", 1, payload)
    result = calc("--metrics=swd12", network=path)
    assert result.exit_code == 2
    assert f"{path}: contains no averaged generator" in result.stderr
    assert trained.G_ema is not None


def test_runs_without_snapshots_and_missing_detectors_are_named(calc: CalcMetrics, tmp_path: Path) -> None:
    (tmp_path / "training_options.json").write_text("{}")
    empty = calc("--metrics=swd12", network=tmp_path)
    assert empty.exit_code == 2
    assert "this run has written no snapshot yet" in empty.stderr
    wrong = calc("--metrics=fid30", "--detector=no/such.pt")
    assert wrong.exit_code == 2
    assert "--detector=no/such.pt: no such file" in wrong.stderr


@pytest.mark.slow
def test_two_processes_equal_one_for_every_metric(
    calc: CalcMetrics, snapshot: Path, detector_program: Path, tmp_path: Path
) -> None:
    """Two processes divide fakes, reals and rows of distances, and gather features.

    With odd numbers of images and batches of 13, shards and batches differ from those of a single process.
    """
    holdout = make_shapes(tmp_path / "holdout.zip", 16, 15)
    names = "--metrics=swd41,fid31_full,kid31,mind31,is31,pr313_full,dc20,fid1_full,authpct31,fld31,spectrum31"
    options = [names, bound(detector_program), f"--holdout={holdout}"]
    alone = lines(calc(*options, "--no-cache"))
    command = [sys.executable, "calc_metrics.py", f"--network={snapshot}", "--device=cpu", *options]
    together = subprocess.run(
        [*command, "--gpus=2", "--batch=13", "--detector-batch=7"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    records = [json.loads(line) for line in together.stdout.splitlines()]
    assert [record["metric"] for record in records] == [record["metric"] for record in alone]
    for one, two in zip(alone, records, strict=True):
        # Individual gray levels may be rounded differently.
        assert two["results"] == pytest.approx(one["results"], rel=1e-3), one["metric"]
        assert (two["num_real"], two["num_fake"]) == (one["num_real"], one["num_fake"])


@pytest.mark.slow
def test_metrics_of_image_files_equal_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG files -> uint8 -> resize -> Inception with random weights -> FID, KID, IS."""
    library = pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.utils import extract_featuresdict_from_input_id_cached

    weights = tmp_path / "weights.pth"
    torch.save(random_inception(), weights)
    file = WeightFile(name=weights.name, url="", sha256="", content="test")
    monkeypatch.setattr(detectors, "FILES", {**detectors.FILES, "inception": (file,)})
    monkeypatch.setattr(detectors, "KNOWN", (file,))
    sets = {
        name: write_natural_images(tmp_path / name, seed, 12) for seed, name in enumerate(("reals", "fakes"), start=1)
    }
    arguments = [f"--network={sets['fakes']}", f"--data={sets['reals']}", f"--detector={weights}", "--device=cpu"]
    result = CliRunner().invoke(calc_metrics.main, [*arguments, "--metrics=fid12_full,kid12_full,is12"])
    fid, kid, score = (record["results"] for record in lines(result))

    features = {}
    extractor = library.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    for name, folder in sets.items():
        options = {"input1": str(folder), "feature_extractor_weights_path": str(weights), "cuda": False}
        features[name] = extract_featuresdict_from_input_id_cached(
            1, extractor, **options, cache=False, verbose=False, batch_size=5, save_cpu_ram=True
        )
    real, fake = (features[name]["2048"].double() for name in ("reals", "fakes"))
    assert (real - fake).abs().mean() > 1e-3
    centred = [(x - x.mean(dim=0)) / math.sqrt(len(x)) for x in (real, fake)]
    # With few images, the trace of the matrix root is the nuclear norm of a small matrix.
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    spread = sum(x.square().sum() for x in centred)
    expected = (real.mean(dim=0) - fake.mean(dim=0)).square().sum() + spread - 2 * cross
    assert fid["fid12_full"] == pytest.approx(float(expected), rel=1e-5)

    theirs = kid_features_to_metric(fake, real, kid_subsets=2, kid_subset_size=12, verbose=False)
    assert kid["kid12_full"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    order = np.array(fake_order(12))
    theirs = isc_features_to_metric(features["fakes"]["logits_unbiased"][order], splits=10, shuffle=False)
    # Most splits hold a single image, whose score is 1.
    assert score["is12_mean"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3)
    assert score["is12_std"] > 1e-4


def write_natural_images(folder: Path, seed: int, count: int) -> Path:
    folder.mkdir()
    for number, image in enumerate(natural_images(count, (3, 24, 20), seed=seed)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    return folder


def fake_order(count: int) -> list[int]:
    return [int(index) for index in random_stream(0, "fakes").permutation(count)]
