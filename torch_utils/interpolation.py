"""Interpolation between points: spherical, piecewise linear, cubic spline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Interpolate spherically from a to b, (B, z_dim), at t in [0, 1]; the norm is interpolated linearly."""
    lengths = torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), t)
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    cosine = (a * b).sum(dim=1, keepdim=True)
    across = F.normalize(b - cosine * a, dim=1)
    angle = t * cosine.clamp(-1, 1).acos()
    return lengths * (angle.cos() * a + angle.sin() * across)


def linear_weights(times: Tensor, count: int, *, closed: bool) -> Tensor:
    """Return linear interpolation weights (T, count) at times (T,) for `count` points at times 0, 1, ..., count - 1.

    A closed path returns from the last point to the first between times count - 1 and count.
    """
    before, after, t = _neighbours(times, count, closed)
    points = torch.eye(count, dtype=times.dtype)
    return torch.lerp(points[before], points[after], t)


def spline_weights(times: Tensor, count: int, *, closed: bool) -> Tensor:
    """Return interpolation weights like `linear_weights`, for the cubic spline with continuous second derivative.

    The second derivatives m solve m_{i-1} + 4 m_i + m_{i+1} = 6 (p_{i-1} - 2 p_i + p_{i+1}), with m = 0 at the ends of
    an open path. Between two points, with t from 0 to 1:

        p(t) = (1 - t) p_i + t p_{i+1} + ((1 - t)^3 - (1 - t)) m_i / 6 + (t^3 - t) m_{i+1} / 6
    """
    before, after, t = _neighbours(times, count, closed)
    points = torch.eye(count, dtype=torch.float64)
    neighbours = points.roll(1, dims=0) + points.roll(-1, dims=0)
    left, right = neighbours + 4 * points, 6 * (neighbours - 2 * points)
    if not closed:
        for end in (0, -1):
            left[end], right[end] = points[end], 0
    curvatures = torch.linalg.solve(left, right).to(times.dtype)  # (count, count): m as a function of p
    bend = ((1 - t) ** 3 - (1 - t)) * curvatures[before] + (t**3 - t) * curvatures[after]
    return linear_weights(times, count, closed=closed) + bend / 6


def _neighbours(times: Tensor, count: int, closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the points before and after each time, and the fraction between them, (T, 1)."""
    before = times.floor().long()
    if not closed:
        before = before.clamp(max=max(count - 2, 0))
    t = (times - before).unsqueeze(1)
    if closed:
        return before % count, (before + 1) % count, t
    return before, (before + 1).clamp(max=count - 1), t
