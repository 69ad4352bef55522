"""How noisy a measurement is behind each pixel of the image: what error bars of varying doses go by."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.likelihood import Likelihood, ProximableNoise
from patchflow.problems.operator import LinearOperator


@torch.no_grad()
def noise_level(
    likelihood: Likelihood, y: Float[Tensor, "batch channels angles bins"]
) -> Float[Tensor, "batch channels height width"]:
    r"""The root of the mean variance of the measured values that see a pixel.

    .. math:: s_j = \sqrt{(A^\top v)_j \,/\, (A^\top 1)_j}, \qquad v_i = \operatorname{var}(y_i),

    with the variances that the law of the noise gives to what was measured. In computed tomography they grow behind
    whatever absorbs photons, and so do the errors of a reconstruction there. What nothing sees has the largest level.

    Args:
        likelihood: The law of the measurement, with a linear operator :math:`A` whose entries are not negative.
        y: The measurement.

    Returns:
        The levels, in the unit of the measurement.

    Raises:
        InputError: If the operator is not linear, or the noise does not tell its variance.
    """
    operator, noise = likelihood.operator, likelihood.noise
    if not (isinstance(operator, LinearOperator) and isinstance(noise, ProximableNoise)):
        raise InputError(
            f"The noise level at a pixel is that of linear operators and noises with a precision, not of "
            f"{type(operator).__name__} with {type(noise).__name__}; leave it out."
        )
    seen = operator.adjoint(torch.ones_like(y[:1, :1]))
    variance = operator.adjoint(1 / noise.precision(y)) / seen
    largest = variance.nan_to_num(0).amax((-2, -1), keepdim=True)
    return torch.where(seen > 0, variance, largest).sqrt()
