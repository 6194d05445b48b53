"""Power-function averages: the tracked profiles, their files, and averages of other lengths rebuilt from the files."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_shapes, new_saver, small_config
from PIL import Image
from snapshot_helpers import make_snapshot
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import calc_metrics
import generate
import styleformer
from dnnlib.config import OPTIONS_FILE, ConfigError, UserError, to_json
from torch_utils.checkpoint import Checkpoint, digest, write_file
from training import restore
from training.config import read_config
from training.dataset import ImageDataset
from training.ema import EMAConfig
from training.power_ema import PowerEMA, gamma_of, sigma_of
from training.resume import Start
from training.snapshots import post_hoc
from training.snapshots.exchange import save_snapshot
from training.snapshots.snapshot import Snapshot, load_network, save_network
from training.training_loop import Trainer

SIGMAS = (0.05, 0.1)


class Row(nn.Module):
    """Module with one parameter of n numbers, and a buffer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.register_buffer("count", torch.zeros([]))


def exact_weights(ends: np.ndarray, sigma: float) -> np.ndarray:
    """Integrate the profile over each step of a run; `ends` are the images seen after the steps."""
    gamma = gamma_of(sigma)
    return np.diff((np.concatenate([[0.0], ends]) / ends[-1]) ** (gamma + 1))


def step_weights(batches: Sequence[int], sigmas: Sequence[float]) -> Iterator[tuple[int, dict[float, np.ndarray]]]:
    """Yield the images seen and the weights of all steps in each average, after every step.

    The k-th weights of the module are the k-th unit vector, so that the average is the vector of the steps' weights.
    """
    module, nimg = Row(len(batches)), 0
    averages = PowerEMA(module, sigmas)
    for k, batch in enumerate(batches):
        module.row.data.zero_()[k] = 1
        averages.update(nimg, batch)
        nimg += batch
        yield nimg, {sigma: x[0].numpy().copy() for sigma, x in averages.averages.items()}


@pytest.mark.parametrize(
    ("sigma", "gamma"), [(0.01, 97.0), (0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.83), (0.28, 0.1693)]
)
def test_widths_are_standard_deviations_of_profiles(sigma: float, gamma: float) -> None:
    assert gamma_of(sigma) == pytest.approx(gamma, rel=3e-3)
    assert sigma_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-12)
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = tau ** gamma_of(sigma)
    mean = (p * tau).sum() / p.sum()
    assert np.sqrt((p * (tau - mean) ** 2).sum() / p.sum()) == pytest.approx(sigma, rel=1e-6)


def test_inner_products_equal_integrals() -> None:
    tau = (np.arange(400_000) + 0.5) / 400_000
    for (a, t_a), (b, t_b) in itertools.product([(0.05, 0.7), (0.1, 1.0), (0.2, 0.4)], repeat=2):
        profiles = [(g + 1) * (tau / t) ** g / t * (tau < t) for g, t in ((gamma_of(a), t_a), (gamma_of(b), t_b))]
        integral = (profiles[0] * profiles[1]).mean()
        assert post_hoc.correlate(gamma_of(a), t_a, gamma_of(b), t_b) == pytest.approx(integral, rel=1e-4)


def test_an_average_equals_the_integral_of_its_profile() -> None:
    batches = [8] * 5 + [32] * 5 + [16] * 5
    *_, (nimg, averages) = step_weights(batches, (0.01, *SIGMAS, 0.28))
    assert nimg == sum(batches)
    for sigma, weights in averages.items():
        np.testing.assert_allclose(weights, exact_weights(np.cumsum(batches), sigma), atol=1e-14)


@pytest.mark.parametrize(("sigma", "percent"), [(0.05, 0), (0.10, 0), (0.15, 0.6), (0.20, 1.5), (0.01, 30)])
def test_predicted_residuals_of_twenty_snapshots(sigma: float, percent: float) -> None:
    nimgs = [1000 * k for k in range(1, 21)]
    x, residuals = post_hoc.solve([s for s in SIGMAS for _ in nimgs], nimgs * 2, [sigma], nimgs[-1])
    assert x.sum() == pytest.approx(1)
    assert residuals[0] * 100 == pytest.approx(percent, abs=0.06)


def test_weights_without_memory_err_by_the_residual() -> None:
    """The weights of the steps are unit vectors, so the error is the expected one of white noise, in float64."""
    steps, snapshots = 2000, 20
    batches, every = [32] * steps, steps // snapshots
    saved = [state for k, state in enumerate(step_weights(batches, SIGMAS), 1) if k % every == 0]
    nimgs = [nimg for nimg, _ in saved]
    rows = np.stack([averages[sigma] for sigma in SIGMAS for _, averages in saved])
    lengths = (0.01, 0.15, 0.2, 0.25)
    x, residuals = post_hoc.solve([s for s in SIGMAS for _ in saved], nimgs * 2, lengths, nimgs[-1])
    wanted = np.stack([exact_weights(np.cumsum(batches), sigma) for sigma in lengths])
    measured = np.linalg.norm(x.T @ rows - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(measured, residuals, rtol=0.02)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30, 3e38])
def test_float16_files_hold_weights_of_any_magnitude(magnitude: float) -> None:
    x = [torch.randn(50, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * magnitude, torch.zeros(3)]
    halves, exponents = post_hoc.to_half(x)
    restored = [half.double() * torch.exp2(e.double()) for half, e in zip(halves, exponents, strict=True)]
    error = (restored[0] - x[0]).double().abs()
    assert (error <= 2**-11 * x[0].double().abs().clamp(min=2**-14 * magnitude)).all()
    assert not restored[1].any()


@dataclass
class SmallRun:
    """Folder with the snapshot and the averages of a simulated run, and its weights after every step, as rows."""

    folder: Path
    rows: torch.Tensor  # float64 (steps, parameters)
    ends: np.ndarray  # images seen after the steps

    @property
    def path(self) -> Path:
        return self.folder / "network-snapshot-000020.pkl"

    @property
    def snapshot(self) -> Snapshot:
        return load_network(self.path)

    def average(self, sigma: float) -> torch.Tensor:
        return torch.from_numpy(exact_weights(self.ends, sigma)) @ self.rows


def simulate(folder: Path, data: Path, seed: int = 0) -> SmallRun:
    """Write the snapshot and the averages of a run of 400 steps; the weights of a step are fixed ones plus noise."""
    template = make_snapshot(folder / "network-snapshot-000000.pkl", data=str(data))
    (folder / OPTIONS_FILE).touch()
    G, steps, batch = template.G_ema, 400, 50
    fixed = parameters_to_vector(G.parameters()).double()
    noise = torch.randn(steps, len(fixed), generator=torch.Generator().manual_seed(seed)).double()
    rows = (fixed + 0.02 * noise).float().double()
    averages = PowerEMA(G, SIGMAS, run=f"run {seed}")
    for step, row in enumerate(rows):
        vector_to_parameters(row.float(), G.parameters())
        averages.update(step * batch, batch)
        nimg = (step + 1) * batch
        for sigma in SIGMAS if nimg % 1000 == 0 else ():
            content = post_hoc.capture(averages, sigma, nimg, batch)
            post_hoc.write(folder / post_hoc.file_name(sigma, nimg), content)
    save_network(folder / "network-snapshot-000020.pkl", config=template.config, G_ema=G, nimg=steps * batch)
    return SmallRun(folder, rows, np.arange(1, steps + 1) * float(batch))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "run"
    run.mkdir()
    return simulate(run, make_shapes(folder / "shapes.zip", 8, 24))


@pytest.fixture
def run_copy(small_run: SmallRun, tmp_path: Path) -> SmallRun:
    return replace(small_run, folder=Path(shutil.copytree(small_run.folder, tmp_path / "run")))


@pytest.mark.parametrize("sigma", [0.15, 0.2, 0.07])
def test_rebuilt_weights_equal_the_average_of_all_steps(small_run: SmallRun, sigma: float) -> None:
    plan = post_hoc.plan(small_run.snapshot, sigma)
    assert len(plan.files) == 40
    rebuilt = post_hoc.rebuild(small_run.snapshot, [plan])[0].G_ema
    expected = small_run.average(sigma)
    error = (parameters_to_vector(rebuilt.parameters()).double() - expected).norm()
    noise = 0.02 * np.linalg.norm(exact_weights(small_run.ends, sigma)) * len(expected) ** 0.5
    predicted = math.hypot(plan.residual * noise, plan.rounding * float(expected.norm()))
    assert error <= 1.1 * predicted


def test_buffers_and_other_networks_are_the_snapshots(small_run: SmallRun) -> None:
    snapshot = small_run.snapshot
    rebuilt = post_hoc.rebuild(snapshot, [post_hoc.plan(snapshot, 0.15)])[0]
    assert digest(dict(rebuilt.G_ema.named_buffers())) == digest(dict(snapshot.G_ema.named_buffers()))
    assert not rebuilt.G_ema.training
    assert replace(rebuilt, G_ema=snapshot.G_ema) == snapshot


def test_a_tracked_length_is_read_from_its_file(small_run: SmallRun) -> None:
    plan = post_hoc.plan(small_run.snapshot, 0.1)
    assert [file.path.name for file in plan.files] == ["network-ema-0.100-000020.pt"]
    rebuilt = post_hoc.rebuild(small_run.snapshot, [plan])[0].G_ema
    error = parameters_to_vector(rebuilt.parameters()).double() - small_run.average(0.1)
    assert error.norm() <= 2**-11 * small_run.average(0.1).norm()


def test_files_after_the_snapshot_are_not_used(small_run: SmallRun) -> None:
    snapshot = replace(small_run.snapshot, nimg=12_000)
    assert max(file.nimg for file in post_hoc.plan(snapshot, 0.08).files) == 12_000
    with pytest.raises(UserError, match=r"no file network-ema-.* of kimg 12.345 .* give the snapshot of kimg 12$"):
        post_hoc.plan(replace(snapshot, nimg=12_345), 0.08)
    with pytest.raises(UserError, match=r"no files network-ema-.* up to kimg 0 are in its folder"):
        post_hoc.plan(replace(snapshot, nimg=0), 0.08)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (0.01, r"--ema=0.01: cannot be rebuilt from the 40 files .* residual 30 %.* the lengths 0.\d+ to 0.\d+; for"),
        (0.25, r"residual 6 %.*--set ema.profiles=0.05,0.1,0.25"),
        (0.5, r"--ema=0.5: must be from 0.001 to 0.28"),
        (-0.1, r"--ema=-0.1: must be from"),
    ],
)
def test_lengths_that_cannot_be_rebuilt_are_refused(small_run: SmallRun, sigma: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        post_hoc.plan(small_run.snapshot, sigma)


def test_amplified_rounding_is_refused() -> None:
    """A short length follows from 200 snapshots, but its large factors amplify the rounding of the files."""
    nimgs = [1000 * k for k in range(1, 201)]
    x, residuals = post_hoc.solve([s for s in SIGMAS for _ in nimgs], nimgs * 2, [0.01], nimgs[-1])
    assert residuals[0] < post_hoc.MAX_ERROR < post_hoc.rounding_of(x)[0]


def test_unusable_files_are_named(run_copy: SmallRun) -> None:
    newest, older = (run_copy.folder / post_hoc.file_name(0.05, nimg) for nimg in (20_000, 7000))

    def fails(message: str, sigma: float = 0.15) -> None:
        with pytest.raises(UserError, match=message):
            styleformer.load_network(run_copy.path, ema=sigma)

    intact = older.read_bytes()
    post_hoc.write(older, post_hoc.read(older) | {"run": "run 1"})
    fails(f"{older}: belongs to another run than network-ema-0.100-000020.pt")
    older.write_bytes(intact[:5000] + bytes([intact[5000] ^ 1]) + intact[5001:])
    fails(f"{older}: damaged")
    assert styleformer.load_network(run_copy.path, ema=0.05)  # does not need the file
    older.write_bytes(intact)
    content = post_hoc.read(newest)
    post_hoc.write(newest, content | {"run": "run 1"})
    fails(f"network-ema-0.100-000020.pt: belongs to another run than {newest.name}", 0.05)
    post_hoc.write(newest, content)
    name, x = next(iter(content["parameters"].items()))
    post_hoc.write(newest, content | {"parameters": content["parameters"] | {name: x[:1]}})
    fails(f"{newest}: contains the parameters of another network", 0.05)
    post_hoc.write(newest, content | {"parameters": content["parameters"] | {name: x * math.nan}})
    fails(f"{newest}: {name} contains non-finite values", 0.05)
    for key, value in {"sigma": 0, "nimg": -1, "parameters": {}, "exponents": 3, "run": None}.items():
        post_hoc.write(newest, content | {key: value})
        fails(f"{newest}: .* is not valid in an average")


def test_metrics_of_several_lengths_are_separate_lines(run_copy: SmallRun) -> None:
    arguments = ["--metrics=swd20", "--device=cpu", "--no-cache"]
    result = CliRunner().invoke(calc_metrics.main, [f"--network={run_copy.path}", "--ema=0.05,0.15", *arguments])
    assert result.exit_code == 0, result.output
    assert "EMA 0.05 from 1 file: residual 0.0 %" in result.stderr
    assert "EMA 0.15 from 40 files: residual 0.6 %" in result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["metric"] for record in records] == ["swd20_ema0.05", "swd20_ema0.15"]
    for record in records:
        assert json.loads((run_copy.folder / f"metric-{record['metric']}.jsonl").read_text()) == record
        assert {name.rpartition("_")[2] for name in record["results"]} == {record["metric"].rpartition("_")[2]}
    alone = styleformer.compute_metric(run_copy.path, "swd20", ema=0.15, device="cpu", use_cache=False)
    assert alone["results"] == records[1]["results"]
    assert sorted(run_copy.folder.glob("metric-*")) == [
        run_copy.folder / f"metric-{record['metric']}.jsonl" for record in records
    ]


def test_lengths_of_a_run_are_skipped_where_impossible(run_copy: SmallRun) -> None:
    for name in ("000000", "000001"):  # without images seen, and with two averages
        snapshot = replace(run_copy.snapshot, nimg=1000 * int(name))
        save_snapshot(run_copy.folder / "copy.pkl", snapshot)
        (run_copy.folder / "copy.pkl").replace(run_copy.folder / f"network-snapshot-{name}.pkl")
    options = [f"--network={run_copy.folder}", "--ema=0.05,0.15", "--metrics=swd20", "--device=cpu", "--no-cache"]
    result = CliRunner().invoke(calc_metrics.main, options)
    assert result.exit_code == 1
    assert re.findall(r"Warning: (--ema=\S+): cannot be rebuilt from the (\d+) files", result.stderr) == [
        ("--ema=0.15", "2")
    ]
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(record["kimg"], record["ema"]) for record in records] == [(1, 0.05), (20, 0.05), (20, 0.15)]
    path = run_copy.folder / post_hoc.file_name(0.05, 1000)
    content = post_hoc.read(path)
    bad = {name: x * math.nan for name, x in content["parameters"].items()}
    post_hoc.write(path, content | {"parameters": bad})
    result = CliRunner().invoke(calc_metrics.main, [*options, "--ema=0.05"])
    assert (result.exit_code, f"Warning: {path}: " in result.stderr) == (1, True), result.stderr
    assert json.loads(result.stdout)["kimg"] == 20


def test_images_of_a_length_are_those_of_the_rebuilt_network(small_run: SmallRun, tmp_path: Path) -> None:
    outdir = tmp_path / "out"
    options = [f"--network={small_run.path}", "--seeds=3", "--device=cpu", f"--outdir={outdir}", "--ema=0.15"]
    result = CliRunner().invoke(generate.main, options)
    assert result.exit_code == 0, result.output
    assert "EMA 0.15 from 40 files: residual 0.6 %" in result.stderr
    with Image.open(outdir / "seed0003.png") as file:
        made = np.asarray(file)
    snapshot = styleformer.load_network(small_run.path, ema=0.15)
    assert (made.transpose(2, 0, 1) == styleformer.generate(snapshot, [3])[0].numpy()).all()
    assert torch.equal(
        styleformer.generate(small_run.path, [3], ema=0.15, device="cpu"), styleformer.generate(snapshot, [3])
    )
    with pytest.raises(UserError, match=r"^ema=0.15: the network is already loaded; pass ema to load_network$"):
        styleformer.generate(snapshot, [3], ema=0.15)
    assert (made.transpose(2, 0, 1) != styleformer.generate(small_run.snapshot, [3])[0].numpy()).any()


@pytest.mark.parametrize(
    "command", ["images", "mix", "attention", "directions", "video", "neighbours", "project", "play"]
)
def test_every_command_refuses_unusable_lengths(small_run: SmallRun, tmp_path: Path, command: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "target.png")
    options = {
        "images": ["--seeds=0", f"--outdir={tmp_path}"],
        "mix": ["--rows=0", "--cols=1", f"--outdir={tmp_path}"],
        "attention": ["--seeds=0", "--query=4,4", f"--outdir={tmp_path}"],
        "directions": ["--seeds=0", f"--outdir={tmp_path}"],
        "neighbours": ["--seeds=0", f"--outdir={tmp_path}"],
        "video": ["--seeds=0,1", f"--output={tmp_path / 'video.gif'}"],
        "project": [f"--target={tmp_path / 'target.png'}", "--loss=pixels", f"--outdir={tmp_path}"],
        "play": ["--port=0"],
    }[command]
    arguments = [command, f"--network={small_run.path}", "--ema=0.01", "--device=cpu", *options]
    result = CliRunner().invoke(generate.main, arguments)
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"Error: --ema=0.01: cannot be rebuilt from the 40 files .*\n", result.stderr), result.stderr


def test_a_set_of_images_has_no_lengths(small_run: SmallRun) -> None:
    images = small_run.snapshot.config.data.path
    result = CliRunner().invoke(calc_metrics.main, [f"--network={images}", f"--data={images}", "--ema=0.1"])
    assert result.exit_code == 2
    assert "--ema: a set of images has no moving averages of weights; omit --ema" in result.stderr


def new_trainer(data: Path, profiles: tuple[float, ...] = SIGMAS) -> Trainer:
    config = small_config(data, ema__profiles=profiles, run__snapshot_ticks=1, run__tick_kimg=0.016)
    return Trainer(config, ImageDataset(config.data), torch.device("cpu"))


def test_a_run_writes_its_averages_and_resumes_them(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip)
    saver = new_saver(tmp_path, trainer.config)
    saver.save(trainer, snapshot=True)
    assert not post_hoc.list_files(tmp_path)  # no average at image 0
    trainer.total_nimg = 16
    trainer.train()
    saver.save(trainer, snapshot=True)
    saver.finish()
    snapshot = load_network(tmp_path / "network-snapshot-000000.pkl")
    for sigma in SIGMAS:
        rebuilt = post_hoc.rebuild(snapshot, [post_hoc.plan(snapshot, sigma)])[0]
        expected = trainer.profiles.averages[sigma]
        for x, y in zip(rebuilt.G_ema.parameters(), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-11, atol=2**-25 * float(y.abs().max()))

    stale = tmp_path / post_hoc.file_name(0.05, 1000)
    copied = tmp_path / "copy of network-ema-0.050-000001.pt"
    for path in (stale, copied):
        path.touch()
    fewer = new_trainer(shapes_zip, (0.1,))
    restore.load_latest(fewer, tmp_path)
    restore.discard_later(tmp_path, fewer.state.nimg)
    assert not stale.exists()
    assert copied.exists()
    assert len(post_hoc.list_files(tmp_path)) == len(SIGMAS)
    assert fewer.profiles.run == trainer.profiles.run
    assert digest(fewer.profiles.averages[0.1]) == digest(trainer.profiles.averages[0.1])
    with pytest.raises(ValueError, match=r"no average of the length 0.2"):
        PowerEMA(trainer.G, (0.2,)).load_state_dict(trainer.profiles.state_dict())


def test_states_without_averages_resume_without_averages(shapes_zip: Path, tmp_path: Path) -> None:
    trainer = new_trainer(shapes_zip, ())
    trainer.save(tmp_path / "new.pt")
    payload = Checkpoint.read(tmp_path / "new.pt")
    old = {name: part for name, part in payload["parts"].items() if name not in ("profiles", "logit_means")}
    write_file(tmp_path / "old.pt", "training-state", 3, payload | {"parts": old})
    assert new_trainer(shapes_zip, ()).resume(tmp_path / "old.pt")
    options = to_json(trainer.config)
    del options["ema"]["profiles"]
    assert read_config(options) == trainer.config


def test_a_run_starts_with_the_weights_of_its_snapshot(shapes_zip: Path, tmp_path: Path) -> None:
    source, trainer = new_trainer(shapes_zip), new_trainer(shapes_zip)
    with torch.no_grad():
        for x in source.G.parameters():
            x.add_(1)
    config = source.config
    save_network(tmp_path / "source.pkl", config=config, G=source.G, D=source.D, G_ema=source.ema.module)
    run = trainer.profiles.run
    restore.load(trainer, Start(config=config, outdir=None, snapshot=str(tmp_path / "source.pkl")))
    for averages in trainer.profiles.averages.values():
        assert digest(averages) == digest(list(source.G.parameters()))
    assert trainer.profiles.run != run


@pytest.mark.parametrize("profiles", [(0.0,), (0.05, 0.3), (0.1, 0.1), (0.0501,)])
def test_unusable_profiles_are_refused(profiles: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="profiles"):
        EMAConfig(profiles=profiles)
