"""Folder and device of the demo; other modules test the commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import demo


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Return the commands that the demo runs in a temporary folder, up to training."""
    found: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        found.append(command)
        if command[0] == "train.py":
            sys.exit(0)

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "OUTDIR", tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    return found


def run_demo(*arguments: str) -> Result:
    return CliRunner().invoke(demo.main, arguments)


def test_results_come_from_complete_records(tmp_path: Path) -> None:
    lines = ('{"results": {"swd500": 9.5}}', '{"results": {"swd500": NaN}}', '{"results": {"swd500": 3}}', '{"resul')
    (tmp_path / "metric-swd500.jsonl").write_text("\n".join(lines))
    assert demo.read_results(tmp_path, "swd500") == [9.5, 3]


def test_only_the_default_folder_is_emptied(commands: list[tuple[str, ...]]) -> None:
    for name in ("default", "runs"):
        Path(name).mkdir()
        Path(name, "log.txt").touch()
    result = run_demo("--outdir=runs")
    assert (result.exit_code, "--outdir=runs: exists and is not an empty folder" in result.stderr) == (2, True)
    assert Path("runs/log.txt").exists()
    assert commands == []
    assert run_demo("--device=cpu").exit_code == 0
    assert not Path("default").exists()


def test_the_folder_is_relative_to_the_caller(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    assert run_demo("--outdir=new", "--device=cpu").exit_code == 0
    assert f"--dest={tmp_path / 'new' / 'shapes.zip'}" in commands[0]


def test_the_given_device_is_used(commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_demo("--outdir=new", "--device=gpu")
    assert (result.exit_code, "--device=gpu: no such kind of device" in result.stderr) == (2, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run_demo("--outdir=new", "--device=cuda:1").exit_code == 0
    assert {"--device=cuda:1", "--kimg=200"} <= set(commands[-1])
