r"""The weight of a prior without a ground truth: by the discrepancy principle, and by Stein's unbiased risk estimate.

A reconstruction :math:`\hat x_w(y)` predicts the measurement as :math:`\hat a_w = A \hat x_w(y)`. With noise of the
covariance :math:`\Sigma` the *discrepancy principle* takes the weight whose residual is as large as the noise,

.. math:: \|\hat a_w - y\|^2_{\Sigma^{-1}} = m,

which is too smooth where the prior is good. *Stein's estimate* of the risk of the prediction,

.. math:: \mathrm{SURE}(w) = \|\hat a_w - y\|^2_{\Sigma^{-1}} - m + 2 \operatorname{div}_y \hat a_w, \qquad
          \mathbb E\, \mathrm{SURE}(w) = \mathbb E \|\hat a_w - A x\|^2_{\Sigma^{-1}},

is unbiased for Gaussian noise and needs no truth; its divergence is estimated by a second reconstruction, of the
measurement with a little more noise :math:`\epsilon b`, :math:`b \sim N(0, \Sigma)`:

.. math:: \operatorname{div}_y \hat a_w \approx \langle b, \hat a_w(y + \epsilon b) - \hat a_w(y)
          \rangle_{\Sigma^{-1}} / \epsilon.

References:
    Morozov, "On the solution of functional equations by the method of regularization", 1966
    Stein, "Estimation of the mean of a multivariate normal distribution", 1981
    Ramani, Blu, Unser, "Monte-Carlo SURE: a black-box optimization of regularization parameters for general denoising
    algorithms", IEEE Trans. Image Process. 17(9), 2008
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patchflow.errors import InputError, NumericalError
from patchflow.problems.likelihood import Likelihood, ProximableNoise
from patchflow.problems.sampling import Mask
from patchflow.solution import Solution

# Of the second measurement, in standard deviations of the noise.
_PROBE = 0.3
# Weights of the first grid, and how far it may be extended on one side.
_FACTOR, _GRID, _EXTENSIONS = 4.0, 5, 4
# Neighbours of the best weight of the grid, then of the refined grid.
_REFINEMENTS = (2.0, math.sqrt(2.0))
# Ratio of the two choices beyond which they disagree.
_DISAGREEMENT = 4.0


class Trial(NamedTuple):
    """A weight that was tried.

    Attributes:
        weight: The weight.
        discrepancy: The mean squared residual over the variance of the noise; 1 is what the noise alone leaves.
        risk: Stein's estimate of the mean squared error of the prediction, over the variance of the noise.
    """

    weight: float
    discrepancy: float
    risk: float


class WeightChoice(NamedTuple):
    """The chosen weight.

    Attributes:
        weight: The weight of the smallest estimated risk.
        solution: The reconstruction with it.
        by_discrepancy: The weight of the discrepancy principle, or None if the residual never is so large or small.
        trials: All that were tried, by weight.
    """

    weight: float
    solution: Solution
    by_discrepancy: float | None
    trials: list[Trial]

    @property
    def agree(self) -> bool:
        """Whether both principles choose weights within a factor of four."""
        if self.by_discrepancy is None:
            return False
        ratio = self.by_discrepancy / self.weight
        return 1 / _DISAGREEMENT <= ratio <= _DISAGREEMENT


@torch.no_grad()
def choose_weight(
    solve: Callable[[Tensor, float], Solution],
    likelihood: Likelihood,
    y: Tensor,
    *,
    start: float,
    report: Callable[[Trial], None] | None = None,
) -> WeightChoice:
    """Choose a weight: on a grid of factors of four, then of two and of its root around the best.

    Each trial takes two reconstructions, of the measurement and of a noisier one (seeded by torch's generator).

    Args:
        solve: Reconstructs a measurement with a weight; the same steps for every measurement.
        likelihood: The law of the measurement; its noise Gaussian, or with a known precision.
        y: The measurement.
        start: The middle of the grid, for example the default weight.
        report: Called with each trial.

    Returns:
        The choice by Stein's estimate, beside that by the discrepancy principle.

    Raises:
        InputError: If the noise has no precision, or ``start`` is not positive and finite.
        NumericalError: If no weight of a wide range has the smallest risk.
    """
    noise = likelihood.noise
    if not isinstance(noise, ProximableNoise):
        raise InputError(
            f"An automatic weight needs Gaussian or Poisson noise, not {type(noise).__name__}; give a weight."
        )
    if not 0 < start < math.inf:
        raise InputError(f"The start weight is {start} but must be positive and finite.")
    precision = noise.precision(y)
    # A generator of its own: seeded as the simulation was, torch's would draw the noise of the measurement again.
    generator = torch.Generator(y.device).manual_seed(int(torch.randint(2**62, ())))
    probe = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
    probe = probe * precision.rsqrt()
    if isinstance(likelihood.operator, Mask):
        # What a file holds where nothing was measured says nothing.
        precision = precision * likelihood.operator.mask
    count = int((precision > 0).sum())
    trials: dict[float, Trial] = {}
    solutions: dict[float, Solution] = {}

    def attempt(weight: float) -> None:
        solution, other = solve(y, weight), solve(y + _PROBE * probe, weight)
        if solution.interrupted or other.interrupted:
            raise KeyboardInterrupt
        image = likelihood.operator(solution.x)
        change = likelihood.operator(other.x) - image
        divergence = float((probe * change * precision).sum()) / _PROBE
        discrepancy = float(((image - y).square() * precision).sum()) / count
        risk = discrepancy - 1 + 2 * divergence / count
        trials[weight] = Trial(weight, discrepancy, risk)
        solutions[weight] = solution
        if report is not None:
            report(trials[weight])

    def best() -> float:
        return min(trials.values(), key=lambda trial: trial.risk).weight

    for k in range(_GRID):
        attempt(start * _FACTOR ** (k - _GRID // 2))
    for _ in range(_EXTENSIONS):
        if best() == min(trials):
            attempt(best() / _FACTOR)
        elif best() == max(trials):
            attempt(best() * _FACTOR)
    if best() in (min(trials), max(trials)):
        raise NumericalError(
            f"The estimated risk is smallest at the end of the range of weights, {best():g}; check the noise level, "
            "or give a weight."
        )
    for factor in _REFINEMENTS:
        centre = best()
        attempt(centre / factor)
        attempt(centre * factor)
    ordered = sorted(trials.values())
    return WeightChoice(best(), solutions[best()], _crossing(ordered), ordered)


def _crossing(trials: list[Trial]) -> float | None:
    """The largest weight at which the discrepancy, between trials a power of the weight, is one."""
    for low, high in reversed(list(zip(trials, trials[1:], strict=False))):
        if low.discrepancy <= 1 <= high.discrepancy:
            rise = math.log(high.discrepancy / low.discrepancy)
            share = -math.log(low.discrepancy) / rise if rise > 0 else 0.0
            return low.weight * (high.weight / low.weight) ** share
    return None
