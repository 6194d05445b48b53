"""Seeds, allocator and module table."""

import getpass
import itertools
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from small_families import small_discriminator, small_generator
from torch import Tensor, nn

from dnnlib.allocator import tune_allocator
from torch_utils import misc
from torch_utils.stats import Stats
from training.networks import DISCRIMINATORS, GENERATORS


def draws(seed: int, phase: str, position: int) -> tuple[float, ...]:
    misc.seed_step(seed, phase, position)
    return tuple(torch.randn(4).tolist())


def test_seed_step_repeats() -> None:
    assert draws(3, "D", 64) == draws(3, "D", 64)


def test_seed_step_separates_seeds_phases_and_positions() -> None:
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**40, 2**62, -1]
    phases = ["G", "D", "G_path", "D_r1"]
    positions = [0, 1, 2, 32, 33, 2**31, 2**32, 2**32 + 1]
    streams = {draws(*key) for key in itertools.product(seeds, phases, positions)}
    assert len(streams) == len(seeds) * len(phases) * len(positions)


def test_seeds_that_differ_in_high_bits_give_independent_numbers() -> None:
    """A generator that ignores the high bits would correlate perfectly."""
    samples = []
    for exponent in (32, 40, 48, 56, 62):
        misc.seed_step(2**exponent, "D", 0)
        samples.append(torch.randn(10_000))
    correlation = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    assert correlation.abs().max() < 5 / 10_000**0.5


def test_neighbouring_positions_give_independent_numbers() -> None:
    samples = []
    for position in range(20):
        misc.seed_step(0, "D", position)
        samples.append(torch.randn(10_000))
    correlation = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    assert correlation.abs().max() < 5 / 10_000**0.5


def test_derive_seed_fills_the_range_of_manual_seed() -> None:
    seeds = [misc.derive_seed("phase", i) for i in range(4000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):  # each bit is set in half of the seeds; 6 standard deviations are 190
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 2000) < 190
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)


def test_derive_seed_separates_its_parts() -> None:
    parts: list[tuple[int | str, ...]] = [(1, 23), (12, 3), (1, 2, 3), (3, 2, 1), (123,), ("123",), ("1", 23), ()]
    assert len({misc.derive_seed(*each) for each in parts}) == len(parts)


PAGE_FAULTS = """
import resource, sys
import torch
from dnnlib.allocator import tune_allocator

if sys.argv[1] == "tuned":
    tune_allocator()
torch.set_num_threads(1)
def step():
    return torch.ones(2**24) + 1  # two buffers of 64 MiB
for _ in range(8):  # the heap's layout settles
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_user_without_a_name_is_named_by_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "someone")
    misc.name_user()
    assert os.environ["LOGNAME"] == "someone"
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    misc.name_user()
    assert os.environ["LOGNAME"] == getpass.getuser() == "uid_54321"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is tuned")
def test_tune_allocator_keeps_big_buffers() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", PAGE_FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("tuned") < faults("plain") / 4  # a sixth: the heap grew once more, by a buffer


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_tune_allocator_does_nothing_on_other_systems(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    def refuse(name: str | None) -> None:
        raise AssertionError("the C library was opened")

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("ctypes.CDLL", refuse)
    tune_allocator()


def test_tune_allocator_does_nothing_with_another_libc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    tune_allocator()


class Net(nn.Module):
    """A module with a shared weight, a buffer, a tuple output and a submodule without tensors."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.act = nn.ReLU()
        self.head = nn.Linear(5, 5, bias=False)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.head.weight
        self.unused = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.tied(self.head(self.act(self.stem(x)))), c


def test_count_parameters_counts_shared_tensors_once() -> None:
    assert misc.count_parameters(Net()) == 3 * 5 + 5 + 5 * 5 + 2 + 1


def test_module_summary() -> None:
    net = Net()
    lines = misc.module_summary(net, [torch.zeros(4, 3), None]).splitlines()
    cells = {line.split("  ")[0].strip(): line.split()[-4:] for line in lines}

    total = next(line for line in lines if line.startswith("total")).split(maxsplit=3)
    assert total == ["total", "48", "7", "[4, 5]"]
    assert cells["stem (Linear)"] == ["20", "0", "[4,", "5]"]
    assert cells["head (Linear)"] == ["25", "0", "[4,", "5]"]
    assert cells["unused (Linear)"][-3:] == ["3", "0", "-"]
    assert "act (ReLU)" not in cells
    assert "tied (Linear)" not in cells  # the tensor is counted under "head"
    assert not any(part._forward_hooks for part in net.modules())


def test_the_summary_of_a_generator_shows_every_layer() -> None:
    """Affine layers, which usually share one matrix product, run one by one under the hooks of the summary."""
    G: Any = small_generator("styleformer").build()
    lines = misc.module_summary(G, [torch.zeros(1, G.z_dim), None]).splitlines()
    affine = [line for line in lines if "affine (" in line]
    assert len(affine) == len(G.synthesis.style_readers())
    assert not [line for line in affine if line.endswith("-")]


@pytest.mark.parametrize("later", [("a",), ("b", "c"), ("c", "b", "a")])
def test_statistics_may_be_added_in_any_combination(later: tuple[str, ...]) -> None:
    stats, expected = Stats(torch.device("cpu")), dict.fromkeys("abc", 0.0)
    for i, names in enumerate([("a", "b"), later, ("a", "b"), ("c",), later]):
        stats.add({name: torch.tensor([i + 1.0, 10.0]) for name in names})
        for name in names:
            expected[name] += i + 11
        if i == 2:
            saved = {name: row.clone() for name, row in stats.state_dict().items()}
            stats = Stats(torch.device("cpu"))
            stats.load_state_dict(saved)
    totals = {name: row[1].item() for name, row in stats.state_dict().items()}
    assert totals == expected


def test_module_summary_removes_its_hooks_when_forward_fails() -> None:
    net = Net()
    with pytest.raises(RuntimeError):
        misc.module_summary(net, [torch.zeros(4, 9), None])
    assert not any(part._forward_hooks for part in net.modules())


def test_product_rate_counts_two_operations_per_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by 8, 4, 2 and 1 seconds; the first product does not count."""
    times = iter([0, 8, 10, 14, 20, 22, 30, 31])
    monkeypatch.setattr(misc.time, "perf_counter", lambda: next(times))
    assert misc.product_rate(torch.float32, size=10) == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_is_finite_equals_isfinite_of_all_values(dtype: torch.dtype) -> None:
    """A sum would overflow for the largest finite values."""
    x = torch.arange(1000).to(dtype).reshape(10, 100)
    assert misc.is_finite(x)
    assert misc.is_finite(x[:0])
    assert misc.is_finite(torch.ones((), dtype=dtype))
    if dtype.is_floating_point:
        assert misc.is_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in ((0, 0), (5, 50), (9, 99)):
                odd = x.clone()
                odd[place] = value
                assert not misc.is_finite(odd)
                assert not odd.isfinite().all()


SMALL = [small_generator(family) for family in GENERATORS] + [small_discriminator(family) for family in DISCRIMINATORS]


@pytest.mark.parametrize("config", SMALL, ids=lambda config: type(config).__name__)
def test_networks_without_init_differ_in_saved_values_only(config: Any) -> None:
    """Values that a file does not hold, such as filters, are computed."""
    with misc.EmptyRandn():
        network = config.build()
    reference = config.build()
    network.load_state_dict(reference.state_dict())
    buffers = dict(network.named_buffers())
    assert buffers.keys() == dict(reference.named_buffers()).keys()
    assert all(torch.equal(buffers[name], x) for name, x in reference.named_buffers())
    assert all(torch.equal(x, y) for x, y in zip(network.parameters(), reference.parameters(), strict=True))
