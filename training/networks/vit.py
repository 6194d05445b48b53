"""Pre-norm transformer blocks over a grid of tokens, of which TransGAN builds both its networks (Jiang et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.config import ConfigError, setting
from training.networks import execution
from training.networks.attention import Attention, attend, split_heads
from training.networks.generator import Grid, NoiseMode
from training.networks.grid_attention import AxisAttention, CellAttention, Form, NystromAttention
from training.networks.layers import scaled_noise

Norm = Literal["token", "layer"]
Position = Literal["absolute", "relative", "both"]

MLP_RATIO = 4  # width of the hidden layer, in units of the block's


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Normalisation and attention of a network's blocks.

    `attention` is `full` among all tokens, `grid` inside windows of `window` x `window` tokens, `axis` along rows and
    columns, `nystrom` by `landmarks`.
    """

    num_heads: int = setting(4, "Attention heads.", at_least=1)
    norm: Norm = setting("token", "Normalisation: token-wise or LayerNorm.")
    position: Position = setting("both", "Positions: an embedding per token of a stage, a bias per offset, or both.")
    attention: Form = setting("grid", "Form of attention where there are many tokens.")
    window: int = setting(16, "Side of the windows of grid attention, in tokens.", at_least=1)
    landmarks: int = setting(64, "Landmarks of nystrom attention.", at_least=1)
    attention_noise: bool = setting(False, "Noise of learned strength, added to the tokens before self-attention.")

    def check_width(self, field: str, width: int) -> None:
        """Raise ConfigError, naming `field`, unless the heads share the width evenly."""
        if width < 1 or width % self.num_heads:
            problem = f"every width must be a positive multiple of the {self.num_heads} heads, {width} is not"
            raise ConfigError(field, getattr(self, field), problem)

    def check_grid(self, grid: Grid) -> None:
        """Raise ConfigError when `attention` cannot be cut into windows or segments on this grid."""
        height, width = grid
        if self.attention == "grid" and (height % self.window or width % self.window):
            common = math.gcd(height, width)
            options = ", ".join(str(n) for n in range(common, 1, -1) if common % n == 0)
            raise ConfigError("window", self.window, f"does not divide the grid {height}x{width}; what does: {options}")
        if self.attention == "nystrom" and height * width % self.landmarks:
            options = ", ".join(str(n) for n in range(min(height * width, 256), 15, -1) if height * width % n == 0)
            problem = f"does not divide the {height * width} tokens of the grid {height}x{width}; what does: {options}"
            raise ConfigError("landmarks", self.landmarks, problem)

    @property
    def has_absolute(self) -> bool:
        """Whether stages have an embedding per token."""
        return self.position != "relative"

    @property
    def has_relative(self) -> bool:
        """Whether blocks have a bias per offset."""
        return self.position != "absolute"

    def build_attention(self, grid: Grid, *, is_full: bool) -> Attention:
        """Attention among the tokens of a grid: among all, or in the configured form."""
        heads, relative = self.num_heads, self.has_relative
        if is_full or self.attention == "full":
            return CellAttention(heads, grid, grid, use_relative=relative)
        if self.attention == "grid":
            return CellAttention(heads, grid, (self.window, self.window), use_relative=relative)
        if self.attention == "axis":
            return AxisAttention(heads, grid, use_relative=relative)
        return NystromAttention(heads, self.landmarks)

    def build_noise(self, num_tokens: int) -> TokenNoise | None:
        """The noise on the tokens of a self-attention, if there is one."""
        return TokenNoise(num_tokens) if self.attention_noise else None

    def build_norm(self, width: int) -> nn.Module:
        """A normalisation of tokens of this width."""
        return TokenNorm() if self.norm == "token" else LayerNorm(width)


class Linear(nn.Linear):
    """A plain linear layer that computes in its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class TokenNorm(nn.Module):
    """x rsqrt(mean_C(x^2) + 1e-8): TransGAN's "modified normalization", without parameters; the mean in float32."""

    def forward(self, x: Tensor) -> Tensor:
        mean_square = execution.full_precision(x).square().mean(dim=2, keepdim=True)
        return x * (mean_square + 1e-8).rsqrt().to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a token, in its input's type."""

    def __init__(self, width: int) -> None:
        super().__init__(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y


class TokenNoise(nn.Module):
    """x + s n with n ~ N(0, 1) per token, the same in all its channels (Karras et al. 2019, section 3.2).

    s is one learned number, 0 at first. `noise_const` holds the n of mode 'const'.
    """

    noise_const: Tensor

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(num_tokens, 1))

    def forward(self, x: Tensor, mode: NoiseMode) -> Tensor:
        """x (B, N, C) -> (B, N, C), in x's type; 'random' draws from torch's global generator."""
        return x + scaled_noise(self.noise_const, self.strength, mode, len(x)).to(x.dtype)


class CrossAttention(nn.Module):
    """Attention of tokens (B, N, C) to others (B, M, C'), with a query, a key and value and an output matrix."""

    def __init__(self, width: int, other_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(other_width, 2 * width, bias=False)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        k, v = self.kv(others).chunk(2, dim=2)  # each (B, M, C)
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(x), k, v))
        y: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """A transformer block with normalisation first (Dosovitskiy et al. 2021, figure 1).

        x <- x + Attention(norm(x) + noise) W_o^T + b_o
        x <- x + cross-attention of norm(x) to other tokens, with `other_width` their width
        x <- x + W_2 gelu(W_1 norm(x) + b_1) + b_2

    Queries, keys and values have no bias, there is no dropout, gelu is exact. Without `noise` there is none. `clamp`
    bounds what leaves the block.
    """

    def __init__(
        self,
        config: BlockConfig,
        width: int,
        attention: Attention,
        *,
        noise: TokenNoise | None = None,
        other_width: int | None = None,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.clamp = clamp
        self.norm1 = config.build_norm(width)
        self.noise = noise
        self.qkv = Linear(width, 3 * width, bias=False)
        self.attention = attention
        self.out = Linear(width, width)
        self.cross_norm: nn.Module | None = None
        if other_width is not None:
            self.cross_norm = config.build_norm(width)
            self.cross = CrossAttention(width, other_width, config.num_heads)
        self.norm2 = config.build_norm(width)
        self.fc1 = Linear(width, MLP_RATIO * width)
        self.fc2 = Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, others: Tensor | None = None, noise_mode: NoiseMode = "const") -> Tensor:
        """x (B, N, C), others (B, M, other_width) or None -> (B, N, C), computed in x's type."""
        y = self.norm1(x)
        if self.noise is not None:
            y = self.noise(y, noise_mode)
        q, k, v = self.qkv(y).chunk(3, dim=2)  # each (B, N, C)
        x = x + self.out(self.attention(q, k, v))
        if self.cross_norm is not None:
            assert others is not None
            x = x + self.cross(self.cross_norm(x), others.to(x.dtype))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


def position_embedding(grid: Grid | int, width: int) -> nn.Parameter:
    """A learned vector per token, (N, width), from N(0, 0.02^2)."""
    count = grid if isinstance(grid, int) else math.prod(grid)
    embedding = torch.empty(count, width)
    return nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02))
