"""benchmarks/self_attention.py with few tokens: reported problems, and memory of a known size."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_helpers import results
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import grid_attention
import self_attention

SMALL = ["--device=cpu", "--repeats=1", "--head-dim=4"]


@pytest.mark.slow
def test_attention_measures_memory_and_time() -> None:
    """The explicit implementation holds several matrices, the blockwise one the same number of half-size blocks."""
    options = [*SMALL, "--tokens=1024", "--batch=4", "--forms=plain,blockwise", "--derivatives=2"]
    plain, blockwise = results(self_attention.main, *options)
    assert (plain["form"], blockwise["form"]) == ("plain", "blockwise")
    matrix = 4 * 1024**2 * 4 / 2**20
    block = self_attention.BLOCK_BYTES["cpu"] / 2**20
    assert 4 * matrix < plain["peak_mib"] < self_attention.MATRICES[2] * matrix
    assert 4 * block < blockwise["peak_mib"] < self_attention.BLOCKS * block
    for row in (plain, blockwise):
        assert (row["tokens"], row["derivatives"]) == (1024, 2)
        assert row["ms"] > 0
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ  # restored


def problem(**case: Any) -> Any:
    """Return the reported problem of a case that cannot be measured, without starting a process."""
    sizes: dict[str, Any] = {"batch": 1, "heads": 1, "head_dim": 4, "projected_tokens": 2, "dtype": "float32"}
    measured = self_attention.measure(
        self_attention.Case(**case, **sizes), torch.device("cpu"), 1, torch.get_num_threads()
    )
    assert measured.keys() == {"problem"}
    return measured["problem"]


def test_attention_reports_why_a_case_has_no_result() -> None:
    options = ["--tokens=65536", "--forms=plain", "--derivatives=2", "--max-gib=0.5"]
    (refused,) = results(self_attention.main, *SMALL, *options)
    assert refused["problem"] == "not started: needs matrices of about 192 GiB, limit 0.5"
    assert "ms" not in refused
    assert problem(form="fused", derivatives=2, tokens=16) == "has no second derivative"


def test_attention_reports_running_out_of_memory() -> None:
    """Running out of address space is a result; other failures are errors."""
    assert problem(form="plain", derivatives=1, tokens=2**44) == "out of memory"
    assert self_attention.explain(torch.OutOfMemoryError("CUDA out of memory.")) == "out of memory"
    with pytest.raises(RuntimeError, match="another"):
        self_attention.explain(RuntimeError("another"))


def test_attention_implementations_are_equal() -> None:
    case = {"derivatives": 2, "tokens": 8, "batch": 2, "heads": 3, "head_dim": 4, "projected_tokens": 2}
    cases = {form: self_attention.Case(form=form, dtype="float32", **case) for form in self_attention.FORMS}
    inputs = self_attention.make_inputs(cases["plain"], torch.device("cpu"), tokens=8)
    out = {form: self_attention.attend(cases[form], inputs) for form in self_attention.FORMS}
    for form in ("fused", "blockwise", "linformer"):  # linformer without a projection equals plain
        torch.testing.assert_close(out[form], out["plain"])
    shortened = self_attention.attend(cases["linformer"], [*inputs, torch.eye(8)[:2]])
    k, v = inputs[1][:, :, :2], inputs[2][:, :, :2]
    torch.testing.assert_close(shortened, self_attention.attend(cases["plain"], [inputs[0], k, v]))


@pytest.mark.parametrize(
    ("option", "problem"), [("--forms=plain,flash", "unknown type 'flash'"), ("--derivatives=1,3", "choose from 1,2")]
)
def test_attention_refuses_invalid_options(option: str, problem: str) -> None:
    outcome = CliRunner().invoke(self_attention.main, [option, "--device=cpu"])
    assert outcome.exit_code == 2
    assert problem in outcome.output


GRID = ["--device=cpu", "--repeats=1", "--head-dim=4", "--heads=2"]


def test_windows_need_less_memory_than_the_whole_grid() -> None:
    (grid,) = results(grid_attention.main, *GRID, "--resolutions=48", "--forms=grid", "--derivatives=1")
    assert (grid["form"], grid["resolution"]) == ("grid", 48)
    matrix = 2 * 48**4 * 4 / 2**20  # attention weights of all tokens and both heads
    assert grid["peak_mib"] < matrix / 2
    assert grid["ms"] > 0


def test_grid_attention_measures_the_modules_of_the_networks() -> None:
    """The benchmark measures modules of the networks; each measurement starts with a small case."""
    sizes: dict[str, Any] = {"batch": 2, "heads": 2, "head_dim": 4, "window": 4, "landmarks": 16, "dtype": "float32"}
    for form in grid_attention.FORMS:
        case = grid_attention.GridCase(form=form, derivatives=2, resolution=8, **sizes)
        inputs, run = case.prepare(torch.device("cpu"))
        assert run().shape == inputs[0].shape == (2, 64, 8)
        self_attention.differentiate(case, inputs, run)  # every input has both derivatives
        assert len(inputs) == 3 + {"full": 1, "grid": 1, "axis": 2, "nystrom": 0}[form]
        assert case.small().matrix_gib() < 0.1


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--forms=full,sparse", "unknown type 'sparse'"),
        ("--derivatives=3", "choose from 1,2"),
        ("--window=10", "--window=10: does not divide the grid 16x16; possible: 16, 8, 4, 2"),
    ],
)
def test_grid_attention_refuses_invalid_options(option: str, problem: str) -> None:
    outcome = CliRunner().invoke(grid_attention.main, [option, "--device=cpu"])
    assert outcome.exit_code == 2
    assert problem in outcome.output


def test_grid_attention_reports_why_a_case_has_no_result() -> None:
    (row,) = results(grid_attention.main, *GRID, "--resolutions=256", "--forms=full", "--derivatives=1", "--max-gib=1")
    assert row["problem"] == "not started: needs matrices of about 128 GiB, limit 1"
