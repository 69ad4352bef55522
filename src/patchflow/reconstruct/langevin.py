r"""Samples of the posterior of an image with a patch prior, by preconditioned Langevin steps.

The posterior has the energy :math:`U(x) = \frac{1}{2\sigma^2}\|A x - y\|^2 + w R(x)`. A step with the metric
:math:`H = \sigma^{-2}(A^\top A + \rho I)` and the step size h proposes

.. math:: x' = x - \tfrac h2 H^{-1} \nabla U(x) + \sqrt h\, \eta, \qquad \eta \sim N(0, H^{-1}),

where both solves are the operator's exact data steps:
:math:`\eta = \sigma (A^\top A + \rho I)^{-1} (A^\top \xi_1 + \sqrt\rho\, \xi_2)`. The data are stiff in some
directions and silent in others; in this metric one step size suits both. Metropolis-adjusted (MALA), the proposal is
accepted with probability :math:`\min(1, e^{U(x) - U(x')} q(x \mid x') / q(x' \mid x))`, computed in double precision
with all patches: the chain leaves the posterior invariant. Unadjusted, it takes larger steps and is biased by them.

References:
    Roberts, Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations", Bernoulli
    2(4), 1996, https://doi.org/10.2307/3318418
    Roberts, Rosenthal, "Optimal scaling of discrete approximations to Langevin diffusions", JRSS B 60, 1998
    (accept 57 %)
    Girolami, Calderhead, "Riemann manifold Langevin and Hamiltonian Monte Carlo methods", JRSS B 73, 2011 (metrics)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.progress import progress_line
from patchflow.solution import Samples

# Acceptance at which MALA moves fastest in high dimensions.
TARGET = 0.574
# First step size, and the largest that the adaptation of unadjusted chains may use.
_FIRST, _UNADJUSTED = 0.05, 0.1
# Of the finite difference that measures the prior's curvature.
_PROBE = 1e-3

Image = Float[Tensor, "1 channels height width"]


@torch.no_grad()
def sample(
    likelihood: GaussianLikelihood,
    prior: Energy,
    y: Tensor,
    init: Image,
    *,
    weight: float | int = 1.0,
    draws: int = 32,
    chains: int = 4,
    burn_in: int = 300,
    thin: int = 20,
    adjusted: bool = True,
    step: float | None = None,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Samples:
    r"""Run Markov chains for :math:`e^{-U}`.

    Args:
        likelihood: The operator and the noise. The exactness of MALA rests on the exactness of ``operator.solve``.
        prior: The energy :math:`R`.
        y: The measurement of one image.
        init: Where all chains start, usually the maximum a posteriori estimate; each first takes a step of noise.
        weight: The weight w. The whole prior of patches is 1: maximum a posteriori estimates like less.
        draws: Samples in all.
        chains: Number of chains.
        burn_in: Steps of each chain before the first sample, in which the step size of MALA adapts.
        thin: Steps between samples.
        adjusted: Accept or reject (MALA); otherwise unadjusted.
        step: The step size h; by default .05 to start the adaptation with, and .1 if unadjusted.
        callback: Called after each step with its number, the current images and their mean energy.
        progress: Show a progress line.

    Returns:
        The samples. When interrupted (Ctrl-C) those so far.

    Raises:
        InputError: If a number is out of range, or y is not the measurement of one image.
        NumericalError: If the energy is not finite.
    """
    if min(draws, chains, thin) < 1 or burn_in < 0 or draws % chains or not weight > 0:
        raise InputError(
            f"Got {draws} draws of {chains} chains, {burn_in} steps before the first, {thin} between, and weight "
            f"{weight}; all must be positive, and the draws a multiple of the chains."
        )
    if len(y) != 1 or len(init) != 1:
        raise InputError(f"Got {len(y)} measurements and {len(init)} start images; sample one.")
    if step is not None and not 0 < step < math.inf:
        raise InputError(f"The step size is {step} but must be positive and finite.")
    if adjusted:
        # Energies of a million nats have errors of a tenth in single precision.
        likelihood, prior = copy.deepcopy(likelihood).double(), copy.deepcopy(prior).double()
        y, init = y.double(), init.double()
    target = _Target(likelihood, prior, float(weight), y, init)
    h = step if step is not None else _FIRST if adjusted else _UNADJUSTED
    log_h, accepted, kept, energies = math.log(h), [], [], []
    x = init.expand(chains, *init.shape[1:])
    x = x + math.sqrt(h) * target.noise(x)
    value, slope = target(x)
    steps = burn_in + thin * (draws // chains)
    interrupted = False
    bar = progress_line(total=steps, shown=progress)
    try:
        for k in range(steps):
            h = math.exp(log_h)
            drift = x - 0.5 * h * target.solve(slope)
            proposal = drift + math.sqrt(h) * target.noise(x)
            new_value, new_slope = target(proposal)
            if not bool(new_value.isfinite().all()):
                raise NumericalError(
                    f"The energy is {new_value.tolist()} at step {k}; sample with a smaller step size than {h:g}."
                )
            if adjusted:
                back = proposal - 0.5 * h * target.solve(new_slope)
                forth = target.square(proposal - drift) - target.square(x - back)
                log_ratio = value - new_value + forth / (2 * h)
                rate = log_ratio.clamp_max(0).exp()
                accept = torch.rand_like(rate) < rate
                x = torch.where(accept.view(-1, 1, 1, 1), proposal, x)
                slope = torch.where(accept.view(-1, 1, 1, 1), new_slope, slope)
                value = torch.where(accept, new_value, value)
                if k < burn_in and step is None:
                    log_h += (float(rate.mean()) - TARGET) / math.sqrt(1 + k / 10)
                elif k >= burn_in:
                    accepted.append(float(rate.mean()))
            else:
                x, value, slope = proposal, new_value, new_slope
            shown = {"energy": f"{float(value.mean()):.6g}", "step size": f"{h:.2g}"}
            if callback is not None:
                shown |= callback(k, x, float(value.mean())) or {}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if k >= burn_in and (k + 1 - burn_in) % thin == 0:
                kept.append(x.float())
                energies.append(value)
    except KeyboardInterrupt:
        if not kept:
            raise
        interrupted = True
    finally:
        bar.close()
    return Samples(
        torch.stack(kept, 1),
        torch.stack(energies, 1),
        sum(accepted) / len(accepted) if accepted else None,
        math.exp(log_h),
        interrupted,
    )


class _Target:
    """The energy of the posterior of an image, and the metric."""

    def __init__(
        self, likelihood: GaussianLikelihood, prior: Energy, weight: float, y: Tensor, x: Image
    ) -> None:
        self.likelihood, self.prior, self.weight, self.y = likelihood, prior, weight, y
        self.variance = likelihood.std**2
        # The prior's mean curvature at the start stands for it in the metric.
        probe = torch.randint(0, 2, x.shape, device=x.device).to(x) * 2 - 1
        ends = [prior.value_and_grad(x + sign * _PROBE * probe)[1] for sign in (1, -1)]
        curvature = float((probe * (ends[0] - ends[1])).mean()) / (2 * _PROBE)
        # At least that of values that may be anywhere in the range of the image.
        self.rho = self.variance * max(weight * curvature, 1.0)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The energies and their gradients."""
        prior, slope = self.prior.value_and_grad(x)
        data, pull = self.likelihood.value_and_grad(x, self.y)
        return data + self.weight * prior, pull + self.weight * slope

    def solve(self, slope: Tensor) -> Tensor:
        return self.likelihood.operator.solve(self.variance * slope, self.rho)

    def noise(self, x: Tensor) -> Tensor:
        operator = self.likelihood.operator
        measured = operator.adjoint(torch.randn_like(operator(x)))
        silent = math.sqrt(self.rho) * torch.randn_like(x)
        return self.likelihood.std * operator.solve(measured + silent, self.rho)

    def square(self, d: Tensor) -> Tensor:
        r"""The squared norm :math:`d^\top H d` of each."""
        measured = self.likelihood.operator(d).flatten(1).square().sum(1)
        return (measured + self.rho * d.flatten(1).square().sum(1)) / self.variance
