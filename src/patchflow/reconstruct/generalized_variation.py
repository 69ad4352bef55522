r"""Total generalised variation of second order (TGV-2) with any linear operator: total variation without staircases.

.. math:: \hat x, \hat v \in \arg\min_{x, v} \; D(A x \mid y) + w\,\big(\|\nabla x - v\|_1 + r\,\|E v\|_1\big),
          \qquad D = -\log p(y \mid \cdot)

where the field :math:`v` takes over the smooth part of the gradient and :math:`E v` is its symmetrised derivative:
edges cost as much as in total variation, slopes only where they change. Both norms are isotropic. It is solved like
:mod:`patchflow.reconstruct.total_variation`, with :math:`(x, v)` in place of :math:`x`.

The duality gap needs a bounded set that holds a minimiser. For images it is the range of the present one and half as
much more on both sides, for fields those that are nowhere longer than the longest difference of the present image.
That v is a smoothed gradient makes this plausible; it is an assumption, not a theorem, since pulling long vectors of v
back to that length may raise :math:`\|E v\|_1`.

References:
    Bredies, Kunisch, Pock, "Total generalized variation", SIAM J. Imaging Sciences 3(3), 2010,
    https://doi.org/10.1137/090769521
    Chambolle, Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging", 2011
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchflow.errors import InputError
from patchflow.priors.differences import SecondDifferences
from patchflow.problems.likelihood import Likelihood
from patchflow.saddle import Steps, saddle_problem
from patchflow.solution import Solution
from patchflow.splitting import primal_dual

# The usual choice of the literature.
RATIO = 2.0
# Highest PSNR on the validation image of super-resolution x4 (noise 0.01) among 1.5, 2, 2.5, 3, 3.5, 4: 27.93 dB.
SUPER_RESOLUTION_WEIGHT = 3.5
# With Gaussian noise: primal step of the image times weight; how the norm of (x, v) -> Dx - v is shared between x and
# v; dual step of the second order in that of the first. Gap after 200 iterations on super-resolution x4 (a quarter of
# the validation image, noise 0.01, weight 3, energy 5800): 267 with (0.007, 0.3, 6); 1310 with (0.015, 1, 1), 360 with
# (0.004, 0.3, 3), 601 with (0.007, 0.03, 6).
STEP, SHARE, SECOND = 0.006, 0.3, 5.0
# With projectors: dual steps of both orders, per unit of their weights. Gap after 150 iterations on a phantom (120
# angles, 4096 photons, energy 22450): 300; 303 with (8, 8), 367 with (25, 8), 1440 with (80, 25).
GRADIENT_STEP, SECOND_STEP = 25.0, 25.0
# Both derivatives' norms are below its root.
_SQUARED_NORM = 8.0


@torch.no_grad()
def reconstruct(
    likelihood: Likelihood,
    y: Tensor,
    init: Tensor,
    *,
    weight: float | int,
    ratio: float | int = RATIO,
    max_iterations: int = 1000,
    tolerance: float = 1e-2,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Minimise the negative log-likelihood plus ``weight`` times the total generalised variation.

    It stops when the duality gap, see above, is at most ``tolerance`` times the energy.

    Args:
        likelihood: A linear operator with Gaussian noise, or a projector and a noise with a proximal map.
        y: The measurement (batch, channels, height, width), or sinograms (batch, channels, angles, bins).
        init: Start (batch, channels, height, width), for example ``operator.initial(y)``.
        weight: The weight :math:`w`, in nats per unit of variation.
        ratio: The weight :math:`r` of the second order against the first.
        max_iterations: Stop after this many iterations in any case.
        tolerance: See above.
        callback: Called after each step with its number, the current x and its energy; what it returns is shown.
        progress: Show a progress line.

    Returns:
        The last image, the energies along the way in nats (up to a constant of y), and whether the gap closed. When
        interrupted (Ctrl-C), the image so far.

    Raises:
        InputError: If the weight or the ratio is not positive and finite, or operator and noise are of another kind.
        NumericalError: If the energy is not finite.
    """
    if not 0 < weight < math.inf:
        raise InputError(
            f"The weight of generalised variation is {weight} but must be positive and finite; 0.5 / noise is usual."
        )
    # |K(x, v)|^2 <= s1 (1 + b) |Dx|^2 + s1 (1 + 1/b) |v|^2 + s2 |Ev|^2, to be at most |x|^2 / t1 + |v|^2 / t2.
    tau = STEP / weight
    first = 1 / (_SQUARED_NORM * tau * (1 + SHARE))
    second = SECOND * first
    field = 1 / (first * (1 + 1 / SHARE) + _SQUARED_NORM * second)
    problem = saddle_problem(
        likelihood,
        y,
        init,
        SecondDifferences(ratio),
        weight,
        proximal=Steps((tau, field), (first, second)),
        preconditioned=(GRADIENT_STEP * weight, SECOND_STEP * weight * ratio),
    )
    return primal_dual(
        problem,
        *problem.start(init),
        relaxation=problem.relaxation,
        max_iterations=max_iterations,
        tolerance=tolerance,
        callback=callback,
        progress=progress,
    )
