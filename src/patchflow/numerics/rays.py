"""Line integrals along any rays, by sampling images along them: Joseph's projector without a matrix.

The formula is that of :mod:`patchflow.numerics.radon`; the two agree to rounding. Slower, with bounded memory.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Points sampled at a time: 128 MiB of coordinates in float32.
_POINTS = 2**24


def project_rays(
    x: Float[Tensor, "images height width"],
    normals: Float[Tensor, "rays 2"],
    offsets: Float[Tensor, " rays"],
) -> Float[Tensor, "images rays"]:
    """Joseph's projector for any rays, without a matrix: slower, with bounded memory.

    Args:
        x: Images.
        normals: Unit normals of the rays.
        offsets: Their signed distances from the centre of the image, in pixels.
    """
    parts = []
    for chunk in _chunks(x.shape, len(offsets)):
        grid, weight = _samples(normals[chunk], offsets[chunk], x)
        parts.append(_gather(x, grid) * weight)
    return torch.cat(parts, -1)


def backproject_rays(
    y: Float[Tensor, "images rays"],
    normals: Float[Tensor, "rays 2"],
    offsets: Float[Tensor, " rays"],
    shape: tuple[int, int],
) -> Float[Tensor, "images height width"]:
    """The adjoint of :func:`project_rays`.

    Args:
        y: A number for each ray.
        normals: As there.
        offsets: As there.
        shape: Height and width of the image.
    """
    total = y.new_zeros(y.shape[0], *shape)
    for chunk in _chunks(total.shape, len(offsets)):
        grid, weight = _samples(normals[chunk], offsets[chunk], total)
        with torch.enable_grad():
            zero = torch.zeros_like(total, requires_grad=True)
            value = _gather(zero, grid)
        total += torch.autograd.grad(value, zero, y[:, chunk] * weight)[0]
    return total


def _chunks(shape: torch.Size, rays: int) -> list[slice]:
    images, height, width = shape
    size = max(1, _POINTS // (max(height, width) * max(images, 2)))
    return [slice(start, start + size) for start in range(0, rays, size)]


def _samples(normals: Tensor, offsets: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sample points of rays, in grid_sample's coordinates, and the lengths that they stand for."""
    height, width = x.shape[-2:]
    first, second = normals[:, :1].double(), normals[:, 1:].double()
    steep = first.abs() >= second.abs()
    steps = torch.arange(max(height, width), device=x.device, dtype=torch.float64)
    along = torch.where(steep, steps - (width - 1) / 2, steps - (height - 1) / 2)
    main, other = torch.where(steep, first, second), torch.where(steep, second, first)
    across = (offsets[:, None].double() - other * along) / main
    row, column = torch.where(steep, across, along), torch.where(steep, along, across)
    # grid_sample has -1 and 1 at the centres of the outer pixels; one pixel has no extent there.
    grid = torch.stack((column * 2 / max(width - 1, 1), row * 2 / max(height - 1, 1)), -1)
    return grid.to(x.dtype)[None], (1 / main[:, 0].abs()).to(x.dtype)


def _gather(x: Tensor, grid: Tensor) -> Tensor:
    samples = functional.grid_sample(x[None], grid, padding_mode="zeros", align_corners=True)
    return samples[0].sum(-1)
