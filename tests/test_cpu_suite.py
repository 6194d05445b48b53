"""The benchmarks of a CPU, and the table of their results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_helpers import results
from click.testing import CliRunner

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import convolutions
import cpu_suite

LAYER = {"channels": 512, "side": 32, "batch": 8}
TIMES = {"plain_busy_seconds": 3.0, "busy_seconds": 1.5, "deviation": 2.4e-6}

# Results of the benchmarks, by script.
RESULTS: dict[str, list[dict[str, Any]]] = {
    "train_step.py": [
        {"mode": "plain", "batch": 32, "sec_per_kimg": 660.0},
        {"mode": "fp32", "batch": 32, "sec_per_kimg": 220.0},
    ],
    "convolutions.py": [{"layer": "same", "order": 2, **LAYER, **TIMES}],
    "feature_metrics.py": [{"part": "kid", "subsets": 10, "features": 4096, **TIMES}],
    "swd.py": [{"images": 1024, "size": 32, **TIMES, "deviation": 0.0}],
    "loading.py": [
        {"num_images": 200000, "cpu_s": {"plain": 1.5, "first": 2.0, "second": 0.15}},
        {"mib": 219.3, "cpu_s": {"torch_load": 0.13, "read": 0.26}},
    ],
}


def test_convolutions_are_timed_beside_those_of_pytorch() -> None:
    rows = results(convolutions.main, "--scale=64", "--batch=2", "--repeats=1")
    layers = [(kind, channels // 64, side) for kind, shapes in convolutions.LAYERS.items() for channels, side in shapes]
    assert [(row["layer"], row["channels"], row["side"], row["order"]) for row in rows] == [
        (*layer, order) for layer in layers for order in range(3)
    ]
    assert all(row["deviation"] < 1e-4 for row in rows)


def test_the_table_has_a_row_per_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:  # git
            return real(command, **options)
        commands.append([Path(command[1]).name, *command[2:]])
        lines = [json.dumps(result) for result in RESULTS[commands[-1][0]]]
        return SimpleNamespace(returncode=0, stdout="\n".join(["a note", *lines]))

    monkeypatch.setattr(subprocess, "run", run)
    outcome = CliRunner().invoke(cpu_suite.main, [], catch_exceptions=False)
    assert commands == [command for command, _ in cpu_suite.PARTS.values()]
    intro, _, header, _, *rows = outcome.stdout.splitlines()
    assert intro.startswith("cpu (")
    assert "load average" in intro
    assert header == "| | plain s | here s | speedup | deviation |"
    assert rows == [
        "| training, README example, fp32, batch 32: s/kimg | 660 | 220 | 3.00 |  |",
        "| same, 512 channels, 32x32, batch 8: second derivative | 3 | 1.5 | 2.00 | 2e-06 |",
        "| KID of 10 subsets | 3 | 1.5 | 2.00 | 2e-06 |",
        "| swd of 1,024 images, 32x32 | 3 | 1.5 | 2.00 | 0e+00 |",
        "| open a zip of 200,000 images: first start | 1.5 | 2 | 0.75 |  |",
        "| open a zip of 200,000 images: next starts | 1.5 | 0.15 | 10.00 |  |",
        "| read and verify a snapshot of 219 MiB | 0.13 | 0.26 | 0.50 |  |",
    ]


def test_a_failed_benchmark_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **options: SimpleNamespace(returncode=3, stdout=""))
    outcome = CliRunner().invoke(cpu_suite.main, ["--parts=files"])
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1] == "Error: loading.py ended with exit code 3; its messages are above"
    outcome = CliRunner().invoke(cpu_suite.main, ["--parts=gpu"])
    assert outcome.stderr.splitlines()[-1].endswith(
        "--parts: 'gpu' is not one of training, layers, metrics, swd, files"
    )
