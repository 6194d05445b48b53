"""Any generator, discriminator, objective and augmentation train together; what makes no sense is refused."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import dataset_tool
import train
from dnnlib.config import override
from training import loss
from training.augment.pipe import Mode
from training.config import PRESETS, Environment, apply_options, resolve
from training.dataset import ImageDataset
from training.networks import DISCRIMINATORS, GENERATORS
from training.training_loop import Trainer

# What makes each family tiny, for images of 16x16.
G_SETTINGS: dict[str, dict[str, Any]] = {
    "styleformer": {"widths": (16, 8), "layers": (1, 1)},
    "stylegan2": {"channel_base": 128, "channel_max": 8},
    "styleformer-c": {"handover": 8, "widths": (16,), "layers": (1,), "channel_base": 128, "channel_max": 8},
    "transgan": {"widths": (16, 4), "layers": (1, 1), "num_heads": 2, "full_upto": 8, "window": 8},
}
D_SETTINGS: dict[str, dict[str, Any]] = {
    "stylegan2": {"channel_base": 128, "channel_max": 8},
    "styleformer": {"layers": (1, 1), "channel_base": 128, "channel_max": 8, "depth": 4},
    "transgan": {"widths": (8, 8), "layers": (1, 1), "local_layers": (0, 0), "num_heads": 2},
}
A_SETTINGS: dict[str, dict[str, Any]] = {"noaug": {}, "ada": {"pipe": "bgc"}, "fixed": {"p": 0.5}, "diffaug": {}}
OBJECTIVES = tuple(loss.OBJECTIVES)
MODES: tuple[str, ...] = get_args(Mode)


def matches() -> list[tuple[str, str, str, str]]:
    """Every generator with every discriminator and objective; augmentations take turns."""
    kinds = list(product(enumerate(GENERATORS), enumerate(DISCRIMINATORS), enumerate(OBJECTIVES)))
    return [(g, d, loss, MODES[(i + j + k) % len(MODES)]) for (i, g), (j, d), (k, loss) in kinds]


def test_every_pair_of_parts_occurs() -> None:
    parts = [*GENERATORS], [*DISCRIMINATORS], [*OBJECTIVES], [*MODES]
    found = matches()
    for a, b in combinations(range(4), 2):
        assert {(match[a], match[b]) for match in found} == set(product(parts[a], parts[b]))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scenes.zip"
    options = ["--source=shapes", f"--dest={path}", "--max-images=16", "--width=16", "--height=16", "--workers=1"]
    assert CliRunner().invoke(dataset_tool.main, options).exit_code == 0
    return path


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


@pytest.mark.parametrize("match", matches(), ids="-".join)
def test_all_that_can_be_combined_trains(scenes: Path, match: tuple[str, str, str, str]) -> None:
    """Two steps with every phase, labels and two micro-batches; the second one adjusts p."""
    g, d, objective, mode = match
    values: dict[str, Any] = {"generator.family": g, "discriminator.family": d, "loss.objective": objective}
    values |= {f"generator.{name}": value for name, value in G_SETTINGS[g].items()}
    values |= {f"discriminator.{name}": value for name, value in D_SETTINGS[d].items()}
    values |= {"augment.mode": mode} | {f"augment.{name}": value for name, value in A_SETTINGS[mode].items()}
    values |= {"data.path": str(scenes), "data.use_labels": True, "run.workers": 0}
    every_phase = {"loss.pl_weight": 1.0, "loss.pl_interval": 1, "loss.r1_interval": 1, "loss.style_mixing": 0.9}
    small = {"batch_size": 4, "run.batch_gpu": 2, "generator.z_dim": 8, "generator.w_dim": 8}
    preset = override(PRESETS["tiny"], {**every_phase, **small, "augment.ada_interval": 2, "run.tick_kimg": 0.004})
    config = apply_options(preset, values)
    dataset = ImageDataset(config.data)
    config = resolve(config, Environment(img_shape=dataset.img_shape, c_dim=dataset.c_dim))
    trainer = Trainer(config, dataset, torch.device("cpu"))

    expected = {"G_main", "D_main"}
    expected |= {"G_reg"} if trainer.G.num_ws > 1 else set()
    expected |= {"D_reg"} if objective in loss.LAZY_R1 else set()
    assert {phase.name for phase in trainer.phases} == expected
    before = flat(trainer.G), flat(trainer.D), flat(trainer.ema.module)
    trainer.total_nimg = 8
    trainer.train()  # stops with an error where anything is not finite
    for old, new in zip(before, (flat(trainer.G), flat(trainer.D), flat(trainer.ema.module)), strict=True):
        assert new.isfinite().all()
        assert (new != old).float().mean() > 0.5
    if mode == "ada":
        assert float(trainer.ada.count) == 0  # it has been asked
    assert float(trainer.augment.p) == {"noaug": 0.0, "fixed": 0.5, "diffaug": 1.0}.get(mode, float(trainer.augment.p))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gen=transgan", "--pl-weight=2"], "--pl-weight=2.0: this generator has no styles per layer"),
        (["--gen=transgan", "--mixing=0.9"], "--mixing=0.9: this generator has no styles per layer"),
        (["--loss=wgangp-eps", "--gamma=1"], "--gamma=1.0: wgangp-eps has a penalty of its own"),
        (
            ["--loss=wgangp-eps", "--set=loss.r1_interval=16"],
            f"--set loss.r1_interval=16: only --loss={' and '.join(loss.LAZY_R1)} have R1",
        ),
        (["--loss=relativistic", "--set=loss.g_batch_scale=2"], "--set loss.g_batch_scale=2: relativistic compares"),
        (["--loss=hinge", "--set=loss.drift_weight=0.1"], "--set loss.drift_weight=0.1: only --loss=wgangp-eps has it"),
        (["--aug=diffaug", "--target=0.6"], "--target=0.6: --aug=diffaug does not read it"),
        (["--aug=noaug", "--augpipe=bgc"], "--augpipe=bgc: --aug=noaug does not read it"),
        (
            ["--aug=fixed", "--p=0.5", "--set=augment.policy=color"],
            "--set augment.policy=color: mode 'fixed' takes no policy",
        ),
        (
            ["--gen=stylegan2", "--set=generator.ffn=true"],
            "--set generator.ffn=true: is not a setting of the family stylegan2",
        ),
        (["--disc=styleformer", "--d-arch=skip"], "--d-arch=skip: is not a setting of the family styleformer"),
        (["--cfg=transgan-cifar", "--gen=styleformer", "--pl-weight=2"], "--pl-weight=2.0: has no effect without"),
    ],
)
def test_what_makes_no_sense_is_refused(scenes: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={scenes}", "--device=cpu", "-n", *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
