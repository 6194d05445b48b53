"""Convolutions with fewer multiplications, for wide layers on a CPU.

Winograd's minimal filtering (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for convolutional neural networks")
computes m outputs y of a filter g from a tile d of n inputs by P < m * taps products:

    y = A^T [ (G g) * (B^T d) ]

In two dimensions, B^T, G and A^T act along both axes. The product * is elementwise over the points, so the sum over
input channels amounts to one matrix product per point. With U, the transform of g, a convolution C is a bilinear map
of x and U. The map and its gradients I and W form a closed family, so derivatives of any order cost as much as the
convolution:

    y = C(x, U)               dx = I(dy, U)       dU = W(dy, x)
    I(g, U), by x             dg = C(dI, U)       dU = W(g, dI)
    W(g, x), by U             dg = C(x, dW)       dx = I(g, dW)

Activations are processed in channels-last order and in blocks that fit into the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_utils.ops import library

# Finite interpolation points, in addition to infinity, by the number of products P. The points 0, +-1, +-2, ... give a
# two to four times larger error.
POINTS = {
    5: (0, 0.75, -0.75, 1.5),
    6: (0, 0.75, -0.75, 1.5, -1.5),
    10: (0, 0.4, -0.4, 0.8, -0.8, 1.2, -1.2, 2.2, -2.2),
}

# Stride -> number of inputs of which both sides of the grid must be multiples, and supported dtypes. In bfloat16,
# convolutions with stride 2 would not be faster than F.conv2d, and have four times its rounding errors.
TILE = {1: 4, 2: 8}
EXACT = (torch.float32, torch.float64)
DTYPES = {1: (*EXACT, torch.bfloat16), 2: EXACT}

# Minimum number of channels, and stride -> minimum number of channels times the side of the grid, for which the saved
# multiplications outweigh the transforms (measured on AVX-512 cores). Transforming the weights takes as long as small
# grids do: these are only worth it if the transforms are cached.
MIN_CHANNELS = 64
MIN_SIZE = {1: 2**11, 2: 2**13}
MIN_SIDE, MIN_SIDE_CACHED = 16, 8

# Tiles times channels of a block: one that stays in the cache during the transforms, one for a matrix product.
TRANSFORM_BLOCK = 2**13
PRODUCT_BLOCK = 2**18


@dataclass(frozen=True)
class Axis:
    """Minimal filtering along one axis: m outputs from n inputs by P products.

    Consecutive tiles start `step` inputs apart, the first one `padding` zeros before the image.
    """

    data: np.ndarray  # B^T, (P, n)
    kernel: np.ndarray  # G, (P, taps)
    output: np.ndarray  # A^T, (m, P)
    step: int
    padding: int


@dataclass(frozen=True, eq=False)
class Algorithm:
    """Minimal filtering along both axes."""

    y: Axis
    x: Axis


def _toom_cook(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return B^T (P, P), G (P, taps) and A^T (outputs, P) of F(outputs, taps), with P = outputs + taps - 1."""
    P = outputs + taps - 1
    points = np.array(POINTS[P])
    data, kernel, output = np.zeros((P, P)), np.zeros((P, taps)), np.zeros((outputs, P))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        data[i, :-1] = np.poly(others)[::-1]
        kernel[i] = point ** np.arange(taps) / np.prod(point - others)
        output[:, i] = point ** np.arange(outputs)
    data[-1] = np.poly(points)[::-1]  # the last row and column represent the point at infinity
    kernel[-1, -1] = output[-1, -1] = 1
    return data, kernel, output


@cache
def same(width: int, dtype: torch.dtype) -> Algorithm:
    """Return an algorithm for 3x3 filters with padding 1: F(4, 3) along y, F(4, 3) or F(8, 3) along x.

    F(8, 3) takes 10 instead of 12 products for 8 outputs, at five times the rounding error: about 25 times that of a
    direct convolution. It is used in float32 and float64, for widths that are multiples of 8. In bfloat16, whose
    rounding of the transforms dominates, F(4, 3) has nine times the error of a direct convolution.
    """
    y, x = (Axis(*_toom_cook(m, 3), step=m, padding=1) for m in (4, 8))
    return Algorithm(y, x if width % 8 == 0 and dtype in EXACT else y)


@cache
def halving(taps: tuple[float, ...]) -> Algorithm:
    """Return an algorithm for the FIR filter `taps` of even length, then a 3x3 filter with stride 2.

    Along each axis, 4 outputs take 9 instead of 12 products: F(4, 2) of the even inputs with g_0 and g_2, and one
    product of each odd input with g_1. The FIR filter is part of the data transform.
    """
    data, kernel, output = np.zeros((9, 9)), np.zeros((9, 3)), np.zeros((4, 9))
    data[:5, ::2], kernel[:5, ::2], output[:, :5] = _toom_cook(4, 2)
    data[5:, 1::2], kernel[5:, 1], output[:, 5:] = np.eye(4), 1, np.eye(4)
    fir = np.zeros((9, 8 + len(taps)))
    for i in range(9):
        fir[i, i : i + len(taps)] = taps[::-1]
    axis = Axis(data @ fir, kernel, output, step=8, padding=len(taps) // 2)
    return Algorithm(axis, axis)


def fits(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether `convolve` supports x (B, C, H, W) with this weight (C_out, C, k, k)."""
    if x.device.type != "cpu" or x.dtype not in DTYPES[stride] or not library.is_plain_eager():
        return False
    return weight.shape[1:] == (x.shape[1], 3, 3) and all(side % TILE[stride] == 0 for side in x.shape[2:])


def is_profitable(x: Tensor, weight: Tensor, stride: int, *, is_cached: bool) -> bool:
    """Return whether `convolve` supports x and weight and is faster than `F.conv2d`.

    `is_cached`: whether the transform of the weight is usually known from an earlier call. The decision ignores the
    batch size, so that the result for an image does not depend on its batch.
    """
    channels, side = min(weight.shape[:2]), min(x.shape[2:])
    is_large = channels >= MIN_CHANNELS and channels * side >= MIN_SIZE[stride]
    return is_large and side >= (MIN_SIDE_CACHED if is_cached else MIN_SIDE) and fits(x, weight, stride)


def transform(weight: Tensor, algorithm: Algorithm, cached: Tensor | None = None) -> Tensor:
    """Return U, the transforms of all filters of a weight (O, C, k, k): (points, O, C) in the weight's dtype.

    `cached` is the result of an earlier call for equal weights. Differentiable any number of times.
    """
    return _Transform.apply(weight, algorithm, cached)


def convolve(x: Tensor, U: Tensor, algorithm: Algorithm) -> Tensor:
    """Return the convolution (B, O, h, w), channels-last, of x (B, C, H, W) with the `transform` U of a weight.

    H and W are multiples of the algorithm's steps. Differentiable any number of times.
    """
    return _Convolution.apply(x, U, algorithm)


class _Transform(torch.autograd.Function):
    """Transform of all filters of a weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, algorithm: Algorithm, cached: Tensor | None) -> Tensor:
        ctx.algorithm, ctx.shape = algorithm, weight.shape
        if cached is not None:
            return cached.detach()
        C_out, C, k, _ = weight.shape
        along_y, along_x = _kernel_matrices(algorithm, weight.dtype)
        g = weight.to(along_x.dtype).permute(3, 2, 0, 1).reshape(k, -1)
        columns = (along_x @ g).view(-1, k, C_out * C)
        return torch.matmul(along_y, columns).view(-1, C_out, C).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dU,), (C_out, C, k, _) = grads, ctx.shape
        along_y, along_x = _kernel_matrices(ctx.algorithm, dU.dtype)
        columns = torch.matmul(along_y.T, dU.to(along_y.dtype).view(len(along_x), len(along_y), C_out * C))
        g = (along_x.T @ columns.view(len(along_x), -1)).view(k, k, C_out, C)
        return g.permute(2, 3, 1, 0).to(dU.dtype), None, None


def _kernel_matrices(algorithm: Algorithm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return G along y and along x for weights of `dtype`."""
    y, x = (torch.from_numpy(axis.kernel).to(library.computed_in(dtype)) for axis in (algorithm.y, algorithm.x))
    return y, x


class _Convolution(torch.autograd.Function):
    """Convolution C(x, U)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, algorithm: Algorithm) -> Tensor:
        ctx.save_for_backward(x, U)
        ctx.algorithm = algorithm
        tiles = _Tiles(algorithm, x.shape, x.dtype)
        rows, y = _rows(x), x.new_empty(tiles.output_shape(U.shape[1]))
        for images in tiles.blocks(max(U.shape[1:])):
            tiles.write_outputs(torch.bmm(tiles.data_of(rows[images]), U.transpose(1, 2)), y[images])
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,), (x, U) = grads, ctx.saved_tensors
        for_dx = U if library.is_needed(ctx, 0) else None
        for_dU = x if library.is_needed(ctx, 1) else None
        dx, dU = _Gradients.apply(dy, for_dU, for_dx, x.shape, ctx.algorithm)
        return dx, dU, None


class _Gradients(torch.autograd.Function):
    """Gradients I(g, U), unless U is None, and W(g, x), unless x is None, of a convolution of x with a given shape."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor | None, U: Tensor | None, shape: Sequence[int], algorithm: Algorithm
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(g, x, U)
        ctx.shape, ctx.algorithm = shape, algorithm
        ctx.set_materialize_grads(False)
        tiles = _Tiles(algorithm, shape, g.dtype)
        of_g, of_x = _rows(g), None if x is None else _rows(x)
        dx = None if U is None else g.new_empty(tiles.input_shape(shape[1]))
        dU: Tensor | None = None
        for images in tiles.blocks(max(g.shape[1], shape[1])):
            points = tiles.points_of(of_g[images])
            if U is not None and dx is not None:
                tiles.write_inputs(torch.bmm(points, U), dx[images])
            if of_x is not None:
                dU = _add_product(dU, points.transpose(1, 2), tiles.data_of(of_x[images]))
        return None if dx is None else dx.permute(0, 3, 1, 2), None if dU is None else dU.to(g.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (dI, dW), (g, x, U) = grads, ctx.saved_tensors
        needs_dg, needs_dx, needs_dU, *_ = ctx.needs_input_grad
        dg = None
        if needs_dg and dI is not None:
            dg = _Convolution.apply(dI, U, ctx.algorithm)
        if needs_dg and dW is not None:
            term = _Convolution.apply(x, dW, ctx.algorithm)
            dg = term if dg is None else dg + term
        x, U = dI if needs_dU else None, dW if needs_dx else None
        if x is None and U is None:
            return dg, None, None, None, None
        return dg, *_Gradients.apply(g, x, U, ctx.shape, ctx.algorithm), None, None  # I(g, dW) and W(g, dI)


def _rows(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) as contiguous rows of pixels (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a @ b for batches of matrices, in the dtype of the transforms; changes `total`."""
    if total is None:
        return torch.bmm(a, b).to(library.computed_in(a.dtype))
    return total.baddbmm_(a, b) if total.dtype == a.dtype else total.add_(torch.bmm(a, b))


class _Tiles:
    """Transforms between a batch of images (B, C, H, W) and tiles, and their adjoints.

    Images are stored as (B, H, W, C), points of tiles as (points, T, C) with T = B h w tiles in the order (y, x) and
    points in the order (x, y). They have the dtype of the given tensors; the transforms compute in their own.
    """

    def __init__(self, algorithm: Algorithm, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.y, self.x = algorithm.y, algorithm.x
        self.images, _, self.H, self.W = shape
        self.h, self.w = self.H // self.y.step, self.W // self.x.step
        self.num_points = len(self.y.data) * len(self.x.data)
        self.computed_in = library.computed_in(dtype)
        (self.data_y, self.output_y), (self.data_x, self.output_x) = (
            [torch.from_numpy(matrix).to(self.computed_in) for matrix in (axis.data, axis.output)]
            for axis in (self.y, self.x)
        )

    def input_shape(self, channels: int) -> tuple[int, int, int, int]:
        """Return the shape of a batch of inputs, (B, H, W, channels)."""
        return self.images, self.H, self.W, channels

    def output_shape(self, channels: int) -> tuple[int, int, int, int]:
        """Return the shape of a batch of outputs, (B, m h, m w, channels)."""
        return self.images, self.h * len(self.output_y), self.w * len(self.output_x), channels

    def blocks(self, channels: int) -> Iterator[slice]:
        """Yield slices of the batch whose tiles make up one matrix product."""
        return _slices(self.images, PRODUCT_BLOCK // (self.h * self.w * channels))

    def _parts(self, points: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield images, rows of tiles, and their points (x, y, images, rows, w, C), in parts that fit into the cache.

        A part consists of all rows of several images, or of some rows of one image, whose other rows follow.
        """
        channels = points.shape[2]
        points = points.view(len(self.data_x), len(self.data_y), -1, self.h, self.w, channels)
        size = max(TRANSFORM_BLOCK // (self.w * channels), 1)
        for images in _slices(points.shape[2], size // self.h):
            for rows in _slices(self.h, size):
                yield images, rows, points[:, :, images, rows]

    def data_of(self, inputs: Tensor) -> Tensor:
        """Return the points B^T d B of all tiles d of inputs (B, H, W, C)."""
        (B, _, _, C), n = inputs.shape, self.data_x.shape[1]
        result = inputs.new_empty(self.num_points, B * self.h * self.w, C)
        for images, rows, points in self._parts(result):
            if rows.start == 0:
                strips = self._strips(inputs[images])
            columns = torch.matmul(self.data_y, strips[:, rows]).unflatten(3, (-1, C))
            tiles = columns.unfold(3, n, self.x.step).permute(5, 2, 0, 1, 3, 4)  # (n, P, b, r, w, C)
            self._multiply(self.data_x, tiles.reshape(n, len(self.data_y), -1), out=points)
        return result

    def _strips(self, inputs: Tensor) -> Tensor:
        """Return the n lines of padded inputs (b, H, W, C) that each row of tiles covers: a view (b, h, n, width C)."""
        padding = [0, 0, self.x.padding, self.x.padding, self.y.padding, self.y.padding]
        padded = F.pad(inputs.to(self.computed_in), padding).flatten(2)
        line = padded.shape[2]
        shape = len(padded), self.h, self.data_y.shape[1], line
        return padded.as_strided(shape, (padded.stride(0), self.y.step * line, line, 1))

    def points_of(self, g: Tensor) -> Tensor:
        """Return the points A g A^T of all tiles of the gradient g (B, m h, m w, O) of outputs."""
        m = len(self.output_x)
        source = g.view(len(g), self.h, -1, self.w, m, g.shape[3])
        result = g.new_empty(self.num_points, len(g) * self.h * self.w, g.shape[3])
        for images, rows, points in self._parts(result):
            tiles = source[images, rows].permute(4, 2, 0, 1, 3, 5).to(self.computed_in)
            columns = torch.matmul(self.output_y.T, tiles.reshape(m, len(self.output_y), -1))  # (m, P, N)
            self._multiply(self.output_x.T, columns, out=points)
        return result

    def write_inputs(self, points: Tensor, dx: Tensor) -> None:
        """Write the gradient B M B^T of all tiles, added where tiles overlap, to dx (B, H, W, C)."""
        (_, H, W, C), step_y, step_x = dx.shape, self.y.step, self.x.step
        crop = slice(self.y.padding, self.y.padding + H), slice(self.x.padding, self.x.padding + W)
        for images, rows, part in self._parts(points):
            if rows.start == 0:
                shape = part.shape[2], self.h + 1, step_y, self.w + 1, step_x, C
                padded = dx.new_zeros(shape, dtype=self.computed_in)
            tiles = self._of_tiles(part, self.data_y.T, self.data_x.T)  # (b, r, n, w, n, C)
            below = slice(rows.start + 1, rows.stop + 1)
            for where, piece in ((rows, tiles[:, :, :step_y]), (below, tiles[:, :, step_y:])):
                target = padded[:, where, : piece.shape[2]]
                target[:, :, :, :-1].add_(piece[..., :step_x, :])
                target[:, :, :, 1:, : piece.shape[4] - step_x].add_(piece[..., step_x:, :])
            if rows.stop == self.h:
                dx[images] = padded.flatten(1, 2).flatten(2, 3)[:, *crop]

    def write_outputs(self, points: Tensor, y: Tensor) -> None:
        """Write the outputs A^T M A of all tiles M to y (B, m h, m w, O)."""
        y = y.view(len(y), self.h, len(self.output_y), self.w, len(self.output_x), -1)
        for images, rows, part in self._parts(points):
            y[images, rows] = self._of_tiles(part, self.output_y, self.output_x)

    def _of_tiles(self, points: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
        """Map points (x, y, b, r, w, C) by matrices (k, P) along both axes: (b, r, k, w, k, C), a view."""
        rows = points.flatten(2).transpose(0, 1).to(self.computed_in)  # (y, x, N)
        columns = torch.bmm(along_x.expand(len(rows), -1, -1), rows).transpose(0, 1)  # (k, y, N)
        tiles = torch.bmm(along_y.expand(len(columns), -1, -1), columns)  # (k of x, k of y, N)
        return tiles.unflatten(2, points.shape[2:]).permute(2, 3, 1, 4, 0, 5)

    def _multiply(self, matrix: Tensor, columns: Tensor, out: Tensor) -> None:
        """Write matrix (P, n) times columns (n, y, N) to `out`, points (x, y, images, rows, w, C)."""
        matrices, columns, out = matrix.expand(columns.shape[1], -1, -1), columns.transpose(0, 1), out.flatten(2)
        if out.dtype == self.computed_in:
            torch.bmm(matrices, columns, out=out.transpose(0, 1))
        else:
            out.copy_(torch.bmm(matrices, columns).transpose(0, 1))


def _slices(total: int, size: int) -> Iterator[slice]:
    """Yield slices of `size`, at least 1, that cover range(total)."""
    size = max(size, 1)
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
