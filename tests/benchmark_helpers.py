"""Run benchmark scripts in the test process."""

from __future__ import annotations

import json
from typing import Any

import click
import torch
from click.testing import CliRunner

# Keys of every result.
COMMON_KEYS = {"benchmark", "device", "torch", "threads", "cores", "load_at_start", "command"}


def results(command: click.Command, *options: str) -> list[dict[str, Any]]:
    """Run a benchmark and return the JSON objects that it prints, one per line."""
    outcome = CliRunner().invoke(command, options, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row.keys() >= COMMON_KEYS
        assert row["torch"] == torch.__version__
        assert row["device"].startswith("cpu")
        assert row["command"].startswith("python ")
    return rows
