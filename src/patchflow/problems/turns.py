"""The turns and reflections that an operator commutes with, up to a shift of the measurement."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchflow.numerics.dihedral import DIHEDRAL, Symmetry
from patchflow.problems.operator import LinearOperator


class Turn(NamedTuple):
    """What an operator makes of turning its image: the measurement is turned, and moved periodically.

    It is moved where the operator's grid does not lie in the middle of the image.
    """

    symmetry: Symmetry
    shift: tuple[int, int]

    def __call__(self, y: Tensor) -> Tensor:
        """The measurement of the turned image."""
        return self.symmetry(y).roll(self.shift, (-2, -1))


IDENTITY = Turn(DIHEDRAL[0], (0, 0))


def commuting(operator: LinearOperator) -> tuple[Turn, ...]:
    """The turns and reflections that an operator commutes with, tried on a random image; the identity comes first."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(1, 1, *operator.domain_shape)
    y = operator(x)
    tolerance = 1e-4 * float(y.abs().max())
    found = [IDENTITY]
    for g in DIHEDRAL[1:]:
        if g(x).shape != x.shape or g(y).shape != y.shape:
            continue
        turned = operator(g(x))
        turn = Turn(g, _shift(g(y), turned))
        if torch.allclose(turn(y), turned, rtol=0, atol=tolerance):
            found.append(turn)
    return tuple(found)


def _shift(y: Tensor, moved: Tensor) -> tuple[int, int]:
    """The periodic shift that brings one image nearest to another: the maximum of their correlation."""
    y, moved = y - y.mean(), moved - moved.mean()
    spectrum = torch.fft.rfft2(y).conj() * torch.fft.rfft2(moved)
    correlation = torch.fft.irfft2(spectrum, s=y.shape[-2:])
    row, column = divmod(int(correlation[0, 0].argmax()), y.shape[-1])
    return row, column
