"""Energies of the problems and simple priors: gradients, normalisation, proximal maps, algebra, messages."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from patchflow.energy import Sum
from patchflow.errors import InputError
from patchflow.priors.gaussian import Gaussian, StandardNormal
from patchflow.priors.variation import TotalVariation, image_gradient, minus_divergence
from patchflow.problems.blur import Blur, downsample
from patchflow.problems.likelihood import GaussianLikelihood, GaussianNoise, Likelihood
from patchflow.problems.operator import Identity
from patchflow.problems.sampling import Mask

DOUBLE = torch.float64
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE)
COVARIANCE = torch.tensor([[2.0, 0.6, 0.1], [0.6, 1.0, -0.3], [0.1, -0.3, 0.5]], dtype=DOUBLE)
IMAGE = (1, 8, 8)


def random_mask():
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) < 0.6


# Name: the energy, the shape of an event, the shape of a measurement.
ENERGIES = {
    "standard-normal": (lambda: StandardNormal(3), (3,), None),
    "gaussian": (lambda: Gaussian(MEAN, COVARIANCE), (3,), None),
    "variation": (lambda: TotalVariation(), IMAGE, None),
    "variation-anisotropic": (lambda: TotalVariation(isotropic=False), IMAGE, None),
    "likelihood": (
        lambda: Likelihood(lambda x: x[:, :2].sin() ** 2, GaussianNoise(0.3)),
        (3,),
        (2,),
    ),
    "denoising": (lambda: GaussianLikelihood(Identity((8, 8)), 0.2), IMAGE, IMAGE),
    "deblurring": (
        lambda: GaussianLikelihood(Blur(torch.rand(3, 3, dtype=DOUBLE), (8, 8)), 0.2),
        IMAGE,
        IMAGE,
    ),
    "super-resolution": (
        lambda: GaussianLikelihood(downsample((8, 8), 2, kernel_size=4), 0.2),
        IMAGE,
        (1, 4, 4),
    ),
    "inpainting": (lambda: GaussianLikelihood(Mask(random_mask()), 0.2), IMAGE, IMAGE),
}
PROXIMABLE = ["denoising", "deblurring", "super-resolution", "inpainting"]


def setting(name, batch=2):
    make, event, measurement = ENERGIES[name]
    x = torch.randn(batch, *event, dtype=DOUBLE)
    y = None if measurement is None else torch.randn(batch, *measurement, dtype=DOUBLE)
    return make(), x, y


@pytest.mark.parametrize("name", ENERGIES)
def test_gradient(name):
    energy, x, y = setting(name)
    value, gradient = energy.value_and_grad(x, y)
    assert value.shape == (2,)
    direction = torch.randn_like(x)
    h = 1e-6
    numeric = (energy(x + h * direction, y) - energy(x - h * direction, y)) / (2 * h)
    exact = (gradient * direction).flatten(1).sum(1)
    assert torch.allclose(numeric, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ENERGIES)
def test_batch_entries_are_separate(name):
    energy, x, y = setting(name)
    both = energy(x, y)
    alone = [energy(x[k : k + 1], None if y is None else y[k : k + 1]) for k in range(2)]
    assert torch.allclose(both, torch.cat(alone))


@pytest.mark.parametrize("name", ENERGIES)
def test_algebra(name):
    energy, x, y = setting(name)
    total = 2 * energy + (energy + 0.5 * energy)
    assert isinstance(total, Sum)
    assert len(total.terms) == 3
    assert torch.allclose(total(x, y), 3.5 * energy(x, y))


def test_noise_integrates_to_one():
    noise = GaussianNoise(0.3)
    line = torch.linspace(-4, 4, 801, dtype=DOUBLE)
    b = torch.cartesian_prod(line, line)
    a = torch.tensor([[0.4, -0.7]], dtype=DOUBLE)
    mass = noise.log_prob(b, a).exp().sum() * (line[1] - line[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=1e-9)


def test_noise_draws_what_it_says():
    noise, a = GaussianNoise(0.3), torch.zeros(20000, 1, dtype=DOUBLE)
    b, log_prob = noise.draw(a + 2)
    assert torch.equal(log_prob, noise.log_prob(b, a + 2))
    assert scipy.stats.kstest(b[:, 0].numpy(), scipy.stats.norm(2, 0.3).cdf).pvalue > 1e-3


def test_likelihood_is_the_noise_at_the_operator():
    likelihood, x, y = setting("super-resolution")
    expected = (
        -scipy.stats.norm(likelihood.operator(x).numpy(), 0.2).logpdf(y.numpy()).sum((1, 2, 3))
    )
    assert np.allclose(likelihood(x, y).numpy(), expected)
    residual = likelihood.simulate(x.expand(2, *IMAGE)) - likelihood.operator(x)
    assert 0.1 < float(residual.std()) < 0.3


def test_gaussians_against_scipy():
    x = torch.randn(5, 3, dtype=DOUBLE)
    law = scipy.stats.multivariate_normal(MEAN.numpy(), COVARIANCE.numpy())
    assert np.allclose(Gaussian(MEAN, COVARIANCE)(x).numpy(), -law.logpdf(x.numpy()))
    standard = scipy.stats.multivariate_normal(np.zeros(3))
    assert np.allclose(StandardNormal(3)(x).numpy(), -standard.logpdf(x.numpy()))


@pytest.mark.parametrize("name", ["standard-normal", "gaussian"])
def test_samples(name):
    density = ENERGIES[name][0]()
    x = density.sample(40000)
    mean, covariance = (MEAN, COVARIANCE) if name == "gaussian" else (torch.zeros(3), torch.eye(3))
    scale = covariance.diagonal().max()
    assert (x.mean(0) - mean).abs().max() < 5 * (scale / 40000) ** 0.5
    assert (torch.cov(x.T) - covariance).abs().max() < 8 * scale / 40000**0.5


@pytest.mark.parametrize("name", PROXIMABLE)
@pytest.mark.parametrize("step", [0.01, 1.0])
def test_prox(name, step):
    energy, v, y = setting(name, batch=1)

    def objective(flat):
        x = torch.from_numpy(flat).view_as(v)
        value, gradient = energy.value_and_grad(x, y)
        value = value + (x - v).square().sum() / (2 * step)
        return float(value), (gradient + (x - v) / step).flatten().numpy()

    solved = scipy.optimize.minimize(
        objective, v.flatten().numpy(), jac=True, method="L-BFGS-B",
        options={"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-8},
    )  # fmt: skip
    x = energy.prox(v, step, y)
    assert np.abs(x.flatten().numpy() - solved.x).max() < 1e-5


def test_variation_of_known_images():
    step = torch.zeros(1, 1, 6, 5, dtype=DOUBLE)
    step[..., 2:] = 3
    ramp = torch.arange(4.0, dtype=DOUBLE)[:, None] + torch.arange(4.0, dtype=DOUBLE)[None]
    assert float(TotalVariation()(step)) == 18
    # Nine pixels have the gradient (1, 1); the last row and column have one difference.
    assert float(TotalVariation()(ramp[None, None])) == pytest.approx(9 * 2**0.5 + 6)
    assert float(TotalVariation(isotropic=False)(ramp[None, None])) == 24


def test_variation_is_finite_where_flat():
    value, gradient = TotalVariation().value_and_grad(torch.zeros(1, 1, 4, 4, dtype=DOUBLE))
    assert float(value) == 0
    assert float(gradient.abs().max()) == 0


def test_differences_are_adjoint():
    x, p = torch.randn(2, 3, 7, 5, dtype=DOUBLE), torch.randn(2, 2, 3, 7, 5, dtype=DOUBLE)
    left, right = (image_gradient(x) * p).sum(), (x * minus_divergence(p)).sum()
    assert float(left) == pytest.approx(float(right), abs=1e-12)


@pytest.mark.parametrize("isotropic", [True, False])
def test_dual_projection(isotropic):
    """The support function of the dual ball is total variation, and the projection is the nearest point of it."""
    variation = TotalVariation(isotropic=isotropic)
    p = 2 * torch.randn(2, 1, 1, 7, 5, dtype=DOUBLE)
    projected = variation.project(p, 0.7)
    size = projected.norm(dim=0) if isotropic else projected.abs()
    assert float(size.max()) <= 0.7 + 1e-12
    assert torch.allclose(variation.project(projected, 0.7), projected)
    inside = variation.project(torch.randn_like(p), 0.7)
    assert float(((p - projected) * (inside - projected)).sum()) <= 1e-12
    x = torch.randn(1, 1, 7, 5, dtype=DOUBLE)
    support = (image_gradient(x) * variation.project(1e9 * image_gradient(x), 0.7)).sum()
    assert float(support) == pytest.approx(0.7 * float(variation(x)), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(0.0), "noise level is 0.0 but must be positive"),
        (lambda: GaussianNoise(float("nan")), "noise level is nan"),
        (lambda: GaussianLikelihood(Identity((2, 2)), -1.0), "noise level is -1.0"),
        (
            lambda: GaussianLikelihood(Identity((2, 2)), 1.0)(torch.zeros(1, 1, 2, 2)),
            "needs the measurement",
        ),
        (
            lambda: GaussianLikelihood(Identity((2, 2)), 1.0).prox(torch.zeros(1, 1, 2, 2), 1.0),
            "needs the measurement",
        ),
        (
            lambda: GaussianLikelihood(Identity((2, 2)), 1.0)(
                torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3)
            ),
            r"measurement has the shape \(1, 2, 3\) but the operator gives \(1, 2, 2\)",
        ),
        (
            lambda: GaussianLikelihood(Identity((2, 2)), 1.0).prox(
                torch.zeros(1, 1, 2, 2), 1.0, torch.zeros(1, 1, 3, 2)
            ),
            r"measurement has the shape \(1, 3, 2\) but the operator gives \(1, 2, 2\)",
        ),
        (
            lambda: Gaussian(MEAN, COVARIANCE[:2]),
            r"shape \(3,\) and a covariance of shape \(2, 3\)",
        ),
        (lambda: Gaussian(MEAN, -COVARIANCE), "must be positive definite"),
        (lambda: Gaussian(MEAN, COVARIANCE.tril()), "must be symmetric"),
    ],
)
def test_messages(make, message):
    with pytest.raises(InputError, match=message):
        make()
