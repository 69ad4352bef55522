"""Posterior samples with weights: how far a chain is from its target, the evidence, and corrections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.flow import Flow
from patchflow.errors import InputError, NumericalError
from patchflow.numerics.weights import (
    effective_sample_size,
    log_evidence,
    log_weight_warnings,
    pareto_smoothed,
    resample,
)

Correction = Literal["none", "resample", "metropolis"]
# Walks at a time: large enough for full speed, small enough for the cache.
_BLOCK = 16_384
# Below this acceptance a layer does nothing.
_STUCK = 0.01


@dataclass(frozen=True)
class Draws:
    r"""Samples of a posterior.

    Attributes:
        x: The samples, (count, dim).
        log_weights: Their log-weights; zeros after a correction.
        log_evidence: :math:`\log p(y)` and its standard error, from the uncorrected walks.
        ess: Effective sample size of the uncorrected walks, as a share of their number.
        k_hat: Shape of the tail of their weights: below 0.5 good, above 0.7 unreliable.
        acceptance: Acceptance probability of each kernel that accepts and rejects, by its place in the chain.
        warnings: What is wrong with them, and what to change.
    """

    x: Float[Tensor, "count dim"]
    log_weights: Float[Tensor, " count"]
    log_evidence: tuple[float, float]
    ess: float
    k_hat: float
    acceptance: dict[int, float]
    warnings: list[str] = field(default_factory=list)


@torch.no_grad()
def sample_posterior(
    flow: Flow,
    count: int,
    y: Float[Tensor, "1 data"],
    *,
    correct: Correction = "none",
    effort: int | None = None,
) -> Draws:
    r"""Sample :math:`p(x \mid y)` by walks through a stochastic flow, with weights or corrected by them.

    Args:
        flow: A conditional flow with a target.
        count: Number of samples.
        y: The measurement.
        correct: ``"none"``: the ends of the walks with their weights. ``"resample"``: ``effort`` times as many
            walks (4 by
            default), of which ``count`` are kept in proportion to their Pareto-smoothed weights. ``"metropolis"``:
            each sample is the end of a Markov chain of ``effort`` (20 by default) whole walks, each accepted with
            probability :math:`\min\{1, w'/w\}`.
        effort: Walks per sample.

    Raises:
        InputError: If the measurement does not fit or is not finite, or ``count`` is not positive.
        NumericalError: If the posterior is nan somewhere, or zero at every sample.
    """
    if count < 1:
        raise InputError(f"The number of samples is {count} but must be at least 1.")
    if correct not in ("none", "resample", "metropolis"):
        raise InputError(f"There is no correction {correct!r}; use none, resample or metropolis.")
    y = torch.as_tensor(y)
    if y.ndim != 2 or len(y) != 1 or not y.isfinite().all():
        raise InputError(
            f"The measurement has the shape {tuple(y.shape)} and {int((~y.isfinite()).sum())} values that are not "
            "finite; give one row of finite numbers: y[None] of a vector y."
        )
    # An array of NumPy is in double precision, whatever the flow is in.
    y = y.to(next((p.dtype for p in flow.parameters() if p.is_floating_point()), y.dtype))
    effort = (20 if correct == "metropolis" else 4) if effort is None else effort
    if effort < 1:
        raise InputError(f"The effort is {effort} walks per sample but must be at least 1.")
    total = count * effort if correct == "resample" else count
    x, log_weights, acceptance = _walks(flow, total, y)
    _check(log_weights)
    smoothed, k_hat = pareto_smoothed(log_weights)
    evidence = log_evidence(log_weights)
    share = float(effective_sample_size(log_weights)) / total
    warnings = log_weight_warnings(log_weights) + _stuck(acceptance)
    if correct == "resample":
        x = x[resample(smoothed, count)]
    elif correct == "metropolis":
        for _ in range(effort - 1):
            new, new_weights, _ = _walks(flow, count, y)
            _check(new_weights)
            accept = torch.rand_like(new_weights).log() < new_weights - log_weights
            x = torch.where(accept[:, None], new, x)
            log_weights = torch.where(accept, new_weights, log_weights)
    if correct != "none":
        log_weights = x.new_zeros(count)
    return Draws(x, log_weights, evidence, share, k_hat, acceptance, warnings)


def _stuck(acceptance: dict[int, float]) -> list[str]:
    stuck = [f"{100 * rate:.1g} %" for rate in acceptance.values() if rate < _STUCK]
    if not stuck:
        return []
    return [
        f"A layer accepts {stuck[0]} of its steps at this measurement, so the samples are where the flow put them, and "
        "the evidence may be far off however small its error: anneal instead, or train longer."
    ]


def _walks(flow: Flow, count: int, y: Tensor) -> tuple[Tensor, Tensor, dict[int, float]]:
    parts, rates = [], {}
    for start in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - start)
        part = flow.walk(rows, y)
        parts.append(part)
        for place, rate in part.acceptance.items():
            rates[place] = rates.get(place, 0.0) + rate * rows / count
    return torch.cat([p.x for p in parts]), torch.cat([p.log_weights for p in parts]), rates


def _check(log_weights: Tensor) -> None:
    bad = int(log_weights.isnan().sum())
    if bad:
        raise NumericalError(
            f"The posterior is nan at {bad} of {len(log_weights)} samples; let the forward model return finite numbers "
            "for all parameters of the prior, or restrict the prior."
        )
    if not log_weights.isfinite().any():
        raise NumericalError(
            f"The posterior density is zero or not finite at all {len(log_weights)} samples; check that the "
            "measurement belongs to this problem, or train longer."
        )
