r"""Reconstruction with the Wasserstein patch prior: :math:`x` moves down, the potentials up.

References:
    Hertrich, Houdard, Redenbach, "Wasserstein patch prior for image superresolution", IEEE TCI 8, 2022,
    https://arxiv.org/abs/2109.12880
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError
from patchflow.priors.multiscale import MultiscalePrior
from patchflow.priors.wasserstein import TransportCost
from patchflow.solution import Solution
from patchflow.solve import minimize

# Published for super-resolution x4 with noise 0.01: lambda = 6000/36 in |f(x) - y|^2 / (lambda S) + the mean of W_2^2
# between the patch distributions over S = 2 scales, a weight of (S lambda / sigma^2) p^2 / N = 339 here. Best on the
# validation image among 50 to 4000. On its corner of 300 x 300 pixels, patches of 8 x 8 pixels and the rate below give
# 28.02 dB, those of 6 x 6 and 1e-3 give 27.64; more reference patches or a third scale no more than 0.02 dB.
DEFAULT_WEIGHT = 100.0
STEPS, STEP_SIZE = 200, 0.01
# Of a reference patch that is never used, per evaluation of 32,768 patches, in squared units of images in [0, 1].
RATE = 6e-3


def reconstruct(
    likelihood: Energy,
    prior: MultiscalePrior,
    y: Tensor,
    init: Tensor,
    *,
    weight: float = DEFAULT_WEIGHT,
    steps: int = STEPS,
    lr: float = STEP_SIZE,
    rate: float = RATE,
    stride: int | None = None,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Minimise the negative log-likelihood plus ``weight`` times the Wasserstein patch prior.

    Each step of Adam in x evaluates one phase of the patch grid; the assignment of its patches also gives one step of
    ascent in the potentials, which start at zero.

    Args:
        likelihood: :math:`-\log p(y \mid x)`.
        prior: The prior, of :func:`patchflow.models.wpp`; its potentials are changed in place.
        y: The measurement.
        init: The start image, aligned with the operator's grid (``operator.initial(y)``).
        weight: The weight: one over a variance, in units of the image.
        steps: Number of steps.
        lr: Adam's peak step.
        rate: The ascent; see :meth:`patchflow.priors.wasserstein.TransportCost.rising`.
        stride: Stride of the cycling patch grid, the patch size by default.
        callback: See :func:`patchflow.solve.minimize`.
        progress: Show a progress line.

    Raises:
        InputError: If the prior is another one, there are several images, or a number is out of range.
        NumericalError: If the energy is not finite.
    """
    if not (0 <= weight < math.inf and steps >= 1 and 0 <= rate < math.inf):
        raise InputError(
            f"Got the weight {weight}, {steps} steps and the rate {rate}; weight and rate must be 0 or "
            "more and finite, the steps at least one."
        )
    if len(init) != 1:
        raise InputError(
            f"Got a stack of {len(init)} images but the potentials are those of one; call once for each."
        )
    prior.check(init)
    energies = [likelihood + weight * phase for phase in prior.phases(stride)]
    with ExitStack() as stack:
        for cost in transport_costs(prior):
            cost.reset()
            stack.enter_context(cost.rising(rate))
        return minimize(energies, init, y, steps=steps, lr=lr, callback=callback, progress=progress)


def transport_costs(prior: MultiscalePrior) -> list[TransportCost]:
    """The patch energies of the scales.

    Raises:
        InputError: If one is not that of transport.
    """
    energies = [scale.get_submodule("patch_energy") for scale in prior.priors]
    costs = [energy for energy in energies if isinstance(energy, TransportCost)]
    if len(costs) < len(energies):
        raise InputError(
            f"The Wasserstein patch prior needs transport but a scale has a {type(energies[0]).__name__}; make the "
            "prior with patchflow train wpp, or patchflow.learn_wpp."
        )
    return costs
