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
    arguments = ["--images=24", "--batch=8", "--detector-batch=6", "--device=cpu", f"--detector={program}"]
    outcome = CliRunner().invoke(feature_metrics.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    generated, real, distance = (json.loads(line) for line in outcome.stdout.splitlines())
    for row, kind in ((generated, "generated"), (real, "real")):
        assert row["pass"] == kind
        assert (row["images"], row["features"], row["detector"]) == (24, 6, "small.pt")
        assert row["img_per_s"] > 0
        assert row["detector_share"] > 0
        assert row["torch"] == torch.__version__
    assert distance["pass"] == "distance"
    assert distance["seconds"] >= 0
