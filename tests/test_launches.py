"""A training step on fake CUDA tensors: no phase synchronises, mixes devices, or launches more kernels than before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fake
import launches

from dnnlib.config import UserError, override
from training.augment.pipe import AugmentConfig, AugmentPipe
from training.config import PRESETS, Environment, resolve

Count = Callable[[str], dict[str, dict[str, Any]]]
SLOW = [
    "auto-64",
    "transgan-cifar",
    "styleformer-c256",
    "church128-l",
    "fp16-bgcfnc",
    "r3gan-cifar",
    "pairs",
    "slicing",
]
CASES = [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in launches.CASES]


@pytest.fixture(scope="module")
def count(stub_gpu: Executor) -> Count:
    """Return the rows of launches.py for a case, by phase."""

    @cache
    def count(case: str) -> dict[str, dict[str, Any]]:
        return {row["phase"]: row for row in stub_gpu.submit(launches.count_launches, case).result()}

    return count


@pytest.mark.parametrize("case", CASES)
def test_no_phase_waits_for_the_gpu_or_mixes_devices(case: str, count: Count) -> None:
    rows, config = count(case), launches.CASES[case].config
    assert {phase: row["problem"] for phase, row in rows.items() if "problem" in row} == {}
    assert {"G_main", "D_main", "averages"} <= rows.keys()
    assert ("D_reg" in rows) == (config.loss.r1_interval is not None)
    assert ("G_reg" in rows) == (config.loss.pl_weight > 0)


# Launches and MiB. Lower a number here when a change reduces it.
COUNTS = {
    "readme": {"G_main": (518, 1899), "D_main": (309, 3815), "D_reg": (322, 4304), "averages": (12, 31)},
    "cifar-large": {"G_main": (548, 23110), "D_main": (319, 12897), "D_reg": (324, 6937), "averages": (12, 420)},
}


@pytest.mark.parametrize(("case", "phase"), [(case, phase) for case in COUNTS for phase in COUNTS[case]])
def test_launches_and_traffic_of_a_phase_do_not_grow(case: str, phase: str, count: Count) -> None:
    """Counts may differ by 2 % between versions of PyTorch."""
    row = count(case)[phase]
    assert (row["launches"], row["mib"]) == pytest.approx(COUNTS[case][phase], rel=0.02), f"most: {row['most']}"


@pytest.mark.slow
def test_the_warp_of_large_images_uses_filters(count: Count) -> None:
    """On a GPU, images of up to 128 pixels are resampled by D only."""
    cases = ("styleformer-c256", "church128-l", "readme")
    large, medium, small = (count(case)["D_reg"]["most"].get("styleformer.upfirdn2d", 0) for case in cases)
    assert large > 40
    assert medium <= 20
    assert small <= 12


@pytest.mark.parametrize("case", [case for case in launches.CASES if case not in SLOW])
def test_no_convolution_uses_an_image_as_its_filter(case: str, count: Count) -> None:
    """The second derivatives of F.conv2d use images as filters."""
    assert all(row["largest_filter"] <= 12 for row in count(case).values())


def synchronize(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x


MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda x: x * x.sum().item(), "DataDependentOutputException: aten._local_scalar_dense"),
    "if": (lambda x: x if x.sum() > 0 else -x, "DataDependentOutputException: aten._local_scalar_dense"),
    "nonzero": (lambda x: x + x.nonzero().sum(), "DynamicOutputShapeException: aten.nonzero"),
    "download": (lambda x: x.cpu().to(x.device), "HostError: aten._to_copy.default between cpu and cuda"),
    "upload": (lambda x: x * torch.ones(3, 1, 1).to(x.device), "HostError: aten._to_copy.default between cpu and cuda"),
    "copy": (lambda x: x.detach().copy_(torch.ones(3, 1, 1)), "HostError: aten.copy_.default between cpu and cuda"),
    "synchronize": (synchronize, "AcceleratorError"),
    "index": (lambda x: x[torch.arange(len(x))], "HostError: aten.index.Tensor between cpu and cuda"),
    "constant": (lambda x: x * torch.tensor([0.5], device=x.device), "AcceleratorError"),
    "devices": (lambda x: x + torch.ones(3, 1, 1), "devices"),
}


def run_d_main(mistake: str | None, extra: int = 0) -> dict[str, Any]:
    """Count the launches of D_main of `tiny` with a faulty augmentation, or with additional launches."""
    env = Environment(img_shape=(3, 32, 32), c_dim=0, on_gpu=True)
    config = resolve(override(PRESETS["tiny"], {"run.graphs": False, "augment.mode": "noaug"}), env)
    with fake.fake_tensors():
        trainer = fake.new_trainer(config, env, launches.DEVICE)

        def augment(x: Tensor, values: list[Tensor] | None = None) -> Tensor:
            for _ in range(extra):
                x = x.cos()
            return MISTAKES[mistake][0](x) if mistake else x

        trainer.augment.forward = augment  # type: ignore[assignment]
        phase = next(phase for phase in trainer.phases if phase.name == "D_main")
        return launches.watch(trainer.run_phase, phase, *fake.new_batch(trainer))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_synchronisation_and_device_mixing_are_detected(mistake: str, stub_gpu: Executor) -> None:
    row = stub_gpu.submit(run_d_main, mistake).result()
    assert MISTAKES[mistake][1] in row.get("problem", "none")
    assert row["where"].startswith("training/loss.py:")  # the line that calls the augmentation


def test_launches_are_counted(stub_gpu: Executor) -> None:
    """Real and generated images are augmented together, without gradients with respect to the images."""
    few, many = (stub_gpu.submit(run_d_main, None, extra).result()["launches"] for extra in (0, 100))
    assert many - few == 100


def run_augment(pipe: str) -> dict[str, Any]:
    """Count the launches of one augmentation of a batch of 32x32 images."""
    with fake.fake_tensors():
        augment = AugmentPipe(AugmentConfig(pipe=pipe), (3, 32, 32)).to(launches.DEVICE)
        return launches.watch(augment, torch.empty(64, 3, 32, 32, device=launches.DEVICE))


@pytest.mark.parametrize(("pipe", "limit"), [("bgc", 38), ("bgcfnc", 73)])
def test_an_augmentation_takes_few_launches(pipe: str, limit: int, stub_gpu: Executor) -> None:
    row = stub_gpu.submit(run_augment, pipe).result()
    assert row["launches"] <= limit, row


def test_the_command_prints_the_counts(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        launches.main(["--cases=readme,huge"])
    assert stopped.value.code == 2
    assert "--cases: 'huge' is not one of readme, cifar-large" in capfd.readouterr().err


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with (
        pytest.raises(UserError, match=r"cuda_stub.cpp cannot be compiled: .*no-such-compiler.*install g\+\+"),
        launches.processes(),
    ):
        pass
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="built without CUDA"), launches.processes():
        pass
