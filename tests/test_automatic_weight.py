"""The automatic weight where the risk is known: shrinkage of white noise, whose best weight has a closed form."""

import math

import pytest
import torch

from patchflow.errors import InputError, NumericalError
from patchflow.problems.likelihood import GaussianLikelihood, Likelihood, MixedNoise
from patchflow.problems.operator import Identity
from patchflow.problems.poisson import PoissonNoise
from patchflow.problems.sampling import Mask
from patchflow.reconstruct.automatic_weight import choose_weight
from patchflow.solution import Solution

STD, SIGNAL, SHAPE = 0.3, 0.8, (80, 90)
# Of the shrinkage y / (1 + w STD^2) the risk is least at w = 1 / SIGNAL^2, the precision of the prior.
BEST = 1 / SIGNAL**2


def shrink(y, weight):
    return Solution(y / (1 + weight * STD**2), [], 1, True)


def measured(operator):
    x = SIGNAL * torch.randn(1, 1, *SHAPE)
    likelihood = GaussianLikelihood(operator, STD)
    return likelihood, likelihood.simulate(x), x


def test_all_weights_are_tried_on_the_same_two_measurements():
    """Solvers may keep what they have computed of them."""
    likelihood, y, _ = measured(Identity(SHAPE))
    given = []

    def solve(measurement, weight):
        given.append(measurement)
        return shrink(measurement, weight)

    choose_weight(solve, likelihood, y, start=BEST)
    assert len(given) > 10
    assert len({id(measurement) for measurement in given}) == 2


def test_stein_finds_the_best_shrinkage():
    likelihood, y, x = measured(Identity(SHAPE))
    choice = choose_weight(shrink, likelihood, y, start=0.3 * BEST)
    # On a grid of factors of the root of two.
    assert 2**-0.5 < choice.weight / BEST < 2**0.5
    assert torch.equal(choice.solution.x, shrink(y, choice.weight).x)
    for trial in choice.trials:
        error = (shrink(y, trial.weight).x - x).square().mean() / (1 + (STD / 0.3) ** 2) ** 2
        # Its standard error: that of the mean of squared noise, and of the divergence with the probe.
        assert abs(trial.risk - float(error)) < 6 * math.sqrt(8 / y.numel()) * STD**2
        residual = (shrink(y, trial.weight).x - y).square().mean() / STD**2
        assert math.isclose(trial.discrepancy, float(residual), rel_tol=1e-9)


def test_the_discrepancy_principle_is_where_the_residual_is_the_noise():
    likelihood, y, _ = measured(Identity(SHAPE))
    choice = choose_weight(shrink, likelihood, y, start=BEST)
    assert choice.by_discrepancy is not None
    residual = float((shrink(y, choice.by_discrepancy).x - y).square().mean())
    assert math.isclose(residual, STD**2, rel_tol=0.03)
    # White noise on a white signal: the residual is that of the noise at a weight far above the best one.
    assert choice.by_discrepancy > 2 * choice.weight


def test_too_small_a_level_of_noise_asks_for_less_prior():
    likelihood, y, _ = measured(Identity(SHAPE))
    sharper = GaussianLikelihood(likelihood.operator, STD / 10)
    assert choose_weight(shrink, sharper, y, start=BEST).weight < BEST / 20


def test_hidden_pixels_do_not_count():
    mask = torch.rand(SHAPE) > 0.7
    likelihood, y, _ = measured(Mask(mask))
    filled = torch.where(mask, y, 0.0)
    torch.manual_seed(5)
    choice = choose_weight(shrink, likelihood, y, start=BEST)
    torch.manual_seed(5)
    again = choose_weight(shrink, likelihood, filled, start=BEST)
    assert choice.weight == again.weight
    for a, b in zip(choice.trials, again.trials, strict=True):
        assert math.isclose(a.discrepancy, b.discrepancy, rel_tol=1e-9)
    assert 0.5 < choice.weight / BEST < 2


def test_trials_are_reported_and_flags_raised():
    likelihood, y, _ = measured(Identity(SHAPE))
    seen = []
    choice = choose_weight(shrink, likelihood, y, start=BEST, report=seen.append)
    assert sorted(seen) == choice.trials
    assert choice.agree == (0.25 <= (choice.by_discrepancy or 0) / choice.weight <= 4)
    assert not choice._replace(by_discrepancy=None).agree
    assert not choice._replace(by_discrepancy=5 * choice.weight).agree


def test_counts_weigh_by_their_precision():
    """Poisson noise of sinograms: the risk is that of the prediction in units of each ray's noise."""
    noise = PoissonNoise(1e4)
    likelihood = Likelihood(Identity(SHAPE), noise)
    x = 0.5 + 0.1 * torch.rand(1, 1, *SHAPE)
    y = likelihood.simulate(x)

    def smooth(y, weight):
        return Solution(y.mean() + (y - y.mean()) / (1 + weight), [], 1, True)

    choice = choose_weight(smooth, likelihood, y, start=0.1)
    errors = {
        trial.weight: float((smooth(y, trial.weight).x - x).square().mean())
        for trial in choice.trials
    }
    assert errors[choice.weight] < 1.05 * min(errors.values())


def test_bad_input_is_refused():
    likelihood, y, _ = measured(Identity(SHAPE))
    with pytest.raises(InputError, match="start weight is 0"):
        choose_weight(shrink, likelihood, y, start=0.0)
    with pytest.raises(InputError, match="not MixedNoise"):
        choose_weight(shrink, Likelihood(Identity(SHAPE), MixedNoise(0.1, 0.1)), y, start=1.0)


def test_a_choice_at_the_end_of_the_range_says_so():
    likelihood, y, _ = measured(Identity(SHAPE))

    def constant(y, weight):
        return Solution(torch.zeros_like(y) + 1 / weight, [], 1, True)

    choice = choose_weight(constant, likelihood, y, start=1.0)
    assert choice.at_end
    assert choice.weight == choice.trials[-1].weight
    assert not choose_weight(shrink, likelihood, y, start=BEST).at_end


def test_weights_that_fail_are_passed_over():
    likelihood, y, _ = measured(Identity(SHAPE))

    def fragile(y, weight):
        if weight > 2 * BEST:
            raise NumericalError("The energy is nan.")
        return shrink(y, weight)

    choice = choose_weight(fragile, likelihood, y, start=BEST)
    assert choice.weight == choose_weight(shrink, likelihood, y, start=BEST).weight
    assert any(math.isinf(trial.risk) for trial in choice.trials)

    def broken(y, weight):
        raise NumericalError("The energy is nan.")

    with pytest.raises(NumericalError, match="failed with all weights"):
        choose_weight(broken, likelihood, y, start=BEST)


def test_the_probe_is_not_the_noise_even_from_the_same_seed():
    likelihood = GaussianLikelihood(Identity(SHAPE), STD)
    x = SIGNAL * torch.randn(1, 1, *SHAPE)
    torch.manual_seed(3)
    y = likelihood.simulate(x)
    given = []

    def solve(measurement, weight):
        given.append(measurement)
        return shrink(measurement, weight)

    torch.manual_seed(3)
    choose_weight(solve, likelihood, y, start=BEST)
    probe, noise = given[1] - y, y - x
    correlation = (probe * noise).sum() / (probe.norm() * noise.norm())
    assert abs(float(correlation)) < 5 / math.sqrt(y.numel())


def test_an_interruption_keeps_the_best_so_far():
    likelihood, y, _ = measured(Identity(SHAPE))
    tried = []

    def solve(measurement, weight):
        tried.append(weight)
        if len(tried) == 6:
            raise KeyboardInterrupt
        return shrink(measurement, weight)

    choice = choose_weight(solve, likelihood, y, start=BEST)
    assert len(choice.trials) == 2
    assert choice.solution.interrupted
    assert torch.equal(choice.solution.x, shrink(y, choice.weight).x)
    tried[:] = range(5)
    with pytest.raises(KeyboardInterrupt):
        choose_weight(solve, likelihood, y, start=BEST)


def test_a_random_network_is_the_same_in_both_reconstructions():
    likelihood, y, _ = measured(Identity(SHAPE))
    drawn = []

    def solve(measurement, weight):
        drawn.append(float(torch.rand(())))
        return shrink(measurement, weight)

    choose_weight(solve, likelihood, y, start=BEST)
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 1
