r"""Calibration of posterior samplers: simulation-based calibration and expected coverage.

Draw parameters from the prior, simulate a measurement of each, and let the sampler under test draw
from each posterior. If the sampler is right, the true parameters cannot be told from its draws:
their ranks among the draws are uniform (SBC, one parameter at a time) and so are the credibilities
at which regions of the whole space cover them (TARP).

The draws of one dataset must be independent of each other: thin Markov chains first. Ties are
broken at random, by torch's global generator. Results are in float64.

References:
    Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms with
    simulation-based calibration", 2018, https://arxiv.org/abs/1804.06788

    Lemos, Coogan, Hezaveh and Perreault-Levasseur, "Sampling-based accuracy testing of posterior
    estimators for general inference", 2023, https://arxiv.org/abs/2302.03026
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchflow.errors import InputError

_MOST_POINTS = 200
_SIMULATIONS = 4000


def sbc_ranks(
    samples: Float[Tensor, "datasets draws dim"], truths: Float[Tensor, "datasets dim"]
) -> Int[Tensor, "datasets dim"]:
    r"""The ranks :math:`\#\{j : x_{ij} < x_i^*\}` of the true parameters among the draws.

    Each rank is uniform in 0..draws if the sampler is right. Draws equal to the truth, as with
    discrete parameters or at the walls of a box, count or not at random, so that this stays true.

    Args:
        samples: For each dataset, independent draws of its posterior.
        truths: The parameters that the datasets were simulated with.

    Returns:
        The ranks, integers in 0..draws.

    Raises:
        InputError: The shapes do not fit, there are fewer than 20 datasets or 2 draws, or a value
            is not finite.
    """
    _check(samples, truths)
    return _ranks(samples, truths[:, None])


def sbc_test(ranks: Int[Tensor, "datasets dim"], draws: int) -> Float[Tensor, " dim"]:
    r"""The p-values of Pearson's chi-square test that the ranks are uniform.

    The ranks 0..draws are cut into bins, as equal as they can be: one for each 20 datasets, but
    between 2 and 20. Expected counts are exact, also where the bins do not divide draws + 1. With
    several parameters, compare the smallest p-value with the level divided by their number.

    Args:
        ranks: The ranks of :func:`sbc_ranks`.
        draws: The number of draws that they are ranks among.

    Returns:
        One p-value per parameter.

    Raises:
        InputError: There are fewer than 20 datasets, or a rank is outside 0..draws.
    """
    from scipy import stats  # here, because it is slow to import

    _check_ranks(ranks, draws)
    bins = min(max(len(ranks) // 20, 2), 20, draws + 1)
    sizes = torch.bincount(torch.arange(draws + 1, device="cpu") * bins // (draws + 1))
    expected = sizes.double() * len(ranks) / (draws + 1)
    counts = _counts(ranks * bins // (draws + 1), bins)
    statistic = ((counts - expected[:, None]).square() / expected[:, None]).sum(0)
    return torch.from_numpy(stats.chi2.sf(statistic.numpy(), bins - 1))


def ecdf_difference(
    ranks: Int[Tensor, "datasets dim"], draws: int
) -> tuple[Float[Tensor, " points"], Float[Tensor, "points dim"]]:
    r"""The empirical distribution function of the ranks minus the uniform one, for plots.

    Args:
        ranks: The ranks of :func:`sbc_ranks`.
        draws: The number of draws that they are ranks among.

    Returns:
        Levels :math:`(r + 1) / (\mathrm{draws} + 1)` of up to 200 ranks :math:`r`, and at each the
        share of ranks up to :math:`r` minus the level.

    Raises:
        InputError: There are fewer than 20 datasets, or a rank is outside 0..draws.
    """
    _check_ranks(ranks, draws)
    points = _points(draws)
    levels = (points + 1).double() / (draws + 1)
    shares = _counts(ranks, draws + 1).cumsum(0)[points] / len(ranks)
    return levels, shares - levels[:, None]


def ecdf_band(
    draws: int, datasets: int, level: float | int = 0.95
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    r"""The simultaneous band of :func:`ecdf_difference` under uniform ranks.

    The whole curve of a calibrated parameter stays inside with the probability ``level``: at each
    point, a binomial interval of the one probability that 4000 simulated curves demand.

    Args:
        draws: The number of draws per dataset.
        datasets: The number of datasets.
        level: The probability of the band, inside (0, 1).

    Returns:
        The lower and the upper edge, at the levels of :func:`ecdf_difference`.

    Raises:
        InputError: The level is not inside (0, 1), or there are fewer than 20 datasets or 2 draws.

    References:
        Sailynoja, Burkner and Vehtari, "Graphical test for discrete uniformity and its applications
        in goodness-of-fit evaluation and multiple sample comparison", 2022,
        https://arxiv.org/abs/2103.10522
    """
    from scipy import stats  # here, because it is slow to import

    if not 0 < level < 1:
        raise InputError(f"The level is {level} but must lie inside (0, 1), for example 0.95.")
    _check_sizes(datasets, draws)
    generator = torch.Generator("cpu").manual_seed(0)
    edges = ((_points(draws) + 1).double() / (draws + 1)).tolist()
    below = torch.zeros(_SIMULATIONS, dtype=torch.float64, device="cpu")
    worst = torch.ones_like(below)
    for before, edge in pairwise([0.0, *edges]):
        # The counts up to each edge are a Markov chain of binomial steps.
        share = torch.full_like(below, (edge - before) / (1 - before))
        below = below + torch.binomial(datasets - below, share, generator=generator)
        down = stats.binom.cdf(below.numpy(), datasets, edge)
        up = stats.binom.sf(below.numpy() - 1, datasets, edge)
        worst = worst.minimum(torch.from_numpy(down)).minimum(torch.from_numpy(up))
    # Counts are discrete, so many curves may be equally bad; just below the quantile they all stay.
    tail = float(worst.quantile(1 - level, interpolation="lower")) * (1 - 1e-9)
    lower = stats.binom.ppf(tail, datasets, edges) / datasets - edges
    upper = stats.binom.isf(tail, datasets, edges) / datasets - edges
    return torch.from_numpy(lower), torch.from_numpy(upper)


def tarp_credibilities(
    samples: Float[Tensor, "datasets draws dim"],
    truths: Float[Tensor, "datasets dim"],
    *,
    references: Float[Tensor, "datasets dim"] | None = None,
) -> Float[Tensor, " datasets"]:
    r"""The credibility of the ball around a reference point that has the truth on its surface.

    With :math:`r` of the :math:`L` draws nearer to the reference than the truth is, it is
    :math:`(r + u) / (L + 1)` with :math:`u` uniform in [0, 1): so it is exactly uniform if the
    sampler is right and references do not depend on the truth given the measurement. Distances are
    Euclidean after each parameter is divided by the range of its true values.

    References independent of the measurement, as by default, cannot detect a sampler that ignores
    it and returns the prior: that is calibrated, though useless. References made of the
    measurements, such as rough estimates, detect it.

    Args:
        samples: For each dataset, independent draws of its posterior.
        truths: The parameters that the datasets were simulated with.
        references: One point per dataset; by default uniform in the bounding box of the truths,
            which depends on the truth a little if datasets are few.

    Returns:
        One credibility per dataset.

    Raises:
        InputError: As :func:`sbc_ranks`, also for references that do not fit.
    """
    _check(samples, truths)
    low, width = truths.amin(0), truths.amax(0) - truths.amin(0)
    width = torch.where(width > 0, width, torch.ones_like(width))
    if references is None:
        references = low + width * torch.rand_like(truths)
    elif references.shape != truths.shape:
        raise InputError(
            f"References of shape {tuple(references.shape)} do not fit truths of shape "
            f"{tuple(truths.shape)}: give one point per dataset."
        )
    _check_finite("references", references)
    # Truths and draws side by side, so that equal points are at equal distances.
    points = torch.cat([truths[:, None], samples], 1)
    distances = ((points - references[:, None]) / width).square().sum(-1, keepdim=True)
    ranks = _ranks(distances[:, 1:], distances[:, :1])[:, 0]
    return (ranks + torch.rand_like(ranks, dtype=torch.float64)) / (samples.shape[1] + 1)


def tarp_coverage(
    samples: Float[Tensor, "datasets draws dim"],
    truths: Float[Tensor, "datasets dim"],
    *,
    references: Float[Tensor, "datasets dim"] | None = None,
    levels: Float[Tensor, " levels"] | None = None,
) -> tuple[Float[Tensor, " levels"], Float[Tensor, " levels"]]:
    r"""The expected coverage: the share of truths in regions of each credibility level.

    Args:
        samples: As in :func:`tarp_credibilities`.
        truths: As there.
        references: As there.
        levels: Levels in [0, 1]; 0, 0.01, ..., 1 by default.

    Returns:
        The levels and the coverage, equal up to chance if the sampler is right.

    Raises:
        InputError: As :func:`tarp_credibilities`; or a level is outside [0, 1].
    """
    levels = torch.arange(101).double() / 100 if levels is None else levels.double()
    levels = levels.cpu()
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise InputError(
            f"Credibility levels from {float(levels.min())} to {float(levels.max())} leave [0, 1]: "
            "give fractions."
        )
    credibilities = tarp_credibilities(samples, truths, references=references).cpu()
    return levels, (credibilities <= levels[:, None]).double().mean(1)


def tarp_deviation(levels: Float[Tensor, " levels"], coverage: Float[Tensor, " levels"]) -> float:
    r"""The largest :math:`|\mathrm{coverage} - \mathrm{level}|` of :func:`tarp_coverage`."""
    return float((coverage - levels).abs().max())


def tarp_test(
    samples: Float[Tensor, "datasets draws dim"],
    truths: Float[Tensor, "datasets dim"],
    *,
    references: Float[Tensor, "datasets dim"] | None = None,
) -> float:
    """The p-value of the Kolmogorov-Smirnov test that :func:`tarp_credibilities` are uniform.

    Args and errors are those of :func:`tarp_credibilities`.
    """
    from scipy import stats  # here, because it is slow to import

    credibilities = tarp_credibilities(samples, truths, references=references)
    return float(stats.kstest(credibilities.cpu().numpy(), "uniform").pvalue)


def _ranks(samples: Tensor, truths: Tensor) -> Tensor:
    # Over the axis of draws, the second one; ties count or not at random.
    less, ties = (samples < truths).sum(1), (samples == truths).sum(1)
    lucky = (torch.rand_like(ties, dtype=torch.float64) * (ties + 1)).long()
    return less + lucky.minimum(ties)


def _points(draws: int) -> Tensor:
    # At the rank `draws` every curve ends in zero, which says nothing.
    count = min(draws, _MOST_POINTS)
    return torch.linspace(0, draws - 1, count, dtype=torch.float64, device="cpu").round().long()


def _counts(places: Tensor, size: int) -> Tensor:
    return torch.stack([torch.bincount(p, minlength=size) for p in places.cpu().T], 1).double()


def _check_sizes(datasets: int, draws: int) -> None:
    if datasets < 20 or draws < 2:
        raise InputError(
            f"{datasets} datasets of {draws} draws cannot show calibration: give at least 20 of 2 draws."
        )


def _check_ranks(ranks: Tensor, draws: int) -> None:
    _check_sizes(len(ranks), draws)
    if (low := int(ranks.min())) < 0 or int(ranks.max()) > draws:
        raise InputError(
            f"Ranks from {low} to {int(ranks.max())} are not among {draws} draws: give the number of draws behind them."
        )


def _check_finite(name: str, values: Tensor) -> None:
    bad = int((~values.isfinite()).sum())
    if bad:
        raise InputError(f"{bad} of {values.numel()} {name} are not finite: find out why.")


def _check(samples: Tensor, truths: Tensor) -> None:
    if samples.ndim != 3 or truths.shape != (samples.shape[0], samples.shape[2]):
        raise InputError(
            f"Samples {tuple(samples.shape)} do not fit truths {tuple(truths.shape)}: give (datasets, draws, dim) and "
            "(datasets, dim)."
        )
    _check_sizes(samples.shape[0], samples.shape[1])
    _check_finite("samples", samples)
    _check_finite("truths", truths)
