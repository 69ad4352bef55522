"""Annealing, corrected samples, distances of samples, training of posteriors, against closed forms and quadrature."""

import inspect
import math

import pytest
import scipy.stats
import torch

from patchflow.chains.adaptation import adapt
from patchflow.chains.bijections import AffineCoupling
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain
from patchflow.chains.proposals import LangevinProposal, RandomWalk
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Energy, Interpolation
from patchflow.errors import InputError, NumericalError
from patchflow.fit import fit
from patchflow.learn_posterior import fit_layerwise, learn_posterior
from patchflow.posterior_models import conditional_snf, interleaved_snf, joint_batches
from patchflow.priors.gaussian import Gaussian, StandardNormal
from patchflow.priors.mixture import GaussianMixture
from patchflow.priors.uniform import Uniform
from patchflow.problems.likelihood import GaussianNoise, Likelihood
from patchflow.sample_metrics import c2st, wasserstein1
from patchflow.uncertainty.annealing import anneal
from patchflow.uncertainty.evidence import sample_posterior

MATRIX = torch.tensor([[1.0, 0.5], [0.0, 0.8]])


def linear_problem() -> tuple[Likelihood, GaussianMixture]:
    means = torch.tensor([[2.0, 0.0], [-2.0, 1.0]])
    prior = GaussianMixture(torch.tensor([1.0, 2.0]), means, torch.full((2, 2), 0.3))
    return Likelihood(lambda x: x @ MATRIX.T, GaussianNoise(0.5)), prior


def evidence(prior: GaussianMixture, y: torch.Tensor) -> float:
    law = sum(
        float(w)
        * scipy.stats.multivariate_normal(
            (MATRIX @ m).numpy(), (0.3 * MATRIX @ MATRIX.T + 0.25 * torch.eye(2)).numpy()
        ).pdf(y.numpy())
        for w, m in zip(prior.weights, prior.means, strict=True)
    )
    return math.log(law)


def test_annealing_finds_posterior_and_evidence_of_each_measurement():
    likelihood, prior = linear_problem()
    y = torch.tensor([[0.2, 0.4], [1.5, -0.3], [-1.0, 1.0]])
    result = anneal(likelihood + prior, prior, y, particles=4000)
    for k in range(3):
        exact = prior.posterior(MATRIX, 0.5, y[k])
        share = float((exact.responsibilities(result.x[k])[:, 0]).mean())
        assert share == pytest.approx(float(exact.weights[0]), abs=0.05)
        mean = (exact.weights[:, None] * exact.means).sum(0)
        assert float((result.x[k].mean(0) - mean).abs().max()) < 0.15
        error = float(result.log_evidence[k]) - evidence(prior, y[k])
        # Particles share ancestors, so that the standard error is a little too small.
        assert abs(error) < 6 * float(result.standard_error[k])
        assert float(result.standard_error[k]) < 0.1
    assert 0.05 < result.acceptance < 0.9


def test_annealing_in_a_box_keeps_to_it_and_counts():
    likelihood = Likelihood(lambda x: x[:, :1] ** 2, GaussianNoise(0.05))
    prior, calls = Uniform(-1.0, 1.0, dim=2), 0

    def count(module, arguments, result):
        nonlocal calls
        calls += len(result)

    likelihood.register_forward_hook(count)
    result = anneal(likelihood + prior, prior, torch.tensor([[0.5]]), particles=2000)
    assert (result.x.abs() <= 1).all()
    right = float((result.x[0, :, 0] > 0).double().mean())
    assert right == pytest.approx(0.5, abs=0.06), "both modes"
    assert calls == result.evaluations


def test_annealing_reports_what_is_wrong():
    prior = StandardNormal(2)

    class Nowhere(Energy):
        def forward(self, x, condition=None):
            return torch.full((len(x),), math.inf)

    class Broken(Energy):
        def forward(self, x, condition=None):
            return torch.full((len(x),), math.nan)

    y = torch.zeros(1, 1)
    with pytest.raises(NumericalError, match="zero at all particles"):
        anneal(Nowhere(), prior, y, particles=50)
    with pytest.raises(NumericalError, match="nan at 200"):
        anneal(Broken(), prior, y, particles=50)
    with pytest.raises(InputError, match="5 particles"):
        anneal(prior, prior, y, particles=5)
    likelihood, mixture = linear_problem()
    posterior, y = likelihood + mixture, torch.zeros(1, 2)
    with pytest.raises(InputError, match="1 values that are not finite"):
        anneal(posterior, mixture, torch.tensor([[math.nan, 0.0]]))
    with pytest.raises(InputError, match="1 values but the forward model gives 2"):
        anneal(posterior, mixture, y[:, :1])
    with pytest.raises(InputError, match="shape .2,."):
        inspect.unwrap(anneal)(posterior, mixture, y[0])
    with pytest.raises(InputError, match="add the prior"):
        anneal(likelihood, mixture, y)


def test_annealed_effective_sample_size():
    likelihood, prior = linear_problem()
    y = torch.tensor([[0.2, 0.4]])
    mixed = anneal(likelihood + prior, prior, y, particles=1000)
    stuck = anneal(likelihood + prior, prior, y, particles=1000, moves=1, final_moves=1)
    assert 500 < mixed.ess <= 1000
    assert stuck.ess < 0.9 * mixed.ess


def coarse_flow() -> tuple[Flow, GaussianMixture, torch.Tensor]:
    """A start that is not the posterior but covers it."""
    likelihood, prior = linear_problem()
    wide = Gaussian(torch.zeros(2), 4 * torch.eye(2))
    return Flow(wide, Chain(), target=likelihood + prior), prior, torch.tensor([[0.2, 0.4]])


@pytest.mark.parametrize("correct", ["resample", "metropolis"])
def test_corrections_give_the_posterior(correct):
    flow, prior, y = coarse_flow()
    draws = sample_posterior(flow, 4000, y, correct=correct, effort=40)
    exact = prior.posterior(MATRIX, 0.5, y[0])
    reference = exact.sample(4000)
    floor = wasserstein1(exact.sample(2000), reference[:2000])
    assert wasserstein1(draws.x[:2000], reference[:2000]) < 2.5 * floor
    raw = sample_posterior(flow, 4000, y)
    assert wasserstein1(raw.x[:2000], reference[:2000]) > 4 * floor
    assert (draws.log_weights == 0).all()
    value, error = raw.log_evidence
    assert abs(value - evidence(prior, y[0])) < 4.5 * error
    assert raw.ess < 0.5
    assert raw.log_weights.std() > 0


def test_collapsed_weights_are_reported():
    likelihood, prior = linear_problem()
    far = Gaussian(torch.tensor([40.0, 40.0]), 0.01 * torch.eye(2))
    flow = Flow(far, Chain(), target=likelihood + prior)
    draws = sample_posterior(flow, 2000, torch.tensor([[0.2, 0.4]]))
    assert draws.warnings
    assert "k-hat" in draws.warnings[0]
    assert "draw more samples" in draws.warnings[0]


def test_a_layer_that_accepts_nothing_is_reported():
    likelihood, prior = linear_problem()
    start = Gaussian(torch.tensor([3.0, 3.0]), 0.01 * torch.eye(2))
    hopeless = Metropolis(likelihood + prior, RandomWalk(1000.0), 2)
    flow = Flow(start, Chain(hopeless), target=likelihood + prior)
    draws = sample_posterior(flow, 500, torch.tensor([[0.2, 0.4]]))
    assert "accepts 0 % of its steps" in draws.warnings[-1]


def test_bad_measurements():
    flow, _, y = coarse_flow()
    with pytest.raises(InputError, match="number of samples is 0"):
        sample_posterior(flow, 0, y)
    with pytest.raises(InputError, match="1 values that are not finite"):
        sample_posterior(flow, 5, torch.tensor([[math.nan, 0.0]]))
    # Without the checks of shapes and choices that run under pytest only.
    unchecked = inspect.unwrap(sample_posterior)
    assert unchecked(flow, 5, y.numpy()).x.shape == (5, 2)
    with pytest.raises(InputError, match=r"shape \(2, 2\)"):
        unchecked(flow, 5, torch.zeros(2, 2))
    with pytest.raises(InputError, match="no correction 'magic'"):
        unchecked(flow, 5, y, correct="magic")


def test_wasserstein_is_that_of_sorted_samples_on_the_line():
    a, b = torch.randn(200, 1), 1 + 2 * torch.randn(200, 1)
    assert wasserstein1(a, b) == pytest.approx(scipy.stats.wasserstein_distance(a[:, 0], b[:, 0]))
    assert wasserstein1(a, a[torch.randperm(200)]) == 0
    with pytest.raises(InputError, match="200 and 100"):
        inspect.unwrap(wasserstein1)(a, b[:100])
    with pytest.raises(InputError, match="not finite"):
        wasserstein1(a, torch.full((200, 1), math.nan))


def test_c2st_sees_a_shift_and_nothing_where_nothing_is():
    pytest.importorskip("sklearn")
    a, b = torch.randn(600, 2), torch.randn(600, 2)
    assert abs(c2st(a, b) - 0.5) < 0.07
    # The best classifier of N(0, 1) against N(2, 1) is right with probability Phi(1).
    shifted = c2st(a, b + torch.tensor([2.0, 0.0]))
    assert shifted == pytest.approx(scipy.stats.norm.cdf(1.0), abs=0.04)


@pytest.mark.parametrize("couplings", ["spline", "affine"])
def test_a_learned_posterior_is_the_posterior(couplings):
    likelihood, prior = (
        Likelihood(lambda x: x @ MATRIX.T, GaussianNoise(0.5)),
        Uniform(-1.0, 1.0, dim=2),
    )
    snf = conditional_snf(likelihood, prior, 2, layers=2, hidden=16, couplings=couplings)
    result = learn_posterior(snf, likelihood, prior, batch=256, steps=200, lr=5e-3, average=0.98)
    assert result.steps == 200
    y = torch.tensor([[0.4, -0.2]])
    draws = sample_posterior(snf, 4000, y)
    assert draws.ess > 0.6
    axis = torch.linspace(-1, 1, 401)
    grid = torch.cartesian_prod(axis, axis)
    density = (-likelihood(grid, y.expand(len(grid), -1))).exp()
    value, error = draws.log_evidence
    assert abs(value - math.log(float(density.mean()))) < 4.5 * error + 0.02
    mean = (density[:, None] * grid).sum(0) / density.sum()
    assert float((draws.x.mean(0) - mean).abs().max()) < 0.05
    assert not any(p.requires_grad for p in snf.parameters())


def test_bad_simulations_stop_before_training():
    likelihood = Likelihood(lambda x: (x - 0.5).log(), GaussianNoise(0.1))
    prior = Uniform(-1.0, 1.0, dim=2)
    snf = conditional_snf(likelihood, prior, 2, layers=1, hidden=8)
    with pytest.raises(InputError, match="not finite"):
        learn_posterior(snf, likelihood, prior, steps=5)
    with pytest.raises(InputError, match="500 simulations"):
        learn_posterior(snf, likelihood, prior, steps=5, simulations=500)


def test_training_by_layers_reaches_the_target():
    target = Gaussian(torch.tensor([3.0, -2.0]), torch.tensor([[0.5, 0.2], [0.2, 0.4]]))
    latent = StandardNormal(2)
    half = Interpolation(latent, target, 0.5)
    chain = Chain(
        AffineCoupling(2, hidden=16),
        Metropolis(half, RandomWalk(0.5), 2),
        AffineCoupling(2, hidden=16),
        Metropolis(target, LangevinProposal(0.1), 2),
    )
    snf = Flow(latent, chain, target=target)
    before = snf.walk(4000).log_weights.detach()
    results = fit_layerwise(snf, lambda: (target.sample(256), None), steps=300, lr=5e-3)
    assert len(results) == 2, "one for each segment between Metropolis kernels"
    after = snf.walk(4000).log_weights.detach()
    assert float(after.std()) < 0.5 < float(before.std())
    assert float(after.logsumexp(0)) - math.log(4000) == pytest.approx(0, abs=0.05)
    with pytest.raises(InputError, match="Chain of several kernels"):
        fit_layerwise(Flow(latent, AffineCoupling(2)), lambda: (target.sample(8), None), steps=1)


@pytest.mark.parametrize("mcmc", ["mala", "mh"])
def test_the_interleaved_flow_learns_weights_steps_and_posterior(mcmc):
    likelihood, _ = linear_problem()
    prior = Gaussian(torch.zeros(2), torch.eye(2))
    posterior = likelihood + prior
    snf = interleaved_snf(
        posterior, 2, 2, layers=2, couplings=1, hidden=16, mcmc=mcmc, step_size=0.1, learned=True
    )
    half = snf.chain[1].energy
    start = float(half.weight.detach())
    fit(snf, joint_batches(prior, likelihood, 256), steps=150, lr=5e-3, warmup=5)
    assert float(half.weight) != start, "the interpolation weight is learned"
    y = torch.tensor([[0.4, -0.3]])
    rates = adapt(snf, lambda: joint_batches(prior, likelihood, 256)()[1])
    assert all(0.4 < rate < 0.9 for rate in rates.values())
    draws = sample_posterior(snf, 4000, y)
    exact = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2)).posterior(
        MATRIX, 0.5, y[0]
    )
    assert float((draws.x.mean(0) - exact.means[0]).abs().max()) < 0.1
    marginal = MATRIX @ MATRIX.T + 0.25 * torch.eye(2)
    expected = float(-Gaussian(torch.zeros(2), marginal)(y)[0])
    value, error = draws.log_evidence
    assert abs(value - expected) < 4.5 * error
    assert error < 0.05
