"""Calibration tests against an exact conjugate posterior, and faults planted in it."""

from __future__ import annotations

import inspect
import io
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.image import imread

from patchflow.calibration_plots import draw_calibration
from patchflow.errors import InputError
from patchflow.uncertainty.calibration import (
    ecdf_band,
    ecdf_difference,
    sbc_ranks,
    sbc_test,
    tarp_coverage,
    tarp_credibilities,
    tarp_deviation,
    tarp_test,
)

NOISE = 0.8


def simulate(datasets=1000, draws=99, dim=3, *, scale=1.0, shift=0.0, blind=False):
    """Samples, truths and measurements y = x + NOISE n of x ~ N(0, I), with a fault if asked."""
    truths = torch.randn(datasets, dim)
    measured = truths + NOISE * torch.randn(datasets, dim)
    gain = 0.0 if blind else 1 / (1 + NOISE**2)
    std = math.sqrt(1 - gain)
    noise = torch.randn(datasets, draws, dim)
    samples = (gain * measured)[:, None] + std * (scale * noise + shift)
    return samples, truths, measured


def p_values(samples, truths):
    return sbc_test(sbc_ranks(samples, truths), samples.shape[1])


@pytest.mark.parametrize(
    ("datasets", "draws", "dim"), [(20, 2, 1), (300, 7, 2), (1000, 99, 5), (3000, 10, 1)]
)
def test_the_exact_posterior_is_calibrated(datasets, draws, dim):
    samples, truths, measured = simulate(datasets, draws, dim)
    assert float(p_values(samples, truths).min()) > 1e-3
    assert tarp_test(samples, truths) > 1e-3
    assert tarp_test(samples, truths, references=measured) > 1e-3
    levels, coverage = tarp_coverage(samples, truths)
    assert tarp_deviation(levels, coverage) < 2 / math.sqrt(datasets)


def test_p_values_are_uniform():
    """Over many repetitions, of the tests themselves; 34 ranks in 20 bins are not equal bins."""
    ranks = torch.randint(0, 34, (600, 800))
    values = sbc_test(ranks, 33)
    assert scipy.stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    repeated = [tarp_test(*simulate(100, 3, 2)[:2]) for _ in range(200)]
    assert scipy.stats.kstest(repeated, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("fault", [{"scale": 0.7}, {"scale": 1.5}, {"shift": 0.4}])
def test_planted_faults_are_seen(fault):
    samples, truths, measured = simulate(**fault)
    assert float(p_values(samples, truths).max()) < 1e-6
    # Random references see an error of spread; a shift shows from the measurements' side.
    if "scale" in fault:
        assert tarp_test(samples, truths) < 1e-6
    levels, coverage = tarp_coverage(samples, truths, references=measured + 3)
    assert tarp_test(samples, truths, references=measured + 3) < 1e-6
    assert tarp_deviation(levels, coverage) > 0.05


def test_a_sampler_that_ignores_the_measurement():
    samples, truths, measured = simulate(blind=True)
    # The prior is calibrated, parameter by parameter and for references that are independent of y.
    assert float(p_values(samples, truths).min()) > 1e-3
    assert tarp_test(samples, truths) > 1e-3
    assert tarp_test(samples, truths, references=measured) < 1e-6


def test_tarp_sees_wrong_correlations_that_ranks_do_not():
    factor = torch.tensor([[1.0, 0.0], [0.95, math.sqrt(1 - 0.95**2)]])
    truths = torch.randn(1500, 2) @ factor.T
    samples = torch.randn(1500, 99, 2)
    assert float(p_values(samples, truths).min()) > 1e-3
    # Seen from a corner, truths along the other diagonal are all about equally far.
    references = torch.tensor([3.0, -3.0]).expand(1500, 2)
    assert tarp_test(samples, truths, references=references) < 1e-6


@pytest.mark.parametrize("draws", [2, 3, 4])
def test_ranks_are_uniform_for_every_order(draws):
    """Each order of the truth and the draws once: each rank equally often, exactly."""
    orders = torch.tensor(list(itertools.permutations(range(draws + 1)))).double()
    orders = orders.repeat(4, 1)
    ranks = sbc_ranks(orders[:, 1:, None], orders[:, :1])
    assert torch.equal(ranks[:, 0], orders[:, 0].long())
    counts = torch.bincount(ranks[:, 0])
    assert counts.tolist() == [len(orders) // (draws + 1)] * (draws + 1)
    assert float(sbc_test(ranks, draws)) == pytest.approx(1.0, abs=1e-9)


def test_ties_are_broken_at_random():
    n, draws = 20_000, 5
    truths, samples = torch.randint(0, 2, (n, 2)).double(), torch.randint(0, 2, (n, draws, 2))
    assert float(p_values(samples.double(), truths).min()) > 1e-3
    all_equal = sbc_ranks(torch.ones(n, draws, 1), torch.ones(n, 1))
    assert float(sbc_test(all_equal, draws)) > 1e-3
    # Half of a box's draws stick to its wall.
    wall = torch.randn(n, draws + 1, 1).clamp_min(0)
    assert float(p_values(wall[:, 1:], wall[:, 0])) > 1e-3
    assert tarp_test(samples.double(), truths) > 1e-3
    # The fault that this prevents: ties never count.
    plain = (wall[:, 1:] < wall[:, :1]).sum(1)
    assert float(sbc_test(plain, draws)) < 1e-6


def test_chi_square_against_scipy():
    ranks = torch.randint(0, 11, (137, 1))
    # 137 datasets give 6 bins of the 11 ranks 0..10.
    sizes = np.bincount(np.arange(11) * 6 // 11)
    observed = np.bincount(ranks[:, 0].numpy() * 6 // 11, minlength=6)
    expected = scipy.stats.chisquare(observed, sizes * 137 / 11).pvalue
    assert sorted(set(sizes)) == [1, 2]
    assert float(sbc_test(ranks, 10)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize(("draws", "datasets"), [(2, 40), (20, 100), (99, 500), (1000, 250)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_band_holds_a_curve_with_its_probability(draws, datasets, level):
    curves = 2000
    places, differences = ecdf_difference(torch.randint(0, draws + 1, (datasets, curves)), draws)
    lower, upper = ecdf_band(draws, datasets, level)
    assert places.shape == lower.shape == upper.shape == (min(draws, 200),)
    inside = (differences >= lower[:, None] - 1e-12) & (differences <= upper[:, None] + 1e-12)
    share = float(inside.all(0).double().mean())
    error = math.sqrt(level * (1 - level) * (1 / curves + 1 / 4000))
    assert share > level - 4 * error
    # Counts are discrete: with few points and datasets the band must hold a little more.
    assert share < level + 4 * error + 0.6 / math.sqrt(datasets * min(draws, 200))
    # Local generator: the caller's random numbers are untouched.
    state = torch.get_rng_state()
    assert torch.equal(ecdf_band(draws, datasets, level)[0], lower)
    assert torch.equal(torch.get_rng_state(), state)


def test_ecdf_difference_by_hand():
    ranks = torch.tensor([0, 0, 1, 3] * 5)[:, None]
    places, difference = ecdf_difference(ranks, 3)
    assert places.tolist() == [0.25, 0.5, 0.75]
    assert difference[:, 0].tolist() == pytest.approx([0.25, 0.25, 0.0])


def test_tarp_credibilities_by_hand():
    # The second parameter spans 100, so that a step of 50 in it is as far as 0.5 in the first.
    truths = torch.tensor([[0.0, 0.0], [1.0, 100.0]]).repeat(10, 1)
    samples = torch.tensor([[0.3, 30.0], [0.5, 0.0], [0.0, 60.0]]).expand(20, 3, 2)
    references = torch.zeros(20, 2)
    values = tarp_credibilities(samples, truths, references=references)
    assert (values * 4).floor().tolist() == [0.0, 3.0] * 10
    values = tarp_credibilities(samples, truths, references=references + torch.tensor([0.0, 60.0]))
    # Distances of the draws 0.42, 0.78, 0 and of the truths 0.6, 1.08.
    assert (values * 4).floor().tolist() == [2.0, 3.0] * 10
    levels, coverage = tarp_coverage(
        samples, truths, references=references, levels=torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    )
    assert levels.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert coverage.tolist() == [0.0, 0.5, 0.5, 0.5, 1.0]
    assert tarp_deviation(levels, coverage) == 0.25
    # A parameter that is the same for all truths has no range.
    flat = tarp_credibilities(samples, torch.ones(20, 2))
    assert bool(flat.isfinite().all())


def plain(function):
    """Without the check of shapes at the call, which only tests have."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("function", [sbc_ranks, tarp_credibilities, tarp_coverage, tarp_test])
def test_what_cannot_be_used(function):
    samples, truths, _ = simulate(20, 4, 2)
    with pytest.raises(InputError, match="19 datasets of 4 draws cannot show calibration"):
        function(samples[:19], truths[:19])
    with pytest.raises(InputError, match="20 datasets of 1 draws"):
        function(samples[:, :1], truths)
    samples[3, 1, 0], truths[0, 1] = math.nan, math.inf
    with pytest.raises(InputError, match="1 of 160 samples are not finite"):
        function(samples, truths)
    with pytest.raises(InputError, match="1 of 40 truths are not finite"):
        function(torch.zeros(20, 4, 2), truths)


def test_other_arguments_that_cannot_be_used():
    samples, truths, _ = simulate(20, 4, 2)
    for function in (sbc_ranks, tarp_credibilities):
        with pytest.raises(InputError, match=r"\(20, 4, 2\) do not fit truths \(20, 3"):
            plain(function)(samples, torch.zeros(20, 3))
    with pytest.raises(InputError, match="give one point per dataset"):
        plain(tarp_credibilities)(samples, truths, references=torch.zeros(1, 2))
    with pytest.raises(InputError, match="2 of 40 references are not finite"):
        tarp_test(samples, truths, references=truths / (torch.arange(20) > 0)[:, None])
    with pytest.raises(InputError, match="levels from 0.5 to 95.0 leave"):
        tarp_coverage(samples, truths, levels=torch.tensor([0.5, 95.0]))
    ranks = sbc_ranks(samples, truths)
    with pytest.raises(InputError, match="are not among 2 draws"):
        sbc_test(ranks.clamp_min(1) * 3, 2)
    with pytest.raises(InputError, match="are not among 4 draws"):
        ecdf_difference(ranks - 9, 4)
    for level in (0, 1, 95):
        with pytest.raises(InputError, match=f"level is {level} but must lie inside"):
            ecdf_band(10, 100, level)
    with pytest.raises(InputError, match="5 datasets of 10 draws"):
        ecdf_band(10, 5)


@pytest.mark.parametrize("dim", [1, 2, 5, 10])
def test_the_picture_is_a_png_of_sane_size(dim):
    samples, truths, _ = simulate(200, 50, dim)
    ranks = sbc_ranks(samples, truths)
    names = [f"parameter {index}" for index in range(dim)]
    png = draw_calibration(ranks, 50, *tarp_coverage(samples, truths), names)
    height, width, _ = imread(io.BytesIO(png)).shape
    assert 500 < width < 2000
    assert 300 < height < 2000
    assert 10_000 < len(png) < 500_000
    with pytest.raises(InputError, match=f"{dim + 1} names for {dim} parameters"):
        draw_calibration(ranks, 50, *tarp_coverage(samples, truths), [*names, "more"])
