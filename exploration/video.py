"""Video writers: MP4 through ffmpeg, GIF through Pillow."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dnnlib.config import UserError, WriteError
from dnnlib.util import counted, import_extra
from exploration.model import atomic_write

QUALITY = "16"  # crf of x264: 0 is lossless, losses become visible at about 18
MIN_FRAME = 128  # minimum longer side of an image in a video; smaller images are upscaled
GIF_FPS = 50  # browsers play a GIF with a higher rate at 10 fps
MP4_FPS = 240  # the highest rate of displays

AddFrame = Callable[[np.ndarray], None]  # uint8 (H, W, 3)


def check_encoder(path: Path, fps: float, *, instead: str = "write a .gif") -> None:
    """Raise UserError for an unsupported suffix or frame rate, or a missing encoder.

    `instead` is the alternative to a missing encoder that the message suggests.
    """
    if not 1 <= fps <= MP4_FPS:
        raise UserError(f"--fps={fps:g}: must be 1 to {MP4_FPS}")
    if path.suffix == ".mp4":
        _ffmpeg(path, instead)
    elif path.suffix != ".gif":
        raise UserError(f"{path}: videos are .mp4 or .gif files")
    elif fps > GIF_FPS:
        raise UserError(f"--fps={fps:g}: browsers show no more than {GIF_FPS} frames of a GIF per second")


def describe_video(path: Path, num_frames: int, fps: float) -> str:
    """Return e.g. "240 frames, 4.0 s at 60 fps, out/morph.mp4"."""
    return f"{counted(num_frames, 'frame')}, {num_frames / fps:.1f} s at {fps:g} fps, {path}"


@contextmanager
def open_video(path: Path, fps: float) -> Iterator[AddFrame]:
    """Yield a function that appends a frame to a new video. The file appears at `path` on success.

    MP4 is H.264 in 4:2:0, for compatibility; odd sides are padded by repeating the last row or column. A GIF loops
    forever and has 256 colours per frame. Its frames last whole hundredths of a second, which match `fps` on average,
    and are kept in memory until the end, one byte per pixel. Raises WriteError, UserError like `check_encoder`, and
    ValueError without a frame.
    """
    check_encoder(path, fps)
    with _gif(path, fps) if path.suffix == ".gif" else _mp4(path, fps) as add:
        yield add


@contextmanager
def _mp4(path: Path, fps: float) -> Iterator[AddFrame]:
    encoder: Any = None

    def add(frame: np.ndarray) -> None:
        nonlocal encoder
        H, W, _ = frame.shape
        frame = np.pad(frame, ((0, H % 2), (0, W % 2), (0, 0)), mode="edge")
        if encoder is None:
            encoder = _start_ffmpeg(path, temporary, frame.shape, fps)
        try:
            encoder.stdin.write(np.ascontiguousarray(frame))
        except OSError:  # the encoder has exited: report its message
            _finish(encoder, path)

    with atomic_write(path) as temporary:
        try:
            yield add
            if encoder is None:
                raise ValueError(f"{path}: a video needs at least one frame")
            _finish(encoder, path)
        finally:
            if encoder is not None and encoder.poll() is None:
                encoder.kill()
                encoder.communicate()


def _start_ffmpeg(path: Path, temporary: Path, shape: tuple[int, ...], fps: float) -> Any:
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{shape[1]}x{shape[0]}", "-r", f"{fps:g}", "-i", "-"]
    result = ["-c:v", "libx264", "-crf", QUALITY, "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    command = [_ffmpeg(path), "-y", "-v", "error", *source, *result, f"file:{temporary}"]  # paths may contain colons
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def _finish(encoder: Any, path: Path) -> None:
    """Flush the encoder and wait for it to exit. Raises WriteError with the last line of its stderr on failure."""
    _, stderr = encoder.communicate()
    if encoder.returncode:
        reason = stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise WriteError(f"{path}: ffmpeg failed ({reason[-1]})")


def _ffmpeg(path: Path, instead: str = "write a .gif") -> str:
    try:
        program: str = import_extra("imageio_ffmpeg", "video").get_ffmpeg_exe()
    except (UserError, RuntimeError) as error:  # RuntimeError: the package has no ffmpeg for this platform
        raise UserError(f"{path}: {error}; or {instead}") from None
    return program


@contextmanager
def _gif(path: Path, fps: float) -> Iterator[AddFrame]:
    frames: list[Image.Image] = []

    def add(frame: np.ndarray) -> None:
        image = Image.fromarray(np.ascontiguousarray(frame))
        frames.append(image.quantize(dither=Image.Dither.NONE))

    with atomic_write(path) as temporary:
        yield add
        if not frames:
            raise ValueError(f"{path}: a video needs at least one frame")
        ends = [round(100 * (index + 1) / fps) for index in range(len(frames))]  # in hundredths of a second
        durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)
