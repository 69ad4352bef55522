r"""Maximum likelihood of a Gaussian mixture with full covariances by expectation maximisation.

.. math:: \max_{w, m, \Sigma} \sum_n \log \sum_k w_k N(x_n \mid m_k, \Sigma_k) \quad\text{with}\quad
          \Sigma_k \succeq \varepsilon I.

The floor :math:`\varepsilon` keeps the likelihood bounded, and each step is exact under it: the best covariance is the
weighted sample covariance with its eigenvalues raised to :math:`\varepsilon`. So the likelihood never decreases,
up to rounding, which adding :math:`\varepsilon I` would not guarantee. Both steps are one product each with the
second-order features of the points (:mod:`patchflow.numerics.quadratic`), in the coordinates in which the data
have covariance one, chunk by chunk in bounded memory.

References:
    Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977
    Arthur, Vassilvitskii, "k-means++: the advantages of careful seeding", 2007
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.errors import InputError
from patchflow.numerics.quadratic import coefficients, feature_count, features, moments
from patchflow.progress import progress_line

# Points whose features are in memory at a time.
_CHUNK = 4096
# Points per component on which centres are placed.
_SEEDING = 100
_LLOYD_STEPS = 10
# A component that owns less than this many points is left out; so the likelihood loses nothing.
_EMPTY = 1e-3


class MixtureFit(NamedTuple):
    """A fitted mixture, and how it came about.

    Attributes:
        weights: (components,); those without points are left out.
        means: (components, dim).
        covariances: (components, dim, dim).
        log_likelihood: The mean log-likelihood of a point, in nats, before each step and after the last.
        converged: Whether a step gained less than the tolerance.
        interrupted: Whether the user stopped it (Ctrl-C).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    log_likelihood: list[float]
    converged: bool
    interrupted: bool = False


@torch.no_grad()
def fit_mixture(
    points: Float[Tensor, "count dim"],
    components: int,
    *,
    floor: float | int = 1e-6,
    tolerance: float | int = 1e-3,
    max_iterations: int = 500,
    start: MixtureFit | None = None,
    progress: bool = False,
) -> MixtureFit:
    r"""Fit a mixture to points, by default from a k-means++ start drawn from torch's global generator.

    Args:
        points: The points; the work is done in their precision, sums in float64. Single precision becomes double when
            a step gains less than rounding takes away, so that the likelihood never decreases.
        components: The number of components.
        floor: The smallest eigenvalue :math:`\varepsilon` of a covariance, in squared units of the points; 1e-6 is a
            quarter of a grey level of an 8-bit image.
        tolerance: Stop when a step gains less than this many nats per point.
        max_iterations: Stop after this many steps in any case.
        start: A mixture to go on from.
        progress: Show a progress line.

    Returns:
        The mixture and its record. When interrupted (Ctrl-C), the mixture so far.

    Raises:
        InputError: If there are too few different points, one is not finite, or a number is out of range.
    """
    check_points(points, components, floor, max_iterations)
    count, dim = points.shape
    space = Whitening(points, floor)
    z = space.whiten(points)
    if start is None:
        mixture = start_mixture(points, components, floor)
    else:
        mixture = start.weights.double(), start.means.double(), start.covariances.double()
    before, history = mixture, []
    converged = interrupted = False
    bar = progress_line(total=max_iterations, shown=progress)
    try:
        while True:
            sums, total = _expect(z, space.theta(*mixture).to(z))
            value = total / count + space.log_det
            if history and value < history[-1] and z.dtype != torch.float64:
                # Rounding outweighs what a step gains: back to the mixture before it, and on in double precision.
                z, mixture = z.double(), before
                history.pop()
                continue
            history.append(value)
            bar.set_postfix({"log-likelihood": f"{value:.4f}"}, refresh=False)
            converged = len(history) > 1 and value - history[-2] < tolerance
            if converged or len(history) > max_iterations:
                break
            before, mixture = mixture, space.maximise(sums, count)
            bar.update()
    except KeyboardInterrupt:
        # What has been computed is worth keeping; the record says it.
        interrupted = True
    finally:
        bar.close()
    weights, means, covariances = (t.to(points) for t in mixture)
    return MixtureFit(weights, means, covariances, history, converged, interrupted)


class Whitening:
    """The coordinates in which the points have mean zero and covariance one; parameters stay in those of the user."""

    def __init__(self, points: Tensor, floor: float | int) -> None:
        count, dim = points.shape
        self.floor = floor
        self.centre = points.mean(0, dtype=torch.float64)
        square = torch.zeros(dim, dim, dtype=torch.float64, device=points.device)
        for part in points.split(1 << 16):
            centred = part.double() - self.centre
            square += centred.T @ centred
        values, vectors = torch.linalg.eigh(square / count)
        scales = values.clamp_min(floor).sqrt()
        self.inverse = vectors * scales
        self.matrix = (vectors / scales).T
        self.log_det = -float(scales.log().sum())

    def whiten(self, points: Tensor) -> Tensor:
        """The whitened points, one per column."""
        shift = (self.matrix @ self.centre)[:, None]
        parts = [self.matrix @ part.double().T - shift for part in points.split(1 << 16)]
        return torch.cat([part.to(points) for part in parts], 1)

    def distances(self, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients of the squared Mahalanobis distances of whitened points, and half the log-determinants.

        The determinants are those of the covariances of whitened points.
        """
        factors = torch.linalg.cholesky(self.matrix @ covariances @ self.matrix.T)
        precision = torch.cholesky_inverse(factors)
        centres = (means - self.centre) @ self.matrix.T
        slope = (precision @ centres[:, :, None])[:, :, 0]
        theta = coefficients(2 * precision, -2 * slope, (slope * centres).sum(1))
        return theta, factors.diagonal(dim1=1, dim2=2).log().sum(1)

    def theta(self, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
        """The coefficients of the joint log-densities of whitened points, up to the constant ``log_det``."""
        distances, log_dets = self.distances(means, covariances)
        theta = -0.5 * distances
        theta[:, 0] += weights.log() - log_dets - 0.5 * len(self.centre) * math.log(2 * math.pi)
        return theta

    def maximise(self, sums: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best weights, means and covariances for weighted sums of features of whitened points."""
        sums = sums[sums[:, 0] > _EMPTY]
        owned, first, second = moments(sums)
        centres = first / owned[:, None]
        spread = second / owned[:, None, None] - centres[:, :, None] * centres[:, None]
        return owned / count, *self.unwhiten(centres, spread)

    def unwhiten(self, centres: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Means and covariances of points for those of whitened ones, with the floor."""
        means = centres @ self.inverse.T + self.centre
        return means, raise_eigenvalues(self.inverse @ spread @ self.inverse.T, self.floor)


def raise_eigenvalues(covariances: Tensor, floor: float | int) -> Tensor:
    """The nearest matrices whose eigenvalues are at least ``floor``."""
    values, vectors = torch.linalg.eigh(covariances)
    return vectors * values.clamp_min(floor)[:, None] @ vectors.mT


def _expect(z: Tensor, theta: Tensor) -> tuple[Tensor, float]:
    """The features summed with the responsibilities, and the sum of the log-likelihoods."""
    count = z.shape[1]
    sums = torch.zeros(theta.shape, dtype=torch.float64, device=z.device)
    total = 0.0
    buffer = z.new_empty(feature_count(len(z)), min(_CHUNK, count))
    for part in z.split(_CHUNK, 1):
        phi = features(part, buffer[:, : part.shape[1]])
        joint = theta @ phi
        log_likelihood = joint.logsumexp(0)
        total += float(log_likelihood.sum(dtype=torch.float64))
        sums += joint.sub_(log_likelihood).exp_() @ phi.T
    return sums, total


def start_mixture(
    points: Tensor, components: int, floor: float | int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of a part of the points, each with its own mean and covariance, shrunk towards that of all."""
    chosen = torch.randperm(len(points), device=points.device)[: _SEEDING * components]
    part = points[chosen].double()
    centres = part[torch.randint(len(part), (1,))]
    distance = (part - centres).square().sum(1)
    for _ in range(components - 1):
        if not bool((distance > 0).any()):
            raise InputError(
                f"There are only {len(centres)} different points among {len(part)} but {components} components; "
                "use fewer components, or images that vary more."
            )
        new = part[torch.multinomial(distance, 1)]
        centres = torch.cat((centres, new))
        distance = torch.minimum(distance, (part - new).square().sum(1))
    nearest = torch.cdist(part, centres).argmin(1)
    for _ in range(_LLOYD_STEPS):
        sizes = nearest.bincount(minlength=components)
        sums = torch.zeros_like(centres).index_add_(0, nearest, part)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
        nearest = torch.cdist(part, centres).argmin(1)
    sizes = nearest.bincount(minlength=components).to(part)
    residual = part - centres[nearest]
    common = residual.T @ residual / len(part)
    spread = torch.stack(
        [residual[nearest == k].T @ residual[nearest == k] for k in range(components)]
    )
    # As if each cluster held as many more points as there are dimensions, with the common covariance.
    dim = part.shape[1]
    covariances = (spread + dim * common) / (sizes + dim)[:, None, None]
    return (sizes + 1) / (sizes + 1).sum(), centres, raise_eigenvalues(covariances, floor)


def check_points(points: Tensor, components: int, floor: float | int, max_iterations: int) -> None:
    """Refuse points and settings that no mixture can be fitted with.

    Raises:
        InputError: As said.
    """
    if components < 1 or max_iterations < 1 or not 0 < floor < math.inf:
        raise InputError(
            f"Got {components} components, {max_iterations} iterations and the floor {floor}; all must be positive."
        )
    if len(points) <= components:
        raise InputError(
            f"{len(points)} points cannot place {components} components; give more points or fewer components."
        )
    if not bool(points.isfinite().all()):
        raise InputError("A point is not finite; mask or replace such pixels first.")
