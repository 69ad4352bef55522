r"""Line integrals of images: Joseph's projector for parallel beams, as sparse matrices.

A ray is the line :math:`\{p : \langle p, n \rangle = t\}` with unit normal :math:`n`. Joseph's method walks along the
axis that is nearer to the ray, one pixel at a time, and interpolates linearly across it:

.. math:: (Rx)(n, t) = \frac{1}{|n_0|} \sum_j x\big(\tfrac{t - n_1 p_j}{n_0},\ p_j\big), \qquad |n_0| \ge |n_1|,

and the same with the axes exchanged otherwise. Lengths here are in pixels and the origin is the centre of the image.

Eight angles share one matrix: the symmetries of the square carry :math:`\theta` to :math:`\pm\theta`,
:math:`\pi/2 \pm \theta`, ... and the image is turned instead of the rays. Where the detector is symmetric, half of its
bins follow from the image turned by 180 degrees. So a regular set of angles needs an eighth of its matrix, whose
product with eight images costs little more than with one.

References:
    Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE TMI 1(3), 1982
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

# Angles [rad] that differ by less than this are one: above the rounding of float32, far below any scanner's accuracy.
_SAME = 1e-6


class Orientation(NamedTuple):
    """A symmetry of the square: exchange the axes, then reverse them."""

    transpose: bool
    reverse0: bool
    reverse1: bool

    def opposite(self) -> Orientation:
        """Followed by half a turn."""
        return Orientation(self.transpose, not self.reverse0, not self.reverse1)

    def apply(self, x: Float[Tensor, "*batch rows columns"]) -> Tensor:
        """The image, turned."""
        return (x.mT if self.transpose else x).flip(self._axes())

    def undo(self, x: Tensor) -> Tensor:
        """The inverse, which is also the adjoint, of :meth:`apply`."""
        x = x.flip(self._axes())
        return x.mT if self.transpose else x

    def _axes(self) -> list[int]:
        return [axis for axis, reverse in ((-2, self.reverse0), (-1, self.reverse1)) if reverse]


@dataclass(frozen=True)
class Block:
    """Rays that are projected by one matrix.

    Attributes:
        shape: Height and width of the turned images.
        angles: Angles in [0, pi/4] of the rays in the turned images, increasing.
        orientations: The turned images that are projected.
    """

    shape: tuple[int, int]
    angles: tuple[float, ...]
    orientations: tuple[Orientation, ...]


@dataclass(frozen=True)
class Plan:
    """How the rays of a parallel beam are computed by few matrices.

    Attributes:
        shape: Height and width of the image.
        offsets: The signed distances of the rays of a block, in pixels.
        blocks: The blocks.
        index: For each angle and bin, the place of its ray in the results of all blocks, which are ordered by block,
            angle, offset and orientation.
    """

    shape: tuple[int, int]
    offsets: Tensor
    blocks: tuple[Block, ...]
    index: Tensor

    def rays(self, block: Block) -> int:
        """Number of rays of a block: the rows of its matrix."""
        return len(block.angles) * len(self.offsets)

    def entries(self) -> int:
        """An upper bound, nearly sharp, of the number of non-zero entries of the matrices."""
        total = 0
        for block in self.blocks:
            height, width = block.shape
            angle = torch.tensor(block.angles, dtype=torch.float64)[:, None]
            column = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
            centre = column * angle.sin()
            reach = (height + 1) / 2 * angle.cos()
            first = torch.searchsorted(self.offsets, centre - reach)
            last = torch.searchsorted(self.offsets, centre + reach)
            total += 2 * int((last - first).sum())
        return total


def plan_parallel(shape: tuple[int, int], angles: Tensor, offsets: Tensor) -> Plan:
    """Sort the rays of a parallel beam by the symmetries of the square.

    Args:
        shape: Height and width of the image.
        angles: Angles of the normals in radians, float64: axis 0 of the image is at angle 0, axis 1 at a right angle.
        offsets: Signed distances of the rays from the centre, in pixels, increasing, float64.
    """
    count = len(offsets)
    symmetric = bool((offsets + offsets.flip(0)).abs().max() < _SAME * offsets.abs().max())
    kept = offsets[count // 2 :] if symmetric else offsets
    bases, orientations = zip(*map(_fold, angles.tolist()), strict=True)
    order = np.argsort(bases)
    cluster = np.empty(len(angles), dtype=np.int64)
    cluster[order] = np.cumsum(np.diff(np.array(bases)[order], prepend=0.0) > _SAME)
    members: dict[int, list[int]] = defaultdict(list)
    for k, number in enumerate(cluster.tolist()):
        members[number].append(k)
    # Clusters that need the same turned images form a block; a matrix fits one shape only.
    square = shape[0] == shape[1]
    groups: dict[tuple[Orientation, ...], list[int]] = defaultdict(list)
    for number, angles_of in sorted(members.items()):
        needed = {orientations[k] for k in angles_of}
        if symmetric:
            needed |= {orientation.opposite() for orientation in needed}
        for transposed in (None,) if square else (False, True):
            part = tuple(sorted(o for o in needed if transposed in (None, o.transpose)))
            if part:
                groups[part].append(number)
    blocks, index, start = [], torch.empty(len(angles), count, dtype=torch.int64), 0
    for part, numbers in groups.items():
        turned = (shape[1], shape[0]) if part[0].transpose and not square else shape
        values = tuple(bases[members[number][0]] for number in numbers)
        blocks.append(Block(turned, values, part))
        for position, number in enumerate(numbers):
            for k in members[number]:
                if orientations[k] in part:
                    index[k] = start + _places(position, len(kept), count, orientations[k], part)
        start += len(numbers) * len(kept) * len(part)
    return Plan(shape, kept.contiguous(), tuple(blocks), index)


def joseph_matrix(
    block: Block, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix of a block, as compressed sparse rows.

    Args:
        block: The block.
        offsets: Signed distances of the rays, in pixels.
        dtype: Type of the values.

    Returns:
        The starts of the rows, the columns (int32) and the values.
    """
    height, width = block.shape
    column = torch.arange(width)
    position = column.to(torch.float64) - (width - 1) / 2
    starts = [torch.zeros(1, dtype=torch.int64)]
    columns, values = [], []
    for angle in block.angles:
        cosine, sine = math.cos(angle), math.sin(angle)
        row = (offsets[:, None] - position * sine) / cosine + (height - 1) / 2
        lower = row.floor()
        upper_share = (row - lower).to(dtype)
        lower = lower.to(torch.int32)
        place = lower * width + column.to(torch.int32)
        inside = torch.stack(
            ((lower >= 0) & (lower < height), (lower >= -1) & (lower < height - 1)), -1
        )
        shares = torch.stack((1 - upper_share, upper_share), -1) / cosine
        columns.append(torch.stack((place, place + width), -1)[inside])
        values.append(shares[inside])
        starts.append(inside.flatten(1).sum(1))
    return torch.cat(starts).cumsum(0).to(torch.int32), torch.cat(columns), torch.cat(values)


def transpose_matrix(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of a matrix of compressed sparse rows, as the parts of one.

    Args:
        matrix: The matrix, on the CPU.
    """
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    transposed = scipy.sparse.csr_array(
        tuple(part.numpy() for part in parts), shape=tuple(matrix.shape)
    ).tocsc()
    start, column, value = map(
        torch.from_numpy, (transposed.indptr, transposed.indices, transposed.data)
    )
    return start, column, value


def _fold(angle: float) -> tuple[float, Orientation]:
    """The angle in [0, pi/4] that a symmetry of the square makes of an angle, and that symmetry."""
    first, second = math.cos(angle), math.sin(angle)
    # The tolerance keeps an angle and its mirror image on the same side of the diagonal.
    transpose = abs(second) > abs(first) + _SAME
    if transpose:
        first, second = second, first
    return math.atan2(abs(second), abs(first)), Orientation(transpose, first < 0, second < 0)


def _places(
    position: int, kept: int, count: int, orientation: Orientation, part: tuple[Orientation, ...]
) -> Tensor:
    """The places of an angle's rays in the results of its block."""
    here = part.index(orientation)
    bins = torch.arange(count)
    if kept == count:
        return (position * kept + bins) * len(part) + here
    there = part.index(orientation.opposite())
    # Bins are numbered from the lower end; the kept ones are the upper half, with the middle one if there is one.
    reflected = bins < count // 2
    offset = torch.where(reflected, count - 1 - bins, bins) - count // 2
    return (position * kept + offset) * len(part) + torch.where(reflected, there, here)
