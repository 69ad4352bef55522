r"""Total variation with any linear operator: the standard competitor without training.

.. math:: \hat x \in \arg\min_x \; D(A x \mid y) + w\,\mathrm{TV}(x), \qquad D = -\log p(y \mid \cdot)

by the over-relaxed primal-dual method of Chambolle and Pock. With Gaussian noise the data enter by their exact proximal
map in the space of images, see :class:`patchflow.saddle.ProximalSaddle`; for projectors, with Gaussian or Poisson
noise, by a dual variable and a Fourier preconditioner, see :class:`patchflow.saddle.PreconditionedSaddle`.

References:
    Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D, 1992
    Chambolle, Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging", 2011
    Sidky, Jorgensen, Pan, "Convex optimization problem prototyping for image reconstruction in computed tomography with
    the Chambolle-Pock algorithm", Phys. Med. Biol. 57, 2012, https://arxiv.org/abs/1111.5632
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood
from patchflow.problems.sampling import Mask
from patchflow.solution import Solution
from patchflow.splitting import primal_dual
from patchflow.variation_problem import TOLERANCE, variation_problem


@torch.no_grad()
def reconstruct(
    likelihood: Likelihood,
    y: Tensor,
    init: Tensor,
    *,
    weight: float | int,
    isotropic: bool = True,
    max_iterations: int = 1000,
    tolerance: float = TOLERANCE,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Minimise the negative log-likelihood plus ``weight`` times the total variation.

    It stops when the duality gap, the distance to the smallest energy among images in [0, 1] and in the range of the
    present one, is at most ``tolerance`` times the energy.

    Args:
        likelihood: A linear operator with Gaussian noise, or a projector and a noise with a proximal map.
        y: The measurement (batch, channels, height, width), or sinograms (batch, channels, angles, bins).
        init: Start (batch, channels, height, width), for example ``operator.initial(y)``.
        weight: The weight :math:`w`, in nats per unit of variation.
        isotropic: See :class:`patchflow.priors.variation.TotalVariation`.
        max_iterations: Stop after this many iterations in any case.
        tolerance: See above.
        callback: Called after each step with its number, the current x and its energy; what it returns is shown.
        progress: Show a progress line.

    Returns:
        The last point, the energies along the way in nats (up to a constant of y), and whether the gap closed. When
        interrupted (Ctrl-C), the point so far.

    Raises:
        InputError: If the weight is not positive and finite, or operator and noise are of another kind.
        NumericalError: If the energy is not finite.
    """
    if not 0 < weight < math.inf:
        raise InputError(
            f"The weight of total variation is {weight} but must be positive and finite; 0.5 / noise is usual."
        )
    problem = variation_problem(likelihood, y, init, weight, isotropic=isotropic)
    return primal_dual(
        problem,
        *problem.start(init),
        relaxation=problem.relaxation,
        max_iterations=max_iterations,
        tolerance=tolerance,
        callback=callback,
        progress=progress,
    )


def default_weight(likelihood: GaussianLikelihood) -> float:
    """The best weight in denoising and super-resolution of photographs, in nats: as the data say more, it grows.

    Args:
        likelihood: The law of the measurement.
    """
    operator = likelihood.operator
    measured = math.prod(operator.range_shape)
    if isinstance(operator, Mask):
        measured = int(operator.mask.sum())
    return 0.56 * measured / math.prod(operator.domain_shape) / likelihood.std
