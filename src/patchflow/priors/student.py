r"""Student-t mixtures: heavier tails than Gaussian ones."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Density
from patchflow.errors import InputError


class StudentMixture(Density):
    r"""The density :math:`\sum_k w_k\, t_{\nu_k}(m_k, \Sigma_k)` of multivariate Student-t laws.

    .. math::
        t_\nu(x; m, \Sigma) = \frac{\Gamma(\frac{\nu + d}{2})}{\Gamma(\frac\nu2) (\pi\nu)^{d/2} |\Sigma|^{1/2}}
        \Bigl(1 + \tfrac1\nu (x - m)^\top \Sigma^{-1} (x - m)\Bigr)^{-(\nu + d)/2}.

    Args:
        weights: The weights, (components,), positive; they are normalised.
        means: The locations, (components, dim).
        scatters: The scatter matrices :math:`\Sigma_k`, (components, dim, dim).
        degrees: The degrees of freedom :math:`\nu_k > 0`, (components,).

    Raises:
        InputError: If the shapes do not fit, or a weight, a scatter matrix or a degree is not positive.

    References:
        Peel, McLachlan, "Robust mixture modelling using the t distribution", 2000,
        https://doi.org/10.1023/A:1008981510081
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor
    degrees: Tensor

    def __init__(self, weights: Tensor, means: Tensor, scatters: Tensor, degrees: Tensor) -> None:
        super().__init__()
        count, dim = means.shape
        if (weights.shape, scatters.shape, degrees.shape) != (
            (count,),
            (count, dim, dim),
            (count,),
        ):
            raise InputError(
                f"Weights {tuple(weights.shape)}, means {tuple(means.shape)}, scatters {tuple(scatters.shape)} and "
                f"degrees {tuple(degrees.shape)} do not fit; give (K,), (K, dim), (K, dim, dim) and (K,)."
            )
        factors, info = torch.linalg.cholesky_ex(scatters)
        if info.any() or not ((weights > 0).all() and (degrees > 0).all()):
            raise InputError(
                "Weights and degrees of freedom must be positive, and scatter matrices positive definite."
            )
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)
        self.register_buffer("degrees", degrees)

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        centred = (x[:, None] - self.means).permute(1, 2, 0)
        white = torch.linalg.solve_triangular(self.factors, centred, upper=False)
        log_dets = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        tails = log_densities(white.square().sum(1), log_dets, self.degrees, x.shape[1])
        return -(self.log_weights[:, None] + tails).logsumexp(0)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples: normal ones over the root of a gamma variable; see :meth:`Density.sample`."""
        k = torch.multinomial(self.log_weights.exp(), count, replacement=True)
        noise = torch.randn(count, self.means.shape[1]).to(self.means)
        half = self.degrees[k] / 2
        width = torch.distributions.Gamma(half, half).sample().rsqrt()
        return self.means[k] + width[:, None] * torch.einsum("nij,nj->ni", self.factors[k], noise)


def log_densities(
    squared: Float[Tensor, "components count"],
    log_dets: Float[Tensor, " components"],
    degrees: Float[Tensor, " components"],
    dim: int,
) -> Float[Tensor, "components count"]:
    r"""The numbers :math:`\log t_{\nu_k}(x_n; m_k, \Sigma_k)`, differentiable in everything.

    Args:
        squared: The squared Mahalanobis distances :math:`(x_n - m_k)^\top \Sigma_k^{-1} (x_n - m_k)`.
        log_dets: The numbers :math:`\tfrac12 \log |\Sigma_k|`.
        degrees: The degrees of freedom :math:`\nu_k`.
        dim: Dimension of the points.
    """
    tail = 0.5 * (degrees + dim)
    constant = torch.lgamma(tail) - torch.lgamma(degrees / 2)
    constant = constant - 0.5 * dim * (math.pi * degrees).log() - log_dets
    return constant[:, None] - tail[:, None] * torch.log1p(squared / degrees[:, None])
