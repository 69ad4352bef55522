r"""Splitting methods: the data by its exact proximal map, the prior by its own.

References:
    Chambolle, Pock, "A first-order primal-dual algorithm for convex problems with applications to imaging", 2011
    Condat, "A primal-dual splitting method for convex optimization", 2013 (over-relaxation)
    Geman, Yang, "Nonlinear image recovery with half-quadratic regularization", 1995
    Zoran, Weiss, "From learning models of natural image patches to whole image restoration", 2011
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from patchflow.energy import Proximable
from patchflow.errors import InputError, NumericalError
from patchflow.priors.differences import Fields
from patchflow.progress import progress_line
from patchflow.solution import Solution


class Saddle(ABC):
    r"""A convex problem :math:`\min_u G(u) + F(K u) = \min_u \max_d G(u) + \langle K u, d\rangle - F^*(d)`.

    The variables :math:`u` and :math:`d` are tuples of tensors. Steps may be preconditioned by fixed symmetric maps
    :math:`T` and :math:`\Sigma` with :math:`\|\Sigma^{1/2} K T^{1/2}\| \le 1`.
    """

    @abstractmethod
    def apply(self, u: Fields) -> Fields:
        r"""The images :math:`K u`."""

    @abstractmethod
    def adjoint(self, d: Fields) -> Fields:
        r"""The slopes :math:`K^\top d`."""

    @abstractmethod
    def primal_step(self, u: Fields, slope: Fields) -> tuple[Fields, Fields]:
        r"""The proximal point of :math:`u - T s` for G, and a subgradient of G there."""

    @abstractmethod
    def dual_step(self, d: Fields, ahead: Fields) -> tuple[Fields, Tensor]:
        r"""The proximal point of :math:`d + \Sigma a` for :math:`F^*`, and the value of :math:`F^*` there."""

    @abstractmethod
    def energies(self, u: Fields, image: Fields) -> tuple[Tensor, Tensor]:
        r"""The values :math:`G(u)` and :math:`F(K u)`."""

    @abstractmethod
    def lowest(self, slope: Fields, u: Fields) -> Tensor:
        r"""The smallest :math:`\langle s, u'\rangle` over a bounded set that holds a minimiser."""


@torch.no_grad()
def primal_dual(
    problem: Saddle,
    u: Fields,
    d: Fields,
    *,
    relaxation: float,
    max_iterations: int,
    tolerance: float,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Solve a saddle point problem by the over-relaxed primal-dual method of Chambolle and Pock.

    A subgradient :math:`g` of G at the present :math:`u` bounds the energy of every :math:`u'` from below by

    .. math:: G(u) - \langle g, u\rangle + \langle g + K^\top d, u'\rangle - F^*(d),

    so its minimum over a bounded set that holds a minimiser bounds the smallest energy. It stops when the duality
    gap, the distance of the energy to this bound, is at most ``tolerance`` times the energy.

    Args:
        problem: The problem, its steps and its bounds.
        u: Start of the primal variables; the first of them is the image.
        d: Start of the dual variables.
        relaxation: Below 2; 1 is the original method.
        max_iterations: Stop after this many iterations in any case.
        tolerance: See above.
        callback: Called after each step with its number, the current image and its energy; what it returns is shown.
        progress: Show a progress line.

    Returns:
        The last image, the energies along the way, and whether the gap closed. When interrupted (Ctrl-C), the
        image so far.

    Raises:
        InputError: If the tolerance is not positive.
        NumericalError: If the energy is not finite.
    """
    if not tolerance > 0:
        raise InputError(
            f"The tolerance is {tolerance} but must be positive; 1e-3 of the energy is usual."
        )
    u_new = u
    image, slope = problem.apply(u), problem.adjoint(d)
    history: list[float] = []
    converged = interrupted = False
    bar = progress_line(total=max_iterations, shown=progress)
    try:
        for k in range(max_iterations):
            u_new, own = problem.primal_step(u, slope)
            image_new = problem.apply(u_new)
            ahead = tuple(2 * new - old for new, old in zip(image_new, image, strict=True))
            d_new, conjugate = problem.dual_step(d, ahead)
            slope_new = problem.adjoint(d_new)
            smooth, rough = problem.energies(u_new, image_new)
            energy = smooth + rough
            total = tuple(a + b for a, b in zip(own, slope_new, strict=True))
            inner = sum((g * v).sum() for g, v in zip(own, u_new, strict=True))
            gap = rough + inner + conjugate - problem.lowest(total, u_new)
            history.append(float(energy))
            if not torch.isfinite(energy):
                raise NumericalError(
                    f"The energy is {history[-1]} at step {k}; check the measurement and its noise level or number of "
                    "photons."
                )
            converged = bool(gap <= tolerance * energy.abs())
            # Over-relaxation of all variables; their images are linear, so they relax alike.
            u, d = _relax(u, u_new, relaxation), _relax(d, d_new, relaxation)
            image = _relax(image, image_new, relaxation)
            slope = _relax(slope, slope_new, relaxation)
            shown = {"energy": f"{history[-1]:.5g}", "gap": f"{float(gap):.3g}"}
            if callback is not None:
                shown |= callback(k, u_new[0], history[-1]) or {}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if converged:
                break
    except KeyboardInterrupt:
        # What has been computed is worth keeping; the caller sees it.
        interrupted = True
    finally:
        bar.close()
    return Solution(u_new[0], history, len(history), converged, interrupted)


def _relax(old: Fields, new: Fields, relaxation: float) -> Fields:
    return tuple(torch.lerp(a, b, relaxation) for a, b in zip(old, new, strict=True))


@torch.no_grad()
def half_quadratic_splitting(
    data: Proximable,
    denoise: Callable[[Tensor, float], Tensor],
    init: Tensor,
    condition: Tensor | None = None,
    *,
    betas: Sequence[float],
    weight: float = 1.0,
    progress: bool = False,
) -> Solution:
    r"""Alternate between a denoiser and the exact data step.

    .. math:: z = \mathrm{denoise}(x, \beta^{-1/2}), \qquad x = \arg\min_x \tfrac{w\beta}2 \|x - z\|^2 + E(x \mid y)

    With a denoiser that is the proximal map of an energy :math:`R` this lowers
    :math:`E(x \mid y) + w \, (\tfrac\beta2 \|x - z\|^2 + R(z))` for growing :math:`\beta`.

    Args:
        data: The data term, with its exact proximal map.
        denoise: Removes noise of a standard deviation from an image.
        init: Start (batch, channels, height, width).
        condition: The measurement.
        betas: The penalties :math:`\beta`, one per iteration, usually growing.
        weight: The weight :math:`w` of what the denoiser stands for.
        progress: Show a progress line.

    Returns:
        The last point, and the relative distance of x and z at each step. When interrupted (Ctrl-C), the point so far.

    Raises:
        InputError: If a penalty or the weight is not positive.
        NumericalError: If the image is not finite.
    """
    if not betas or min(betas) <= 0:
        raise InputError(
            f"The penalties are {list(betas)} but must be positive, at least one of them."
        )
    if not 0 < weight < math.inf:
        raise InputError(f"The weight is {weight} but must be positive and finite.")
    x, history, interrupted = init, [], False
    try:
        for beta in progress_line(betas, shown=progress):
            z = denoise(x, beta**-0.5)
            x = data.prox(z, 1 / (weight * beta), condition)
            history.append(float((x - z).norm() / x.norm().clamp_min(1e-30)))
    except KeyboardInterrupt:
        # As in minimize: what has been computed is worth keeping.
        interrupted = True
    if not bool(x.isfinite().all()):
        raise NumericalError(
            f"The image is not finite after {len(history)} steps; check the measurement and the penalties."
        )
    return Solution(x, history, len(history), None, interrupted)
