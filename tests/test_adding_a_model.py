"""docs/adding_a_model.md: the family defined on the page trains, resumes and generates without further code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from small_families import PAGE, add_documented_family

import generate
import train
from training.networks import execution
from training.snapshots.snapshot import load_network


@pytest.fixture
def film(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Module defined on the page, with its family in the table."""
    return add_documented_family(monkeypatch)


def test_the_documented_family_trains_resumes_and_generates(film: ModuleType, shapes_zip: Path, tmp_path: Path) -> None:
    (line,) = re.findall(r"python train\.py (.*)", PAGE)
    command = [item for item in shlex.split(line) if not item.startswith(("--outdir", "--data"))]
    command += [
        f"--outdir={tmp_path}",
        f"--data={shapes_zip}",
        "--z-dim=16",
        "--set=generator.w_dim=16",
        "--set=discriminator.channel_max=8",
        "--tick=0.016",
    ]
    command += [
        "--pl-weight=2",
        "--set=loss.pl_interval=1",
        "--snap=1",
        "--metrics=none",
        "--device=cpu",
        "--workers=0",
    ]
    for kimg in ("0.016", "0.032"):
        result = CliRunner().invoke(train.main, [*command, f"--kimg={kimg}", "--resume=latest"])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    (run_dir,) = tmp_path.glob("0*")
    assert run_dir.name == "00000-shapes-tiny-film-gpus1-batch8"
    snapshot = run_dir / "network-snapshot-000000.pkl"
    loaded = load_network(snapshot)
    assert loaded.kimg == 0.032
    assert loaded.config.generator == film.FilmConfig(z_dim=16, w_dim=16, base=(8, 8), resolutions=2)

    arguments = [f"--network={snapshot}", "--seeds=0-1", f"--outdir={tmp_path / 'out'}", "--device=cpu"]
    result = CliRunner().invoke(generate.main, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "seed0001.png").exists()


def test_flags_of_other_families_are_refused(film: ModuleType, shapes_zip: Path) -> None:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={shapes_zip}", "--gen=film", "--depth=8", "-n"])
    assert result.exit_code == 2
    assert "--depth=8: is not a setting of the family film; supported by styleformer, styleformer-c" in result.stderr


def test_the_documented_network_supports_execution_modes(film: ModuleType) -> None:
    """Reduced precision, recomputation and the second derivative."""
    torch.manual_seed(0)
    G, z = film.FilmConfig(z_dim=8, w_dim=8, width=16).build(), torch.randn(2, 8)
    exact = G(z, None)
    with execution.using(reduced=torch.bfloat16):
        assert 0 < (G(z, None) - exact).std() < 0.05 * exact.std()
    with execution.using(recompute=True):
        assert torch.equal(G(z, None), exact)

    block = film.FilmBlock(film.FilmConfig(w_dim=2, width=2)).double()
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 3, 3), (1, 2)))
    assert torch.autograd.gradgradcheck(block, (x, w))


def test_the_documented_example_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 60
    assert all(len(line) <= 120 for line in lines)
