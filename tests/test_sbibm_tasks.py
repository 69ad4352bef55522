"""The tasks of the benchmark: densities, integrators, simulators and reference posteriors; normal priors."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from patchflow.errors import InputError
from patchflow.papers import sbibm_tasks
from patchflow.papers.sbibm_tasks import NAMES, populations, read_observation, task
from patchflow.priors.normal import LogNormal, Normal

ODES = {"sir", "lotka_volterra"}
COVARIANCE = [[2.0, 0.6, 0.1], [0.6, 1.0, -0.3], [0.1, -0.3, 0.5]]
GAUSSIAN: Any = scipy.stats.multivariate_normal  # its stub asks for an integer covariance
PRIORS = {
    "normal": lambda: Normal(torch.tensor([0.5, -1.0, 2.0]), torch.tensor(COVARIANCE)),
    "log-normal": lambda: LogNormal(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.3, 1.0, 0.6])),
}


@pytest.fixture
def folder(data_dir):
    if not (data_dir / "sbibm").is_dir():
        pytest.skip(f"no benchmark in {data_dir}")
    return data_dir / "sbibm"


def close(actual, expected, **tolerance):
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected).to(torch.as_tensor(actual)), **tolerance
    )


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


# Priors.


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_the_image_of_the_standard_normal_law(name):
    prior = PRIORS[name]()
    u = torch.randn(5, 3)
    x = prior.from_normal(u)
    close(prior.to_normal(x), u)
    slope = torch.autograd.functional.jacobian(lambda v: prior.from_normal(v[None])[0], u[0])
    volume = torch.linalg.slogdet(slope).logabsdet
    latent = 0.5 * u[0].square().sum() + 1.5 * math.log(2 * math.pi)
    close(prior(x)[0], latent + volume)


def test_the_energies_of_the_priors_are_those_of_scipy():
    normal, x = PRIORS["normal"](), torch.randn(5, 3)
    close(normal(x), -GAUSSIAN.logpdf(x.numpy(), [0.5, -1.0, 2.0], COVARIANCE))
    log_normal, x = PRIORS["log-normal"](), torch.rand(5, 3) * 4
    logpdf = scipy.stats.lognorm.logpdf
    close(log_normal(x), -logpdf(x.numpy(), [0.3, 1, 0.6], scale=np.exp([0.5, -1, 2])).sum(1))


def test_a_log_normal_law_excludes_what_is_not_positive():
    prior = PRIORS["log-normal"]()
    x = torch.tensor([[1.0, 1, 1], [1, 0, 1], [-1, 1, 1]])
    value, gradient = prior.value_and_grad(x)
    assert value.isfinite().tolist() == [True, False, False]
    assert (value[1:] == math.inf).all()
    assert gradient.isfinite().all()
    assert prior.to_normal(x).isfinite().all()


@pytest.mark.parametrize("name", PRIORS)
def test_samples_of_a_prior_have_its_moments_and_type(name):
    prior = PRIORS[name]()
    u = prior.to_normal(prior.sample(20_000))
    assert u.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert (u.T.cov() - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / 20_000)
    assert prior.float().sample(2).dtype == torch.float32


def test_priors_refuse_what_is_no_law():
    zeros = torch.zeros(2)
    for mean, covariance in [
        (zeros, torch.eye(3)),
        (zeros, -torch.eye(2)),
        (zeros, torch.tensor([[1.0, 0.5], [0, 1]])),
    ]:
        with pytest.raises(InputError):
            Normal(mean, covariance)
    for scale in (torch.ones(3), zeros, torch.tensor([1, math.inf]), torch.tensor([1, math.nan])):
        with pytest.raises(InputError):
            LogNormal(zeros, scale)


# Likelihoods.


@pytest.mark.parametrize(
    ("name", "theta", "half"),
    [("gaussian_mixture", [1.0, -2.0], 6.0), ("two_moons", [0.3, -0.6], 0.2)],
)
def test_the_density_of_two_data_integrates_to_one(folder, name, theta, half):
    this, theta = task(name, folder), torch.tensor([theta])
    centre = theta[0]
    if name == "two_moons":
        centre = torch.tensor([0.25 - 0.3 / math.sqrt(2), -0.9 / math.sqrt(2)])
    # Midpoints, and a grid that the edge of the moon halves.
    line = (torch.arange(1200) + 0.5) / 600 - 1
    y = centre + half * torch.cartesian_prod(line, line)
    density = (-this.likelihood(theta.expand(len(y), -1), y)).exp()
    assert float(density.sum()) * (half / 600) ** 2 == pytest.approx(1, abs=1e-4)


def test_gaussian_likelihoods_are_those_of_scipy(folder):
    slcp = task("slcp", folder)
    theta, y = slcp.prior.sample(20), 3 * torch.randn(20, 8)
    expected = []
    for t, points in zip(theta.numpy(), y.numpy(), strict=True):
        a, b, rho = t[2] ** 2, t[3] ** 2, np.tanh(t[4])
        covariance = np.array([[a * a, rho * a * b], [rho * a * b, b * b]]) + 1e-6 * np.eye(2)
        expected.append(-GAUSSIAN.logpdf(points.reshape(4, 2), t[:2], covariance).sum())
    close(slcp.likelihood(theta, y), expected, rtol=1e-6, atol=1e-6)
    for name in ("gaussian_linear", "gaussian_linear_uniform"):
        this = task(name, folder)
        theta, y = this.prior.sample(20), torch.randn(20, 10)
        expected = -scipy.stats.norm.logpdf(y.numpy(), theta.numpy(), math.sqrt(0.1)).sum(1)
        close(this.likelihood(theta, y), expected)


def test_spikes_are_bernoulli_and_their_statistics_sufficient(folder):
    this = task("bernoulli_glm", folder)
    design = np.load(folder / "bernoulli_glm" / "design_matrix.npy").astype(float)
    raw = folder / "bernoulli_glm" / "num_observation_1" / "observation_raw.csv"
    spikes = np.loadtxt(raw, delimiter=",", skiprows=1)
    y, _, _ = read_observation(folder, "bernoulli_glm", 1)
    close(y, (spikes @ design)[None], rtol=1e-5, atol=1e-5)
    theta = this.prior.sample(20)
    chance = 1 / (1 + np.exp(-theta.numpy() @ design.T))
    expected = -scipy.stats.bernoulli.logpmf(spikes, chance).sum(1)
    # The spikes in the files are exact, the statistics beside them rounded.
    close(this.likelihood(theta, torch.tensor(spikes @ design)[None]), expected)


def solution(name, theta):
    """The model of a task by a solver of SciPy, in the populations themselves."""
    times = np.arange(10) * (17.0 if name == "sir" else 2.1)
    if name == "sir":
        beta, gamma = theta
        start = [1 - 1e-6, 1e-6]

        def slope(_, u):
            return [-beta * u[0] * u[1], beta * u[0] * u[1] - gamma * u[1]]
    else:
        alpha, beta, gamma, delta = theta
        start = [30.0, 1.0]

        def slope(_, u):
            return [alpha * u[0] - beta * u[0] * u[1], delta * u[0] * u[1] - gamma * u[1]]

    solved = scipy.integrate.solve_ivp(
        slope, (0, times[-1]), start, method="LSODA", t_eval=times, rtol=1e-10, atol=1e-14
    )
    return solved.y[1] if name == "sir" else solved.y.reshape(-1)


@pytest.mark.parametrize("name", sorted(ODES))
def test_the_differential_equations_are_solved_and_their_laws_those_of_scipy(folder, name):
    this = task(name, folder)
    y, truth, _ = read_observation(folder, name, 1)
    theta = torch.cat([truth, this.prior.sample(6)])
    expected = []
    for row in theta.numpy():
        value = solution(name, row)
        if name == "sir":
            expected.append(-scipy.stats.binom.logpmf(y[0].numpy(), 1000, value).sum())
        else:
            expected.append(-scipy.stats.lognorm.logpdf(y[0].numpy(), 0.1, scale=value).sum())
    close(this.likelihood(theta, y), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", sorted(ODES))
def test_half_the_step_changes_nothing_and_no_prior_draw_breaks(folder, name, monkeypatch):
    this = task(name, folder)
    y, _, reference = read_observation(folder, name, 4)
    coarse = this.likelihood(reference[:500], y)
    monkeypatch.setattr(sbibm_tasks, "STEPS", 2 * sbibm_tasks.STEPS)
    assert (this.likelihood(reference[:500], y) - coarse).abs().max() < 1e-3
    monkeypatch.undo()
    # Four times as wide as the prior.
    theta = this.prior.from_normal(4 * torch.randn(2000, this.prior.dim))
    data = this.simulate(theta)
    for values in (this.likelihood(theta, y), this.likelihood(theta, data), this.condition(data)):
        assert values.isfinite().all()


def test_populations_follow_the_conserved_quantity():
    rates = torch.tensor([[0.7, 0.1, 0.9, 0.12]]).T
    prey, predators = populations(rates, (30, 1), 2.1)
    level = 0.12 * prey.exp() - 0.9 * prey + 0.1 * predators.exp() - 0.7 * predators
    close(level, level[:, :1].expand_as(level), rtol=1e-6, atol=0)


def test_outside_the_moon_the_energy_is_infinite_and_its_gradient_zero(folder):
    this = task("two_moons", folder)
    theta = torch.zeros(2, 2)
    value, gradient = this.likelihood.value_and_grad(
        theta, torch.tensor([[0.1, 0.0], [0.34, 0.02]])
    )
    assert value[0] == math.inf
    assert value[1].isfinite()
    assert (gradient[0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - ODES))
def test_cheap_gradients_are_those_of_finite_differences(folder, name):
    this = task(name, folder)
    assert this.gradient
    y, _, reference = read_observation(folder, name, 2)
    theta = reference[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: this.likelihood(t, y), theta, eps=1e-7, atol=1e-3)


@pytest.mark.parametrize("name", sorted(ODES))
def test_gradients_behind_an_equation_are_not_called_cheap(folder, name):
    assert not task(name, folder).gradient


# Simulators.


def energy_of_one(this, theta, data):
    """Energies of one parameter for many data; a differential equation is solved once."""
    return -this.likelihood.noise.log_prob(data, this.likelihood.operator(theta))


def other_energies(this, theta, data):
    """Energies of the data under other laws that have their mass where the law of theta has."""
    if this.name == "two_moons":
        # Another moon has another support; a normal law on the middle of this one has not.
        total, difference = theta.sum(), theta[0, 1] - theta[0, 0]
        middle = torch.stack([0.35 - total.abs() / 2**0.5, difference / 2**0.5])
        law = torch.distributions.Normal(middle, torch.tensor([0.006, 0.015]))
        return [-law.log_prob(data).sum(1)]
    # Steps of about half a standard deviation of the likelihood, both ways along each coordinate.
    energies = []
    for unit in torch.eye(this.prior.dim):
        up, down = (
            energy_of_one(this, theta + shift * unit, data[:200]) for shift in (1e-5, -1e-5)
        )
        step = 0.5 * unit / ((up - down) / 2e-5).square().mean().sqrt()
        for shifted in (theta + step, theta - step):
            energies.append(energy_of_one(this, shifted, data))
    return energies


@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_draws_from_the_likelihood(folder, name):
    """For y of p(y | a) the mean of p(y | b) / p(y | a) is one; for data of another a it is not."""
    this, count = task(name, folder), 2000 if name in ODES else 20_000
    _, theta, _ = read_observation(folder, name, 1)

    def scores(truth):
        data = this.simulate(truth.expand(count, -1))
        own = energy_of_one(this, theta, data)
        # Data that the law excludes count as one outlier, not as infinity.
        ratios = (own - torch.stack(other_energies(this, theta, data))).clamp_max(50).exp()
        error = ratios.std(1) / math.sqrt(count)
        return ((ratios.mean(1) - 1) / error).abs(), error

    score, error = scores(theta)
    assert error.max() < 0.1
    assert score.max() < 5
    assert scores(1.1 * theta)[0].max() > 5


# Posteriors.


def laws(name, prior, y, u):
    """Two normalised laws inside the posterior of samples u, as functions for their log-densities."""
    if name != "two_moons":
        mode = u
        if name == "slcp":  # one of the four modes that the signs of two standard deviations make
            mode = u[(u[:, 2] > 0) & (u[:, 3] > 0)]
        if name == "gaussian_mixture":  # its narrow part
            mode = u[((u - u.median(0).values) / u.std(0)).norm(dim=1) < 0.5]
        mean, covariance = mode.mean(0), mode.T.cov()
        normal = torch.distributions.MultivariateNormal
        return [normal(mean, width * covariance).log_prob for width in (0.4, 1)]
    # Small clouds along the ridges of the moons and beside them, far from their ends, where the density jumps.
    theta = prior.from_normal(u)
    right = y[0, 0] - 0.25 + theta.sum(1).abs() / 2**0.5
    upper = y[0, 1] - (theta[:, 1] - theta[:, 0]) / 2**0.5
    radius, middle = torch.hypot(right, upper), torch.atan2(upper, right).abs() < 1.1
    beside = (radius - 0.1).abs()
    clouds = []
    for chosen in (middle & (beside < 0.004), middle & (beside > 0.012)):
        centres = u[chosen][:200]
        std = 0.003 / (2 * torch.exp(-0.5 * centres.square()) / math.sqrt(2 * math.pi))
        kernel = torch.distributions.Independent(torch.distributions.Normal(centres, std), 1)
        mixture = torch.distributions.Categorical(torch.ones(len(centres)))
        clouds.append(torch.distributions.MixtureSameFamily(mixture, kernel).log_prob)
    return clouds


def evidence_gap(this, likelihood, y, reference):
    """The difference of two estimates of log 1 / Z in standard errors, and its standard error.

    For samples of the posterior and any normalised q, the mean of q(theta) / p(theta, y) is 1 / Z. In the
    coordinates where the prior is standard normal, a normal law has its support inside the posterior's.
    """
    u = this.prior.to_normal(reference)
    # The laws are made from one half, and used on the other.
    made, used = u[::2], u[1::2]
    latent = 0.5 * used.square().sum(1) + 0.5 * used.shape[1] * math.log(2 * math.pi)
    joint = -likelihood(reference[1::2], y) - latent
    logs = [law(used) - joint for law in laws(this.name, this.prior, y, made)]
    first, second = ((log - logs[0].max()).exp() for log in logs)
    _, error = mean_and_error(first / first.mean() - second / second.mean())
    return float((first.mean() / second.mean()).log().abs()) / error, error


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_samples_have_the_density_of_the_posterior(folder, name, number):
    this = task(name, folder)
    y, truth, reference = read_observation(folder, name, number)
    assert reference.shape == (10_000, this.prior.dim)
    assert truth.shape == (1, this.prior.dim)
    with torch.no_grad():
        gap, error = evidence_gap(this, this.likelihood, y, reference)
        # Noise of 1.3 times the standard deviation flattens the likelihood so much.
        faulty, _ = evidence_gap(this, (1 / 1.69) * this.likelihood, y, reference)
    assert error < 0.2
    assert gap < 5
    assert faulty > 5


def test_the_moments_of_the_gaussian_posteriors_are_those_of_the_formulas(folder):
    y, _, reference = read_observation(folder, "gaussian_linear", 1)
    z = (reference - y / 2) / math.sqrt(0.05)
    assert z.mean(0).abs().max() < 5 / 100
    assert (z.T.cov() - torch.eye(10)).abs().max() < 5 * math.sqrt(2) / 100
    y, _, reference = read_observation(folder, "gaussian_linear_uniform", 1)
    std, y, samples = math.sqrt(0.1), y[0].numpy(), reference.numpy()
    law = scipy.stats.truncnorm((-1 - y) / std, (1 - y) / std, loc=y, scale=std)
    assert (np.abs(samples.mean(0) - law.mean()) < 5 * law.std() / 100).all()
    assert np.abs(samples.std(0) / law.std() - 1).max() < 0.05


# Interface.


@pytest.mark.parametrize("name", NAMES)
def test_data_have_features_that_tell_them_apart(folder, name):
    this = task(name, folder)
    y = this.simulate(this.prior.sample(200))
    features = this.condition(y)
    observation, _, _ = read_observation(folder, name, 1)
    assert y.shape == features.shape == (200, observation.shape[1])
    assert features.isfinite().all()
    assert len(features.unique(dim=0)) == len(y.unique(dim=0))
    assert this.likelihood(this.prior.sample(7), observation).shape == (7,)


def test_counts_have_different_finite_features(folder):
    counts = torch.arange(1001.0)[:, None]
    features = task("sir", folder).condition(counts)
    assert features.isfinite().all()
    assert (features.diff(dim=0) > 0).all()


def test_bad_inputs_are_named(tmp_path):
    with pytest.raises(InputError, match="two_moons"):
        task("three_moons", tmp_path)
    with pytest.raises(InputError, match="design_matrix"):
        task("bernoulli_glm", tmp_path)
    with pytest.raises(InputError, match="num_observation_11"):
        read_observation(tmp_path, "sir", 11)
    with pytest.raises(InputError, match="measurement"):
        task("two_moons", tmp_path).likelihood(torch.zeros(1, 2))
