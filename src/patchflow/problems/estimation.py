r"""Estimate the blur of a super-resolution problem from one registered pair of images of high and low resolution.

The kernel and a constant solve the least-squares problem

.. math:: \min_{k, b} \; \sum_i \Big( \sum_u k_u\, x_{s i + u - a} + b - y_i \Big)^2
          + r \|k\|^2,

over all measured pixels whose window lies inside of the image. Published is a quotient in the Fourier domain, cut to
15 x 15 pixels; the least squares need no periodic images and weigh each frequency by what there is of it.

References:
    Altekrueger, Hertrich, "WPPNets and WPPFlows: the power of Wasserstein patch priors for superresolution", 2022,
    https://arxiv.org/abs/2201.08157
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.patches import extract_patches

# Of the mean square of the image's windows: what they hardly contain does not enter the kernel.
RIDGE = 1e-4


class Estimate(NamedTuple):
    """What was estimated.

    Attributes:
        kernel: The kernel (rows, columns) of sum 1, for a :class:`patchflow.problems.blur.Blur`.
        gain: By what measured pixels are multiplied: the sum of the fitted kernel.
        bias: What is added to them then.
        residual: The root mean square of what the two do not explain: noise and errors of the registration.
    """

    kernel: Tensor
    gain: float
    bias: float
    residual: float

    def calibrated(self, y: Tensor) -> Tensor:
        """Measurements as bright as images: without the constant, and divided by the factor."""
        return (y - self.bias) / self.gain


def estimate_kernel(
    high: Float[Tensor, "1 1 height width"],
    low: Float[Tensor, "1 1 rows columns"],
    *,
    size: int = 15,
    ridge: float = RIDGE,
) -> Estimate:
    """Estimate the kernel that made a low-resolution image of a high-resolution one.

    Args:
        high: The image.
        low: What was measured of it: a whole number of times smaller, and registered so that each of its pixels is in
            the middle of those of the image that it covers, up to what the kernel can shift.
        size: Side length of the kernel, at least the scale.
        ridge: The factor :math:`r`, in units of the mean square of the windows around their mean.

    Raises:
        InputError: If the sizes are no multiples, the kernel is too small, there are fewer pixels than unknowns, or the
            images do not show the same.
    """
    scale = high.shape[2] // low.shape[2]
    if scale < 2 or tuple(scale * n for n in low.shape[2:]) != tuple(high.shape[2:]):
        raise InputError(
            f"The images have {high.shape[2]} x {high.shape[3]} and {low.shape[2]} x {low.shape[3]} pixels; the first "
            "must be a whole number of times, at least twice, as large as the second: crop or register them."
        )
    if not (float(high.std()) > 0 and float(low.std()) > 0):
        raise InputError(
            "One of the images is constant, or not finite: nothing tells the blur; give images with texture."
        )
    if size < scale or not ridge >= 0:
        raise InputError(
            f"Got a kernel of {size} x {size} at scale {scale} and the ridge {ridge}; the kernel must be at least as "
            "large as the scale, the ridge not negative."
        )
    before = (size - scale) // 2
    first = -(-before // scale)  # the first measured pixel whose window is inside
    start = first * scale - before
    counts = [(extent - start - size) // scale + 1 for extent in high.shape[2:]]
    if min(counts) < 1 or counts[0] * counts[1] <= size**2:
        raise InputError(
            f"A kernel of {size} x {size} has more unknowns than the {max(counts[0], 0)} x {max(counts[1], 0)} "
            "measured pixels inside tell; give larger images or a smaller kernel."
        )
    windows = extract_patches(high[0].double(), size, scale, (start, start))
    values = low[0, 0, first : first + counts[0], first : first + counts[1]].double().flatten()
    windows_mean, mean = windows.mean(0), values.mean()
    centred = windows - windows_mean
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    kernel = torch.cholesky_solve(
        (centred.T @ (values - mean))[:, None], torch.linalg.cholesky(gram)
    )[:, 0]
    bias = mean - windows_mean @ kernel
    residual = windows @ kernel + bias - values
    gain = float(kernel.sum())
    if not gain > 0:
        raise InputError(
            f"The estimated kernel has the sum {gain:.3g}, as if bright pixels were measured dark; check that the two "
            "images show the same and are registered."
        )
    return Estimate(
        (kernel / gain).view(size, size).to(high),
        gain,
        float(bias),
        float(residual.square().mean().sqrt()),
    )
