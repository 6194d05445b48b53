"""DiffAugment: transforms against NumPy, distributions of the draws, derivatives, options."""

from __future__ import annotations

import dataclasses
import json
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import small_config
from torch import Tensor

import train
from dnnlib.config import ConfigError, override
from torch_utils.graphs import no_synchronisation
from training.augment.diffaugment import (
    DEFAULT_POLICY,
    DIFFAUG,
    PARAMETERS,
    DiffColor,
    DiffCutout,
    DiffErase,
    DiffFilter,
    DiffHue,
    DiffTranslation,
)
from training.augment.pipe import MODE_FIELDS, AugmentConfig, AugmentPipe
from training.config import PRESETS, Environment, resolve
from training.dataset import ImageDataset
from training.networks import execution
from training.training_loop import Trainer

ONE = torch.tensor(1.0)
Array = np.ndarray[Any, np.dtype[np.float64]]


def build(policy: tuple[str, ...], img_shape: tuple[int, int, int]) -> AugmentPipe:
    return AugmentPipe(AugmentConfig(mode="diffaug", policy=policy), img_shape)


def some_images(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_color_equals_the_reference(channels: int) -> None:
    images = some_images(4, channels, 5, 6)
    stage = DiffColor((channels, 5, 6))
    values = stage.draw(images, ONE)
    for image, (b, s, t), actual in zip(images, values, stage.transform(images, values), strict=True):
        colors = 3 if channels == 4 else channels
        x: Array = image.numpy()[:colors] + b.item()
        m = x.mean(axis=0, keepdims=True)
        x = m + s.item() * (x - m)
        x = x.mean() + t.item() * (x - x.mean())
        np.testing.assert_allclose(actual[:colors].numpy(), x, rtol=1e-12, atol=1e-12)
        assert torch.equal(actual[colors:], image[colors:])


def test_color_parameters_are_uniform_in_their_ranges() -> None:
    values = DiffColor((3, 2, 2)).draw(torch.zeros(20_000, 3, 2, 2), ONE)
    for column, (low, high) in zip(values.unbind(1), [(-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)], strict=True):
        width = high - low
        assert low <= column.min() < low + 0.01 * width
        assert high - 0.01 * width < column.max() <= high
        assert column.std().item() == pytest.approx(width / 12**0.5, rel=0.03)
    assert torch.corrcoef(values.T).triu(1).abs().max() < 0.03


def test_translation_shifts_pixels_and_pads_with_zeros() -> None:
    images = some_images(9, 2, 16, 9)
    stage = DiffTranslation((2, 16, 9))
    values = torch.tensor([[dy, dx] for dy in (-2, 0, 2) for dx in (-1, 0, 1)])
    for image, (dy, dx), actual in zip(images, values.tolist(), stage.transform(images, values), strict=True):
        expected = np.zeros([2, 16, 9])
        for y in range(16):
            for x in range(9):
                if 0 <= y - dy < 16 and 0 <= x - dx < 9:
                    expected[:, y, x] = image[:, y - dy, x - dx]
        assert np.array_equal(actual.numpy(), expected)


@pytest.mark.parametrize(
    ("size", "ratio", "steps"),
    [
        ((32, 32), 0.125, (4, 4)),
        ((20, 8), 0.125, (3, 1)),
        ((3, 4), 0.125, (0, 1)),
        ((32, 32), 0.2, (6, 6)),
        ((48, 256), 0.2, (10, 51)),
    ],
)
def test_translations_are_uniform_up_to_the_maximum(
    size: tuple[int, int], ratio: float, steps: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    values = DiffTranslation((1, *size), ratio).draw(torch.zeros(6000, 1, *size), ONE)
    for column, step in zip(values.unbind(1), steps, strict=True):
        counts = torch.bincount(column + step, minlength=2 * step + 1)
        assert len(counts) == 2 * step + 1
        assert (counts - 6000 / (2 * step + 1)).abs().max() < 5 * (6000 / (2 * step + 1)) ** 0.5 + 1


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (5, 4)])
@pytest.mark.parametrize("kind", [DiffCutout, DiffErase])
def test_cutout_and_erase_zero_a_rectangle(kind: type[DiffCutout], size: tuple[int, int]) -> None:
    images = some_images(500, 2, *size)
    stage = kind((2, *size))
    values = stage.draw(images, ONE)
    for image, bounds, actual in zip(images, values.tolist(), stage.transform(images, values), strict=True):
        top, bottom, left, right = (max(int(bound), 0) for bound in bounds)
        expected = image.numpy().copy()
        expected[:, top:bottom, left:right] = 0
        assert np.array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (5, 4)])
def test_cutout_has_half_of_each_side_and_a_uniform_position(size: tuple[int, int]) -> None:
    half = [round(side / 2 + 1e-9) for side in size]  # rounded half up
    values = DiffCutout((2, *size)).draw(some_images(4000, 2, *size), ONE)
    for side, cut, (first, end) in zip(size, half, values.t().unflatten(0, (2, 2)), strict=True):
        assert (end - first).unique().tolist() == [cut]
        centres = (first + cut // 2).long()
        counts = torch.bincount(centres, minlength=side + 1 - cut % 2)  # part of a cutout may lie outside
        assert len(counts) == side + 1 - cut % 2
        assert (counts - 4000 / len(counts)).abs().max() < 5 * (4000 / len(counts)) ** 0.5


def test_erase_has_a_uniform_size_and_position() -> None:
    """Sides are uniform from zero to the image's side and independent; centres are uniform for every side."""
    H, W, B = 5, 8, 60_000
    torch.manual_seed(0)
    values = DiffErase((3, H, W)).draw(torch.zeros(B, 3, H, W), ONE).long()
    height, width = values[:, 1] - values[:, 0], values[:, 3] - values[:, 2]
    counts = torch.bincount(height * (W + 1) + width, minlength=(H + 1) * (W + 1))
    expected = B / ((H + 1) * (W + 1))
    assert len(counts) == (H + 1) * (W + 1)
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-squared with 53 degrees of freedom: p = 1e-4
    assert (height * width).double().mean().item() == pytest.approx(H * W / 4, rel=0.02)
    for side in range(W + 1):
        centres = values[width == side, 2] + side // 2
        counts = torch.bincount(centres, minlength=W + 1 - side % 2)
        assert len(counts) == W + 1 - side % 2
        assert (counts - len(centres) / len(counts)).abs().max() < 5 * (len(centres) / len(counts)) ** 0.5


@pytest.mark.parametrize("kind", [DiffCutout, DiffErase])
def test_rectangles_fire_for_the_whole_batch(kind: type[DiffCutout]) -> None:
    torch.manual_seed(0)
    stage, images = kind((1, 32, 32), 0.3), torch.ones(8, 1, 32, 32)
    has_rectangle = torch.stack([stage.draw(images, ONE) for _ in range(8000)])  # (draws, B, 4)
    has_rectangle = has_rectangle[:, :, 1] > has_rectangle[:, :, 0]
    fires = has_rectangle.any(dim=1)
    assert fires.double().mean().item() == pytest.approx(0.3, abs=0.02)  # four standard deviations
    empty = 1 / 33 if kind is DiffErase else 0  # share of erased rectangles of zero height
    assert has_rectangle[fires].double().mean().item() == pytest.approx(1 - empty, abs=0.005)


@pytest.mark.parametrize("kind", [DiffCutout, DiffErase])
def test_rectangles_fire_per_minibatch(kind: type[DiffCutout]) -> None:
    """Generated and real images pass the pipe as one batch; each half has its own chance."""
    torch.manual_seed(0)
    stage, images = kind((1, 32, 32), 0.3), torch.ones(8, 1, 32, 32)
    with execution.using(minibatches=2):
        bounds = torch.stack([stage.draw(images, ONE) for _ in range(2000)]).unflatten(1, (2, 4))  # (draws, 2, 4, 4)
    fires = (bounds[..., 1] > bounds[..., 0]).any(dim=2).double()  # (draws, 2)
    assert fires.mean(dim=0).tolist() == pytest.approx([0.3, 0.3], abs=0.04)  # four standard deviations
    assert fires.prod(dim=1).mean().item() == pytest.approx(0.09, abs=0.026)  # independent


def test_the_filter_fires_per_image_and_band() -> None:
    """Bands that do not fire share one gain, so the number of distinct gains follows a binomial distribution."""
    torch.manual_seed(0)
    gains = DiffFilter((3, 22, 22), 0.25).draw(torch.zeros(20_000, 3, 22, 22, dtype=torch.float64), ONE)
    gains = gains.sort(dim=1).values
    different = 1 + (gains.diff(dim=1) > 1e-12).sum(dim=1)
    shares = torch.bincount(different, minlength=5)[1:] / 20_000
    binomial = [comb(4, k) * 0.25**k * 0.75 ** (4 - k) for k in range(5)]
    expected = torch.tensor(
        [*binomial[:3], binomial[3] + binomial[4]]
    )  # three bands that fire leave the fourth a gain of its own
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)  # more than four standard deviations


def test_the_hue_fires_per_image() -> None:
    torch.manual_seed(0)
    maps = DiffHue((3, 2, 2), 0.5).draw(torch.zeros(20_000, 3, 2, 2), ONE)[:, 1]
    is_still = (maps == torch.eye(4)).all(dim=(1, 2))
    assert is_still.double().mean().item() == pytest.approx(0.5, abs=0.015)
    angles = (
        (maps[:, 1, 0] - maps[:, 0, 1]).mul(3**0.5 / 2).asin()[~is_still]
    )  # U(-pi, pi), up to the ambiguity of a sine
    assert angles.abs().max() > 1.5
    assert angles.std().item() == pytest.approx(torch.pi / 12**0.5, rel=0.03)


def test_filter_and_hue_behave_as_in_ada() -> None:
    """A hue rotation preserves the channel mean and distances from the mean; a filtered constant image is constant."""
    images = some_images(4, 3, 24, 24)
    turned = build(("hue",), (3, 24, 24))(images)
    torch.testing.assert_close(turned.mean(dim=1), images.mean(dim=1))
    chroma, before = (x - x.mean(dim=1, keepdim=True) for x in (turned, images))
    torch.testing.assert_close(chroma.square().sum(dim=1), before.square().sum(dim=1))
    assert (turned - images).abs().mean() > 0.1

    flat = torch.ones(4, 3, 24, 24, dtype=torch.float64)
    filtered = build(("filter",), (3, 24, 24))(flat)
    assert filtered.std(dim=(1, 2, 3)).max() < 1e-9
    assert filtered[:, 0, 0, 0].unique().numel() == 4


def test_transforms_follow_the_order_of_the_policy() -> None:
    images = some_images(3, 3, 8, 8)
    stages: list[Any] = [*build(("cutout", "color"), (3, 8, 8)).stages]
    assert [type(stage) for stage in stages] == [DiffCutout, DiffColor]
    torch.manual_seed(4)
    together = build(("cutout", "color"), (3, 8, 8))(images)
    torch.manual_seed(4)
    x = images
    for stage in stages:
        x = stage.transform(x, stage.draw(x, ONE))
    assert torch.equal(together, x)
    assert float(build(("color",), (3, 8, 8)).p) == 1


@pytest.mark.parametrize("policy", [*((name,) for name in DIFFAUG), DEFAULT_POLICY])
def test_second_derivatives_are_correct(policy: tuple[str, ...]) -> None:
    size = (22, 23) if "filter" in policy else (5, 6)
    module = build(policy, (3, *size))

    def seeded(images: Tensor) -> Tensor:
        torch.manual_seed(1)
        return module(images).square()

    images = some_images(2, 3, *size).requires_grad_()
    assert seeded(images).shape == images.shape
    assert torch.autograd.gradcheck(seeded, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(seeded, images, fast_mode=True)


def test_probabilities_are_passed_to_their_transforms() -> None:
    policy = ("translation", "cutout", "erase", "filter", "hue")
    config = AugmentConfig(mode="diffaug", policy=policy, translation=0.3, cutout_p=0.1, filter_p=0.2, hue_p=0.4)
    stages: list[Any] = [*AugmentPipe(config, (3, 24, 24)).stages]
    assert [stages[0].ratio, *(stage.probability for stage in stages[1:])] == [0.3, 0.1, 0.1, 0.2, 0.4]


def with_partial_p(policy: tuple[str, ...], img_shape: tuple[int, int, int]) -> AugmentPipe:
    return AugmentPipe(AugmentConfig(mode="diffaug", policy=policy, cutout_p=0.3, filter_p=0.5, hue_p=0.5), img_shape)


@pytest.mark.parametrize("name", DIFFAUG)
def test_the_number_of_draws_does_not_depend_on_probability(name: str) -> None:
    images, after = some_images(4, 3, 24, 24), []
    for p in (0.0, 0.3, 1.0):
        changes: dict[str, Any] = {PARAMETERS[name]: p} if name in PARAMETERS else {}
        torch.manual_seed(3)
        AugmentPipe(AugmentConfig(mode="diffaug", policy=(name,), **changes), (3, 24, 24))(images)
        after.append(torch.rand(1))
    assert after[0] == after[1] == after[2]


@pytest.mark.parametrize("name", ["cutout", "erase", "filter", "hue"])
def test_transforms_with_probability_zero_change_nothing(name: str) -> None:
    images = some_images(4, 3, 24, 24)
    config = AugmentConfig(mode="diffaug", policy=(name,), cutout_p=0, filter_p=0, hue_p=0)
    torch.testing.assert_close(AugmentPipe(config, (3, 24, 24))(images), images, rtol=0, atol=1e-10)


def test_no_value_is_read_by_the_host() -> None:
    pipe = with_partial_p((*DIFFAUG,), (3, 24, 32)).to("meta")  # reading a value of a meta tensor raises an error
    assert pipe(torch.empty(2, 3, 24, 32, device="meta")).shape == (2, 3, 24, 32)


@pytest.mark.gpu
def test_cuda_equals_cpu_without_synchronisation() -> None:
    images = torch.randn(4, 3, 32, 48)
    policy = (*DIFFAUG,)
    cpu, cuda = with_partial_p(policy, (3, 32, 48)), with_partial_p(policy, (3, 32, 48)).cuda()
    on_device = images.cuda()
    cuda(on_device)
    with no_synchronisation():
        cuda(on_device)
    for stage_cpu, stage_cuda in zip(cpu.stages, cuda.stages, strict=True):
        values = stage_cpu.draw(images, cpu.p)  # type: ignore[operator]
        expected = stage_cpu.transform(images, values)  # type: ignore[operator]
        actual = stage_cuda.transform(on_device, values.cuda()).cpu()  # type: ignore[operator]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("policy", "img_shape", "message"),
    [
        (("filter",), (3, 21, 64), "at least 22 pixels per side, but the images are 21x64; remove filter"),
        (("hue",), (1, 32, 32), "needs RGB channels, but the images have 1 channels"),
    ],
)
def test_images_that_a_policy_cannot_augment_are_refused(
    policy: tuple[str, ...], img_shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(policy, img_shape)
    assert caught.value.field == "policy"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ((), "give one or more of color, translation, cutout, erase, filter, hue, each at most once"),
        (("color", "color"), "give one or more of color, translation, cutout, erase, filter, hue, each at most once"),
        (("color", "colour"), "'colour' is not one of color, translation, cutout, erase, filter, hue"),
    ],
)
def test_invalid_policies_are_refused(policy: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AugmentConfig(mode="diffaug", policy=policy)
    assert caught.value.field == "policy"


def test_every_field_belongs_to_a_mode() -> None:
    fields = {field.name for field in dataclasses.fields(AugmentConfig)}
    assert fields == {"mode"}.union(*MODE_FIELDS.values())


def plan(data: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={data}", "--device=cpu", "-n", *arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return json.loads(result.stdout)["options"]["augment"]


def test_command_line_options_set_the_policy(shapes_zip: Path, shapes32_zip: Path) -> None:
    assert plan(shapes_zip, "--aug=diffaug")["policy"] == ["translation", "cutout", "color"]
    chosen = plan(shapes_zip, "--aug=diffaug", "--set=augment.policy=color,hue")
    assert (chosen["mode"], chosen["policy"], chosen["p"]) == ("diffaug", ["color", "hue"], None)
    numbers = [
        "--set=augment.translation=0.2",
        "--set=augment.cutout_p=0.3",
        "--set=augment.filter_p=0.25",
        "--set=augment.hue_p=0.5",
    ]
    chosen = plan(shapes32_zip, "--aug=diffaug", "--set=augment.policy=translation,erase,hue,filter", *numbers)
    assert [chosen[name] for name in ("translation", "cutout_p", "filter_p", "hue_p")] == [0.2, 0.3, 0.25, 0.5]
    assert plan(shapes_zip, "--aug=none") == plan(shapes_zip, "--aug=noaug")
    assert plan(shapes_zip, "--aug=none")["mode"] == "noaug"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aug=diffaug", "--p=0.5"], "--p=0.5: mode 'diffaug' does not use a probability"),
        (
            ["--aug=diffaug", "--target=0.5"],
            "--target=0.5: --aug=diffaug does not use it: omit it, or",
        ),
        (["--aug=diffaug", "--augpipe=bgc"], "--augpipe=bgc: --aug=diffaug does not use it"),
        (["--aug=none", "--set=augment.max_p=0.5"], "--set augment.max_p=0.5: --aug=noaug does not use it"),
        (
            ["--aug=fixed", "--p=0.5", "--set=augment.ada_kimg=5"],
            "--set augment.ada_kimg=5.0: --aug=fixed does not use it",
        ),
        (
            ["--aug=diffaug", "--set=augment.hue_p=0.5"],
            "has no effect on augment.policy=translation,cutout,color, which lacks hue",
        ),
        (
            ["--aug=diffaug", "--set=augment.policy=color", "--set=augment.cutout_p=0.5"],
            "augment.policy=color, which lacks cutout and erase",
        ),
        (
            ["--aug=diffaug", "--set=augment.cutout_p=1.5"],
            "--set augment.cutout_p=1.5: must lie in 0..1",
        ),
        (
            ["--aug=diffaug", "--set=augment.translation=-0.1"],
            "--set augment.translation=-0.1: must lie in 0..1",
        ),
        (["--set=augment.translation=0.2"], "--set augment.translation=0.2: --aug=ada does not use it"),
        (
            ["--set=augment.policy=color"],
            "--set augment.policy=color: mode 'ada' does not use a policy; omit it or use 'diffaug'",
        ),
        (
            ["--aug=diffaug", "--set=augment.policy=colour"],
            "--set augment.policy=colour: 'colour' is not one of color, translation",
        ),
        (["--aug=diff"], "choose one of noaug, ada, fixed, diffaug, apa"),
    ],
)
def test_options_without_effect_are_refused(shapes_zip: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(train.main, ["--outdir=x", f"--data={shapes_zip}", "--device=cpu", "-n", *arguments])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_real_and_generated_images_are_augmented(shapes_zip: Path) -> None:
    config = small_config(shapes_zip, augment__mode="diffaug", batch_size=4, loss__r1_interval=1)
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    assert config.augment.policy == DEFAULT_POLICY
    calls: list[tuple[str, bool]] = []
    batch = next(trainer._batches())
    for phase in trainer.phases:
        seen: list[Tensor] = []
        handle = trainer.augment.register_forward_pre_hook(lambda module, x, seen=seen: seen.append(x[0]))
        trainer.run_phase(phase, *batch)
        handle.remove()
        calls += [(phase.name, torch.equal(part.detach(), batch[0])) for x in seen for part in x.split(4)]
    assert calls == [("G_main", False), ("D_main", False), ("D_main", True), ("D_reg", True)]
    trainer.total_nimg = 8
    trainer.train()
    assert float(trainer.augment.p) == 1


def test_only_the_filter_is_nondeterministic_on_a_gpu() -> None:
    env = Environment(img_shape=(3, 32, 32), c_dim=0, on_gpu=True)
    config = override(PRESETS["tiny"], {"augment.mode": "diffaug", "run.deterministic": True})
    resolve(config, env)
    augment = dataclasses.replace(config.augment, policy=("filter",))
    with pytest.raises(ConfigError, match="--aug=diffaug without filter"):
        resolve(dataclasses.replace(config, augment=augment), env)
