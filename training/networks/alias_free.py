"""Parts of alias-free networks (Karras et al. 2021, "Alias-free generative adversarial networks", StyleGAN3).

A signal is a continuous function of the position, of which a grid stores samples. Positions are in units of the image:
it spans [-0.5, 0.5] along both axes, and a grid extends beyond it by a margin. Frequencies, cutoffs and sampling rates
are in cycles or samples per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_utils.filters import lowpass
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from training.networks import execution
from training.networks.layers import FullyConnected

Grid = tuple[int, int]  # (height, width)
TAPS = 6  # of a filter, per sample of the lower of its two rates
OVERSAMPLING = 2  # of the leaky ReLU, relative to the higher of the rates around it


@dataclass(frozen=True, kw_only=True)
class Band:
    """Samples of a signal: `size` per side at a sampling rate, of which `rate` span the image and the rest margins.

    The signal has frequencies up to `cutoff`, with a transition band of this half width around it.
    """

    rate: int
    size: int
    cutoff: float
    half_width: float

    @property
    def grid(self) -> Grid:
        """Samples in both directions."""
        return self.size, self.size


class FourierInput(nn.Module):
    """Fourier features (B, C, h, w) of the positions of a grid, which w rotates and shifts.

        x = W (a * sin(2 pi (f . T p + phi))) / sqrt(C)

    The frequencies f are inside a disc of radius `cutoff`, the phases phi in [-0.5, 0.5], and the amplitudes a
    fade out beyond the disc, up to half the sampling `rate`, for transforms that enlarge f. The transform T of a
    position p is a rotation and a shift, affine in w and initially the identity, after that of
    `execution.current.input_transform` (1 or B, 3, 3), if any.
    """

    frequencies: Tensor  # (C, 2): x and y
    phases: Tensor  # (C,)
    points: Tensor  # (h w, 2): x and y

    def __init__(self, w_dim: int, channels: int, grid: Grid, *, rate: int, cutoff: float) -> None:
        super().__init__()
        self.grid, self.rate, self.cutoff = grid, rate, cutoff
        self.affine = FullyConnected(w_dim, 4)
        with torch.no_grad():
            self.affine.weight.zero_()
            self.affine.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.register_buffer("frequencies", disc_points(channels) * cutoff)
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        self.register_buffer("points", positions(grid, rate), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Map the output t (B, 4) of the affine layer to features: cosine and sine of the angle, shifts in x and y."""
        transform = rigid_transform(t)
        if execution.current.input_transform is not None:
            transform = transform @ execution.current.input_transform.to(transform)
        frequencies = self.frequencies @ transform[:, :2, :2]  # (B, C, 2)
        phases = self.phases + (self.frequencies @ transform[:, :2, 2:]).squeeze(2)  # (B, C)
        fade = (frequencies.norm(dim=2) - self.cutoff) / (self.rate / 2 - self.cutoff)
        amplitudes = (1 - fade).clamp(0, 1)
        waves = torch.sin(2 * math.pi * (self.points @ frequencies.mT + phases.unsqueeze(1))) * amplitudes.unsqueeze(1)
        x = waves @ self.weight.t() / math.sqrt(len(self.weight))  # (B, N, C)
        return x.mT.unflatten(2, self.grid)


def disc_points(count: int) -> Tensor:
    """Return random points (count, 2) in the unit disc: n / (|n| exp(|n|^2)^(1/4)) with n from N(0, I)."""
    n = torch.randn(count, 2)
    radii = n.norm(dim=1, keepdim=True)
    return n / (radii * radii.square().exp().pow(0.25))


def rigid_transform(t: Tensor) -> Tensor:
    """Return matrices (B, 3, 3) of a rotation after a shift, for t (B, 4): cosine and sine times a norm, x and y.

    The whole of t is divided by the norm. The transform is that of positions, so the image moves the other way.
    """
    cos, sin, x, y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(dim=1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rotation = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).unflatten(1, (3, 3))
    shift = torch.stack([one, zero, -x, zero, one, -y, zero, zero, one], dim=1).unflatten(1, (3, 3))
    return rotation @ shift


def positions(grid: Grid, rate: int) -> Tensor:
    """Return the positions (h w, 2), x and y, of the samples of a grid (h, w), row by row."""
    rows, columns = ((torch.arange(side) - (side - 1) / 2) / rate for side in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


class FilteredActivation(nn.Module):
    """Bias, and a leaky ReLU at a higher sampling rate, from one band to another: upsample, act, downsample, crop.

    The input (B, C, in + extra, in + extra) has `extra` more samples than its band, of a convolution with padding. The
    filters keep the band of the input and of the output. With `is_radial`, the second is radially symmetric. A linear
    activation has no filters; its bands must have the same rate.
    """

    up_filter: Tensor | None
    down_filter: Tensor | None

    def __init__(
        self,
        channels: int,
        source: Band,
        target: Band,
        *,
        extra: int,
        clamp: float | None,
        is_linear: bool = False,
        is_radial: bool = False,
    ) -> None:
        super().__init__()
        self.clamp, self.is_linear = clamp, is_linear
        self.source, self.target = source, target
        rate = source.rate if is_linear else OVERSAMPLING * max(source.rate, target.rate)
        self.up, self.down = rate // source.rate, rate // target.rate
        taps_up, taps_down = (TAPS * factor if factor > 1 else 1 for factor in (self.up, self.down))
        self.bias = nn.Parameter(torch.zeros(channels))
        up_filter = lowpass(taps_up, source.cutoff, 2 * source.half_width, rate)
        down_filter = lowpass(taps_down, target.cutoff, 2 * target.half_width, rate, is_radial=is_radial)
        self.register_buffer("up_filter", up_filter, persistent=False)
        self.register_buffer("down_filter", down_filter, persistent=False)
        self.padding = centred_padding(source.size + extra, target.size, self.up, self.down, taps_up, taps_down)

    def forward(self, x: Tensor) -> Tensor:
        return filtered_lrelu(
            x,
            self.up_filter,
            self.down_filter,
            self.bias,
            up=self.up,
            down=self.down,
            padding=self.padding,
            gain=1.0 if self.is_linear else math.sqrt(2),
            slope=1.0 if self.is_linear else 0.2,
            clamp=self.clamp,
        )

    def resample(self, x: Tensor) -> Tensor:
        """Resample x (B, C, in, in) from one band to the other without bias and leaky ReLU, for `extra` = 0."""
        return filtered_lrelu(
            x, self.up_filter, self.down_filter, up=self.up, down=self.down, padding=self.padding, gain=1.0, slope=1.0
        )


def centred_padding(
    in_size: int, out_size: int, up: int, down: int, taps_up: int, taps_down: int
) -> tuple[int, int, int, int]:
    """Return the padding (x0, x1, y0, y1), negative to crop, of a resampling whose output has the same centre."""
    total = (out_size - 1) * down + 1 - in_size * up + taps_up + taps_down - 2
    first = (total + up) // 2
    return first, total - first, first, total - first
