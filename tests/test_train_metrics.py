"""Metrics during training: intervals, records, the best network, overfitting signals, error messages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SMALL
from metric_helpers import SmallDetector, bound, script_program
from torch import Tensor

import train
from dnnlib.config import ConfigError
from metrics import feature_stats, sampling
from metrics.detectors import DetectorSetup
from metrics.registry import find, is_best
from reporting.run_reader import read_run
from training import hooks
from training.dataset import DatasetConfig, ImageDataset
from training.snapshots.snapshot import load_network

SHORT = [*SMALL, "--kimg=0.064", "--tick=0.016", "--snap=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def detector_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script_program(tmp_path_factory.mktemp("detector") / "small.pt", SmallDetector())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(argument) for argument in arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_run_at_intervals_and_keep_the_best_network(
    shapes_zip: Path, detector_program: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [
        f"--outdir={tmp_path / 'runs'}",
        f"--data={shapes_zip}",
        *SHORT,
        bound(detector_program),
    ]
    arguments += [
        "--metrics=fid60_full,is60",
        "--set=run.metrics_every=3",
        "--set=run.tick_metrics=swd20",
        "--mirror",
        "--subset=100",
    ]
    result = run(*arguments, "--holdout=32", "--set=run.metrics_first=1")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    [run_dir] = (tmp_path / "runs").iterdir()
    fid = lines(run_dir / "metric-fid60_full.jsonl")
    assert [line["kimg"] for line in fid] == [0.0, 0.048, 0.064]
    assert [line["kimg"] for line in lines(run_dir / "metric-is60.jsonl")] == [0.0, 0.048, 0.064]
    assert [line["kimg"] for line in lines(run_dir / "metric-swd20.jsonl")] == [0.0, 0.016, 0.032, 0.048, 0.064]
    assert [line["snapshot"] for line in fid] == ["network-snapshot-000000.pkl", None, "network-snapshot-000000.pkl"]
    assert (fid[0]["num_real"], fid[0]["mirror"]) == (256, False)  # all real images, unflipped, unlike in training
    assert {line["mirror"] for line in lines(run_dir / "metric-swd20.jsonl")} == {True}
    assert fid[0]["detector"] == "small.pt"

    values = [line["results"]["fid60_full"] for line in fid]
    best = load_network(run_dir / "network-best-fid60_full.pkl")
    assert best.kimg == fid[values.index(min(values))]["kimg"]
    assert result.output.count("Best fid60_full so far") == sum(
        value == min(values[: number + 1]) for number, value in enumerate(values)
    )
    events = EventAccumulator(str(run_dir)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("Metrics/fid60_full")]
    assert [step for step, _ in logged] == [0, 48, 64]
    assert [value for _, value in logged] == pytest.approx(values)
    assert len(events.Scalars("Metrics/swd20")) == 5

    ticks = lines(run_dir / "stats.jsonl")
    for tick in ticks:
        scores = [tick[f"Overfitting/score_{name}"] for name in ("train", "holdout", "generated")]
        expected = (scores[0] - scores[1]) / (scores[0] - scores[2])
        assert tick["Overfitting/r_v"] == pytest.approx(expected)
        assert -1 <= tick["Overfitting/r_t"] == tick["Overfitting/sign_train"] <= 1
    assert len({tick["Overfitting/score_train"] for tick in ticks}) == len(ticks)


def test_a_metric_interrupted_by_a_kill_is_computed_on_resume(shapes_zip: Path, tmp_path: Path) -> None:
    """The kill happens after the state of a tick is saved and before the metrics are recorded."""
    arguments = [f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, "--metrics=swd20", "--resume=latest"]
    assert run(*arguments, "--set=run.tick_metrics=swd30").exit_code == 0
    [run_dir] = (tmp_path / "runs").iterdir()
    log, best = run_dir / "metric-swd20.jsonl", run_dir / "network-best-swd20.pkl"
    complete = lines(log)
    worse = [line | {"results": {"swd20": 1e9}} for line in complete[:-1]]
    log.write_text("".join(json.dumps(line) + "\n" for line in worse))
    best.unlink()
    result = run(*arguments, "--set=run.tick_metrics=swd30")
    assert result.exit_code == 0, result.output
    again = lines(log)[-1]
    assert [again[key] for key in ("results", "kimg")] == [complete[-1][key] for key in ("results", "kimg")]
    assert again["snapshot"] == complete[-1]["snapshot"] == "network-snapshot-000000.pkl"
    assert len(lines(log)) == len(complete)
    assert load_network(best).kimg == 0.064
    assert len(lines(run_dir / "metric-swd30.jsonl")) == 4  # the other metric is not computed again


def test_metrics_that_cannot_run_are_refused_before_training(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("dnnlib.download.requests.Session.get", offline)
    for option in ("--metrics=fid50k_full", "--set=run.tick_metrics=fid5k"):
        result = run(f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, option)
        assert result.exit_code == 2
        assert "weights-inception-2015-12-05-6726825d.pth" in result.output
    wrong = run(f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, "--detector=no/such.pt")
    assert wrong.exit_code == 2
    assert "--detector=no/such.pt: no such file" in wrong.output
    for name, network, metric, problem in (
        ("gray", SmallDetector(1), "fid60_full", "failed on uint8 images (2, 3, 16, 16)"),
        ("plain", torch.nn.Flatten(), "is60", "returns no class logits"),
    ):
        path = script_program(tmp_path / f"{name}.pt", network)
        unfit = run(*[f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT], f"--detector={path}",
                    f"--set=run.tick_metrics={metric}")  # fmt: skip
        assert unfit.exit_code == 2
        assert problem in unfit.output
    few = run(f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, "--metrics=none", "--holdout=15")
    assert few.exit_code == 2
    assert "--holdout=15: D evaluates held-out images in whole batches: hold out at least 16" in few.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_metrics_none_is_case_insensitive(shapes_zip: Path, tmp_path: Path, word: str) -> None:
    arguments = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, "--dry-run"]
    result = run(*arguments, f"--metrics={word}", f"--set=run.tick_metrics={word}")
    assert result.exit_code == 0, result.output
    options = json.loads(result.stdout)["options"]["run"]
    assert (options["metrics"], options["tick_metrics"]) == ([], [])


def test_overfitting_signals_do_not_change_the_training(shapes_zip: Path, tmp_path: Path) -> None:
    """Both runs hold out the same images; only one has the hook."""
    states = []
    for name in ("with", "without"):
        arguments = [f"--outdir={tmp_path / name}", f"--data={shapes_zip}", *SHORT, "--metrics=none", "--holdout=16"]
        if name == "without":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(hooks.Overfitting, "on_tick", lambda self, trainer, tick: None)
                assert run(*arguments).exit_code == 0
        else:
            assert run(*arguments).exit_code == 0
        [run_dir] = (tmp_path / name).iterdir()
        states.append(load_network(run_dir / "network-snapshot-000000.pkl").G.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_two_processes_log_the_same_values_as_one(shapes_zip: Path, detector_program: Path, tmp_path: Path) -> None:
    logs = []
    for gpus in (1, 2):
        arguments = [
            f"--outdir={tmp_path / str(gpus)}",
            f"--data={shapes_zip}",
            *SHORT,
            f"--gpus={gpus}",
            "--kimg=0.016",
        ]
        arguments += [
            "--batch-gpu=8",
            "--mbstd=4",
            "--holdout=48",
            bound(detector_program),
            "--cond",
        ]
        arguments += ["--metrics=fid61_full,kid61,pr613,fid61_class"]
        result = run(*arguments)
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        [run_dir] = (tmp_path / str(gpus)).iterdir()
        values = {
            f"{path.stem} {i}": line["results"]
            for path in run_dir.glob("metric-*")
            for i, line in enumerate(lines(path))
        }
        for i, tick in enumerate(lines(run_dir / "stats.jsonl")):
            values[f"tick {i}"] = {name: value for name, value in tick.items() if name.startswith("Overfitting/")}
        logs.append(values)
    assert len(logs[0]) == 4 * 2 + 2
    assert logs[1].keys() == logs[0].keys()
    for name, expected in logs[0].items():
        assert logs[1][name] == pytest.approx(expected, rel=2e-3, abs=1e-3), name


# Held-out images.


def test_held_out_images_are_disjoint_from_training_images(shapes_zip: Path) -> None:
    config = DatasetConfig(path=str(shapes_zip), holdout=56, mirror=True)
    training, held_out = ImageDataset(config), ImageDataset(config, held_out=True)
    assert (len(training), len(held_out)) == (400, 112)
    chosen = [set(dataset._subset.tolist()) for dataset in (training, held_out)]
    assert not chosen[0] & chosen[1]
    assert chosen[0] | chosen[1] == set(range(256))
    assert training.content_hash != held_out.content_hash
    few = ImageDataset(DatasetConfig(path=str(shapes_zip), holdout=56, max_images=10))
    assert len(few) == 10
    assert not set(few._subset.tolist()) & chosen[1]
    with pytest.raises(ConfigError, match="the dataset has 256 images: leave some for training"):
        ImageDataset(DatasetConfig(path=str(shapes_zip), holdout=256))


def test_overfitting_is_computed_from_mean_logits(shapes_zip: Path) -> None:
    """The logit of D is the mean brightness, so the mean logits are known."""
    config = DatasetConfig(path=str(shapes_zip), holdout=56)
    training, held_out = ImageDataset(config), ImageDataset(config, held_out=True)

    def brightness(img: Tensor, c: Tensor) -> Tensor:
        return img.mean(dim=(1, 2, 3)).unsqueeze(1) + 0.1

    def generator(z: Tensor, c: Tensor, noise_mode: str) -> Tensor:
        return torch.full((len(z), 3, 16, 16), 0.7)

    generator.z_dim, generator.c_dim = 4, 0  # type: ignore[attr-defined]
    tick: Any = SimpleNamespace(values={})
    trainer: Any = SimpleNamespace(
        dataset=training, device=torch.device("cpu"), batch_gpu=8, G=generator, D=brightness,
        augment=lambda img: img, config=SimpleNamespace(seed=0), state=SimpleNamespace(nimg=0),
        gan=SimpleNamespace(repeat_for_rgb_heads=lambda img: img),
    )  # fmt: skip
    hooks.Overfitting(held_out).on_tick(trainer, tick)
    values = tick.values
    every = held_out.images(range(56)).double() / 127.5 - 1
    means = every.mean(dim=(1, 2, 3)) + 0.1
    assert values["Overfitting/score_holdout"] == pytest.approx(float(means.mean()), rel=1e-5)
    assert values["Overfitting/sign_holdout"] == pytest.approx(float(means.sign().mean()))
    assert values["Overfitting/score_generated"] == pytest.approx(0.8)
    train_score, held = values["Overfitting/score_train"], values["Overfitting/score_holdout"]
    assert values["Overfitting/r_v"] == pytest.approx((train_score - held) / (train_score - 0.8))


# The best network.


@pytest.mark.parametrize(("metric", "number", "better"), [("fid5k", "fid5k", 1.0), ("is5k", "is5k_mean", 3.0)])
def test_lower_distances_and_higher_scores_are_better(tmp_path: Path, metric: str, number: str, better: float) -> None:
    higher_is_better = find(metric)[0].higher_is_better

    def wins(value: float, **changes: Any) -> bool:
        return is_best(record(metric, number, value) | changes, tmp_path, higher_is_better=higher_is_better)

    assert wins(5)
    (tmp_path / f"metric-{metric}.jsonl").write_text(json.dumps(record(metric, number, 2.0)) + '\n{"metric": "cut')
    assert wins(better)
    assert not wins(4 - better)
    assert not wins(2.0)
    for key, other in {
        "detector_sha256": "f", "protocol": "clean", "data_hash": "other", "mirror": True, "seed": 1,
        "truncation_psi": 0.7, "noise_mode": "none", "num_real": 9, "num_fake": 9,
    }.items():  # fmt: skip
        assert wins(4 - better, **{key: other}), key


def record(metric: str, number: str, value: float) -> dict[str, Any]:
    return {
        "metric": metric, "results": {number: value}, "num_real": 1, "num_fake": 1, "seed": 0, "truncation_psi": 1.0,
        "noise_mode": "const", "protocol": "p", "detector_sha256": None, "data_hash": "d", "mirror": False,
    }  # fmt: skip


@pytest.mark.parametrize("with_flips", [True, False])
def test_the_best_network_ignores_records_of_other_reals(
    shapes_zip: Path, detector_program: Path, tmp_path: Path, with_flips: bool
) -> None:
    """Older versions counted flips in fid<N>_full with --mirror; such values look better but are not comparable."""
    arguments = [
        f"--outdir={tmp_path / 'runs'}",
        f"--data={shapes_zip}",
        *SHORT,
        bound(detector_program),
        "--resume=latest",
    ]
    arguments += ["--mirror", "--metrics=fid60_full", "--keep-best"]
    assert run(*arguments, "--kimg=0.032").exit_code == 0
    [run_dir] = (tmp_path / "runs").iterdir()
    log, best = run_dir / "metric-fid60_full.jsonl", run_dir / "network-best-fid60_full.pkl"
    old = [line | {"results": {"fid60_full": 0.0}} for line in lines(log)]
    if with_flips:
        mirrored = ImageDataset(DatasetConfig(path=str(shapes_zip), mirror=True))
        old = [line | {"mirror": True, "num_real": 512, "data_hash": mirrored.content_hash} for line in old]
    log.write_text("".join(json.dumps(line) + "\n" for line in old))
    before = best.read_bytes()
    result = run(*arguments, "--kimg=0.064")
    assert result.exit_code == 0, result.output
    new = lines(log)[len(old) :]
    assert [(line["kimg"], line["mirror"], line["num_real"]) for line in new] == [(0.064, False, 256)]
    assert new[0]["results"]["fid60_full"] > 0
    assert ("Best fid60_full so far" in result.output) == with_flips
    assert (best.read_bytes() == before) == (not with_flips)
    if with_flips:
        assert load_network(best).kimg == 0.064
    shown = read_run(run_dir, "run")
    expected = [0.064] if with_flips else [0.032, 0.064]
    assert shown.metrics["fid60_full"].kimg.tolist() == expected
    assert any("not comparable with the last line" in problem for problem in shown.problems) == with_flips


def test_the_best_network_is_saved_before_its_record(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metrics.registry.append_result", interrupted)
    run(f"--outdir={tmp_path / 'runs'}", f"--data={shapes_zip}", *SHORT, "--metrics=swd20")
    [run_dir] = (tmp_path / "runs").iterdir()
    assert not (run_dir / "metric-swd20.jsonl").exists()
    assert load_network(run_dir / "network-best-swd20.pkl").kimg == 0.032


def test_detectors_and_real_statistics_are_reused_by_later_ticks(
    shapes_zip: Path, detector_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def watch(owner: Any, name: str) -> None:
        function, calls = getattr(owner, name), seen.setdefault(name, [])

        def watched(*arguments: Any) -> Any:
            calls.append(arguments[1])
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((DetectorSetup, "load"), (feature_stats, "choose_reals"), (sampling, "latents")):
        watch(owner, name)
    arguments = [
        f"--outdir={tmp_path / 'runs'}",
        f"--data={shapes_zip}",
        *SHORT,
        bound(detector_program),
    ]
    result = run(*arguments, "--metrics=none", "--set=run.tick_metrics=fid60_full", "--batch-gpu=8", "--mbstd=4")
    assert result.exit_code == 0, result.output
    assert (len(seen["load"]), len(seen["choose_reals"])) == (1, 1)
    assert max(map(len, seen["latents"])) == 8
