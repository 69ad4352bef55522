"""Samples of images against closed forms: with a normal prior the posterior is normal."""

import pytest
import torch

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.problems.blur import Blur, gaussian_kernel
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.sampling import Mask
from patchflow.reconstruct import langevin, split_gibbs
from patchflow.solution import Samples
from patchflow.uncertainty.image_samples import check_samples, diagnose, summarise

SIDE = 6


class Smooth(Energy):
    """A periodic normal law of images with the mean one half, diagonal for Fourier transforms."""

    def __init__(self, side=SIDE):
        super().__init__()
        k = torch.fft.fftfreq(side)
        self.side = side
        self.register_buffer("variances", 0.04 / (1 + 40 * (k[:, None] ** 2 + k[None] ** 2)))

    def filtered(self, x, factors):
        return torch.fft.ifft2(torch.fft.fft2(x) * factors.to(x)).real

    def forward(self, x, condition=None):
        d = x - 0.5
        return 0.5 * (d * self.filtered(d, 1 / self.variances)).flatten(1).sum(1)

    def denoise(self, x, std):
        return 0.5 + self.filtered(x - 0.5, self.variances / (self.variances + std**2))

    def draw(self, count):
        return 0.5 + self.filtered(
            torch.randn(count, 1, self.side, self.side), self.variances.sqrt()
        )


def problem(name, side=SIDE):
    if name == "mask":
        mask = torch.rand(side, side, generator=torch.Generator().manual_seed(1)) < 0.4
        return GaussianLikelihood(Mask(mask), 0.02)
    kernel = gaussian_kernel(5, 1.0)
    return GaussianLikelihood(Blur(kernel, (side, side), "periodic", stride=2), 0.02)


def posterior(prior, likelihood):
    """A measurement of a draw of the prior, and the mean and the covariance of the posterior."""
    torch.manual_seed(2)
    basis = torch.eye(prior.side**2).view(-1, 1, prior.side, prior.side)
    inverse = prior.filtered(basis, 1 / prior.variances).flatten(1)
    matrix = likelihood.operator(basis).flatten(1).T
    y = likelihood.simulate(prior.draw(1))
    covariance = torch.linalg.inv(inverse + matrix.T @ matrix / likelihood.std**2)
    right = inverse.sum(1) * 0.5 + matrix.T @ y.flatten() / likelihood.std**2
    return y, (covariance @ right).view(1, 1, prior.side, prior.side), covariance


def scores(samples, mean, covariance):
    """Along the axes of the covariance, mean and mean square in standard errors between the chains."""
    values, vectors = torch.linalg.eigh(covariance)
    u = (samples.x.double() - mean).flatten(2) @ vectors / values.sqrt()
    for moment, wanted in ((u, 0.0), (u.square(), 1.0)):
        of_chains = moment.mean(1)
        yield (of_chains.mean(0) - wanted) / of_chains.std(0) * len(of_chains) ** 0.5


def walk(name, **settings):
    prior, likelihood = Smooth(), problem(name)
    y, mean, covariance = posterior(prior, likelihood)
    torch.manual_seed(0)
    found = langevin.sample(
        likelihood, prior, y, mean, draws=800, chains=100, burn_in=60, thin=5, **settings
    )
    return found, mean, covariance


@pytest.mark.parametrize("name", ["mask", "blur"])
def test_adjusted_langevin_steps_draw_from_the_posterior(name):
    found, mean, covariance = walk(name)
    assert found.x.shape == (100, 8, 1, SIDE, SIDE)
    assert 0.4 < found.acceptance < 0.75
    for deviations in scores(found, mean, covariance):
        assert float(deviations.abs().max()) < 4.5


def test_unadjusted_steps_of_the_same_size_are_seen_to_be_biased():
    found, mean, covariance = walk("mask", adjusted=False, step=0.8)
    assert found.acceptance is None
    _, squares = scores(found, mean, covariance)
    assert float(squares.max()) > 8


def test_short_unadjusted_steps_are_nearly_right():
    found, mean, covariance = walk("mask", adjusted=False, step=0.1)
    u = (found.x.double() - mean).flatten(2).flatten(0, 1)
    assert float(u.var(0).mean() / covariance.diagonal().mean()) == pytest.approx(1, abs=0.15)


def gibbs(name, draws=600, denoise=None):
    prior, likelihood = Smooth(), problem(name)
    y, mean, covariance = posterior(prior, likelihood)
    torch.manual_seed(0)
    found = split_gibbs.sample(
        likelihood,
        prior.denoise if denoise is None else denoise,
        y,
        likelihood.operator.initial(y),
        levels=split_gibbs.noise_levels(likelihood, (0.003, 0.5)),
        draws=draws,
        batch=draws,
    )
    images = found.images.flatten(1)
    bias = float((images.mean(0) - mean.flatten()).square().mean() / covariance.diagonal().mean())
    return bias, float(images.var(0).mean() / covariance.diagonal().mean())


@pytest.mark.parametrize("name", ["mask", "blur"])
def test_split_gibbs_is_near_the_posterior(name):
    bias, variance = gibbs(name)
    # The standard error of the ratio of variances is at most sqrt(2 / 600) = .06 for one direction alone.
    assert bias < 0.03
    assert 0.85 < variance < 1.15


def test_a_denoiser_that_takes_away_too_much_would_be_seen():
    prior = Smooth()
    _, variance = gibbs("mask", denoise=lambda x, std: prior.denoise(x, 3 * std))
    assert variance < 0.7


def calibrated(spread, draws=32):
    """Samples of a posterior whose truth is one more draw, scattered more or less than they should be."""
    torch.manual_seed(0)
    mean = torch.rand(1, 1, 96, 96)
    truth = mean + 0.1 * torch.randn_like(mean)
    images = mean + spread * 0.1 * torch.randn(draws, 1, 96, 96)
    return check_samples(Samples(images[:, None], None, None, None), truth, mean + 0.02)


def test_checks_pass_right_samples_and_see_wrong_ones():
    right = calibrated(1.0)
    assert right.passed
    assert right.ratio == pytest.approx(2 / (1 + 1 / 32), abs=0.03)
    assert right.explain().startswith("The sampler passed")
    few = calibrated(1.0, draws=8)
    assert few.passed
    assert few.ratio == pytest.approx(2 / (1 + 1 / 8), abs=0.03)
    assert calibrated(1.0).accepted == pytest.approx((1.8, 2.2))
    assert few.accepted == pytest.approx((1.65, 2.017), abs=1e-3)
    narrow = calibrated(0.4)
    assert not narrow.passed
    assert "overconfident" in narrow.explain()
    wide = calibrated(2.0)
    assert not wide.passed
    assert "too uncertain" in wide.explain()


def test_summaries_are_those_of_the_samples():
    x = torch.linspace(0, 1, 101).view(101, 1, 1, 1, 1).expand(101, 1, 2, 3, 4)
    mean, std, low, high = summarise(Samples(x, None, None, None), level=0.8)
    assert mean.shape == std.shape == low.shape == high.shape == (1, 2, 3, 4)
    for values, wanted in ((mean, 0.5), (std, 0.2930), (low, 0.1), (high, 0.9)):
        assert torch.allclose(values, torch.tensor(wanted), atol=1e-3)


def test_chains_that_have_not_met_are_seen():
    pytest.importorskip("arviz")
    torch.manual_seed(0)
    x = torch.randn(4, 50, 1, 8, 8)
    energies = torch.randn(4, 50)
    (met,) = diagnose(Samples(x, energies, 0.5, 0.1))
    assert met.startswith("The chains have met")
    apart = Samples(x + torch.arange(4).view(4, 1, 1, 1, 1), energies, 0.5, 0.1)
    (told,) = diagnose(apart)
    assert told.startswith("Warning: the chains have not met")
    assert "--steps" in told
    assert diagnose(Samples(x, None, None, None)) == []


def test_bad_input_is_refused():
    prior, likelihood = Smooth(), problem("mask")
    y = torch.rand(1, 1, SIDE, SIDE)
    with pytest.raises(InputError, match="multiple of the chains"):
        langevin.sample(likelihood, prior, y, y, draws=10, chains=4)
    with pytest.raises(InputError, match="sample one"):
        langevin.sample(likelihood, prior, y.expand(2, -1, -1, -1), y)
    with pytest.raises(InputError, match="step size"):
        langevin.sample(likelihood, prior, y, y, step=0.0)
    with pytest.raises(InputError, match="--high 0.5"):
        split_gibbs.noise_levels(likelihood, (0.0, 0.01))
    with pytest.raises(InputError, match="levels"):
        split_gibbs.sample(likelihood, prior.denoise, y, y, levels=[])
    with pytest.raises(InputError, match="squares"):
        check_samples(Samples(y.expand(9, -1, -1, -1)[:, None], None, None, None), y, y)
    with pytest.raises(InputError, match="two samples"):
        summarise(Samples(y[None], None, None, None))


def test_values_that_are_not_finite_stop():
    likelihood = problem("mask")
    y = torch.rand(1, 1, SIDE, SIDE)
    with pytest.raises(NumericalError, match="not finite"):
        split_gibbs.sample(likelihood, lambda x, s: x / 0, y, y, levels=[0.1])

    class Broken(Smooth):
        def forward(self, x, condition=None):
            return super().forward(x) / 0

    with pytest.raises(NumericalError, match="smaller step"):
        langevin.sample(likelihood, Broken(), y, y, draws=4, thin=1, burn_in=0)
