"""Importance weights against closed forms of Gaussians, and Pareto smoothing against ArviZ."""

from __future__ import annotations

import math

import pytest
import torch

from patchflow.errors import InputError
from patchflow.numerics.weights import (
    effective_sample_size,
    log_evidence,
    log_weight_warnings,
    pareto_smoothed,
    resample,
)


def gaussian_log_weights(n, target_std, proposal_std, log_mass=0.0):
    """Draws of N(0, proposal_std^2); the target is exp(log_mass) N(0, target_std^2)."""
    x = proposal_std * torch.randn(n)
    target = log_mass - 0.5 * (x / target_std) ** 2 - math.log(target_std)
    return target + 0.5 * (x / proposal_std) ** 2 + math.log(proposal_std)


def pareto_log_weights(n, shape):
    """Weights of a Pareto law: P(w > t) = t^(-1 / shape)."""
    return -shape * torch.rand(n).log()


def test_evidence_of_gaussians():
    log_mass, n, repeats = -7.3, 2000, 400
    estimates = [log_evidence(gaussian_log_weights(n, 0.7, 1.0, log_mass)) for _ in range(repeats)]
    values, errors = torch.tensor(estimates).T
    z = (values - log_mass) / errors
    assert abs(float(z.mean())) < 4 / math.sqrt(repeats)
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * repeats)
    # E w^2 = s^2 / (t sqrt(2 s^2 - t^2)) for the target's t and the proposal's s.
    second = 1 / (0.7 * math.sqrt(2 - 0.7**2))
    assert float(errors.mean()) == pytest.approx(math.sqrt((second - 1) / n), rel=0.05)
    # The same sentence is seen to fail for a wrong evidence.
    assert abs(float(z.mean() + 0.02 / errors.mean())) > 4 / math.sqrt(repeats)
    ess = effective_sample_size(gaussian_log_weights(200_000, 0.7, 1.0))
    assert float(ess) == pytest.approx(200_000 / second, rel=0.02)


def test_closed_forms_and_shifts():
    log_weights = torch.tensor([1.0, 2.0, 5.0, 0.0]).log()
    assert float(effective_sample_size(log_weights)) == pytest.approx(64 / 30)
    value, error = log_evidence(log_weights)
    assert value == pytest.approx(math.log(2))
    variance = (0 + 1 + 9 + 4) / 3
    assert error == pytest.approx(math.sqrt(variance / 4) / 2)
    rows = torch.stack([log_weights, log_weights + 3000, torch.zeros(4)])
    assert effective_sample_size(rows).tolist() == pytest.approx([64 / 30, 64 / 30, 4])
    assert effective_sample_size(rows[None].float()).shape == (1, 3)
    assert effective_sample_size(rows.float()).dtype == torch.float64

    long = gaussian_log_weights(500, 1.0, 0.8)
    for shift in (-5000.0, 5000.0):
        assert log_evidence(long + shift)[0] == pytest.approx(log_evidence(long)[0] + shift)
        assert log_evidence(long + shift)[1] == pytest.approx(log_evidence(long)[1])
        smoothed, shape = pareto_smoothed(long + shift)
        torch.testing.assert_close(smoothed, pareto_smoothed(long)[0] + shift)
        assert shape == pytest.approx(pareto_smoothed(long)[1])


def resampling_z_score(draw, log_weights, count, repeats=3000):
    """The largest deviation of mean counts from ``count`` w, in units of standard error."""
    n, expected = len(log_weights), count * log_weights.softmax(0)
    counts = torch.stack([torch.bincount(draw(), minlength=n) for _ in range(repeats)]).double()
    fraction = expected - expected.floor()
    # A count is the floor or the ceiling of its mean.
    assert bool((counts >= expected.floor()).all() and (counts <= expected.ceil()).all())
    error = (fraction * (1 - fraction) / repeats).sqrt().clamp_min(1e-12)
    return float(((counts.mean(0) - expected) / error).abs().max())


def test_resampling_is_unbiased():
    log_weights = torch.tensor([-math.inf, 0.3, -1.0, -math.inf, 2.0, 0.0, -3.0, -math.inf])
    assert resampling_z_score(lambda: resample(log_weights, 10), log_weights, 10) < 4.5

    def planted():
        # Systematic resampling that starts its comb at zero.
        comb = torch.arange(10) / 10
        return torch.searchsorted(log_weights.softmax(0).cumsum(0), comb, right=True)

    assert resampling_z_score(planted, log_weights, 10) > 20


def test_resampling_in_random_order_and_never_outside():
    log_weights = torch.full((1000,), -math.inf)
    log_weights[300:310] = torch.linspace(-30.0, 0.0, 10)
    drawn = resample(log_weights, 20_000)
    assert set(drawn.tolist()) <= set(range(300, 310))
    assert resample(torch.zeros(5), 5).sort().values.tolist() == [0, 1, 2, 3, 4]
    firsts = torch.stack([resample(torch.zeros(5), 5)[0] for _ in range(2000)])
    counts = torch.bincount(firsts, minlength=5)
    assert float(((counts - 400) / math.sqrt(320)).abs().max()) < 4.5
    assert resample(torch.tensor([-1e5]), 3).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="0 indices cannot be drawn"):
        resample(torch.zeros(5), 0)


CASES = {
    "light": lambda n: gaussian_log_weights(n, 0.7, 1.0),
    "heavy": lambda n: gaussian_log_weights(n, 2.0, 1.0),
    "pareto": lambda n: pareto_log_weights(n, 0.4) - 800,
    "some outside": lambda n: torch.where(
        torch.rand(n) < 0.3, torch.tensor(-math.inf), torch.randn(n)
    ),
    "most outside": lambda n: torch.where(
        torch.rand(n) < 0.7, torch.tensor(-math.inf), torch.randn(n)
    ),
    "wide": lambda n: 300 * torch.randn(n),
    "ties": lambda n: (3 * torch.randn(n)).round() / 3,
}


@pytest.mark.parametrize("n", [25, 101, 1000, 4000])
@pytest.mark.parametrize("case", CASES)
def test_pareto_smoothing_equals_arviz(case, n):
    arviz = pytest.importorskip("arviz")
    log_weights = CASES[case](n)
    smoothed, shape = pareto_smoothed(log_weights)
    expected, expected_shape = arviz.psislw(log_weights.numpy(), normalize=False)
    assert shape == pytest.approx(float(expected_shape), rel=1e-7, abs=1e-9)
    ours, theirs = smoothed, torch.from_numpy(expected)
    if case == "ties":
        # Which of two equal weights gets the larger quantile is arbitrary.
        ours, theirs = ours.sort().values, theirs.sort().values
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_pareto_shape_tells_heavy_from_light():
    assert pareto_smoothed(gaussian_log_weights(5000, 0.7, 1.0))[1] < 0.5
    assert pareto_smoothed(gaussian_log_weights(200_000, 5.0, 1.0))[1] > 0.7
    # The shape of Pareto weights is known; its standard error is about (1 + k) / sqrt(tail).
    for true in (0.2, 0.5, 0.9):
        _, shape = pareto_smoothed(pareto_log_weights(100_000, true))
        assert abs(shape - true) < 4 * (1 + true) / math.sqrt(3 * math.sqrt(100_000))
    raw = gaussian_log_weights(5000, 3.0, 1.0)
    smoothed, _ = pareto_smoothed(raw)
    assert float(smoothed.max()) <= float(raw.max()) + 1e-12
    assert bool((smoothed[raw.argsort()].diff() >= 0).all())
    assert int((smoothed - raw).abs().gt(1e-9).sum()) <= math.ceil(3 * math.sqrt(5000))


def test_warnings():
    assert log_weight_warnings(gaussian_log_weights(5000, 0.7, 1.0)) == []
    assert log_weight_warnings(torch.zeros(1000)) == []
    (heavy,) = log_weight_warnings(-0.8 * ((torch.arange(2000) + 0.5) / 2000).log())
    assert "heavy tail (Pareto k-hat 0." in heavy
    assert "more MCMC layers" in heavy
    few = torch.full((1000,), -math.inf)
    few[:2] = 0.0
    assert any("worth only 2.0 independent ones" in line for line in log_weight_warnings(few))
    both = log_weight_warnings(50 * torch.randn(1000))
    assert len(both) == 2
    assert all(line.endswith(".") and ": draw more samples" in line for line in both)
    (small,) = log_weight_warnings(torch.zeros(20))
    assert "The 20 importance weights are too few" in small


def test_degenerate_weights():
    one = torch.tensor([-3.0])
    assert float(effective_sample_size(one)) == 1
    assert log_evidence(one) == (-3.0, math.inf)
    assert pareto_smoothed(one) == (one, math.inf)
    equal = torch.full((100,), -2.0)
    assert float(effective_sample_size(equal)) == 100
    assert log_evidence(equal) == (-2.0, 0.0)
    smoothed, shape = pareto_smoothed(equal)
    assert torch.equal(smoothed, equal)
    assert shape == -math.inf
    # One giant among equals: a tail of one cannot be fitted, and that is bad news.
    equal[7] = 10.0
    assert pareto_smoothed(equal)[1] == math.inf
    # Equal but for rounding.
    smoothed, shape = pareto_smoothed(1e-16 * torch.randn(1000))
    assert shape < 0.5
    assert float(smoothed.abs().max()) < 1e-14
    # A tail over more than the range of numbers.
    _, shape = pareto_smoothed(torch.linspace(-5000.0, 0.0, 30))
    assert shape > 0.7


FUNCTIONS = [
    effective_sample_size,
    log_evidence,
    pareto_smoothed,
    log_weight_warnings,
    lambda log_weights: resample(log_weights, 3),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_weights_that_cannot_be_used(function):
    log_weights = torch.zeros(30)
    log_weights[3], log_weights[5] = math.nan, math.inf
    with pytest.raises(InputError, match="2 of 30 log-weights are NaN or plus infinity"):
        function(log_weights)
    with pytest.raises(InputError, match="All 30 log-weights of 1 of 1 rows are minus infinity"):
        function(torch.full((30,), -math.inf))
    with pytest.raises(InputError, match="hold no draws"):
        function(torch.zeros(0))
