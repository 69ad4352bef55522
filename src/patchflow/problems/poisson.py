r"""Photon counting: noise of line integrals that were computed from counts.

A detector counts :math:`N \sim \mathrm{Poisson}(N_0 e^{-\mu a})` photons behind an object with line integral
:math:`a` in units of :math:`1/\mu`; the measurement is :math:`b = -\log(N / N_0) / \mu`.

References:
    Leuschner, Schmidt, Otero Baguer, Maass, "LoDoPaB-CT, a benchmark dataset for low-dose computed tomography
    reconstruction", Scientific Data 8, 2021, https://doi.org/10.1038/s41597-021-00893-z
    Sauer, Bouman, "A local update strategy for iterative reconstruction from projections", IEEE TSP 41(2), 1993
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.energy import Conditional
from patchflow.errors import InputError

# What a bin without a photon counts as: the logarithm needs a number.
NO_PHOTON = 0.1


class PoissonNoise(Conditional):
    r"""Counts of photons, after the logarithm.

    Up to a constant of the counts :math:`N = N_0 e^{-\mu b}` the negative logarithm of its density is

    .. math:: \sum_i N_0 e^{-\mu a_i} + N_i (\mu a_i - \log N_0) = \sum_i N_i\,(e^{-\delta_i} - 1 + \delta_i) + c(N),
              \qquad \delta = \mu (a - b),

    whose second form, used here, does not cancel in float32.

    Args:
        photons: Mean number :math:`N_0` of photons per bin without an object.
        scale: The attenuation :math:`\mu` that 1 stands for; 1 if the line integrals have no unit.

    Raises:
        InputError: If one of them is not positive.
    """

    def __init__(self, photons: float | int, scale: float | int = 1.0) -> None:
        super().__init__()
        if not (0 < photons < math.inf and 0 < scale < math.inf):
            raise InputError(
                f"Got {photons} photons and the attenuation scale {scale}; both must be positive and finite."
            )
        self.photons, self.scale = float(photons), float(scale)

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Count photons; a bin without any counts as :data:`NO_PHOTON`. See :meth:`Conditional.draw`."""
        counts = torch.poisson(self.counts(a)).clamp_min(NO_PHOTON)
        b = -(counts / self.photons).log() / self.scale
        return b, self.log_prob(b, a)

    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """The logarithm of the counts' probability; see :meth:`Conditional.log_prob`."""
        counts = self.counts(b)
        delta = self.scale * (a - b)
        at_best = torch.xlogy(counts, counts) - counts - torch.lgamma(counts + 1)
        return (at_best - counts * (torch.expm1(-delta) + delta)).flatten(1).sum(1)

    def counts(self, a: Tensor) -> Tensor:
        r"""The mean counts :math:`N_0 e^{-\mu a}` of line integrals, or the counts of a measurement."""
        return self.photons * torch.exp(-self.scale * a)


class CountWeightedNoise(PoissonNoise):
    r"""The quadratic approximation of :class:`PoissonNoise`, :math:`b_i \sim N(a_i, 1 / (\mu^2 N_i))`.

    The negative logarithm of its density is :math:`\sum_i \tfrac12 \mu^2 N_i (a_i - b_i)^2` up to a constant: a
    weighted least-squares problem, since the counts :math:`N_i = N_0 e^{-\mu b_i}` are those of the measurement.
    """

    def draw(self, a: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add normal noise with the variance of the mean counts; see :meth:`Conditional.draw`."""
        b = a + torch.randn_like(a) / (self.scale * self.counts(a).sqrt())
        return b, self.log_prob(b, a)

    def log_prob(
        self, b: Tensor, a: Tensor, condition: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """The log-density with the counts of the measurement; see :meth:`Conditional.log_prob`."""
        precision = self.scale**2 * self.counts(b)
        terms = precision * (b - a).square() - (precision / (2 * math.pi)).log()
        return -0.5 * terms.flatten(1).sum(1)
