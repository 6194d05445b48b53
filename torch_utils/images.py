"""Image tensors: conversion to uint8, PNG files, grids."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnnlib.config import WriteError
from dnnlib.util import write_atomically

# Maps targets (B, C, H, W) in [-1, 1] to a differentiable function from images (B, C, H, W) to distances (B,).
DistanceTo = Callable[[Tensor], Callable[[Tensor], Tensor]]


def square_resolution(img_shape: Sequence[int]) -> int:
    """Return the side length of square images of shape (C, H, W). Raises ValueError for other shapes."""
    _, height, width = img_shape
    if height != width:
        raise ValueError(f"images of {height}x{width} (height x width) have no single resolution; use img_shape")
    return height


def to_uint8(img: Tensor) -> Tensor:
    """Return clamp(x 127.5 + 128, 0, 255) as uint8."""
    return (img.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def save_image(img: Tensor, path: Path) -> None:
    """Write one uint8 image (C, H, W) of 1, 3 or 4 channels as PNG, atomically. Raises WriteError."""
    save_pixels(img.permute(1, 2, 0).cpu().numpy(), path)


def save_pixels(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 pixels (H, W, C) of 1, 3 or 4 channels as PNG, atomically. Raises WriteError."""
    encoded = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(encoded, "PNG")
    try:
        write_atomically(path, encoded.getvalue())
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error


def make_grid(images: Tensor) -> Tensor:
    """Tile uint8 images (N, C, H, W) row by row into one image (C, rows H, columns W).

    The grid has ceil(sqrt(N)) columns. Unused cells are white.
    """
    N, C, H, W = images.shape
    columns = math.ceil(math.sqrt(N))
    rows = -(-N // columns)
    padded = images.new_full([rows * columns, C, H, W], 255)
    padded[:N] = images
    grid = padded.reshape(rows, columns, C, H, W).permute(2, 0, 3, 1, 4)  # (C, rows, H, columns, W)
    return grid.reshape(C, rows * H, columns * W)
