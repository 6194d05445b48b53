"""Every generator, discriminator, objective and augmentation train together; contradictory options are refused."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from small_families import small_train_config
from training_helpers import OBJECTIVES, flat_parameters, new_trainer, train_steps

import dataset_tool
import train
from training import loss
from training.augment.pipe import ADAPTIVE, Mode
from training.config import PRESETS, apply_options
from training.networks import DISCRIMINATORS, GENERATORS

A_SETTINGS: dict[str, dict[str, Any]] = {
    **{"noaug": {}, "ada": {"augment__pipe": "bgc"}},
    **{"fixed": {"augment__p": 0.5}, "diffaug": {}, "apa": {}},
}
MODES: tuple[str, ...] = get_args(Mode)
Match = tuple[str, str, str, str]  # generator, discriminator, objective, augmentation
REFUSED = {("wgangp-eps", "apa")}


def matches() -> list[Match]:
    """Return every generator with every discriminator and objective; augmentations alternate."""
    modes = {loss: [mode for mode in MODES if (loss, mode) not in REFUSED] for loss in OBJECTIVES}
    kinds = list(product(enumerate(GENERATORS), enumerate(DISCRIMINATORS), enumerate(OBJECTIVES)))
    return [(g, d, loss, modes[loss][(i + j + k) % len(modes[loss])]) for (i, g), (j, d), (k, loss) in kinds]


def pairs_of(match: Match) -> set[tuple[int, str, int, str]]:
    """Return the pairs of components that train together in a match."""
    return {(a, match[a], b, match[b]) for a, b in combinations(range(4), 2)}


def covering(found: list[Match]) -> list[Match]:
    """Return a few matches with all pairs of components; each adds as many new pairs as possible."""
    chosen: list[Match] = []
    missing = set().union(*map(pairs_of, found))
    while missing:
        chosen.append(max(found, key=lambda match: len(pairs_of(match) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


QUICK = covering(matches())


def test_every_pair_of_components_is_covered() -> None:
    parts = [*GENERATORS], [*DISCRIMINATORS], [*OBJECTIVES], [*MODES]
    for a, b in combinations(range(4), 2):
        assert {(match[a], match[b]) for match in QUICK} == set(product(parts[a], parts[b])) - REFUSED


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scenes.zip"
    options = ["--source=shapes", f"--dest={path}", "--max-images=16", "--width=16", "--height=16", "--workers=1"]
    assert CliRunner().invoke(dataset_tool.main, options).exit_code == 0
    return path


@pytest.mark.parametrize(
    "match",
    [pytest.param(match, marks=[] if match in QUICK else pytest.mark.slow) for match in matches()],
    ids="-".join,
)
def test_every_combination_trains(scenes: Path, match: Match) -> None:
    """Two steps with every phase, labels and two micro-batches; the second step adjusts p."""
    generator, discriminator, objective, mode = match
    changes = {"augment__mode": mode, "loss__objective": objective, "data__use_labels": True, **A_SETTINGS[mode]}
    trainer = new_trainer(small_train_config(scenes, generator, discriminator, **changes))
    expected = {"G_main", "D_main"}
    expected |= {"G_reg"} if trainer.G.num_ws > 1 else set()
    expected |= {"D_reg"} if objective in loss.LAZY_R1 else set()
    assert {phase.name for phase in trainer.phases} == expected
    networks = trainer.G, trainer.D, trainer.ema.module
    before = [flat_parameters(network) for network in networks]
    train_steps(trainer, 2)  # raises an error if any value is not finite
    for old, new in zip(before, map(flat_parameters, networks), strict=True):
        assert new.isfinite().all()
        assert (new != old).float().mean() > 0.5
    if mode in ADAPTIVE:
        assert float(trainer.ada.count) == 0  # the controller has adjusted p
    assert float(trainer.augment.p) == {"noaug": 0.0, "fixed": 0.5, "diffaug": 1.0}.get(mode, float(trainer.augment.p))


SMALL_R3GAN = ["--cfg=r3gan-cifar", "--g_dict=32,32,32", "--num_layers=1,1,1"]
SMALL_R3GAN += ["--set=discriminator.widths=32,32,32", "--set=discriminator.layers=1,1,1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gen=transgan", "--pl-weight=2"], "--pl-weight=2.0: this generator has no styles per layer"),
        (["--gen=transgan", "--mixing=0.9"], "--mixing=0.9: this generator has no styles per layer"),
        ([*SMALL_R3GAN, "--pl-weight=2"], "--pl-weight=2.0: this generator has no styles per layer"),
        (["--loss=wgangp-eps", "--gamma=1"], "--gamma=1.0: wgangp-eps has its own penalty"),
        (
            ["--loss=wgangp-eps", "--set=loss.r1_interval=16"],
            f"--set loss.r1_interval=16: only --loss={' and '.join(loss.LAZY_R1)} have R1",
        ),
        (["--loss=relativistic", "--set=loss.g_batch_scale=2"], "--set loss.g_batch_scale=2: relativistic compares"),
        (
            ["--loss=hinge", "--set=loss.drift_weight=0.1"],
            "--set loss.drift_weight=0.1: applies to --loss=wgangp-eps only",
        ),
        (["--aug=diffaug", "--target=0.6"], "--target=0.6: --aug=diffaug does not use it"),
        (["--aug=apa", "--augpipe=bgc"], "--augpipe=bgc: --aug=apa does not use it"),
        (["--aug=apa", "--loss=wgangp-eps"], "--aug=apa: only scales the loss of wgangp-eps by 1 - p"),
        (["--aug=noaug", "--augpipe=bgc"], "--augpipe=bgc: --aug=noaug does not use it"),
        (
            ["--augpipe=bg", "--set=augment.color_strength=0.5"],
            "--set augment.color_strength=0.5: has no effect on augment.pipe=bg, which lacks colour transforms",
        ),
        (
            ["--aug=fixed", "--p=0.5", "--set=augment.policy=color"],
            "--set augment.policy=color: mode 'fixed' does not use a policy",
        ),
        (
            ["--gen=stylegan2", "--set=generator.ffn=true"],
            "--set generator.ffn=true: is not a setting of the family stylegan2",
        ),
        (["--disc=styleformer", "--d-arch=skip"], "--d-arch=skip: is not a setting of the family styleformer"),
        (["--cfg=transgan-cifar", "--gen=styleformer", "--pl-weight=2"], "--pl-weight=2.0: has no effect without"),
    ],
)
def test_contradictory_options_are_refused(scenes: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={scenes}", "--device=cpu", "-n", *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("family", ["styleformer", "styleformer-c", "stylegan2"])
def test_generators_with_styles_keep_the_regularisers(family: str) -> None:
    """The number of styles is unknown before the image size."""
    for preset in (PRESETS["stylegan2"], PRESETS["auto"]):
        assert apply_options(preset, {"generator.family": family}).loss == preset.loss
