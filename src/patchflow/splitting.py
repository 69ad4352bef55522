r"""Splitting methods: the data by its exact proximal map, the prior by its own.

References:
    Chambolle, Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging", 2011
    Geman, Yang, "Nonlinear image recovery with half-quadratic regularization", 1995
    Zoran, Weiss, "From learning models of natural image patches to whole image restoration", 2011
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchflow.energy import Proximable
from patchflow.errors import InputError
from patchflow.priors.variation import TotalVariation, image_gradient, minus_divergence
from patchflow.solution import Solution


@torch.no_grad()
def primal_dual(
    data: Proximable,
    weight: float | int,
    variation: TotalVariation,
    init: Tensor,
    condition: Tensor | None = None,
    *,
    step: float | None = None,
    max_iterations: int = 2000,
    tolerance: float = 1e-4,
) -> Solution:
    r"""Minimise :math:`E(x \mid y) + w\, \mathrm{TV}(x)` by the primal-dual method of Chambolle and Pock.

    It stops when the primal and the dual residual of the optimality conditions, relative to the sizes of :math:`x` and of
    the dual variable's divergence, are both below ``tolerance``.

    Args:
        data: The data term, with its exact proximal map.
        weight: The weight :math:`w`.
        variation: The total variation.
        init: Start (batch, channels, height, width).
        condition: The measurement.
        step: Primal step; the dual one is :math:`1 / (8 \tau)`. By default :math:`0.05 / w`, which balances pixels of
            size 0.05 against dual variables of size :math:`w`.
        max_iterations: Stop after this many iterations in any case.
        tolerance: See above.

    Returns:
        The last point, the larger of the two relative residuals at each step, and whether they reached ``tolerance``.

    Raises:
        InputError: If the weight is not positive.
    """
    if not weight > 0:
        raise InputError(f"The weight of total variation is {weight} but must be positive.")
    tau = 0.05 / weight if step is None else step
    sigma = 1 / (8 * tau)
    x = leading = init
    p = torch.zeros_like(image_gradient(x))
    history: list[float] = []
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(max_iterations):
        p_new = variation.project(p + sigma * image_gradient(leading), weight)
        x_new = data.prox(x - tau * minus_divergence(p_new), tau, condition)
        moved, turned = x - x_new, p - p_new
        # Residuals of 0 in dE(x) + D'p and 0 in dF*(p) - Dx, where F* is the indicator of the dual ball.
        primal = (moved / tau - minus_divergence(turned)).norm() / minus_divergence(p_new).norm().clamp_min(tiny)
        dual = (turned / sigma - image_gradient(moved)).norm() / image_gradient(x_new).norm().clamp_min(tiny)
        leading = 2 * x_new - x
        x, p = x_new, p_new
        history.append(float(torch.maximum(primal, dual)))
        if history[-1] < tolerance:
            break
    return Solution(x, history, len(history), bool(history) and history[-1] < tolerance)


@torch.no_grad()
def half_quadratic_splitting(
    data: Proximable,
    denoise: Callable[[Tensor, float], Tensor],
    init: Tensor,
    condition: Tensor | None = None,
    *,
    betas: Sequence[float],
) -> Solution:
    r"""Alternate :math:`z = \mathrm{denoise}(x, \beta^{-1/2})` and :math:`x = \arg\min \tfrac\beta2\|x - z\|^2 + E(x \mid y)`.

    With a denoiser that is the proximal map of an energy :math:`R` this lowers
    :math:`E(x \mid y) + \tfrac\beta2 \|x - z\|^2 + R(z)` for growing :math:`\beta`.

    Args:
        data: The data term, with its exact proximal map.
        denoise: Removes noise of a standard deviation from an image.
        init: Start (batch, channels, height, width).
        condition: The measurement.
        betas: The penalties :math:`\beta`, one per iteration, usually growing.

    Returns:
        The last point, and the relative distance of x and z at each step.

    Raises:
        InputError: If a penalty is not positive.
    """
    if not betas or min(betas) <= 0:
        raise InputError(f"The penalties are {list(betas)} but must be positive, at least one of them.")
    x, history = init, []
    for beta in betas:
        z = denoise(x, beta**-0.5)
        x = data.prox(z, 1 / beta, condition)
        history.append(float((x - z).norm() / x.norm()))
    return Solution(x, history, len(history), False)
