r"""Posterior samples without training: particles annealed from a start density to the posterior.

A stochastic normalizing flow of Metropolis layers whose targets interpolate between both, with a resampling
between them (a sequential Monte Carlo sampler). Temperatures and step sizes follow from the particles.

References:
    Del Moral, Doucet, Jasra, "Sequential Monte Carlo samplers", 2006, https://doi.org/10.1111/j.1467-9868.2006.00553.x
    Wu, Koehler, Noe, "Stochastic normalizing flows", 2020, https://arxiv.org/abs/2002.06707
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.coordinates import FromNormal, Pulled
from patchflow.chains.proposals import DifferenceWalk
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Density, Energy, Transported
from patchflow.errors import InputError, NumericalError
from patchflow.problems.likelihood import Likelihood

# Most temperatures: a posterior that needs more is out of reach of its start.
_LIMIT = 200
_ACCEPTANCE = 0.25


class Annealed(NamedTuple):
    r"""What annealing returns.

    Attributes:
        x: Samples of each posterior, (measurements, particles, dim).
        log_evidence: :math:`\log p(y)` of each measurement.
        standard_error: Its standard error as if the particles were independent at each temperature; those of separated
            modes are not, and then it is too small. Repeat with other seeds where the evidence matters.
        ess: Effective sample size of each posterior's particles. Resampling makes copies, which count once as far
            as the walks that follow leave them correlated with what they were; optimistic for separated modes, too.
        temperatures: The number of temperatures.
        evaluations: Evaluations of the posterior in all.
        acceptance: Mean acceptance probability at the last temperature.
    """

    x: Float[Tensor, "measurements particles dim"]
    log_evidence: Float[Tensor, " measurements"]
    standard_error: Float[Tensor, " measurements"]
    ess: Float[Tensor, " measurements"]
    temperatures: int
    evaluations: int
    acceptance: float


@torch.no_grad()
def anneal(
    posterior: Energy,
    start: Density,
    y: Float[Tensor, "measurements data"],
    *,
    particles: int = 10_000,
    pool: int = 4,
    moves: int = 30,
    final_moves: int = 50,
    threshold: float = 0.7,
) -> Annealed:
    r"""Anneal particles from ``start`` to :math:`p(x \mid y)`, for each measurement by itself but all at a time.

    With :math:`E_t = (1 - t) E_{start} + t E`: raise :math:`t` until the effective sample size falls to
    ``threshold`` of the particles, resample, walk ``moves`` Metropolis steps along differences of particles; until
    :math:`t = 1`.

    Args:
        posterior: The energy :math:`E(x \mid y)`, likelihood plus prior; no gradient is needed.
        start: Where to start: the prior, or a trained flow (exact). A prior with normal scores is walked in these.
        y: The measurements, one row each.
        particles: Particles per measurement.
        pool: Draws of the start for each particle, of which the first resampling keeps one: more help where the
            posterior fills little of the start.
        moves: Metropolis steps per temperature.
        final_moves: Metropolis steps at the posterior itself.
        threshold: Effective sample size that sets the next temperature, as a share.

    Raises:
        InputError: If a number is out of range, the start has no exact density, the posterior lacks the prior, or the
            measurements do not fit.
        NumericalError: If the posterior is nan, or zero at all particles, or out of reach.
    """
    if particles < 20 or min(pool, moves, final_moves) < 1 or not 0 < threshold < 1:
        raise InputError(
            f"Got {particles} particles from {pool} times as many, {moves} and {final_moves} moves and the threshold "
            f"{threshold}; use at least 20, 1, 1, 1, and a share between 0 and 1."
        )
    y = torch.as_tensor(y)
    _check_problem(posterior, start, y)
    groups, size = len(y), pool * particles
    condition = y.repeat_interleave(size, 0)
    coordinates = FromNormal(start) if isinstance(start, Transported) else None
    x = start.sample(groups * size, condition)
    first: Energy = start
    if coordinates is not None:
        x = coordinates.reverse(x).x
        first, posterior = Pulled(start, coordinates), Pulled(posterior, coordinates)
    level = x.new_zeros(groups, dtype=torch.float64)
    evidence, variance = torch.zeros_like(level), torch.zeros_like(level)
    # The variance of a mean, relative to that of independent particles.
    inflation = torch.ones_like(level)
    scale, evaluations, stages, accepted = 1.0, 0, 0, 0.0
    while (level < 1).any():
        stages += 1
        if stages > _LIMIT:
            raise NumericalError(
                f"After {_LIMIT} temperatures the particles are at {float(level.min()):.3g} of the way; start nearer "
                "to the posterior (a trained flow), or use more particles."
            )
        gain = _gain(first, posterior, x, condition).view(groups, -1)
        step = _next_step(gain, 1 - level, threshold)
        weights = step[:, None] * gain
        relative = weights.softmax(1) * weights.shape[1]
        evidence += weights.logsumexp(1) - math.log(weights.shape[1])
        variance += relative.var(1) / weights.shape[1]
        evaluations += len(x)
        picks = _systematic(relative, particles)
        copies = picks.bincount(minlength=len(x)).view(groups, -1).double()
        x, inflation = x[picks], inflation * copies.square().sum(1) / particles
        condition = y.repeat_interleave(particles, 0)
        level = torch.where(level + step > 1 - 1e-9, 1.0, level + step)
        target = _Tempered(first, posterior, level.repeat_interleave(particles))
        walk = DifferenceWalk(x.view(groups, particles, -1), scale)
        count = final_moves if (level == 1).all() else moves
        moved, rate = Metropolis(target, walk, count).walk(x, condition)
        kept = _correlation(x.view(groups, particles, -1), moved.x.view(groups, particles, -1))
        inflation = 1 + kept.square() * (inflation - 1)
        x, accepted = moved.x, rate.mean().item()
        evaluations += len(x) * (count + 1)
        # Too long steps are shortened at the next temperature, too short ones lengthened.
        scale = min(2.0, max(0.05, scale * math.exp(accepted - _ACCEPTANCE)))
    if coordinates is not None:
        x = coordinates(x).x
    x = x.view(groups, particles, -1)
    return Annealed(
        x, evidence, variance.sqrt(), particles / inflation, stages, evaluations, accepted
    )


def _check_problem(posterior: Energy, start: Density, y: Tensor) -> None:
    if isinstance(posterior, Likelihood):
        raise InputError("The posterior is a likelihood alone; add the prior: likelihood + prior.")
    if not isinstance(start, Density):
        raise InputError(
            f"The start is a {type(start).__name__} but must be a density, such as the prior."
        )
    if not start.exact:
        raise InputError("Annealing needs the exact density of its start; give the bijective part.")
    if y.ndim != 2 or not y.isfinite().all():
        raise InputError(
            f"The measurements have the shape {tuple(y.shape)} and {int((~y.isfinite()).sum())} values that are not "
            "finite; give a row of finite numbers for each: y[None] of a vector y."
        )
    for likelihood in (part for part in posterior.modules() if isinstance(part, Likelihood)):
        simulated = likelihood.simulate(start.sample(1, y[:1])).shape[1]
        if simulated != y.shape[1]:
            raise InputError(
                f"A measurement has {y.shape[1]} values but the forward model gives {simulated}; measurements are rows."
            )


def _correlation(before: Tensor, after: Tensor) -> Float[Tensor, " groups"]:
    """The largest correlation of a coordinate before a walk and after it, over the particles of each group."""
    first, second = before - before.mean(1, keepdim=True), after - after.mean(1, keepdim=True)
    scale = (first.square().mean(1) * second.square().mean(1)).sqrt()
    correlation = (first * second).mean(1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return correlation.abs().amax(1).clamp_max(1).double()


class _Tempered(Energy):
    """The interpolation with a weight for each row."""

    def __init__(self, start: Energy, end: Energy, weights: Tensor) -> None:
        super().__init__()
        self.start, self.end, self.weights = start, end, weights

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        start, end = self.start(x, condition).double(), self.end(x, condition).double()
        return torch.where(end.isinf(), math.inf, torch.lerp(start, end, self.weights))


def _gain(first: Energy, posterior: Energy, x: Tensor, condition: Tensor) -> Tensor:
    energy = posterior(x, condition).double()
    if energy.isnan().any():
        raise NumericalError(
            f"The posterior is nan at {int(energy.isnan().sum())} of {len(x)} particles; let the forward model return "
            "finite numbers for all parameters of the prior."
        )
    return first(x, condition).double() - energy


def _next_step(gain: Tensor, rest: Tensor, threshold: float) -> Tensor:
    """The largest step of the temperature, at most the rest, that keeps the effective sample size."""

    def share(step: Tensor) -> Tensor:
        weights = torch.where(step[:, None] > 0, step[:, None] * gain, 0.0).softmax(1)
        return 1 / (weights.square().sum(1) * gain.shape[1])

    if not (gain.max(1).values > -math.inf).all():
        raise NumericalError(
            "The posterior density is zero at all particles; check that the measurement belongs to this problem, or "
            "use more particles."
        )
    low, high = torch.zeros_like(rest), rest
    whole = share(rest) >= threshold
    for _ in range(60):
        middle = 0.5 * (low + high)
        fine = share(middle) >= threshold
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    # Where particles of zero density alone cost more than the threshold, the smallest step discards them.
    return torch.where(whole, rest, low.clamp_min(1e-12))


def _systematic(weights: Tensor, count: int) -> Tensor:
    """``count`` rows of each group, drawn by systematic resampling."""
    groups, size = weights.shape
    edges = weights.cumsum(1)
    edges = (edges / edges[:, -1:]).contiguous()
    grid = (torch.arange(count, device=weights.device) + torch.rand(groups, 1).to(weights)) / count
    picks = torch.searchsorted(edges, grid.contiguous()).clamp_max(size - 1)
    return (picks + size * torch.arange(groups, device=weights.device)[:, None]).flatten()
