"""generate.py project: loss terms against formulas; generated images are recovered."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("imageio_ffmpeg", reason="imageio_ffmpeg is an optional package")
import torch
from click.testing import CliRunner
from exploration_helpers import FAMILIES, decode_video, make_model, make_snapshot, pixels, run, run_ok
from metric_helpers import SmallDetector, export_program, natural_images, script_program
from PIL import Image
from torch import Tensor, nn

import projector
from dnnlib.config import UserError
from exploration import projection, video
from exploration.model import Model
from exploration.projection import ProjectionConfig, as_map, noise_correlation, pixel_distance, project
from metrics import detectors
from metrics.detectors import DetectorSetup
from metrics.path_length import lpips_input
from metrics.perceptual import feature_distance, lpips_distance
from training.networks.styleformer_block import EncoderBlock
from training.networks.stylegan2 import ModulatedConv

CPU = torch.device("cpu")


def test_schedules_follow_the_stylegan2_paper() -> None:
    """1000 steps: the learning rate rises over the first 50 and falls over the last 250; latent noise until 750."""
    config = ProjectionConfig()
    assert [config.rate_at(t / 1000) for t in (0, 25, 50, 400, 750)] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1])
    assert config.rate_at(0.875) == pytest.approx(0.1 * (0.5 + 0.5 * math.cos(math.pi / 2)))
    assert config.rate_at(1) == pytest.approx(0)
    assert [config.exploration_at(t) for t in (0, 0.375, 0.75, 1)] == pytest.approx([0.05, 0.0125, 0, 0])


def test_noise_correlation_equals_its_formula() -> None:
    noise = torch.randn(2, 1, 32, 16, dtype=torch.float64)
    expected, x = 0.0, noise[:, 0].numpy()
    while True:
        for image in x:
            rows = np.mean([image[i] * image[i - 1] for i in range(len(image))])
            columns = np.mean([image[:, i] * image[:, i - 1] for i in range(image.shape[1])])
            expected += rows**2 + columns**2
        if min(x.shape[1:]) <= 8:
            break
        x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 2
    assert noise_correlation(noise).item() == pytest.approx(expected)
    tokens = torch.arange(32.0).reshape(1, 32, 1)
    assert torch.equal(as_map(tokens, (16, 32)), torch.arange(32.0).reshape(1, 1, 4, 8))
    assert torch.equal(as_map(noise[:, 0], (64, 32)), noise)


def test_pixels_are_compared_at_every_scale() -> None:
    goal, img = torch.rand(2, 3, 40, 24), torch.rand(2, 3, 40, 24)
    difference = (img - goal).numpy()
    halved = difference.reshape(2, 3, 20, 2, 12, 2).mean(axis=(3, 5))
    expected = [(np.square(difference[i]).mean() + np.square(halved[i]).mean()) / 2 for i in range(2)]
    np.testing.assert_allclose(pixel_distance(goal)(img), expected, rtol=1e-5)


@pytest.mark.parametrize("layer", [EncoderBlock, ModulatedConv])
def test_layers_accept_one_noise_map_per_image(layer: Any) -> None:
    model = make_model("styleformer" if layer is EncoderBlock else "stylegan2")
    ws = model.styles_of((1, 1))
    noises = projection.noise_maps(model, 2)
    with torch.no_grad():
        for noise in noises.values():
            noise[1].normal_()
    both = torch.func.functional_call(model.G.synthesis, noises, (ws,))
    for image in range(2):
        for name, noise in noises.items():
            model.G.synthesis.get_buffer(name).copy_(noise[image])
        torch.testing.assert_close(both[image : image + 1], model.G.synthesis(ws[:1]))
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "fix_noise"),
    [
        *((family, True) for family in FAMILIES if family != "styleformer"),
        ("stylegan2", False),
        pytest.param("styleformer", True, marks=pytest.mark.slow),
        pytest.param("styleformer", False, marks=pytest.mark.slow),
    ],
)
def test_projection_recovers_generated_images(family: str, fix_noise: bool) -> None:
    """The generator is untrained, so some searches end in a local minimum. Optimized noise maps are discarded."""
    model = make_model(family)
    config = ProjectionConfig(num_steps=150, fix_noise=fix_noise, num_samples=500)
    w_avg, _ = projection.mean_and_spread(model, config.num_samples)
    with torch.no_grad():
        targets = model.G.synthesis(model.styles_of((4, 5, 6)))
        *_, last = project(model, targets, pixel_distance, config)
        start, end = (
            pixel_distance(targets)(model.G.synthesis(ws)) for ws in (w_avg.expand(3, model.G.num_ws, -1), last.ws)
        )
    assert (end < start / 4).all()
    assert (end / start).median() < 1 / 10
    if fix_noise:
        assert (end / start).min() < 1 / 1000
    assert torch.equal(last.ws, last.ws[:, :1].expand_as(last.ws))


def test_projected_images_are_independent_of_each_other() -> None:
    """Projecting an image alone or in a batch gives equal results up to rounding if the image has the same index."""
    model = make_model()
    with torch.no_grad():
        targets = model.G.synthesis(model.styles_of((4, 5)))
    config = ProjectionConfig(num_steps=5, space="w+", num_samples=100)
    *_, both = project(model, targets, pixel_distance, config)
    *_, alone = project(model, targets[1:], pixel_distance, config, first=1)
    *_, other = project(model, targets[1:], pixel_distance, config, first=7)
    torch.testing.assert_close(both.ws[1:], alone.ws, rtol=1e-3, atol=1e-3)
    assert (other.ws - alone.ws).abs().max() > 0.01
    assert not torch.equal(both.ws[:, 0], both.ws[:, 1])


@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_features_of_programs_have_gradients(kind: str, tmp_path: Path) -> None:
    detector = SmallDetector()
    uint8 = natural_images(3, (3, 32, 32))
    if kind == "pt":
        path = script_program(tmp_path / "d.pt", detector)
    else:
        path = export_program(tmp_path / "d.pt2", detector, uint8)
    targets = (uint8.float() - 128) / 127.5
    img = (targets + 0.2 * torch.randn(targets.shape)).requires_grad_()
    distances = feature_distance(path, CPU)(targets)(img)
    f, g = detector((img * 127.5 + 128).clamp(0, 255))[0], detector(uint8)[0]
    torch.testing.assert_close(distances, (f - g).square().sum(dim=1) / g.square().sum(dim=1))
    distances.sum().backward()
    assert img.grad is not None
    assert img.grad.flatten(1).any(dim=1).all()


class StyleganVgg16(nn.Module):
    """VGG16 with the interface of the StyleGAN family: LPIPS is the squared distance of features."""

    def forward(
        self, img: Tensor, resize_images: bool = True, return_features: bool = False, return_lpips: bool = False
    ) -> Tensor:
        if return_lpips and not resize_images:
            return img.flatten(1) / 100
        return img.flatten(1) * 0


class WithoutGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).round().to(torch.uint8).float()


class OnlyUint8(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8, "expects uint8"
        return images.flatten(1).float()


def test_stylegan_programs_work_and_unsuitable_ones_are_refused(tmp_path: Path) -> None:
    targets, img = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    lpips = feature_distance(script_program(tmp_path / "vgg.pt", StyleganVgg16()), CPU)(targets)(img)
    expected = ((lpips_input(img, False) - lpips_input(targets, False)) / 100).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(lpips, expected)
    for module, message in ((WithoutGradient(), "have no gradient"), (OnlyUint8(), "fails on float images")):
        path = script_program(tmp_path / "x.pt", module)
        with pytest.raises(UserError, match=rf"{message}.*use --loss=pixels"):
            feature_distance(path, CPU)(targets)


def test_lpips_equals_the_metric_and_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(init_weights=False).eval().state_dict()
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    monkeypatch.setattr(DetectorSetup, "_lpips_states", lambda self: (vgg, linear))
    images = natural_images(4, (3, 32, 32)).float() / 127.5 - 1
    img = images[2:].clone().requires_grad_()
    distances = lpips_distance(DetectorSetup(), CPU)(images[:2])(img)
    expected = detectors.load_lpips(vgg, linear, CPU)((images[:2] + 1) * 127.5, (images[2:] + 1) * 127.5)
    torch.testing.assert_close(distances.detach(), expected, rtol=1e-4, atol=1e-6)
    distances.sum().backward()
    assert img.grad is not None
    assert img.grad.flatten(1).any(dim=1).all()


def test_lpips_equals_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum over five layers of mean_xy sum_c lin_c (f/|f| - g/|g|)^2, in float64, with torchvision's layers."""
    pytest.importorskip("torch_fidelity")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(init_weights=False).eval()
    weights = [torch.rand(width) for width in (64, 128, 256, 512, 512)]
    linear = {f"lin{i}.model.1.weight": weight.reshape(1, -1, 1, 1) for i, weight in enumerate(weights)}
    monkeypatch.setattr(DetectorSetup, "_lpips_states", lambda self: (vgg.state_dict(), linear))
    images = natural_images(4, (3, 32, 32)).float() / 127.5 - 1
    distances = lpips_distance(DetectorSetup(), CPU)(images[:2])(images[2:])

    mean, std = (
        torch.tensor([-0.030, -0.088, -0.188]),
        torch.tensor([0.458, 0.448, 0.450]),
    )  # constants of the published LPIPS
    x, expected = ((images - mean[:, None, None]) / std[:, None, None]).double(), torch.zeros(2).double()
    for index, layer in enumerate(vgg.features.double()):
        x = layer(x)
        if index in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            f, g = (x / x.norm(dim=1, keepdim=True)).split(2)
            weight = weights[(3, 8, 15, 22, 29).index(index)].double()
            expected += torch.einsum("c,bchw->b", weight, (f - g).square()) / math.prod(x.shape[2:])
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-6)


def test_project_processes_folders_in_batches(shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    run_ok("images", f"--network={network}", "--seeds=0-2", f"--outdir={tmp_path / 'in'}")
    large = Image.open(tmp_path / "in" / "seed0002.png").resize((64, 64), Image.Resampling.NEAREST)
    large.save(tmp_path / "in" / "seed0002.png")
    common = [f"--network={network}", "--num-steps=60", "--loss=pixels", "--fix-noise"]
    output = run_ok("project", *common, f"--target={tmp_path / 'in'}", "--batch=2", "--save-video", f"--outdir={out}")
    with np.load(out / "projected_w.npz") as file:
        assert file["w"].shape == (3, 5, 12)
    lines = re.findall(r"(proj\d\d): (\S+), distance ([\d.]+) at the start, ([\d.]+) at the end", output)
    assert [line[:2] for line in lines] == [(f"proj{i:02d}", f"seed{i:04d}.png") for i in range(3)]
    assert all(float(end) < float(start) / 2 for *_, start, end in lines)
    assert decode_video(out / "proj01.mp4")[0].shape == (60, 128, 256, 3)
    assert sorted(path.suffix for path in out.iterdir()) == [".mp4"] * 3 + [".npz"] + [".png"] * 3
    run_ok(
        "images", f"--network={network}", f"--projected-w={out / 'projected_w.npz'}", f"--outdir={tmp_path / 'again'}"
    )
    for index in range(3):
        name = f"proj{index:02d}.png"
        assert np.array_equal(pixels(out / name), pixels(tmp_path / "again" / name))

    run_ok("project", *common, f"--target={tmp_path / 'in' / 'seed0000.png'}", f"--outdir={tmp_path / 'one'}")
    found, goal = pixels(tmp_path / "one" / "proj00.png"), pixels(tmp_path / "in" / "seed0000.png")
    average = tmp_path / "average"
    run_ok("images", f"--network={network}", "--seeds=0", "--trunc=0", f"--outdir={average}")
    before = np.square(pixels(average / "seed0000.png") / 255 - goal / 255).mean()
    assert np.square(found / 255 - goal / 255).mean() < before / 2


def test_results_are_kept_if_a_later_batch_fails(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    run_ok("images", f"--network={network}", "--seeds=0-2", f"--outdir={tmp_path / 'in'}")
    original = projection.project_batch

    def failing(model: Model, targets: Tensor, *others: Any) -> Any:
        if len(targets) == 1:
            raise RuntimeError("CUDA out of memory")
        return original(model, targets, *others)

    monkeypatch.setattr(projection, "project_batch", failing)
    options = ("--num-steps=2", "--loss=pixels", "--batch=2", f"--target={tmp_path / 'in'}", f"--outdir={out}")
    assert run("project", f"--network={network}", *options).exit_code != 0
    with np.load(out / "projected_w.npz") as file:
        assert len(file["w"]) == 2
    assert sorted(path.name for path in out.glob("*.png")) == ["proj00.png", "proj01.png"]


def test_a_diverged_projection_is_not_saved(shapes_zip: Path, tmp_path: Path) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    options = ("--num-steps=3", "--loss=pixels", "--lr=1e30", f"--target={tmp_path / 'x.png'}", f"--outdir={out}")
    result = run("project", f"--network={network}", *options)
    assert (result.exit_code, "--lr=1e+30: the optimization diverged" in result.output) == (2, True)
    assert not any(out.iterdir())


@pytest.mark.parametrize("mode", [1, 3, 4])
def test_project_accepts_programs_and_images_of_any_mode(mode: int, shapes_zip: Path, tmp_path: Path) -> None:
    """An RGBA image of another shape is projected by networks with 1, 3 and 4 channels."""
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, img_channels=mode)
    program = script_program(tmp_path / "d.pt", SmallDetector(mode))
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 50, 4), np.uint8)).save(tmp_path / "x.png")
    arguments = [f"--network={network}", f"--target={tmp_path / 'x.png'}", f"--detector={program}", "--num-steps=20"]
    output = run_ok("project", *arguments, "--space=w+", f"--outdir={tmp_path}")
    match = re.search(r"proj00: x.png, distance ([\d.]+) at the start, ([\d.]+) at the end", output)
    assert match
    assert float(match[2]) < float(match[1]) / 2
    assert pixels(tmp_path / "proj00.png").shape == ((32, 32) if mode == 1 else (32, 32, mode))
    with np.load(tmp_path / "projected_w.npz") as file:
        assert not np.array_equal(file["w"][0, 0], file["w"][0, 1])


def test_projector_py_equals_project_with_other_option_names(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    pattern = np.kron(np.random.RandomState(0).randint(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(pattern).save(tmp_path / "x.png")  # 48 pixels wide, 32 high
    arguments = [f"--network={network}", f"--target={tmp_path / 'x.png'}", "--num-steps=4", "--loss=pixels"]
    result = CliRunner().invoke(projector.main, [*arguments, f"--outdir={out}"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"target.png", "proj.png", "proj.mp4", "projected_w.npz"}
    assert np.array_equal(pixels(out / "target.png"), pattern[:, 8:40])
    assert len(decode_video(out / "proj.mp4")[0]) == 4
    run_ok("project", *arguments, "--seed=303", f"--outdir={tmp_path / 'new'}")
    with np.load(out / "projected_w.npz") as old, np.load(tmp_path / "new" / "projected_w.npz") as new:
        assert old["w"].shape == (1, 5, 12)
        np.testing.assert_array_equal(old["w"], new["w"])
    assert (out / "proj.png").read_bytes() == (tmp_path / "new" / "proj00.png").read_bytes()
    saved = f"--projected-w={out / 'projected_w.npz'}"
    run_ok("images", f"--network={network}", saved, f"--outdir={tmp_path / 'again'}")
    assert np.array_equal(pixels(out / "proj.png"), pixels(tmp_path / "again" / "proj00.png"))

    several = [item.replace("x.png", "again") for item in arguments]
    Image.fromarray(pattern).save(tmp_path / "again" / "second.png")
    result = CliRunner().invoke(projector.main, [*several, f"--outdir={tmp_path / 'no'}"])
    assert (result.exit_code, "again: holds 2 images; specify one, or use generate.py" in result.stderr) == (2, True)

    def missing(module: str, extra: str) -> Any:
        raise UserError("no ffmpeg")

    monkeypatch.setattr(video, "import_extra", missing)
    result = CliRunner().invoke(projector.main, [*arguments, f"--outdir={tmp_path / 'no'}"])
    assert (result.exit_code, "proj.mp4: no ffmpeg; or use --save-video=0" in result.stderr) == (2, True)
    assert not (tmp_path / "no").exists()
    result = CliRunner().invoke(projector.main, [*arguments, "--save-video=0", f"--outdir={tmp_path / 'no'}"])
    assert (result.exit_code, (tmp_path / "no" / "proj.mp4").exists()) == (0, False)


def test_invalid_project_arguments_get_one_message(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    (tmp_path / "bad.png").write_text("no")
    program = script_program(tmp_path / "d.pt", SmallDetector())
    good = tmp_path / "good.png"
    Image.new("RGB", (40, 32)).save(good)
    for arguments, message in [
        ([f"--target={tmp_path / 'bad.png'}", "--loss=pixels"], "bad.png cannot be read (not an image of a"),
        (["--target=/nowhere.png", "--loss=pixels"], "/nowhere.png"),
        (["--target=/nowhere", "--loss=pixels"], "/nowhere does not exist"),
        ([f"--target={good}", "--loss=pixels", "--lr=0"], "--lr=0: must be positive"),
        ([f"--target={good}", "--loss=features"], "specify a program with --detector=FILE"),
        ([f"--target={good}", "--loss=pixels", f"--detector={program}"], "does not use a program"),
    ]:
        result = run("project", f"--network={network}", f"--outdir={out}", *arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output

    def missing(self: DetectorSetup, role: str) -> None:
        raise UserError("not there")

    monkeypatch.setattr(DetectorSetup, "prepare", missing)
    result = run("project", f"--network={network}", f"--outdir={out}", f"--target={good}")
    assert (result.exit_code, "--loss=lpips: not there; or use --loss=pixels" in result.output) == (2, True)
    assert not out.exists()
