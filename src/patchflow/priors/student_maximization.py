r"""Maximum likelihood of a Student-t mixture with full scatter matrices by expectation maximisation.

A Student-t variable is a normal one of covariance :math:`\Sigma / U` with :math:`U \sim \Gamma(\nu/2, \nu/2)`. With the
responsibilities :math:`r_{nk}` and :math:`u_{nk} = (\nu_k + d) / (\nu_k + \delta_{nk})`, the mean of :math:`U` given
the point at the squared distance :math:`\delta_{nk}`, a step is

.. math::
    m_k = \frac{\sum_n r_{nk} u_{nk} x_n}{\sum_n r_{nk} u_{nk}}, \quad
    \Sigma_k = \frac{\sum_n r_{nk} u_{nk} (x_n - m_k)(x_n - m_k)^\top}{\sum_n r_{nk}}, \quad
    w_k = \tfrac1N \sum_n r_{nk},

with the eigenvalues of :math:`\Sigma_k` raised to the floor, and :math:`\nu_k` the zero of the decreasing function

.. math::
    \log\tfrac\nu2 - \psi(\tfrac\nu2) + 1 + \frac{\sum_n r_{nk} (\log u_{nk} - u_{nk})}{\sum_n r_{nk}}
    + \psi\bigl(\tfrac{\nu_k + d}2\bigr) - \log\tfrac{\nu_k + d}2,

or the end of the interval [0.1, 1000] that it lies beyond. Each part is the exact maximum of the expected
likelihood, so the likelihood never decreases.

References:
    Peel, McLachlan, "Robust mixture modelling using the t distribution", 2000,
    https://doi.org/10.1023/A:1008981510081
    Liu, Rubin, "ML estimation of the t distribution using EM and its extensions, ECM and ECME", 1995
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.quadratic import features, moments
from patchflow.priors.expectation_maximization import Whitening, check_points, start_mixture
from patchflow.priors.student import log_densities
from patchflow.progress import progress_line

DEGREES = (0.1, 1000.0)
# Where the degrees of freedom start.
_START = 3.0
_CHUNK = 4096
# A component that owns less than this many points is left out.
_EMPTY = 1e-3
# Halvings of the logarithmic interval of the degrees of freedom.
_BISECTIONS = 60


class StudentFit(NamedTuple):
    """A fitted Student-t mixture, and how it came about.

    Attributes:
        weights: (components,); those without points are left out.
        means: The locations, (components, dim).
        scatters: The scatter matrices, (components, dim, dim).
        degrees: The degrees of freedom, (components,).
        log_likelihood: The mean log-likelihood of a point, in nats, before each step and after the last.
        converged: Whether a step gained less than the tolerance.
        interrupted: Whether the user stopped it (Ctrl-C).
    """

    weights: Tensor
    means: Tensor
    scatters: Tensor
    degrees: Tensor
    log_likelihood: list[float]
    converged: bool
    interrupted: bool = False


@torch.no_grad()
def fit_student_mixture(
    points: Float[Tensor, "count dim"],
    components: int,
    *,
    floor: float | int = 1e-6,
    tolerance: float | int = 1e-3,
    max_iterations: int = 500,
    start: StudentFit | None = None,
    progress: bool = False,
) -> StudentFit:
    r"""Fit a mixture to points, by default from a k-means++ start drawn from torch's global generator.

    Args:
        points: The points; the work is done in float64.
        components: The number of components.
        floor: The smallest eigenvalue of a scatter matrix, in squared units of the points.
        tolerance: Stop when a step gains less than this many nats per point.
        max_iterations: Stop after this many steps in any case.
        start: A mixture to go on from.
        progress: Show a progress line.

    Returns:
        The mixture and its record. When interrupted (Ctrl-C), the mixture so far.

    Raises:
        InputError: If there are too few different points, one is not finite, or a number is out of range.
    """
    check_points(points, components, floor, max_iterations)
    count = len(points)
    space = Whitening(points, floor)
    z = space.whiten(points.double())
    if start is None:
        weights, means, scatters = start_mixture(points, components, floor)
        degrees = torch.full_like(weights, _START)
    else:
        if start.means.shape != (components, points.shape[1]):
            raise InputError(
                f"The start has locations of {tuple(start.means.shape)} but there are {components} components of "
                f"dimension {points.shape[1]}; give a start for these."
            )
        weights, means, scatters, degrees = (t.double() for t in start[:4])
        degrees = degrees.clamp(*DEGREES)
    history: list[float] = []
    converged = interrupted = False
    bar = progress_line(total=max_iterations, shown=progress)
    try:
        while True:
            sums, owned, tails, total = _expect(z, space, weights, means, scatters, degrees)
            history.append(total / count + space.log_det)
            bar.set_postfix({"log-likelihood": f"{history[-1]:.4f}"}, refresh=False)
            converged = len(history) > 1 and history[-1] - history[-2] < tolerance
            if converged or len(history) > max_iterations:
                break
            kept = owned > _EMPTY
            sums, owned, tails, degrees = sums[kept], owned[kept], tails[kept], degrees[kept]
            degrees = _degrees(tails / owned, degrees, len(z))
            pulled, first, second = moments(sums)
            centres = first / pulled[:, None]
            outer = pulled[:, None, None] * centres[:, :, None] * centres[:, None]
            means, scatters = space.unwhiten(centres, (second - outer) / owned[:, None, None])
            weights = owned / count
            bar.update()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    weights, means, scatters, degrees = (t.to(points) for t in (weights, means, scatters, degrees))
    return StudentFit(weights, means, scatters, degrees, history, converged, interrupted)


def _expect(
    z: Tensor,
    space: Whitening,
    weights: Tensor,
    means: Tensor,
    scatters: Tensor,
    degrees: Tensor,
) -> tuple[Tensor, Tensor, Tensor, float]:
    r"""The sums of :math:`r u \phi`, :math:`r` and :math:`r (\log u - u)`, and that of the log-likelihoods."""
    theta, log_dets = space.distances(means, scatters)
    sums, owned, tails, total = torch.zeros_like(theta), 0.0, 0.0, 0.0
    dim, nu = len(z), degrees[:, None]
    for part in z.split(_CHUNK, 1):
        phi = features(part)
        squared = (theta @ phi).clamp_min(0)
        joint = weights.log()[:, None] + log_densities(squared, log_dets, degrees, dim)
        log_likelihood = joint.logsumexp(0)
        total += float(log_likelihood.sum())
        r = (joint - log_likelihood).exp()
        u = (nu + dim) / (nu + squared)
        owned = owned + r.sum(1)
        tails = tails + (r * (u.log() - u)).sum(1)
        sums += (r * u) @ phi.T
    assert isinstance(owned, Tensor)
    assert isinstance(tails, Tensor)
    return sums, owned, tails, total


def _degrees(tails: Tensor, degrees: Tensor, dim: int) -> Tensor:
    """The zeros of the module's function of the degrees of freedom, by bisection of their logarithms."""
    before = 0.5 * (degrees + dim)
    constant = 1 + tails + torch.digamma(before) - before.log()
    low, high = (torch.full_like(degrees, end).log() for end in DEGREES)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        half = 0.5 * middle.exp()
        rising = half.log() - torch.digamma(half) + constant > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return (0.5 * (low + high)).exp()
