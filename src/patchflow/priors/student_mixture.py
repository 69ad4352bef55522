r"""Student-t mixtures with full scatter matrices on patches: EPLL with heavier tails.

.. math:: E(q) = -\log \sum_{k=1}^{K} w_k\, t_{\nu_k}(q; m_k, \Sigma_k),

see :class:`patchflow.priors.student.StudentMixture` for the density. Where :math:`\nu_k` is small, the energy of a
patch that does not fit grows with the logarithm of its distance and not with its square.

References:
    Peel, McLachlan, "Robust mixture modelling using the t distribution", 2000,
    https://doi.org/10.1023/A:1008981510081
    Zoran, Weiss, "From learning models of natural image patches to whole image restoration", ICCV 2011
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Density
from patchflow.errors import InputError
from patchflow.numerics.quadratic import features, pull_back
from patchflow.priors.patch_mixture import PatchMixture
from patchflow.priors.student import StudentMixture, log_densities

# Points whose features are in memory at a time.
_CHUNK = 4096


class PatchStudentMixture(Density):
    r"""A Student-t mixture for many points, with its gradient; see the module's formula.

    Args:
        weights: The weights :math:`w_k`, (components,), positive; they are normalised.
        means: The locations :math:`m_k`, (components, dim).
        scatters: The scatter matrices :math:`\Sigma_k`, (components, dim, dim).
        degrees: The degrees of freedom :math:`\nu_k`, (components,), positive.

    Raises:
        InputError: If the shapes do not fit, a weight or a degree is not positive, or a scatter matrix is not positive
            definite.
    """

    degrees: Tensor
    peaks: Tensor
    heights: Tensor

    def __init__(self, weights: Tensor, means: Tensor, scatters: Tensor, degrees: Tensor) -> None:
        super().__init__()
        if degrees.shape != weights.shape or not bool((degrees > 0).all()):
            raise InputError(
                f"Got {tuple(degrees.shape)} degrees of freedom for {tuple(weights.shape)} weights, the smallest "
                f"{float(degrees.min()):g}; give a positive one for each."
            )
        # Its log-densities tell the distances from the locations.
        self.gaussian = PatchMixture(weights, means, scatters)
        self.register_buffer("degrees", degrees)
        for name in ("peaks", "heights"):
            self.register_buffer(name, None, persistent=False)
        self._prepare()
        self.register_load_state_dict_post_hook(lambda module, _: module._prepare())

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used; there are no second derivatives."""
        gaussian = self.gaussian
        z = gaussian.whitening @ (x - gaussian.centre).T
        return _StudentEnergy.apply(z, gaussian.theta, self.peaks, self.heights, self.degrees)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples; see :meth:`Density.sample`."""
        g = self.gaussian
        return StudentMixture(g.weights, g.means, g.covariances, self.degrees).sample(count)

    @torch.no_grad()
    def _prepare(self) -> None:
        means, scatters = self.gaussian.means, self.gaussian.covariances.double()
        count, dim = means.shape
        log_dets = torch.linalg.cholesky(scatters).diagonal(dim1=1, dim2=2).log().sum(1)
        log_weights = self.gaussian.log_weights.double()
        # The logarithms of the joint densities of the Gaussian and the Student-t mixture at the locations.
        self.peaks = (log_weights - log_dets - 0.5 * dim * math.log(2 * math.pi)).to(means)
        zeros = log_dets.new_zeros(count, 1)
        heights = log_weights + log_densities(zeros, log_dets, self.degrees.double(), dim)[:, 0]
        self.heights = heights.to(means)


class _StudentEnergy(torch.autograd.Function):
    """The energy of whitened points, with the gradient computed along where it is wanted."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, theta: Tensor, peaks: Tensor, heights: Tensor, degrees: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        energies, slopes = z.new_empty(z.shape[1]), torch.empty_like(z) if wanted else None
        powers, nu = degrees[:, None] + len(z), degrees[:, None]
        start = 0
        for part in z.split(_CHUNK, 1):
            rows = slice(start, start := start + part.shape[1])
            squared = (2 * (peaks[:, None] - theta @ features(part))).clamp_min(0)
            joint = heights[:, None] - 0.5 * powers * torch.log1p(squared / nu)
            energies[rows] = -joint.logsumexp(0)
            if slopes is not None:
                # Each component pulls as a Gaussian one whose precision is (nu + d) / (nu + squared) times as large.
                pull = joint.softmax(0) * powers / (nu + squared)
                slopes[:, rows] = pull_back(part, theta.T @ -pull)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad_outputs[0], None, None, None, None
