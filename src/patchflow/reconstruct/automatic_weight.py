r"""The weight of a prior without a ground truth: by the discrepancy principle, and by Stein's unbiased risk estimate.

A reconstruction :math:`\hat x_w(y)` predicts the measurement as :math:`\hat a_w = A \hat x_w(y)`. With noise of the
covariance :math:`\Sigma` the *discrepancy principle* takes the weight whose residual is as large as the noise,

.. math:: \|\hat a_w - y\|^2_{\Sigma^{-1}} = m,

which is too smooth where the prior is good. *Stein's estimate* of the risk, seen through a linear map :math:`W`,

.. math:: \mathrm{SURE}(w) = \|W(\hat a_w - y)\|^2 - \mathbb E\|W\eta\|^2
          + 2 \operatorname{div}_y (\Sigma W^\top W\, \hat a_w), \qquad
          \mathbb E\, \mathrm{SURE}(w) = \mathbb E \|W(\hat a_w - A x)\|^2,

is unbiased for Gaussian noise :math:`\eta` and needs no truth; its divergence is estimated by a second reconstruction,
of the measurement with a little more noise :math:`\epsilon b`, :math:`b \sim N(0, \Sigma)`:

.. math:: \operatorname{div}_y (\Sigma W^\top W\, \hat a_w) \approx
          \langle W b, W(\hat a_w(y + \epsilon b) - \hat a_w(y)) \rangle / \epsilon.

For Gaussian noise of the standard deviation :math:`\sigma`, :math:`W = (A^\top A + \kappa)^{-1} A^\top` looks at the
error of the image wherever the measurement says something about it: the error of the prediction alone hardly feels what
a blur damps, and asks for too little prior. There :math:`\kappa = (\sigma / 0.3)^2`: an image of the standard deviation
0.3 is above the noise.

Counts of photons are no Gaussian noise. There :math:`\Sigma` is diagonal with the variances :math:`1 / (\mu^2 N_i)`
that the measured counts say (:meth:`patchflow.problems.poisson.PoissonNoise.precision`), and :math:`W = \Sigma^{-1/2}`:
what is minimised approximates the risk of the prediction, each ray in units of its own noise, as far as the logarithm
of a count is a normal variable. Rays with few photons, where it is not, have little weight. The discrepancy is that of
the same weighted residual.

References:
    Morozov, "On the solution of functional equations by the method of regularization", 1966
    Stein, "Estimation of the mean of a multivariate normal distribution", 1981
    Eldar, "Generalized SURE for exponential families: applications to regularization", IEEE Trans. Signal Process.
    57(2), 2009
    Giryes, Elad, Eldar, "The projected GSURE for automatic parameter tuning in iterative shrinkage methods", Appl.
    Comput. Harmon. Anal. 30(3), 2011
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
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood, ProximableNoise
from patchflow.problems.sampling import Mask
from patchflow.solution import Solution

# Of the second measurement, in standard deviations of the noise.
_PROBE = 0.3
# The standard deviation of an image, which decides what the measurement says about it.
_CONTRAST = 0.3
# A risk so much above the smallest, relatively, is as good, and the larger weight the more stable.
_INDIFFERENCE = 0.01
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
        risk: Stein's estimate of the squared error, the mean over what :math:`W` maps to.
    """

    weight: float
    discrepancy: float
    risk: float


class WeightChoice(NamedTuple):
    """The chosen weight.

    Attributes:
        weight: The largest weight whose estimated risk is within a hundredth of the smallest.
        solution: The reconstruction with it.
        by_discrepancy: The weight of the discrepancy principle, or None if the residual never is so large or small.
        trials: All that were tried, by weight; those that failed have an infinite risk.
    """

    weight: float
    solution: Solution
    by_discrepancy: float | None
    trials: list[Trial]

    @property
    def at_end(self) -> bool:
        """Whether it lies at the end of what was tried, so that a still larger or smaller weight may be better."""
        found = [trial.weight for trial in self.trials if trial.risk < math.inf]
        return self.weight in (found[0], found[-1])

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
        The choice by Stein's estimate, beside that by the discrepancy principle. When interrupted (Ctrl-C), the best so
        far; its solution says so.

    Raises:
        InputError: If the noise has no precision, or ``start`` is not positive and finite.
        NumericalError: If the reconstruction failed with every weight.
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
    lens = _lens(likelihood, precision)
    seen = lens(probe)
    disturbed = y + _PROBE * probe
    trials: dict[float, Trial] = {}
    solutions: dict[float, Solution] = {}

    def attempt(weight: float) -> None:
        state = torch.get_rng_state()
        try:
            solution = solve(y, weight)
            torch.set_rng_state(state)  # the same random network
            other = solve(disturbed, weight)
        except (
            NumericalError
        ):  # a weight that is too large or too small for the solver; others are tried
            trials[weight] = Trial(weight, math.inf, math.inf)
            return
        if solution.interrupted or other.interrupted:
            raise KeyboardInterrupt
        image = likelihood.operator(solution.x)
        change = likelihood.operator(other.x) - image
        divergence = float((seen * lens(change)).mean()) / _PROBE
        discrepancy = float(((image - y).square() * precision).sum()) / count
        risk = float((lens(image - y).square() - seen.square()).mean()) + 2 * divergence
        trials[weight] = Trial(weight, discrepancy, risk)
        solutions[weight] = solution
        if report is not None:
            report(trials[weight])

    def best() -> float:
        least = min(trial.risk for trial in trials.values())
        if math.isinf(least):
            raise NumericalError(
                f"The reconstruction failed with all weights from {min(trials):g} to {max(trials):g}; check the "
                "measurement and its noise level, or give a weight."
            )
        return max(
            t.weight for t in trials.values() if t.risk <= least + _INDIFFERENCE * abs(least)
        )

    interrupted = False
    try:
        for k in range(_GRID):
            attempt(start * _FACTOR ** (k - _GRID // 2))
        for _ in range(_EXTENSIONS):
            if best() == min(trials):
                attempt(best() / _FACTOR)
            elif best() == max(trials):
                attempt(best() * _FACTOR)
        for factor in _REFINEMENTS:
            centre = best()
            attempt(centre / factor)
            attempt(centre * factor)
    except KeyboardInterrupt:
        if not solutions:
            raise
        interrupted = True
    ordered = sorted(trials.values())
    chosen = solutions[best()]._replace(interrupted=interrupted)
    return WeightChoice(best(), chosen, _crossing(ordered), ordered)


def _lens(likelihood: Likelihood, precision: Tensor) -> Callable[[Tensor], Tensor]:
    """The map through which the risk is seen."""
    if isinstance(likelihood, GaussianLikelihood):
        operator, kappa = likelihood.operator, (likelihood.std / _CONTRAST) ** 2

        def look(residual: Tensor) -> Tensor:
            zero = residual.new_zeros(*residual.shape[:-2], *operator.domain_shape)
            return operator.nearest(zero, residual, kappa)

        return look
    # Total variation of three lung slices (96 x 96; 4096 photons, 36 degrees missing, 30,000 photons) loses 0, 0.15 and
    # 0 dB to the best weight tried; seen through filtered backprojection the first loses 1.1.
    return lambda residual: residual * precision.sqrt()


def _crossing(trials: list[Trial]) -> float | None:
    """The largest weight at which the discrepancy, between trials a power of the weight, is one."""
    trials = [trial for trial in trials if trial.discrepancy < math.inf]
    for low, high in reversed(list(zip(trials, trials[1:], strict=False))):
        if low.discrepancy <= 1 <= high.discrepancy:
            rise = math.log(high.discrepancy / low.discrepancy)
            share = -math.log(low.discrepancy) / rise if rise > 0 else 0.0
            return low.weight * (high.weight / low.weight) ** share
    return None
