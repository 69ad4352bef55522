"""Mixtures on patches against torch.distributions and autograd, and their fit against scikit-learn's."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import patchflow as pf
from patchflow.errors import InputError
from patchflow.numerics import quadratic
from patchflow.priors.expectation_maximization import MixtureFit, fit_mixture
from patchflow.priors.mixture_search import SearchedMixture
from patchflow.priors.patch_mixture import PatchMixture, mean_free_basis

DIM, COUNT = 5, 3


def parameters(dim=DIM, count=COUNT, spread=1.0):
    factors = torch.randn(count, dim, dim) / dim**0.5
    covariances = factors @ factors.mT + 0.05 * torch.eye(dim)
    return torch.rand(count) + 0.2, spread * torch.randn(count, dim), covariances


def oracle(weights, means, covariances):
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def test_features_hold_quadratic_functions():
    hessian, slope, constant = torch.randn(4, DIM, DIM), torch.randn(4, DIM), torch.randn(4)
    hessian = hessian + hessian.mT
    z = torch.randn(7, DIM)
    expected = 0.5 * torch.einsum("ni,kij,nj->kn", z, hessian, z) + slope @ z.T + constant[:, None]
    theta = quadratic.coefficients(hessian, slope, constant)
    assert theta.shape[1] == quadratic.feature_count(DIM)
    torch.testing.assert_close(theta @ quadratic.features(z.T), expected)


def test_summed_features_hold_moments():
    z, weights = torch.randn(9, DIM), torch.rand(2, 9)
    total, first, second = quadratic.moments(weights @ quadratic.features(z.T).T)
    torch.testing.assert_close(total, weights.sum(1))
    torch.testing.assert_close(first, weights @ z)
    torch.testing.assert_close(second, torch.einsum("kn,ni,nj->kij", weights, z, z))


def test_slopes_are_pulled_back_as_by_autograd():
    z = torch.randn(DIM, 6, requires_grad=True)
    slope = torch.randn(quadratic.feature_count(DIM), 6)
    i, j = torch.triu_indices(DIM, DIM)
    phi = torch.cat((torch.ones(1, 6), z, z[i] * z[j]))
    (expected,) = torch.autograd.grad((phi * slope).sum(), z)
    torch.testing.assert_close(quadratic.pull_back(z.detach(), slope), expected)


def test_energy_and_gradient_are_those_of_the_density():
    weights, means, covariances = parameters()
    mixture = PatchMixture(weights, means, covariances)
    x = torch.randn(5000, DIM).requires_grad_(True)  # more than one chunk
    expected = -oracle(weights, means, covariances).log_prob(x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    value, gradient = mixture.value_and_grad(x.detach())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(mixture.log_joint(x.detach()).logsumexp(1), -value)


def test_single_precision_suffices_for_thin_components():
    """As of patches: half of the directions are ten thousand times thinner than the rest."""
    weights, means, covariances = parameters()
    scales = torch.tensor([1.0, 1.0, 1e-2, 1e-4, 1e-4])
    covariances = scales[:, None] * covariances * scales
    exact = PatchMixture(weights, 0.3 + means * scales, covariances)
    single = PatchMixture(weights.float(), (0.3 + means * scales).float(), covariances.float())
    x = exact.sample(1000)
    # Rounding x itself costs 3e-8 / 1e-4 standard deviations.
    error = (single(x.float()).double() - exact(x.float().double())).abs()
    assert error.max() < 0.02


def test_without_the_mean_brightness_does_not_count():
    weights, means, covariances = parameters()
    mixture = PatchMixture(weights, means, covariances, remove_mean=True)
    basis = mean_free_basis(DIM + 1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(DIM))
    assert basis.sum(1).abs().max() < 1e-14
    x = torch.randn(20, DIM + 1)
    torch.testing.assert_close(mixture(x), mixture(x + 0.7))
    torch.testing.assert_close(
        mixture(x), -oracle(weights, means, covariances).log_prob(x @ basis.T)
    )
    denoised = mixture.denoise(x, 0.5)
    torch.testing.assert_close(denoised.mean(1), x.mean(1))
    torch.testing.assert_close(mixture.denoise(x + 0.7, 0.5), denoised + 0.7)
    assert mixture.sample(4).shape == (4, DIM + 1)
    assert mixture.sample(4).mean(1).abs().max() < 1e-14


def test_samples_have_the_moments_of_the_mixture():
    weights, means, covariances = parameters()
    x = PatchMixture(weights, means, covariances).sample(20_000)
    law = oracle(weights, means, covariances)
    error = (x.mean(0) - law.mean) / (law.variance / len(x)).sqrt()
    assert error.abs().max() < 4.5
    assert (x.var(0) / law.variance - 1).abs().max() < 0.1


def test_denoising_is_the_wiener_filter_of_the_most_probable_component():
    weights, means, covariances = parameters(spread=3.0)
    mixture = PatchMixture(weights, means, covariances)
    std = 0.7
    x = mixture.sample(50) + std * torch.randn(50, DIM)
    noisy = covariances + std**2 * torch.eye(DIM)
    scores = MultivariateNormal(means, noisy).log_prob(x[:, None]) + weights.log()
    expected = torch.empty_like(x)
    for row, k in enumerate(scores.argmax(1)):
        expected[row] = means[k] + covariances[k] @ torch.linalg.inv(noisy[k]) @ (x[row] - means[k])
    torch.testing.assert_close(mixture.denoise(x, std), expected)
    assert len(set(mixture.blurred(std**2).component(x).tolist())) == COUNT


def test_a_loaded_state_is_used():
    source, target = PatchMixture(*parameters()), PatchMixture(*parameters())
    target.load_state_dict(source.state_dict())
    x = torch.randn(10, DIM)
    torch.testing.assert_close(target(x), source(x))


def test_files_keep_the_mixture(tmp_path):
    prior = pf.epll(size=2, components=3, remove_mean=True, padding=1)
    prior.patch_energy.load_state_dict(PatchMixture(*parameters(3, 3)).state_dict())
    pf.save(tmp_path / "prior.safetensors", prior)
    loaded = pf.load(tmp_path / "prior.safetensors", pf.PatchPrior)
    x = torch.rand(1, 1, 6, 7)
    torch.testing.assert_close(loaded(x), prior(x))


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (torch.ones(2), torch.zeros(3, 2), torch.eye(2).repeat(3, 1, 1), "do not fit"),
        (torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None], "smallest weight"),
        (torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2, 2), "Covariance 0"),
    ],
)
def test_bad_mixtures_are_refused(weights, means, covariances, message):
    with pytest.raises(InputError, match=message):
        PatchMixture(weights, means, covariances)


def test_steps_are_those_of_scikit_learn():
    mixture = pytest.importorskip("sklearn.mixture")
    weights, means, covariances = parameters(spread=2.0)
    points = PatchMixture(weights, means, covariances).sample(3000)
    weights = weights / weights.sum()
    start = MixtureFit(weights, means + 0.3, covariances + 0.2 * torch.eye(DIM), [], False)
    fit = fit_mixture(points, COUNT, floor=1e-12, tolerance=0, max_iterations=4, start=start)
    theirs = mixture.GaussianMixture(
        COUNT,
        reg_covar=0,
        tol=0,
        max_iter=4,
        weights_init=weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.covariances).numpy(),
    )
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(points.numpy())
    torch.testing.assert_close(fit.weights, torch.from_numpy(theirs.weights_))
    torch.testing.assert_close(fit.means, torch.from_numpy(theirs.means_))
    torch.testing.assert_close(fit.covariances, torch.from_numpy(theirs.covariances_))
    assert math.isclose(fit.log_likelihood[-1], theirs.score(points.numpy()), rel_tol=1e-9)


@pytest.mark.parametrize("floor", [1e-9, 0.3])
def test_the_likelihood_never_decreases(floor):
    """Also where the floor is above many eigenvalues, which adding it to the covariances would not guarantee."""
    points = PatchMixture(*parameters(count=8, spread=2.0)).sample(2000)
    fit = fit_mixture(points, 6, floor=floor, tolerance=0, max_iterations=60)
    gains = torch.tensor(fit.log_likelihood).diff()
    assert gains.min() > -1e-12
    assert fit.log_likelihood[-1] > fit.log_likelihood[0]
    assert torch.linalg.eigvalsh(fit.covariances).min() > floor * (1 - 1e-9)
    refit = PatchMixture(fit.weights, fit.means, fit.covariances)
    assert math.isclose(float(-refit(points).mean()), fit.log_likelihood[-1], rel_tol=1e-9)


def test_single_precision_goes_on_in_double_where_rounding_counts():
    """Clipped white patches beside grey ones: a thin component far from the mean of all."""
    white = 1 - 1e-4 * torch.rand(800, 9)
    grey = 0.3 + 0.1 * torch.randn(2000, 1) + 0.02 * torch.randn(2000, 9)
    points = torch.cat((white, grey))
    torch.manual_seed(1)
    double = fit_mixture(points, 8, tolerance=0, max_iterations=80)
    torch.manual_seed(1)
    single = fit_mixture(points.float(), 8, tolerance=0, max_iterations=80)
    assert single.weights.dtype == torch.float32
    assert torch.tensor(single.log_likelihood).diff().min() > -1e-3
    assert single.log_likelihood[-1] > double.log_likelihood[-1] - 0.05


def test_a_mixture_is_recovered():
    weights, _, covariances = parameters()
    means = torch.tensor([-6.0, 0.0, 6.0])[:, None] * torch.ones(DIM)
    points = PatchMixture(weights, means, covariances).sample(6000)
    fit = fit_mixture(points, COUNT, tolerance=1e-8)
    order = fit.means[:, 0].argsort()
    assert fit.converged
    assert (fit.means[order] - means).abs().max() < 0.15
    assert (fit.weights[order] - weights / weights.sum()).abs().max() < 0.03
    assert (fit.covariances[order] - covariances).abs().max() < 0.2


def test_constant_directions_are_given_the_floor():
    points = torch.randn(500, 3)
    points[:, 2] = 0.25
    fit = fit_mixture(points, 2, floor=1e-4)
    torch.testing.assert_close(fit.means[:, 2], torch.full((2,), 0.25))
    torch.testing.assert_close(fit.covariances[:, 2, 2], torch.full((2,), 1e-4))


def test_empty_components_are_left_out():
    points = torch.randn(500, 3)
    far = torch.tensor([[0.0, 0, 0], [1e3, 0, 0]])
    start = MixtureFit(torch.tensor([0.9, 0.1]), far, torch.eye(3).repeat(2, 1, 1), [], False)
    fit = fit_mixture(points, 2, start=start)
    assert len(fit.weights) == 1
    torch.testing.assert_close(fit.weights, torch.ones(1))
    torch.testing.assert_close(fit.means[0], points.mean(0))


@pytest.mark.parametrize(
    ("points", "components", "floor", "message"),
    [
        (torch.randn(3, 2), 3, 1e-6, "3 points cannot place 3 components"),
        (torch.ones(50, 2), 2, 1e-6, "only 1 different points"),
        (torch.full((50, 2), math.nan), 2, 1e-6, "not finite"),
        (torch.randn(50, 2), 0, 1e-6, "0 components"),
        (torch.randn(50, 2), 2, 0.0, "the floor 0.0"),
    ],
)
def test_bad_data_are_refused(points, components, floor, message):
    with pytest.raises(InputError, match=message):
        fit_mixture(points, components, floor=floor)


def test_search_in_groups_finds_nearly_the_best():
    mixture = PatchMixture(*parameters(count=30, spread=2.0))
    x = mixture.sample(2000)
    exact = mixture.component(x)
    searched = SearchedMixture(mixture, 6)
    found = searched.component(x)
    assert searched.owner.bincount().max() <= 5
    assert (found == exact).double().mean() > 0.6
    joint = mixture.log_joint(x)
    missed = joint.max(1).values - joint.gather(1, found[:, None])[:, 0]
    at_random = joint.max(1).values - joint[:, 0]
    assert missed.mean() < 0.05 * at_random.mean()
    # Within its group the search is exact.
    members = torch.where(searched.owner == searched.owner[found][:, None], joint, -math.inf)
    assert torch.equal(members.argmax(1), found)
    torch.testing.assert_close(searched(x), mixture(x))
    noisy = searched.blurred(0.3)
    assert torch.equal(noisy.owner, searched.owner)
    torch.testing.assert_close(noisy.covariances, mixture.blurred(0.3).covariances)


@pytest.mark.parametrize("groups", [1, 4])
def test_search_in_one_group_or_in_single_ones_is_exact(groups):
    mixture = PatchMixture(*parameters(count=4))
    x = mixture.sample(300)
    assert torch.equal(SearchedMixture(mixture, groups).component(x), mixture.component(x))
    with pytest.raises(InputError, match="9 groups for 4"):
        SearchedMixture(mixture, 9)
