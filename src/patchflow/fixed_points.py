r"""Fixed points of averaged operators made of a data term and a denoiser: forward-backward splitting and ADMM.

They repeat one operator with a fixed denoiser :math:`D` until it does not move,

.. math:: x \leftarrow D\big(x - \tau \nabla d(x)\big), \qquad\text{and}\qquad
          v \leftarrow v + \operatorname{prox}_{\tau d}\big(2 D(v) - v\big) - D(v).

The second is ADMM (:math:`v = x + p / \gamma` with the multiplier :math:`p`), which is Douglas' and Rachford's method.
They converge to a fixed point, if there is one, when the operator is averaged, see :mod:`patchflow.numerics.averaged`:
the first for an averaged denoiser and :math:`0 < \tau < 2 / L` with the Lipschitz constant :math:`L` of
:math:`\nabla d`, the second for a firmly nonexpansive denoiser (averagedness at most 1/2) and any :math:`\tau > 0`.
Both have the same fixed points. Then the steps never grow, which is watched: a denoiser that is not what it is said to
be is found out.

References:
    Bauschke, Combettes, "Convex analysis and monotone operator theory in Hilbert spaces", 2017
    Venkatakrishnan, Bouman, Wohlberg, "Plug-and-play priors for model based reconstruction", GlobalSIP, 2013
    Hertrich, Neumayer, Steidl, "Convolutional proximal neural networks and plug-and-play algorithms", 2021,
    https://arxiv.org/abs/2011.02281
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Energy, Proximable
from patchflow.errors import InputError, NumericalError
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import operator_norm
from patchflow.progress import progress_line
from patchflow.solution import Solution

# Power iteration finds a norm from below; and what a step may be above the one before by rounding, or by a constant
# that was measured.
_NORM_MARGIN, _SLACK = 1.02, 1e-3

Images = Float[Tensor, "batch channels height width"]
Follow = Callable[[int, Tensor, float], Mapping[str, str] | None]


@torch.no_grad()
def forward_backward(
    data: Energy,
    denoise: Callable[[Tensor], Tensor],
    y: Tensor,
    init: Images,
    *,
    averagedness: float,
    lipschitz: float | None = None,
    step: float | None = None,
    max_iterations: int = 800,
    tolerance: float = 1e-5,
    callback: Follow | None = None,
    progress: bool = False,
) -> Solution:
    r"""Repeat a gradient step for the data and a denoiser, :math:`x \leftarrow D(x - \tau \nabla d(x))`.

    Args:
        data: The data term :math:`d`, convex and smooth.
        denoise: The denoiser :math:`D`: any callable.
        y: The measurement.
        init: Start image.
        averagedness: Its averagedness constant, in (0, 1): known of proximal networks, else to be guaranteed by the
            caller; :func:`patchflow.numerics.averaged.with_reference` makes one of a Lipschitz constant.
        lipschitz: The Lipschitz constant :math:`L` of the gradient; by default, for a linear operator with Gaussian
            noise, :math:`\|A\|^2 / \sigma^2` by power iteration and 4 % more.
        step: The step :math:`\tau`, below :math:`2 / L`; by default :math:`1.9 / L`.
        max_iterations: Stop after this many iterations in any case.
        tolerance: Stop when a step is at most this fraction of the image (in the Euclidean norm).
        callback: Called after each step with its number, the image and the length of the step per root of the pixels.
        progress: Show a progress line.

    Returns:
        The last image, the length of each step per root of the pixels, and whether the tolerance was reached. When
        interrupted (Ctrl-C), the image so far.

    Raises:
        InputError: If the constants do not allow convergence, or the denoiser changes the shape.
        NumericalError: If a step is longer than the one before it, which an averaged operator does not allow, or the
            denoiser returns values that are not finite.
    """
    if not 0 < averagedness < 1:
        raise InputError(
            f"The denoiser has the averagedness {averagedness} but forward-backward converges below 1 only; relax it "
            "(relaxed), mix it with a reference (with_reference), or use dpir, which asks for nothing."
        )
    bound = gradient_lipschitz(data) if lipschitz is None else lipschitz
    if not 0 < bound < math.inf:
        raise InputError(f"The Lipschitz constant is {bound} but must be positive and finite.")
    tau = 1.9 / bound if step is None else step
    if not 0 < tau < 2 / bound:
        raise InputError(
            f"The step is {tau:.4g} but must be positive and below 2 / L = {2 / bound:.4g} for the Lipschitz constant "
            f"L = {bound:.4g} of the gradient; give a smaller step, or none for 1.9 / L."
        )

    def advance(x: Tensor) -> tuple[Tensor, Tensor]:
        slope = data.value_and_grad(x, y)[1]
        moved = denoised(denoise, x - tau * slope)
        return moved, moved

    return _repeat(advance, init, max_iterations, tolerance, callback, progress)


@torch.no_grad()
def admm(
    data: Proximable,
    denoise: Callable[[Tensor], Tensor],
    y: Tensor,
    init: Images,
    *,
    averagedness: float,
    step: float,
    max_iterations: int = 300,
    tolerance: float = 1e-5,
    callback: Follow | None = None,
    progress: bool = False,
) -> Solution:
    r"""Alternate between a denoiser and the proximal map of the data, with a multiplier.

    Args:
        data: The data term :math:`d`, with its exact proximal map.
        denoise: The denoiser :math:`D`: any callable.
        y: The measurement.
        init: Start image.
        averagedness: Its averagedness constant, in (0, 1/2]; see :func:`forward_backward`.
        step: The step :math:`\tau > 0` of the proximal map.
        max_iterations: Stop after this many iterations in any case.
        tolerance: Stop when a step is at most this fraction of the image (in the Euclidean norm).
        callback: See :func:`forward_backward`.
        progress: Show a progress line.

    Returns:
        As :func:`forward_backward`; the image is the last one after a data step.

    Raises:
        InputError: If the constants do not allow convergence, or the denoiser changes the shape.
        NumericalError: As :func:`forward_backward`.
    """
    if not 0 < averagedness <= 0.5:
        raise InputError(
            f"The denoiser has the averagedness {averagedness} but ADMM converges up to 1/2 only (firmly "
            "nonexpansive); relax it with the weight 1 / (2 averagedness) (relaxed), or mix it with a "
            "reference (with_reference)."
        )
    if not 0 < step < math.inf:
        raise InputError(f"The step is {step} but must be positive and finite.")

    def advance(v: Tensor) -> tuple[Tensor, Tensor]:
        z = denoised(denoise, v)
        x = data.prox(2 * z - v, step, y)
        return v + x - z, x

    return _repeat(advance, init, max_iterations, tolerance, callback, progress)


def gradient_lipschitz(data: Energy) -> float:
    r"""A bound of the Lipschitz constant of the gradient of a Gaussian likelihood, :math:`\|A\|^2 / \sigma^2`.

    Args:
        data: The data term.

    Raises:
        InputError: If it is another one.
    """
    if not isinstance(data, GaussianLikelihood):
        raise InputError(
            f"The Lipschitz constant of the gradient of a {type(data).__name__} is not known; give lipschitz."
        )
    return (_NORM_MARGIN * operator_norm(data.operator) / data.std) ** 2


def _repeat(
    advance: Callable[[Tensor], tuple[Tensor, Tensor]],
    v: Tensor,
    max_iterations: int,
    tolerance: float,
    callback: Follow | None,
    progress: bool,
) -> Solution:
    """Repeat an operator, which returns its next point and the image there, until it does not move."""
    if max_iterations < 1 or not tolerance > 0:
        raise InputError(
            f"Got {max_iterations} iterations and the tolerance {tolerance}; both must be positive."
        )
    x, history = v, []
    converged = interrupted = False
    root, rounding = math.sqrt(v.numel()), 100 * torch.finfo(v.dtype).eps
    bar = progress_line(total=max_iterations, shown=progress)
    try:
        for k in range(max_iterations):
            moved, x = advance(v)
            length, size = float((moved - v).norm()) / root, float(moved.norm()) / root
            history.append(length)
            if k and length > (1 + _SLACK) * history[-2] + rounding * size:
                raise NumericalError(
                    f"The step grew from {history[-2]:.4g} to {length:.4g} in iteration {k}, which an averaged "
                    "denoiser does not allow; measure its constant (measured_averagedness), relax it more, or mix it "
                    "with a reference (with_reference)."
                )
            v = moved
            shown = {"step": f"{length:.3g}"}
            if callback is not None:
                shown |= callback(k, x, length) or {}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            converged = length <= tolerance * size
            if converged:
                break
    except KeyboardInterrupt:
        # What has been computed is worth keeping; the caller sees it.
        interrupted = True
    finally:
        bar.close()
    return Solution(x, history, len(history), converged, interrupted)


def denoised(denoise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a denoiser that is any callable, and look at what it returns.

    Args:
        denoise: The denoiser.
        x: The image.

    Raises:
        InputError: If the shape is another.
        NumericalError: If values are not finite.
    """
    z = denoise(x)
    if z.shape != x.shape:
        raise InputError(
            f"The denoiser made {tuple(z.shape)} of an image {tuple(x.shape)}; give one that keeps the shape."
        )
    if not bool(z.isfinite().all()):
        raise NumericalError(
            "The denoiser returned values that are not finite; check its weights, the measurement and the noise level."
        )
    return z
