"""Pre-norm transformer blocks on a grid of tokens, used in both networks of TransGAN (Jiang et al. 2021)."""

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
from training.networks.grid_attention import AttentionType, AxisAttention, CellAttention, NystromAttention
from training.networks.layers import scaled_noise
from training.networks.weights import effective

Norm = Literal["token", "layer"]
Position = Literal["absolute", "relative", "both"]

MLP_RATIO = 4  # hidden width of the MLP / width of the block


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Configuration of the normalisation and attention of transformer blocks.

    The attention types are `full`: between all tokens; `grid`: within windows of `window` x `window` tokens; `axis`:
    along rows, then columns; `nystrom`: Nystrom approximation with `landmarks` landmarks.
    """

    num_heads: int = setting(4, "Number of attention heads.", at_least=1)
    norm: Norm = setting("token", "Normalisation: token-wise (token) or LayerNorm (layer).")
    position: Position = setting(
        "both", "Positions: an embedding per token (absolute), an attention bias per offset (relative), or both."
    )
    attention: AttentionType = setting("grid", "Attention type on large grids.")
    window: int = setting(16, "Side of the windows of grid attention, in tokens.", at_least=1)
    landmarks: int = setting(64, "Number of landmarks of nystrom attention.", at_least=1)
    attention_noise: bool = setting(False, "Add noise of learned strength to the tokens before self-attention.")

    def check_width(self, field: str, width: int) -> None:
        """Raise ConfigError for `field` unless `width` is a positive multiple of the number of heads."""
        if width < 1 or width % self.num_heads:
            problem = f"every width must be a positive multiple of num_heads={self.num_heads}, but {width} is not"
            raise ConfigError(field, getattr(self, field), problem)

    def check_grid(self, grid: Grid) -> None:
        """Raise ConfigError if windows or landmark segments do not divide the grid."""
        height, width = grid
        if self.attention == "grid" and (height % self.window or width % self.window):
            common = math.gcd(height, width)
            options = ", ".join(str(n) for n in range(common, 1, -1) if common % n == 0)
            raise ConfigError("window", self.window, f"does not divide the grid {height}x{width}; possible: {options}")
        if self.attention == "nystrom" and height * width % self.landmarks:
            options = ", ".join(str(n) for n in range(min(height * width, 256), 15, -1) if height * width % n == 0)
            problem = f"does not divide the {height * width} tokens of the grid {height}x{width}; possible: {options}"
            raise ConfigError("landmarks", self.landmarks, problem)

    @property
    def has_absolute(self) -> bool:
        """True if stages have a learned embedding per token."""
        return self.position != "relative"

    @property
    def has_relative(self) -> bool:
        """True if attention has a learned bias per offset."""
        return self.position != "absolute"

    def build_attention(self, grid: Grid, *, is_full: bool) -> Attention:
        """Build full attention (`is_full`) or the configured attention type for a grid."""
        heads, relative = self.num_heads, self.has_relative
        if is_full or self.attention == "full":
            return CellAttention(heads, grid, grid, use_relative=relative)
        if self.attention == "grid":
            return CellAttention(heads, grid, (self.window, self.window), use_relative=relative)
        if self.attention == "axis":
            return AxisAttention(heads, grid, use_relative=relative)
        return NystromAttention(heads, self.landmarks)

    def build_noise(self, num_tokens: int) -> TokenNoise | None:
        """Build the noise on the input tokens of self-attention, or return None without `attention_noise`."""
        return TokenNoise(num_tokens) if self.attention_noise else None

    def build_norm(self, width: int) -> nn.Module:
        """Build the configured normalisation for tokens of this width."""
        return TokenNorm() if self.norm == "token" else LayerNorm(width)


class Linear(nn.Linear):
    """Linear layer with parameters cast to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else effective(self.bias, x.dtype)
        return F.linear(x, effective(self.weight, x.dtype), bias)


class TokenNorm(nn.Module):
    """TransGAN's "modified normalization" x rsqrt(mean_C(x^2) + 1e-8), without parameters, with the mean in float32."""

    def forward(self, x: Tensor) -> Tensor:
        mean_square = execution.full_precision(x).square().mean(dim=2, keepdim=True)
        return x * (mean_square + 1e-8).rsqrt().to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, with parameters cast to the dtype of the input."""

    def __init__(self, width: int) -> None:
        super().__init__(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.layer_norm(
            x, self.normalized_shape, effective(self.weight, x.dtype), effective(self.bias, x.dtype), self.eps
        )
        return y


class TokenNoise(nn.Module):
    """Noise x + s n with n ~ N(0, 1) per token, shared by all channels (Karras et al. 2019, section 3.2).

    The strength s is a learned scalar, initially 0. `noise_const` is n in mode 'const'.
    """

    noise_const: Tensor

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(num_tokens, 1))

    def forward(self, x: Tensor, mode: NoiseMode) -> Tensor:
        """Map x (B, N, C) to (B, N, C), in the dtype of x; 'random' draws from torch's global RNG."""
        return x + scaled_noise(self.noise_const, self.strength, mode, len(x)).to(x.dtype)


class CrossAttention(nn.Module):
    """Multi-head cross-attention from tokens (B, N, C) to context tokens (B, M, C')."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(context_width, 2 * width, bias=False)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).chunk(2, dim=2)  # each (B, M, C)
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(x), k, v))
        y: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, figure 1) with optional noise and cross-attention.

        x <- x + Attention(norm(x) + noise) W_o^T + b_o
        x <- x + CrossAttention(norm(x), context)           if `context_width`, the width of the context, is given
        x <- x + W_2 gelu(W_1 norm(x) + b_1) + b_2

    Query, key and value projections have no bias. There is no dropout. GELU is exact, not the tanh approximation. The
    output is clamped to +- `clamp`.
    """

    def __init__(
        self,
        config: BlockConfig,
        width: int,
        attention: Attention,
        *,
        noise: TokenNoise | None = None,
        context_width: int | None = None,
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
        if context_width is not None:
            self.cross_norm = config.build_norm(width)
            self.cross = CrossAttention(width, context_width, config.num_heads)
        self.norm2 = config.build_norm(width)
        self.fc1 = Linear(width, MLP_RATIO * width)
        self.fc2 = Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, noise_mode: NoiseMode = "const") -> Tensor:
        """Map x (B, N, C) and context (B, M, context_width) or None to (B, N, C), in the dtype of x."""
        y = self.norm1(x)
        if self.noise is not None:
            y = self.noise(y, noise_mode)
        q, k, v = self.qkv(y).chunk(3, dim=2)  # each (B, N, C)
        x = x + self.out(self.attention(q, k, v))
        if self.cross_norm is not None:
            assert context is not None
            x = x + self.cross(self.cross_norm(x), context.to(x.dtype))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


def position_embedding(grid: Grid | int, width: int) -> nn.Parameter:
    """Create a learned position embedding (N, width), initialized from N(0, 0.02^2)."""
    count = grid if isinstance(grid, int) else math.prod(grid)
    embedding = torch.empty(count, width)
    return nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02))
