"""Tensor files: round trip, corruption, foreign pickles, failed writes."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnnlib.config import UserError
from torch_utils.checkpoint import Checkpoint, digest, read_file, write_file

PAYLOAD: dict[str, Any] = {
    "x": torch.arange(6.0).reshape(2, 3),
    "n": 3,
    "names": ["a", "b"],
    "half": torch.ones(2, dtype=torch.bfloat16),
}


def test_a_file_round_trips(tmp_path: Path) -> None:
    write_file(tmp_path / "f", "thing", 1, PAYLOAD)
    read = read_file(tmp_path / "f", "thing", 1, {})
    assert digest(read) == digest(PAYLOAD)
    assert torch.equal(read["x"], PAYLOAD["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_torch_load_reads_a_file_with_weights_only(tmp_path: Path) -> None:
    write_file(tmp_path / "f", "thing", 1, PAYLOAD)
    document = torch.load(tmp_path / "f", weights_only=True)
    assert document["format"] == "thing"


def test_the_digest_covers_values_types_shapes_and_order() -> None:
    x = torch.zeros(4)
    variants = [
        {"x": x},
        {"x": x.reshape(2, 2)},
        {"x": x.to(torch.int32)},
        {"y": x},
        {"x": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"x": [0, 0, 0, 0]},
        {"x": 0, "y": 1},
        {"y": 1, "x": 0},
        {"x": 0.0, "y": 1},
    ]
    assert len({digest(variant) for variant in variants}) == len(variants)


def test_a_flipped_bit_in_a_tensor_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, "thing", 1, {"x": torch.full([1000], 1.5)})
    data = bytearray(path.read_bytes())
    place = data.find(torch.full([4], 1.5).numpy().tobytes()) + 41
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"f: damaged .*checksum"):
        read_file(path, "thing", 1, {})


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, "thing", 1, PAYLOAD)
    data = path.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="f: "):
            read_file(path, "thing", 1, {})


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_foreign_pickles_are_refused_without_executing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"G": Hostile()}))
    torch.save({"G": Hostile()}, tmp_path / "zip.pkl")
    assert zipfile.is_zipfile(tmp_path / "zip.pkl")
    for name in ("plain.pkl", "zip.pkl"):
        with pytest.raises(UserError, match=name):
            read_file(tmp_path / name, "thing", 1, {})
    assert not (tmp_path / "pwned").exists()


def test_other_formats_and_newer_versions_are_named(tmp_path: Path) -> None:
    write_file(tmp_path / "f", "thing", 2, PAYLOAD)
    with pytest.raises(UserError, match="this is a thing file, expected a network-snapshot file"):
        read_file(tmp_path / "f", "network-snapshot", 2, {})
    with pytest.raises(UserError, match="format version 2 was written by release"):
        read_file(tmp_path / "f", "thing", 1, {})
    torch.save({"some": "file"}, tmp_path / "g")
    with pytest.raises(UserError, match="that holds some, which is not supported"):
        read_file(tmp_path / "g", "thing", 1, {})
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "h", "thing", 1, {})


def test_older_versions_are_migrated_step_by_step(tmp_path: Path) -> None:
    write_file(tmp_path / "f", "thing", 1, {"n": 1})
    migrations = {1: lambda payload: payload | {"m": 2}, 2: lambda payload: {"n": payload["n"] + payload["m"]}}
    assert read_file(tmp_path / "f", "thing", 3, migrations) == {"n": 3}


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_file(path, "thing", 1, {"n": 1})

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        write_file(path, "thing", 1, {"n": 2})
    assert read_file(path, "thing", 1, {}) == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_checkpoint_restores_modules_and_optimizers(tmp_path: Path) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    model, optimizer = parts()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    Checkpoint(model=model, optimizer=optimizer).save(tmp_path / "f", note="hello")
    other, other_optimizer = parts()
    payload = Checkpoint(model=other, optimizer=other_optimizer).load(tmp_path / "f")
    assert payload["note"] == "hello"
    assert digest([other.state_dict(), other_optimizer.state_dict()]) == digest(
        [model.state_dict(), optimizer.state_dict()]
    )
    with pytest.raises(UserError, match=r"contains the parts \['model', 'optimizer'\], expected \['model'\]"):
        Checkpoint(model=other).load(tmp_path / "f")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("change", ["to contiguous", "to channels last"])
def test_a_fused_optimizer_continues_in_another_memory_layout(tmp_path: Path, device: str, change: str) -> None:
    """Moments are permuted with their parameters: the next step equals a step without the layout change."""
    there, here = torch.channels_last, torch.contiguous_format
    if change == "to channels last":
        there, here = here, there

    def parts(layout: torch.memory_format) -> tuple[nn.Conv2d, torch.optim.Optimizer]:
        model = nn.Conv2d(4, 8, 3).to(device).to(memory_format=layout)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Conv2d, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            p.grad = torch.empty_like(p).copy_(gradient)
        optimizer.step()

    same_layout, changes = parts(there), parts(here)
    assert same_layout[0].weight.stride() != changes[0].weight.stride()
    for seed in range(3):
        step(*same_layout, seed)
    Checkpoint(model=same_layout[0], optimizer=same_layout[1]).save(tmp_path / "f")
    Checkpoint(model=changes[0], optimizer=changes[1]).load(tmp_path / "f")
    step(*same_layout, 3)
    step(*changes, 3)
    torch.testing.assert_close(changes[0].weight, same_layout[0].weight, rtol=1e-6, atol=1e-6)


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(optimizer=optimizer)
    payload = checkpoint.capture()
    payload["parts"]["optimizer"]["state"][1]["exp_avg"] = torch.zeros(1)
    Checkpoint.write(tmp_path / "f", payload)
    with pytest.raises(UserError, match=r"optimizer does not match .*exp_avg has shape \(1,\), its parameter \(2,\)"):
        checkpoint.load(tmp_path / "f")
