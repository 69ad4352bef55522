"""Gaussian densities, exactly normalised."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Density
from patchflow.errors import InputError


class StandardNormal(Density):
    r"""The density :math:`N(0, I)`, the latent law of flows: :math:`E(x) = \tfrac12\|x\|^2 + \tfrac d2 \log 2\pi`.

    Args:
        shape: Shape of one sample.
    """

    # A tensor, so that samples follow the module's device and type.
    reference: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("reference", torch.zeros(()), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch *event"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        constant = 0.5 * math.prod(self.shape) * math.log(2 * math.pi)
        return 0.5 * x.flatten(1).square().sum(1) + constant

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count *event"]:
        """Draw samples; see :meth:`Density.sample`."""
        return torch.randn(count, *self.shape).to(self.reference)


class Gaussian(Density):
    r"""The density :math:`N(m, \Sigma)`, evaluated through the Cholesky factor of :math:`\Sigma`.

    Args:
        mean: The mean :math:`m`, of shape (dim,).
        covariance: The covariance :math:`\Sigma`, of shape (dim, dim), symmetric and positive definite.

    Raises:
        InputError: If the shapes do not fit or the covariance is not positive definite.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"A mean of shape {tuple(mean.shape)} and a covariance of shape {tuple(covariance.shape)} do not fit; "
                "give (dim,) and (dim, dim)."
            )
        # The Cholesky factorisation reads the lower triangle only.
        skew = float((covariance - covariance.T).abs().max())
        if skew > 1e-5 * float(covariance.abs().max()):
            raise InputError(
                f"The covariance differs from its transpose by {skew:g} but must be symmetric; use (C + C.T) / 2."
            )
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            smallest = float(torch.linalg.eigvalsh(covariance)[0])
            raise InputError(
                f"The covariance has the eigenvalue {smallest:g} but must be positive definite; add a multiple of I."
            )
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        white = torch.linalg.solve_triangular(self.factor, (x - self.mean).T, upper=False)
        constant = self.factor.diagonal().log().sum() + 0.5 * len(self.mean) * math.log(2 * math.pi)
        return 0.5 * white.square().sum(0) + constant

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples; see :meth:`Density.sample`."""
        return self.mean + torch.randn(count, len(self.mean)).to(self.mean) @ self.factor.T
