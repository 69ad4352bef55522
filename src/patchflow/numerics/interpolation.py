"""Cubic interpolation as a matrix, for samples at any stride and shift."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def cubic_matrix(
    count: int, small: int, stride: int, shift: float, periodic: bool
) -> Float[Tensor, "count small"]:
    """Rows that interpolate ``small`` samples at ``stride * i + shift`` to the positions 0, ..., count - 1.

    The cubic kernel has a = -0.75, that of torch's bicubic interpolation. Unless periodic, pixels outside those that
    bicubic interpolation covers are reflected, as in the published zero-shot code.
    """
    pixels = torch.arange(count, dtype=torch.float64)
    if not periodic:
        # The margin absorbs the rounding of a shift that was computed as a centroid.
        half, margin = (stride - 1) / 2, 1e-3
        first = max(math.ceil(shift - half - margin), 0)
        last = min(math.floor(shift + (small - 1) * stride + half + margin), count - 1)
        pixels = first + (pixels - first).abs()
        pixels = (last - (last - pixels).abs()).clamp_min(first)
    position = (pixels - shift) / stride
    taps = position.floor()[:, None] + torch.arange(-1, 3, dtype=torch.float64)
    distance = (position[:, None] - taps).abs()
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = torch.where(distance <= 1, near, far)
    index = taps.long() % small if periodic else taps.long().clamp(0, small - 1)
    return torch.zeros(count, small, dtype=torch.float64).scatter_add(1, index, weights)


def interpolate(
    y: Float[Tensor, "batch channels height width"], scale: int
) -> Float[Tensor, "batch channels rows columns"]:
    """Bicubic interpolation (a = -0.75): each pixel in the middle of its ``scale`` x ``scale`` pixels."""
    return functional.interpolate(y, scale_factor=scale, mode="bicubic", align_corners=False)
