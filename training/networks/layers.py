"""Layers and functions shared by several networks. Tokens are (B, N, C), images (B, C, H, W)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, field_names
from torch_utils.images import square_resolution
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upfirdn2d
from training.networks import execution
from training.networks.convolution import conv2d, halving_conv2d
from training.networks.weights import effective

# Restricted to activations with act(g x) = g act(x) for g > 0, because the layers fold output gains into the weights.
Activation = Literal["linear", "lrelu"]
ACTIVATION_GAINS: dict[Activation, float] = {"linear": 1.0, "lrelu": math.sqrt(2)}

NoiseMode = Literal["const", "random", "none"]


def resample_filter() -> Tensor:
    """Return the 1-D taps of the separable binomial filter used for up- and downsampling (StyleGAN2, appendix B)."""
    return torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


class Resampling(nn.Module):
    """Base class of layers that linearly resample tokens (B, N, C) between or within grids, alike in all channels.

    Each output channel is computed from GROUP consecutive input channels.
    """

    GROUP: ClassVar[int] = 1

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid


class ImageShape:
    """Mixin that derives StyleGAN2-ADA's attributes `img_channels` and `img_resolution` from `img_shape` (C, H, W)."""

    img_shape: tuple[int, int, int]

    @property
    def img_channels(self) -> int:
        """Number of image channels."""
        return self.img_shape[0]

    @property
    def img_resolution(self) -> int:
        """Side of square images, in pixels. Raises ValueError if the images are not square."""
        return square_resolution(self.img_shape)


# Larger than any practical network. The limits prevent a single number in a file from exhausting memory.
_MAX_LAYERS, _MAX_SIZE = 1000, 2**20


def check_limits(config: Any) -> None:
    """Raise ConfigError for the first field of `config` that exceeds _MAX_LAYERS or _MAX_SIZE."""
    for name in field_names(config):
        value = getattr(config, name)
        limit = _MAX_LAYERS if "layers" in name or name == "resolutions" else _MAX_SIZE
        items = value if isinstance(value, tuple) else (value,)
        numbers = [item for item in items if isinstance(item, int)]
        total = sum(numbers) if limit == _MAX_LAYERS else 0
        if len(items) > _MAX_LAYERS or max(total, *numbers, 0) > limit:
            raise ConfigError(name, value, f"too large for a network: must be at most {limit}")


def check_labels(c: Tensor | None, c_dim: int, batch: int) -> None:
    """Raise ValueError unless `c` has shape (batch, c_dim); None is accepted if c_dim is 0."""
    found = (batch, 0) if c is None else tuple(c.shape)
    if found != (batch, c_dim):
        raise ValueError(f"labels have shape {found}, this network needs {(batch, c_dim)}: one one-hot row per image")


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """Normalize each row of x (B, C) to unit mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def uniform_weight(out_features: int, in_features: int) -> nn.Parameter:
    """Create a weight matrix (out, in), without equalised learning rate, from U(-1/sqrt(in), 1/sqrt(in))."""
    bound = 1 / math.sqrt(in_features)
    return nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))


def limit_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalize each row of x (rows, C) to a largest absolute value of 1 if `dtype` is float16; return x otherwise.

    Prevents products from exceeding float16's maximum, 65,504. Use only for weights and styles, because demodulation
    cancels their scale.
    """
    return x / x.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) if dtype == torch.float16 else x


def scaled_noise(const: Tensor, strength: Tensor, mode: NoiseMode, batch: int) -> Tensor:
    """Noise input (StyleGAN, section 3.2), shared by all channels: `strength` * n with n ~ N(0, 1).

    Mode 'const' uses n = `const` (h, w), or (batch, h, w) if a projection optimizes one noise map per image. Mode
    'random' draws one map per image from torch's global RNG, 'none' returns zeros. Returns (batch or 1, h, w) in the
    dtype of `const`.
    """
    noise = const.reshape(-1, *const.shape[-2:])
    if mode == "none":
        return torch.zeros_like(noise)
    if mode == "random":
        noise = torch.randn(batch, *noise.shape[1:], dtype=noise.dtype, device=noise.device)
    return noise * strength


def to_tokens(x: Tensor) -> Tensor:
    """Reshape a feature map (B, C, H, W) to tokens (B, H W, C); token y W + x is pixel (y, x)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape tokens (B, H W, C) to a feature map (B, C, H, W) on the grid (H, W)."""
    return x.transpose(1, 2).unflatten(2, grid)


class FullyConnected(nn.Module):
    """Fully connected layer with equalised learning rate (ProGAN, section 4.1) and learning rate multiplier m.

        y = act(x (W m / sqrt(in))^T + b m)

    W is initialized from N(0, 1) / m, b with `bias_init`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Activation = "linear",
        multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight_gain = multiplier / math.sqrt(in_features)
        self.bias_gain = multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))

    def forward(self, x: Tensor) -> Tensor:
        # Scale x instead of W, because x has fewer elements in every use.
        bias = effective(self.bias, self.bias.dtype, self.bias_gain)
        return bias_act(F.linear(x * self.weight_gain, self.weight), bias, act=self.activation)


class Conv2d(nn.Module):
    """Convolution with equalised learning rate, optional downsampling by 2, bias and activation.

        y = clamp(gain act(conv(x, W / sqrt(in k^2)) + b))

    Computed in the dtype of x. `gain` multiplies both the gain of the activation and the clamp, so clamped outputs
    are scaled as well. down=2 applies the filter [1, 3, 3, 1] with zero padding and halves the size, which must be
    even.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        down: Literal[1, 2] = 1,
        bias: bool = True,
        activation: Activation = "linear",
        gain: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.down = down
        self.padding = kernel_size // 2
        self.activation = activation
        self.clamp = None if clamp is None else clamp * gain
        self.gain = ACTIVATION_GAINS[activation] * gain
        self.weight_gain = self.gain / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        if down == 2:
            self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Apply the gain to weight and bias, which have far fewer elements than the output.
        weight = effective(self.weight, x.dtype, self.weight_gain)
        bias = None if self.bias is None else effective(self.bias, self.bias.dtype, self.gain)
        if self.down == 1:
            x = conv2d(x, weight, padding=self.padding)
        elif self.padding == 0:
            # A pointwise convolution commutes with subsampling, so subsample first.
            x = conv2d(upfirdn2d(x, self.resample_filter, down=2, padding=1), weight)
        else:
            x = halving_conv2d(x, weight, self.resample_filter)
        return bias_act(x, bias, act=self.activation, gain=1.0, clamp=self.clamp)


class MinibatchStd(nn.Module):
    """Append the minibatch standard deviation of each group as one constant channel, (B, C, H, W) -> (B, C + 1, H, W).

        std_g = mean_{c,h,w} sqrt(Var_{b in g}(x_bchw) + 1e-8)        ProGAN, section 3

    Groups of G = min(`group_size`, B) images are strided: image b belongs to group b mod (B/G), so neighbours in a
    batch are in different groups. Raises ValueError if G does not divide B. A batch may concatenate several minibatches
    (`execution.current.minibatches`); B is then the size of one, and groups stay within a minibatch.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        M, (C, H, W) = execution.current.minibatches, x.shape[1:]
        B = len(x) // M
        G = min(self.group_size, B)
        if B % G:
            raise ValueError(
                f"a minibatch of {B} images cannot be cut into minibatch-std groups of {G}: "
                f"choose a batch size per GPU that is a multiple of {G}, or change mbstd_group_size"
            )

        groups = x.reshape(M, G, B // G, C, H, W)
        std = groups.var(dim=1, correction=0).add(1e-8).sqrt()  # (M, B/G, C, H, W)
        spread = std.mean(dim=(2, 3, 4), keepdim=True)  # (M, B/G, 1, 1, 1)
        spread = spread.unsqueeze(1).expand(M, G, -1, 1, H, W).reshape(M * B, 1, H, W)
        return torch.cat([x, spread], dim=1)  # (M B, C+1, H, W)
