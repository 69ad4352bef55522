"""Linear reconstructions against dense linear algebra, and spectra of known processes."""

import math

import numpy as np
import pytest
import torch

import patchflow as pf
from patchflow.reconstruct.wiener import power_spectrum, tikhonov, wiener

SHAPE = (8, 6)
OPERATORS = {
    "denoising": pf.Identity(SHAPE),
    "deblurring": pf.Blur(torch.rand(3, 3, generator=torch.Generator().manual_seed(1)), SHAPE, "periodic"),
    "super-resolution": pf.downsample(SHAPE, 2, kernel_size=4),
}  # fmt: skip
operators = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def dense(operator):
    count = math.prod(SHAPE)
    return operator(torch.eye(count).view(count, 1, *SHAPE)).reshape(count, -1).T.numpy()


def periodic_differences():
    rows, columns = (np.roll(np.eye(side), 1, axis=1) - np.eye(side) for side in SHAPE)
    return np.concatenate([np.kron(rows, np.eye(SHAPE[1])), np.kron(np.eye(SHAPE[0]), columns)])


@operators
def test_tikhonov_solves_the_normal_equations(operator):
    std, weight = 0.1, 7.0
    y = torch.rand(2, 1, *operator.range_shape)
    a, d = dense(operator), periodic_differences()
    hessian = a.T @ a / std**2 + weight * d.T @ d
    expected = np.linalg.solve(hessian, a.T @ y.flatten(1).numpy().T / std**2).T
    found = tikhonov(pf.GaussianLikelihood(operator, std), y, weight=weight)
    assert np.allclose(found.flatten(1).numpy(), expected, atol=1e-10)


@operators
def test_wiener_is_the_mean_of_the_gaussian_posterior(operator):
    """The covariance from the spectrum by an explicit discrete Fourier transform, the mean with a huge variance."""
    std, count = 0.2, math.prod(SHAPE)
    noise = torch.rand(SHAPE)
    spectrum = torch.fft.rfft2(noise).abs().square() + 0.01
    full = np.abs(np.fft.fft2(noise.numpy())) ** 2 + 0.01
    full[0, 0] = 1e9
    transform = np.kron(np.fft.fft(np.eye(SHAPE[0])), np.fft.fft(np.eye(SHAPE[1])))
    covariance = (transform.conj().T @ np.diag(full.ravel()) @ transform).real / count
    y = torch.rand(1, 2, *operator.range_shape)
    a = dense(operator)
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + std**2 * np.eye(len(a)))
    found = wiener(pf.GaussianLikelihood(operator, std), y, spectrum=spectrum)
    expected = y.flatten(2).numpy() @ gain.T
    assert np.allclose(found.flatten(2).numpy(), expected, atol=1e-5)


def test_no_linear_filter_is_better_on_its_own_law():
    """Mean squared error on draws: that of the posterior covariance, and more with any other spectrum."""
    shape, std = (32, 32), 0.5
    k0, k1 = torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)
    spectrum = 1 / (0.01 + k0**2 + k1**2)
    x = torch.fft.irfft2(spectrum.sqrt() * torch.fft.rfft2(torch.randn(200, 1, *shape)), s=shape)
    likelihood = pf.GaussianLikelihood(pf.downsample(shape, 2, kernel_size=4), std)
    y = likelihood.simulate(x)

    def error(s):
        return float((wiener(likelihood, y, spectrum=s) - x).square().mean())

    assert error(spectrum) < min(error(spectrum / 4), error(4 * spectrum), error(spectrum**2))


def test_spectrum_of_white_noise_is_its_variance():
    images = [0.3 * torch.randn(2, 1, 200, 150) + 5, 0.3 * torch.randn(1, 3, 140, 170)]
    spectrum = power_spectrum(images, (64, 96))
    assert spectrum.shape == (64, 49)
    assert float(spectrum.mean()) == pytest.approx(0.09, rel=0.05)
    assert float(spectrum[8:-8, 8:-8].std()) < 0.02


def test_spectrum_of_filtered_noise_is_the_square_of_the_filter():
    kernel = pf.gaussian_kernel(7, 1.0)
    shape = (256, 256)
    blur = pf.Blur(kernel, shape, "periodic")
    images = [blur(torch.randn(2, 1, *shape))]
    # On a grid larger than the images' blocks, and on one that is smaller.
    for grid in ((192, 160), (48, 64)):
        expected = pf.numerics.fourier.transfer_function(kernel, grid).abs().square()
        spectrum = power_spectrum(images, grid)
        large = expected > 0.05
        ratio = (spectrum / expected)[large]
        assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
        assert float(ratio.std()) < 0.35
        assert float(spectrum[~large].mean()) < 0.02


def test_a_learned_spectrum_denoises_better_than_tikhonov():
    shape = (128, 128)
    blur = pf.Blur(torch.ones(1, 9) / 3, shape, "periodic")
    train, x = (blur(torch.randn(2, 1, *shape)) for _ in range(2))
    likelihood = pf.GaussianLikelihood(pf.Identity(shape), 0.5)
    y = likelihood.simulate(x)
    learned = wiener(likelihood, y, spectrum=power_spectrum([train], shape))
    others = [tikhonov(likelihood, y, weight=w) for w in (0.1, 0.3, 1, 3, 10)]
    assert float(pf.psnr(learned, x).mean()) > max(float(pf.psnr(o, x).mean()) for o in others) + 1


def test_single_precision():
    likelihood = pf.GaussianLikelihood(OPERATORS["super-resolution"], 0.01)
    y = torch.rand(1, 1, *likelihood.operator.range_shape)
    single = tikhonov(likelihood, y.float(), weight=30)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), tikhonov(likelihood, y, weight=30), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda L, y: tikhonov(L(pf.Identity(SHAPE)), y, weight=0), "gradient is 0 but"),
        (lambda L, y: tikhonov(L(pf.Mask(torch.ones(SHAPE))), y, weight=1), "not Mask; use"),
        (
            lambda L, y: tikhonov(L(pf.Blur(torch.ones(3, 3), SHAPE)), y, weight=1),
            "not a reflect Blur of 8 x 6",
        ),
        (
            lambda L, y: tikhonov(
                L(pf.Blur(torch.ones(3, 3), SHAPE, "periodic", stride=4)), y, weight=1
            ),
            "with the stride 4; use",
        ),
        (
            lambda L, y: wiener(L(pf.Identity(SHAPE)), y, spectrum=torch.ones(SHAPE)),
            "8 x 6 frequencies but",
        ),
        (
            lambda L, y: wiener(L(pf.Identity(SHAPE)), y, spectrum=-torch.ones(8, 4)),
            "smallest value of the spectrum is -1",
        ),
        (
            lambda L, y: tikhonov(L(pf.Identity((8, 8))), y, weight=1),
            "8 x 6 pixels but the operator gives 8 x 8",
        ),
        (lambda L, y: power_spectrum([], SHAPE), "no image to learn"),
        (lambda L, y: power_spectrum([y[..., :1]], SHAPE), "8 x 1 pixels; at least"),
    ],
)
def test_messages(call, message):
    with pytest.raises(pf.InputError, match=message):
        call(lambda operator: pf.GaussianLikelihood(operator, 0.1), torch.rand(1, 1, *SHAPE))
