"""Super-resolution by a trained conditional flow: the mean of samples, and their standard deviation pixel by pixel.

References:
    Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", 2022,
    https://arxiv.org/abs/2201.08157
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.resolution import from_cells
from patchflow.resolution_models import SuperResolver
from patchflow.solution import Solution

# Published are 10.
SAMPLES = 32


@torch.no_grad()
def reconstruct(
    likelihood: GaussianLikelihood,
    model: SuperResolver,
    y: Float[Tensor, "batch channels height width"],
    *,
    samples: int = SAMPLES,
) -> Solution:
    """Draw samples of the image, from torch's global generator.

    Args:
        likelihood: The operator and the noise.
        model: The flow, of :func:`patchflow.wpp_flow`.
        y: The measurement.
        samples: How many are drawn, one after the other: memory does not grow with them.

    Returns:
        The mean of the samples, with their standard deviation; where nothing was measured, it is zero.

    Raises:
        InputError: If the flow was trained for something else, or there are fewer than two samples.
    """
    if samples < 2:
        raise InputError(f"Got {samples} samples; a standard deviation needs at least two.")
    model.check(y)
    operator = model.operator_of(likelihood)
    start = operator.initial(y)
    first = from_cells(operator, model(y), start)
    # Around the first sample, so that nothing cancels.
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for _ in range(samples - 1):
        difference = from_cells(operator, model(y), start) - first
        total += difference
        squares += difference.square()
    variance = (squares - total.square() / samples) / (samples - 1)
    return Solution(first + total / samples, [], samples, None, std=variance.clamp_min(0).sqrt())
