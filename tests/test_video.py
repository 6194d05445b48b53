"""generate.py video: interpolation against closed forms and SciPy; frames and loop closure of decoded files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("imageio_ffmpeg", reason="imageio_ffmpeg is an optional package")
import torch
from exploration_helpers import (
    FAMILIES,
    MOVING,
    decode_video,
    example_directions,
    make_model,
    make_snapshot,
    model_of,
    pixels,
    run,
    run_ok,
    save_untrained,
)
from PIL import Image, ImageSequence
from scipy.interpolate import CubicSpline
from scipy.spatial import geometric_slerp

from dnnlib.config import UserError, WriteError
from exploration import morphing
from exploration.directions import save_directions
from exploration.model import save_styles
from exploration.morphing import (
    Timing,
    render_frames,
    sweep_direction,
    sweep_pose,
    sweep_truncation,
    through_latents,
    through_styles,
)
from exploration.pose import Pose
from exploration.video import check_encoder, open_video
from torch_utils.interpolation import linear_weights, slerp, spline_weights


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("closed", [True, False])
def test_splines_equal_scipy(count: int, closed: bool) -> None:
    points = torch.randn(count, 4, dtype=torch.float64)
    times = torch.linspace(0, max(count - (not closed), 1), 50, dtype=torch.float64)
    trajectory = spline_weights(times, count, closed=closed) @ points
    if count == 1:
        expected = points.expand(50, -1)
    else:
        knots = torch.cat([points, points[:1]]) if closed else points
        reference = CubicSpline(np.arange(len(knots)), knots, bc_type="periodic" if closed else "natural")
        expected = torch.from_numpy(reference(times))
    torch.testing.assert_close(trajectory, expected)
    straight = linear_weights(times, count, closed=closed) @ points
    for i in range(4):
        knots = torch.cat([points, points[:1]])[: count + closed, i] if closed else points[:, i]
        np.testing.assert_allclose(straight[:, i], np.interp(times, np.arange(len(knots)), knots), atol=1e-12)


def test_slerp_equals_scipy() -> None:
    """Directions follow SciPy's slerp on the unit sphere; lengths are interpolated linearly."""
    a, b = torch.randn(2, 1, 5, dtype=torch.float64).unbind()
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    trajectory = slerp(a.expand(9, -1), b.expand(9, -1), t[:, None])
    units = geometric_slerp((a / a.norm())[0].numpy(), (b / b.norm())[0].numpy(), t.numpy())
    lengths = (1 - t) * a.norm() + t * b.norm()
    torch.testing.assert_close(trajectory, torch.from_numpy(units) * lengths[:, None])
    torch.testing.assert_close(slerp(a, a, t[:1, None]), a)


@pytest.mark.parametrize("family", FAMILIES)
def test_interpolation_in_z_turns_by_equal_angles(family: str) -> None:
    """Equal steps between two latents turn z by equal angles; the first and last frames use the latents themselves."""
    model = make_model(family)
    z = torch.randn(1, 2, 16)
    turned: list[torch.Tensor] = []
    model.G.mapping.register_forward_pre_hook(lambda module, args: turned.append(args[0]))
    timing = Timing(num_keys=2, steps=4, loop=False)
    ws = through_latents(model, z, torch.zeros(2, 0), timing, 1.0)(timing.times())
    (made,) = turned
    units = torch.nn.functional.normalize(made[:5].double(), dim=1)
    steps = (units[1:] * units[:-1]).sum(dim=1).acos()
    torch.testing.assert_close(steps, steps[:1].expand(4))
    torch.testing.assert_close(ws[[0, -1], 0], model.map(z[0]))


def test_sweeps_follow_their_formulas() -> None:
    model = make_model()
    keys, w_avg = torch.randn(2, 1, 5, 12), model.G.mapping.w_avg
    for loop, psi, strengths in (
        (True, [0.2, 0.6, 1.0, 0.6], [0, 2, 0, -2]),
        (False, [0.2, 0.4, 0.6, 0.8, 1.0], [-2, -1, 0, 1, 2]),
    ):
        timing = Timing(num_keys=1, steps=4, loop=loop)
        still = through_styles(keys, "w", timing)
        swept = sweep_truncation(still, w_avg, 0.2, 1.0, timing)(timing.times())
        edited = sweep_direction(still, example_directions(), 1, 2.0, timing)(timing.times())
        assert swept.shape == edited.shape == (len(psi), 2, 5, 12)
        for i in range(len(psi)):
            torch.testing.assert_close(swept[i], w_avg + psi[i] * (keys[:, 0] - w_avg))
            expected = keys[:, 0].clone()
            expected[:, 1:3, 1] += strengths[i]
            torch.testing.assert_close(edited[i], expected)


def test_poses_follow_their_formulas() -> None:
    """A loop moves there and back; a whole turn goes on at constant speed."""
    for loop, degrees, fractions, angles in (
        (True, 40, [0, 0.5, 1, 0.5], [0, 20, 40, 20]),
        (True, -360, [0, 0.5, 1, 0.5], [0, -90, -180, -270]),
        (False, 40, [0, 0.25, 0.5, 0.75, 1], [0, 10, 20, 30, 40]),
        (False, 360, [0, 0.25, 0.5, 0.75, 1], [0, 90, 180, 270, 360]),
    ):
        timing = Timing(num_keys=1, steps=4, loop=loop)
        found = sweep_pose(Pose(x=0.4, y=-0.2, degrees=degrees), timing)(timing.times())
        expected = [Pose(x=0.4 * f, y=-0.2 * f, degrees=a) for f, a in zip(fractions, angles, strict=True)]
        torch.testing.assert_close(found, torch.stack([pose.transform for pose in expected]))


def test_every_cell_moves_while_its_image_is_edited() -> None:
    model = model_of(MOVING["stylegan3-r"], batch=4)
    timing = Timing(num_keys=2, steps=3, loop=True)
    keys = model.styles_of(range(4)).unflatten(0, (2, 2))
    path = sweep_truncation(through_styles(keys, "spline", timing), model.G.mapping.w_avg, 1.0, 0.3, timing)
    path = sweep_direction(path, example_directions(), 1, 2.0, timing)
    moving = replace(model, pose=Pose(x=0.25, y=0.1, degrees=30))
    frames = np.stack([*render_frames(moving, path, timing, (2, 1), 1)]).astype(int)
    assert frames.shape == (6, 32, 64, 3)
    for time, fraction in enumerate((0, 0.25, 0.75, 1, 0.75, 0.25)):
        pose = Pose(x=0.25 * fraction, y=0.1 * fraction, degrees=30 * fraction)
        images = replace(model, pose=pose).images(path(torch.tensor([time / 3]))[0])
        expected = images.permute(2, 0, 3, 1).flatten(1, 2).numpy()
        assert np.abs(frames[time] - expected).max() <= 1
    assert np.abs(frames[3, :, :32] - model.images(path(torch.ones(1))[0])[0].permute(1, 2, 0).numpy()).max() > 1


@pytest.mark.parametrize("loop", [0, 1])
def test_a_video_leads_to_the_pose_of_its_options(loop: int, shapes_zip: Path, tmp_path: Path) -> None:
    network = save_untrained(tmp_path / "n.pkl", shapes_zip, MOVING["stylegan3-r"])
    common, motion = (f"--network={network}", "--seeds=5"), ("--translate=0.3,-0.2", "--rotate=45")
    command = ("--frames=4", "--scale=4", f"--loop={loop}", f"--output={tmp_path}/v.gif")
    run_ok("video", *common, *motion, *command)
    frames, _ = decode_video(tmp_path / "v.gif")
    for name, flags in (("plain", ()), ("moved", motion)):
        run_ok("images", *common, *flags, f"--outdir={tmp_path / name}")
    plain, moved = (pixels(tmp_path / name / "seed0005.png").repeat(4, 0).repeat(4, 1) for name in ("plain", "moved"))
    first, last = frames[0].astype(int), frames[2 if loop else 4].astype(int)
    errors = [np.abs(a - b).mean() for a, b in ((first, plain), (last, moved), (first, moved), (last, plain))]
    assert max(errors[:2]) < min(errors[2:]) / 2  # a GIF has 256 colours
    if loop:
        assert np.array_equal(frames[1], frames[3])


def test_loops_close_smoothly() -> None:
    """The step from the last frame to the first is about as long as the previous step, in w, in z and on splines."""
    model = make_model()
    timing = Timing(num_keys=3, steps=8, loop=True)
    z = torch.randn(2, 3, 16)
    keys = model.map(z.flatten(0, 1)).unflatten(0, (2, 3))
    trajectories = [through_styles(keys, "w", timing), through_styles(keys, "spline", timing)]
    trajectories.append(through_latents(model, z, torch.zeros(3, 0), timing, 1.0))
    for trajectory in trajectories:
        ws = trajectory(timing.times())
        assert len(ws) == timing.num_frames == 24
        torch.testing.assert_close(ws[[0, 8, 16]].transpose(0, 1), keys)
        steps = (ws.roll(-1, dims=0) - ws).flatten(2).norm(dim=2)  # (24, cells)
        assert (steps[-1] < 2 * steps[-2]).all()
        assert (steps[-1] > 0.5 * steps[-2]).all()


def test_grid_cells_are_in_row_major_order() -> None:
    model = make_model(batch=5)
    timing = Timing(num_keys=2, steps=2, loop=True)
    keys = torch.stack([model.styles_of((2 * cell, 2 * cell + 1)) for cell in range(6)])
    frames = np.stack(list(render_frames(model, through_styles(keys, "w", timing), timing, (3, 2), 2)))
    assert frames.shape == (4, 2 * 64, 3 * 64, 3)
    image = model.images(keys[4, 1:])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(frames[2, 64:128:2, 64:128:2], image)  # row 1, column 1


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_video_files_contain_the_frames(ending: str, shapes_zip: Path, tmp_path: Path) -> None:
    """Keyframes equal the images of the seeds up to compression losses; the last frame leads back to the first."""
    network, path = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "new" / f"v.{ending}"
    run_ok("video", f"--network={network}", "--seeds=1-3", "--frames=5", "--fps=10", "--scale=4", f"--output={path}")
    run_ok("images", f"--network={network}", "--seeds=1-3", f"--outdir={tmp_path}")
    frames, fps = decode_video(path)
    assert frames.shape == (15, 128, 128, 3)
    assert fps == 10
    images = [pixels(tmp_path / f"seed{seed:04d}.png").repeat(4, axis=0).repeat(4, axis=1) for seed in (1, 2, 3)]
    for key, image in enumerate(images):
        distances = [np.abs(frame.astype(float) - image).mean() for frame in frames]
        assert np.argmin(distances) == 5 * key
        assert distances[5 * key] < 8
    steps = np.abs(frames.astype(float) - np.roll(frames, -1, axis=0)).mean(axis=(1, 2, 3))
    assert steps[-1] < 1.5 * steps[:-1].max()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_odd_sizes_and_grayscale_images_are_encoded(shapes_zip: Path, tmp_path: Path) -> None:
    """A grayscale network of 24 x 40 pixels in three columns, and videos of 3 x 5 pixels."""
    network = make_snapshot(
        tmp_path / "n.pkl", shapes_zip, img_channels=1, base=(3, 5), widths=(8, 8, 8, 8), layers=(1,) * 4
    )
    run_ok(
        "video",
        f"--network={network}",
        "--seeds=0-2",
        "--grid=3x1",
        "--frames=3",
        "--scale=1",
        f"--output={tmp_path}/v.mp4",
    )
    assert decode_video(tmp_path / "v.mp4")[0].shape == (3, 24, 120, 3)
    for ending, shape in (("mp4", (2, 4, 6, 3)), ("gif", (2, 3, 5, 3))):
        with open_video(tmp_path / f"odd.{ending}", 25) as add:
            for value in (0, 200):
                add(np.full((3, 5, 3), value, np.uint8))
        frames, _ = decode_video(tmp_path / f"odd.{ending}")
        assert frames.shape == shape
        assert abs(frames[1].astype(int) - 200).max() < 6


def test_classes_become_keyframes(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, c_dim=3)
    common = [f"--network={network}", "--frames=2", "--scale=4"]
    for interpolation in ("w", "z", "spline"):
        path = tmp_path / f"{interpolation}.gif"
        run_ok("video", *common, "--seeds=5", "--classes=2,0", f"--interpolation={interpolation}", f"--output={path}")
        frames, _ = decode_video(path)
        for key, index in enumerate((2, 0)):
            run_ok("images", f"--network={network}", "--seeds=5", f"--class={index}", f"--outdir={tmp_path}")
            image = pixels(tmp_path / "seed0005.png").repeat(4, axis=0).repeat(4, axis=1)
            assert np.abs(frames[2 * key].astype(float) - image).mean() < 8
    result = run("video", *common, "--seeds=5-7", "--classes=2,0", f"--output={tmp_path}/x.gif")
    assert (result.exit_code, "2 classes and 3 seeds per cell" in result.output) == (2, True)
    result = run("video", *common, "--seeds=5", "--classes=1,3", f"--output={tmp_path}/x.gif")
    assert (result.exit_code, "--classes=3: this network has the classes 0..2" in result.output) == (2, True)


def test_videos_of_saved_styles_equal_those_of_seeds(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)
    save_styles(tmp_path / "w.npz", make_model().styles_of((4,)))
    save_directions(tmp_path / "d.npz", example_directions())
    common = [f"--network={network}", "--frames=4", "--scale=4", f"--direction={tmp_path}/d.npz:0", "--strength=2"]
    for source, name in ((f"--projected-w={tmp_path}/w.npz", "w"), ("--seeds=4", "seed")):
        run_ok("video", *common, source, f"--output={tmp_path}/{name}.gif")
    ours, theirs = (decode_video(tmp_path / f"{name}.gif")[0] for name in ("w", "seed"))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours[1], ours[3])


def test_invalid_video_arguments_get_one_message(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, out = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / "out"
    for arguments, message in [
        (["--output=x.avi"], "x.avi: videos are .mp4 or .gif files"),
        (["--fps=60"], "--fps=60: browsers show no more than 50 frames of a GIF per second"),
        (["--grid=2x1"], "--grid: 3 keyframes cannot be divided evenly among 2 cells"),
        (["--fps=nan"], "'nan' is not a finite number"),
        (["--fps=0.5"], "--fps=0.5: must be 1 to 240"),
        (["--fps=241", "--output=x.mp4"], "--fps=241: must be 1 to 240"),
        (["--frames=0"], "0 is not in the range x>=1"),
        (["--seeds=0", "--frames=1"], "--frames=1: one frame is not a video; specify more frames or more keyframes"),
        (["--grid=2x" + "9" * 5000], "is not a number of columns and rows such as 3x2"),
        (["--grid=2"], "is not a number of columns and rows such as 3x2"),
        (["--strength=2"], "specify one with --direction"),
        (["--projected-w=w.npz", "--interpolation=z"], "cannot be combined with --interpolation=z"),
        (["--classes=0", "--class=0"], "--classes: cannot be combined with --class or --label"),
        (["--output=/proc/x/v.gif"], "--output=/proc/x/v.gif: cannot be written"),
    ]:
        result = run("video", f"--network={network}", "--seeds=0-2", f"--output={out}/v.gif", *arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install '.\[video\]'; or write a .gif"):
        check_encoder(tmp_path / "v.mp4", 30)


@pytest.mark.parametrize(
    ("num_keys", "loop", "fps", "steps", "num_frames"),
    [
        *((1, True, 30, 120, 120), (2, True, 30, 60, 120), (2, False, 30, 120, 121), (4, True, 60, 120, 480)),
        *((1, True, 12.5, 50, 50), (3, False, 24.9, 50, 101)),
    ],
)
def test_default_intervals_last_2_s_and_videos_4_s(
    num_keys: int, loop: bool, fps: float, steps: int, num_frames: int
) -> None:
    timing = Timing.paced(num_keys, frames=None, fps=fps, loop=loop)
    assert (timing.steps, timing.num_frames) == (steps, num_frames)
    assert Timing.paced(num_keys, frames=7, fps=fps, loop=loop).steps == 7


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_the_length_is_printed_before_rendering(
    ending: str, shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = make_snapshot(tmp_path / "n.pkl", shapes_zip), tmp_path / f"v.{ending}"
    command = (f"--network={network}", "--seeds=1-3", "--frames=5", "--fps=12.5", f"--output={path}")
    output = run_ok("video", *command)
    assert output.startswith(f"15 frames, 1.2 s at 12.5 fps, {path}\n")
    assert f"{path}: {path.stat().st_size / 1000:,.0f} kB\n" in output
    monkeypatch.setattr(morphing, "render_frames", lambda *_: 1 / 0)
    result = run("video", *command)
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.output.startswith("15 frames, 1.2 s")


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_a_video_without_frames_is_an_error(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"v.{ending}"
    with pytest.raises(ValueError, match="a video needs at least one frame"), open_video(path, 10):
        pass
    assert not list(tmp_path.iterdir())


def test_gifs_keep_the_frame_rate(tmp_path: Path) -> None:
    """30 frames per second in hundredths of a second: 3, 4, 3, and so on."""
    with open_video(tmp_path / "v.gif", 30) as add:
        for value in range(30):
            add(np.full((4, 4, 3), value, np.uint8))
    with Image.open(tmp_path / "v.gif") as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert durations == [30, 40, 30] * 10


def test_a_colon_in_a_path_is_not_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    for path in (Path("a:b/v.mp4"), Path("c:d.mp4")):
        with open_video(path, 10) as add:
            add(np.zeros((16, 16, 3), np.uint8))
        assert decode_video(tmp_path / path)[0].shape == (1, 16, 16, 3)


def test_unwritable_paths_are_refused_before_the_first_frame(tmp_path: Path) -> None:
    for ending in ("mp4", "gif"):
        (tmp_path / f"v.{ending}").mkdir()
        for path, reason in (
            (tmp_path / f"v.{ending}", "Is a directory"),
            (tmp_path / "no" / f"v.{ending}", "No such"),
        ):
            with pytest.raises(WriteError, match=f"cannot be written .{reason}"), open_video(path, 10):
                pytest.fail("the video was opened")


def test_an_error_keeps_the_old_video(tmp_path: Path) -> None:
    def write(path: Path, count: int, error: type[Exception] | None = None, width: int = 16) -> None:
        with open_video(path, 10) as add:
            for _ in range(count):
                add(np.zeros((16, width, 3), np.uint8))
            if error:
                raise error

    for path in (tmp_path / "v.mp4", tmp_path / "v.gif"):
        path.write_text("old")
        with pytest.raises(KeyError):
            write(path, 1, KeyError)
        assert path.read_text() == "old"
    with pytest.raises(WriteError, match="ffmpeg failed"):
        write(tmp_path / "v.mp4", 100_000, width=40_000)  # wider than x264 supports
    assert len(list(tmp_path.iterdir())) == 2
