r"""Total variation with any noise, for projectors: the standard competitor in computed tomography.

.. math:: \hat x \in \arg\min_x \; D(A x \mid y) + w\,\mathrm{TV}(x), \qquad D = -\log p(y \mid \cdot)

by the over-relaxed primal-dual method of Chambolle and Pock with two dual variables, :math:`q` for the data and
:math:`p` for the gradient :math:`\nabla x`: each step takes one projection, one backprojection, and the
noise's proximal map, ray by ray. The primal step is preconditioned in the Fourier domain by

.. math:: \big(\rho_1\, c\, m(\xi)/|\xi| + \rho_2 |\xi|^2\big)^{-1},

the inverse of what :math:`\rho_1 A^\top A + \rho_2 \nabla^\top\nabla` is in an infinite image; :math:`m` is small in
the directions that were not measured, where only the prior acts.

References:
    Sidky, Jorgensen, Pan, "Convex optimization problem prototyping for image reconstruction in computed tomography with
    the Chambolle-Pock algorithm", Phys. Med. Biol. 57, 2012, https://arxiv.org/abs/1111.5632
    Pock, Chambolle, "Diagonal preconditioning for first order primal-dual algorithms in convex optimization", 2011
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from patchflow.errors import InputError, NumericalError
from patchflow.numerics.linalg import power_iteration
from patchflow.priors.variation import TotalVariation, image_gradient, minus_divergence
from patchflow.problems.likelihood import Likelihood, ProximableNoise
from patchflow.problems.projector import Projector
from patchflow.solution import Solution

# Of the dual variable for the gradient, per unit of weight: differences of 0.04 count as edges.
GRADIENT_STEP = 25.0
# Below 2; 1 is the original method.
RELAXATION = 1.8
# The image is padded by this factor, so that what leaves it does not come in on the other side.
_PADDING = 1.5
# A few rays measure so few photons that their curvature would stop all others.
_QUANTILE = 0.1


@torch.no_grad()
def reconstruct(
    likelihood: Likelihood,
    y: Tensor,
    init: Tensor,
    *,
    weight: float | int,
    isotropic: bool = True,
    max_iterations: int = 300,
    tolerance: float = 1e-2,
    callback: Callable[[int, Tensor, float], Mapping[str, str] | None] | None = None,
    progress: bool = False,
) -> Solution:
    r"""Minimise the negative log-likelihood plus ``weight`` times the total variation.

    It stops when the duality gap, the distance to the smallest energy among images in the range of the present one
    (and half as much more on both sides), is at most ``tolerance`` times the energy.

    Args:
        likelihood: A projector and a noise with a proximal map.
        y: Sinograms (batch, channels, angles, bins).
        init: Start (batch, channels, height, width), for example filtered backprojection.
        weight: The weight :math:`w`, in nats per unit of variation.
        isotropic: See :class:`patchflow.priors.variation.TotalVariation`.
        max_iterations: Stop after this many iterations in any case.
        tolerance: See above.
        callback: Called after each step with its number, the current x and its energy; what it returns is shown.
        progress: Show a progress line.

    Returns:
        The last point, the energies along the way (up to a constant of y), and whether the gap closed. When
        interrupted (Ctrl-C), the point so far.

    Raises:
        InputError: If the weight is not positive, the operator no projector, or the noise has no proximal map.
        NumericalError: If the energy is not finite.
    """
    operator, noise = likelihood.operator, likelihood.noise
    if not (isinstance(operator, Projector) and isinstance(noise, ProximableNoise)):
        raise InputError(
            f"Total variation of sinograms needs a projector and Gaussian or Poisson noise, not "
            f"{type(operator).__name__} and {type(noise).__name__}; use patchflow.primal_dual for other operators."
        )
    if not weight > 0:
        raise InputError(f"The weight of total variation is {weight} but must be positive.")
    variation = TotalVariation(isotropic=isotropic)
    best = noise.log_prob(y, y).sum()
    rho = float(noise.precision(y).flatten()[:: max(1, y.numel() // 10**6)].quantile(_QUANTILE))
    sigma = GRADIENT_STEP * weight
    step = _preconditioner(operator, init, rho, sigma)

    def data(a: Tensor) -> Tensor:
        return best - noise.log_prob(y, a).sum()

    x = x_new = init
    image, gradient = operator(x), image_gradient(x)
    # The dual variables of the start are those of its residual, and none for the variation.
    q = rho * (image - noise.prox(image, 1 / rho, y))
    p = torch.zeros_like(gradient)
    slope = operator.adjoint(q)
    history: list[float] = []
    converged = False
    bar = tqdm(total=max_iterations, disable=not progress, unit="step", dynamic_ncols=True)
    try:
        for k in range(max_iterations):
            x_new = x - step(slope)
            image_new, gradient_new = operator(x_new), image_gradient(x_new)
            ahead = q / rho + 2 * image_new - image
            nearest = noise.prox(ahead, 1 / rho, y)
            q_new = rho * (ahead - nearest)
            p_new = variation.project(p + sigma * (2 * gradient_new - gradient), weight)
            slope_new = operator.adjoint(q_new) + minus_divergence(p_new)
            energy = data(image_new) + weight * variation(x_new).sum()
            history.append(float(energy))
            # By Fenchel and Young, the conjugate of D at q_new = D'(nearest) is <q_new, nearest> - D(nearest).
            dual = data(nearest) - (q_new * nearest).sum() + _lowest(slope_new, x_new)
            converged = bool(energy - dual <= tolerance * energy.abs())
            if not torch.isfinite(energy):
                raise NumericalError(
                    f"The energy is {history[-1]} at step {k}; check the sinogram and the number of photons."
                )
            # Over-relaxation of all variables; their images are linear, so they relax alike.
            x, q, p, image, gradient, slope = (
                torch.lerp(old, new, RELAXATION)
                for old, new in (
                    (x, x_new),
                    (q, q_new),
                    (p, p_new),
                    (image, image_new),
                    (gradient, gradient_new),
                    (slope, slope_new),
                )
            )
            shown = {"energy": f"{history[-1]:.5g}", "gap": f"{float(energy - dual):.3g}"}
            if callback is not None:
                shown |= callback(k, x_new, history[-1]) or {}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if converged:
                break
    except KeyboardInterrupt:
        # What has been computed is worth keeping; the caller sees that fewer steps were taken.
        pass
    finally:
        bar.close()
    return Solution(x_new, history, len(history), converged)


def _lowest(slope: Tensor, x: Tensor) -> Tensor:
    r"""The smallest :math:`\langle s, x'\rangle` over images :math:`x'` in the widened range of x."""
    low, high = x.min(), x.max()
    margin = (high - low) / 2
    return torch.minimum(slope * (low - margin), slope * (high + margin)).sum()


def _preconditioner(
    operator: Projector, like: Tensor, rho: float, sigma: float
) -> Callable[[Tensor], Tensor]:
    height, width = operator.domain_shape
    # Multiples of 32 have fast transforms.
    grid = (32 * math.ceil(_PADDING * height / 32), 32 * math.ceil(_PADDING * width / 32))
    k0 = 2 * torch.pi * torch.fft.fftfreq(grid[0], device=like.device, dtype=like.dtype)[:, None]
    k1 = 2 * torch.pi * torch.fft.rfftfreq(grid[1], device=like.device, dtype=like.dtype)
    spectrum = operator.normal_spectrum(grid).to(like)
    factors = 1 / (rho * spectrum + sigma * (4 - 2 * k0.cos() - 2 * k1.cos()))

    def apply(v: Tensor) -> Tensor:
        filtered = torch.fft.irfft2(factors * torch.fft.rfft2(v, s=grid), s=grid)
        return filtered[..., :height, :width]

    def scaled(v: Tensor) -> Tensor:
        inner = rho * operator.adjoint(operator(v)) + sigma * minus_divergence(image_gradient(v))
        return apply(inner)

    # The method converges if the largest eigenvalue is at most 1; power iterations approach it from below.
    start = torch.randn(
        (1, 1, height, width), generator=torch.Generator().manual_seed(0), dtype=like.dtype
    )
    largest = 1.05 * power_iteration(scaled, start.to(like), 20)
    return lambda v: apply(v) / largest
