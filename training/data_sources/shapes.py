"""Procedural dataset of drawn scenes, of any size, as a pure function of a seed.

A scene has one to three coloured shapes on a plain or gradient background. The front shape is larger than the others,
and the kind of the front shape is the label. Image i depends only on (seed, i, width, height).
"""

from __future__ import annotations

import numpy as np

KINDS = ("circle", "square", "triangle", "ring", "cross")

_MAX_SHAPES = 3
_SHAPE_DRAWS = 7  # kind, x, y, radius, angle, hue, value
_SCENE_DRAWS = 6  # number of shapes, gradient or plain, angle, hue and the two end values of the gradient


def draw_scenes(indices: np.ndarray, *, seed: int, width: int, height: int) -> np.ndarray:
    """Draw the scenes with the given indices, uint8 [B, H, W, 3]."""
    draws = _uniform(indices, seed, _SCENE_DRAWS + _MAX_SHAPES * _SHAPE_DRAWS)  # [B, draws]
    scene, shapes = draws[:, :_SCENE_DRAWS], draws[:, _SCENE_DRAWS:].reshape(-1, _MAX_SHAPES, _SHAPE_DRAWS)
    unit = min(width, height)
    y, x = np.meshgrid(
        (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / unit,
        (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / unit,
        indexing="ij",
    )  # pixel centres [H, W]; the shorter side extends from -1/2 to 1/2

    num_shapes = 1 + (scene[:, 0] ** 2 * _MAX_SHAPES).astype(int)  # one in most scenes
    image = _background(scene, x, y)  # [B, H, W, 3]
    for depth in range(_MAX_SHAPES):  # back to front
        front = depth == _MAX_SHAPES - 1
        shown = np.flatnonzero(num_shapes >= _MAX_SHAPES - depth)
        alpha, color = _shape(shapes[shown, depth], x, y, unit, front=front)
        image[shown] += alpha[..., None] * (color[:, None, None, :] - image[shown])
    return np.rint(image * 255).astype(np.uint8)


def scene_labels(indices: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the kind of the front shape of each scene as an index into KINDS, int64 [B]."""
    draws = _uniform(indices, seed, _SCENE_DRAWS + _MAX_SHAPES * _SHAPE_DRAWS)
    return _kind(draws[:, -_SHAPE_DRAWS:])


def _kind(shape: np.ndarray) -> np.ndarray:
    return (shape[:, 0] * len(KINDS)).astype(np.int64)


def _background(scene: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Draw pale backgrounds [B, H, W, 3]: plain in half of the scenes, else a linear gradient of lightness."""
    is_gradient, angle, hue, start, end = (scene[:, k, None, None] for k in range(1, 6))
    along = np.cos(2 * np.pi * angle) * x + np.sin(2 * np.pi * angle) * y  # [B, H, W]
    t = np.where(is_gradient < 0.5, 0.5, np.clip(along + 0.5, 0, 1))
    value = 0.55 + 0.4 * (start * (1 - t) + end * t)
    tint = _rgb(hue[:, 0, 0], saturation=0.25)  # [B, 3]
    return value[..., None] * tint[:, None, None, :]


def _shape(shape: np.ndarray, x: np.ndarray, y: np.ndarray, unit: int, *, front: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the coverage [B, H, W] and the colour [B, 3] of one shape per scene."""
    center_x, center_y, size, turn = (shape[:, k, None, None] for k in range(1, 5))
    radius = 0.26 + 0.12 * size if front else 0.15 + 0.09 * size  # relative to the shorter side
    spread = 0.35 if front else 0.8
    angle = (turn - 0.5) * 0.6
    dx = (x - spread * (center_x - 0.5)) / radius  # [B, H, W], in units of the radius
    dy = (y - spread * (center_y - 0.5)) / radius
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = np.cos(angle) * dy - np.sin(angle) * dx

    distance = np.empty_like(u)
    kinds = _kind(shape)
    for kind, name in enumerate(KINDS):
        chosen = kinds == kind
        distance[chosen] = _signed_distance(name, u[chosen], v[chosen])
    alpha = np.clip(0.5 - distance * radius * unit, 0, 1)  # one pixel of antialiasing
    return alpha, (0.7 + 0.3 * shape[:, 6, None]) * _rgb(shape[:, 5], saturation=0.9)


def _signed_distance(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1, negative inside; a lower bound outside of corners."""
    if name == "circle":
        return np.hypot(u, v) - 1
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    u, v_abs = np.abs(u), np.abs(v)
    if name == "square":
        return np.maximum(u, v_abs) - 0.85
    if name == "cross":
        return np.maximum(np.maximum(u, v_abs) - 1, np.minimum(u, v_abs) - 0.32)
    return np.maximum(v, np.sqrt(0.75, dtype=np.float32) * u - v / 2) - 0.55  # equilateral triangle, tip up


def _rgb(hue: np.ndarray, *, saturation: float) -> np.ndarray:
    """Convert hue in [0, 1), at full value, to RGB, float32 [B, 3]."""
    phase = (hue[:, None] + np.array([0, 2 / 3, 1 / 3], dtype=np.float32)) % 1
    pure = np.clip(np.abs(phase * 6 - 3) - 1, 0, 1)
    return 1 - saturation * (1 - pure)


def _uniform(indices: np.ndarray, seed: int, num_draws: int) -> np.ndarray:
    """Uniform random numbers in [0, 1) as a function of (seed, index, draw), float32 [B, num_draws].

    Uses the output function of SplitMix64 (Steele, Lea & Flood 2014) as a hash of seed, index and draw.
    """
    state = np.array([[seed]], dtype=np.uint64)
    for counter in (np.asarray(indices, dtype=np.uint64)[:, None], np.arange(num_draws, dtype=np.uint64)):
        state = _mix(state + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
