r"""Gaussian mixtures with hundreds of full covariances on patches: the prior of EPLL.

.. math:: E(q) = -\log \sum_{k=1}^{K} w_k\, N(B q \mid m_k, \Sigma_k).

:math:`B` is the identity, or it takes the mean of the patch out: :math:`B` then has orthonormal rows that are
orthogonal to the constant patch, and the energy does not depend on the brightness. Summed over all patches of an image
by :class:`patchflow.priors.patch.PatchPrior` the energy is the negative *expected patch log-likelihood*.

The mixture is evaluated in the coordinates in which its overall covariance is the identity, by second-order features
(:mod:`patchflow.numerics.quadratic`). Single precision is enough there, but for thin components far from the mean of
all patches (clipped white in a grey image): their energies may be off by a few nats.

References:
    Zoran, Weiss, "From learning models of natural image patches to whole image restoration", ICCV 2011
    Parameswaran, Deledalle, Denis, Nguyen, "Accelerating GMM-based patch priors for image restoration: three
    ingredients for a 100x speed-up", 2018, https://arxiv.org/abs/1710.08124
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Density
from patchflow.errors import InputError
from patchflow.numerics.quadratic import coefficients, features, pull_back

# Points whose features are in memory at a time: 703 features of 6 x 6 patches take 11 MB.
_CHUNK = 4096


class PatchMixture(Density):
    r"""A Gaussian mixture on patches; see the module's formula.

    Args:
        weights: The weights :math:`w_k`, (components,), positive; they are normalised.
        means: The means :math:`m_k`, (components, dim).
        covariances: The covariances :math:`\Sigma_k`, (components, dim, dim).
        remove_mean: Whether the mean of a patch is taken out; patches then have one number more than ``dim``.

    Raises:
        InputError: If the shapes do not fit, a weight is not positive, or a covariance is not positive definite.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor
    theta: Tensor
    centre: Tensor
    whitening: Tensor
    basis: Tensor | None

    def __init__(
        self, weights: Tensor, means: Tensor, covariances: Tensor, *, remove_mean: bool = False
    ) -> None:
        super().__init__()
        count, dim = means.shape
        if weights.shape != (count,) or covariances.shape != (count, dim, dim):
            raise InputError(
                f"Weights {tuple(weights.shape)}, means {tuple(means.shape)} and covariances "
                f"{tuple(covariances.shape)} do not fit; give (K,), (K, dim) and (K, dim, dim)."
            )
        if not bool((weights > 0).all() and weights.isfinite().all()):
            raise InputError(
                f"The smallest weight of the mixture is {float(weights.min()):g} but all must be positive and finite; "
                "leave components of weight zero out."
            )
        self.remove_mean = remove_mean
        basis = mean_free_basis(dim + 1).to(means) if remove_mean else None
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        for name in ("theta", "centre", "whitening"):
            self.register_buffer(name, None, persistent=False)
        self._prepare()
        self.register_load_state_dict_post_hook(lambda module, _: module._prepare())

    @property
    def weights(self) -> Float[Tensor, " components"]:
        """The normalised weights."""
        return self.log_weights.exp()

    def forward(
        self, x: Float[Tensor, "batch patch"], condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Evaluate; see :meth:`Energy.forward`. The condition is not used; there are no second derivatives."""
        return _MixtureEnergy.apply(self._whiten(x), self.theta)

    def log_joint(self, x: Float[Tensor, "batch patch"]) -> Float[Tensor, "batch components"]:
        r"""The numbers :math:`\log w_k + \log N(Bq \mid m_k, \Sigma_k)`."""
        z = self._whiten(x)
        return torch.cat([(self.theta @ features(part)).T for part in z.split(_CHUNK, 1)])

    def component(self, x: Float[Tensor, "batch patch"]) -> Tensor:
        """The number of the most probable component of each patch."""
        return self._best(self._whiten(x), self.theta)

    def sample(self, count: int, condition: Tensor | None = None) -> Float[Tensor, "count patch"]:
        """Draw patches, of mean zero where the mean is taken out; see :meth:`Density.sample`."""
        k = torch.multinomial(self.weights, count, replacement=True)
        noise = torch.randn(count, self.means.shape[1]).to(self.means)
        factors = torch.linalg.cholesky(self.covariances)
        drawn = self.means[k] + torch.einsum("nij,nj->ni", factors[k], noise)
        return drawn if self.basis is None else drawn @ self.basis

    def blurred(self, variance: float | int) -> PatchMixture:
        r"""The mixture of :math:`Bq + \sqrt{v}\,\xi` with :math:`\xi \sim N(0, I)`: covariances :math:`\Sigma_k + v I`.

        Args:
            variance: The variance :math:`v` of the noise.
        """
        noise = variance * torch.eye(self.means.shape[1]).to(self.means)
        return PatchMixture(
            self.weights, self.means, self.covariances + noise, remove_mean=self.remove_mean
        )

    def denoise(
        self, x: Float[Tensor, "batch patch"], std: float | int
    ) -> Float[Tensor, "batch patch"]:
        r"""Remove noise from patches by the Wiener filter of the component that is most probable given the noise.

        .. math:: m_k + \Sigma_k (\Sigma_k + s^2 I)^{-1} (Bq - m_k), \qquad
                  k = \arg\max_k w_k N(Bq \mid m_k, \Sigma_k + s^2 I)

        Args:
            x: Noisy patches; where the mean is taken out it is kept as it is.
            std: The standard deviation :math:`s` of the noise.
        """
        noisy = self.blurred(std**2)
        filters = torch.linalg.solve(noisy.covariances, self.covariances)
        owner = noisy.component(x)
        order = owner.argsort()
        q = self.project(x)[order]
        start = 0
        for k, size in enumerate(owner.bincount(minlength=len(filters)).tolist()):
            rows = slice(start, start := start + size)
            q[rows] = torch.addmm(self.means[k], q[rows] - self.means[k], filters[k])
        result = torch.empty_like(x)
        result[order] = q if self.basis is None else q @ self.basis
        return result if self.basis is None else result + x.mean(1, keepdim=True)

    def project(self, x: Float[Tensor, "batch patch"]) -> Float[Tensor, "batch dim"]:
        """The coordinates :math:`Bq` of patches."""
        return x if self.basis is None else x @ self.basis.T

    @staticmethod
    def _best(z: Tensor, theta: Tensor) -> Tensor:
        parts = [(theta @ features(part)).argmax(0) for part in z.split(_CHUNK, 1)]
        return torch.cat(parts) if parts else z.new_empty(0, dtype=torch.long)

    def _whiten(self, x: Tensor) -> Tensor:
        return self.whitening @ (self.project(x) - self.centre).T

    @torch.no_grad()
    def _prepare(self) -> None:
        # In double precision, once; single precision is enough for what follows.
        weights, means, covariances = (
            t.double() for t in (self.weights, self.means, self.covariances)
        )
        factors, info = torch.linalg.cholesky_ex(covariances)
        if bool(info.any()):
            raise InputError(
                f"Covariance {int(info.nonzero()[0])} of the mixture is not positive definite; add a multiple of the "
                "identity, or learn it with a larger floor."
            )
        centre = weights @ means
        spread = means - centre
        overall = torch.einsum("k,kij->ij", weights, covariances)
        overall = overall + torch.einsum("k,ki,kj->ij", weights, spread, spread)
        values, vectors = torch.linalg.eigh(overall)
        whitening = values.clamp_min(values.max() * 1e-15).rsqrt()[:, None] * vectors.mT
        # W is inverted by its own factors: W^-1 = V diag(sqrt(values)).
        unwhitening = torch.linalg.inv(whitening)
        precision = unwhitening.T @ torch.cholesky_inverse(factors) @ unwhitening
        z = spread @ whitening.T
        slope = (precision @ z[:, :, None])[:, :, 0]
        log_det = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = (
            self.log_weights.double()
            - log_det
            - 0.5 * (slope * z).sum(1)
            - 0.5 * means.shape[1] * math.log(2 * math.pi)
        )
        self.theta = coefficients(-precision, slope, constant).to(self.means)
        self.centre, self.whitening = centre.to(self.means), whitening.to(self.means)


def mean_free_basis(size: int) -> Float[Tensor, "rest size"]:
    """Orthonormal rows that are orthogonal to the constant vector.

    Args:
        size: The length of the vectors.
    """
    # The reflection that takes the first unit vector to the constant one; its other rows are what is wanted.
    v = torch.full((size,), size**-0.5, dtype=torch.float64)
    v[0] -= 1
    return (torch.eye(size, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))[1:]


class _MixtureEnergy(torch.autograd.Function):
    """The energy of whitened points, with the gradient computed along where it is wanted."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        energies, slopes = z.new_empty(z.shape[1]), torch.empty_like(z) if wanted else None
        start = 0
        for part in z.split(_CHUNK, 1):
            rows = slice(start, start := start + part.shape[1])
            joint = theta @ features(part)
            energies[rows] = -joint.logsumexp(0)
            if slopes is not None:
                slopes[:, rows] = pull_back(part, theta.T @ -joint.softmax(0))
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad_outputs[0], None
