"""Triton kernels of encoder.py, which gives the equations. Import this module lazily: Triton may be absent.

Tokens are (B, N, C) with contiguous channels and arbitrary strides of images and rows. One program processes `TILES`
tiles of `ROWS` rows of one image. A tile holds all C channels of its rows, padded to `WIDTH`, a power of two, so that
LayerNorm needs one pass over memory. Arithmetic is in float32. Sums over the rows of an image are deterministic: each
program stores its partial sum (B, blocks, columns), and PyTorch adds the partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)  # of LayerNorm
SLOPE = tl.constexpr(0.2)  # of the leaky ReLU

jit = triton.jit(do_not_specialize=["N", "blocks"])  # no recompilation for another number of tokens


@triton.jit
def _image_and_block(blocks: tl.tensor) -> tl.tensor:
    """Return the image of this program, and its number among the `blocks` programs of the image."""
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks


@triton.jit
def _tile(number: tl.tensor, N: tl.tensor, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Return the rows (ROWS,) of a tile, the channels (WIDTH,), and a mask (ROWS, WIDTH) of the existing elements."""
    rows = number * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    return rows.to(tl.int64), channels, (rows < N)[:, None] & (channels < C)[None, :]


@triton.jit
def _load(x: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(x, mask=mask, other=0).to(tl.float32)


@jit
def modulated_layer_norm(
    x: tl.tensor,
    s: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    x_image: tl.tensor,
    x_row: tl.tensor,
    s_image: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Compute y, mean and rstd of one tile."""
    b, block = _image_and_block(blocks)
    rows, channels, mask = _tile(block, N, C, ROWS, WIDTH)
    style = _load(s + b * s_image + channels, channels < C)
    v = _load(x + b * x_image + rows[:, None] * x_row + channels[None, :], mask) * style[None, :]
    center = tl.sum(v, 1) / C
    v = tl.where(mask, v - center[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(v * v, 1) / C + EPS)
    tl.store(y + (b * N + rows)[:, None] * C + channels[None, :], v * scale[:, None], mask=mask)
    tl.store(mean + b * N + rows, center, mask=rows < N)
    tl.store(rstd + b * N + rows, scale, mask=rows < N)


@jit
def modulated_layer_norm_grad(
    grad: tl.tensor,
    x: tl.tensor,
    s: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    sums: tl.tensor,
    grad_image: tl.tensor,
    grad_row: tl.tensor,
    x_image: tl.tensor,
    x_row: tl.tensor,
    s_image: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Compute dx, and the partial sums of ds: `sums` (B, blocks, C)."""
    b, block = _image_and_block(blocks)
    channels = tl.arange(0, WIDTH)
    style = _load(s + b * s_image + channels, channels < C)
    ds = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(TILES):
        rows, _, mask = _tile(block * TILES + i, N, C, ROWS, WIDTH)
        value = _load(x + b * x_image + rows[:, None] * x_row + channels[None, :], mask)
        g = _load(grad + b * grad_image + rows[:, None] * grad_row + channels[None, :], mask)
        center, scale = _load(mean + b * N + rows, rows < N), _load(rstd + b * N + rows, rows < N)
        normalized = (value * style[None, :] - center[:, None]) * scale[:, None]
        along = tl.sum(g * normalized, 1) / C
        dv = (g - (tl.sum(g, 1) / C)[:, None] - normalized * along[:, None]) * scale[:, None]
        tl.store(dx + (b * N + rows)[:, None] * C + channels[None, :], dv * style[None, :], mask=mask)
        ds += dv * value
    tl.store(sums + (b * blocks + block) * C + channels, tl.sum(ds, 0), mask=channels < C)


@jit
def residual_lrelu(
    a: tl.tensor,
    r: tl.tensor,
    da: tl.tensor,
    dr: tl.tensor,
    noise: tl.tensor,
    strength: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    a_image: tl.tensor,
    a_row: tl.tensor,
    r_image: tl.tensor,
    r_row: tl.tensor,
    da_image: tl.tensor,
    dr_image: tl.tensor,
    noise_image: tl.tensor,
    clamp: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CLAMPED: tl.constexpr,
) -> None:
    """Compute one tile of y."""
    b, block = _image_and_block(blocks)
    rows, channels, mask = _tile(block, N, C, ROWS, WIDTH)
    exists = channels < C
    scale_a, scale_r = _load(da + b * da_image + channels, exists), _load(dr + b * dr_image + channels, exists)
    v = _load(a + b * a_image + rows[:, None] * a_row + channels[None, :], mask) * scale_a[None, :]
    v += _load(r + b * r_image + rows[:, None] * r_row + channels[None, :], mask) * scale_r[None, :]
    v += (tl.load(strength) * _load(noise + b * noise_image + rows, rows < N))[:, None]
    v += _load(bias + channels, exists)[None, :]
    v = tl.where(v > 0, v, v * SLOPE)
    if CLAMPED:  # by comparisons, which keep NaN
        v = tl.where(v > clamp, clamp, tl.where(v < -clamp, -clamp, v))
    tl.store(y + (b * N + rows)[:, None] * C + channels[None, :], v, mask=mask)


@jit
def residual_lrelu_grad(
    grad: tl.tensor,
    y: tl.tensor,
    a: tl.tensor,
    r: tl.tensor,
    da: tl.tensor,
    dr: tl.tensor,
    noise: tl.tensor,
    d_a: tl.tensor,
    d_r: tl.tensor,
    sums: tl.tensor,
    grad_image: tl.tensor,
    grad_row: tl.tensor,
    a_image: tl.tensor,
    a_row: tl.tensor,
    r_image: tl.tensor,
    r_row: tl.tensor,
    da_image: tl.tensor,
    dr_image: tl.tensor,
    noise_image: tl.tensor,
    edge: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    CLAMPED: tl.constexpr,
) -> None:
    """Compute d_a and d_r, and the partial sums of the gradients of da, dr, bias and strength (B, blocks, 3C + 1)."""
    b, block = _image_and_block(blocks)
    channels = tl.arange(0, WIDTH)
    exists = channels < C
    scale_a, scale_r = _load(da + b * da_image + channels, exists), _load(dr + b * dr_image + channels, exists)
    sum_a = tl.zeros([ROWS, WIDTH], tl.float32)
    sum_r, sum_g, sum_noise = sum_a, sum_a, sum_a
    for i in range(TILES):
        rows, _, mask = _tile(block * TILES + i, N, C, ROWS, WIDTH)
        dense = (b * N + rows)[:, None] * C + channels[None, :]
        out = _load(y + dense, mask)
        g = _load(grad + b * grad_image + rows[:, None] * grad_row + channels[None, :], mask)
        g = tl.where(out > 0, g, g * SLOPE)
        if CLAMPED:
            g = tl.where(tl.abs(out) < edge, g, 0.0)
        tl.store(d_a + dense, g * scale_a[None, :], mask=mask)
        tl.store(d_r + dense, g * scale_r[None, :], mask=mask)
        sum_a += g * _load(a + b * a_image + rows[:, None] * a_row + channels[None, :], mask)
        sum_r += g * _load(r + b * r_image + rows[:, None] * r_row + channels[None, :], mask)
        sum_g += g
        sum_noise += g * _load(noise + b * noise_image + rows, rows < N)[:, None]
    sums += (b * blocks + block) * (3 * C + 1)
    tl.store(sums + channels, tl.sum(sum_a, 0), mask=exists)
    tl.store(sums + C + channels, tl.sum(sum_r, 0), mask=exists)
    tl.store(sums + 2 * C + channels, tl.sum(sum_g, 0), mask=exists)
    tl.store(sums + 3 * C, tl.sum(tl.sum(sum_noise, 0), 0))


@triton.jit
def _scale(x: tl.tensor, scale: tl.tensor, y: tl.tensor, mask: tl.tensor, exists: tl.tensor) -> None:
    tl.store(y, _load(x, mask) * _load(scale, exists)[None, :], mask=mask)


@jit
def scale_and_split(
    qkv: tl.tensor,
    scale: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    qkv_image: tl.tensor,
    qkv_row: tl.tensor,
    scale_image: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Compute one tile each of q, k and v."""
    b, block = _image_and_block(blocks)
    rows, channels, mask = _tile(block, N, C, ROWS, WIDTH)
    x = qkv + b * qkv_image + rows[:, None] * qkv_row + channels[None, :]
    scale += b * scale_image + channels
    dense = (b * N + rows)[:, None] * C + channels[None, :]
    _scale(x, scale, q + dense, mask, channels < C)
    _scale(x + C, scale + C, k + dense, mask, channels < C)
    _scale(x + 2 * C, scale + 2 * C, v + dense, mask, channels < C)


@triton.jit
def _scale_grad(
    grad: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    dx: tl.tensor,
    sums: tl.tensor,
    grad_row: tl.tensor,
    x_row: tl.tensor,
    first: tl.tensor,
    N: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Compute dx, whose rows have 3C elements, and the sum of dscale of one of q, k and v."""
    channels = tl.arange(0, WIDTH)
    factor = _load(scale + channels, channels < C)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(TILES):
        rows, _, mask = _tile(first + i, N, C, ROWS, WIDTH)
        g = _load(grad + rows[:, None] * grad_row + channels[None, :], mask)
        tl.store(dx + rows[:, None] * (3 * C) + channels[None, :], g * factor[None, :], mask=mask)
        total += g * _load(x + rows[:, None] * x_row + channels[None, :], mask)
    tl.store(sums + channels, tl.sum(total, 0), mask=channels < C)


@jit
def scale_and_split_grad(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    qkv: tl.tensor,
    scale: tl.tensor,
    d_qkv: tl.tensor,
    sums: tl.tensor,
    q_image: tl.tensor,
    q_row: tl.tensor,
    k_image: tl.tensor,
    k_row: tl.tensor,
    v_image: tl.tensor,
    v_row: tl.tensor,
    x_image: tl.tensor,
    x_row: tl.tensor,
    scale_image: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Compute d_qkv, and the partial sums of dscale: `sums` (B, blocks, 3C)."""
    b, block = _image_and_block(blocks)
    first = block * TILES
    x, scale, dx = qkv + b * x_image, scale + b * scale_image, d_qkv + b * N * 3 * C
    sums += (b * blocks + block) * 3 * C
    _scale_grad(dq + b * q_image, x, scale, dx, sums, q_row, x_row, first, N, C, ROWS, WIDTH, TILES)
    x, scale, dx, sums = x + C, scale + C, dx + C, sums + C
    _scale_grad(dk + b * k_image, x, scale, dx, sums, k_row, x_row, first, N, C, ROWS, WIDTH, TILES)
    x, scale, dx, sums = x + C, scale + C, dx + C, sums + C
    _scale_grad(dv + b * v_image, x, scale, dx, sums, v_row, x_row, first, N, C, ROWS, WIDTH, TILES)
