r"""Optimal transport between two clouds of points: semi-dual, entropic, semi-unbalanced, and exact for small ones.

Between :math:`\mu = \frac1N \sum_i \delta_{p_i}` and the reference :math:`\nu = \frac1M \sum_j \delta_{q_j}`, with the
cost :math:`\frac12 \|p - q\|^2`, the semi-dual problem is concave in one number :math:`\psi_j` per reference point:

.. math:: T_{\varepsilon,\rho}(\mu, \nu) = \max_\psi \; \frac1N \sum_i \min\nolimits^\varepsilon_j
          \big(\tfrac12 \|p_i - q_j\|^2 - \psi_j\big) + \frac1M \sum_j \phi_\rho(\psi_j).

With :math:`\varepsilon = 0` the minimum is the ordinary one and :math:`T` half of the squared 2-Wasserstein distance.
With :math:`\varepsilon > 0` it is smooth, :math:`\min^\varepsilon_j a_j = -\varepsilon \log \frac1M \sum_j e^{-a_j /
\varepsilon}`: entropic transport. With :math:`\rho = \infty` every reference point is used alike,
:math:`\phi_\infty(t) = t`; else :math:`\phi_\rho(t) = \rho (1 - e^{-t/\rho})`, and using them otherwise costs
:math:`\rho` times a Kullback-Leibler divergence (semi-unbalanced).

References:
    Genevay, Cuturi, Peyre, Bach, "Stochastic optimization for large-scale optimal transport", 2016,
    https://arxiv.org/abs/1605.08527
    Chizat, Peyre, Schmitzer, Vialard, "Scaling algorithms for unbalanced optimal transport problems", 2018,
    https://arxiv.org/abs/1607.05816
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye_array, kron
from torch import Tensor

from patchflow.errors import InputError

# Numbers of the table of scores in memory at a time.
_CHUNK = 1 << 22
# Steps of Newton's method, which converges quadratically from its first: more than enough in double precision.
_NEWTON = 6


class Assignment(NamedTuple):
    """Where points go.

    Attributes:
        value: The (smooth) minimum for each point.
        target: The (mean) reference point that each goes to; its difference to the point is the slope of the value.
        use: The share of the points that each reference point receives.
    """

    value: Tensor
    target: Tensor
    use: Tensor


def assign(
    points: Float[Tensor, "count dim"],
    reference: Float[Tensor, "size dim"],
    psi: Float[Tensor, " size"],
    epsilon: float | int = 0.0,
) -> Assignment:
    r"""The (smooth) minimum over the reference points, chunk by chunk in bounded memory.

    Args:
        points: The points :math:`p_i`.
        reference: The reference points :math:`q_j`.
        psi: The potential :math:`\psi`.
        epsilon: The smoothing :math:`\varepsilon`, in units of the cost; 0 for none.

    Raises:
        InputError: If there are no points or no reference points, or the smoothing is negative or infinite.
    """
    _check(points, reference)
    if not 0 <= epsilon < math.inf:
        raise InputError(f"The smoothing is {epsilon} but must be 0 or more, and finite.")
    size = len(reference)
    offset = psi - 0.5 * reference.square().sum(1)
    values, targets = [], []
    use = torch.zeros_like(psi)
    for part in points.split(max(1, _CHUNK // size)):
        scores = torch.addmm(offset, part, reference.T)
        if epsilon > 0:
            best = epsilon * ((scores / epsilon).logsumexp(1) - math.log(size))
            shares = scores.div_(epsilon).softmax(1)
            targets.append(shares @ reference)
            use += shares.sum(0)
        else:
            best, chosen = scores.max(1)
            targets.append(reference[chosen])
            use += chosen.bincount(minlength=size)
        values.append(0.5 * part.square().sum(1) - best)
    return Assignment(torch.cat(values), torch.cat(targets), use / len(points))


def marginal(psi: Float[Tensor, " size"], rho: float | int = math.inf) -> Float[Tensor, " size"]:
    r"""The terms :math:`\phi_\rho(\psi_j)`."""
    return psi if math.isinf(rho) else -rho * torch.expm1(-psi / rho)


def ascent_direction(
    psi: Float[Tensor, " size"], use: Float[Tensor, " size"], rho: float | int = math.inf
) -> Float[Tensor, " size"]:
    r"""The gradient of the semi-dual objective, times :math:`M`: how much more each reference point should be used."""
    wanted = 1.0 if math.isinf(rho) else torch.exp(-psi / rho)
    return wanted - len(psi) * use


def climb(
    psi: Float[Tensor, " size"],
    use: Float[Tensor, " size"],
    rate: float | int,
    rho: float | int = math.inf,
) -> Float[Tensor, " size"]:
    r"""One step of proximal gradient ascent of the semi-dual objective.

    .. math:: \psi^+ = \psi - r M u + r\, \phi_\rho'(\psi^+),

    explicit in the minimum, whose use of the reference points is :math:`u`, and implicit in the marginal: an explicit
    step overflows where :math:`\psi` is below a few :math:`-\rho`.

    Args:
        psi: The potential.
        use: The share of the points that each reference point receives.
        rate: The step :math:`r` for a reference point that is never used, in units of the cost.
        rho: The penalty of the reference marginal.
    """
    below = psi - rate * len(psi) * use
    if math.isinf(rho) or rate == 0:
        return below + rate
    # The step upwards over rho, t, solves t + log t = log(rate / rho) - below / rho: Newton's method, from the
    # asymptotes of the concave equation.
    level = (math.log(rate / rho) - below / rho).clamp_min(-50.0)  # a step of exp(-50) rho is none
    small = level.clamp_max(1.0).exp()
    t = torch.where(level > 1, level, small / (1 + small))
    for _ in range(_NEWTON):
        t = t * (1 + level - t.log()) / (1 + t)
    return below + rho * t


def dual_value(assignment: Assignment, psi: Tensor, rho: float | int = math.inf) -> Tensor:
    """The semi-dual objective: a lower bound of the cost of transport, equal to it for the best potential."""
    return assignment.value.mean() + marginal(psi, rho).mean()


def ascend(
    points: Float[Tensor, "count dim"],
    reference: Float[Tensor, "size dim"],
    psi: Float[Tensor, " size"],
    *,
    rate: float,
    steps: int,
    batch: int | None = None,
    epsilon: float | int = 0.0,
    rho: float | int = math.inf,
) -> Float[Tensor, " size"]:
    """Averaged stochastic gradient ascent of the semi-dual objective.

    Args:
        points: The points.
        reference: The reference points.
        psi: The potential to start from.
        rate: The first step for a reference point that is never used, in units of the cost; steps fall with the root of
            their number.
        steps: The number of steps.
        batch: Points per step, drawn with replacement from torch's generator; all by default.
        epsilon: The smoothing.
        rho: The penalty of the reference marginal.

    Returns:
        The mean of the potentials of the second half of the steps.

    Raises:
        InputError: If there are no points or no reference points.
    """
    _check(points, reference)
    total, count = torch.zeros_like(psi), 0
    for k in range(steps):
        chosen = points if batch is None else points[torch.randint(len(points), (batch,))]
        use = assign(chosen, reference, psi, epsilon).use
        psi = climb(psi, use, rate / math.sqrt(k + 1), rho)
        if 2 * k >= steps - 1:
            total, count = total + psi, count + 1
    return total / count if count else psi


def sinkhorn(
    points: Float[Tensor, "count dim"],
    reference: Float[Tensor, "size dim"],
    *,
    epsilon: float,
    rho: float | int = math.inf,
    psi: Float[Tensor, " size"] | None = None,
    steps: int = 100,
    scaling: float = 0.5,
) -> Float[Tensor, " size"]:
    r"""The best potential of entropic transport by Sinkhorn's iterations in the logarithmic domain.

    The table of all costs is held in memory. Without a start :math:`\varepsilon` falls geometrically to its value from
    the largest cost.

    Args:
        points: The points.
        reference: The reference points.
        epsilon: The smoothing :math:`\varepsilon > 0`.
        rho: The penalty of the reference marginal.
        psi: The potential to start from.
        steps: The number of iterations at the last :math:`\varepsilon`.
        scaling: The factor by which :math:`\varepsilon` falls.

    Raises:
        InputError: If there are no points or no reference points, the smoothing is not positive and finite, or the
            factor is not inside (0, 1).
    """
    _check(points, reference)
    if not (0 < epsilon < math.inf and 0 < scaling < 1):
        raise InputError(
            f"Got the smoothing {epsilon} and the factor {scaling}; the one must be positive, the other inside (0, 1)."
        )
    cost = 0.5 * torch.cdist(points, reference).square()
    level = epsilon if psi is not None else max(epsilon, float(cost.max()))
    psi = torch.zeros_like(reference[:, 0]) if psi is None else psi
    count, size = cost.shape
    remaining = steps
    while remaining > 0:
        remaining -= level <= epsilon
        phi = level * (math.log(size) - ((psi - cost) / level).logsumexp(1))
        psi = level * (math.log(count) - ((phi[:, None] - cost) / level).logsumexp(0))
        if not math.isinf(rho):
            psi = psi * (rho / (rho + level))
        level = max(epsilon, scaling * level)
    return psi


def exact_cost(points: Float[Tensor, "count dim"], reference: Float[Tensor, "size dim"]) -> float:
    r"""Half of the squared 2-Wasserstein distance, exactly: an assignment or a linear programme; for small clouds.

    Args:
        points: The points.
        reference: The reference points.

    Raises:
        InputError: If there are no points or no reference points.
    """
    _check(points, reference)
    cost = 0.5 * torch.cdist(points.double(), reference.double()).square().cpu().numpy()
    count, size = cost.shape
    if count == size:
        return float(cost[linear_sum_assignment(cost)].mean())
    rows = kron(eye_array(count), np.ones((1, size)))
    columns = kron(np.ones((1, count)), eye_array(size))
    # One of the constraints follows from the others.
    found = linprog(
        cost.ravel(),
        A_eq=np.vstack([rows.toarray(), columns.toarray()])[:-1],
        b_eq=np.concatenate([np.full(count, 1 / count), np.full(size, 1 / size)])[:-1],
        method="highs",
    )
    return float(found.fun)


def _check(points: Tensor, reference: Tensor) -> None:
    if not len(points) or not len(reference):
        raise InputError(
            f"Transport needs points on both sides but got {len(points)} and {len(reference)} reference points; give "
            "an image that is at least as large as a patch."
        )
