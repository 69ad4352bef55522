r"""Plug and play: a denoiser in the place of the proximal map of a prior.

:func:`dpir` is half-quadratic splitting with falling noise levels :math:`\sigma_k` and any denoiser of a known level,

.. math:: x_k = \arg\min_x \|A x - y\|^2 + \rho_k \|x - z_{k-1}\|^2, \quad z_k = D(x_k, \sigma_k), \qquad
          \rho_k = \lambda \sigma^2 / \sigma_k^2,

a fixed number of steps that need not converge to anything. :func:`reconstruct` repeats one operator with a proximal
network until it does not move, see :mod:`patchflow.fixed_points`, where any other averaged denoiser may take its place.

References:
    Venkatakrishnan, Bouman, Wohlberg, "Plug-and-play priors for model based reconstruction", GlobalSIP, 2013
    Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-play image restoration with deep denoiser prior", 2021,
    https://arxiv.org/abs/2008.13751
    Hertrich, Neumayer, Steidl, "Convolutional proximal neural networks and plug-and-play algorithms", 2021,
    https://arxiv.org/abs/2011.02281
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Proximable
from patchflow.errors import InputError
from patchflow.fixed_points import Follow, admm, denoised, forward_backward, gradient_lipschitz
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.numerics.averaged import relaxed
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.sampling import Mask
from patchflow.solution import Solution
from patchflow.splitting import half_quadratic_splitting

# Of DPIR, as published for super-resolution: weight, largest noise level, number of steps.
DEFAULT_WEIGHT, LARGEST_LEVEL, STEPS = 0.23, 49 / 255, 24
# Where pixels were not measured, what is there comes from around them by many small steps. On a corner of the
# validation image with 80 % missing, 24, 48 and 96 steps from 49/255 leave 29.07, 30.06 and 30.63 dB, 96 from .1 30.75
# (benchmarks/dpir_schedule.py).
FILLING_LEVEL, FILLING_STEPS = 0.1, 96
# Of pnp-pnn: between the best on a corner of the validation image with a network of the level 10/255: .18 for
# super-resolution, .35 for deblurring, 1 and .5 for denoising with .05 and .1 (benchmarks/tune.py --side 240).
PNN_WEIGHT = 0.4

Images = Float[Tensor, "batch channels height width"]


def noise_levels(likelihood: GaussianLikelihood, steps: int | None = None) -> list[float]:
    """The noise levels of DPIR: in equal ratios from 49/255 to that of the data, or to s/255 for a stride s.

    Where pixels are missing they start at 0.1.

    Args:
        likelihood: The law of the measurement.
        steps: How many; by default 24 as published, or 96 where pixels are missing.

    Raises:
        InputError: If there is none.
    """
    operator = likelihood.operator
    filling = isinstance(operator, Mask)
    if steps is None:
        steps = FILLING_STEPS if filling else STEPS
    if steps < 1:
        raise InputError(f"The number of steps is {steps} but must be at least 1.")
    largest = FILLING_LEVEL if filling else LARGEST_LEVEL
    stride = operator.stride if isinstance(operator, Blur) else 0
    last = max(likelihood.std, stride / 255) if stride > 1 else likelihood.std
    return [float(level) for level in np.geomspace(max(largest, last), last, steps)]


def dpir(
    data: Proximable,
    denoise: Callable[[Tensor, float], Tensor],
    y: Tensor,
    init: Images,
    *,
    levels: Sequence[float],
    weight: float | int = DEFAULT_WEIGHT,
    turn: bool = False,
    progress: bool = False,
) -> Solution:
    r"""Half-quadratic splitting with a denoiser and falling noise levels.

    Args:
        data: The data term; it is in nats, so that it contains the noise level.
        denoise: Removes noise of a standard deviation from an image: any callable.
        y: The measurement.
        init: Start image.
        levels: The noise levels :math:`\sigma_k`, usually :func:`noise_levels`.
        weight: The weight :math:`\lambda`.
        turn: Turn and mirror the image for the denoiser, in another one of eight ways in each step, as DPIR offers.
        progress: Show a progress line.

    Returns:
        The last denoised image, and the relative distance of x and z at each step. When interrupted (Ctrl-C), the point
        so far.

    Raises:
        InputError: If a number is not positive, or the denoiser changes the shape.
        NumericalError: If the denoiser returns values that are not finite.
    """
    if not (weight > 0 and levels and min(levels) > 0):
        raise InputError(
            f"Got weight {weight} and levels {list(levels)}; all must be positive, at least one level."
        )
    done: list[float] = []

    def earlier(x: Tensor, level: float) -> Tensor:
        # Splitting denoises before its data step with the same level, DPIR after it: so the level of the step before.
        z = x
        if done:
            before = done[-1]
            z = _turned(lambda image: denoise(image, before), x, len(done) - 1 if turn else 0)
        done.append(level)
        return z

    betas = [level**-2 for level in levels]
    found = half_quadratic_splitting(
        data, earlier, init, y, betas=betas, weight=float(weight), progress=progress
    )
    if found.interrupted:
        return found
    with torch.no_grad():
        last = len(done) - 1 if turn else 0
        z = _turned(lambda image: denoise(image, levels[-1]), found.x, last)
    return found._replace(x=z)


def reconstruct(
    likelihood: GaussianLikelihood,
    denoiser: ProximalDenoiser,
    y: Tensor,
    init: Images,
    *,
    weight: float | int = PNN_WEIGHT,
    method: Literal["admm", "forward-backward"] = "admm",
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    callback: Follow | None = None,
    progress: bool = False,
) -> Solution:
    r"""Plug and play with a proximal network whose averagedness is guaranteed, and one weight.

    A denoiser of the level :math:`\sigma_0` stands for :math:`\operatorname{prox}_{\sigma_0^2 R}` with a prior
    :math:`R` in nats, and relaxed by :math:`s` about for :math:`s \sigma_0^2 R`. So the fixed point is about a
    minimiser of :math:`d + w R` with the weight :math:`w = s \sigma_0^2 / \tau`. ADMM relaxes as much as it must and
    takes the step from the weight; forward-backward relaxes more where the step would be out of its range.

    Args:
        likelihood: The law of the measurement.
        denoiser: The network.
        y: The measurement.
        init: Start image.
        weight: The weight :math:`w`.
        method: Which iteration; both have the same fixed points.
        max_iterations: See :func:`patchflow.fixed_points.forward_backward`.
        tolerance: See there.
        callback: See there.
        progress: Show a progress line.

    Raises:
        InputError: If the weight is not positive, or nothing is guaranteed about the denoiser.
        NumericalError: See :func:`patchflow.fixed_points.forward_backward`.
    """
    if not 0 < weight < math.inf:
        raise InputError(f"The weight is {weight} but must be positive and finite.")
    if not denoiser.averagedness < 1:
        raise InputError(
            f"The denoiser has gamma {denoiser.gamma} and the Lipschitz bound {denoiser.lipschitz:.3g}, with which "
            "plug and play need not converge; train one without --gamma, or mix it with a reference (with_reference)."
        )
    level = denoiser.levels[1]

    def denoise(x: Tensor) -> Tensor:
        return denoiser(x, level)

    if method == "admm":
        share = min(1.0, 0.5 / denoiser.averagedness)
        return admm(
            likelihood,
            relaxed(denoise, share),
            y,
            init,
            averagedness=share * denoiser.averagedness,
            step=share * level**2 / weight,
            max_iterations=max_iterations,
            tolerance=tolerance,
            callback=callback,
            progress=progress,
        )
    bound = gradient_lipschitz(likelihood)
    step = min(1.9 / bound, level**2 / weight)
    share = min(1.0, weight * step / level**2)
    return forward_backward(
        likelihood,
        relaxed(denoise, share),
        y,
        init,
        averagedness=share * denoiser.averagedness,
        lipschitz=bound,
        step=step,
        max_iterations=max_iterations,
        tolerance=tolerance,
        callback=callback,
        progress=progress,
    )


def _turned(denoise: Callable[[Tensor], Tensor], x: Tensor, way: int) -> Tensor:
    """Denoise an image that is turned by quarters, and mirrored for odd ways, and turn the result back."""
    quarters, mirrored = (way % 8) // 2, way % 2
    turned = torch.rot90(x.flip(-1) if mirrored else x, quarters, (-2, -1))
    z = denoised(denoise, turned)
    back = torch.rot90(z, -quarters, (-2, -1))
    return back.flip(-1) if mirrored else back
