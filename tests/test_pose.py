"""Poses of images: --translate and --rotate against matrices, shifted pixels and turned pixels."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exploration_helpers import (
    FAMILIES,
    MOVING,
    example_directions,
    model_of,
    pixels,
    run,
    run_ok,
    save_untrained,
)

from exploration.directions import save_directions
from exploration.model import Model
from exploration.pose import Pose
from training.networks import execution
from training.networks.generator import GeneratorConfig
from training.networks.stylegan3 import StyleGAN3Config

WIDE: dict[str, Any] = {"z_dim": 16, "w_dim": 12, "side": 64, "num_layers": 6, "channel_base": 1024, "channel_max": 32}


def calibrated(config: GeneratorConfig) -> Model:
    """Build a StyleGAN3 with the magnitudes that training would track."""
    model = model_of(config)
    for _ in range(6):
        magnitudes: list[torch.Tensor] = []
        with torch.no_grad(), execution.using(magnitudes=magnitudes):
            model.G.synthesis(model.styles_of(range(4)))
        model.G.synthesis.input_magnitudes.copy_(magnitudes[0])
    return model


def test_a_transform_is_the_inverse_of_the_motion() -> None:
    """Points turn counterclockwise, from x (right) to -y (up), and then shift."""
    points = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    pose = Pose(x=0.3, y=-0.2, degrees=50.0)
    for shift, turn in ((1.0, 1.0), (0.5, 0.0), (0.0, -1.0), (0.25, 2.0)):
        found = pose.transforms(torch.tensor([9.0, shift]), torch.tensor([9.0, turn]))[1].numpy()
        angle = math.radians(50) * turn
        moved = (points[:, 0] + 1j * points[:, 1]) * np.exp(-1j * angle) + shift * (0.3 - 0.2j)
        back = np.stack([moved.real, moved.imag, np.ones(50)], axis=1) @ found.T
        np.testing.assert_allclose(back[:, :2], points, atol=1e-6)
        np.testing.assert_allclose(back[:, 2], 1)
    assert torch.equal(Pose().transform, torch.eye(3))


def test_images_shift_to_the_right_and_down() -> None:
    model = calibrated(StyleGAN3Config(**WIDE))
    ws = model.styles_of((0, 1))
    plain = model.synthesise(ws)
    moved = dataclasses.replace(model, pose=Pose(x=8 / 64, y=-4 / 64)).synthesise(ws)
    inside = slice(16, 48)
    error = (moved - plain.roll((-4, 8), (2, 3)))[:, :, inside, inside]
    assert error.square().mean().sqrt() < 0.02 * plain.std()
    assert (moved - plain).square().mean().sqrt() > 0.2 * plain.std()


def test_images_rotate_counterclockwise() -> None:
    model = calibrated(StyleGAN3Config(**WIDE, rotation=True))
    ws = model.styles_of((0, 1))
    plain = model.synthesise(ws)
    moved = dataclasses.replace(model, pose=Pose(degrees=90)).synthesise(ws)
    errors = [float((moved - plain.rot90(k, (2, 3))).square().mean().sqrt() / plain.std()) for k in range(4)]
    assert errors[1] < 0.02  # rot90 turns counterclockwise
    assert min(errors[0], *errors[2:]) > 0.2


@pytest.mark.parametrize("name", MOVING)
def test_the_transforms_of_a_batch_belong_to_their_styles(name: str) -> None:
    model = model_of(MOVING[name], batch=2)
    poses = [Pose(x=0.1 * i, y=-0.2, degrees=10.0 * i) for i in range(5)]
    ws = model.styles_of(range(5))
    found = model.images(ws, torch.stack([pose.transform for pose in poses]))
    for i, pose in enumerate(poses):
        alone = dataclasses.replace(model, pose=pose).images(ws[i : i + 1])[0]
        assert (found[i].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(found, model.images(ws))


@pytest.mark.parametrize("name", MOVING)
def test_commands_move_the_images(name: str, shapes_zip: Path, tmp_path: Path) -> None:
    """The pixels of images, mixtures and attention equal those of a synthesis with the matrix of the motion."""
    network = save_untrained(tmp_path / "n.pkl", shapes_zip, MOVING[name])
    model = model_of(MOVING[name])
    matrix = torch.tensor([[1, 0, -0.2], [0, 1, 0.1], [0, 0, 1]])
    flags = [f"--network={network}", "--translate=0.2,-0.1", f"--outdir={tmp_path}"]
    if name == "stylegan3-r":
        turn = math.radians(30)
        cos, sin = math.cos(turn), math.sin(turn)
        matrix = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ matrix
        flags.append("--rotate=30")
    save_directions(tmp_path / "d.npz", example_directions())
    edit = [f"--direction={tmp_path}/d.npz:0", "--strength=2"]

    def expected(ws: torch.Tensor) -> np.ndarray:
        with torch.no_grad(), execution.using(input_transform=matrix):
            images = model.G.synthesis(ws.expand(8, -1, -1))
        image: np.ndarray = (images[0] * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return image.astype(int)

    a, b = model.styles_of((3, 4)).split(1)
    edited, mixed = a.clone(), a.clone()
    edited[:, 1:3, 0] += 4
    mixed[:, 0] = b[:, 0]
    for command, file, ws in (
        (["images", "--seeds=3"], "seed0003.png", a),
        (["images", "--seeds=3", *edit], "seed0003.png", edited),
        (["mix", "--rows=3", "--cols=4", "--styles=0"], "3-4.png", mixed),
    ):
        run_ok(*command, *flags)
        assert np.abs(pixels(tmp_path / file) - expected(ws)).max() <= 1
        assert np.abs(pixels(tmp_path / file) - model.images(ws)[0].permute(1, 2, 0).numpy()).max() > 1
    if name.startswith("styleformer"):
        moved = []
        for shift in (flags[1:2], []):
            run_ok("attention", flags[0], *shift, "--seeds=3", "--query=9,5", flags[2])
            with np.load(tmp_path / "seed0003-attention.npz") as arrays:
                moved.append(arrays["rollout_16x16_0"])
        assert np.abs(moved[0] - moved[1]).max() > 1e-5


def test_poses_that_are_not_supported_get_one_message(shapes_zip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    configs = {**MOVING, "stylegan2": FAMILIES["stylegan2"]}
    networks = {name: save_untrained(tmp_path / f"{name}.pkl", shapes_zip, config) for name, config in configs.items()}
    fixed = "network is not equivariant to rotation, because its filters follow the axes of the image; use --translate"
    cases = [
        ("stylegan2", "--translate=0.1,0", "this stylegan2 network has no Fourier features at its input, so its"),
        ("stylegan2", "--rotate=5", "use a network trained with --cfg=stylegan3-t, stylegan3-r, styleformer-a or"),
        ("stylegan3-t", "--rotate=5", f"--rotate=5: this stylegan3 {fixed}"),
        ("styleformer-a", "--rotate=5", f"--rotate=5: this styleformer-a {fixed}"),
        ("styleformer-f", "--rotate=5", f"--rotate=5: this styleformer {fixed}"),
        ("stylegan3-r", "--rotate=360.5", "--rotate=360.5: must be -360 to 360 degrees"),
        ("stylegan3-r", "--translate=0,0.6", "--translate=0,0.6: must be -0.5 to 0.5 of the image along each axis"),
        ("stylegan3-r", "--translate=0.1", "--translate=0.1: specify two numbers"),
        ("stylegan3-r", "--translate=0.1,0,0", "--translate=0.1,0,0: specify two numbers"),
    ]
    common = ["--seeds=0", f"--outdir={out}"]
    mix, video = ["mix", "--rows=0", "--cols=1", common[1]], ["video", "--seeds=0", f"--output={out}/v.gif"]
    for command in (["images", *common], ["attention", *common], mix, video):
        for name, flag, message in cases:
            result = run(*command, f"--network={networks[name]}", flag)
            assert (result.exit_code, message in result.output) == (2, True), result.output
            assert result.output.count("\n") == 1
    for flag, message in (
        ("--translate=a,0", "Invalid value for '--translate': 'a' is not a valid float"),
        ("--translate=nan,0", "'nan' is not a finite number"),
        ("--rotate=inf", "Invalid value for '--rotate': 'inf' is not a finite number"),
    ):
        result = run("images", f"--network={networks['stylegan3-r']}", flag, *common)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = run("images", f"--network={networks['stylegan3-r']}", "--translate=0.1,0", "--noise-mode=random", *common)
    assert (result.exit_code, "cannot be combined with" in result.output) == (2, True)
    assert not out.exists()
