"""The benchmark of feature metrics with tiny settings prints JSON lines with the documented keys."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from metric_helpers import SmallDetector, script_program

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import feature_metrics


def test_passes_are_timed_with_the_share_of_the_detector(tmp_path: Path) -> None:
    program = script_program(tmp_path / "small.pt", SmallDetector())
    arguments = [
        "--images=24",
        "--batch=8",
        "--detector-batch=6",
        "--device=cpu",
        f"--detector={program}",
        "--parts=passes",
    ]
    outcome = CliRunner().invoke(feature_metrics.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    generated, real = (json.loads(line) for line in outcome.stdout.splitlines())
    for row, kind in ((generated, "generated"), (real, "real")):
        assert row["pass"] == kind
        assert (row["images"], row["features"], row["detector"]) == (24, 6, "small.pt")
        assert row["img_per_s"] > 0
        assert row["detector_share"] > 0
        assert row["torch"] == torch.__version__


def test_computations_are_timed_beside_their_plain_forms() -> None:
    parts = ["covariance", "frechet", "kid", "precision_recall", "density_coverage"]
    settings = [f"--parts={','.join(reversed(parts))}", "--features=300", "--dimensions=64", "--subsets=2"]
    outcome = CliRunner().invoke(feature_metrics.main, [*settings, "--device=cpu"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    rows = {row["part"]: row for row in map(json.loads, outcome.stdout.splitlines())}
    assert list(rows) == parts
    for row in rows.values():
        assert (row["features"], row["dimensions"]) == (300, 64)
        assert row.keys() >= {"busy_seconds", "plain_busy_seconds", "speedup"}
    assert max(rows[part]["deviation"] for part in ("covariance", "frechet")) < 1e-10
    assert rows["kid"]["deviation"] < 1e-3
    assert max(rows[part]["deviation"] for part in ("precision_recall", "density_coverage")) < 0.02


def test_an_unknown_part_is_one_line() -> None:
    outcome = CliRunner().invoke(feature_metrics.main, ["--parts=kid,fid"])
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1].endswith(
        "--parts: 'fid' is not one of passes, covariance, frechet, kid, precision_recall, density_coverage"
    )
