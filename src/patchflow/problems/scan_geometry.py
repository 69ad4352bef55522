"""What makes two scans the same: the numbers of a projector, and how they are told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchflow.problems.tomography import ParallelBeam

# Numbers that were rounded differently agree.
_TOLERANCE = 1e-3


def geometry(operator: ParallelBeam) -> dict[str, Any]:
    """The numbers that rebuild a projector, as JSON values: pixels, bins, lengths in metres, angles in radians."""
    return {
        "image": list(operator.domain_shape),
        "bins": operator.range_shape[1],
        "pixel": operator.pixel,
        "bin width": operator.spacing,
        "detector offset": operator.offset,
        "angles": operator.angles.tolist(),
    }


def projector(numbers: Mapping[str, Any]) -> ParallelBeam:
    """The projector of the numbers of :func:`geometry`."""
    height, width = numbers["image"]
    return ParallelBeam(
        (height, width),
        torch.tensor(numbers["angles"], dtype=torch.float64),
        numbers["bins"],
        pixel=numbers["pixel"],
        spacing=numbers["bin width"],
        offset=numbers["detector offset"],
    )


class Difference(NamedTuple):
    """A number of a geometry that is another than it should be, in words.

    Attributes:
        name: Which one.
        given: What it is.
        own: What it should be.
    """

    name: str
    given: str
    own: str


def difference(operator: ParallelBeam, own: ParallelBeam) -> Difference | None:
    """The first number in which a geometry differs from another; None if it is the same up to rounding.

    Args:
        operator: The projector.
        own: What it should be.
    """
    wanted, given = geometry(own), geometry(operator)
    for name, value in wanted.items():
        if name == "angles":
            if not _same_angles(own.angles, operator.angles):
                return Difference(
                    name, _describe_angles(operator.angles), _describe_angles(own.angles)
                )
        elif not _agree(value, given[name]):
            return Difference(name, str(given[name]), str(value))
    return None


def _agree(a: Any, b: Any) -> bool:  # noqa: ANN401
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-9)
    return a == b


def _same_angles(a: Tensor, b: Tensor) -> bool:
    """In any order, and modulo half a turn, up to a tenth of the usual way to the next one."""
    if len(a) != len(b):
        return False
    a, b = (torch.remainder(t, math.pi).sort().values for t in (a, b))
    near = 0.1 * float(a.diff().median()) if len(a) > 1 else _TOLERANCE
    # Rounding may have carried an angle of zero to the other end.
    return any(
        bool(((a - shifted + math.pi / 2) % math.pi - math.pi / 2).abs().max() <= near)
        for shifted in (b, b.roll(1), b.roll(-1))
    )


def _describe_angles(angles: Tensor) -> str:
    degrees = torch.rad2deg(torch.remainder(angles, math.pi))
    return f"{len(degrees)} from {float(degrees.min()):.4g} to {float(degrees.max()):.4g} degrees"
