"""Warnings about failing training: each condition on synthetic ticks and on real failing runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, small_config

import train
from training.dataset import ImageDataset
from training.health import CONDITIONS, Diversity, HealthCheck, TickValues, spread
from training.training_loop import Tick, Trainer

ROOT = Path(__file__).parent.parent
# Values of a healthy run, and the changes that trigger each condition.
HEALTHY = {
    "Loss/scores/real": 1.5,
    "Loss/scores/fake": -1.0,
    "Loss/signs/real": 0.6,
    "Loss/signs/fake": -0.6,
    "Loss/D/loss": 0.7,
    "Images/diversity": 0.9,
    "ADA/is_saturated": 0.0,
}
FAILURES: list[tuple[str, dict[str, float]]] = [
    ("D separates perfectly", {"Loss/signs/real": 1.0, "Loss/signs/fake": -1.0}),
    ("D separates perfectly", {"Loss/scores/real": 8.0, "Loss/scores/fake": -9.0, "Loss/D/loss": 0.001}),
    ("D does not separate", {"Loss/scores/real": -0.5, "Loss/scores/fake": 1.6, "Loss/D/loss": 3.0}),
    ("D does not separate", {"Loss/scores/real": 0.001, "Loss/scores/fake": 0.001, "Loss/D/loss": 1.386}),
    ("G has collapsed", {"Images/diversity": 0.01}),
    ("p is at its upper bound", {"ADA/is_saturated": 1.0}),
]


def names(watch: HealthCheck, values: dict[str, float]) -> list[str]:
    return [condition.name for condition in watch.newly_met(TickValues(values))]


@pytest.mark.parametrize(("name", "change"), FAILURES)
def test_each_condition_is_reported_once_until_it_clears(name: str, change: dict[str, float]) -> None:
    (patience,) = (condition.patience for condition in CONDITIONS if condition.name == name)
    watch, bad = HealthCheck(), HEALTHY | change
    reported = [names(watch, values) for values in [HEALTHY, *[bad] * 6, HEALTHY, *[bad] * 4]]
    expected: list[list[str]] = [[]] * 12
    for begins in (1, 8):
        expected[begins + patience - 1] = [name]
    assert reported == expected


def test_every_condition_is_tested_and_documented() -> None:
    described = (ROOT / "docs" / "troubleshooting.md").read_text()
    for condition in CONDITIONS:
        assert condition.name in dict(FAILURES)
        assert f"\n### {condition.name}\n" in described


@pytest.mark.parametrize("missing", HEALTHY)
def test_a_missing_value_raises_no_warning(missing: str) -> None:
    watch = HealthCheck()
    partial = {name: value for name, value in HEALTHY.items() if name != missing}
    assert [names(watch, partial) for _ in range(5)] == [[]] * 5


def test_a_critic_that_ranks_perfectly_raises_no_warning() -> None:
    """wgangp-eps and relativistic losses report signs of score differences, but no signs for generated images."""
    watch = HealthCheck()
    scores = {"Loss/scores/real": 30.0, "Loss/scores/fake": -20.0, "Loss/D/loss": -45.0, "Loss/signs/real": 1.0}
    values = {name: value for name, value in (HEALTHY | scores).items() if name != "Loss/signs/fake"}
    assert [names(watch, values) for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("p", [0.5, 0.25])
def test_the_bound_of_p_comes_from_the_ada_controller(
    shapes_zip: Path, capsys: pytest.CaptureFixture[str], p: float
) -> None:
    config = small_config(shapes_zip, augment__max_p=0.5)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    tick = Tick(1, 0, is_first=False, is_last=False, stats={}, values={"Progress/augment": p})
    HealthCheck().on_tick(trainer, tick)
    assert ("p of ADA or APA is at its upper bound" in capsys.readouterr().out) == (p == 0.5)


def test_diversity_is_the_ratio_of_fake_to_real_spread(shapes_zip: Path) -> None:
    """Diversity is s for a generator that returns dataset images scaled by s about their mean."""
    data = ImageDataset(small_config(shapes_zip).data)
    reals = data.images([k * 8 for k in range(32)]).float() / 127.5 - 1  # the 32 of 256 images used for diversity
    requested: list[tuple[int, Any]] = []

    def measure(G: Any) -> float:
        tick = Tick(1, 0, is_first=False, is_last=False, stats={}, values={})
        at: Any = SimpleNamespace(dataset=data, G=G, device=torch.device("cpu"), batch_gpu=16)
        Diversity().on_tick(at, tick)
        return tick.values["Images/diversity"]

    class Repeats:
        z_dim, c_dim = 3, 0

        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __call__(self, z: torch.Tensor, c: torch.Tensor, noise_mode: str) -> torch.Tensor:
            start = sum(count for count, _ in requested) % 32
            requested.append((len(z), noise_mode))
            return reals[start : start + len(z)] * self.scale

    assert [measure(Repeats(scale)) for scale in (1.0, 0.25, 0.0)] == pytest.approx([1.0, 0.25, 0.0], abs=1e-6)
    assert requested == [(16, "const")] * 6
    assert measure(Repeats(1e6)) == pytest.approx(reals.sign().double().std(dim=0, correction=0).mean() / spread(reals))


SHORT = [*SMALL, "--metrics=none", "--device=cpu", "--tick=0.032", "--snap=99", "--kimg=0.256"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], set()),
        (["--glr=1"], {"G has collapsed"}),
        (["--gamma=0", "--dlr=0.3", "--tick=0.016"], {"D does not separate"}),
        (
            ["--subset=16", "--aug=noaug", "--glr=1e-12", "--dlr=0.02", "--gamma=0", "--tick=0.016", "--kimg=0.32"],
            {"D separates perfectly"},
        ),
    ],
)
def test_failing_runs_print_warnings(shapes_zip: Path, tmp_path: Path, options: list[str], expected: set[str]) -> None:
    result = CliRunner().invoke(train.main, [f"--outdir={tmp_path}", f"--data={shapes_zip}", *SHORT, *options])
    assert result.exit_code == 0, result.output
    reported = {line.rpartition(', "')[2].rstrip('")') for line in result.stdout.splitlines() if "Warning" in line}
    assert reported == expected, result.stdout
