"""Priors, noise models, the mixture posterior and premade posteriors against quadrature, scipy and closed forms."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from patchflow.chains.features import NormalScores
from patchflow.errors import InputError
from patchflow.posterior_models import (
    conditional_snf,
    joint_batches,
    load_posterior_model,
    prepare,
    save_posterior_model,
)
from patchflow.priors.gaussian import Gaussian, StandardNormal
from patchflow.priors.mixture import ConditionalMixture, GaussianMixture
from patchflow.priors.student import StudentMixture
from patchflow.priors.uniform import Uniform
from patchflow.problems.external import NumpyModel
from patchflow.problems.likelihood import GaussianNoise, Likelihood, MixedNoise


def mixture() -> GaussianMixture:
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.6]]])
    return GaussianMixture(
        torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), covariances
    )


def student() -> StudentMixture:
    scatters = torch.stack((torch.eye(2), torch.tensor([[0.5, 0.2], [0.2, 0.4]])))
    return StudentMixture(
        torch.tensor([0.4, 0.6]),
        torch.tensor([[0.0, 1.0], [1.0, -1.0]]),
        scatters,
        torch.tensor([3.0, 8.0]),
    )


def test_student_mixture_is_that_of_scipy():
    law, x = student(), torch.randn(50, 2)
    expected = sum(
        float(w.exp()) * scipy.stats.multivariate_t(m, f @ f.T, df=float(nu)).pdf(x.numpy())
        for w, m, f, nu in zip(law.log_weights, law.means, law.factors, law.degrees, strict=True)
    )
    np.testing.assert_allclose((-law(x)).exp().numpy(), expected)


def test_gaussian_mixture_is_that_of_scipy():
    law, x = mixture(), torch.randn(50, 2)
    expected = sum(
        float(w) * scipy.stats.multivariate_normal(m, f @ f.T).pdf(x.numpy())
        for w, m, f in zip(law.weights, law.means, law.factors, strict=True)
    )
    np.testing.assert_allclose((-law(x)).exp().numpy(), expected)
    diagonal = GaussianMixture(torch.ones(2), law.means, torch.tensor([[0.5, 0.1], [0.2, 0.3]]))
    full = GaussianMixture(torch.ones(2), law.means, torch.diag_embed(diagonal.factors**2))
    torch.testing.assert_close(diagonal(x), full(x))


@pytest.mark.parametrize(
    "law",
    [
        mixture(),
        student(),
        Uniform(-1.0, 2.0, dim=2, wall=4.0),
        Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0])),
    ],
    ids=["mixture", "student", "soft walls", "hard walls"],
)
def test_samples_follow_the_density(law):
    """E_sample[q / p] = 1 for a density q inside the support, and moments by quadrature."""
    x = law.sample(40_000)
    q = Gaussian(torch.tensor([0.3, 0.0]), 0.02 * torch.eye(2))
    ratio = (law(x) - q(x)).exp()
    error = (ratio.mean() - 1) / (ratio.std() / math.sqrt(len(x)))
    assert abs(float(error)) < 4.5
    axis = torch.linspace(-12, 12, 801)
    grid = torch.cartesian_prod(axis, axis)
    density = (-law(grid)).exp() * (axis[1] - axis[0]) ** 2
    assert float(density.sum()) == pytest.approx(1, abs=0.03), "walls between grid lines"
    density /= density.sum()
    moments = (density[:, None] * torch.cat((grid.tanh(), grid.tanh() ** 2), 1)).sum(0)
    sampled = torch.cat((x.tanh(), x.tanh() ** 2), 1)
    error = (sampled.mean(0) - moments) / (sampled.std(0) / math.sqrt(len(x)))
    assert float(error.abs().max()) < 6  # quadrature across walls is exact to 1 %


def test_tails_of_soft_walls_have_their_scale():
    """The released sampler of the paper draws tails of length 1 instead of 1 / wall."""
    wall = 100.0
    x = Uniform(-1.0, 1.0, wall=wall).sample(200_000)
    outside = (x.abs() - 1).clamp_min(0)
    outside = outside[outside > 0]
    share = len(outside) / len(x)
    expected = (2 / wall) / (2 + 2 / wall)
    assert abs(share - expected) < 5 * math.sqrt(expected / len(x))
    assert abs(float(outside.mean()) * wall - 1) < 5 / math.sqrt(len(outside))


@pytest.mark.parametrize("wall", [None, 50.0])
def test_normal_scores_of_a_box(wall):
    law = Uniform(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 0.5]), wall=wall)
    u = torch.randn(100, 2)
    x = law.from_normal(u)
    torch.testing.assert_close(law.to_normal(x), u)
    for k in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: law.from_normal(v[None])[0], u[k])
        expected = law(x[k : k + 1]) - StandardNormal(2)(u[k : k + 1])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, expected[0])
    ends = torch.stack((law.low, law.high))
    assert law.to_normal(ends).isfinite().all(), "finite at the walls"
    assert law.from_normal(torch.full((1, 2), 40.0)).isfinite().all()


def test_mixture_posterior_against_quadrature():
    prior, y, b = mixture(), torch.tensor([0.3, -0.2, 0.4]), 0.5
    matrix = torch.tensor([[1.0, 0.5], [0.0, 0.8], [0.3, -0.4]])
    axis = torch.linspace(-6, 6, 901)
    grid = torch.cartesian_prod(axis, axis)
    likelihood = Likelihood(lambda x: x @ matrix.T, GaussianNoise(b))
    energy = (likelihood + prior)(grid, y[None].expand(len(grid), -1))
    density = (-energy).exp()
    density /= density.sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(
        (-prior.posterior(matrix, b, y)(grid)).exp(), density, atol=1e-8, rtol=1e-6
    )
    # Without the determinants, as printed on the slide, the weights are wrong here.
    posterior = prior.posterior(matrix, b, y)
    dets = posterior.factors.diagonal(dim1=1, dim2=2).prod(1) / prior.factors.diagonal(
        dim1=1, dim2=2
    ).prod(1)
    printed = posterior.weights / dets
    assert float((printed / printed.sum() - posterior.weights).abs().max()) > 0.01


def test_conditional_mixture_learns_nothing_wrong():
    law = ConditionalMixture(2, 3, 2)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    weights = (law.logits + law.net(y)).softmax(1)
    for k in range(6):
        exact = GaussianMixture(
            weights[k].detach(), law.means.detach(), (2 * law.log_scales).exp().detach()
        )
        torch.testing.assert_close(law(x, y)[k].detach(), exact(x[k : k + 1])[0])
    data = torch.cat((torch.randn(300, 2) * 0.01, 5 + torch.randn(300, 2) * 0.1))
    law = ConditionalMixture(2, 4)
    law.initialize(data)
    assert float(torch.cdist(data, law.means.detach()).min(1).values.max()) < 1
    assert law.sample(10).shape == (10, 2)
    with pytest.raises(InputError, match="cannot place"):
        law.initialize(data[:3])


def test_mixed_noise_integrates_to_one_and_is_drawn():
    noise, a = MixedNoise(0.2, 0.05), torch.tensor([[1.5]])
    axis = torch.linspace(-2, 5, 20_001)[:, None]
    density = noise.log_prob(axis, a.expand(len(axis), 1)).exp()
    assert float(density.sum() * (axis[1] - axis[0])) == pytest.approx(1, abs=1e-6)
    b, log_prob = noise.draw(a.expand(50_000, 1))
    torch.testing.assert_close(log_prob, noise.log_prob(b, a.expand(50_000, 1)))
    variance = 0.3**2 + 0.05**2
    assert abs(float(b.var()) / variance - 1) < 5 * math.sqrt(2 / len(b))


def test_noise_of_each_value():
    std = torch.tensor([0.5, 2.0, 1.0])
    noise, a = GaussianNoise(std), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    b, log_density = noise.draw(a)
    law = torch.distributions.Normal(a, std)
    torch.testing.assert_close(log_density, law.log_prob(b).sum(1))
    torch.testing.assert_close(noise.log_prob(a, a), law.log_prob(a).sum(1))
    drawn = noise.draw(a[:1].expand(20_000, 3))[0]
    assert ((drawn.std(0) / std - 1).abs() < 5 / math.sqrt(40_000)).all()


def test_features_are_injective_scores():
    features = NormalScores(3)
    y = torch.stack(
        (10 ** torch.randn(5000), torch.randn(5000), torch.poisson(torch.full((5000,), 0.5))), 1
    )
    torch.testing.assert_close(
        NormalScores(3)(torch.randn(4, 3)).isfinite().all(), torch.tensor(True)
    )
    features.initialize(y)
    scores = features(y)
    # The median and the quartiles, since beyond the outer knots the scores of heavy tails are not normal.
    quartiles = scores[:, :2].quantile(torch.tensor([0.25, 0.5, 0.75]), 0)
    assert float((quartiles - torch.tensor([[-0.674], [0.0], [0.674]])).abs().max()) < 0.05
    line = torch.linspace(-20, 20, 1001)[:, None].expand(-1, 3)
    assert (features(line).diff(dim=0) > 0).all(), (
        "strictly increasing, also beyond the data and between ties"
    )
    with pytest.raises(InputError, match="not finite"):
        features.initialize(torch.full((100, 3), math.nan))
    with pytest.raises(InputError, match=r"shape \(2, 4\)"):
        features(torch.zeros(2, 4))


def problem() -> tuple[Likelihood, Uniform]:
    return Likelihood(lambda x: x[:, :1] ** 2, GaussianNoise(0.2)), Uniform(-1.0, 1.0, dim=2)


@pytest.mark.parametrize("mcmc", ["independence", "mala", "mh", "none"])
def test_conditional_snf_has_exact_weights(mcmc):
    """The mean weight is the evidence, by quadrature, whatever was (not) learned."""
    likelihood, prior = problem()
    snf = conditional_snf(likelihood, prior, 1, layers=2, hidden=8, mcmc=mcmc, mcmc_steps=2)
    prepare(snf, *joint_batches(prior, likelihood, 500)())
    snf.requires_grad_(False)
    y = torch.tensor([[0.4]])
    weights = snf.walk(40_000, y).log_weights.exp()
    axis = torch.linspace(-1, 1, 2001)
    density = likelihood.noise.log_prob(y, (axis**2)[:, None]).exp()
    evidence = float(torch.trapezoid(density, axis) / 2)
    error = (float(weights.mean()) - evidence) / (float(weights.std()) / math.sqrt(len(weights)))
    assert abs(error) < 4.5
    assert float(weights.std()) / math.sqrt(len(weights)) < 0.05 * evidence


def test_posterior_models_are_saved_without_the_problem(tmp_path):
    likelihood, prior = problem()
    snf = conditional_snf(likelihood, prior, 1, layers=2, hidden=8, components=3, mcmc="mh")
    prepare(snf, *joint_batches(prior, likelihood, 500)())
    path = tmp_path / "snf.safetensors"
    save_posterior_model(path, snf, {"seed": 3})
    again = load_posterior_model(path, likelihood, prior)
    y = torch.tensor([[0.4]])
    torch.manual_seed(1)
    x = snf.sample(5, y)
    torch.manual_seed(1)
    torch.testing.assert_close(again.sample(5, y), x)
    with pytest.raises(InputError):
        load_posterior_model(path, likelihood, Uniform(-1.0, 1.0, dim=3))


def test_numpy_models_work_without_gradients_and_say_so():
    likelihood = Likelihood(NumpyModel(lambda x: np.sin(x)), GaussianNoise(0.1))
    prior = Uniform(-1.0, 1.0, dim=2)
    snf = conditional_snf(likelihood, prior, 2, layers=1, hidden=8, mcmc="independence")
    prepare(snf, *joint_batches(prior, likelihood, 100)())
    with torch.no_grad():
        assert snf.sample(5, torch.zeros(1, 2)).shape == (5, 2)
    mala = conditional_snf(likelihood, prior, 2, layers=1, hidden=8, mcmc="mala")
    with pytest.raises(InputError, match="NumPy function has none"):
        mala.sample(5, torch.zeros(1, 2))
    with pytest.raises(InputError, match="shape"):
        NumpyModel(lambda x: x[:1])(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(1.0, 0.0), "is empty"),
        (lambda: Uniform(0.0, 1.0, wall=0.0), "wall is 0.0"),
        (lambda: Uniform(torch.zeros(2), torch.ones(3)), "does not fit"),
        (lambda: MixedNoise(0.1, 0.0), "noise levels"),
        (lambda: GaussianNoise(torch.tensor([0.1, 0.0])), "must be positive"),
        (lambda: GaussianMixture(torch.ones(2), torch.zeros(3, 2), torch.ones(3, 2)), "do not fit"),
        (lambda: GaussianMixture(torch.ones(1), torch.zeros(1, 2), -torch.ones(1, 2)), "definite"),
        (lambda: mixture().posterior(torch.eye(3), 0.1, torch.zeros(3)), "does not map"),
        (lambda: conditional_snf(*problem(), 0), "0 measured values"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
