r"""Linear reconstructions in closed form, for periodic operators: Tikhonov's method and Wiener's filter.

.. math:: \hat x = \arg\min_x \; \frac{1}{2\sigma^2} \|A x - y\|^2
                   + \frac12 \sum_{\xi \ne 0} \frac{|\hat x(\xi)|^2}{n\, s(\xi)}

with the power spectrum :math:`s` of a stationary Gaussian law of images of :math:`n` pixels: the mean of its posterior,
the best linear reconstruction for images of this spectrum. The mean of the image is left free (frequency 0 has a flat
prior). Wiener's filter learns :math:`s` from images; Tikhonov's method with the squared gradient is the case
:math:`s = 1 / (w |\hat\nabla|^2)`. Operators that subsample mix the frequencies that alias to the same one; they are
solved exactly by the fold over these aliases, see :func:`patchflow.numerics.fourier.stationary_mean`.

References:
    Wiener, "Extrapolation, interpolation, and smoothing of stationary time series", 1949
    Tikhonov, "Solution of incorrectly formulated problems and the regularization method", 1963
    Welch, "The use of fast Fourier transform for the estimation of power spectra", 1967
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.fourier import stationary_mean, transfer_function
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import Identity, LinearOperator, Shape

# Highest PSNR of Tikhonov's method on the validation image of super-resolution x4 (noise 0.01) among 3, 10, 20, 30, 40,
# 50, 60, 100, 200, 400: 27.22 dB.
SUPER_RESOLUTION_WEIGHT = 40.0
# Side length of the windows of the periodogram. On that image 32, 64, 128 and 256 give 27.23, 27.23, 27.22 and 27.18
# dB: finer frequencies are noise, with one to six images.
BLOCK = 64


def tikhonov(likelihood: GaussianLikelihood, y: Tensor, *, weight: float | int) -> Tensor:
    r"""Minimise :math:`\frac{1}{2\sigma^2}\|A x - y\|^2 + \frac w2 \|\nabla x\|^2`, periodically.

    Args:
        likelihood: A periodic operator with Gaussian noise.
        y: The measurement (batch, channels, height, width).
        weight: The weight :math:`w`, in nats per half of a squared difference.

    Returns:
        The reconstruction (batch, channels, height, width).

    Raises:
        InputError: If the weight is not positive and finite, or the operator is not periodic.
    """
    if not 0 < weight < math.inf:
        raise InputError(
            f"The weight of the squared gradient is {weight} but must be positive and finite; 60 is usual."
        )
    height, width = likelihood.operator.domain_shape
    k0 = 2 * math.pi * torch.fft.fftfreq(height, dtype=y.dtype, device=y.device)[:, None]
    k1 = 2 * math.pi * torch.fft.rfftfreq(width, dtype=y.dtype, device=y.device)
    squares = 4 - 2 * k0.cos() - 2 * k1.cos()
    squares[0, 0] = 1  # not used
    return wiener(likelihood, y, spectrum=1 / (weight * squares))


def wiener(
    likelihood: GaussianLikelihood, y: Tensor, *, spectrum: Float[Tensor, "height half"]
) -> Tensor:
    r"""The posterior mean under a stationary Gaussian law of images.

    Args:
        likelihood: A periodic operator with Gaussian noise.
        y: The measurement (batch, channels, height, width).
        spectrum: The power spectrum on the grid of ``rfft2``, for example that of :func:`power_spectrum`; its mean over
            all frequencies is the variance of a pixel. That of frequency 0 is not used.

    Returns:
        The reconstruction (batch, channels, height, width).

    Raises:
        InputError: If the operator is not periodic, or the spectrum of another shape or negative.
    """
    operator, shape = likelihood.operator, likelihood.operator.domain_shape
    transfer, stride = _periodic(likelihood, y)
    if tuple(y.shape[-2:]) != operator.range_shape:
        raise InputError(
            f"The measurement has {y.shape[-2]} x {y.shape[-1]} pixels but the operator gives "
            f"{operator.range_shape[0]} x {operator.range_shape[1]}; check the shape that the operator was made for."
        )
    expected = (shape[0], shape[1] // 2 + 1)
    if tuple(spectrum.shape) != expected:
        raise InputError(
            f"The spectrum has {spectrum.shape[0]} x {spectrum.shape[1]} frequencies but an image of {shape[0]} x "
            f"{shape[1]} pixels has {expected[0]} x {expected[1]}; learn it with power_spectrum(images, {shape})."
        )
    if not bool((spectrum >= 0).all()):
        raise InputError(
            f"The smallest value of the spectrum is {float(spectrum.min()):g} but powers are not negative; learn it "
            "with power_spectrum."
        )
    spectrum = spectrum.to(y).clone()
    # The limit of an infinite variance of the mean: the image has the mean of the measurement, and no other frequency
    # explains it.
    spectrum[0, 0] = 0
    mean = y.mean((-2, -1), keepdim=True) / transfer[0, 0].real
    rest = y - operator(mean.expand(*y.shape[:-2], *shape))
    return mean + stationary_mean(rest, likelihood.std**2, transfer, spectrum, shape, stride)


def power_spectrum(images: Sequence[Tensor], shape: Shape) -> Float[Tensor, "height half"]:
    r"""Learn the power spectrum of a stationary law from one to six images: Welch's averaged periodogram.

    .. math:: s(\xi) = \frac{1}{M} \sum_{m=1}^M \frac{|\mathcal F(h\,(b_m - \bar x))(\xi)|^2}{\|h\|^2}

    over half-overlapping blocks :math:`b_m` of at most :data:`BLOCK` pixels a side, in a Hann window :math:`h`, so
    that the border of a block does not look like an edge. Blocks are padded by zeros to the large grid, so that no
    frequency is interpolated; all blocks count alike.

    Args:
        images: Images (batch, channels, height, width), of any sizes.
        shape: Height and width of the images to reconstruct.

    Raises:
        InputError: If there is no image, or one is smaller than 2 x 2 pixels.
    """
    if not images:
        raise InputError("There is no image to learn a spectrum from; give at least one.")
    sides = [min(BLOCK, shape[k], *(int(x.shape[k - 2]) for x in images)) for k in (0, 1)]
    if min(sides) < 2:
        raise InputError(
            f"The images and the shape {shape} allow blocks of {sides[0]} x {sides[1]} pixels; at least 2 x 2 are "
            "needed, so give larger images."
        )
    lines = [torch.hann_window(side + 2, periodic=False).to(images[0])[1:-1] for side in sides]
    window = lines[0][:, None] * lines[1]
    total = window.new_zeros(shape[0], shape[1] // 2 + 1)
    count = 0
    for x in images:
        centred = x.to(window) - x.to(window).mean((-2, -1), keepdim=True)
        blocks = centred.flatten(0, 1).unfold(1, sides[0], max(1, sides[0] // 2))
        blocks = blocks.unfold(2, sides[1], max(1, sides[1] // 2)).reshape(-1, *sides)
        # One at a time: a padded block is as large as the image.
        for block in blocks:
            total += torch.fft.rfft2(window * block, s=shape).abs().square()
            count += 1
    return total / (count * window.square().sum())


def is_periodic(operator: LinearOperator) -> bool:
    """Whether the closed forms know the operator: the identity, or a periodic blur whose stride divides the image."""
    if isinstance(operator, Identity):
        return True
    height, width = operator.domain_shape
    return (
        isinstance(operator, Blur)
        and operator.boundary == "periodic"
        and not (height % operator.stride or width % operator.stride)
    )


def _periodic(likelihood: GaussianLikelihood, y: Tensor) -> tuple[Tensor, int]:
    """The factors and the stride of a periodic operator."""
    operator, (height, width) = likelihood.operator, likelihood.operator.domain_shape
    if isinstance(operator, Identity):
        return torch.ones(height, width // 2 + 1, dtype=y.dtype, device=y.device) + 0j, 1
    kind = type(operator).__name__
    if isinstance(operator, Blur):
        if is_periodic(operator):
            kernel = operator.kernel.to(y)
            return transfer_function(kernel, (height, width), operator.anchor), operator.stride
        kind = f"a {operator.boundary} Blur of {height} x {width} pixels with the stride {operator.stride}"
    raise InputError(
        "Linear reconstruction in closed form needs the identity or a periodic blur whose stride divides the image, "
        f"not {kind}; use patchflow.reconstruct.total_variation for others."
    )
