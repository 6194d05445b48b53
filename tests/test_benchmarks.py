"""The benchmark scripts with tiny settings: lines of JSON with the documented keys."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_helpers import COMMON_KEYS, results
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import data
import generation
import loading
import networks
import operators
import penalties
import swd
import train_step

from torch_utils.ops import winograd
from training.config import PRESETS
from training.data_sources import labelled
from training.networks import DISCRIMINATORS, GENERATORS
from training.snapshots.snapshot import save_network

ROOT = Path(__file__).parent.parent
TINY_STEP = ["--preset=tiny", "--g_dict=16,16,16", "--batch=4", "--steps=1", "--warmup=0", "--device=cpu"]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not count operations, which takes longer than the steps."""
    monkeypatch.setattr(train_step, "gflop_per_image", lambda config, env: 1.0)


@pytest.mark.usefixtures("_uncounted")
def test_train_step_weights_phases_by_their_intervals() -> None:
    (row,) = results(train_step.main, *TINY_STEP, "--threads=1")
    assert row["threads"] == 1
    assert row["intervals"] == {"G_main": 1, "D_main": 1, "D_reg": 16}
    assert row["ms"].keys() == {"data", "G_main", "D_main", "D_reg", "ema"}
    ms = row["ms"]
    step = ms["data"] + ms["G_main"] + ms["D_main"] + ms["ema"] + ms["D_reg"] / 16
    assert row["step_ms"] == pytest.approx(step, abs=0.05)
    assert row["sec_per_kimg"] == pytest.approx(step / 4, abs=0.02)  # ms per image = s per 1000 images
    assert row["img_per_s"] == pytest.approx(1000 / row["sec_per_kimg"], rel=1e-3)
    assert row["peak_mib"] > 0
    assert (row["widths"], row["img_shape"]) == ([16, 16, 16], [3, 32, 32])


def uses_winograd() -> bool:
    x, weight = torch.empty(1, 256, 32, 32), torch.empty(256, 256, 3, 3)
    return winograd.is_profitable(x, weight, 1, is_cached=False)


@pytest.mark.usefixtures("_uncounted")
def test_train_step_runs_warmup_and_measured_steps_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, bool]] = []
    run_phase = train_step.Trainer.run_phase

    def spy(self: Any, phase: Any, img: torch.Tensor, c: torch.Tensor) -> None:
        calls.append((phase.name, len(img), uses_winograd()))
        run_phase(self, phase, img, c)

    monkeypatch.setattr(train_step.Trainer, "run_phase", spy)
    (row,) = results(train_step.main, *TINY_STEP, "--steps=2", "--warmup=1", "--modes=bf16+no-winograd")
    assert {batch for _, batch, _ in calls} == {4}
    names = [name for name, *_ in calls]
    assert {name: names.count(name) for name in names} == {"G_main": 3, "D_main": 3, "D_reg": 3}
    assert not any(used for _, _, used in calls)
    assert uses_winograd()  # restored
    assert (row["mode"], row["precision"], row["speedup"]) == ("bf16+no-winograd", "bf16", 1)


def test_train_step_counts_operations() -> None:
    """With a tiny generator, D dominates: 3 forward passes in G_main, 6 in D_main, 9 in every 16th D_reg.

    A backward pass for weights and inputs costs as much as two forward passes. The sum is slightly smaller, because
    G_main computes no weight gradients of D, and D_main no gradient for the input of the first layer.
    """
    (row,) = results(train_step.main, *TINY_STEP, "--steps=1", "--warmup=0")
    config = train_step.override(PRESETS["tiny"], {"generator.widths": (16, 16, 16), "generator.layers": (1, 1, 1)})
    forward = networks.gflop_per_image(config.discriminator)
    generator = networks.gflop_per_image(config.generator)
    least, most = 2 * forward + 3 * generator + 5 * forward, (3 + 6 + 9 / 16) * forward + 5 * generator
    assert least < row["gflop_per_image"] < most
    assert row["tflop_per_s"] == pytest.approx(row["gflop_per_image"] * row["img_per_s"] / 1000, abs=1e-3)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_of_grouped_convolutions_cost_like_the_forward(is_transposed: bool) -> None:
    """Three groups map 2 channels each to 2 channels: 4 products of 9 weights per position of the input, and group."""
    convolve = torch.conv_transpose2d if is_transposed else torch.conv2d
    x, weight = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(6, 2, 3, 3, requires_grad=True)
    y = convolve(x, weight, padding=1, groups=3).sum()
    with train_step.CountOperations() as counter:
        y.backward()
    forward = 2 * (2 * 25) * (3 * 4 * 9)
    assert counter.flop == 2 * forward


def test_train_step_requires_a_resolution_for_open_presets() -> None:
    outcome = CliRunner().invoke(train_step.main, ["--preset=auto", "--device=cpu"])
    assert outcome.exit_code == 2
    assert "--resolution" in outcome.output


@pytest.mark.slow
def test_train_step_measures_each_mode_in_a_separate_process() -> None:
    rows = results(train_step.main, *TINY_STEP, "--modes=plain,fp32,bf16+checkpoint")
    assert [row["mode"] for row in rows] == ["plain", "fp32", "bf16+checkpoint"]
    assert rows[0]["speedup"] == 1
    for row in rows:
        assert row["speedup"] == pytest.approx(rows[0]["sec_per_kimg"] / row["sec_per_kimg"], abs=0.01)


def test_train_step_refuses_unknown_modes() -> None:
    outcome = CliRunner().invoke(train_step.main, [*TINY_STEP, "--modes=fp32,fast"])
    assert outcome.exit_code == 2
    assert "'fast' is not one of fp32, tf32" in outcome.output


def test_generation_measures_each_batch_size(tmp_path: Path) -> None:
    config = PRESETS["tiny"]
    path = tmp_path / "network-snapshot-000001.pkl"
    save_network(path, config=config, G_ema=config.generator.build())
    options = ["--batch=1,9", "--seconds=0.01", "--device=cpu", "--modes=fp32,bf16"]
    rows = results(generation.main, f"--network={path}", *options)
    assert [(row["mode"], row["batch"]) for row in rows] == [("fp32", 1), ("fp32", 9), ("bf16", 1), ("bf16", 9)]
    for row in rows:
        assert row["network"] == path.name
        rounding = 0.05 * row["ms_per_batch"] + 0.005 * row["img_per_s"] + 0.001  # of both printed values
        assert row["img_per_s"] * row["ms_per_batch"] == pytest.approx(1000 * row["batch"], abs=rounding)


def test_networks_count_parameters_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["tiny"].generator
    monkeypatch.setattr(networks, "CONFIGS", {"tiny": config})
    (row,) = results(networks.main, "--batch=2", "--seconds=0.01")
    assert row["parameters"] == sum(p.numel() for p in config.build().parameters())
    assert row.keys() >= {"gflop_per_image", "forward_img_per_s", "forward_backward_img_per_s"}
    assert row["peak_mib"] * 2**20 > 8 * row["parameters"]  # parameters and gradients, 4 bytes each


def test_network_benchmark_covers_every_family() -> None:
    found = {type(config) for config in networks.CONFIGS.values()}
    assert found == {*GENERATORS.values(), *DISCRIMINATORS.values()}


def test_operators_reports_one_row_per_case() -> None:
    rows = results(operators.main, "--only=RGB pyramid up, 16 px", "--repeats=1")
    assert [row["case"] for row in rows] == ["RGB pyramid up, 16 px"]
    assert rows[0]["forward"].keys() == {"ms", "gb_per_s", "of_copy"}
    assert rows[0]["impl"] == "reference"


@pytest.mark.parametrize(
    ("case", "forward", "backward"),  # number of tensors of the input's size that are read or written
    [
        ("bias_act lrelu, 32 px", 2, 3),
        ("encoder LayerNorm, 64", 2, 3),
        ("encoder residual, 64", 3, 6),
        ("encoder QKV, 64", 2, 3),
    ],
)
def test_operators_counts_the_bytes_that_a_fused_kernel_moves(case: str, forward: int, backward: int) -> None:
    options = (f"--only={case}", "--repeats=1", "--dtype=float32,bfloat16", "--impl=reference")
    for row, size in zip(results(operators.main, *options), (4, 2), strict=True):
        tensor = math.prod(row["shape"]) * size / 1e9
        assert row["forward"]["gb_per_s"] * row["forward"]["ms"] / 1e3 == pytest.approx(forward * tensor, rel=1e-2)
        assert row["backward"]["gb_per_s"] * row["backward"]["ms"] / 1e3 == pytest.approx(backward * tensor, rel=1e-2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--impl=triton", "'triton' is not one of cuda, reference, compiled"),
        ("--impl=cuda", "the kernels need --device=cuda"),
        ("--dtype=float32,int8", "'int8' is not one of float32, float16, bfloat16"),
    ],
)
def test_operators_refuses_unknown_options(option: str, message: str) -> None:
    outcome = CliRunner().invoke(operators.main, [option])
    assert outcome.exit_code == 2
    assert message in outcome.output


def test_data_reports_throughput_and_speedup() -> None:
    (row,) = results(data.main, "--draw=32", "--side=16", "--workers=1", "--batch-size=8")
    assert (row["num_images"], row["img_shape"]) == (32, [3, 16, 16])
    assert row["tool_speedup"] > 0
    assert row["tool_speedup_cpu_seconds"] > 0
    assert row["img_per_s"].keys() == {
        "tool",
        "tool_plain",
        "decode",
        "decode_pillow",
        "batches",
        "batches_workers",
    }


def test_swd_reports_throughput() -> None:
    (row,) = results(swd.main, "--size=32", "--images=16", "--device=cpu")
    assert (row["size"], row["images"]) == (32, 16)
    assert row.keys() >= {"cut_images_per_second", "images_per_second", "peak_mib"}
    assert min(row["busy_seconds"], row["plain_busy_seconds"], row["speedup"]) > 0
    assert row["deviation"] < 1e-5


@pytest.mark.slow
def test_penalties_reports_times_and_an_unbiased_estimate() -> None:
    options = ["--discriminators=stylegan2", "--batch=4", "--rounds=1", "--device=cpu", "--train-steps=1"]
    step, *biases = results(penalties.main, *options, "--precisions=fp32", "--sigmas=0.001,0.01", "--draws=2")
    assert step["parameters"] == 278_177
    assert step["seconds"].keys() == step["ratio"].keys() == {"none", "exact", "estimate", "quarter"}
    assert [(row["steps"], row["sigma"]) for row in biases] == [(0, 0.001), (0, 0.01), (1, 0.001), (1, 0.01)]
    assert biases[0]["ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_bounds_prints_one_line_per_input_and_a_summary() -> None:
    command = [sys.executable, "benchmarks/bounds.py", "--each", "--only=pipes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *each, kind = [json.loads(line) for line in done.stdout.splitlines()]
    assert kind.keys() >= COMMON_KEYS | {"exit_codes", "seconds", "peak_mb"}
    assert kind["inputs"] == len(each) == 10
    assert {row["exit_code"] for row in each} == {0, 2}
    assert all("regular file" in row["last_line"] for row in each if row["exit_code"] == 2)


def test_loading_compares_with_zipfile_and_torch_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "LARGE", 50)
    zip_row, snapshot_row = results(loading.main, "--images=50", "--cfg=tiny")
    assert zip_row["num_images"] == 50
    assert zip_row["index_mib"] is not None
    assert zip_row["cpu_s"].keys() == {"plain", "first", "second"}
    assert snapshot_row["cpu_s"].keys() == {"sha256", "torch_load", "read", "load_network"}
    for row in (zip_row, snapshot_row):
        assert all(ratio > 0 for ratio in row["ratio"].values())
