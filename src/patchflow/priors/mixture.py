r"""Gaussian mixtures: fixed ones, with their exact posterior, and mixtures whose parameters are learned.

References:
    Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint", 2022,
    https://arxiv.org/abs/2109.11375 (the mixture posterior; the printed weights lack a determinant)
    Bishop, "Mixture density networks", 1994, https://publications.aston.ac.uk/id/eprint/373/
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchflow.energy import Density
from patchflow.errors import InputError


class GaussianMixture(Density):
    r"""The density :math:`\sum_k w_k N(m_k, \Sigma_k)`.

    Args:
        weights: The weights :math:`w_k`, (components,), positive; they are normalised.
        means: The means :math:`m_k`, (components, dim).
        covariances: The covariances :math:`\Sigma_k`, (components, dim, dim), or (components, dim) if diagonal.

    Raises:
        InputError: If the shapes do not fit, a weight is negative, or a covariance is not positive definite.
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        count, dim = means.shape
        diagonal = covariances.ndim == 2
        if (
            weights.shape != (count,)
            or covariances.shape != (count, dim, dim)[: 2 if diagonal else 3]
        ):
            raise InputError(
                f"Weights {tuple(weights.shape)}, means {tuple(means.shape)} and covariances "
                f"{tuple(covariances.shape)} do not fit; give (K,), (K, dim) and (K, dim, dim) or (K, dim)."
            )
        if not ((weights >= 0).all() and weights.sum() > 0):
            raise InputError(f"The weights {weights.tolist()} must not be negative, nor all zero.")
        if diagonal:
            failed, factors = bool((covariances <= 0).any()), covariances.clamp_min(0).sqrt()
        else:
            factors, info = torch.linalg.cholesky_ex(covariances)
            failed = bool(info.any())
        if failed:
            raise InputError(
                "A covariance of the mixture is not positive definite; add a multiple of the identity."
            )
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)

    @property
    def weights(self) -> Float[Tensor, " components"]:
        """The normalised weights."""
        return self.log_weights.exp()

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used."""
        return -self._log_joint(x).logsumexp(1)

    def responsibilities(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch components"]:
        """The probability of each component given a point."""
        return self._log_joint(x).softmax(1)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples; see :meth:`Density.sample`."""
        k = torch.multinomial(self.weights, count, replacement=True)
        noise = torch.randn(count, self.means.shape[1]).to(self.means)
        if self.factors.ndim == 2:
            return self.means[k] + self.factors[k] * noise
        return self.means[k] + torch.einsum("nij,nj->ni", self.factors[k], noise)

    def posterior(
        self, matrix: Float[Tensor, "data dim"], std: float | int, y: Float[Tensor, " data"]
    ) -> GaussianMixture:
        r"""The exact law of :math:`X` given :math:`Y = AX + \Xi = y` with :math:`\Xi \sim N(0, b^2 I)`.

        .. math::
            \tilde\Sigma_k = (A^\top A / b^2 + \Sigma_k^{-1})^{-1}, \quad
            \tilde m_k = \tilde\Sigma_k (A^\top y / b^2 + \Sigma_k^{-1} m_k), \quad
            \tilde w_k \propto w_k \sqrt{|\tilde\Sigma_k| / |\Sigma_k|}\;
            e^{\frac12 (\tilde m_k^\top \tilde\Sigma_k^{-1} \tilde m_k - m_k^\top \Sigma_k^{-1} m_k)}

        Args:
            matrix: The matrix :math:`A`.
            std: The standard deviation :math:`b` of the noise.
            y: The measurement.

        Raises:
            InputError: If matrix and measurement do not fit the mixture.
        """
        if matrix.shape != (len(y), self.means.shape[1]):
            raise InputError(
                f"A matrix of shape {tuple(matrix.shape)} does not map dimension {self.means.shape[1]} to the "
                f"{len(y)} values of y; give ({len(y)}, {self.means.shape[1]})."
            )
        full = torch.diag_embed(self.factors) if self.factors.ndim == 2 else self.factors
        precision = torch.cholesky_inverse(full)
        information = precision @ self.means[:, :, None]
        factor = torch.linalg.cholesky(matrix.T @ matrix / std**2 + precision)
        shift = (matrix.T @ y / std**2)[None, :, None] + information
        means = torch.cholesky_solve(shift, factor)
        log_weights = (
            self.log_weights
            + 0.5 * (means * shift).sum((1, 2))
            - 0.5 * (self.means[:, :, None] * information).sum((1, 2))
            - factor.diagonal(dim1=1, dim2=2).log().sum(1)
            - full.diagonal(dim1=1, dim2=2).log().sum(1)
        )
        return GaussianMixture(
            log_weights.softmax(0), means[:, :, 0], torch.cholesky_inverse(factor)
        )

    def _log_joint(self, x: Tensor) -> Tensor:
        centred = x[:, None] - self.means
        if self.factors.ndim == 2:
            white, log_det = centred / self.factors, self.factors.log().sum(1)
        else:
            white = torch.linalg.solve_triangular(
                self.factors, centred.permute(1, 2, 0), upper=False
            ).permute(2, 0, 1)
            log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi)
        return self.log_weights - 0.5 * white.square().sum(2) - log_det - constant


class ConditionalMixture(Density):
    r"""A learned mixture :math:`\sum_k w_k(y) N(m_k, \mathrm{diag}\,s_k^2)`: the latent law of a multimodal target.

    A bijection of bounded Lipschitz constant cannot tear a normal law into modes; a latent law with modes of its
    own does not ask it to. The weights depend on the condition through a network, means and scales are shared.

    Args:
        dim: Dimension.
        components: Number of components; more than there are modes does no harm.
        condition_dim: Dimension of the condition; 0 for none.
        hidden: Width of the network of the weights.
        features: What is made of the condition first, usually a standardisation.

    References:
        Izmailov et al., "Semi-supervised learning with normalizing flows", 2020, https://arxiv.org/abs/1912.13025
    """

    def __init__(
        self,
        dim: int,
        components: int,
        condition_dim: int = 0,
        *,
        hidden: int = 64,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(components, dim))
        self.log_scales = nn.Parameter(torch.zeros(components, dim))
        self.logits = nn.Parameter(torch.zeros(components))
        self.features = nn.Identity() if features is None else features
        self.net = (
            nn.Sequential(
                nn.Linear(condition_dim, hidden), nn.ReLU(), nn.Linear(hidden, components)
            )
            if condition_dim
            else None
        )

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "batch dim"]) -> None:
        """Place the components on data: centres far from each other, each as wide as the points nearest to it.

        Args:
            x: Data, more points than components.

        Raises:
            InputError: If there are too few points.

        References:
            Arthur, Vassilvitskii, "k-means++", 2007, https://doi.org/10.1145/1283383.1283494
        """
        count = len(self.means)
        if len(x) <= count:
            raise InputError(f"{len(x)} points cannot place {count} components; give more points.")
        centres = x[torch.randint(len(x), (1,))]
        for _ in range(count - 1):
            distance = torch.cdist(x, centres).min(1).values.square()
            centres = torch.cat((centres, x[torch.multinomial(distance + 1e-30, 1)]))
        nearest = torch.cdist(x, centres).argmin(1)
        overall = x.std(0)
        for k in range(count):
            own = x[nearest == k]
            self.means[k] = own.mean(0)
            scale = own.std(0) if len(own) > 2 else overall
            self.log_scales[k] = torch.maximum(scale, 1e-3 * overall).clamp_min(1e-12).log()

    def forward(
        self, x: Float[Tensor, "batch dim"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`."""
        # |x - m|^2 / s^2 as three matrix products: no tensor of batch times components times dimension.
        precision = (-2 * self.log_scales).exp()
        centre = self.means.detach().mean(0)
        x, means = x - centre, self.means - centre
        square = (
            x.square() @ precision.T
            - 2 * x @ (precision * means).T
            + (precision * means.square()).sum(1)
        )
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi)
        log_joint = self._log_weights(condition) - 0.5 * square - self.log_scales.sum(1) - constant
        return -log_joint.logsumexp(1)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count dim"]:
        """Draw samples; see :meth:`Density.sample`."""
        weights = self._log_weights(condition).exp().expand(count, -1)
        k = torch.multinomial(weights, 1)[:, 0]
        noise = torch.randn(count, self.means.shape[1]).to(self.means)
        return self.means[k] + self.log_scales[k].exp() * noise

    def _log_weights(self, condition: Tensor | None) -> Tensor:
        if self.net is None or condition is None:
            return self.logits.log_softmax(0)[None]
        return (self.logits + self.net(self.features(condition))).log_softmax(1)
