"""Reconstruction by a network that was trained on simulated pairs of one to six images: one pass, or several averaged.

References:
    Timofte, Rothe, Van Gool, "Seven ways to improve example-based single image super resolution", CVPR 2016,
    https://arxiv.org/abs/1511.02228 (the mean over turns and reflections)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.image_models import SingleImage
from patchflow.numerics.dihedral import DIHEDRAL, Symmetry
from patchflow.numerics.precision import Precision, autocast
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.operator import LinearOperator
from patchflow.solution import Solution


@torch.no_grad()
def reconstruct(
    likelihood: Likelihood,
    model: SingleImage,
    y: Float[Tensor, "batch channels *measured"],
    *,
    ensemble: bool | None = None,
    precision: Precision = "auto",
) -> Solution:
    """Apply the network.

    Args:
        likelihood: The operator and the noise, which the network was trained for.
        model: The network.
        y: The measurement.
        ensemble: Whether to average over the turns and reflections that the operator commutes with; by default if the
            network learned from such.
        precision: Precision of the networks: what they correct stays in float32, as do the data steps. See
            :func:`patchflow.numerics.precision.autocast`.

    Raises:
        InputError: If the network was trained for another measurement.
    """
    model.check(y)
    model.check_measurement(likelihood)
    operator = likelihood.operator
    assert isinstance(operator, LinearOperator)
    turns = commuting(operator) if (model.dihedral if ensemble is None else ensemble) else ()
    with autocast(y, precision):
        found = mean_over_turns(model, y, operator, turns)
    return Solution(found, [], 1, True)


class Turn(NamedTuple):
    """What an operator makes of turning its image: the measurement is turned, and moved periodically.

    It is moved where the operator's grid does not lie in the middle of the image.
    """

    symmetry: Symmetry
    shift: tuple[int, int]

    def __call__(self, y: Tensor) -> Tensor:
        """The measurement of the turned image."""
        return self.symmetry(y).roll(self.shift, (-2, -1))


def mean_over_turns(
    model: SingleImage,
    y: Float[Tensor, "batch channels *measured"],
    operator: LinearOperator,
    turns: Sequence[Turn],
) -> Float[Tensor, "batch channels height width"]:
    """The mean of what a network makes of a measurement and of its turns, turned back."""
    found = model(y, operator)
    for turn in turns:
        found = found + turn.symmetry.undo(model(turn(y), operator))
    return found / (1 + len(turns))


def commuting(operator: LinearOperator) -> tuple[Turn, ...]:
    """The turns and reflections, but for the identity, that an operator commutes with, tried on a random image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(1, 1, *operator.domain_shape)
    y = operator(x)
    tolerance = 1e-4 * float(y.abs().max())
    found = []
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
