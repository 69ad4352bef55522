r"""Samples of the posterior of an image with a denoiser, by split Gibbs steps.

The image is split in two that may differ by noise of the level :math:`\rho`,

.. math:: p_\rho(x, z \mid y) \propto \exp\Bigl(-\frac{1}{2\sigma^2}\|A x - y\|^2 - R(z) -
          \frac{1}{2\rho^2}\|x - z\|^2\Bigr),

and drawn in turn. :math:`x \mid z` is normal and drawn exactly, by the operator's data step on perturbed data,

.. math:: x = \arg\min_x \frac{1}{2\sigma^2}\|A x - y - \sigma \xi_1\|^2 + \frac{1}{2\rho^2}\|x - z - \rho \xi_2\|^2.

:math:`z \mid x` is the law of a clean image given a noisy one. A denoiser D of the level :math:`\rho` is its mean,
and :math:`\rho^2 D'(x)` its covariance (Tweedie). It is drawn by denoising the perturbed image,
:math:`z = D(x + \rho \xi_3, \rho)`: up to second order of D, its mean is D(x) and its covariance
:math:`\rho^2 D'(x) D'(x)^\top`, which is the right one where the denoiser is a projection, and too small where it
dampens. So the samples are an approximation: check them on an image with known truth
(:func:`patchflow.uncertainty.image_samples.check_samples`).

The level falls from that of a coarse image to a small one. Every draw begins anew: the draws are independent.

References:
    Vono, Dobigeon, Chainais, "Split-and-augmented Gibbs sampler", IEEE TSP 67(6), 2019,
    https://arxiv.org/abs/1804.05809
    Orieux, Feron, Giovannelli, "Sampling high-dimensional Gaussian distributions for general linear inverse problems",
    IEEE SPL 19(5), 2012, https://doi.org/10.1109/LSP.2012.2189104 (perturbed data)
    Wu, Sun, Chen, Zhang, Yue, Bouman, "Principled probabilistic imaging using diffusion models as plug-and-play
    priors", 2024, https://arxiv.org/abs/2405.18782 (falling levels; reverse diffusions)
    Efron, "Tweedie's formula and selection bias", JASA 106, 2011, https://doi.org/10.1198/jasa.2011.tm11181
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError, NumericalError
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.progress import progress_line
from patchflow.solution import Samples

LARGEST, STEPS = 0.5, 60

Image = Float[Tensor, "1 channels height width"]


def noise_levels(
    likelihood: GaussianLikelihood, levels: tuple[float, float], steps: int = STEPS
) -> list[float]:
    """The levels of the splitting, in equal ratios from the largest that the denoiser knows to that of the noise.

    Args:
        likelihood: The law of the measurement.
        levels: The smallest and the largest noise level of the denoiser.
        steps: How many.

    Raises:
        InputError: If there are fewer than two, or the denoiser knows no larger level than that of the noise.
    """
    low, high = levels
    last = max(likelihood.std, low)
    if steps < 2 or not last < high:
        raise InputError(
            f"Got {steps} levels from {high:g} to {last:g}; give at least two, and a denoiser of larger noise levels "
            "than the measurement has (patchflow train denoiser --high 0.5)."
        )
    return [float(level) for level in np.geomspace(min(high, LARGEST), last, steps)]


@torch.no_grad()
def sample(
    likelihood: GaussianLikelihood,
    denoise: Callable[[Tensor, float], Tensor],
    y: Tensor,
    init: Image,
    *,
    levels: Sequence[float],
    draws: int = 32,
    batch: int = 1,
    progress: bool = False,
) -> Samples:
    r"""Draw independent samples.

    Args:
        likelihood: The operator and the noise.
        denoise: The mean of a clean image given one with noise of a standard deviation.
        y: The measurement of one image.
        init: Start image.
        levels: The levels :math:`\rho`, usually :func:`noise_levels`.
        draws: Number of samples.
        batch: How many are drawn at a time: more for small images.
        progress: Show a progress line.

    Returns:
        The samples, each a chain of its own. When interrupted (Ctrl-C) those so far.

    Raises:
        InputError: If a number is out of range, or y is not the measurement of one image.
        NumericalError: If the denoiser returns values that are not finite.
    """
    if min(draws, batch) < 1 or not levels or not min(levels) > 0:
        raise InputError(
            f"Got {draws} draws, {batch} at a time, and the levels {list(levels)}; give at least one of each, all "
            "positive."
        )
    if len(y) != 1 or len(init) != 1:
        raise InputError(f"Got {len(y)} measurements and {len(init)} start images; sample one.")
    kept: list[Tensor] = []
    interrupted = False
    bar = progress_line(total=draws, unit="draw", shown=progress)
    try:
        while (missing := draws - sum(map(len, kept))) > 0:
            count = min(batch, missing)
            z, ys = (image.expand(count, *image.shape[1:]) for image in (init, y))
            for rho in levels:
                x = likelihood.prox(
                    z + rho * torch.randn_like(z),
                    rho**2,
                    ys + likelihood.std * torch.randn_like(ys),
                )
                z = denoise(x + rho * torch.randn_like(x), rho)
            if not bool(z.isfinite().all()):
                raise NumericalError(
                    "A sample has values that are not finite: the denoiser has not learned these noise levels."
                )
            kept.append(z)
            bar.update(count)
    except KeyboardInterrupt:
        if not kept:
            raise
        interrupted = True
    finally:
        bar.close()
    return Samples(torch.cat(kept)[:, None], None, None, None, interrupted)
