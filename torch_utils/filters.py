"""Low-pass FIR filters for alias-free resampling (Karras et al. 2021, "Alias-free generative adversarial networks")."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def lowpass(taps: int, cutoff: float, width: float, rate: float, *, is_radial: bool = False) -> Tensor | None:
    """Return the taps of a windowed low-pass filter of sum 1 in float32; None for a single tap, the identity.

    `cutoff`, `width` of the transition band and `rate`, the sampling rate, share a unit. The filter is separable,
    [taps], with a Kaiser window (Kaiser 1974), or radially symmetric, [taps, taps]: the jinc function times the outer
    product of the window. Raises ValueError for fewer than one tap and a cutoff outside 0..rate/2.
    """
    if taps < 1 or not 0 < cutoff <= rate / 2:
        raise ValueError(f"taps={taps}, cutoff={cutoff:g}, rate={rate:g}: needs a tap and a cutoff up to half the rate")
    if taps == 1:
        return None
    filter = radial_taps if is_radial else separable_taps
    return torch.from_numpy(filter(taps, cutoff, width, rate)).float()


def separable_taps(taps: int, cutoff: float, width: float, rate: float) -> np.ndarray:
    """Return (taps,) in float64: sinc(2 cutoff t) times the window, normalised to sum 1."""
    t = (np.arange(taps) - (taps - 1) / 2) / rate
    found = np.sinc(2 * cutoff * t) * kaiser_window(taps, width, rate)
    return found / found.sum()


def radial_taps(taps: int, cutoff: float, width: float, rate: float) -> np.ndarray:
    """Return (taps, taps) in float64: J1(2 pi cutoff r) / (pi r) times the window, normalised to sum 1."""
    t = (np.arange(taps) - (taps - 1) / 2) / rate
    r = np.hypot(t[:, None], t[None, :])
    jinc = np.divide(bessel_j1(2 * math.pi * cutoff * r), math.pi * r, out=np.full_like(r, cutoff), where=r > 0)
    window = kaiser_window(taps, width, rate)
    found = jinc * np.outer(window, window)
    return found / found.sum()


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """Return the Bessel function J1(x) = (1 / pi) integral of cos(t - x sin t) over 0..pi.

    The midpoint rule converges exponentially for periodic functions once it has more than |x| points.
    """
    count = 64 + 2 * math.ceil(np.abs(x).max())
    t = np.pi * (np.arange(count) + 0.5) / count
    values: np.ndarray = np.cos(t - x[..., None] * np.sin(t)).mean(axis=-1)
    return values


def kaiser_window(taps: int, width: float, rate: float) -> np.ndarray:
    """Return the Kaiser window (taps,) whose filter has a transition band of this width.

    Attenuation A = 2.285 (taps - 1) pi width / (rate / 2) + 7.95 in dB; beta from A by Kaiser's formula.
    """
    attenuation = 2.285 * (taps - 1) * math.pi * width / (rate / 2) + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation > 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    return np.kaiser(taps, beta)
