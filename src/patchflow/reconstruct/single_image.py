"""Reconstruction by a network that was trained on simulated pairs of one to six images: one pass, or several averaged.

References:
    Timofte, Rothe, Van Gool, "Seven ways to improve example-based single image super resolution", CVPR 2016,
    https://arxiv.org/abs/1511.02228 (the mean over turns and reflections)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.image_models import SingleImage
from patchflow.numerics.precision import Precision, autocast
from patchflow.problems.likelihood import Likelihood
from patchflow.problems.operator import LinearOperator
from patchflow.problems.turns import IDENTITY, commuting
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
    whole = model.dihedral if ensemble is None else ensemble
    turns = commuting(operator) if whole else (IDENTITY,)
    with autocast(y, precision):
        found = sum(turn.symmetry.undo(model(turn(y), operator)) for turn in turns) / len(turns)
    assert isinstance(found, Tensor)
    return Solution(found, [], 1, True)
