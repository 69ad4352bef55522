r"""Importance weights, given by their logarithms: how many draws they are worth, and what they say.

A draw :math:`x_i \sim q` of a proposal has the weight :math:`w_i = \tilde p(x_i) / q(x_i)` with the
unnormalised target :math:`\tilde p`. A log-weight of minus infinity is a draw outside the target's
support and allowed. Everything is computed and returned in float64, whatever the weights are in.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchflow.errors import InputError

# Above this shape the mean of the weights converges too slowly to be of use (Vehtari et al. 2024).
_LARGEST_K = 0.7
# A fit to fewer exceedances is refused. With a tail of a fifth, that needs more than 20 weights.
_SMALLEST_TAIL = 5
_SMALLEST_SAMPLE = 4 * _SMALLEST_TAIL + 1


def effective_sample_size(log_weights: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    r"""The effective number of draws :math:`(\sum_i w_i)^2 / \sum_i w_i^2`, along the last axis.

    Args:
        log_weights: Log-weights; a constant added to a row changes nothing.

    Returns:
        One number in [1, n] per row, float64.

    Raises:
        InputError: A log-weight is NaN or plus infinity, or a row has no finite one.

    References:
        Kong, "A note on importance sampling using standardized weights", 1992
    """
    shifted, _ = _shift(log_weights)
    weights = shifted.exp()
    return weights.sum(-1).square() / weights.square().sum(-1)


def log_evidence(log_weights: Float[Tensor, " n"]) -> tuple[float, float]:
    r"""The estimate :math:`\log \frac1n \sum_i w_i` of the log-evidence, and its standard error.

    The standard error is that of the delta method, :math:`\sqrt{\mathrm{var}(w) / n} / \bar w`. It
    is to be believed only if :func:`pareto_smoothed` finds a shape well below 0.7.

    Args:
        log_weights: Log-weights.

    Returns:
        The estimate and its standard error, in nats. One draw has an infinite standard error.

    Raises:
        InputError: A log-weight is NaN or plus infinity, or none is finite.
    """
    shifted, top = _shift(log_weights)
    weights, n = shifted.exp(), len(shifted)
    mean = float(weights.mean())
    error = math.sqrt(float(weights.var()) / n) / mean if n > 1 else math.inf
    return float(top) + math.log(mean), error


def resample(log_weights: Float[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    r"""Indices of ``count`` draws by systematic resampling, in random order.

    With the normalised weights :math:`\bar w_i` and one uniform number, index :math:`i` comes
    :math:`\lfloor m \bar w_i \rfloor` or :math:`\lceil m \bar w_i \rceil` times, in the mean
    :math:`m \bar w_i` times. An index of weight zero never comes.

    Args:
        log_weights: Log-weights.
        count: The number :math:`m` of indices, at least 1.

    Returns:
        The indices. Their order is random, so that any part of them is a fair sample too.

    Raises:
        InputError: The count is below 1, a log-weight is NaN or plus infinity, or none is finite.

    References:
        Kitagawa, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models",
        1996, https://doi.org/10.1080/10618600.1996.10474692
    """
    if count < 1:
        raise InputError(f"{count} indices cannot be drawn: ask for at least one.")
    weights = _shift(log_weights)[0].exp()
    # Without the zeros, rounding in the cumulative sum cannot select one of them.
    (support,) = weights.nonzero(as_tuple=True)
    edges = weights[support].cumsum(0)
    comb = torch.arange(count, dtype=edges.dtype, device=edges.device)
    comb = (comb + torch.rand_like(edges[:1])) * (edges[-1] / count)
    places = torch.searchsorted(edges, comb, right=True).clamp_max(len(support) - 1)
    return support[places][torch.randperm(count, device=edges.device)]


def pareto_smoothed(log_weights: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], float]:
    r"""Pareto smoothed importance sampling: tame the largest weights, and tell how heavy they are.

    The largest :math:`\min(n / 5, 3 \sqrt n)` weights are replaced by quantiles of a generalised
    Pareto law fitted to them, in the order of the raw ones and no larger than their maximum.

    The shape :math:`\hat k` of that law is the diagnosis: the weights have about :math:`1 / \hat k`
    finite moments. Below 0.5 all is well, above 0.7 means of the draws are not to be trusted. It is
    infinite, and nothing is smoothed, if there are at most 20 weights or fewer than 5 distinct from
    the threshold; it is minus infinity if none of many weights exceeds the threshold, as with equal
    weights: nothing is in the tail.

    Args:
        log_weights: Log-weights of independent draws.

    Returns:
        The smoothed log-weights, float64, not normalised: below the tail they are the given ones,
        so that :func:`log_evidence` applies to them. And the shape.

    Raises:
        InputError: A log-weight is NaN or plus infinity, or none is finite.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646

        Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto
        distribution", 2009, https://doi.org/10.1198/tech.2009.08017
    """
    shifted, top = _shift(log_weights)
    n = len(shifted)
    if n < _SMALLEST_SAMPLE:
        return shifted + top, math.inf
    size = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    ordered, order = shifted.sort()
    # Weights that underflow are no threshold: differences to it must not underflow with it.
    threshold = ordered[-size - 1].clamp_min(math.log(torch.finfo(ordered.dtype).tiny))
    first = int(torch.searchsorted(ordered, threshold, right=True))
    if first == n:
        return shifted + top, -math.inf
    if n - first < _SMALLEST_TAIL:
        return shifted + top, math.inf
    # As exp(x) - exp(threshold), but positive also where both are equal to rounding.
    shape, scale = _fit_pareto(threshold.exp() * torch.expm1(ordered[first:] - threshold))
    middles = (torch.arange(n - first).to(ordered) + 0.5) / (n - first)
    quantiles = _pareto_quantiles(middles, shape, scale)
    if not (math.isfinite(shape) and bool(quantiles.isfinite().all())):
        return shifted + top, math.inf
    smoothed = shifted.clone()
    smoothed[order[first:]] = torch.log(quantiles + threshold.exp()).clamp_max(0)
    return smoothed + top, shape


def log_weight_warnings(log_weights: Float[Tensor, " n"]) -> list[str]:
    r"""What the weights say against the draws, in sentences; an empty list is good news.

    Args:
        log_weights: Log-weights of independent draws.

    Returns:
        A sentence if the Pareto shape is above 0.7, and one if the effective sample size is below
        1 % of the draws; each says what happened and what to change.

    Raises:
        InputError: A log-weight is NaN or plus infinity, or none is finite.
    """
    n, warnings = len(log_weights), []
    remedy = (
        "take more MCMC layers, train longer, or put more intermediate targets between the latent "
        "law and the posterior."
    )
    _, shape = pareto_smoothed(log_weights)
    if n < _SMALLEST_SAMPLE:
        warnings.append(
            f"The {n} importance weights are too few to judge their tail: "
            f"draw at least {_SMALLEST_SAMPLE} samples, better 1000."
        )
    elif shape > _LARGEST_K:
        warnings.append(
            f"The importance weights have a heavy tail (Pareto k-hat {shape:.2f}, above "
            f"{_LARGEST_K}), so weighted means and the evidence are unreliable: draw more samples, "
            + remedy
        )
    effective = float(effective_sample_size(log_weights))
    if effective < n / 100:
        warnings.append(
            f"The {n} weighted samples are worth only {effective:.1f} independent ones, less than "
            "1 %, since the draws miss most of the posterior: draw more samples, " + remedy
        )
    return warnings


def _shift(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    # The log-weights with maximum zero in each row, in float64, and the maxima.
    values = log_weights.detach().double()
    if values.shape[-1:].numel() == 0 or values.ndim == 0:
        raise InputError(
            f"Log-weights of shape {tuple(values.shape)} hold no draws: draw at least one sample."
        )
    bad = int((values.isnan() | (values == math.inf)).sum())
    if bad:
        raise InputError(
            f"{bad} of {values.numel()} log-weights are NaN or plus infinity but must be finite or "
            "minus infinity: check the energies of those draws, or train with a smaller step."
        )
    top = values.amax(-1, keepdim=True)
    outside = int((top == -math.inf).sum())
    if outside:
        raise InputError(
            f"All {values.shape[-1]} log-weights of {outside} of {top.numel()} rows are minus "
            "infinity: draw from a proposal that reaches the support of the target."
        )
    return values - top, top.squeeze(-1)


def _fit_pareto(excess: Tensor) -> tuple[float, float]:
    # Shape and scale of the generalised Pareto law: the mean of theta = -shape / scale under its
    # profile likelihood and the prior of Zhang and Stephens, on a grid of quantiles of that prior.
    n = len(excess)
    grid = 30 + math.isqrt(n)
    levels = torch.arange(1, grid + 1).to(excess) - 0.5
    quartile = excess[int(n / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - (grid / levels).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-theta[:, None] * excess).mean(1)
    likelihood = n * (torch.log(-theta / shapes) - shapes - 1)
    mean = (likelihood.softmax(0) * theta).sum()
    shape = torch.log1p(-mean * excess).mean()
    scale = -shape / mean
    # The weakly informative prior: ten observations that say 1/2 (Vehtari et al., appendix C).
    return float((n * shape + 10 * 0.5) / (n + 10)), float(scale)


def _pareto_quantiles(levels: Tensor, shape: float | int, scale: float | int) -> Tensor:
    tail = -torch.log1p(-levels)
    if abs(shape) < torch.finfo(levels.dtype).eps:
        return scale * tail
    return scale * torch.expm1(shape * tail) / shape
