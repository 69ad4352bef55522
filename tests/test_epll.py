"""EPLL against closed forms: one component is a Gaussian prior, whose posterior mean is known."""

import math

import pytest
import torch

import patchflow as pf
from patchflow.errors import InputError, NumericalError
from patchflow.numerics.patches import add_patches, extract_patches
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity
from patchflow.reconstruct import epll, variational

SIZE = 3


def mixture(count=1, remove_mean=False):
    dim = SIZE**2 - remove_mean
    factors = torch.randn(count, dim, dim) / dim**0.5
    covariances = factors @ factors.mT + 0.1 * torch.eye(dim)
    return PatchMixture(
        torch.rand(count) + 0.2, torch.randn(count, dim), covariances, remove_mean=remove_mean
    )


def prior_of(energy, padding=0):
    return pf.PatchPrior(energy, SIZE, padding=padding)


def test_splitting_reaches_the_minimum_of_a_gaussian_patch():
    """A 3 x 3 image is one patch: the minimum over z is Gaussian with covariance S + s^2."""
    energy, std, weight, level = mixture(), 0.5, 0.7, 0.4
    y = torch.randn(1, 1, SIZE, SIZE)
    solution = epll.reconstruct(
        GaussianLikelihood(Identity((SIZE, SIZE)), std),
        prior_of(energy),
        y,
        y,
        weight=weight,
        levels=[level] * 300,
        stride=1,
    )
    precision = weight * torch.linalg.inv(energy.covariances[0] + level**2 * torch.eye(9))
    system = torch.eye(9) / std**2 + precision
    x = torch.linalg.solve(system, y.flatten() / std**2 + precision @ energy.means[0])
    torch.testing.assert_close(solution.x.view(1, 9), energy.denoise(x[None], level))
    assert solution.steps == 300


@pytest.mark.parametrize("padding", [0, 2])
def test_denoised_patches_are_averaged(padding):
    energy = mixture(3)
    x = torch.randn(2, 1, 8, 7)
    filtered = epll.filter_patches(x, energy, prior_of(energy, padding), 0.6)
    for image, result in zip(x, filtered, strict=True):
        image = torch.nn.functional.pad(image, [padding] * 4, mode="reflect")
        sums, counts = torch.zeros_like(image), torch.zeros_like(image)
        patches = extract_patches(image, SIZE)
        add_patches(sums, energy.denoise(patches, 0.6), SIZE)
        add_patches(counts, torch.ones_like(patches), SIZE)
        rows, columns = slice(padding, padding + 8), slice(padding, padding + 7)
        torch.testing.assert_close(result, (sums / counts)[:, rows, columns])


def test_a_phase_of_the_grid_leaves_other_pixels():
    energy = mixture(2)
    x = torch.randn(1, 1, 8, 8)
    filtered = epll.filter_patches(x, energy, prior_of(energy), 0.6, 3, (1, 2))
    covered = torch.zeros(8, 8, dtype=torch.bool)
    covered[1:7, 2:8] = True
    assert torch.equal(filtered[0, 0][~covered], x[0, 0][~covered])
    assert (filtered != x)[0, 0][covered].all()


@pytest.mark.parametrize("remove_mean", [False, True])
def test_denoising_beats_the_noise_and_the_mean(remove_mean):
    """A picture of waves, learned from one half, denoised on the other."""
    i, j = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    image = (0.5 + 0.25 * torch.sin(0.7 * i) + 0.25 * torch.cos(0.4 * j))[None, None]
    learned, held = image[..., :48], image[..., 48:]
    prior, record = pf.learn_epll([learned], size=4, components=5, remove_mean=remove_mean)
    assert record.log_likelihood[-1] > record.log_likelihood[0]
    likelihood = GaussianLikelihood(Identity((64, 48)), 0.1)
    y = likelihood.simulate(held)
    x = epll.reconstruct(likelihood, prior, y, y, weight=1.0).x
    published = epll.reconstruct(
        likelihood, prior, y, y, weight=1.0, levels=epll.published_levels(0.1), stride=1
    ).x
    for result in (x, published):
        assert (result - held).square().mean() < 0.1 * (y - held).square().mean()


def test_maps_show_components_and_surprise():
    energy = mixture(4)
    x = torch.randn(1, 1, 9, 8)
    chosen = epll.component_map(x, prior_of(energy))
    assert chosen.shape == (1, 1, 7, 6)
    joint = energy.log_joint(extract_patches(x[0], SIZE))
    assert torch.equal(chosen.flatten().long(), joint.argmax(1))
    assert prior_of(energy).nll_map(x).shape == (1, 1, 9, 8)


def test_published_levels_are_those_of_zoran_and_weiss():
    betas = [level**-2 * 0.2**2 for level in epll.published_levels(0.2)]
    torch.testing.assert_close(torch.tensor(betas), torch.tensor([1.0, 4, 8, 16, 32]))


def test_bad_input_is_refused():
    likelihood, x = GaussianLikelihood(Identity((8, 8)), 0.1), torch.rand(1, 1, 8, 8)
    prior = prior_of(mixture())
    with pytest.raises(InputError, match="needs a Gaussian mixture"):
        epll.reconstruct(likelihood, pf.patch_nr(size=3, hidden=4), x, x)
    with pytest.raises(InputError, match="weight 0"):
        epll.reconstruct(likelihood, prior, x, x, weight=0.0)
    with pytest.raises(InputError, match="at least one level"):
        epll.reconstruct(likelihood, prior, x, x, levels=[])
    with pytest.raises(InputError, match="3 channels"):
        epll.reconstruct(likelihood, prior, x, x.expand(1, 3, 8, 8))
    with pytest.raises(NumericalError, match="not finite"):
        epll.reconstruct(likelihood, prior, x * math.nan, x, levels=[0.1])
    with pytest.raises(InputError, match="no training images"):
        pf.learn_epll([])


@pytest.mark.parametrize("padding", [0, 2])
def test_a_smoothed_prior_takes_its_noise_away(padding):
    """Tweedie's formula of noisy patches of a Gaussian is its posterior mean, known in closed form."""
    energy, noise = mixture(), 0.6
    x = torch.randn(2, 1, 8, 7)
    smooth = pf.PatchPrior(energy.blurred(noise**2), SIZE, padding=padding, smoothing=noise)
    expected = epll.filter_patches(x, energy, prior_of(energy, padding), noise)
    torch.testing.assert_close(smooth.denoise(x), expected)
    assert not torch.allclose(smooth.denoise(x), x, atol=0.1)
    assert prior_of(energy).denoise(x) is x
    # The reconstruction is what this makes of the minimum.
    likelihood = GaussianLikelihood(Identity((8, 7)), 0.5)
    options = {"weight": 1.0, "method": "lbfgs", "steps": 300}
    last = variational.reconstruct(
        likelihood, pf.PatchPrior(smooth.patch_energy, SIZE, padding=padding), x, x, **options
    )
    found = variational.reconstruct(likelihood, smooth, x, x, **options)
    torch.testing.assert_close(found.x, smooth.denoise(last.x))
