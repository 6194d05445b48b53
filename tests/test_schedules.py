"""Schedules: values, text, fields that accept them, and training with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, OnTick, small_config
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import new_trainer, saved_state, train_steps, train_with_a_break

import train
from dnnlib.config import ConfigError, from_json, override, to_json
from dnnlib.config_text import parse_texts
from dnnlib.schedule import Schedule, value_at
from reporting.charts import GROUPS, find_charts
from reporting.run_reader import read_run
from torch_utils.checkpoint import digest
from training.config import PRESETS, TrainConfig, read_config, schedules
from training.ema import EMA, EMAConfig
from training.phases import AdamConfig, build_updater
from training.training_loop import Tick, Trainer

# Every field that accepts a schedule, for runs of a few dozen images.
SCHEDULED: dict[str, str] = {
    "g_optimizer.lr": "0.001+warmup@0.016k+rsqrt@0.04k",
    "d_optimizer.lr": "0.002:0.0005@0.05k",
    "g_optimizer.beta2": "0.9:0.99@0.06k",
    "d_optimizer.beta2": "0.8:0.95@0.03k",
    "loss.r1_gamma": "2:0.2@0.05k",
    "ema.kimg": "0:0.1@0.05k",
    "augment.p": "0:0.5@0.05k",
}


def scheduled_config(data: Path, **changes: Any) -> TrainConfig:
    config = small_config(data, augment__mode="fixed", augment__p=0.1, loss__r1_interval=2, **changes)
    return override(config, parse_texts(config, SCHEDULED))


def test_the_burn_in_is_half_a_cosine() -> None:
    schedule = Schedule.parse("0.9:0.99@20M")
    n = np.linspace(0, 20e6, 41)
    expected = 0.99 + (0.9 - 0.99) * (1 + np.cos(np.pi * n / 20e6)) / 2
    np.testing.assert_allclose([schedule.at(int(x)) for x in n], expected, rtol=1e-12)
    assert [round(schedule.at(x), 12) for x in (0, 10**7)] == [0.9, 0.945]
    assert schedule.at(20 * 10**6) == schedule.at(10**12) == 0.99


def test_warm_up_is_linear_and_decay_an_inverse_root() -> None:
    """EDM2's learning rate: 0.01 / sqrt(max(n / 512,000, 1)) with a linear warm-up over a million images."""
    schedule = Schedule.parse("0.01+warmup@1M+rsqrt@512k")
    assert [schedule.at(n) for n in (0, 256_000)] == [0, 0.01 * 0.256]
    for n in (600_000, 10**6, 2_048_000, 5 * 10**7):
        assert schedule.at(n) == pytest.approx(0.01 * min(n / 1e6, 1) / math.sqrt(n / 512_000), rel=1e-12)
    assert schedule.at(2_048_000) == pytest.approx(0.005)


@pytest.mark.parametrize(
    "text", ["0.9:0.99@20M", "1.0+warmup@1.5M", "2.0:0.2@0.032k+rsqrt@512k", "0.0:5000.0@0.001k+warmup@1M+rsqrt@1k"]
)
def test_text_is_preserved(text: str) -> None:
    assert str(Schedule.parse(text)) == text


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 10**12), st.integers(0, 10**10), st.integers(0, 10**10))
def test_every_schedule_round_trips_through_text(a: float, b: float, length: int, warmup: int, decay: int) -> None:
    schedule = Schedule(a, b, length, warmup, decay)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "0.9:0.99",
        "0.9:0.99@20",
        "0.9:0.99@0k",
        "0.9:0.99@0.0005k",
        "0.9:@20M",
        ":0.99@20M",
        "0.9@20M",
        "0.9:0.99@20M+rsqrt@1M+warmup@1M",
        "0.9:0.99@20M:",
        "-1:1@20M",
        "nan:1@20M",
        "1:1e39@20M",
        "0.9:0.99@20m",
        "0.9:0.99@9999999999M",
        "1+decay@1M",
    ],
)
def test_malformed_schedules_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a number or a schedule such as 0\.9:0\.99@20M") as caught:
        parse_texts(PRESETS["auto"], {"d_optimizer.beta2": text})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("d_optimizer.beta2", "0.9:1@20M", "each value must lie in 0..1, 1 excluded"),
        ("d_optimizer.lr", "0:0.001@20M", "each value must be positive"),
        ("loss.r1_gamma", "1e9:1e-9@1M", ""),
        ("ema.rampup", "0:1@1M", "expected a number or none"),
    ],
)
def test_both_ends_are_checked_against_the_bounds(path: str, text: str, problem: str) -> None:
    auto = PRESETS["auto"]
    if not problem:
        assert override(auto, parse_texts(auto, {path: text})).loss.r1_gamma == Schedule(1e9, 1e-9, 10**6)
        return
    with pytest.raises(ConfigError, match=problem):
        override(auto, parse_texts(auto, {path: text}))


def test_schedules_are_text_in_json(shapes_zip: Path) -> None:
    config = scheduled_config(shapes_zip)
    data = json.loads(json.dumps(to_json(config)))
    assert data["d_optimizer"]["beta2"] == "0.8:0.95@0.03k"
    assert from_json(TrainConfig, data) == read_config(data) == config
    assert {path: str(schedule) for path, schedule in schedules(config).items()}.keys() == SCHEDULED.keys()
    data["d_optimizer"]["beta2"] = "0.8:0.95@"
    with pytest.raises(ConfigError, match=r"d_optimizer\.beta2.*expected a schedule such as"):
        from_json(TrainConfig, data)


def test_bias_correction_uses_the_current_beta2() -> None:
    """Compare with algorithm 1 of Kingma & Ba 2015 in float64, with beta2 of the step in both places."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    config = AdamConfig(lr=Schedule.parse("0.01:0.001@0.04k"), beta2=Schedule.parse("0.5:0.99@0.04k"), eps=1e-3)
    updater = build_updater([p], config, None)
    w, v = p.detach().double(), torch.zeros(7).double()
    for step in range(6):
        nimg = 8 * step
        updater.follow_schedules(nimg)
        g = torch.randn(7, generator=torch.Generator().manual_seed(step))
        updater.gradients.zero()
        updater.gradients.buffer[:7] += g
        updater.step(skip=torch.tensor(False))
        t = min(nimg / 40, 1)
        lr, beta2 = (
            end + (start - end) * (1 + math.cos(math.pi * t)) / 2 for start, end in ((0.01, 0.001), (0.5, 0.99))
        )
        v = beta2 * v + (1 - beta2) * g.double() ** 2
        w = w - lr * g.double() / ((v / (1 - beta2 ** (step + 1))).sqrt() + 1e-3)
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_the_half_life_of_the_average_follows_its_schedule() -> None:
    layer = torch.nn.BatchNorm1d(1)
    ema = EMA(layer, EMAConfig(kimg=Schedule(0, 1, length=1000), rampup=None))
    for nimg, expected in ((0, 1.0), (500, 1 - 0.5 ** (8 / 500)), (1000, 1 - 0.5 ** (8 / 1000))):
        torch.nn.init.zeros_(ema.module.weight)
        torch.nn.init.ones_(layer.weight)
        ema.update(nimg, 8)
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_training_uses_and_logs_the_scheduled_values(shapes_zip: Path) -> None:
    trainer = new_trainer(scheduled_config(shapes_zip, run__tick_kimg=0.008))
    ticks: list[tuple[int, dict[str, float], dict[str, float]]] = []

    def observe(trainer: Trainer, tick: Tick) -> None:
        G, D = trainer.g_updater.optimizer.param_groups[0], trainer.d_updater.optimizer.param_groups[0]
        (gamma,) = trainer.gan.scheduled.values()
        used = {
            "g_optimizer.lr": G["lr"] * 5 / 4,  # lazy regularisation every 4 steps of G
            "d_optimizer.lr": D["lr"] * 3 / 2,  # and every 2 steps of D
            "g_optimizer.beta2": G["betas"][1] ** (5 / 4),
            "d_optimizer.beta2": D["betas"][1] ** (3 / 2),
            "loss.r1_gamma": float(gamma),
            "augment.p": float(trainer.augment.p),
        }
        ticks.append((trainer.state.nimg, used, dict(tick.values)))

    trainer.hooks = [OnTick(observe)]
    train_steps(trainer, 9)
    assert len(ticks) == 10
    for nimg, used, values in ticks:
        for path, text in SCHEDULED.items():
            expected = Schedule.parse(text).at(nimg)
            assert values[f"Schedule/{path}"] == expected
            if path in used:
                assert used[path] == pytest.approx(expected, rel=1e-6), (nimg, path)
    assert ticks[0][1] != ticks[-1][1]


def test_the_penalty_reads_gamma_from_one_tensor(shapes_zip: Path) -> None:
    """A captured CUDA graph keeps the tensor's address, so the value must change in place."""
    trainer = new_trainer(scheduled_config(shapes_zip))
    (gamma,) = trainer.gan.scheduled.values()
    address, before = gamma.data_ptr(), float(gamma)
    train_steps(trainer, 4)
    (same,) = trainer.gan.scheduled.values()
    assert same.data_ptr() == address
    assert float(same) < before
    penalty = next(phase for phase in trainer.phases if phase.name == "D_reg")
    images = torch.randn(4, *trainer.dataset.img_shape)
    results = []
    for nimg in (0, 50):
        trainer.gan.follow_schedules(nimg)
        torch.manual_seed(0)
        results.append(penalty.loss(images, torch.zeros(4, 0)).loss.item())
    assert results[0] == pytest.approx(10 * results[1], rel=1e-4)


def test_resuming_with_schedules_is_bit_exact(shapes_zip: Path, tmp_path: Path) -> None:
    config = scheduled_config(shapes_zip)
    straight = new_trainer(config)
    train_steps(straight, 7)
    resumed = train_with_a_break(config, 3, 4, tmp_path)
    assert digest(saved_state(resumed)) == digest(saved_state(straight))


def test_a_run_with_schedules_is_reported(shapes_zip: Path, tmp_path: Path) -> None:
    """Each schedule has a chart; p is shown as the augmentation probability."""
    arguments = [option for option in SMALL if not option.startswith("--gamma")]
    arguments += [f"--outdir={tmp_path}", f"--data={shapes_zip}", "--device=cpu", "--metrics=none"]
    arguments += ["--kimg=0.032", "--tick=0.016", "--snap=99", "--aug=fixed", "--log=none", "--set=loss.r1_interval=2"]
    arguments += [f"--set={path}={text}" for path, text in SCHEDULED.items()]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 0, result.output
    (run,) = tmp_path.iterdir()
    last = json.loads((run / "stats.jsonl").read_text().splitlines()[-1])
    assert last["Schedule/loss.r1_gamma"] == pytest.approx(value_at(Schedule.parse("2:0.2@0.05k"), 32))
    charts = {chart.name: chart.statistics for chart in find_charts([read_run(run, "run")])}
    shown = [name for name in charts if name.startswith("schedule-")]
    assert shown == [group.name for group in GROUPS if group.name.startswith("schedule-")]
    assert charts["schedule-lr"] == ("Schedule/d_optimizer.lr", "Schedule/g_optimizer.lr")
    assert not any("Schedule/augment.p" in names for names in charts.values())
