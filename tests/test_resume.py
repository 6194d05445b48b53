"""Resuming (training/resume.py): command-line options are applied to the saved configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_shapes

from dnnlib.config import OPTIONS_FILE, UserError, override, to_json
from training.config import PRESETS, TrainConfig
from training.resume import RunRequest, Start, choose_start, complete, open_dataset

TEXTS = {"generator.widths": "32,16", "generator.layers": "1,1", "run.device": "cpu"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    open_dataset.cache_clear()
    make_shapes(tmp_path / "data.zip", 16, 24)
    return tmp_path / "data.zip"


@pytest.fixture
def new(data: Path, tmp_path: Path) -> Callable[..., RunRequest]:
    """Return a function that builds the RunRequest of a command line with TEXTS and further options."""

    def make(resume: str | Path | None = None, preset: str | None = "tiny", **changes: Any) -> RunRequest:
        texts = {"data.path": str(data), **TEXTS} | changes.pop("texts", {})
        return RunRequest(
            outdir=tmp_path / "runs",
            resume=None if resume is None else str(resume),
            preset=preset,
            texts=texts,
            **changes,
        )

    return make


def save(start: Start, number: int = 0, **changes: Any) -> Path:
    """Write a run folder with its options file and an empty training state."""
    assert start.outdir
    run_dir = start.outdir / f"{number:05d}-run"
    run_dir.mkdir(parents=True)
    config = override(start.config, changes)
    (run_dir / OPTIONS_FILE).write_text(json.dumps(to_json(config)))
    (run_dir / "training-state-000000.pt").touch()
    return run_dir


def test_a_run_resumes_from_its_folder_alone(new: Callable[..., RunRequest]) -> None:
    """Every field comes from the saved configuration, even if the presets have changed."""
    start = choose_start(new(texts={"loss.r1_gamma": "3", "run.total_kimg": "5", "g_optimizer.beta2": "0.9"}))
    run_dir = save(start)
    resumed = choose_start(RunRequest(outdir=None, resume=str(run_dir)))
    assert (resumed.config, resumed.run_dir) == (start.config, run_dir)


def test_repeating_the_options_changes_nothing(new: Callable[..., RunRequest]) -> None:
    for number, texts in enumerate(
        (
            {},
            {"loss.objective": "hinge", "augment.mode": "diffaug"},
            {"augment.mode": "fixed", "augment.p": "0.2"},
            {"precision": "auto", "batch_size": "auto", "ema.kimg": "auto"},
            {"discriminator.family": "styleformer"},
        )
    ):
        start = choose_start(new(texts=texts))
        run_dir = save(start, number)
        assert choose_start(new(run_dir, texts=texts)).config == start.config
        assert choose_start(new("latest", texts=texts)).run_dir == run_dir


def test_run_settings_may_change_on_resume(new: Callable[..., RunRequest]) -> None:
    start = choose_start(new())
    run_dir = save(start)
    texts = {"run.total_kimg": "99", "run.metrics": "none", "run.snapshot_ticks": "7"}
    for request in (new(run_dir, texts=texts), new("latest", texts=texts), new("latest", None, texts=texts)):
        resumed = choose_start(request)
        assert resumed.run_dir == run_dir
        values: dict[str, Any] = {"run.total_kimg": 99.0, "run.metrics": (), "run.snapshot_ticks": 7}
        assert resumed.config == override(start.config, values)


@pytest.mark.parametrize(
    ("texts", "preset", "change"),
    [
        ({"loss.r1_gamma": "3"}, "tiny", "loss.r1_gamma: 0.5 -> 3.0"),
        ({"generator.widths": "64,16"}, None, "generator.widths: [32, 16] -> [64, 16]"),
        ({"loss.objective": "hinge"}, None, "loss.objective: 'logistic' -> 'hinge'"),
        ({"data.mirror": "true"}, None, "data.mirror: False -> True"),
        ({"seed": "1"}, None, "seed: 0 -> 1"),
        ({"precision": "bf16"}, None, "precision: 'fp32' -> 'bf16'"),
        ({}, "auto", "preset: 'tiny' -> 'auto'"),
    ],
)
def test_other_changes_are_refused_without_override(
    new: Callable[..., RunRequest],
    capsys: pytest.CaptureFixture[str],
    texts: dict[str, str],
    preset: str | None,
    change: str,
) -> None:
    run_dir = save(choose_start(new()))
    with pytest.raises(UserError, match="give --override") as refused:
        choose_start(new(run_dir, preset, texts=texts))
    assert f"\n  {change}" in str(refused.value)

    latest = choose_start(new("latest", preset, texts=texts))
    assert latest.run_dir is None
    warnings = capsys.readouterr().err
    assert f"--override resumes {run_dir}" in warnings
    assert change in warnings

    for resume in (run_dir, "latest"):
        overridden = choose_start(new(resume, preset, texts=texts, override=True))
        assert overridden.run_dir == run_dir
        assert change in capsys.readouterr().err
        name, _, value = change.partition(": ")
        assert json.dumps(value.split(" -> ")[1].strip("'")) is not None
        config: Any = overridden.config
        for part in name.split("."):
            config = getattr(config, part)
        assert str(list(config) if isinstance(config, tuple) else config) == value.split(" -> ")[1].strip("'")


def test_latest_is_the_newest_run_with_matching_options(new: Callable[..., RunRequest]) -> None:
    """An option that is not given matches every run."""
    runs = {}
    for number, gamma in enumerate(("1", "2", "1", "3")):
        runs[number] = save(choose_start(new(texts={"loss.r1_gamma": gamma})), number)
    assert choose_start(new("latest")).run_dir == runs[3]
    assert choose_start(new("latest", texts={"loss.r1_gamma": "1"})).run_dir == runs[2]
    assert choose_start(new("latest", texts={"loss.r1_gamma": "2"})).run_dir == runs[1]
    assert choose_start(new("latest", texts={"loss.r1_gamma": "4"})).run_dir is None


def test_unreadable_runs_are_skipped(new: Callable[..., RunRequest], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = save(choose_start(new()))
    broken = save(choose_start(new()), 1)
    (broken / OPTIONS_FILE).write_text("[]")
    without_state = save(choose_start(new()), 2)
    (without_state / "training-state-000000.pt").unlink()
    assert choose_start(new("latest")).run_dir == run_dir
    assert str(broken / OPTIONS_FILE) in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        choose_start(new(broken))
    with pytest.raises(UserError, match="contains no training state"):
        choose_start(new(without_state))


def test_runs_of_other_families_or_data_do_not_match(
    new: Callable[..., RunRequest], data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.zip"
    make_shapes(other, 16, 24)
    save(choose_start(new(texts={"data.path": str(other)})))
    texts = {"generator.family": "stylegan2", "generator.channel_base": "256"}
    request = replace(new(texts=texts), texts={"data.path": str(data), "run.device": "cpu", **texts})
    run_dir = save(choose_start(request), 1)
    assert choose_start(replace(request, resume="latest")).run_dir == run_dir
    assert choose_start(new("latest")).run_dir is None  # the other family has no field `widths`
    other.unlink()
    assert choose_start(replace(request, resume="latest")).run_dir == run_dir  # the other dataset is not opened


def test_micro_batches_follow_the_number_of_processes(new: Callable[..., RunRequest]) -> None:
    """The micro-batch size stays if it divides the batch size per process."""
    start = choose_start(new(texts={"batch_size": "32", "run.batch_gpu": "8"}))
    assert start.config.run.batch_gpu == 8
    run_dir = save(start)

    def batch_gpu_of(**texts: str) -> Any:
        return choose_start(
            new(run_dir, texts={f"run.{name}": text for name, text in texts.items()})
        ).config.run.batch_gpu

    assert batch_gpu_of() == 8
    assert batch_gpu_of(num_gpus="2") == 8
    assert batch_gpu_of(num_gpus="8") == 4
    assert batch_gpu_of(num_gpus="2", batch_gpu="4") == 4
    assert batch_gpu_of(batch_gpu="16") == 16


def test_automatic_settings_adapt_to_another_machine(new: Callable[..., RunRequest]) -> None:
    """A run that used CUDA graphs on a GPU can resume on a CPU."""
    start = choose_start(new())
    run_dir = save(start, **{"run.graphs": True})
    assert choose_start(new(run_dir)).config == start.config
    with pytest.raises(UserError, match="need a GPU"):
        choose_start(new(run_dir, texts={"run.graphs": "true"}))


def test_a_state_starts_a_new_run_with_its_configuration(new: Callable[..., RunRequest], monkeypatch: Any) -> None:
    start = choose_start(new(texts={"loss.r1_gamma": "3"}))
    state = save(start) / "training-state-000000.pt"
    monkeypatch.setattr("training.resume.Checkpoint.read", lambda path: {"config": to_json(start.config)})
    new_run = choose_start(RunRequest(outdir=start.outdir, resume=str(state)))
    assert (new_run.config, new_run.run_dir, new_run.state) == (start.config, None, state)
    with pytest.raises(UserError, match="missing option --outdir"):
        choose_start(RunRequest(outdir=None, resume=str(state)))
    with pytest.raises(UserError, match=r"loss.r1_gamma: 3.0 -> 4.0"):
        choose_start(RunRequest(outdir=start.outdir, resume=str(state), texts={"loss.r1_gamma": "4"}))


def test_missing_options_of_a_new_run_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing option --data"):
        choose_start(RunRequest(outdir=tmp_path))
    with pytest.raises(UserError, match="missing option --data"):
        choose_start(RunRequest(outdir=tmp_path, resume="latest"))


def test_resolving_twice_changes_nothing(data: Path) -> None:
    """Resuming relies on resolved configurations being complete."""
    for name in ("auto", "tiny", "cifar", "transgan-cifar"):
        size = {"tiny": 32, "cifar": 32, "transgan-cifar": 32}.get(name, 16)
        path = data if size == 16 else data.with_name(f"{name}.zip")
        if size != 16:
            make_shapes(path, size, 24)
        config: TrainConfig = override(PRESETS[name], {"data.path": str(path), "run.device": "cpu"})
        resolved = complete(config)
        assert complete(resolved) == resolved


def test_a_resumed_run_can_drop_averages_but_not_add_them(new: Callable[..., RunRequest]) -> None:
    run_dir = save(choose_start(new()))
    fewer = choose_start(new(run_dir, texts={"ema.profiles": "0.1"}, override=True))
    assert fewer.config.ema.profiles == (0.1,)
    assert choose_start(new(run_dir, texts={"ema.profiles": "none"}, override=True)).config.ema.profiles == ()
    with pytest.raises(
        UserError, match=r"ema.profiles=0.2,0.03: .* cannot add lengths: .*=0.05,0.1, or start a new run"
    ):
        choose_start(new(run_dir, texts={"ema.profiles": "0.1,0.2,0.03"}, override=True))
