"""StyleGAN3's layers in float64 NumPy and SciPy, from the equations of the paper, one image and channel at a time."""

from __future__ import annotations

import math

import numpy as np
import scipy.signal
import scipy.special


def firwin(taps: int, cutoff: float, width: float, rate: float) -> np.ndarray:
    """Return SciPy's Kaiser low-pass filter."""
    taps_of: np.ndarray = scipy.signal.firwin(taps, cutoff, width=width, fs=rate)
    return taps_of


def radial_filter(taps: int, cutoff: float, width: float, rate: float) -> np.ndarray:
    """Return the windowed jinc filter (taps, taps) of sum 1."""
    t = (np.arange(taps) - (taps - 1) / 2) / rate
    r = np.hypot(*np.meshgrid(t, t))
    jinc = scipy.special.j1(2 * math.pi * cutoff * r) / (math.pi * r)
    beta = scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(taps, width / (rate / 2)))
    window = scipy.signal.windows.kaiser(taps, beta, sym=True)
    found: np.ndarray = jinc * window[:, None] * window[None, :]
    return found / found.sum()


def resample(x: np.ndarray, f: np.ndarray, up: int, down: int, padding: tuple[int, int]) -> np.ndarray:
    """Insert zeros, pad or crop, convolve with a filter [taps] or [taps, taps], and subsample a map (H, W)."""
    f = np.outer(f, f) if f.ndim == 1 else f
    large = np.zeros((x.shape[0] * up, x.shape[1] * up))
    large[::up, ::up] = x
    before, after = padding
    large = np.pad(large, (max(before, 0), max(after, 0)))
    large = large[max(-before, 0) : len(large) - max(-after, 0), max(-before, 0) : len(large) - max(-after, 0)]
    found: np.ndarray = scipy.signal.convolve2d(large, f, mode="valid")[::down, ::down]
    return found


def filtered_lrelu(
    x: np.ndarray,
    fu: np.ndarray,
    fd: np.ndarray,
    b: np.ndarray,
    *,
    up: int,
    down: int,
    padding: tuple[int, int],
    gain: float,
    slope: float,
    clamp: float,
) -> np.ndarray:
    """Apply the operator to maps (C, H, W)."""
    outputs = []
    for channel, bias in zip(x, b, strict=True):
        y = resample(channel + bias, fu, up, 1, padding) * up**2
        y = np.clip(np.where(y > 0, y, slope * y) * gain, -clamp, clamp)
        outputs.append(resample(y, fd, 1, down, (0, 0)))
    return np.stack(outputs)


def modulated_conv(x: np.ndarray, weight: np.ndarray, style: np.ndarray, magnitude: float) -> np.ndarray:
    """Convolve maps (I, H, W) with normalised, modulated and demodulated weights (O, I, k, k), padded by k - 1."""
    weight = weight / np.sqrt((weight**2).mean(axis=(1, 2, 3), keepdims=True))
    weight = weight * (style / np.sqrt((style**2).mean()))[None, :, None, None]
    weight = weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True))
    x = x / math.sqrt(magnitude)
    return np.stack([sum(scipy.signal.correlate2d(x[i], w[i], mode="full") for i in range(len(x))) for w in weight])


def fourier_features(
    t: np.ndarray,
    frequencies: np.ndarray,
    phases: np.ndarray,
    weight: np.ndarray,
    *,
    size: int,
    rate: int,
    cutoff: float,
) -> np.ndarray:
    """Evaluate the input (C, size, size) at each position: rotate by the angle of t after a shift by -t_x, -t_y."""
    c, s, tx, ty = t / math.hypot(t[0], t[1])
    maps = np.zeros((len(phases), size, size))
    for row in range(size):
        for column in range(size):
            x, y = (column - (size - 1) / 2) / rate - tx, (row - (size - 1) / 2) / rate - ty
            x, y = c * x - s * y, s * x + c * y
            maps[:, row, column] = np.sin(2 * math.pi * (frequencies[:, 0] * x + frequencies[:, 1] * y + phases))
    fade = (np.hypot(*frequencies.T) - cutoff) / (rate / 2 - cutoff)
    maps *= np.clip(1 - fade, 0, 1)[:, None, None]
    found: np.ndarray = np.einsum("oi,ihw->ohw", weight, maps) / math.sqrt(len(phases))
    return found


def relative_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, points: np.ndarray, log_width: float, wavelengths: np.ndarray
) -> np.ndarray:
    """Attention of one head over tokens (N, D), from pairwise differences of their points (N, 2), without a mask."""
    depth = q.shape[1]
    logits = np.zeros((len(q), len(q)))
    for i in range(len(q)):
        for j in range(len(q)):
            difference = points[i] - points[j]
            angles = 2 * math.pi * np.concatenate([difference[0] / wavelengths, difference[1] / wavelengths])
            pairs = q[i].reshape(-1, 2) @ np.array([1, 1j]) * np.conj(k[j].reshape(-1, 2) @ np.array([1, 1j]))
            logits[i, j] = (pairs * np.exp(1j * angles)).real.sum() / math.sqrt(depth)
            logits[i, j] -= (difference**2).sum() / (2 * math.exp(2 * log_width))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = weights / weights.sum(axis=1, keepdims=True) @ v
    return found
