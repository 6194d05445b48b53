"""Files of earlier versions remain readable.

tests/data holds files of release 0.1.0, format version 1: a training state, the snapshot of the same step, the images
of this snapshot, and the dataset. Never regenerate them; add files of later versions. network-snapshot-v1-next.pkl is
the next step, computed before the order of random draws changed, without those draws: augmentation and noise.
The step runs no regulariser, because Adam of that release skipped parameters without a gradient.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torch_utils.checkpoint import Checkpoint
from torch_utils.images import to_uint8
from training import restore
from training.config import read_config
from training.dataset import ImageDataset
from training.snapshots.snapshot import load_network
from training.training_loop import Trainer

DATA = Path(__file__).parent / "data"


def new_trainer() -> Trainer:
    config = read_config(Checkpoint.read(DATA / "training-state-v1.pt")["config"])
    config = replace(config, data=replace(config.data, path=str(DATA / "shapes.zip")))
    return Trainer(config, ImageDataset(config.data), torch.device("cpu"))


def without_noise(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"noise_mode": "none"}


def test_the_files_have_the_format_version_of_their_name() -> None:
    for name in ("training-state-v1.pt", "network-snapshot-v1.pkl"):
        document = torch.load(DATA / name, weights_only=True)
        assert (document["version"], document["written_by"]) == (1, "0.1.0")


def test_a_version_1_snapshot_generates_the_stored_images() -> None:
    snapshot = load_network(DATA / "network-snapshot-v1.pkl")
    assert (snapshot.nimg, snapshot.config.data.path) == (104, "shapes.zip")
    assert snapshot.ada_p == pytest.approx(0.14)
    z = torch.randn(5, snapshot.G_ema.z_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = to_uint8(snapshot.G_ema(z, torch.eye(5), noise_mode="const"))
    grid = images.permute(2, 0, 3, 1).reshape(16, 5 * 16, 3).int()
    with Image.open(DATA / "network-snapshot-v1.png") as stored:
        expected = torch.from_numpy(np.array(stored)).int()
    assert expected.float().std() > 10
    assert (grid - expected).abs().max() <= 1


def test_training_resumes_from_version_1_as_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(DATA / "training-state-v1.pt", tmp_path / "training-state-000000.pt")
    trainer = new_trainer()
    assert restore.load_latest(trainer, tmp_path) == tmp_path / "training-state-000000.pt"
    assert capsys.readouterr().err == ""  # the dataset is recognised by its hash
    assert (trainer.state.nimg, trainer.state.step) == (104, 13)
    assert float(trainer.augment.p) == pytest.approx(0.14)
    before = {name: x.clone() for name, x in trainer.D.state_dict().items()}
    trainer.augment.stages = torch.nn.ModuleList()
    trainer.G.synthesis.register_forward_pre_hook(without_noise, with_kwargs=True)
    trainer.total_nimg = 112
    trainer.train()
    later = load_network(DATA / "network-snapshot-v1-next.pkl")
    assert trainer.state.nimg == later.nimg
    for ours, theirs in ((trainer.G, later.G), (trainer.D, later.D), (trainer.ema.module, later.G_ema)):
        expected = theirs.state_dict()
        for name, x in ours.state_dict().items():
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    moved = max((before[name] - x).abs().max().item() for name, x in trainer.D.state_dict().items())
    assert moved > 2e-3
