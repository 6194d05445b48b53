"""Average power spectra of real and generated images against the radial frequency.

Every channel of an image in [-1, 1] is multiplied by a Hann window w after its mean, weighted by w, is subtracted:

    P(f) = |F(w (x - mean))(f)|^2 / sum(w^2)

so that white noise of variance s^2 has P = s^2 at every frequency. Powers are averaged over images and channels, and
over the frequencies of a ring: those that round to the same number of cycles per image, along its shorter side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnnlib.config import UserError
from metrics.registry import Measurement, register_metric
from metrics.sampling import (
    FAKES,
    NUM_IMAGES,
    REALS,
    Batches,
    MetricContext,
    choose_reals,
    fake_batches,
    real_batches,
    shape_name,
)
from torch_utils.distributed import all_reduce

MIN_SIDE = 4  # pixels, for a ring between the mean and the highest frequency
MIN_POWER = 1e-10  # -100 dB; rounding to 8 bits adds noise of -53 dB
DECIMALS = 4  # of the curves, in dB


@register_metric(
    "spectrum<N>",
    help="mean absolute difference of the average power spectra of N fakes and N reals, in dB",
    note="calc_metrics.py --plot draws both spectra",
    axes=("radial frequency in cycles per image", "power in dB"),
    protocol="Hann window, mean removed, float64, mean over channels and rings of radial frequency up to the Nyquist "
    "frequency; 50,000 images or <N>, at most all reals",
    paper="none",
)
def spectrum(context: MetricContext, name: str, count: int | None) -> Measurement:
    """Return the mean absolute difference in dB, and the spectra of min(N, all) reals and of N fakes as curves."""
    H, W = context.images.img_shape[1:]
    if min(H, W) < MIN_SIDE:
        raise UserError(f"images of {shape_name(context.images.img_shape)}: needs {MIN_SIDE} pixels per side")
    indices = choose_reals(context, count or NUM_IMAGES)
    num_fakes = count or NUM_IMAGES
    context.progress.plan(name, [(REALS["all"], len(indices)), (FAKES, num_fakes)])
    real = decibels(average_power(context, real_batches(context, indices)))
    fake = decibels(average_power(context, fake_batches(context, num_fakes)))
    return Measurement(
        values={name: float((fake - real).abs().mean())},
        curves={
            "frequency": [float(ring) for ring in range(1, len(real) + 1)],
            "real": [round(power, DECIMALS) for power in real.tolist()],
            "fake": [round(power, DECIMALS) for power in fake.tolist()],
        },
        num_real=len(indices),
        num_fake=num_fakes,
    )


def average_power(context: MetricContext, batches: Batches) -> Tensor:
    """Return the mean power of each ring over uint8 images [B, C, H, W], from one cycle per image. Collective."""
    C, H, W = context.images.img_shape
    total = torch.zeros(H, W, dtype=torch.float64, device=context.device)
    number = torch.zeros(1, dtype=torch.float64, device=context.device)
    for _, images in batches:
        total += power(images.double() / 127.5 - 1).sum(dim=(0, 1))
        number += len(images) * C
    return ring_means(all_reduce(total) / all_reduce(number))


def power(x: Tensor) -> Tensor:
    """Return the power P (..., H, W) of images x (..., H, W) in float64 by frequency, in the order of torch.fft."""
    window = torch.outer(*(torch.hann_window(size, dtype=x.dtype, device=x.device) for size in x.shape[-2:]))
    mean = (x * window).sum(dim=(-2, -1), keepdim=True) / window.sum()
    return torch.fft.fft2((x - mean) * window).abs().square() / window.square().sum()


def ring_means(power: Tensor) -> Tensor:
    """Return the mean power of each ring 1, 2, ... of P (H, W), up to half the number of pixels of the shorter side."""
    H, W = power.shape
    y, x = (torch.fft.fftfreq(size, dtype=power.dtype, device=power.device) for size in (H, W))
    rings = (torch.hypot(y.unsqueeze(1), x) * min(H, W)).round().long().flatten()
    sums = torch.bincount(rings, weights=power.flatten()) / torch.bincount(rings)
    return sums[1 : min(H, W) // 2 + 1]


def decibels(power: Tensor) -> Tensor:
    """Return 10 log10 of powers of at least MIN_POWER."""
    return 10 * power.clamp_min(MIN_POWER).log10()
