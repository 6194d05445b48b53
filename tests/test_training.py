"""Training loop: exact resume, independence of the number of processes, bookkeeping."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PATIENCE, OnTick, all_captured, small_config
from training_helpers import every_phase_config, new_trainer, saved_state, train_and_save, train_steps

from dnnlib.config import OPTIONS_FILE, ConfigError, UserError, override
from dnnlib.util import PARTIAL
from torch_utils import graphs
from torch_utils.checkpoint import Checkpoint, digest, write_file
from torch_utils.graphs import CaptureError, no_synchronisation
from torch_utils.stats import Stat
from training import hooks, restore, training_loop
from training.config import PRESETS, Environment, TrainConfig, resolve
from training.dataset import ImageDataset
from training.loss import LossTerms
from training.phases import Phase, Updater
from training.training_loop import Tick, Trainer, TrainState, set_arithmetic


def test_resuming_is_bit_exact(shapes_zip: Path, tmp_path: Path) -> None:
    """One grid has plain attention, the other Linformer."""
    linformer = {"generator__linformer": True, "generator__linformer_min_tokens": 256}
    config = every_phase_config(shapes_zip, data__use_labels=True, data__mirror=True, **linformer)
    straight, first = new_trainer(config), new_trainer(config)
    for trainer in (straight, first):
        trainer.augment.p.fill_(0.5)
    train_steps(straight, 10)

    train_steps(first, 5)
    first.save(tmp_path / "training-state-000000.pt")
    second = new_trainer(config)
    second.resume(tmp_path / "training-state-000000.pt")
    assert second.state.nimg == 40
    train_steps(second, 5)
    assert digest(saved_state(second)) == digest(saved_state(straight))
    assert float(straight.augment.p) not in (0, 0.5)  # the controller has adjusted p


def test_a_state_of_version_1_resumes_with_fused_optimizers(shapes_zip: Path, tmp_path: Path) -> None:
    config = override(every_phase_config(shapes_zip), {"ema.profiles": ()})
    straight = new_trainer(config)
    train_steps(straight, 2)
    straight.save(tmp_path / "new.pt")
    payload = Checkpoint.read(tmp_path / "new.pt")
    for name in ("g_optimizer", "d_optimizer"):
        payload["parts"][name]["param_groups"][0]["fused"] = None
    write_file(tmp_path / "old.pt", Checkpoint.FORMAT, 1, payload)
    again = new_trainer(config)
    again.resume(tmp_path / "old.pt")
    again.profiles.run = straight.profiles.run  # was not saved before version 4
    train_steps(straight, 2)
    train_steps(again, 2)
    assert digest(saved_state(again)) == digest(saved_state(straight))


def test_training_changes_every_parameter_and_running_mean(shapes_zip: Path) -> None:
    trainer = new_trainer(every_phase_config(shapes_zip))
    before = {name: x.clone() for net in (trainer.G, trainer.D) for name, x in net.named_parameters()}
    train_steps(trainer, 3)
    after = {name: x for net in (trainer.G, trainer.D) for name, x in net.named_parameters()}
    assert [name for name, x in before.items() if torch.equal(x, after[name])] == []
    assert trainer.pl_mean.value != 0
    assert trainer.G.mapping.w_avg.abs().sum() > 0
    assert torch.equal(trainer.ema.module.mapping.w_avg, trainer.G.mapping.w_avg)


def test_w_avg_is_updated_by_the_mean_of_the_global_batch(shapes_zip: Path) -> None:
    trainer = new_trainer(small_config(shapes_zip, batch_size=8, run__batch_gpu=2))
    seen: list[torch.Tensor] = []
    mapping = trainer.G.mapping.forward

    def spy(z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ws = mapping(z, c)
        seen.append(ws[:, 0].detach())
        return ws

    trainer.G.mapping.forward = spy
    data = trainer._batches()
    img, c = next(data)
    main_phase = trainer.phases[0]
    trainer.run_phase(main_phase, img, c)
    assert len(seen) == 4
    torch.testing.assert_close(trainer.G.mapping.w_avg, 0.005 * torch.cat(seen).mean(dim=0))


def test_a_phase_steps_by_its_weight_times_the_mean_gradient(shapes_zip: Path) -> None:
    trainer = new_trainer(small_config(shapes_zip, batch_size=8, run__batch_gpu=2))
    x = torch.nn.Parameter(torch.zeros(()))
    updater = Updater([x], torch.optim.SGD([x], lr=1.0, fused=True))
    phase = Phase("x", updater, lambda img, c: LossTerms(x * img.mean()), interval=3, weight=5)
    img = torch.arange(8.0).reshape(8, 1, 1, 1)
    trainer.run_phase(phase, img, torch.zeros(8, 0))
    assert x.item() == pytest.approx(-5 * img.mean().item())


def test_the_ema_update_receives_nimg_before_the_batch(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(small_config(shapes_zip))
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(trainer.ema, "update", lambda nimg, batch_size: calls.append((nimg, batch_size)))
    train_steps(trainer, 3)
    assert calls == [(0, 16), (16, 16), (32, 16)]


def make_infinite(phase: Phase, trainer: Trainer, step: int) -> None:
    """Make the loss of a phase infinite at one step; the statistics stay finite."""
    finite = phase.loss

    def loss(img: torch.Tensor, c: torch.Tensor) -> LossTerms:
        terms = finite(img, c)
        factor = float("inf") if trainer.state.step == step else 1.0
        return LossTerms(terms.loss * factor, terms.stats, terms.means)

    phase.loss = loss


def test_a_nonfinite_gradient_stops_the_run_before_saving(shapes_zip: Path) -> None:
    trainer = new_trainer(small_config(shapes_zip, run__tick_kimg=0.048))
    trainer.last_snapshot = Path("network-snapshot-000007.pkl")
    make_infinite(trainer.phases[1], trainer, step=1)
    ticks: list[int] = []
    trainer.hooks = [OnTick(lambda trainer, tick: ticks.append(trainer.state.nimg))]
    with pytest.raises(UserError, match=r"D_main .* at step 1 \(kimg 0\.0\).*--resume=network-snapshot-000007"):
        train_steps(trainer, 6)
    assert ticks == [0]
    assert all(x.isfinite().all() for x in trainer.D.state_dict().values())


def test_a_nonfinite_step_can_be_skipped(shapes_zip: Path) -> None:
    """A skipped phase leaves everything bit-identical; the other phases continue."""
    config = every_phase_config(shapes_zip, run__nan="skip", run__tick_kimg=0.008)
    trainer, untouched = new_trainer(config), new_trainer(config)
    untouched.phases = untouched.phases[:2]  # the phases of G
    make_infinite(trainer.phases[2], trainer, step=0)
    trainer.phases = trainer.phases[:3]
    ticks: list[Tick] = []
    trainer.hooks = [OnTick(lambda trainer, tick: ticks.append(tick))]
    train_steps(untouched, 1)
    train_steps(trainer, 2)
    assert [tick.values.get("Skipped/D_main") for tick in ticks] == [None, 1.0, None]
    for name, counts in (("Loss/scores/real", [0, 8]), ("Loss/scores/fake", [8, 8])):  # D_main, G_main
        assert [tick.stats[name].count for tick in ticks[1:]] == counts

    again = new_trainer(config)
    make_infinite(again.phases[2], again, step=0)
    again.phases = again.phases[:3]
    train_steps(again, 1)
    for part in ("G", "D", "pl_mean", "ada"):
        theirs = untouched.checkpoint.parts[part].state_dict()
        for name, x in again.checkpoint.parts[part].state_dict().items():
            if name != "mapping.w_avg":
                assert torch.equal(x, theirs[name]), f"{part} {name}"
    moments = again.d_updater.optimizer.state_dict()["state"]
    assert all(not row["exp_avg_sq"].any() and row["step"] == 0 for row in moments.values())


def test_only_the_networks_of_a_phase_collect_gradients(shapes_zip: Path) -> None:
    trainer = new_trainer(small_config(shapes_zip))
    img, c = next(trainer._batches())
    trainer.run_phase(trainer.phases[0], img, c)
    assert all((p.grad == 0).all() for p in trainer.D.parameters())
    assert any((p.grad != 0).any() for p in trainer.G.parameters())
    assert not any(p.requires_grad for net in (trainer.G, trainer.D) for p in net.parameters())


def test_frozen_layers_keep_their_weights(shapes_zip: Path) -> None:
    trainer = new_trainer(small_config(shapes_zip, freeze_layers=3))
    frozen = [p for layer in trainer.D.layers_from_image()[:3] for p in layer.parameters()]
    rest = [p for p in trainer.D.parameters() if all(p is not q for q in frozen)]
    before = [p.clone() for p in frozen]
    rest_before = [p.clone() for p in rest]
    train_steps(trainer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rest_before, rest, strict=True))


def config_to_share(data: Path) -> TrainConfig:
    """Return a configuration with a large epsilon in Adam.

    With the usual epsilon the first steps are the signs of the gradients, and rounding decides the signs near zero.
    """
    smooth = {"g_optimizer__eps": 1e-2, "d_optimizer__eps": 1e-2}
    return every_phase_config(data, data__use_labels=True, augment__mode="fixed", augment__p=0.7, **smooth)


def in_two_processes(folder: Path, data: Path) -> None:
    train_and_save(new_trainer(config_to_share(data)), 4, folder / "two.pt")


def test_two_processes_compute_the_same_as_one(shapes_zip: Path, together: Path) -> None:
    """Batch 8: two micro-batches of 4 in one process, one micro-batch of 4 in each of two processes."""
    alone = new_trainer(config_to_share(shapes_zip))
    train_steps(alone, 4)
    payload = Checkpoint.read(together / "test_training" / "two.pt")
    assert (payload["rank_mean"], payload["rank_std"], payload["count"]) == (0.5, 0.5, 4)

    one, two = saved_state(alone), payload["parts"]
    for part in ("G", "D", "G_ema", "ada", "pl_mean"):
        for name, x in one[part].items():
            torch.testing.assert_close(two[part][name], x, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
    assert two["state"]["nimg"] == one["state"]["nimg"] == 32


def test_nonfinite_weights_stop_the_run(shapes_zip: Path) -> None:
    trainer = new_trainer(small_config(shapes_zip, run__tick_kimg=0.001))
    with torch.no_grad():
        trainer.D.epilogue.out.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"G_main produced non-finite values at step 0"):
        train_steps(trainer, 2)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _give_impossible_values(path: Path) -> None:
    """Write impossible values with a correct checksum."""
    payload = Checkpoint.read(path)
    payload["parts"]["state"]["nimg"] = -1
    Checkpoint.write(path, payload)


def _give_other_networks(path: Path) -> None:
    payload = Checkpoint.read(path)
    payload["parts"]["G"]["mapping.w_avg"] = torch.zeros(7)
    Checkpoint.write(path, payload)


@pytest.mark.parametrize("damage", [_truncate, _give_impossible_values, _give_other_networks])
def test_an_unusable_state_is_skipped_for_the_previous_one(
    shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    config = small_config(shapes_zip)
    trainer = new_trainer(config)
    train_steps(trainer, 1)
    trainer.save(tmp_path / "training-state-000001.pt")
    expected = digest(trainer.capture()["parts"])
    train_steps(trainer, 1)
    newest = tmp_path / "training-state-000002.pt"
    trainer.save(newest)
    damage(newest)
    (tmp_path / "stats.jsonl").write_text(
        "".join(json.dumps({"Progress/kimg": kimg}) + "\n" for kimg in (0.0, 0.016, 0.032))
    )
    again = new_trainer(config)
    assert restore.load_latest(again, tmp_path).name == "training-state-000001.pt"
    restore.discard_later(tmp_path, again.state.nimg)
    assert "Warning: " + str(newest) in capsys.readouterr().err
    assert digest(again.capture()["parts"]) == expected
    lines = (tmp_path / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["Progress/kimg"] for line in lines] == [0.0, 0.016]
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no usable training state"):
        restore.load_latest(again, tmp_path)


def test_resuming_removes_only_partial_files_of_the_run(tmp_path: Path) -> None:
    names = ("training-state-000001.pt", "stats.jsonl", "metric-fid50k_full.jsonl", "fakes000001.png", "reals.png")
    own = [tmp_path / f".{name}.123{PARTIAL}" for name in (*names, "network-best-swd32.pkl", OPTIONS_FILE)]
    others = [".notes.2024", ".notes.2024.partial", ".backup.20241231", ".training-state-000001.pt.1", ".lock"]
    for path in (*own, *(tmp_path / name for name in others)):
        path.write_text("mine")
    (tmp_path / f".stats.jsonl.7{PARTIAL}").mkdir()
    (tmp_path / f".stats.jsonl.8{PARTIAL}" / "inside").mkdir(parents=True)
    restore.discard_later(tmp_path, 0)
    assert not any(path.exists() for path in own)
    kept = [*others, f".stats.jsonl.7{PARTIAL}", f".stats.jsonl.8{PARTIAL}"]
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(kept)


@pytest.mark.parametrize("name", ["elapsed", "step_seconds", "cpu_seconds"])
@pytest.mark.parametrize("seconds", [-5.0, float("nan"), float("inf"), 10**400, "long", None, [1]])
def test_a_state_with_an_invalid_time_is_accepted(name: str, seconds: object) -> None:
    state = TrainState()
    state.load_state_dict(
        {"nimg": 16, "step": 1, "elapsed": 7.0, "step_seconds": 6.0, "cpu_seconds": 5.0, name: seconds}
    )
    assert 0 <= getattr(state, name) < float("inf")
    others = {"elapsed": 7.0, "step_seconds": 6.0, "cpu_seconds": 5.0}
    del others[name]
    assert {other: getattr(state, other) for other in others} == others
    assert (state.nimg, state.step) == (16, 1)


class Clocks:
    """Replacement of the module `time` whose clocks stand still except in `spend`."""

    def __init__(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = wall, cpu

    def monotonic(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu

    def spend(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


def timed_trainer(data: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, list[list[float]]]:
    """Return a trainer with ticks of two steps, and a list to which every tick adds its times.

    A step takes 2 seconds (7 of the CPU), the statistics of a tick 1, its hooks 100 (1000 of the CPU). The times are
    those of the steps, of the CPU in the steps, and in total.
    """
    trainer = new_trainer(small_config(data, run__tick_kimg=0.032))
    trainer.phases = trainer.phases[:1]
    ticks: list[list[float]] = []

    def add_tick(trainer: Trainer, tick: Tick) -> None:
        ticks.append([tick.values[f"Timing/{name}_sec"] for name in ("steps", "steps_cpu", "total")])
        clocks.spend(wall=100, cpu=1000)

    def collect() -> dict[str, Stat]:
        clocks.spend(wall=1, cpu=0)
        return {}

    trainer.hooks = [OnTick(add_tick)]
    monkeypatch.setattr(training_loop, "time", clocks)
    monkeypatch.setattr(trainer, "run_phase", lambda *_: clocks.spend(wall=2, cpu=7))
    monkeypatch.setattr(trainer.stats, "collect", collect)
    return trainer, ticks


def test_the_time_of_the_steps_leaves_out_the_hooks(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, ticks = timed_trainer(shapes_zip, Clocks(wall=5000, cpu=30), monkeypatch)
    train_steps(trainer, 6)
    # Collecting the statistics waits for the last step, so it counts.
    assert [steps for steps, _, _ in ticks] == [0, 2 * 2 + 1, 4 * 2 + 2, 6 * 2 + 3]
    assert [cpu for _, cpu, _ in ticks] == [0, 2 * 7, 4 * 7, 6 * 7]
    assert [total for _, _, total in ticks] == [0, 100 + 2 * 2, 200 + 4 * 2 + 1, 300 + 6 * 2 + 2]


def test_the_time_of_the_steps_continues_when_resuming(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = timed_trainer(shapes_zip, Clocks(wall=5000, cpu=30), monkeypatch)
    train_steps(first, 2)
    first.save(tmp_path / "training-state-000000.pt")
    second, ticks = timed_trainer(shapes_zip, Clocks(wall=70, cpu=3), monkeypatch)  # clocks of another process
    second.resume(tmp_path / "training-state-000000.pt")
    train_steps(second, 2)
    assert [tick[:2] for tick in ticks] == [[4 * 2 + 2, 4 * 7]]


def test_a_state_without_the_time_of_the_steps_starts_at_0(shapes_zip: Path, tmp_path: Path) -> None:
    """States of earlier releases hold the total time only."""
    config = small_config(shapes_zip)
    trainer = new_trainer(config)
    trainer.state.elapsed = 9.0
    trainer.save(tmp_path / "new.pt")
    payload = Checkpoint.read(tmp_path / "new.pt")
    for name in ("step_seconds", "cpu_seconds"):
        del payload["parts"]["state"][name]
    Checkpoint.write(tmp_path / "old.pt", payload)
    again = new_trainer(config)
    again.state.step_seconds, again.state.cpu_seconds = 3.0, 2.0
    again.resume(tmp_path / "old.pt")
    assert again.state == TrainState(elapsed=9.0)


def test_times_do_not_depend_on_the_system_clock(shapes_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(small_config(shapes_zip, run__tick_kimg=0.016))
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    times: list[float] = []

    def record_times(trainer: Trainer, tick: Tick) -> None:
        times.extend(value for name, value in tick.values.items() if name.startswith("Timing/"))

    trainer.hooks = [OnTick(record_times)]
    train_steps(trainer, 2)
    assert len(times) > 10
    assert all(0 <= value < PATIENCE * 1e6 for value in times)  # the largest unit is milliseconds


def test_phases_that_cannot_be_captured_train_without_graphs(
    shapes_zip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only D_reg can be captured here; gradients accumulated during a failed capture are discarded."""

    class Recorder:
        def __init__(self, accumulate: Any, *inputs: torch.Tensor, pool: Any) -> None:
            self.accumulate = accumulate
            accumulate(*inputs)
            if accumulate.args[0].name != "D_reg":
                raise CaptureError("called a synchronizing CUDA operation")

        def __call__(self, *inputs: torch.Tensor) -> Any:
            return self.accumulate(*inputs)

    monkeypatch.setattr(graphs, "Captured", Recorder)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))  # missing in builds without CUDA
    config = every_phase_config(shapes_zip)
    plain = new_trainer(config)
    recorded = new_trainer(override(config, {"run.graphs": True}))
    for trainer in (plain, recorded):
        train_steps(trainer, 2)
    assert recorded.graphs is not None
    assert recorded.graphs.refused == {"G_main", "G_reg", "D_main"}
    for network in ("G", "D"):
        for ours, theirs in zip(
            getattr(recorded, network).parameters(), getattr(plain, network).parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cannot be captured" in line]
    assert [line.split()[1] for line in warnings] == ["G_main", "G_reg", "D_main"]


@pytest.mark.gpu
@pytest.mark.parametrize("use_graphs", [False, True])
def test_no_phase_waits_for_the_gpu(shapes_zip: Path, use_graphs: bool) -> None:
    config = every_phase_config(shapes_zip, run__graphs=use_graphs)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cuda"))
    data = trainer._batches()
    batch = next(data)
    for phase in trainer.phases:  # the first call may fill caches
        trainer.run_phase(phase, *batch)
    with no_synchronisation():
        for phase in trainer.phases:
            trainer.run_phase(phase, *batch)
        trainer.ema.update(8, 8)
        trainer.ada.update(4, 8)
    assert all_captured(trainer) == use_graphs


@pytest.mark.gpu
def test_the_gpu_computes_the_same_as_the_cpu(shapes_zip: Path) -> None:
    """Compare R1 and images for the same weights and inputs."""
    config = small_config(shapes_zip, augment__mode="noaug")
    on_cpu = new_trainer(config)
    on_gpu = Trainer(config, ImageDataset(config.data), torch.device("cuda"))
    on_gpu.G.load_state_dict(on_cpu.G.state_dict())
    on_gpu.D.load_state_dict(on_cpu.D.state_dict())
    img, c = next(on_cpu._batches())
    penalties = []
    for trainer in (on_cpu, on_gpu):
        phase = next(phase for phase in trainer.phases if phase.name == "D_reg")
        penalties.append(phase.loss(img.to(trainer.device), c.to(trainer.device)).loss.cpu())
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-4, atol=1e-6)
    z = torch.randn(4, on_cpu.G.z_dim)
    ours, theirs = on_gpu.G(z.cuda(), None).cpu(), on_cpu.G(z, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("use_graphs", [False, True])
def test_training_on_the_gpu_saves_and_resumes(shapes_zip: Path, tmp_path: Path, use_graphs: bool) -> None:
    config = every_phase_config(shapes_zip, data__use_labels=True, run__graphs=use_graphs)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cuda"))
    train_steps(trainer, 4)
    trainer.save(tmp_path / "training-state-000000.pt")
    again = Trainer(config, ImageDataset(config.data), torch.device("cuda"))
    again.resume(tmp_path / "training-state-000000.pt")
    assert digest(saved_state(again)) == digest(saved_state(trainer))
    train_steps(again, 1)
    assert all_captured(trainer) == use_graphs
    assert all(x.isfinite().all() for x in again.G.state_dict().values())


@pytest.fixture
def _restore_arithmetic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_restore_arithmetic")
def test_every_phase_has_deterministic_algorithms(shapes_zip: Path) -> None:
    """CPU only; test_resuming_on_the_gpu_is_exact_if_deterministic tests the GPU."""
    config = every_phase_config(shapes_zip, run__deterministic=True)
    set_arithmetic(config)
    assert torch.are_deterministic_algorithms_enabled()
    train_steps(new_trainer(config), 1)
    set_arithmetic(every_phase_config(shapes_zip))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("pipe", "is_refused"), [("bgc", True), ("filter", True), ("blit", True), ("color", False)])
def test_nondeterministic_pipes_are_refused_on_a_gpu(pipe: str, is_refused: bool) -> None:
    config = override(PRESETS["tiny"], {"augment.pipe": pipe, "run.deterministic": True})
    env = Environment(img_shape=(3, 32, 32), c_dim=0, on_gpu=True)
    with pytest.raises(ConfigError, match=r"run\.deterministic") if is_refused else nullcontext():
        resolve(config, env)
    resolve(replace(config, augment=replace(config.augment, mode="noaug")), env)


@pytest.mark.gpu
@pytest.mark.usefixtures("_restore_arithmetic")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_on_the_gpu_is_exact_if_deterministic(shapes_zip: Path, tmp_path: Path, precision: str) -> None:
    config = every_phase_config(shapes_zip, run__deterministic=True, precision=precision, augment__pipe="color")
    set_arithmetic(config)

    def trainer() -> Trainer:
        return Trainer(config, ImageDataset(config.data), torch.device("cuda"))

    straight, first, second = trainer(), trainer(), trainer()
    train_steps(straight, 10)
    train_steps(first, 5)
    first.save(tmp_path / "state.pt")
    second.resume(tmp_path / "state.pt")
    train_steps(second, 5)
    assert digest(saved_state(second)) == digest(saved_state(straight))


def test_the_remaining_time_includes_metrics_and_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1000.0, 1060.0, 1060.0])
    monkeypatch.setattr(hooks.time, "monotonic", lambda: next(clock))
    trainer: Any = SimpleNamespace(total_nimg=10_000, state=TrainState(nimg=100))
    progress = hooks.TickLine()
    progress.on_step(trainer)  # first step
    stats = {name: Stat(mean=-1.2345, std=0.0, count=8) for name in ("Loss/G/loss", "Loss/D/loss", "Loss/signs/real")}
    values = {"Timing/sec_per_kimg": 20.0, "Progress/augment": 0.12, "Resources/cpu_mem_gb": 12.34}
    tick = Tick(1234, 1233, is_first=False, is_last=False, stats=stats, values=values)
    trainer.state = TrainState(nimg=1100, elapsed=3600.0)
    progress.on_tick(trainer, tick)  # 1 kimg took 60 seconds, including 20 seconds of training
    line = capsys.readouterr().out
    assert "kimg 1.1 " in line
    assert "left 8m 54s" in line
    assert "sec/kimg 20.00" in line
    assert "p 0.120  mem 12.3 GB" in line
    assert len(line.rstrip()) <= 120
