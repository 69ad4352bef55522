"""What a simulation of scans needs: a finer grid than that of the reconstruction, and the geometry's symmetries."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchflow.errors import InputError
from patchflow.numerics.dihedral import DIHEDRAL, Symmetry
from patchflow.problems.operator import Shape
from patchflow.problems.tomography import ParallelBeam

# Angles in radians that differ by less are the same direction.
_SAME = 1e-5


def refined(operator: ParallelBeam, shape: Shape) -> ParallelBeam:
    """The same rays through the same field, as an image of other pixels.

    Args:
        operator: The projector.
        shape: Height and width of that image, in the ratio of the projector's.

    Raises:
        InputError: If the ratio is another.
    """
    height, width = operator.domain_shape
    if shape[0] * width != shape[1] * height:
        raise InputError(
            f"The grid of {shape[0]} x {shape[1]} pixels does not cover the field of {height} x {width} pixels with "
            "square ones; keep the ratio of its sides."
        )
    return ParallelBeam(
        shape,
        operator.angles,
        operator.range_shape[1],
        pixel=operator.pixel * height / shape[0],
        spacing=operator.spacing,
        offset=operator.offset,
    )


def line_integrals(
    x: Float[Tensor, "batch channels height width"], fine: ParallelBeam
) -> Float[Tensor, "batch channels angles bins"]:
    """Line integrals of images through a finer grid, to which they are brought bilinearly: no inverse crime.

    Args:
        x: Images of the projector's field.
        fine: The projector on the finer grid.
    """
    large = functional.interpolate(
        x, fine.domain_shape, mode="bilinear", align_corners=False, antialias=False
    )
    return fine(large)


def scan_symmetries(operator: ParallelBeam) -> tuple[Symmetry, ...]:
    """The turns and reflections of the image that a scan does not notice.

    For these the measurements of the turned image are those of the image in another order. So the filtered
    backprojection of the turned image is the turned one, and its noise has the same law. Always the identity; all eight
    if the angles cover the half turn evenly, four if a wedge around an axis of the image is missing.

    Args:
        operator: The projector.
    """
    square = operator.domain_shape[0] == operator.domain_shape[1]
    # From the opposite side the bins are in the opposite order, which are the same ones if they are centred.
    period = 2 * math.pi if operator.offset else math.pi
    angles = _directions(operator.angles, period)
    kept = []
    for g in DIHEDRAL:
        turned = operator.angles + g.turns * math.pi / 2
        turned = _directions(-turned if g.mirrored else turned, period)
        if torch.allclose(turned, angles, rtol=0, atol=_SAME) and (square or g.turns % 2 == 0):
            kept.append(g)
    return tuple(kept)


def _directions(angles: Tensor, period: float) -> Tensor:
    """The directions in order, modulo a period; what rounding left just below it is zero."""
    return torch.remainder(angles.double() + _SAME / 2, period).sort().values
